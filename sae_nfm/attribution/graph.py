"""Features and the pairs between them as a graph: GraphML for graph tools, JSON for programs.

A node is a feature, an edge a pair with the figures of `pair_corpus`. The JSON is the node-link form that networkx
(`node_link_graph(content, edges="edges")`) and d3 read; the GraphML is what Gephi, Cytoscape and networkx read.

Source: Brandes et al. 2002, GraphML Progress Report.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from sae_nfm.architectures import PathWeights
from sae_nfm.attribution.pair_table import PairSums
from sae_nfm.attribution.weight_only import weight_strengths
from sae_nfm.common import whole, write_json

NAMESPACE = "http://graphml.graphdrawing.org/xmlns"


@dataclass(frozen=True, kw_only=True)
class FeatureNode:
    """A feature."""

    feature: int
    """Its number."""
    tokens: int
    """Tokens on which the interaction path reads it."""
    mean_activation: float
    """Mean activation on those tokens."""


@dataclass(frozen=True, kw_only=True)
class PairEdge:
    """A pair of features over a corpus."""

    first: int
    """The lower feature."""
    second: int
    """The higher feature."""
    tokens: int
    """Tokens on which the pair fires."""
    frequency: float
    """Their share of all tokens."""
    norm_mean: float
    """Mean ||o_ij|| where it fires."""
    norm_max: float
    """Largest ||o_ij||."""
    energy_share: float
    """Its part of the summed energy ||o_ij||^2 of all pairs."""
    effect_mean: float | None
    """Mean effect on the target where it fires; None without a target."""
    weight: float
    """Weight-only strength at average gates and activations (`pair_weights`, "scaled")."""


@dataclass(frozen=True, kw_only=True)
class InteractionGraph:
    """Features and pairs, in order: nodes by number, edges as given."""

    nodes: tuple[FeatureNode, ...]
    """Features that have an edge."""
    edges: tuple[PairEdge, ...]
    """Pairs."""

    def save(self, path: str | Path) -> None:
        """Write as .graphml or .json, under a temporary name first.

        Raises:
            ValueError: for another suffix.
        """
        _check_suffix(path)
        if Path(path).suffix == ".json":
            nodes = [{"id": node.feature, **asdict(node)} for node in self.nodes]
            links = [{"source": edge.first, "target": edge.second, **asdict(edge)} for edge in self.edges]
            write_json(path, {"directed": False, "multigraph": False, "graph": {}, "nodes": nodes, "edges": links})
            return
        with whole(path) as partial:
            ElementTree.ElementTree(self._graphml()).write(partial, encoding="utf-8", xml_declaration=True)

    @classmethod
    def load(cls, path: str | Path) -> "InteractionGraph":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: for another suffix, or a file of another kind.
        """
        _check_suffix(path)
        try:
            nodes, edges = _read_json(Path(path)) if Path(path).suffix == ".json" else _read_graphml(Path(path))
            return cls(
                nodes=tuple(FeatureNode(**_typed(FeatureNode, node)) for node in nodes),
                edges=tuple(PairEdge(**_typed(PairEdge, edge)) for edge in edges),
            )
        except (ValueError, KeyError, TypeError, AttributeError, ElementTree.ParseError) as error:
            raise ValueError(
                f"{path} is not an interaction graph ({error}); write one with `sae-nfm attribute`"
            ) from error

    def _graphml(self) -> ElementTree.Element:
        root = ElementTree.Element("graphml", xmlns=NAMESPACE)
        for kind, of in (("node", FeatureNode), ("edge", PairEdge)):
            for name, type_ in _types(of).items():
                attributes = {"id": f"{kind}_{name}", "for": kind, "attr.name": name}
                ElementTree.SubElement(root, "key", attributes | {"attr.type": "long" if type_ is int else "double"})
        graph = ElementTree.SubElement(root, "graph", id="interactions", edgedefault="undirected")
        for node in self.nodes:
            _add_data(ElementTree.SubElement(graph, "node", id=f"n{node.feature}"), "node", node)
        for edge in self.edges:
            ends = {"source": f"n{edge.first}", "target": f"n{edge.second}"}
            _add_data(ElementTree.SubElement(graph, "edge", ends), "edge", edge)
        ElementTree.indent(root)
        return root


def interaction_graph(sums: PairSums, weights: PathWeights, *, n: int, directed: bool = False) -> InteractionGraph:
    """The pairs of most energy over a corpus as a graph.

    Args:
        sums: of the corpus.
        weights: of the interaction path.
        n: pairs, at most.
        directed: whether the corpus had a target or direction, so that effects mean something.
    """
    table: Any = sums.table.head(n)
    first, second = sums.features(table)
    strengths = weight_strengths(weights, sums, table)["scaled"]
    edges = tuple(
        PairEdge(
            first=int(i),
            second=int(j),
            tokens=int(row.tokens),
            frequency=float(row.tokens / sums.tokens),
            norm_mean=float(row.norm / row.tokens),
            norm_max=float(row.norm_max),
            energy_share=float(row.energy / sums.energy) if sums.energy else 0.0,
            effect_mean=float(row.effect / row.tokens) if directed else None,
            weight=float(weight),
        )
        for i, j, weight, row in zip(first, second, strengths, table.itertuples(), strict=True)
    )
    nodes = tuple(
        FeatureNode(
            feature=int(feature),
            tokens=int(sums.feature_tokens[feature]),
            mean_activation=float(sums.feature_sum[feature] / sums.feature_tokens[feature]),
        )
        for feature in np.unique(np.concatenate([first, second]))
    )
    return InteractionGraph(nodes=nodes, edges=edges)


def _add_data(element: ElementTree.Element, kind: str, figures: FeatureNode | PairEdge) -> None:
    for name, value in asdict(figures).items():
        if value is not None:
            ElementTree.SubElement(element, "data", key=f"{kind}_{name}").text = repr(value)


def _read_json(path: Path) -> tuple[list[Any], list[Any]]:
    content = json.loads(path.read_text())
    return content["nodes"], content["edges"]


def _read_graphml(path: Path) -> tuple[list[Any], list[Any]]:
    root = ElementTree.parse(path).getroot()

    def figures(kind: str) -> list[dict[str, str | None]]:
        return [
            {str(data.get("key")).removeprefix(f"{kind}_"): data.text for data in element.iter(f"{{{NAMESPACE}}}data")}
            for element in root.iter(f"{{{NAMESPACE}}}{kind}")
        ]

    if root.tag != f"{{{NAMESPACE}}}graphml":
        raise ValueError(f"its root is {root.tag}")
    return figures("node"), figures("edge")


def _typed(of: type, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a class, each as a number of its type; None where it is left out and may be."""
    found = {name: figures[name] if name != "effect_mean" else figures.get(name) for name in _types(of)}
    return {name: None if value is None else _types(of)[name](value) for name, value in found.items()}


def _types(of: type) -> dict[str, type]:
    """Whether each field is an int or a float."""
    return {field.name: int if field.type is int else float for field in fields(of)}


def _check_suffix(path: str | Path) -> None:
    if Path(path).suffix not in (".graphml", ".json"):
        raise ValueError(f"the graph {str(path)!r} ends in {Path(path).suffix!r}; give a name in .graphml or .json")
