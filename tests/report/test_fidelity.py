"""The chapter on fidelity: what its figures draw are the numbers of the results, one seed and several."""

import json
from dataclasses import asdict, replace

import pytest
from invented_comparison import ONCE, ROWS, compare_row, compared, compared_once
from report_inputs import RUN
from report_runs import figures, labels, marks, plots, run_of

from sae_nfm.cli.jobs import write_report
from sae_nfm.comparison.results import RowKind, arm_means
from sae_nfm.evaluation import Evaluation, Fidelity, FidelityTable
from sae_nfm.report.blocks import Heading, Prose, Table
from sae_nfm.report.chapters.fidelity import TITLE, section
from sae_nfm.report.command import ReportConfig
from sae_nfm.report.run_folder import read_run

FVU, KL = "FVU, fraction of variance unexplained", "KL, nats per token"


@pytest.fixture(scope="module")
def one_run():
    return section(run_of(RUN, compared_once()))


def test_nothing_without_a_result(tmp_path):
    assert section(run_of(tmp_path)) is None


def test_claims_are_the_comparisons_the_papers_first(one_run):
    claims = figures(one_run)[0]
    rows = [
        "The paper's comparison: with a part of itself",
        "joint against its own part, direct only",
        "Fair: with SAEs trained on their own",
        "joint against topk (1.50 x its parameters)",
        "joint against matched (1.00 x its parameters)",
    ]
    assert labels(claims.plot) == rows
    fvu = {rows[1]: -0.75, rows[3]: 0.25, rows[4]: 1.0}  # 0.1 against 0.4, 0.08, 0.05
    kl = {rows[1]: -0.20, rows[3]: -0.20, rows[4]: 1.0}  # 0.2 against 0.25, 0.25, 0.1
    expected = {(row, "FVU", x) for row, x in fvu.items()} | {(row, "KL", x) for row, x in kl.items()}
    assert marks(claims) == expected
    assert {(r.comparison, r.measure, round(r[3], 9)) for r in claims.data.itertuples(index=False)} == expected
    assert "not measured here" in claims.caption


def test_every_row_of_the_table_is_a_mark(one_run):
    rows = figures(one_run)[1]
    group = {"joint": "joint_nfm and variants", "topk": "TopK", "matched": "TopK"}
    expected = {(r.arm, group.get(r.arm, "with paths ablated")): r for r in ONCE}
    assert marks(rows) == {(*key, r.fvu) for key, r in expected.items()} | {
        (*key, r.kl_nats) for key, r in expected.items()
    }
    assert {(r.measure, r.row, r.kind): r.value for r in rows.data.itertuples()} == (
        {(FVU, *key): r.fvu for key, r in expected.items()} | {(KL, *key): r.kl_nats for key, r in expected.items()}
    )
    table = next(block for block in one_run.blocks if isinstance(block, Table))
    assert (tuple(table.columns), [line[0] for line in table.rows]) == (
        compared_once().columns,
        [row.arm for row in ONCE],
    )
    assert list(table.strong) == [True, False, False, True, True]
    assert "One seed (7)" in next(block for block in one_run.blocks if isinstance(block, Prose)).lines[0]


def test_a_loss_is_a_verdict_like_a_win(one_run):
    said = one_run.verdicts
    assert said[0] == "joint, the paper's comparison: all paths against the direct path alone: FVU -75.0%, KL -20.0%."
    assert said[2].endswith("FVU +100.0%, KL +100.0% (no better on either).")


def test_seeds_and_their_mean(tmp_path):
    there = section(run_of(tmp_path, compared()))
    ablations, whole = figures(there)
    assert labels(whole.plot) == ["joint_nfm", "topk"]
    # 0.10, 0.11, 0.12: standard error 0.01 / sqrt(3), t with 2 degrees of freedom 4.302653: half width 0.02484138
    assert ("joint_nfm", "joint_nfm and variants", 0.11, 0.085158623, 0.134841377) in marks(whole)
    assert {m for m in marks(whole) if m[1] == "one seed" and m[2] < 0.115} == {
        ("joint_nfm", "one seed", 0.10), ("joint_nfm", "one seed", 0.11),
    }  # fmt: skip
    assert ("joint_nfm: direct only", "with paths ablated", 0.4, 0.4, 0.4) in marks(ablations)
    assert ablations.plot.layout.xaxis.rangemode == "tozero"
    assert {m[2] for m in marks(ablations)} == set(ablations.data["value"].round(9))
    table = next(block for block in there.blocks if isinstance(block, Table))
    assert [line[5] for line in table.rows] == ["0.1100 (0.0100)", "0.4000 (0.0000)", "0.1200 (0.0000)"]
    assert list(table.strong) == [True, False, True]


def test_one_seed_has_no_interval(tmp_path):
    whole = figures(section(run_of(tmp_path, compared(rows=ROWS[:3]))))[1]
    assert marks(whole) == {
        ("joint_nfm", "joint_nfm and variants", 0.1), ("joint_nfm", "joint_nfm and variants", 0.2),
        ("topk", "TopK", 0.12), ("topk", "TopK", 0.25),
    }  # fmt: skip
    assert "one seed" in whole.caption
    assert "interval" not in whole.caption.partition(";")[0]


def test_members_at_other_sparsities_are_not_beside_the_others(tmp_path):
    rows = (
        *ROWS,
        compare_row("standard 3", 0.5, 0.5, family="standard", l0=20.0),
        compare_row("standard", 0.15, 0.3, family="standard", kind=RowKind.INTERPOLATED),
        compare_row("gated", None, None, family="gated", kind=RowKind.INTERPOLATED, l0=None),
    )
    whole = figures(section(run_of(tmp_path, compared(rows=rows))))[1]
    assert labels(whole.plot) == ["joint_nfm", "topk", "standard"]


def test_several_results_and_several_k(tmp_path):
    both = compared(rows=(*ROWS, *(replace(row, k=64) for row in ROWS)))
    there = section(run_of(tmp_path, compared_once(), compared_once(), both))
    assert [block.text for block in there.blocks if isinstance(block, Heading)] == [
        "One run: 0", "One run: 1", "Several seeds: 2", "k = 32", "k = 64",
    ]  # fmt: skip
    assert len(figures(there)) == 2 + 2 + 4


def test_the_same_twice_and_without_timings(tmp_path):
    faster = compared(rows=tuple(replace(row, training_tokens_per_second=9.0) for row in ROWS))
    assert plots(section(run_of(tmp_path, compared_once(), compared()))) == plots(
        section(run_of(tmp_path, compared_once(), faster))
    )


def test_a_diverged_seed_is_left_out_of_the_mean():
    rows = [compare_row("topk", fvu, 0.2, seed=seed) for seed, fvu in enumerate((0.1, float("nan"), 0.3))]
    fvu, kl = arm_means(rows)
    assert (fvu.seeds, fvu.values, fvu.mean) == ((0, 2), (0.1, 0.3), pytest.approx(0.2))
    assert kl.seeds == (0, 1, 2)
    assert arm_means([replace(rows[1], kl_nats=None)]) == ()


def evaluation(sae, kl, *, tokens="same", data="held-out tokens of the embedded model", l0=8.0):
    return Evaluation(
        sae=sae,
        architecture="topk",
        model_name="tiny",
        hook_name="blocks.1",
        data=data,
        context_size=64,
        passes=1,
        metrics={
            "model_behavior_preservation": {"kl_div_with_sae": kl, "kl_div_score": None},
            "model_performance_preservation": {"ce_loss_with_sae": 4.5, "ce_loss_without_sae": 4.25},
            "sparsity": {"l0": l0},
            "token_stats": {"total_tokens_eval_reconstruction": 4096},
        },
        feature_metrics={"feature_density": [0.5, None]},
        provenance={"config": {"save": "x"}, "tokens_sha256": tokens},
    )


def tables(there):
    return [block for block in there.blocks if isinstance(block, Table)]


def test_evaluations_on_the_same_tokens_are_one_table(tmp_path):
    """What `evaluate --save` wrote, also with what is no number; SAEs by their names, other tokens in a table of their own."""
    saved = [evaluation("runs/mine", 0.5), evaluation("/home/me/other", 0.25, l0=16.0), evaluation("release:id", 1.0)]
    elsewhere = [evaluation("runs/mine", 0.75, tokens="others")]
    for number, one in enumerate([*saved, *elsewhere]):
        one.save(tmp_path / f"{number}.json")
    written = write_report(ReportConfig(run=str(tmp_path)))
    assert written.sections == (TITLE,)
    assert "sae-nfm demo " not in written.words()
    assert "sae-nfm evaluate SAE --save RUN/SAE.json" not in written.words()
    there = section(read_run(tmp_path))
    first, second = tables(there)
    names = {row[0]: dict(zip(first.columns, row, strict=True)) for row in first.rows}
    assert list(names) == ["mine (0.json)", "other", "release:id"]  # "mine" was evaluated twice
    assert {name: (row["KL, nats"], row["L0"], row["CE score"]) for name, row in names.items()} == {
        "mine (0.json)": ("0.5", "8", "-"),
        "other": ("0.25", "16", "-"),
        "release:id": ("1", "8", "-"),
    }
    assert [row[0] for row in second.rows] == ["mine (3.json)"]
    assert "4,096 tokens of held-out tokens of the embedded model" in first.caption
    (ranked,) = there.verdicts
    assert ranked.endswith("other 0.25 at L0 16; mine (0.json) 0.5 at L0 8; release:id 1 at L0 8.")
    assert "without a test" in ranked


def test_fidelity_measured_from_python_is_a_table(tmp_path):
    found = {"mine": Fidelity(fvu=0.1, l0=8, kl_nats=0.2, ce_nats=4.5, ce_delta_nats=0.25, tokens=1000)}
    FidelityTable(saes=found).save(tmp_path / "saved.json")
    (tmp_path / "plain.json").write_text(json.dumps({name: asdict(one) for name, one in found.items()}))
    shown = tables(section(read_run(tmp_path)))
    assert [[list(row) for row in table.rows] for table in shown] == [
        [["mine", "0.1", "0.2", "4.5", "0.25", "8", "1,000"]]
    ] * 2
