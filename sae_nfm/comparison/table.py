"""The table of a comparison: metrics of every SAE, and the arms whose L0 a coefficient sets, interpolated."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sae_lens import SAE
from sae_lens.constants import SPARSITY_FILENAME
from safetensors.torch import load_file

from sae_nfm.analysis import gauge
from sae_nfm.architectures import refined
from sae_nfm.common import checked, read_parquet, write_parquet
from sae_nfm.comparison.arms import (
    ENCODED_TOGETHER,
    inference_flops,
    interpolation_weights,
    is_rescaled,
    training_flops,
)
from sae_nfm.comparison.results import (
    ABLATED,
    ARM_GROUPS,
    ArmGroup,
    ArmName,
    CompareRow,
    Paths,
    RowKind,
    refined_name,
)
from sae_nfm.data import TokenRows
from sae_nfm.evaluation import Arm, Fidelity, evaluate
from sae_nfm.evaluation.fidelity import SUMS, fidelity_of, held_out_sums
from sae_nfm.models import LanguageModel
from sae_nfm.training import Trained, TrainingArm

OF_A_ROW = tuple(field.name for field in fields(Fidelity) if field.name not in ("l0", "tokens"))
"""Metrics that a row of the table has as they were measured."""

PATH_HOOKS = {Paths.LINEAR: "hook_nfm_linear", Paths.NONLINEAR: "hook_nfm_interaction", Paths.SQUARE: "hook_nfm_square"}
"""What is left on beside the direct path, and the hook point of what it writes."""
DOCUMENTS_FILENAME = "documents.parquet"
NEVER_ACTIVE = -9.9
"""SAELens saves log10(frequency + 1e-10); one token in ten million would be -7."""


def ablations(sae: SAE[Any]) -> dict[Paths, tuple[str, ...]]:
    """For a joint NFM-SAE, which hook points to zero so that only these paths write; nothing for others."""
    present = {paths: hook for paths, hook in PATH_HOOKS.items() if hook in sae.hook_dict}
    if not present:
        return {}
    left_on = present if len(present) > 1 else ()
    return {Paths.DIRECT: tuple(present.values())} | {
        on: tuple(hook for paths, hook in present.items() if paths != on) for on in left_on
    }


def in_canonical_gauge(sae: SAE[Any]) -> SAE[Any] | None:
    """A copy of the SAE in its canonical gauge, where it has one: a linear path that reads all active features."""
    return gauge.canonical(sae) if gauge.has_canonical(sae) else None


def parts_of(name: str, sae: SAE[Any], wanted: Collection[Paths]) -> dict[Paths, Arm]:
    """The SAE whole and with the ablations that are wanted, as far as it has them."""
    off = ablations(sae)
    found = {Paths.ALL: Arm(name=name, sae=sae)}
    found |= {paths: Arm(name=paths.of(name), sae=sae, off=hooks) for paths, hooks in off.items()}
    if off and Paths.CANONICAL in wanted and (canonical := in_canonical_gauge(sae)) is not None:
        found[Paths.CANONICAL] = Arm(name=Paths.CANONICAL.of(name), sae=canonical, off=off[Paths.DIRECT])
    return {paths: arm for paths, arm in found.items() if paths in wanted}


def _load(folder: Path, device: str) -> SAE[Any]:
    return SAE.load_from_disk(folder, device=device).eval()


def evaluated_once(
    model: LanguageModel,
    rows: TokenRows,
    arms: Mapping[str, TrainingArm],
    folder: Path,
    *,
    k: int,
    seed: int,
    device: str,
    refinement_steps: int = 0,
) -> list[CompareRow]:
    """Rows of trained SAEs, each with every combination of its paths, then refined, averaged over the tokens."""
    saes = {name: parts_of(name, _load(folder / name, device), tuple(Paths)) for name in arms}
    fitted = {
        name: Arm(name=refined_name(name), sae=refined(parts[Paths.ALL].sae, refinement_steps))
        for name, parts in saes.items()
        if refinement_steps
    }
    whole = [arm for parts in saes.values() for arm in parts.values()]
    fidelity, found = evaluate(model, rows.tokens, [*whole, *fitted.values()]), list[CompareRow]()
    for name, parts in saes.items():
        trained, place = Trained.load(folder / name), folder / name
        found += [_row(k, seed, paths, arms[name], trained, fidelity[arm.name], place) for paths, arm in parts.items()]
        if name in fitted:
            own = fidelity[fitted[name].name]
            found.append(_row(k, seed, Paths.ALL, arms[name], trained, own, place, refinement_steps=refinement_steps))
    return found


def evaluated(
    model: LanguageModel, rows: TokenRows, arms: Sequence[str], folder: Path, device: str, refinement_steps: int = 0
) -> None:
    """Evaluate those of the trained SAEs that are not yet, all on the same tokens; `documents.parquet` goes into each folder.

    Those of `ABLATED` have rows for the direct path alone too, and for that in the canonical gauge where there is one. With
    refinements the SAEs are evaluated with these too, and `refined-<R>.parquet` is beside it.
    """
    left = dict[Path, list[Arm]]()
    for name in arms:
        sae: SAE[Any] | None = None
        for steps in sorted({0, refinement_steps}):
            if (file := folder / name / _documents(steps)).exists():
                continue
            sae = _load(folder / name, device) if sae is None else sae
            wanted = (Paths.ALL, *((Paths.DIRECT, Paths.CANONICAL) if name in ABLATED else ()))
            left[file] = (
                [Arm(name=refined_name(name), sae=refined(sae, steps))]
                if steps
                else [*parts_of(name, sae, wanted).values()]
            )
    if left:
        sums = held_out_sums(model, rows, {arm.name: arm.intervention for own in left.values() for arm in own})
        for file, own in left.items():
            write_parquet(sums[sums["arm"].isin([arm.name for arm in own])], file)


def _documents(refinement_steps: int) -> str:
    return f"refined-{refinement_steps}.parquet" if refinement_steps else DOCUMENTS_FILENAME


def tidy(
    output: Path, arms: Mapping[int, Mapping[str, TrainingArm]], seeds: Sequence[int], refinement_steps: int = 0
) -> tuple[list[CompareRow], pd.DataFrame]:
    """The rows of all k, seeds and arms, and the sums behind them: columns k, seed, and those of `held_out_sums`."""
    rows, documents = list[CompareRow](), list[pd.DataFrame]()
    for k, own in arms.items():
        for seed in seeds:
            found, sums = _of_seed(output / f"k{k}" / f"seed-{seed}", k, seed, own, refinement_steps)
            rows += found
            sums.insert(0, "seed", seed)
            sums.insert(0, "k", k)
            documents.append(sums)
    return rows, pd.concat(documents, ignore_index=True)


def _of_seed(
    folder: Path, k: int, seed: int, arms: Mapping[str, TrainingArm], refinement_steps: int
) -> tuple[list[CompareRow], pd.DataFrame]:
    both = sorted({0, refinement_steps})
    sums = {(name, steps): read_parquet(folder / name / _documents(steps)) for name in arms for steps in both}
    trained = {name: Trained.load(folder / name) for name in arms}
    rows, tables = list[CompareRow](), list[pd.DataFrame]()
    for name, arm in arms.items():
        for paths in Paths:
            own: pd.DataFrame = sums[name, 0].loc[sums[name, 0]["arm"] == paths.of(name)]
            if len(own):
                rows.append(_row(k, seed, paths, arm, trained[name], fidelity_of(own), folder / name))
                tables.append(own)
        if refinement_steps:
            own = sums[name, refinement_steps]
            how: Any = {"refinement_steps": refinement_steps}
            rows.append(_row(k, seed, Paths.ALL, arm, trained[name], fidelity_of(own), folder / name, **how))
            tables.append(own)
    target = next((row.l0 for row in rows if row.arm == ArmName.JOINT), None) or float(k)
    for family in dict.fromkeys(arm.family for arm in arms.values() if arm.coefficient is not None):
        members = [arm for arm in arms.values() if arm.family == family]
        for steps in both:
            name = refined_name(family) if steps else family
            between = _interpolated(name, [sums[arm.name, steps] for arm in members], target)
            found = None if between is None else fidelity_of(between)
            how = {"interpolated_at": target, "refinement_steps": steps}
            rows.append(_row(k, seed, Paths.ALL, members[0], trained[members[0].name], found, **how))
            tables += [] if between is None else [between]
    return rows, pd.concat(tables, ignore_index=True)


def _interpolated(family: str, members: Sequence[pd.DataFrame], l0: float) -> pd.DataFrame | None:
    """Sums of an arm at that L0, document by document; None where it was not reached."""
    weights = interpolation_weights([fidelity_of(member).l0 for member in members], l0)
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
    paths: Paths,
    arm: TrainingArm,
    trained: Trained,
    found: Fidelity | None,
    folder: Path | None = None,
    *,
    interpolated_at: float | None = None,
    refinement_steps: int = 0,
) -> CompareRow:
    """A row of an SAE in its folder, or of an arm interpolated at an L0; without metrics where that was not reached."""
    l0 = None if found is None else interpolated_at or found.l0
    is_whole = folder is not None and paths is Paths.ALL and not refinement_steps
    kind = RowKind.TRAINED if is_whole else RowKind.REFINED if paths is Paths.ALL else RowKind.ABLATION
    name = arm.family if folder is None else paths.of(arm.name)
    return CompareRow(
        k=k,
        seed=seed,
        arm=refined_name(name) if refinement_steps else name,
        kind=RowKind.INTERPOLATED if folder is None else kind,
        family=arm.family,
        group=ARM_GROUPS.get(arm.family, ArmGroup.OTHER),
        paths=paths,
        parameters=trained.parameters,
        training_flops=training_flops(arm.sae, l0, ENCODED_TOGETHER) if l0 else None,
        learning_rate=trained.settings["learning_rate"],
        training_tokens_per_second=trained.tokens_per_second if is_whole else None,
        dead_fraction=_dead_fraction(folder) if folder is not None and is_whole else None,
        l0=l0,
        **{name: getattr(found, name, None) for name in OF_A_ROW},
        tokens=0 if found is None else found.tokens,
        rescaling=is_rescaled(arm),
        refinement_steps=refinement_steps,
        inference_flops=inference_flops(arm.sae, l0, refinement_steps, ENCODED_TOGETHER) if l0 else None,
    )


def _dead_fraction(folder: Path) -> float:
    """Share of features that never were active since SAELens last began to count, half way through the training."""
    return float((load_file(checked(folder / SPARSITY_FILENAME))["sparsity"] < NEVER_ACTIVE).double().mean())
