"""The maths against hand-computed values, a literal double sum, and its own dense form."""

from itertools import combinations

import pytest
import torch

from sae_nfm.kernels import dispatch, reference
from sae_nfm.kernels.reference import SparseActs

# A dense float64 sum and its gathered form differ by rounding only: a few ulp of values of order 10.
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def random_acts(seed: int = 0, batch: tuple[int, ...] = (3, 4), d_sae: int = 11, k: int = 5):
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(*batch, d_sae, generator=generator, dtype=torch.float64)
    values, indices = pre.topk(k)
    values = values.relu()
    return torch.zeros_like(pre).scatter_(-1, indices, values), SparseActs(indices, values), generator


def test_bi_interaction_of_two_features_by_hand():
    f = torch.tensor([[2.0, 3.0, 0.0]])
    V = torch.tensor([[1.0, 10.0], [5.0, -1.0], [7.0, 7.0]])
    # 2 * 3 * (1 * 5, 10 * -1)
    torch.testing.assert_close(reference.bi_interaction(f, V), torch.tensor([[30.0, -60.0]]))


def test_bi_interaction_of_one_feature_is_zero():
    f = torch.tensor([[0.0, 4.0, 0.0]])
    assert (reference.bi_interaction(f, torch.rand(3, 6, generator=torch.Generator().manual_seed(0))) == 0).all()


def test_bi_interaction_equals_the_double_sum_over_pairs():
    dense, sparse, generator = random_acts()
    V = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    pairs = sum(dense[..., i, None] * dense[..., j, None] * V[i] * V[j] for i, j in combinations(range(11), 2))
    torch.testing.assert_close(reference.bi_interaction(dense, V), pairs, **TIGHT)
    torch.testing.assert_close(reference.bi_interaction(sparse, V), pairs, **TIGHT)


@pytest.mark.parametrize("k", [1, 5, 11])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_sparse_form_equals_dense_form(k, batch):
    dense, sparse, generator = random_acts(batch=batch, k=k)
    W = torch.randn(11, 7, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(reference.weighted_rows(sparse, W), dense @ W, **TIGHT)
    torch.testing.assert_close(reference.square_output(sparse, W, 3.0), reference.square_output(dense, W, 3.0), **TIGHT)
    torch.testing.assert_close(reference.bi_interaction(sparse, W), reference.bi_interaction(dense, W), **TIGHT)


def test_bilinear_of_two_features_by_hand():
    f = torch.tensor([[2.0, 3.0, 0.0]])
    V = torch.tensor([[1.0, 10.0], [5.0, -1.0], [7.0, 7.0]])  # A and B of one dimension
    # (2 * 1 + 3 * 5) (2 * 10 + 3 * -1)
    torch.testing.assert_close(reference.bilinear(f, V), torch.tensor([[17.0 * 17.0]]))


def test_bilinear_is_the_sum_over_pairs_and_squares():
    dense, sparse, generator = random_acts()
    A, B = torch.randn(2, 11, 6, generator=generator, dtype=torch.float64)
    expected = torch.zeros(3, 4, 6, dtype=torch.float64)
    for i in range(11):
        expected += dense[..., i, None] ** 2 * A[i] * B[i]
        for j in range(i):
            expected += dense[..., i, None] * dense[..., j, None] * (A[i] * B[j] + A[j] * B[i])
    V = torch.cat([A, B], dim=-1)
    torch.testing.assert_close(reference.bilinear(dense, V), expected, **TIGHT)
    torch.testing.assert_close(reference.bilinear(sparse, V), expected, **TIGHT)
    torch.testing.assert_close(dispatch.pooled("bilinear", sparse, V), expected, **TIGHT)
    # what `heads` asks of a head that is registered
    torch.testing.assert_close(reference.bilinear(3 * dense, V), reference.bilinear(dense, 3 * V), **TIGHT)


def test_square_output_by_hand():
    f = torch.tensor([[2.0, 0.0, 3.0]])
    U = torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.0, 2.0]])
    # (4 * (1, 0) + 9 * (0, 2)) / 2
    torch.testing.assert_close(reference.square_output(f, U, 2.0), torch.tensor([[2.0, 9.0]]))


def test_hidden_pre_and_interaction_output_by_hand():
    z = torch.tensor([[1.0, -2.0]])
    W_1, b_1 = torch.tensor([[1.0, 3.0], [2.0, 1.0]]), torch.tensor([0.5, 1.0])
    h = reference.hidden_pre(z, W_1, b_1)
    torch.testing.assert_close(h, torch.tensor([[-2.5, 2.0]]))
    W_2, b_2 = torch.tensor([[100.0], [4.0]]), torch.tensor([1.0])
    torch.testing.assert_close(reference.interaction_output(h, W_2, b_2), torch.tensor([[9.0]]))


def test_top_n_keeps_the_largest_in_either_form():
    dense, sparse, _ = random_acts()
    W = torch.eye(11, dtype=torch.float64)
    threshold = dense.topk(2, dim=-1).values[..., -1:]
    expected = torch.where(dense >= threshold, dense, 0.0)
    for acts in (dense, sparse):
        torch.testing.assert_close(reference.weighted_rows(reference.top_n(acts, 2), W), expected)


def test_sparse_acts_from_dense_refuses_what_they_cannot_hold():
    acts = torch.tensor([[0.0, 0.25, 1.0], [0.5, 0.0, 0.0]])
    found = reference.sparse_acts_from_dense(acts, 2)
    assert torch.equal(torch.zeros(2, 3).scatter(-1, found.indices, found.values), acts)
    assert reference.sparse_acts_from_dense(acts, 1) is None  # two active on the first token
    assert reference.sparse_acts_from_dense(acts - torch.tensor([0.125, 0.0, 0.0]), 3) is None  # a small negative one
    assert reference.sparse_acts_from_dense(acts[:0], 2) is None


def test_gradients_of_every_output_in_both_forms():
    dense, sparse, generator = random_acts(batch=(2,), d_sae=6, k=3)
    V = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    def outputs(values, weight):
        acts = SparseActs(sparse.indices, values)
        return (
            reference.weighted_rows(acts, weight),
            reference.square_output(acts, weight, 1.7),
            reference.bi_interaction(reference.top_n(acts, 2), weight),
        )

    values = sparse.values.detach().requires_grad_()
    assert torch.autograd.gradcheck(outputs, (values, V))
    # and the dense form has the same gradient in V
    total = sum(out.sum() for out in outputs(values, V))
    same = (
        reference.weighted_rows(dense, V).sum()
        + reference.square_output(dense, V, 1.7).sum()
        + reference.bi_interaction(reference.top_n(dense, 2), V).sum()
    )
    torch.testing.assert_close(*(torch.autograd.grad(x, V)[0] for x in (total, same)), **TIGHT)


def test_bi_interaction_keeps_float32_precision_under_autocast_and_for_bfloat16():
    """One feature dominates: in bfloat16 the difference of squares would be rounding error of 100^2."""
    f = torch.tensor([[100.0, 0.5]])
    V = torch.tensor([[1.0], [1.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(reference.bi_interaction(f, V), torch.tensor([[50.0]]))
    half = reference.bi_interaction(f.bfloat16(), V.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.item() == 50.0


def test_sparse_acts_from_coo_is_differentiable_and_exact():
    dense, sparse, _ = random_acts(batch=(2, 3), k=4)
    values = sparse.values.reshape(-1).detach().requires_grad_()
    rows = torch.cartesian_prod(torch.arange(2), torch.arange(3)).repeat_interleave(4, dim=0).T
    indices = torch.cat([rows, sparse.indices.reshape(1, -1)])
    acts = reference.sparse_acts_from_coo(torch.sparse_coo_tensor(indices, values, (2, 3, 11)), k=4)
    torch.testing.assert_close(reference.weighted_rows(acts, torch.eye(11, dtype=torch.float64)), dense)
    (gradient,) = torch.autograd.grad((acts.values * acts.indices).sum(), values)
    torch.testing.assert_close(gradient, sparse.indices.reshape(-1).double())


@pytest.mark.parametrize("counts", [[1, 1, 1], [3, 1, 2], [2, 2, 3]], ids=["fewer", "as many in all", "more"])
def test_sparse_acts_from_coo_wants_as_many_entries_from_each_token(counts):
    rows = torch.tensor([[float(i < n) for i in range(5)] for n in counts])
    assert reference.sparse_acts_from_coo(rows.to_sparse(), k=2) is None
    assert reference.sparse_acts_from_coo(torch.ones(3, 2).to_sparse(), k=2) is not None
