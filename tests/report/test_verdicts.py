"""The chapter on verdicts: every answer is a mark, the words are those of the verdicts, rates are those of the sweep."""

from dataclasses import replace

import pytest
from invented_comparison import ANSWERS, SWEEP, answer, compared
from report_inputs import RUN
from report_runs import figures, labels, marks, plots, run_of

from sae_nfm.comparison.results import ClaimKind, SweepRow
from sae_nfm.report.blocks import Prose
from sae_nfm.report.chapters.verdicts import section

PART, TOPK = "joint_nfm against joint_nfm: direct only", "joint_nfm against topk"


@pytest.fixture(scope="module")
def whole():
    return section(run_of(RUN, compared()))


def test_nothing_without_a_comparison(tmp_path):
    assert section(run_of(tmp_path)) is None


def test_the_papers_comparison_and_the_fair_ones_share_a_scale(whole):
    scale = figures(whole)[0]
    assert labels(scale.plot) == [
        "The paper's comparison: with a part of itself", PART, "Fair: with SAEs trained on their own", TOPK,
    ]  # fmt: skip
    assert marks(scale) == {
        (PART, "FVU", -0.75, -0.76, -0.74), (PART, "KL", -0.60, -0.61, -0.59),
        (TOPK, "FVU", -0.05, -0.06, -0.04), (TOPK, "KL", 0.02, 0.01, 0.03),
    }  # fmt: skip
    assert {trace.xaxis for trace in scale.plot.data} == {"x"}
    assert scale.data["relative difference"].tolist() == [-0.75, -0.60, -0.05, 0.02]
    assert scale.data["verdict"].tolist() == ["better", "better", "better", "no difference shown"]


def test_fair_claims_carry_their_words(whole):
    fair = figures(whole)[1]
    assert marks(fair) == {(TOPK, "better", -0.05, -0.06, -0.04), (TOPK, "no difference shown", 0.02, 0.01, 0.03)}
    assert [a.text for a in fair.plot.layout.annotations] == ["<b>FVU</b>", "<b>KL</b>"]
    assert [trace.xaxis for trace in fair.plot.data] == ["x", "x2"]
    assert len(fair.data) == 2


def test_the_paper_is_named_and_null_results_are_counted(whole):
    said = whole.verdicts
    assert [line.startswith("The paper's comparison, an ablation: ") for line in said] == [True, True, False, False]
    assert said[2] == f"{ANSWERS[2].verdict.sentence}."
    assert said[3] == "No difference shown in 1 of 2 fair tests: joint_nfm against topk (kl_nats)."


def test_inference_and_paths_have_a_figure_and_words_of_their_own(tmp_path):
    gain = answer("staged_topk", "topk", "fvu", -0.2, kind=ClaimKind.INFERENCE, p=0.001)
    paths = answer("joint_nfm staged", "staged_topk", "fvu", 0.01, kind=ClaimKind.PATHS)
    there = section(run_of(tmp_path, compared(answers=(*ANSWERS, gain, paths))))
    assert there.verdicts[-2:] == [
        f"Gain from inference: {gain.verdict.sentence}.",
        "Gain from paths on the same inference: no difference shown in 1 of 1 tests: joint_nfm staged against staged_topk (fvu).",
    ]
    names = [figure.name for figure in figures(there)]
    assert names == ["one-scale-0-k32", "fair-0-k32", "inference-0-k32", "paths-0-k32", "rates-0-k32"]
    assert marks(figures(there)[2]) == {("staged_topk against topk", "better", -0.2, -0.21, -0.19)}
    assert labels(figures(there)[0].plot)[4:] == [
        "The gain from inference: stages, refinements, both", "staged_topk against topk",
        "The gain from NFM paths on the same inference", "joint_nfm staged against staged_topk",
    ]  # fmt: skip


def test_rates_with_and_without_rescaling_are_rows_of_their_own(tmp_path):
    same = {"k": 32, "arm": "staged_topk", "family": "staged_topk", "learning_rate": 0.001, "l0": 32.0}
    swept = (SweepRow(**same, fvu=0.3, rescaling=True), SweepRow(**same, fvu=0.2, rescaling=False, chosen=True))
    rates = figures(section(run_of(tmp_path, compared(sweep=swept))))[-1]
    assert labels(rates.plot) == ["staged_topk", "staged_topk, not rescaled"]
    assert rates.data[["rescaled", "chosen"]].to_numpy().tolist() == [[True, False], [False, True]]


def test_a_loss_is_said(tmp_path):
    worse = answer("joint_nfm", "topk", "fvu", 0.3, p=0.001)
    there = section(run_of(tmp_path, compared(answers=(worse,))))
    assert there.verdicts == [f"{worse.verdict.sentence}."]
    assert there.verdicts[0].endswith(": worse.")
    assert {m[1] for m in marks(figures(there)[1])} == {"worse"}


def test_too_few_seeds_are_no_claim(tmp_path):
    few = tuple(replace(a, verdict=replace(a.verdict, n_seeds=3)) for a in ANSWERS)
    there = section(run_of(tmp_path, compared(answers=few)))
    assert there.verdicts[-1] == "3 seeds: no claim in 2 of 2 fair tests: joint_nfm against topk (fvu, kl_nats)."
    assert {m[1] for m in marks(figures(there)[1])} == {"too few seeds: no claim"}


def test_rates_tried_and_chosen(whole):
    rates = figures(whole)[2]
    assert marks(rates) == {
        ("joint_nfm", "0.001", 0.3), ("joint_nfm", "0.002", 0.2), ("joint_nfm", "chosen", 0.2),
        ("topk", "0.001", 0.35), ("topk", "0.002", 0.25), ("topk", "0.004", 0.15),
        ("topk", "chosen, at an edge of the sweep", 0.15),
    }  # fmt: skip
    assert rates.data["chosen"].tolist() == [False, True, False, False, False, True]
    assert rates.data["FVU"].isna().sum() == 1  # diverged: in the data, no mark


def test_without_a_sweep_and_with_claims_that_could_not_be_judged(tmp_path):
    there = section(run_of(tmp_path, compared(sweep=(), missing=("a against b at k = 32: a diverged",))))
    assert len(figures(there)) == 2
    prose = next(block for block in there.blocks if isinstance(block, Prose))
    assert list(prose.lines) == ["No verdict: a against b at k = 32: a diverged."]


@pytest.mark.parametrize("changes", [{"answers": ANSWERS[:2]}, {"answers": (), "sweep": SWEEP}])
def test_parts_of_a_comparison(tmp_path, changes):
    assert len(figures(section(run_of(tmp_path, compared(**changes))))) == (2 if changes["answers"] else 1)


def test_an_interval_without_bounds_is_in_no_plot_and_no_data(tmp_path):
    relative = replace(ANSWERS[2].verdict.relative, low=float("-inf"), high=float("inf"))
    open_ended = replace(ANSWERS[2], verdict=replace(ANSWERS[2].verdict, relative=relative))
    fair = figures(section(run_of(tmp_path, compared(answers=(open_ended,)))))[1]
    assert marks(fair) == {(TOPK, "better", -0.05)}
    assert fair.data["low"].isna().all()


def test_the_same_twice(whole):
    assert plots(section(run_of(RUN, compared()))) == plots(whole)
