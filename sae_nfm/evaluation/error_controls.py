"""Gurnee's ratios: how much more an SAE's error does than other errors of its size, from the rows of a measurement.

    ratio = mean KL(original || spliced) / mean KL(original || control)

1 says that the error does as much as the control of equal distance; Gurnee found 2 to 4.5 against isotropic vectors.

Source: W. Gurnee 2024, "SAE reconstruction errors are (empirically) pathological".
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_nfm.evaluation.results import SUMMARY_FILENAME, ArmKL, MeasuredKL, Role
from sae_nfm.evaluation.token_table import read_manifest, read_rows
from sae_nfm.interventions import EQUAL_DISTANCE, UNDER_TEST
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

    Numerators and denominators by document are the `kl_nats` of `token_table.document_sums`, from the folder of a finished
    measurement of `control_arms`. `bootstrap` resamples documents; None refers to Student's t. Raises as `read_rows`.
    """
    columns = ["document", "kl_nats"]
    mine: Any = read_rows(folder, columns, [under_test])
    found: dict[str, Estimate] = {}
    for control in controls:
        other: Any = read_rows(folder, columns, [control])
        assert (mine["document"] == other["document"]).all()  # all arms are measured on the same tokens, in one order
        found[control] = ratio_of_means(
            mine["kl_nats"].to_numpy(),
            other["kl_nats"].to_numpy(),
            mine["document"].to_numpy(),
            confidence=confidence,
            bootstrap=bootstrap,
        )
    return found


ANCHORS = ("none", "zero", "mean")
_PART = re.compile(r"direct (only|\+ )")
_SCALED = re.compile(r"error x (.+)")


def summarise(folder: Path) -> None:
    """Write `summary.json` beside the rows of a finished measurement, where it is one of an SAE and its controls on documents."""
    if not {UNDER_TEST, EQUAL_DISTANCE[0]} <= set(read_manifest(folder).arms):
        return
    rows: Any = read_rows(folder, ["document"], [UNDER_TEST])
    if rows["document"].nunique() > 1:
        kl_by_arm(folder).save(folder / SUMMARY_FILENAME)


def kl_by_arm(folder: str | Path) -> MeasuredKL:
    """Mean KL of every arm; of the rows three columns are read. Raises as `read_rows`; a ValueError for a single document."""
    names = tuple(read_manifest(Path(folder)).arms)
    rows = read_rows(folder, ["arm", "document", "kl_nats"])
    found: list[ArmKL] = []
    for arm in names:
        own = rows.loc[rows["arm"] == arm]
        found.append(_classified(arm, names, clustered_mean(own["kl_nats"].to_numpy(), own["document"].to_numpy())))
    ratios: dict[str, Mapping[str, Estimate]] = {}
    for sae in dict.fromkeys(arm.of for arm in found if arm.role == "control"):
        controls = {arm.arm: arm.name for arm in found if arm.of == sae and arm.role == "control"}
        by_arm = error_ratios(folder, sae, tuple(controls))
        ratios[sae] = {controls[arm]: estimate for arm, estimate in by_arm.items()}
    return MeasuredKL(arms=tuple(found), ratios=ratios)


def _classified(arm: str, arms: tuple[str, ...], kl: Estimate) -> ArmKL:
    prefix, _, rest = arm.partition(": ")
    of, name = (prefix, rest) if rest and prefix in arms else (UNDER_TEST, arm)
    role, scale = _role(name)
    if role == "other" and f"{arm}: {EQUAL_DISTANCE[0]}" in arms:
        of, name, role, scale = arm, arm, "SAE", 1.0
    return ArmKL(arm=arm, of=arm if role == "other" else of, name=name, role=role, scale=scale, kl=kl)


def _role(name: str) -> tuple[Role, float | None]:
    if name == UNDER_TEST:
        return "SAE", 1.0
    if name in EQUAL_DISTANCE:
        return "control", -1.0 if name == "flipped error" else None
    if name in ANCHORS:
        return "anchor", None
    if scaled := _SCALED.fullmatch(name):
        return "scaled error", float(scaled[1])
    return ("part" if _PART.match(name) else "other"), None
