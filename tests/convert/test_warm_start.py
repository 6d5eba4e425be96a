"""A joint_nfm that begins as a trained TopK or JumpReLU SAE."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    CONTEXT,
    D_MODEL,
    HOOK,
    HOOK_Z,
    inference_sae,
    random_activations,
    random_sae,
    runner_config,
    tiny_model,
    token_dataset,
    training_config,
)
from checkpoint_writers import topk_in_training
from sae_lens import SAE, BatchTopKTrainingSAEConfig, LanguageModelSAETrainingRunner, TopKSAE
from sae_lens.training.activation_scaler import ActivationScaler

from sae_nfm import JointNFMSAE
from sae_nfm.architectures.joint_training import JointNFMTrainingSAE
from sae_nfm.convert.run import ConvertConfig, convert
from sae_nfm.convert.warm_start import warm_started, with_silent_nfm
from sae_nfm.hub.release import FolderSource, register_release, release_entry

SOURCES: dict[str, Callable[[Path], Any]] = {
    "object in training": lambda _: topk_in_training(),
    "object": lambda folder: SAE.load_from_disk(folder),
    "folder": lambda folder: folder,
    "text": lambda folder: str(folder),
    "release": lambda _: "warm-start-test:a",
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("fields", [{}, {"nfm_top_k": 2, "head": "mlp"}, {"use_square_path": True}])
def test_every_source_gives_the_saes_features_and_nearly_its_output(
    tmp_path: Path, source: str, fields: dict[str, Any]
) -> None:
    topk = topk_in_training()
    topk.save_inference_model(tmp_path / "a")
    entry = release_entry(tmp_path / "a", sae_id="a")
    register_release(
        "warm-start-test", model="tiny", source=FolderSource(folder=str(tmp_path)), saes=[entry], replace=True
    )
    sae = warm_started(SOURCES[source](tmp_path / "a"), nfm_dim=8, **fields)
    assert isinstance(sae, JointNFMTrainingSAE)
    x = random_activations(40, 5)
    # saving for inference divides the decoder norms out, so the weights are others and the features the same up to rounding
    torch.testing.assert_close(sae.encode(x), topk.encode(x), rtol=1e-5, atol=1e-5)
    # 3 features of size 2 times W_lin of 0.01 beside outputs of size 1
    assert (sae(x) - topk(x)).norm() < 0.1 * topk(x).norm()
    assert not torch.equal(sae(x), topk(x))
    assert sae.cfg.metadata.hook_name == HOOK
    assert sae.cfg.metadata.training_architecture == "joint_nfm"
    assert torch.equal(sae.folded_W_dec_norm, torch.ones(11))


@pytest.mark.parametrize(
    "taken",
    [
        {"k": 1, "rescale_acts_by_decoder_norm": False},
        {"k": 5, "apply_b_dec_to_input": False},
        {"normalize_activations": "layer_norm"},
        {"normalize_activations": "constant_norm_rescale"},
    ],
)
def test_without_initial_scales_it_is_the_sae_to_the_bit(taken: dict[str, Any]) -> None:
    topk = topk_in_training(**taken)
    sae, x = warm_started(topk, nfm_weight_init_std=0.0, nfm_dropout=0.3), random_activations(40, 5)
    assert torch.equal(sae.encode(x), topk.encode(x))
    assert torch.equal(sae(x), topk(x))
    assert {name: getattr(sae.cfg, name) for name in taken} == taken
    assert warm_started(topk, **taken).cfg.k == topk.cfg.k  # what says the same is welcome


def test_a_jumprelu_gives_its_thresholds(tmp_path: Path) -> None:
    """Also as a folder of SAELens's batchtopk, and through `convert`."""
    batch = random_sae(BatchTopKTrainingSAEConfig(d_in=5, d_sae=11, k=2.5))
    batch.topk_threshold.fill_(0.7)
    batch.save_inference_model(tmp_path / "a")
    start, x = SAE.load_from_disk(tmp_path / "a"), random_activations(40, 5)
    sae = warm_started(tmp_path / "a", nfm_weight_init_std=0.0, l0_coefficient=2.0, inference_refinement_steps=1)
    assert (sae.cfg.encoder, sae.cfg.k, sae.cfg.l0_coefficient) == ("jumprelu", None, 2.0)
    torch.testing.assert_close(sae.threshold, torch.full((11,), 0.7))
    assert torch.equal(sae.encode(x), start.encode(x))
    assert torch.equal(sae(x), start(x))
    told = convert(ConvertConfig(source=tmp_path / "a", output=tmp_path / "b", nfm_dim=4)).words()
    assert "to joint_nfm (d_in 5, d_sae 11, nfm_dim 4, nfm_top_k all)" in told
    silent = SAE.load_from_disk(tmp_path / "b")
    assert isinstance(silent, JointNFMSAE)
    assert torch.equal(silent(x), start(x))
    with pytest.raises(ValueError, match="k is 3"):
        warm_started(start, k=3)
    with pytest.raises(ValueError, match="batchtopk SAE: its threshold is in the finished SAE"):
        warm_started(batch)


def test_the_nfm_has_the_configs_scales_and_its_own_seed() -> None:
    topk, state = topk_in_training(d_in=32, d_sae=400), torch.random.get_rng_state()
    sae = warm_started(topk, nfm_dim=50, nfm_embedding_init_std=0.2, nfm_weight_init_std=0.03, seed=1)
    # 20,000 and 12,800 draws: the standard error of a deviation is below 1 %
    assert sae.V.std().item() == pytest.approx(0.2, rel=0.03)
    assert sae.W_lin.std().item() == pytest.approx(0.03, rel=0.03)
    assert not sae.b_lin.any()
    assert torch.equal(warm_started(topk, nfm_dim=50, nfm_embedding_init_std=0.2, seed=1).V, sae.V)
    assert not torch.equal(warm_started(topk, nfm_dim=50, nfm_embedding_init_std=0.2, seed=2).V, sae.V)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_sae_it_came_from_stays_as_it_is() -> None:
    topk = topk_in_training()
    sae = warm_started(topk)
    before = {name: tensor.clone() for name, tensor in topk.state_dict().items()}
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 1
    sae.cfg.metadata.hook_name = "elsewhere"
    assert all(torch.equal(tensor, before[name]) for name, tensor in topk.state_dict().items())
    assert topk.cfg.metadata.hook_name == HOOK


def test_type_and_device_can_be_chosen() -> None:
    assert warm_started(topk_in_training(), dtype="float64").W_enc.dtype == torch.float64
    assert warm_started(topk_in_training(dtype="float64")).V.dtype == torch.float64


def test_a_folders_checkpoint_is_folded(tmp_path: Path) -> None:
    topk, x = topk_in_training(normalize_activations="expected_average_only_in"), random_activations(40, 5)
    topk.save_model(tmp_path)
    ActivationScaler(scaling_factor=0.25).save(str(tmp_path / "activation_scaler.json"))
    sae = warm_started(tmp_path, nfm_weight_init_std=0.0)
    torch.testing.assert_close(sae(x), topk(0.25 * x) / 0.25, rtol=1e-5, atol=1e-5)  # the fold rounds each weight once
    assert sae.cfg.normalize_activations == "none"
    with pytest.raises(ValueError, match="normalize_activations 'expected_average_only_in'"):
        warm_started(topk)


def test_saelens_trains_it_further_without_a_scale(tmp_path: Path) -> None:
    topk = topk_in_training(d_in=D_MODEL, d_sae=32, k=4)
    sae = warm_started(topk, nfm_dim=8)
    start = sae.W_dec.detach().clone()
    cfg = runner_config(sae.cfg, tmp_path / "out", steps=3, lr=1e-4)
    data, model = token_dataset(40, CONTEXT), tiny_model()
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=data, override_model=model, override_sae=sae)
    trained = runner.run()
    assert 0 < (trained.W_dec - start).abs().max() < 1e-3  # three Adam steps of 1e-4 from where the SAE was
    loaded = SAE.load_from_disk(tmp_path / "out")
    assert loaded.cfg.architecture() == "joint_nfm"
    x = random_activations(40)
    torch.testing.assert_close(loaded(x), trained(x), rtol=1e-4, atol=1e-5)  # saving folds the decoder norms


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (lambda: random_sae(training_config("joint_nfm")), {}, r"\bjoint_nfm\b.*\bNFM already"),
        (lambda: inference_sae(training_config("joint_nfm")), {}, r"\bjoint_nfm\b.*\bNFM already"),
        (topk_in_training, {"k": 2}, r"\bk is 2\b.*\b3\b"),
        (topk_in_training, {"apply_b_dec_to_input": False}, r"apply_b_dec_to_input is False\b.*\bTrue\b"),
        (
            topk_in_training,
            {"normalize_activations": "expected_average_only_in"},
            r"normalize_activations is 'expected_average_only_in'.*\bscale\b",
        ),
        (topk_in_training, {"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        (topk_in_training, {"encoder": "batchtopk"}, "encoder is 'batchtopk', but the SAE to start from has 'topk'"),
        (topk_in_training, {"nfm_dimm": 2}, r"\bkey 'nfm_dimm'"),
        (topk_in_training, {"nfm_top_k": 4}, r"nfm_top_k .*\bk = 3\b.* 4\b"),
        (lambda: "nowhere", {}, "'nowhere'.*folder.*release:sae_id"),
    ],
)
def test_what_does_not_fit_is_an_error(make: Callable[[], Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        warm_started(make(), **fields)


def test_heads_stay_heads(tmp_path: Path) -> None:
    topk_in_training(d_in=6, hook_name=HOOK_Z, reshape_activations="hook_z").save_inference_model(tmp_path)
    topk, x = SAE.load_from_disk(tmp_path), torch.randn(4, 5, 2, 3, generator=torch.Generator().manual_seed(0))
    assert isinstance(topk, TopKSAE)
    silent = with_silent_nfm(topk, nfm_dim=4, use_square_path=True)
    assert torch.equal(silent(x), topk(x))
    assert silent(x).shape == x.shape
    staged = with_silent_nfm(topk, nfm_dim=4, selection_stages=2, inference_refinement_steps=1)
    assert (staged.cfg.selection_stages, staged.cfg.refinement_steps) == (2, 1)
    assert (staged(x) - x).square().sum() < (topk(x) - x).square().sum()
