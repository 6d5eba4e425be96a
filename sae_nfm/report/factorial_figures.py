"""Figures of a 2x2 experiment: cell means with intervals, and the contrast of every arm."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_nfm.experiments.factorial import ArmCells
from sae_nfm.experiments.factorial.results import ArmResult
from sae_nfm.report.dot_rows import Dot, ends
from sae_nfm.report.theme import DASHES, PALETTE, SYMBOLS, styled, wrapped

COLUMNS, NARROW_COLUMNS = 4, 2
PANEL = 170
"""Height of a panel of cell means, in pixels."""
Levels = tuple[tuple[str, str], tuple[str, str]]
"""Levels of the first and of the second factor."""
KINDS = {"feature": "features", "pair": "pairs", "secondary": "secondary features"}
"""Kinds of units, in words."""


def cells_figure(found: Sequence[ArmCells], levels: Levels) -> go.Figure:
    """A panel an arm: the first factor along x, a line for each level of the second."""
    rows = -(-len(found) // COLUMNS)
    figure = make_subplots(rows=rows, cols=COLUMNS)
    for number, one in enumerate(found):
        for line in range(2):
            figure.add_trace(
                _line(one, levels, line, legend=number == 0), row=number // COLUMNS + 1, col=number % COLUMNS + 1
            )
    styled(figure, height=60 + PANEL * rows)
    wide, narrow = (_grid(found, columns) for columns in (COLUMNS, NARROW_COLUMNS))
    figure.update_layout(wide)
    figure.update_xaxes(range=[-0.3, 1.3], showgrid=False, title_standoff=2)
    figure.update_yaxes(nticks=4, zerolinewidth=1.5, tickfont={"size": 10}, exponentformat="e")
    narrow["height"] = 80 + PANEL * -(-len(found) // NARROW_COLUMNS)
    figure.update_layout(meta={"narrow": narrow})
    return figure


def _line(one: ArmCells, levels: Levels, second: int, *, legend: bool) -> go.Scatter:
    cells = [one.cells[2 * first + second] for first in range(2)]
    drawn = [ends(cell) for cell in cells]
    colour = PALETTE[second]
    return go.Scatter(
        x=list(levels[0]),
        y=[mean for mean, *_ in drawn],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [0 if high is None else high - (mean or 0) for mean, _, high in drawn],
            "arrayminus": [0 if low is None else (mean or 0) - low for mean, low, _ in drawn],
            "thickness": 1.4,
            "width": 3,
        },
        mode="lines+markers",
        line={"color": colour, "dash": DASHES[second], "width": 2},
        marker={"size": 8, "symbol": SYMBOLS[second]},
        name=levels[1][second],
        legendgroup=levels[1][second],
        showlegend=legend,
        hovertemplate=f"{one.arm.name}<br>%{{x}}, {levels[1][second]}: %{{y:.3g}} nats<extra></extra>",
    )


def _grid(found: Sequence[ArmCells], columns: int) -> dict[str, Any]:
    """Where panels and their headings are, so many in a row."""
    rows, gap = -(-len(found) // columns), 0.09 if columns == COLUMNS else 0.2
    width, height = (1 - gap * (columns - 1)) / columns, 1 / rows
    layout: dict[str, Any] = {"annotations": []}
    for number, one in enumerate(found):
        left, top = (number % columns) * (width + gap), 1 - (number // columns) * height
        suffix = "" if number == 0 else str(number + 1)
        layout[f"xaxis{suffix}"] = {"domain": [left, left + width]}
        layout[f"yaxis{suffix}"] = {"domain": [top - 0.84 * height, top - 0.2 * height]}
        layout["annotations"].append(
            {
                "text": _heading(one.arm),
                "x": left + width / 2,
                "y": top - 0.18 * height,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "center",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 10.5},
            }
        )
    return layout


def _heading(arm: ArmResult) -> str:
    return f"<b>{wrapped(arm.role, 26)}</b><br>{_numbers(arm)} at {arm.clamp}"


def contrast_dots(found: Sequence[ArmCells], kind: str) -> list[Dot]:
    """Under each role its clamps, of the arms whose units are of one kind: pairs do far less than features."""
    return [
        Dot(
            heading=f"{one.arm.role.removesuffix(' (main effect)')}: {_numbers(one.arm)}",
            label=f"{one.arm.clamp}{_holm(one)}",
            series="control" if one.arm.control else "selected",
            figure=one.contrast,
            note=f"p = {one.contrast.p_value:.2g}, not adjusted",
        )
        for role in dict.fromkeys(one.arm.role for one in found)
        for one in found
        if one.arm.role == role and one.arm.units[0].kind == kind
    ]


def _holm(one: ArmCells) -> str:
    p = one.arm.tests.items_p_adjusted
    return "" if p is None else f", Holm p {'< 0.001' if p < 0.001 else f'= {p:.2f}'}"


def _numbers(arm: ArmResult) -> str:
    return " and ".join(" x ".join(map(str, unit.index)) for unit in arm.units)
