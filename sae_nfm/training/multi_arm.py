"""Training of the arms of a comparison: SAELens's runner on one activation stream, each arm at its own learning rate.

What an arm becomes depends on its configuration, its learning rate, the seed and the data, to the last bit, and not on the
arms beside it (`MatchedRunner`): all begin from one seed and see the same batches in the same order.

Each arm ends in a folder of its own, written whole: SAELens's files, `training.jsonl` (its losses and metrics) and
`trained.json`. An interrupted run leaves an exact checkpoint (`resume`) and goes on from it; finished arms are left alone.
An arm that diverges stands still, the others go on, and nothing of it is written.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    HookedSAETransformer,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    SAETrainer,
    SAETransformerBridge,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import temporary_seed
from torch import Tensor
from typing_extensions import override

from sae_nfm.architectures import EncoderFields, random_initialisation
from sae_nfm.common import final_path, read_json, seal, write_json
from sae_nfm.common.files import begin
from sae_nfm.data import ActivationCache, read_from_cache
from sae_nfm.loading import quiet_saelens
from sae_nfm.training.recorder import record_training
from sae_nfm.training.results import RECORD_FILENAME, TRAINED_FILENAME, Trained, read_training_record, record_line
from sae_nfm.training.resume import DivergedError, checkpoint_folder, diverged, exact_resume
from sae_nfm.training.settings import refuse_several_processes

ORDINARY: dict[str, Any] = {
    "model_class_name": "HookedTransformer",
    "model_kwargs": {},
    "activations": None,
    "selection_stages": 1,
    "selection_candidates": None,
    "refinement_steps": 0,
    "inference_selection_stages": None,
    "inference_refinement_steps": None,
    **{field.name: field.default for field in fields(EncoderFields)},
}
"""Settings that are not written down where they have these values."""
BEGUN_FILENAME, DIVERGED_FILENAME = "begun.json", "diverged.json"
"""In the folder of arms that are being trained: the settings of each, and why some stand still."""


@dataclass(frozen=True, kw_only=True)
class TrainingArm:
    """One SAE to train."""

    name: str
    """Unique name, such as "topk" or "jumprelu 0.5"."""
    family: str
    """Name of the arm it belongs to: "jumprelu" for every coefficient of it, else its own name."""
    sae: TrainingSAEConfig
    coefficient: float | None = None
    """What sets its L0; None where k does."""
    decoder_rate: float = 1.0
    """Factor on each of Adam's steps of W_dec."""


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """The activations that arms are trained on, and the length of the training: what is the same for all of them."""

    model_name: str
    """Name of the language model, for the SAEs' metadata."""
    hook_name: str
    """Hook point whose activations are reconstructed."""
    dataset: str
    """Name of the training data, for the SAEs' metadata."""
    training_tokens: int
    context_size: int
    """Tokens per row, BOS included."""
    batch_size: int
    """Activations per training step."""
    seed: int
    """Seed of initialisation, data order and what training steps draw."""
    n_checkpoints: int = 0
    """Exact checkpoints during the training, besides the one an interruption leaves."""
    fewest_steps_counted: int = 0
    """Last steps, at least, over which active features are counted for `sparsity.safetensors`; else the last half."""
    device: str = "cpu"
    model_class_name: str = "HookedTransformer"
    """How the language model was loaded, for the SAEs' metadata: its class, and what its loader was given."""
    model_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    activations: str | None = None
    """The cache that the activations are from, by its `name`; None where they are the model's."""

    @property
    def steps(self) -> int:
        """Training steps."""
        return max(1, self.training_tokens // self.batch_size)


def train_arms(
    stream: StreamConfig,
    arms: Mapping[str, TrainingArm],
    learning_rates: Mapping[str, float],
    model: HookedSAETransformer | SAETransformerBridge,
    dataset: Any,
    folder: Path,
    cache: ActivationCache | None = None,
) -> None:
    """Train those of the arms that are not finished, all at once, each into `folder/<name>`, at Adam's learning rates by name.

    Where an interrupted run left a checkpoint in `folder.partial`, its arms go on from there before the others begin. The data
    set has a `text` or a `tokens` column, in the order of this seed. With a cache, which `stream.activations` names, the data
    set is its own.

    Raises:
        ValueError: when an arm was trained, or begun, otherwise.
        DivergedError: when arms diverged, which it names (`saes`); the others are finished first.
    """
    refuse_several_processes()
    failed: dict[str, str] = {}
    for names, unfinished in _rounds(pending(stream, arms, learning_rates, folder), _unfinished(folder)):
        chosen = {name: arms[name] for name in names}
        settings = {name: _settings(stream, arm, learning_rates[name]) for name, arm in chosen.items()}
        _claim_round(unfinished, settings)
        failed |= _train_round(stream, chosen, learning_rates, model, dataset, folder, unfinished, cache)
        shutil.rmtree(unfinished)
    if _unfinished(folder).is_dir() and not any(_unfinished(folder).iterdir()):
        _unfinished(folder).rmdir()
    if failed:
        others = "; the others are finished" if len(failed) < len(arms) else ""
        error = DivergedError(f"{'; '.join(failed.values())}{others}")
        error.saes = failed
        raise error


def pending(
    stream: StreamConfig, arms: Mapping[str, TrainingArm], learning_rates: Mapping[str, float], folder: Path
) -> list[str]:
    """Arms without a finished folder; a ValueError when a finished arm was trained otherwise."""
    for name, arm in arms.items():
        if (folder / name).exists():
            was = Trained.load(folder / name).settings
            _refuse_others(name, _settings(stream, arm, learning_rates[name]), was, f"{folder / name} was trained")
    return [name for name in arms if not (folder / name).exists()]


def _refuse_others(name: str, settings: Mapping[str, Any], was: Mapping[str, Any], when: str) -> None:
    left_out = {key: value for key, value in ORDINARY.items() if key in was}
    for key, value in (left_out | dict(settings)).items():
        if (then := was.get(key, ORDINARY.get(key))) != value:
            raise ValueError(
                f"{key} of {name!r} is {value!r}, and was {then!r} when {when}; give it as it was, or another output folder"
            )


def _claim_round(unfinished: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Write down the settings of arms that begin, or compare them with those that they began with."""
    file = unfinished / BEGUN_FILENAME
    was = read_json(file) if file.is_file() else {}
    for name, own in settings.items():
        _refuse_others(name, own, was.get(name, own), f"its training in {unfinished} was begun")
    write_json(file, was | dict(settings))


def _settings(stream: StreamConfig, arm: TrainingArm, learning_rate: float) -> dict[str, Any]:
    """All that the outcome depends on, as JSON has it."""
    own = {"learning_rate": learning_rate, "decoder_rate": arm.decoder_rate}
    everything = arm.sae.to_dict() | asdict(stream) | own
    ignored = ["metadata", "n_checkpoints", "fewest_steps_counted"]
    # as before there were others
    ignored += [key for key, value in ORDINARY.items() if everything.get(key) == value]
    kept = {key: value for key, value in everything.items() if key not in ignored}
    return json.loads(json.dumps(kept))


def _unfinished(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _rounds(names: Sequence[str], unfinished: Path) -> list[tuple[list[str], Path]]:
    """Which arms to train together, and where: those of each checkpoint there is, then the others."""
    rounds: list[tuple[list[str], Path]] = []
    left = list(names)
    for begun in sorted(unfinished.iterdir()) if unfinished.is_dir() else []:
        checkpoint = _checkpoint(begun)
        if checkpoint is None:
            shutil.rmtree(begun)
        elif members := [name for name in left if (checkpoint / name).is_dir()]:
            rounds.append((members, begun))
            left = [name for name in left if name not in members]
        else:  # all of them are finished
            shutil.rmtree(begun)
    if left:
        taken = [int(path.name) for path in unfinished.iterdir()] if unfinished.is_dir() else []
        rounds.append((left, unfinished / str(max(taken, default=0) + 1)))
    return rounds


def trained_tokens(folder: Path) -> dict[str, int]:
    """On how many tokens each arm was trained that goes on from a checkpoint an interrupted `train_arms` into `folder` left."""
    unfinished, found = _unfinished(folder), dict[str, int]()
    for begun in sorted(unfinished.iterdir()) if unfinished.is_dir() else []:
        checkpoint = _checkpoint(begun)
        if checkpoint is not None and checkpoint.name.isdigit():
            found |= {path.name: int(checkpoint.name) for path in checkpoint.iterdir() if path.is_dir()} | found
    return found


def _checkpoint(unfinished: Path) -> Path | None:
    try:
        return checkpoint_folder(unfinished / "checkpoints")
    except FileNotFoundError:
        return None


def _train_round(
    stream: StreamConfig,
    arms: Mapping[str, TrainingArm],
    learning_rates: Mapping[str, float],
    model: HookedSAETransformer | SAETransformerBridge,
    dataset: Any,
    folder: Path,
    unfinished: Path,
    cache: ActivationCache | None,
) -> Mapping[str, str]:
    """Train arms to their end; returns why, for those that diverged."""
    file = unfinished / DIVERGED_FILENAME
    failed: dict[str, str] = read_json(file) if file.is_file() else {}
    arms = {name: arm for name, arm in arms.items() if name not in failed}
    if not arms:
        return failed
    with temporary_seed(stream.seed), quiet_saelens():
        runner = MatchedRunner(
            runner_config(stream, arms, unfinished),
            learning_rates,
            {name: arm.decoder_rate for name, arm in arms.items()},
            override_dataset=dataset,
            override_model=model,
            override_saes={name: random_initialisation(arm.sae, stream.seed) for name, arm in arms.items()},
        )
        if cache is not None:
            read_from_cache(runner, cache)
        parameters = {name: sum(p.numel() for p in sae.parameters()) for name, sae in runner.saes.items()}
        exact_resume(runner, on_diverged=lambda name, error: write_json(file, failed | {name: str(error)}))
        with record_training(runner, unfinished / RECORD_FILENAME) as record:
            try:
                runner.run()
            except DivergedError:
                if len(diverged(runner)) < len(arms):
                    raise
    failed |= {name: str(error) for name, error in diverged(runner).items()}
    arms = {name: arm for name, arm in arms.items() if name not in failed}
    lines = read_training_record(unfinished / RECORD_FILENAME)
    for name, arm in arms.items():
        made = unfinished / "saes" / name
        # SAELens's file of settings is of all SAEs that it trained together
        cfg = json.loads((made.parent / RUNNER_CFG_FILENAME).read_text())
        own = {"lr": learning_rates[name], "lr_end": learning_rates[name] / 10, "saes": {name: cfg["saes"][name]}}
        own |= {"output_path": str(final_path(folder / name)), "checkpoint_path": None, "resume_from_checkpoint": None}
        (made / RUNNER_CFG_FILENAME).write_text(json.dumps(cfg | own))
        (made / RECORD_FILENAME).write_text("".join(record_line(line) for line in lines if line["sae"] == name))
        begin(made, {}, mark=False)
        Trained(
            arm=name,
            parameters=parameters[name],
            tokens_per_second=record.tokens_per_second(name),
            settings=_settings(stream, arm, learning_rates[name]),
        ).save(made / TRAINED_FILENAME)
        seal(made)
        folder.mkdir(parents=True, exist_ok=True)
        made.rename(folder / name)
    return failed


def runner_config(
    stream: StreamConfig, arms: Mapping[str, TrainingArm], unfinished: Path
) -> MultiSAETrainingRunnerConfig:
    """SAELens's configuration: warmed up over a twentieth of the steps, decayed over the last fifth; position 0 left out."""
    steps, checkpoint = stream.steps, _checkpoint(unfinished)
    return MultiSAETrainingRunnerConfig(
        saes={name: arm.sae for name, arm in arms.items()},
        hook_names=stream.hook_name,
        model_name=stream.model_name,
        model_class_name=stream.model_class_name,
        model_from_pretrained_kwargs=dict(stream.model_kwargs),
        dataset_path=stream.dataset,
        context_size=stream.context_size,
        seqpos_slice=(1, None),
        exclude_special_tokens=True,
        training_tokens=stream.training_tokens,
        store_batch_size_prompts=16,
        n_batches_in_buffer=max(64, 4 * stream.batch_size // stream.context_size),
        train_batch_size_tokens=stream.batch_size,
        lr=1.0,  # each arm has its own
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 5,
        n_batches_for_norm_estimate=min(10, steps),
        dead_feature_window=max(20, steps // 4),
        # so that the last count is of half the training
        feature_sampling_window=max(stream.fewest_steps_counted, steps // 2 + 1),
        device=stream.device,
        seed=stream.seed,
        logger=LoggingConfig(log_to_wandb=False),
        n_checkpoints=stream.n_checkpoints,
        checkpoint_path=str(unfinished / "checkpoints"),
        resume_from_checkpoint=None if checkpoint is None else str(checkpoint),
        output_path=str(unfinished / "saes"),
    )


STEPS_PER_SEED = 2**32
"""More than any run has: the seeds of the steps of two runs do not meet."""


class MatchedRunner(MultiSAETrainingRunner):
    """SAELens's runner for several SAEs, each at its own rates; the learning rate in `cfg` is nobody's.

    Args:
        learning_rates: peak of Adam's learning rate, by name.
        decoder_rates: factor on each of Adam's steps of W_dec, by name.
    """

    drops_diverged = True
    """What becomes of an SAE depends on none of the others."""

    def __init__(
        self,
        cfg: MultiSAETrainingRunnerConfig,
        learning_rates: Mapping[str, float],
        decoder_rates: Mapping[str, float],
        **overrides: Any,
    ) -> None:
        super().__init__(cfg, **overrides)
        self._learning_rates, self._decoder_rates = learning_rates, decoder_rates

    @override
    def _run_with_interruption_handling(self, trainer: MultiSAETrainer) -> dict[str, TrainingSAE[Any]]:
        for name, one in trainer.trainers.items():
            if one.n_training_samples == 0:  # else the checkpoint has set the rates
                _set_learning_rate(one, self._learning_rates[name])
            multiply_decoder_steps(one, self._decoder_rates[name])
            _draw_apart(one, self.cfg.seed)
        saes = super()._run_with_interruption_handling(trainer)
        if self.cfg.total_training_steps <= self.cfg.dead_feature_window:
            for sae in saes.values():  # SAELens's 0 would say nothing: none can count as dead so early
                sae.cfg.metadata.num_dead_features = None
        return saes


def _set_learning_rate(trainer: SAETrainer[Any, Any], learning_rate: float) -> None:
    """Take optimizer and schedule from a trainer made with that rate; it decays as a share of it."""
    cfg = replace(trainer.cfg, lr=learning_rate, lr_end=learning_rate / 10)
    made = SAETrainer(cfg, trainer.sae, iter(()))
    trainer.cfg, trainer.optimizer, trainer.lr_scheduler = made.cfg, made.optimizer, made.lr_scheduler


def multiply_decoder_steps(trainer: SAETrainer[Any, Any], factor: float) -> None:
    """Make each of Adam's steps of W_dec longer: what a learning rate multiplied by `factor` would do to it alone."""
    if factor == 1:
        return
    W_dec: Tensor = trainer.sae.W_dec
    before = torch.empty_like(W_dec)

    def keep(*_: Any) -> None:
        before.copy_(W_dec.detach())

    def lengthen(*_: Any) -> None:
        W_dec.data.add_(W_dec.detach() - before, alpha=factor - 1)

    trainer.optimizer.register_step_pre_hook(keep)
    trainer.optimizer.register_step_post_hook(lengthen)


def _draw_apart(trainer: SAETrainer[Any, Any], seed: int) -> None:
    """Let a step draw from a state made of seed and step, and leave the state of the stream as it was."""
    step: Callable[[Tensor], Any] = trainer.step

    def step_apart(batch: Tensor) -> Any:
        with temporary_seed(seed * STEPS_PER_SEED + trainer.n_training_steps):
            return step(batch)

    trainer.step = step_apart  # pyright: ignore[reportAttributeAccessIssue]
