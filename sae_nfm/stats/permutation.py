"""Selecting and testing in a 2x2 experiment, and what both do where there is nothing to find.

    halves               stimuli of every cell divided at random into a half to select on and a half to test on
    select               the candidate with the largest |t|, and how often chance does as well among as many candidates
    permuted_p           the test when residuals of the additive model are shuffled among the stimuli
    flipped_p            the test when they change their signs at random
    shuffled_procedure   selection and test, all of it, on shuffled cells

An effect is permuted without the others: residuals of the model that lacks it are shuffled (Freedman & Lane), so that a large
main effect neither hides in the null distribution of an interaction nor widens it.

Source: Freedman & Lane 1983, J. Business & Economic Statistics 1:292; Winkler et al. 2014, NeuroImage 92:381 (sign flips).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sae_nfm.stats.anova_2x2 import SIGNS, Cells, Effect, FactorialTest, effect_t, factorial_test
from sae_nfm.stats.estimates import Floats

Half = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The candidate with the largest effect on the selecting half."""

    index: int
    f: float
    """Its F there, which selection inflates: no evidence."""
    p_value: float
    """How often the largest of as many candidates has this |t| when residuals are shuffled, the observed one counted."""
    candidates: int
    """Their number."""


@dataclass(frozen=True, kw_only=True)
class SelectedTest:
    """A selection on one half, and its test on the other."""

    selection: Selection
    held_out: FactorialTest


@dataclass(frozen=True, kw_only=True)
class ProcedureNull:
    """Selection and test on shuffled cells."""

    rejected: float
    """Share of shuffles in which the held-out test was significant at 5 %; 0.05 in expectation for a valid one."""
    rejected_same_half: float
    """The same when the test is on the half that selected: what selection inflates."""
    p_value: float
    """Share of shuffles with a held-out F at least as large as the real one, that one counted."""
    shuffles: int


def halves(cells: Cells, rng: np.random.Generator) -> Half:
    """True for the stimuli to select on: half of every cell (of at least 4), at random; of an odd number the smaller."""
    chosen = np.zeros(len(cells), dtype=bool)
    for cell in range(4):
        members = np.flatnonzero(cells == cell)
        if len(members) < 4:
            raise ValueError(f"cell {cell} has {len(members)} stimuli; give at least 4: two halves with a spread each")
        chosen[rng.permutation(members)[: len(members) // 2]] = True
    return chosen


def residuals(values: Floats, cells: Cells, effect: Effect) -> Floats:
    """What the model without an effect leaves of the values, [items, ...]."""
    design = np.column_stack([np.ones(len(cells)), *(signs[cells] for name, signs in SIGNS.items() if name != effect)])
    flat = np.asarray(values, dtype=np.float64).reshape(len(cells), -1)
    return (flat - design @ np.linalg.lstsq(design, flat, rcond=None)[0]).reshape(np.shape(values))


def select(
    values: Floats, cells: Cells, effect: Effect, rng: np.random.Generator, n_permutations: int = 199
) -> Selection:
    """The candidate with the largest |t| of an effect, against the largest of as many candidates by chance.

    Args:
        values: [items, candidates], the selecting half.
        n_permutations: 0 leaves the p-value 1.

    Raises a ValueError when there is no candidate.
    """
    if values.shape[1] == 0:
        raise ValueError("there is no candidate to select from; lower min_stimuli, or give more stimuli")
    observed = np.abs(effect_t(values, cells, effect))
    index, rest = int(observed.argmax()), residuals(values, cells, effect)
    largest = [np.abs(effect_t(rng.permutation(rest), cells, effect)).max() for _ in range(n_permutations)]
    return Selection(
        index=index,
        f=float(observed[index] ** 2),
        p_value=_share_above(float(observed[index]), np.array(largest)),
        candidates=values.shape[1],
    )


def select_and_test(
    values: Floats, cells: Cells, effect: Effect, half: Half, rng: np.random.Generator, n_permutations: int = 199
) -> SelectedTest:
    """Select a candidate of the values [items, candidates] on one half of the stimuli and test it on the other."""
    selection = select(values[half], cells[half], effect, rng, n_permutations)
    held_out = factorial_test(values[~half, selection.index], cells[~half], effect)
    return SelectedTest(selection=selection, held_out=held_out)


def shuffled_procedure(
    values: Floats, cells: Cells, effect: Effect, observed_f: float, rng: np.random.Generator, n_shuffles: int = 300
) -> ProcedureNull:
    """Shuffle the cells among the stimuli, divide, select and test again, many times; `observed_f` is the real held-out F."""
    held_out, same = list[float](), list[float]()
    for _ in range(n_shuffles):
        shuffled = rng.permutation(cells)
        half = halves(shuffled, rng)
        t = effect_t(values[half], shuffled[half], effect)
        index = int(np.abs(t).argmax())
        same.append(float(t[index] ** 2))
        held_out.append(float(effect_t(values[~half, index], shuffled[~half], effect) ** 2))
    half_size = np.bincount(cells, minlength=4) // 2
    dfs = (len(cells) - half_size.sum() - 4, half_size.sum() - 4)
    limits = [float(stats.f.isf(0.05, 1, df)) for df in dfs]
    return ProcedureNull(
        rejected=float((np.array(held_out) > limits[0]).mean()),
        rejected_same_half=float((np.array(same) > limits[1]).mean()),
        p_value=_share_above(observed_f, np.array(held_out)),
        shuffles=n_shuffles,
    )


def permuted_p(values: Floats, cells: Cells, rng: np.random.Generator, n_permutations: int = 300) -> float:
    """The interaction against the additive model's residuals shuffled among the stimuli: share of F at least as large."""
    columns = np.tile(residuals(values, cells, "interaction")[:, None], n_permutations)
    return _interaction_p(values, rng.permuted(columns, axis=0), cells)


def flipped_p(values: Floats, cells: Cells, rng: np.random.Generator, n_flips: int = 300) -> float:
    """The interaction against random signs of the additive model's residuals: share of F at least as large."""
    flips = rng.choice([-1.0, 1.0], (len(cells), n_flips))
    return _interaction_p(values, residuals(values, cells, "interaction")[:, None] * flips, cells)


def _interaction_p(values: Floats, drawn: Floats, cells: Cells) -> float:
    observed = abs(float(effect_t(values, cells, "interaction")))
    return _share_above(observed, np.abs(effect_t(drawn, cells, "interaction")))


def _share_above(observed: float, drawn: Floats) -> float:
    """Share at least as large up to rounding, the observed one counted."""
    return float((1 + (drawn >= observed * (1 - 1e-9)).sum()) / (1 + len(drawn)))
