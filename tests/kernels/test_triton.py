"""The Triton kernels against their twins in torch, run by Triton's interpreter on CPU tensors.

The interpreter runs the same source as a GPU, one program after the other, some milliseconds each: so there are few tokens
and features, and as many entries and columns as it takes for several steps of a loop and several programs. What the
interpreter cannot tell, whether the source compiles for a GPU, is in `test_triton_compiled`.
"""

from functools import partial

import pytest
import torch
from builders import covering_pairs, random_activations, random_sae, training_config
from kernel_inputs import TIGHT, assert_largest, decoded, encoder, gradients, random_acts, randoms
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_nfm.kernels import device, dispatch, sums, topk
from sae_nfm.kernels.reference import SparseActs

pytestmark = pytest.mark.usefixtures("triton_on_cpu")

# Other orders of the same sums. Triton's interpreter truncates to bfloat16 where a GPU rounds: one unit in the last place.
TOLERANCES = {
    torch.float64: TIGHT,
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-6},
}


@pytest.fixture
def small_programs(monkeypatch):
    """Several programs, and several steps of a loop, for what otherwise one would do."""
    from sae_nfm.kernels import triton_sums

    monkeypatch.setattr(triton_sums, "CHUNKS", (32, 16))
    monkeypatch.setattr(triton_sums, "IN_FLIGHT", 1)  # 8 entries, the fewest
    monkeypatch.setattr(triton_sums, "BLOCKS", 16)
    monkeypatch.setattr(triton_sums, "TILE", 16)


def in_torch(monkeypatch, function, *args):
    with monkeypatch.context() as context:
        context.setattr(device, "TRITON_DEVICES", ())
        return function(*args)


def both(monkeypatch, function, *args, dtype):
    """A kernel of this name and its twin, on the same arguments."""
    ours = function(*args)
    twin = in_torch(monkeypatch, function, *args)
    assert ours.dtype == twin.dtype
    torch.testing.assert_close(ours, twin, **TOLERANCES[dtype])
    return ours


def acts_and_rows(n_tokens, k, d_sae, d_out, dtype):
    scores, values, rows, by_token = (
        tensor.detach()
        for tensor in randoms((n_tokens, d_sae), (n_tokens, k), (d_sae, d_out), (n_tokens, d_out), dtype=dtype)
    )
    return scores.topk(k, dim=-1, sorted=False).indices, values, rows, by_token


SIZES = [(3, 5, 7, 5), (2, 1, 5, 34), (2, 9, 10, 50), (9, 8, 8, 16), (1, 1, 1, 1)]
"""n_tokens, k, d_sae, d_out: entries that fill the last step of a loop or not, for tokens (5, 9 and 8 by 8) and for features
(9 by 8); columns in one chunk, filled or not, in three of 16 and two of 32; features without a token."""


@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_sums(monkeypatch, sizes, dtype):
    indices, values, rows, by_token = acts_and_rows(*sizes, dtype)
    routing = sums.route(indices, len(rows))
    both(monkeypatch, sums.sum_by_token, indices, values, rows, dtype=dtype)
    both(monkeypatch, sums.sum_by_feature, routing, values, by_token, dtype=dtype)
    if dtype != torch.bfloat16:  # torch has no such product
        both(monkeypatch, sums.dots, indices, by_token, rows, dtype=dtype)
        both(monkeypatch, sums.sum_values, routing, values, indices, len(rows), dtype=dtype)


def test_sums_by_hand():
    indices, values = torch.tensor([[2, 0], [2, 1]]), torch.tensor([[3.0, 5.0], [7.0, 11.0]])
    rows = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0], [9.0, 9.0]])
    by_token = torch.tensor([[1.0, 0.0], [1.0, -1.0]])
    routing = sums.route(indices, 4)
    assert sums.sum_by_token(indices, values, rows).tolist() == [[305.0, 610.0], [810.0, 1620.0]]
    assert sums.sum_by_feature(routing, values, by_token).tolist() == [[5, 0], [11, -11], [10, -7], [0, 0]]
    assert sums.dots(indices, by_token, rows).tolist() == [[100.0, 1.0], [-100.0, -10.0]]
    assert sums.sum_values(routing, values, indices, 4).tolist() == [5.0, 11.0, 10.0, 0.0]


@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize("shape", [(16, 16), (5, 40), (40, 5), (1, 1)])
def test_transpose(shape):
    from sae_nfm.kernels import triton_sums

    source, out = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.zeros(shape[1], 2 * shape[0])
    triton_sums.transpose(source, out[:, : shape[0]])
    assert torch.equal(out[:, : shape[0]], source.T)
    assert not out[:, shape[0] :].any()


def test_no_tokens():
    indices, values = torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3)
    routing = sums.route(indices, 5)
    assert (sums.sum_by_feature(routing, values, torch.zeros(0, 4)) == 0).all()


@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize(
    ("size", "shift", "scaled", "dtype"),
    covering_pairs(
        size=[(37, 1), (37, 3), (37, 37), (130, 3), (40, 20)],
        shift=[0.0, -20.0],
        scaled=[True, False],
        dtype=[torch.float32, torch.float64],
    ),
)
def test_selection(size, shift, scaled, dtype):
    """Of d_sae features, k: blocks of one, of 4 and of 8, the last ones of fewer; one program and several; all scores
    negative, so that a number made up for a missing member would be among the largest.
    """
    d_sae, k = size
    x, W_enc, b_enc, scale = (t.detach() for t in randoms((4, 3), (3, d_sae), (d_sae,), (d_sae,), dtype=dtype))
    b_enc += shift
    b_enc[: d_sae // 2] = b_enc[0]
    W_enc[:, : d_sae // 2] = W_enc[:, :1]  # ties
    x[2:3] *= -1
    scale = scale.abs() if scaled else None
    assert_largest(topk.top_hidden_pre(x, W_enc, b_enc, scale, k), topk.hidden_pre(x, W_enc, b_enc, scale), k)


@pytest.mark.parametrize("k", [3, 4])
def test_selection_among_scores_of_minus_infinity_stays_within_the_columns(k):
    """One score is finite; the others are as large as those of members that a block has beyond the last column.

    Of ten blocks with column c in block c % 10, the last three lack their fourth member.
    """
    for column in (0, 6, 7, 8, 9, 17, 28, 29, 36):
        b_enc = torch.full((37,), -torch.inf)
        b_enc[column] = 0.0
        indices, _ = topk.top_hidden_pre(torch.ones(1, 1), torch.ones(1, 37), b_enc, None, k)
        assert indices.max() < 37
        assert column in indices


@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize(
    ("k", "nfm_dim", "n_tokens", "dtype"),
    covering_pairs(k=[1, 2, 9, 11], nfm_dim=[3, 18], n_tokens=[3, 9], dtype=[torch.float32, torch.float64]),
)
def test_bi_interaction(monkeypatch, k, nfm_dim, n_tokens, dtype):
    acts, (V,) = random_acts((n_tokens,), k=k, dtype=dtype), randoms((11, nfm_dim), seed=1, dtype=dtype)
    routing = sums.route(acts.indices, 11)

    def outcome() -> list[Tensor]:
        z = dispatch.bi_interaction(acts, V, routing)
        return [z, *gradients(z, [acts.values, V])]

    torch.testing.assert_close(outcome(), in_torch(monkeypatch, outcome), **TOLERANCES[dtype])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bi_interaction_and_its_gradients_keep_their_precision_when_one_feature_dominates(sign):
    acts, (V,) = random_acts((4,), d_sae=12, k=8, dtype=torch.float32), randoms((12, 6), dtype=torch.float32)
    with torch.no_grad():
        acts.values[:, 3] = sign * 1e4
    exact_acts = SparseActs(acts.indices, acts.values.detach().double().requires_grad_())
    exact_V = V.detach().double().requires_grad_()
    z, exact = dispatch.bi_interaction(acts, V), dispatch.bi_interaction(exact_acts, exact_V, kernel="dense")
    found = [z, *gradients(z, [acts.values, V])]
    expected = [exact, *gradients(exact, [exact_acts.values, exact_V])]
    for ours, theirs in zip(found, expected, strict=True):
        # float32 has 6e-8, sums of 4 to 8 terms need a few of it; the plain formula is wrong in the fourth digit
        assert (ours.double() - theirs).norm() / theirs.norm() < 1e-6
    # the gradient of the strongest feature is a sum over the weak ones, and small beside the others'
    top, reference = found[1][:, 3].double(), expected[1][:, 3]
    assert (top - reference).norm() / reference.norm() < 1e-6


@pytest.mark.usefixtures("small_programs")
def test_numerical_gradients():
    """Along one random direction: every number of the gradients is compared with the twin's, which `test_kernels` checks."""
    gradcheck = partial(torch.autograd.gradcheck, fast_mode=True, check_undefined_grad=False)
    x, W_enc, b_enc, scale = randoms((2, 2), (2, 9), (9,), (9,))
    scale = scale.detach().abs().add(0.1).requires_grad_()
    assert gradcheck(lambda *args: dispatch.encode(*args, 3).values, (x, W_enc, b_enc, scale))
    acts, (weight,) = random_acts((2,), d_sae=5, k=3), randoms((5, 2), seed=1)
    for reader in (dispatch.weighted_rows, dispatch.bi_interaction, decoded):
        assert gradcheck(
            lambda values, rows, reader=reader: reader(SparseActs(acts.indices, values), rows), (acts.values, weight)
        )
    (per_feature,) = randoms((5,))
    assert gradcheck(lambda numbers: dispatch.of_active(numbers, acts), per_feature)


@pytest.mark.parametrize("batch", [(), (3, 2), (2, 1, 2)])
def test_any_batch(monkeypatch, batch):
    acts, (weight, per_feature) = random_acts(batch, d_sae=5, k=3), randoms((5, 2), (5,))
    x, W_enc, b_enc, scale = encoder(batch, d_sae=9)

    def outcome() -> list[Tensor]:
        found = []
        for reader in (dispatch.weighted_rows, dispatch.bi_interaction, decoded):
            output = reader(acts, weight)
            found += [output, *gradients(output, [acts.values, weight])]
        numbers = dispatch.of_active(per_feature, acts)
        encoded = dispatch.encode(x, W_enc, b_enc, scale, 3)
        values = dispatch.to_dense(encoded, W_enc.shape[1])
        return [*found, numbers, *gradients(numbers, [per_feature]), values, *gradients(values, [x, W_enc, scale])]

    torch.testing.assert_close(outcome(), in_torch(monkeypatch, outcome), **TIGHT)


@pytest.mark.parametrize("layout", [lambda t: t.mT.contiguous().mT, lambda t: torch.stack([t, t], dim=-1)[..., 0]])
def test_layouts_do_not_matter(layout):
    acts, (weight,) = random_acts((3,), d_sae=5, k=3), randoms((5, 3))
    other = SparseActs(layout(acts.indices), layout(acts.values.detach()).requires_grad_())
    moved = layout(weight.detach()).requires_grad_()
    for reader in (dispatch.weighted_rows, dispatch.bi_interaction, decoded):
        expected, found = reader(acts, weight), reader(other, moved)
        torch.testing.assert_close(found, expected, **TIGHT)
        torch.testing.assert_close(
            gradients(found, [other.values, moved]), gradients(expected, [acts.values, weight]), **TIGHT
        )
    x, W_enc, b_enc, scale = encoder((3,), d_sae=9)
    expected = dispatch.encode(x, W_enc, b_enc, scale, 3).values
    moved = [layout(tensor.detach()).requires_grad_() for tensor in (x, W_enc)]
    found = dispatch.encode(*moved, b_enc, scale, 3).values
    torch.testing.assert_close(gradients(found, moved), gradients(expected, [x, W_enc]), **TIGHT)


@pytest.mark.parametrize("nfm_top_k", [None, 3])
@pytest.mark.parametrize("rescale", [True, False])
def test_a_step_of_joint_nfm(monkeypatch, nfm_top_k, rescale):
    """Losses and gradients of all paths, dead features among them."""
    settings = {"d_sae": 12, "nfm_top_k": nfm_top_k, "rescale_acts_by_decoder_norm": rescale, "dtype": "float64"}
    sae, x = random_sae(training_config("joint_nfm", **settings, kernel="sparse")), random_activations(rows=4).double()

    def outcome() -> list[Tensor]:
        sae.zero_grad()
        step = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=torch.arange(12) < 5, n_training_steps=0, is_logging_step=False
        )
        output = sae.training_forward_pass(step)
        output.loss.backward()
        return [output.loss, output.feature_acts.to_dense(), *(parameter.grad for parameter in sae.parameters())]

    torch.testing.assert_close(outcome(), in_torch(monkeypatch, outcome))
