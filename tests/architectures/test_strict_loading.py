"""Saving and loading: what is saved comes back, on a real device, and anything damaged is refused by name."""

import json
import re

import pytest
import torch
from builders import (
    ARCHITECTURES,
    D_SAE,
    WITH_ENCODER,
    inference_sae,
    random_activations,
    random_sae,
    runner_config,
    tiny_model,
    token_dataset,
    training_config,
)
from sae_lens import SAE, LanguageModelSAETrainingRunner, TopKSAE, TopKSAEConfig, TrainingSAE, registry
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.util import temporary_seed
from safetensors.torch import load_file, save_file

from sae_nfm import JointNFMSAE, JointNFMTrainingSAE
from sae_nfm.common.files import DIGESTS_FILENAME
from sae_nfm.loading import load_sae

for_every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
DOORS = pytest.mark.parametrize("door", [SAE, JointNFMSAE], ids=["SAE", "JointNFMSAE"])


@pytest.fixture
def saved(tmp_path):
    """The folder of a sound SAE, without the digests that would show any change before it is read."""
    inference_sae(training_config("joint_nfm")).save_model(tmp_path)
    (tmp_path / DIGESTS_FILENAME).unlink()
    return tmp_path


def change_config(folder, **changes):
    path = folder / SAE_CFG_FILENAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, **changes):
    """Replace tensors; None takes one out."""
    path = folder / SAE_WEIGHTS_FILENAME
    weights = load_file(path) | changes
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)


def weights_message(*problems):
    """All of them, and how to get a sound SAE."""
    return "".join(f"{problem}.*" for problem in problems) + r"\bsave_model\b.*\bsave_inference_model\b"


@for_every_architecture
@pytest.mark.parametrize("as_text", [False, True])
def test_round_trip_of_an_inference_sae(architecture, as_text, tmp_path):
    sae = inference_sae(training_config(architecture, normalize_activations="layer_norm"))
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(str(tmp_path) if as_text else tmp_path)
    assert type(loaded) is type(sae)
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()
    x = random_activations()
    assert torch.equal(loaded(x), sae(x))


@pytest.mark.parametrize("architecture", WITH_ENCODER)
@pytest.mark.parametrize("rescale", [True, False])
def test_inference_model_of_a_training_sae_is_the_same_function(architecture, rescale, tmp_path):
    sae = random_sae(training_config(architecture, rescale_acts_by_decoder_norm=rescale))
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    x = random_activations()
    # Saving folds decoder norms into the encoder: the same function in another order of float32 operations.
    torch.testing.assert_close(loaded(x), sae(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.trained_W_dec_norm(), sae.W_dec.norm(dim=-1).detach())


@for_every_architecture
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float64"])
def test_nothing_stays_on_the_meta_device(architecture, dtype, tmp_path):
    inference_sae(training_config(architecture)).save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path, "cpu", dtype)
    tensors = [*loaded.parameters(), *loaded.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    wanted = torch.float32 if dtype is None else getattr(torch, dtype)
    assert {tensor.dtype for tensor in tensors} == {wanted}
    assert (loaded.cfg.device, loaded.device, loaded.dtype) == ("cpu", torch.device("cpu"), wanted)
    assert loaded(random_activations()).dtype == wanted


@pytest.mark.parametrize("architecture", WITH_ENCODER)
def test_every_saved_tensor_is_contiguous(architecture, tmp_path):
    sae = random_sae(training_config(architecture, normalize_activations="covariance_whitening"))
    sae.fold_activation_whitening(torch.ones(16), 2 * torch.eye(16), torch.eye(16) / 2)
    assert all(tensor.is_contiguous() for tensor in sae.state_dict().values())
    sae.save_inference_model(tmp_path)  # safetensors refuses any other
    assert set(load_file(tmp_path / SAE_WEIGHTS_FILENAME)) == set(sae.state_dict())
    assert set(inference_sae(training_config(architecture)).state_dict()) == set(sae.state_dict())


@for_every_architecture
def test_checkpoint_is_loaded_and_resumed(architecture, tmp_path):
    cfg = training_config(architecture, normalize_activations="expected_average_only_in")
    model, settings = tiny_model(), {"override_dataset": token_dataset(64)}
    first = runner_config(
        cfg, tmp_path / "first", steps=4, n_checkpoints=1, checkpoint_path=str(tmp_path / "checkpoints")
    )
    with temporary_seed(0):
        LanguageModelSAETrainingRunner(first, override_model=model, **settings).run()
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*")

    fresh = TrainingSAE.from_dict(cfg.to_dict())
    fresh.load_weights_from_checkpoint(checkpoint)
    loaded = TrainingSAE.load_from_disk(checkpoint)
    assert type(loaded) is registry.get_sae_training_class(architecture)[0]
    saved = load_file(checkpoint / SAE_WEIGHTS_FILENAME)
    for sae in (fresh, loaded):
        assert all(torch.equal(tensor, saved[name]) for name, tensor in sae.state_dict().items())

    again = runner_config(cfg, tmp_path / "again", steps=4, resume_from_checkpoint=str(checkpoint))
    with temporary_seed(0):
        resumed = LanguageModelSAETrainingRunner(again, override_model=model, **settings).run()
    assert resumed.cfg.normalize_activations == "none"
    assert not torch.equal(resumed.W_lin, saved["W_lin"])


@for_every_architecture
def test_training_checkpoint_opens_as_an_inference_sae(architecture, tmp_path):
    sae = random_sae(training_config(architecture))
    sae.save_model(tmp_path)  # what a checkpoint holds; SAELens loads it so for each of its own architectures
    x = random_activations()
    assert torch.equal(SAE.load_from_disk(tmp_path)(x), sae(x))


@DOORS
def test_sound_folder_is_accepted(door, saved):
    assert type(door.load_from_disk(saved)) is JointNFMSAE


@DOORS
def test_unknown_key(door, saved):
    change_config(saved, nfm_topk=3)
    with pytest.raises(ValueError, match=r"\bkey 'nfm_topk'.*\bjoint_nfm\b.*\bJointNFMSAEConfig\b"):
        door.load_from_disk(saved)


@DOORS
def test_missing_key_that_decoding_needs(door, saved):
    path = saved / SAE_CFG_FILENAME
    config = json.loads(path.read_text())
    del config["square_scale"]  # the default, 1.0, would be another function
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"cfg\.json lacks 'square_scale'.*\bjoint_nfm\b"):
        door.load_from_disk(saved)


@DOORS
def test_truncated_config(door, saved):
    path = saved / SAE_CFG_FILENAME
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=r"cfg\.json is not JSON\b.*\bsave\b"):
        door.load_from_disk(saved)


@DOORS
def test_missing_tensor(door, saved):
    change_weights(saved, V=None, b_lin=None)
    with pytest.raises(ValueError, match=weights_message("'V' is missing", "'b_lin' is missing")):
        door.load_from_disk(saved)


@DOORS
def test_extra_tensor(door, saved):
    change_weights(saved, W_3=torch.zeros(2))
    with pytest.raises(ValueError, match=weights_message("'W_3' is unknown")):
        door.load_from_disk(saved)


@DOORS
def test_tensor_of_a_path_that_the_config_switches_off(door, saved):
    change_config(saved, use_square_path=False)
    with pytest.raises(ValueError, match=weights_message("'U' is unknown")):
        door.load_from_disk(saved)


@DOORS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_not_finite(door, value, saved):
    b_2 = torch.zeros(16)
    b_2[3] = value
    change_weights(saved, b_2=b_2)
    with pytest.raises(ValueError, match=weights_message("'b_2' .*not finite")):
        door.load_from_disk(saved)


@DOORS
def test_wrong_shape(door, saved):
    change_weights(saved, V=torch.zeros(D_SAE, 9))
    with pytest.raises(ValueError, match=weights_message(rf"'V' .*\({D_SAE}, 9\).*\({D_SAE}, 8\)")):
        door.load_from_disk(saved)


@DOORS
@pytest.mark.parametrize("kept", [0, 100, 0.5])
def test_truncated_weight_file(door, kept, saved):
    path = saved / SAE_WEIGHTS_FILENAME
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=rf"{re.escape(repr(str(saved)))}.*\bdamaged\b"):
        door.load_from_disk(saved)


@DOORS
@pytest.mark.parametrize("name", [SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME])
def test_missing_file(door, name, saved):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        door.load_from_disk(saved)


@DOORS
def test_missing_folder(door, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "nothing"))):
        door.load_from_disk(tmp_path / "nothing")


def test_checkpoint_weights_are_checked_too(saved):
    change_weights(saved, W_1=None)
    with pytest.raises(ValueError, match=weights_message("'W_1' is missing")):
        random_sae(training_config("joint_nfm")).load_weights_from_checkpoint(saved)
    with pytest.raises(ValueError, match=weights_message("'W_1' is missing")):
        JointNFMTrainingSAE.load_from_disk(saved)


def test_other_architectures_load_as_before(tmp_path):
    """Only our architectures pass through the strict layer: SAELens drops a key it does not know."""
    sae_class, cfg_class = registry.get_sae_training_class("topk")
    sae = sae_class(cfg_class(d_in=16, d_sae=D_SAE, k=4))
    sae.save_inference_model(tmp_path)
    change_config(tmp_path, a_key_of_the_future=1)
    x = random_activations()
    torch.testing.assert_close(SAE.load_from_disk(tmp_path)(x), sae(x))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cfg.json", b"{"),
        ("cfg.json", b'{"architecture": "\xff"}'),
        ("cfg.json", b"[]"),
        ("cfg.json", b'{"architecture": "topk"}'),
        ("cfg.json", b'{"architecture": "unheard_of", "d_in": 4}'),
        ("cfg.json", b'{"architecture": ["topk"]}'),
        ("sae_weights.safetensors", b"\x00" * 40),
        ("sae_weights.safetensors", b""),
        ("sae_weights.safetensors", b"\xff" * 8 + b"{}"),
    ],
)
def test_a_damaged_sae_of_any_architecture_is_named(tmp_path, name, content):
    TopKSAE(TopKSAEConfig(d_in=4, d_sae=8, k=2)).save_model(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_sae(str(tmp_path))
