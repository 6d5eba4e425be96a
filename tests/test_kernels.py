"""Each sparse kernel against its dense twin, hand values, numerical gradients and SAELens."""

import warnings
from collections import Counter

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import act_times_W_dec, calculate_topk_aux_acts
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sae_nfm import interaction, kernels
from sae_nfm.interaction import SparseActs

# The same sums in another order: a few ulp of values of order 10.
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
D_IN, D_SAE = 5, 37
"""37 features are no whole number of blocks for k = 1 (4 of 8, 5 left over) and k = 2 (9 of 4, 1 left over)."""


def randoms(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Seeded normal tensors that record gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def encoder(batch: tuple[int, ...] = (7,), scaled: bool = True, **settings) -> list[Tensor | None]:
    """sae_in, W_enc, b_enc, scale."""
    x, W_enc, b_enc, scale = randoms((*batch, D_IN), (D_IN, D_SAE), (D_SAE,), (D_SAE,), **settings)
    return [x, W_enc, b_enc, (scale.detach().abs() + 0.1).requires_grad_() if scaled else None]


def random_acts(batch: tuple[int, ...] = (6,), d_sae: int = 11, k: int = 4, dtype=torch.float64) -> SparseActs:
    scores, values = randoms((*batch, d_sae), (*batch, k), seed=3, dtype=dtype)
    return SparseActs(scores.topk(k, dim=-1, sorted=False).indices, values)


def gradients(output: Tensor, inputs: list[Tensor | None]) -> list[Tensor]:
    """Gradients of a sum that weighs every number of the output differently."""
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
    wanted = [tensor for tensor in inputs if tensor is not None]
    return list(torch.autograd.grad((output * weights).sum(), wanted, retain_graph=True))


def assert_same(function, inputs: list[Tensor | None], **tolerance) -> None:
    """`function(kernel)` has the same value, and the same gradient in every input, in both forms."""
    sparse, dense = function("sparse"), function("dense")
    torch.testing.assert_close(sparse, dense, **tolerance)
    torch.testing.assert_close(gradients(sparse, inputs), gradients(dense, inputs), **tolerance)


# --- encode


def test_encode_by_hand():
    x, W_enc = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0]])
    # (1, 2, 1) + (0, 0, -3) = (1, 2, -2), times (9, 1, 1) = (9, 2, -2)
    b_enc, scale = torch.tensor([0.0, 0.0, -3.0]), torch.tensor([9.0, 1.0, 1.0])
    for kernel in ("dense", "sparse"):
        one = kernels.encode(x, W_enc, b_enc, scale, 1, kernel=kernel)
        assert (one.indices.item(), one.values.item()) == (0, 9.0)
        everything = kernels.encode(x, W_enc, b_enc, scale, 3, kernel=kernel)
        assert kernels.to_dense(everything, 3).tolist() == [[9.0, 2.0, 0.0]]


@pytest.mark.parametrize("k", [1, 2, 6, D_SAE])
@pytest.mark.parametrize("batch", [(), (7,), (2, 3), (0,)])
@pytest.mark.parametrize("scaled", [True, False])
def test_encode_equals_its_dense_form(k, batch, scaled):
    inputs = encoder(batch, scaled)
    assert_same(lambda kernel: kernels.to_dense(kernels.encode(*inputs, k, kernel=kernel), D_SAE), inputs, **TIGHT)


@pytest.mark.parametrize("k", [1, 4])
def test_encode_has_the_gradient_of_its_values(k):
    inputs = encoder((3,))
    assert torch.autograd.gradcheck(lambda *args: kernels.encode(*args, k).values, inputs)


def test_encode_in_pieces_is_the_same(monkeypatch):
    inputs = encoder((7,))
    whole = kernels.to_dense(kernels.encode(*inputs, 3), D_SAE)
    expected = gradients(whole, inputs)
    monkeypatch.setitem(kernels.TOKENS_AT_ONCE, "cpu", 3)  # 3 + 3 + 1 tokens
    monkeypatch.setattr(kernels, "TRANSPOSED_BYTES", 2 * D_SAE * 8)  # 2 + 2 + 1 rows of W_enc
    pieces = kernels.to_dense(kernels.encode(*inputs, 3), D_SAE)
    torch.testing.assert_close(pieces, whole, **TIGHT)
    torch.testing.assert_close(gradients(pieces, inputs), expected, **TIGHT)


def test_a_relu_at_or_below_zero_has_no_gradient():
    x, W_enc, b_enc, scale = encoder()
    with torch.no_grad():
        b_enc.copy_(-100.0)
    acts = kernels.encode(x, W_enc, b_enc, scale, 3)
    assert (acts.values == 0).all()
    zero = kernels.encode(0 * x, W_enc, 0 * b_enc, scale, 3)
    for values in (acts.values, zero.values):
        assert all((gradient == 0).all() for gradient in gradients(values, [x, W_enc, b_enc, scale]))


def test_ties_may_be_chosen_either_way():
    """Every feature is the same: the values, and the gradients summed over features, do not depend on the choice."""
    x, one = randoms((4, D_IN), (D_IN, 1))
    W_enc = one.detach().expand(-1, D_SAE).clone().requires_grad_()
    b_enc = torch.full((D_SAE,), 9.0, dtype=torch.float64, requires_grad=True)

    def outcome(kernel):
        acts = kernels.encode(x, W_enc, b_enc, None, 3, kernel=kernel)
        grad_x, grad_W, grad_b = torch.autograd.grad(acts.values.square().sum(), [x, W_enc, b_enc])
        assert (acts.indices.sort(dim=-1).values.diff() > 0).all(), "a feature is chosen twice"
        return acts.values, grad_x, grad_W.sum(dim=1), grad_b.sum()

    torch.testing.assert_close(outcome("sparse"), outcome("dense"), **TIGHT)


@pytest.mark.parametrize("d_sae", [16, 37, 64, 1000])
@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_selection_in_blocks_finds_the_largest(d_sae, k):
    generator = torch.Generator().manual_seed(d_sae)
    scores = torch.randn(50, d_sae, generator=generator)
    scores[10:20] = scores[10:20].sort(dim=-1).values  # the largest are columns left over from the blocks
    scores[20:30] = scores[20:30].round()  # ties
    scores[30:40] = -scores[30:40].abs()
    found = kernels._top_indices(scores, k)
    assert (found.sort(dim=-1).values.diff() > 0).all(), "a column is found twice"
    expected = scores.topk(k, dim=-1).values
    torch.testing.assert_close(scores.gather(-1, found).sort(dim=-1, descending=True).values, expected, rtol=0, atol=0)


def test_encode_keeps_nothing_of_the_size_of_batch_times_d_sae():
    x, W_enc, b_enc, scale = encoder((600,))
    kept: dict[str, int] = {}
    for kernel in ("sparse", "dense"):
        sizes: list[int] = []
        with saved_tensors_hooks(lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda t: t):
            kernels.encode(x, W_enc, b_enc, scale, 4, kernel=kernel)
        kept[kernel] = max(sizes)
    assert kept["dense"] == 600 * D_SAE  # else the comparison says nothing
    assert kept["sparse"] == x.numel()


def test_gradients_have_the_layout_of_their_parameters():
    x, W_enc, b_enc, scale = encoder()
    (gradient,) = gradients(kernels.encode(x, W_enc, b_enc, scale, 3).values, [W_enc])
    assert gradient.stride() == W_enc.stride()


def test_only_the_gradients_asked_for():
    x, W_enc, b_enc, scale = encoder()
    for wanted in (x, W_enc, b_enc, scale):
        alone = [tensor if tensor is wanted else tensor.detach() for tensor in (x, W_enc, b_enc, scale)]
        expected = gradients(kernels.encode(x, W_enc, b_enc, scale, 3).values, [wanted])
        torch.testing.assert_close(gradients(kernels.encode(*alone, 3).values, [wanted]), expected, **TIGHT)


# --- reading features


READERS = (kernels.weighted_rows, kernels.bi_interaction)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (0,)])
@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("routed", [True, False])
def test_reading_equals_its_dense_form(reader, batch, k, routed):
    acts, (weight,) = random_acts(batch, k=k), randoms((11, 3), seed=1)
    routing = kernels.route(acts.indices, 11) if routed else None
    assert_same(lambda kernel: reader(acts, weight, routing, kernel=kernel), [acts.values, weight], **TIGHT)
    dense = kernels.to_dense(acts, 11)
    assert_same(lambda kernel: reader(dense, weight, kernel=kernel), [acts.values, weight], **TIGHT)
    torch.testing.assert_close(reader(dense, weight), reader(acts, weight), **TIGHT)


@pytest.mark.parametrize("reader", READERS)
def test_reading_has_the_gradient_of_its_output(reader):
    acts, (weight,) = random_acts((3,)), randoms((11, 3), seed=1)
    assert torch.autograd.gradcheck(
        lambda values, rows: reader(SparseActs(acts.indices, values), rows), (acts.values, weight)
    )


@pytest.mark.parametrize("reader", READERS)
def test_reading_with_one_side_frozen(reader):
    acts, (weight,) = random_acts(), randoms((11, 3), seed=1)
    expected = gradients(reader(acts, weight), [acts.values, weight])
    frozen_weight = gradients(reader(acts, weight.detach()), [acts.values])
    frozen_acts = gradients(reader(SparseActs(acts.indices, acts.values.detach()), weight), [weight])
    torch.testing.assert_close(frozen_weight + frozen_acts, expected, **TIGHT)


def test_route_by_hand():
    routing = kernels.route(torch.tensor([[2, 0], [3, 2]]), 5)
    assert routing.entries.tolist() == [1, 0, 3, 2]
    assert routing.tokens.tolist() == [0, 0, 1, 1]
    assert routing.starts.tolist() == [0, 1, 1, 3, 4, 4]


def test_route_keeps_the_order_of_tokens():
    indices = torch.randint(3, (1000, 1), generator=torch.Generator().manual_seed(0))
    routing = kernels.route(indices, 3)
    for feature in range(3):
        tokens = routing.tokens[routing.starts[feature] : routing.starts[feature + 1]]
        assert torch.equal(tokens, (indices[:, 0] == feature).nonzero()[:, 0])


def test_bi_interaction_by_hand():
    acts = SparseActs(torch.tensor([[2, 0, 1]]), torch.tensor([[4.0, 2.0, 3.0]]))
    V = torch.tensor([[1.0], [5.0], [-1.0]])
    # 2*3 * 1*5 + 2*4 * 1*-1 + 3*4 * 5*-1
    assert kernels.bi_interaction(acts, V).tolist() == [[-38.0]]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bi_interaction_keeps_its_precision_when_one_feature_dominates(sign):
    acts, (V,) = random_acts((50,), d_sae=40, k=8, dtype=torch.float32), randoms((40, 6), dtype=torch.float32)
    with torch.no_grad():
        acts.values[:, 3] = sign * 1e4
    exact = interaction.bi_interaction(SparseActs(acts.indices, acts.values.double()), V.double())
    plain = interaction.bi_interaction(acts, V)
    ours = kernels.bi_interaction(acts, V)
    # float32 has 6e-8; a sum of 8 terms needs a few of it, and the plain formula is wrong in the fourth digit
    assert (ours - exact).norm() / exact.norm() < 5e-7
    assert (plain - exact).norm() / exact.norm() > 1e-5


def test_a_single_feature_has_no_interaction_and_no_gradient():
    acts, (V,) = random_acts(k=1, dtype=torch.float32), randoms((11, 3), dtype=torch.float32)
    pooled = kernels.bi_interaction(acts, V)
    assert (pooled == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(pooled, [acts.values, V]))


def test_row_norms():
    (weight,) = randoms((4, 3))
    assert_same(lambda kernel: kernels.row_norms(weight, kernel=kernel), [weight], **TIGHT)
    assert torch.autograd.gradcheck(kernels.row_norms, weight)
    zero = torch.zeros(2, 3, requires_grad=True)
    kernels.row_norms(zero).sum().backward()
    assert (zero.grad == 0).all()


def test_only_the_dense_form_has_a_second_derivative():
    acts, (weight,) = random_acts((3,), k=2), randoms((11, 3))
    x, W_enc, b_enc, scale = encoder((3,))

    def outputs(kernel):
        yield kernels.weighted_rows(acts, weight, kernel=kernel), weight
        yield kernels.bi_interaction(acts, weight, kernel=kernel), weight
        yield kernels.row_norms(weight, kernel=kernel), weight
        yield kernels.encode(x, W_enc, b_enc, scale, 2, kernel=kernel).values, W_enc

    for output, tensor in outputs("dense"):
        (gradient,) = torch.autograd.grad(output.square().sum(), tensor, create_graph=True)
        gradient.sum().backward()
    for output, tensor in outputs("sparse"):
        (gradient,) = torch.autograd.grad(output.square().sum(), tensor, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


class Operations(TorchDispatchMode):
    """How often torch runs each operation."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def operations_of_gradients(output: Tensor, inputs: list[Tensor]) -> Counter:
    with Operations() as operations:
        gradients(output, inputs)
    return operations.count


def test_gradients_that_nobody_asked_for_cost_nothing():
    acts, (weight,) = random_acts(), randoms((11, 3))
    routing = kernels.route(acts.indices, 11)
    frozen = SparseActs(acts.indices, acts.values.detach())
    x, W_enc, b_enc, _ = encoder(scaled=False)
    bag = "_embedding_bag_forward_only"

    both = operations_of_gradients(kernels.weighted_rows(acts, weight), [acts.values, weight])
    assert (both["sparse_sampled_addmm"], both[bag], both["argsort"] + both["sort"]) == (1, 1, 1)
    values = operations_of_gradients(kernels.weighted_rows(acts, weight.detach()), [acts.values])
    assert (values["sparse_sampled_addmm"], values[bag], values["argsort"] + values["sort"]) == (1, 0, 0)
    rows = operations_of_gradients(kernels.weighted_rows(frozen, weight, routing), [weight])
    assert (rows["sparse_sampled_addmm"], rows[bag], rows["argsort"] + rows["sort"]) == (0, 1, 0)
    for inputs, bags in (([x, W_enc, b_enc], 2), ([x.detach(), W_enc, b_enc], 1), ([x, W_enc.detach(), b_enc], 1)):
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        assert operations_of_gradients(kernels.encode(*inputs, None, 3).values, wanted)[bag] == bags


# --- dtypes and layouts


def whole_step(inputs: list[Tensor], k: int, kernel: kernels.Kernel) -> Tensor:
    x, W_enc, b_enc, W_dec, V = inputs
    norms = kernels.row_norms(W_dec, kernel=kernel)
    acts = kernels.encode(x, W_enc, b_enc, norms, k, kernel=kernel)
    routing = kernels.route(acts.indices, len(b_enc))
    unscaled = SparseActs(acts.indices, acts.values / norms[acts.indices])
    rows = kernels.weighted_rows(unscaled, W_dec, routing, kernel=kernel)
    return torch.cat([rows, kernels.bi_interaction(acts, V, routing, kernel=kernel)], dim=-1)


def step_inputs(dtype: torch.dtype) -> list[Tensor]:
    shapes = ((20, D_IN), (D_IN, D_SAE), (D_SAE,), (D_SAE, D_IN), (D_SAE, 4))
    return randoms(*shapes, dtype=dtype)


def relative(errors: Tensor, reference: Tensor) -> float:
    return ((errors.double() - reference.double()).norm() / reference.double().norm()).item()


def test_a_whole_step_in_float32():
    inputs = step_inputs(torch.float32)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    sparse, exact = whole_step(inputs, 4, "sparse"), whole_step(exact_inputs, 4, "dense")
    both = [(sparse, exact), *zip(gradients(sparse, inputs), gradients(exact, exact_inputs), strict=True)]
    # float32 has 6e-8, and the sums here a few roundings each
    assert all(relative(ours, reference) < 1e-6 for ours, reference in both)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_whole_step_in_bfloat16(autocast):
    """bfloat16 parameters, or float32 ones under autocast: dtypes as in the dense form, values to bfloat16's precision.

    With k = d_sae no selection depends on rounding. One number has a relative error of 0.4 %, sums over several roundings have
    a multiple of it.
    """
    inputs = step_inputs(torch.float32 if autocast else torch.bfloat16)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = whole_step(exact_inputs, D_SAE, "dense")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        sparse, dense = (whole_step(inputs, D_SAE, kernel) for kernel in ("sparse", "dense"))
    assert relative(sparse, exact) < 0.02
    assert relative(sparse, exact) < 1.5 * relative(dense, exact)
    for tensor, ours, reference in zip(inputs, gradients(sparse, inputs), gradients(exact, exact_inputs), strict=True):
        assert ours.dtype == tensor.dtype
        assert relative(ours, reference) < 0.03


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_encode_under_autocast_chooses_as_its_dense_form(scaled, dtype):
    inputs = encoder((50,), scaled, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sparse, dense = (kernels.encode(*inputs, 4, kernel=kernel) for kernel in ("sparse", "dense"))
    assert sparse.values.dtype == dense.values.dtype == dtype
    # equal bfloat16 numbers may be chosen either way
    torch.testing.assert_close(*(acts.values.sort(dim=-1).values for acts in (sparse, dense)), rtol=0, atol=0)


def test_norms_in_float32_beside_bfloat16_parameters():
    """Autocast computes norms in float32."""
    x, W_enc, b_enc, scale = encoder((50,), dtype=torch.bfloat16)
    inputs = (x, W_enc, b_enc, scale.float())
    sparse, dense = (kernels.encode(*inputs, 4, kernel=kernel) for kernel in ("sparse", "dense"))
    assert sparse.values.dtype == dense.values.dtype == torch.float32
    torch.testing.assert_close(*(acts.values.sort(dim=-1).values for acts in (sparse, dense)), rtol=0, atol=0)
    rows = kernels.weighted_rows(sparse, W_enc.T)
    assert rows.dtype == torch.bfloat16
    assert relative(rows, kernels.to_dense(sparse, D_SAE) @ W_enc.T.float()) < 0.01  # bfloat16 has 0.004


def test_bi_interaction_of_bfloat16_is_rounded_once():
    acts, (V,) = random_acts((50,), dtype=torch.bfloat16), randoms((11, 3), dtype=torch.bfloat16)
    exact = interaction.bi_interaction(SparseActs(acts.indices, acts.values.double()), V.double())
    torch.testing.assert_close(kernels.bi_interaction(acts, V), exact.bfloat16(), rtol=2**-8, atol=1e-5)


def test_encode_leaves_the_gradient_of_a_later_product_under_autocast():
    """Autocast remembers its copies of parameters; one made inside a custom function would have no gradient."""
    x, W_enc, b_enc, scale = encoder(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kernels.encode(x, W_enc, b_enc, scale, 3)
        later = x.detach() @ W_enc
    assert later.requires_grad
    assert gradients(later, [W_enc])[0].abs().sum() > 0


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.ndim == 2 else tensor


@pytest.mark.parametrize("layout", [strided, transposed])
def test_layouts_do_not_matter(layout):
    plain = step_inputs(torch.float64)
    laid_out = [layout(tensor.detach()).requires_grad_() for tensor in plain]
    assert not laid_out[1].is_contiguous()
    expected, output = whole_step(plain, 4, "sparse"), whole_step(laid_out, 4, "sparse")
    torch.testing.assert_close(output, expected, **TIGHT)
    torch.testing.assert_close(gradients(output, laid_out), gradients(expected, plain), **TIGHT)


def test_a_gradient_that_is_one_number_expanded():
    inputs = step_inputs(torch.float64)
    sparse, dense = (torch.autograd.grad(whole_step(inputs, 4, kernel).sum(), inputs) for kernel in ("sparse", "dense"))
    torch.testing.assert_close(sparse, dense, **TIGHT)


def test_no_warning_about_sparse_tensors():
    acts, (weight,) = random_acts(), randoms((11, 3))
    torch.set_warn_always(True)  # else torch warns once a process, perhaps in an earlier test
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernels.weighted_rows(acts, weight).sum().backward()
            kernels.to_coo(acts, 11)
    finally:
        torch.set_warn_always(False)


# --- the dead-feature loss


def dead_loss(kernel: str, inputs: list[Tensor], dead: Tensor, k_aux: int) -> Tensor:
    """SAELens's reconstruction by dead features, from its own functions or from ours."""
    x, W_enc, b_enc, W_dec = inputs
    norms = W_dec.norm(dim=-1)
    if kernel == "saelens":
        hidden_pre = (x @ W_enc + b_enc) * norms
        acts = calculate_topk_aux_acts(min(k_aux, int(dead.sum())), hidden_pre, dead)
        return act_times_W_dec(acts, W_dec, True)
    ours = kernels.top_dead(x, W_enc, b_enc, norms, dead, k_aux, kernel=kernel)
    rows = (W_dec / norms[:, None])[ours.features]
    return kernels.weighted_rows(ours.acts, rows)


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
    sparse, dense = (kernels.top_dead(*inputs[:3], None, dead, k_aux, kernel=kernel) for kernel in ("sparse", "dense"))
    assert isinstance(sparse.acts, form)
    assert torch.equal(sparse.features, dead.nonzero()[:, 0])
    assert torch.equal(dense.features, torch.arange(D_SAE))


def test_dead_features_without_scale():
    x, W_enc, b_enc, _ = encoder(scaled=False)
    dead = torch.arange(D_SAE) % 2 == 0
    ours = kernels.top_dead(x, W_enc, b_enc, None, dead, 4)
    expected = calculate_topk_aux_acts(4, x @ W_enc + b_enc, dead)[:, ours.features]
    torch.testing.assert_close(kernels.to_dense(ours.acts, 19), expected, **TIGHT)


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
    norms = kernels.row_norms(W_dec) if rescale else None
    acts = kernels.encode(x - b_dec, W_enc, b_enc, norms, 3)
    unscaled = acts if norms is None else SparseActs(acts.indices, acts.values / norms[acts.indices])
    out = kernels.weighted_rows(unscaled, W_dec) + b_dec
    loss = (out - x).square().sum(dim=-1).mean()
    if n_dead:
        aux = kernels.top_dead(x - b_dec, W_enc, b_enc, norms, dead, 4)  # d_in / 2
        rows = (W_dec if norms is None else W_dec / norms[:, None])[aux.features]
        # the residual is x - out, not x - b_dec - out: SAELens passes the step's input
        loss = loss + (kernels.weighted_rows(aux.acts, rows) - (x - out).detach()).square().sum(dim=-1).mean()
    loss.backward()
    for ours, theirs in zip((W_enc, b_enc, W_dec, b_dec), (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


# --- forms of activations


@pytest.mark.parametrize("batch", [(6,), (2, 3), (0,), (2, 1, 2)])
def test_coo_form(batch):
    acts = random_acts(batch)
    coo, dense = kernels.to_coo(acts, 11), kernels.to_dense(acts, 11)
    assert coo.is_coalesced()
    torch.testing.assert_close(coo.detach().to_dense(), dense)
    # flagged as coalesced: the order is torch's own
    unordered = torch.sparse_coo_tensor(coo.indices(), coo.values(), coo.shape, check_invariants=True)
    assert torch.equal(coo.indices(), unordered.coalesce().indices())
    back = interaction.sparse_acts_from_coo(coo, 4)
    torch.testing.assert_close(gradients(kernels.to_dense(back, 11), [acts.values]), gradients(dense, [acts.values]))


def test_coo_form_gives_saelens_its_statistics():
    acts = kernels.encode(*(None if tensor is None else tensor.detach() for tensor in encoder()), 4)
    coo, dense = kernels.to_coo(acts, D_SAE).bool().float(), kernels.to_dense(acts, D_SAE).bool().float()
    assert (dense.sum(dim=-1) <= 4).all()
    for axis in (-2, 0, -1):
        assert torch.equal(coo.sum(axis).to_dense(), dense.sum(axis))


def test_dense_form_is_a_matrix_of_one_hots_times_values():
    acts = random_acts((3,))
    expected = (F.one_hot(acts.indices, 11) * acts.values[..., None]).sum(dim=-2)
    torch.testing.assert_close(kernels.to_dense(acts, 11), expected, **TIGHT)


# --- the choice


def test_the_choice_follows_the_rates():
    flops, gathered = kernels.RATES["cpu"]
    crossing = round(1_000_000 * gathered / (2 * flops))
    assert kernels.choose(1_000_000, crossing - 1, "cpu") == "sparse"
    assert kernels.choose(1_000_000, crossing + 1, "cpu") == "dense"


@pytest.mark.parametrize(
    ("d_sae", "k", "device", "expected"),
    [
        (8192, 32, "cpu", "sparse"),
        (50_000, 1024, "cpu", "sparse"),
        (50_000, 25_000, "cpu", "dense"),
        (50_000, 32, "cuda", "sparse"),
        (50_000, 1024, "cuda", "dense"),
        (50_000, 32, "mps", "dense"),
    ],
)
def test_the_choice_at_known_sizes(d_sae, k, device, expected):
    assert kernels.choose(d_sae, k, device) == expected
