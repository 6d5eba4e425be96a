"""Small results by hand, and runs that hold them, for the sections of a report."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from simulated_factorial import cells_of, changes_of_words

from sae_nfm.experiments.factorial.clamps import cell_estimates, clamp_tests, contrast_estimate
from sae_nfm.experiments.factorial.measure import SCALES
from sae_nfm.experiments.factorial.results import (
    PRIMARY_SCALE,
    ArmResult,
    FactorialResult,
    SelectedUnit,
    Unit,
    with_holm,
)
from sae_nfm.report.blocks import Figure, Section
from sae_nfm.stats.anova_2x2 import by_bucket, factorial_test, word_pattern
from sae_nfm.stats.estimates import Estimate
from sae_nfm.stats.permutation import ProcedureNull, SelectedTest, Selection

CELLS, WORD_CELLS = cells_of(5), cells_of(3)
LEVELS = (("calm", "angry"), ("old", "new"))


def estimate(value: float, half: float = 0.1, **more: Any) -> Estimate:
    return Estimate(estimate=value, low=value - half, high=value + half, n=10, test="by hand", **more)


RUN = Path("run")
"""The folder of runs that are not on disk."""


def figures_by_name(section: Section | None) -> dict[str, Figure]:
    assert section is not None
    return {block.name: block for block in section.blocks if isinstance(block, Figure)}


def traces(figure: Figure) -> dict[str, Any]:
    """Traces by name; of several of one name the first."""
    found: dict[str, Any] = {}
    for trace in figure.plot.data:
        found.setdefault(trace.name, trace)
    return found


def unit(kind: Any, index: tuple[int, ...], role: str, *, control: bool = False) -> Unit:
    return Unit(kind=kind, index=index, role=role, control=control, typical=1.0, frequency=0.1)


UNITS = (
    (unit("feature", (3,), "mood (main effect)"), -4.0),
    (unit("feature", (3,), "mood (main effect)"), 4.0),
    (unit("pair", (1, 2), "pair (interaction)"), 4.0),
    (unit("feature", (9,), "match of mood", control=True), 4.0),
)


@functools.cache
def factorial_experiment() -> FactorialResult:
    """Four arms of simulated changes without an interaction, as `factorial` writes them; made once, to be read only."""
    rng = np.random.default_rng(0)
    arms: list[ArmResult] = []
    for one, times in UNITS:
        changes = {scale: changes_of_words(rng, CELLS, WORD_CELLS) for scale in SCALES}
        tests = clamp_tests(changes, WORD_CELLS, CELLS, rng, 19)
        outcome = word_pattern(by_bucket(changes[PRIMARY_SCALE], WORD_CELLS))
        arms.append(
            ArmResult(
                name=f"{one.role}: {one.name} at {times:g} x typical",
                role=one.role,
                units=(one,),
                clamp=f"{times:g} x typical",
                times=times,
                control=one.control,
                tests=tests,
                cells=cell_estimates(outcome, CELLS),
                contrast=contrast_estimate(tests.items[PRIMARY_SCALE], outcome, CELLS),
            )
        )
    selection = Selection(index=0, f=9.0, p_value=0.2, candidates=7)
    held_out = factorial_test(rng.normal(size=len(CELLS)), CELLS, "first")
    null = ProcedureNull(rejected=0.05, rejected_same_half=0.9, p_value=0.4, shuffles=20)
    return FactorialResult(
        design="mood (calm / angry) x age (old / new)",
        items=(20, 20),
        selected=(
            SelectedUnit(unit=UNITS[0][0], test=SelectedTest(selection=selection, held_out=held_out), null=null),
        ),
        arms=with_holm(arms),
        secondary_shifts=(),
        provenance={
            "config": {"seed": 0},
            "stimuli": {"factors": [{"name": n, "levels": ls} for n, ls in zip(("mood", "age"), LEVELS, strict=True)]},
        },
    )
