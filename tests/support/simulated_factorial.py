"""Simulated 2x2 experiments with a known truth."""

import numpy as np
import pytest
from simulated_evidence import counts_by_chance

from sae_nfm.stats.anova_2x2 import SIGNS

EFFECTS = ("first", "second", "interaction")
FEW, MANY = 200, 2_000
TRIALS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]
"""How often a procedure is tried on data with nothing to find."""


def rejections_allowed(trials: int) -> tuple[int, int]:
    """At a nominal 5 %: what chance allows a few trials, and 3 to 7 % of many."""
    return (60, 140) if trials == MANY else counts_by_chance(trials)


def cells_of(n: int) -> np.ndarray:
    return np.repeat(np.arange(4), n)


def factorial_values(rng: np.random.Generator, cells: np.ndarray, width: int = 1, **given: float) -> np.ndarray:
    """[items, width]: effects drawn from N(0, 2^2) unless given, skewed spread between items that differs by cell."""
    unknown = set(given) - set(EFFECTS)
    assert not unknown
    sizes = {name: given.get(name, 2 * rng.normal(size=width)) for name in EFFECTS}
    means = sum(np.outer(SIGNS[name][cells], np.broadcast_to(size, width)) for name, size in sizes.items())
    spread = np.array([0.7, 1.0, 1.0, 1.3])[cells][:, None]
    return means + spread * (rng.gamma(4, 0.5, (len(cells), width)) - 2)


def changes_of_words(
    rng: np.random.Generator, cells: np.ndarray, word_cells: np.ndarray, word_spread: float = 1.0, items: float = 0.5
) -> np.ndarray:
    """[items, words] without an interaction: words answer each in its own way, items shift all words, cells have main effects."""
    words = word_spread * rng.normal(size=len(word_cells))
    main = sum(rng.normal() * SIGNS[name][cells] for name in ("first", "second"))
    item = items * rng.standard_t(4, size=len(cells))
    return words + (main + item)[:, None] + 0.5 * rng.normal(size=(len(cells), len(word_cells)))
