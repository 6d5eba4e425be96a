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

from sae_nfm.architectures import PathWeights, attributable
from sae_nfm.attribution import CAPACITY, Corpus, PairSums, pair_sums, strongest_firings
from sae_nfm.explorer.results import Floats, Ints, starts_of
from sae_nfm.models import LanguageModel


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownPairs:
    """The pairs shown, descending by energy."""

    table: pd.DataFrame
    """Their rows of `PairSums.table`."""
    first: Ints
    second: Ints
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
    """Choose pairs and find their contexts: two passes over the tokens, three where more pairs fire than fit.

    Args:
        sae: an SAE that `has_pairs`.
        pairs: pairs of most energy.
        partners: strongest pairs of each feature beside them.
        contexts: of each pair, at most.
        described: pairs, of most energy, of which the mean is kept.
        capacity: see `pair_sums`.
    """
    corpus = Corpus(model, sae, tokens, batch_rows=batch_rows, show_progress=show_progress)
    sums, weights = pair_sums(corpus, capacity=capacity), PathWeights.of(sae)
    table: Any = sums.table.iloc[_chosen(*sums.features(), pairs, partners)]
    first, second = sums.features(table)
    keys = np.asarray(table.index, dtype=np.int64)
    firings: Any = strongest_firings(corpus, keys, n=contexts)
    pair = table.index.get_indexer(firings.index)
    order = np.argsort(pair, kind="stable")  # as the pairs stand, by energy
    return ShownPairs(
        table=table,
        first=first,
        second=second,
        share=table["energy"].to_numpy() / sums.energy if sums.energy else table["energy"].to_numpy(),
        context_starts=starts_of(np.bincount(pair, minlength=len(table))),
        position=firings["place"].to_numpy()[order],
        norm=firings["norm"].to_numpy()[order],
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


@torch.no_grad()
def mean_written(sums: PairSums, weights: PathWeights, table: Any) -> Float[Tensor, "pairs d_in"]:
    """mean(f_i f_j) ((v_i * v_j) W_1 mean(D)) W_2: what pairs write on average where they fire, but for the gates' variation."""
    first, second = (torch.from_numpy(features).to(weights.V.device) for features in sums.features(table))
    product = torch.tensor((table["product"] / table["tokens"]).to_numpy()).to(weights.V)
    pooled = product[:, None] * weights.V[first] * weights.V[second]
    return ((pooled @ weights.W_1) * sums.gates.to(weights.V)) @ weights.W_2
