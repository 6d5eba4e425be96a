"""`sae-nfm attribute` on the packaged SAE: its figures are those of the functions, and what cannot work is said at once."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sae_nfm
from sae_nfm import demo
from sae_nfm.architectures.nfm_paths import PathWeights
from sae_nfm.attribution.pair_effects import run_prompt
from sae_nfm.attribution.pairs import TokenPairs, norms
from sae_nfm.attribution.results import Attribution, InteractionGraph
from sae_nfm.attribution.run import AttributeConfig, attribute
from sae_nfm.loading.saelens import load_sae

PROMPT = "The film was not as good as the book"
SAE = "sae-nfm-demo:blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def loaded():
    """The embedded model and the packaged SAE on it."""
    return demo.load_model(), load_sae(SAE)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> AttributeConfig:
    return AttributeConfig(
        prompt=PROMPT, token=("-1", " good"), logit=" as", top=3, save=str(tmp_path_factory.mktemp("a") / "a.json")
    )


@pytest.fixture(scope="module")
def found(config) -> Attribution:
    return attribute(config, command="sae-nfm attribute")


def test_one_call_gives_the_numbers_that_the_command_prints(loaded, found):
    model, sae = loaded
    table = sae_nfm.attribute(sae, model, PROMPT, token=("-1", " good"), logit=" as", top=3)
    first = found.tokens[0]
    pairs = table[(table["kind"] == "pair") & (table["position"] == first.position)]
    for row, pair in zip(pairs.itertuples(), first.pairs, strict=True):
        assert (row.term, row.norm, row.direct) == (pair.written.name, pair.written.norm, pair.written.direct)
        assert (row.frozen, row.free, row.flipped) == (pair.frozen, pair.free, pair.flipped)
    assert [len(table[table["position"] == one.position]) for one in found.tokens] == [3 + 3 + 3] * 2
    assert list(table["kind"].unique()) == ["path", "pair", "feature"]
    assert table[table["kind"] != "pair"]["free"].isna().all()
    with pytest.raises(ValueError, match="no token 99"):
        sae_nfm.attribute(sae, model, PROMPT, token="99")


def test_the_old_module_of_that_name_is_no_obstacle(loaded):
    model, sae = loaded
    sys.modules.pop("sae_nfm.attribute", None)  # of a test before this one
    with pytest.warns(FutureWarning, match=r"attribute is sae_nfm\.attribution"):
        old = importlib.import_module("sae_nfm.attribute")
    assert old.AttributeConfig is AttributeConfig
    assert len(sae_nfm.attribute(sae, model, "The film", top=1)) == 5
    sys.modules.pop("sae_nfm.attribute")
    del sae_nfm.attribute


def test_the_strongest_pairs_of_a_token_are_those_of_largest_norm(loaded, found):
    model, sae = loaded
    run = run_prompt(model, sae, model.to_tokens(PROMPT)[0])
    last, good = found.tokens
    assert (last.position, last.token, good.token) == (9, " book", " good")
    reads = run.reads.of(torch.tensor([9]))
    pairs = TokenPairs.of(reads.read)
    values, places = norms(pairs, reads.gates, PathWeights.of(sae))[0].topk(3)
    # float32: sums in another order
    assert [pair.written.norm for pair in last.pairs] == pytest.approx(values.tolist(), rel=1e-5)
    assert [(pair.first, pair.second) for pair in last.pairs] == [
        (int(pairs.first[0, i]), int(pairs.second[0, i])) for i in places
    ]
    assert last.value == pytest.approx(
        float(run.logits[9, model.tokenizer.encode(" as", add_special_tokens=False)[0]] - run.logits[9].mean()),
        abs=1e-4,
    )


def test_in_float32_the_terms_add_up_and_predictions_hold(found):
    """float32 sums of 496 pairs of sizes up to the path's: rounding is a few 1e-7, measured up to 4e-6 for a single pair."""
    for token in found.tokens:
        assert (token.pairs_firing, len(token.pairs), len(token.features)) == (496, 3, 3)
        assert token.sum_error < 1e-5
        assert all(pair.prediction_error < 1e-4 for pair in token.pairs)
        assert all(abs(pair.frozen - pair.written.gradient) < 0.02 for pair in token.pairs)


def test_the_words_and_the_file_have_the_figures(config, found):
    words = found.words()
    pair = found.tokens[0].pairs[0]
    assert f"{pair.first} x {pair.second}" in words
    assert f"{pair.free:+.4f}" in words
    assert "effects on the logit of ' as' less the mean logit" in words
    content = json.loads(Path(config.save).read_text())
    assert content["tokens"][0]["pairs"][0]["frozen"] == pair.frozen
    assert content["provenance"]["command"] == "sae-nfm attribute"


def test_ranked_by_effect_the_first_pair_has_the_largest(config, found):
    for kind in ("direct", "gradient"):
        (token,) = attribute(replace(config, token=("-1",), rank_by=kind, against=" a", save=None)).tokens
        effects = [abs(getattr(pair.written, kind)) for pair in token.pairs]
        assert effects == sorted(effects, reverse=True)
        assert token.target == "the logit of ' as' less that of ' a'"


def test_without_a_logit_the_likeliest_next_token_is_the_target(loaded):
    tokens = attribute(AttributeConfig(prompt="The film", token=("all",), top=1)).tokens
    assert [token.position for token in tokens] == [1, 2]
    model, sae = loaded
    run = run_prompt(model, sae, model.to_tokens("The film")[0])
    assert repr(model.tokenizer.decode([int(run.logits[2].argmax())])) in tokens[1].target


def test_a_corpus(tmp_path):
    config = AttributeConfig(
        corpus=True, n_tokens=512, control_tokens=200, n_permutations=1, top=2, graph_pairs=20, logit=" film",
        capacity=30_000, graph=str(tmp_path / "g.graphml"), save=str(tmp_path / "c.json"),
    )  # fmt: skip
    found = attribute(config).corpus
    # 2 rows of 255 counted tokens, one of them a BOS within its row
    assert (found.tokens, found.firings, len(found.contexts)) == (509, 509 * 496, 2)
    assert not found.complete
    assert InteractionGraph.load(config.graph) == found.graph
    edge = found.graph.edges[0]
    assert found.contexts[0][0].norm == pytest.approx(edge.norm_max)
    words = found.words()
    assert f"{edge.first} x {edge.second}" in words
    assert "a pair that was dropped has at most" in words
    assert "Is it co-occurrence?" in words
    assert json.loads(Path(config.save).read_text())["corpus"]["graph"]["edges"][0]["first"] == edge.first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"\bprompt\b.*--corpus"),
        ({"prompt": "a", "corpus": True}, r"\bprompt\b.*--corpus"),
        ({"prompt": "a", "against": " b"}, r"\bagainst\b.*' b'.*--logit"),
        ({"prompt": "a", "graph": "g.json"}, r"\bgraph\b.*--corpus"),
        ({"corpus": True, "graph": "g.gml"}, r"\bgraph\b.*'g\.gml'.*\.graphml.*\.json"),
        ({"prompt": "a", "top": 0}, r"\btop\b.*\b0\b"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        AttributeConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": ("12",)}, r"\btoken 12\b.*\b10 tokens\b.*\b9\b"),
        ({"token": (" bad",)}, r"\btoken ' bad'.*'<\|endoftext\|>', 'The', ' film'"),
        ({"token": ("0",)}, r"\btoken 0 of 10\b"),
        ({"logit": "goodness me"}, r"'goodness me'.* \d tokens\b"),
        ({"prompt": ""}, r"\bprompt\b.*\bempty\b"),
        ({"sae": "nowhere"}, r"'nowhere'"),
    ],
)
def test_what_the_prompt_does_not_have_is_said(config, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        attribute(replace(config, save=None, **options))
