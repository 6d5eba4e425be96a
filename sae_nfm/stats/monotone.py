"""Whether an interaction is more than a matter of scale, and survives every monotone transform that is tried.

Two factors that add up on one scale interact on another: exp(a + b) does. So an interaction counts as one of the factors only
if no strictly increasing transform of the outcome makes it go away. Tried are ranks, normal scores and Yeo-Johnson powers from
logarithm-like to convex (of the outcome in units of its root mean square). An interaction that is significant on the scale
of measurement and not on one of these, or of the other sign there, is called removable.

Beside it the ordinal criterion: where each factor's simple effects have one sign at both levels of the other, some monotone
transform of the four means makes them additive; where they cross none does.

Source: Loftus 1978, Memory & Cognition 6:312; Wagenmakers et al. 2012, Memory & Cognition 40:145; Yeo & Johnson 2000,
Biometrika 87:954.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from sae_nfm.stats.anova_2x2 import Cells, FactorialTest, factorial_test
from sae_nfm.stats.clustered import Floats

POWERS = (-1.0, 0.0, 0.5, 1.5, 2.0, 3.0)
"""Yeo-Johnson's lambda; 1 is the identity, 0 a logarithm of positive values, 2 one of negative values."""
ALPHA = 0.05
"""Below this an interaction is there, above it has vanished."""


@dataclass(frozen=True, kw_only=True)
class Removability:
    """What monotone transforms of the outcome do to its interaction."""

    p_values: dict[str, float]
    """Of the interaction after each transform; "as measured" is none."""
    vanishes: tuple[str, ...]
    """Transforms after which it is not significant, or of the other sign."""
    crosses: bool
    """Whether the simple effects of a factor have opposite signs at the two levels of the other."""

    @property
    def words(self) -> str:
        """The verdict."""
        if self.p_values["as measured"] >= ALPHA:
            return "no interaction"
        return "removable" if self.vanishes else "not removed"


def removability(values: Floats, cells: Cells) -> Removability:
    """Try the transforms.

    Args:
        values: [items].
        cells: [items].
    """
    measured = factorial_test(values, cells)
    tests = {"as measured": measured} | {
        name: factorial_test(transformed, cells) for name, transformed in _transforms(values).items()
    }
    lost = [
        name
        for name, test in tests.items()
        if test.p_value >= ALPHA or np.sign(test.contrast) != np.sign(measured.contrast)
    ]
    return Removability(
        p_values={name: test.p_value for name, test in tests.items()}, vanishes=tuple(lost), crosses=_crosses(measured)
    )


def _transforms(values: Floats) -> dict[str, Floats]:
    ranks = np.asarray(stats.rankdata(values), dtype=np.float64)
    unit = float(np.sqrt(np.mean(values**2))) or 1.0
    powers: dict[str, Any] = {f"power {power:g}": stats.yeojohnson(values / unit, power) for power in POWERS}
    return {"ranks": ranks, "normal scores": stats.norm.ppf((ranks - 0.5) / len(ranks)), **powers}


def _crosses(test: FactorialTest) -> bool:
    m = test.cell_means
    return (m[0] - m[2]) * (m[1] - m[3]) < 0 or (m[0] - m[1]) * (m[2] - m[3]) < 0
