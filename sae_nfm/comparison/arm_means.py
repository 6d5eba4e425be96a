"""Means over the seeds of a comparison: each arm's reconstruction error and KL, and the lines they make over L0.

    mean = (1/S) sum_s value_s,     interval: Student's t over the S seeds

The seed is the unit: an interval needs two. Differences between arms are paired by seed (`verdicts`), so that two intervals that
overlap do not say that the arms are alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

from sae_nfm.comparison.results import CompareRow
from sae_nfm.stats import paired_t

Measure = Literal["fvu", "kl_nats"]
Kind = Literal["trained", "interpolated", "ablation"]


@dataclass(frozen=True, kw_only=True)
class ArmMean:
    """One measure of one arm, over seeds."""

    k: int
    """Active features a token that the arms are compared at."""
    arm: str
    """Name of the arm."""
    family: str
    """The arm that it is a part of, as `CompareRow` has it."""
    kind: Kind
    """As `CompareRow` has it."""
    measure: Measure
    """What is averaged."""
    seeds: tuple[int, ...]
    """Seeds with a figure; those that diverged, or whose L0 was not reached, are left out."""
    values: tuple[float, ...]
    """A figure for each of them."""
    mean: float
    """Their mean."""
    low: float | None
    """Lower end of the 95 % interval over seeds; None for one seed."""
    high: float | None
    """Upper end."""
    l0: float
    """Active features per token, mean over the same seeds."""


def arm_means(rows: Sequence[CompareRow]) -> tuple[ArmMean, ...]:
    """The mean of each measure for each arm and k, in the order of the rows; none for an arm without a figure."""
    found: list[ArmMean] = []
    for k, arm in dict.fromkeys((row.k, row.arm) for row in rows):
        own = [row for row in rows if (row.k, row.arm) == (k, arm)]
        found += [mean for measure in get_args(Measure) if (mean := _mean(own, measure)) is not None]
    return tuple(found)


def _mean(rows: Sequence[CompareRow], measure: Measure) -> ArmMean | None:
    there = {row.seed: (value, row.l0) for row in rows if (value := getattr(row, measure)) is not None}
    there = {seed: (value, l0) for seed, (value, l0) in there.items() if isfinite(value) and l0 is not None}
    if not there:
        return None
    values = tuple(float(value) for value, _ in there.values())
    over_seeds = paired_t(values) if len(values) > 1 else None
    return ArmMean(
        k=rows[0].k,
        arm=rows[0].arm,
        family=rows[0].family,
        kind=rows[0].kind,
        measure=measure,
        seeds=tuple(there),
        values=values,
        mean=sum(values) / len(values) if over_seeds is None else over_seeds.estimate,
        low=None if over_seeds is None else over_seeds.low,
        high=None if over_seeds is None else over_seeds.high,
        l0=sum(l0 for _, l0 in there.values()) / len(there),
    )


def lines_over_l0(means: Sequence[ArmMean]) -> Mapping[str, tuple[ArmMean, ...]]:
    """Trained SAEs of each family by L0, those of all k and coefficients together.

    Returns:
        A line for each family, both measures in it; none at all where no family has SAEs of two L0s (equal to one decimal).
    """
    trained = [mean for mean in means if mean.kind == "trained"]
    families = dict.fromkeys(mean.family for mean in trained)
    lines = {
        family: tuple(sorted((mean for mean in trained if mean.family == family), key=lambda mean: mean.l0))
        for family in families
    }
    several = any(len({round(mean.l0, 1) for mean in line}) > 1 for line in lines.values())
    return lines if several else {}
