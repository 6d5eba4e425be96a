"""How figures look: one palette, one style, and what changes on a narrow screen."""

import textwrap
from typing import Any

import plotly.graph_objects as go

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999933", "#000000")
"""Okabe & Ito's colours, distinguishable with every common colour vision; their yellow is darker here, for white paper."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash")
"""Line styles beside the colours, for print in grey."""
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "triangle-down", "star")
"""Markers beside the colours."""
FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "#1a1a1a"}
GRID, AXIS = "#e6e6e6", "#8a8a8a"


def styled(figure: go.Figure, *, height: int, narrow: dict[str, Any] | None = None) -> go.Figure:
    """Give a figure the common style.

    Args:
        figure: changed in place, and returned.
        height: in CSS pixels.
        narrow: layout settings that replace others on screens below 600 px, such as {"height": 700}.
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
