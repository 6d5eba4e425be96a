"""Selection of the largest pre-activations, piece by piece and block by block, against a sort of all of them."""

import pytest
import torch
from kernel_inputs import D_SAE, TIGHT, encoder, gradients, randoms

from sae_nfm.kernels import dispatch, inference, sparse_sums, sums, topk


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


class LinearSum:
    """What features of a decoder write."""

    def __init__(self, W_dec):
        self.W_dec, self.written = W_dec, 0

    def add(self, new):
        self.written = self.written + sums.sum_by_token(new.indices, new.values, self.W_dec)

    def explained(self, acts):
        return self.written


@pytest.mark.parametrize("scaled", [True, False])
@torch.no_grad()
def test_a_ranking_in_bfloat16_chooses_as_the_exact_one(monkeypatch, scaled):
    x, W_enc, b_enc, norms, W_dec = randoms((50, 64), (64, 1100), (1100,), (1100,), (1100, 64), dtype=torch.float32)
    given = (x, W_enc, 0.1 * b_enc, norms.abs() if scaled else None)
    chosen, types = [], []

    def top_hidden_pre(sae_in, *rest):
        types.append(sae_in.dtype)
        return topk.top_hidden_pre(sae_in, *rest)

    monkeypatch.setattr(inference, "top_hidden_pre", top_hidden_pre)
    for rough in (False, True):
        monkeypatch.setattr(inference, "ranks_in_bfloat16", lambda weight, rough=rough: rough)
        acts = inference.select_sparsely(given, [3, 2, 3], LinearSum(0.01 * W_dec), None)
        chosen.append(dispatch.to_dense(acts, 1100))
    assert types == [torch.float32] * 4 + [torch.bfloat16] * 2
    torch.testing.assert_close(*chosen)
    assert chosen[0].count_nonzero() > 300
