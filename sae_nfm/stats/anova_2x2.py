"""Statistics of a 2x2 experiment with the stimuli (items) as units of evidence.

Cells are numbered 0 to 3 (`stimuli`); with s_c the sign of an effect in cell c, m_c and n_c mean and number of its items,

    contrast     L = sum_c s_c m_c                          of the interaction: a difference of differences
    F            L^2 / (MSE sum_c 1/n_c)                    1 and N - 4 degrees of freedom

with MSE the mean squared deviation from the cells' means. For the interaction that is the F of types I, II and III alike; for
main effects it is type III. Words are no replications: a thousand words after one sentence say nothing about other sentences.

Source: Clark 1973, J. Verbal Learning and Verbal Behavior 12:335 (what is sampled has to be the unit); Steiger 2004,
Psychological Methods 9:164 (interval of partial eta squared).
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import statsmodels.api as sm
from numpy.typing import NDArray
from scipy import optimize, stats
from statsmodels.multivariate.manova import MANOVA
from statsmodels.tools.sm_exceptions import ConvergenceWarning

from sae_nfm.stats.estimates import Estimate, Floats

Effect = Literal["first", "second", "interaction"]
Cells = NDArray[np.int64]
SIGNS: dict[Effect, Floats] = {
    "first": np.array([1.0, 1.0, -1.0, -1.0]),
    "second": np.array([1.0, -1.0, 1.0, -1.0]),
    "interaction": np.array([1.0, -1.0, -1.0, 1.0]),
}
"""Sign of each effect by cell."""
CONFIDENCE = 0.90
"""Of intervals of partial eta squared, which leave out 0 exactly when F is significant at 5 %."""


@dataclass(frozen=True, kw_only=True)
class FactorialTest:
    """The F-test of one effect of a 2x2 design."""

    effect: Effect
    contrast: float
    """L, in the units of the values; for the interaction m_0 - m_1 - m_2 + m_3."""
    cell_means: tuple[float, float, float, float]
    """Mean of the units of each cell."""
    f: float
    """F; 0 where all values are one."""
    df: int
    """Degrees of freedom of the error; those of the effect are 1."""
    p_value: float
    partial_eta_squared: Estimate
    """F / (F + df): share of the variance left by the other effects; its `n` counts the units."""


@dataclass(frozen=True, kw_only=True)
class MixedModel:
    """The interaction in a linear mixed model of single words, with a random intercept for each stimulus."""

    contrast: float | None
    """As of `FactorialTest`; None where the model did not converge."""
    p_value: float | None
    """Wald's."""
    item_share: float | None
    """Share of the residual variance that is between stimuli."""
    words: str
    """Whether it was fitted and converged."""


def effect_t(values: Floats, cells: Cells, effect: Effect) -> Floats:
    """T of an effect, F = t^2, for many columns [items, ...] at once; 0 where a column is constant within every cell.

    Raises a ValueError for an empty cell, or fewer than 5 items.
    """
    counts = _counts(cells, len(values))
    one_hot = (cells[:, None] == np.arange(4)).astype(np.float64)
    flat = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    flat = flat - flat.mean(0)  # squares about the mean lose no digits
    means = (one_hot.T @ flat) / counts[:, None]
    error = np.square(flat - one_hot @ means).sum(0) / (len(values) - 4)
    contrast = SIGNS[effect] @ means
    scale = np.sqrt(error * (1 / counts).sum())
    flat_scale = np.abs(flat).max(0, initial=0) * 1e-12  # what rounding leaves of a constant is no spread
    t = np.divide(contrast, scale, out=np.zeros_like(contrast), where=scale > flat_scale)
    return t.reshape(np.shape(values)[1:])


def factorial_test(values: Floats, cells: Cells, effect: Effect = "interaction") -> FactorialTest:
    """The F-test of an effect in the two-way analysis of variance of values [units], by statsmodels.

    Raises a ValueError for an empty cell, too few units, or values that are not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"the values have shape {values.shape} or are not all finite; give one number a unit")
    counts = _counts(cells, len(values))
    means = np.bincount(cells, values, minlength=4) / counts
    fit: Any = sm.OLS(values, _design(cells)).fit()
    t = float(fit.tvalues[1 + list(SIGNS).index(effect)])
    df = len(values) - 4
    varies = float(effect_t(values, cells, effect)) != 0
    f = t**2 if varies and np.isfinite(t) else 0.0
    return FactorialTest(
        effect=effect,
        contrast=float(SIGNS[effect] @ means),
        cell_means=(float(means[0]), float(means[1]), float(means[2]), float(means[3])),
        f=f,
        df=df,
        p_value=float(stats.f.sf(f, 1, df)),
        partial_eta_squared=partial_eta_squared(f, df),
    )


def partial_eta_squared(f: float, df: int, confidence: float = CONFIDENCE) -> Estimate:
    """F / (F + df) with the interval that noncentral F gives: l / (l + N), l the noncentralities at which F is a tail's edge.

    F has 1 and df = N - 4 degrees of freedom. An F near 0 is so improbable under any l that the upper end would be 0, as if an
    effect were excluded. It is therefore at least -2 ln(tail), where F = 0 is as much less probable than without an effect.

    Source: Steiger 2004; the bound is that of Read 2002, J. Physics G 28:2693 (CLs), at F = 0.
    """
    n, finite_f = df + 4, min(f, 1e8)  # beyond it noncentral F is no number, and the interval a point in all digits

    def excess(noncentrality: float, tail: float) -> float:
        return float(stats.ncf.cdf(finite_f, 1, df, noncentrality)) - tail

    def noncentrality(tail: float) -> float:
        if stats.f.cdf(finite_f, 1, df) <= tail:
            return 0.0
        upper = 10.0
        while excess(upper, tail) > 0:
            upper *= 2
        root: Any = optimize.brentq(excess, 1e-12, upper, args=(tail,))
        return float(root)

    low, high = (noncentrality(tail) for tail in ((1 + confidence) / 2, (1 - confidence) / 2))
    high = max(high, -2 * float(np.log((1 - confidence) / 2)))
    return Estimate(
        estimate=f / (f + df),
        low=low / (low + n),
        high=high / (high + n),
        confidence=confidence,
        n=n,
        test=f"F(1, {df}), noncentral F interval",
        p_value=float(stats.f.sf(f, 1, df)),
    )


def word_pattern(buckets: Floats) -> Floats:
    """Of each stimulus, how far the words changed as an interaction of their own cells: 1/4 sum_c s_c d_c, [items].

    All buckets are scored after every stimulus, so no other words stand in one cell than in the next. (The words of a stimulus's
    own cell alone would not do: a clamp with two main effects, on stimuli of the first factor and on words of the second, makes
    an interaction of these.) What moves all words alike cancels, the normaliser of the softmax with it. `buckets` [items, 4] are
    the mean changes of each bucket.
    """
    return buckets @ SIGNS["interaction"] / 4


def any_bucket_p(buckets: Floats, cells: Cells) -> float:
    """The interaction of stimuli in the four buckets [items, 4] at once: p-value of Wilks' lambda; 1 where nothing varies."""
    centred = buckets - buckets.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    kept = sizes > max(float(sizes[0]) * 1e-6, 1e-12)  # buckets can move together, or not at all
    scores = np.sqrt(len(cells)) * left[:, kept]
    if scores.shape[1] < 2:
        return factorial_test(scores[:, 0], cells).p_value if scores.shape[1] else 1.0
    hypothesis = [("interaction", np.array([[0.0, 0.0, 0.0, 1.0]]))]
    try:
        found: Any = MANOVA(scores, _design(cells)).mv_test(hypothesis)
    except (ValueError, np.linalg.LinAlgError):  # some combination does not vary within cells: no error to test against
        return float("nan")
    return float(found.results["interaction"]["stat"].loc["Wilks' lambda", "Pr > F"])


def mixed_model(changes: Floats, word_cells: Cells, cells: Cells) -> MixedModel:
    """The interaction with single words as observations and stimuli as random intercepts, by statsmodels (REML).

        y_i + s_w (deviation of word w from its bucket, less its mean over stimuli) = effects of the cell + stimulus_i + rest_iw

    with y_i = `word_pattern`. Its interaction is that of y; beside that it shows how much of the spread is between stimuli.
    `changes` are [items, words].
    """
    buckets = by_bucket(changes, word_cells)
    deviations = changes - buckets[:, word_cells]
    deviations = SIGNS["interaction"][word_cells] * (deviations - deviations.mean(0))
    values = word_pattern(buckets - buckets.mean(0))[:, None] + deviations
    spread, (n_items, n_words) = float(values.std()), changes.shape
    none = MixedModel(contrast=None, p_value=None, item_share=None, words="not converged")
    if spread == 0:
        return replace(none, words="not fitted: nothing changed")
    if np.abs(deviations).max() < 1e-4 * spread:  # rounding in float32
        return replace(none, words="not fitted: words of a bucket change alike")
    rows = pd.DataFrame(np.repeat(_design(cells), n_words, axis=0), columns=["constant", *SIGNS])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            model: Any = sm.MixedLM(values.ravel() / spread, rows, groups=np.repeat(np.arange(n_items), n_words))
            fit = model.fit(reml=True)
        except np.linalg.LinAlgError:
            return replace(none, words="not converged: singular")
    between = float(np.asarray(fit.cov_re)[0, 0])
    failed = any(issubclass(one.category, ConvergenceWarning) for one in told) and between > 1e-6
    if failed or not fit.converged or not np.isfinite(fit.pvalues["interaction"]):
        return none
    return MixedModel(
        contrast=float(fit.params["interaction"]) * 4 * spread,
        p_value=float(fit.pvalues["interaction"]),
        item_share=between / (between + float(fit.scale)),
        words="converged" if between > 1e-6 else "converged, no variance between stimuli",
    )


def by_bucket(changes: Floats, word_cells: Cells) -> Floats:
    """Mean over the words of each bucket: [items, words] to [items, 4]."""
    one_hot = (word_cells[:, None] == np.arange(4)).astype(np.float64)
    return changes @ (one_hot / one_hot.sum(0))


def index_paired_f(changes: Floats, word_cells: Cells, cells: Cells) -> tuple[float, float]:
    """The published statistic, for comparison only: a one-way F on words paired by their place in the buckets.

    Each word's change is averaged over the stimuli of its own cell; word k of cell 1 is taken from word k of cell 0, word k of
    cell 3 from word k of cell 2, and the two sets of differences are compared by a one-way analysis of variance. The pairing is
    arbitrary (another order of the words gives another F), and the stimuli do not enter as units. Returns F and its p-value;
    0 and 1 where nothing changed.

    Source: arXiv 2507.00269, released evaluation.
    """
    own = [changes[cells == c][:, word_cells == c].mean(0) for c in range(4)]
    n = min(map(len, own))
    differences = [own[0][:n] - own[1][:n], own[2][:n] - own[3][:n]]
    if not any(np.ptp(d) > 0 for d in differences):
        return 0.0, 1.0
    found: Any = stats.f_oneway(*differences)
    return float(found.statistic), float(found.pvalue)


def _design(cells: Cells) -> Floats:
    """[units, 4]: a constant and the signs of the three effects."""
    return np.column_stack([np.ones(len(cells)), *(signs[cells] for signs in SIGNS.values())])


def _counts(cells: Cells, n: int) -> Floats:
    if len(cells) != n:
        raise ValueError(f"{len(cells)} cells for {n} units; give the cell of each unit")
    counts = np.bincount(cells, minlength=4).astype(np.float64)
    if len(counts) != 4 or not counts.all() or n <= 4:
        raise ValueError(f"the cells have {counts.astype(int).tolist()} units; give each of the 4 some, and 5 in all")
    return counts


POWERS = (-1.0, 0.0, 0.5, 1.5, 2.0, 3.0)
"""Yeo-Johnson's lambda; 1 is the identity, 0 a logarithm of positive values, 2 one of negative values."""
ALPHA = 0.05
"""Below this an interaction is there, above it has vanished."""


@dataclass(frozen=True, kw_only=True)
class Removability:
    """What monotone transforms of the outcome do to its interaction."""

    p_values: dict[str, float]
    """Of the interaction after each transform; "as measured" is none."""
    vanishes: tuple[str, ...]
    """Transforms after which it is not significant, or of the other sign."""
    crosses: bool
    """Whether the simple effects of a factor have opposite signs at the two levels of the other."""

    @property
    def words(self) -> str:
        """The verdict."""
        if self.p_values["as measured"] >= ALPHA:
            return "no interaction"
        return "removable" if self.vanishes else "not removed"


def removability(values: Floats, cells: Cells) -> Removability:
    """Whether an interaction is more than a matter of scale, and survives every monotone transform that is tried.

    Two factors that add up on one scale interact on another: exp(a + b) does. So an interaction counts as one of the factors
    only if no strictly increasing transform of the outcome makes it go away. Tried are ranks, normal scores and Yeo-Johnson
    powers from logarithm-like to convex (of the outcome in units of its root mean square). An interaction that is significant
    on the scale of measurement and not on one of these, or of the other sign there, is called removable.

    Beside it the ordinal criterion: where each factor's simple effects have one sign at both levels of the other, some monotone
    transform of the four means makes them additive; where they cross none does.

    Source: Loftus 1978, Memory & Cognition 6:312; Wagenmakers et al. 2012, Memory & Cognition 40:145; Yeo & Johnson 2000,
    Biometrika 87:954.
    """
    ranks = np.asarray(stats.rankdata(values), dtype=np.float64)
    unit = float(np.sqrt(np.mean(values**2))) or 1.0
    powers: dict[str, Any] = {f"power {power:g}": stats.yeojohnson(values / unit, power) for power in POWERS}
    scales = {
        "as measured": values,
        "ranks": ranks,
        "normal scores": stats.norm.ppf((ranks - 0.5) / len(ranks)),
        **powers,
    }
    tests = {name: factorial_test(scaled, cells) for name, scaled in scales.items()}
    p_values, sign = {name: test.p_value for name, test in tests.items()}, np.sign(tests["as measured"].contrast)
    lost = [name for name, test in tests.items() if test.p_value >= ALPHA or np.sign(test.contrast) != sign]
    m = tests["as measured"].cell_means
    crosses = (m[0] - m[2]) * (m[1] - m[3]) < 0 or (m[0] - m[1]) * (m[2] - m[3]) < 0
    return Removability(p_values=p_values, vanishes=tuple(lost), crosses=crosses)
