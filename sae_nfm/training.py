"""Training through SAELens's runners, and a record of losses and metrics that needs no wandb."""

import json
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from sae_lens import LanguageModelSAETrainingRunner, MultiSAETrainingRunner, SAETrainer
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

Runner = LanguageModelSAETrainingRunner | MultiSAETrainingRunner


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
def record_training(runner: Runner, path: str | Path, *, every: int = 10) -> Generator[TrainingRecord]:
    """Keep losses and metrics of every SAE the runner trains, one JSON object a line.

    A line has `sae`, `step`, `tokens`, `seconds` and all that SAELens would send to wandb under the same keys
    (`losses/...`, `metrics/...`, `details/...`), with the paths of joint_nfm among the metrics. The last step is always
    recorded. SAELens's progress bar moves as often as a line is written.
    Lines go to `<path>.partial`, renamed when the block ends; after an exception the partial file stays.

        runner = SAETrainingRunner(cfg)
        with record_training(runner, "runs/mine/training.jsonl"):
            sae = runner.run()

    Args:
        runner: SAELens's runner, before `run`.
        path: the file to write.
        every: record each n-th step.

    Raises:
        ValueError: when `every` is not positive.
    """
    if every < 1:
        raise ValueError(f"every is {every}; give a positive number of steps")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    record = TrainingRecord()
    # Each runner hands its trainer to one method of its own before the first step: that is where we listen.
    method = (
        "_run_with_interruption_handling"
        if isinstance(runner, MultiSAETrainingRunner)
        else "run_trainer_with_interruption_handling"
    )
    run_trainer = getattr(runner, method)
    with unfinished.open("w") as file:

        def listen(trainer: Any) -> Any:
            trainers: dict[str, SAETrainer[Any, Any]] = getattr(trainer, "trainers", {"sae": trainer})
            for name, one in trainers.items():
                _record_steps(name, one, record, file, every)
            trainer._update_pbar = partial(trainer._update_pbar, update_interval=every)
            return run_trainer(trainer)

        setattr(runner, method, listen)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield record
        finally:
            delattr(runner, method)
            for number, handler in handlers.items():  # the runner leaves its own behind
                signal.signal(number, handler)
    unfinished.replace(path)


def _record_steps(name: str, trainer: SAETrainer[Any, Any], record: TrainingRecord, file: IO[str], every: int) -> None:
    step = trainer.step
    record.seconds[name], record.tokens[name] = 0.0, 0

    def recorded_step(batch: Tensor) -> TrainStepOutput:
        started = _now(trainer.sae.device)
        output = step(batch)
        record.seconds[name] += _now(trainer.sae.device) - started
        record.tokens[name] += batch.shape[0]
        last = trainer.n_training_samples >= trainer.cfg.total_training_samples
        if trainer.n_training_steps % every == 0 or last:
            line = {
                "sae": name,
                "step": trainer.n_training_steps,
                "tokens": trainer.n_training_samples,
                "seconds": record.seconds[name],
                **trainer.build_train_step_log_dict(output, trainer.n_training_samples),
            }
            file.write(json.dumps(line) + "\n")
            file.flush()
        return output

    trainer.step = recorded_step  # pyright: ignore[reportAttributeAccessIssue]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def read_training_record(path: str | Path) -> list[dict[str, Any]]:
    """The lines written by `record_training`."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
