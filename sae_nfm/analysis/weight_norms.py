"""Norms of a feature's weights in each path, their shares, and how far the shares follow from the norms: on matrices alone.

A feature has one row in each path: w_i of W_dec, l_i of W_lin, v_i of V. The published share of a path is its part of
||w_i|| + ||l_i|| + ||v_i||, correlated over features with ||w_i||^2. That norm stands in the denominator too, so the correlation
is near -1 (integration) and +1 (direct) for weights that have nothing to do with each other: the null permutes the rows of the
integration paths over features and recomputes the shares.

Source: arXiv 2507.00269, analysis of decoder norms (shares, Spearman, the split at 0.2, principal components); the null is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor

from sae_nfm.stats import (
    DipTest,
    MixtureComparison,
    PermutedCorrelation,
    compare_mixtures,
    dip_test,
    permuted_spearman,
)

SPLIT = 0.2
"""The squared decoder norm at which arXiv 2507.00269 divides the features."""
SPREAD = 1e-4
"""Values whose standard deviation is a smaller fraction of their mean are equal up to rounding: they have no ranks."""
MIN_FEATURES = 10
"""Fewer have no shape that a mixture could describe."""
N_PERMUTATIONS = 1_999
"""Permutations of a null."""


@dataclass(frozen=True, kw_only=True)
class PathRows:
    """The rows of every feature in each path, in one unit."""

    direct: Float[Tensor, "d_sae d_in"]
    linear: Float[Tensor, "d_sae d_in"] | None = None
    """Rows l_i of the linear path; None without one."""
    nonlinear: Float[Tensor, "d_sae nfm_dim"] | None = None
    """Embeddings v_i of the interaction path; None without one."""

    def norms(self) -> "PathNorms":
        """Row norms; zero for a path that is not there."""
        direct = self.direct.norm(dim=-1)
        linear, nonlinear = (
            torch.zeros_like(direct) if rows is None else rows.norm(dim=-1) for rows in (self.linear, self.nonlinear)
        )
        return PathNorms(direct=direct, linear=linear, nonlinear=nonlinear)

    def times(self, factor: Float[Tensor, " d_sae"], read_factor: Float[Tensor, " d_sae"] | None = None) -> "PathRows":
        """Row i times `factor[i]`; the rows of the integration paths times `read_factor[i]` where that is given."""
        read = (factor if read_factor is None else read_factor)[:, None]
        return PathRows(
            direct=self.direct * factor[:, None],
            linear=None if self.linear is None else self.linear * read,
            nonlinear=None if self.nonlinear is None else self.nonlinear * read,
        )

    def of(self, chosen: Tensor) -> "PathRows":
        """The rows of some features (a mask or indices)."""
        return PathRows(
            direct=self.direct[chosen],
            linear=None if self.linear is None else self.linear[chosen],
            nonlinear=None if self.nonlinear is None else self.nonlinear[chosen],
        )


@dataclass(frozen=True, kw_only=True)
class PathShares:
    """Part of a feature's weight norm in each path, as fractions."""

    integration: Float[Tensor, "*d_sae"]
    """(||l_i|| + ||v_i||) over the sum of the three norms (the published "total")."""
    linear: Float[Tensor, "*d_sae"]
    """||l_i|| over that sum."""
    nonlinear: Float[Tensor, "*d_sae"]
    """||v_i|| over that sum."""
    direct: Float[Tensor, "*d_sae"]
    """||w_i|| over that sum."""

    def named(self) -> dict[str, Tensor]:
        """The shares by name, in the published order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def mean(self, chosen: Tensor) -> "PathShares":
        """Means over the chosen features (a mask or indices)."""
        return PathShares(**{name: share[chosen].mean() for name, share in self.named().items()})


@dataclass(frozen=True, kw_only=True)
class PathNorms:
    """Norms of a feature's rows, [d_sae] each."""

    direct: Float[Tensor, " d_sae"]
    """||w_i||."""
    linear: Float[Tensor, " d_sae"]
    """||l_i||."""
    nonlinear: Float[Tensor, " d_sae"]
    """||v_i||."""

    def shares(self) -> PathShares:
        """Each path's part of the sum of a feature's norms; 0 for a feature without any weight."""
        total = (self.direct + self.linear + self.nonlinear).clamp_min(torch.finfo(self.direct.dtype).tiny)
        return PathShares(
            integration=(self.linear + self.nonlinear) / total,
            linear=self.linear / total,
            nonlinear=self.nonlinear / total,
            direct=self.direct / total,
        )

    def permuted(self, order: Tensor) -> "PathNorms":
        """The integration rows of feature `order[i]` given to feature i, l and v of one feature together."""
        return PathNorms(direct=self.direct, linear=self.linear[order], nonlinear=self.nonlinear[order])


@dataclass(frozen=True, kw_only=True)
class Split:
    """Features on one side of a squared norm."""

    n: int
    shares: PathShares | None
    """Their mean shares; None when there is no such feature."""


@dataclass(frozen=True, kw_only=True)
class WeightFigures:
    """The published statistics of a feature's weights, in one gauge and one unit."""

    squared_norm: Float[Tensor, " d_sae"]
    """||w_i||^2."""
    shares: PathShares
    threshold: float
    below: Split
    above: Split
    share_correlations: Mapping[str, PermutedCorrelation | None]
    """||w_i||^2 with each share, against rows permuted over features; None where one of the two does not vary."""
    norm_correlations: Mapping[str, PermutedCorrelation | None]
    """||w_i||^2 with ||l_i|| ("linear") and ||v_i|| ("nonlinear") themselves: no term in common, so the null is at 0."""
    participation: PermutedCorrelation | None
    """||w_i||^2 with the participation ratio of w_i."""
    components: int
    """Principal components of the rows w_i for 90 % of their variance."""
    dip: DipTest | None
    """One mode of ||w_i||^2 against several; None where it does not vary."""
    mixture: MixtureComparison | None
    """One Gaussian for ||w_i||^2 against two."""


def weight_figures(
    rows: PathRows, *, seed: int, threshold: float = SPLIT, n_permutations: int = N_PERMUTATIONS
) -> WeightFigures:
    """All statistics of this module.

    Args:
        rows: in one unit, see `gauge`; at least 10 features.
        threshold: squared norm that divides the features; the published 0.2 means something in the published unit only.

    Raises:
        ValueError: for fewer than 10 features.
    """
    if len(rows.direct) < MIN_FEATURES:
        raise ValueError(f"{len(rows.direct)} features; shapes over features need at least {MIN_FEATURES}")
    norms = rows.norms()
    squared, shares = norms.direct.square(), norms.shares()
    small, values = squared < threshold, _array(squared) if varies(squared) else None
    return WeightFigures(
        squared_norm=squared,
        shares=shares,
        threshold=threshold,
        below=_split(shares, small),
        above=_split(shares, ~small),
        share_correlations=share_correlations(norms, seed=seed, n_permutations=n_permutations),
        norm_correlations={
            name: correlation(squared, norm, seed=seed, n_permutations=n_permutations)
            for name, norm in (("linear", norms.linear), ("nonlinear", norms.nonlinear))
        },
        participation=correlation(squared, participation_ratio(rows.direct), seed=seed, n_permutations=n_permutations),
        components=components_for_variance(rows.direct),
        dip=None if values is None else dip_test(values),
        mixture=None if values is None else compare_mixtures(values, seed=seed),
    )


def share_correlations(
    norms: PathNorms, *, seed: int, n_permutations: int = N_PERMUTATIONS
) -> dict[str, PermutedCorrelation | None]:
    """Spearman correlation of ||w_i||^2 with each share, against integration rows permuted over features.

    Args:
        seed: of the permutations; the same ones serve every share.

    Returns:
        By share; None where the share or the norm does not vary.
    """
    squared = norms.direct.square()

    def against(name: str) -> PermutedCorrelation:
        return permuted_spearman(
            _array(squared),
            lambda order: _array(norms.permuted(torch.tensor(order)).shares().named()[name]),
            seed=seed,
            n_permutations=n_permutations,
        )

    return {
        name: against(name) if varies(share) and varies(squared) else None
        for name, share in norms.shares().named().items()
    }


def correlation(
    one: Float[Tensor, " n"], other: Float[Tensor, " n"], *, seed: int, n_permutations: int = N_PERMUTATIONS
) -> PermutedCorrelation | None:
    """Spearman correlation over features against a random pairing; None where one of the two does not vary."""
    if not (varies(one) and varies(other)):
        return None
    return permuted_spearman(_array(one), _array(other), seed=seed, n_permutations=n_permutations)


def participation_ratio(rows: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, " d_sae"]:
    """Over how many dimensions of the model a row spreads: `(sum_d w_d^2)^2 / sum_d w_d^4`, from 1 to d_in; 0 for no row."""
    squares = rows.double().square()
    return squares.sum(-1).square() / squares.square().sum(-1).clamp_min(torch.finfo(torch.float64).tiny)


def components_for_variance(rows: Float[Tensor, "n d_in"], fraction: float = 0.9) -> int:
    """Principal components that explain at least `fraction` of the variance of the rows around their mean."""
    fitted = PCA(n_components=fraction, svd_solver="full").fit(rows.double().cpu().numpy())
    return int(fitted.n_components_)


def varies(values: Float[Tensor, " n"]) -> bool:
    """Whether values differ by more than rounding, so that their ranks mean something."""
    wide = values.double()
    return float(wide.std()) > SPREAD * float(wide.abs().mean())


def _split(shares: PathShares, chosen: Tensor) -> Split:
    n = int(chosen.sum())
    return Split(n=n, shares=shares.mean(chosen) if n else None)


def _array(values: Tensor) -> NDArray[np.float64]:
    return values.detach().cpu().double().numpy()
