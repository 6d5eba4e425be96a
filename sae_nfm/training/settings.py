"""The settings of a run: which cannot work, and which a run that goes on from a checkpoint may have changed.

Settings are by name, as `sae-nfm train` has them; those of the SAE have "sae." before them where the run has the name too, and
the SAE's name in a run of several.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME

from sae_nfm.architectures import PRIMARY_DIGEST, UNFOLDED
from sae_nfm.common import check_numbers
from sae_nfm.common.options import ACTIVATIONS
from sae_nfm.convert import WARM_START_DIGEST
from sae_nfm.loading import refuse_not_finite

RunnerConfig = LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig
MAY_CHANGE = (
    *(
        "output_path",
        "checkpoint_path",
        "resume_from_checkpoint",
        "n_checkpoints",
        "save_final_checkpoint",
        "logger",
        "verbose",
    ),
    *(
        "device",
        "llm_device",
        "act_store_device",
        "compile_llm",
        "llm_compilation_mode",
        "compile_sae",
        "sae_compilation_mode",
    ),
    *("n_eval_batches", "eval_batch_size_prompts", "hook_eval", "dataset_trust_remote_code"),
    *("sae_lens_version", "sae_lens_training_version", "sae.device", "metadata"),
)
"""Settings that may be others when a run goes on; and there may be more `training_tokens` where no schedule depends on them."""
ALLOWED = (
    "a run goes on with the settings it was begun with, but for its output, checkpoints, logging, evaluation and devices, and "
    "more training_tokens at a constant rate without decay"
)
PATHS = ("model_name", "dataset_path", "cached_activations_path", "from_pretrained_path")
"""Settings that are often paths, which have several spellings."""
FOLDED = ("normalize_activations", "rescale_acts_by_decoder_norm")
"""Settings of an SAE that the end of its training changes."""


def refuse_several_processes() -> None:
    """Raise a ValueError where torchrun or the like began several processes: each would train the whole run."""
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        started = max(started, torch.distributed.get_world_size())
    if started > 1:
        raise ValueError(
            f"WORLD_SIZE is {started}: each of these processes would train the whole run into one folder, as training is not "
            "distributed; start one process, without torchrun, or unset WORLD_SIZE"
        )


def check_settings(cfg: RunnerConfig, saes: Mapping[str, TrainingSAE[Any]]) -> None:
    """Raise a ValueError for settings that cannot work or say nothing, or an SAE to begin with that is not finite."""
    refuse_several_processes()
    check_numbers(cfg)
    check_numbers(cfg.logger)
    check_schedule(cfg)
    for sae in saes.values():
        _check_sae(sae, cfg.total_training_steps)


def check_schedule(cfg: RunnerConfig) -> None:
    """Raise a ValueError for a warm-up and decay that do not fit into a run: the rate would never be reached, or left."""
    steps = cfg.total_training_steps
    warm_up, decay = cfg.lr_warm_up_steps, cfg.lr_decay_steps
    if warm_up + decay > steps:
        raise ValueError(
            f"lr_warm_up_steps is {warm_up} and lr_decay_steps {decay}, but the run has {steps} steps (training_tokens "
            f"{cfg.training_tokens} in batches of {cfg.train_batch_size_tokens}); lower them, or train on more tokens"
        )


def _check_sae(sae: TrainingSAE[Any], steps: int) -> None:
    check_numbers(sae.cfg)
    dtypes = {parameter.dtype for parameter in sae.parameters()}
    if torch.float16 in dtypes:
        raise ValueError(
            "the SAE's dtype is float16, in which its losses overflow and Adam's small steps are lost; give dtype float32, or "
            "bfloat16 where memory is short"
        )
    for name in ("l1_warm_up_steps", "l0_warm_up_steps"):
        if getattr(sae.cfg, name, 0) > steps:
            raise ValueError(
                f"{name} is {getattr(sae.cfg, name)}, but the run has {steps} steps, so the coefficient would never be reached; "
                "lower it, or train on more tokens"
            )
    refuse_not_finite(sae.state_dict(), "the SAE to begin with")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A setting that is not what it was when a checkpoint was made."""

    name: str
    given: Any
    saved: Any

    def __str__(self) -> str:
        return f"{self.name} {self.saved!r}, this run {self.given!r}"


def read_settings(file: Path) -> dict[str, Any]:
    """A config as SAELens saves it beside weights; a ValueError where the file is damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); resume from another checkpoint") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged (no object); resume from another checkpoint")
    return content


def first_difference(
    checkpoint: Path, cfg: RunnerConfig, saes: Mapping[str, TrainingSAE[Any]], *, some: bool = False
) -> Difference | None:
    """The first setting of a run that is not what it was for a checkpoint; None where the run may go on from there.

    Args:
        checkpoint: its folder.
        cfg, saes: of the run; one SAE has the name "".
        some: whether the run may lack SAEs of the checkpoint.
    """
    saved, given = read_settings(checkpoint / RUNNER_CFG_FILENAME), _plain(cfg.to_dict())
    saved_saes, given_saes = saved.pop("saes", None), given.pop("saes", None)
    finished = checkpoint.name.startswith("final_")
    found = [*_differences(saved, given, _defaults(cfg), "")]
    if (saved_saes is None) != (given_saes is None):
        found.append(Difference(name="saes", given=given_saes and [*given_saes], saved=saved_saes and [*saved_saes]))
    elif saved_saes is not None:
        if (set(saved_saes) != set(given_saes)) if not some else not set(given_saes) <= set(saved_saes):
            return Difference(name="saes", given=[*given_saes], saved=[*saved_saes])
    else:
        saved_saes, given_saes = {"": saved.get("sae", {})}, {"": given["sae"]}
    folded = False
    for name, sae in saes.items():
        now = _plain(sae.cfg.to_dict())
        file = checkpoint / name / SAE_CFG_FILENAME
        made = read_settings(file) if file.is_file() else saved_saes.get(name, {})
        folded |= finished and made.get("normalize_activations") == "none" and now["normalize_activations"] in UNFOLDED
        for then, this in ((saved_saes.get(name, {}), given_saes.get(name, {})), (made, now)):
            where = f"saes[{name}]." if name else ""
            found += [
                d
                for d in _differences(then, this, _defaults(sae.cfg), where, of_sae=True)
                if not (finished and _fold(d))
            ]
        found += _origins(made, now)
    reached = int(checkpoint.name.removeprefix("final_")) if checkpoint.name.removeprefix("final_").isdigit() else 0
    constant = cfg.lr_scheduler_name.lower() == "constant" and not cfg.lr_decay_steps
    longer = constant and not folded and cfg.training_tokens >= max(reached, saved.get("training_tokens", 0))
    return next((one for one in found if not (one.name == "training_tokens" and longer)), None)


def other_run(one: Path, other: Path) -> Difference | None:
    """The first setting in which the runs of two checkpoints differ; None also where a checkpoint does not say its run's."""
    files = [folder / RUNNER_CFG_FILENAME for folder in (one, other)]
    if not all(file.is_file() for file in files):
        return None
    then, now = map(read_settings, files)
    found = [
        *_differences(then, now, {}, ""),
        *_differences(then.get("sae", {}), now.get("sae", {}), {}, "", of_sae=True),
    ]
    return next((d for d in found if d.name != "training_tokens" and not _fold(d)), None)


def _fold(difference: Difference) -> bool:
    return difference.name.rpartition(".")[2] in FOLDED and any(
        v in ("none", False) for v in (difference.saved, difference.given)
    )


def _origins(made: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    """Other SAEs that an SAE is trained on or began as, and the cached activations, by what its metadata say."""
    then, this = made.get("metadata") or {}, now.get("metadata") or {}
    for name in (PRIMARY_DIGEST, WARM_START_DIGEST, ACTIVATIONS):
        if then.get(name) != this.get(name):
            yield Difference(name=name, given=this.get(name), saved=then.get(name))


def _differences(
    saved: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any], where: str, *, of_sae: bool = False
) -> Iterator[Difference]:
    same_base = of_sae and saved.get("base_sha256") and saved["base_sha256"] == given.get("base_sha256")
    known_otherwise = ("base",) if same_base else ("base_sha256",) if given.get("train_base") else ()
    if not given.get("use_cached_activations"):  # then SAELens does not read that path, and ours is told by its content
        known_otherwise += ("cached_activations_path",)
    for name, value in sorted(given.items(), key=lambda item: item[0] != "architecture"):
        then = saved.get(name, defaults.get(name))  # an older SAELens had fewer settings
        shown = f"sae.{name}" if of_sae and name in ("dtype", "device") else name
        if shown in MAY_CHANGE or name == "sae" or name in known_otherwise or _same(name, value, then):
            continue
        yield Difference(name=where + shown, given=value, saved=then)


def _same(name: str, one: Any, other: Any) -> bool:
    if name == "prefetch_llm_batches":  # how many wait says nothing about what they are
        return bool(one) == bool(other)
    if name in PATHS and isinstance(one, str) and isinstance(other, str):
        return one == other or Path(one).resolve() == Path(other).resolve()
    if isinstance(one, str) and isinstance(other, str):
        return one.removeprefix("torch.") == other.removeprefix("torch.")
    return one == other


def _plain(content: Any) -> dict[str, Any]:
    """As it is once it was saved."""
    return json.loads(json.dumps(content, default=str))


def _defaults(cfg: Any) -> dict[str, Any]:
    found = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cfg)}
    return _plain({name: value for name, value in found.items() if value is not MISSING})
