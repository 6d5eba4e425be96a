"""A whole step of the kernels in every data type, under autocast and in every memory layout."""

from typing import Literal

import pytest
import torch
from kernel_inputs import D_IN, D_SAE, TIGHT, encoder, gradients, random_acts, randoms, relative
from torch import Tensor

from sae_nfm.kernels import dispatch, reference
from sae_nfm.kernels.reference import SparseActs


def whole_step(inputs: list[Tensor], k: int, kernel: dispatch.Kernel | Literal["products"]) -> Tensor:
    """In one of the two forms, or the sparse one with products of the decoder and for the encoder's gradient."""
    x, W_enc, b_enc, W_dec, V = inputs
    kernel, product = ("sparse", "dense") if kernel == "products" else (kernel, kernel)
    norms, W_dec = dispatch.row_norms(W_dec, kernel=kernel)
    acts = dispatch.encode(x, W_enc, b_enc, norms, k, kernel=kernel, gradient=product)
    routing = reference.route(acts.indices, len(b_enc))
    unscaled = SparseActs(acts.indices, acts.values / norms[acts.indices])
    rows = dispatch.weighted_rows(unscaled, W_dec, routing, kernel=product)
    both = dispatch.both_decoders(acts, W_dec, norms, W_enc.mT, routing, kernel=product)
    return torch.cat([rows, both, dispatch.bi_interaction(acts, V, routing, kernel=kernel)], dim=-1)


def step_inputs(dtype: torch.dtype) -> list[Tensor]:
    shapes = ((20, D_IN), (D_IN, D_SAE), (D_SAE,), (D_SAE, D_IN), (D_SAE, 4))
    return randoms(*shapes, dtype=dtype)


for_sparse_forms = pytest.mark.parametrize("form", ["sparse", "products"])


@for_sparse_forms
def test_a_whole_step_in_float32(form):
    inputs = step_inputs(torch.float32)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    sparse, exact = whole_step(inputs, 4, form), whole_step(exact_inputs, 4, "dense")
    both = [(sparse, exact), *zip(gradients(sparse, inputs), gradients(exact, exact_inputs), strict=True)]
    # float32 has 6e-8, and the sums here a few roundings each
    assert all(relative(ours, reference) < 1e-6 for ours, reference in both)


@for_sparse_forms
@pytest.mark.parametrize("autocast", [True, False])
def test_a_whole_step_in_bfloat16(autocast, form):
    """bfloat16 parameters, or float32 ones under autocast: dtypes as in the dense form, values to bfloat16's precision.

    With k = d_sae no selection depends on rounding. One number has a relative error of 0.4 %, sums over several roundings have
    a multiple of it.
    """
    inputs = step_inputs(torch.float32 if autocast else torch.bfloat16)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = whole_step(exact_inputs, D_SAE, "dense")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        sparse, dense = (whole_step(inputs, D_SAE, kernel) for kernel in (form, "dense"))
    assert relative(sparse, exact) < 0.02
    assert relative(sparse, exact) < 1.5 * relative(dense, exact)
    for tensor, ours, expected in zip(inputs, gradients(sparse, inputs), gradients(exact, exact_inputs), strict=True):
        assert ours.dtype == tensor.dtype
        assert relative(ours, expected) < 0.03


def in_quarters(tensor: Tensor) -> Tensor:
    """Of a few of these, sums of products are exact in float32, whatever their order, and rounded to bfloat16 once."""
    return (4 * tensor.detach()).round() / 4


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_encode_under_autocast_chooses_as_its_dense_form(scaled, dtype):
    x, W_enc, *others = encoder((50,), scaled, dtype=dtype)
    inputs = [in_quarters(x), in_quarters(W_enc), *others]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sparse, dense = (dispatch.encode(*inputs, 4, kernel=kernel) for kernel in ("sparse", "dense"))
    assert sparse.values.dtype == dense.values.dtype == dtype
    # equal bfloat16 numbers may be chosen either way
    torch.testing.assert_close(*(acts.values.sort(dim=-1).values for acts in (sparse, dense)), rtol=0, atol=0)


def test_norms_in_float32_beside_bfloat16_parameters():
    """Autocast computes norms in float32."""
    x, W_enc, b_enc, scale = encoder((50,), dtype=torch.bfloat16)
    x, W_enc = in_quarters(x), in_quarters(W_enc)
    inputs = (x, W_enc, b_enc, scale.float())
    sparse, dense = (dispatch.encode(*inputs, 4, kernel=kernel) for kernel in ("sparse", "dense"))
    assert sparse.values.dtype == dense.values.dtype == torch.float32
    torch.testing.assert_close(*(acts.values.sort(dim=-1).values for acts in (sparse, dense)), rtol=0, atol=0)
    rows = dispatch.weighted_rows(sparse, W_enc.T)
    assert rows.dtype == torch.bfloat16
    assert relative(rows, dispatch.to_dense(sparse, D_SAE) @ W_enc.T.float()) < 0.01  # bfloat16 has 0.004


def test_gradients_of_encode_in_bfloat16_without_scale():
    """The gradient comes back in bfloat16, and no scale widens it before the sums over the batch."""
    x, W_enc, b_enc, _ = encoder((300,), scaled=False, dtype=torch.bfloat16)
    with torch.no_grad():
        b_enc += 30.0  # every feature is active: rounding changes no ReLU
    inputs = [x, W_enc, b_enc]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    ours, exact = (
        gradients(dispatch.to_dense(dispatch.encode(*tensors, None, D_SAE), D_SAE).sum(dim=0), tensors)
        for tensors in (inputs, exact_inputs)
    )
    # bfloat16 has 0.004, and a sum over features of either sign a multiple of it
    assert all(relative(gradient, reference) < 0.02 for gradient, reference in zip(ours, exact, strict=True))


def test_bi_interaction_of_bfloat16_is_rounded_once():
    acts, (V,) = random_acts((50,), dtype=torch.bfloat16), randoms((11, 3), dtype=torch.bfloat16)
    exact = reference.bi_interaction(SparseActs(acts.indices, acts.values.double()), V.double())
    torch.testing.assert_close(dispatch.bi_interaction(acts, V), exact.bfloat16(), rtol=2**-8, atol=1e-5)


def test_encode_leaves_the_gradient_of_a_later_product_under_autocast():
    """Autocast remembers its copies of parameters; one made inside a custom function would have no gradient."""
    x, W_enc, b_enc, scale = encoder(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dispatch.encode(x, W_enc, b_enc, scale, 3)
        later = x.detach() @ W_enc
    assert later.requires_grad
    assert gradients(later, [W_enc])[0].abs().sum() > 0


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.ndim == 2 else tensor


@for_sparse_forms
@pytest.mark.parametrize("layout", [strided, transposed])
def test_layouts_do_not_matter(layout, form):
    plain = step_inputs(torch.float64)
    laid_out = [layout(tensor.detach()).requires_grad_() for tensor in plain]
    assert not laid_out[1].is_contiguous()
    expected, output = whole_step(plain, 4, form), whole_step(laid_out, 4, form)
    torch.testing.assert_close(output, expected, **TIGHT)
    torch.testing.assert_close(gradients(output, laid_out), gradients(expected, plain), **TIGHT)


def test_a_gradient_that_is_one_number_expanded():
    inputs = step_inputs(torch.float64)
    sparse, dense = (torch.autograd.grad(whole_step(inputs, 4, kernel).sum(), inputs) for kernel in ("sparse", "dense"))
    torch.testing.assert_close(sparse, dense, **TIGHT)
