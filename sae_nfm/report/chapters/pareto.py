"""Error and KL against sparsity: whether an arm is better at every L0, or at one."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_nfm.comparison.results import ArmMean, CompareResult, RowKind, arm_means, lines_over_l0
from sae_nfm.report.blocks import Figure, Section, section_of
from sae_nfm.report.chapters.fidelity import PANELS
from sae_nfm.report.plots import DECADES, PALETTE, SYMBOLS, bars, line, styled
from sae_nfm.report.run_folder import Run

TITLE = "Sparsity: error and KL against L0"
COMMANDS = ("sae-nfm compare --k 16 32 64 --output RUN/compare",)


def section(run: Run) -> Section | None:
    """The chapter; None without a comparison that has SAEs of several L0s."""
    return section_of(
        [found for found in run.of(CompareResult) if lines_over_l0(arm_means(found.result.rows))],
        id="pareto",
        title=TITLE,
        lead="More active features explain more. An architecture is better where its line lies below the others' at "
        "the same L0.",
        blocks=lambda result, number: [pareto_figure(arm_means(result.rows), number + 1)],
        findings=lambda _: (),
    )


def pareto_figure(means: Sequence[ArmMean], number: int) -> Figure:
    """One panel for FVU, one for KL: the means of trained SAEs as lines, those interpolated between them hollow."""
    lines = lines_over_l0(means)
    between = [mean for mean in means if mean.row.kind is RowKind.INTERPOLATED]
    rows = [mean for line in lines.values() for mean in line] + list(between)
    n = max(len(mean.seeds) for mean in rows)
    return Figure(
        name=f"pareto-{number}",
        title="Lower and further left is better",
        plot=_plot(lines, between),
        caption=f"Held-out text; both axes logarithmic. A mark is the mean over {n} seed{'s' * (n > 1)} of SAEs "
        f"trained alike{', its line the 95 % interval over seeds (Student t)' if n > 1 else ': no intervals'}. "
        "Hollow: interpolated between the SAEs of an arm whose sparsity a coefficient sets, at the L0 of the "
        "others. Arms have different numbers of parameters: the verdicts compare at matched ones, and this figure "
        "tests nothing.",
        data=pd.DataFrame(
            [
                (m.row.family, m.row.arm, m.row.k, str(m.row.kind), m.metric, m.l0, m.mean, m.low, m.high, len(m.seeds))
                for m in rows
            ],
            columns=["family", "arm", "k", "kind", "measure", "L0", "mean", "low", "high", "seeds"],
        ),
    )


def _plot(lines: Mapping[str, Sequence[ArmMean]], between: Sequence[ArmMean]) -> go.Figure:
    figure: Any = make_subplots(rows=len(PANELS), cols=1, shared_xaxes=True, vertical_spacing=0.07)
    families = list(dict.fromkeys([*lines, *(mean.row.line for mean in between)]))
    for panel, (measure, title) in enumerate(PANELS.items(), 1):
        for place, family in enumerate(families):
            trained = [mean for mean in lines.get(family, ()) if mean.metric == measure]
            hollow = [mean for mean in between if (mean.row.line, mean.metric) == (family, measure)]
            if trained:
                figure.add_trace(_trace(trained, place, legend=panel == 1), row=panel, col=1)
            if hollow:
                trace = _trace(hollow, place, legend=panel == 1 and not trained, hollow=True)
                figure.add_trace(trace, row=panel, col=1)
        figure.update_yaxes(title=title.replace(", ", "<br>", 1), **DECADES, row=panel, col=1)
    figure.update_xaxes(**DECADES, tickangle=0)
    ks = sorted({mean.row.k for line in lines.values() for mean in line})
    if len(ks) > 1:
        figure.update_xaxes(tickvals=ks)
    figure.update_xaxes(title="L0, active features per token", row=len(PANELS), col=1)
    rows = -(-len(families) // 4)  # of the legend
    styled(figure, height=680 + 20 * rows, narrow={"height": 680 + 22 * len(families)})
    return figure


def _trace(means: Sequence[ArmMean], place: int, *, legend: bool, hollow: bool = False) -> go.Scatter:
    family = means[0].row.line
    trace = line(
        [mean.l0 for mean in means],
        [mean.mean for mean in means],
        family,
        place,
        size=9 + 3 * hollow,
        error_y=bars([(m.mean, m.low, m.high) for m in means], width=3)
        if any(m.low is not None for m in means)
        else None,
        legendgroup=family,
        showlegend=legend,
        hovertext=[f"{mean.row.arm}{', interpolated' * hollow}<br>L0 {mean.l0:.1f}: {mean.mean:.4f}" for mean in means],
        hoverinfo="text",
    )
    if hollow:
        trace.update(mode="markers", marker_symbol=f"{SYMBOLS[place % len(SYMBOLS)]}-open")
    return trace.update(marker_color=PALETTE[place % len(PALETTE)])
