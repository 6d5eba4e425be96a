"""Gurnee's ratios: how much more an SAE's error does than other errors of its size, from the rows of a measurement.

    ratio = mean KL(original || spliced) / mean KL(original || control)

1 says that the error does as much as the control of equal distance; Gurnee found 2 to 4.5 against isotropic vectors.

Source: W. Gurnee 2024, "SAE reconstruction errors are (empirically) pathological".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_nfm.evaluation.results import SUMMARY_FILENAME, ArmKL, MeasuredKL
from sae_nfm.evaluation.token_table import read_rows
from sae_nfm.interventions.results import EQUAL_DISTANCE, UNDER_TEST, ArmRole, Role
from sae_nfm.stats import Bootstrap, Estimate, clustered_mean, ratio_of_means


def error_ratios(
    folder: str | Path,
    under_test: str = UNDER_TEST,
    controls: Sequence[str] = EQUAL_DISTANCE,
    *,
    confidence: float = 0.95,
    bootstrap: Bootstrap | None = None,
) -> dict[str, Estimate]:
    """The ratio against each control, paired by token, clustered by document, tested against 1.

    Numerators and denominators by document are the `kl_nats` of `token_rows.document_sums`.

    Args:
        folder: a finished measurement of `controls.control_arms`.
        under_test: name of the arm in the numerator.
        controls: names of the arms in the denominators.
        confidence: nominal coverage.
        bootstrap: resample documents; None refers to Student's t.

    Raises:
        FileNotFoundError, ValueError: as `token_rows.read_rows` and `statistics.ratio_of_means`.
    """
    mine = _kl(folder, under_test)
    found: dict[str, Estimate] = {}
    for control in controls:
        other = _kl(folder, control)
        assert (mine["document"] == other["document"]).all()  # all arms are measured on the same tokens, in one order
        found[control] = ratio_of_means(
            mine["kl_nats"].to_numpy(),
            other["kl_nats"].to_numpy(),
            mine["document"].to_numpy(),
            confidence=confidence,
            bootstrap=bootstrap,
        )
    return found


def _kl(folder: str | Path, arm: str) -> Any:
    return read_rows(folder, ["document", "kl_nats"], [arm])


def summarise(folder: Path, roles: Mapping[str, ArmRole]) -> None:
    """Write `summary.json` beside the rows of a finished measurement, where it is one of an SAE and its controls on documents."""
    if all(one.role is not Role.CONTROL for one in roles.values()):
        return
    rows: Any = read_rows(folder, ["document"], [next(iter(roles))])
    if rows["document"].nunique() > 1:
        kl_by_arm(folder, roles).save(folder / SUMMARY_FILENAME)


def kl_by_arm(folder: str | Path, roles: Mapping[str, ArmRole]) -> MeasuredKL:
    """Mean KL of every arm; of the rows three columns are read.

    Args:
        folder: a finished measurement.
        roles: of its arms, by name.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`; for a single document.
    """
    rows = read_rows(folder, ["arm", "document", "kl_nats"])
    found: list[ArmKL] = []
    for arm, one in roles.items():
        own = rows.loc[rows["arm"] == arm]
        kl = clustered_mean(own["kl_nats"].to_numpy(), own["document"].to_numpy())
        named = {"of": one.of or arm, "name": one.name or arm}
        found.append(ArmKL(arm=arm, role=one.role, scale=one.scale, kl=kl, **named))
    ratios: dict[str, Mapping[str, Estimate]] = {}
    for sae in dict.fromkeys(arm.of for arm in found if arm.role is Role.CONTROL):
        controls = {arm.arm: arm.name for arm in found if arm.of == sae and arm.role is Role.CONTROL}
        by_arm = error_ratios(folder, sae, tuple(controls))
        ratios[sae] = {controls[arm]: estimate for arm, estimate in by_arm.items()}
    return MeasuredKL(arms=tuple(found), ratios=ratios)
