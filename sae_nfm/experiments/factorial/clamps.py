"""What is clamped in a 2x2 experiment (selected units and their controls), and the tests of what a clamp does.

    cell        m_c -+ t(n_c - 1) s_c / sqrt(n_c)             s_c: standard deviation of the cell's stimuli
    contrast    L -+ t(N - 4) |L| / sqrt(F)                   leaves out 0 exactly where F is significant

The outcome of a stimulus is the change of the words' own interaction pattern (`word_pattern`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sae_lens import SAE

from sae_nfm.architectures import NFMPaths
from sae_nfm.experiments.factorial.measure import Candidates
from sae_nfm.experiments.factorial.results import PRIMARY_SCALE, ClampTests, Unit
from sae_nfm.interventions import Edit, PairEdit, ReadEdit, SAEEdit, SecondarySplice, Splice
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

HOOK_OF_KIND = {"feature": "hook_sae_acts_post", "secondary": "hook_secondary_acts_post"}
CONFIDENCE = 0.95


def unit_of(candidates: Candidates, column: int, role: str, *, control: bool = False) -> Unit:
    """A candidate in a role."""
    return Unit(
        kind=candidates.kind,
        index=candidates.indices[column],
        role=role,
        control=control,
        typical=float(candidates.typical[column]),
        frequency=float(candidates.frequency[column]),
    )


def clamped(unit: Unit, value: float) -> SAEEdit:
    """Clamp a unit at all tokens."""
    if unit.kind == "pair":
        return PairEdit(pair=(unit.index[0], unit.index[1]), mode="clamp", value=value)
    return Edit(at=HOOK_OF_KIND[unit.kind], index=unit.index, mode="clamp", value=value)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One clamp of one unit, or of two together."""

    units: tuple[Unit, ...]
    role: str
    control: bool
    clamp: str
    times: float | None
    """At what, in units of the typical activation; None for an absolute value."""
    edits: tuple[SAEEdit, ...]

    @classmethod
    def of(
        cls, units: tuple[Unit, ...], role: str, clamp: tuple[bool, float], *, control: bool, path: bool = False
    ) -> "Arm":
        """A clamp at a multiple of the typical activation (True) or at an absolute value, at all tokens or on the linear path."""
        relative, value = clamp
        targets = [value * unit.typical if relative else value for unit in units]
        return cls(
            units=units,
            role=role,
            control=control,
            clamp=f"{value:g} x typical" if relative else f"{value:g}",
            times=value if relative else None,
            edits=tuple(
                ReadEdit(path="linear", index=unit.index, mode="clamp", value=target) if path else clamped(unit, target)
                for unit, target in zip(units, targets, strict=True)
            ),
        )

    @property
    def name(self) -> str:
        """Unique name."""
        return f"{self.role}: {' and '.join(unit.name for unit in self.units)} at {self.clamp}"


def spliced(sae: SAE[Any], secondary: SAE[Any] | None, edits: tuple[SAEEdit, ...] = ()) -> Splice:
    """An SAE in place, by way of a secondary SAE with its error term where there is one."""
    if secondary is None:
        return Splice(sae=sae, edits=edits)
    return SecondarySplice(sae=sae, secondary=secondary, error_term=True, edits=edits)


def arms(
    sae: SAE[Any], units: Sequence[Unit], times: Sequence[float], absolute: Sequence[float], roles: tuple[str, str]
) -> list[Arm]:
    """Every clamp of every unit, at multiples of its typical activation and at absolute values; controls at multiples only.

    The two primary features, of these roles, are clamped together too, and through the linear path only. What would be clamped
    to the same value twice, such as a feature that was selected for both factors, is clamped once.
    """
    multiples, values = [(True, time) for time in times], [(False, value) for value in absolute]
    found = [
        Arm.of((unit,), unit.role, clamp, control=unit.control)
        for unit in units
        for clamp in (multiples if unit.control else multiples + values)
    ]
    both = tuple(unit for role in roles for unit in units if unit.role == role)
    if len(both) == 2 and both[0].index != both[1].index:
        found += [Arm.of(both, "both features", clamp, control=False) for clamp in multiples + values]
        if isinstance(sae, NFMPaths) and sae.cfg.use_linear_path:
            role = "both, linear path only"
            found += [Arm.of(both, role, clamp, control=True, path=True) for clamp in multiples + values]
    return [arm for number, arm in enumerate(found) if all(arm.edits != other.edits for other in found[:number])]


def clamp_tests(
    changes: Mapping[str, Floats], word_cells: Cells, cells: Cells, rng: np.random.Generator, n_permutations: int
) -> ClampTests:
    """Test what an arm did: changes by scale, [items, words], with the clamp less without it."""
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
    """The mean of each cell over its stimuli, by Student's t; without an interval where they are one, or all alike."""
    own = [values[cells == cell] for cell in range(4)]
    return tuple(
        float(one.mean())
        if len(one) < 2 or not np.ptp(one)
        else replace(paired_t(one, confidence=CONFIDENCE), test="mean, t interval over stimuli", p_value=None)
        for one in own
    )


def contrast_estimate(test: FactorialTest, values: Floats, cells: Cells) -> Estimate | float:
    """The interaction's contrast of values with its interval; without one where they do not vary within cells."""
    counts = np.bincount(cells, minlength=4)
    spread = values - (np.bincount(cells, values, minlength=4) / counts)[cells]
    error = float(np.sqrt(np.square(spread).sum() / test.df * (1 / counts).sum()))
    if error <= 1e-12 * np.abs(values).max(initial=0):
        return test.contrast
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
