"""Features that pass from one third of the integration shares to another between two checkpoints, beside chance.

Thirds are divided in two ways: at the same shares for all checkpoints (tertiles of all features at all checkpoints), so that a
shift of all shares shows, and at each checkpoint's own tertiles, so that only a change of order does. The null deals the features
of the later checkpoint out anew: how many are in each third stays, which ones does not. Tables with the same margins are then all
there is to draw from.

Source: Patefield 1981, Applied Statistics 30:91 (random tables with given margins, by scipy).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sae_nfm.stats import Floats

LEVELS = ("identity", "mixed", "integration")
"""The thirds, from the lowest integration share to the highest."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A number of features beside what it is when features are dealt out anew."""

    observed: int
    """Features."""
    expected: float
    """Mean of the null."""
    low: float
    """2.5 % quantile of the null."""
    high: float
    """97.5 % quantile of the null."""
    p_value: float
    """Two-sided: twice the smaller tail, the observed one counted in it."""


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """Where features went."""

    table: tuple[tuple[int, ...], ...]
    """Features by third before (rows) and after (columns), in the order of `LEVELS`."""
    to_identity: Counted
    """From the third of most integration to that of least."""
    to_integration: Counted
    """From the third of least integration to that of most."""
    stayed: Counted
    """In the same third."""


def tertiles(shares: Sequence[Floats]) -> tuple[float, float]:
    """The two edges between the thirds of shares, all checkpoints together; nan, of features that are not active, left out."""
    low, high = np.nanquantile(np.concatenate(shares), [1 / 3, 2 / 3])
    return float(low), float(high)


def transitions(
    before: Floats,
    after: Floats,
    edges: tuple[float, float] | None = None,
    *,
    seed: int,
    n_permutations: int = 1_999,
) -> Transitions:
    """Count the transitions of features and hold them against shuffled identities.

    Args:
        before: [features], integration shares at one checkpoint, none nan.
        after: [features], at another.
        edges: from `tertiles`; None takes those of `before` for it and those of `after` for it.
        seed: of the null's draws.
        n_permutations: how many.

    Raises:
        ValueError: for unequal lengths, nan, or no feature.
    """
    if len(before) != len(after) or not len(before) or np.isnan([before, after]).any():
        raise ValueError(
            f"{len(before)} shares before and {len(after)} after; give one of each for every feature that is active in both"
        )
    table = np.zeros((3, 3), dtype=np.int64)
    levels = [np.searchsorted(edges or tertiles([shares]), shares) for shares in (before, after)]
    np.add.at(table, tuple(levels), 1)
    margins: Any = stats.random_table(table.sum(1), table.sum(0))
    drawn = margins.rvs(size=n_permutations, random_state=np.random.default_rng(seed))
    return Transitions(
        table=tuple(tuple(int(n) for n in row) for row in table),
        to_identity=_counted(int(table[2, 0]), drawn[:, 2, 0]),
        to_integration=_counted(int(table[0, 2]), drawn[:, 0, 2]),
        stayed=_counted(int(np.trace(table)), np.trace(drawn, axis1=1, axis2=2)),
    )


def _counted(observed: int, drawn: NDArray[Any]) -> Counted:
    tails = (drawn <= observed).sum(), (drawn >= observed).sum()
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Counted(
        observed=observed,
        expected=float(drawn.mean()),
        low=float(low),
        high=float(high),
        p_value=float(min(1.0, 2 * (1 + min(tails)) / (1 + len(drawn)))),
    )
