"""The tests of one arm of a 2x2 experiment, from cached scores: nothing here runs a model."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sae_nfm.stats import (
    Cells,
    FactorialTest,
    Floats,
    MixedModel,
    Removability,
    any_bucket_p,
    by_bucket,
    factorial_test,
    flipped_p,
    index_paired_f,
    mixed_model,
    permuted_p,
    removability,
    word_pattern,
)

PRIMARY_SCALE = "log_prob"
"""The scale that claims are made on; the others stand beside it."""


@dataclass(frozen=True, kw_only=True)
class ClampTests:
    """What a clamp did to the target words, over the stimuli that nothing was selected on."""

    mean_absolute_change: float
    """Mean over stimuli and words of |change of log-probability|, nats."""
    items: dict[str, FactorialTest]
    """The interaction of the stimuli's cells by scale, stimuli as units, of `word_pattern`."""
    items_p_adjusted: float | None
    """Holm's p-value of the log-probability one, over clamps x units of the selected; None for controls."""
    permuted_p: float
    """Of the same with the additive model's residuals shuffled among the stimuli."""
    flipped_p: float
    """Of the same with random signs of these residuals."""
    any_bucket_p: float | None
    """Of the interaction of the stimuli's cells in any combination of the buckets (Wilks); None where it cannot be tested."""
    removability: Removability
    """Whether a monotone transform of the change of log-probability removes the interaction."""
    mixed: MixedModel
    """The same interaction from single words, stimuli as random intercepts."""
    words: FactorialTest
    """The interaction of the words' own cells, words as units, each averaged over all stimuli: another question, whether the
    clamp moves the four buckets non-additively whatever came before."""
    published_f: float
    """The author's statistic, a one-way F on index-paired words (logits); no valid test."""
    published_p: float
    """Its p-value."""


def clamp_tests(
    changes: Mapping[str, Floats], word_cells: Cells, cells: Cells, rng: np.random.Generator, n_permutations: int
) -> ClampTests:
    """Test what an arm did.

    Args:
        changes: by scale, [items, words]: with the clamp less without it.
        word_cells: [words], the bucket of each.
        cells: [items].
        rng: of the permutations.
        n_permutations: how many.
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
