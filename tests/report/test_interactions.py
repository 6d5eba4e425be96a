"""The section on interactions: a layout that repeats, pairs, correlations beside their null, effects of single pairs."""

from dataclasses import replace

import pytest
from pair_edges import EDGES
from report_inputs import RUN, figures_by_name, traces
from report_runs import run_of

from sae_nfm.attribution.results import (
    Attribution,
    Context,
    CorpusAttribution,
    Correlation,
    FeatureNode,
    InteractionGraph,
    PairControls,
    PairEffect,
    TokenAttribution,
    Written,
)
from sae_nfm.report.blocks import Prose, Table
from sae_nfm.report.chapters import interactions as interactions_chapter
from sae_nfm.report.page import section_html

FREQUENCY = "co-activation frequency"
PLACES = {1: (0.0, 0.2), 2: (0.5, 0.9), 3: (1.0, 1.0), 4: (0.2, 0.4), 7: (0.1, 0.1), 8: (0.2, 0.1)}


def written(name, direct, gradient):
    return Written(name=name, norm=0.5, direct=direct, gradient=gradient, promotes=(" a", "b"), suppresses=("<c>",))


def corpus(**changes):
    found = CorpusAttribution(
        tokens=100,
        pairs=50,
        firings=500,
        complete=True,
        slack_share=0.0,
        target="the logit of ' x'",
        places=PLACES,
        graph=InteractionGraph(
            nodes=tuple(FeatureNode(feature=f, tokens=5 * f, mean_activation=1.0) for f in (1, 2, 3, 4, 7, 8)),
            edges=EDGES,
        ),
        contexts=((Context(row=0, position=3, norm=1.0, effect=None, text="one[[ two]]\n three"),), ()),
        controls=PairControls(
            tokens=100,
            pairs=40,
            min_tokens=5,
            weights_against_tokens=(),
            cooccurrence=(
                Correlation(
                    measure="total",
                    against=FREQUENCY,
                    pearson=0.3,
                    spearman=0.45,
                    null_pearson=(0.1,),
                    null_spearman=(0.53, 0.5),
                ),
                Correlation(measure="covariance", against=FREQUENCY, pearson=0.3, spearman=0.2),
            ),
        ),
    )
    return replace(found, **changes)


TOKEN = TokenAttribution(
    position=3,
    token=" two",
    target="the logit of ' x'",
    value=1.5,
    path_norm=1.0,
    gates_open=0.5,
    pairs_firing=6,
    sum_error=0.0,
    all_pairs=written("all pairs", 0.1, 0.1),
    biases=(),
    pairs=(
        PairEffect(
            first=1,
            second=2,
            product=2.0,
            written=written("1 x 2", None, -0.25),
            frozen=-0.5,
            free=-0.75,
            flipped=0.125,
            prediction_error=0.0,
        ),
    ),
    features=(),
)


def attribution(**changes):
    return Attribution(**({"sae": "s", "hook_name": "h", "tokens": (), "corpus": None, "provenance": {}} | changes))


@pytest.fixture(scope="module")
def of_corpus():
    return interactions_chapter.section(run_of(RUN, attribution(corpus=corpus())))


def test_files_of_0_1_0_have_no_graph():
    section = interactions_chapter.section(run_of(RUN, attribution(corpus=corpus(places=None))))
    assert section is not None
    assert "graph-0" not in figures_by_name(section)
    assert any("no layout" in line for block in section.blocks if isinstance(block, Prose) for line in block.lines)


def test_edges_are_lines_between_their_features(of_corpus):
    drawn = figures_by_name(of_corpus)["graph-0"]
    lines = {(trace.name, tuple(trace.x), tuple(trace.y)): trace for trace in drawn.plot.data if trace.mode == "lines"}
    assert len(lines) == 4
    for one in EDGES:
        (x0, y0), (x1, y1) = PLACES[one.first], PLACES[one.second]
        sign = "raises the target" if (one.effect_mean or 0) > 0 else "lowers the target"
        width = lines[sign, (x0, x1), (y0, y1)].line.width
        assert width == pytest.approx(max(1.0, 9 * (one.energy_share / 0.4) ** 0.5), abs=0.005)  # rounded to 0.01
    assert drawn.data["energy_share"].tolist() == [0.4, 0.2, 0.1, 0.05]


def test_correlations_stand_before_what_permuted_embeddings_give(of_corpus):
    drawn = figures_by_name(of_corpus)["controls-0"]
    assert list(traces(drawn)["this SAE"].x) == [0.45]
    assert list(traces(drawn)["by chance"].x) == [0.5, 0.53, None]
    assert drawn.data[["chance_low", "chance_high"]].to_numpy().tolist() == [[0.5, 0.53]]


def test_what_is_said_of_a_corpus(of_corpus):
    assert of_corpus is not None
    assert of_corpus.verdicts == [
        "50 pairs fire on 100 tokens; the strongest, 1 x 2, has 40.0% of their energy.",
        "Energy of pairs correlates at +0.45 with co-activation frequency; with permuted embeddings at +0.50 to +0.53.",
    ]
    (table,) = (block for block in of_corpus.blocks if isinstance(block, Table))
    assert [row[0] for row in table.rows] == ["1 x 2", "2 x 3"]
    assert table.rows[0][-1] == "one[[ two]] three"


def test_predicted_and_measured_effects_of_a_pair():
    section = interactions_chapter.section(run_of(RUN, attribution(tokens=(TOKEN,))))
    drawn = figures_by_name(section)["effects-0-0"]
    found = {name: list(trace.x) for name, trace in traces(drawn).items()}
    assert found == {"gradient": [-0.25], "frozen": [-0.5], "free": [-0.75]}  # there is no direct path here
    assert section is not None
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    assert table.rows[0] == ("1 x 2", "0.5", "", "-0.2500", "-0.5000", "-0.7500", "12%", "' a' 'b'", "'<c>'")


def test_nothing_fired():
    empty = corpus(graph=InteractionGraph(nodes=(), edges=()), contexts=())
    section = interactions_chapter.section(run_of(RUN, attribution(corpus=empty)))
    assert figures_by_name(section) == {}


def test_made_twice_it_is_the_same():
    run = run_of(RUN, attribution(corpus=corpus(), tokens=(TOKEN,)))
    one, other = (interactions_chapter.section(run) for _ in range(2))
    assert one is not None
    assert other is not None
    assert section_html(one) == section_html(other)
    assert interactions_chapter.section(run_of(RUN)) is None
