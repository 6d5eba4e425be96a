"""How far the features of an SAE are true ones, or those of another SAE: directions matched one to one, and how they fire.

    matching     the one-to-one assignment of rows to rows with the largest sum of cosines (Hungarian algorithm)
    MCC          SAELens's `mean_correlation_coefficient`: the mean |cosine| of such an assignment made on |cosine|
    firing       of each true feature and the one matched with it, over tokens:  precision = TP / (TP + FP),
                 recall = TP / (TP + FN),  F1 = 2 TP / (2 TP + FP + FN),  where "fires" is > 0

A true feature that nothing is matched with, or only one that never fires, counts with 0: leaving features out does not pay.
Activations are never negative, so the matching minds the sign of a direction; MCC does not. Error says nothing about features:
a dictionary that reconstructs noise has a lower one too.

Source: MCC, arXiv 2505.20254; F1 of firing, SynthSAEBench, which matches each SAE feature with the nearest true one instead.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from sae_lens.synthetic import mean_correlation_coefficient
from sae_lens.util import cosine_similarities
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_nfm.analysis.gauge import as_read, canonical
from sae_nfm.architectures import NFMDecoder
from sae_nfm.common import ShortRepr


@torch.no_grad()
def feature_directions(sae: SAE[Any]) -> Float[Tensor, "d_sae d_in"]:
    """What one unit of each feature, as hooked at `hook_sae_acts_post`, writes through the direct and the linear path.

    That is the decoder in the canonical gauge: the direct path's rows alone may be anything. What depends on other features or
    on the activation itself (interaction, square) has no direction of its own and is left out. Of a sequential_nfm it is the
    decoder of its frozen base, whose features they are.

    Raises:
        ValueError: with `nfm_top_k`, where a feature writes one direction while it is among the strongest and another else.
    """
    if isinstance(sae, NFMDecoder) and sae.cfg.nfm_top_k is not None and sae.cfg.use_linear_path:
        raise ValueError(
            f"nfm_top_k is {sae.cfg.nfm_top_k}: a feature among the strongest writes W_dec + W_lin, another W_dec alone: it "
            "has no one direction; compare the directions that you mean, or train with nfm_top_k=None"
        )
    return as_read(canonical(sae)).direct


@dataclass(frozen=True, kw_only=True, repr=False)
class Matching(ShortRepr):
    """Features matched one to one, in the order of the true ones."""

    features: Int[Tensor, " matched"]
    """Rows of what was learned."""
    true: Int[Tensor, " matched"]
    """Rows of the truth."""
    cosines: Float[Tensor, " matched"]

    @property
    def mean_cosine(self) -> float:
        """Mean cosine of matched directions, from -1 to 1."""
        return float(self.cosines.mean())


def matched(features: Float[Tensor, "d_sae d_in"], true: Float[Tensor, "features d_true"]) -> Matching:
    """The one-to-one matching of directions with the largest sum of cosines; as many as the smaller set has.

    A direction of length 0 has cosine 0 with all others.

    Raises:
        ValueError: for directions of different dimensions, or not finite.
    """
    _check(features, true)
    cosines = cosine_similarities(true.float(), features.float())
    rows, columns = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    rows, columns = torch.from_numpy(rows), torch.from_numpy(columns)
    return Matching(features=columns, true=rows, cosines=cosines.cpu()[rows, columns])


def mcc(one: Float[Tensor, "n d_in"], other: Float[Tensor, "m d_other"]) -> float:
    """SAELens's mean correlation coefficient of two sets of directions, 0 to 1; of two seeds' decoders it is their stability.

    Raises:
        ValueError: for directions of different dimensions, or not finite.
    """
    _check(one, other)
    return mean_correlation_coefficient(one.float(), other.float())


@dataclass(frozen=True, kw_only=True, repr=False)
class FiringScores(ShortRepr):
    """How well matched features fire where the true ones do: fractions, one for each true feature that fires at all."""

    true: Int[Tensor, " scored"]
    """Which true features."""
    precision: Float[Tensor, " scored"]
    recall: Float[Tensor, " scored"]
    f1: Float[Tensor, " scored"]


def firing_scores(
    acts: Float[Tensor, "tokens d_sae"], true_acts: Float[Tensor, "true_tokens features"], matching: Matching
) -> FiringScores:
    """Precision, recall and F1 of every true feature that fires on these tokens; 0 where nothing fires for it.

    Raises:
        ValueError: when the two have different numbers of tokens, or no true feature fires.
    """
    if len(acts) != len(true_acts):
        raise ValueError(
            f"acts are of {len(acts)} tokens and true_acts of {len(true_acts)}; give both on the same tokens"
        )
    fires, true_fires = _fires(acts), _fires(true_acts)
    counts = true_fires.sum(0)
    both, found = torch.zeros_like(counts), torch.zeros_like(counts)
    at, own = matching.true.to(counts.device), fires[:, matching.features.to(fires.device)]
    both[at], found[at] = (own & true_fires[:, at]).sum(0), own.sum(0)
    scored = counts.nonzero()[:, 0]
    if not len(scored):
        raise ValueError(f"no true feature fires on these {len(acts)} tokens; give more")
    both, found, counts = (part[scored].double() for part in (both, found, counts))
    return FiringScores(
        true=scored,
        precision=both / found.clamp(min=1),
        recall=both / counts,
        f1=2 * both / (found + counts),
    )


def dead_features(acts: Float[Tensor, "tokens d_sae"]) -> Bool[Tensor, " d_sae"]:
    """Features that fire on none of these tokens."""
    return ~_fires(acts).any(0)


def _fires(acts: Tensor) -> Bool[Tensor, "tokens features"]:
    return (acts.to_dense() if acts.is_sparse else acts) > 0


def _check(one: Tensor, other: Tensor) -> None:
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or not len(one) or not len(other):
        raise ValueError(
            f"directions have shapes {tuple(one.shape)} and {tuple(other.shape)}; give [features, d_in] twice, with one d_in"
        )
    for directions in (one, other):
        if not directions.isfinite().all():
            raise ValueError("a direction is not finite; give the weights of a training that has not diverged")
