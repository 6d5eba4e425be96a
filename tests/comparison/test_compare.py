"""A comparison end to end, small, on the embedded model; its pieces against slower ways to get the same; what it refuses."""

import json
import shutil
from dataclasses import asdict, replace
from math import inf, nan
from shutil import copytree

import numpy as np
import pandas as pd
import pytest
import torch
from builders import D_MODEL, inference_sae, tiny_model, token_dataset, training_config
from invented_comparison import compare_row
from sae_lens import SAE

from sae_nfm import demo
from sae_nfm.architectures import refined
from sae_nfm.common import read_json, write_json
from sae_nfm.common.options import ACTIVATIONS
from sae_nfm.comparison.arms import ArmSizes, training_arms
from sae_nfm.comparison.config import ALL_ARMS, DEFAULT_ARMS, CompareConfig
from sae_nfm.comparison.plan import Costs, Step, duration, words
from sae_nfm.comparison.results import (
    CLAIMS,
    ArmName,
    ClaimKind,
    CompareResult,
    RowKind,
    SweepRow,
    answers,
    cells,
)
from sae_nfm.comparison.run import Prepared, _claim_folder, _say_plan, choices, of_cache, rounds_of, run_compare
from sae_nfm.comparison.table import _interpolated
from sae_nfm.data import CacheConfig, datasets, run_cache
from sae_nfm.data.documents import held_out_rows
from sae_nfm.evaluation.fidelity import SUMS, Arm, evaluate, fidelity_of, held_out_sums
from sae_nfm.training.multi_arm import train_arms, trained_tokens
from sae_nfm.training.results import Trained, read_training_record
from sae_nfm_cli.commands import COMMANDS

TINY = {
    "training_tokens": 1024, "held_out_tokens": 384, "context_size": 32, "d_sae": 96, "k": (16,), "nfm_dim": 4,
    "batch_size": 128, "seeds": (0, 1), "learning_rates": (5e-3, 1e-2), "sweep_tokens": 256, "sweep_held_out_tokens": 128,
    "standard_l1": (0.01, 2.0),
}  # fmt: skip
JOINT = str(ArmName.JOINT)
SIZES = ArmSizes(d_in=D_MODEL, d_sae=48, k=4, nfm_dim=6)
ARMS = ("joint_nfm", "topk", "topk matched", "standard")
SAES = ("joint_nfm", "topk", "topk matched", "standard 0.01", "standard 2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("comparison") / "run"
    cfg = CompareConfig(**TINY, arms=ARMS, output=str(output))
    state = torch.get_rng_state()
    result = run_compare(cfg, command="a command")
    assert torch.equal(torch.get_rng_state(), state), "the run must scope its random state"
    return cfg, output, result


def row_of(result, arm, seed=0):
    return next(row for row in result.rows if row.arm == arm and row.seed == seed)


def test_rows_are_every_arm_of_every_seed(finished):
    _, output, result = finished
    own = ["joint_nfm", "joint_nfm: direct only", "joint_nfm: direct only, canonical gauge", "topk", "topk matched",
           "standard 0.01", "standard 2", "standard"]  # fmt: skip
    assert [(row.seed, row.arm) for row in result.rows] == [(seed, arm) for seed in (0, 1) for arm in own]
    for row in result.rows:
        if row.kind is RowKind.TRAINED:
            sae = SAE.load_from_disk(output / "k16" / f"seed-{row.seed}" / row.arm)
            assert row.parameters == sum(parameter.numel() for parameter in sae.parameters())
            assert row.training_tokens_per_second > 0
            assert 0 <= row.dead_fraction <= 1
    assert {row.l0 for row in result.rows if row.arm == "topk"} != {None}
    with (output / "rows.csv").open() as file:
        assert len(file.readlines()) == 1 + len(result.rows)


def test_the_figures_are_those_of_evaluate(finished):
    cfg, output, result = finished
    model = demo.load_model()
    tokens = datasets.held_out_tokens(model, demo.load_tokens("validation"), cfg.context_size, cfg.held_out_tokens)
    arms = [Arm(name=name, sae=SAE.load_from_disk(output / "k16" / "seed-0" / name).eval()) for name in SAES]
    for name, fidelity in evaluate(model, tokens, arms).items():
        row = row_of(result, name)
        # sums of float32 figures in another order
        assert [row.l0, row.fvu, row.kl_nats, row.ce_nats] == pytest.approx(
            [fidelity.l0, fidelity.fvu, fidelity.kl_nats, fidelity.ce_nats], rel=1e-5
        )
        assert row.ce_delta_nats == pytest.approx(fidelity.ce_delta_nats, abs=1e-5)
        assert row.tokens == fidelity.tokens


def test_the_rows_are_sums_over_the_documents_file(finished):
    _, output, result = finished
    documents = pd.read_parquet(output / "documents.parquet")
    assert list(documents.columns) == ["k", "seed", "arm", "document", *SUMS]
    for (seed, arm), own in documents.groupby(["seed", "arm"]):
        row = row_of(result, arm, seed)
        assert row.fvu == pytest.approx(own["error_energy"].sum() / own["variance_energy"].sum(), rel=1e-12)
        assert row.kl_nats == pytest.approx(own["kl_nats"].sum() / own["tokens"].sum(), rel=1e-12)
    per_document = documents.pivot_table(index="document", columns=["seed", "arm"], values="variance_energy")
    # the text is one, so is its variance
    np.testing.assert_allclose(per_document.to_numpy(), per_document.to_numpy()[:, :1].repeat(per_document.shape[1], 1))


def test_each_arm_has_the_rate_that_its_own_sweep_chose(finished):
    cfg, output, result = finished
    assert [(row.learning_rate, row.arm) for row in result.sweep] == [(r, a) for r in cfg.learning_rates for a in SAES]
    chosen = choices(result.sweep, cfg.learning_rates)
    for row in result.rows:
        assert (row.learning_rate, row.rescaling) == chosen[row.family]
    assert {(row.family, (row.learning_rate, row.rescaling)) for row in result.sweep if row.chosen} == set(
        chosen.items()
    )
    for arm in SAES:
        record = read_training_record(output / "k16" / "seed-1" / arm / "training.jsonl")
        assert record[-1]["tokens"] == cfg.training_tokens
    best = min((row for row in result.sweep if row.arm == "topk"), key=lambda row: row.fvu)
    assert chosen["topk"] == (best.learning_rate, True)
    model, validation = demo.load_model(), demo.load_tokens("validation")
    compared = held_out_rows(model, validation, cfg.context_size, cfg.held_out_tokens)
    swept = held_out_rows(model, validation, cfg.context_size, cfg.sweep_held_out_tokens, compared.tokens.numel())
    assert not {tuple(row) for row in compared.tokens.tolist()} & {tuple(row) for row in swept.tokens.tolist()}


def sweep_row(arm, rate, fvu, l0=4.0, family=None, rescaling=None):
    row = {"k": 4, "family": family or arm, "learning_rate": rate, "rescaling": rescaling}
    return SweepRow(arm=arm, l0=l0, fvu=fvu, **row)


def test_choices_by_hand():
    rows = [sweep_row("topk", 1e-3, 0.3), sweep_row("topk", 1e-2, 0.2), sweep_row("joint", 1e-3, 0.1)]
    rows += [sweep_row("joint", 1e-2, nan)]  # diverged
    # at L0 4, half way in log between 2 and 8: 0.25 at 1e-3; at 1e-2 no coefficient is as dense as 4
    rows += [sweep_row("l1 1", 1e-3, 0.2, 8, "l1"), sweep_row("l1 2", 1e-3, 0.3, 2, "l1")]
    rows += [sweep_row("l1 1", 1e-2, 0.1, 3, "l1"), sweep_row("l1 2", 1e-2, 0.1, 2, "l1")]
    rows += [sweep_row("dead", 1e-3, nan), sweep_row("dead", 1e-2, inf)]
    # the best of both, at whichever rate
    ways = ((1e-3, True, 0.3), (1e-3, False, 0.1), (1e-2, True, 0.2), (1e-2, False, inf))
    rows += [sweep_row("staged", rate, fvu, rescaling=way) for rate, way, fvu in ways]
    found = {"topk": 1e-2, "joint": 1e-3, "l1": 1e-3, "dead": 1e-2}
    assert choices(rows, (1e-3, 1e-2)) == {name: (rate, None) for name, rate in found.items()} | {
        "staged": (1e-3, False)
    }


def test_a_sweep_tries_both_ways_what_has_the_choice_and_nothing_twice():
    arms = training_arms(["topk", "staged_topk", "jumprelu", "matching_pursuit"], SIZES, {"jumprelu": (0.1, 1.0)})
    rounds = [*rounds_of(arms, (1e-3, 1e-2), (True, False))]
    other = ["jumprelu 0.1", "jumprelu 1", "matching_pursuit"]
    both, names = ["topk", "staged_topk"], ["0.001", "0.001, not rescaled", "0.01", "0.01, not rescaled"]
    assert [(one.name, [*one.arms]) for one in rounds] == [*zip(names, [both + other, both] * 2, strict=True)]
    for one, way in zip(rounds, (True, False, True, False), strict=True):
        assert {one.arms[name].sae.rescale_acts_by_decoder_norm for name in both} == {way}
    # rows of before there was the choice are of arms as they were then: rescaled where they can be
    before = [sweep_row("topk", 1e-3, 0.2), sweep_row("jumprelu 1", 1e-3, 0.2)]
    assert [[*one.left(before)] for one in rounds[:2]] == [["staged_topk", "jumprelu 0.1", "matching_pursuit"], both]
    since = [sweep_row("topk", 1e-3, 0.2, rescaling=False), sweep_row("staged_topk", 1e-3, 0.2, rescaling=True)]
    assert [[*one.left(since)] for one in rounds[:2]] == [["topk", *other], ["staged_topk"]]
    assert [*rounds_of({"matching_pursuit": arms["matching_pursuit"]}, (1e-3,), (True, False))] == [
        replace(rounds[0], arms={"matching_pursuit": arms["matching_pursuit"]})
    ]


def test_an_l0_that_no_coefficient_reaches_is_not_extrapolated():
    arms = [pd.DataFrame({name: [1.0] for name in SUMS} | {"document": [0], "active": [l0]}) for l0 in (10.0, 20.0)]
    assert _interpolated("standard", arms, 9.0) is None
    assert _interpolated("standard", arms, 15.0) is not None


def test_interpolated_arms_have_joint_nfms_l0_or_say_that_it_was_not_reached(finished):
    result = finished[2]
    assert row_of(result, "standard").l0 is not None
    for seed in (0, 1):
        low, high = sorted((row_of(result, f"standard {c}", seed) for c in ("0.01", "2")), key=lambda row: row.l0)
        between, target = row_of(result, "standard", seed), row_of(result, "joint_nfm", seed).l0
        if not low.l0 <= target <= high.l0:
            assert (between.l0, between.fvu, between.kl_nats) == (None, None, None)
            continue
        share = np.log(target / low.l0) / np.log(high.l0 / low.l0)
        assert between.l0 == target
        for name in ("fvu", "kl_nats", "ce_delta_nats"):
            expected = (1 - share) * getattr(low, name) + share * getattr(high, name)
            assert getattr(between, name) == pytest.approx(expected, rel=1e-9)


def test_results_load_back_and_say_how_to_repeat_them(finished, tmp_path):
    cfg, output, result = finished
    assert CompareResult.load(output / "results.json") == result
    assert result.provenance["command"] == "a command"
    assert result.provenance["config"]["d_sae"] == 96
    assert result.provenance["config"]["arms"] == list(cfg.arms)
    assert not list(output.rglob("*.partial"))
    assert sorted(path.name for path in (output / "k16").iterdir()) == ["seed-0", "seed-1", "sweep.json"]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json.*sae-nfm compare.*\brows\b"):
        CompareResult.load(tmp_path / "other.json")


def test_the_words_name_ablations_and_limits(finished):
    words = finished[2].words()
    fair, ablations = words.split("The paper's comparison (")
    assert "joint_nfm against topk matched, fvu:" in fair
    assert "direct only" not in fair.split("The fair comparison (")[1]
    assert "joint_nfm against joint_nfm: direct only, canonical gauge, kl_nats:" in ablations
    assert words.count("2 seeds: no claim") == len(finished[2].answers)
    assert "no evidence about real text" in words
    assert "Learning rates by a sweep of 0.005, 0.01 for every arm." in words


def test_a_second_run_does_nothing_again_and_an_added_arm_changes_nothing(
    finished, tmp_path, monkeypatch, capsys, caplog
):
    cfg, output, result = finished
    cfg = replace(cfg, output=str(copytree(output, tmp_path / "copy")))
    names: list[str] = []

    def watched(**given):
        seed, folder = given["stream"].seed, given["folder"]
        names.extend(f"{seed} {name}" for name in given["arms"] if not (folder / name).exists())
        train_arms(**given)

    monkeypatch.setattr("sae_nfm.comparison.run.train_arms", watched)
    assert run_compare(cfg).table() == result.table()
    assert names == []
    assert "the plan" not in capsys.readouterr().err
    more = run_compare(replace(cfg, arms=("topk", "batchtopk"), seeds=(1, 2)))
    assert not [
        entry for entry in caplog.records if "reproducible" in entry.getMessage()
    ]  # SAELens of overrides: ours are
    planned = [line.split()[:5] for line in capsys.readouterr().err.splitlines() if line.startswith("k 16")]
    assert planned == [
        ["k", "16,", "rate", "0.005", "1"],
        ["k", "16,", "rate", "0.01", "1"],
        ["k", "16,", "seed", "1", "1"],
        ["k", "16,", "seed", "2", "2"],
    ]
    assert names == ["1000 batchtopk"] * 2 + ["1 batchtopk", "2 topk", "2 batchtopk"]
    (one,) = (row for row in more.table() if (row.seed, row.arm) == (1, "topk"))
    assert one in result.table()


def test_an_arm_is_trained_as_its_sweep_chose(tmp_path):
    sizes = TINY | {"seeds": (0,), "learning_rates": (5e-3,), "rescaling": ("on", "off")}
    sizes |= {"selection_stages": 2, "selection_candidates": 40}
    cfg = CompareConfig(**sizes, arms=("topk", "staged_topk", "matching_pursuit"), output=str(tmp_path / "run"))
    result = run_compare(cfg)
    tried = [("topk", True), ("staged_topk", True), ("matching_pursuit", None), ("topk", False), ("staged_topk", False)]
    assert [(row.arm, row.rescaling) for row in result.sweep] == tried
    best = {row.arm: row for row in sorted(result.sweep, key=lambda row: row.fvu, reverse=True)}
    ways = {row.arm: row.rescaling for row in result.rows}
    assert ways == {arm: row.rescaling for arm, row in best.items()}
    assert set(ways.values()) >= {False, None}, "else the usual one would pass too"
    for name, way in ways.items():
        settings = Trained.load(tmp_path / "run" / "k16" / "seed-0" / name).settings
        assert settings.get("rescale_acts_by_decoder_norm") is way
        in_stages = (settings.get("selection_stages", 1), settings.get("selection_candidates"))
        assert in_stages == ((2, 40) if name == "staged_topk" else (1, None))
    assert "chosen in 2 stages, later ones among 40 candidates of the first, in training too" in result.words()
    assert "rescaled" in result.columns
    assert {
        row.arm: cell[result.columns.index("rescaled")]
        for row, cell in zip(result.rows, cells(result.rows, result.columns), strict=True)
    } == {arm: {True: "yes", False: "no", None: ""}[way] for arm, way in ways.items()}
    assert "Rescaling by decoder norms on or off by the same sweep" in result.words()
    config = result.provenance["config"] | {"rescaling": ["on"]}
    once = replace(result, sweep=(), provenance=result.provenance | {"config": config})
    assert "rescaled" not in once.columns
    assert "staged_topk may not be at their best" in once.words()


def test_refined_rows_are_of_the_same_saes_and_are_added_to_a_finished_folder(finished, tmp_path, monkeypatch):
    cfg, output, before = finished
    cfg = replace(cfg, output=str(copytree(output, tmp_path / "copy")), refinement_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr("sae_nfm.training.multi_arm._train_round", None)  # nothing is trained
        result = run_compare(cfg)
        assert CompareResult.load(tmp_path / "copy" / "results.json") == result
    assert [row for row in result.table() if not row.refinement_steps] == before.table()
    fitted = [row for row in result.rows if row.refinement_steps]
    assert [(row.seed, row.arm, row.refinement_steps) for row in fitted] == [
        (seed, f"{name} refined", 3) for seed in (0, 1) for name in (*SAES, "standard")
    ]
    kinds = {row.arm: row.kind for row in fitted}
    assert (kinds.pop("standard refined"), set(kinds.values())) == (RowKind.INTERPOLATED, {RowKind.REFINED})
    model = demo.load_model()
    tokens = datasets.held_out_tokens(model, demo.load_tokens("validation"), cfg.context_size, cfg.held_out_tokens)
    saes = {name: SAE.load_from_disk(output / "k16" / "seed-0" / name).eval() for name in SAES}
    arms = [Arm(name=f"{name} refined", sae=refined(sae, 3)) for name, sae in saes.items()]
    for name, fidelity in evaluate(model, tokens, arms).items():
        row, plain = row_of(result, name), row_of(result, name.removesuffix(" refined"))
        # sums of float32 figures in another order
        assert [row.l0, row.fvu, row.kl_nats] == pytest.approx([fidelity.l0, fidelity.fvu, fidelity.kl_nats], rel=1e-5)
        assert row.fvu < plain.fvu
        assert row.l0 <= plain.l0
        assert (row.parameters, row.learning_rate) == (plain.parameters, plain.learning_rate)
        assert row.inference_flops > plain.inference_flops
    words = result.words()
    assert "topk refined against topk, fvu: " in words.split("What inference gains (")[1]
    assert "encode with 3 refinements" in words
    assert "joint_nfm refined against topk refined" in words.split("What the NFM's paths gain")[1]


def test_a_folder_of_before_rescaling_was_an_option_is_gone_on_with(finished, tmp_path, monkeypatch, capsys):
    cfg, output, result = finished
    folder = copytree(output, tmp_path / "copy")
    settings, swept = read_json(folder / "compare.json"), read_json(folder / "k16" / "sweep.json")
    assert (settings.pop("rescaling"), settings.pop("selection_stages")) == (["on"], 4)
    for row in swept["rows"]:
        del row["rescaling"]
    write_json(folder / "compare.json", settings)
    write_json(folder / "k16" / "sweep.json", swept)
    monkeypatch.setattr("sae_nfm.training.multi_arm._train_round", None)  # nothing is trained
    assert run_compare(replace(cfg, output=str(folder))).table() == result.table()
    assert "the plan" not in capsys.readouterr().err
    for changes, said in (
        ({"rescaling": ("on", "off")}, r"\['on', 'off'\], and \['on'\]"),
        ({"selection_stages": 2}, "2, and 4"),
    ):
        with pytest.raises(ValueError, match=said):
            run_compare(replace(cfg, output=str(folder), **changes))


def test_the_expected_time_by_hand():
    costs = Costs(read_seconds=2e-3, forward_seconds=5e-3, step_seconds={"a": 0.5, "b": 1.0, "c": 99.0})
    step = Step(what="k 8, seed 0", arms=("a", "b"), tokens=100_000, held_out_tokens=1_000)
    training, evaluation = 200 + 50 * 1.5, 5 * 4  # passes of a and b, of the model as it is and of its mean
    assert step.seconds(costs, batch_size=2_000) == pytest.approx(training + evaluation)
    fitted = replace(step, refined=True)  # a and b once more, 0.01 s and 0.03 s a token beside the passes of the model
    costs = replace(costs, refine_seconds={"a": 0.01, "b": 0.03, "c": 99.0})
    again = 1_000 * (2 * 5e-3 + 0.04)
    assert fitted.seconds(costs, batch_size=2_000) == pytest.approx(training + evaluation + again)
    begun = replace(step, done={"b": 60_000, "c": 9})  # b goes on by itself, from 60,000 tokens
    training = (100_000 + 40_000) * 2e-3 + 50 * 0.5 + 20 * 1.0
    assert begun.seconds(costs, batch_size=2_000) == pytest.approx(training + evaluation)
    assert (
        words([begun], costs, 2_000).splitlines()[1]
        == "k 8, seed 0              2      100,000     6 min; 1 from 60,000 on"
    )
    finished = replace(step, what="k 8, seed 1", arms=())
    assert finished.seconds(costs, batch_size=2_000) == 0
    _, one, other, total = words([step, finished], costs, 2_000).splitlines()
    assert one == "k 8, seed 0              2      100,000     5 min"
    assert other == "k 8, seed 1              0      100,000  finished"
    assert total.startswith("About 5 min ")
    assert duration(89.4) == "89 s"
    assert duration(3_600 * 26 + 59 * 60 + 40) == "27 h 0 min"


def test_held_out_sums_by_hand():
    """Two documents of different length, figures against a direct computation."""
    model, dataset = tiny_model(), token_dataset(6)
    rows = held_out_rows(model, dataset, 16, 96)
    sae = inference_sae(training_config("joint_nfm"))
    sums = held_out_sums(model, rows, {"one": Arm(name="one", sae=sae).intervention}, batch_rows=4)
    _, cache = model.run_with_cache(rows.tokens, names_filter=["blocks.0.hook_resid_post"])
    x = cache["blocks.0.hook_resid_post"][:, 1:].reshape(-1, D_MODEL).double()
    documents = rows.documents[:, 1:].reshape(-1)
    error = (sae(x.float()) - x).square().sum(-1).double()
    variance = (x - x.mean(0)).square().sum(-1)
    active = (sae.encode(x.float()) != 0).sum(-1)
    assert list(sums["document"]) == list(range(6))
    for number, row in sums.set_index("document").iterrows():
        mine = documents == number
        assert row["tokens"] == 15
        assert row["predictions"] == 14
        assert row["active"] == active[mine].sum()
        assert row["error_energy"] == pytest.approx(error[mine].sum().item(), rel=1e-5)  # float32 activations
        assert row["variance_energy"] == pytest.approx(variance[mine].sum().item(), rel=1e-5)
    assert fidelity_of(sums).fvu == pytest.approx((error.sum() / variance.sum()).item(), rel=1e-5)


def document_rows(arms, seeds=range(5), documents=20, noise=0.01):
    generator = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {"k": 32, "seed": seed, "arm": arm, "document": d, "tokens": 10.0, "active": 320.0,
             "error_energy": 5 * level + noise * e, "variance_energy": 50.0, "kl_nats": 10 * level + noise * e}
            for arm, level in arms.items() for seed in seeds for d, e in enumerate(generator.normal(size=documents))
        ]
    )  # fmt: skip


def test_answers_point_the_right_way_and_correct_the_fair_claims_together():
    rows = document_rows({JOINT: 1.0, "topk": 1.2, "joint_nfm mlp": 1.0, f"{JOINT}: direct only": 3.0})
    found, missing = answers(rows, [32], 5)
    assert missing == []
    said = {(a.claim.against, a.verdict.measure): a for a in found}
    assert {key: answer.verdict.words for key, answer in said.items()} == {
        ("topk", "fvu"): "better",
        ("topk", "kl_nats"): "better",
        ("joint_nfm mlp", "fvu"): "no difference shown",
        ("joint_nfm mlp", "kl_nats"): "no difference shown",
        ("joint_nfm: direct only", "fvu"): "better",
        ("joint_nfm: direct only", "kl_nats"): "better",
    }
    # 5 x 1 / 50 against 5 x 1.2 / 50, up to the noise
    assert said["topk", "fvu"].verdict.difference.estimate == pytest.approx(-0.02, abs=1e-3)
    assert said["topk", "fvu"].verdict.difference.correction == "Holm over 4 tests"
    assert said["joint_nfm: direct only", "fvu"].claim.kind is ClaimKind.ABLATION
    assert said["joint_nfm: direct only", "fvu"].verdict.difference.correction is None


def test_the_gains_from_inference_and_from_paths_are_told_apart():
    levels = {"topk": 1.0, "topk refined": 0.8, "topk matched": 0.95, "staged_topk": 0.7, "staged_topk refined": 0.6}
    levels |= {"joint_nfm staged": 0.75, "joint_nfm staged refined": 0.6}
    found, missing = answers(document_rows(levels), [32], 5)
    assert missing == []
    words = {(a.claim.kind, a.claim.arm, a.claim.against): a.verdict.words for a in found}
    gained = {
        ("topk refined", "topk"), ("staged_topk", "topk"), ("staged_topk refined", "staged_topk"),
        ("joint_nfm staged refined", "joint_nfm staged"),
    } | {
        (whole, other)
        for whole in ("staged_topk refined", "joint_nfm staged refined")
        for other in ("topk", "topk refined", "topk matched")
    }  # fmt: skip
    assert words == {(ClaimKind.INFERENCE, *pair): "better" for pair in gained} | {
        (ClaimKind.PATHS, "joint_nfm staged", "staged_topk"): "worse",
        (ClaimKind.PATHS, "joint_nfm staged refined", "staged_topk refined"): "no difference shown",
    }
    assert {a.verdict.difference.correction for a in found} == {f"Holm over {len(found)} tests"}
    seeds = {"config": {"training_tokens": 1, "learning_rates": [1.0], "dataset": "t"}, "seeds": [0]}
    printed = CompareResult(rows=(compare_row("topk", 1, 1),), answers=tuple(found), provenance=seeds).words()
    inference, paths = printed.split("What inference gains (")[1].split("What the NFM's paths gain on top of the same ")
    assert inference.count(": better (Holm") == 2 * len(gained)
    assert paths.count(": worse (Holm") == paths.count(": no difference shown (Holm") == 2


def test_claims_without_all_seeds_or_with_a_diverged_arm_have_a_reason_in_place_of_a_verdict():
    rows = document_rows({JOINT: 1.0, "topk": 1.2, "jumprelu": 1.1})
    rows = rows[(rows["arm"] != "jumprelu") | (rows["seed"] < 3)]
    rows.loc[(rows["arm"] == "topk") & (rows["seed"] == 2) & (rows["document"] == 7), "kl_nats"] = nan
    found, missing = answers(rows, [32], 5)
    assert found == []
    assert missing == [
        "joint_nfm against topk at k = 32: topk diverged",
        "joint_nfm against jumprelu at k = 32: jumprelu has values for 3 of 5 seeds",
    ]


def test_arms_of_unequal_sparsity_are_not_judged():
    rows = document_rows({JOINT: 1.0, "batchtopk": 1.2, "matryoshka": 1.1})
    rows.loc[rows["arm"] == "batchtopk", "active"] *= 1.06
    rows.loc[rows["arm"] == "matryoshka", "active"] *= 1.04
    found, missing = answers(rows, [32], 5)
    assert {answer.claim.against for answer in found} == {"matryoshka"}
    told = "joint_nfm against batchtopk at k = 32: L0 is 32.0 and 33.9: metrics at unequal sparsity say nothing"
    assert missing == [told]


def test_every_claim_is_about_arms_that_exist():
    assert len({(claim.arm, claim.against) for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.arm.removesuffix(" refined") in ALL_ARMS
        assert claim.against.partition(":")[0].removesuffix(" refined") in ALL_ARMS
        assert (claim.kind is ClaimKind.ABLATION) == (":" in claim.against)
        if claim.kind is ClaimKind.PATHS:  # the same inference on both sides, paths on one
            sides = [(name.endswith(" refined"), "staged" in name) for name in (claim.arm, claim.against)]
            assert sides[0] == sides[1]
            assert claim.arm.startswith("joint_nfm")
            assert not claim.against.startswith("joint_nfm")
        if {claim.arm, claim.against} <= set(DEFAULT_ARMS):
            assert claim.kind is ClaimKind.FAIR
    assert {claim.against for claim in CLAIMS if claim.arm == JOINT and claim.kind is ClaimKind.FAIR} >= set(
        DEFAULT_ARMS
    ) - {
        JOINT,
        "joint_nfm square",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_tokens": 8192}, r"\btraining_tokens\b.*\b8192\b.*\b1024\b.*run'"),
        ({"learning_rates": (1e-3,)}, r"\blearning_rates\b.*\[0\.001\].*\[0\.005, 0\.01\]"),
        ({"held_out_tokens": 512}, r"\bheld_out_tokens\b.*\b512\b.*\b384\b"),
        ({"d_sae": 97}, r"\bd_sae\b.*\b97\b.*\b96\b"),
    ],
)  # fmt: skip
def test_a_changed_configuration_is_an_error_that_names_the_field(changes, message, finished):
    cfg, output, _ = finished
    before = (output / "results.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        run_compare(replace(cfg, **changes))
    assert (output / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("topk", "topq")}, r"\barm\b.*'topq'.*'joint_nfm', 'joint_nfm half', "),
        ({"arms": ()}, r"\barms\b.*\[\]"),
        ({"seeds": (1, 1)}, r"\bseeds\b.*\[1, 1\]"),
        ({"seeds": (0, 1000)}, r"\bseeds\b.*\[0, 1000\].*\bsweep_seed\b.*\b1000\b"),
        ({"seeds": (-1, 0)}, r"\bseeds\b.*\[-1, 0\].*\bfrom 0\b"),
        ({"k": (0,)}, r"\bk\b.*\[0\]"),
        ({"learning_rates": (0.1, -0.1)}, r"\blearning_rates\b.*\[0\.1, -0\.1\]"),
        ({"d_sae": 0}, r"\bd_sae\b.*\b0\b"),
        ({"context_size": 1}, r"\bcontext_size\b.*\b2\b.*\b1\b"),
        ({"sweep_tokens": 100}, r"\bsweep_tokens\b.*\b2048\b.*\b100\b"),
        ({"shuffle": False}, r"\bshuffle\b.*\[0, 1, 2, 3, 4\]"),
        ({"rescaling": ("on", "of")}, r"\brescaling\b.*'on', 'off', got 'of'"),
        ({"rescaling": ()}, r"\brescaling\b.*\[\]"),
        ({"arms": ("staged_topk",), "k": (3, 8)}, r"selection_stages.*k = 3\b.*got 4;.*staged_topk"),
        ({"arms": ("staged_topk",), "selection_candidates": 31}, r"selection_candidates.*k = 32\b.*2048.*got 31"),
    ],
)  # fmt: skip
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(**changes)


def test_bad_input_leaves_nothing(tmp_path):
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=r"\bk\b.*\bd_sae\b.*\b96\b.*\b200\b"):
        run_compare(CompareConfig(**(TINY | {"k": (200,)}), output=str(output)))
    with pytest.raises(ValueError, match=r"1 document, .*--held-out-tokens"):
        run_compare(CompareConfig(**(TINY | {"held_out_tokens": 1}), output=str(output)))
    assert not output.exists()
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"\boutput\b.*run.*\bnew folder\b"):
        run_compare(CompareConfig(**TINY, output=str(output)))
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_all_arms_by_one_word():
    assert CompareConfig(arms=("all",)).chosen_arms == ALL_ARMS
    assert json.loads(json.dumps(asdict(CompareConfig())))["arms"] == list(DEFAULT_ARMS)


def test_flags_of_several_values():
    flags = [
        "--k",
        "16",
        "64",
        "--seeds",
        "3",
        "4",
        "--learning-rates",
        "1e-3",
        "--rescaling",
        "on",
        "off",
        "--jumprelu-l0",
        "0.5",
        "5",
        "--arms",
        "topk",
    ]
    cfg = COMMANDS["compare"].make_parser("compare").parse([*flags, "joint_nfm mlp"])
    assert (cfg.k, cfg.seeds, cfg.learning_rates, cfg.jumprelu_l0) == ((16, 64), (3, 4), (1e-3,), (0.5, 5.0))
    assert cfg.chosen_arms == ("topk", "joint_nfm mlp")
    assert cfg.rescaled == (True, False)
    assert cfg.sweeps


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    folder = tmp_path_factory.mktemp("activations") / "cache"
    return run_cache(CacheConfig(tokens=8_192, context_size=32, output=str(folder)))


def test_from_a_cache_everything_is_as_from_the_model(cached, tmp_path):
    sizes = {name: value for name, value in TINY.items() if name != "context_size"}  # that of the cache is taken
    sizes |= {"seeds": (0,), "learning_rates": (5e-3,)}
    one = run_compare(
        CompareConfig(
            **sizes,
            arms=("joint_nfm", "topk"),
            shuffle=False,
            activations=str(cached.folder),
            output=str(tmp_path / "a"),
        )
    )
    sizes["context_size"] = 32
    other = run_compare(CompareConfig(**sizes, arms=("joint_nfm", "topk"), shuffle=False, output=str(tmp_path / "b")))
    for name in ("joint_nfm", "topk"):
        mine, theirs = (SAE.load_from_disk(tmp_path / run / "k16" / "seed-0" / name) for run in "ab")
        assert all(torch.equal(mine.state_dict()[key], value) for key, value in theirs.state_dict().items())
        assert getattr(mine.cfg.metadata, ACTIVATIONS) == str(cached.identity)
    speed = "training_tokens_per_second"
    assert [replace(row, **{speed: 0}) for row in one.rows] == [replace(row, **{speed: 0}) for row in other.rows]
    assert f"Trained on cached activations: {cached.identity}." in one.caveats()


def test_each_seed_has_the_rows_of_a_cache_in_an_order_of_its_own(cached, tmp_path):
    cfg = CompareConfig(
        **TINY | {"learning_rates": (5e-3,)},
        arms=("topk",),
        activations=str(cached.folder),
        output=str(tmp_path / "run"),
    )
    on = [Prepared.of(cfg).training(seed, 1_024) for seed in (0, 1, 1)]
    orders = [one["dataset"]["tokens"] for one in on]
    assert orders[0] != orders[1] == orders[2]
    assert sorted(orders[0]) == sorted(orders[1])
    assert len({one["stream"].activations for one in on}) == 2
    prepared = Prepared.of(cfg)
    _claim_folder(tmp_path, prepared)
    other = replace(prepared, cache=replace(prepared.cache, tokens_sha256="0"))
    with pytest.raises(ValueError, match=r"activations is '256 rows .*, and '256 rows .* in the comparison begun"):
        _claim_folder(tmp_path, other)


@pytest.mark.parametrize(
    ("given", "own", "said"),
    [
        ({"model": "gpt2"}, {}, r"model is 'gpt2', and 'sae-nfm-demo' in the cache"),
        ({"context_size": 64}, {}, r"context_size is 64, and 32 in the cache"),
        # what is the default without a cache, typed
        ({"context_size": 256}, {}, r"context_size is 256, and 32 in the cache"),
        ({"model": "sae-nfm-demo"}, {"model": "gpt2"}, r"model is 'sae-nfm-demo', and 'gpt2' in the cache"),
        ({"dataset": "a.parquet"}, {"dataset": "b.parquet"}, r"dataset is 'a.parquet', and 'b.parquet' in the cache"),
        ({}, {"model_class_name": "TransformerBridge"}, "is of a TransformerBridge"),
    ],
)
def test_what_does_not_fit_a_cache(cached, given, own, said):
    with pytest.raises(ValueError, match=said):
        of_cache(CompareConfig(activations="cache", **given), replace(cached.identity, **own))


def test_a_cache_decides_what_is_not_given_and_the_defaults_do_without(cached):
    config = CompareConfig(activations="cache")
    assert (config.model, config.context_size) == (None, None)
    own = of_cache(config, cached.identity)
    assert (own.model, own.context_size) == ("sae-nfm-demo", 32)
    assert (CompareConfig().model, CompareConfig().context_size) == ("sae-nfm-demo", 256)


def test_the_plan_counts_what_a_checkpoint_has_done(finished, tmp_path, capsys):
    cfg, output, _ = finished
    folder = copytree(output, tmp_path / "copy")
    seed, checkpoint = folder / "k16" / "seed-0", folder / "k16" / "seed-0.partial" / "1" / "checkpoints" / "id" / "512"
    for name in ("topk", "joint_nfm"):
        shutil.rmtree(seed / name)
        (checkpoint / name).mkdir(parents=True)
    assert trained_tokens(seed) == {}
    (checkpoint / "runner_cfg.json").write_text("{}")
    assert trained_tokens(seed) == {"topk": 512, "joint_nfm": 512}
    prepared = Prepared.of(replace(cfg, output=str(folder)))
    _say_plan(prepared, {16: prepared.arms(16, cfg.training_tokens)}, folder)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("k 16, seed 0"))
    assert line.split()[4] == "2"
    assert line.endswith("; 2 from 512 on")


def test_of_several_hook_points_the_usual_one_unless_given(cached):
    hooks = {"blocks.1.hook_resid_post": (128,), "blocks.2.hook_resid_post": (128,)}
    own = replace(cached.identity, hooks=hooks, dataset="b", held_out="c")
    chosen = of_cache(CompareConfig(activations="cache"), own)
    assert (chosen.hook, chosen.dataset, chosen.held_out) == ("blocks.2.hook_resid_post", "b", "c")
    assert (
        of_cache(CompareConfig(activations="cache", hook="blocks.1.hook_resid_post"), own).hook
        == "blocks.1.hook_resid_post"
    )
