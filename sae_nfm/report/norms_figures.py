"""Figures of squared norms: one small histogram below the other, on one axis."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_nfm.analysis import (
    AS_TRAINED,
    CANONICAL,
    INITIAL,
    PUBLISHED_MEANS,
    TOPK,
    NormHistogram,
    SquaredNorms,
    p_words,
)
from sae_nfm.report.theme import AXIS, PALETTE, styled

COLOURS = {AS_TRAINED: PALETTE[0], CANONICAL: PALETTE[2], TOPK: PALETTE[1], INITIAL: PALETTE[7]}
ROW = 96


def norms_figure(norms: SquaredNorms) -> go.Figure:
    """A histogram for each SAE, in rows that share the axis; dashed: the published means, where the measure is theirs."""
    rows = len(norms.histograms)
    figure = make_subplots(rows=rows, shared_xaxes=True, vertical_spacing=0.32 / rows)
    width = norms.edges[1] - norms.edges[0]
    centres = [edge + width / 2 for edge in norms.edges[:-1]]
    for row, histogram in enumerate(norms.histograms, start=1):
        figure.add_trace(
            go.Bar(
                x=centres,
                y=histogram.counts,
                width=width,
                marker={"color": COLOURS[histogram.name], "line": {"width": 0}},
                name=histogram.name,
                hovertemplate=f"{histogram.name}: %{{y:,}} features around %{{x:.3g}}<extra></extra>",
                showlegend=False,
            ),
            row=row,
            col=1,
        )
        figure.add_annotation(
            text=f"<b>{histogram.name}</b> &nbsp;{_told(histogram)}",
            xref="x domain" if row == 1 else f"x{row} domain",
            yref="y domain" if row == 1 else f"y{row} domain",
            x=0,
            y=1,
            yanchor="bottom",
            xanchor="left",
            showarrow=False,
        )
    if norms.measure == "decoder":
        for mean in PUBLISHED_MEANS:
            figure.add_vline(x=mean, line={"dash": "dash", "width": 1.2, "color": AXIS})
    styled(figure, height=110 + ROW * rows)
    figure.update_layout(bargap=0, margin={"t": 36})
    figure.update_yaxes(showticklabels=False, ticks="", showgrid=False, rangemode="tozero")
    figure.update_xaxes(range=[0, norms.edges[-1]])
    figure.update_xaxes(title=_axis(norms), row=rows, col=1)
    return figure


def _told(histogram: NormHistogram) -> str:
    if histogram.dip is None:
        return f"all {histogram.mean:.3g}"
    return f"mean {histogram.mean:.3g}, dip test {p_words(histogram.dip.p_value)}"


def _axis(norms: SquaredNorms) -> str:
    return "squared decoder norm" if norms.measure == "decoder" else "squared norm, encoder times decoder"
