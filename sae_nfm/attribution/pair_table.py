"""Pairs over a corpus, in bounded memory: how often each fires, what it writes, where.

A first pass keeps at most `capacity` pairs. Whenever there are more, the weight of the heaviest one that does not fit is taken
off every pair's weight, and pairs with nothing left are dropped (Misra-Gries, the weight being the energy ||o_ij||^2). What is
exact:

* where nothing was dropped, every statistic of every pair that fired;
* otherwise a second pass counts the pairs kept from the start, so that their statistics are exact too, and every pair that is not
  among them has an energy of at most `slack`, itself at most the total energy / (capacity + 1).

Totals (tokens, firings, energy) are exact in either case. "Exact" is up to float32 for each pair on a token and float64 for sums.

Source: Misra & Gries 1982; Agarwal et al. 2012, Mergeable Summaries (PODS), for batches.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sae_nfm.architectures import PathWeights
from sae_nfm.attribution.corpus import Corpus, TokenBatch
from sae_nfm.attribution.pairs import TokenPairs, along, norms
from sae_nfm.attribution.results import Context

CAPACITY = 1_000_000
"""Pairs kept. With 500,000 of them a run took 0.5 GB beside model and SAE, merges and batches included."""
SUMS = ("tokens", "norm", "energy", "product", "effect")
COLUMNS = (*SUMS, "norm_max", "weight")


@dataclass(frozen=True, kw_only=True)
class PairSums:
    """Sums over tokens, for each pair."""

    table: pd.DataFrame
    """By key first * d_sae + second: `tokens` on which the pair fires, sums there of `norm` ||o_ij||, `energy` ||o_ij||^2,
    `product` f_i f_j and `effect` <o_ij, direction> (0 without a direction), and `norm_max`. Descending by energy."""
    d_sae: int
    tokens: int
    firings: int
    energy: float
    """Sum of all pairs' energy over all tokens, of those not in the table too. Pairs are not orthogonal: it is not the path's."""
    slack: float
    """The most energy that a pair which is not in the table can have; 0 when every pair that fired is in it."""
    feature_tokens: Float[Tensor, " d_sae"]
    feature_sum: Float[Tensor, " d_sae"]
    """Sum of each feature's activations as read."""
    feature_squares: Float[Tensor, " d_sae"]
    gates: Float[Tensor, " nfm_dim"]
    """Share of tokens on which each gate is open."""

    @property
    def complete(self) -> bool:
        """Whether every pair that fired is in the table."""
        return self.slack == 0

    def features(self, table: pd.DataFrame | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and second feature of each row of the table, or of some rows of it."""
        keys: Any = (self.table if table is None else table).index
        first, second = np.divmod(np.asarray(keys, dtype=np.int64), self.d_sae)
        return first, second


class PairTable:
    """Running sums by pair, at most `capacity` of them (None: all)."""

    def __init__(self, capacity: int | None) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be > 0, got {capacity}")
        self._capacity, self._parts, self._waiting = capacity, list[pd.DataFrame](), 0
        self._table: Any = pd.DataFrame(columns=list(COLUMNS), dtype=np.float64, index=pd.Index([], dtype=np.int64))
        self.slack = 0.0

    def add(self, rows: pd.DataFrame) -> None:
        """Add rows, of which several can be of one pair."""
        part = _summed(rows)
        self._parts.append(part)
        self._waiting += len(part)
        if self._waiting > max(len(self._table), 100_000):
            self._merge()

    def table(self) -> pd.DataFrame:
        """The sums, descending by energy; equal ones by key."""
        self._merge()
        return self._table.sort_index().sort_values("energy", ascending=False, kind="stable")

    def _merge(self) -> None:
        if not self._parts:
            return
        table: Any = _summed(pd.concat([part for part in (self._table, *self._parts) if len(part)] or [self._table]))
        self._parts, self._waiting = [], 0
        if self._capacity is not None and len(table) > self._capacity:
            weights = table["weight"].to_numpy()
            least = float(np.partition(weights, len(weights) - self._capacity - 1)[len(weights) - self._capacity - 1])
            self.slack += least
            table["weight"] = weights - least
            table = table[table["weight"] > 0]
        self._table = table


def _summed(rows: pd.DataFrame) -> pd.DataFrame:
    groups: Any = rows.groupby(level=0, sort=False)
    return groups[[*SUMS, "weight"]].sum().assign(norm_max=groups["norm_max"].max())


def pair_sums(corpus: Corpus, *, capacity: int | None = CAPACITY) -> PairSums:
    """Sums over a corpus for every pair, or, where there are more than `capacity`, for those of most energy.

    Args:
        corpus: gone through once, and once more where pairs had to be dropped.
        capacity: pairs kept, see the module; None for all that fire.
    """
    weights = PathWeights.of(corpus.sae)
    found = summed(corpus.batches("Pairs"), weights, capacity=capacity)
    if found.complete:
        return found
    again = summed(corpus.batches("Exact sums"), weights, only=np.sort(np.asarray(found.table.index)))
    return replace(found, table=again.table)


@torch.no_grad()
def summed(
    batches: Iterable[TokenBatch],
    weights: PathWeights,
    *,
    capacity: int | None = None,
    only: NDArray[np.int64] | None = None,
) -> PairSums:
    """One pass: sums by pair.

    Args:
        batches: tokens.
        weights: of the interaction path, those of an SAE or others.
        capacity: pairs kept; None for all.
        only: sorted keys of the pairs to look at, the others counting in no total; None for all.
    """
    d_sae, m = weights.V.shape
    pairs, totals = PairTable(capacity), {"tokens": 0, "firings": 0.0, "energy": 0.0}
    features, gates = torch.zeros(3, d_sae, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    for batch in batches:
        rows = pair_rows(batch, weights, only)
        totals["tokens"] += len(batch.row)
        totals["firings"] += len(rows)
        totals["energy"] += float(rows["energy"].to_numpy().sum())
        pairs.add(rows)
        _add_features(features, batch)
        gates += batch.reads.gates.double().sum(0).cpu()
    return PairSums(
        table=pairs.table().drop(columns="weight"),
        d_sae=d_sae,
        tokens=int(totals["tokens"]),
        firings=int(totals["firings"]),
        energy=totals["energy"],
        slack=pairs.slack,
        feature_tokens=features[0],
        feature_sum=features[1],
        feature_squares=features[2],
        gates=gates / max(1, totals["tokens"]),
    )


def _add_features(sums: Float[Tensor, "3 d_sae"], batch: TokenBatch) -> None:
    """Add what each feature does on a batch: tokens, sum, sum of squares."""
    values, indices = batch.reads.read.values.double().cpu().flatten(), batch.reads.read.indices.cpu().flatten()
    for row, value in zip(sums, ((values != 0).double(), values, values.square()), strict=True):
        row.index_add_(0, indices, value)


def pair_rows(batch: TokenBatch, weights: PathWeights, only: NDArray[np.int64] | None = None) -> pd.DataFrame:
    """A row for each pair that fires on each token, by key first * d_sae + second; `token` is its place in the batch.

    Args:
        batch: tokens.
        only: sorted keys of the pairs to look at; None for all.
    """
    read, gates, pairs = batch.reads.read, batch.reads.gates, TokenPairs.of(batch.reads.read)
    keys, chosen = pairs.first * len(weights.V) + pairs.second, pairs.fires
    if only is None:
        norm = norms(pairs, gates, weights)[chosen]
    else:
        chosen = chosen & torch.isin(keys, torch.from_numpy(only).to(keys.device))
        single = pairs.flat(chosen)
        norm = norms(single, gates[chosen.nonzero()[:, 0]], weights)[:, 0]
    effect = torch.zeros_like(norm)
    if batch.directions is not None:
        effect = along(read, gates, weights, batch.directions)[chosen]
    columns = {"norm": norm, "energy": norm.double().square(), "product": pairs.product[chosen], "effect": effect}
    columns |= {"tokens": torch.ones_like(norm), "norm_max": norm, "weight": columns["energy"]}
    rows: Any = {name: column.double().cpu().numpy() for name, column in columns.items()}
    rows["token"] = chosen.nonzero()[:, 0].cpu().numpy()
    return pd.DataFrame(rows, index=keys[chosen].cpu().numpy())


def strongest_firings(corpus: Corpus, keys: NDArray[np.int64], *, n: int) -> pd.DataFrame:
    """Where some pairs write most, in one pass: the n tokens of largest ||o_ij|| of each pair, the earlier of equal ones.

    Args:
        keys: first * d_sae + second.
        n: tokens for each pair, at most.

    Returns:
        Rows by ascending key, then descending norm: `place` (row * pos + position), `norm`, and `effect` as of `pair_rows`.
    """
    weights, only, width = PathWeights.of(corpus.sae), np.sort(keys), corpus.tokens.shape[1]
    best = pd.DataFrame({"place": np.zeros(0, dtype=np.int64), "norm": np.zeros(0), "effect": np.zeros(0)})
    best.index = best.index.astype(np.int64)
    for batch in corpus.batches("Contexts of pairs"):
        place = (batch.row * width + batch.position).cpu().numpy()
        rows: Any = pair_rows(batch, weights, only)
        new = rows.assign(place=place[rows["token"].to_numpy()])[list(best.columns)]
        best = _largest(pd.concat([part for part in (best, new) if len(part)] or [best]), n)
    return best


def _largest(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """The n rows of each key with the largest norm."""
    table: Any = rows
    keys = table.index.to_numpy()
    order = np.lexsort((table["place"].to_numpy(), -table["norm"].to_numpy(), keys))
    keys = keys[order]
    return table.iloc[order[np.arange(len(keys)) - np.searchsorted(keys, keys) < n]]


def top_contexts(corpus: Corpus, keys: NDArray[np.int64], *, n: int = 5) -> dict[int, tuple[Context, ...]]:
    """`strongest_firings` with their text.

    Args:
        keys: first * d_sae + second.
        n: tokens for each pair, at most.
    """
    found: dict[int, list[Context]] = {int(key): [] for key in keys}
    strongest: Any = strongest_firings(corpus, keys, n=n)
    for one in strongest.itertuples():
        row, position = divmod(int(one.place), corpus.tokens.shape[1])
        effect = float(one.effect) if corpus.directed else None
        text = corpus.text(row, position)
        found[int(one.Index)].append(
            Context(row=row, position=position, norm=float(one.norm), effect=effect, text=text)
        )
    return {key: tuple(contexts) for key, contexts in found.items()}
