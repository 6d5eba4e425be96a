"""How do features move while an SAE is trained? Shares by gauge, norms and frequency over tokens, passages between thirds."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_nfm.experiments.dynamics.results import (
    CANONICAL,
    LEVELS,
    RAW,
    CheckpointRow,
    DynamicsResult,
    Movement,
    Transitions,
    counted,
)
from sae_nfm.report.blocks import Block, Figure, Prose, Section, Table, section_of
from sae_nfm.report.plots import PALETTE, bars, ends, line, styled
from sae_nfm.report.run_folder import Run

TITLE = "Learning dynamics"
COMMANDS = ("sae-nfm dynamics CHECKPOINTS --output RUN/dynamics",)
THIRDS = {"fixed": "Fixed thirds", "own": "Own tertiles"}
LEAD = (
    "Do features begin in the integration paths and move to the direct one, or the other way? As trained the answer "
    "is set by the gauge, so it stands beside the canonical one, and passages of single features beside those of "
    "shuffled identities."
)
SHARES_CAPTION = (
    "Mean over features of each path's part in what a feature writes (root mean square on held-out tokens), by tokens "
    "trained on. As trained, the division between direct and linear is a gauge, which training sets from "
    "initialisation and learning rate; in the canonical gauge all that is linear is direct. Bars: 95 % intervals over "
    "documents, often smaller than the marks. One run."
)
NORMS_CAPTION = (
    "Mean decoder norm of the active features and median share of tokens on which a feature is active, beside the "
    "reference where there is one. Norms are in the unit of raw activations. One run and one seed each, no intervals."
)
TRANSITIONS_CAPTION = (
    "Features by third of their integration share at the first checkpoint (rows) and at the last (columns). With "
    "fixed thirds a shift of all features shows; with each checkpoint's own tertiles only changes of order do. What "
    "chance gives stands in the table below."
)
TABLE_CAPTION = (
    "Features that pass between thirds of the integration share; in brackets mean and 95 % when identities of "
    "features are shuffled. A number inside the brackets is no sign that single features move."
)
SHARES = ("direct", "linear", "nonlinear", "square")
MEASURED = ("run", "tokens", "norm", "canonical_norm", "frequency", "active")
GAUGES = {RAW: "as trained", CANONICAL: "canonical gauge"}
PANELS = {"norm": "mean decoder norm", "canonical_norm": "the same, canonical gauge", "frequency": "median frequency"}


def section(run: Run) -> Section | None:
    """All results on learning dynamics of a run; None without any."""
    found = run.of(DynamicsResult)
    return section_of(found, id="dynamics", title=TITLE, lead=LEAD, blocks=_blocks, findings=DynamicsResult.findings)


def _blocks(result: DynamicsResult, number: int) -> list[Block]:
    return [
        Prose(lines=result.findings(), listed=True),
        Figure(
            name=f"shares-{number}",
            title="Where the features' work is done, by gauge",
            plot=shares_figure([row for row in result.checkpoints if row.shares], list(result.edges)),
            caption=SHARES_CAPTION,
            data=pd.DataFrame(_share_rows(result)),
        ),
        Figure(
            name=f"norms-{number}",
            title="Norm and frequency while training",
            plot=norms_figure(result.checkpoints),
            caption=NORMS_CAPTION,
            data=pd.DataFrame([{name: getattr(row, name) for name in MEASURED} for row in result.checkpoints]),
        ),
        Figure(
            name=f"transitions-{number}",
            title="Where features went, first checkpoint to last",
            plot=transitions_figure(result.overall[0], THIRDS),
            caption=TRANSITIONS_CAPTION,
            data=pd.DataFrame(_transition_rows(result.overall[0])),
        ),
        _passages(result),
    ]


def _share_rows(result: DynamicsResult) -> list[dict[str, Any]]:
    return [
        {"gauge": gauge, "tokens": row.tokens, "path": path, "share": one.estimate, "low": one.low, "high": one.high}
        for row in result.checkpoints
        for gauge, shares in row.shares.items()
        for path, one in shares.items()
    ]


def _transition_rows(move: Movement) -> list[dict[str, Any]]:
    return [
        {"thirds": thirds, "gauge": gauge, "from": LEVELS[i], "to": LEVELS[j], "features": found.table[i][j]}
        for thirds in THIRDS
        for gauge, found in _transitions(move, thirds).items()
        for i, j in itertools.product(range(len(LEVELS)), repeat=2)
    ]


def _transitions(move: Movement, thirds: str) -> Mapping[str, Transitions]:
    return move.transitions if thirds == "fixed" else move.reordered


def _passages(result: DynamicsResult) -> Table:
    whole = {(move.before, move.after) for move in result.overall}
    rows: list[tuple[str, ...]] = []
    strong: list[bool] = []
    for thirds, gauge in itertools.product(THIRDS, result.edges):
        for move in (*result.steps, *result.overall):
            if move.transitions:
                found = _transitions(move, thirds)[gauge]
                passed = map(counted, (found.to_identity, found.to_integration, found.stayed))
                rows.append((f"{THIRDS[thirds]}, {GAUGES[gauge]}", f"{move.before:,}", f"{move.after:,}", *passed))
                strong.append((move.before, move.after) in whole)
    passages = ("integration to identity", "identity to integration", "stayed")
    columns = ("thirds and gauge", "from tokens", "to tokens", *passages)
    return Table(columns=columns, rows=rows, caption=TABLE_CAPTION, strong=strong)


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
            trace = line(
                [row.tokens for row in rows],
                [one.estimate for one in estimates],
                path,
                style,
                legendgroup=path,
                showlegend=panel == 1,
                error_y=bars(map(ends, estimates), thickness=1.5, width=4),
                hovertemplate=f"{path}, {GAUGES[gauge]}: %{{y:.1%}} after %{{x:,}} tokens<extra></extra>",
            )
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
                trace = line(
                    [row.tokens for row in own],
                    [getattr(row, name) for row in own],
                    run,
                    style,
                    legendgroup=run,
                    showlegend=panel == 1,
                    hovertemplate=f"{run}, {PANELS[name]}: %{{y:.3g}} after %{{x:,}} tokens<extra></extra>",
                )
                figure.add_trace(trace, row=panel, col=1)
    styled(figure, height=110 + 175 * len(there))
    figure.update_yaxes(rangemode="tozero", nticks=5)
    return _over_tokens(figure, len(there))


def transitions_figure(overall: Movement, thirds: Mapping[str, str]) -> go.Figure:
    """Features by third at the first and at the last checkpoint, a table of numbers for each way of dividing."""
    panels = [
        (f"{words}, {GAUGES[gauge]}", _transitions(overall, kind)[gauge].table)
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


def _over_tokens(figure: go.Figure, rows: int) -> go.Figure:
    """The axis of tokens, and headings at its left; the legend stands above them."""
    figure.update_annotations(x=0, xanchor="left", font={"size": 12.5})
    figure.update_xaxes(title={"text": "tokens trained on", "font": {"size": 12.5}}, row=rows, col=1)
    figure.update_xaxes(rangemode="tozero", nticks=6)
    figure.update_layout(margin={"t": 70}, legend={"y": 1.0, "yref": "container", "yanchor": "top"})
    return figure
