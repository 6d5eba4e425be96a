"""The graph as sums have it; both files read back, and read by networkx."""

import json

import networkx as nx
import pytest
import torch
from pair_inputs import pair_sae, x

from sae_nfm.architectures.nfm_paths import PathWeights
from sae_nfm.attribution.graph import interaction_graph
from sae_nfm.attribution.pair_table import TokenBatch, summed
from sae_nfm.attribution.pairs import token_reads
from sae_nfm.attribution.results import InteractionGraph


def random_graph(*, directed: bool = False) -> InteractionGraph:
    sae, tokens = pair_sae(), torch.arange(50)
    weights = PathWeights.of(sae)
    sums = summed([TokenBatch(reads=token_reads(sae, x(50)), row=tokens, position=tokens)], weights)
    return interaction_graph(sums, weights, n=7, directed=directed)


def test_figures_are_those_of_the_sums():
    graph, (_, weights), tokens = random_graph(), (None, PathWeights.of(pair_sae())), torch.arange(50)
    sums = summed([TokenBatch(reads=token_reads(pair_sae(), x(50)), row=tokens, position=tokens)], weights)
    strongest, edge = sums.table.iloc[0], graph.edges[0]
    assert (edge.first, edge.second) == divmod(sums.table.index[0], 32)
    assert (edge.tokens, edge.frequency, edge.effect_mean) == (strongest.tokens, strongest.tokens / 50, None)
    assert edge.norm_mean == pytest.approx(strongest.norm / strongest.tokens)
    assert edge.energy_share == pytest.approx(strongest.energy / sums.energy)
    assert len(graph.edges) == 7
    assert {node.feature for node in graph.nodes} == {end for edge in graph.edges for end in (edge.first, edge.second)}
    node = graph.nodes[0]
    assert node.tokens == sums.feature_tokens[node.feature]
    assert node.mean_activation == pytest.approx(float(sums.feature_sum[node.feature] / node.tokens))


@pytest.mark.parametrize("suffix", ["graphml", "json"])
@pytest.mark.parametrize("directed", [False, True])
def test_a_saved_graph_is_the_same_when_read(tmp_path, suffix, directed):
    graph = random_graph(directed=directed)
    graph.save(tmp_path / f"graph.{suffix}")
    assert InteractionGraph.load(tmp_path / f"graph.{suffix}") == graph
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"graph.{suffix}", f"graph.{suffix}.sha256"]


def test_networkx_reads_both(tmp_path):
    graph = random_graph(directed=True)
    for suffix in ("graphml", "json"):
        graph.save(tmp_path / f"graph.{suffix}")
    for found, name in (
        (nx.read_graphml(tmp_path / "graph.graphml"), "n{}".format),
        (nx.node_link_graph(json.loads((tmp_path / "graph.json").read_text()), edges="edges"), int),
    ):
        assert not found.is_directed()
        assert (found.number_of_nodes(), found.number_of_edges()) == (len(graph.nodes), len(graph.edges))
        edge = graph.edges[2]
        figures = found.edges[name(edge.first), name(edge.second)]
        assert {field: figures[field] for field in vars(edge)} == vars(edge)
        assert found.nodes[name(graph.nodes[0].feature)]["mean_activation"] == graph.nodes[0].mean_activation


def test_an_empty_graph_is_one(tmp_path):
    graph = InteractionGraph(nodes=(), edges=())
    graph.save(tmp_path / "graph.graphml")
    assert InteractionGraph.load(tmp_path / "graph.graphml") == graph


def test_other_files_are_refused(tmp_path):
    graph = InteractionGraph(nodes=(), edges=())
    with pytest.raises(ValueError, match=r"'graph\.gml'.*\.graphml.*\.json"):
        graph.save("graph.gml")
    for name, text in (("a.json", "{}"), ("b.json", "[1"), ("c.graphml", "<graph/>"), ("d.graphml", "<a>")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"\b{name}\b.*\binteraction graph\b"):
            InteractionGraph.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        InteractionGraph.load(tmp_path / "none.json")
