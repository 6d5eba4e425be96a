"""What does a training step cost beside SAELens's TopK? The one section with timings: they differ from run to run."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from sae_nfm.profiling.results import TOPK, Scan, SpeedResult, SpeedRow
from sae_nfm.report.blocks import Block, Figure, Prose, Section, Table, dots_figure, section_of
from sae_nfm.report.plots import AXIS, Axis, Dot, bars, line, styled
from sae_nfm.report.run_folder import Run
from sae_nfm.stats import Estimate

TITLE = "Speed"
COMMANDS = ("sae-nfm speed --save RUN/speed/speed.json",)
STEP, PEAK = "training step", "peak memory"
RATIO_AXIS = Axis(title="times topk's (1: the same)", form=".2f", reference=1, from_zero=True)
AXES: dict[Scan, str] = {"d_sae": "features (d_sae)", "nfm_dim": "interaction dimensions"}
LEAD = (
    "What does a training step cost, in time and memory, beside SAELens's TopK SAE of the same width? Timings are of "
    "one machine and differ from run to run: read the ratios, not the seconds."
)
RATIOS = (
    "Medians of a training step and of the memory that the steps add, each over those of topk at the same size; below "
    "1 is cheaper. Bars: quartiles of the arm's own steps over topk's median; memory is measured once. Arms that do "
    "not fit or fail are in the table with the reason. Another machine, batch or width gives other ratios."
)
SCANNED = (
    "Median of a training step by size, both axes logarithmic; bars are quartiles. The grey line costs in proportion "
    "to the size: what runs flatter grows more slowly. On a machine with other load single points move."
)


def section(run: Run) -> Section | None:
    """All timings of a run; None without any, and no verdicts: the summary has no timings."""
    found = run.of(SpeedResult)
    return section_of(found, id="speed", title=TITLE, lead=LEAD, blocks=_blocks, findings=lambda _: ())


def findings(result: SpeedResult) -> list[str]:
    """The ratio of each arm's step to topk's, at every size."""
    scan: Scan | None = result.provenance["config"]["scan"]
    return [
        f"{row.arm}{f' at {getattr(row, scan):,} {scan}' if scan else ''}: a step takes {row.step_over_topk:.2f} of "
        "topk's."
        for row in result.rows
        if row.step_over_topk is not None and row.arm != TOPK
    ]


def _blocks(result: SpeedResult, number: int) -> list[Block]:
    scan: Scan | None = result.provenance["config"]["scan"]
    heading = Prose(lines=[f"{result.words().partition(chr(10))[0]}.", *findings(result)])
    if scan is None:
        dots = ratio_dots(result.rows)
        figure = dots_figure(f"ratios-{number}", "Cost of a step beside topk's", dots, RATIO_AXIS, RATIOS)
    else:
        figure = Figure(
            name=f"scan-{number}",
            title=f"Cost of a step by {AXES[scan]}",
            plot=scan_figure(result.rows, scan),
            caption=SCANNED,
            data=pd.DataFrame(
                [{scan: getattr(row, scan), "arm": row.arm, "step_seconds": row.step_seconds} for row in result.rows]
            ),
        )
    return [heading, figure, _table(result.rows)]


def ratio_dots(rows: Sequence[SpeedRow]) -> list[Dot]:
    """Step and memory of every arm over topk's."""
    median = next((row.step_seconds for row in rows if row.arm == TOPK), None)
    dots: list[Dot] = []
    for row in rows:
        if row.step_over_topk is not None and row.step_quartiles is not None and median:
            low, high = (seconds / median for seconds in row.step_quartiles)
            step = Estimate(
                estimate=row.step_over_topk, low=low, high=high, confidence=0.5, n=1, test="quartiles of the steps"
            )
            dots.append(Dot(heading=STEP, label=row.arm, series=STEP, figure=step))
    for row in rows:
        if row.peak_over_topk is not None:
            dots.append(Dot(heading=PEAK, label=row.arm, series=PEAK, figure=row.peak_over_topk))
    return dots


def scan_figure(rows: Sequence[SpeedRow], scan: Scan) -> go.Figure:
    """Seconds by size, a line an arm, and the line of a cost in proportion."""
    figure = go.Figure()
    timed = [row for row in rows if row.step_seconds is not None]
    for style, arm in enumerate(dict.fromkeys(row.arm for row in timed)):
        own = [row for row in timed if row.arm == arm]
        times = [(s := row.step_seconds or 0.0, *(row.step_quartiles or (s, s))) for row in own]
        figure.add_trace(
            line(
                [getattr(row, scan) for row in own],
                [seconds for seconds, *_ in times],
                arm,
                style,
                size=9,
                error_y=bars(times, thickness=1.4, width=4),
                hovertemplate=f"{arm}: %{{y:.2f}} s at %{{x:,}}<extra></extra>",
            )
        )
    sizes = sorted({getattr(row, scan) for row in timed})
    if len(sizes) > 1:
        start = min(row.step_seconds or 0.0 for row in timed if getattr(row, scan) == sizes[0])
        figure.add_scatter(
            x=[sizes[0], sizes[-1]],
            y=[start, start * sizes[-1] / sizes[0]],
            name="in proportion to the size",
            mode="lines",
            line={"color": AXIS, "width": 1.5, "dash": "dot"},
            hoverinfo="skip",
        )
    styled(figure, height=430)
    figure.update_xaxes(type="log", tickvals=sizes, ticktext=[f"{size:,}" for size in sizes], title=AXES[scan])
    decades = [step * 10.0**power for power in range(-4, 5) for step in (1, 2, 5)]
    figure.update_yaxes(type="log", title="seconds a step", tickvals=decades, ticktext=[f"{one:g}" for one in decades])
    return figure


def _table(rows: Sequence[SpeedRow]) -> Table:
    def shown(value: float | None, form: str = ".3f", unit: float = 1.0) -> str:
        return "" if value is None else f"{value / unit:{form}}"

    return Table(
        columns=("arm", "d_sae", "nfm_dim", "step ms", "/ topk", "/ floor", "peak MiB", "/ topk", "missing because"),
        rows=[
            (
                row.arm,
                f"{row.d_sae:,}",
                f"{row.nfm_dim}",
                shown(row.step_seconds, ",.1f", 1e-3),
                shown(row.step_over_topk),
                shown(row.step_over_floor, ".2f"),
                shown(row.peak_bytes, ",.0f", 2**20),
                shown(row.peak_over_topk),
                row.reason or "",
            )
            for row in rows
        ],
        caption="Medians. floor: what products and memory traffic of a joint_nfm step take at least at this machine's rates.",
        text_columns=(0, 8),
    )
