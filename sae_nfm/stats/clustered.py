"""What a mean over clustered values is held against: the jackknife over clusters, Student's t, the bootstrap of t."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Floats = NDArray[np.float64]

CELLS = 2**22
"""Numbers that one batch of bootstrap resamples may hold: 32 MiB per array."""


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Resample whole documents, and refer t to the t of the resamples."""

    seed: int
    """Seed of the resampling: one seed, one interval."""
    n_resamples: int = 1_999
    """Resamples; the p-value cannot be below 1 / (n_resamples + 1)."""

    def __post_init__(self) -> None:
        """Refuse too few resamples for a tail."""
        if self.n_resamples < 99:
            raise ValueError(f"n_resamples is {self.n_resamples}; give at least 99: a 5 % tail needs some to count")


@dataclass(frozen=True, kw_only=True)
class StudentT:
    """Student's t distribution."""

    df: float
    """Degrees of freedom."""

    @classmethod
    def over_clusters(cls, counts: Floats) -> "StudentT":
        """As many degrees of freedom as there are effective clusters, less 1, and at least 1.

            effective clusters = (sum_c n_c)^2 / sum_c n_c^2        (all of them when they are of equal size)

        Source: Kish 1965.
        """
        return cls(df=max(1.0, float(counts.sum() ** 2 / (counts**2).sum()) - 1))

    @property
    def words(self) -> str:
        """What was done."""
        return f"t-test clustered by document (jackknife, {self.df:.1f} degrees of freedom)"

    def critical(self, confidence: float) -> float:
        """The |t| that is exceeded with probability 1 - confidence."""
        return float(special.stdtrit(self.df, (1 + confidence) / 2))  # scipy.stats.t.ppf, without its overhead

    def p_value(self, difference: float, error: float) -> float:
        """Probability of an |t| at least as large."""
        return float(2 * stats.t.sf(_t(difference, error), self.df))


@dataclass(frozen=True, kw_only=True)
class BootstrapT:
    """The |t| of resamples of the clusters, each studentised with its own jackknife error.

    Source: Hall 1992, The Bootstrap and Edgeworth Expansion (the symmetric bootstrap-t).
    """

    resampled: Floats
    """[resamples], |t| of each, sorted."""
    bootstrap: Bootstrap
    """How they were drawn."""

    @classmethod
    def over_clusters(cls, residuals: Floats, counts: Floats, bootstrap: Bootstrap) -> "BootstrapT":
        """From each cluster's sum of residuals, which add up to 0, and its size; both [clusters]."""

        def t(sums: Floats, sizes: Floats, axis: int = -1) -> Floats:  # noqa: ARG001  (always the last)
            mean, deviations = jackknife(sums, sizes)
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.abs(mean) / np.linalg.norm(deviations, axis=-1)
            return np.nan_to_num(ratio, nan=np.inf, posinf=np.inf)  # one cluster drawn throughout bounds nothing

        with np.errstate(invalid="ignore"):  # scipy takes a standard deviation of the infinite ones, unused here
            drawn: Any = stats.bootstrap(
                (residuals, counts),
                t,
                paired=True,
                vectorized=True,
                method="percentile",
                n_resamples=bootstrap.n_resamples,
                batch=max(1, CELLS // len(counts)),
                rng=np.random.default_rng(bootstrap.seed),
            )
        return cls(resampled=np.sort(drawn.bootstrap_distribution), bootstrap=bootstrap)

    @property
    def words(self) -> str:
        """What was done."""
        b = self.bootstrap
        return f"bootstrap-t over documents ({b.n_resamples} resamples, seed {b.seed})"

    def critical(self, confidence: float) -> float:
        """The |t| above which `p_value` is below 1 - confidence."""
        rank = int(confidence * (len(self.resampled) + 1) + 1e-9)  # 0.95 * 2,000 may be a little under 1,900
        return float(self.resampled[rank]) if rank < len(self.resampled) else float("inf")

    def p_value(self, difference: float, error: float) -> float:
        """Share of |t| at least as large, the observed one counted among them."""
        above = len(self.resampled) - np.searchsorted(self.resampled, _t(difference, error), side="left")
        return float((1 + above) / (1 + len(self.resampled)))


def _t(difference: float, error: float) -> float:
    if error == 0:
        return float("inf") if difference else 0.0
    return abs(difference) / error


def reference(residuals: Floats, counts: Floats, bootstrap: Bootstrap | None) -> StudentT | BootstrapT:
    """What to hold t against: Student's t, or with `bootstrap` the clusters resampled."""
    if bootstrap is None or not residuals.any():
        return StudentT.over_clusters(counts)
    return BootstrapT.over_clusters(residuals, counts, bootstrap)


def jackknife(sums: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """The mean sum(sums) / sum(counts) and what leaving out each cluster does to it.

    Args:
        sums: [..., clusters], sum of the values of each cluster.
        counts: [..., clusters], number (or weight) of its values.

    Returns:
        The mean [...], and its deviations [..., clusters], scaled so that the squared standard error is the sum of
        their squares, and the covariance of two means the sum of their products.
    """
    g = sums.shape[-1]
    total, n = sums.sum(-1, keepdims=True), counts.sum(-1, keepdims=True)
    mean = total / n
    return mean[..., 0], np.sqrt((g - 1) / g) * ((total - sums) / (n - counts) - mean)


def interval(estimate: float, error: float, critical: float) -> tuple[float, float]:
    """Ends of estimate -+ critical * error; a point where there is no error."""
    half = critical * error if error else 0.0
    return estimate - half, estimate + half


def fieller(a: float, b: float, covariance: Floats, critical: float) -> tuple[float, float]:
    """The interval of a / b: all r with (a - r b)^2 <= critical^2 Var(a - r b).

    Args:
        a: estimate of the numerator.
        b: estimate of the denominator, not 0.
        covariance: [2, 2], of the two estimates.
        critical: the |t| allowed.

    Returns:
        Its ends; -inf and inf when b itself is not told apart from 0, as the set has no bound then.

    Source: Fieller 1954, J. Royal Statistical Society B 16:175.
    """
    square = critical**2
    if not covariance.any():
        return a / b, a / b
    quadratic = b**2 - square * covariance[1, 1]
    if not (np.isfinite(square) and quadratic > 0):
        return float("-inf"), float("inf")
    half = a * b - square * covariance[0, 1]
    constant = a**2 - square * covariance[0, 0]
    root = np.sqrt(max(0.0, half**2 - quadratic * constant))  # rounding can take it below 0
    return float((half - root) / quadratic), float((half + root) / quadratic)


def sums_by_cluster(clusters: ArrayLike, *values: Floats) -> tuple[Floats, list[Floats]]:
    """Number of values of each cluster, and the sum of each array of values in it: [clusters] each.

    Raises:
        ValueError: for unequal lengths, a missing cluster, or fewer than 2 clusters.
    """
    labels = np.asarray(clusters)
    if labels.shape != values[0].shape:
        raise ValueError(
            f"documents has shape {labels.shape} and the values {values[0].shape}; give one document per value"
        )
    codes, names = pd.factorize(labels)
    missing = (codes < 0) | (labels < 0 if np.issubdtype(labels.dtype, np.signedinteger) else False)
    if missing.any():
        raise ValueError(f"{missing.sum()} value(s) have no document (missing, or -1: a separator); leave them out")
    if len(names) < 2:
        raise ValueError(
            f"all {len(codes)} values are from one document; an interval over documents needs at least 2, better 20"
        )
    return _summed(codes, np.ones(codes.shape)), [_summed(codes, value) for value in values]


def _summed(codes: NDArray[np.intp], values: Floats) -> Floats:
    return np.asarray(np.bincount(codes, weights=values), dtype=np.float64)


def checked(name: str, values: ArrayLike) -> Floats:
    """Values [n] in float64.

    Raises:
        ValueError: when there are none, they are not one row, or one is NaN or infinite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; give one row of at least one value")
    bad = ~np.isfinite(array)
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"{name} has {bad.sum()} NaN or infinite value(s) of {array.size}, the first {array[first]} at {first}; "
            "leave out tokens without a value, in all arms alike"
        )
    return array


def checked_pair(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    """Two rows of values of one length, in float64.

    Raises:
        ValueError: as `checked`, or when their lengths differ.
    """
    a, b = checked("a", a), checked("b", b)
    if a.shape != b.shape:
        raise ValueError(f"a has {len(a)} values and b {len(b)}; give both on the same tokens, in the same order")
    return a, b


def check_confidence(confidence: float) -> None:
    """Refuse a confidence that is not a share, such as 95."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a share between 0 and 1, such as 0.95")
