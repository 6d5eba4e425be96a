"""Cell means of a 2x2 experiment with their intervals, from the changes that `sae-nfm factorial` leaves beside its result.

    cell        m_c -+ t(n_c - 1) s_c / sqrt(n_c)             s_c: standard deviation of the cell's stimuli
    contrast    L -+ t(N - 4) |L| / sqrt(F)                   leaves out 0 exactly where F is significant

The outcome of a stimulus is the change of the words' own interaction pattern, by the functions that the tests use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sae_nfm.experiments.factorial.clamp_tests import cell_estimates, contrast_estimate
from sae_nfm.experiments.factorial.results import PRIMARY_SCALE, ArmResult, FactorialResult
from sae_nfm.experiments.factorial.run import CHANGES_FILENAME
from sae_nfm.stats import Cells, Estimate, FactorialTest, Floats, by_bucket, word_pattern


@dataclass(frozen=True, kw_only=True)
class ArmCells:
    """The cells of one arm; nats of log-probability."""

    arm: ArmResult
    cells: tuple[Estimate | float, ...]
    """Mean over the stimuli of each cell; a number without the changes, and for a cell of one stimulus."""
    contrast: Estimate
    """L = m_0 - m_1 - m_2 + m_3."""


def arm_cells(result: FactorialResult, folder: Path) -> tuple[ArmCells, ...]:
    """The cells of every arm, with intervals where the changes are beside the result.

    Raises:
        ValueError: when the changes are of another experiment: an arm is missing, or its means are not the result's.
    """
    path, rows = folder / CHANGES_FILENAME, dict[Any, pd.DataFrame]()
    if path.is_file():
        columns = ["arm", "item", "item_cell", "word_cell", f"{PRIMARY_SCALE}_change"]
        rows = dict(list(pd.read_parquet(path, columns=columns).groupby("arm", sort=False, observed=True)))
        missing = [arm.name for arm in result.arms if arm.name not in rows]
        if missing:
            raise ValueError(
                f"{path} has no arm {missing[0]!r}: it is of another experiment; rerun the command to regenerate both"
            )
    return tuple(
        ArmCells(
            arm=arm,
            cells=_means(arm, rows[arm.name], path) if rows else _primary(arm).cell_means,
            contrast=contrast_estimate(_primary(arm)),
        )
        for arm in result.arms
    )


def outcomes(rows: pd.DataFrame) -> tuple[Floats, Cells]:
    """The outcome of each stimulus, and its cell, from the changes of one arm.

    Args:
        rows: in the order they were written: stimulus by stimulus, the words of each in one order.
    """
    frame: Any = rows
    n_items = int(frame["item"].nunique())
    changes = frame[f"{PRIMARY_SCALE}_change"].to_numpy(dtype=np.float64).reshape(n_items, -1)
    cells = frame["item_cell"].to_numpy(dtype=np.int64).reshape(n_items, -1)[:, 0]
    word_cells = frame["word_cell"].to_numpy(dtype=np.int64)[: changes.shape[1]]
    return word_pattern(by_bucket(changes, word_cells)), cells


def largest_clamps(found: Sequence[ArmCells]) -> list[ArmCells]:
    """One arm a role: clamped at the largest multiple of the typical activation, a positive one before a negative one."""
    by_role: dict[str, ArmCells] = {}

    def size(one: ArmCells) -> tuple[float, float]:
        times = one.arm.times or 0.0
        return abs(times), times

    for one in found:
        if one.arm.role not in by_role or size(one) > size(by_role[one.arm.role]):
            by_role[one.arm.role] = one
    return list(by_role.values())


def _means(arm: ArmResult, rows: pd.DataFrame, path: Path) -> tuple[Estimate | float, ...]:
    found = cell_estimates(*outcomes(rows))
    means = [one.estimate if isinstance(one, Estimate) else one for one in found]
    if not np.allclose(means, _primary(arm).cell_means, rtol=1e-9, atol=1e-12):  # summed in another order
        raise ValueError(
            f"the cell means of {arm.name!r} in {path} are not those of the result; rerun the command to regenerate both"
        )
    return found


def _primary(arm: ArmResult) -> FactorialTest:
    return arm.tests.items[PRIMARY_SCALE]
