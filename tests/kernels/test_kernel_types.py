"""A whole step of the kernels in every data type, under autocast and in every memory layout."""

import copy
from typing import Literal

import pytest
import torch
from builders import inference_sae, random_activations, training_config
from kernel_inputs import D_IN, D_SAE, TIGHT, encoder, gradients, random_acts, randoms, relative
from torch import Tensor

from sae_nfm.kernels import dispatch, reference, sums
from sae_nfm.kernels.reference import SparseActs


def whole_step(inputs: list[Tensor], k: int, kernel: dispatch.Kernel | Literal["products"]) -> Tensor:
    """In one of the two forms, or the sparse one with products of the decoder and for the encoder's gradient."""
    x, W_enc, b_enc, W_dec, V = inputs
    kernel, product = ("sparse", "dense") if kernel == "products" else (kernel, kernel)
    norms, W_dec = dispatch.row_norms(W_dec, kernel=kernel)
    acts = dispatch.encode(x, W_enc, b_enc, norms, k, kernel=kernel, gradient=product)
    routing = sums.route(acts.indices, len(b_enc))
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


def loud(strength: float, dtype: torch.dtype, **settings):
    """An SAE for activations of a size whose squares and pair products float16 does not hold, but whose outputs it does."""
    sae = inference_sae(training_config("joint_nfm", rescale_acts_by_decoder_norm=False, nfm_top_k=None, **settings))
    with torch.no_grad():
        for name, scale in {"W_dec": 1, "W_lin": 1, "V": 3e-2, "U": 3 / strength, "W_2": 30 / strength}.items():
            getattr(sae, name).mul_(scale)
    acts = torch.zeros(6, len(sae.W_dec))
    acts[:, 3:7] = strength * torch.tensor([1.0, 0.5, 0.25, 0.8])
    return sae.to(dtype), acts.to(dtype)


@pytest.mark.parametrize("strength", [300, 3_000, 30_000])
@pytest.mark.parametrize("head", ["fm", "mlp", "bilinear"])
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_loud_activations_in_16_bits(strength, head, kernel, dtype, autocast):
    """A 16-bit number is rounded by 5e-4 (float16) or 4e-3 (bfloat16); a path has some roundings of terms that partly cancel."""
    sae, acts = loud(strength, dtype, head=head, kernel=kernel)
    exact = copy.deepcopy(sae).double().decode_paths(acts.double()).present()
    assert max(path.abs().max() for path in exact.values()) < 60_000
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            found = sae.decode_paths(acts.requires_grad_(wanted)).present()
        for name, path in exact.items():
            ours = found[name].double()
            assert relative(ours, path) < (0.02 if torch.bfloat16 in (dtype, autocast) else 0.003), name


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loud_activations_in_the_kernels(form, dtype):
    sae, acts = loud(30_000, dtype)
    active = reference.sparse_acts_from_dense(acts, 4)
    exact = SparseActs(active.indices, active.values.double())
    square = dispatch.square_output(active, sae.U, 2.0, kernel=form)
    assert square.dtype == dtype
    # rounded once
    assert relative(square, reference.square_output(exact, sae.U.double(), 2.0)) < 2 * torch.finfo(dtype).eps
    for head, tolerance in {"fm": 1, "mlp": 4}.items():
        z = dispatch.pooled(head, active, sae.V, kernel=form)
        expected = dispatch.pooled(head, exact, sae.V.double(), kernel="dense")
        assert relative(z, expected) < tolerance * torch.finfo(dtype).eps
    assert expected.abs().max() < 65_504 < dispatch.pooled("fm", exact, sae.V.double()).abs().max()


@pytest.mark.parametrize("normalisation", ["constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("architecture", ["joint_nfm", "sequential_nfm"])
def test_normalisation_of_loud_and_silent_tokens_in_float16(architecture, normalisation):
    """The norm of 16 activations of 30,000 is no float16 number. A token of norm 0 has none to be divided by."""
    sae = inference_sae(training_config(architecture, normalize_activations=normalisation, head="none"))
    x = 12_000 * random_activations(rows=4).clamp(-2.5, 2.5)
    x[2] = 0
    with torch.no_grad():
        for weight in (sae.W_dec, sae.W_lin, sae.U):
            weight.mul_(0.1)
    exact = copy.deepcopy(sae).double()(x.double())
    half = sae.half()(x.half())
    assert exact.abs().max() < 60_000
    assert relative(half, exact) < 0.01
    assert (exact[2].abs() < 1).all()


@pytest.mark.parametrize("normalisation", ["constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("architecture", ["joint_nfm", "sequential_nfm"])
def test_a_copy_keeps_its_own_normalisation(architecture, normalisation):
    """What encode leaves for decode belongs to one SAE: another one may encode in between."""
    sae = inference_sae(training_config(architecture, normalize_activations=normalisation))
    copied, x = copy.deepcopy(sae), random_activations()
    expected, acts = sae(x), copied.encode(x)
    sae.encode(3 * random_activations(seed=9))
    torch.testing.assert_close(copied.decode(acts), expected)
