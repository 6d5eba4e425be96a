"""A sequential NFM without its base, and what is said where a base is missing, damaged, another one, or harmful."""

import json
import pickle  # noqa: TID251 (what must not be executed)
import re
import shutil
from pathlib import Path

import pytest
import torch
from builders import D_MODEL, D_SAE, inference_sae, random_activations, random_sae, saved_base, training_config
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from safetensors.torch import load_file, save_file

from sae_nfm.architectures.sequential_config import SequentialNFMTrainingSAEConfig
from sae_nfm.architectures.sequential_training import SequentialNFMTrainingSAE
from sae_nfm.common.manifest import ManifestConfig, accept
from sae_nfm.convert.adapter import load_adapter, save_adapter
from sae_nfm.hub.release import FolderSource, register_release, release_entry


@pytest.fixture
def base(tmp_path) -> Path:
    """A base of the test's own, to be damaged."""
    return Path(shutil.copytree(saved_base(d_in=D_MODEL, d_sae=D_SAE, k=4), tmp_path / "base"))


@pytest.fixture
def sae(base):
    return inference_sae(SequentialNFMTrainingSAEConfig(base=str(base), nfm_dim=8))


def other_weights(folder: Path, change) -> None:
    weights = load_file(folder / SAE_WEIGHTS_FILENAME)
    change(weights)
    save_file(weights, folder / SAE_WEIGHTS_FILENAME)
    accept(ManifestConfig(path=str(folder / SAE_WEIGHTS_FILENAME)))  # what the SAE itself notices


def test_an_adapter_is_the_nfm_alone_and_loads_as_the_same_function(sae, tmp_path):
    folder, x = save_adapter(sae, tmp_path / "adapter"), random_activations()
    saved = load_file(folder / SAE_WEIGHTS_FILENAME)
    assert set(saved) == {"W_lin", "b_lin", "V", "W_1", "b_1", "W_2", "b_2"}
    assert torch.equal(SAE.load_from_disk(folder)(x), sae(x))
    assert not list(tmp_path.glob("*.partial"))


def test_an_adapter_of_a_training_sae_has_its_scale_folded_in(base, tmp_path):
    training = random_sae(SequentialNFMTrainingSAEConfig(base=str(base), nfm_dim=8))
    training.nfm_scale.fill_(3.0)
    x = random_activations()
    loaded = SAE.load_from_disk(save_adapter(training, tmp_path / "adapter"))
    torch.testing.assert_close(loaded(x), training(x), atol=1e-5, rtol=1e-5)


def test_an_adapter_whose_base_is_elsewhere(sae, base, tmp_path):
    folder, x = save_adapter(sae, tmp_path / "adapter"), random_activations()
    base.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=rf"\bbase '{re.escape(str(base))}'.*\bload_adapter\b"):
        SAE.load_from_disk(folder)
    assert torch.equal(load_adapter(folder, str(tmp_path / "moved"))(x), sae(x))
    assert torch.equal(load_adapter(folder, SAE.load_from_disk(tmp_path / "moved"))(x), sae(x))


def test_an_adapter_of_an_object_needs_a_name(base, tmp_path):
    x = random_activations()
    wrapped = SequentialNFMTrainingSAE.wrap(SAE.load_from_disk(base), nfm_dim=8)
    with pytest.raises(ValueError, match=r"\bobject\b.*\bgive base\b"):
        save_adapter(wrapped, tmp_path / "adapter")
    folder = save_adapter(wrapped, tmp_path / "adapter", base=str(base))
    assert torch.equal(SAE.load_from_disk(folder).encode(x), wrapped.encode(x))


def test_a_base_and_its_adapter_by_the_name_of_a_release(base, tmp_path):
    entry = release_entry(base, sae_id="topk")
    register_release("bases-of-this-test", model="tiny", source=FolderSource(folder=str(base.parent)), saes=[entry])
    sae = random_sae(SequentialNFMTrainingSAEConfig(base="bases-of-this-test:topk", nfm_dim=8))
    x = random_activations()
    assert torch.equal(sae.encode(x), SAE.load_from_disk(base).encode(x))
    folder = save_adapter(sae, tmp_path / "adapter")
    assert torch.equal(SAE.load_from_disk(folder).encode(x), sae.encode(x))


def test_an_adapter_of_another_base_is_not_written(sae, base, tmp_path):
    with torch.no_grad():
        sae.base.b_dec += 1
    with pytest.raises(ValueError, match=r"\bbase\b.*\bnot the one\b.*\bsha256\b"):
        save_adapter(sae, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_base_changed_by_one_bit(sae, base, tmp_path):
    folder = save_adapter(sae, tmp_path / "adapter")
    other_weights(base, lambda weights: weights["W_dec"].view(torch.int32)[0, 0].bitwise_xor_(1))
    with pytest.raises(ValueError, match=rf"\bbase '{re.escape(str(base))}' is not the one\b.*\brestore\b"):
        SAE.load_from_disk(folder)
    with pytest.raises(ValueError, match=r"\bbase\b.*\bnot the one\b.*\brestore\b"):
        load_adapter(folder, SAE.load_from_disk(base))


def test_a_self_contained_sae_changed_by_one_bit(sae, tmp_path):
    sae.save_model(tmp_path / "sae")
    other_weights(tmp_path / "sae", lambda weights: weights["base.W_dec"].view(torch.int32)[0, 0].bitwise_xor_(1))
    with pytest.raises(ValueError, match=r"\bbase\b.*\bnot the one\b"):
        SAE.load_from_disk(tmp_path / "sae")


def test_a_self_contained_sae_needs_no_base(sae, base, tmp_path):
    x = random_activations()
    sae.save_model(tmp_path / "sae")
    shutil.rmtree(base)
    assert torch.equal(SAE.load_from_disk(tmp_path / "sae")(x), sae(x))


def test_a_base_without_some_of_its_tensors(sae, tmp_path):
    sae.save_model(tmp_path / "sae")
    other_weights(tmp_path / "sae", lambda weights: weights.pop("base.W_enc"))
    with pytest.raises(ValueError, match=r"'base\.W_enc' is missing"):
        SAE.load_from_disk(tmp_path / "sae")


@pytest.mark.parametrize("name", [SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME])
def test_a_base_without_one_of_its_files(base, name):
    (base / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        SequentialNFMTrainingSAEConfig(base=str(base))


def test_a_truncated_base(base):
    weights = base / SAE_WEIGHTS_FILENAME
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"'{re.escape(str(base))}' is not a saved SAE that loads\b"):
        SequentialNFMTrainingSAEConfig(base=str(base))


class Harmful:
    """Unpickled, it makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return Path.touch, (self.made,)


@pytest.mark.parametrize("where", ["weights", "file"])
def test_a_pickle_is_not_executed(base, where, tmp_path):
    made, source = tmp_path / "made", base
    harmful = pickle.dumps({"W_enc": Harmful(made)})
    if where == "weights":
        (base / SAE_WEIGHTS_FILENAME).write_bytes(harmful)
    else:
        source = tmp_path / "base.pt"
        source.write_bytes(harmful)
    with pytest.raises(
        (ValueError, FileNotFoundError), match=rf"'{re.escape(str(source))}' is (not a saved SAE that loads|no folder)"
    ):
        SequentialNFMTrainingSAEConfig(base=str(source))
    assert not made.exists()
    pickle.loads(harmful)  # it would have
    assert made.exists()


def test_a_base_that_changed_since_the_config_was_made(base):
    config = training_config("sequential_nfm")
    config.base = str(base)
    sae = random_sae(config)
    assert sae.cfg.base_sha256  # the same base at another place
    other_weights(base, lambda weights: weights["b_dec"].add_(1))
    other = json.loads(json.dumps(config.to_dict()))
    with pytest.raises(ValueError, match=r"\bbase\b.*\bnot the one\b"):
        random_sae(SequentialNFMTrainingSAEConfig.from_dict(other))
