"""Which pairs of features an explorer shows, where they write most, and what they write on average.

Shown are the pairs of most energy, and of every feature the few strongest that it is in, so that each feature that interacts
has partners. Sums over tokens are those of `pair_corpus`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from sae_nfm.attribution import PathWeights
from sae_nfm.explorer_data import Floats, Ints
from sae_nfm.models import LanguageModel
from sae_nfm.pair_batches import Corpus
from sae_nfm.pair_corpus import CAPACITY, PairSums, pair_rows, pair_sums
from sae_nfm.token_reads import attributable
from sae_nfm.top_contexts import joined, starts_of


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownPairs:
    """The pairs shown, descending by energy."""

    table: pd.DataFrame
    """Their rows of `PairSums.table`."""
    first: Ints
    """The lower feature of each."""
    second: Ints
    """The higher one."""
    share: Floats
    """Energy of each over that of all pairs."""
    context_starts: Ints
    """Of each pair, into `position` and `norm`."""
    position: Ints
    """Where each writes most, row * pos + position."""
    norm: Floats
    """||o_ij|| there."""
    mean: Float[Tensor, "pairs d_in"]
    """What each writes on average where it fires, every gate at its mean over all tokens; of the first pairs only."""
    fired: int
    """Pairs that fired."""
    firings: int
    """The same summed over tokens."""


def has_pairs(sae: SAE[Any]) -> bool:
    """Whether the interaction path is a sum over pairs."""
    try:
        attributable(sae)
    except ValueError:
        return False
    return True


def shown_pairs(
    model: LanguageModel,
    sae: SAE[Any],
    tokens: Tensor,
    *,
    pairs: int,
    partners: int,
    contexts: int,
    described: int,
    capacity: int = CAPACITY,
    batch_rows: int = 16,
    show_progress: bool = True,
) -> ShownPairs:
    """Choose pairs and find their contexts: two passes of the language model, three where more pairs fire than fit.

    Args:
        model: the language model.
        sae: an SAE that `has_pairs`.
        tokens: held-out rows.
        pairs: pairs of most energy.
        partners: strongest pairs of each feature beside them.
        contexts: of each pair, at most.
        described: pairs, of most energy, of which the mean is kept.
        capacity: see `pair_sums`.
        batch_rows: rows in a forward pass.
        show_progress: whether each pass shows a progress bar.
    """
    corpus = Corpus(model, sae, tokens, batch_rows=batch_rows, show_progress=show_progress)
    sums, weights = pair_sums(corpus, capacity=capacity), PathWeights.of(sae)
    table: Any = sums.table.iloc[_chosen(*sums.features(), pairs, partners)]
    first, second = sums.features(table)
    found = strongest_firings(corpus, weights, np.asarray(table.index, dtype=np.int64), contexts)
    return ShownPairs(
        table=table,
        first=first,
        second=second,
        share=table["energy"].to_numpy() / sums.energy if sums.energy else table["energy"].to_numpy(),
        context_starts=starts_of([len(places) for places, _ in found]),
        position=joined([places for places, _ in found]),
        norm=np.concatenate([np.zeros(0), *(norms for _, norms in found)]),
        mean=mean_written(sums, weights, table.iloc[:described]),
        fired=len(sums.table),
        firings=sums.firings,
    )


def _chosen(first: Ints, second: Ints, pairs: int, partners: int) -> Ints:
    """Places of the first pairs and of the first few of each feature, in their order."""
    place = np.tile(np.arange(len(first)), 2)
    by_feature: Any = pd.DataFrame({"feature": np.concatenate([first, second]), "place": place})
    strongest = by_feature.sort_values("place", kind="stable").groupby("feature").head(partners)
    return np.union1d(np.arange(min(pairs, len(first))), strongest["place"].to_numpy()).astype(np.int64)


def strongest_firings(corpus: Corpus, weights: PathWeights, keys: Ints, n: int) -> list[tuple[Ints, Floats]]:
    """Where each pair's ||o_ij|| is largest, row * pos + position, and how large; the earlier of equal ones. One pass.

    Args:
        corpus: the corpus.
        weights: of the interaction path.
        keys: first * d_sae + second of the pairs.
        n: tokens for each.
    """
    only, width = np.sort(keys), corpus.tokens.shape[1]
    best: tuple[Any, Any, Any] = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))
    for batch in corpus.batches("Contexts of pairs"):
        rows, place = pair_rows(batch, weights, only), (batch.row * width + batch.position).cpu().numpy()
        new = (np.asarray(rows.index), place[rows["token"].to_numpy()], rows["norm"].to_numpy())
        key, where, norm = (np.concatenate([old, more]) for old, more in zip(best, new, strict=True))
        best = _largest(key, where, norm, n)
    starts = np.searchsorted(best[0], only)
    ends = np.searchsorted(best[0], only, side="right")
    by_key = {key: slice(start, end) for key, start, end in zip(only.tolist(), starts, ends, strict=True)}
    return [(best[1][by_key[key]], best[2][by_key[key]]) for key in keys.tolist()]


def _largest(key: Ints, place: Ints, norm: Floats, n: int) -> tuple[Ints, Ints, Floats]:
    """The n of each key with the largest norm, by key and norm."""
    order = np.lexsort((place, -norm, key))
    sorted_key = key[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_key, sorted_key)
    kept = order[rank < n]
    return key[kept], place[kept], norm[kept]


@torch.no_grad()
def mean_written(sums: PairSums, weights: PathWeights, table: Any) -> Float[Tensor, "pairs d_in"]:
    """mean(f_i f_j) ((v_i * v_j) W_1 mean(D)) W_2: what pairs write on average where they fire, but for the gates' variation.

    Args:
        sums: of a corpus.
        weights: of the interaction path.
        table: rows of the sums' table.
    """
    first, second = (torch.from_numpy(features).to(weights.V.device) for features in sums.features(table))
    product = torch.tensor((table["product"] / table["tokens"]).to_numpy()).to(weights.V)
    pooled = product[:, None] * weights.V[first] * weights.V[second]
    return ((pooled @ weights.W_1) * sums.gates.to(weights.V)) @ weights.W_2
