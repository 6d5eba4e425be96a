"""Pairs by hand and by loop; their sum is the path; relabelling, gauges and scales change no pair; what is refused."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from builders import ARCHITECTURES, D_SAE, HOOK_Z, random_sae, training_config
from pair_inputs import pair_sae, pairs_by_loop, x
from sae_lens import SAE, TopKSAE, TopKSAEConfig

from sae_nfm.analysis.gauge import canonical
from sae_nfm.architectures.nfm_paths import PathWeights
from sae_nfm.attribution.pairs import (
    TokenPairs,
    TokenReads,
    along,
    bias_terms,
    norms,
    single_features,
    strongest,
    token_reads,
    written,
)
from sae_nfm.kernels.reference import SparseActs

SETTINGS = [{"nfm_top_k": None}, {"nfm_top_k": 3}, {"nfm_top_k": None, "kernel": "sparse"}, {"nfm_dim": 2}]


def read_weights(sae: SAE, rows: int = 12) -> tuple[TokenReads, PathWeights, TokenPairs]:
    reads = token_reads(sae, x(rows))
    return reads, PathWeights.of(sae), TokenPairs.of(reads.read)


def hand_weights() -> PathWeights:
    eye, zero = torch.eye(2), torch.zeros(2)
    V = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 5.0]])
    return PathWeights(V=V, W_1=eye, b_1=torch.tensor([1.0, 2.0]), W_2=2 * eye, b_2=zero, W_lin=None, b_lin=None)


def test_a_token_by_hand():
    """f = (2, 1, 0.5) and the second gate shut: only the first dimension of v_i * v_j is written, doubled."""
    reads = SparseActs(torch.tensor([[0, 1, 2]]), torch.tensor([[2.0, 1.0, 0.5]]))
    pairs, gates = TokenPairs.of(reads), torch.tensor([[True, False]])
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([[0, 0, 1]], [[1, 2, 2]])
    assert pairs.product.tolist() == [[2.0, 1.0, 0.5]]
    assert written(pairs, gates, hand_weights()).tolist() == [[[12.0, 0.0], [0.0, 0.0], [0.0, 0.0]]]
    assert norms(pairs, torch.tensor([[True, True]]), hand_weights()).tolist() == [
        pytest.approx([(12**2 + 8**2) ** 0.5, 20.0, 5.0])
    ]
    assert along(reads, gates, hand_weights(), torch.tensor([[0.5, 7.0]])).tolist() == [[6.0, 0.0, 0.0]]
    constant, gated = bias_terms(gates, hand_weights())
    assert (constant.tolist(), gated.tolist()) == ([0.0, 0.0], [[2.0, 0.0]])


@pytest.mark.parametrize("overrides", SETTINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_pair_is_that_of_a_loop_and_their_sum_is_the_path(architecture, overrides):
    sae = pair_sae(architecture, **overrides)
    reads, weights, pairs = read_weights(sae)
    vectors = written(pairs, reads.gates, weights)
    for token in (0, 5):
        by_loop = pairs_by_loop(sae, reads, token)
        assert len(by_loop) == int(pairs.fires[token].sum())
        for pair, vector in zip(
            zip(pairs.first[token].tolist(), pairs.second[token].tolist(), strict=True), vectors[token], strict=True
        ):
            torch.testing.assert_close(vector, by_loop.get(pair, torch.zeros_like(vector)))
    constant, gated = bias_terms(reads.gates, weights)
    torch.testing.assert_close(vectors.sum(1) + gated + constant, reads.interaction)
    torch.testing.assert_close(single_features(reads.read, weights).sum(1) + weights.b_lin, reads.linear)
    directions = torch.randn(12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norms(pairs, reads.gates, weights), vectors.norm(dim=-1))
    torch.testing.assert_close(
        along(reads.read, reads.gates, weights, directions), torch.einsum("tpd,td->tp", vectors, directions)
    )


@pytest.mark.parametrize("overrides", SETTINGS[:3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bilinear_pairs_and_squares_are_those_of_a_loop_and_their_sum_is_the_path(architecture, overrides):
    sae = pair_sae(architecture, head="bilinear", **overrides)
    reads, weights = token_reads(sae, x()), PathWeights.of(sae)
    assert not hasattr(sae, "W_1")
    assert reads.gates.all()
    pairs = TokenPairs.of(reads.read, selves=weights.selves)
    vectors = written(pairs, reads.gates, weights)
    for token in (0, 5):
        by_loop = pairs_by_loop(sae, reads, token)
        ends = zip(pairs.first[token].tolist(), pairs.second[token].tolist(), strict=True)
        found = {pair: vector for pair, vector in zip(ends, vectors[token], strict=True) if vector.any()}
        assert_same_pairs(found, by_loop)
        torch.testing.assert_close(sum(by_loop.values()) + sae.b_2.detach(), reads.interaction[token])
    torch.testing.assert_close(vectors.sum(1) + sum(bias_terms(reads.gates, weights)), reads.interaction)
    assert not bias_terms(reads.gates, weights)[1].any()
    directions = torch.randn(12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norms(pairs, reads.gates, weights), vectors.norm(dim=-1))
    torch.testing.assert_close(
        along(reads.read, reads.gates, weights, directions), torch.einsum("tpd,td->tp", vectors, directions)
    )
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(1))
    other = weights.permuted(order)
    torch.testing.assert_close(torch.cat([other.V, other.B], dim=-1), sae.V[order].detach())


@torch.no_grad()
def test_the_scale_that_two_projections_trade_changes_no_pair():
    """A column of A times s and that of B over s, and the two exchanged; balanced they have one norm."""
    sae = pair_sae(head="bilinear", nfm_top_k=None)
    traded, s = deepcopy(sae), torch.linspace(0.1, 3.0, 8, dtype=torch.float64)
    A, B = sae.V.chunk(2, dim=-1)
    traded.V.copy_(torch.cat([B * s, A / s], dim=-1))
    expected = by_pair(sae)
    for other in (traded, canonical(traded)):
        assert_same_pairs(by_pair(other), expected)
    balanced = canonical(traded).V
    norms_of = balanced.norm(dim=0)
    torch.testing.assert_close(norms_of[:8], norms_of[8:])
    # whatever was traded before, a feature has one norm
    torch.testing.assert_close(balanced.norm(dim=-1), canonical(sae).V.norm(dim=-1))
    assert not torch.allclose(traded.V.norm(dim=-1), sae.V.norm(dim=-1), rtol=0.1)


def test_what_passed_the_hooks_is_what_the_paths_write():
    sae = pair_sae()
    paths, reads = sae.decode_paths(sae.encode(x())), token_reads(sae, x())
    torch.testing.assert_close(reads.interaction, paths.interaction)
    torch.testing.assert_close(reads.linear, paths.linear)
    assert not any(hook.fwd_hooks for hook in sae.hook_dict.values())  # what reads along is taken off


def test_heads_are_flattened():
    sae = pair_sae(hook_name=HOOK_Z)
    reads, weights, pairs = read_weights(sae)
    torch.testing.assert_close(
        written(pairs, reads.gates, weights).sum(1) + sum(bias_terms(reads.gates, weights)), reads.interaction
    )
    assert sae.hook_z_reshaping_mode


@torch.no_grad()
def by_pair(sae: SAE, token: int = 3) -> dict[tuple[int, int], torch.Tensor]:
    return pairs_by_loop(sae, token_reads(sae, x()), token)


def assert_same_pairs(found, expected, name=lambda pair: pair):
    assert {name(pair) for pair in expected} == set(found)
    for pair, vector in expected.items():
        torch.testing.assert_close(found[name(pair)], vector)


@torch.no_grad()
def test_relabelled_features_have_the_same_pairs():
    sae, order = pair_sae(), torch.randperm(D_SAE, generator=torch.Generator().manual_seed(3))
    relabelled, place = pair_sae(), order.argsort().tolist()
    for name in ("W_dec", "W_lin", "V", "U", "b_enc"):
        getattr(relabelled, name).copy_(getattr(sae, name)[order])
    relabelled.W_enc.copy_(sae.W_enc[:, order])
    assert_same_pairs(by_pair(relabelled), by_pair(sae), lambda pair: tuple(sorted(place[i] for i in pair)))


@torch.no_grad()
def test_folding_the_linear_path_leaves_every_pair_as_it_is():
    sae = pair_sae(nfm_top_k=None)
    assert_same_pairs(by_pair(sae.folded()), by_pair(sae))


@torch.no_grad()
def test_folding_decoder_norms_leaves_every_pair_as_it_is():
    sae, before = (random_sae(training_config("joint_nfm", dtype="float64")) for _ in range(2))
    sae.fold_W_dec_norm()
    assert_same_pairs(by_pair(sae), by_pair(before))


@pytest.mark.parametrize("seed", range(5))
def test_scales_and_orders_that_cancel_leave_every_pair_as_it_is(seed):
    """v_i / c_i with f_i c_i; pooled s with W_1 / s^2, in another order; hidden t > 0 with W_2 / t, in another order."""
    generator = torch.Generator().manual_seed(seed)
    sae = pair_sae()
    reads, weights, pairs = read_weights(sae)
    c, s, t = (0.5 + torch.rand(n, generator=generator, dtype=torch.float64) for n in (D_SAE, 8, 8))
    pooled, hidden = (torch.randperm(8, generator=generator) for _ in range(2))
    scaled = SparseActs(reads.read.indices, reads.read.values * c[reads.read.indices])
    other = replace(
        weights,
        V=(weights.V / c[:, None] * s)[:, pooled],
        W_1=((weights.W_1 / s.square()[:, None])[pooled] * t)[:, hidden],
        b_1=(weights.b_1 * t)[hidden],
        W_2=(weights.W_2 / t[:, None])[hidden],
    )
    found = written(TokenPairs.of(scaled), reads.gates[:, hidden], other)
    torch.testing.assert_close(found, written(pairs, reads.gates, weights))


@torch.no_grad()
@pytest.mark.parametrize("active", [0, 1, 2])
def test_few_active_features(active):
    """No pair below two of them; the path then writes its biases alone."""
    sae = pair_sae(nfm_top_k=None)
    sae.b_enc.copy_(torch.where(torch.arange(D_SAE) < active, 100.0, -100.0))
    reads, weights, pairs = read_weights(sae)
    assert pairs.fires.sum(1).tolist() == [active * (active - 1) // 2] * 12
    vectors = written(pairs, reads.gates, weights)
    torch.testing.assert_close(vectors.sum(1) + sum(bias_terms(reads.gates, weights)), reads.interaction)
    assert (
        norms(pairs, reads.gates, weights).shape
        == along(reads.read, reads.gates, weights, x(1)).shape
        == pairs.product.shape
    )


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["dense", "sparse"])
def test_of_equal_features_the_ones_that_the_sae_read_are_attributed(kernel):
    """All features equal, three of four read: which three is the SAE's choice, and the sum is of these."""
    sae = pair_sae(kernel=kernel, rescale_acts_by_decoder_norm=False)
    sae.W_enc.zero_()
    sae.b_enc.fill_(1.0)
    reads, weights, pairs = read_weights(sae)
    assert reads.read.values.tolist() == [[1.0] * 3] * 12
    vectors = written(pairs, reads.gates, weights)
    torch.testing.assert_close(vectors.sum(1) + sum(bias_terms(reads.gates, weights)), reads.interaction)


def test_negative_features_are_read_with_their_sign():
    sae = pair_sae(nfm_top_k=None)
    acts = torch.zeros(1, D_SAE, dtype=torch.float64)
    acts[0, [3, 7, 9]] = torch.tensor([-2.0, 1.0, 3.0], dtype=torch.float64)
    with torch.no_grad(), sae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda value, hook: acts.expand_as(value))]):
        reads = token_reads(sae, x())
    pairs, weights = TokenPairs.of(reads.read), PathWeights.of(sae)
    assert pairs.product[0].tolist() == [-2.0, -6.0, 3.0]
    torch.testing.assert_close(
        written(pairs, reads.gates, weights).sum(1) + sum(bias_terms(reads.gates, weights)), reads.interaction
    )


def test_equal_pairs_come_in_the_order_of_their_features():
    values, fires = torch.tensor([2.0, -3.0, 3.0, 9.0, 0.0]), torch.tensor([True, True, True, False, True])
    assert strongest(values, fires, 3).tolist() == [1, 2, 0]
    assert strongest(values, fires, 9).tolist() == [1, 2, 0, 4]


def test_joined_parts_are_the_whole():
    sae = pair_sae(nfm_top_k=None)
    whole = token_reads(sae, x())
    narrow = replace(whole.of(torch.arange(2)), read=SparseActs(*(part[:2, :2] for part in whole.read)))
    joined = TokenReads.joined([narrow, *whole.split(5)])
    torch.testing.assert_close(joined.read.values[2:], whole.read.values)
    torch.testing.assert_close(joined.gates[2:], whole.gates)
    assert TokenPairs.of(joined.read).fires.sum(1)[:3].tolist() == [1, 1, 6]


@pytest.mark.parametrize("head", ["mlp", "none"])
def test_heads_without_pairs_are_refused(head):
    with pytest.raises(ValueError, match=rf"\bhead '{head}'.*\bfm\b"):
        token_reads(pair_sae(head=head), x())


def test_dropout_a_secondary_and_plain_saes_are_refused():
    with pytest.raises(ValueError, match=r"\bnfm_dropout 0\.5\b"):
        token_reads(random_sae(training_config("joint_nfm", nfm_dropout=0.5, dtype="float64")), x())
    plain = TopKSAE(TopKSAEConfig(d_in=16, d_sae=32, k=4))
    with pytest.raises(ValueError, match=r"'topk'.*\bjoint_nfm\b"):
        token_reads(plain, x())
    sae = pair_sae()
    sae.hidden_code = lambda primary, hidden: hidden
    with pytest.raises(ValueError, match=r"\bsecondary SAE\b"):
        token_reads(sae, x())


def test_a_linear_path_that_is_off_has_no_single_features():
    reads, weights, _ = read_weights(pair_sae(use_linear_path=False))
    assert reads.linear is None
    with pytest.raises(ValueError, match=r"\blinear path\b"):
        single_features(reads.read, weights)
