"""The table of `sae-nfm reproduce`: as words for the terminal and as JSON."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from typing_extensions import override

from sae_nfm.analysis.results import Figure, Statistic
from sae_nfm.common.results import SavedResult
from sae_nfm.comparison.results import renamed
from sae_nfm.experiments.reproduce.published import FORMS, GURNEE_RATIOS, PAPER_RATIO, PUBLISHED, Published, Unit
from sae_nfm.stats import Estimate

__all__ = [
    "FORMS",
    "GURNEE_RATIOS",
    "PAPER_RATIO",
    "NoVerdict",
    "Published",
    "ReproduceResult",
    "ReproducedRow",
    "Section",
    "Unit",
    "reproduced_row",
]


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
    """What is measured."""
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
        if config["dataset"] is None:
            told.append("The tokens were sampled from the embedded model itself: no evidence about real text.")
        return told

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
    statistic, path = Statistic.OTHER, row["name"].rpartition(", ")[2]
    for one in Statistic:
        if row["name"] == one.of(path):
            statistic = one
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
