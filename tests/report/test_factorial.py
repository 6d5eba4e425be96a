"""The section on 2x2 experiments: cell means and their intervals are those of the tests."""

import numpy as np
import pytest
from report_inputs import CELLS, LEVELS, RUN, factorial_experiment, figures_by_name, traces
from report_runs import run_of
from scipy import stats

from sae_nfm.experiments.factorial.cell_means import arm_cells, largest_clamps, outcomes
from sae_nfm.experiments.factorial.clamp_tests import cell_estimates, contrast_estimate
from sae_nfm.report.blocks import Table
from sae_nfm.report.chapters import factorial as factorial_chapter
from sae_nfm.report.html import section_html
from sae_nfm.stats.anova_2x2 import factorial_test
from sae_nfm.stats.estimates import Estimate


@pytest.fixture
def run(tmp_path):
    result, changes = factorial_experiment()
    (tmp_path / "0").mkdir()
    changes.to_parquet(tmp_path / "0" / "changes.parquet")
    return run_of(tmp_path, result)


def test_cell_means_are_those_of_the_result(run):
    (found,) = run.results
    for one in arm_cells(found.result, found.path.parent):
        told = one.arm.tests.items["log_prob"]
        assert [cell.estimate for cell in one.cells if isinstance(cell, Estimate)] == pytest.approx(
            told.cell_means,
            rel=1e-12,  # the same sums, of rows that went through a file
        )
        assert one.contrast.estimate == told.contrast  # that of the test itself


def test_an_interval_by_hand():
    values, cells = np.array([1.0, 2.0, 6.0, 5.0, 5.0, 0.0, 1.0, 2.0]), np.array([0, 0, 0, 1, 1, 2, 2, 3])
    first, second, _, single = cell_estimates(values, cells)
    half = stats.t.ppf(0.975, 2) * np.sqrt(7.0) / np.sqrt(3)  # of 1, 2, 6: mean 3, variance 7
    assert isinstance(first, Estimate)
    assert isinstance(second, Estimate)
    assert (first.estimate, first.low, first.high) == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-12)
    assert (second.low, second.high) == (5.0, 5.0)
    assert single == 2.0


def test_the_contrasts_interval_is_of_the_pooled_error():
    values = np.random.default_rng(1).normal(size=len(CELLS))
    found = contrast_estimate(factorial_test(values, CELLS))
    means = np.array([values[cell == CELLS].mean() for cell in range(4)])
    error = np.sqrt(np.square(values - means[CELLS]).sum() / 16 * 4 / 5)
    half = stats.t.ppf(0.975, 16) * error
    assert (found.low, found.high) == pytest.approx((found.estimate - half, found.estimate + half), rel=1e-9)


def test_outcomes_weigh_words_by_their_cell():
    _, changes = factorial_experiment()
    rows = changes[changes["arm"] == changes["arm"][0]]
    values, cells = outcomes(rows)
    own = rows[rows["item"] == 3].groupby("word_cell")["log_prob_change"].mean()
    assert values[3] == pytest.approx((own[0] - own[1] - own[2] + own[3]) / 4, rel=1e-12)
    assert cells.tolist() == CELLS.tolist()


def test_lines_of_a_panel_are_the_cells(run):
    (found,) = run.results
    shown = largest_clamps(arm_cells(found.result, found.path.parent))
    assert [one.arm.times for one in shown] == [4.0, 4.0, 4.0]
    means = shown[0].arm.tests.items["log_prob"].cell_means
    drawn = figures_by_name(factorial_chapter.section(run))["cells-0"]
    for second, level in enumerate(LEVELS[1]):
        trace = traces(drawn)[level]
        assert list(trace.x) == list(LEVELS[0])
        assert list(trace.y) == pytest.approx([means[second], means[2 + second]], rel=1e-12)
        assert all(trace.error_y.array[place] > 0 for place in range(2))


def test_every_arm_has_its_contrast(run):
    (found,) = run.results
    drawn = figures_by_name(factorial_chapter.section(run))
    for kind, arms in (("feature", [0, 1, 3]), ("pair", [2])):
        data = drawn[f"contrast-{kind}-0"].data
        expected = [found.result.arms[arm].tests.items["log_prob"].contrast for arm in arms]
        assert data["value"].tolist() == expected
        assert "Holm p" in data["row"][0]
        assert data["series"].tolist()[-1] == ("control" if kind == "feature" else "selected")


def test_a_null_result_is_said(run):
    section = factorial_chapter.section(run)
    assert section is not None
    assert "No clamp shows an interaction: of 3 tests none is left by Holm's correction." in section.verdicts
    selection, arms = (block for block in section.blocks if isinstance(block, Table))
    assert selection.rows[0][:4] == ("mood (main effect)", "3", "7", "9.0")
    assert len(arms.rows) == 4
    assert arms.strong == [True, True, True, False]


def test_without_the_changes_there_are_means_alone(run):
    (run.folder / "0" / "changes.parquet").unlink()
    figure = figures_by_name(factorial_chapter.section(run))["cells-0"]
    assert figure.data["low"].isna().all()
    assert figure.data["mean_nats"].notna().all()
    assert "changes.parquet is not beside it" in figure.caption


def test_changes_of_another_experiment(run):
    (found,) = run.results
    _, changes = factorial_experiment()
    other = changes.assign(log_prob_change=1.5 * changes["log_prob_change"])
    other.to_parquet(run.folder / "0" / "changes.parquet")
    with pytest.raises(ValueError, match=r"cell means.*'mood \(main effect\): feature 3 at -4 x typical'.*changes"):
        arm_cells(found.result, found.path.parent)
    other[other["arm"] != other["arm"][0]].to_parquet(run.folder / "0" / "changes.parquet")
    with pytest.raises(ValueError, match="no arm 'mood"):
        arm_cells(found.result, found.path.parent)


def test_made_twice_it_is_the_same(run):
    one, other = (factorial_chapter.section(run) for _ in range(2))
    assert one is not None
    assert other is not None
    assert section_html(one) == section_html(other)


def test_a_run_without_experiments_has_no_section():
    assert factorial_chapter.section(run_of(RUN)) is None
