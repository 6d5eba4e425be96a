"""Dot plots of estimates under headings, and what chance gives behind them."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from sae_nfm.analysis.results import Figure
from sae_nfm.report.plots.dot_plot import Axis, Group, Mark, Row, bounded, dot_plot
from sae_nfm.report.plots.theme import AXIS, PALETTE, SYMBOLS
from sae_nfm.stats import Estimate

WIDE, NARROW = 60, 26
"""Characters of a label in a line, on a wide and on a narrow screen."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """An estimate in a row."""

    heading: str
    """What the row stands under; rows under one heading come together. Without any: empty."""
    label: str
    """The row; dots with one heading and label share it."""
    series: str
    """What its colour and symbol mean."""
    figure: Figure
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
    """Draw them, in order.

    Args:
        dots: the estimates.
        axis: what they are.
        hollow: series whose symbols are outlines: controls, or figures from elsewhere.
        limits: of the x axis; fitting unless given.
        narrow: characters of a label in a line on a narrow screen.
    """
    drawn = [dot for dot in dots if dot.figure is not None]
    series = list(dict.fromkeys(dot.series for dot in drawn))
    groups = [
        Group(
            name=name,
            colour=PALETTE[style % len(PALETTE)],
            symbol=SYMBOLS[style % len(SYMBOLS)] + ("-open" if name in hollow else ""),
        )
        for style, name in enumerate(series)
    ]
    rows = _rows(drawn)
    figure = dot_plot([_mark(dot) for dot in drawn], groups, rows, axis, label_width=WIDE, narrow_width=narrow)
    _bands(figure, drawn, rows)
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


def ends(figure: Figure) -> tuple[float | None, float | None, float | None]:
    """A figure and the ends of its interval; None for what there is not, or has no bound."""
    if isinstance(figure, Estimate):
        return figure.estimate, bounded(figure.low), bounded(figure.high)
    return figure, None, None


def _key(dot: Dot) -> str:
    return f"{dot.heading}\n{dot.label}"


def _rows(dots: Sequence[Dot]) -> list[Row]:
    rows: list[Row] = []
    for heading in dict.fromkeys(dot.heading for dot in dots):
        if heading:
            rows.append(Row(key=heading, label=heading, heading=True))
        own = {_key(dot): dot.label for dot in dots if dot.heading == heading}
        rows.extend(Row(key=key, label=label) for key, label in own.items())
    return rows


def _mark(dot: Dot) -> Mark:
    value, low, high = ends(dot.figure)
    assert value is not None
    return Mark(row=_key(dot), group=dot.series, x=value, low=low, high=high, note=dot.note)


def _bands(figure: go.Figure, dots: Sequence[Dot], rows: Sequence[Row]) -> None:
    places = {row.key: place for place, row in enumerate(rows)}
    bands = [(dot.null, places[_key(dot)]) for dot in dots if dot.null is not None]
    if not bands:
        return
    figure.add_trace(
        go.Scatter(
            x=[x for band, _ in bands for x in (*band, None)],
            y=[y for _, place in bands for y in (place, place, None)],
            mode="lines+markers",
            line={"color": AXIS, "width": 6},
            marker={"color": AXIS, "size": 12, "symbol": "line-ns", "line": {"width": 2, "color": AXIS}},
            opacity=0.6,
            name="by chance",
            hoverinfo="skip",
        )
    )
    figure.data = (figure.data[-1], *figure.data[:-1])  # behind the dots
