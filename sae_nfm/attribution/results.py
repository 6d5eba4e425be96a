"""What `sae-nfm attribute` finds: as words for the terminal, as JSON, and its pairs as a graph of features.

The graph's JSON is the node-link form that networkx (`node_link_graph(content, edges="edges")`) and d3 read; its GraphML is what
Gephi, Cytoscape and networkx read.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import networkx
import pandas as pd
from pydantic import TypeAdapter

from sae_nfm.common import checked, reading, text_of, whole, write_json
from sae_nfm.common.options import sampled_text
from sae_nfm.common.results import SavedResult, with_kind, without_kind

Point = tuple[float, float]
GRAPH_KIND = "graph/1"
DRAWN = 50
"""Pairs of most energy that are laid out to be drawn."""

LEGEND = """\
effect: change in the target when the term is ablated. direct: through the unembedding alone, the final scale held; gradient: to
first order through the rest of the model; frozen: pair removed, gates held, model rerun; free: gates free to flip, which is what
removing the pair really does. promotes, suppresses: on the direct path."""


@dataclass(frozen=True, kw_only=True)
class FeatureNode:
    """A feature."""

    feature: int
    tokens: int
    """Tokens on which the interaction path reads it."""
    mean_activation: float
    """On those tokens."""


@dataclass(frozen=True, kw_only=True)
class PairEdge:
    """A pair of features over a corpus."""

    first: int
    second: int
    tokens: int
    """Tokens on which the pair fires."""
    frequency: float
    """Their share of all tokens."""
    norm_mean: float
    """Mean ||o_ij|| where it fires."""
    norm_max: float
    energy_share: float
    """Its part of the summed energy ||o_ij||^2 of all pairs."""
    effect_mean: float | None
    """Mean effect on the target where it fires; None without a target."""
    weight: float
    """Weight-only strength at average gates and activations (`pair_weights`, "scaled")."""


@dataclass(frozen=True, kw_only=True)
class InteractionGraph:
    """Features and pairs: nodes by number, edges by descending energy."""

    nodes: tuple[FeatureNode, ...]
    edges: tuple[PairEdge, ...]

    def save(self, path: str | Path) -> None:
        """Write as .graphml or .json (a ValueError for another suffix), under a temporary name first."""
        _check_suffix(path)
        if Path(path).suffix == ".json":  # by hand: networkx would order the edges by node
            nodes = [{"id": node.feature, **asdict(node)} for node in self.nodes]
            links = [{"source": edge.first, "target": edge.second, **asdict(edge)} for edge in self.edges]
            form = {"directed": False, "multigraph": False, "graph": {}}
            write_json(path, with_kind(GRAPH_KIND, {**form, "nodes": nodes, "edges": links}))
            return
        graph = networkx.Graph()
        for node in self.nodes:
            graph.add_node(f"n{node.feature}", **asdict(node))
        for edge in self.edges:
            values = {name: value for name, value in asdict(edge).items() if value is not None}
            graph.add_edge(f"n{edge.first}", f"n{edge.second}", **values)
        with whole(path) as partial:
            networkx.write_graphml(graph, partial)

    @classmethod
    def load(cls, path: str | Path) -> "InteractionGraph":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: for another suffix, or a file of another kind.
        """
        _check_suffix(path)
        checked(path)
        with reading(path, "an interaction graph", remedy="write one with `sae-nfm attribute`"):
            if Path(path).suffix == ".json":
                content = without_kind(GRAPH_KIND, json.loads(Path(path).read_text(encoding="utf-8")))
                nodes, edges = content["nodes"], content["edges"]
            else:
                graph: Any = networkx.read_graphml(path)
                nodes = [data for _, data in graph.nodes(data=True)]
                edges: list[dict[str, Any]] = [{"effect_mean": None} | data for *_, data in graph.edges(data=True)]
                edges.sort(key=lambda edge: (-edge["energy_share"], edge["first"], edge["second"]))
            return TypeAdapter(cls).validate_python({"nodes": nodes, "edges": edges})


def _check_suffix(path: str | Path) -> None:
    if Path(path).suffix not in (".graphml", ".json"):
        raise ValueError(f"the graph {str(path)!r} ends in {Path(path).suffix!r}; give a name in .graphml or .json")


@dataclass(frozen=True, kw_only=True)
class Context:
    """A token on which a pair fires."""

    row: int
    position: int
    norm: float
    """||o_ij|| there."""
    effect: float | None
    """<o_ij, direction> there."""
    text: str
    """The token in its text, in [[double brackets]]."""


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Pearson's r and Spearman's rho of two measures of pairs; None where one of them has one value throughout."""

    measure: str
    against: str
    pearson: float | None
    spearman: float | None
    null_pearson: tuple[float, ...] = ()
    """One for each permutation of the rows of V; empty where V does not enter."""
    null_spearman: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PairControls:
    """What the strength of pairs goes with, over the pairs that fire often enough."""

    tokens: int
    pairs: int
    """Pairs compared: those that fire on at least `min_tokens` of them. Pairs that never do have no strength on tokens."""
    min_tokens: int
    weights_against_tokens: tuple[Correlation, ...]
    """The weight-only measures against those on tokens."""
    cooccurrence: tuple[Correlation, ...]
    """Every measure against co-activation frequency and covariance."""


@dataclass(frozen=True, kw_only=True)
class CorpusAttribution:
    """Pairs over held-out tokens."""

    tokens: int
    """Tokens looked at: not special, not in position 0."""
    pairs: int
    firings: int
    """Pairs that fired, summed over tokens."""
    complete: bool
    """Whether the table has every pair that fired; its statistics are exact in any case."""
    slack_share: float
    """Otherwise the largest energy share that a pair outside the table can have."""
    target: str | None
    """What effects are on: a target's direct effect, at the token where the pair fires."""
    graph: InteractionGraph
    contexts: tuple[tuple[Context, ...], ...]
    controls: PairControls
    places: dict[int, Point] | None = None
    """Where to draw the features of the `DRAWN` pairs of most energy, in the unit square; None in files of 0.1.0."""

    def words(self) -> str:
        """For the terminal."""
        scope, most = "every pair that fired is counted", f"{self.slack_share:.1e}"
        if not self.complete:
            scope = f"statistics of the pairs in the table are exact; a pair that was dropped has at most {most} of the energy"
        squares = any(edge.first == edge.second for edge in self.graph.edges)
        what = "pairs and squares (i x i)" if squares else "pairs"
        lines = [
            f"{self.pairs:,} {what} over {self.tokens:,} tokens, {self.firings / self.tokens:.1f} firing a token; {scope}",
            "",
            f"Strongest {what} by energy{f'; effect: direct, on {self.target}' if self.target else ''}",
            self._table(),
            "",
            "Where they write most (||o_ij||; the token in [[ ]])",
        ]
        for edge, contexts in zip(self.graph.edges, self.contexts, strict=False):
            lines.append(f"  {edge.first} x {edge.second}")
            lines += [f"    {one.norm:.3g}  {one.text!r}" for one in contexts]
        return "\n".join([*lines, "", control_words(self.controls)])

    def _table(self) -> str:
        rows = [
            {
                "pair": f"{edge.first} x {edge.second}",
                "tokens": f"{edge.tokens:,}",
                "share of tokens": f"{edge.frequency:.2%}",
                "mean norm": f"{edge.norm_mean:.3g}",
                "max norm": f"{edge.norm_max:.3g}",
                "share of energy": f"{edge.energy_share:.2%}",
                **({} if edge.effect_mean is None else {"mean effect": f"{edge.effect_mean:+.4f}"}),
            }
            for edge in self.graph.edges[: len(self.contexts)]
        ]
        return pd.DataFrame(rows).to_string(index=False)


def control_words(controls: PairControls) -> str:
    """The controls as two tables with what they say."""

    def figures(*values: float | None) -> str:
        return "" if None in values else " to ".join(f"{value:+.2f}" for value in values)

    def row(one: Correlation) -> dict[str, str]:
        named = {"pair strength": one.measure, "against": one.against}
        return named | {"r": figures(one.pearson), "rho": figures(one.spearman)}

    head = f"over {controls.pairs:,} pairs that fire on at least {controls.min_tokens} of {controls.tokens:,} tokens"
    weights, cooccurrence = (
        [row(one) for one in many] for many in (controls.weights_against_tokens, controls.cooccurrence)
    )
    for line, one in zip(cooccurrence, controls.cooccurrence, strict=True):
        nulls = {"null r": one.null_pearson, "null rho": one.null_spearman}
        line |= {name: figures(min(null), max(null)) if null else "" for name, null in nulls.items()}
    return "\n".join(
        [
            f"Weights alone against what pairs do on tokens, {head}",
            pd.DataFrame(weights).to_string(index=False),
            "",
            f"Is it co-occurrence? {head}; null: rows of V permuted over features",
            pd.DataFrame(cooccurrence).to_string(index=False),
            "A correlation that the null has too is due to the features' activations, not to which embeddings interact.",
        ]
    )


@dataclass(frozen=True, kw_only=True)
class Written:
    """A vector that a path writes on a token, and what it does to the target."""

    name: str
    norm: float
    """In the SAE's normalised space."""
    direct: float | None
    """Effect on the target straight through the unembedding, the final scale held; None where there is no such path."""
    gradient: float
    """Effect on the target to first order through the rest of the model."""
    promotes: tuple[str, ...]
    """Tokens whose logits it raises most on the direct path, strongest first."""
    suppresses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PairEffect:
    """A pair on a token."""

    first: int
    second: int
    product: float
    written: Written
    """What it writes with the gates held, and that vector's predicted effects."""
    frozen: float
    """Effect on the target, measured by removing the pair with the gates held and running the rest of the model."""
    free: float
    """The same with gates free: what removing the pair really does."""
    flipped: float
    """Share of the token's gates that flip then."""
    prediction_error: float
    """How far the measured change of the path's output with gates held is from what the pair writes, relative to its norm."""


@dataclass(frozen=True, kw_only=True)
class TokenAttribution:
    """One token of a prompt."""

    position: int
    token: str
    target: str
    """What effects are on, read at this position."""
    value: float
    """The target's value with the SAE in place."""
    path_norm: float
    """Norm of what the interaction path writes, biases included."""
    gates_open: float
    """Share of gates that are open; 1 with head "bilinear", which has none."""
    pairs_firing: int
    """Pairs of which both features are read."""
    sum_error: float
    """Distance of the sum of all terms from what passed hook_nfm_interaction, relative to its norm."""
    all_pairs: Written
    all_squares: Written | None = None
    """Of single features, with head "bilinear"; None with head "fm", which has none."""
    biases: tuple[Written, ...]
    """b_2, and with head "fm" (b_1 * D) W_2."""
    pairs: tuple[PairEffect, ...]
    """With head "bilinear" squares too, as pairs of a feature with itself."""
    features: tuple[Written, ...]
    """The strongest single features of the linear path, by the same; empty where that path is off."""

    def words(self) -> str:
        """For the terminal."""
        lines = [
            f"token {self.position} {self.token!r}: effects on {self.target} (now {self.value:+.3f}), read at this token",
            f"  interaction path: norm {self.path_norm:.3g}, {self.gates_open:.0%} of gates open, {self.pairs_firing} pairs "
            f"fire; sum of the terms off by {self.sum_error:.0e}",
            _table([_row(one) for one in self.terms()]),
            f"  strongest {len(self.pairs)} pairs{'' if self.all_squares is None else ' and squares (i x i)'}",
            _table([_pair_row(pair) for pair in self.pairs]),
        ]
        if self.features:
            rows = [_row(feature) for feature in self.features]
            lines += [f"  linear path, strongest {len(rows)} features", _table(rows)]
        return "\n".join(lines)

    def terms(self) -> list[Written]:
        """What makes up the interaction path's output."""
        return [self.all_pairs, *([] if self.all_squares is None else [self.all_squares]), *self.biases]

    def rows(self) -> list[dict[str, Any]]:
        """Every line of these tables as numbers; of a term that is no pair the measured effects are None."""
        terms = [("path", one) for one in self.terms()]
        terms += [("pair", pair.written) for pair in self.pairs] + [("feature", one) for one in self.features]
        measured = {id(pair.written): pair for pair in self.pairs}
        return [
            {"position": self.position, "token": self.token, "target": self.target, "kind": kind, "term": one.name}
            | {name: getattr(one, name) for name in ("norm", "direct", "gradient")}
            | {name: getattr(measured.get(id(one)), name, None) for name in ("frozen", "free", "flipped")}
            | {name: getattr(one, name) for name in ("promotes", "suppresses")}
            for kind, one in terms
        ]


def _table(rows: list[dict[str, str]]) -> str:
    if not rows:
        return "    none"
    text = pd.DataFrame(rows).set_index("").to_string(index_names=False)
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines() if line.strip())


def _row(one: Written, **measured: str) -> dict[str, str]:
    row = {"": one.name, "norm": f"{one.norm:.3g}", "gradient": f"{one.gradient:+.4f}", **measured}
    if one.direct is None:
        return row
    named = {"promotes": " ".join(map(repr, one.promotes)), "suppresses": " ".join(map(repr, one.suppresses))}
    return {"": row.pop(""), "norm": row.pop("norm"), "direct": f"{one.direct:+.4f}", **row, **named}


def _pair_row(pair: PairEffect) -> dict[str, str]:
    measured = {"frozen": f"{pair.frozen:+.4f}", "free": f"{pair.free:+.4f}", "gates flipped": f"{pair.flipped:.0%}"}
    return _row(pair.written, **measured)


@dataclass(frozen=True, kw_only=True)
class Attribution(SavedResult):
    """What `sae-nfm attribute` found."""

    kind: ClassVar[str] = "attribute/1"

    sae: str
    hook_name: str
    tokens: tuple[TokenAttribution, ...]
    corpus: CorpusAttribution | None
    """Pairs over held-out text."""
    provenance: dict[str, Any]
    """Configuration, versions, sha256 of the tokens, command."""

    def words(self) -> str:
        """For the terminal."""
        head = f"{self.sae} at {self.hook_name}"
        if self.corpus is not None:
            sampled = sampled_text(self.provenance.get("model_name"), self.provenance["config"].get("held_out"))
            told = [f"{head}\nText: {text_of(self.provenance)}", self.corpus.words()]
            return "\n\n".join([*told, *([f"* {sampled}"] if sampled else [])])
        return "\n\n".join([head, *(token.words() for token in self.tokens), LEGEND])
