"""The dead-feature loss from the kernels against SAELens's."""

from dataclasses import replace

import pytest
import torch
from builders import random_activations, random_sae, training_config
from kernel_inputs import D_IN, D_SAE, TIGHT, encoder, gradients, randoms
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import act_times_W_dec, calculate_topk_aux_acts
from torch import Tensor

from sae_nfm.kernels import dispatch
from sae_nfm.kernels.reference import SparseActs


def dead_loss(kernel: str, inputs: list[Tensor], dead: Tensor, k_aux: int) -> Tensor:
    """SAELens's reconstruction by dead features, from its own functions or from ours."""
    x, W_enc, b_enc, W_dec = inputs
    norms = W_dec.norm(dim=-1)
    if kernel == "saelens":
        hidden_pre = (x @ W_enc + b_enc) * norms
        acts = calculate_topk_aux_acts(min(k_aux, int(dead.sum())), hidden_pre, dead)
        return act_times_W_dec(acts, W_dec, True)
    ours = dispatch.top_dead(x, W_enc, b_enc, norms, dead, k_aux, kernel=kernel)
    rows = (W_dec / norms[:, None])[ours.features]
    return dispatch.weighted_rows(ours.acts, rows)


@pytest.mark.parametrize(
    ("n_dead", "k_aux", "form"),
    [(1, 3, Tensor), (3, 3, Tensor), (5, 3, Tensor), (30, 3, SparseActs), (D_SAE, 3, SparseActs)],
)
@pytest.mark.parametrize("batch", [(7,), (2, 3)])
def test_dead_features_as_in_saelens(n_dead, k_aux, form, batch):
    inputs = randoms((*batch, D_IN), (D_IN, D_SAE), (D_SAE,), (D_SAE, D_IN))
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(n_dead))[:n_dead]] = True
    expected = dead_loss("saelens", inputs, dead, k_aux)
    for kernel in ("sparse", "dense"):
        ours = dead_loss(kernel, inputs, dead, k_aux)
        torch.testing.assert_close(ours, expected, **TIGHT)
        torch.testing.assert_close(
            gradients(ours, inputs), gradients(dead_loss("saelens", inputs, dead, k_aux), inputs), **TIGHT
        )
    sparse, dense = (dispatch.top_dead(*inputs[:3], None, dead, k_aux, kernel=kernel) for kernel in ("sparse", "dense"))
    assert isinstance(sparse.acts, form)
    assert torch.equal(sparse.features, dead.nonzero()[:, 0])
    assert torch.equal(dense.features, torch.arange(D_SAE))


def test_dead_features_without_scale():
    x, W_enc, b_enc, _ = encoder(scaled=False)
    dead = torch.arange(D_SAE) % 2 == 0
    ours = dispatch.top_dead(x, W_enc, b_enc, None, dead, 4)
    expected = calculate_topk_aux_acts(4, x @ W_enc + b_enc, dead)[:, ours.features]
    torch.testing.assert_close(dispatch.to_dense(ours.acts, 19), expected, **TIGHT)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("n_dead", [0, 20])
def test_every_gradient_of_a_training_step_equals_saelens(rescale, n_dead):
    """b_dec through the encoder's input, W_dec through the scale, all through the dead-feature loss: none is dropped."""
    cfg = TopKTrainingSAEConfig(d_in=8, d_sae=D_SAE, k=3, rescale_acts_by_decoder_norm=rescale, dtype="float64")
    sae = TopKTrainingSAE(cfg)
    with torch.no_grad():
        for parameter, values in zip(sae.parameters(), randoms(*(p.shape for p in sae.parameters())), strict=True):
            parameter.copy_(values)
    (x,) = randoms((9, 8), seed=5)
    dead = torch.arange(D_SAE) < n_dead
    step = TrainStepInput(x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)
    sae.training_forward_pass(step).loss.backward()

    W_enc, b_enc, W_dec, b_dec = (
        p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    )
    norms = dispatch.row_norms(W_dec)[0] if rescale else None
    acts = dispatch.encode(x - b_dec, W_enc, b_enc, norms, 3)
    unscaled = acts if norms is None else SparseActs(acts.indices, acts.values / norms[acts.indices])
    out = dispatch.weighted_rows(unscaled, W_dec) + b_dec
    loss = (out - x).square().sum(dim=-1).mean()
    if n_dead:
        aux = dispatch.top_dead(x - b_dec, W_enc, b_enc, norms, dead, 4)  # d_in / 2
        rows = (W_dec if norms is None else W_dec / norms[:, None])[aux.features]
        # the residual is x - out, not x - b_dec - out: SAELens passes the step's input
        loss = loss + (dispatch.weighted_rows(aux.acts, rows) - (x - out).detach()).square().sum(dim=-1).mean()
    loss.backward()
    for ours, theirs in zip((W_enc, b_enc, W_dec, b_dec), (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("dead", [None, torch.zeros(32, dtype=torch.bool)], ids=["not counted yet", "none dead"])
def test_without_a_dead_feature_there_is_no_dead_feature_loss(kernel, normalize, dead):
    sae = random_sae(training_config("joint_nfm", kernel=kernel, normalize_activations=normalize))
    x = random_activations()
    step = TrainStepInput(x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)
    assert sae.training_forward_pass(step).losses["auxiliary_reconstruction_loss"] == 0
    some = replace(step, dead_neuron_mask=torch.arange(32) < 20)
    assert sae.training_forward_pass(some).losses["auxiliary_reconstruction_loss"] > 0
