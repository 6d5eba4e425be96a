"""Permutation nulls, dips and mixtures: by hand, against scipy, and on data with a known truth."""

import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats
from simulated_evidence import counts_by_chance

from sae_nfm.stats.distributions import Mixture, MixtureComparison, compare_mixtures, dip_test, permuted_spearman


def test_spearman_over_all_permutations_by_hand():
    # Of the 24 orders only the identity has rho >= 1: one tail 1/24, two-sided 2/24. Over all orders rho averages 0.
    found = permuted_spearman([1, 2, 3, 4], [1, 8, 27, 64], seed=0)
    assert (found.observed, found.p_value, found.null_mean) == pytest.approx((1, 2 / 24, 0), abs=1e-12)
    assert (found.n, found.n_permutations) == (4, 24)
    # Sorted, the 24 begin -1, -0.8, -0.8, -0.8: 2.5 % of the way from first to last is 0.575 from the first to the second.
    assert (found.null_low, found.null_high) == pytest.approx((-0.885, 0.885))


def test_spearman_is_scipy_s_with_ties():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 5, 50)
    y = x + rng.integers(0, 6, 50)
    oracle = stats.spearmanr(x, y)
    found = permuted_spearman(x, y, seed=0, n_permutations=999)
    assert found.observed == pytest.approx(oracle.statistic, rel=1e-12)
    # Quantiles of the null: normal with variance 1 / (n - 1); 0.03 is 4 standard errors of one from 999 draws.
    assert (found.null_low, found.null_high) == pytest.approx((-1.96 / 7, 1.96 / 7), abs=0.05)
    assert found.p_value == pytest.approx(oracle.pvalue, abs=0.01)
    by_order = permuted_spearman(x, lambda order: y[order], seed=0, n_permutations=999)
    assert asdict(by_order) == pytest.approx(asdict(found), rel=1e-12)  # sums of ranks


def test_a_share_correlates_with_its_own_part_and_the_null_says_so():
    rng = np.random.default_rng(1)
    direct, linear = rng.gamma(2, size=(2, 300))
    found = permuted_spearman(
        direct, lambda order: linear[order] / (direct + linear[order]), seed=0, n_permutations=999
    )
    assert found.observed < -0.5  # by construction
    assert found.null_low < found.observed < found.null_high
    assert found.p_value > 0.05
    fixed = permuted_spearman(direct, linear / (direct + linear), seed=0, n_permutations=999)
    assert fixed.p_value == pytest.approx(2 / 1000)  # the wrong null: the share taken as if it did not contain `direct`
    assert fixed.null_mean == pytest.approx(0, abs=0.01)  # 5 standard errors


def test_a_correlation_beyond_construction_is_found():
    rng = np.random.default_rng(2)
    direct = rng.gamma(2, size=300)
    linear = rng.gamma(2, size=300) / (1 + direct)
    found = permuted_spearman(
        direct, lambda order: linear[order] / (direct + linear[order]), seed=0, n_permutations=999
    )
    assert found.observed < found.null_low
    assert found.p_value == pytest.approx(2 / 1000)


def test_permuted_spearman_rejects_as_often_as_announced():
    rng = np.random.default_rng(3)
    trials, rejected = 200, 0
    for trial in range(trials):
        a, b = rng.gamma(2, size=(2, 40))
        found = permuted_spearman(a, lambda order, a=a, b=b: b[order] / (a + b[order]), seed=trial, n_permutations=199)
        rejected += found.p_value <= 0.05
    low, high = counts_by_chance(trials)
    assert low <= rejected <= high


@pytest.mark.parametrize("n", [10, 101])
def test_dip_of_equal_steps_by_hand(n: int):
    found = dip_test(np.arange(n))  # no distribution dips less: 1 / 2n
    assert (found.dip, found.n) == (pytest.approx(1 / (2 * n)), n)
    assert found.p_value > 0.99


def test_dip_of_two_points_by_hand():
    found = dip_test([0.0] * 50 + [1.0] * 50)  # no distribution dips more: 1/4
    assert found.dip == pytest.approx(0.25)
    assert found.p_value < 1e-4


def test_dip_finds_two_modes_and_none_in_one_long_tail():
    rng = np.random.default_rng(4)
    assert dip_test(np.r_[rng.normal(-2, 1, 200), rng.normal(2, 1, 200)]).p_value < 0.01
    assert dip_test(rng.lognormal(size=400)).p_value > 0.5


def test_one_gaussian_s_bic_by_hand():
    x = np.random.default_rng(5).normal(3, 2, 100)
    one = compare_mixtures(x).fits[0]
    # -2 log L = n (log(2 pi var) + 1) at the maximum, and 2 parameters; scikit-learn adds 1e-6 to the variance.
    assert one.bic == pytest.approx(100 * (math.log(2 * math.pi * x.var()) + 1) + 2 * math.log(100), abs=1e-3)
    assert (*one.weights, *one.means, *one.sds) == pytest.approx((1, x.mean(), x.std()), rel=1e-5)


def test_mixtures_find_what_was_planted():
    rng = np.random.default_rng(6)
    two = compare_mixtures(np.r_[rng.normal(0.05, 0.02, 300), rng.normal(0.37, 0.05, 700)], max_components=3)
    assert two.preferred.n_components == 2
    assert (*two.preferred.means, *two.preferred.weights) == pytest.approx((0.05, 0.37, 0.3, 0.7), abs=0.01)
    assert two.preferred.sds == pytest.approx((0.02, 0.05), rel=0.15)
    one = compare_mixtures(rng.normal(0.4, 0.1, 1000))
    assert one.words == f"1 component preferred by a BIC difference of {one.fits[1].bic - one.fits[0].bic:.1f}"
    # At most the price of three further parameters; the fit stops up to half a unit of log-likelihood from its optimum.
    assert 0 < one.bic_difference < 3 * math.log(1000) + 1
    skewed = compare_mixtures(rng.lognormal(size=500))
    assert skewed.words.startswith("2 components preferred")  # not one Gaussian, and yet one mode


def test_mixtures_do_not_depend_on_the_unit():
    x = np.random.default_rng(7).gamma(2, size=200)
    plain, scaled = compare_mixtures(x, seed=1), compare_mixtures(1e-4 * x, seed=1)
    assert scaled.bic_difference == pytest.approx(plain.bic_difference, abs=1e-6)
    assert scaled.preferred.bic == pytest.approx(plain.preferred.bic + 2 * 200 * math.log(1e-4), abs=1e-6)
    assert scaled.preferred.means == pytest.approx([1e-4 * mean for mean in plain.preferred.means], rel=1e-6)


def test_bic_difference_is_to_the_next_best():
    fits = tuple(
        Mixture(weights=(1 / k,) * k, means=(0.0,) * k, sds=(1.0,) * k, bic=bic) for k, bic in ((1, 9), (2, 2), (3, 5))
    )
    assert MixtureComparison(fits=fits, n=10).words == "2 components preferred by a BIC difference of 3.0"


def test_error_messages():
    with pytest.raises(ValueError, match=r"\ba\b.*\b3\b.*\bb\b.*\b4\b"):
        permuted_spearman([1, 2, 3], [1, 2, 3, 4], seed=0)
    with pytest.raises(ValueError, match=r"\ba\b.*\b3\b.*\bb\b.*\b2\b"):
        permuted_spearman([1, 2, 3], lambda order: order[:2], seed=0)
    with pytest.raises(ValueError, match=r"\bb\b.*\b1\b.*\bof 3\b.*\binf at 2\b"):
        permuted_spearman([1, 2, 3], [1, 2, np.inf], seed=0)
    with pytest.raises(ValueError, match=r"\by\b.*\bone value\b"):
        permuted_spearman([1, 2, 3], [1, 1, 1], seed=0)
    with pytest.raises(ValueError, match=r"\bx\b.*\b2\b.*\b3\b"):
        permuted_spearman([1, 2], [1, 2], seed=0)
    with pytest.raises(ValueError, match=r"\b3 value.*\b4\b"):
        dip_test([1, 2, 3])
    with pytest.raises(ValueError, match=r"\b10 values\b.*\b2\b"):
        compare_mixtures([2.0] * 10)
    with pytest.raises(ValueError, match=r"\bvalues\b.*\b1 NaN\b"):
        compare_mixtures([np.nan] + [2.0] * 10)
    with pytest.raises(ValueError, match=r"\bmax_components\b.*\b1\b.*\b2\b"):
        compare_mixtures(range(20), max_components=1)
