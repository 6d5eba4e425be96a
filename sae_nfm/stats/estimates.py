"""Statistics that treat a document, not a token, as the unit of evidence.

Tokens of one document resemble each other, so a t-test over tokens finds differences that are not there. Here every mean
is over tokens and every interval over documents: only the documents' sums enter, so millions of tokens cost one pass.

    mean        m = sum_c s_c / sum_c n_c                   s_c, n_c: sum and number of tokens of document c
    its error   SE^2 = (G - 1)/G sum_c (m_(-c) - m)^2       m_(-c): the mean without document c; G documents
    reference   t with 1 / sum_c (n_c / sum n)^2 - 1 degrees of freedom, or the bootstrap distribution of t

For documents of equal length this is the textbook clustered standard error (G/(G - 1) corrected) with t on G - 1
degrees of freedom. For unequal ones that textbook test rejects too often (7 to 12 % at a nominal 5 %, simulated, for
60 to 8 documents of log-normal length); so do percentile and BCa bootstraps. The jackknife with as many degrees of
freedom as there are effective documents, and the bootstrap of t, keep 5 % in the same simulations. Where document means
are strongly skewed (exponential), use the bootstrap: it rejects in 5 to 8 % (60 to 8 documents), t in 6 to 9 %.

Source: E. Miller 2024, arXiv 2411.00640 (clustered errors of evaluations); MacKinnon, Nielsen & Webb 2023, J. Applied
Econometrics 38:671 (jackknife); Kish 1965 (effective number); Hall 1992 (bootstrap-t); Fieller 1954 (ratios).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.multitest import multipletests

from sae_nfm.stats.clustered import (
    Bootstrap,
    Floats,
    StudentT,
    check_confidence,
    checked,
    checked_pair,
    fieller,
    interval,
    jackknife,
    reference,
    sums_by_cluster,
)

Correction = Literal["holm", "benjamini-hochberg"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its interval and how they were got."""

    estimate: float
    """The figure, in the units of the values."""
    low: float
    """Lower end of the interval; -inf where the data set no bound."""
    high: float
    """Upper end of the interval; inf where the data set no bound."""
    confidence: float = 0.95
    """Nominal coverage of the interval."""
    n: int
    """Values averaged over: tokens, or seeds."""
    n_clusters: int | None = None
    """Documents; None where the values themselves are the units."""
    test: str
    """What was done, in words."""
    p_value: float | None = None
    """Two-sided, of no difference (0; for a ratio 1); None where nothing was tested."""
    correction: str | None = None
    """How `p_value` was adjusted for several tests, in words. The interval never is."""

    def complement(self) -> "Estimate":
        """1 - this."""
        return replace(self, estimate=1 - self.estimate, low=1 - self.high, high=1 - self.low)


def clustered_mean(
    values: ArrayLike, documents: ArrayLike, *, confidence: float = 0.95, bootstrap: Bootstrap | None = None
) -> Estimate:
    """Mean over tokens with an interval over documents, tested against 0.

    Args:
        values: [tokens].
        documents: [tokens], which document each is from; in any order.
        bootstrap: resample documents; None refers to Student's t.

    Raises:
        ValueError: for NaN or infinite values, unequal lengths, no tokens, fewer than 2 documents.
    """
    check_confidence(confidence)
    counts, (sums,) = sums_by_cluster(documents, checked("values", values))
    mean, deviations = jackknife(sums, counts)
    error = float(np.linalg.norm(deviations))
    against = reference(sums - mean * counts, counts, bootstrap)
    low, high = interval(float(mean), error, against.critical(confidence))
    return Estimate(
        estimate=float(mean),
        low=low,
        high=high,
        confidence=confidence,
        n=int(counts.sum()),
        n_clusters=len(counts),
        test=f"mean, {against.words}",
        p_value=against.p_value(float(mean), error),
    )


def mean_difference(
    a: ArrayLike, b: ArrayLike, documents: ArrayLike, *, confidence: float = 0.95, bootstrap: Bootstrap | None = None
) -> Estimate:
    """Mean of a - b, paired by token, clustered by document; as `clustered_mean`."""
    a, b = checked_pair(a, b)
    found = clustered_mean(a - b, documents, confidence=confidence, bootstrap=bootstrap)
    return replace(found, test=f"paired difference: {found.test}")


def ratio_of_means(
    a: ArrayLike, b: ArrayLike, documents: ArrayLike, *, confidence: float = 0.95, bootstrap: Bootstrap | None = None
) -> Estimate:
    """mean(a) / mean(b), paired by token, clustered by document, tested against 1.

    The interval is Fieller's: all r for which a - r b is not told apart from 0. So a bounded one leaves out 1 exactly
    when `p_value` is below 1 - confidence, and with Student's t that is the p-value of `mean_difference`.

    Args:
        a: [tokens], for example KL of the SAE.
        b: [tokens], for example KL of the equal-distance random arm.
        documents: [tokens], which document each is from.
        bootstrap: resample documents; None refers to Student's t.

    Raises:
        ValueError: as `clustered_mean`, or when the mean of b is 0.
    """
    check_confidence(confidence)
    counts, sums = sums_by_cluster(documents, *checked_pair(a, b))
    means, deviations = zip(*(jackknife(s, counts) for s in sums), strict=True)
    mean_a, mean_b = map(float, means)
    if mean_b == 0:
        raise ValueError("the mean of b is 0, so there is no ratio; give an arm that changes something to divide by")
    against = reference(sums[0] - mean_a / mean_b * sums[1], counts, bootstrap)
    covariance = np.array(deviations) @ np.array(deviations).T
    low, high = fieller(mean_a, mean_b, covariance, against.critical(confidence))
    return Estimate(
        estimate=mean_a / mean_b,
        low=low,
        high=high,
        confidence=confidence,
        n=int(counts.sum()),
        n_clusters=len(counts),
        test=f"ratio of means, Fieller's interval, {against.words}",
        p_value=against.p_value(mean_a - mean_b, float(np.linalg.norm(deviations[0] - deviations[1]))),
    )


def relative_change(
    a: ArrayLike, b: ArrayLike, documents: ArrayLike, *, confidence: float = 0.95, bootstrap: Bootstrap | None = None
) -> Estimate:
    """(mean(a) - mean(b)) / mean(b), a fraction: `ratio_of_means` less 1. The paper's "-50.9 %" is -0.509."""
    found = ratio_of_means(a, b, documents, confidence=confidence, bootstrap=bootstrap)
    return replace(
        found,
        estimate=found.estimate - 1,
        low=found.low - 1,
        high=found.high - 1,
        test=f"relative change: {found.test}",
    )


def effect_size(a: ArrayLike, b: ArrayLike, documents: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Cohen's d_z: mean of a - b over the standard deviation of a - b across tokens, clustered by document.

    The interval is from the jackknife over documents. Nothing is tested: `mean_difference` does that.

    Raises:
        ValueError: as `clustered_mean`, or when all differences are equal.
    """
    check_confidence(confidence)
    a, b = checked_pair(a, b)
    difference = a - b
    shift = difference.mean() if difference.size else 0.0  # sums of squares about the mean lose no digits
    counts, (sums, squares) = sums_by_cluster(documents, difference - shift, (difference - shift) ** 2)

    def d_z(n: Floats, s: Floats, q: Floats) -> Floats:
        variance = np.maximum(q - s**2 / n, 0) / (n - 1)
        if not (variance > 0).all():
            raise ValueError("the differences are all equal, so they have no standardised size; report their mean")
        return (shift + s / n) / np.sqrt(variance)

    n, s, q = counts.sum(), sums.sum(), squares.sum()
    observed = float(d_z(n, s, q))
    left_out = d_z(n - counts, s - sums, q - squares)
    error = float(np.sqrt((len(counts) - 1) / len(counts) * ((left_out - observed) ** 2).sum()))
    against = StudentT.over_clusters(counts)
    low, high = interval(observed, error, against.critical(confidence))
    return Estimate(
        estimate=observed,
        low=low,
        high=high,
        confidence=confidence,
        n=int(n),
        n_clusters=len(counts),
        test=f"d_z of paired differences over tokens, {against.words}",
    )


def paired_t(a: ArrayLike, b: ArrayLike | None = None, *, confidence: float = 0.95) -> Estimate:
    """Mean of a - b over seeds (of a alone without b), tested against 0 by Student's paired t.

    Raises:
        ValueError: for NaN or infinite values, unequal lengths, fewer than 2 seeds.
    """
    check_confidence(confidence)
    a = checked("a", a)
    difference = a if b is None else np.subtract(*checked_pair(a, b))
    if len(difference) < 2:
        raise ValueError(f"{len(difference)} seed(s): a spread over seeds needs at least 2; train more seeds")
    mean = float(difference.mean())
    if np.ptp(difference) == 0:  # scipy answers nan
        low, high, p_value = mean, mean, float(mean == 0)
    else:
        found: Any = stats.ttest_1samp(difference, 0.0)
        low, high = map(float, found.confidence_interval(confidence))
        p_value = float(found.pvalue)
    return Estimate(
        estimate=mean,
        low=low,
        high=high,
        confidence=confidence,
        n=len(difference),
        test=f"{'t-test' if b is None else 'paired t-test'} over {len(difference)} seeds",
        p_value=p_value,
    )


def corrected_p_values(p_values: ArrayLike, method: Correction) -> Floats:
    """P-values adjusted for their number: "holm" (family-wise error) or "benjamini-hochberg" (false discovery rate).

    Raises:
        ValueError: for no p-values, one outside [0, 1], or another method.
    """
    names = {"holm": "holm", "benjamini-hochberg": "fdr_bh"}
    if method not in names:
        raise ValueError(f"the correction is {method!r}; choose one of {', '.join(names)}")
    p = checked("p_values", p_values)
    if ((p < 0) | (p > 1)).any():
        raise ValueError(f"the p-values run from {p.min():g} to {p.max():g}; give probabilities between 0 and 1")
    return np.asarray(multipletests(p, method=names[method])[1], dtype=np.float64)


def corrected(estimates: Sequence[Estimate], method: Correction) -> tuple[Estimate, ...]:
    """The same estimates with adjusted p-values; intervals stay as they are, each for itself.

    Raises:
        ValueError: for an estimate without a p-value, or one that was adjusted before.
    """
    for i, estimate in enumerate(estimates):
        if estimate.p_value is None:
            raise ValueError(f"estimate {i} ({estimate.test}) has no p-value to adjust; leave it out")
        if estimate.correction is not None:
            raise ValueError(f"estimate {i} is adjusted already ({estimate.correction}); give the original ones")
    adjusted = corrected_p_values([e.p_value for e in estimates if e.p_value is not None], method)
    words = (
        f"{'Holm' if method == 'holm' else 'Benjamini-Hochberg'} over {len(estimates)} test{'s' * (len(estimates) > 1)}"
    )
    return tuple(
        replace(estimate, p_value=float(p), correction=words) for estimate, p in zip(estimates, adjusted, strict=True)
    )
