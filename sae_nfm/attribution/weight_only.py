"""What the weights alone say about pairs, how far it agrees with what pairs do on tokens, and whether either is co-occurrence.

    open        ||(v_i * v_j) W_1 W_2||                 all gates open
    averaged    ||((v_i * v_j) W_1 E[D]) W_2||          each gate at the share of tokens on which it is open
    scaled      averaged, times E[f_i | i active] E[f_j | j active]

`open` and `averaged` depend on the scale of features: f_i -> c f_i, v_i -> v_i / c changes them and nothing else. `scaled` does
not. None knows which gates are open where the two features fire, or how strong they are together.

On tokens: `when firing` is the mean ||o_ij|| over tokens on which the pair fires, `total` its sum of ||o_ij||^2. A pair of
features that are active together more often has more of the second by counting alone, so each measure is correlated with how
often the pair fires and with the covariance of its features, beside the same with the rows of V permuted over features
(gates computed anew): what is left under the null is due to the features' activations, not to which embeddings interact.

Source: PolySAE, arXiv 2602.01322 (correlation of interaction weights with co-occurrence 0.06, of an SAE's covariance 0.82).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from sae_nfm.architectures import PathWeights
from sae_nfm.attribution.pair_table import PAIRS_AT_ONCE, PairSums, TokenBatch, summed
from sae_nfm.attribution.pairs import TokenPairs, TokenReads, norms
from sae_nfm.attribution.results import Correlation, PairControls
from sae_nfm.kernels import bi_interaction, hidden_pre

Floats = NDArray[np.float64]
FREQUENCY, COVARIANCE = "co-activation frequency", "covariance of the features"


def weight_strengths(weights: PathWeights, sums: PairSums, table: Any | None = None) -> dict[str, Floats]:
    """The weight-only measures of the pairs in a table (rows of `sums.table`; all unless given), by name."""
    first, second = (torch.from_numpy(one).to(weights.V.device) for one in sums.features(table))
    mean = sums.feature_sum / sums.feature_tokens.clamp_min(1)
    averaged = _weight_norms(weights, first, second, sums.gates)
    found = {
        "open": _weight_norms(weights, first, second, torch.ones_like(sums.gates)),
        "averaged": averaged,
        "scaled": averaged * (mean[first.cpu()] * mean[second.cpu()]).abs(),
    }
    return {name: values.numpy() for name, values in found.items()}


def _weight_norms(weights: PathWeights, first: Tensor, second: Tensor, gates: Tensor) -> Float[Tensor, " pairs"]:
    found, size = [torch.zeros(0, dtype=torch.float64)], PAIRS_AT_ONCE // 4
    for i, j in zip(first.split(size), second.split(size), strict=True):
        ones = torch.ones(1, len(i), dtype=weights.V.dtype, device=i.device)
        pairs = TokenPairs(first=i[None], second=j[None], product=ones)
        found.append(norms(pairs, gates[None].to(ones), weights)[0].double().cpu())
    return torch.cat(found)


def pair_controls(
    reads: TokenReads,
    weights: PathWeights,
    *,
    seed: int,
    min_tokens: int = 5,
    n_permutations: int = 3,
    show_progress: bool = True,
) -> PairControls:
    """Correlations of pair strengths with each other and with co-occurrence, and their null.

    Args:
        reads: tokens in memory (`first_reads`); every pair that fires on them is counted.
        min_tokens: on how many tokens a pair has to fire.
        n_permutations: permutations of the rows of V; each costs as much as the statistics themselves.

    Raises:
        ValueError: when fewer than 3 pairs fire often enough.
    """
    generator = torch.Generator().manual_seed(seed)
    measured, compared, n_pairs = _measures(reads, weights, min_tokens)
    nulls: list[Mapping[str, Floats]] = []
    for _ in tqdm(range(n_permutations), desc="Null", disable=not show_progress):
        order = torch.randperm(len(weights.V), generator=generator).to(weights.V.device)
        other = replace(weights, V=weights.V[order])
        nulls.append(_measures(replace(reads, gates=gates_of(reads, other)), other, min_tokens)[0])
    return PairControls(
        tokens=len(reads.gates),
        pairs=n_pairs,
        min_tokens=min_tokens,
        weights_against_tokens=tuple(
            correlated((name, measured[name]), (other, measured[other]))
            for name in ("open", "averaged", "scaled")
            for other in ("when firing", "total")
        ),
        cooccurrence=(
            *(
                correlated((name, values), other, [null[name] for null in nulls])
                for name, values in measured.items()
                for other in compared.items()
            ),
            correlated((COVARIANCE, compared[COVARIANCE]), (FREQUENCY, compared[FREQUENCY])),
        ),
    )


def gates_of(reads: TokenReads, weights: PathWeights) -> Bool[Tensor, "tokens nfm_dim"]:
    """The gates that other weights would have on the same features."""
    return hidden_pre(bi_interaction(reads.read, weights.V), weights.W_1, weights.b_1) > 0


def _measures(
    reads: TokenReads, weights: PathWeights, min_tokens: int
) -> tuple[dict[str, Floats], dict[str, Floats], int]:
    """Strengths of the pairs that fire often enough, what they are compared with, and how many there are; by key."""
    n = len(reads.gates)
    tokens = torch.arange(n)
    sums = summed(TokenBatch(reads=reads, row=tokens, position=tokens).split(PAIRS_AT_ONCE), weights)
    table: Any = sums.table[sums.table["tokens"] >= min_tokens].sort_index()
    if len(table) < 3:
        raise ValueError(
            f"{len(table)} pairs fire on at least {min_tokens} of {n} tokens; give more tokens, or a lower min_tokens"
        )
    first, second = sums.features(table)
    means = (sums.feature_sum / n).numpy()
    strengths = weight_strengths(weights, sums, table)
    strengths["when firing"] = (table["norm"] / table["tokens"]).to_numpy()
    strengths["total"] = table["energy"].to_numpy()
    compared = {
        FREQUENCY: table["tokens"].to_numpy() / n,
        COVARIANCE: table["product"].to_numpy() / n - means[first] * means[second],
    }
    return strengths, compared, len(table)


def correlated(one: tuple[str, Floats], other: tuple[str, Floats], nulls: list[Floats] | None = None) -> Correlation:
    """Correlate two named measures, and the first one's nulls with the second."""
    (measure, x), (against, y) = one, other
    found = [_coefficients(null, y) for null in nulls or []]
    pearson, spearman = _coefficients(x, y)
    return Correlation(
        measure=measure,
        against=against,
        pearson=pearson,
        spearman=spearman,
        null_pearson=tuple(r for r, _ in found if r is not None),
        null_spearman=tuple(rho for _, rho in found if rho is not None),
    )


def _coefficients(x: Floats, y: Floats) -> tuple[float | None, float | None]:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None, None
    pearson: Any = stats.pearsonr(x, y)
    spearman: Any = stats.spearmanr(x, y)
    return float(pearson.statistic), float(spearman.statistic)
