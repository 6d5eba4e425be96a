"""Figures of learning dynamics: shares, norms and frequencies by tokens trained on, and where features went."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_nfm.experiments.dynamics import LEVELS
from sae_nfm.experiments.dynamics.results import CANONICAL, RAW, CheckpointRow, Movement
from sae_nfm.report.theme import DASHES, PALETTE, SYMBOLS, styled

SHARES = ("direct", "linear", "nonlinear", "square")
GAUGES = {RAW: "as trained", CANONICAL: "canonical gauge"}
PANELS = {"norm": "mean decoder norm", "canonical_norm": "the same, canonical gauge", "frequency": "median frequency"}


def shares_figure(rows: Sequence[CheckpointRow], gauges: Sequence[str]) -> go.Figure:
    """Mean share of each path over tokens, a panel for each gauge."""
    titles = [f"<b>{GAUGES[gauge]}</b>" for gauge in gauges]
    figure = make_subplots(rows=len(gauges), shared_xaxes=True, vertical_spacing=0.12, subplot_titles=titles)
    there = [path for path in SHARES if any(row.shares[gauge][path].estimate for row in rows for gauge in gauges)]
    for panel, gauge in enumerate(gauges, start=1):
        for style, path in enumerate(there):
            estimates = [row.shares[gauge][path] for row in rows]
            if panel > 1 and not any(one.estimate for one in estimates):
                continue
            values = [one.estimate for one in estimates]
            trace = _line([row.tokens for row in rows], values, path, style, legend=panel == 1)
            trace.error_y = {
                "type": "data",
                "symmetric": False,
                "array": [one.high - one.estimate for one in estimates],
                "arrayminus": [one.estimate - one.low for one in estimates],
                "thickness": 1.5,
                "width": 4,
            }
            trace.hovertemplate = f"{path}, {GAUGES[gauge]}: %{{y:.1%}} after %{{x:,}} tokens<extra></extra>"
            figure.add_trace(trace, row=panel, col=1)
    styled(figure, height=120 + 230 * len(gauges))
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03])
    return _over_tokens(figure, len(gauges))


def norms_figure(rows: Sequence[CheckpointRow]) -> go.Figure:
    """Norm and frequency over tokens, of the run and of the reference."""
    there = [name for name in PANELS if any(getattr(row, name) is not None for row in rows)]
    titles = [f"<b>{PANELS[name]}</b>" for name in there]
    figure = make_subplots(rows=len(there), shared_xaxes=True, vertical_spacing=0.1, subplot_titles=titles)
    for style, run in enumerate(dict.fromkeys(row.run for row in rows)):
        for panel, name in enumerate(there, start=1):
            own = [row for row in rows if row.run == run and getattr(row, name) is not None]
            if own:
                values = [getattr(row, name) for row in own]
                trace = _line([row.tokens for row in own], values, run, style, legend=panel == 1)
                trace.hovertemplate = f"{run}, {PANELS[name]}: %{{y:.3g}} after %{{x:,}} tokens<extra></extra>"
                figure.add_trace(trace, row=panel, col=1)
    styled(figure, height=110 + 175 * len(there))
    figure.update_yaxes(rangemode="tozero", nticks=5)
    return _over_tokens(figure, len(there))


def transitions_figure(overall: Movement, thirds: Mapping[str, str]) -> go.Figure:
    """Features by third at the first and at the last checkpoint, a table of numbers for each way of dividing."""
    panels = [
        (f"{words}, {GAUGES[gauge]}", (overall.transitions if kind == "fixed" else overall.reordered)[gauge].table)
        for kind, words in thirds.items()
        for gauge in overall.transitions
    ]
    figure = make_subplots(
        rows=len(panels), subplot_titles=[f"<b>{title}</b>" for title, _ in panels], vertical_spacing=0.36 / len(panels)
    )
    for row, (_, table) in enumerate(panels, start=1):
        figure.add_trace(
            go.Heatmap(
                z=table,
                x=LEVELS,
                y=LEVELS,
                colorscale=[[0, "white"], [1, PALETTE[5]]],
                showscale=False,
                texttemplate="%{z:,}",
                textfont={"color": "#1a1a1a"},
                hovertemplate="from %{y} to %{x}: %{z:,} features<extra></extra>",
                xgap=2,
                ygap=2,
            ),
            row=row,
            col=1,
        )
    styled(figure, height=60 + 185 * len(panels))
    figure.update_annotations(x=0, xanchor="left", font={"size": 12})
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", title={"text": "first", "font": {"size": 12}})
    figure.update_xaxes(showgrid=False, ticks="")
    figure.update_xaxes(title={"text": "third at the last checkpoint", "font": {"size": 12.5}}, row=len(panels), col=1)
    return figure


def _line(x: Sequence[int], y: Sequence[float], name: str, style: int, *, legend: bool) -> go.Scatter:
    return go.Scatter(
        x=list(x),
        y=list(y),
        name=name,
        legendgroup=name,
        showlegend=legend,
        mode="lines+markers",
        line={"color": PALETTE[style], "dash": DASHES[style], "width": 2},
        marker={"symbol": SYMBOLS[style], "size": 7},
    )


def _over_tokens(figure: go.Figure, rows: int) -> go.Figure:
    """The axis of tokens, and headings at its left; the legend stands above them."""
    figure.update_annotations(x=0, xanchor="left", font={"size": 12.5})
    figure.update_xaxes(title={"text": "tokens trained on", "font": {"size": 12.5}}, row=rows, col=1)
    figure.update_xaxes(rangemode="tozero", nticks=6)
    figure.update_layout(margin={"t": 70}, legend={"y": 1.0, "yref": "container", "yanchor": "top"})
    return figure
