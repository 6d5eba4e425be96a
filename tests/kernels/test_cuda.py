"""On a GPU, with Triton compiled: `make test-cuda`. The kernels at real sizes, whole steps, the same bits every time.

References are made in float64 by torch's matrix products on the same GPU.
"""

import copy
import os

import pytest
import torch
from builders import random_sae, training_config
from kernel_inputs import assert_largest, decoded, relative
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_nfm.kernels import dispatch, sums, topk
from sae_nfm.kernels.device import device_rates
from sae_nfm.kernels.reference import SparseActs

pytestmark = pytest.mark.cuda

DEVICE = os.environ.get("SAE_NFM_CUDA_DEVICE", "cuda")
N_TOKENS, D_IN, D_SAE, K, NFM_DIM = 1000, 768, 6000, 32, 64
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 0.01}
"""Relative, of sums over 32 or 1000 terms: a few times 6e-8 and 0.004."""


def randoms(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [torch.randn(shape, device=DEVICE, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def random_acts(dtype: torch.dtype) -> SparseActs:
    """Some features are active in every token, most in few."""
    popularity, scores, values = randoms((D_SAE,), (N_TOKENS, D_SAE), (N_TOKENS, K), dtype=dtype)
    indices = (scores + 3 * popularity).topk(K, dim=-1).indices
    return SparseActs(indices, values)


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    weights = torch.randn(output.shape, device=DEVICE, generator=generator)
    return list(torch.autograd.grad((output * weights.to(output.dtype)).sum(), inputs))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("width", [D_IN, NFM_DIM, 300, 1])
@pytest.mark.parametrize("reader", [dispatch.weighted_rows, dispatch.bi_interaction, decoded])
def test_reading(dtype, width, reader):
    acts, (weight,) = random_acts(dtype), randoms((D_SAE, width), dtype=dtype)
    exact_acts = SparseActs(acts.indices, acts.values.detach().double().requires_grad_())
    exact_weight = weight.detach().double().requires_grad_()
    routing = sums.route(acts.indices, D_SAE)
    ours, exact = reader(acts, weight, routing), reader(exact_acts, exact_weight, kernel="dense")
    assert relative(ours, exact) < ROUNDING[dtype]
    found, expected = (
        gradients(ours, [acts.values, weight]),
        gradients(exact, [exact_acts.values, exact_weight]),
    )
    assert all(relative(a, b) < 4 * ROUNDING[dtype] for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bi_interaction_keeps_its_precision_when_one_feature_dominates(sign):
    """Here a product and a difference are one operation: the gradient of the strongest feature, a sum over weak ones, tells."""
    acts, (V,) = random_acts(torch.float32), randoms((D_SAE, NFM_DIM))
    with torch.no_grad():
        acts.values[:, 3] = sign * 1e4
    exact_acts = SparseActs(acts.indices, acts.values.detach().double().requires_grad_())
    exact_V = V.detach().double().requires_grad_()
    z, exact = dispatch.bi_interaction(acts, V), dispatch.bi_interaction(exact_acts, exact_V, kernel="dense")
    found, expected = gradients(z, [acts.values, V]), gradients(exact, [exact_acts.values, exact_V])
    assert relative(z, exact) < 2e-6
    assert all(relative(a, b) < 2e-6 for a, b in zip(found, expected, strict=True))
    assert relative(found[0][:, 3], expected[0][:, 3]) < 2e-6


@pytest.mark.parametrize(("d_sae", "k"), [(D_SAE, K), (D_SAE, 1), (D_SAE, 500), (6001, 33), (40, 40)])
@pytest.mark.parametrize("scaled", [True, False])
def test_selection(d_sae, k, scaled):
    x, W_enc, b_enc, scale = (t.detach() for t in randoms((N_TOKENS, 64), (64, d_sae), (d_sae,), (d_sae,)))
    scale = scale.abs() if scaled else None
    assert_largest(topk.top_hidden_pre(x, W_enc, b_enc, scale, k), topk.hidden_pre(x, W_enc, b_enc, scale), k)


@pytest.mark.parametrize("gradient", ["sparse", "dense"])
def test_encoder_gradients(gradient):
    inputs = randoms((N_TOKENS, 64), (64, D_SAE), (D_SAE,), (D_SAE,))
    with torch.no_grad():
        inputs[3].abs_()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    acts = dispatch.encode(*inputs, K, gradient=gradient)
    scores = topk.hidden_pre(*exact).gather(-1, acts.indices).relu()
    found, expected = gradients(acts.values, inputs), gradients(scores, exact)
    assert relative(acts.values, scores) < 1e-5  # sums of 64 products
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def make_step(sae, x: Tensor, autocast: bool = False) -> list[Tensor]:
    sae.zero_grad()
    dead = torch.arange(D_SAE, device=DEVICE) < 500
    step = TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16, enabled=autocast):
        output = sae.training_forward_pass(step)
    output.loss.backward()
    return [output.loss.detach(), *(parameter.grad.clone() for parameter in sae.parameters())]


def sae_and_input(**settings):
    sizes = {"d_in": 128, "d_sae": D_SAE, "k": K, "nfm_dim": NFM_DIM, "device": DEVICE}
    sae = random_sae(training_config("joint_nfm", **(sizes | settings)))
    return sae, randoms((N_TOKENS, 128))[0].detach()


@pytest.mark.parametrize("nfm_top_k", [None, 16])
def test_a_step_in_either_form(nfm_top_k):
    sae, x = sae_and_input(nfm_top_k=nfm_top_k, kernel="sparse")
    dense = copy.deepcopy(sae)
    dense.cfg.kernel = "dense"
    # float32 sums in other orders
    assert all(relative(a, b) < 1e-4 for a, b in zip(make_step(sae, x), make_step(dense, x), strict=True))


@pytest.mark.parametrize("kernel", ["sparse", "auto"])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_same_bits_every_time(kernel, autocast):
    sae, x = sae_and_input(kernel=kernel)
    first = make_step(sae, x, autocast)
    for _ in range(3):
        torch.testing.assert_close(make_step(sae, x, autocast), first, rtol=0, atol=0)


def test_rates_are_measured_once():
    rates = device_rates(DEVICE)
    assert device_rates(DEVICE) is rates
    assert rates.flop_per_second > 0
    assert rates.gathered_bytes_per_second > 0
