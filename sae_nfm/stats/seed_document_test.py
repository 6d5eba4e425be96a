"""Whether one arm is better than another: a difference over seeds and documents, and the word for it.

With D_sd the difference of two arms for seed s and document d, and documents weighted by w_d (sum 1),

    D_sd = mu + seed_s + document_d + rest_sd           seeds and documents both drawn, crossed

the weighted mean has the variance v_S/S + v_D q + v_R q/S, with q = sum_d w_d^2. The spread of the S seed means estimates
v_S/S + v_R q/S; the jackknife over documents of the mean over seeds estimates v_D q + v_R q/S. Their sum contains the last
term twice: it errs towards wide intervals (most where seeds and documents matter least), never towards narrow ones.
Degrees of freedom are Satterthwaite's: S - 1 where seeds dominate, the effective documents less 1 where documents do.

The seed is the unit of every claim about architectures: with fewer than 5 there are estimates and no verdict. The interval
of a relative difference is Fieller's idea with this test: all r for which a - (1 + r) b does not differ significantly from 0.
So it leaves out 0 exactly when the difference does.

A t-test over few seeds trusts them to scatter normally. So the words also ask that swapping the arms' labels in any set of
seeds looks as good at most once in 32: five seeds have to agree. Under labels that mean nothing that holds exactly, whatever
the distribution (t alone: up to 3.5 % one-sided for 5 seeds and 6.2 % for 7, where differences are large and of either sign).

Source: Satterthwaite 1946, Biometrics Bulletin 2:110; Fieller 1954; `sae_nfm.stats.estimates` for the jackknife.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats
from scipy.optimize import brentq

from sae_nfm.stats.estimates import (
    Correction,
    Estimate,
    Floats,
    StudentT,
    check_confidence,
    corrected,
    interval,
    jackknife,
    paired_by_seed,
)

SEEDS_FOR_A_CLAIM = 5
"""With fewer seeds there are estimates but no verdict."""

RELABELLED_AT_MOST = 2.0**-SEEDS_FOR_A_CLAIM
"""Share of relabellings of the seeds that may look as good: what five seeds reach when they agree."""


class Outcome(StrEnum):
    """What a verdict comes to."""

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference shown"
    NO_CLAIM = "no claim"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One arm against another on one measure, of which less is better (FVU, KL)."""

    arm: str
    against: str
    """The arm it is compared with."""
    measure: str
    """What was measured, with its unit."""
    difference: Estimate
    """Mean of arm - against, interval over seeds and documents; `n` counts seeds x documents."""
    relative: Estimate
    """The same over the mean of `against`, a fraction."""
    n_seeds: int
    relabelled: float
    """Share of the ways to swap the labels of the arms by seed that show as large a difference in this direction."""

    @property
    def outcome(self) -> Outcome:
        """There is none for too few seeds."""
        if self.n_seeds < SEEDS_FOR_A_CLAIM:
            return Outcome.NO_CLAIM
        if not self._significant or self.relabelled > RELABELLED_AT_MOST:
            return Outcome.NO_DIFFERENCE
        return Outcome.BETTER if self.difference.estimate < 0 else Outcome.WORSE

    @property
    def words(self) -> str:
        """The outcome, and how many seeds are too few."""
        if self.outcome is not Outcome.NO_CLAIM:
            return str(self.outcome)
        return f"{'one seed' if self.n_seeds == 1 else f'{self.n_seeds} seeds'}: {self.outcome}"

    @property
    def _significant(self) -> bool:
        d = self.difference
        return d.p_value is not None and d.p_value < 1 - d.confidence

    @property
    def sentence(self) -> str:
        """The numbers and the words, in one line."""
        d, r = self.difference, self.relative
        disagree = self._significant and self.outcome is Outcome.NO_DIFFERENCE
        notes = [note for note in (d.correction, "the seeds disagree" if disagree else None) if note]
        return (
            f"{self.arm} against {self.against}, {self.measure}: {d.estimate:+.4g} [{d.low:+.4g}, {d.high:+.4g}], "
            f"{r.estimate:+.1%} [{r.low:+.1%}, {r.high:+.1%}] over {self.n_seeds} seed{'s' * (self.n_seeds > 1)} and "
            f"{d.n_clusters} documents: {self.words}" + (f" ({', '.join(notes)})" if notes else "")
        )


def verdict(
    a: ArrayLike,
    b: ArrayLike,
    *,
    arm: str,
    against: str,
    measure: str,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Verdict:
    """Compare two arms over the same seeds and documents.

    Args:
        a: [seeds, documents], the arm's mean of the measure over each document's tokens.
        b: [seeds, documents], likewise of the arm it is compared with: same seeds, same documents, same order.
        weights: [documents], what each counts for: its tokens for a mean over tokens; for FVU, where a and b are squared
            error over squared distance from the mean within the document, that squared distance. None: equal.
        confidence: nominal coverage of both intervals.

    Raises:
        ValueError: for NaN or infinite values, unequal shapes, no seed, fewer than 2 documents, a weight that is not
            positive, or a mean of `against` of 0.
    """
    check_confidence(confidence)
    a, b = _checked_cells(arm, a), _checked_cells(against, b)
    if a.shape != b.shape:
        raise ValueError(
            f"{arm!r} has [seeds, documents] {list(a.shape)} and {against!r} {list(b.shape)}; give both for the same "
            "seeds and documents"
        )
    w = _checked_weights(weights, a.shape[1])
    if b.mean(0) @ w == 0:
        raise ValueError(f"the mean of {against!r} is 0, so there is no relative difference: nothing to improve")
    difference, relative = _estimates(a, b, w, confidence)
    relabelled, names = _relabelled((a - b) @ w), {"arm": arm, "against": against, "measure": measure}
    return Verdict(**names, difference=difference, relative=relative, n_seeds=len(a), relabelled=relabelled)


def _relabelled(differences: Floats) -> float:
    """Share of the sign patterns of the seeds' differences whose mean is as far from 0, on the side of their own."""
    if len(differences) == 1:
        return 0.5
    found: Any = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=9_999,  # all patterns up to 13 seeds; above, random ones, always the same
        alternative="less" if differences.mean() < 0 else "greater",
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def _estimates(a: Floats, b: Floats, weights: Floats, confidence: float) -> tuple[Estimate, Estimate]:
    """Difference and relative difference of the weighted means, over seeds and documents."""
    cells, (n_seeds, n_documents) = np.stack([a, b]), a.shape
    means, by_document = jackknife(cells.mean(1) * weights, weights[None])
    mean_a, mean_b = map(float, means)
    # [2, 2] covariance of the means and its degrees of freedom: over documents, and over seeds where there are several
    parts = [(by_document @ by_document.T, StudentT.over_clusters(weights).df)]
    if n_seeds > 1:
        parts.append((np.cov(cells @ weights / weights.sum()) / n_seeds, float(n_seeds - 1)))

    def error_of(r: float) -> tuple[float, StudentT]:
        """Standard error of mean(a) - r mean(b), and Satterthwaite's t for it."""
        contrast = np.array([1.0, -r])
        variances = [max(0.0, float(contrast @ part @ contrast)) for part, _ in parts]
        spread = sum(v**2 / df for v, (_, df) in zip(variances, parts, strict=True))
        df = sum(variances) ** 2 / spread if spread else parts[0][1]
        return float(np.sqrt(sum(variances))), StudentT(df=df)

    def beyond(r: float) -> float:
        """How far mean(a) - r mean(b) is outside of what the test allows."""
        error, reference = error_of(r)
        return abs(mean_a - r * mean_b) - reference.critical(confidence) * error

    error, reference = error_of(1.0)
    low, high = interval(mean_a - mean_b, error, reference.critical(confidence))
    documents = f"{n_documents} documents"
    units = f"{documents} of one seed" if n_seeds == 1 else f"{n_seeds} seeds and {documents}, crossed"
    test = f"t-test over {units} ({reference.df:.1f} degrees of freedom)"
    difference = Estimate(
        estimate=mean_a - mean_b,
        low=low,
        high=high,
        confidence=confidence,
        n=a.size,
        n_clusters=n_documents,
        test=f"paired difference, {test}",
        p_value=reference.p_value(mean_a - mean_b, error),
    )
    ratio = mean_a / mean_b
    low, high = _accepted(beyond, ratio, error_of(ratio)[0] / abs(mean_b))
    words = f"relative difference, by inversion of the {test}"
    return difference, replace(difference, estimate=ratio - 1, low=low - 1, high=high - 1, test=words)


def _accepted(beyond: Callable[[float], float], ratio: float, step: float) -> tuple[float, float]:
    """All r around the ratio of the means that the test does not refuse; -inf and inf when the divisor may be 0."""
    far = 1e9 * (abs(ratio) + step + 1)
    if beyond(far) <= 0 or beyond(-far) <= 0:
        return float("-inf"), float("inf")
    if beyond(ratio) >= 0:  # no spread but rounding
        return ratio, ratio

    def crossing(step: float) -> float:
        while beyond(ratio + step) <= 0:
            step *= 2
        return float(brentq(beyond, ratio, ratio + step, xtol=1e-12, rtol=1e-12))  # pyright: ignore[reportArgumentType]

    return crossing(-step), crossing(step)


def verdict_from_rows(
    rows: pd.DataFrame, measure: str, *, arm: str, against: str, weight: str = "tokens", confidence: float = 0.95
) -> Verdict:
    """`verdict` on tidy rows: one per seed, arm and document, as `paired_by_seed` reads them, with its ValueErrors."""
    a, b, weights = paired_by_seed(rows, measure, arm=arm, against=against, weight=weight)
    return verdict(a, b, arm=arm, against=against, measure=measure, weights=weights, confidence=confidence)


def corrected_verdicts(verdicts: Sequence[Verdict], method: Correction) -> tuple[Verdict, ...]:
    """The same verdicts, their words from p-values adjusted for their number; those without a claim stay as they are."""
    claims = [i for i, v in enumerate(verdicts) if v.n_seeds >= SEEDS_FOR_A_CLAIM]
    adjusted = corrected([verdicts[i].difference for i in claims], method) if claims else ()
    differences = dict(zip(claims, adjusted, strict=True))
    return tuple(replace(v, difference=differences.get(i, v.difference)) for i, v in enumerate(verdicts))


def _checked_cells(arm: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or len(array) == 0 or array.shape[1] < 2:
        raise ValueError(f"{arm!r} has shape {array.shape}; give [seeds, documents], at least 1 and 2 of them")
    bad = ~np.isfinite(array)
    if bad.any():
        seed, document = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{arm!r} has {bad.sum()} NaN or infinite value(s), the first at seed {seed}, document {document}; "
            "leave the document out of all seeds and arms, or train the seed again"
        )
    return array


def _checked_weights(weights: ArrayLike | None, n_documents: int) -> Floats:
    array = np.ones(n_documents) if weights is None else np.asarray(weights, dtype=np.float64)
    if array.shape != (n_documents,) or not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(
            f"weights has shape {array.shape} and smallest value {array.min(initial=np.inf):g}; give one positive "
            f"number for each of the {n_documents} documents"
        )
    return array
