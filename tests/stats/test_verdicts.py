"""Verdicts over seeds and documents: against the tests they contain, and on arms that do or do not differ."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulated_evidence import arms_by_seed, counts_by_chance, quick_collection

from sae_nfm.stats.estimates import Estimate, mean_difference, paired_t, ratio_of_means
from sae_nfm.stats.seed_document_test import Verdict, corrected_verdicts, verdict, verdict_from_rows

NAMES = {"arm": "joint", "against": "topk", "measure": "kl_nats"}


@pytest.fixture(scope="module", autouse=True)
def collections_are_quick():
    with quick_collection():
        yield


def ends(estimate: Estimate, less: float = 0.0) -> tuple[float, float, float]:
    return estimate.estimate - less, estimate.low - less, estimate.high - less


def example(seed: int = 0, **settings: float) -> Verdict:
    a, b, weights = arms_by_seed(np.random.default_rng(seed), **settings)  # pyright: ignore[reportArgumentType]
    return verdict(a, b, weights=weights, **NAMES)


def test_difference_by_hand():
    # a - b = [[1, 3], [3, 9]]. Seed means 2, 6: variance 8 / 2 = 4. Document means 2, 6: without either 6 and 2, so
    # 1/2 (2^2 + 2^2) = 4. SE^2 = 8, df = 8^2 / (4^2 + 4^2) = 2, |t| < 4.3027.
    b = np.array([[2.0, 5.0], [4.0, 1.0]])
    found = verdict(b + np.array([[1, 3], [3, 9]]), b, **NAMES)
    assert ends(found.difference) == pytest.approx(
        (4, 4 - 4.30265 * math.sqrt(8), 4 + 4.30265 * math.sqrt(8)), rel=1e-5
    )
    assert found.difference.p_value == pytest.approx(2 * stats.t.sf(4 / math.sqrt(8), 2))
    assert found.relative.estimate == pytest.approx(4 / 3)
    assert (found.difference.n, found.difference.n_clusters, found.n_seeds) == (4, 2, 2)
    assert found.difference.test == (
        "paired difference, t-test over 2 seeds and 2 documents, crossed (2.0 degrees of freedom)"
    )
    assert found.words == "2 seeds: no claim"


def test_one_seed_is_the_mean_over_its_tokens_clustered_by_document():
    rng = np.random.default_rng(1)
    lengths, b = rng.integers(3, 30, 12), rng.gamma(5, size=12)
    a = b * rng.lognormal(sigma=0.1, size=12)
    tokens = [np.repeat(x, lengths) for x in (a, b, np.arange(12))]
    found = verdict(a[None], b[None], weights=lengths, **NAMES)
    assert ends(found.difference) == pytest.approx(ends(mean_difference(*tokens)), rel=1e-9)
    assert ends(found.relative) == pytest.approx(
        ends(ratio_of_means(*tokens), less=1), rel=1e-9
    )  # Fieller, in closed form
    assert found.words == "one seed: no claim"
    assert "t-test over 12 documents of one seed" in found.difference.test


def test_seeds_that_shift_all_documents_alike_are_the_paired_t_over_seeds():
    rng = np.random.default_rng(2)
    b = rng.gamma(5, size=(6, 20))
    shifts = rng.normal(size=6)
    found = verdict(b + shifts[:, None], b, weights=rng.gamma(5, size=20), **NAMES)
    oracle = paired_t(shifts)
    assert ends(found.difference) == pytest.approx(ends(oracle), rel=1e-9)
    assert found.difference.p_value == pytest.approx(oracle.p_value, rel=1e-9)


@pytest.mark.parametrize("n_seeds", [2, 5])
def test_relative_difference_leaves_out_zero_exactly_when_the_p_value_is_small(n_seeds: int):
    a, b, weights = arms_by_seed(np.random.default_rng(3), change=-0.05, n_seeds=n_seeds)
    p = verdict(a, b, weights=weights, **NAMES).difference.p_value
    assert p is not None
    for confidence, shown in ((1 - 1.01 * p, True), (1 - 0.99 * p, False)):
        found = verdict(a, b, weights=weights, confidence=confidence, **NAMES)
        assert (found.difference.high < 0) == shown
        assert (found.relative.high < 0) == shown


def test_relative_difference_is_free_of_units():
    a, b, weights = arms_by_seed(np.random.default_rng(4))
    found, scaled = verdict(a, b, weights=weights, **NAMES), verdict(7 * a, 7 * b, weights=3 * weights, **NAMES)
    assert ends(scaled.relative) == pytest.approx(ends(found.relative), rel=1e-9)
    assert ends(scaled.difference) == pytest.approx([7 * x for x in ends(found.difference)], rel=1e-9)


def test_words():
    assert example(change=-0.2).words == "better"
    assert example(change=0.2).words == "worse"
    assert example(change=0.0).words == "no difference shown"
    for n_seeds, words in ((1, "one seed: no claim"), (2, "2 seeds: no claim"), (4, "4 seeds: no claim")):
        found = example(change=-0.2, n_seeds=n_seeds)
        assert found.words == words
        assert found.difference.high < 0  # the figures are there all the same


def test_relabelled_by_hand():
    b = np.full((5, 4), 2.0)
    # Means of the signed differences: of 32 patterns only all of one sign reach 5; with one sign turned, 6 reach 3.
    assert verdict(b - np.array([[1], [1], [1], [1], [1]]), b, **NAMES).relabelled == 1 / 32
    assert verdict(b + np.array([[1], [1], [-1], [1], [1]]), b, **NAMES).relabelled == 6 / 32
    assert verdict(b, b, **NAMES).relabelled == 1
    assert verdict(b[:1] + 1, b[:1], **NAMES).relabelled == 0.5


def test_seeds_that_disagree_make_no_verdict_whatever_t_says():
    b = np.full((7, 4), 2.0)
    # t = 2.5 on 6 degrees of freedom; but 8 of the 128 patterns of 7 seeds have at most one of the other sign.
    found = verdict(b - np.array([[1]] * 6 + [[-1]]), b, **NAMES)
    assert found.difference.high < 0
    assert found.relabelled == 8 / 128
    assert found.words == "no difference shown"
    assert found.sentence.endswith(": no difference shown (the seeds disagree)")


def test_sentence():
    b = np.full((5, 4), 2.0)
    found = verdict(b - 0.5, b, **NAMES)
    assert found.sentence == (
        "joint against topk, kl_nats: -0.5 [-0.5, -0.5], -25.0% [-25.0%, -25.0%] over 5 seeds and 4 documents: better"
    )
    assert verdict(b, b, **NAMES).sentence.endswith(
        "+0.0% [+0.0%, +0.0%] over 5 seeds and 4 documents: no difference shown"
    )


def test_a_baseline_that_may_be_zero_leaves_the_relative_difference_open():
    rng = np.random.default_rng(5)
    found = verdict(rng.normal(size=(5, 10)), rng.normal(size=(5, 10)), **NAMES)
    assert (found.relative.low, found.relative.high) == (-math.inf, math.inf)


def test_rows_give_what_arrays_give():
    a, b, weights = arms_by_seed(np.random.default_rng(6), n_documents=7)
    seeds, documents = np.indices(a.shape)
    rows = pd.concat(
        pd.DataFrame(
            {
                "seed": seeds.ravel(),
                "document": documents.ravel(),
                "arm": arm,
                "kl_nats": values.ravel(),
                "tokens": np.tile(weights, 5),
            }
        )
        for arm, values in (("joint", a), ("topk", b))
    ).sample(frac=1, random_state=0)
    found = verdict_from_rows(rows, "kl_nats", arm="joint", against="topk")
    expected = verdict(a, b, weights=weights, **NAMES)
    assert (found.sentence, found.n_seeds, found.relabelled) == (expected.sentence, 5, expected.relabelled)
    for one, other in ((found.difference, expected.difference), (found.relative, expected.relative)):
        # arrays of another layout may be summed in another order
        assert (*ends(one), one.p_value) == pytest.approx((*ends(other), other.p_value), rel=1e-9)
        assert (one.n, one.n_clusters, one.test) == (other.n, other.n_clusters, other.test)


def test_correction_changes_words_and_leaves_those_without_a_claim_alone():
    near = next(v for v in (example(seed, change=-0.04) for seed in range(100)) if v.words == "better")
    others = [example(seed) for seed in range(20)]
    few = example(change=-0.2, n_seeds=3)
    found = corrected_verdicts([few, near, *others], "holm")
    assert found[0] == few
    assert near.difference.p_value is not None
    assert found[1].difference.p_value == pytest.approx(min(1, 21 * near.difference.p_value))
    assert found[1].words == "no difference shown"
    assert found[1].sentence.endswith(": no difference shown (Holm over 21 tests)")
    assert corrected_verdicts([few], "holm") == (few,)


def test_error_messages():
    a, b, weights = arms_by_seed(np.random.default_rng(7), n_documents=4)
    with pytest.raises(ValueError, match=r"'joint'.*\[4, 4\].*'topk'.*\[5, 4\]"):
        verdict(a[1:], b, **NAMES)
    for bad in (a[0], a[:0], a[:, :1]):
        with pytest.raises(ValueError, match=rf"'joint'.*{re.escape(str(bad.shape))}.*\[seeds, documents\]"):
            verdict(bad, b, **NAMES)
    b_bad = b.copy()
    b_bad[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"'topk'.*\b1 NaN\b.*\bseed 2, document 3\b"):
        verdict(a, b_bad, **NAMES)
    with pytest.raises(ValueError, match=r"\bweights\b.*\(4,\).*\b0\b.*\b4 documents\b"):
        verdict(a, b, weights=[1, 2, 0, 3], **NAMES)
    with pytest.raises(ValueError, match=r"\bweights\b.*\(3,\)"):
        verdict(a, b, weights=weights[:3], **NAMES)
    with pytest.raises(ValueError, match=r"\bmean of 'topk' is 0\b"):
        verdict(a, 0 * b, **NAMES)
    with pytest.raises(ValueError, match=r"\bconfidence\b.*\b5\b"):
        verdict(a, b, confidence=5, **NAMES)


def test_random_improvements_are_called_better_no_more_often_than_announced():
    rng = np.random.default_rng(8)
    trials, words = 200, []
    for _ in range(trials):
        arms = arms_by_seed(rng, seed_sd=0.05)
        swapped = rng.permuted(np.stack(arms[:2], axis=-1), axis=-1)  # labels permuted in each cell on its own
        words.append(verdict(*arms[:2], weights=arms[2], **NAMES).words)
        words.append(verdict(swapped[..., 0], swapped[..., 1], weights=arms[2], **NAMES).words)
    _, most = counts_by_chance(trials, 0.025)
    for part in (words[::2], words[1::2]):
        assert part.count("better") <= most
        assert part.count("worse") <= most


def test_a_real_improvement_is_found():
    rng = np.random.default_rng(9)
    words = [
        verdict(a, b, weights=w, **NAMES).words for a, b, w in (arms_by_seed(rng, change=-0.1) for _ in range(100))
    ]
    assert words.count("better") >= 80  # at 10 %, with noise of 2 % by seed and 10 % by document in each arm
    assert words.count("worse") == 0
