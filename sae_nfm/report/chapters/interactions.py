"""Which features interact? The graph of the strongest pairs, where they write, their controls, and pairs on a prompt."""

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from sae_nfm.attribution.results import (
    DRAWN,
    LEGEND,
    Attribution,
    CorpusAttribution,
    Correlation,
    InteractionGraph,
    PairEdge,
    Point,
    TokenAttribution,
)
from sae_nfm.common import not_held_out
from sae_nfm.report.blocks import Block, Figure, Heading, Prose, Section, Table, dots_figure
from sae_nfm.report.plots import AXIS, PALETTE, Axis, Dot, styled
from sae_nfm.report.run_folder import Found, Run

TITLE = "Interactions"
COMMANDS = ("sae-nfm attribute --corpus --sae SAE --save RUN/attribution/corpus.json",)
STRONGEST, TOKENS = 20, 6
"""Pairs in the dot plot, and tokens of a prompt that are shown."""
SHARE_AXIS = Axis(title="share of the energy of all pairs", tickformat=".1%", form=".2%", reference=0, from_zero=True)
RHO_AXIS = Axis(title="Spearman's correlation over pairs", tickformat="+.1f", form="+.2f", reference=0)
LEAD = (
    "Which pairs of features write through the interaction path, where, and what do they do to the predictions? With "
    "the gates of the hidden units held, the path is an exact sum over pairs."
)
GRAPH_CAPTION = (
    "The {pairs} pairs of most energy on held-out text. A dot is a feature, larger the more tokens it is read on; a "
    "line is a pair, wider the more of the energy ||o_ij||^2 of all pairs it has. {effect} Numbers are features, in "
    "the explorer #feature=123; only the busiest are labelled. Places are chosen so that connected features stand "
    "close and mean nothing else. A hub is often only a feature that is active on many tokens: read the correlations "
    "below."
)
STRENGTH_CAPTION = (
    "Share of the summed energy of all pairs. Pairs are not orthogonal, so the shares are not parts of what the path "
    "writes, and the strongest pair can still be small: together the {n} shown have {total:.1%}."
)
CONTEXT_CAPTION = (
    "The strongest pairs: tokens they fire on, share of the energy, mean and largest norm of what they write, and "
    "where they write most, the token in [[ ]]."
)
CONTROL_CAPTION = (
    "Is the strength of a pair only co-occurrence? Rank correlation of five measures of strength with how often both "
    "features are active and with their covariance, over {pairs:,} pairs. Grey: the same with rows of V permuted "
    "among features ({n} draws; few draws show the place, not the spread). Where a dot lies in or near the grey, "
    "activations alone explain the correlation. From weights alone: open (all gates open), averaged (gates as often "
    "open as on tokens), scaled (averaged, times mean activations). On tokens: when firing (mean norm where the pair "
    "fires), total (its energy)."
)
EFFECT_CAPTION = (
    "Effect of each of the strongest pairs on {target}, with the pair less without it. Predicted: direct, through the "
    "unembedding alone, and gradient, to first order through the rest of the model. Measured: frozen, the pair "
    "removed with gates held, and free, with gates free to flip, which is what removing it really does. One token: no "
    "sampling error, and no evidence about others."
)
WIDEST, LARGEST = 9.0, 26.0
"""Pixels: the widest edge and the largest node."""
LABELLED, LABELLED_NARROW = 1, 3
"""Edges from which a feature's number is written beside it, on a wide and on a narrow screen."""
LABELLED_PAIRS = 10
"""Pairs whose features are labelled in any case."""
SIGNS = {
    1: ("raises the target", PALETTE[0], "solid"),
    -1: ("lowers the target", PALETTE[4], "dash"),
    0: ("pair", AXIS, "solid"),
}


def section(run: Run) -> Section | None:
    """All attributions of a run; None without any."""
    found = run.of(Attribution)
    blocks: list[Block] = []
    verdicts: list[str] = []
    for number, one in enumerate(found):
        blocks.append(Heading(text=f"{run.label(one.path)}: {one.result.sae}"))
        corpus = one.result.corpus
        if corpus is not None:
            warned = not_held_out(one.result.provenance)
            blocks += [*([Prose(lines=warned)] if warned else []), *_corpus(corpus, number)]
            verdicts += [*findings(corpus), *warned]
        blocks += _prompt(one, number)
    return Section(id="interactions", title=TITLE, lead=LEAD, blocks=blocks, verdicts=verdicts) if blocks else None


def findings(corpus: CorpusAttribution) -> list[str]:
    """How concentrated the pairs are, and whether their strength goes with co-occurrence beyond chance."""
    strongest = [
        f"{corpus.pairs:,} pairs fire on {corpus.tokens:,} tokens; the strongest, {edge.first} x {edge.second}, "
        f"has {edge.energy_share:.1%} of their energy."
        for edge in corpus.graph.edges[:1]
    ]
    correlated = [
        f"Energy of pairs correlates at {dot.figure:+.2f} {dot.heading}; with permuted embeddings at "
        f"{dot.null[0]:+.2f} to {dot.null[1]:+.2f}."
        for dot in control_dots(corpus.controls.cooccurrence)
        if dot.label == "total" and dot.null is not None and isinstance(dot.figure, float)
    ]
    return strongest + correlated


def _corpus(corpus: CorpusAttribution, number: int) -> list[Block]:
    edges = corpus.graph.edges[:DRAWN]
    if not edges:
        return [Prose(lines=["No pair fired on these tokens."])]
    effect = (
        f"Solid: raises {corpus.target} on average; dashed: lowers it." if corpus.target else "No target was given."
    )
    strongest = strength_dots(edges[:STRONGEST])
    total = sum(edge.energy_share for edge in edges[:STRONGEST])
    blocks: list[Block] = [Prose(lines=findings(corpus))]
    if corpus.places is None:
        lacking = f"This file is of 0.1.0 and has no layout of the graph; `{COMMANDS[0]}` writes one that has."
        blocks.append(Prose(lines=[lacking]))
    else:
        graph = Figure(
            name=f"graph-{number}",
            title="The strongest pairs as a graph",
            plot=graph_figure(corpus.graph, edges, corpus.places),
            caption=GRAPH_CAPTION.format(pairs=len(edges), effect=effect),
            data=pd.DataFrame([vars(edge) for edge in edges]),
        )
        blocks.append(graph)
    caption = STRENGTH_CAPTION.format(n=len(strongest), total=total)
    blocks.append(
        dots_figure(f"strength-{number}", "How much the strongest pairs have", strongest, SHARE_AXIS, caption)
    )
    blocks.append(_contexts(corpus))
    controls = control_dots(corpus.controls.cooccurrence)
    if controls:
        draws = max(len(one.null_spearman) for one in corpus.controls.cooccurrence)
        caption = CONTROL_CAPTION.format(pairs=corpus.controls.pairs, n=draws)
        title = "Strength and co-occurrence, and with permuted embeddings"
        blocks.append(dots_figure(f"controls-{number}", title, controls, RHO_AXIS, caption, limits=(-1, 1)))
    return blocks


def _contexts(corpus: CorpusAttribution) -> Table:
    rows = [
        (
            f"{edge.first} x {edge.second}",
            f"{edge.tokens:,}",
            f"{edge.energy_share:.2%}",
            f"{edge.norm_mean:.3g}",
            f"{edge.norm_max:.3g}",
            " | ".join(" ".join(one.text.split()) for one in contexts),
        )
        for edge, contexts in zip(corpus.graph.edges, corpus.contexts, strict=False)
    ]
    columns = ("pair", "tokens", "energy", "mean norm", "max norm", "where it writes most")
    return Table(columns=columns, rows=rows, caption=CONTEXT_CAPTION, text_columns=(0, 5))


def _prompt(found: Found[Attribution], number: int) -> Iterator[Block]:
    tokens = [token for token in found.result.tokens if token.pairs]
    for place, token in enumerate(tokens[:TOKENS]):
        yield from _token(token, f"{number}-{place}")
    if tokens:
        yield Prose(lines=[LEGEND.replace("\n", " ")])
    if len(tokens) > TOKENS:
        yield Prose(lines=[f"{len(tokens) - TOKENS} more tokens are in {found.path.name}."])


def _token(token: TokenAttribution, name: str) -> Iterator[Block]:
    yield dots_figure(
        f"effects-{name}",
        f"Token {token.position} {token.token!r}: predicted and measured effects of its strongest pairs",
        effect_dots(token),
        Axis(title=f"effect on {token.target}", form="+.4f", reference=0),
        EFFECT_CAPTION.format(target=token.target),
        hollow=("frozen", "free"),
    )
    yield Table(
        columns=("pair", "norm", "direct", "gradient", "frozen", "free", "gates flipped", "promotes", "suppresses"),
        rows=[
            (
                f"{pair.first} x {pair.second}",
                f"{pair.written.norm:.3g}",
                "" if pair.written.direct is None else f"{pair.written.direct:+.4f}",
                f"{pair.written.gradient:+.4f}",
                f"{pair.frozen:+.4f}",
                f"{pair.free:+.4f}",
                f"{pair.flipped:.0%}",
                " ".join(map(repr, pair.written.promotes)),
                " ".join(map(repr, pair.written.suppresses)),
            )
            for pair in token.pairs
        ],
        caption=(
            f"Effects on {token.target}, which is {token.value:+.3f} here; {token.pairs_firing} pairs fire, "
            f"{token.gates_open:.0%} of the gates are open. promotes, suppresses: on the direct path."
        ),
        text_columns=(0, 7, 8),
    )


def graph_figure(graph: InteractionGraph, edges: Sequence[PairEdge], places: Mapping[int, Point]) -> go.Figure:
    """Features as dots at their places, these pairs as lines as wide as their share of the energy."""
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
            label=f"{edge.first} x {edge.second}",
            series=SIGNS[_sign(edge)][0],
            figure=edge.energy_share,
            note=f"fires on {edge.tokens:,} tokens, mean norm {edge.norm_mean:.3g}",
        )
        for edge in edges
    ]


def control_dots(correlations: Sequence[Correlation]) -> list[Dot]:
    """Spearman's rho of each measure of strength with co-occurrence; behind it the same with permuted embeddings."""
    return [
        Dot(
            heading=f"with {one.against}",
            label=one.measure,
            series="this SAE",
            figure=one.spearman,
            null=null,
            note=f"rows of V permuted: {null[0]:+.2f} to {null[1]:+.2f}",
        )
        for one in correlations
        if one.null_spearman and one.spearman is not None
        for null in [(min(one.null_spearman), max(one.null_spearman))]
    ]


def effect_dots(token: TokenAttribution) -> list[Dot]:
    """The effects of each pair of a token in one row: predicted, and measured by removing the pair."""
    return [
        Dot(
            label=f"{pair.first} x {pair.second}",
            series=name,
            figure=value,
            note=f"{pair.flipped:.0%} of the gates flip when it is removed" if name == "free" else "",
        )
        for pair in token.pairs
        for name, value in (
            ("direct", pair.written.direct),
            ("gradient", pair.written.gradient),
            ("frozen", pair.frozen),
            ("free", pair.free),
        )
    ]


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
    told = [
        f"{edge.first} x {edge.second}: {edge.energy_share:.2%} of the energy, {edge.tokens:,} tokens"
        + ("" if edge.effect_mean is None else f", mean effect {edge.effect_mean:+.3g}")
        for edge in edges
    ]
    middles = [((x0 + x1) / 2, (y0 + y1) / 2) for (x0, y0), (x1, y1) in ends]
    return _points(middles, told, {"size": 14, "opacity": 0})


def _nodes(graph: InteractionGraph, edges: Sequence[PairEdge], places: Mapping[int, Point]) -> go.Scatter:
    drawn = {feature for edge in edges for feature in (edge.first, edge.second)}
    nodes = [node for node in graph.nodes if node.feature in drawn]
    most = max(node.tokens for node in nodes)
    told = [f"feature {n.feature}: {n.tokens:,} tokens, mean activation {n.mean_activation:.3g}" for n in nodes]
    sizes = [round(7 + (LARGEST - 7) * (node.tokens / most) ** 0.5, 1) for node in nodes]
    marker = {"size": sizes, "color": "white", "line": {"color": "#1a1a1a", "width": 1.5}}
    return _points([places[node.feature] for node in nodes], told, marker)


def _points(points: Sequence[Point], told: Sequence[str], marker: Mapping[str, object]) -> go.Scatter:
    return go.Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        mode="markers",
        marker=marker,
        text=told,
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _labels(edges: Sequence[PairEdge], places: Mapping[int, Point], least: int) -> list[dict[str, object]]:
    """Numbers of the features that have many pairs, and of those in the strongest."""
    ends = [feature for edge in edges for feature in (edge.first, edge.second)]
    strongest = {feature for edge in edges[:LABELLED_PAIRS] for feature in (edge.first, edge.second)}
    return [
        {"x": x, "y": y, "text": f"<b>{feature}</b>", "showarrow": False, "font": {"size": 10.5}, "yshift": 13}
        for feature, (x, y) in places.items()
        if feature in strongest or ends.count(feature) >= least
    ]
