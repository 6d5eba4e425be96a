"""The published figures, each beside the same statistic here and under the control that it needs."""

from collections.abc import Iterator, Sequence

from sae_nfm.experiments.reproduce import NOT_MEASURED, SINGLE, ReproducedRow
from sae_nfm.experiments.reproduce.results import ReproduceResult, written
from sae_nfm.report.blocks import Block, Heading, Prose, Section, Table
from sae_nfm.report.reproduced_figures import reproduced_figures
from sae_nfm.report.run_folder import Run
from sae_nfm.report.several import section_of

TITLE = "The published figures, and their controls"
COMMAND = "sae-nfm reproduce --compare RUN/compare --output RUN/reproduce"
COLUMNS = ("figure", "published", "here", "control", "under the control", "verdict")
SECTIONS = {
    "reconstruction": "Reconstruction error",
    "KL": "Divergence of the model's predictions (KL)",
    "cross-entropy": "Cross-entropy",
    "errors": "Errors beside others of their size",
    "paths": "What the paths write",
    "norms": "Norms of the weights",
    "sequential": "An NFM on the residual of a frozen SAE",
    "2x2": "2x2 experiment",
}


def section(run: Run) -> Section | None:
    """The chapter; None without a reproduction."""
    return section_of(
        run.of(ReproduceResult),
        id="reproduced",
        title=TITLE,
        lead="What arXiv 2507.00269 reports, the same statistic on the SAE of this run, and that statistic under "
        "the control it lacks. The published figures are from OpenLLaMA-3B and were not measured here.",
        blocks=lambda found, number: _blocks(found.result, number),
        findings=_said,
    )


def _blocks(result: ReproduceResult, number: int) -> Iterator[Block]:
    shown = [row for row in result.rows if row.published != "-"]
    for name in dict.fromkeys(row.section for row in shown):
        own = [row for row in shown if row.section == name]
        yield Heading(text=SECTIONS[name])
        yield from reproduced_figures(own, number)
        yield Table(columns=COLUMNS, rows=_cells(own), caption=_caption(own), text_columns=(0, 1, 3, 5))
    yield Prose(lines=result.caveats(), listed=True)


def _cells(rows: Sequence[ReproducedRow]) -> list[tuple[str, ...]]:
    """A line for each control; what is the same in the line before is not said again."""
    lines: list[tuple[str, ...]] = []
    for before, row in zip([None, *rows], rows, strict=False):
        same = before is not None and (before.name, before.here) == (row.name, row.here)
        first = ("", "", "") if same else (row.name, row.published, written(row.here, row.form))
        lines.append((*first, row.control, written(row.controlled, row.form), row.verdict))
    return lines


def _caption(rows: Sequence[ReproducedRow]) -> str:
    told = "Published: the paper's. Here: the same statistic on this run's SAE. In brackets: 95 % intervals."
    missing = sum(row.verdict == NOT_MEASURED for row in rows)
    return f"{told} {missing} were not measured." if missing else told


def _said(result: ReproduceResult) -> Iterator[str]:
    """Figures whose control has a verdict over seeds; where none has, those of the reconstruction error."""
    judged = [row for row in result.rows if row.verdict not in (SINGLE, NOT_MEASURED)]
    for row in judged or [row for row in result.rows if row.section == "reconstruction"]:
        yield (
            f"{row.name}: published {row.published}; here {written(row.here, row.form)}; {row.control}: "
            f"{written(row.controlled, row.form)} ({row.verdict})."
        )
