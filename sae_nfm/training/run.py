"""The job of `sae-nfm train`: one SAE of any architecture, trained by SAELens's runner, recorded, and written whole.

    flags -> model, hook point and data found -> SAELens's runner, seeded and exactly resumable -> <output>.partial -> output

What does not work is said before anything is written.
"""

import logging
import shlex
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, TrainingSAE
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.training._interruption import InterruptedException
from sae_lens.util import temporary_seed
from typing_extensions import override

from sae_nfm import demo
from sae_nfm.architectures import SequentialNFM
from sae_nfm.common import check_output, check_positive, discard_unstarted, partial_folder, publish
from sae_nfm.convert import write_adapter
from sae_nfm.data import explained_hub, held_out_tokens, local_dataset, open_dataset, refuse_without_tokenizer
from sae_nfm.loading import quiet_saelens
from sae_nfm.models import LanguageModel, check_context, check_device, load_model, refuse_heads_of_a_bridge, site_at
from sae_nfm.training.arguments import TrainArguments
from sae_nfm.training.recorder import HeldOut, record_training
from sae_nfm.training.results import RECORD_FILENAME
from sae_nfm.training.resume import checkpoint_folder, exact_resume
from sae_nfm.training.starting_saes import LoadedSAEs, load_others

POSITIVE = (
    *("context_size", "train_batch_size_tokens", "store_batch_size_prompts", "n_batches_in_buffer", "n_eval_batches"),
    *("n_batches_for_norm_estimate", "feature_sampling_window"),
)
"""Sizes that SAELens does not check and fails with."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What `train` wrote."""

    folder: Path | None
    """The SAE's folder; None where none was asked for."""
    kept: Path | None
    """Where the SAE lies now that was in that folder before."""
    checkpoints: Path | None
    """The folder of this run's checkpoints, where there are any."""

    def words(self) -> str:
        """Where everything is and how it is loaded."""
        if self.folder is None:
            return "Trained; output_path is None, so nothing was written."
        lines = [f"SAE:    {self.folder}", f"Record: {self.folder / RECORD_FILENAME}"]
        lines += [f"The SAE that was there before: {self.kept}"] if self.kept else []
        lines += [f"Checkpoints: {self.checkpoints}"] if self.checkpoints else []
        load = ["import sae_nfm", "from sae_lens import SAE", f'sae = SAE.load_from_disk("{self.folder}")']
        return "\n".join([*lines, "In Python:", *(f"    {line}" for line in load)])


class WholeRunner(LanguageModelSAETrainingRunner):
    """SAELens's runner, with the finished SAE in `<output_path>.partial`, to be renamed when all of it is there."""

    saves_adapter = False
    """Whether a sequential SAE is saved without its base."""

    @override
    def save_final_sae(
        self, sae: TrainingSAE[Any], output_path: str, log_feature_sparsity: torch.Tensor | None = None
    ) -> None:
        super().save_final_sae(sae, str(partial_folder(output_path)), log_feature_sparsity)
        if self.saves_adapter:
            write_adapter(cast(SequentialNFM, sae), partial_folder(output_path))


def train(arguments: TrainArguments) -> Trained:
    """Train one SAE.

    Raises:
        ValueError, FileNotFoundError: for a model, hook point, data set or size that does not work; nothing is written.
        InterruptedException: after SIGINT or SIGTERM; it says how to go on.
    """
    cfg = arguments.cfg
    check_output(cfg.output_path)
    others = load_others(arguments.others, cfg)
    model = fit_to_model(arguments, others)
    dataset, held_out = _data(arguments)
    with temporary_seed(cfg.seed), quiet_saelens(), _expected_overrides():
        with explained_hub(cfg.dataset_path) if dataset is None else nullcontext():
            sae = others.starting_sae(cfg, arguments.given)
            runner = WholeRunner(cfg, override_dataset=dataset, override_model=cast(Any, model), override_sae=sae)
        runner.saves_adapter = arguments.others.adapter
        others.sign(runner.sae.cfg.metadata)
        _check_runner(runner, held_out)
        exact_resume(runner)
        try:
            _run(runner, arguments, held_out)
        except (KeyboardInterrupt, InterruptedException):
            raise InterruptedException(how_to_go_on(arguments)) from None
    kept = None if cfg.output_path is None else publish(cfg.output_path)
    checkpoints = Path(cfg.checkpoint_path) if cfg.checkpoint_path else None
    return Trained(
        folder=None if cfg.output_path is None else Path(cfg.output_path),
        kept=kept,
        checkpoints=checkpoints if checkpoints and checkpoints.is_dir() else None,
    )


def _run(runner: WholeRunner, arguments: TrainArguments, held_out: Any) -> None:
    cfg, record = arguments.cfg, arguments.record
    recorded = nullcontext()
    if cfg.output_path is not None:
        partial = partial_folder(cfg.output_path)
        if cfg.resume_from_checkpoint is None:  # else the record of the interrupted run goes on
            shutil.rmtree(partial, ignore_errors=True)
        evaluated = None
        if held_out is not None:
            evaluated = HeldOut(dataset=held_out, every=record.evaluate_every, n_batches=cfg.n_eval_batches)
        recorded = record_training(runner, partial / RECORD_FILENAME, every=record.record_every, held_out=evaluated)
    try:
        with recorded:
            runner.run()
    finally:
        if cfg.output_path is not None:
            discard_unstarted(cfg.output_path)


def fit_to_model(arguments: TrainArguments, others: LoadedSAEs) -> LanguageModel | None:
    """Load the model, and set what the hook point decides: its name there, the SAE's width, whether heads are flattened.

    Args:
        arguments: the command line.
        others: other SAEs, which imply a hook point unless one was given; a primary is spliced in.

    Returns:
        The model; None for a HookedMamba, which is left to SAELens, its hook point as given.

    Raises:
        ValueError, FileNotFoundError: for a model, hook point or size that does not fit.
    """
    cfg = arguments.cfg
    _check_sizes(cfg)
    if "hook_name" not in arguments.given:
        cfg.hook_name = others.hook_name(cfg) or cfg.hook_name
    if cfg.model_class_name == "HookedMamba":
        others.splice_in(None)
        return None
    assert cfg.llm_device is not None  # set by SAELens
    model = load_model(
        cfg.model_name,
        cfg.llm_device,
        model_class_name=cfg.model_class_name,
        **(cfg.model_from_pretrained_kwargs or {}),
    )
    others.splice_in(model)
    site = site_at(model, cfg.hook_name, cfg.hook_head_index)
    cfg.hook_name = site.hook_name
    measured: dict[str, Any] = {"d_in": site.d_in, "reshape_activations": site.reshape_activations}
    if "d_in" in arguments.given and cfg.sae.d_in != site.d_in:
        raise ValueError(
            f"d_in is {cfg.sae.d_in}, but {cfg.hook_name!r} of {cfg.model_name} has width {site.d_in}; leave d_in out"
        )
    cfg.sae = replace(cfg.sae, **{name: value for name, value in measured.items() if name not in arguments.given})
    check_context(model, cfg.context_size)
    return model


def _check_sizes(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    for device in {cfg.device, cfg.llm_device, cfg.act_store_device}:
        check_device(str(device))
    check_positive(cfg, *POSITIVE)
    pretrained = cfg.from_pretrained_path
    if pretrained is not None and not (Path(pretrained) / SAE_CFG_FILENAME).is_file():
        raise FileNotFoundError(
            f"from_pretrained_path is {pretrained!r}, where no saved SAE is; give the folder of one"
        )
    k = getattr(cfg.sae, "k", None)
    if k is not None and not 0 < k <= cfg.sae.d_sae:
        raise ValueError(f"k is {k}; give a number from 1 to the d_sae = {cfg.sae.d_sae} features there are")
    if cfg.training_tokens < cfg.train_batch_size_tokens:
        raise ValueError(
            f"training_tokens is {cfg.training_tokens}, less than one batch of {cfg.train_batch_size_tokens} tokens; raise it, "
            "or lower train_batch_size_tokens"
        )


def _check_runner(runner: WholeRunner, held_out: Any) -> None:
    """Refuse what would fail in the first step: text that fills no row, a pretrained SAE of another width."""
    cfg, store = runner.cfg, runner.activations_store
    if runner.sae.cfg.d_in != cfg.sae.d_in:
        raise ValueError(
            f"the SAE in {cfg.from_pretrained_path!r} has d_in {runner.sae.cfg.d_in}, the hook point {cfg.sae.d_in}; "
            "choose the hook point it was trained at"
        )
    model = cast(LanguageModel, runner.model)
    if held_out is not None:
        refuse_heads_of_a_bridge(model, cfg.hook_name)
        held_out_tokens(model, held_out, cfg.context_size, 1)  # says so where the text fills no row
    if store.dataset is None:  # cached activations
        return
    refuse_without_tokenizer(model, store.dataset)
    if next(store._iterate_tokenized_sequences(), None) is None:  # pyright: ignore[reportPrivateUsage]
        raise ValueError(
            f"the text in {cfg.dataset_path!r} does not fill one row of {cfg.context_size} tokens; give more text or lower "
            "context_size"
        )
    store.n_dataset_processed = 0  # nothing was taken from the training's own sequences


def _data(arguments: TrainArguments) -> tuple[Any, Any]:
    """The data sets for training (None: SAELens loads it from the hub) and for evaluation (None: there is none)."""
    cfg, held_out = arguments.cfg, arguments.record.held_out
    embedded = cfg.dataset_path in ("", demo.MODEL_NAME)
    if embedded and cfg.model_name != demo.MODEL_NAME:
        raise ValueError(f"the embedded tokens suit the embedded model only; give --dataset for {cfg.model_name!r}")
    if embedded:
        cfg.dataset_path = demo.MODEL_NAME
    dataset = demo.load_tokens("train") if embedded else local_dataset(cfg.dataset_path, seed=cfg.seed)
    if arguments.record.evaluate_every == 0 or (held_out is None and not embedded):
        return dataset, None
    return dataset, demo.load_tokens("validation") if held_out is None else open_dataset(held_out, split="validation")


@contextmanager
def _expected_overrides() -> Generator[None]:
    """Hide SAELens's warning that a run with a given model or data set is not described by its config: ours is."""

    def expected(entry: logging.LogRecord) -> bool:
        return not entry.getMessage().startswith("You just passed in a ")

    logger = logging.getLogger("sae_lens")
    logger.addFilter(expected)
    try:
        yield
    finally:
        logger.removeFilter(expected)


def how_to_go_on(arguments: TrainArguments) -> str:
    """What to type after an interruption: the command that resumes, where there is a checkpoint."""
    cfg = arguments.cfg
    checkpoint = cfg.resume_from_checkpoint
    if cfg.checkpoint_path is not None and Path(cfg.checkpoint_path).is_dir():
        checkpoint = str(checkpoint_folder(cfg.checkpoint_path))
    if checkpoint is None:
        why = ", as checkpoint_path is None" if cfg.checkpoint_path is None else ""
        return f"interrupted before a checkpoint was saved{why}"
    command = ["sae-nfm", "train", *_without_resume(arguments.argv), "--resume_from_checkpoint", checkpoint]
    return f"interrupted; to go on: {shlex.join(command)}"


def _without_resume(argv: Sequence[str]) -> list[str]:
    """The arguments without the flag that says where to resume from."""
    plain = [arg.partition("=")[0].replace("-", "_") for arg in argv]
    flags = [i for i, arg in enumerate(plain) if arg == "__resume_from_checkpoint"]
    values = [i + 1 for i in flags if "=" not in argv[i] and not "".join(argv[i + 1 : i + 2]).startswith("--")]
    return [arg for i, arg in enumerate(argv) if i not in {*flags, *values}]
