"""The learning rate of each arm: the same candidates and tokens for all, chosen on text that nothing is reported on.

Every arm is trained at every candidate, for fewer tokens, on a seed that is not among the compared, and takes the rate with the
lowest held-out FVU. Where a coefficient sets the L0, FVUs are comparable at one L0 only: they are interpolated at k.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import inf, isfinite
from pathlib import Path
from typing import Any

from jaxtyping import Int
from sae_lens import SAE, HookedSAETransformer
from torch import Tensor

from sae_nfm.common import write_json
from sae_nfm.common.results import with_kind, without_kind
from sae_nfm.comparison.arms import interpolation_weights
from sae_nfm.comparison.results import SweepRow
from sae_nfm.evaluation.fidelity import Arm, evaluate
from sae_nfm.training import StreamConfig, TrainingArm, train_arms

SWEEP_KIND = "sweep/1"


def sweep(
    stream: StreamConfig,
    arms: Mapping[str, TrainingArm],
    candidates: Sequence[float],
    k: int,
    model: HookedSAETransformer,
    dataset: Any,
    held_out: Int[Tensor, "rows pos"],
    folder: Path,
) -> list[SweepRow]:
    """Train and evaluate each arm at each rate that `folder/sweep.json` does not have yet; the SAEs are deleted.

    Raises:
        ValueError: when an SAE of an interrupted sweep was trained otherwise.
    """
    path = folder / "sweep.json"
    rows = read_sweep(path) if path.is_file() else []
    for rate in candidates:
        done = {row.arm for row in rows if row.learning_rate == rate}
        left = {name: arm for name, arm in arms.items() if name not in done}
        if not left:
            continue
        trained = folder / f"sweep {rate:g}"
        train_arms(stream, left, dict.fromkeys(left, rate), model, dataset, trained)
        saes = [Arm(name=name, sae=SAE.load_from_disk(trained / name, device=stream.device).eval()) for name in left]
        for name, fidelity in evaluate(model, held_out, saes).items():
            family, l0, fvu = arms[name].family, fidelity.l0, fidelity.fvu
            rows.append(SweepRow(k=k, arm=name, family=family, learning_rate=rate, l0=l0, fvu=fvu))
        write_json(path, with_kind(SWEEP_KIND, {"rows": [asdict(row) for row in rows]}))
        shutil.rmtree(trained)
    return [row for row in rows if row.arm in arms]


def read_sweep(path: Path) -> list[SweepRow]:
    """The rows of a `sweep.json`."""
    content = json.loads(path.read_text())
    rows = content if isinstance(content, list) else without_kind(SWEEP_KIND, content)["rows"]  # a list in 0.1.0
    return [SweepRow(**row) for row in rows]


def chosen_rates(rows: Sequence[SweepRow], candidates: Sequence[float]) -> dict[str, float]:
    """The rate of each family: the lowest FVU; the middle candidate where no rate brought its L0s around k."""
    return {family: _best(rows, family, candidates) for family in dict.fromkeys(row.family for row in rows)}


def _best(rows: Sequence[SweepRow], family: str, candidates: Sequence[float]) -> float:
    fvus = {
        rate: _fvu_at_k([row for row in rows if row.family == family and row.learning_rate == rate])
        for rate in candidates
    }
    if not any(isfinite(fvu) for fvu in fvus.values()):
        return sorted(candidates)[len(candidates) // 2]
    return min(fvus, key=lambda rate: fvus[rate])


def _fvu_at_k(members: Sequence[SweepRow]) -> float:
    """FVU of an arm at one rate, interpolated at k where it has several SAEs; infinite where that says nothing."""
    weights: list[float] | None = [1.0]
    if len(members) != 1 or members[0].arm != members[0].family:
        weights = interpolation_weights([row.l0 for row in members], members[0].k) if members else None
    if weights is None:
        return inf
    fvu = sum(weight * row.fvu for weight, row in zip(weights, members, strict=True) if weight)
    return fvu if isfinite(fvu) else inf
