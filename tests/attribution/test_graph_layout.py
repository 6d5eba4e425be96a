"""Where features of a graph are drawn."""

import numpy as np
from pair_edges import EDGES, edge

from sae_nfm.attribution.graph import graph_layout


def test_the_layout_repeats_and_lies_in_the_unit_square():
    places = graph_layout(EDGES)
    assert places == graph_layout(EDGES)
    assert sorted(places) == [1, 2, 3, 4, 7, 8]
    points = np.array(list(places.values()))
    assert points.min() >= 0
    assert points.max() <= 1
    assert len({tuple(point) for point in points}) == 6


def test_neighbours_stand_closer_than_others():
    star = [edge(0, i) for i in range(1, 6)] + [edge(10, i) for i in range(11, 16)] + [edge(0, 10)]
    places = {feature: np.array(point) for feature, point in graph_layout(star).items()}

    def apart(pairs):
        return np.mean([np.linalg.norm(places[i] - places[j]) for i, j in pairs])

    assert 2 * apart([(one.first, one.second) for one in star]) < apart(
        (i, j) for i in range(1, 6) for j in range(11, 16)
    )


def test_parts_that_are_not_connected_do_not_overlap():
    places = graph_layout(EDGES)
    assert max(places[7][1], places[8][1]) < min(places[feature][1] for feature in (1, 2, 3, 4))


def test_the_square_of_a_feature_is_laid_out(recwarn):
    """A part of one feature, and an edge to itself within another."""
    places = graph_layout([*EDGES, edge(20, 20), edge(1, 1)])
    assert set(places) == {1, 2, 3, 4, 7, 8, 20}
    assert np.isfinite(list(places.values())).all()
    assert not recwarn.list


def test_one_pair_is_laid_out():
    assert set(graph_layout([edge(3, 9)])) == {3, 9}
