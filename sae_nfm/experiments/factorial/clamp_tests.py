"""The tests of one arm of a 2x2 experiment and its cell means with their intervals; nothing here runs a model.

    cell        m_c -+ t(n_c - 1) s_c / sqrt(n_c)             s_c: standard deviation of the cell's stimuli
    contrast    L -+ t(N - 4) |L| / sqrt(F)                   leaves out 0 exactly where F is significant

The outcome of a stimulus is the change of the words' own interaction pattern (`word_pattern`).
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from sae_nfm.experiments.factorial.results import PRIMARY_SCALE, ClampTests
from sae_nfm.stats import (
    Cells,
    Estimate,
    FactorialTest,
    Floats,
    StudentT,
    any_bucket_p,
    by_bucket,
    factorial_test,
    flipped_p,
    index_paired_f,
    interval,
    mixed_model,
    paired_t,
    permuted_p,
    removability,
    word_pattern,
)

CONFIDENCE = 0.95

CELLS = range(4)


def clamp_tests(
    changes: Mapping[str, Floats], word_cells: Cells, cells: Cells, rng: np.random.Generator, n_permutations: int
) -> ClampTests:
    """Test what an arm did.

    Args:
        changes: by scale, [items, words]: with the clamp less without it.
        word_cells: [words], the bucket of each.
        rng: of the permutations.
    """
    buckets = {scale: by_bucket(values, word_cells) for scale, values in changes.items()}
    outcome, in_any = word_pattern(buckets[PRIMARY_SCALE]), any_bucket_p(buckets[PRIMARY_SCALE], cells)
    published = index_paired_f(changes["logit"], word_cells, cells)
    return ClampTests(
        mean_absolute_change=float(np.abs(changes[PRIMARY_SCALE]).mean()),
        items={scale: factorial_test(word_pattern(values), cells) for scale, values in buckets.items()},
        items_p_adjusted=None,
        permuted_p=permuted_p(outcome, cells, rng, n_permutations),
        flipped_p=flipped_p(outcome, cells, rng, n_permutations),
        any_bucket_p=in_any if np.isfinite(in_any) else None,
        removability=removability(outcome, cells),
        mixed=mixed_model(changes[PRIMARY_SCALE], word_cells, cells),
        words=factorial_test(changes[PRIMARY_SCALE].mean(0), word_cells),
        published_f=published[0],
        published_p=published[1],
    )


def cell_estimates(values: Floats, cells: Cells) -> tuple[Estimate | float, ...]:
    """The mean of each cell over its stimuli, by Student's t; a cell of one stimulus has no interval."""
    own = [values[cells == cell] for cell in CELLS]
    return tuple(
        float(one.mean())
        if len(one) < 2
        else replace(paired_t(one, confidence=CONFIDENCE), test="mean, t interval over stimuli", p_value=None)
        for one in own
    )


def contrast_estimate(test: FactorialTest) -> Estimate:
    """The interaction's contrast with its interval: F is the square of L over its standard error."""
    error = abs(test.contrast) / test.f**0.5 if test.f else 0.0
    low, high = interval(test.contrast, error, StudentT(df=test.df).critical(CONFIDENCE))
    return Estimate(
        estimate=test.contrast,
        low=low,
        high=high,
        confidence=CONFIDENCE,
        n=test.partial_eta_squared.n,
        test=f"contrast, t interval with {test.df} degrees of freedom",
        p_value=test.p_value,
    )
