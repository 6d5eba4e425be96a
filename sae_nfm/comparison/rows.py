"""The table of a comparison: held-out sums of every SAE, and the arms whose L0 a coefficient sets, interpolated."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from sae_lens import SAE
from sae_lens.constants import SPARSITY_FILENAME
from safetensors.torch import load_file

from sae_nfm.common import whole
from sae_nfm.comparison.arms import JOINT, interpolation_weights, training_flops
from sae_nfm.comparison.benchmark import ablations, in_canonical_gauge
from sae_nfm.comparison.claims import ABLATED, CANONICAL, DIRECT
from sae_nfm.comparison.results import CompareRow
from sae_nfm.data import TokenRows
from sae_nfm.evaluation import Arm
from sae_nfm.evaluation.held_out_sums import SUMS, figures, held_out_sums
from sae_nfm.interventions import Splice
from sae_nfm.models import LanguageModel
from sae_nfm.training import Trained, TrainingArm

DOCUMENTS_FILENAME = "documents.parquet"
NEVER_ACTIVE = -9.9
"""SAELens saves log10(frequency + 1e-10); one token in ten million would be -7."""
Kind = Literal["trained", "interpolated", "ablation"]


def evaluated(
    model: LanguageModel, rows: TokenRows, arms: Mapping[str, TrainingArm], folder: Path, device: str
) -> None:
    """Evaluate those of the trained SAEs that are not yet, all on the same tokens; `documents.parquet` goes into each folder.

    Those of `claims.ABLATED` have more arms in them: the direct path alone, and that in the canonical gauge where there is one.
    """
    left = [name for name in arms if not (folder / name / DOCUMENTS_FILENAME).exists()]
    if not left:
        return
    splices = {name: _parts(name, SAE.load_from_disk(folder / name, device=device).eval()) for name in left}
    sums = held_out_sums(model, rows, {name: arm for parts in splices.values() for name, arm in parts.items()})
    for name, parts in splices.items():
        with whole(folder / name / DOCUMENTS_FILENAME) as partial:
            sums[sums["arm"].isin(list(parts))].to_parquet(partial, index=False)


def _parts(name: str, sae: SAE[Any]) -> dict[str, Splice]:
    off = ablations(sae).get(DIRECT) if name in ABLATED else None
    arms = [Arm(name=name, sae=sae)]
    if off is not None:
        arms.append(Arm(name=f"{name}: {DIRECT}", sae=sae, off=off))
        canonical = in_canonical_gauge(sae)
        if canonical is not None:
            arms.append(Arm(name=f"{name}: {CANONICAL}", sae=canonical, off=off))
    return {arm.name: arm.intervention for arm in arms}


def tidy(
    output: Path, arms: Mapping[int, Mapping[str, TrainingArm]], seeds: Sequence[int]
) -> tuple[list[CompareRow], pd.DataFrame]:
    """The rows of all k, seeds and arms, and the sums behind them: columns k, seed, and those of `held_out_sums`."""
    rows: list[CompareRow] = []
    documents: list[pd.DataFrame] = []
    for k, own in arms.items():
        for seed in seeds:
            found, sums = _of_seed(output / f"k{k}" / f"seed-{seed}", k, seed, own)
            rows += found
            sums.insert(0, "seed", seed)
            sums.insert(0, "k", k)
            documents.append(sums)
    return rows, pd.concat(documents, ignore_index=True)


def _of_seed(folder: Path, k: int, seed: int, arms: Mapping[str, TrainingArm]) -> tuple[list[CompareRow], pd.DataFrame]:
    sums = {name: pd.read_parquet(folder / name / DOCUMENTS_FILENAME) for name in arms}
    trained = {name: Trained.load(folder / name) for name in arms}
    rows: list[CompareRow] = []
    tables: list[pd.DataFrame] = []
    for name, arm in arms.items():
        for part in dict.fromkeys(sums[name]["arm"]):
            own: pd.DataFrame = sums[name].loc[sums[name]["arm"] == part]
            kind: Kind = "trained" if part == name else "ablation"
            dead = _dead_fraction(folder / name) if part == name else None
            rows.append(_row(k, seed, str(part), kind, arm, trained[name], own, dead))
            tables.append(own)
    target = next((row.l0 for row in rows if row.arm == JOINT), None) or float(k)
    for family in dict.fromkeys(arm.family for arm in arms.values() if arm.coefficient is not None):
        members = [arm for arm in arms.values() if arm.family == family]
        between = _interpolated(family, [sums[arm.name] for arm in members], target)
        rows.append(_row(k, seed, family, "interpolated", members[0], trained[members[0].name], between, None, target))
        tables += [] if between is None else [between]
    return rows, pd.concat(tables, ignore_index=True)


def _interpolated(family: str, members: Sequence[pd.DataFrame], l0: float) -> pd.DataFrame | None:
    """Sums of an arm at that L0, document by document; None where it was not reached."""
    weights = interpolation_weights([figures(member).l0 for member in members], l0)
    if weights is None:
        return None
    stacked = np.stack([member[SUMS].to_numpy(dtype=np.float64) for member in members])
    between = pd.DataFrame(np.tensordot(weights, stacked, axes=1), columns=pd.Index(SUMS))
    between["active"] = l0 * between["tokens"]
    between.insert(0, "document", members[0]["document"].to_numpy())
    between.insert(0, "arm", family)
    return between


def _row(
    k: int,
    seed: int,
    name: str,
    kind: Kind,
    arm: TrainingArm,
    trained: Trained,
    sums: pd.DataFrame | None,
    dead_fraction: float | None,
    l0: float | None = None,
) -> CompareRow:
    found = None if sums is None else figures(sums)
    l0 = found.l0 if found is not None and l0 is None else l0
    return CompareRow(
        k=k,
        seed=seed,
        arm=name,
        kind=kind,
        family=arm.family,
        parameters=trained.parameters,
        training_flops=training_flops(arm.sae, l0) if found is not None and l0 else None,
        learning_rate=trained.settings["learning_rate"],
        training_tokens_per_second=trained.tokens_per_second if kind == "trained" else None,
        dead_fraction=dead_fraction,
        l0=None if found is None else l0,
        fvu=None if found is None else found.fvu,
        kl_nats=None if found is None else found.kl_nats,
        ce_nats=None if found is None else found.ce_nats,
        ce_delta_nats=None if found is None else found.ce_delta_nats,
        tokens=0 if found is None else found.tokens,
    )


def _dead_fraction(folder: Path) -> float:
    """Share of features that never were active since SAELens last began to count, half way through the training."""
    sparsity = load_file(folder / SPARSITY_FILENAME)["sparsity"]
    return float((sparsity < NEVER_ACTIVE).double().mean())
