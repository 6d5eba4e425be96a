"""Dot plots: a row for each thing that is compared, a mark for each value, a line for its interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_nfm.report.plots.theme import styled, wrapped

LINE, ROW_MARGIN, LEGEND, BELOW, BETWEEN = 16, 12, 64, 64, 76
"""Pixels: a line of a label, the space around it, what stands above and below the rows, and between two panels."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row, or a heading among the rows."""

    key: str
    """What marks refer to; unique."""
    label: str
    heading: bool = False
    """Whether it is set in bold."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Marks of one kind: an entry of the legend."""

    name: str
    """Its words in the legend."""
    colour: str
    symbol: str
    """Its symbol, so that it is told apart without the colour too."""
    size: int = 11
    offset: float = 0.0
    """How far below the middle of the row its marks stand, in rows."""
    opacity: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value."""

    row: str
    group: str
    x: float
    low: float | None = None
    """Lower end of its interval; None where there is none."""
    high: float | None = None
    panel: str = ""
    note: str = ""
    """More words for who points at it."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What the values are."""

    title: str
    """Quantity and unit."""
    tickformat: str = ""
    """How ticks are written."""
    form: str = ".4f"
    """How values are written for who points at them."""
    log: bool = False
    reference: float | None = None
    """Where a line stands that values are compared with."""
    from_zero: bool = False


def dot_plot(
    marks: Sequence[Mark],
    groups: Sequence[Group],
    rows: Sequence[Row],
    axis: Axis,
    *,
    panels: Sequence[str] = ("",),
    label_width: int = 40,
    narrow_width: int = 22,
) -> go.Figure:
    """Rows from top to bottom, in every panel the same; panels one below the other, each with its own scale.

    Args:
        marks: the values; drawn in the order of the groups.
        groups: what they are of; those without a mark are left out of the legend.
        rows: the rows.
        axis: what the values are.
        panels: titles of the panels.
        label_width: characters of a line of a row's label.
        narrow_width: the same on a narrow screen.
    """
    figure: Any = make_subplots(rows=len(panels), cols=1)
    for number, panel in enumerate(panels, 1):
        for group in groups:
            own = [mark for mark in marks if (mark.panel, mark.group) == (panel, group.name)]
            # a trace with and one without intervals: plotly draws a missing one as an interval of no width
            for some in ([m for m in own if _bounds(m)], [m for m in own if not _bounds(m)]):
                if some:
                    figure.add_trace(_trace(some, group, rows, axis), row=number, col=1)
    _one_entry_each(figure)
    _axes(figure, rows, axis, label_width)
    height = _plot_height(rows, len(panels), label_width)
    domains = _domains(height, len(panels))
    styled(figure, height=height + LEGEND + BELOW, narrow=_narrow(rows, panels, narrow_width, len(groups)))
    for number, domain in enumerate(domains, 1):
        figure.update_yaxes(domain=domain, row=number, col=1)
    figure.update_layout(
        margin={"t": LEGEND, "b": 16},
        legend={"y": 1 + 30 / height},
        annotations=_titles(panels, domains, side="left"),
        hovermode="closest",
        showlegend=True,
    )
    figure.update_yaxes(ticks="", showgrid=True)
    return figure


def drawn(marks: Sequence[Mark], rows: Sequence[Row], *, panel: str = "measure", group: str = "kind") -> pd.DataFrame:
    """What a dot plot draws: panel, row, group, value and the ends of its interval, a row for each mark."""
    labels = {row.key: row.label for row in rows}
    return pd.DataFrame(
        [(m.panel, labels[m.row], m.group, m.x, bounded(m.low), bounded(m.high)) for m in marks],
        columns=[panel, "row", group, "value", "low", "high"],
    ).drop(columns=[] if any(mark.panel for mark in marks) else [panel])


def bounded(end: float | None) -> float | None:
    """The end of an interval; None where there is none, or no bound."""
    return end if end is not None and isfinite(end) else None


def _trace(marks: Sequence[Mark], group: Group, rows: Sequence[Row], axis: Axis) -> go.Scatter:
    places = {row.key: place for place, row in enumerate(rows)}
    labels = {row.key: row.label for row in rows}
    bars = [bounds for mark in marks if (bounds := _bounds(mark))]
    ends = {"arrayminus": [below for below, _ in bars], "array": [above for _, above in bars]}
    error = {"type": "data", "symmetric": False, **ends, "thickness": 1.6, "width": 4}
    return go.Scatter(
        x=[mark.x for mark in marks],
        y=[places[mark.row] + group.offset for mark in marks],
        error_x=error if bars else None,
        mode="markers",
        marker={
            "size": group.size,
            "color": group.colour,
            "symbol": group.symbol,
            "opacity": group.opacity,
            "line": {"width": 1.5},
        },
        hovertext=[_words(mark, labels[mark.row], axis.form) for mark in marks],
        hoverinfo="text",
        name=group.name,
        legendgroup=group.name,
    )


def _one_entry_each(figure: Any) -> None:
    """A group has one entry in the legend, whatever the number of its traces."""
    names = [trace.name for trace in figure.data]
    for place, trace in enumerate(figure.data):
        trace.showlegend = trace.name not in names[:place]


def _bounds(mark: Mark) -> tuple[float, float] | None:
    """Lengths of the interval's two sides; None where there is none, or no bound."""
    low, high = bounded(mark.low), bounded(mark.high)
    return None if low is None or high is None else (mark.x - low, high - mark.x)


def _words(mark: Mark, label: str, form: str) -> str:
    lines = [f"<b>{wrapped(label, 60)}</b>", f"{mark.group}: {mark.x:{form}}"]
    if mark.low is not None and mark.high is not None:
        bounded = isfinite(mark.low) and isfinite(mark.high)
        lines[1] += f" [{mark.low:{form}}, {mark.high:{form}}]" if bounded else " (an interval without bounds)"
    return "<br>".join([*lines, *([wrapped(mark.note, 60)] if mark.note else [])])


def _axes(figure: Any, rows: Sequence[Row], axis: Axis, label_width: int) -> None:
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=_labels(rows, label_width),
        range=[len(rows) - 0.4, -0.6],
        zeroline=False,
    )
    figure.update_xaxes(
        title=axis.title,
        tickformat=axis.tickformat,
        type="log" if axis.log else "linear",
        rangemode="tozero" if axis.from_zero else "normal",
        zeroline=axis.reference == 0,
        zerolinewidth=2,
        nticks=6,
        tickangle=0,
    )
    if axis.log:
        figure.update_xaxes(dtick="D2", tickformat=axis.tickformat or "~g")  # 1, 2, 5, 10: fewer decades than ticks
    if axis.reference:
        figure.add_vline(x=axis.reference, line={"width": 2, "color": "#8a8a8a"}, layer="below")


def _labels(rows: Sequence[Row], width: int) -> list[str]:
    return [f"<b>{wrapped(row.label, width)}</b>" if row.heading else wrapped(row.label, width) for row in rows]


def _plot_height(rows: Sequence[Row], panels: int, width: int) -> int:
    lines = max((label.count("<br>") + 1 for label in _labels(rows, width)), default=1)
    return panels * len(rows) * (LINE * lines + ROW_MARGIN) + (panels - 1) * BETWEEN


def _domains(height: int, panels: int) -> list[tuple[float, float]]:
    """Where the panels stand, from the top, as fractions of the height of all."""
    share = (height - (panels - 1) * BETWEEN) / panels / height
    tops = [1 - number * (share + BETWEEN / height) for number in range(panels)]
    return [(max(0.0, top - share), top) for top in tops]


def _narrow(rows: Sequence[Row], panels: Sequence[str], width: int, entries: int) -> dict[str, Any]:
    """The layout on a narrow screen, where each entry of the legend has a line."""
    height = _plot_height(rows, len(panels), width)
    domains = _domains(height, len(panels))
    layout: dict[str, Any] = {
        "height": height + LEGEND + BELOW + LINE * entries,
        "annotations": _titles(panels, domains, side="right"),
    }
    for number, domain in enumerate(domains, 1):
        layout[_name("yaxis", number)] = {"ticktext": _labels(rows, width), "domain": domain}
        layout[_name("xaxis", number)] = {"nticks": 4}
    return layout


def _titles(
    panels: Sequence[str], domains: Sequence[tuple[float, float]], *, side: Literal["left", "right"]
) -> list[dict[str, Any]]:
    """Titles over the panels; at the right side, long ones reach over the labels of a narrow screen."""
    same = {"x": float(side == "right"), "xanchor": side, "xref": "paper", "yref": "paper", "yanchor": "bottom"}
    return [
        {"text": f"<b>{panel}</b>", "y": top, "showarrow": False, **same}
        for panel, (_, top) in zip(panels, domains, strict=True)
        if panel
    ]


def _name(axis: str, number: int) -> str:
    return axis if number == 1 else f"{axis}{number}"
