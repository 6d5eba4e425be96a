"""How figures look, and dot plots: a row for each thing that is compared, a mark for each value, a line for its interval."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_nfm.analysis.results import Figure as Value
from sae_nfm.stats import Estimate

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999933", "#000000")
"""Okabe & Ito's colours, distinguishable with every common colour vision; their yellow is darker here, for white paper."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash")
"""Line styles beside the colours, for print in grey."""
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "triangle-down", "star")
"""Markers beside the colours."""
FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "#1a1a1a"}
GRID, AXIS = "#e6e6e6", "#8a8a8a"
DECADES = {"type": "log", "dtick": "D2", "tickformat": "~g"}
"""A logarithmic axis with ticks at 1, 2, 5, 10: fewer decades than ticks."""
LINE, ROW_MARGIN, LEGEND, BELOW, BETWEEN = 16, 12, 64, 64, 76
"""Pixels: a line of a label, the space around it, what stands above and below the rows, and between two panels."""
WIDE, NARROW = 60, 26
"""Characters of a label of `dot_rows` in a line, on a wide and on a narrow screen."""


def styled(figure: go.Figure, *, height: int, narrow: dict[str, Any] | None = None) -> go.Figure:
    """Give a figure, in place, the common style and this height in CSS pixels.

    `narrow` has layout settings that replace others on screens below 600 px, such as {"height": 700}.
    """
    figure.update_layout(
        template="none",
        height=height,
        font=FONT,
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 8, "r": 16, "t": 36, "b": 8},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "xanchor": "left", "font": {"size": 12}},
        hoverlabel={"font": {"family": FONT["family"]}},
        meta={"narrow": narrow or {}},
    )
    axis: dict[str, Any] = {
        "automargin": True,
        "gridcolor": GRID,
        "linecolor": AXIS,
        "zerolinecolor": AXIS,
        "ticks": "outside",
    }
    figure.update_xaxes(**axis, title_standoff=8, title_font_size=12.5)
    figure.update_yaxes(**axis, title_standoff=8, title_font_size=12.5)
    return figure


def wrapped(text: str, width: int = 24) -> str:
    """A label over several lines."""
    return "<br>".join(textwrap.wrap(text, width))


def line(x: Iterable[Any], y: Iterable[Any], name: str, style: int, *, size: int = 7, **more: Any) -> go.Scatter:
    """A line with markers; its style is the place of its colour, dash and symbol."""
    return go.Scatter(
        x=list(x),
        y=list(y),
        name=name,
        mode="lines+markers",
        line={"color": PALETTE[style % len(PALETTE)], "dash": DASHES[style % len(DASHES)], "width": 2},
        marker={"symbol": SYMBOLS[style % len(SYMBOLS)], "size": size},
        **more,
    )


def bars(values: Iterable[tuple[float | None, float | None, float | None]], **style: Any) -> dict[str, Any]:
    """Error bars of values with the ends of their intervals (`ends`); None where there is no end."""
    sides = [
        (None if low is None else (value or 0) - low, None if high is None else high - (value or 0))
        for value, low, high in values
    ]
    below, above = [below for below, _ in sides], [above for _, above in sides]
    return {"type": "data", "symmetric": False, "arrayminus": below, "array": above, **style}


def bounded(end: float | None) -> float | None:
    """The end of an interval; None where there is none, or no bound."""
    return end if end is not None and isfinite(end) else None


def ends(value: Value) -> tuple[float | None, float | None, float | None]:
    """A value and the ends of its interval; None for what there is not, or has no bound."""
    if isinstance(value, Estimate):
        return value.estimate, bounded(value.low), bounded(value.high)
    return value, None, None


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
    colour: str
    symbol: str
    """So that it is told apart without the colour too."""
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
    form: str = ".4f"
    """How values are written for who points at them."""
    log: bool = False
    reference: float | None = None
    """Where a line stands that values are compared with."""
    from_zero: bool = False


def mark(row: str, group: str, value: Estimate | float, *, panel: str = "", note: str = "") -> Mark:
    """An estimate with its interval, or a number without one, as a mark."""
    if isinstance(value, Estimate):
        return Mark(row=row, group=group, x=value.estimate, low=value.low, high=value.high, panel=panel, note=note)
    return Mark(row=row, group=group, x=value, panel=panel, note=note)


def plain_rows(labels: Iterable[str]) -> list[Row]:
    """A row for each label, once; the label is its key."""
    return [Row(key=label, label=label) for label in dict.fromkeys(labels)]


def headed(parts: Iterable[tuple[str, Sequence[Row]]]) -> list[Row]:
    """Rows under their headings; a heading without rows is left out, an empty one not drawn."""
    found: list[Row] = []
    for heading, rows in parts:
        found += [Row(key=heading, label=heading, heading=True)] if heading and rows else []
        found += rows
    return found


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

    Marks are drawn in the order of the groups; a group without a mark is left out of the legend. A line of a label has
    `label_width` characters, on a narrow screen `narrow_width`.
    """
    figure: Any = make_subplots(rows=len(panels), cols=1)
    named = set[str]()
    for number, panel in enumerate(panels, 1):
        for group in groups:
            own = [mark for mark in marks if (mark.panel, mark.group) == (panel, group.name)]
            # a trace with and one without intervals: plotly draws a missing one as an interval of no width
            for some in ([m for m in own if _has_bounds(m)], [m for m in own if not _has_bounds(m)]):
                if some:
                    figure.add_trace(_trace(some, group, rows, axis), row=number, col=1)
                    figure.data[-1].showlegend = group.name not in named
                    named.add(group.name)
    _axes(figure, rows, axis)
    height, wide = _layout(rows, panels, label_width)
    low, narrow = _layout(rows, panels, narrow_width, right=True)
    narrow |= {_name("xaxis", number): {"nticks": 4} for number in range(1, len(panels) + 1)}
    # on a narrow screen each entry of the legend has a line
    narrow["height"] = low + LEGEND + BELOW + LINE * len(groups)
    styled(figure, height=height + LEGEND + BELOW, narrow=narrow)
    figure.update_layout(
        wide, margin={"t": LEGEND, "b": 16}, legend={"y": 1 + 30 / height}, hovermode="closest", showlegend=True
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


def _has_bounds(mark: Mark) -> bool:
    return bounded(mark.low) is not None and bounded(mark.high) is not None


def _trace(marks: Sequence[Mark], group: Group, rows: Sequence[Row], axis: Axis) -> go.Scatter:
    places = {row.key: place for place, row in enumerate(rows)}
    return go.Scatter(
        x=[mark.x for mark in marks],
        y=[places[mark.row] + group.offset for mark in marks],
        error_x=bars([(m.x, m.low, m.high) for m in marks], thickness=1.6, width=4) if _has_bounds(marks[0]) else None,
        mode="markers",
        marker={
            "size": group.size,
            "color": group.colour,
            "symbol": group.symbol,
            "opacity": group.opacity,
            "line": {"width": 1.5},
        },
        hovertext=[_words(mark, rows[places[mark.row]].label, axis.form) for mark in marks],
        hoverinfo="text",
        name=group.name,
        legendgroup=group.name,
    )


def _words(mark: Mark, label: str, form: str) -> str:
    lines = [f"<b>{wrapped(label, 60)}</b>", f"{mark.group}: {mark.x:{form}}"]
    if mark.low is not None and mark.high is not None:
        interval = f" [{mark.low:{form}}, {mark.high:{form}}]"
        lines[1] += interval if _has_bounds(mark) else " (an interval without bounds)"
    return "<br>".join([*lines, *([wrapped(mark.note, 60)] if mark.note else [])])


def _axes(figure: Any, rows: Sequence[Row], axis: Axis) -> None:
    figure.update_yaxes(tickvals=list(range(len(rows))), range=[len(rows) - 0.4, -0.6], zeroline=False)
    figure.update_xaxes(
        title=axis.title,
        tickformat=axis.tickformat,
        type="linear",
        rangemode="tozero" if axis.from_zero else "normal",
        zeroline=axis.reference == 0,
        zerolinewidth=2,
        nticks=6,
        tickangle=0,
    )
    if axis.log:
        figure.update_xaxes(DECADES | ({"tickformat": axis.tickformat} if axis.tickformat else {}))
    if axis.reference:
        figure.add_vline(x=axis.reference, line={"width": 2, "color": AXIS}, layer="below")


def _layout(
    rows: Sequence[Row], panels: Sequence[str], width: int, *, right: bool = False
) -> tuple[int, dict[str, Any]]:
    """Height of the panels, and where they stand with their titles and labels of this width.

    Titles at the right side, if long, reach over the labels of a narrow screen.
    """
    labels = [f"<b>{wrapped(row.label, width)}</b>" if row.heading else wrapped(row.label, width) for row in rows]
    lines = max((label.count("<br>") + 1 for label in labels), default=1)
    between = (len(panels) - 1) * BETWEEN
    height = len(panels) * len(rows) * (LINE * lines + ROW_MARGIN) + between
    share = (height - between) / len(panels) / height
    tops = [1 - number * (share + BETWEEN / height) for number in range(len(panels))]
    same = {"x": float(right), "xanchor": "right" if right else "left", "xref": "paper", "yref": "paper"}
    layout: dict[str, Any] = {
        "annotations": [
            {"text": f"<b>{panel}</b>", "y": top, "showarrow": False, "yanchor": "bottom", **same}
            for panel, top in zip(panels, tops, strict=True)
            if panel
        ]
    }
    for number, top in enumerate(tops, 1):
        layout[_name("yaxis", number)] = {"ticktext": labels, "domain": (max(0.0, top - share), top)}
    return height, layout


def _name(axis: str, number: int) -> str:
    return axis if number == 1 else f"{axis}{number}"


@dataclass(frozen=True, kw_only=True)
class Dot:
    """An estimate in a row of `dot_rows`."""

    heading: str = ""
    """What the row stands under; rows under one heading come together."""
    label: str
    """The row; dots with one heading and label share it."""
    series: str
    """What its colour and symbol mean."""
    figure: Value
    """The estimate, or a number without an interval; None is not drawn."""
    note: str = ""
    """More words for who points at it."""
    null: tuple[float, float] | None = None
    """Where it would be by chance: a grey band behind it."""


def dot_rows(
    dots: Sequence[Dot],
    axis: Axis,
    *,
    hollow: Sequence[str] = (),
    limits: tuple[float, float] | None = None,
    narrow: int = NARROW,
) -> go.Figure:
    """Estimates under headings, in order, and what chance gives behind them.

    Args:
        dots: those without a value are not drawn.
        axis: what they are.
        hollow: series whose symbols are outlines: controls, or statistics from elsewhere.
        limits: of the x axis; fitting unless given.
        narrow: characters of a label in a line on a narrow screen.
    """
    groups = [
        Group(
            name=name,
            colour=PALETTE[style % len(PALETTE)],
            symbol=SYMBOLS[style % len(SYMBOLS)] + ("-open" if name in hollow else ""),
        )
        for style, name in enumerate(dict.fromkeys(dot.series for dot in dots if dot.figure is not None))
    ]
    marks = [mark(_key(dot), dot.series, dot.figure, note=dot.note) for dot in dots if dot.figure is not None]
    labels = {_key(dot): dot for dot in dots if dot.figure is not None}
    rows = headed(
        (heading, [Row(key=key, label=dot.label) for key, dot in labels.items() if dot.heading == heading])
        for heading in dict.fromkeys(dot.heading for dot in labels.values())
    )
    figure = dot_plot(marks, groups, rows, axis, label_width=WIDE, narrow_width=narrow)
    places = {row.key: place for place, row in enumerate(rows)}
    bands = [(dot.null, places[_key(dot)]) for dot in dots if dot.figure is not None and dot.null is not None]
    if bands:
        band = go.Scatter(
            x=[x for ends, _ in bands for x in (*ends, None)],
            y=[y for _, place in bands for y in (place, place, None)],
            mode="lines+markers",
            line={"color": AXIS, "width": 6},
            marker={"color": AXIS, "size": 12, "symbol": "line-ns", "line": {"width": 2, "color": AXIS}},
            opacity=0.6,
            name="by chance",
            hoverinfo="skip",
        )
        figure.add_trace(band)
        figure.data = (figure.data[-1], *figure.data[:-1])  # behind the dots
    return figure if limits is None else figure.update_xaxes(range=list(limits))


def dot_data(dots: Sequence[Dot]) -> pd.DataFrame:
    """The numbers drawn, a row for each dot."""
    return pd.DataFrame(
        [
            {"group": dot.heading, "row": dot.label, "series": dot.series, "value": value, "low": low, "high": high}
            | ({} if dot.null is None else {"chance_low": dot.null[0], "chance_high": dot.null[1]})
            for dot in dots
            for value, low, high in [ends(dot.figure)]
            if value is not None
        ]
    )


def _key(dot: Dot) -> str:
    return f"{dot.heading}\n{dot.label}"
