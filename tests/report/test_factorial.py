"""The section on 2x2 experiments: cell means and their intervals are those of the tests."""

from dataclasses import replace

import numpy as np
import pytest
from report_inputs import CELLS, LEVELS, RUN, factorial_experiment, figures_by_name, traces
from report_runs import run_of
from scipy import stats

from sae_nfm.experiments.factorial.clamps import arms as planned_arms
from sae_nfm.experiments.factorial.clamps import cell_estimates, contrast_estimate
from sae_nfm.experiments.factorial.results import Unit, few_stimuli
from sae_nfm.report.blocks import Table
from sae_nfm.report.chapters import factorial as factorial_chapter
from sae_nfm.report.page import section_html
from sae_nfm.stats.anova_2x2 import factorial_test
from sae_nfm.stats.estimates import Estimate


@pytest.fixture
def run():
    return run_of(RUN, factorial_experiment())


def test_an_interval_by_hand():
    values, cells = np.array([1.0, 2.0, 6.0, 5.0, 5.0, 0.0, 1.0, 2.0]), np.array([0, 0, 0, 1, 1, 2, 2, 3])
    first, second, _, single = cell_estimates(values, cells)
    half = stats.t.ppf(0.975, 2) * np.sqrt(7.0) / np.sqrt(3)  # of 1, 2, 6: mean 3, variance 7
    assert isinstance(first, Estimate)
    assert (first.estimate, first.low, first.high) == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-12)
    assert second == 5.0  # two alike: no spread, and no interval
    assert single == 2.0


def test_the_contrasts_interval_is_of_the_pooled_error():
    values = np.random.default_rng(1).normal(size=len(CELLS))
    found = contrast_estimate(factorial_test(values, CELLS), values, CELLS)
    means = np.array([values[cell == CELLS].mean() for cell in range(4)])
    error = np.sqrt(np.square(values - means[CELLS]).sum() / 16 * 4 / 5)
    half = stats.t.ppf(0.975, 16) * error
    assert (found.low, found.high) == pytest.approx((found.estimate - half, found.estimate + half), rel=1e-9)


def test_a_contrast_of_0_has_an_interval():
    """F is 0 then, so that it says nothing of the error."""
    values = np.tile([1.0, -1.0], len(CELLS) // 2)
    values = np.where(np.isin(CELLS, (0, 3)), values, 2 * values)[: len(CELLS)]
    values -= np.array([values[cell == CELLS].mean() for cell in range(4)])[CELLS]
    found = contrast_estimate(factorial_test(values, CELLS), values, CELLS)
    assert isinstance(found, Estimate)
    error = np.sqrt(np.square(values).sum() / 16 * 4 / 5)
    assert found.high == pytest.approx(stats.t.ppf(0.975, 16) * error, rel=1e-9)
    assert found.low == pytest.approx(-found.high, rel=1e-9)
    assert contrast_estimate(factorial_test(0 * values, CELLS), 0 * values, CELLS) == 0.0


def test_what_old_files_have_for_an_f_near_0_is_not_defined():
    result = factorial_experiment()
    one = result.selected[0]
    none = replace(one.test.held_out.partial_eta_squared, estimate=0.0, low=0.0, high=0.0)
    old = replace(one, test=replace(one.test, held_out=replace(one.test.held_out, partial_eta_squared=none)))
    old_result = replace(result, selected=(old,))
    assert "0.000 [not defined]" in old_result.words()
    assert "0.000 [not defined]" in section_html(factorial_chapter.section(run_of(RUN, old_result)))


def test_a_feature_selected_for_both_factors_is_told_of_and_clamped_once():
    unit = Unit(kind="feature", index=(5,), role="a (main effect)", control=False, typical=2.0, frequency=0.5)
    units = [unit, replace(unit, role="b (main effect)")]
    planned = planned_arms(None, units, [1.0, 4.0], [2.0], ("a (main effect)", "b (main effect)"))
    assert [arm.edits[0].value for arm in planned] == [2.0, 8.0]  # 2 is 1 x typical
    result = factorial_experiment()
    chosen = tuple(replace(result.selected[0], unit=one) for one in units)
    told = "Feature 5 was selected for a and b alike"
    assert told in replace(result, selected=chosen).words()
    assert told in section_html(factorial_chapter.section(run_of(RUN, replace(result, selected=chosen))))
    assert told not in result.words()


def test_few_stimuli_deserve_a_warning():
    result = factorial_experiment()
    cells = [{"sentences": ["x"] * n} for n in (20, 5, 20, 20)]
    few = {**result.provenance, "stimuli": {**result.provenance["stimuli"], "cells": cells}}
    assert "A cell has 3 stimuli to test on, fewer than 8" in replace(result, provenance=few).words()
    assert few_stimuli(8) == ""


def test_lines_of_a_panel_are_the_cells(run):
    (found,) = run.results
    shown = found.result.largest_clamps()
    assert [arm.times for arm in shown] == [4.0, 4.0, 4.0]
    means = shown[0].tests.items["log_prob"].cell_means
    drawn = figures_by_name(factorial_chapter.section(run))["cells-0"]
    for second, level in enumerate(LEVELS[1]):
        trace = traces(drawn)[level]
        assert list(trace.x) == list(LEVELS[0])
        assert list(trace.y) == pytest.approx([means[second], means[2 + second]], rel=1e-12)
        assert all(trace.error_y.array[place] > 0 for place in range(2))


def test_files_of_0_1_0_have_means_alone():
    result = factorial_experiment()
    old = replace(result, arms=tuple(replace(arm, cells=None, contrast=None) for arm in result.arms))
    drawn = figures_by_name(factorial_chapter.section(run_of(RUN, old)))
    assert drawn["cells-0"].data["low"].isna().all()
    assert drawn["cells-0"].data["mean_nats"].notna().all()
    assert "sae-nfm factorial" in drawn["cells-0"].caption
    assert drawn["contrast-pair-0"].data["low"].isna().all()


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


def test_made_twice_it_is_the_same(run):
    one, other = (factorial_chapter.section(run) for _ in range(2))
    assert one is not None
    assert other is not None
    assert section_html(one) == section_html(other)


def test_a_run_without_experiments_has_no_section():
    assert factorial_chapter.section(run_of(RUN)) is None
