"""Means over tokens, intervals over documents: by hand, against statsmodels and scipy, and on data with a known truth."""

import itertools
import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats
from simulated_evidence import clustered_values, counts_by_chance, kl_of_two_arms, quick_collection

from sae_nfm.stats.estimates import (
    Bootstrap,
    BootstrapT,
    Estimate,
    clustered_mean,
    corrected,
    corrected_p_values,
    effect_size,
    fieller,
    mean_difference,
    paired_t,
    ratio_of_means,
    relative_change,
)

EXACT = 1e-12  # relative; float64 sums of a few thousand numbers


@pytest.fixture(scope="module", autouse=True)
def collections_are_quick():
    with quick_collection():
        yield


def ends(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.estimate, estimate.low, estimate.high


def arms(seed: int = 0, n_documents: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return kl_of_two_arms(np.random.default_rng(seed), 0.7, n_documents)


def test_mean_by_hand():
    # Without document 7 the mean is 5, without document 3 it is 2: SE^2 = 1/2 ((5 - 3)^2 + (2 - 3)^2) = 2.5.
    # Effective documents 3^2 / (2^2 + 1^2) = 1.8: below 2, so 1 degree of freedom, where |t| < 12.706 and
    # p = 1 - 2/pi atan |t|.
    found = clustered_mean([1.0, 5.0, 3.0], [7, 3, 7])
    assert ends(found) == pytest.approx((3, 3 - 12.7062 * math.sqrt(2.5), 3 + 12.7062 * math.sqrt(2.5)), rel=1e-5)
    assert found.p_value == pytest.approx(1 - 2 / math.pi * math.atan(3 / math.sqrt(2.5)), rel=EXACT)
    assert (found.n, found.n_clusters, found.confidence, found.correction) == (3, 2, 0.95, None)
    assert found.test == "mean, t-test clustered by document (jackknife, 1.0 degrees of freedom)"


@pytest.mark.parametrize("n_documents", [2, 5, 40])
def test_documents_of_equal_length_give_the_clustered_errors_of_statsmodels(n_documents: int):
    rng = np.random.default_rng(n_documents)
    documents = np.repeat(np.arange(n_documents), 9)
    values = 0.2 + rng.normal(size=n_documents)[documents] + rng.standard_t(3, documents.size)
    oracle = sm.OLS(values, np.ones_like(values)).fit(cov_type="cluster", cov_kwds={"groups": documents}, use_t=True)
    found = clustered_mean(values, documents)
    assert ends(found) == pytest.approx((oracle.params[0], *oracle.conf_int()[0]), rel=1e-9)
    assert found.p_value == pytest.approx(oracle.pvalues[0], rel=1e-9)


def test_the_error_is_that_of_leaving_each_document_out():
    values, documents = clustered_values(np.random.default_rng(3), n_documents=15)
    table = pd.DataFrame({"value": values, "document": documents})
    left_out = np.array([table[table.document != d].value.mean() for d in range(15)])
    error = math.sqrt(14 / 15 * ((left_out - values.mean()) ** 2).sum())
    lengths = table.groupby("document").size()
    df = lengths.sum() ** 2 / (lengths**2).sum() - 1
    half = stats.t.ppf(0.95, df) * error
    found = clustered_mean(values, documents, confidence=0.9)
    assert ends(found) == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), rel=1e-9)
    assert df < 14 - 1


def test_order_and_names_of_documents_do_not_matter():
    a, b, documents = arms()
    order = np.random.default_rng(1).permutation(len(a))
    names = np.array([f"document {d}" for d in documents])
    for statistic in (mean_difference, ratio_of_means, effect_size):
        assert ends(statistic(a[order], b[order], names[order])) == pytest.approx(
            ends(statistic(a, b, documents)), rel=1e-9
        )


def test_one_arm_with_itself_differs_by_nothing():
    a, _, documents = arms()
    for bootstrap in (None, Bootstrap(seed=0)):
        found = mean_difference(a, a, documents, bootstrap=bootstrap)
        assert (*ends(found), found.p_value) == (0, 0, 0, 1)
        found = relative_change(a, a, documents, bootstrap=bootstrap)
        assert (*ends(found), found.p_value) == (0, pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9), 1)


@pytest.mark.parametrize("bootstrap", [None, Bootstrap(seed=4)])
def test_a_ratio_to_one_is_a_mean(bootstrap: Bootstrap | None):
    values, documents = clustered_values(np.random.default_rng(5), n_documents=20)
    ratio = ratio_of_means(values, np.ones_like(values), documents, bootstrap=bootstrap)
    # Both see the same residuals; 1e-6: the square root of a rounded discriminant.
    assert ends(ratio) == pytest.approx(ends(clustered_mean(values, documents, bootstrap=bootstrap)), rel=1e-6)
    assert ratio.p_value != pytest.approx(clustered_mean(values, documents).p_value)  # of 1, not of 0


def test_ratio_is_free_of_units_and_tested_as_the_difference_is():
    a, b, documents = arms()
    found = ratio_of_means(a, b, documents)
    assert found.estimate == pytest.approx(a.mean() / b.mean(), rel=EXACT)
    assert ends(ratio_of_means(10 * a, 10 * b, documents)) == pytest.approx(ends(found), rel=1e-9)
    assert ends(ratio_of_means(b, a, documents)) == pytest.approx(
        [1 / x for x in (found.estimate, found.high, found.low)]
    )
    assert found.p_value == pytest.approx(mean_difference(a, b, documents).p_value, rel=1e-9)
    change = relative_change(a, b, documents)
    assert ends(change) == pytest.approx([x - 1 for x in ends(found)], rel=EXACT)
    assert change.test.startswith("relative change: ratio of means, Fieller's interval, t-test clustered by document")


@pytest.mark.parametrize("bootstrap", [None, Bootstrap(seed=2)])
def test_the_ratio_s_interval_leaves_out_one_exactly_when_the_p_value_is_small(bootstrap: Bootstrap | None):
    a, b, documents = kl_of_two_arms(np.random.default_rng(0), 0.94, 60)
    p = relative_change(a, b, documents, bootstrap=bootstrap).p_value
    assert p is not None
    assert 0.002 < p < 0.2
    assert relative_change(a, b, documents, confidence=1 - p * 1.01, bootstrap=bootstrap).high < 0
    assert relative_change(a, b, documents, confidence=1 - p * 0.99, bootstrap=bootstrap).high > 0


def test_fieller_by_hand():
    # (1 - r)^2 <= 4 (0.01 + 0.01 r^2): 0.96 r^2 - 2 r + 0.96 <= 0, r = (1 -+ sqrt(1 - 0.96^2)) / 0.96
    covariance = np.diag([0.01, 0.01])
    assert fieller(1, 1, covariance, 2) == pytest.approx(((1 - 0.28) / 0.96, (1 + 0.28) / 0.96), rel=EXACT)
    assert fieller(1, 0.19, covariance, 2) == (-math.inf, math.inf)  # b is 1.9 standard errors from 0: no bound
    assert fieller(1, 1, covariance, math.inf) == (-math.inf, math.inf)


def test_bootstrap_against_all_resamples_of_three_documents():
    sums, counts = np.array([4.0, -1.0, 9.0]), np.array([4.0, 2.0, 3.0])
    residuals = sums - sums.sum() / counts.sum() * counts
    exact: list[float] = []
    for draw in itertools.product(range(3), repeat=3):
        s, n = residuals[list(draw)], counts[list(draw)]
        mean = s.sum() / n.sum()
        left_out = np.array([np.delete(s, i).sum() / np.delete(n, i).sum() for i in range(3)])
        error = math.sqrt(2 / 3 * ((left_out - mean) ** 2).sum())
        exact.append(abs(mean) / error if len(set(draw)) > 1 else math.inf)
    found = BootstrapT.over_clusters(residuals, counts, Bootstrap(seed=0, n_resamples=20_000)).resampled
    for t in (0.2, 0.5, 1.0, 2.0, 10.0):
        # Four standard errors of a share of 20,000 are at most 0.014.
        assert np.mean(found >= t) == pytest.approx(np.mean(np.array(exact) >= t), abs=0.014)


def test_bootstrap_repeats_with_its_seed_and_agrees_with_t_for_many_documents():
    values, documents = clustered_values(np.random.default_rng(6), "normal", n_documents=400, length_spread=0.1)
    first, again, other = (clustered_mean(values, documents, bootstrap=Bootstrap(seed=s)) for s in (0, 0, 1))
    assert first == again
    assert ends(first) != ends(other)
    plain = clustered_mean(values, documents)
    # The 95 % point of 1,999 resamples has a relative error of about 2.5 %.
    assert first.high - first.low == pytest.approx(plain.high - plain.low, rel=0.1)
    assert first.p_value == pytest.approx(plain.p_value, abs=0.05)
    assert first.test == "mean, bootstrap-t over documents (1999 resamples, seed 0)"


def test_two_documents_resampled_bound_nothing():
    found = clustered_mean([1.0, 2.0, 5.0], [0, 0, 1], bootstrap=Bootstrap(seed=0))
    assert (found.low, found.high) == (-math.inf, math.inf)  # every second resample is one document twice
    assert found.p_value is not None
    assert found.p_value > 0.4


def test_effect_size_by_hand_and_by_leaving_documents_out():
    a, b = [2.0, 4.0, 3.0, 7.0], [1.0, 2.0, 0.0, 3.0]  # differences 1, 2, 3, 4: mean 2.5, variance 5/3
    found = effect_size(a, b, [0, 0, 1, 1])
    # Without the first document 3.5 / sqrt(1/2), without the second 1.5 / sqrt(1/2); |t| < 12.706 on 1 degree of freedom.
    d = 2.5 / math.sqrt(5 / 3)
    error = math.sqrt(1 / 2 * ((3.5 * math.sqrt(2) - d) ** 2 + (1.5 * math.sqrt(2) - d) ** 2))
    assert ends(found) == pytest.approx((d, d - 12.7062 * error, d + 12.7062 * error), rel=1e-5)
    assert found.p_value is None
    assert found.test.startswith("d_z of paired differences over tokens")


def test_effect_size_is_free_of_units_and_of_large_means():
    a, b, documents = arms()
    found = effect_size(a, b, documents)
    assert found.estimate == pytest.approx(pd.Series(a - b).mean() / pd.Series(a - b).std(), rel=1e-9)
    assert ends(effect_size(1e3 * a, 1e3 * b, documents)) == pytest.approx(ends(found), rel=1e-9)
    shifted = effect_size(a + 1e6, b, documents)
    assert shifted.estimate == pytest.approx((a - b + 1e6).mean() / (a - b).std(ddof=1), rel=1e-6)


def test_paired_t_is_scipy_s():
    rng = np.random.default_rng(7)
    a, b = rng.normal(1, 1, 5), rng.normal(0, 1, 5)
    oracle = stats.ttest_rel(a, b)
    found = paired_t(a, b, confidence=0.9)
    low, high = oracle.confidence_interval(0.9)
    assert (*ends(found), found.p_value) == pytest.approx(((a - b).mean(), low, high, oracle.pvalue), rel=EXACT)
    assert (found.n, found.n_clusters, found.test) == (5, None, "paired t-test over 5 seeds")
    assert replace(paired_t(a - b, confidence=0.9), test=found.test) == found  # the same differences
    assert (*ends(paired_t(a, a)), paired_t(a, a).p_value) == (0, 0, 0, 1)
    assert (*ends(paired_t([2.0, 2.0])), paired_t([2.0, 2.0]).p_value) == (2, 2, 2, 0)


def test_corrections_by_hand():
    p = [0.01, 0.04, 0.03, 0.5]
    assert corrected_p_values(p, "holm") == pytest.approx([0.04, 0.09, 0.09, 0.5])  # 4 p, 3 p, then never less
    assert corrected_p_values(p, "benjamini-hochberg") == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])


def test_corrected_estimates_keep_their_intervals():
    a, b, documents = arms()
    originals = [mean_difference(a, b, documents), relative_change(a, b, documents), clustered_mean(a, documents)]
    found = corrected(originals, "benjamini-hochberg")
    assert [ends(e) for e in found] == [ends(e) for e in originals]
    assert [e.p_value for e in found] == pytest.approx(
        corrected_p_values([e.p_value or 0 for e in originals], "benjamini-hochberg")
    )
    assert {e.correction for e in found} == {"Benjamini-Hochberg over 3 tests"}
    assert corrected(originals[:1], "holm")[0].correction == "Holm over 1 test"
    with pytest.raises(FrozenInstanceError):
        found[0].p_value = 0.0  # pyright: ignore[reportAttributeAccessIssue]


def test_error_messages():
    a, b, documents = arms()
    with pytest.raises(ValueError, match=r"\bvalues\b.*\b2\b.*\bof 3\b.*\bnan at 0\b"):
        clustered_mean([np.nan, 1, np.inf], [0, 1, 2])
    with pytest.raises(ValueError, match=r"\bvalues\b.*\(0,\)"):
        clustered_mean([], [])
    with pytest.raises(ValueError, match=r"\ba\b.*\(0,\)"):
        effect_size([], [], [])
    with pytest.raises(ValueError, match=r"\b2 values\b.*\bone document\b"):
        clustered_mean([1.0, 2.0], [4, 4])
    with pytest.raises(ValueError, match=r"\bdocuments\b.*\(3,\).*\bvalues\b.*\(2,\)"):
        clustered_mean([1.0, 2.0], [4, 4, 5])
    with pytest.raises(ValueError, match=r"\b1 value.*\bno document\b.*-1"):
        clustered_mean([1.0, 2.0, 3.0], [-1, 0, 1])
    with pytest.raises(ValueError, match=r"\b1 value.*\bno document\b"):
        clustered_mean([1.0, 2.0, 3.0], [np.nan, 0.0, 1.0])
    for statistic in (mean_difference, ratio_of_means, relative_change, effect_size):
        with pytest.raises(ValueError, match=rf"\ba\b.*\b3\b.*\bb\b.*\b{len(b)}\b"):
            statistic(a[:3], b, documents)
    with pytest.raises(ValueError, match=r"\bmean of b is 0\b"):
        ratio_of_means(a, 0 * b, documents)
    with pytest.raises(ValueError, match=r"\bdifferences\b.*\bequal\b"):
        effect_size(a, a, documents)
    for confidence in (95, 1, 0, -0.1):
        with pytest.raises(ValueError, match=rf"\bconfidence\b.* {confidence}\b"):
            clustered_mean(a, documents, confidence=confidence)
    with pytest.raises(ValueError, match=r"\b1 seed\b.*\b2\b"):
        paired_t([1.0], [2.0])
    with pytest.raises(ValueError, match=r"\bn_resamples\b.*\b10\b.*\b99\b"):
        Bootstrap(seed=0, n_resamples=10)


def test_error_messages_of_corrections():
    a, b, documents = arms()
    tested, untested = mean_difference(a, b, documents), effect_size(a, b, documents)
    with pytest.raises(ValueError, match=r"\bestimate 1\b.*\bd_z\b.*\bp-value\b"):
        corrected([tested, untested], "holm")
    with pytest.raises(ValueError, match=r"\bestimate 0\b.*\bHolm over 1 test\b"):
        corrected(corrected([tested], "holm"), "holm")
    with pytest.raises(ValueError, match=r"\bp_values\b.*\(0,\)"):
        corrected([], "holm")
    with pytest.raises(ValueError, match=r"\bp-values\b.*\b0\.5\b.*\b1\.5\b"):
        corrected_p_values([0.5, 1.5], "holm")
    with pytest.raises(ValueError, match=r"\bcorrection\b.*'bonferroni'.*\bholm, benjamini-hochberg\b"):
        corrected_p_values([0.5], "bonferroni")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bootstrap", [None, Bootstrap(seed=0, n_resamples=199)])
def test_chance_is_found_as_often_as_announced_and_by_a_token_level_test_far_more_often(bootstrap: Bootstrap | None):
    rng = np.random.default_rng(8)
    trials, rejected, naive = 200, 0, 0
    for _ in range(trials):
        values, documents = clustered_values(rng)
        found = clustered_mean(values, documents, bootstrap=bootstrap)
        assert found.p_value is not None
        assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
        rejected += found.p_value < 0.05
        naive += stats.ttest_1samp(values, 0).pvalue < 0.05
    low, high = counts_by_chance(trials)
    assert low <= rejected <= high
    assert naive > 5 * high / 2


def test_the_interval_of_a_relative_change_covers_the_truth():
    rng = np.random.default_rng(9)
    trials, missed = 200, 0
    for _ in range(trials):
        found = relative_change(*kl_of_two_arms(rng, 0.5))
        missed += not found.low <= -0.5 <= found.high
    low, high = counts_by_chance(trials)
    assert low <= missed <= high
