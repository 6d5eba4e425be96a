"""Training through SAELens's runners: a record of losses and metrics, and of held-out fidelity, that needs no wandb."""

import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import wandb
from sae_lens import SAE, ActivationsStore, LanguageModelSAETrainingRunner, MultiSAETrainingRunner, SAETrainer
from sae_lens.evals import EvalConfig, ExplainedVarianceCalculator, run_evals
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor

from sae_nfm import models  # what it imports itself is loaded with the first evaluation
from sae_nfm.architectures import TrainedPaths, read_and_written
from sae_nfm.common import check_positive
from sae_nfm.loading import quiet_saelens
from sae_nfm.training.activation_stream import ask_again
from sae_nfm.training.results import DEAD_WINDOW, read_training_record, record_line

Runner = LanguageModelSAETrainingRunner | MultiSAETrainingRunner
CHECKPOINT_RECORD = "record.jsonl"
"""A training record up to a checkpoint, in its folder."""
NAMES = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")
METRICS: dict[str, Any] = {f"compute_{name}": True for name in NAMES}


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Text that is not trained on, and how often the SAE is evaluated on it while it trains."""

    dataset: Any
    """Text or tokens (column `text` or `tokens`), as for training."""
    every: int = 100
    """Evaluate at each n-th step, and at the last."""
    n_batches: int = 4
    """Batches of `store_batch_size_prompts` rows; the same rows each time."""

    def __post_init__(self) -> None:
        check_positive(self, "every", "n_batches")


@dataclass(kw_only=True)
class TrainingRecord:
    """What a training run did so far, by SAE name ("sae" where the runner trains one)."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Time spent in training steps (forward, backward, optimizer), without the language model and without recording."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens trained on."""

    def tokens_per_second(self, name: str = "sae") -> float:
        """Training tokens per second of SAE time."""
        return self.tokens[name] / self.seconds[name]


@contextmanager
def record_training(
    runner: Runner, path: str | Path, *, every: int = 10, held_out: HeldOut | None = None
) -> Generator[TrainingRecord]:
    """Write losses and metrics of every SAE the runner trains, one JSON object a line.

    A line has `sae`, `step`, `tokens`, `seconds` and all that SAELens would send to wandb under the same keys
    (`losses/...`, `metrics/...`, `details/...`), with the paths of joint_nfm among the metrics. Losses are of the activations as
    the trainer normalises them; `metrics/mse` is the squared error in the language model's own units, summed over dimensions,
    which is what `sae-nfm evaluate` calls mse. `details/dead_feature_window` says how many steps a feature has to be silent to be
    counted in `sparsity/dead_features`: as long as fewer are over, none is. With `held_out`, the lines of
    its steps have SAELens's evaluation (`run_evals`) on that text too, as `held_out/<group>/<metric>`, such as
    `held_out/model_behavior_preservation/kl_div_with_sae`; wandb gets the same where it is on. Evaluating changes nothing in
    the training: weights are the same bits with and without. The last step is always recorded. SAELens's progress bar moves as
    often as a line is written.

    Lines go to `<path>.partial`, renamed when the block ends; after an exception the partial file stays. Each checkpoint has the
    lines up to it (`record.jsonl`), behind which a run resumed from it (`resume_from_checkpoint`) goes on.

        runner = SAETrainingRunner(cfg)
        with record_training(runner, "runs/mine/training.jsonl"):
            sae = runner.run()

    Args:
        runner: SAELens's runner, before `run`.
        every: record each n-th step; a ValueError unless > 0.
    """
    if every < 1:
        raise ValueError(f"every must be > 0 steps, got {every}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    # Each runner hands its trainer to one method of its own before the first step: that is where we listen.
    several = isinstance(runner, MultiSAETrainingRunner)
    method = "_run_with_interruption_handling" if several else "run_trainer_with_interruption_handling"
    run_trainer = getattr(runner, method)
    # of an interrupted run: its last lines, or all of them where it was stopped before its folder was renamed
    left = (
        next((file for file in (unfinished, path) if file.is_file()), None)
        if runner.cfg.resume_from_checkpoint
        else None
    )
    with unfinished.open("r+" if left == unfinished else "w") as file:
        recorder = _Recorder(runner, file, every, held_out)

        def listen(trainer: Any) -> Any:
            # the checkpoint has the lines of its own run, one of 0.1.0 has not; another run may have left that file
            own = Path(str(runner.cfg.resume_from_checkpoint)) / CHECKPOINT_RECORD
            source = own if own.is_file() else left
            earlier = [] if source is None else read_training_record(source, unfinished=True)
            recorder.attach(trainer, earlier)
            return run_trainer(trainer)

        setattr(runner, method, listen)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield recorder.record
        finally:
            delattr(runner, method)
            for number, handler in handlers.items():  # the runner leaves its own behind
                signal.signal(number, handler)
    unfinished.replace(path)


class _Recorder:
    def __init__(self, runner: Runner, file: IO[str], every: int, held_out: HeldOut | None) -> None:
        self.record = TrainingRecord()
        self._runner, self._file, self._every, self._held_out = runner, file, every, held_out

    def attach(self, trainer: Any, earlier: list[dict[str, Any]]) -> None:
        """Listen to the steps of SAELens's trainer, or of the several that a `MultiSAETrainer` has; `earlier`: lines before."""
        lines = [line for line in earlier if line["tokens"] <= trainer.n_training_samples]
        self._file.seek(0)
        self._file.truncate()
        self._file.writelines(map(record_line, lines))
        self._file.flush()
        self._save_with_checkpoints(trainer)
        trainers: dict[str, SAETrainer[Any, Any]] = getattr(trainer, "trainers", {"sae": trainer})
        for name, one in trainers.items():
            last = next((line for line in reversed(lines) if line["sae"] == name), None)
            self.record.seconds[name] = last["seconds"] if last else 0.0
            self.record.tokens[name] = last["tokens"] if last else 0
            self._listen(name, one, trainer.data_provider)
        trainer._update_pbar = partial(trainer._update_pbar, update_interval=self._every)

    def _save_with_checkpoints(self, trainer: Any) -> None:
        """Add the lines so far to each checkpoint that the trainer writes."""
        save = trainer.save_checkpoint

        def save_with_record(checkpoint_name: str, base_path: Path | str | None = None, **kwargs: Any) -> None:
            save(checkpoint_name, **({} if base_path is None else {"base_path": base_path}), **kwargs)
            base = base_path if base_path is not None else trainer.cfg.checkpoint_path
            if base is not None:
                shutil.copyfile(self._file.name, Path(base) / checkpoint_name / CHECKPOINT_RECORD)

        trainer.save_checkpoint = save_with_record

    def _listen(self, name: str, trainer: SAETrainer[Any, Any], data_provider: Any) -> None:
        step = trainer.step

        def recorded_step(batch: Tensor) -> TrainStepOutput:
            last = trainer.n_training_samples + len(batch) >= trainer.cfg.total_training_samples
            evaluated = self._held_out is not None and (trainer.n_training_steps % self._held_out.every == 0 or last)
            recorded = evaluated or last or trainer.n_training_steps % self._every == 0
            if isinstance(trainer.sae, TrainedPaths):
                trainer.sae.keep_paths = recorded
            started = _now(trainer.sae.device)
            output = step(batch)
            self.record.seconds[name] += _now(trainer.sae.device) - started
            self.record.tokens[name] += batch.shape[0]
            if recorded:
                held_out = self._evaluate(name, trainer, data_provider) if evaluated else {}
                steps, tokens = trainer.n_training_steps, trainer.n_training_samples
                line = {"sae": name, "step": steps, "tokens": tokens, "seconds": self.record.seconds[name]}
                line |= (
                    trainer.build_train_step_log_dict(output, tokens) | _in_own_units(trainer, output, batch) | held_out
                )
                self._file.write(record_line(line))
                self._file.flush()
            return output

        trainer.step = recorded_step  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def _evaluate(self, name: str, trainer: SAETrainer[Any, Any], data_provider: Any) -> dict[str, float]:
        """SAELens's evaluation on the held-out text, flat, under `held_out/`."""
        assert self._held_out is not None
        trainer.sae.eval()
        # a thread that prefetches runs the same model: it waits
        waits = data_provider.paused() if isinstance(data_provider, PrefetchingIterator) else nullcontext()
        with waits, quiet_saelens():
            store = _held_out_store(self._runner, self._held_out.dataset, trainer.sae)
            special = store.exclude_special_tokens
            own = models.is_transcoder(trainer.sae)
            grouped, _ = (
                _evaluate_transcoder(trainer.sae, store, self._held_out.n_batches)
                if own
                else run_evals(
                    sae=trainer.sae,
                    activation_store=store,
                    model=self._runner.model,
                    activation_scaler=trainer.activation_scaler,
                    eval_config=EvalConfig(
                        batch_size_prompts=self._runner.cfg.eval_batch_size_prompts,
                        n_eval_reconstruction_batches=self._held_out.n_batches,
                        n_eval_sparsity_variance_batches=self._held_out.n_batches,
                        **METRICS,
                    ),
                    exclude_special_tokens=False if special is None else special.tolist(),
                    model_kwargs=self._runner.cfg.model_kwargs,
                )
            )
        trainer.sae.train()
        named = [(f"{group}/{key}", v) for group, values in grouped.items() for key, v in values.items()]
        metrics = {f"held_out/{name}": float(value) for name, value in named}
        if self._runner.cfg.logger.log_to_wandb:
            prefix = f"{name}/" if isinstance(self._runner, MultiSAETrainingRunner) else ""
            wandb.log({prefix + key: value for key, value in metrics.items()}, step=trainer.n_training_steps)
        return metrics


@torch.no_grad()
def _in_own_units(trainer: SAETrainer[Any, Any], output: TrainStepOutput, batch: Tensor) -> dict[str, float]:
    """What SAELens's log lacks: the squared error of the language model's activations, and when a feature counts as dead."""
    wanted = read_and_written(trainer.sae, batch)[1].to(output.sae_out.device)
    error = trainer.activation_scaler.unscale(output.sae_out).float() - wanted.float()
    window = trainer.cfg.dead_feature_window
    return {"metrics/mse": float(error.square().sum(dim=-1).mean()), DEAD_WINDOW: window}


def _evaluate_transcoder(
    sae: SAE[Any], store: ActivationsStore, n_batches: int
) -> tuple[dict[str, dict[str, float]], None]:
    """A transcoder in place of what it writes, by SAELens's names; SAELens itself would put it in place of what it reads.

    Counted are tokens that are neither special nor in position 0, as by `evaluation.evaluate`.
    """
    model: Any = store.model
    sums, variance = defaultdict[str, float](float), ExplainedVarianceCalculator()
    for _ in range(n_batches):
        batch, seen = store.get_batch_tokens(), dict[str, Any]()
        counted = models.counted_tokens(model, batch)
        clean = models.run_rows(model, batch)
        names = {"hook_sae_output": models.keeping(seen, "made"), "hook_sae_acts_post": models.keeping(seen, "acts")}
        with models.splice(model, sae) as found, found.replaced(models.keeping(seen, "y")), found.hooks(names):
            changed = models.run_rows(model, batch)
        variance.add_batch(seen["made"][counted].float(), seen["y"][counted].float())
        sums["active"] += float((seen["acts"].to_dense()[counted] != 0).sum())
        sums["tokens"] += int(counted.sum())
        last = counted[:, :-1]
        sums["next"] += int(last.sum())
        p, q = (logits.float().log_softmax(-1) for logits in (clean, changed))
        sums["kl"] += float((p.exp() * (p - q)).sum(-1)[counted].double().sum())
        for name, one in (("ce", p), ("ce_sae", q)):
            nll = -one[:, :-1].gather(-1, batch[:, 1:, None])[..., 0]
            sums[name] += float(nll[last].double().sum())
    return {
        "model_behavior_preservation": {"kl_div_with_sae": sums["kl"] / sums["tokens"]},
        "model_performance_preservation": {
            "ce_loss_with_sae": sums["ce_sae"] / sums["next"],
            "ce_loss_without_sae": sums["ce"] / sums["next"],
        },
        "reconstruction_quality": {"explained_variance": float(variance.compute())},
        "sparsity": {"l0": sums["active"] / sums["tokens"]},
    }, None


def _held_out_store(runner: Runner, dataset: Any, sae: SAE[Any]) -> ActivationsStore:
    """A store that cuts the held-out text as the runner's cuts what it trains on, at its beginning."""
    cfg, hook_name = runner.cfg, sae.cfg.metadata.hook_name
    same = (
        "context_size",
        "store_batch_size_prompts",
        "prepend_bos",
        "dtype",
        "model_kwargs",
        "autocast_lm",
        "seqpos_slice",
    )
    same += ("disable_concat_sequences", "sequence_separator_token", "use_chat_formatting")
    store = ActivationsStore.from_config_multi_hook(
        model=runner.model,
        dataset=dataset,
        hook_names=[hook_name],
        hook_d_ins={hook_name: sae.cfg.d_in},
        hook_head_indices={hook_name: sae.cfg.metadata.hook_head_index},
        total_training_tokens=1,
        device=runner.activations_store.device,
        exclude_special_tokens=runner.activations_store.exclude_special_tokens,
        **{name: getattr(cfg, name) for name in same},
    )
    ask_again(store)
    return store


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
