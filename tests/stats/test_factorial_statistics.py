import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats
from simulated_evidence import counts_by_chance
from simulated_factorial import MANY, TRIALS, cells_of, changes_of_words, factorial_values, rejections_allowed
from statsmodels.stats.anova import anova_lm

from sae_nfm.stats.anova_2x2 import (
    SIGNS,
    any_bucket_p,
    by_bucket,
    effect_t,
    factorial_test,
    index_paired_f,
    mixed_model,
    partial_eta_squared,
    removability,
    word_pattern,
)


def test_f_by_hand():
    # cell means 4, 2, 1, 3; each cell's two items lie 1 to either side, so MSE = 8 / 4 = 2
    values = np.array([5, 3, 3, 1, 2, 0, 4, 2], dtype=float)
    test = factorial_test(values, cells_of(2))
    assert test.cell_means == (4, 2, 1, 3)
    assert test.contrast == pytest.approx(4 - 2 - 1 + 3)
    assert test.f == pytest.approx(4**2 / (2 * 4 / 2))
    assert test.df == 4
    assert test.p_value == pytest.approx(stats.f.sf(4, 1, 4))
    assert test.partial_eta_squared.estimate == pytest.approx(4 / (4 + 4))
    assert factorial_test(values, cells_of(2), "first").f == pytest.approx((4 + 2 - 1 - 3) ** 2 / 4)


@pytest.mark.parametrize("counts", [(5, 5, 5, 5), (3, 7, 4, 9)])
def test_against_the_analysis_of_variance_of_statsmodels(counts):
    rng = np.random.default_rng(0)
    cells = rng.permutation(np.repeat(np.arange(4), counts))
    values = factorial_values(rng, cells, interaction=0.4)
    rows = pd.DataFrame({"y": values[:, 0]} | {name: signs[cells] for name, signs in SIGNS.items()})
    fit = smf.ols("y ~ first * second", rows).fit()
    names = {"first": "first", "second": "second", "interaction": "first:second"}
    by_type = {kind: anova_lm(fit, typ=kind) for kind in (2, 3)}
    for effect, name in names.items():
        test = factorial_test(values[:, 0], cells, effect)
        assert test.f == pytest.approx(by_type[3].loc[name, "F"], rel=1e-9)  # float64
        assert test.p_value == pytest.approx(by_type[3].loc[name, "PR(>F)"], rel=1e-9)
        assert float(effect_t(values, cells, effect)[0] ** 2) == pytest.approx(test.f, rel=1e-9)
    assert factorial_test(values[:, 0], cells).f == pytest.approx(by_type[2].loc["first:second", "F"], rel=1e-9)


def test_many_columns_are_each_for_itself_and_constants_have_no_effect():
    rng = np.random.default_rng(1)
    cells = rng.permutation(cells_of(6))
    values = factorial_values(rng, cells, width=5)
    values[:, 3] = 0.1
    values[:, 4] = 1e6 + SIGNS["interaction"][cells]  # no spread within cells, so nothing to test against
    t = effect_t(values, cells, "interaction")
    assert t[3] == t[4] == 0
    for column in range(3):
        assert t[column] == pytest.approx(effect_t(values[:, column], cells, "interaction"), rel=1e-9)
    assert factorial_test(values[:, 3], cells).p_value == 1


def test_interval_of_partial_eta_squared():
    # Steiger 2004 inverts noncentral F: at its ends the observed F is the 5 % and the 95 % quantile
    found = partial_eta_squared(6.0, 76)
    for end, tail in ((found.low, 0.95), (found.high, 0.05)):
        assert stats.ncf.cdf(6.0, 1, 76, end * 80 / (1 - end)) == pytest.approx(tail, abs=1e-6)
    limit = float(stats.f.isf(0.05, 1, 76))
    assert partial_eta_squared(limit * 1.001, 76).low > 0
    assert partial_eta_squared(limit * 0.999, 76).low == 0


@pytest.mark.parametrize("f", [0.0, 1e-9, 1e-3, 0.05, 0.5])
def test_an_f_near_0_excludes_no_effect_that_it_could_have_missed(f):
    """Inverting noncentral F would give 0 to 0.06: an upper end of 0 reads as proof that there is no effect."""
    found = partial_eta_squared(f, 76)
    bound = -2 * np.log(0.05)  # the noncentrality at which F = 0 is 0.05 times as probable as without an effect
    assert found.low == 0
    assert found.high == pytest.approx(bound / (bound + 80), rel=1e-12)
    density = stats.ncf.pdf(1e-9, 1, 76, bound) / stats.f.pdf(1e-9, 1, 76)
    assert density == pytest.approx(0.05, rel=1e-3)  # at 1e-9, as the density at 0 is infinite


def test_interval_of_partial_eta_squared_covers():
    rng = np.random.default_rng(2)
    cells, effect, missed = cells_of(10), 0.35, 0
    truth = effect**2 / (effect**2 + 1)  # of values with variance 1 within cells and effects -+0.35
    for _ in range(200):
        found = factorial_test(effect * SIGNS["interaction"][cells] + rng.normal(size=40), cells).partial_eta_squared
        missed += not found.low <= truth <= found.high
    low, high = counts_by_chance(200, 0.10)
    assert low <= missed <= high


def test_word_pattern_by_hand():
    assert word_pattern(np.array([[8.0, 2, 1, 3], [5, 5, 5, 5]])).tolist() == [(8 - 2 - 1 + 3) / 4, 0]


@pytest.mark.parametrize("trials", TRIALS)
def test_main_effects_of_stimuli_and_of_words_make_no_interaction_of_stimuli(trials):
    """Words of own cells alone would show one: stimuli of the first factor times words of the second."""
    rng = np.random.default_rng(4)
    cells, word_cells = cells_of(20), cells_of(12)
    pattern = any_bucket = own = 0
    limit = stats.f.isf(0.05, 1, 76)
    every = 5 if trials == MANY else 2  # statsmodels takes its time
    for trial in range(trials):
        strength = 1.0 * SIGNS["second"][cells] + 2 + 0.5 * rng.standard_t(4, size=80)
        buckets = by_bucket(np.outer(strength, rng.normal(size=48)), word_cells) + 0.1 * rng.normal(size=(80, 4))
        pattern += effect_t(word_pattern(buckets), cells, "interaction") ** 2 > limit
        own += effect_t(buckets[np.arange(80), cells], cells, "interaction") ** 2 > limit
        if trial % every == 0:
            any_bucket += any_bucket_p(buckets, cells) < 0.05
    fewest, most = rejections_allowed(trials)
    assert fewest <= pattern <= most
    low, high = counts_by_chance(trials // every)
    assert low <= any_bucket <= high
    assert own > 0.5 * trials


def test_any_bucket_finds_what_the_pattern_does_not_hold():
    rng = np.random.default_rng(12)
    cells = cells_of(20)
    buckets = rng.normal(size=(80, 4))
    buckets[:, [0, 1]] += (
        1.5 * SIGNS["interaction"][cells][:, None]
    )  # moves two buckets whose signs in the pattern differ
    assert any_bucket_p(buckets, cells) < 1e-6
    assert factorial_test(word_pattern(buckets), cells).p_value > 0.01
    one = np.zeros((80, 4))
    one[:, 2] = buckets[:, 0]  # a single bucket: the univariate test
    assert any_bucket_p(one, cells) == pytest.approx(factorial_test(buckets[:, 0], cells).p_value, rel=1e-6)
    assert any_bucket_p(np.ones((80, 4)), cells) == 1


@pytest.mark.parametrize("trials", TRIALS)
def test_size_of_the_interaction_with_stimuli_as_units_and_with_words_as_units(trials):
    rng = np.random.default_rng(5)
    cells, word_cells = cells_of(20), cells_of(12)
    by_item = by_word = 0
    by_item_limit, by_word_limit = (stats.f.isf(0.05, 1, n - 4) for n in (80, 80 * 48))
    for _ in range(trials):
        changes = changes_of_words(rng, cells, word_cells, word_spread=0.0, items=1.0)
        buckets = by_bucket(changes, word_cells)
        buckets += (0.5 * rng.normal(size=80))[:, None] * SIGNS["interaction"]  # what one sentence does to its words
        changes += (buckets - by_bucket(changes, word_cells))[:, word_cells]
        by_item += effect_t(word_pattern(buckets), cells, "interaction") ** 2 > by_item_limit
        single = (changes * SIGNS["interaction"][word_cells]).ravel()
        many = np.repeat(cells, 48)
        by_word += effect_t(single, many, "interaction") ** 2 > by_word_limit
    fewest, most = rejections_allowed(trials)
    assert fewest <= by_item <= most
    assert by_word > 0.2 * trials  # every word of every sentence counted as a replication


def test_mixed_model_agrees_with_the_analysis_of_variance_of_item_means():
    rng = np.random.default_rng(7)
    cells, word_cells = cells_of(10), cells_of(6)
    changes = changes_of_words(rng, cells, word_cells, items=1.0)
    signs = SIGNS["interaction"]
    changes += signs[word_cells] * (0.2 * signs[cells] + 0.3 * rng.normal(size=len(cells)))[:, None]
    found = mixed_model(changes, word_cells, cells)
    anova = factorial_test(word_pattern(by_bucket(changes, word_cells)), cells)
    assert found.words == "converged"
    assert found.contrast == pytest.approx(anova.contrast, rel=1e-6)  # balanced, so the estimates are one
    assert found.p_value == pytest.approx(
        2 * stats.norm.sf(np.sqrt(anova.f)), rel=0.02
    )  # Wald's z; optimiser's tolerance
    assert found.item_share is not None
    assert 0.1 < found.item_share < 0.45  # 0.3^2 between stimuli and 0.5^2 within: 0.26


def test_mixed_model_says_so_where_there_is_nothing_to_fit():
    cells, word_cells = cells_of(4), cells_of(3)
    assert mixed_model(np.zeros((16, 12)), word_cells, cells).words == "not fitted: nothing changed"
    alike = np.random.default_rng(8).normal(size=(16, 4))[:, word_cells]
    assert mixed_model(alike, word_cells, cells).words == "not fitted: words of a bucket change alike"
    noise = np.random.default_rng(8).normal(size=(16, 12))
    pattern = SIGNS["interaction"][word_cells]
    noise -= pattern * (noise * pattern).mean(
        1, keepdims=True
    )  # no spread between stimuli: the estimate is at its bound, 0
    found = mixed_model(noise, word_cells, cells)
    assert found.words == "converged, no variance between stimuli" or found.words.startswith("not converged")
    assert (found.p_value is None) == found.words.startswith("not converged")


def test_the_published_statistic_by_hand_depends_on_the_order_of_the_words():
    cells, word_cells = cells_of(2), cells_of(3)
    changes = np.zeros((8, 12))
    changes[:2, :3] = [[4, 5, 9], [6, 5, 9]]  # means 5, 5, 9 of the words of cell 0 after its own stimuli
    changes[2:4, 3:6] = [1, 2, 3]
    changes[4:6, 6:9] = [1, 1, 2]
    changes[6:, 9:] = [1, 0, 0]
    changes[:2, 3:] = 100  # after other stimuli: not read
    f, p = index_paired_f(changes, word_cells, cells)
    expected = stats.f_oneway([4, 3, 6], [0, 1, 2])
    assert (f, p) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))
    changes[2:4, 3:6] = [3, 1, 2]
    assert index_paired_f(changes, word_cells, cells)[0] != pytest.approx(f)
    assert index_paired_f(np.zeros((8, 12)), word_cells, cells) == (0.0, 1.0)


@pytest.mark.parametrize("convex", [True, False])
def test_an_interaction_of_scale_is_removable(convex: bool):
    rng = np.random.default_rng(9)
    cells = cells_of(20)
    additive = 1.2 * (SIGNS["first"] + SIGNS["second"])[cells] + 0.4 * rng.normal(size=80)
    values = np.exp(additive) if convex else -np.exp(-additive)
    found = removability(values, cells)
    assert found.p_values["as measured"] < 1e-6
    assert factorial_test(additive, cells).p_value > 0.05
    assert found.words == "removable"
    assert not found.crosses


def test_a_crossing_interaction_is_not_removed_and_none_is_called_none():
    rng = np.random.default_rng(10)
    cells = cells_of(20)
    crossing = removability(2 * SIGNS["interaction"][cells] + rng.normal(size=80), cells)
    assert (crossing.words, crossing.crosses, crossing.vanishes) == ("not removed", True, ())
    additive = removability(2 * SIGNS["first"][cells] + rng.normal(size=80), cells)
    assert additive.p_values["as measured"] > 0.05
    assert additive.words == "no interaction"


@pytest.mark.parametrize(
    ("means", "crosses"),
    [
        ((2, 1, 3, 0), True),  # the second factor's effect is the same way everywhere, the first's is not
        ((2, 3, 1, 0), True),  # the other way round
        ((0, 2, 1, 5), False),
        ((0, 0, 1, 1), False),
    ],
)
def test_effects_cross_where_one_changes_its_sign(means, crosses):
    values = np.repeat(np.array(means, dtype=float), 4) + np.tile([-0.1, -0.05, 0.05, 0.1], 4)
    assert removability(values, np.repeat(np.arange(4), 4)).crosses == crosses


def test_refusals():
    with pytest.raises(ValueError, match=r"\bcells\b.*\[2, 2, 2, 0\]"):
        factorial_test(np.ones(6), np.repeat(np.arange(3), 2))
    with pytest.raises(ValueError, match=r"\bcells\b.*\[1, 1, 1, 1\]"):
        factorial_test(np.ones(4), np.arange(4))
    with pytest.raises(ValueError, match=r"\b4 cells\b.*\b8 units\b"):
        effect_t(np.ones(8), np.arange(4), "first")
    with pytest.raises(ValueError, match=r"\bvalues\b.*\(5,\)"):
        factorial_test(np.array([1, np.nan, 2, 3, 4]), np.array([0, 1, 2, 3, 3]))
