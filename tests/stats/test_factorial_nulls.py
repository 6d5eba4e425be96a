import numpy as np
import pytest
from scipy import stats
from simulated_evidence import counts_by_chance
from simulated_factorial import EFFECTS, TRIALS, cells_of, factorial_values, rejections_allowed

from sae_nfm.stats.anova_2x2 import SIGNS, effect_t
from sae_nfm.stats.permutation import (
    flipped_p,
    halves,
    permuted_p,
    residuals,
    select,
    select_and_test,
    shuffled_procedure,
)


def test_halves_divide_every_cell():
    cells = np.repeat(np.arange(4), (4, 5, 6, 9))
    half = halves(cells, np.random.default_rng(0))
    assert np.bincount(cells[half]).tolist() == [2, 2, 3, 4]
    assert not np.array_equal(half, halves(cells, np.random.default_rng(1)))
    assert np.array_equal(half, halves(cells, np.random.default_rng(0)))
    with pytest.raises(ValueError, match=r"\bcell 1 has 3\b.*\b4\b"):
        halves(np.repeat(np.arange(4), (4, 3, 4, 4)), np.random.default_rng(0))


@pytest.mark.parametrize("effect", EFFECTS)
def test_residuals_keep_the_effect_and_no_other(effect):
    rng = np.random.default_rng(1)
    cells = rng.permutation(cells_of(5))
    left = residuals(factorial_values(rng, cells, width=3), cells, effect)
    for name, signs in SIGNS.items():
        size = np.abs(signs[cells] @ left)
        assert (size > 1).all() if name == effect else (size < 1e-9).all()


@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize("effect", EFFECTS)
def test_size_of_selecting_on_one_half_and_testing_on_the_other(effect, trials):
    """40 candidates, none with the effect selected for, all with the two others."""
    rng = np.random.default_rng(2)
    cells = cells_of(20)
    limit = stats.f.isf(0.05, 1, 36)
    valid = same = 0
    for _ in range(trials):
        values = factorial_values(rng, cells, width=40, **{effect: 0.0})
        half = halves(cells, rng)
        index = select(values[half], cells[half], effect, rng, n_permutations=0).index
        valid += effect_t(values[~half, index], cells[~half], effect) ** 2 > limit
        same += effect_t(values[half, index], cells[half], effect) ** 2 > limit
    fewest, most = rejections_allowed(trials)
    assert fewest <= valid <= most
    assert same > 0.8 * trials  # the largest of 40, tested where it was selected


def test_power_to_find_the_one_candidate_with_an_interaction():
    rng = np.random.default_rng(3)
    cells, found = cells_of(20), 0
    for _ in range(100):
        values = factorial_values(rng, cells, width=40, interaction=0.0)
        values[:, 7] += SIGNS["interaction"][cells]  # one standard deviation within cells
        test = select_and_test(values, cells, "interaction", halves(cells, rng), rng, n_permutations=0)
        found += test.selection.index == 7 and test.held_out.p_value < 0.05
    assert found > 95


def test_null_of_the_selection_counts_all_candidates():
    rng = np.random.default_rng(4)
    cells, small = cells_of(10), 0
    for _ in range(200):
        values = factorial_values(rng, cells, width=20, interaction=0.0)
        small += select(values, cells, "interaction", rng, n_permutations=39).p_value <= 0.05
    low, high = counts_by_chance(200)
    assert low <= small <= high
    values[:, 5] += 3 * SIGNS["interaction"][cells]
    found = select(values, cells, "interaction", rng, n_permutations=39)
    by_cell = [values[cells == cell, 5] for cell in range(4)]
    contrast = sum(sign * part.mean() for sign, part in zip(SIGNS["interaction"], by_cell, strict=True)) / 4
    error = np.mean([part.var(ddof=1) for part in by_cell]) / len(cells)
    assert found.f == pytest.approx(contrast**2 / error)  # the contrast of cell means over its standard error, squared
    assert (found.index, found.candidates, found.p_value) == (5, 20, 1 / 40)


def test_the_procedure_on_shuffled_cells():
    rng = np.random.default_rng(5)
    cells = cells_of(20)
    values = factorial_values(rng, cells, width=40, first=0.0, second=0.0, interaction=0.0)
    null = shuffled_procedure(values, cells, "interaction", 1.0, rng, n_shuffles=300)
    low, high = counts_by_chance(300)
    assert low <= 300 * null.rejected <= high
    assert null.rejected_same_half > 0.8  # the largest of 40: 1 - 0.95^40 = 0.87
    assert 0.2 < null.p_value < 0.5  # F(1, 36) is above 1 in 32 % of cases
    assert shuffled_procedure(values, cells, "interaction", 1e9, rng, n_shuffles=99).p_value == pytest.approx(1 / 100)


@pytest.mark.parametrize("null", [permuted_p, flipped_p])
def test_size_and_power_of_permutations_of_one_outcome(null):
    rng = np.random.default_rng(6)
    cells = cells_of(10)

    def p_value(interaction: float) -> float:
        return null(factorial_values(rng, cells, interaction=interaction)[:, 0], cells, rng, 99)

    low, high = counts_by_chance(300)
    assert low <= sum(p_value(0.0) <= 0.05 for _ in range(300)) <= high
    assert sum(p_value(1.0) <= 0.05 for _ in range(40)) >= 38
