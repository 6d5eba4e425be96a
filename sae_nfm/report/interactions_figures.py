"""The graph of the strongest pairs, and dots of pairs, correlations and effects."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from sae_nfm.attribution import Correlation, InteractionGraph, PairEdge, Point, TokenAttribution
from sae_nfm.report.dot_rows import Dot
from sae_nfm.report.theme import PALETTE, styled

WIDEST, LARGEST = 9.0, 26.0
"""Pixels: the widest edge and the largest node."""
LABELLED, LABELLED_NARROW = 1, 3
"""Edges from which a feature's number is written beside it, on a wide and on a narrow screen."""
STRONGEST = 10
"""Pairs whose features are labelled in any case."""
SIGNS = {
    1: ("raises the target", PALETTE[0], "solid"),
    -1: ("lowers the target", PALETTE[4], "dash"),
    0: ("pair", "#8a8a8a", "solid"),
}
EFFECTS = ("direct", "gradient", "frozen", "free")
"""Effects of a pair, from the first prediction to what removing it does."""


def graph_figure(graph: InteractionGraph, edges: Sequence[PairEdge], places: Mapping[int, Point]) -> go.Figure:
    """Features as dots, pairs as lines as wide as their share of the energy.

    Args:
        graph: for the figures of the features.
        edges: the pairs to draw.
        places: of their features.
    """
    figure = go.Figure()
    largest = max(edge.energy_share for edge in edges)
    shown = set[int]()
    for edge in sorted(edges, key=lambda one: one.energy_share):
        sign = _sign(edge)
        figure.add_trace(_line(edge, places, largest, legend=sign not in shown))
        shown.add(sign)
    figure.add_trace(_middles(edges, places))
    figure.add_trace(_nodes(graph, edges, places))
    wide, narrow = (_labels(edges, places, least) for least in (LABELLED, LABELLED_NARROW))
    styled(figure, height=640, narrow={"height": 470, "annotations": narrow})
    hidden = {"visible": False, "range": [-0.06, 1.06]}
    figure.update_layout(xaxis=hidden, yaxis=hidden, annotations=wide, hovermode="closest", margin={"l": 4, "r": 4})
    return figure


def strength_dots(edges: Sequence[PairEdge]) -> list[Dot]:
    """Share of the energy of each pair."""
    return [
        Dot(
            heading="",
            label=f"{edge.first} x {edge.second}",
            series=SIGNS[_sign(edge)][0],
            figure=edge.energy_share,
            note=f"fires on {edge.tokens:,} tokens, mean norm {edge.norm_mean:.3g}",
        )
        for edge in edges
    ]


def control_dots(correlations: Sequence[Correlation]) -> list[Dot]:
    """Spearman's rho of each measure of strength with co-occurrence; behind it what embeddings dealt out anew give."""
    found: list[Dot] = []
    for one in correlations:
        if one.null_spearman and one.spearman is not None:
            null = (min(one.null_spearman), max(one.null_spearman))
            found.append(
                Dot(
                    heading=f"with {one.against}",
                    label=one.measure,
                    series="this SAE",
                    figure=one.spearman,
                    null=null,
                    note=f"rows of V dealt out anew: {null[0]:+.2f} to {null[1]:+.2f}",
                )
            )
    return found


def effect_dots(token: TokenAttribution) -> list[Dot]:
    """The effects of each pair of a token in one row: predicted, and measured by removing the pair."""
    found: list[Dot] = []
    for pair in token.pairs:
        values = {
            "direct": pair.written.direct,
            "gradient": pair.written.gradient,
            "frozen": pair.frozen,
            "free": pair.free,
        }
        found.extend(
            Dot(
                heading="",
                label=f"{pair.first} x {pair.second}",
                series=name,
                figure=values[name],
                note=f"{pair.flipped:.0%} of the gates flip when it is removed" if name == "free" else "",
            )
            for name in EFFECTS
        )
    return found


def _sign(edge: PairEdge) -> int:
    effect = edge.effect_mean
    return 0 if effect is None else 1 if effect > 0 else -1


def _line(edge: PairEdge, places: Mapping[int, Point], largest: float, *, legend: bool) -> go.Scatter:
    name, colour, dash = SIGNS[_sign(edge)]
    (x0, y0), (x1, y1) = places[edge.first], places[edge.second]
    width = max(1.0, WIDEST * (edge.energy_share / largest) ** 0.5)
    return go.Scatter(
        x=[x0, x1],
        y=[y0, y1],
        mode="lines",
        line={"color": colour, "width": round(width, 2), "dash": dash},
        opacity=0.55,
        name=name,
        legendgroup=name,
        showlegend=legend,
        hoverinfo="skip",
    )


def _middles(edges: Sequence[PairEdge], places: Mapping[int, Point]) -> go.Scatter:
    """What is pointed at to read a pair."""
    ends = [(places[edge.first], places[edge.second]) for edge in edges]
    return go.Scatter(
        x=[(one[0] + other[0]) / 2 for one, other in ends],
        y=[(one[1] + other[1]) / 2 for one, other in ends],
        mode="markers",
        marker={"size": 14, "opacity": 0},
        text=[
            f"{edge.first} x {edge.second}: {edge.energy_share:.2%} of the energy, {edge.tokens:,} tokens"
            + ("" if edge.effect_mean is None else f", mean effect {edge.effect_mean:+.3g}")
            for edge in edges
        ],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _nodes(graph: InteractionGraph, edges: Sequence[PairEdge], places: Mapping[int, Point]) -> go.Scatter:
    drawn = {feature for edge in edges for feature in (edge.first, edge.second)}
    nodes = [node for node in graph.nodes if node.feature in drawn]
    most = max(node.tokens for node in nodes)
    return go.Scatter(
        x=[places[node.feature][0] for node in nodes],
        y=[places[node.feature][1] for node in nodes],
        mode="markers",
        marker={
            "size": [round(7 + (LARGEST - 7) * (node.tokens / most) ** 0.5, 1) for node in nodes],
            "color": "white",
            "line": {"color": "#1a1a1a", "width": 1.5},
        },
        text=[
            f"feature {node.feature}: {node.tokens:,} tokens, mean activation {node.mean_activation:.3g}"
            for node in nodes
        ],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _labels(edges: Sequence[PairEdge], places: Mapping[int, Point], least: int) -> list[dict[str, object]]:
    """Numbers of the features that have many pairs, and of those in the strongest."""
    ends = [feature for edge in edges for feature in (edge.first, edge.second)]
    strongest = {feature for edge in edges[:STRONGEST] for feature in (edge.first, edge.second)}
    return [
        {
            "x": x,
            "y": y,
            "text": f"<b>{feature}</b>",
            "showarrow": False,
            "font": {"size": 10.5},
            "yshift": 13,
        }
        for feature, (x, y) in places.items()
        if feature in strongest or ends.count(feature) >= least
    ]
