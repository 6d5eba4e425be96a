"""`sae-nfm reproduce` on the embedded model, small: its figures are those of `evaluate`, and none is without its control."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree

import numpy as np
import pytest
from finished_runs import COMMAND, SMALL
from sae_lens import SAE

from sae_nfm import demo
from sae_nfm.analysis.linear_component import divided
from sae_nfm.comparison.results import Paths
from sae_nfm.comparison.table import ablations
from sae_nfm.data import datasets
from sae_nfm.data.documents import held_out_rows
from sae_nfm.evaluation.fidelity import Arm, evaluate
from sae_nfm.evaluation.results import MeasuredKL
from sae_nfm.experiments.reproduce.results import PUBLISHED, NoVerdict, ReproduceResult, Unit, written
from sae_nfm.experiments.reproduce.rows import FEWEST_DOCUMENTS, factorial_rows, keeping_means
from sae_nfm.experiments.reproduce.run import ReproduceConfig, behaviour_arms, run_reproduce
from sae_nfm.interventions.results import Role
from sae_nfm.models.load import load_model
from sae_nfm.stats.estimates import Estimate
from sae_nfm.training.results import Trained

pytest_plugins = ["finished_runs"]
CANONICAL, DIRECT = str(Paths.CANONICAL), str(Paths.DIRECT)
CONTEXT, ROWS = SMALL["context_size"], SMALL["held_out_tokens"] // SMALL["context_size"]


@pytest.fixture(scope="module")
def config(reproduction) -> ReproduceConfig:
    return reproduction.config


@pytest.fixture(scope="module")
def result(reproduction) -> ReproduceResult:
    return reproduction.result


@pytest.fixture(scope="module")
def fidelity(reproduction):
    """The same tokens through `evaluate`."""
    model, (_, validation) = load_model(demo.MODEL_NAME), datasets.load_splits(None, None, demo.MODEL_NAME)
    joint, topk = (SAE.load_from_disk(reproduction.arms / name).eval() for name in ("joint_nfm", "topk matched"))
    canonical = joint.folded()
    arms = [Arm(name=str(paths), sae=joint, off=off) for paths, off in ablations(joint).items()]
    arms += [Arm(name="all", sae=joint), Arm(name="topk matched", sae=topk)]
    arms += [Arm(name=CANONICAL, sae=canonical, off=("hook_nfm_interaction",))]
    return evaluate(model, datasets.held_out_tokens(model, validation, CONTEXT, SMALL["held_out_tokens"]), arms)


def row(result: ReproduceResult, name: str, control: str):
    (found,) = [one for one in result.rows if one.name == name and control in one.control]
    return found


@pytest.mark.parametrize(
    ("what", "measure"), [("squared error", "fvu"), ("KL", "kl_nats"), ("cross-entropy", "ce_nats")]
)
def test_figures_of_behaviour_are_those_of_evaluate(result, fidelity, what, measure):
    def change(arm: str, against: str) -> float:
        mine, other = (getattr(fidelity[name], measure) for name in (arm, against))
        return pytest.approx(
            mine / other - 1, rel=1e-3, abs=1e-5
        )  # averages in float32, of differences of a few percent

    whole = f"{what}, all paths against the direct path alone"
    for control, against in (("canonical gauge", CANONICAL), ("as many parameters", "topk matched")):
        found = row(result, whole, control)
        assert found.here.estimate == change("all", DIRECT)
        assert found.controlled.estimate == change("all", against)
        assert found.here.low < found.here.estimate < found.here.high
        assert found.here.n_clusters == ROWS  # of the embedded tokens, each a document
    if what != "squared error":
        for part, arm in (("linear", "direct + linear"), ("nonlinear", "direct + nonlinear"), ("both", "all")):
            found = row(result, f"{what} relative to the direct path alone, {part}", "mean over other text")
            assert found.here.estimate == change(arm, DIRECT)
            assert found.controlled.estimate != found.here.estimate


def test_arms_of_the_measurement_have_their_roles(reproduction):
    """Those that arms of 0.1.0 had by their names."""
    found = MeasuredKL.load(reproduction.folder / "rows" / "summary.json").arms
    roles = {arm.arm: (arm.role, arm.of, arm.name, arm.scale) for arm in found}
    assert len(roles) == 38
    assert roles["sae"] == (Role.SAE, "sae", "sae", 1.0)
    assert roles["flipped error"] == (Role.CONTROL, "sae", "flipped error", -1.0)
    assert roles["error x 0.25"] == (Role.SCALED, "sae", "error x 0.25", 0.25)
    assert roles["mean"] == (Role.ANCHOR, "sae", "mean", None)
    assert roles[CANONICAL] == (Role.PART, "sae", CANONICAL, None)
    assert roles[keeping_means(DIRECT)] == (Role.PART, "sae", keeping_means(DIRECT), None)
    assert roles["topk matched"] == (Role.OTHER, "topk matched", "topk matched", None)
    assert roles["sequential"] == (Role.SAE, "sequential", "sequential", 1.0)
    assert roles["sequential: covariance"] == (Role.CONTROL, "sequential", "covariance", None)
    assert roles[keeping_means("sequential: direct only")] == (Role.PART, "sequential", keeping_means(DIRECT), None)
    assert roles["sequential without nonlinear"][0] is Role.OTHER


def test_the_share_of_the_gain(result, fidelity):
    kl = {name: found.kl_nats for name, found in fidelity.items()}
    share = (kl[DIRECT] - kl["direct + nonlinear"]) / (kl[DIRECT] - kl["all"])
    found = row(result, "share of the KL gain that the nonlinear path has by itself", "means kept")
    assert found.here.estimate == pytest.approx(share, rel=1e-3)


def test_every_published_figure_has_a_control(result):
    shown = [one for one in result.rows if one.published is not None]
    sections = {one.section for one in shown}
    assert sections == {"reconstruction", "KL", "cross-entropy", "errors", "paths", "norms", "sequential", "2x2"}
    assert {one.name for one in shown} == set(PUBLISHED)
    for one in result.rows:
        assert one.control
        assert one.verdict == NoVerdict.ONE_SEED
    for name in {one.name for one in shown}:
        assert any(one.controlled is not None for one in shown if one.name == name), name


def test_the_2x2_rows_are_the_experiment(config, result):
    """Its own file has the same statistics."""
    saved = json.loads((Path(config.output) / "2x2" / "results.json").read_text())
    arms = {arm["role"]: arm["tests"] for arm in saved["arms"] if arm["units"][0]["kind"] == "secondary"}
    assert sum(saved["items"]) == 4 * SMALL["sentences"]
    clamped, control = arms["secondary (interaction)"], arms["match of secondary"]
    found = row(result, "formality x emotion, clamping secondary feature 4022", "interaction F, stimuli as units")
    assert (found.here, found.controlled) == (clamped["published_f"], clamped["items"]["log_prob"]["f"])
    assert f"p = {clamped['items']['log_prob']['p_value']:.3f}" in found.control
    assert "sentiment (positive / negative) x register" in found.control
    found = row(result, "the same, control feature 1113", "match of secondary")
    assert (found.here, found.controlled) == (control["published_f"], control["items"]["log_prob"]["f"])


def test_stimuli_that_select_nothing(reproduction, tmp_path):
    """Four sentences of a cell are two to select on: fewer than a candidate has to be active in."""
    joint = reproduction.arms / "joint_nfm"
    copytree(reproduction.folder / "2x2" / "secondary", tmp_path / "secondary")
    rows = factorial_rows(
        load_model(demo.MODEL_NAME),
        SAE.load_from_disk(joint).eval(),
        demo.load_tokens("train").shuffle(seed=SMALL["seed"]),
        Trained.load(joint).settings,
        tmp_path,
        sentences=1,
        n_permutations=19,
    )
    assert [(one.here, one.controlled, one.verdict) for one in rows] == [(None, None, str(NoVerdict.NOT_MEASURED))] * 2
    assert all("stimuli; give at least 4" in one.control for one in rows)


def test_saved_loaded_and_in_words(config, result, reproduction):
    assert repr(result) == reproduction.returned
    assert result.provenance["command"] == COMMAND
    text = result.words()
    assert all(one.published is None or one.published.text in text for one in result.rows)
    assert "no evidence about real text" in text
    with pytest.raises(ValueError, match=r"sae-nfm reproduce.*compare"):
        ReproduceResult.load(Path(config.output) / "compare" / "results.json")


def test_a_finished_comparison_is_read(config, result, tmp_path):
    """Its SAEs, its settings: the same table, although other sizes were asked for; without an arm, it says what that takes."""
    copytree(Path(config.output) / "compare", tmp_path / "compare")
    rmtree(tmp_path / "compare" / "k8" / "seed-1" / "topk")
    other = {"d_sae": 99, "held_out_tokens": 1, "sentences": 0}
    again = replace(config, compare=str(tmp_path / "compare"), output=str(tmp_path / "out"), **other)
    found = run_reproduce(again).rows
    left = {
        "sequential": "the comparison has no arm 'topk' that an NFM could be trained on",
        "2x2": "left out: sentences is 0",
    }
    for section, reason in left.items():
        rows = [one for one in found if one.section == section]
        assert {one.name for one in rows} == {
            one.name for one in result.rows if one.section == section and one.published is not None
        }
        for one in rows:
            assert (one.here, one.controlled, one.control, one.verdict) == (None, None, reason, NoVerdict.NOT_MEASURED)
    same = [one for one in result.rows if one.section not in left]
    rows = [one for one in found if one.section not in left]
    assert [one.name for one in rows] == [one.name for one in same]
    for one, before in zip(rows, same, strict=True):
        if "TopK SAE of the same width" in one.control:
            assert one == replace(before, controlled=None, control=f"{before.control}: there is none here")
        else:
            assert one == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["digests.json", "results.json", "rows"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 9}, r"\bk\b.*\b9\b.*\[8\]"),
        ({"seed": 3}, r"\bseed\b.*\b3\b.*\[1\]"),
    ],
)
def test_what_a_comparison_does_not_have(config, result, tmp_path, change, message):
    cfg = replace(config, compare=str(Path(config.output) / "compare"), output=str(tmp_path / "new"), **change)
    with pytest.raises(ValueError, match=message):
        run_reproduce(cfg)
    assert not (tmp_path / "new").exists()


def test_no_comparison(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="sae-nfm compare"):
        run_reproduce(replace(config, compare=str(tmp_path)))


def test_refused_before_anything_is_done():
    with pytest.raises(ValueError, match=r"\bfit_tokens\b.*\b0\b"):
        ReproduceConfig(fit_tokens=0)
    with pytest.raises(ValueError, match=r"\bsentences\b.*\b4\b.*\b0\b.*\b3\b"):
        ReproduceConfig(sentences=3)
    with pytest.raises(ValueError, match=r"\blr\b.*-1\.0"):
        ReproduceConfig(lr=-1.0)


def test_too_few_documents_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_nfm.experiments.reproduce.run.run_compare", pytest.fail)
    config = ReproduceConfig(**SMALL | {"held_out_tokens": 2 * CONTEXT}, output=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"from \d documents?, and intervals need at least 6, .*--held-out-tokens"):
        run_reproduce(config)


def test_the_fewest_documents_leave_two_to_score_on():
    """One fewer leaves one: `analysis.linear_component.divided`."""
    parts = [divided(np.arange(n), seed=0) for n in (FEWEST_DOCUMENTS, FEWEST_DOCUMENTS - 1)]
    assert [len(part.test) for part in parts] == [2, 1]


def test_arms_of_an_sae_without_a_canonical_gauge(reproduction):
    joint = SAE.load_from_disk(reproduction.arms / "joint_nfm")
    joint.cfg.nfm_top_k = 4
    model, (_, validation) = load_model(demo.MODEL_NAME), datasets.load_splits(None, None, demo.MODEL_NAME)
    arms = behaviour_arms(model, {"joint_nfm": joint}, held_out_rows(model, validation, CONTEXT, 256))
    assert CANONICAL not in arms
    assert {DIRECT, keeping_means(DIRECT), "isotropic", "covariance mixture"} <= set(arms)


def test_figures_in_words():
    estimate = Estimate(
        estimate=-0.413, low=-0.5, high=-0.3, n=10, n_clusters=2, test="", p_value=None, correction=None
    )
    assert written(estimate, Unit.CHANGE) == "-41.3% [-50.0%, -30.0%]"
    assert written(2.0, Unit.COUNT) == "2"
    assert written(None, Unit.COUNT) == "none"
