"""Gurnee's ratios: how much more an SAE's error does than other errors of its size, from the rows of a measurement.

    ratio = mean KL(original || spliced) / mean KL(original || control)

1 says that the error does as much as the control of equal distance; Gurnee found 2 to 4.5 against isotropic vectors.

Source: W. Gurnee 2024, "SAE reconstruction errors are (empirically) pathological".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_nfm.evaluation.token_table import read_rows
from sae_nfm.interventions import EQUAL_DISTANCE, UNDER_TEST
from sae_nfm.stats import Bootstrap, Estimate, ratio_of_means


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
