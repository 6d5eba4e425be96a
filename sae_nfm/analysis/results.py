"""What `reproduce` and the report save and draw of an analysis of one SAE."""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Literal

from sae_nfm.common.results import SavedResult
from sae_nfm.stats import ALPHA, DipTest, Estimate

AS_TRAINED, CANONICAL, TOPK, INITIAL = "as trained", "canonical gauge", "TopK SAE", "random initialisation"
Measure = Literal["decoder", "encoder x decoder"]

PUBLISHED_MEANS = (0.05, 0.37)
"""Means of the two modes that arXiv 2507.00269 reports of the joint model's squared decoder norms."""

Figure = Estimate | float | None


class Statistic(StrEnum):
    """Statistics that have a value for each path, and are drawn together."""

    NORM_SHARE = "share of weight norm"
    CORRELATION = "Spearman of squared norm and share"
    WRITTEN = "share of what the integration paths write"
    OTHER = "other"

    def of(self, path: str) -> str:
        """Name of the statistic of one path."""
        return f"{self}, {path}"


@dataclass(frozen=True, kw_only=True)
class FigureRow:
    """One line: a statistic and a control."""

    name: str
    statistic: Statistic = Statistic.OTHER
    """Which statistic that is; several lines about one have the same name."""
    path: str = ""
    """Of which path; "" where it is about no single one."""
    p_value: float | None = None
    """Of a control that permutes what it is compared with: `controlled` is their mean, what unrelated rows give."""
    published: Figure
    """As arXiv 2507.00269 defines it, or plain where it reports none; None where the SAE has no such thing."""
    controlled: Figure
    """Under the control; None where that cannot be had."""
    control: str
    """What the control is, and why there is none where there is none."""


@dataclass(frozen=True, kw_only=True)
class NormHistogram:
    """A squared norm over the features of one SAE."""

    name: str
    counts: tuple[int, ...]
    """Features in each bin; the upper end of the last bin belongs to it."""
    mean: float
    """Mean over features."""
    dip: DipTest | None
    """One mode against several; None where all features have one norm, up to rounding."""


@dataclass(frozen=True, kw_only=True)
class SquaredNorms:
    """One measure, for the SAE and what it is compared with."""

    measure: Measure
    edges: tuple[float, ...]
    histograms: tuple[NormHistogram, ...]
    """The SAE as trained, then what there is of canonical gauge, TopK SAE and random initialisation."""
    not_canonical: str | None
    """Why there is no canonical gauge; None where there is one."""

    def findings(self) -> list[str]:
        """Whether several modes are shown, and what fixing the gauge does to the mean."""
        by_name = {histogram.name: histogram for histogram in self.histograms}
        found = [_modes(self.measure, histogram) for histogram in self.histograms if histogram.name != INITIAL]
        if CANONICAL in by_name:
            before, after = by_name[AS_TRAINED].mean, by_name[CANONICAL].mean
            found.append(
                f"Fixing the gauge, which leaves the output as it is, takes the mean from {before:.3g} to {after:.3g}."
            )
        return found


@dataclass(frozen=True, kw_only=True)
class SAENorms:
    """Squared norms of one SAE."""

    sae: str
    """Its folder, relative to the run's."""
    norms: tuple[SquaredNorms, ...]
    """One for each `Measure`."""


@dataclass(frozen=True, kw_only=True)
class NormsResult(SavedResult):
    """Squared norms of the joint SAEs of a run."""

    kind: ClassVar[str] = "norms/1"

    saes: tuple[SAENorms, ...]


def _modes(measure: Measure, histogram: NormHistogram) -> str:
    what = f"Squared norm, {measure}, {histogram.name}"
    if histogram.dip is None:
        return f"{what}: all features have one, {histogram.mean:.3g}."
    p = histogram.dip.p_value
    told = "more than one mode" if p < ALPHA else "one mode is not rejected"
    return f"{what}: {told} (dip test, {p_words(p)}, {histogram.dip.n:,} features)."


def p_words(p: float) -> str:
    """A p-value in words."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
