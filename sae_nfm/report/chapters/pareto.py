"""Error and KL against sparsity: whether an arm is better at every L0, or at one."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_nfm.comparison.results import ArmMean, CompareResult, RowKind, arm_means, lines_over_l0
from sae_nfm.report.blocks import Block, Figure, Heading, Section
from sae_nfm.report.chapters.fidelity import PANELS
from sae_nfm.report.plots.theme import DASHES, PALETTE, SYMBOLS, styled
from sae_nfm.report.run_folder import Run

TITLE = "Sparsity: error and KL against L0"
COMMANDS = ("sae-nfm compare --k 16 32 64 --output RUN/compare",)


def section(run: Run) -> Section | None:
    """The chapter; None without a comparison that has SAEs of several L0s."""
    compared = [(found.label, arm_means(found.result.rows)) for found in run.of(CompareResult)]
    several = [(label, means) for label, means in compared if lines_over_l0(means)]
    blocks: list[Block] = []
    for number, (label, means) in enumerate(several, 1):
        if len(several) > 1:
            blocks.append(Heading(text=label))
        between = [mean for mean in means if mean.row.kind is RowKind.INTERPOLATED]
        blocks.append(pareto_figure(lines_over_l0(means), between, number))
    if not blocks:
        return None
    return Section(
        id="pareto",
        title=TITLE,
        lead="More active features explain more. An architecture is better where its line lies below the others' at "
        "the same L0.",
        blocks=blocks,
    )


def pareto_figure(lines: Mapping[str, Sequence[ArmMean]], between: Sequence[ArmMean], number: int) -> Figure:
    """One panel for FVU, one for KL."""
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
    families = list(dict.fromkeys([*lines, *(mean.row.family for mean in between)]))
    for panel, (measure, title) in enumerate(PANELS.items(), 1):
        for place, family in enumerate(families):
            trained = [mean for mean in lines.get(family, ()) if mean.metric == measure]
            hollow = [mean for mean in between if (mean.row.family, mean.metric) == (family, measure)]
            if trained:
                figure.add_trace(_trace(trained, place, legend=panel == 1), row=panel, col=1)
            if hollow:
                figure.add_trace(
                    _trace(hollow, place, legend=panel == 1 and not trained, hollow=True), row=panel, col=1
                )
        figure.update_yaxes(
            title=title.replace(", ", "<br>", 1), type="log", dtick="D2", tickformat="~g", row=panel, col=1
        )
    figure.update_xaxes(type="log", dtick="D2", tickformat="~g", tickangle=0)
    ks = sorted({mean.row.k for line in lines.values() for mean in line})
    if len(ks) > 1:
        figure.update_xaxes(tickvals=ks)
    figure.update_xaxes(title="L0, active features per token", row=len(PANELS), col=1)
    rows = -(-len(families) // 4)  # of the legend
    styled(figure, height=680 + 20 * rows, narrow={"height": 680 + 22 * len(families)})
    return figure


def _trace(means: Sequence[ArmMean], place: int, *, legend: bool, hollow: bool = False) -> go.Scatter:
    family, several = means[0].row.family, any(mean.low is not None for mean in means)
    symbol = SYMBOLS[place % len(SYMBOLS)]
    ends = [
        (m.mean - m.low, m.high - m.mean) if m.low is not None and m.high is not None else (None, None) for m in means
    ]
    return go.Scatter(
        x=[mean.l0 for mean in means],
        y=[mean.mean for mean in means],
        error_y={
            "type": "data",
            "symmetric": False,
            "arrayminus": [a for a, _ in ends],
            "array": [b for _, b in ends],
            "width": 3,
        }
        if several
        else None,
        mode="markers" if hollow else "lines+markers",
        line={"color": PALETTE[place % len(PALETTE)], "dash": DASHES[place % len(DASHES)], "width": 2},
        marker={
            "symbol": f"{symbol}-open" if hollow else symbol,
            "size": 9 + 3 * hollow,
            "color": PALETTE[place % len(PALETTE)],
        },
        name=family,
        legendgroup=family,
        showlegend=legend,
        hovertext=[f"{mean.row.arm}{', interpolated' * hollow}<br>L0 {mean.l0:.1f}: {mean.mean:.4f}" for mean in means],
        hoverinfo="text",
    )
