"""Pairs over a corpus, in bounded memory: how often each fires, what it writes, where; what the weights alone say about them.

A first pass keeps at most `capacity` pairs. Whenever there are more, the weight of the heaviest one that does not fit is taken
off every pair's weight, and pairs with nothing left are dropped (Misra-Gries, the weight being the energy ||o_ij||^2). What is
exact:

* where nothing was dropped, every statistic of every pair that fired;
* otherwise a second pass counts the pairs kept from the start, so that their statistics are exact too, and every pair that is not
  among them has an energy of at most `slack`, itself at most the total energy / (capacity + 1).

Totals (tokens, firings, energy) are exact in either case. "Exact" is up to float32 for each pair on a token and float64 for sums.
`Corpus` is the only place where the analysis of pairs runs the language model.

The weights alone give each pair a strength:

    open        ||(v_i * v_j) W_1 W_2||                 all gates open
    averaged    ||((v_i * v_j) W_1 E[D]) W_2||          each gate at the share of tokens on which it is open
    scaled      averaged, times E[f_i | i active] E[f_j | j active]

With head "bilinear", (a_i * b_j + a_j * b_i) W_2 without gates, the first two are the same. Its squares f_i^2 are in the tables
as pairs of a feature with itself, and left out where pairs are compared with co-occurrence.

`open` and `averaged` depend on the scale of features: f_i -> c f_i, v_i -> v_i / c changes them and nothing else. `scaled` does
not. None knows which gates are open where the two features fire, or how strong they are together.

On tokens: `when firing` is the mean ||o_ij|| over tokens on which the pair fires, `total` its sum of ||o_ij||^2. A pair of
features that are active together more often has more of the second by counting alone, so each measure is correlated with how
often the pair fires and with the covariance of its features, beside the same with the rows of V permuted over features
(gates computed anew): what is left under the null is due to the features' activations, not to which embeddings interact.

Source: Misra & Gries 1982; Agarwal et al. 2012, Mergeable Summaries (PODS), for batches. PolySAE,
arXiv 2602.01322 (correlation of interaction weights with co-occurrence 0.06, of an SAE's covariance 0.82).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from sae_lens import SAE
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from sae_nfm.architectures import PathWeights, attributable
from sae_nfm.attribution.direct_logits import SCALE, DirectPath, Target
from sae_nfm.attribution.pair_effects import observed, unit_written
from sae_nfm.attribution.pairs import TokenPairs, TokenReads, along, norms, reads_of
from sae_nfm.attribution.results import Context, Correlation, PairControls
from sae_nfm.common import ShortRepr
from sae_nfm.kernels import bi_interaction, hidden_pre
from sae_nfm.models import LanguageModel, check_counted, check_finite, counted_tokens, real_tokens, run_rows, token_text

PAIRS_AT_ONCE = 2**19
"""Pairs of a batch at most, times tokens: some 100 MB in all tensors and tables of them."""
REMEMBERED = 2**28
"""Bytes of what the paths read and wrote that a corpus remembers between two passes: here 100,000 tokens at d_in 256."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenBatch(ShortRepr):
    """Counted tokens of some rows."""

    reads: TokenReads
    row: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]
    directions: Float[Tensor, "#tokens d_in"] | None = None
    """Along which effects are measured, in the space of what the path writes; None for none."""

    @property
    def size(self) -> int:
        """Bytes of what the paths read and wrote."""
        reads = self.reads
        parts = (*reads.read, reads.gates, reads.interaction, *(() if reads.linear is None else (reads.linear,)))
        return sum(part.nbytes for part in parts)

    def split(self, n_pairs: int) -> Iterator["TokenBatch"]:
        """In pieces of at most about `n_pairs` pairs."""
        n = self.reads.read.indices.shape[-1]
        size = max(1, n_pairs // max(1, n * (n - 1) // 2))
        for reads, start in zip(self.reads.split(size), range(0, len(self.row), size), strict=True):
            piece, directions = slice(start, start + size), self.directions
            if directions is not None and len(directions) > 1:
                directions = directions[piece]
            yield TokenBatch(reads=reads, row=self.row[piece], position=self.position[piece], directions=directions)


class Corpus:
    """Rows of tokens that can be gone through several times.

    What the first batches read is remembered, up to `REMEMBERED` bytes; for the others the language model runs in every pass.

    Args:
        tokens: held-out rows, each beginning with BOS where the model wants one.
        target: measure each pair's direct effect on it; or a fixed direction [d_in] in the space of what the path writes.

    Raises:
        ValueError: see `attributable` and `DirectPath`; or no token is counted (not special, not in position 0).
    """

    def __init__(
        self,
        model: LanguageModel,
        sae: SAE[Any],
        tokens: Int[Tensor, "rows pos"],
        *,
        target: Target | Float[Tensor, " d_in"] | None = None,
        batch_rows: int = 16,
        show_progress: bool = True,
    ) -> None:
        self.sae = attributable(sae)
        self._model, self.tokens, self._target = model, tokens, target
        self._batch_rows, self._show_progress = batch_rows, show_progress
        self._remembered, self._left = dict[int, TokenBatch](), REMEMBERED
        self._direct = DirectPath(model, sae) if isinstance(target, Target) else None
        self._real = real_tokens(model, tokens)
        check_counted(counted_tokens(model, tokens, self._real))

    @property
    def directed(self) -> bool:
        """Whether there is a target or a direction that effects are on."""
        return self._target is not None

    def batches(self, what: str) -> Iterator[TokenBatch]:
        """One pass; `what` is done with them stands at the progress bar."""
        with tqdm(total=len(self.tokens), desc=what, unit="row", disable=not self._show_progress) as progress:
            for first in range(0, len(self.tokens), self._batch_rows):
                rows = self.tokens[first : first + self._batch_rows]
                counted = counted_tokens(self._model, rows, self._real[first : first + self._batch_rows])
                if counted.any():
                    yield from self._batch(rows, counted, first).split(PAIRS_AT_ONCE)
                progress.update(len(rows))

    def _batch(self, rows: Tensor, counted: Tensor, first: int) -> TokenBatch:
        if first in self._remembered:
            return self._remembered[first]
        batch = self._read(rows, counted, first)
        if batch.size <= self._left:
            self._remembered[first] = batch
            self._left -= batch.size
        return batch

    @torch.no_grad()
    def _read(self, rows: Tensor, counted: Tensor, first: int) -> TokenBatch:
        seen = dict[str, Any]()
        with observed(self._model, self.sae, seen):
            run_rows(self._model, rows, self._real[first : first + len(rows)])
        row, position = counted.nonzero(as_tuple=True)
        reads = reads_of(self.sae, seen).of(counted.flatten())
        check_finite(reads.interaction, counted, "what the interaction path writes", first)
        directions = self._target[None] if isinstance(self._target, Tensor) else None
        if isinstance(self._target, Target):
            assert self._direct is not None
            scale = seen[SCALE][counted] if SCALE in seen else None
            directions = self._direct.directions([self._target], scale, reads.interaction) * unit_written(seen)[counted]
        return TokenBatch(reads=reads, row=row + first, position=position, directions=directions)

    def text(self, row: int, position: int, *, before: int = 12, after: int = 4) -> str:
        """A token within its row, in [[double brackets]]; ids where the model has no tokenizer."""
        ids = self.tokens[row].tolist()
        parts = (ids[max(0, position - before) : position], [ids[position]], ids[position + 1 : position + 1 + after])
        left, token, right = (token_text(self._model, *part) for part in parts)
        return f"{left}[[{token}]]{right}"


def first_reads(batches: Iterable[TokenBatch], n_tokens: int) -> TokenReads:
    """What the first tokens read, at most `n_tokens` of them, in memory at once; narrower reads are filled up with zeros."""
    found, total = list[TokenReads](), 0
    for batch in batches:
        size = min(n_tokens - total, len(batch.row))
        found.append(next(batch.reads.split(size)))
        total += size
        if total >= n_tokens:
            break
    return TokenReads.joined(found)


CAPACITY = 1_000_000
"""Pairs kept. With 500,000 of them a run took 0.5 GB beside model and SAE, merges and batches included."""
SUMS = ("tokens", "norm", "energy", "product", "effect")
COLUMNS = (*SUMS, "norm_max", "weight")


@dataclass(frozen=True, kw_only=True, repr=False)
class PairSums(ShortRepr):
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
    """Sums over a corpus for every pair, or, where there are more than `capacity`, for those of most energy (None: for all).

    The corpus is gone through once, and once more where pairs had to be dropped.
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
        weights: of the interaction path, those of an SAE or others.
        capacity: pairs kept; None for all.
        only: sorted keys of the pairs to look at, the others counting in no total; None for all.
    """
    d_sae, m = weights.V.shape
    pairs, tokens, firings, energy = PairTable(capacity), 0, 0, 0.0
    features, gates = torch.zeros(3, d_sae, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    for batch in batches:
        rows, read = pair_rows(batch, weights, only), batch.reads.read
        tokens, firings = tokens + len(batch.row), firings + len(rows)
        energy += float(rows["energy"].to_numpy().sum())
        pairs.add(rows)
        values, indices = read.values.double().cpu().flatten(), read.indices.cpu().flatten()
        for row, value in zip(features, ((values != 0).double(), values, values.square()), strict=True):
            row.index_add_(0, indices, value)
        gates += batch.reads.gates.double().sum(0).cpu()
    feature_tokens, feature_sum, feature_squares = features
    return PairSums(
        table=pairs.table().drop(columns="weight"),
        d_sae=d_sae,
        tokens=tokens,
        firings=firings,
        energy=energy,
        slack=pairs.slack,
        feature_tokens=feature_tokens,
        feature_sum=feature_sum,
        feature_squares=feature_squares,
        gates=gates / max(1, tokens),
    )


def pair_rows(batch: TokenBatch, weights: PathWeights, only: NDArray[np.int64] | None = None) -> pd.DataFrame:
    """A row for each pair that fires on each token, by key first * d_sae + second; `token` is its place in the batch.

    `only` are sorted keys of the pairs to look at; None for all.
    """
    read, gates = batch.reads.read, batch.reads.gates
    pairs = TokenPairs.of(read, selves=weights.selves)
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
        found: Any = pd.concat([part for part in (best, new) if len(part)] or [best])
        order = np.lexsort((found["place"].to_numpy(), -found["norm"].to_numpy(), found.index.to_numpy()))
        keys = found.index.to_numpy()[order]
        best = found.iloc[order[np.arange(len(keys)) - np.searchsorted(keys, keys) < n]]
    return best


def top_contexts(corpus: Corpus, keys: NDArray[np.int64], *, n: int = 5) -> dict[int, tuple[Context, ...]]:
    """`strongest_firings` with their text, by key."""
    found: dict[int, list[Context]] = {int(key): [] for key in keys}
    strongest: Any = strongest_firings(corpus, keys, n=n)
    for one in strongest.itertuples():
        row, position = divmod(int(one.place), corpus.tokens.shape[1])
        effect = float(one.effect) if corpus.directed else None
        text, norm = corpus.text(row, position), float(one.norm)
        found[int(one.Index)].append(Context(row=row, position=position, norm=norm, effect=effect, text=text))
    return {key: tuple(contexts) for key, contexts in found.items()}


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
        other = weights.permuted(order)
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
    if weights.B is not None:
        return torch.ones_like(reads.gates)
    return hidden_pre(bi_interaction(reads.read, weights.V), weights.W_1, weights.b_1) > 0


def _measures(
    reads: TokenReads, weights: PathWeights, min_tokens: int
) -> tuple[dict[str, Floats], dict[str, Floats], int]:
    """Strengths of the pairs that fire often enough, what they are compared with, and how many there are; by key."""
    n = len(reads.gates)
    tokens = torch.arange(n)
    sums = summed(TokenBatch(reads=reads, row=tokens, position=tokens).split(PAIRS_AT_ONCE), weights)
    distinct = np.not_equal(*sums.features())  # how often a square fires is no co-occurrence
    table: Any = sums.table[(sums.table["tokens"] >= min_tokens) & distinct].sort_index()
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
