"""What steering with a pair of features did, beside steering with the features themselves and at random."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import ClassVar

import pandas as pd

from sae_nfm.common.results import SavedResult
from sae_nfm.stats import Estimate, corrected, mean_difference

SIGNIFICANT = 0.05
UNDER_TEST = "sae"
EQUAL_DISTANCE = (
    "isotropic",
    "isotropic, norm kept",
    "covariance",
    "covariance mixture",
    "shuffled error",
    "flipped error",
)
"""Names of the controls at the distance of the arm under test."""


class Role(StrEnum):
    """What an intervention is in a measurement of an SAE beside its controls."""

    SAE = "SAE"
    PART = "part"
    """The SAE with some of its paths ablated."""
    CONTROL = "control"
    """Another change of equal distance."""
    SCALED = "scaled error"
    ANCHOR = "anchor"
    """No change, zero, the mean."""
    OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class ArmRole:
    """The role of an intervention, and to which SAE."""

    role: Role = Role.OTHER
    of: str = ""
    """Name of the SAE that it is, or is a part or a control of; "" for others."""
    name: str = ""
    """Its own name without that of the SAE; "" for others."""
    scale: float | None = None
    """What the SAE's error is multiplied with: 1 for the SAE itself, -1 for the flipped error; None for the others."""


NO_ROLE = ArmRole()


@dataclass(frozen=True, kw_only=True)
class Steered:
    """One arm at one distance on one row of text, averaged over its counted tokens."""

    arm: str
    """ "pair", "sum", "first", "second" or "random"."""
    draw: int
    """Which random direction; 0 for the other arms."""
    alpha: float
    """Distance by which the activation was moved, in its own units."""
    row: int
    """Row of the text."""
    tokens: int
    """Counted tokens of the row."""
    kl_nats: float
    """KL(original || steered) of the next-token distributions, nats per token."""
    target_change_nats: float | None
    """Change of the target's log-probability as the next token; None without a target."""


@dataclass(frozen=True, kw_only=True)
class SteeringComparison(SavedResult):
    """Steering with a pair, the sum of its features, each of them and at random, over rows of text."""

    kind: ClassVar[str] = "steering/1"

    pair: tuple[int, int]
    """Features i and j."""
    hook_name: str
    """Where activations were moved."""
    target: int | None
    """Token whose log-probability was followed."""
    rows: tuple[Steered, ...]
    """What each arm did to each row."""
    cosines: Mapping[str, float]
    """Cosine of the pair's direction with those of the other arms, the random ones left out."""
    activation_norm: float
    """Mean norm of the activations, to judge the distances by."""
    gate_tokens: int
    """Tokens on which both features are read, over which the gates were averaged."""
    open_gates: float
    """Mean share of open gates there."""
    seed: int
    """Of the random directions."""

    def frame(self) -> pd.DataFrame:
        """The rows as a data frame, a column for each of their fields."""
        return pd.DataFrame([asdict(row) for row in self.rows])

    def means(self, measure: str) -> pd.DataFrame:
        """Mean over rows (and random directions) of a measure: a line for each distance, a column for each arm."""
        return self.frame().pivot_table(index="alpha", columns="arm", values=measure, aggfunc="mean", sort=False)

    def against_sum(self, measure: str) -> dict[float, Estimate]:
        """Pair minus sum at each distance, paired by row; interval over rows, p-values by Holm over the distances.

        Raises:
            ValueError: for fewer than 2 rows.
        """
        wide = self.frame().pivot_table(index=["alpha", "row"], columns="arm", values=measure, sort=False)
        found = dict[float, Estimate]()
        for alpha in wide.index.get_level_values("alpha").unique():
            part = wide.xs(alpha, level="alpha")
            found[float(alpha)] = mean_difference(part["pair"], part["sum"], part.index)
        return dict(zip(found, corrected(list(found.values()), "holm"), strict=True))

    def words(self) -> str:
        """The table and what it shows."""
        i, j = self.pair
        n = len({row.row for row in self.rows})
        cosines = ", ".join(f"{name} {cosine:+.3f}" for name, cosine in self.cosines.items())
        lines = [
            f"Steering at {self.hook_name} with features {i} and {j}, {n} row{'s' * (n != 1)} of text; activations have norm "
            f"{self.activation_norm:.3g}",
            f"Cosine of the pair's direction with {cosines}; gates averaged over {self.gate_tokens} tokens",
        ]
        measures = {"kl_nats": "KL, nats"}
        if self.target is not None:
            measures["target_change_nats"] = f"change of log p of token {self.target}, nats"
        for measure, name in measures.items():
            lines += ["", name, self.means(measure).to_string(float_format="{:.4g}".format)]
            if n < 2:
                lines.append("One row of text: no interval, no claim.")
                continue
            for alpha, e in self.against_sum(measure).items():
                lines.append(
                    f"pair - sum at {alpha:g}: {e.estimate:+.4g} [{e.low:+.4g}, {e.high:+.4g}] over {n} rows: {_verdict(e)} "
                    f"({e.correction})"
                )
        return "\n".join([*lines, "", "One SAE and one pair: nothing here is about other pairs or seeds."])


def _verdict(difference: Estimate) -> str:
    if difference.p_value is None or difference.p_value >= SIGNIFICANT:
        return "no difference shown"
    return "larger for the pair" if difference.estimate > 0 else "larger for the sum"
