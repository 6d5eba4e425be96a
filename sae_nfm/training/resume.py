"""Exact resume: a run that was interrupted and resumed ends with the same bits as one that was not.

A checkpoint of SAELens has weights, optimizer, schedules and the row of the data set. What it lacks goes into one more file,
`stream_state.safetensors`: the activation buffer, the sequence reached, the random state, the number of finished steps.
Such a checkpoint is written whole or not at all, and SIGTERM or SIGINT takes effect between two steps, never within one
(SAELens stops anywhere and then keeps the row alone). `resume_from_checkpoint` reads it; one without the file resumes as
SAELens does, with a warning.

On by itself for runners that train an architecture of this package; `exact_resume(runner)` switches it on for any other.
Exact on one machine with one number of threads, on the CPU in float32 bit for bit. With prefetching, batches are shuffled
by a generator of their own, as two threads would draw from the global one in any order; what SAELens's own evaluation
takes out of the training stream is then not repeated exactly (`record_training(held_out=...)` takes nothing out).
"""

import json
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sae_lens import LanguageModelSAETrainingRunner, MultiSAETrainingRunner
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.training._interruption import InterruptedException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_nfm.data import TextSketch
from sae_nfm.training.activation_stream import ActivationStream, StreamState

Runner = LanguageModelSAETrainingRunner | MultiSAETrainingRunner

STREAM_STATE_FILENAME = "stream_state.safetensors"
_TENSORS = ("waiting", "serving", "last_sequence")
_COUNTERS = ("epoch", "sequences", "rows", "cached_row")
_RUNS: "WeakKeyDictionary[Any, _ExactRun]" = WeakKeyDictionary()


def exact_resume(runner: Runner) -> None:
    """Make this runner's checkpoints exact, whatever it trains, and let it resume from such a checkpoint exactly.

    Call it after the runner is made and before `run`. Calling it again changes nothing.

    Raises:
        FileNotFoundError: when `resume_from_checkpoint` is no folder of a checkpoint.
        ValueError: when it is damaged, or of another model or data set.
    """
    if runner not in _RUNS:
        _RUNS[runner] = _ExactRun(runner)


def checkpoint_folder(path: str | Path) -> Path:
    """The checkpoint at `path`: itself, or the newest in it (named by token counts); a FileNotFoundError when there is none."""
    path = Path(path)
    if (path / "runner_cfg.json").is_file():
        return path
    found = [p.parent for p in path.glob("**/runner_cfg.json") if _tokens(p.parent) is not None]
    if not found:
        raise FileNotFoundError(
            f"{str(path)!r} is no checkpoint and holds none; give the folder that an interrupted run or n_checkpoints left, "
            "such as checkpoints/<id>/<tokens>"
        )
    return max(found, key=lambda folder: (_tokens(folder) or 0, folder.stat().st_mtime))


def _tokens(folder: Path) -> int | None:
    name = folder.name.removeprefix("final_")
    return int(name) if name.isdigit() else None


class _ExactRun:
    """What one runner needs beyond SAELens: the stream, the number of finished steps, a signal waiting for a step's end."""

    def __init__(self, runner: Runner) -> None:
        cfg = runner.cfg
        prefetch = int(cfg.prefetch_llm_batches)
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (1,)))) if prefetch else None
        # ahead of the trainer: the queue, one batch that waits for a place in it, one that is being made
        self.stream = ActivationStream(runner.activations_store, generator=own, keep=prefetch + 3)
        self.prefetching = bool(prefetch)
        self.steps_done = 0
        self.last_batch: Tensor | None = None
        self.within_step = False
        self.resumed: Path | None = None
        self.random_states: dict[str, Tensor] = {}
        store: Any = runner.activations_store
        if isinstance(runner, MultiSAETrainingRunner):
            store.get_multi_hook_data_loader = lambda: self.stream
        else:
            store._dataloader = self.stream
        if cfg.resume_from_checkpoint is not None:
            self._resume(runner, checkpoint_folder(cfg.resume_from_checkpoint))

    def _resume(self, runner: Runner, folder: Path) -> None:
        """Before SAELens begins: with prefetching, its thread starts to draw before it reads the checkpoint."""
        runner.cfg.resume_from_checkpoint = str(folder)
        several = isinstance(runner, MultiSAETrainingRunner)
        for name, sae in runner.saes.items() if several else [("", runner.sae)]:
            _keep_folded(sae.cfg, folder / name / SAE_CFG_FILENAME)
        file = folder / STREAM_STATE_FILENAME
        if not file.is_file():
            warnings.warn(
                f"{folder} has no {STREAM_STATE_FILENAME}: resumed as SAELens does, without the activation buffer and the "
                "random state, so not exactly the run that was interrupted",
                stacklevel=4,
            )
            return
        state, self.steps_done, self.random_states = _read(file)
        self.resumed = file
        self.stream.restore(state)
        if (text := TextSketch.load(folder)) is not None:  # of earlier epochs too
            self.stream.text.add_sketch(text)
        store: Any = runner.activations_store
        # the stream stands further than at the row that SAELens would load
        store.load_from_checkpoint = lambda _path: None  # pyright: ignore[reportUnknownLambdaType]

    def save(self, folder: Path) -> None:
        """Add the stream's state to a checkpoint, if it is made between two steps."""
        if self.within_step:
            return
        if self.last_batch is None:  # a finished run, resumed: no step was left to make
            if self.resumed is not None:
                shutil.copyfile(self.resumed, folder / STREAM_STATE_FILENAME)
            return
        state = self.stream.state_after(self.last_batch) if self.prefetching else self.stream.state()
        _write(folder / STREAM_STATE_FILENAME, state, self.steps_done)
        self.stream.text.sketch().save(folder)

    def fit(self, trainer: Any) -> Any:
        """SAELens's `trainer.fit`, interrupted between steps only, its checkpoints whole."""
        if self.random_states:
            self._continue(trainer)
        self._watch_steps(trainer)
        _save_whole(trainer)
        finish_step = trainer._update_pbar
        with _signals_wait(lambda: self.last_batch is not None) as waiting:

            def finish_step_then_stop(*args: Any, **kwargs: Any) -> None:
                finish_step(*args, **kwargs)
                if waiting:
                    if trainer.cfg.checkpoint_path is not None:
                        trainer.save_checkpoint(checkpoint_name=str(trainer.n_training_samples))
                    raise InterruptedException

            trainer._update_pbar = finish_step_then_stop
            try:
                return trainer.fit()
            except (KeyboardInterrupt, InterruptedException):
                if not waiting:
                    self._save_within_step(trainer)
                raise

    def _save_within_step(self, trainer: Any) -> None:
        """What SAELens would keep when something else than a signal interrupts a step; no exact place to resume from."""
        base, name = trainer.cfg.checkpoint_path, str(trainer.n_training_samples)
        if self.last_batch is not None and base is not None and not (Path(base) / name).exists():
            self.within_step = True
            trainer.save_checkpoint(checkpoint_name=name)

    def _continue(self, trainer: Any) -> None:
        for one in [trainer, *getattr(trainer, "trainers", {}).values()]:
            one.n_training_steps = self.steps_done
            # SAELens would write the checkpoints that lie behind again
            one.checkpoint_thresholds = [t for t in one.checkpoint_thresholds if t >= one.n_training_samples]
        torch.set_rng_state(self.random_states["rng_cpu"])
        cuda = [self.random_states[name] for name in sorted(self.random_states) if name.startswith("rng_cuda")]
        if cuda and torch.cuda.device_count() == len(cuda):
            torch.cuda.set_rng_state_all(cuda)

    def _watch_steps(self, trainer: Any) -> None:
        trainers: Mapping[str, Any] = getattr(trainer, "trainers", {"sae": trainer})
        first = next(iter(trainers.values()))
        step = first.step

        def watched_step(batch: Tensor) -> Any:
            output = step(batch)
            self.last_batch = batch
            self.steps_done = first.n_training_steps + 1  # SAELens counts the step after it has written its checkpoint
            return output

        first.step = watched_step


def _keep_folded(cfg: Any, saved: Path) -> None:
    """A finished run's checkpoint has its normalisation folded in: SAELens would estimate and fold it a second time."""
    folded = json.loads(saved.read_text()) if saved.is_file() else {}
    if folded.get("normalize_activations") == "none":
        for name in ("normalize_activations", "rescale_acts_by_decoder_norm"):
            if name in folded:
                setattr(cfg, name, folded[name])


def _save_whole(trainer: Any) -> None:
    """Let `trainer.save_checkpoint` write under a temporary name."""
    save = trainer.save_checkpoint

    def save_whole(checkpoint_name: str, base_path: Path | str | None = None, **kwargs: Any) -> None:
        base = base_path if base_path is not None else trainer.cfg.checkpoint_path
        where = {} if base_path is None else {"base_path": base_path}
        if base is None:
            save(checkpoint_name, **where, **kwargs)
            return
        unfinished, finished = Path(base) / f"{checkpoint_name}.partial", Path(base) / checkpoint_name
        shutil.rmtree(unfinished, ignore_errors=True)
        save(unfinished.name, **where, **kwargs)
        shutil.rmtree(finished, ignore_errors=True)
        os.replace(unfinished, finished)

    trainer.save_checkpoint = save_whole


@contextmanager
def _signals_wait(while_: Callable[[], bool]) -> Generator[list[int]]:
    """Collect SIGINT and SIGTERM while `while_()` is true; before that, and the second one, raise InterruptedException."""
    waiting: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        if waiting or not while_():
            raise InterruptedException
        waiting.append(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield waiting
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield waiting
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(path: Path, state: StreamState, steps_done: int) -> None:
    tensors = {name: getattr(state, name) for name in _TENSORS} | {"rng_cpu": torch.get_rng_state()}
    if state.generator is not None:
        tensors["generator"] = state.generator
    if torch.cuda.is_available():
        tensors |= {f"rng_cuda_{i:03d}": rng for i, rng in enumerate(torch.cuda.get_rng_state_all())}
    counters = {name: getattr(state, name) for name in _COUNTERS} | {"steps_done": steps_done}
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}  # views of one buffer otherwise
    save_file(copies, path, metadata={"counters": json.dumps(counters)})


def _read(path: Path) -> tuple[StreamState, int, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            counters = json.loads(file.metadata()["counters"])
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); resume from another checkpoint") from error
    state = StreamState(
        generator=tensors.get("generator"),
        **{name: tensors[name] for name in _TENSORS},
        **{name: counters[name] for name in _COUNTERS},
    )
    return state, counters["steps_done"], {n: t for n, t in tensors.items() if n.startswith("rng_")}


def layer_runners(layer: Callable[[type, str, Callable[[Any], Any]], None], architectures: frozenset[str]) -> None:
    """Give SAELens's runners exact checkpoints where they train one of `architectures`; `layer(class, method, make)` installs."""

    def run(original: Any) -> Any:
        def exact_run(self: Any, *args: Any, **kwargs: Any) -> Any:
            saes = self.saes.values() if isinstance(self, MultiSAETrainingRunner) else [self.sae]
            if any(sae.cfg.architecture() in architectures for sae in saes):
                exact_resume(self)
            return original(self, *args, **kwargs)

        return exact_run

    def fit(original: Any) -> Any:
        def fit_between_signals(self: Any, trainer: Any) -> Any:
            return _RUNS[self].fit(trainer) if self in _RUNS else original(self, trainer)

        return fit_between_signals

    def save(original: Any) -> Any:
        def save_with_stream(self: Any, checkpoint_path: Path | None) -> None:
            original(self, checkpoint_path)
            if self in _RUNS and checkpoint_path is not None:
                _RUNS[self].save(Path(checkpoint_path))

        return save_with_stream

    def finish(original: Any) -> Any:
        def save_with_text(self: Any, saved: Any, output_path: Any, *args: Any, **kwargs: Any) -> None:
            original(self, saved, output_path, *args, **kwargs)
            if self not in _RUNS:
                return
            text, several = _RUNS[self].stream.text.sketch().shortened(), isinstance(self, MultiSAETrainingRunner)
            for folder in [Path(self.cfg.output_path) / name for name in saved] if several else [Path(output_path)]:
                text.save(folder)

        return save_with_text

    for runner, fit_name, save_name, finish_name in (
        (LanguageModelSAETrainingRunner, "run_trainer_with_interruption_handling", "save_checkpoint", "save_final_sae"),
        (
            MultiSAETrainingRunner,
            "_run_with_interruption_handling",
            "_save_runner_checkpoint_files",
            "_save_final_outputs",
        ),
    ):
        layer(runner, "run", run)
        layer(runner, fit_name, fit)
        layer(runner, save_name, save)
        layer(runner, finish_name, finish)
