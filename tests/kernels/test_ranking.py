"""Selection of the largest pre-activations, piece by piece and block by block, against a sort of all of them."""

import pytest
import torch
from kernel_inputs import D_SAE, TIGHT, encoder, gradients, randoms

from sae_nfm.kernels import dispatch, inference, ranking, sparse_sums, topk
from sae_nfm.kernels.ranking import Gram, Parts


@pytest.mark.parametrize("d_sae", [16, 37, 64, 1000])
@pytest.mark.parametrize("k", [1, 2, 5, 16])
@pytest.mark.parametrize("features_at_once", [8, 32, 1024])
def test_selection_in_blocks_finds_the_largest(monkeypatch, d_sae, k, features_at_once):
    monkeypatch.setattr(topk, "FEATURES_AT_ONCE", features_at_once)
    monkeypatch.setitem(topk.TOKENS_AT_ONCE, "cpu", 20)  # 20 + 20 + 10
    generator = torch.Generator().manual_seed(d_sae)
    scores = torch.randn(50, d_sae, generator=generator)
    scores[10:20] = scores[10:20].sort(dim=-1).values  # the largest are columns left over from the blocks
    scores[20:30] = scores[20:30].round()  # ties
    scores[30:40] = -scores[30:40].abs()
    # times ones and zeros: the product is exact
    found, values = topk.top_hidden_pre(torch.eye(50), scores, torch.zeros(d_sae), None, k)
    assert (found.sort(dim=-1).values.diff() > 0).all(), "a column is found twice"
    expected = scores.topk(k, dim=-1).values
    torch.testing.assert_close(values.sort(dim=-1, descending=True).values, expected, rtol=0, atol=0)
    assert torch.equal(scores.gather(-1, found), values)


@pytest.mark.parametrize("rows_at_once", [2, 0])  # of W_enc, 2 + 2 + 1; a row larger than a piece is one all the same
def test_encode_in_pieces_is_the_same(monkeypatch, rows_at_once):
    inputs = encoder((7,))
    whole = dispatch.to_dense(dispatch.encode(*inputs, 3), D_SAE)
    expected = gradients(whole, inputs)
    monkeypatch.setitem(topk.TOKENS_AT_ONCE, "cpu", 3)  # 3 + 3 + 1 tokens
    monkeypatch.setattr(topk, "FEATURES_AT_ONCE", 16)  # 16 + 16 + 5 features
    monkeypatch.setattr(sparse_sums, "TRANSPOSED_BYTES", rows_at_once * D_SAE * 8)
    monkeypatch.setattr(sparse_sums, "TRANSPOSED_FEATURES", 16)
    pieces = dispatch.to_dense(dispatch.encode(*inputs, 3), D_SAE)
    torch.testing.assert_close(pieces, whole, **TIGHT)
    torch.testing.assert_close(gradients(pieces, inputs), expected, **TIGHT)


def test_a_scale_of_zero_has_no_gradient():
    """The value is 0 whatever the pre-activation, which is not kept; SAELens's scale is the norm of a decoder row."""
    x, W_enc, b_enc, scale = encoder()
    with torch.no_grad():
        scale[3] = 0.0
        b_enc[3] = -100.0
    acts = dispatch.encode(x, W_enc, b_enc, scale, D_SAE)
    assert all(gradient.isfinite().all() for gradient in gradients(acts.values, [x, W_enc, b_enc, scale]))


def test_selection_records_no_gradient():
    _, values = topk.top_hidden_pre(*encoder(), 3)
    assert not values.requires_grad


class Written:
    """What features of a decoder write, by themselves, squared and in two hidden units."""

    def __init__(self, W_dec, squares=None, mixed=None):
        self.parts = Parts(rows=W_dec, squares=squares, mixed=mixed, code=None if mixed is None else self.code)

    def code(self, acts):
        dense = dispatch.to_dense(acts, D_RANKED)
        return torch.stack([dense[:, 0::2].sum(-1) * dense[:, 1::2].sum(-1), dense[:, :100].sum(-1)], dim=-1)

    def add(self, new):
        pass

    def explained(self, acts):
        dense, parts = dispatch.to_dense(acts, D_RANKED), self.parts
        written = dense @ parts.rows
        if parts.squares is not None:
            written = written + dense.square() @ parts.squares
        return written if parts.mixed is None else written + self.code(acts) @ parts.mixed


D_RANKED = 1100


def to_rank(*, scaled, dtype):
    x, W_enc, b_enc, norms, W_dec, squares, mixed = randoms(
        *((50, 64), (64, D_RANKED), (D_RANKED,), (D_RANKED,), (D_RANKED, 64), (D_RANKED, 64), (2, 64)), dtype=dtype
    )
    given = (x, W_enc, 0.1 * b_enc, norms.abs() if scaled else None)
    return given, 0.01 * W_dec, 1e-4 * squares, 1e-3 * mixed


@pytest.mark.parametrize("scaled", [True, False])
@torch.no_grad()
def test_a_ranking_in_bfloat16_chooses_as_the_exact_one(monkeypatch, scaled):
    given, W_dec, _, _ = to_rank(scaled=scaled, dtype=torch.float32)
    chosen, types = [], []

    def top_hidden_pre(sae_in, *rest):
        types.append(sae_in.dtype)
        return topk.top_hidden_pre(sae_in, *rest)

    monkeypatch.setattr(ranking, "top_hidden_pre", top_hidden_pre)
    for rough in (False, True):
        monkeypatch.setattr(ranking, "ranks_in_bfloat16", lambda weight, rough=rough: rough)
        acts = inference.select_sparsely(given, [3, 2, 3], Written(W_dec), None)
        chosen.append(dispatch.to_dense(acts, D_RANKED))
    assert types == [torch.float32] * 4 + [torch.bfloat16] * 2
    torch.testing.assert_close(*chosen)
    assert chosen[0].count_nonzero() > 300


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("sizes", [[3, 2, 3], [1] * 8])
@pytest.mark.parametrize("also", [(), ("squares",), ("mixed",), ("squares", "mixed")])
@torch.no_grad()
def test_scores_that_are_kept_choose_as_those_made_anew(monkeypatch, scaled, sizes, also):
    given, W_dec, squares, mixed = to_rank(scaled=scaled, dtype=torch.float64)
    paths = Written(W_dec, squares if "squares" in also else None, mixed if "mixed" in also else None)
    sparse, dense, first = [], [], topk.hidden_pre(*given)
    for pays in (True, False):
        monkeypatch.setattr(Gram, "pays", lambda *given, pays=pays: pays)
        acts = inference.select_sparsely(given, sizes, paths, None)
        sparse.append(dispatch.to_dense(acts, D_RANKED))
        acts = inference.select(first, paths.explained, given[1], given[3], sizes, None, paths.parts)
        dense.append(dispatch.to_dense(acts, D_RANKED))
    for found in (*sparse[1:], *dense):
        torch.testing.assert_close(found, sparse[0], rtol=1e-10, atol=1e-10)
    one_pass = topk.top_hidden_pre(*given, 8)[0].sort(dim=-1).values
    assert (one_pass != acts.indices.sort(dim=-1).values).any(dim=-1).float().mean() > 0.3, "stages change nothing here"
    torch.testing.assert_close(first, topk.hidden_pre(*given), rtol=0, atol=0)  # what is hooked stays as it is


@pytest.mark.parametrize(
    ("n_tokens", "n_products", "n_stages", "pays"),
    [
        *[(1000, 1, 3, True), (999, 1, 3, False), (1000, 2, 3, False), (2000, 2, 3, True)],
        *[(250, 1, 9, True), (249, 1, 17, False), (1000, 1, 1, False), (9999, 0, 9, False)],
    ],
)
def test_where_scores_are_kept(n_tokens, n_products, n_stages, pays):
    """Of 1,000 features: products of the size of half the later stages at most, and no more memory than four times the scores."""
    assert Gram.pays(n_tokens, 1000, n_products, n_stages) == pays
