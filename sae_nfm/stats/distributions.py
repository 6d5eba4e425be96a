"""Shapes and associations of per-feature statistics: Spearman under a permutation null, Hartigan's dip, mixtures by BIC.

A correlation between a share and one of its own terms, such as ||w_lin|| / (||w_dec|| + ||w_lin||) and ||w_dec||, is not 0
for unrelated weights. So the null here is not "no correlation" but "what this correlation is when the other rows are
drawn from other features": the share is computed again for every permutation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diptest
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn.mixture import GaussianMixture

from sae_nfm.stats.estimates import CELLS, Floats, checked, checked_pair

Order = NDArray[np.intp]

TOLERANCE = 1e-6
"""Gain of log-likelihood per value at which a mixture has converged; scikit-learn's 1e-3 stops far enough from the optimum to
spoil a BIC."""


@dataclass(frozen=True, kw_only=True)
class PermutedCorrelation:
    """Spearman's correlation beside what it is when the pairing is random."""

    observed: float
    """Spearman's rho of the data as they are."""
    null_mean: float
    """Mean over permutations; far from 0 when y contains x by construction."""
    null_low: float
    """2.5 % quantile over permutations."""
    null_high: float
    """97.5 % quantile over permutations."""
    p_value: float
    """Two-sided, against the permutations: twice the smaller tail, the observed one counted in it."""
    n: int
    """Pairs."""
    n_permutations: int
    """Permutations drawn; all of them when there are fewer than asked for."""


def permuted_spearman(
    x: ArrayLike, y: ArrayLike | Callable[[Order], ArrayLike], *, seed: int, n_permutations: int = 1_999
) -> PermutedCorrelation:
    """Spearman's correlation of x and y against a permutation null.

    Args:
        x: [n].
        y: [n], permuted against x; or, for a y that contains x, a function that is given an order [n] and computes y
            with every part but x taken in that order (the order 0, 1, ..., n - 1 gives y itself):
            `lambda order: lin[order] / (x + lin[order])`.

    Raises a ValueError for NaN or infinite values, unequal lengths, fewer than 3 pairs, or one value throughout.
    """
    x = checked("x", x)
    n = len(x)
    if n < 3:
        raise ValueError(f"x has {n} value(s); a correlation needs at least 3 pairs")
    x_scores = _rank_scores("x", x)

    def y_at(order: Order) -> Floats:
        return checked_pair(x, y(order) if callable(y) else np.asarray(y)[order])[1]

    if not callable(y):
        checked_pair(x, y)

    def rho(orders: Order, axis: int = -1) -> Floats:  # noqa: ARG001  (always the last)
        ys = np.stack([y_at(order) for order in orders.reshape(-1, n)])
        return (_rank_scores("y", ys) @ x_scores).reshape(orders.shape[:-1])

    found: Any = stats.permutation_test(
        (np.arange(n),),
        rho,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=n_permutations,
        batch=max(1, CELLS // n),
        rng=np.random.default_rng(seed),
    )
    low, high = np.quantile(found.null_distribution, [0.025, 0.975])
    return PermutedCorrelation(
        observed=float(found.statistic),
        null_mean=float(found.null_distribution.mean()),
        null_low=float(low),
        null_high=float(high),
        p_value=float(found.pvalue),
        n=n,
        n_permutations=len(found.null_distribution),
    )


def _rank_scores(name: str, values: Floats) -> Floats:
    """Ranks along the last axis, centred and of length 1: their inner product is Spearman's rho."""
    ranks = stats.rankdata(values, axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    length = np.linalg.norm(ranks, axis=-1, keepdims=True)
    if not length.all():
        raise ValueError(f"{name} has one value throughout, so it has no ranks to correlate; leave it out")
    return ranks / length


@dataclass(frozen=True, kw_only=True)
class DipTest:
    """Hartigan's dip test of one mode against several."""

    dip: float
    """Largest distance between the empirical distribution function and the closest unimodal one."""
    p_value: float
    """Probability of such a dip under a uniform distribution, the unimodal one that dips most."""
    n: int


def dip_test(values: ArrayLike) -> DipTest:
    """Hartigan's dip test; a small p-value says that there is more than one mode.

    Rounded values make modes of their own: give them unrounded.

    Raises:
        ValueError: for NaN or infinite values, fewer than 4, or one value throughout.

    Source: Hartigan & Hartigan 1985, Annals of Statistics 13:70; p-values from the `diptest` package's table.
    """
    array = _spread_out(values, 4)
    found: Any = diptest.diptest(array, allow_zero=False)  # the smallest dip is 1 / 2n by definition
    return DipTest(dip=float(found[0]), p_value=float(found[1]), n=len(array))


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture of Gaussians fitted to one-dimensional values; components in the order of their means."""

    weights: tuple[float, ...]
    """Share of each component."""
    means: tuple[float, ...]
    """In the values' units, as are `sds`."""
    sds: tuple[float, ...]
    bic: float
    """Bayesian information criterion: lower is better."""

    @property
    def n_components(self) -> int:
        """Number of components."""
        return len(self.weights)


@dataclass(frozen=True, kw_only=True)
class MixtureComparison:
    """Mixtures of 1, 2, ... components, compared by BIC."""

    fits: tuple[Mixture, ...]
    """By number of components."""
    n: int

    @property
    def preferred(self) -> Mixture:
        """The mixture with the lowest BIC."""
        return min(self.fits, key=lambda fit: fit.bic)

    @property
    def bic_difference(self) -> float:
        """How much lower its BIC is than the next one's; above 10 is usually called very strong."""
        best, second, *_ = sorted(fit.bic for fit in self.fits)
        return second - best

    @property
    def words(self) -> str:
        """What BIC prefers."""
        n = self.preferred.n_components
        return f"{n} component{'s' if n > 1 else ''} preferred by a BIC difference of {self.bic_difference:.1f}"


def compare_mixtures(values: ArrayLike, *, max_components: int = 2, seed: int = 0) -> MixtureComparison:
    """Fit 1 to `max_components` Gaussians and compare them by BIC.

    More than one component means "not one Gaussian", which a skewed or heavy-tailed distribution of one mode is not
    either: `dip_test` is the test for modes.

    Args:
        seed: seed of the starting points, three per fit.

    Raises a ValueError for NaN or infinite values, fewer than 10, one value throughout, or `max_components` below 2.
    """
    if max_components < 2:
        raise ValueError(f"max_components is {max_components}; give at least 2: there is nothing to compare with one")
    array = _spread_out(values, 10)
    centre, scale = float(array.mean()), float(array.std())
    standard = ((array - centre) / scale)[:, None]  # scikit-learn's floor on variances is absolute

    def fit(n_components: int) -> Mixture:
        model: Any = GaussianMixture(n_components, n_init=3, tol=TOLERANCE, max_iter=5_000, random_state=seed)
        model.fit(standard)
        order = np.argsort(model.means_[:, 0])
        return Mixture(
            weights=tuple(map(float, model.weights_[order])),
            means=tuple(map(float, centre + scale * model.means_[order, 0])),
            sds=tuple(map(float, scale * np.sqrt(model.covariances_[order, 0, 0]))),
            bic=float(model.bic(standard)) + 2 * len(array) * float(np.log(scale)),  # back to the values' units
        )

    return MixtureComparison(fits=tuple(fit(n + 1) for n in range(max_components)), n=len(array))


def _spread_out(values: ArrayLike, least: int) -> Floats:
    array = checked("values", values)
    if len(array) < least:
        raise ValueError(f"there are {len(array)} value(s); a statement about their shape needs at least {least}")
    if np.ptp(array) == 0:
        raise ValueError(f"all {len(array)} values are {array[0]:g}: they have no shape to test")
    return array
