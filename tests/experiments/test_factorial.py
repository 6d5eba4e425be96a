import dataclasses
import functools
import json

import numpy as np
import pandas as pd
import planted_factorial as planted
import pytest
import torch
from sae_lens import SAE
from scipy import stats
from simulated_evidence import quick_collection
from simulated_factorial import TRIALS, rejections_allowed

from sae_nfm import demo
from sae_nfm.analysis.path_contributions import read_activations
from sae_nfm.architectures.nfm_paths import PathWeights
from sae_nfm.attribution.pairs import TokenPairs, token_reads, written
from sae_nfm.experiments.factorial.clamps import clamped, spliced, unit_of
from sae_nfm.experiments.factorial.measure import (
    SCALES,
    Candidates,
    WordScorer,
    feature_candidates,
    pair_candidates,
    tokenized,
)
from sae_nfm.experiments.factorial.run import FactorialConfig, factorial, run_factorial
from sae_nfm.experiments.factorial.stimuli import load_stimuli
from sae_nfm.interventions.edits import PairEdit
from sae_nfm.interventions.intervene import Splice
from sae_nfm.models.splicing import counted_tokens
from sae_nfm.stats.anova_2x2 import SIGNS, by_bucket, effect_t, word_pattern
from sae_nfm.stats.permutation import halves, select

PER_CELL = 20
CONFIG = FactorialConfig(clamps=(-4.0, 4.0), absolute=(1.0,), n_permutations=39)


@pytest.fixture(scope="module", autouse=True)
def collections_are_quick():
    with quick_collection():
        yield


@pytest.fixture(scope="module")
def texts_and_model():
    return planted.stimuli(PER_CELL), planted.model(PER_CELL)


@pytest.fixture(scope="module")
def experiments(texts_and_model):
    """The experiment on the model with the planted pair, and on the one without at fewer clamps."""
    stimuli, model = texts_and_model
    configs = {True: CONFIG, False: dataclasses.replace(CONFIG, clamps=(4.0,))}
    return {has: factorial(model, planted.sae(planted=has), stimuli, cfg) for has, cfg in configs.items()}


def test_the_planted_pair_is_found(experiments):
    result, _ = experiments[True]
    first, second, pair = result.selected
    assert [one.unit.index for one in result.selected] == [(0,), (1,), (0, 1)]
    assert pair.test.selection.p_value == 1 / 40
    assert all(one.test.held_out.p_value < 1e-3 and one.null.p_value == 1 / 40 for one in (first, second, pair))
    clamps = [arm for arm in result.arms if arm.role == "pair (interaction)"]
    assert len(clamps) == 3
    for arm in clamps:
        assert arm.tests.items_p_adjusted is not None
        assert arm.tests.items_p_adjusted < 1e-3
        assert arm.tests.permuted_p == arm.tests.flipped_p == 1 / 40
    words = result.words()
    assert "pair (interaction): 0x1" in words
    assert "clamps show an interaction (Holm, 5 %)" in words


def test_measured_changes_are_those_predicted(experiments):
    """Clamping the pair at m puts m - f_0 f_1 times its gain on the words of cell 0, and nothing on the others."""
    result, rows = experiments[True]
    f, unit = planted.activations(PER_CELL).numpy(), result.selected[2].unit
    product = f[:, 0] * f[:, 1]
    assert unit.typical == pytest.approx(product.mean(), rel=1e-5)  # float32
    for arm in result.arms:
        if arm.role != "pair (interaction)":
            continue
        own = rows[rows["arm"] == arm.name]
        target = 1.0 if arm.times is None else arm.times * unit.typical
        gate = np.maximum(target, 0.0)  # the hidden code is the product itself
        expected = planted.GAIN * (gate - product[own["item"]]) * (own["word_cell"] == 0)
        assert np.allclose(own["logit_change"], expected, atol=1e-5)
        assert np.allclose(own["log_prob_change"], expected, atol=1e-3)  # the other token's share is not quite 1
        tested = np.unique(own["item"])
        means = [product[tested[tested // PER_CELL == cell]].mean() for cell in range(4)]
        contrast = -planted.GAIN / 4 * (SIGNS["interaction"] @ means)
        assert arm.tests.items["logit"].contrast == pytest.approx(contrast, abs=1e-5)


def test_without_the_pair_nothing_is_found(experiments):
    result, _ = experiments[False]
    assert not any((arm.tests.items_p_adjusted or 0) < 0.05 for arm in result.arms if not arm.control)
    assert "No clamp shows an interaction: of 8 tests none is left by Holm's correction." in result.words()


def test_controls_and_the_linear_path(experiments):
    result, rows = experiments[True]
    roles = {arm.role: arm for arm in result.arms}
    assert {arm.role for arm in result.arms if arm.control} == {
        "match of factor 0", "match of factor 1", "match of pair", "insensitive feature", "insensitive pair",
        "both, linear path only",
    }  # fmt: skip
    assert not set(roles["match of pair"].units[0].index) & {0, 1}
    through_linear = rows[rows["arm"].str.startswith("both, linear path only")]
    assert np.abs(through_linear["logit_change"]).max() < 1e-5  # its weights are zero here
    assert len({arm.name for arm in result.arms}) == len(result.arms)


def test_holm_over_clamps_and_units(experiments):
    result, _ = experiments[False]
    family = [arm.tests for arm in result.arms if not arm.control]
    p = np.array([tests.items["log_prob"].p_value for tests in family])
    order = np.argsort(p)
    stepped = np.minimum(1, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    assert [family[i].items_p_adjusted for i in order] == pytest.approx(list(stepped))


def test_cells_are_those_of_the_changes(experiments):
    result, rows = experiments[True]
    for arm in result.arms[:3]:
        own = rows[rows["arm"] == arm.name]
        words = own.groupby(["item", "word_cell"])["log_prob_change"].mean().unstack()
        outcome = (words[0] - words[1] - words[2] + words[3]) / 4
        means = outcome.groupby(own.groupby("item")["item_cell"].first()).mean()
        assert [cell.estimate for cell in arm.cells] == pytest.approx(list(means), rel=1e-9, abs=1e-12)
        assert [cell.estimate for cell in arm.cells] == pytest.approx(arm.tests.items["log_prob"].cell_means, rel=1e-12)
        assert arm.contrast.estimate == arm.tests.items["log_prob"].contrast


def test_result_as_json(experiments, tmp_path):
    result, _ = experiments[True]
    result.save(tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["arms"][0]["tests"]["items"].keys() == set(SCALES)
    assert content == json.loads(json.dumps({"kind": result.kind} | dataclasses.asdict(result)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.json.sha256"]


SENTENCES = 300
"""Of each cell, of which 40 are drawn in a trial."""


@pytest.fixture(scope="module")
def many_texts():
    return planted.stimuli(SENTENCES), planted.model(SENTENCES)


def rejections(many_texts, trials: int, *, has_pair: bool) -> int:
    """Pairs selected by what they write on one half of 160 stimuli, their clamp tested on the other; outcomes are cached."""
    texts, model = many_texts
    sae = planted.sae(planted=has_pair)
    tokens, word_cells, cells = tokenized(model, texts), texts.cell_of_word, texts.cell_of_sentence
    pairs = pair_candidates(model, sae, tokens.prompts, "mean")
    assert pairs is not None
    scorer = WordScorer(model, tokens.prompts, tokens.words, batch_rows=1_200)
    baseline = scorer.scores(Splice(sae=sae))

    @functools.cache
    def outcome(column: int) -> np.ndarray:
        edit = clamped(unit_of(pairs, column, ""), 4 * float(pairs.typical[column]))
        changes = scorer.scores(spliced(sae, None, (edit,))).less(baseline)["log_prob"]
        return word_pattern(by_bucket(changes, word_cells))

    rng, found, limit = np.random.default_rng(0), 0, stats.f.isf(0.05, 1, 76)
    for _ in range(trials):
        drawn = np.concatenate([SENTENCES * c + rng.choice(SENTENCES, 40, replace=False) for c in range(4)])
        own = cells[drawn]
        half = halves(own, rng)
        chosen = select(pairs.values[drawn[half]], own[half], "interaction", rng, n_permutations=0).index
        found += effect_t(outcome(chosen)[drawn[~half]], own[~half], "interaction") ** 2 > limit
    return found


@pytest.mark.parametrize("trials", TRIALS)
def test_size_of_the_whole_procedure(many_texts, trials: int):
    fewest, most = rejections_allowed(trials)
    assert fewest <= rejections(many_texts, trials, has_pair=False) <= most


def test_power_of_the_whole_procedure(many_texts):
    assert rejections(many_texts, 50, has_pair=True) == 50


@pytest.fixture(scope="module")
def demo_model():
    return demo.load_model()


@pytest.fixture(scope="module")
def demo_sae():
    return SAE.from_pretrained("sae-nfm-demo", "blocks.2.hook_resid_post")


def test_words_of_several_tokens_against_one_pass_each(demo_model, demo_sae):
    stimuli = load_stimuli("formality-emotion")
    tokens = tokenized(demo_model, stimuli)
    prompts, words = tokens.prompts[::60], tokens.words[::2]
    assert {len(word) for word in words} >= {1, 2, 3}
    arm = Splice(sae=demo_sae, edits=(PairEdit(pair=(469, 1790), mode="clamp", value=50.0),))
    scores = WordScorer(demo_model, prompts, words, batch_rows=7).scores(arm)
    for item, prompt in enumerate(prompts):
        for number in (0, 3, 6, 12, 18):
            word = words[number]
            with arm.on(demo_model), torch.no_grad():
                logits = demo_model(torch.tensor([prompt + word[:-1]]))[0, len(prompt) - 1 :].double()
            expected = sum(logits[k].log_softmax(-1)[token].item() for k, token in enumerate(word))
            # float32 through the model, in batches of another shape
            assert scores.log_prob[item, number] == pytest.approx(expected, abs=1e-4)
            assert scores.prob[item, number] == pytest.approx(np.exp(expected), rel=1e-3)
            logit = sum(logits[k, token].item() for k, token in enumerate(word))
            assert scores.logit[item, number] == pytest.approx(logit, abs=1e-4)


def test_candidates_against_the_features_of_single_stimuli(demo_model, demo_sae):
    prompts = tokenized(demo_model, load_stimuli("sentiment-register")).prompts[::32]
    pools = {pool: feature_candidates(demo_model, demo_sae, prompts, pool) for pool in ("mean", "last")}
    pairs = pair_candidates(demo_model, demo_sae, prompts, "mean", max_pairs=50)
    last = pair_candidates(demo_model, demo_sae, prompts, "last", max_pairs=50)
    assert pairs is not None
    assert last is not None
    assert pairs.indices == last.indices
    weights, fired = PathWeights.of(demo_sae), []
    for item, prompt in enumerate(prompts):
        tokens = torch.tensor([prompt])
        x, _ = read_activations(demo_model, demo_sae, tokens)
        acts = demo_sae.encode(x).detach()
        assert len(x) == int(counted_tokens(demo_model, tokens).sum()) == len(prompt) - 1
        # float32 in batches of another shape; a token on the edge of the k strongest may differ
        assert np.allclose(pools["mean"].values[item], acts.mean(0), atol=1e-3)
        assert np.allclose(pools["last"].values[item], acts[-1], atol=1e-3)
        reads = token_reads(demo_sae, x)
        every = TokenPairs.of(reads.read)
        wrote = written(every, reads.gates, weights).norm(dim=-1)
        for column, (i, j) in enumerate(pairs.indices):
            mine = (every.first == i) & (every.second == j)
            assert pairs.values[item, column] == pytest.approx((wrote * mine).sum().item() / len(x), abs=1e-4)
            assert last.values[item, column] == pytest.approx((wrote * mine)[-1].sum().item(), abs=1e-4)
        fired.append([((every.first == i) & (every.second == j) & every.fires).any().item() for i, j in pairs.indices])
    assert np.sum(fired, axis=0).min() >= 2  # those that are active in most stimuli were kept


def test_controls_by_hand():
    pool = Candidates(
        kind="feature",
        indices=tuple((i,) for i in range(5)),
        values=np.array([[5.0, 1, 0, 2, 0]] * 4 + [[0.0, 1, 1, 1, 0]] * 12) + 0.1 * np.arange(16)[:, None],
        typical=np.array([1.0, 1.1, 8.0, 1.3, 1.0]),
        frequency=np.array([0.5, 0.4, 0.5, 0.5, 0.001]),
    )
    assert pool.matched(0, {0}) == 1
    assert pool.matched(0, {0, 1}) == 3
    assert pool.matched(0, {0, 1, 2, 3, 4}) is None
    cells = np.repeat(np.arange(4), 4)
    assert pool.insensitive(np.ones(16, dtype=bool), cells, {0}) in (1, 2, 3)
    assert pool.insensitive(np.ones(16, dtype=bool), cells, {0, 1, 2, 3, 4}) is None
    none = dataclasses.replace(pool, values=pool.values * [1, 1, 0, 1, 0])
    assert none.firing_in(np.arange(16) < 8, 7).indices == ((0,), (1,), (3,))


def test_a_secondary_sae_is_selected_from_clamped_and_watched(texts_and_model):
    metadata = {"hook_name": f"{planted.HOOK}.hook_nfm_hidden_pre"}
    secondary, cfg = _secondary(metadata), dataclasses.replace(CONFIG, clamps=(0.0,), absolute=())
    stimuli, model = texts_and_model
    result, rows = factorial(model, planted.sae(planted=True), stimuli, cfg, secondary=secondary)
    chosen = result.selected[-1]
    assert (chosen.unit.role, chosen.unit.index) == ("secondary (interaction)", (0,))  # reads f_0 f_1
    clamps = [arm for arm in result.arms if arm.role == chosen.unit.role]
    assert all((arm.tests.items_p_adjusted or 0) < 1e-3 for arm in clamps)
    f = planted.activations(PER_CELL).numpy()
    shift = next(s for s in result.secondary_shifts if s.arm.startswith("both") and s.arm.endswith(" 0 x typical"))
    tested = np.unique(rows["item"])
    assert shift.change == pytest.approx(-(f[:, 0] * f[:, 1])[tested].mean(), rel=1e-4)
    assert "the selected secondary feature changes by" in result.words()


def _secondary(metadata: dict[str, str]) -> SAE:
    found = SAE.from_dict(
        {"architecture": "topk", "d_in": 4, "d_sae": 6, "k": 4, "dtype": "float32", "device": "cpu"}
        | {"rescale_acts_by_decoder_norm": False, "metadata": metadata, "apply_b_dec_to_input": False}
    )
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
        found.W_enc[:4, :4] = torch.eye(4)
        found.W_dec[:4, :4] = torch.eye(4)
    return found


SMALL = """
factors: {sentiment: [positive, negative], register: [modern, archaic]}
cells:
  - {levels: [positive, modern], words: [good, charming], sentences: [It is so, A film that is, She was, The end is, We are]}
  - {levels: [positive, archaic], words: [gentle, noble], sentences: [Thou art, My lord is, O sweet and, He was most, Be]}
  - {levels: [negative, modern], words: [bad, boring], sentences: [The plot is, It was a, What a, The jokes are, Two hours of]}
  - {levels: [negative, archaic], words: [cruel, vile], sentences: [Get thee hence, A plague on, Fie upon, Thou, He is]}
"""


def test_the_command_writes_whole_files(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    cfg = FactorialConfig(
        stimuli=str(tmp_path / "small.yaml"),
        clamps=(4.0,),
        absolute=(),
        min_stimuli=2,
        max_pairs=60,
        n_permutations=19,
        output=str(tmp_path / "out"),
    )
    result = run_factorial(cfg, command="sae-nfm factorial")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "changes.parquet",
        "digests.json",
        "results.json",
    ]
    rows = pd.read_parquet(tmp_path / "out" / "changes.parquet")
    assert len(rows) == len(result.arms) * 12 * 8  # 3 of 5 stimuli of each cell are tested on
    assert result.items == (8, 12)
    assert rows.groupby("arm", observed=True)["log_prob_change"].count().eq(96).all()


def test_it_repeats_with_its_seed():
    cfg = FactorialConfig(clamps=(4.0,), absolute=(), min_stimuli=2, n_permutations=9)
    stimuli, model, sae = planted.stimuli(4), planted.model(4), planted.sae(planted=True)
    (first, rows), (again, rows_again) = (factorial(model, sae, stimuli, cfg) for _ in range(2))
    assert (again.arms, again.selected) == (first.arms, first.selected)
    assert rows_again.equals(rows)
    halves_of = [halves(stimuli.cell_of_sentence, np.random.default_rng([seed, 0])) for seed in (0, 1)]
    assert [set(np.flatnonzero(~half)) == set(rows["item"]) for half in halves_of] == [True, False]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"min_stimuli": 0}, r"\bmin_stimuli\b.*\b0\b"),
        ({"clamps": (), "absolute": ()}, "--clamps.*--absolute"),
        ({"clamps": (1.0, 1.0)}, r"\bclamps\b.*\(1\.0, 1\.0\)"),
    ],
)
def test_configurations_that_cannot_work(changed, told):
    with pytest.raises(ValueError, match=told):
        FactorialConfig(**changed)


def test_stimuli_that_the_model_cannot_take(demo_model):
    stimuli = load_stimuli("sentiment-register")
    long = dataclasses.replace(stimuli.cells[0], sentences=("word " * 300,))
    with pytest.raises(ValueError, match=r"\b30\d tokens\b.*\b256\b"):
        tokenized(demo_model, dataclasses.replace(stimuli, cells=(long, *stimuli.cells[1:])))
    with pytest.raises(ValueError, match=r"no candidate.*min_stimuli"):
        select(np.zeros((8, 0)), np.repeat(np.arange(4), 2), "first", np.random.default_rng(0))
