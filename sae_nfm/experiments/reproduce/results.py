"""What the paper reports, as numbers by the name of the statistic, and the table of `sae-nfm reproduce`.

Source: arXiv 2507.00269; W. Gurnee 2024, "SAE reconstruction errors are (empirically) pathological".
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

from typing_extensions import override

from sae_nfm.analysis.results import Figure, Statistic
from sae_nfm.common.options import EMBEDDED_MODEL, sampled_text
from sae_nfm.common.results import SavedResult, not_held_out
from sae_nfm.comparison.results import renamed
from sae_nfm.stats import Estimate


class Unit(StrEnum):
    """What a number is, and so how it is written."""

    CHANGE = "relative change"
    SHARE = "share"
    RATIO = "ratio"
    CORRELATION = "correlation"
    F = "F statistic"
    COUNT = "count"
    NUMBER = "number"
    OTHER = "other"


FORMS: Mapping[Unit, str] = dict(zip(Unit, ("+.1%", ".1%", ".2f", "+.3f", ".3f", ".0f", ".3f", "+.3g"), strict=True))
"""Format specifications of what is measured here."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published number, or a range."""

    value: float | None = None
    """The number, changes and shares as fractions; None where the paper says it in words."""
    to: float | None = None
    """The other end, where it is a range."""
    unit: Unit
    before: float | None = None
    """What a change is from, where the paper says so."""
    after: float | None = None
    """What it is to."""
    p_value: float | None = None
    decimals: int = 1
    """Of a percentage."""
    note: str = ""
    """What else the paper says of it."""

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends, the lower first; equal where it is one number."""
        if self.value is None:
            return None
        other = self.value if self.to is None else self.to
        return min(self.value, other), max(self.value, other)

    @property
    def text(self) -> str:
        """As the paper writes it."""
        parts = [" to ".join(self._written(end) for end in (self.value, self.to) if end is not None)]
        if self.before is not None and self.after is not None:
            parts.append(f"({self.before:g} to {self.after:g})")
        if self.p_value is not None:
            parts[0] += f", p = {self.p_value:g}"
        return " ".join(part for part in (*parts, self.note) if part)

    def _written(self, value: float) -> str:
        if self.unit in (Unit.CHANGE, Unit.SHARE):
            return f"{100 * value:.{self.decimals}f} %"
        if self.unit is Unit.CORRELATION:
            return f"{value:+.3f}"
        return f"F = {value:g}" if self.unit is Unit.F else f"{value:g}"


def _change(value: float, to: float | None = None) -> Published:
    return Published(value=value, to=to, unit=Unit.CHANGE)


def _share(value: float, note: str = "", decimals: int = 1) -> Published:
    return Published(value=value, unit=Unit.SHARE, note=note, decimals=decimals)


PAPER_RATIO = 2.99
"""KL of an SAE over that of an isotropic vector of equal distance, arXiv 2507.00269."""
GURNEE_RATIOS = (2.0, 4.5)
"""The same, Gurnee 2024: the ends of a range."""
_GURNEE = "(Gurnee {:g} to {:g})".format(*GURNEE_RATIOS)
_BIMODAL = "bimodal, means 0.05 and 0.37, untested"
_KL_OF_BOTH = _change(-0.516, -0.519)

ERROR_WHOLE, KL_WHOLE, CE_WHOLE = (
    f"{what}, all paths against the direct path alone" for what in ("squared error", "KL", "cross-entropy")
)
SHARE_OF_GAIN = "share of the KL gain that the nonlinear path has by itself"
ERROR_RATIO = "KL of the SAE over that of an equal-distance random vector"
SEQUENTIAL_ERROR = "reconstruction error, NFM on the residual of a frozen SAE"
SEQUENTIAL_KL = "KL relative to the SAE alone"
SEQUENTIAL_LINEAR, SEQUENTIAL_NONLINEAR = "share of NFM output, linear", "share of NFM output, nonlinear"
SEQUENTIAL_RATIO = "KL over that of an equal-distance random vector"
CLAMPED, CONTROL = "formality x emotion, clamping secondary feature 4022", "the same, control feature 1113"


def of_part(what: str, part: str) -> str:
    """Name of a statistic of KL or cross-entropy with some of the paths."""
    return f"{what} relative to the direct path alone, {part}"


_CORRELATIONS = {"integration": -0.987, "linear": -0.867, "nonlinear": -0.922, "direct": 0.987}
_BELOW = {"integration": 0.828, "linear": 0.331, "nonlinear": 0.497, "direct": 0.172}
_ABOVE = {"integration": 0.713, "linear": 0.290, "nonlinear": 0.423, "direct": 0.287}
WEIGHTS: Mapping[str, Published] = {
    "mean squared decoder norm": Published(value=0.4, unit=Unit.NUMBER, note="(SAE)"),
    "modes of the squared norm: p-value of the dip test": Published(unit=Unit.NUMBER, note=_BIMODAL),
    "modes of the squared norm: Gaussians preferred by BIC": Published(unit=Unit.COUNT, note=_BIMODAL),
    "components for 90 % of variance": Published(value=860.0, unit=Unit.COUNT, note="of 3,200, about"),
    **{
        Statistic.CORRELATION.of(path): Published(value=rho, unit=Unit.CORRELATION)
        for path, rho in _CORRELATIONS.items()
    },
    **{f"{Statistic.NORM_SHARE.of(path)}, squared norm below 0.2": _share(part) for path, part in _BELOW.items()},
    **{f"{Statistic.NORM_SHARE.of(path)}, squared norm above 0.2": _share(part) for path, part in _ABOVE.items()},
    Statistic.WRITTEN.of("linear"): _share(0.94, decimals=0),
    Statistic.WRITTEN.of("interaction"): _share(0.06, decimals=0),
    "nonlinear share of what is written": _share(0.06, decimals=0),
}
"""Of norms and paths, by the names of `figure_rows`."""
SEQUENTIAL: Mapping[str, Published] = {
    SEQUENTIAL_ERROR: replace(_change(-0.23), before=0.367, after=0.281, decimals=0),
    SEQUENTIAL_KL: Published(value=-0.298, unit=Unit.CHANGE, note="(17.8M measurements)"),
    SEQUENTIAL_LINEAR: _share(0.955),
    SEQUENTIAL_NONLINEAR: _share(0.045),
    SEQUENTIAL_RATIO: Published(value=2.1, unit=Unit.RATIO),
}
"""Of sequential training."""
FACTORIAL: Mapping[str, Published] = {
    CLAMPED: Published(value=5.06, unit=Unit.F, p_value=0.027),
    CONTROL: Published(value=0.022, unit=Unit.F),
}
"""Of the 2x2 experiment."""
PUBLISHED: Mapping[str, Published] = {
    ERROR_WHOLE: replace(_change(-0.413), before=0.275, after=0.161),
    of_part("KL", "linear"): _change(-0.509),
    of_part("KL", "nonlinear"): _change(-0.086),
    of_part("KL", "both"): _KL_OF_BOTH,
    KL_WHOLE: _KL_OF_BOTH,
    SHARE_OF_GAIN: _share(0.165, "for 3 % of the parameters"),
    of_part("cross-entropy", "linear"): _change(-0.257),
    of_part("cross-entropy", "nonlinear"): _change(-0.042),
    of_part("cross-entropy", "both"): _change(-0.262),
    CE_WHOLE: _change(-0.262),
    ERROR_RATIO: Published(value=PAPER_RATIO, unit=Unit.RATIO, note=_GURNEE),
    **WEIGHTS,
    **SEQUENTIAL,
    **FACTORIAL,
}
"""All of them."""


class Section(StrEnum):
    """What a row is about."""

    RECONSTRUCTION = "reconstruction"
    KL = "KL"
    CROSS_ENTROPY = "cross-entropy"
    ERRORS = "errors"
    PATHS = "paths"
    NORMS = "norms"
    SEQUENTIAL = "sequential"
    FACTORIAL = "2x2"


class NoVerdict(StrEnum):
    """Why seeds say nothing of a row."""

    ONE_SEED = "one seed: no claim"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class ReproducedRow:
    """A published statistic beside this model's, and one control."""

    section: Section
    name: str
    statistic: Statistic = Statistic.OTHER
    """As `FigureRow` has it, like the two that follow."""
    path: str = ""
    p_value: float | None = None
    published: Published | None = None
    """As arXiv 2507.00269 gives it; None where it does not."""
    unit: Unit
    """Of the numbers here."""
    here: Figure
    """The same statistic on the SAE at hand; None where there is none."""
    controlled: Figure
    """The statistic under the control; None where there is none."""
    control: str
    """What the control is, and what it changes; why there is none."""
    verdict: str
    """What five seeds or more say of the controlled statistic, or one of `NoVerdict`."""

    @property
    def here_text(self) -> str:
        """`here` with its interval."""
        return written(self.here, self.unit)

    @property
    def controlled_text(self) -> str:
        """`controlled` with its interval."""
        return written(self.controlled, self.unit)

    @property
    def published_text(self) -> str:
        """As the paper writes it, "-" where it has none."""
        return "-" if self.published is None else self.published.text


def reproduced_row(
    section: Section,
    name: str,
    here: Figure,
    controlled: Figure,
    control: str,
    *,
    verdict: str = NoVerdict.ONE_SEED,
    unit: Unit = Unit.OTHER,
    **more: Any,
) -> ReproducedRow:
    """A row with what is published under its name, whose unit it has then."""
    published = PUBLISHED.get(name)
    return ReproducedRow(
        section=section,
        name=name,
        published=published,
        unit=unit if published is None else published.unit,
        here=here,
        controlled=controlled,
        control=control,
        verdict=str(verdict),
        **more,
    )


@dataclass(frozen=True, kw_only=True)
class ReproduceResult(SavedResult):
    """The table, and what is needed to repeat it."""

    kind: ClassVar[str] = "reproduce/1"

    rows: tuple[ReproducedRow, ...]
    """Every published statistic, once for each control."""
    provenance: dict[str, Any]
    """Configuration, and the provenance of the comparison."""

    def words(self) -> str:
        """Section by section; statistics that the paper does not have are in the file only."""
        lines: list[str] = []
        shown = [row for row in self.rows if row.published is not None]
        for section in dict.fromkeys(row.section for row in shown):
            lines += [section, "-" * len(section)]
            own = [row for row in shown if row.section is section]
            for name in dict.fromkeys(row.name for row in own):
                same = [row for row in own if row.name == name]
                lines.append(f"{name}: published {same[0].published_text}; here {same[0].here_text}")
                lines += [f"    {row.controlled_text}  {row.control} ({row.verdict})" for row in same]
            lines.append("")
        return "\n".join([*lines, *(f"* {caveat}" for caveat in self.caveats())])

    def caveats(self) -> list[str]:
        """What limits these statistics."""
        config = self.provenance["comparison"]["config"]
        told = [
            "Intervals are 95 %, over documents: they say nothing about other seeds. Verdicts are over seeds and documents.",
            f"One SAE of {config['d_sae']:,} features and {config['training_tokens']:,} training tokens; the paper's has "
            "50,000 and 5M, on OpenLLaMA-3B, and reads the strongest half of its features where this one reads all.",
        ]
        sampled = sampled_text(config.get("model", EMBEDDED_MODEL), config["dataset"])
        return [*told, *([sampled] if sampled else []), *not_held_out(self.provenance)]

    @override
    @classmethod
    def from_0_1_0(cls, content: dict[str, Any]) -> dict[str, Any]:
        """As the base class has it."""
        origin = content.get("provenance")
        if set(content) != {"rows", "provenance"} or not isinstance(origin, dict) or "comparison" not in origin:
            return content
        origin = {**origin, "config": renamed(origin["config"])}
        return {"rows": [_row_of_0_1_0(row) for row in content["rows"]], "provenance": origin}


def written(figure: Figure, unit: Unit) -> str:
    """A number with its interval, where it has one."""
    form = FORMS[unit]
    if figure is None:
        return "none"
    if not isinstance(figure, Estimate):
        return f"{figure:{form}}"
    return f"{figure.estimate:{form}} [{figure.low:{form}}, {figure.high:{form}}]"


def _row_of_0_1_0(row: dict[str, Any]) -> dict[str, Any]:
    """0.1.0 saved texts and formats: what is published is found by the row's name."""
    published = PUBLISHED.get(row["name"])
    units = {form: unit for unit, form in FORMS.items()}
    path = row["name"].rpartition(", ")[2]
    statistic = next((one for one in reversed(Statistic) if row["name"] == one.of(path)), Statistic.OTHER)
    if row["name"] == "nonlinear share of what is written":
        statistic, path = Statistic.WRITTEN, ""
    of_null = row["control"].startswith("rows dealt out")
    return {name: value for name, value in row.items() if name not in ("published", "form")} | {
        "published": published,
        "unit": published.unit if published else units.get(row["form"], Unit.OTHER),
        "statistic": statistic,
        "path": "" if statistic is Statistic.OTHER else path,
        "p_value": float(row["control"].rpartition("p = ")[2]) if of_null else None,
    }
