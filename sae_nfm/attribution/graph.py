"""The strongest pairs of a corpus as a graph of features, and where to draw these: distances on paper follow those along edges.

Places are by stress majorisation (scikit-learn's SMACOF) of the square roots of the numbers of edges between features, the best
of several seeded starts: one graph and one seed give one drawing. The root makes room where many features are close. Parts that
are not connected with the largest one stand below it, in boxes of one size.

Source: Gansner, Koren & North 2004, Graph Drawing by Stress Majorization (GD).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, shortest_path
from sklearn.manifold import smacof

from sae_nfm.architectures import PathWeights
from sae_nfm.attribution.pair_table import Floats, PairSums, weight_strengths
from sae_nfm.attribution.results import FeatureNode, InteractionGraph, PairEdge, Point

STARTS = 16
"""Starts, of which the one with the least stress counts."""

STRIP, BOXES, MARGIN = 0.14, 6, 0.2
"""Height of a row of smaller parts, how many stand in it, and the empty part of each one's box."""


def interaction_graph(sums: PairSums, weights: PathWeights, *, n: int, directed: bool = False) -> InteractionGraph:
    """The n pairs of most energy over a corpus as a graph.

    `directed` says whether the corpus had a target or direction, so that effects mean something.
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


def graph_layout(edges: Sequence[PairEdge], *, seed: int = 0) -> dict[int, Point]:
    """Place of every feature that has an edge, in the unit square; at least one edge."""
    features, ends = np.unique([(edge.first, edge.second) for edge in edges], return_inverse=True)
    ends, n = ends.reshape(-1, 2), len(features)
    adjacency = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(n, n)).tocsr()
    _, part = connected_components(adjacency, directed=False)
    parts = np.argsort(-np.bincount(part), kind="stable")
    rows = -(-(len(parts) - 1) // BOXES)
    strips = min(0.5, STRIP * rows)
    places = np.zeros((n, 2))
    for number, one in enumerate(parts):
        members = np.flatnonzero(part == one)
        whole = np.array([0.0, strips]), np.array([1.0, 1.0 - strips])
        low, size = _box(number - 1, rows, strips) if number else whole
        places[members] = low + size * _part(adjacency[members][:, members], seed)
    return {int(feature): (float(x), float(y)) for feature, (x, y) in zip(features, np.round(places, 4), strict=True)}


def _box(number: int, rows: int, strips: float) -> tuple[Floats, Floats]:
    """Lower left corner and size of a smaller part's box, less its margin."""
    row, column = divmod(number, BOXES)
    size = np.array([1 / BOXES, strips / rows])
    corner = size * np.array([column, rows - 1 - row])
    return corner + size * MARGIN / 2, size * (1 - MARGIN)


def _part(adjacency: csr_array, seed: int) -> Floats:
    """A connected part in the unit square; a feature that has an edge to itself alone, its square, in the middle."""
    hops: Any = shortest_path(adjacency, directed=False, unweighted=True)
    if len(hops) == 1:
        return np.full((1, 2), 0.5)
    settings: Any = {"n_init": STARTS, "max_iter": 500, "eps": 1e-6, "random_state": seed, "n_jobs": 1}
    # normalized_stress: of metric scaling, the stress as it is
    places: Any = smacof(np.sqrt(hops), n_components=2, normalized_stress="auto", **settings)[0]
    low, high = places.min(0), places.max(0)
    return (places - low) / np.maximum(high - low, 1e-9)
