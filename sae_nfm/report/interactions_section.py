"""Which features interact? The graph of the strongest pairs, where they write, their controls, and pairs on a prompt."""

from collections.abc import Iterator

import pandas as pd

from sae_nfm.attribution import LEGEND, Attribution, Context, CorpusAttribution, TokenAttribution
from sae_nfm.attribution.graph import graph_layout
from sae_nfm.report.blocks import Block, Figure, Heading, Prose, Section, Table
from sae_nfm.report.dot_plot import Axis
from sae_nfm.report.dot_rows import dot_data, dot_rows
from sae_nfm.report.interactions_figures import control_dots, effect_dots, graph_figure, strength_dots
from sae_nfm.report.run_folder import Found, Run

TITLE = "Interactions"
COMMAND = "sae-nfm attribute --corpus --sae SAE --output RUN/attribution/corpus.json"
GRAPH_PAIRS, STRONGEST, TOKENS = 50, 20, 6
"""Pairs in the graph, pairs in the dot plot, and tokens of a prompt that are shown."""
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
    "features are active and with their covariance, over {pairs:,} pairs. Grey: the same with rows of V dealt out to "
    "other features ({n} draws; few draws show the place, not the spread). Where a dot lies in or near the grey, "
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


def section(run: Run) -> Section | None:
    """All attributions of a run; None without any."""
    found = run.of(Attribution)
    blocks: list[Block] = []
    verdicts: list[str] = []
    for number, one in enumerate(found):
        blocks.append(Heading(text=f"{run.label(one.path)}: {one.result.sae}"))
        corpus = one.result.corpus
        if corpus is not None:
            blocks += _corpus(corpus, number)
            verdicts += findings(corpus)
        blocks += _prompt(one, number)
    return Section(id="interactions", title=TITLE, lead=LEAD, blocks=blocks, verdicts=verdicts) if blocks else None


def findings(corpus: CorpusAttribution) -> list[str]:
    """How concentrated the pairs are, and whether their strength goes with co-occurrence beyond chance."""
    told: list[str] = []
    if corpus.graph.edges:
        edge = corpus.graph.edges[0]
        told.append(
            f"{corpus.pairs:,} pairs fire on {corpus.tokens:,} tokens; the strongest, {edge.first} x {edge.second}, "
            f"has {edge.energy_share:.1%} of their energy."
        )
    for dot in control_dots(corpus.controls.cooccurrence):
        if dot.label == "total" and dot.null is not None and isinstance(dot.figure, float):
            low, high = dot.null
            told.append(
                f"Energy of pairs correlates at {dot.figure:+.2f} {dot.heading}; with embeddings dealt out anew at "
                f"{low:+.2f} to {high:+.2f}."
            )
    return told


def _corpus(corpus: CorpusAttribution, number: int) -> list[Block]:
    edges = corpus.graph.edges[:GRAPH_PAIRS]
    if not edges:
        return [Prose(lines=["No pair fired on these tokens."])]
    effect = (
        f"Solid: raises {corpus.target} on average; dashed: lowers it." if corpus.target else "No target was given."
    )
    strongest = strength_dots(edges[:STRONGEST])
    total = sum(edge.energy_share for edge in edges[:STRONGEST])
    controls = control_dots(corpus.controls.cooccurrence)
    draws = max((len(one.null_spearman) for one in corpus.controls.cooccurrence), default=0)
    return [
        Prose(lines=findings(corpus)),
        Figure(
            name=f"graph-{number}",
            title="The strongest pairs as a graph",
            plot=graph_figure(corpus.graph, edges, graph_layout(edges)),
            caption=GRAPH_CAPTION.format(pairs=len(edges), effect=effect),
            data=pd.DataFrame([vars(edge) for edge in edges]),
        ),
        Figure(
            name=f"strength-{number}",
            title="How much the strongest pairs have",
            plot=dot_rows(strongest, SHARE_AXIS),
            caption=STRENGTH_CAPTION.format(n=len(strongest), total=total),
            data=dot_data(strongest),
        ),
        _contexts(corpus),
        *(_controls(corpus, number, draws) if controls else ()),
    ]


def _controls(corpus: CorpusAttribution, number: int, draws: int) -> Iterator[Figure]:
    dots = control_dots(corpus.controls.cooccurrence)
    yield Figure(
        name=f"controls-{number}",
        title="Strength and co-occurrence, beside embeddings dealt out anew",
        plot=dot_rows(dots, RHO_AXIS, limits=(-1, 1)),
        caption=CONTROL_CAPTION.format(pairs=corpus.controls.pairs, n=draws),
        data=dot_data(dots),
    )


def _contexts(corpus: CorpusAttribution) -> Table:
    rows = [
        (
            f"{edge.first} x {edge.second}",
            f"{edge.tokens:,}",
            f"{edge.energy_share:.2%}",
            f"{edge.norm_mean:.3g}",
            f"{edge.norm_max:.3g}",
            " | ".join(_text(one) for one in contexts),
        )
        for edge, contexts in zip(corpus.graph.edges, corpus.contexts, strict=False)
    ]
    columns = ("pair", "tokens", "energy", "mean norm", "max norm", "where it writes most")
    return Table(columns=columns, rows=rows, caption=CONTEXT_CAPTION, text_columns=(0, 5))


def _text(context: Context) -> str:
    return " ".join(context.text.split())


def _prompt(found: Found[Attribution], number: int) -> Iterator[Block]:
    tokens = [token for token in found.result.tokens if token.pairs]
    for place, token in enumerate(tokens[:TOKENS]):
        yield from _token(token, f"{number}-{place}")
    if tokens:
        yield Prose(lines=[LEGEND.replace("\n", " ")])
    if len(tokens) > TOKENS:
        yield Prose(lines=[f"{len(tokens) - TOKENS} more tokens are in {found.path.name}."])


def _token(token: TokenAttribution, name: str) -> Iterator[Block]:
    dots = effect_dots(token)
    yield Figure(
        name=f"effects-{name}",
        title=f"Token {token.position} {token.token!r}: predicted and measured effects of its strongest pairs",
        plot=dot_rows(
            dots, Axis(title=f"effect on {token.target}", form="+.4f", reference=0), hollow=("frozen", "free")
        ),
        caption=EFFECT_CAPTION.format(target=token.target),
        data=dot_data(dots),
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
