"""Weight-only strengths by hand and beside a loop; correlations beside pandas's; what the null takes away."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from builders import D_SAE
from pair_inputs import pair_sae, x

from sae_nfm.architectures.nfm_paths import PathWeights
from sae_nfm.attribution.pair_table import (
    COVARIANCE,
    FREQUENCY,
    TokenBatch,
    correlated,
    gates_of,
    pair_controls,
    summed,
    weight_strengths,
)
from sae_nfm.attribution.pairs import TokenPairs, TokenReads, norms, token_reads
from sae_nfm.attribution.results import Correlation
from sae_nfm.kernels.reference import SparseActs

SAE = pair_sae(nfm_top_k=None)
WEIGHTS = PathWeights.of(SAE)


def random_reads(rows: int = 200) -> TokenReads:
    return token_reads(SAE, x(rows))


def sums_of(reads: TokenReads, weights: PathWeights = WEIGHTS):
    tokens = torch.arange(len(reads.gates))
    return summed([TokenBatch(reads=reads, row=tokens, position=tokens)], weights)


def test_strengths_are_those_of_a_loop():
    sums = sums_of(random_reads())
    found = weight_strengths(WEIGHTS, sums)
    for n, (i, j) in enumerate(zip(*sums.features(), strict=True)):
        pooled = WEIGHTS.V[i] * WEIGHTS.V[j] @ WEIGHTS.W_1
        averaged = (pooled * sums.gates) @ WEIGHTS.W_2
        mean = (sums.feature_sum / sums.feature_tokens)[[i, j]].prod()
        expected = [(pooled @ WEIGHTS.W_2).norm(), averaged.norm(), averaged.norm() * mean]
        assert [found[name][n] for name in ("open", "averaged", "scaled")] == pytest.approx(
            [float(e) for e in expected]
        )


def test_only_scaled_strengths_are_free_of_the_scale_of_features():
    reads = random_reads()
    c = 0.5 + torch.rand(D_SAE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaled = replace(reads, read=SparseActs(reads.read.indices, reads.read.values * c[reads.read.indices]))
    other = replace(WEIGHTS, V=WEIGHTS.V / c[:, None])
    before, after = (
        weight_strengths(weights, sums := sums_of(of, weights), sums.table.sort_index())
        for weights, of in ((WEIGHTS, reads), (other, scaled))
    )
    assert after["scaled"] == pytest.approx(before["scaled"])
    assert after["open"] != pytest.approx(before["open"], rel=0.1)


def test_with_every_gate_open_and_one_activation_weights_are_what_pairs_do():
    """Then ||o_ij|| = f_i f_j times the strength at open gates, on every token."""
    reads = random_reads()
    same = replace(
        reads,
        gates=torch.ones_like(reads.gates),
        read=SparseActs(reads.read.indices, torch.ones_like(reads.read.values)),
    )
    pairs, sums = TokenPairs.of(same.read), sums_of(same)
    on_token = dict(
        zip(
            (pairs.first[0] * D_SAE + pairs.second[0]).tolist(),
            norms(pairs, same.gates, WEIGHTS)[0].tolist(),
            strict=True,
        )
    )
    by_weights = dict(zip(sums.table.index, weight_strengths(WEIGHTS, sums)["scaled"], strict=True))
    assert {key: by_weights[key] for key in on_token} == pytest.approx(on_token)


def test_correlations_are_those_of_pandas():
    reads = random_reads()
    found = pair_controls(reads, WEIGHTS, seed=0, min_tokens=3, n_permutations=2, show_progress=False)
    table = (sums := sums_of(reads)).table
    table = table[table["tokens"] >= 3]
    dense = torch.zeros(200, D_SAE, dtype=torch.float64).scatter_add(1, *reads.read)
    covariance = pd.DataFrame(dense.numpy()).cov(ddof=0).to_numpy()
    columns = pd.DataFrame(
        {
            FREQUENCY: table["tokens"] / 200,
            COVARIANCE: covariance[sums.features(table)],
            "when firing": table["norm"] / table["tokens"],
            "total": table["energy"],
            "open": weight_strengths(WEIGHTS, sums, table)["open"],
        }
    )
    pearson, spearman = columns.corr(), columns.corr(method="spearman")
    assert (found.pairs, found.tokens) == (len(table), 200)
    named = {(one.measure, one.against): one for one in (*found.weights_against_tokens, *found.cooccurrence)}
    for pair in [("open", "total"), ("when firing", FREQUENCY), ("total", COVARIANCE), (COVARIANCE, FREQUENCY)]:
        assert named[pair].pearson == pytest.approx(pearson.loc[pair])
        assert named[pair].spearman == pytest.approx(spearman.loc[pair])
    assert [len(one.null_pearson) for one in found.cooccurrence] == [2] * 10 + [0]
    assert len(found.weights_against_tokens) == 6


def test_only_embeddings_that_know_frequency_stand_out_from_the_null():
    """Features that are often active get large embeddings: strength when firing then goes with frequency, the null's not."""
    generator = torch.Generator().manual_seed(0)
    often = torch.rand(D_SAE, generator=generator, dtype=torch.float64)
    indices = torch.stack([torch.multinomial(often, 4, generator=generator) for _ in range(400)]).sort(-1).values
    gates = torch.ones(400, 8, dtype=torch.bool)
    reads = TokenReads(
        read=SparseActs(indices, torch.ones(400, 4, dtype=torch.float64)),
        gates=gates,
        interaction=torch.zeros(400, 16),
        linear=None,
    )
    weights = replace(WEIGHTS, V=often[:, None] * WEIGHTS.V, b_1=WEIGHTS.b_1 + 100)  # no gate ever shuts
    found = {
        (one.measure, one.against): one
        for one in pair_controls(reads, weights, seed=1, n_permutations=5, show_progress=False).cooccurrence
    }
    firing, total = found["when firing", FREQUENCY], found["total", FREQUENCY]
    assert firing.spearman > 0.3 > max(map(abs, firing.null_spearman))
    assert sum(total.null_spearman) / 5 > 0.1


def test_gates_of_the_sae_s_own_weights_are_its_gates():
    reads = random_reads()
    assert torch.equal(gates_of(reads, WEIGHTS), reads.gates)


def test_what_cannot_be_correlated_is_none_or_refused():
    constant, values = np.ones(4), np.arange(4.0)
    assert correlated(("a", constant), ("b", values)) == Correlation(
        measure="a", against="b", pearson=None, spearman=None
    )
    with pytest.raises(ValueError, match=r"\b0 pairs\b.*\b5 of 3 tokens\b.*\bmin_tokens\b"):
        pair_controls(random_reads(3), WEIGHTS, seed=0)
