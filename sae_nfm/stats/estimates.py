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
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats
from statsmodels.stats.multitest import multipletests

Floats = NDArray[np.float64]
Correction = Literal["holm", "benjamini-hochberg"]

CELLS = 2**22
"""Numbers that one batch of bootstrap resamples may hold: 32 MiB per array."""
TOKEN = ["document", "row", "position"]
"""Columns that together name a token."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimate with its interval and how they were obtained."""

    estimate: float
    """In the units of the values."""
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


def _reference(residuals: Floats, counts: Floats, bootstrap: Bootstrap | None) -> StudentT | BootstrapT:
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
    """The interval of a / b: all r with (a - r b)^2 <= critical^2 Var(a - r b); `covariance` [2, 2] is that of a and b.

    Its ends are -inf and inf when b itself does not differ significantly from 0, as the set has no bound then.

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


def _sums_by_document(documents: ArrayLike, *values: Floats) -> tuple[Floats, list[Floats]]:
    """Number of values of each document, and the sum of each array of values in it: [documents] each."""
    labels = np.asarray(documents)
    if labels.shape != values[0].shape:
        raise ValueError(
            f"documents has shape {labels.shape}, the values {values[0].shape}; give one document per value"
        )
    codes, names = pd.factorize(labels)
    missing = (codes < 0) | (labels < 0 if np.issubdtype(labels.dtype, np.signedinteger) else False)
    if missing.any():
        raise ValueError(f"{missing.sum()} value(s) have no document (missing, or -1: a separator); leave them out")
    if len(names) < 2:
        raise ValueError(f"all {len(codes)} values are from one document; an interval needs at least 2, better 20")
    counts, *sums = (np.bincount(codes, weights).astype(np.float64) for weights in (np.ones(codes.shape), *values))
    return counts, sums


def checked(name: str, values: ArrayLike) -> Floats:
    """Values [n] in float64. Raises a ValueError when there are none, they are not one row, or one is NaN or infinite."""
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
    """Two rows of values of one length, each `checked`."""
    a, b = checked("a", a), checked("b", b)
    if a.shape != b.shape:
        raise ValueError(f"a has {len(a)} values and b {len(b)}; give both on the same tokens, in the same order")
    return a, b


def check_confidence(confidence: float) -> None:
    """Refuse a confidence that is not a share, such as 95."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a share between 0 and 1, such as 0.95")


def clustered_mean(
    values: ArrayLike, documents: ArrayLike, *, confidence: float = 0.95, bootstrap: Bootstrap | None = None
) -> Estimate:
    """Mean over tokens with an interval over documents, tested against 0.

    Args:
        values: [tokens].
        documents: [tokens], which document each is from; in any order.
        bootstrap: resample documents; None refers to Student's t.

    Raises a ValueError for NaN or infinite values, unequal lengths, no tokens, fewer than 2 documents.
    """
    check_confidence(confidence)
    counts, (sums,) = _sums_by_document(documents, checked("values", values))
    mean, deviations = jackknife(sums, counts)
    error = float(np.linalg.norm(deviations))
    against = _reference(sums - mean * counts, counts, bootstrap)
    ends = interval(float(mean), error, against.critical(confidence))
    test, p_value = f"mean, {against.words}", against.p_value(float(mean), error)
    return _over_documents(float(mean), ends, confidence, counts, test, p_value)


def _over_documents(
    estimate: float, ends: tuple[float, float], confidence: float, counts: Floats, test: str, p_value: float | None
) -> Estimate:
    unfilled = Estimate(estimate=estimate, low=ends[0], high=ends[1], n=int(counts.sum()), test=test)
    return replace(unfilled, confidence=confidence, n_clusters=len(counts), p_value=p_value)


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
    """mean(a) / mean(b), paired by token, clustered by document, tested against 1; arguments as `clustered_mean`.

    The interval is Fieller's: all r for which a - r b does not differ significantly from 0. So a bounded one leaves out 1
    exactly when `p_value` is below 1 - confidence, and with Student's t that is the p-value of `mean_difference`.

    Raises a ValueError as `clustered_mean`, or when the mean of b is 0.
    """
    check_confidence(confidence)
    counts, sums = _sums_by_document(documents, *checked_pair(a, b))
    means, deviations = zip(*(jackknife(s, counts) for s in sums), strict=True)
    mean_a, mean_b = map(float, means)
    if mean_b == 0:
        raise ValueError("the mean of b is 0, so there is no ratio; give an arm that changes something to divide by")
    against = _reference(sums[0] - mean_a / mean_b * sums[1], counts, bootstrap)
    covariance = np.array(deviations) @ np.array(deviations).T
    ends = fieller(mean_a, mean_b, covariance, against.critical(confidence))
    test = f"ratio of means, Fieller's interval, {against.words}"
    p_value = against.p_value(mean_a - mean_b, float(np.linalg.norm(deviations[0] - deviations[1])))
    return _over_documents(mean_a / mean_b, ends, confidence, counts, test, p_value)


def relative_change(
    a: ArrayLike, b: ArrayLike, documents: ArrayLike, *, confidence: float = 0.95, bootstrap: Bootstrap | None = None
) -> Estimate:
    """(mean(a) - mean(b)) / mean(b), a fraction: `ratio_of_means` less 1. The paper's "-50.9 %" is -0.509."""
    found = ratio_of_means(a, b, documents, confidence=confidence, bootstrap=bootstrap)
    moved = {"estimate": found.estimate - 1, "low": found.low - 1, "high": found.high - 1}
    return replace(found, test=f"relative change: {found.test}", **moved)


def effect_size(a: ArrayLike, b: ArrayLike, documents: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Cohen's d_z: mean of a - b over the standard deviation of a - b across tokens, clustered by document.

    The interval is from the jackknife over documents. Nothing is tested: `mean_difference` does that.

    Raises a ValueError as `clustered_mean`, or when all differences are equal.
    """
    check_confidence(confidence)
    a, b = checked_pair(a, b)
    difference = a - b
    shift = difference.mean() if difference.size else 0.0  # sums of squares about the mean lose no digits
    counts, (sums, squares) = _sums_by_document(documents, difference - shift, (difference - shift) ** 2)

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
    ends = interval(observed, error, against.critical(confidence))
    test = f"d_z of paired differences over tokens, {against.words}"
    return _over_documents(observed, ends, confidence, counts, test, None)


def paired_t(a: ArrayLike, b: ArrayLike | None = None, *, confidence: float = 0.95) -> Estimate:
    """Mean of a - b over seeds (of a alone without b), tested against 0 by Student's paired t.

    Raises a ValueError for NaN or infinite values, unequal lengths, fewer than 2 seeds.
    """
    check_confidence(confidence)
    a = checked("a", a)
    difference = a if b is None else np.subtract(*checked_pair(a, b))
    n = len(difference)
    if n < 2:
        raise ValueError(f"{n} seed(s): a spread over seeds needs at least 2; train more seeds")
    mean = float(difference.mean())
    if np.ptp(difference) == 0:  # scipy answers nan
        low, high, p_value = mean, mean, float(mean == 0)
    else:
        found: Any = stats.ttest_1samp(difference, 0.0)
        low, high = map(float, found.confidence_interval(confidence))
        p_value = float(found.pvalue)
    test = f"{'t-test' if b is None else 'paired t-test'} over {n} seeds"
    return Estimate(estimate=mean, low=low, high=high, confidence=confidence, n=n, test=test, p_value=p_value)


def corrected_p_values(p_values: ArrayLike, method: Correction) -> Floats:
    """P-values adjusted for their number: "holm" (family-wise error) or "benjamini-hochberg" (false discovery rate).

    Raises a ValueError for no p-values, one outside [0, 1], or another method.
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

    Raises a ValueError for an estimate without a p-value, or one that was adjusted before.
    """
    for i, estimate in enumerate(estimates):
        if estimate.p_value is None:
            raise ValueError(f"estimate {i} ({estimate.test}) has no p-value to adjust; leave it out")
        if estimate.correction is not None:
            raise ValueError(f"estimate {i} is adjusted already ({estimate.correction}); give the original ones")
    adjusted = corrected_p_values([e.p_value for e in estimates if e.p_value is not None], method)
    name = "Holm" if method == "holm" else "Benjamini-Hochberg"
    words = f"{name} over {len(estimates)} test{'s' * (len(estimates) > 1)}"
    return tuple(replace(e, p_value=float(p), correction=words) for e, p in zip(estimates, adjusted, strict=True))


class PairedTokens(NamedTuple):
    """One measure of two arms on the same tokens: `mean_difference(*pair)`."""

    a: Floats
    """[tokens], the measure of the arm."""
    b: Floats
    """[tokens], the measure of the arm it is compared with."""
    documents: NDArray[np.int64]
    """[tokens]."""


def paired_by_token(rows: pd.DataFrame, measure: str, *, arm: str, against: str) -> PairedTokens:
    """Two arms of tidy rows, token by token; tokens where neither has the measure (no next token) are left out.

    Args:
        rows: one row per token and arm, with the columns document, row, position, arm and the measure.
        measure: name of the column compared, such as "kl_nats".
        against: value of the column `arm` that `arm` is compared with.

    Raises a ValueError for a missing column or arm, a token twice in one arm, or arms on different tokens.
    """
    columns = [*TOKEN, "arm", measure]
    _require(rows, columns)
    rows = rows.filter(columns)
    sides = [_of_arm(rows, name).sort_values(by=TOKEN) for name in (arm, against)]
    for name, side in zip((arm, against), sides, strict=True):
        if side.duplicated(TOKEN).any():
            raise ValueError(f"arm {name!r} has {side.duplicated(TOKEN).sum()} token(s) more than once; give each once")
    keys = [side[TOKEN].to_numpy(dtype=np.int64) for side in sides]
    a, b = (side[measure].to_numpy(dtype=np.float64, na_value=np.nan) for side in sides)
    if not np.array_equal(keys[0], keys[1]) or (np.isnan(a) != np.isnan(b)).any():
        counts = [int((~np.isnan(values)).sum()) for values in (a, b)]
        raise ValueError(
            f"{arm!r} and {against!r} have {measure} on different tokens ({counts[0]} and {counts[1]}); "
            "measure both arms on the same held-out rows"
        )
    kept = ~np.isnan(a)
    return PairedTokens(a[kept], b[kept], keys[0][kept, 0])


class PairedSeeds(NamedTuple):
    """One measure of two arms, by seed and document."""

    a: Floats
    """[seeds, documents], mean over the document's tokens in the arm."""
    b: Floats
    """[seeds, documents], likewise in the arm it is compared with."""
    weights: Floats
    """[documents], what each document counts for."""


def paired_by_seed(rows: pd.DataFrame, measure: str, *, arm: str, against: str, weight: str) -> PairedSeeds:
    """Two arms of tidy rows as matrices over the same seeds and documents.

    Args:
        rows: one row per seed, arm and document, with the columns seed, arm, document, the measure and the weight.
        measure: name of the column compared, the mean of one document.
        against: value of the column `arm` that `arm` is compared with.
        weight: name of the column that says what a document counts for; it may differ by document only.

    Raises a ValueError for a missing column or arm, a cell that is missing or there twice, or weights that differ.
    """
    _require(rows, ["seed", "arm", "document", measure, weight])
    a, b = (_by_seed(rows, name, measure) for name in (arm, against))
    if not (a.index.equals(b.index) and a.columns.equals(b.columns)):
        raise ValueError(
            f"{arm!r} has seeds {list(a.index)} and {a.shape[1]} documents, {against!r} seeds {list(b.index)} and "
            f"{b.shape[1]}, or other documents; train both with the same seeds and measure both on the same text"
        )
    weights = np.concatenate([_by_seed(rows, name, weight).to_numpy(dtype=np.float64) for name in (arm, against)])
    if not np.allclose(weights, weights[0]):
        raise ValueError(f"the weight {weight!r} of a document differs between seeds or arms; give all the same text")
    return PairedSeeds(a.to_numpy(dtype=np.float64), b.to_numpy(dtype=np.float64), weights[0])


def _by_seed(rows: pd.DataFrame, arm: str, column: str) -> pd.DataFrame:
    side = _of_arm(rows, arm)
    if side.duplicated(["seed", "document"]).any():
        raise ValueError(f"arm {arm!r} has a document twice for one seed; give one row per seed, arm and document")
    table = side.pivot(index="seed", columns="document", values=column)
    if table.isna().any(axis=None):
        missing = table.isna().to_numpy()
        seed, document = (int(i) for i in np.argwhere(missing)[0])
        raise ValueError(
            f"arm {arm!r} has no {column} for {missing.sum()} pair(s) of seed and document, the first seed "
            f"{table.index[seed]}, document {table.columns[document]}; measure every seed on the same text"
        )
    return table


def _of_arm(rows: pd.DataFrame, arm: str) -> pd.DataFrame:
    side: pd.DataFrame = rows.loc[rows["arm"] == arm]
    if side.empty:
        raise ValueError(f"there is no arm {arm!r}; there are {', '.join(map(repr, rows['arm'].unique()))}")
    return side


def _require(rows: pd.DataFrame, columns: Sequence[str]) -> None:
    missing: list[Any] = [name for name in columns if name not in rows.columns]
    if missing:
        raise ValueError(f"the rows have no column {', '.join(missing)}; they have {', '.join(map(str, rows.columns))}")
