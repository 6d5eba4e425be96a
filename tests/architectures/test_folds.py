"""Every fold is exact: folded and unfolded SAEs agree on raw activations, path by path, for every two values of two options.

float64 throughout, so that the tolerance (1e-9 relative) is far above rounding and far below any wrong rule (which was
measured at 0.6 to 2.8).
"""

from copy import deepcopy
from dataclasses import fields
from typing import Any

import pytest
import torch
from builders import covering_pairs
from sae_lens import SAE, BatchTopKTrainingSAE

from sae_nfm import JointNFMSAE, JointNFMSAEConfig, JointNFMTrainingSAE, JointNFMTrainingSAEConfig
from sae_nfm.architectures.joint_sae import NFMDecoder

D_IN, D_SAE, K = 6, 13, 5
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
OPTIONS = {
    "nfm_top_k": (None, 1, 3, K),
    "head": ("fm", "mlp", "none", "bilinear"),
    "normalize_activations": ("none", "layer_norm", "constant_norm_rescale"),
    "rescale_acts_by_decoder_norm": (True, False),
    "use_linear_path": (True, False),
    "use_square_path": (True, False),
    "apply_b_dec_to_input": (True, False),
    "selection_stages": (1, 3),
    "selection_candidates": (None, K + 2),
    "refinement_steps": (0, 1),
    "encoder": ("topk", "batchtopk", "jumprelu"),
}


def every_option(training: tuple[bool, ...] = (True, False), **fixed: Any) -> pytest.MarkDecorator:
    """`sae` is a training or inference SAE with random weights: any two values of two options are together in one."""
    axes = {"training": training} | {name: values for name, values in OPTIONS.items() if name not in fixed}
    rows = covering_pairs(**axes)
    settings = [dict(zip(axes, row.values, strict=True)) | fixed for row in rows]
    return pytest.mark.parametrize("sae", settings, ids=[row.id for row in rows], indirect=True)


@pytest.fixture
def sae(request) -> NFMDecoder:
    options = dict(request.param)
    sae_class, config_class = (
        (JointNFMTrainingSAE, JointNFMTrainingSAEConfig)
        if options.pop("training")
        else (JointNFMSAE, JointNFMSAEConfig)
    )
    training = config_class is JointNFMTrainingSAEConfig
    if options["encoder"] != "topk":  # stages are TopK's
        options["selection_stages"], options["selection_candidates"] = 1, None
        if not training:
            options["encoder"] = "jumprelu"
        elif options["rescale_acts_by_decoder_norm"]:  # which SAELens's jumprelu does not do in training
            options["encoder"] = "batchtopk"
    if options["encoder"] != "jumprelu":
        options["k"] = K
    cfg = config_class(d_in=D_IN, d_sae=D_SAE, nfm_dim=4, square_scale=1.7, dtype="float64", **options)
    sae = randomised(sae_class(cfg), 0)
    if hasattr(sae, "threshold"):  # some above all activations, some below
        sae.threshold.data = sae.threshold.abs() / 2
    return sae


def randomised(sae: NFMDecoder, seed: int) -> NFMDecoder:
    generator = torch.Generator().manual_seed(seed)
    size = (
        0.3 if sae.inferring() else 1.0
    )  # larger ones make each stage's activations many times those of the one before
    for parameter in sae.parameters():
        parameter.data = size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return sae


def settled(sae: NFMDecoder, x: torch.Tensor) -> NFMDecoder:
    """The SAE, with the threshold of a batchtopk between what it chooses of these activations and what not."""
    if isinstance(sae, BatchTopKTrainingSAE):
        steps, sae.cfg.refinement_steps = sae.cfg.refinement_steps, 0
        acts, pre = sae.encode_with_hidden_pre(x)
        sae.topk_threshold.copy_((acts[acts > 0].min() + pre[acts == 0].max().clamp(min=0)) / 2)
        sae.cfg.refinement_steps = steps
    return sae


def raw_activations(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(20, D_IN, generator=generator, dtype=torch.float64) + 1


def paths(sae: NFMDecoder, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return sae.decode_paths(sae.encode(x)).present()


def assert_same_paths(folded, unfolded, map_back=lambda path, name: path):
    assert folded.keys() == unfolded.keys()
    for name, path in unfolded.items():
        torch.testing.assert_close(folded[name], map_back(path, name), **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@every_option(normalize_activations="expected_average_only_in")
@pytest.mark.parametrize("factor", [0.3, 2.5])
@torch.no_grad()
def test_fold_activation_norm_scaling_factor(sae, factor):
    x = raw_activations()
    folded = deepcopy(sae)
    folded.fold_activation_norm_scaling_factor(factor)
    assert folded.cfg.normalize_activations == "none"
    torch.testing.assert_close(folded(x), sae(x * factor) / factor, **CLOSE)
    assert_same_paths(paths(folded, x), paths(sae, x * factor), lambda path, name: path / factor)


@every_option(normalize_activations="covariance_whitening", refinement_steps=0)
@torch.no_grad()
def test_fold_activation_whitening(sae):
    x = raw_activations()
    generator = torch.Generator().manual_seed(2)
    whiten = torch.randn(D_IN, D_IN, generator=generator, dtype=torch.float64) + 2 * torch.eye(D_IN)
    unwhiten, mean = torch.linalg.inv(whiten), torch.randn(D_IN, generator=generator, dtype=torch.float64)
    folded = deepcopy(sae)
    folded.fold_activation_whitening(mean, whiten, unwhiten)
    z = (x - mean) @ whiten
    torch.testing.assert_close(folded(x), sae(z) @ unwhiten + mean, **CLOSE)
    assert_same_paths(
        paths(folded, x),
        paths(sae, z),
        lambda path, name: path @ unwhiten + (mean if name == "direct" else 0),
    )


@every_option(rescale_acts_by_decoder_norm=True)
@torch.no_grad()
def test_fold_decoder_norm(sae):
    x = raw_activations()
    folded = deepcopy(sae)
    folded.fold_W_dec_norm()
    torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(D_SAE, dtype=torch.float64), **CLOSE)
    assert_same_paths(paths(folded, x), paths(sae, x))
    # convention: the NFM and whoever clamps see the same activations before and after
    torch.testing.assert_close(folded.encode(x), sae.encode(x), **CLOSE)


@every_option(rescale_acts_by_decoder_norm=True, normalize_activations="expected_average_only_in")
@pytest.mark.parametrize("factor", [0.3, 2.5])
@torch.no_grad()
def test_folds_compose(sae, factor):
    x = raw_activations()
    expected = sae(x * factor) / factor
    norm_first, factor_first = deepcopy(sae), deepcopy(sae)
    norm_first.fold_W_dec_norm()
    norm_first.fold_activation_norm_scaling_factor(factor)
    factor_first.fold_activation_norm_scaling_factor(factor)
    factor_first.fold_W_dec_norm()
    torch.testing.assert_close(norm_first(x), expected, **CLOSE)
    torch.testing.assert_close(factor_first(x), expected, **CLOSE)


@every_option(training=(True,))
@torch.no_grad()
def test_saving_for_inference(sae, tmp_path):
    x = raw_activations()
    settled(sae, x).save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, JointNFMSAE)
    assert_same_paths(paths(loaded, x), paths(sae, x))
    torch.testing.assert_close(loaded(x), sae(x), **CLOSE)
    # norms survive, whether they stayed in W_dec or went into the encoder
    torch.testing.assert_close(loaded.trained_W_dec_norm(), sae.W_dec.norm(dim=-1), **CLOSE)


@every_option()
@torch.no_grad()
def test_trained_decoder_norms_survive_every_fold(sae):
    norms = sae.W_dec.norm(dim=-1)
    torch.testing.assert_close(sae.trained_W_dec_norm(), norms, **CLOSE)
    if sae.cfg.rescale_acts_by_decoder_norm:
        folded = deepcopy(sae)
        folded.fold_W_dec_norm()
        torch.testing.assert_close(folded.trained_W_dec_norm(), norms, **CLOSE)
        eye = torch.eye(D_IN, dtype=torch.float64)
        folded.fold_activation_whitening(torch.zeros(D_IN, dtype=torch.float64), 2 * eye, eye / 2)
        torch.testing.assert_close(folded.trained_W_dec_norm(), norms, **CLOSE)


@every_option(use_linear_path=True, nfm_top_k=None)
@torch.no_grad()
def test_fold_linear_path_is_the_same_function_in_the_canonical_gauge(sae):
    x = raw_activations()
    folded = deepcopy(sae)
    folded.fold_linear_path()
    torch.testing.assert_close(folded(x), sae(x), **CLOSE)
    torch.testing.assert_close(folded.encode(x), sae.encode(x), **CLOSE)
    before, after = paths(sae, x), paths(folded, x)
    torch.testing.assert_close(after["direct"], before["direct"] + before["linear"], **CLOSE)
    assert (after["linear"] == 0).all()


@every_option(use_linear_path=True, nfm_top_k=None)
@torch.no_grad()
def test_the_canonical_gauge_does_not_depend_on_where_one_started(sae):
    if sae.cfg.rescale_acts_by_decoder_norm:
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False
    shifted = deepcopy(sae)
    shift = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    shifted.W_dec.data += shift
    shifted.W_lin.data -= shift
    x = raw_activations()
    torch.testing.assert_close(shifted(x), sae(x), **CLOSE)
    for one in (sae, shifted):
        one.fold_linear_path()
    torch.testing.assert_close(shifted.W_dec, sae.W_dec, **CLOSE)


def build(**options) -> JointNFMSAE:
    return randomised(
        JointNFMSAE(
            JointNFMSAEConfig(**({"d_in": D_IN, "d_sae": D_SAE, "k": K, "nfm_dim": 4, "dtype": "float64"} | options))
        ),
        0,
    )


def test_fold_linear_path_says_why_it_cannot():
    with pytest.raises(ValueError, match=r"nfm_top_k.*\b3\b.*\bNone\b"):
        build(nfm_top_k=3).fold_linear_path()
    with pytest.raises(ValueError, match="linear path"):
        build(use_linear_path=False).fold_linear_path()


def test_fold_decoder_norm_is_refused_without_rescaling():
    # the class of error that SAELens's TopK raises, whose method this is
    with pytest.raises(NotImplementedError, match=r"rescale_acts_by_decoder_norm\b.*\bFalse\b"):
        build(rescale_acts_by_decoder_norm=False).fold_W_dec_norm()
    with pytest.raises(NotImplementedError, match=r"nfm_top_k = 3"):
        build(k=None, encoder="jumprelu", nfm_top_k=3).fold_W_dec_norm()


@every_option(training=(False,), nfm_top_k=None, rescale_acts_by_decoder_norm=False, encoder="jumprelu")
@torch.no_grad()
def test_fold_decoder_norm_of_features_above_a_threshold(sae):
    """Without rescaling their activations grow by the norms, and what the NFM makes of them stays."""
    x, norms = raw_activations(), sae.W_dec.norm(dim=-1)
    folded = deepcopy(sae)
    folded.fold_W_dec_norm()
    torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(D_SAE, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(folded.threshold, sae.threshold * norms)
    torch.testing.assert_close(folded.encode(x), sae.encode(x) * norms, **CLOSE)
    assert_same_paths(paths(folded, x), paths(sae, x))
    torch.testing.assert_close(folded.trained_W_dec_norm(), norms, **CLOSE)


def test_permuting_the_features_changes_nothing():
    sae = build(nfm_top_k=3, use_square_path=True)
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(3))
    permuted = deepcopy(sae)
    for name in ("W_dec", "b_enc", "W_lin", "V", "U"):
        getattr(permuted, name).data = getattr(sae, name).data[order]
    permuted.W_enc.data = sae.W_enc.data[:, order].contiguous()
    x = raw_activations()
    torch.testing.assert_close(permuted(x), sae(x), **CLOSE)


@torch.no_grad()
def test_decode_is_the_formula():
    """x_hat against the formula written out for one token, feature by feature."""
    sae = build(nfm_top_k=3, use_square_path=True, square_scale=1.7, apply_b_dec_to_input=False)
    x = raw_activations()[:1]
    pre = (x @ sae.W_enc + sae.b_enc).squeeze()
    active = pre.topk(K).indices[pre.topk(K).values > 0]
    f = {int(i): pre[i] for i in active}
    strongest = sorted(f, key=lambda i: -float(f[i]))[:3]
    direct = sum(f[i] * sae.W_dec[i] for i in f) + sae.b_dec
    linear = sum(f[i] * sae.W_lin[i] for i in strongest) + sae.b_lin
    square = sum(f[i] ** 2 * sae.U[i] for i in f) / 1.7
    z = sum(f[i] * f[j] * sae.V[i] * sae.V[j] for a, i in enumerate(strongest) for j in strongest[a + 1 :])
    inter = (z @ sae.W_1 + sae.b_1).relu() @ sae.W_2 + sae.b_2
    assert len(strongest) == 3
    torch.testing.assert_close(sae(x).squeeze(), direct + linear + square + inter, **CLOSE)


def test_every_option_of_the_config_is_drawn():
    """The options above are all fields that change what decode computes."""
    decoding = {field.name for field in fields(JointNFMSAEConfig)} - {
        "d_in", "d_sae", "dtype", "device", "metadata", "nfm_dim", "square_scale", "k",
        "reshape_activations", "kernel",
    }  # fmt: skip
    assert decoding == OPTIONS.keys()


@every_option(nfm_top_k=None, use_linear_path=True)
def test_an_exported_sae_has_one_decoder_and_the_same_output(sae, tmp_path):
    x = raw_activations()
    if isinstance(sae, JointNFMTrainingSAE):
        settled(sae, x).save_inference_model(tmp_path, folded=True)
    else:
        sae.folded().save_model(tmp_path)
    exported = SAE.load_from_disk(tmp_path)
    assert not exported.cfg.use_linear_path
    assert exported.W_dec.numel() == sae.W_dec.numel()
    before, after = (
        sum(p.numel() for name, p in one.named_parameters() if name != "threshold") for one in (sae, exported)
    )
    assert before - after == (D_SAE + 1) * D_IN
    torch.testing.assert_close(exported(x), sae(x), **CLOSE)


def test_an_export_that_cannot_be_folded_writes_nothing(tmp_path):
    cfg = JointNFMTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, nfm_dim=4, nfm_top_k=3)
    sae = JointNFMTrainingSAE(cfg)
    with pytest.raises(ValueError, match="cannot be folded"):
        sae.save_inference_model(tmp_path / "sae", folded=True)
    assert not (tmp_path / "sae").exists()
