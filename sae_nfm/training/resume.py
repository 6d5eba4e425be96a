"""Exact resume: a run that was interrupted and resumed ends with the same bits as one that was not.

A checkpoint of SAELens has weights, optimizer, schedules and the row of the data set. What it lacks goes into one more file,
`stream_state.safetensors`: the activation buffer, the sequence reached, the random state, the number of finished steps.
Such a checkpoint is written whole or not at all, and SIGTERM or SIGINT takes effect between two steps, never within one
(SAELens stops anywhere and then keeps the row alone). `resume_from_checkpoint` reads it; one without the file resumes as
SAELens does, with a warning.

On by itself for runners that train an architecture of this package; `exact_resume(runner)` switches it on for any other.
A checkpoint is resumed by the run that it was made by: its settings, the data and the language model are compared first
(`settings`, `activation_stream`), and what is not the same is an error that names both values.

A step whose loss or gradient is not finite ends the run (`DivergedError`) before the weights are changed, and no checkpoint
has weights that are not finite. In a run of several SAEs that do not depend on each other (`drops_diverged`), the others go on.
A data set that breaks off (`DataLostError`) leaves a checkpoint.

Exact on one machine with one number of threads, on the CPU in float32 bit for bit. With prefetching, batches are shuffled
by a generator of their own, as two threads would draw from the global one in any order; what SAELens's own evaluation
takes out of the training stream is then not repeated exactly (`record_training(held_out=...)` takes nothing out).
"""

import json
import os
import shlex
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from math import isfinite
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sae_lens import LanguageModelSAETrainingRunner, MultiSAETrainingRunner, SAETrainer, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from sae_lens.training._interruption import InterruptedException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_nfm import data, models
from sae_nfm.architectures import read_and_written
from sae_nfm.common import DamagedFileError, check_digests, locked, seal
from sae_nfm.training.activation_stream import ActivationStream, DataLostError, NotFiniteError, StreamState
from sae_nfm.training.settings import ALLOWED, RunnerConfig, check_settings, first_difference, read_settings

Runner = LanguageModelSAETrainingRunner | MultiSAETrainingRunner

STREAM_STATE_FILENAME = "stream_state.safetensors"
OVERFLOWING = 1e18
"""A loss whose gradient can have a norm beyond float32."""
SAMPLED = 16
"""Values of each weight of the language model that a checkpoint holds."""
_TENSORS = ("waiting", "serving", "last_sequence")
_COUNTERS = ("epoch", "sequences", "rows", "cached_row")
_ADDED = ("sequences_digest", "data_digest", "epoch_rows")
"""Counters that a checkpoint of 0.1.0 lacks."""
_RUNS: "WeakKeyDictionary[Any, _ExactRun]" = WeakKeyDictionary()


def exact_resume(runner: Runner, *, on_diverged: Callable[[str, "DivergedError"], None] | None = None) -> None:
    """Make this runner's checkpoints exact, whatever it trains, and let it resume from such a checkpoint exactly.

    Call it after the runner is made and before `run`. Calling it again changes nothing.

    Args:
        on_diverged: called with the name of an SAE that diverges, where the runner goes on with the others.

    Raises:
        FileNotFoundError: when `resume_from_checkpoint` is no folder of a checkpoint.
        ValueError: when it is damaged, or of a run with other settings, another model or data set; for settings that cannot work.
    """
    if runner not in _RUNS:
        _RUNS[runner] = _ExactRun(runner, on_diverged)


class DivergedError(FloatingPointError):
    """A training that cannot go on: a loss, a gradient or a weight is not finite."""

    exit_status = 1
    saes: Mapping[str, str] = MappingProxyType({})
    """Why, for each SAE that diverged, where others went on and are finished."""


def checkpoint_folder(path: str | Path) -> Path:
    """The newest checkpoint in the folder of one run (named by token counts), or that folder itself.

    A FileNotFoundError when there is none.
    """
    return max(_checkpoints(Path(path)), key=_age)


def checkpoint_of(
    path: str | Path, cfg: RunnerConfig, saes: Mapping[str, TrainingSAE[Any]], *, some: bool = False
) -> Path:
    """The checkpoint at `path` that a run with these settings goes on from: itself, or the newest in it of such a run.

    Args:
        path: a checkpoint, or a folder with those of any number of runs.
        cfg, saes: of the run; one SAE has the name "".
        some: whether the run may lack SAEs of the checkpoint.

    Raises:
        FileNotFoundError: when there is no checkpoint.
        ValueError: when the checkpoint has other settings, or those in the folder, or several runs in it have these.
    """
    path, found = Path(path), _checkpoints(Path(path))
    if found == [path] and (other := first_difference(path, cfg, saes, some=some)) is not None:
        raise ValueError(
            f"{other.name} is {other.given!r}, and {other.saved!r} in the checkpoint {path}; {ALLOWED}. Give it as it "
            "was, or begin anew without resume_from_checkpoint"
        )
    differences = {one: _difference_or_damage(one, cfg, saes, some) for one in found}
    fits = [one for one in found if differences[one] is None]
    runs = {one.parent: max((other for other in found if other.parent == one.parent), key=_age) for one in found}
    if not fits:
        told = (f"{_told(newest)} has {differences[newest]}" for newest in runs.values())
        raise ValueError(
            f"none of the {len(found)} checkpoints in {str(path)!r} is of a run with these settings: {_listed(told)}; give the "
            "settings of the run that is to go on, or begin anew without resume_from_checkpoint"
        )
    several = _unrelated(fits)
    if len(several) > 1:
        told = (_told(max((one for one in fits if one.parent == run), key=_age)) for run in several)
        raise ValueError(
            f"{str(path)!r} has checkpoints of {len(several)} runs with these settings: {_listed(told)}; name one of them"
        )
    return max(fits, key=_age)


def _difference_or_damage(
    checkpoint: Path, cfg: RunnerConfig, saes: Mapping[str, TrainingSAE[Any]], some: bool
) -> object | None:
    """`first_difference`, or what is wrong with a checkpoint among others, which is no obstacle to resuming those."""
    try:
        return first_difference(checkpoint, cfg, saes, some=some)
    except ValueError as error:
        return f"a file that cannot be read: {error}"


def _unrelated(checkpoints: Iterable[Path]) -> list[Path]:
    """The folders of runs, without those that another of them went on from."""
    runs = list(dict.fromkeys(one.parent for one in checkpoints))
    begun = [read_settings(one / RUNNER_CFG_FILENAME).get("resume_from_checkpoint") for one in checkpoints]
    earlier = {Path(one).resolve().parent for one in begun if one}
    last = [run for run in runs if run.resolve() not in earlier]
    return last or runs


def _listed(told: Iterable[str]) -> str:
    first, *others = told
    more = f"; and {len(others) - 5} more" if len(others) > 5 else ""
    return "; ".join([first, *others[:5]]) + more


def _told(checkpoint: Path) -> str:
    made = datetime.fromtimestamp(checkpoint.stat().st_mtime).isoformat(" ", "seconds")
    return f"{checkpoint} ({_tokens(checkpoint) or 0:,} tokens, {made})"


def _checkpoints(path: Path) -> list[Path]:
    """Those in a folder, named by token counts; or the folder itself, whatever its name."""
    if path.name.endswith(".partial") and not any(path.glob(f"*/**/{RUNNER_CFG_FILENAME}")):
        raise ValueError(f"the checkpoint {path} was not written to its end; resume from another one")
    if (path / RUNNER_CFG_FILENAME).is_file():
        return [path]
    found = [p.parent for p in sorted(path.glob(f"**/{RUNNER_CFG_FILENAME}")) if _tokens(p.parent) is not None]
    if not found:
        raise FileNotFoundError(
            f"{str(path)!r} is no checkpoint and holds none; give the folder that an interrupted run or n_checkpoints left, "
            "such as checkpoints/<id>/<tokens>"
        )
    return found


def _age(folder: Path) -> tuple[int, float]:
    return _tokens(folder) or 0, folder.stat().st_mtime


def last_checkpoint(runner: Runner) -> Path | None:
    """The last checkpoint that an exactly resumable run has left or begun from; None without one."""
    run = _RUNS.get(runner)
    return None if run is None else run.saved


def diverged(runner: Runner) -> Mapping[str, DivergedError]:
    """The SAEs of a run that have diverged, by name, where the others went on."""
    run = _RUNS.get(runner)
    return {} if run is None else run.diverged


def _tokens(folder: Path) -> int | None:
    name = folder.name.removeprefix("final_")
    return int(name) if name.isdigit() else None


class _ExactRun:
    """What one runner needs beyond SAELens: the stream, the number of finished steps, a signal waiting for a step's end."""

    def __init__(self, runner: Runner, on_diverged: Callable[[str, DivergedError], None] | None = None) -> None:
        models.pair_hooks(runner)
        cfg = runner.cfg
        self.on_diverged = on_diverged
        self.saes: Mapping[str, TrainingSAE[Any]] = (
            runner.saes if isinstance(runner, MultiSAETrainingRunner) else {"": runner.sae}
        )
        check_settings(cfg, self.saes)
        self.drops_diverged: bool = getattr(runner, "drops_diverged", False)
        self.diverged: dict[str, DivergedError] = {}
        self.saved: Path | None = None
        prefetch = int(cfg.prefetch_llm_batches)
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (1,)))) if prefetch else None
        # ahead of the trainer: the queue, one batch that waits for a place in it, one that is being made
        self.stream = ActivationStream(runner.activations_store, generator=own, keep=prefetch + 3)
        self.prefetching, self.broken_off = bool(prefetch), False
        self.model_sample = _model_sample(runner.model)
        self.steps_done = 0
        self.last_batch: Tensor | None = None
        self.last_batches: dict[str, Tensor] = {}
        self.within_step = self.in_step = False
        self.resumed: Path | None = None
        self.random_states: dict[str, Tensor] = {}
        store: Any = runner.activations_store
        if isinstance(runner, MultiSAETrainingRunner):
            store.get_multi_hook_data_loader = lambda: self.stream
        else:
            store._dataloader = self.stream
        resumed = None
        if cfg.resume_from_checkpoint is not None:
            resumed = checkpoint_of(cfg.resume_from_checkpoint, cfg, self.saes, some=self.drops_diverged)
        self._refuse_foreign_checkpoints(cfg)
        if resumed is not None:
            self._resume(runner, resumed)

    def _resume(self, runner: Runner, folder: Path) -> None:
        """Before SAELens begins: with prefetching, its thread starts to draw before it reads the checkpoint."""
        runner.cfg.resume_from_checkpoint, self.saved = str(folder), folder
        try:
            for inside in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
                check_digests(inside)
        except DamagedFileError as error:
            raise ValueError(f"{error}; or resume from another checkpoint") from error
        for name, sae in self.saes.items():
            _keep_folded(sae.cfg, folder / name / SAE_CFG_FILENAME)
        file = folder / STREAM_STATE_FILENAME
        if not file.is_file():
            warnings.warn(
                f"{folder} has no {STREAM_STATE_FILENAME}: resumed as SAELens does, without the activation buffer and the "
                "random state, so not exactly the run that was interrupted",
                stacklevel=4,
            )
            return
        state, self.steps_done, others = _read(file)
        self.random_states = {name: tensor for name, tensor in others.items() if name.startswith("rng_")}
        sample = others.get("model_sample")
        if sample is not None and not _same_sample(sample, self.model_sample):
            raise ValueError(
                f"the weights of the language model {runner.cfg.model_name!r} are not those that the checkpoint {folder} was "
                "made with; resume with that model"
            )
        self.resumed = file
        self.stream.restore(state)
        if (text := data.TextSketch.load(folder)) is not None:  # of earlier epochs too
            self.stream.text.add_sketch(text)
        store: Any = runner.activations_store
        # the stream stands further than at the row that SAELens would load
        store.load_from_checkpoint = lambda _path: None  # pyright: ignore[reportUnknownLambdaType]

    def _refuse_foreign_checkpoints(self, cfg: RunnerConfig) -> None:
        """Checkpoints of another run, where this one's would go among them: a folder of checkpoints is of one run."""
        if cfg.checkpoint_path is None or not Path(cfg.checkpoint_path).is_dir():
            return
        with suppress(FileNotFoundError):
            for one in _checkpoints(Path(cfg.checkpoint_path)):
                other = first_difference(one, cfg, self.saes, some=self.drops_diverged)
                if other is not None:
                    raise ValueError(
                        f"{one.parent} has the checkpoints of another run ({other}), and this one's would go among them; give "
                        "another checkpoint_path or wandb_id, or move them"
                    )

    def save(self, folder: Path) -> None:
        """Add the stream's state to a checkpoint, if it is made between two steps."""
        if self.within_step:
            return
        if self.last_batch is None:  # a finished run, resumed: no step was left to make
            if self.resumed is not None:
                shutil.copyfile(self.resumed, folder / STREAM_STATE_FILENAME)
            return
        # a thread that prefetches is ahead of the last step, and so is a stream that broke off
        behind = self.prefetching or self.broken_off
        state = self.stream.state_after(self.last_batch) if behind else self.stream.state()
        _write(folder / STREAM_STATE_FILENAME, state, self.steps_done, self.model_sample)
        self.stream.text.sketch().save(folder)

    def fit(self, trainer: Any) -> Any:
        """SAELens's `trainer.fit`, interrupted between steps only, its checkpoints whole, its weights finite."""
        if self.random_states:
            self._continue(trainer)
        trainers: Mapping[str, SAETrainer[Any, Any]] = getattr(trainer, "trainers", {"": trainer})
        for name, one in trainers.items():
            self._watch_steps(name, one)
        self._save_whole(trainer, trainers)
        finish_step = trainer._update_pbar
        with _signals_wait(lambda: self.last_batch is not None) as waiting:

            def finish_step_then_stop(*args: Any, **kwargs: Any) -> None:
                finish_step(*args, **kwargs)
                if waiting:
                    self._save_now(trainer)
                    raise InterruptedException

            trainer._update_pbar = finish_step_then_stop
            try:
                fitted = trainer.fit()
                self._check_end(trainers)
            except (KeyboardInterrupt, InterruptedException):
                if not waiting:
                    self._save_within_step(trainer)
                raise
            except DataLostError as lost:
                self.broken_off = True
                if self.last_batch is not None and not self.in_step:
                    self._save_now(trainer)
                raise DataLostError(f"{lost}; {self._told_saved()}") from lost
            except NotFiniteError as found:
                raise NotFiniteError(f"{found}; {self._told_saved()}") from None
        return fitted

    def _save_now(self, trainer: Any) -> None:
        if trainer.cfg.checkpoint_path is not None:
            trainer.save_checkpoint(checkpoint_name=str(trainer.n_training_samples))

    def _told_saved(self) -> str:
        return "no checkpoint was saved" if self.saved is None else f"the last checkpoint is {self.saved}"

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

    def _watch_steps(self, name: str, trainer: SAETrainer[Any, Any]) -> None:
        """Note each finished step; let none pass whose loss or gradient is not finite."""
        step: Callable[[Tensor], Any] = trainer.step
        refuse_not_finite_steps(trainer, lambda what: self._diverges(name, trainer, what))

        def watched_step(batch: Tensor) -> Any:
            self.in_step = True
            if name in self.diverged:  # it stands still, and the count goes on, which the trainer of several reads
                trainer.n_training_samples += len(batch)
                output: Any = SimpleNamespace(loss=torch.tensor(torch.nan))
            else:
                try:
                    output = step(batch)
                except DivergedError as error:
                    self._drop(name, error)
                    output = SimpleNamespace(loss=torch.tensor(torch.nan))
            self.last_batch = self.last_batches[name] = batch
            self.steps_done = (
                trainer.n_training_steps + 1
            )  # SAELens counts the step after it has written its checkpoint
            self.in_step = False
            return output

        trainer.step = watched_step  # pyright: ignore[reportAttributeAccessIssue]

    def _diverges(self, name: str, trainer: SAETrainer[Any, Any], what: str) -> DivergedError:
        which = f" of {name!r}" if name else ""
        return DivergedError(
            f"the training{which} diverged in step {trainer.n_training_steps} (counted from 0), after "
            f"{trainer.n_training_steps * trainer.cfg.train_batch_size_samples:,} tokens: {what}. Lower its learning rate "
            f"(lr {trainer.cfg.lr:g}) or warm it up over more steps (lr_warm_up_steps {trainer.cfg.lr_warm_up_steps}); "
            f"{self._told_saved()}"
        )

    def _drop(self, name: str, error: DivergedError) -> None:
        """Go on without an SAE, where that is wanted and there are others."""
        if not self.drops_diverged:
            raise error
        self.diverged[name] = error
        if self.on_diverged is not None:
            self.on_diverged(name, error)
        if len(self.diverged) == len(self.saes):
            raise error

    def _check_end(self, trainers: Mapping[str, SAETrainer[Any, Any]]) -> None:
        """Look at what the last step made of the weights."""
        for name, trainer in trainers.items():
            if name in self.diverged or name not in self.last_batches:
                continue
            what = _not_finite(trainer.sae) or _not_finite_output(trainer.sae, self.last_batches[name])
            if what:
                self._drop(name, self._diverges(name, trainer, what))

    def _save_whole(self, trainer: Any, trainers: Mapping[str, SAETrainer[Any, Any]]) -> None:
        """Let `trainer.save_checkpoint` write under a temporary name, and nothing that is not finite."""
        save = trainer.save_checkpoint

        def save_whole(checkpoint_name: str, base_path: Path | str | None = None, **kwargs: Any) -> None:
            base = base_path if base_path is not None else trainer.cfg.checkpoint_path
            where = {} if base_path is None else {"base_path": base_path}
            for name, one in trainers.items():
                if what := _not_finite(one.sae):
                    raise self._diverges(name, one, what)
            if base is None:
                save(checkpoint_name, **where, **kwargs)
                return
            unfinished, finished = Path(base) / f"{checkpoint_name}.partial", Path(base) / checkpoint_name
            if unfinished.is_symlink():  # whoever made it, nothing is written where it leads
                unfinished.unlink()
            shutil.rmtree(unfinished, ignore_errors=True)
            save(unfinished.name, **where, **kwargs)
            seal(unfinished)
            older = Path(base) / f".{checkpoint_name}.older.partial"
            if finished.is_dir():
                shutil.rmtree(older, ignore_errors=True)
                finished.rename(older)
            os.replace(unfinished, finished)
            shutil.rmtree(older, ignore_errors=True)
            self.saved = finished

        trainer.save_checkpoint = save_whole


def refuse_not_finite_steps(trainer: SAETrainer[Any, Any], error: Callable[[str], Exception]) -> None:
    """Raise `error` of what is wrong in a step whose loss or gradient is not finite, before the step changes a weight."""
    train_step: Callable[..., Any] = trainer._train_step  # pyright: ignore[reportPrivateUsage]

    def finite_step(*args: Any, **kwargs: Any) -> Any:
        norm = 0.0

        def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            nonlocal norm
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if not isfinite(norm):
                raise error(f"the norm of its gradient is {norm}")

        before_update = trainer.optimizer.register_step_pre_hook(look)
        try:
            output = train_step(*args, **kwargs)
        finally:
            before_update.remove()
        loss = output.loss.item()
        if not isfinite(loss):
            raise error(f"its loss is {loss}")
        if norm == 0 and loss > OVERFLOWING:  # SAELens divides the gradient by its norm, which was infinite
            raise error(f"its loss is {loss:g}, and the norm of its gradient is infinite")
        return output

    trainer._train_step = finite_step  # pyright: ignore[reportPrivateUsage]


def _not_finite(sae: TrainingSAE[Any]) -> str | None:
    bad = [name for name, tensor in sae.state_dict().items() if not torch.isfinite(tensor).all()]
    return f"its weights are not finite ({', '.join(bad)})" if bad else None


@torch.no_grad()
def _not_finite_output(sae: TrainingSAE[Any], batch: Tensor) -> str | None:
    training, _ = sae.training, sae.eval()
    finite = bool(torch.isfinite(sae(read_and_written(sae, batch.to(sae.device))[0])).all())
    sae.train(training)
    return None if finite else "its reconstruction of the last batch is not finite"


def _model_sample(model: torch.nn.Module) -> Tensor:
    """Some of each of the weights of a language model, [values]: by what it is known again, on any device."""
    parts: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.device.type == "meta":  # it is kept elsewhere until it is needed
            continue
        flat = parameter.detach().reshape(-1)
        at = torch.linspace(0, len(flat) - 1, min(len(flat), SAMPLED), dtype=torch.float64).long()
        parts.append(flat[at.to(flat.device)].float().cpu())
    return torch.cat(parts) if parts else torch.zeros(0)


def _same_sample(one: Tensor, other: Tensor) -> bool:
    """Up to the rounding with which another device folds weights when it loads a model."""
    scale = one.abs().mean()
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(scale), equal_nan=True)


def _keep_folded(cfg: Any, saved: Path) -> None:
    """A finished run's checkpoint has its normalisation folded in: SAELens would estimate and fold it a second time."""
    folded = json.loads(saved.read_text()) if saved.is_file() else {}
    if folded.get("normalize_activations") == "none":
        for name in ("normalize_activations", "rescale_acts_by_decoder_norm"):
            if name in folded:
                setattr(cfg, name, folded[name])


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


def _write(path: Path, state: StreamState, steps_done: int, model_sample: Tensor) -> None:
    tensors = {name: getattr(state, name) for name in _TENSORS} | {"rng_cpu": torch.get_rng_state()}
    tensors |= {"model_sample": model_sample}
    if state.generator is not None:
        tensors["generator"] = state.generator
    if torch.cuda.is_available():
        tensors |= {f"rng_cuda_{i:03d}": rng for i, rng in enumerate(torch.cuda.get_rng_state_all())}
    counters = {name: getattr(state, name) for name in (*_COUNTERS, *_ADDED)} | {"steps_done": steps_done}
    counters["sequences_digest"] = int(state.sequences_digest or 0)
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
        **{name: counters.get(name) for name in _ADDED},
    )
    return state, counters["steps_done"], tensors


def layer_runners(layer: Callable[[type, str, Callable[[Any], Any]], None], architectures: frozenset[str]) -> None:
    """Give SAELens's runners exact checkpoints where they train one of `architectures`; `layer(class, method, make)` installs."""

    def run(original: Any) -> Any:
        def exact_run(self: Any, *args: Any, **kwargs: Any) -> Any:
            saes = self.saes.values() if isinstance(self, MultiSAETrainingRunner) else [self.sae]
            if any(sae.cfg.architecture() in architectures for sae in saes):
                exact_resume(self)
            path = self.cfg.checkpoint_path if self in _RUNS else None
            with nullcontext() if path is None else locked(Path(path), shlex.join(sys.argv)):
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
        def save_with_text(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if self not in _RUNS:
                return
            if isinstance(self, MultiSAETrainingRunner):
                folders = [Path(str(self.cfg.output_path)) / name for name in args[0]]
            else:
                folders = [Path(kwargs["output_path"] if "output_path" in kwargs else args[1])]
            for folder in folders:
                _RUNS[self].stream.text.sketch().shortened().save(folder)

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
