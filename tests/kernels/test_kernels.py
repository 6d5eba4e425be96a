"""Each sparse kernel against its dense twin, hand values, numerical gradients and SAELens."""

import warnings

import pytest
import torch
from builders import covering_pairs
from kernel_inputs import (
    D_IN,
    D_SAE,
    TIGHT,
    Operations,
    assert_same,
    decoded,
    encoder,
    gradients,
    random_acts,
    randoms,
)
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from sae_nfm.kernels import dispatch, reference, sums
from sae_nfm.kernels.reference import SparseActs

# --- encode


def test_encode_by_hand():
    x, W_enc = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0]])
    # (1, 2, 1) + (0, 0, -3) = (1, 2, -2), times (9, 1, 1) = (9, 2, -2)
    b_enc, scale = torch.tensor([0.0, 0.0, -3.0]), torch.tensor([9.0, 1.0, 1.0])
    for kernel in ("dense", "sparse"):
        one = dispatch.encode(x, W_enc, b_enc, scale, 1, kernel=kernel)
        assert (one.indices.item(), one.values.item()) == (0, 9.0)
        everything = dispatch.encode(x, W_enc, b_enc, scale, 3, kernel=kernel)
        assert dispatch.to_dense(everything, 3).tolist() == [[9.0, 2.0, 0.0]]


@pytest.mark.parametrize(
    ("k", "batch", "scaled"),
    covering_pairs(k=[1, 2, 6, D_SAE], batch=[(), (7,), (2, 3), (0,)], scaled=[True, False]),
)
def test_encode_equals_its_dense_form(k, batch, scaled):
    inputs = encoder(batch, scaled)
    assert_same(lambda kernel: dispatch.to_dense(dispatch.encode(*inputs, k, kernel=kernel), D_SAE), inputs, **TIGHT)


@pytest.mark.parametrize("k", [1, 4])
def test_encode_has_the_gradient_of_its_values(k):
    inputs = encoder((3,), d_sae=11)
    assert torch.autograd.gradcheck(lambda *args: dispatch.encode(*args, k).values, inputs)


def test_a_relu_at_or_below_zero_has_no_gradient():
    x, W_enc, b_enc, scale = encoder()
    with torch.no_grad():
        b_enc.copy_(-100.0)
    acts = dispatch.encode(x, W_enc, b_enc, scale, 3)
    assert (acts.values == 0).all()
    zero = dispatch.encode(0 * x, W_enc, 0 * b_enc, scale, 3)
    for values in (acts.values, zero.values):
        assert all((gradient == 0).all() for gradient in gradients(values, [x, W_enc, b_enc, scale]))


def test_ties_may_be_chosen_either_way():
    """Every feature is the same: the values, and the gradients summed over features, do not depend on the choice."""
    x, one = randoms((4, D_IN), (D_IN, 1))
    W_enc = one.detach().expand(-1, D_SAE).clone().requires_grad_()
    b_enc = torch.full((D_SAE,), 9.0, dtype=torch.float64, requires_grad=True)

    def outcome(kernel):
        acts = dispatch.encode(x, W_enc, b_enc, None, 3, kernel=kernel)
        grad_x, grad_W, grad_b = torch.autograd.grad(acts.values.square().sum(), [x, W_enc, b_enc])
        assert (acts.indices.sort(dim=-1).values.diff() > 0).all(), "a feature is chosen twice"
        return acts.values, grad_x, grad_W.sum(dim=1), grad_b.sum()

    torch.testing.assert_close(outcome("sparse"), outcome("dense"), **TIGHT)


def test_encode_keeps_nothing_of_the_size_of_batch_times_d_sae():
    x, W_enc, b_enc, scale = encoder((600,))
    kept: dict[str, int] = {}
    for kernel in ("sparse", "dense"):
        sizes: list[int] = []
        with saved_tensors_hooks(lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda t: t):
            dispatch.encode(x, W_enc, b_enc, scale, 4, kernel=kernel)
        kept[kernel] = max(sizes)
    assert kept["dense"] == 600 * D_SAE  # else the comparison says nothing
    assert kept["sparse"] == x.numel()


@pytest.mark.parametrize("transposed", [True, False])
def test_gradients_have_the_layout_of_their_parameters(transposed):
    x, W_enc, b_enc, scale = encoder()
    if transposed:
        W_enc = W_enc.detach().T.contiguous().T.requires_grad_()
    (gradient,) = gradients(dispatch.encode(x, W_enc, b_enc, scale, 3).values, [W_enc])
    assert gradient.stride() == W_enc.stride()


def test_only_the_gradients_asked_for():
    x, W_enc, b_enc, scale = encoder()
    for wanted in (x, W_enc, b_enc, scale):
        alone = [tensor if tensor is wanted else tensor.detach() for tensor in (x, W_enc, b_enc, scale)]
        expected = gradients(dispatch.encode(x, W_enc, b_enc, scale, 3).values, [wanted])
        torch.testing.assert_close(gradients(dispatch.encode(*alone, 3).values, [wanted]), expected, **TIGHT)


# --- reading features


READERS = (dispatch.weighted_rows, dispatch.bi_interaction, decoded)


@pytest.mark.parametrize(
    ("reader", "batch", "k", "routed"),
    covering_pairs(reader=READERS, batch=[(), (6,), (2, 3), (0,)], k=[1, 4, 11], routed=[True, False]),
)
def test_reading_equals_its_dense_form(reader, batch, k, routed):
    acts, (weight,) = random_acts(batch, k=k), randoms((11, 3), seed=1)
    routing = sums.route(acts.indices, 11) if routed else None
    assert_same(lambda kernel: reader(acts, weight, routing, kernel=kernel), [acts.values, weight], **TIGHT)
    dense = dispatch.to_dense(acts, 11)
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


def test_both_decoders_by_hand():
    acts = SparseActs(torch.tensor([[2, 0]]), torch.tensor([[4.0, 2.0]]))
    W_dec, W_lin = torch.tensor([[3.0], [9.0], [-8.0]]), torch.tensor([[0.5], [9.0], [10.0]])
    for kernel in ("dense", "sparse"):
        # 4 * (-8 / 8 + 10) + 2 * (3 / 3 + 0.5), and without norms 4 * (-8 + 10) + 2 * (3 + 0.5)
        assert dispatch.both_decoders(acts, W_dec, W_dec.abs()[:, 0], W_lin, kernel=kernel).tolist() == [[39.0]]
        assert dispatch.both_decoders(acts, W_dec, None, W_lin, kernel=kernel).tolist() == [[15.0]]


@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_of_both_decoders(scaled):
    acts, inputs = random_acts(), randoms((11, 3), (11,), (11, 3))
    inputs = [acts.values, inputs[0], (inputs[1].detach().abs() + 0.1).requires_grad_() if scaled else None, inputs[2]]

    def both(*inputs, kernel="sparse"):
        values, *others = inputs
        return dispatch.both_decoders(SparseActs(acts.indices, values), *others, kernel=kernel)

    assert_same(lambda kernel: both(*inputs, kernel=kernel), inputs, **TIGHT)
    assert torch.autograd.gradcheck(both, inputs)
    for wanted in (tensor for tensor in inputs if tensor is not None):
        alone = [tensor if tensor is wanted or tensor is None else tensor.detach() for tensor in inputs]
        torch.testing.assert_close(gradients(both(*alone), [wanted]), gradients(both(*inputs), [wanted]), **TIGHT)


def test_a_decoder_row_of_norm_0_that_no_token_uses_has_no_gradient():
    acts, (W_dec, W_lin) = SparseActs(torch.tensor([[1]]), torch.tensor([[2.0]])), randoms((2, 3), (2, 3))
    W_dec, W_lin = (
        (tensor.detach().float() * torch.tensor([[0.0], [1.0]])).requires_grad_() for tensor in (W_dec, W_lin)
    )
    norms, rows = dispatch.row_norms(W_dec)
    dispatch.both_decoders(acts, rows, norms, W_lin).sum().backward()
    assert (W_dec.grad[0] == 0).all()
    assert (W_dec.grad[1] != 0).any()


def test_route_by_hand():
    routing = sums.route(torch.tensor([[2, 0], [3, 2]]), 5)
    assert routing.entries.tolist() == [1, 0, 3, 2]
    assert routing.tokens.tolist() == [0, 0, 1, 1]
    assert routing.starts.tolist() == [0, 1, 1, 3, 4, 4]


def test_route_keeps_the_order_of_tokens():
    indices = torch.randint(3, (1000, 1), generator=torch.Generator().manual_seed(0))
    routing = sums.route(indices, 3)
    for feature in range(3):
        tokens = routing.tokens[routing.starts[feature] : routing.starts[feature + 1]]
        assert torch.equal(tokens, (indices[:, 0] == feature).nonzero()[:, 0])


def test_bi_interaction_by_hand():
    acts = SparseActs(torch.tensor([[2, 0, 1]]), torch.tensor([[4.0, 2.0, 3.0]]))
    V = torch.tensor([[1.0], [5.0], [-1.0]])
    # 2*3 * 1*5 + 2*4 * 1*-1 + 3*4 * 5*-1
    assert dispatch.bi_interaction(acts, V).tolist() == [[-38.0]]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bi_interaction_keeps_its_precision_when_one_feature_dominates(sign):
    acts, (V,) = random_acts((50,), d_sae=40, k=8, dtype=torch.float32), randoms((40, 6), dtype=torch.float32)
    with torch.no_grad():
        acts.values[:, 3] = sign * 1e4
    exact = reference.bi_interaction(SparseActs(acts.indices, acts.values.double()), V.double())
    plain = reference.bi_interaction(acts, V)
    ours = dispatch.bi_interaction(acts, V)
    # float32 has 6e-8; a sum of 8 terms needs a few of it, and the plain formula is wrong in the fourth digit
    assert (ours - exact).norm() / exact.norm() < 5e-7
    assert (plain - exact).norm() / exact.norm() > 1e-5


def test_a_single_feature_has_no_interaction_and_no_gradient():
    acts, (V,) = random_acts(k=1, dtype=torch.float32), randoms((11, 3), dtype=torch.float32)
    pooled = dispatch.bi_interaction(acts, V)
    assert (pooled == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(pooled, [acts.values, V]))


def test_row_norms():
    (weight,) = randoms((4, 3))

    def both_uses(kernel):
        norms, rows = dispatch.row_norms(weight, kernel=kernel)
        return torch.cat([norms[:, None], rows], dim=-1)

    assert_same(both_uses, [weight], **TIGHT)
    for output in (0, 1):
        assert_same(lambda kernel, output=output: dispatch.row_norms(weight, kernel=kernel)[output], [weight], **TIGHT)
    assert torch.autograd.gradcheck(dispatch.row_norms, weight)
    # a gradient that is one number expanded is no place for a sum
    sums = (sum(output.sum() for output in dispatch.row_norms(weight, kernel=kernel)) for kernel in ("sparse", "dense"))
    torch.testing.assert_close(*(torch.autograd.grad(total, weight)[0] for total in sums), **TIGHT)
    zero = torch.zeros(2, 3, requires_grad=True)
    norms, _ = dispatch.row_norms(zero)
    assert (norms == 0).all()
    norms.sum().backward()
    assert (zero.grad == 0).all()


def test_second_derivatives_are_those_of_the_dense_form():
    """Also of an output's sum, whose gradient has none: there a sparse backward pass would drop the mixed derivatives."""
    acts, (weight,) = random_acts((3,), k=2), randoms((11, 3))
    x, W_enc, b_enc, scale = encoder((3,))

    def outputs(kernel):
        yield dispatch.weighted_rows(acts, weight, kernel=kernel), weight
        yield dispatch.bi_interaction(acts, weight, kernel=kernel), weight
        yield decoded(acts, weight, kernel=kernel), weight
        yield dispatch.row_norms(weight, kernel=kernel)[0], weight
        yield dispatch.encode(x, W_enc, b_enc, scale, 2, kernel=kernel).values, W_enc

    inputs = [acts.values, weight, x, W_enc, b_enc, scale]

    def second(kernel):
        for power in (1, 2):
            for output, tensor in outputs(kernel):
                # sorted, since the forms choose the same features in another order
                loss = (output.sort(dim=-1).values ** power).sum()
                (gradient,) = torch.autograd.grad(loss, tensor, create_graph=True)
                if gradient.requires_grad:
                    yield torch.autograd.grad(
                        gradient.square().sum(), inputs, allow_unused=True, materialize_grads=True
                    )

    dense, sparse = list(second("dense")), list(second("sparse"))
    assert len(dense) == 10
    torch.testing.assert_close(sparse, dense, **TIGHT)


def cost(output: Tensor, inputs: list[Tensor]) -> tuple[int, int, int]:
    """What the gradients take: products with gathered rows, sums of gathered rows, sorts."""
    with Operations() as operations:
        gradients(output, inputs)
    count = operations.count
    return count["sparse_sampled_addmm"], count["_embedding_bag_forward_only"], count["argsort"] + count["sort"]


def test_gradients_that_nobody_asked_for_cost_nothing():
    acts, (weight, norms, W_lin) = random_acts(), randoms((11, 3), (11,), (11, 3))
    routing = sums.route(acts.indices, 11)
    frozen = SparseActs(acts.indices, acts.values.detach())

    assert cost(dispatch.weighted_rows(acts, weight), [acts.values, weight]) == (1, 1, 1)
    assert cost(dispatch.weighted_rows(acts, weight.detach()), [acts.values]) == (1, 0, 0)
    assert cost(dispatch.weighted_rows(frozen, weight, routing), [weight]) == (0, 1, 0)

    both = dispatch.both_decoders
    assert cost(both(acts, weight, norms, W_lin), [acts.values, weight, norms, W_lin]) == (2, 1, 1)
    assert cost(both(acts, weight.detach(), norms.detach(), W_lin.detach()), [acts.values]) == (2, 0, 0)
    assert cost(both(frozen, weight, norms.detach(), W_lin, routing), [weight, W_lin]) == (0, 1, 0)
    assert cost(both(frozen, weight, norms, W_lin, routing), [weight, norms, W_lin]) == (1, 1, 0)

    x, W_enc, b_enc, _ = encoder(scaled=False)
    for inputs, n_sums in (([x, W_enc, b_enc], 2), ([x.detach(), W_enc, b_enc], 1), ([x, W_enc.detach(), b_enc], 1)):
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        assert cost(dispatch.encode(*inputs, None, 3).values, wanted)[1] == n_sums


def test_both_sums_of_the_bi_interaction_share_the_routing():
    acts, (V,) = random_acts(), randoms((11, 3))
    for routing, sorts in ((sums.route(acts.indices, 11), 0), (None, 2)):
        assert cost(dispatch.bi_interaction(acts, V, routing), [acts.values, V])[2] == sorts


def test_a_sum_prepares_no_backward_pass_of_its_own():
    acts, (weight,) = random_acts(), randoms((11, 3))
    with Operations() as operations:
        dispatch.weighted_rows(acts, weight)
    assert (operations.count["_embedding_bag_forward_only"], operations.count["_embedding_bag"]) == (1, 0)


def test_no_warning_about_sparse_tensors():
    acts, (weight,) = random_acts(), randoms((11, 3))
    torch.set_warn_always(True)  # else torch warns once a process, perhaps in an earlier test
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dispatch.weighted_rows(acts, weight).sum().backward()
            dispatch.to_coo(acts, 11)
    finally:
        torch.set_warn_always(False)


# --- forms of activations


@pytest.mark.parametrize("batch", [(6,), (2, 3), (0,), (2, 1, 2)])
def test_coo_form(batch):
    acts = random_acts(batch)
    coo, dense = dispatch.to_coo(acts, 11), dispatch.to_dense(acts, 11)
    assert coo.is_coalesced()
    torch.testing.assert_close(coo.detach().to_dense(), dense)
    # flagged as coalesced: the order is torch's own
    unordered = torch.sparse_coo_tensor(coo.indices(), coo.values(), coo.shape, check_invariants=True)
    assert torch.equal(coo.indices(), unordered.coalesce().indices())
    back = reference.sparse_acts_from_coo(coo, 4)
    torch.testing.assert_close(gradients(dispatch.to_dense(back, 11), [acts.values]), gradients(dense, [acts.values]))


def test_coo_form_gives_saelens_its_statistics():
    acts = dispatch.encode(*(None if tensor is None else tensor.detach() for tensor in encoder()), 4)
    coo, dense = dispatch.to_coo(acts, D_SAE).bool().float(), dispatch.to_dense(acts, D_SAE).bool().float()
    assert (dense.sum(dim=-1) <= 4).all()
    for axis in (-2, 0, -1):
        assert torch.equal(coo.sum(axis).to_dense(), dense.sum(axis))


def test_dense_form_is_a_matrix_of_one_hots_times_values():
    acts = random_acts((3,))
    expected = (F.one_hot(acts.indices, 11) * acts.values[..., None]).sum(dim=-2)
    torch.testing.assert_close(dispatch.to_dense(acts, 11), expected, **TIGHT)
