"""The published statistics, each beside the same one here and under the control that it needs."""

import textwrap
from collections.abc import Iterator, Sequence

import pandas as pd

from sae_nfm.analysis.results import Figure as Value
from sae_nfm.experiments.reproduce.results import FORMS, NoVerdict, ReproducedRow, ReproduceResult, Unit
from sae_nfm.experiments.reproduce.results import Section as Part
from sae_nfm.report.blocks import Block, Figure, Heading, Prose, Section, Table, section_of
from sae_nfm.report.plots.dot_plot import Axis, Group, Mark, Row, bounded, dot_plot
from sae_nfm.report.plots.theme import PALETTE
from sae_nfm.report.run_folder import Run
from sae_nfm.stats import Estimate

TITLE = "The published statistics, and their controls"
COMMANDS = ("sae-nfm reproduce --compare RUN/compare --output RUN/reproduce",)
COLUMNS = ("statistic", "published", "here", "control", "under the control", "verdict")
SECTIONS = {
    Part.RECONSTRUCTION: "Reconstruction error",
    Part.KL: "Divergence of the model's predictions (KL)",
    Part.CROSS_ENTROPY: "Cross-entropy",
    Part.ERRORS: "Errors beside others of their size",
    Part.PATHS: "What the paths write",
    Part.NORMS: "Norms of the weights",
    Part.SEQUENTIAL: "An NFM on the residual of a frozen SAE",
    Part.FACTORIAL: "2x2 experiment",
}
DRAWN = {Unit.CHANGE: "changes", Unit.SHARE: "shares"}
"""What figures show; the tables have the rest too."""
PUBLISHED = Group(
    name="published: OpenLLaMA-3B, not measured here", colour="#000000", symbol="star-open", size=13, offset=-0.13
)
HERE = Group(name="the same statistic here", colour=PALETTE[0], symbol="circle", offset=0.13)
CONTROLLED = Group(name="here, under a control", colour=PALETTE[4], symbol="diamond")
LABEL = 74
"""Characters of a control's label; the table has the whole text."""


def section(run: Run) -> Section | None:
    """The chapter; None without a reproduction."""
    return section_of(
        run.of(ReproduceResult),
        id="reproduced",
        title=TITLE,
        lead="What arXiv 2507.00269 reports, the same statistic on the SAE of this run, and that statistic under "
        "the control it lacks. The published values are from OpenLLaMA-3B and were not measured here.",
        blocks=lambda found, number: _blocks(found.result, number),
        findings=_said,
    )


def _blocks(result: ReproduceResult, number: int) -> Iterator[Block]:
    shown = [row for row in result.rows if row.published is not None]
    for name in dict.fromkeys(row.section for row in shown):
        own = [row for row in shown if row.section is name]
        yield Heading(text=SECTIONS[name])
        yield from reproduced_figures(own, number)
        yield Table(columns=COLUMNS, rows=_cells(own), caption=_caption(own), text_columns=(0, 1, 3, 5))
    yield Prose(lines=result.caveats(), listed=True)


def _cells(rows: Sequence[ReproducedRow]) -> list[tuple[str, ...]]:
    """A line for each control; what is the same in the line before is not said again."""
    lines: list[tuple[str, ...]] = []
    for before, row in zip([None, *rows], rows, strict=False):
        same = before is not None and (before.name, before.here) == (row.name, row.here)
        first = ("", "", "") if same else (row.name, row.published_text, row.here_text)
        lines.append((*first, row.control, row.controlled_text, row.verdict))
    return lines


def _caption(rows: Sequence[ReproducedRow]) -> str:
    told = "Published: the paper's. Here: the same statistic on this run's SAE. In brackets: 95 % intervals."
    missing = sum(row.verdict == NoVerdict.NOT_MEASURED for row in rows)
    return f"{told} {missing} were not measured." if missing else told


def _said(result: ReproduceResult) -> Iterator[str]:
    """Statistics whose control has a verdict over seeds; where none has, those of the reconstruction error."""
    judged = [row for row in result.rows if row.verdict not in tuple(NoVerdict)]
    for row in judged or [row for row in result.rows if row.section is Part.RECONSTRUCTION]:
        yield (
            f"{row.name}: published {row.published_text}; here {row.here_text}; {row.control}: {row.controlled_text} "
            f"({row.verdict})."
        )


def reproduced_figures(rows: Sequence[ReproducedRow], number: int) -> Iterator[Figure]:
    """Percentages of one section, relative changes apart from shares."""
    for unit in DRAWN:
        own = [row for row in rows if row.unit is unit and row.published is not None and row.published.ends]
        if own:
            yield _figure(own, number, unit)


def _figure(shown: Sequence[ReproducedRow], number: int, unit: Unit) -> Figure:
    lines, marks = _lines(shown)
    changes = unit is Unit.CHANGE
    axis = Axis(
        title=str(unit),
        tickformat="+.0%" if changes else ".0%",
        form=FORMS[unit],
        reference=0.0 if changes else None,
        from_zero=not changes,
    )
    return Figure(
        name=f"published-{number}-{shown[0].section.lower()}-{DRAWN[unit]}",
        title=f"{DRAWN[unit].capitalize()}: published, measured here, and under the control",
        plot=dot_plot(marks, (PUBLISHED, HERE, CONTROLLED), lines, axis, label_width=44, narrow_width=22),
        caption="In bold, what is measured: the paper's value (star; a line from end to end where it gives a "
        "range) and the same statistic on the SAE of this run. Below each, that statistic under the controls, in "
        "words. Where the circle agrees with the star and the diamonds lie elsewhere, the published value is "
        "reproduced and does not mean what it seems to. Lines: 95 % intervals over documents, where there are any; "
        "one SAE, so they say nothing about other seeds.",
        data=_data(shown),
    )


def _lines(shown: Sequence[ReproducedRow]) -> tuple[list[Row], list[Mark]]:
    """A bold row for each statistic, and one for each of its controls."""
    rows: list[Row] = []
    marks: list[Mark] = []
    for place, row in enumerate(shown):
        if row.name not in {line.key for line in rows}:
            rows.append(Row(key=row.name, label=row.name, heading=True))
            low, high = _ends(row)
            marks.append(
                Mark(
                    row=row.name,
                    group=PUBLISHED.name,
                    x=(low + high) / 2,
                    low=low if low < high else None,
                    high=high if low < high else None,
                    note=f"as published: {row.published_text}",
                )
            )
            marks += _mark(row.name, HERE.name, row.here, "")
        rows.append(Row(key=f"{place} {row.control}", label=textwrap.shorten(row.control, LABEL, placeholder=" ...")))
        marks += _mark(f"{place} {row.control}", CONTROLLED.name, row.controlled, f"{row.control}: {row.verdict}")
    return rows, marks


def _ends(row: ReproducedRow) -> tuple[float, float]:
    assert row.published is not None
    assert row.published.ends is not None, "what is drawn is a number"
    return row.published.ends


def _mark(row: str, group: str, value: Value, note: str) -> list[Mark]:
    """One mark, or none where there is no value."""
    if value is None:
        return []
    if isinstance(value, Estimate):
        return [Mark(row=row, group=group, x=value.estimate, low=value.low, high=value.high, note=note)]
    return [Mark(row=row, group=group, x=value, note=note)]


def _data(shown: Sequence[ReproducedRow]) -> pd.DataFrame:
    rows = [
        (
            str(row.section),
            row.name,
            *_ends(row),
            *_numbers(row.here),
            row.control,
            *_numbers(row.controlled),
            row.verdict,
        )
        for row in shown
    ]
    columns = ["section", "figure", "published low", "published high", "here", "here low", "here high"]
    return pd.DataFrame(
        rows, columns=[*columns, "control", "controlled", "controlled low", "controlled high", "verdict"]
    )


def _numbers(value: Value) -> tuple[float | None, float | None, float | None]:
    if isinstance(value, Estimate):
        return value.estimate, bounded(value.low), bounded(value.high)
    return value, None, None
