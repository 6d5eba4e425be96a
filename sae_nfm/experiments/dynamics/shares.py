"""What features are worth on held-out tokens, summed so that documents can be left out: shares with intervals over documents.

Energies (`functional.FeatureEnergies`) are sums over tokens, so those of a text are the sums of its documents'. Documents are
dealt into groups, and a figure of all tokens is held against the figures without each group:

    SE^2 = (G - 1)/G sum_g (s_(-g) - s)^2        s: the figure, s_(-g): without group g      (delete-a-group jackknife)

Source: the shares are those of arXiv 2507.00269, taken on tokens; Kott 2001, J. Official Statistics 17:521 (the jackknife).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sae_lens import SAE
from torch import Tensor

from sae_nfm.analysis import FeatureEnergies, feature_energies, token_paths
from sae_nfm.stats import Estimate, Floats, StudentT, interval

PATHS = ("direct", "linear", "nonlinear", "square")
GROUPS = 40
"""Groups of documents, at most."""
_PER_TOKEN, _PER_ACTIVE = ("second_moment", "read_second_moment"), PATHS


@dataclass(frozen=True, kw_only=True)
class GroupedTokens:
    """Activations and the group of documents that each is from."""

    x: Float[Tensor, "tokens d_in"]
    """What is reconstructed."""
    groups: Int[Tensor, " tokens"]
    """0, 1, ..."""

    @classmethod
    def of(cls, x: Float[Tensor, "tokens d_in"], documents: Int[Tensor, " tokens"]) -> "GroupedTokens":
        """Documents dealt out in turn.

        Raises:
            ValueError: for fewer than 2 documents.
        """
        _, number = documents.unique(return_inverse=True)
        if int(number.max()) < 1:
            raise ValueError("the tokens are from one document; intervals over documents need at least 2, better 20")
        return cls(x=x, groups=number % GROUPS)


@dataclass(frozen=True, kw_only=True)
class GroupedEnergies:
    """Sums of energies by group of documents."""

    tokens: Int[Tensor, " groups"]
    """Tokens."""
    active: Float[Tensor, "groups d_sae"]
    """Tokens on which each feature is active."""
    sums: Float[Tensor, "groups figures d_sae"]
    """Summed over tokens: what `FeatureEnergies` has means of, in the order of `_PER_TOKEN` and `_PER_ACTIVE`."""

    def energies(self, without: int | None = None) -> FeatureEnergies:
        """Over all tokens, or all but those of one group."""
        kept = torch.ones(len(self.tokens), dtype=torch.bool)
        if without is not None:
            kept[without] = False
        n, active, sums = int(self.tokens[kept].sum()), self.active[kept].sum(0), self.sums[kept].sum(0)
        means = dict(zip(_PER_TOKEN, sums / n, strict=False))
        means |= dict(zip(_PER_ACTIVE, sums[len(_PER_TOKEN) :] / active, strict=True))
        return FeatureEnergies(tokens=n, active=active, **means)

    def mean_shares(self, path: str, chosen: Tensor) -> "MeanShares":
        """Mean share of a path over some features (a mask): of all tokens, and without each group."""

        def mean(without: int | None) -> float:
            return float(self.energies(without).shares()[path][chosen].nanmean())  # nan: active in that group only

        return MeanShares(
            whole=mean(None),
            without=np.array([mean(group) for group in range(len(self.tokens))]),
            tokens=self.tokens.double().numpy(),
        )


@dataclass(frozen=True, kw_only=True)
class MeanShares:
    """A mean over features on all tokens and without each group of documents."""

    whole: float
    """On all tokens."""
    without: Floats
    """[groups], without each."""
    tokens: Floats
    """[groups], tokens of each."""

    def complement(self) -> "MeanShares":
        """Of all other paths together."""
        return MeanShares(whole=1 - self.whole, without=1 - self.without, tokens=self.tokens)

    def estimate(self) -> Estimate:
        """With its interval; nothing is tested."""
        return self._estimate(self.whole, self.without, tested=False)

    def change_to(self, later: "MeanShares") -> Estimate:
        """`later` less this one on the same tokens, tested against 0."""
        return self._estimate(later.whole - self.whole, later.without - self.without, tested=True)

    def _estimate(self, whole: float, without: NDArray[Any], *, tested: bool) -> Estimate:
        g = len(without)
        error = float(np.linalg.norm(without - whole)) * ((g - 1) / g) ** 0.5
        t = StudentT.over_clusters(self.tokens)
        low, high = interval(whole, error, t.critical(0.95))
        return Estimate(
            estimate=whole,
            low=low,
            high=high,
            n=int(self.tokens.sum()),
            n_clusters=g,
            test=f"mean over features, jackknife over groups of documents ({t.df:.1f} degrees of freedom)",
            p_value=t.p_value(whole, error) if tested else None,
        )


@torch.no_grad()
def grouped_energies(sae: SAE[Any], tokens: GroupedTokens) -> GroupedEnergies:
    """Run an SAE (joint_nfm or TopK) on each group and sum what its features add to each path."""
    counts, active, sums = list[int](), list[Tensor](), list[Tensor]()
    for group in range(int(tokens.groups.max()) + 1):
        found = feature_energies(sae, token_paths(sae, tokens.x[tokens.groups == group]))
        counts.append(found.tokens)
        active.append(found.active)
        totals = [getattr(found, name) * found.tokens for name in _PER_TOKEN]
        totals += [(getattr(found, name) * found.active).nan_to_num() for name in _PER_ACTIVE]  # nan: never active
        sums.append(torch.stack(totals))
    return GroupedEnergies(
        tokens=torch.tensor(counts), active=torch.stack(active).cpu(), sums=torch.stack(sums).double().cpu()
    )
