"""The job of `sae-nfm train`: one SAE of any architecture, trained by SAELens's runner, recorded, and written whole.

    options -> model, hook point and data found -> SAELens's runner, seeded and exactly resumable -> <output>.partial -> output

What does not work is said before anything is written.
"""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training._interruption import InterruptedException
from sae_lens.util import temporary_seed
from typing_extensions import override

from sae_nfm import demo
from sae_nfm.architectures import (
    HIDDEN,
    PRIMARY_DIGEST,
    NFMTrainingFields,
    SequentialNFM,
    SequentialNFMTrainingSAEConfig,
    check_primary,
    primary_digest,
)
from sae_nfm.architectures.joint_config import ARCHITECTURE, ENCODERS, encoder_defaults
from sae_nfm.common import check_choice, check_number, check_output, partial_folder, publishing, remark
from sae_nfm.common.file_errors import python_string
from sae_nfm.common.options import DEFAULT_HOOKS, FETCHED_MODEL, CacheOptions
from sae_nfm.convert import plain_by_name, warm_started, write_adapter
from sae_nfm.data import (
    ActivationCache,
    check_data,
    held_out_tokens,
    open_dataset,
    opened_cache,
    own_text,
    read_from_cache,
    read_identity,
    training_data,
)
from sae_nfm.data.activation_cache import IDENTITY_FILENAME
from sae_nfm.loading import load_sae, quiet_saelens, refuse_not_finite
from sae_nfm.models import (
    LanguageModel,
    check_context,
    check_device,
    context_limit,
    load_model,
    mlp_sites,
    pair_hooks,
    refuse_heads_of_a_bridge,
    site_at,
    special_tokens_words,
)
from sae_nfm.training.activation_stream import DataLostError
from sae_nfm.training.recorder import HeldOut, record_training
from sae_nfm.training.results import RECORD_FILENAME
from sae_nfm.training.resume import exact_resume, last_checkpoint
from sae_nfm.training.settings import check_schedule, refuse_several_processes


@dataclass(frozen=True, kw_only=True)
class OtherSAEs:
    """SAEs that the new one is trained from or on; the base of a sequential_nfm is named by --base."""

    warm_start: str | None = None
    """A TopK or JumpReLU SAE (folder, or release:sae_id) whose encoder and decoder a joint_nfm begins with; the features (d_sae,
    k, ...) and, unless given, the hook point are its own."""
    primary: str | None = None
    """A joint_nfm or sequential_nfm (folder, or release:sae_id) that is spliced in, so that an SAE can be trained on one of its
    hook points: a secondary SAE, on its hidden code unless --hook_name names another, such as
    blocks.2.hook_resid_post.hook_nfm_linear."""
    adapter: bool = False
    """Save a sequential_nfm without its base, which is then looked for under the name given by --base."""

    def __post_init__(self) -> None:
        if self.warm_start is not None and self.primary is not None:
            raise ValueError("both --warm_start and --primary given; a secondary SAE has no warm start, leave one out")

    def check(self, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
        """Raise a ValueError for options that the architecture cannot have."""
        architecture = cfg.sae.architecture()
        if self.warm_start is not None and architecture != ARCHITECTURE:
            raise ValueError(f"--warm_start is for --architecture {ARCHITECTURE}, this is {architecture}; leave it out")
        sequential = isinstance(cfg.sae, SequentialNFMTrainingSAEConfig)
        if self.primary is not None and is_transcoder_config(cfg.sae):
            raise ValueError(
                f"--primary is for SAEs trained inside another SAE, and a {architecture} reads and writes an MLP's hook points; "
                "leave it out"
            )
        if self.adapter and not (sequential and cfg.sae.base):
            raise ValueError(f"--adapter is for a sequential_nfm with a --base, this is {architecture}; leave it out")
        if sequential and not cfg.sae.base:
            raise ValueError("a sequential_nfm needs a base; name it with --base (an SAE's folder, or release:sae_id)")


@dataclass(frozen=True, kw_only=True)
class LoadedSAEs:
    """The other SAEs of a run: what a joint_nfm begins as, and what a secondary SAE is trained on."""

    warm_start: SAE[Any] | None
    primary: SAE[Any] | None

    def hook_name(self, cfg: LanguageModelSAERunnerConfig[Any]) -> str | None:
        """The hook point they imply."""
        if self.primary is not None:
            return f"{self.primary.cfg.metadata.hook_name}.{HIDDEN}"
        metadata = cfg.sae.metadata if self.warm_start is None else self.warm_start.cfg.metadata
        return metadata.hook_name

    def splice_in(self, model: LanguageModel | None) -> None:
        """Attach the primary to the model for good."""
        if self.primary is None:
            return
        if not isinstance(model, HookedSAETransformer):
            raise ValueError("--primary needs --model_class_name HookedTransformer, into which the primary is spliced")
        model.add_sae(self.primary)
        if self.primary.cfg.metadata.hook_name not in model.acts_to_saes:  # SAELens only logs a warning
            raise ValueError(
                f"the model has no hook point {self.primary.cfg.metadata.hook_name!r}, where the primary was trained; give its "
                "model with --model"
            )

    def starting_sae(self, cfg: LanguageModelSAERunnerConfig[Any], given: frozenset[str]) -> TrainingSAE[Any] | None:
        """The SAE that the runner is to begin with; None for a new one. `cfg.sae` becomes its config.

        A ValueError for options that contradict the SAE to start from.
        """
        if self.warm_start is None:
            return None
        own = {field.name for field in fields(NFMTrainingFields)}
        wanted = {f.name: getattr(cfg.sae, f.name) for f in fields(cfg.sae) if f.name in own | given | {"d_in"}}
        sae = warm_started(self.warm_start, seed=cfg.seed, **wanted)
        cfg.sae = sae.cfg
        return sae

    def sign(self, metadata: SAEMetadata) -> None:
        """Write down which primary a secondary SAE is of."""
        if self.primary is not None:
            setattr(metadata, PRIMARY_DIGEST, primary_digest(self.primary))


def load_others(named: OtherSAEs, cfg: LanguageModelSAERunnerConfig[Any]) -> LoadedSAEs:
    """Load the SAEs that were named; an error when one is missing, or does not suit the architecture."""
    named.check(cfg)
    primary = None if named.primary is None else load_sae(named.primary, device=str(cfg.device))
    if primary is not None:
        check_primary(primary)
    start = None if named.warm_start is None else plain_by_name(named.warm_start)
    return LoadedSAEs(warm_start=start, primary=primary)


EMBEDDED = {
    "hook_name": "blocks.2.hook_resid_post",
    "context_size": 256,
    "training_tokens": 200_000,
    "train_batch_size_tokens": 2_048,
    "lr": 5e-3,
    "exclude_special_tokens": True,
    "n_batches_in_buffer": 64,
    "n_batches_for_norm_estimate": 10,
    "n_eval_batches": 1,
}
"""Defaults on the embedded model, where they differ from SAELens's."""
EMBEDDED_SAE = {"d_sae": 2_048, "k": 32, "normalize_activations": "expected_average_only_in"}
"""Defaults of the SAE on the embedded model, for the architectures that have such a field."""
SMOLLM2 = EMBEDDED | {
    "hook_name": DEFAULT_HOOKS[FETCHED_MODEL],
    "training_tokens": 100_000,
    "train_batch_size_tokens": 512,
    "lr": 2e-3,
}
SMOLLM2_SAE = EMBEDDED_SAE | {"d_sae": 2_304}
"""The same on SmolLM2: four features a dimension."""
OURS = {demo.MODEL_NAME: (EMBEDDED, EMBEDDED_SAE), FETCHED_MODEL: (SMOLLM2, SMOLLM2_SAE)}
"""Defaults by model; on any other they are SAELens's."""
SAELENS_SAE = {"d_in": 512, "d_sae": 1_024}
"""SAELens's own command line gives these to fields that have no default."""


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What is measured while training."""

    record_every: int = 10
    """Steps from one line of training.jsonl (losses and metrics, no wandb needed) to the next."""
    held_out: str | None = None
    """Held-out text, evaluated on while training: as dataset_path. Without it: with the embedded model or smollm2 on its own
    text, text held out from that; else none."""
    evaluate_every: int = 100
    """Steps from one held-out evaluation to the next; the last step is always evaluated. 0: never."""

    def __post_init__(self) -> None:
        if self.record_every < 1:
            raise ValueError(f"record_every is {self.record_every}; give a positive number of steps")
        if self.evaluate_every < 0:
            raise ValueError(f"evaluate_every is {self.evaluate_every}; give a number of steps, or 0 for never")


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """A command line of `sae-nfm train`, understood."""

    cfg: LanguageModelSAERunnerConfig[Any]
    record: RecordConfig
    others: OtherSAEs
    cache: CacheOptions
    given: frozenset[str]
    """Names of the flags that were given; the others have defaults."""
    argv: tuple[str, ...]
    """The command line after `sae-nfm train`."""


def trainable(architecture: str) -> type[TrainingSAEConfig]:
    """The config class of an architecture; a ValueError for one that SAELens does not know."""
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(f"SAELens trains no {architecture!r}; give one of {', '.join(SAE_TRAINING_CLASS_REGISTRY)}")
    return SAE_TRAINING_CLASS_REGISTRY[architecture][1]


def option_names(sae_class: type[TrainingSAEConfig]) -> dict[type, dict[str, str]]:
    """The fields of each config class of a run, by the names of their options: "sae.dtype" where the run has a dtype too."""
    run = [f.name for f in fields(LanguageModelSAERunnerConfig) if f.name not in ("sae", "logger")]
    names = {
        config: {f.name: f.name for f in fields(config)}
        for config in (LoggingConfig, RecordConfig, OtherSAEs, CacheOptions)
    }
    of_sae = {f"sae.{f.name}" if f.name in run else f.name: f.name for f in fields(sae_class) if f.init}
    return {LanguageModelSAERunnerConfig: {name: name for name in run}, sae_class: of_sae} | names


def defaults(sae_class: type[TrainingSAEConfig], model_name: str, encoder: str | None = None) -> dict[str, Any]:
    """Our defaults by option, where SAELens has others or none, or they depend on the encoder of a joint_nfm."""
    own, own_sae = OURS.get(model_name, ({}, {}))
    ours: dict[str, Any] = {"log_to_wandb": False}
    if own:  # the model as it is loaded: nothing folded, nothing centred
        ours |= {"model_name": model_name, "model_from_pretrained_kwargs": {}} | own
    names = {f.name for f in fields(sae_class)}
    if is_transcoder_config(sae_class):  # at the MLP of the usual block; input and output are scaled by themselves
        names -= {"normalize_activations"}
        if own:
            ours["hook_name"] = f"{str(own['hook_name']).rpartition('.')[0]}.mlp.hook_in"
    if "base" not in names:  # one that stands on another SAE takes its sizes from that
        sae = SAELENS_SAE | own_sae
        ours |= {name: value for name, value in sae.items() if name in names}
    usual = usual_values(sae_class, encoder)
    return usual | ours | {name: None for name, value in usual.items() if value is None}


def usual_values(sae_class: type[TrainingSAEConfig], encoder: str | None) -> dict[str, Any]:
    """SAELens's defaults of the options whose default depends on the encoder."""
    if "encoder" not in sae_class.__dataclass_fields__:
        return {}
    check_choice("encoder", encoder := encoder or "topk", ENCODERS)
    return encoder_defaults(encoder)


def train_arguments(given: Mapping[str, Any], *, argv: Sequence[str]) -> TrainArguments:
    """What `sae-nfm train` does with these options; a ValueError for an option or value that does not work.

    Args:
        given: values by option, as in `option_names`, "architecture" too; the others have defaults.
        argv: the same as arguments of the command.
    """
    sae_class = trainable(given.get("architecture", ARCHITECTURE))
    names = option_names(sae_class)
    unknown = set(given).difference(("architecture",), *names.values())
    if unknown:
        raise ValueError(f"`sae-nfm train` has no option {sorted(unknown)[0]}; `sae-nfm train --help` has every option")
    cache = CacheOptions(**{name: given[name] for name in ("activations", "shuffle_rows") if name in given})
    measured = _of_cache(cache, given, is_transcoder_config(sae_class))
    model_name = given.get("model_name", measured.get("model_name", demo.MODEL_NAME))
    values = defaults(sae_class, model_name, given.get("encoder")) | measured | dict(given)
    built: dict[type, dict[str, Any]] = {}
    for config, options in names.items():
        hints = get_type_hints(config)
        found = {option: name for option, name in options.items() if option in values}
        ours = config.__module__.startswith(("sae_nfm.", "sae_lens."))
        built[config] = {name: _checked(option, hints[name], values[option], ours) for option, name in found.items()}
    widths = "matryoshka_widths"  # SAELens has no default
    if widths in names[sae_class] and not built[sae_class].get(widths):
        built[sae_class][widths] = sorted({max(1, values["d_sae"] // part) for part in (8, 4, 2, 1)})
    sae, logger = sae_class(**built[sae_class]), LoggingConfig(**built[LoggingConfig])
    cfg = LanguageModelSAERunnerConfig(sae=sae, logger=logger, **built[LanguageModelSAERunnerConfig])
    if "n_batches_in_buffer" not in given:
        fill_buffer(cfg)
    return TrainArguments(
        cfg=cfg,
        record=RecordConfig(**built[RecordConfig]),
        others=OtherSAEs(**built[OtherSAEs]),
        cache=cache,
        given=frozenset(given),
        argv=tuple(argv),
    )


def is_transcoder_config(config: Any) -> bool:
    """Whether a config, or a class of them, is of a transcoder that is trained on two hook points."""
    return "hook_name_out" in {f.name for f in fields(config)}


def _of_cache(options: CacheOptions, given: Mapping[str, Any], transcoder: bool) -> dict[str, Any]:
    """What a cache of activations says of a run. A ValueError where a data set was given that is not its own."""
    if (
        options.activations is None or not (Path(options.activations) / IDENTITY_FILENAME).is_file()
    ):  # said when it is opened
        return {}
    own = read_identity(options.activations).named(options.activations)
    if given.get("dataset_path", own.dataset) != own.dataset:
        raise ValueError(
            f"dataset_path is {given['dataset_path']!r}, and {own.dataset!r} in the cache {options.activations!r}, which has its "
            "own rows; leave one of the two out"
        )
    found = {"model_name": own.model, "model_class_name": own.model_class_name, "context_size": own.context_size}
    found |= {"dataset_path": own.dataset}
    read = [hook for hook in own.hooks if hook.endswith("mlp.hook_in")] if transcoder else list(own.hooks)
    return found | ({"hook_name": read[0]} if len(read) == 1 else {})


def _checked(option: str, hint: Any, value: Any, known: bool) -> Any:
    """A value of the type that it should have, in its range where the config is no other package's."""
    if hint is SAEMetadata:
        return SAEMetadata(**value)
    try:
        checked = TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{option} is {value!r}: {error.errors()[0]['msg']}") from error
    if not (option in ("d_in", "d_sae") and checked == 0):  # those of the base
        check_number(option.removeprefix("sae."), checked, known=known)
    return checked


def _positions(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    """Positions of a row that are trained on."""
    return len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])


def fill_buffer(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Let the activation buffer hold a batch, where a default is too small for one."""
    positions = max(1, _positions(cfg))
    if cfg.n_batches_in_buffer * positions < cfg.train_batch_size_tokens:
        cfg.n_batches_in_buffer = 4 * -(-cfg.train_batch_size_tokens // positions)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What `train` wrote."""

    folder: Path | None
    """The SAE's folder; None where none was asked for."""
    kept: Path | None
    """Where the SAE lies now that was in that folder before."""
    checkpoints: Path | None

    def words(self) -> str:
        """Where everything is and how it is loaded."""
        if self.folder is None:
            return "Trained; output_path is None, so nothing was written."
        lines = [f"SAE:    {self.folder}", f"Record: {self.folder / RECORD_FILENAME}"]
        lines += [f"The SAE that was there before: {self.kept}"] if self.kept else []
        lines += [f"Checkpoints: {self.checkpoints}"] if self.checkpoints else []
        load = ["import sae_nfm", "from sae_lens import SAE", f"sae = SAE.load_from_disk({python_string(self.folder)})"]
        return "\n".join([*lines, "In Python:", *(f"    {line}" for line in load)])


class WholeRunner(LanguageModelSAETrainingRunner):
    """SAELens's runner, with the finished SAE in `<output_path>.partial`, to be renamed when all of it is there."""

    saves_adapter = False
    """Whether a sequential SAE is saved without its base."""

    @override
    def save_final_sae(
        self, sae: TrainingSAE[Any], output_path: str, log_feature_sparsity: torch.Tensor | None = None
    ) -> None:
        refuse_not_finite(sae.state_dict(), "the trained SAE")
        super().save_final_sae(sae, str(partial_folder(output_path)), log_feature_sparsity)
        if self.saves_adapter:
            write_adapter(cast(SequentialNFM, sae), partial_folder(output_path))


def train(arguments: TrainArguments) -> Trained:
    """Train one SAE.

    Raises:
        ValueError, FileNotFoundError: for a model, hook point, data set or size that does not work; nothing is written.
        InterruptedException: after SIGINT or SIGTERM; it says how to go on.
        DataLostError: where a streamed data set breaks off; it says how to go on.
        DivergedError, NotFiniteError: where a loss, a gradient or an activation is not finite; nothing is published.
    """
    refuse_several_processes()
    cfg = arguments.cfg
    check_output(cfg.output_path, "output_path", only_sae=True)
    others = load_others(arguments.others, cfg)
    cache = opened_cache(arguments.cache, cfg.seed)
    model = fit_to_model(arguments, others)
    dataset, held_out = _data(arguments, cache)
    with temporary_seed(cfg.seed), quiet_saelens():
        sae = others.starting_sae(cfg, arguments.given)
        runner = WholeRunner(cfg, override_dataset=dataset, override_model=cast(Any, model), override_sae=sae)
        _check_architecture(runner)
        pair_hooks(runner)
        if cache is not None:
            read_from_cache(runner, cache)
        runner.saves_adapter = arguments.others.adapter
        others.sign(runner.sae.cfg.metadata)
        _check_runner(runner, held_out)
        exact_resume(runner)
        command = shlex.join(["sae-nfm", "train", *arguments.argv])
        resumed = cfg.resume_from_checkpoint is not None
        output = (
            nullcontext()
            if cfg.output_path is None
            else publishing(cfg.output_path, "train", command=command, keep=resumed, leave=True)
        )
        try:
            with output as made:
                _run(runner, arguments, held_out, None if made is None else made.folder)
        except (KeyboardInterrupt, InterruptedException):
            raise InterruptedException(how_to_go_on(arguments, last_checkpoint(runner))) from None
        except DataLostError as lost:
            raise DataLostError(how_to_go_on(arguments, last_checkpoint(runner), why=str(lost))) from lost
    checkpoints = Path(cfg.checkpoint_path) if cfg.checkpoint_path else None
    return Trained(
        folder=None if cfg.output_path is None else Path(cfg.output_path),
        kept=None if made is None else made.kept,
        checkpoints=checkpoints if checkpoints and checkpoints.is_dir() else None,
    )


def _run(runner: WholeRunner, arguments: TrainArguments, held_out: Any, folder: Path | None) -> None:
    cfg, record = arguments.cfg, arguments.record
    recorded = nullcontext()
    if folder is not None:
        evaluated = None
        if held_out is not None:
            evaluated = HeldOut(dataset=held_out, every=record.evaluate_every, n_batches=cfg.n_eval_batches)
        recorded = record_training(runner, folder / RECORD_FILENAME, every=record.record_every, held_out=evaluated)
    try:
        with recorded:
            runner.run()
    except FloatingPointError:  # what is not finite is no result, and nothing goes on from it
        for left in [] if folder is None else folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        raise


def fit_to_model(arguments: TrainArguments, others: LoadedSAEs) -> LanguageModel | None:
    """Load the model, and set what the hook point decides: its name there, the SAE's width, whether heads are flattened.

    Other SAEs imply a hook point unless one was given; a primary is spliced in. None for a HookedMamba, which is left to SAELens,
    its hook point as given.

    Raises:
        ValueError, FileNotFoundError: for a model, hook point or size that does not fit.
    """
    cfg = arguments.cfg
    _check_sizes(cfg)
    if "hook_name" not in arguments.given:
        cfg.hook_name = others.hook_name(cfg) or cfg.hook_name
    transcoder = is_transcoder_config(cfg.sae)
    if cfg.model_class_name == "HookedMamba":
        if transcoder:
            raise ValueError(f"a HookedMamba has no MLPs for a {cfg.sae.architecture()}; give another model_class_name")
        others.splice_in(None)
        return None
    assert cfg.llm_device is not None  # set by SAELens
    kwargs = cfg.model_from_pretrained_kwargs or {}
    model = load_model(cfg.model_name, cfg.llm_device, model_class_name=cfg.model_class_name, **kwargs)
    others.splice_in(model)
    measured: dict[str, Any] = {}
    if transcoder:
        if cfg.hook_head_index is not None:
            raise ValueError(f"hook_head_index is {cfg.hook_head_index}, and an MLP has no heads; leave it out")
        site, written = mlp_sites(model, cfg.hook_name, getattr(cfg.sae, "hook_name_out", None))
        measured = {"d_out": written.d_in}
        if "d_out" in arguments.given and getattr(cfg.sae, "d_out", None) != written.d_in:
            raise ValueError(
                f"d_out is {getattr(cfg.sae, 'd_out', None)}, but {written.hook_name!r} has width {written.d_in}; leave d_out out"
            )
        cfg.sae = replace(cfg.sae, hook_name_out=written.hook_name)  # pyright: ignore[reportCallIssue]
    else:
        site = site_at(model, cfg.hook_name, cfg.hook_head_index)
    cfg.hook_name = site.hook_name
    measured |= {"d_in": site.d_in, "reshape_activations": site.reshape_activations}
    if "d_in" in arguments.given and cfg.sae.d_in != site.d_in:
        raise ValueError(f"d_in is {cfg.sae.d_in}, but {cfg.hook_name!r} has width {site.d_in}; leave d_in out")
    cfg.sae = replace(cfg.sae, **{name: value for name, value in measured.items() if name not in arguments.given})
    limit = context_limit(model)
    if limit is not None and "context_size" not in arguments.given and limit < cfg.context_size:
        remark(f"context_size is {limit}, as the model reads no more")
        cfg.context_size = limit
        if "n_batches_in_buffer" not in arguments.given:
            fill_buffer(cfg)
    check_context(model, cfg.context_size)
    if words := _threshold_words(cfg):
        remark(words)
    remark(
        special_tokens_words(
            model, cfg.exclude_special_tokens, "trained on (--exclude_special_tokens true leaves them out)"
        )
    )
    return model


def _threshold_words(cfg: LanguageModelSAERunnerConfig[Any]) -> str:
    """What is to be said of a threshold that a short training leaves near its start; "" where there is nothing."""
    rate = getattr(cfg.sae, "topk_threshold_lr", None)
    left = 0.0 if rate is None else (1 - rate) ** cfg.total_training_steps
    if getattr(cfg.sae, "encoder", "batchtopk") != "batchtopk" or left < 0.05:
        return ""
    return (
        f"topk_threshold_lr is {rate}: in {cfg.total_training_steps} steps the saved threshold, which begins at 0, goes "
        f"{1 - left:.0%} of the way, so that the saved SAE will have more active features than k; give a higher rate"
    )


def _check_sizes(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    for device in {cfg.device, cfg.llm_device, cfg.act_store_device}:
        check_device(str(device))
    held = cfg.n_batches_in_buffer * _positions(cfg)
    if held < cfg.train_batch_size_tokens:
        raise ValueError(
            f"the buffer holds n_batches_in_buffer x context = {held} tokens, fewer than a batch of "
            f"{cfg.train_batch_size_tokens}; raise n_batches_in_buffer or lower train_batch_size_tokens"
        )
    pretrained = cfg.from_pretrained_path
    if pretrained is not None and not (Path(pretrained) / SAE_CFG_FILENAME).is_file():
        raise FileNotFoundError(f"from_pretrained_path is {pretrained!r}, no saved SAE; give the folder of one")
    k = getattr(cfg.sae, "k", None)
    if k is not None and not 0 < k <= cfg.sae.d_sae:
        raise ValueError(f"k is {k}; give a number from 1 to the d_sae = {cfg.sae.d_sae} features there are")
    if cfg.training_tokens < cfg.train_batch_size_tokens:
        raise ValueError(
            f"training_tokens is {cfg.training_tokens}, less than one batch of {cfg.train_batch_size_tokens} tokens; raise it, "
            "or lower train_batch_size_tokens"
        )
    check_schedule(cfg)


def _check_architecture(runner: WholeRunner) -> None:
    """Refuse a pretrained SAE that is trained on other hook points than asked for: one, or a transcoder's two."""
    asked, own = runner.cfg.sae, runner.sae.cfg
    if (is_transcoder_config(asked) or is_transcoder_config(own)) and asked.architecture() != own.architecture():
        raise ValueError(
            f"architecture is {asked.architecture()!r}, and {own.architecture()!r} in {runner.cfg.from_pretrained_path!r}; "
            "give the same"
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
    check_data(model, store.dataset, cfg.context_size, cfg.dataset_path)
    if next(store._iterate_tokenized_sequences(), None) is None:  # pyright: ignore[reportPrivateUsage]
        raise ValueError(
            f"the text in {cfg.dataset_path!r} does not fill one row of {cfg.context_size} tokens; give more text or lower "
            "context_size"
        )
    store.n_dataset_processed = 0  # nothing was taken from the training's own sequences


def _data(arguments: TrainArguments, cache: ActivationCache | None) -> tuple[Any, Any]:
    """The data sets for training and for evaluation (None: there is none)."""
    cfg, held_out = arguments.cfg, arguments.record.held_out
    own = cfg.dataset_path == "" or cfg.dataset_path == cfg.model_name in OURS
    if cfg.dataset_path == demo.MODEL_NAME != cfg.model_name or (own and cfg.model_name not in OURS):
        raise ValueError(f"the embedded tokens suit the embedded model only; give --dataset for {cfg.model_name!r}")
    if own:
        cfg.dataset_path = cfg.model_name
    streaming: dict[str, Any] = {"seed": cfg.seed, "streaming": cfg.streaming}
    if cache is not None:
        dataset = cache.dataset()
    elif own:
        dataset = own_text(cfg.model_name, "train", seed=cfg.seed)
    else:
        dataset = training_data(cfg.dataset_path, held_out, **streaming)
    if arguments.record.evaluate_every == 0 or (held_out is None and not own):
        return dataset, None
    if held_out is None:
        return dataset, own_text(cfg.model_name, "validation")
    return dataset, open_dataset(held_out, split="validation")


def how_to_go_on(arguments: TrainArguments, saved: Path | None = None, why: str = "interrupted") -> str:
    """What to type after an interruption: the command that resumes, where there is a checkpoint (`saved`, or the one given)."""
    cfg = arguments.cfg
    checkpoint = cfg.resume_from_checkpoint if saved is None else str(saved)
    if checkpoint is None:
        because = ", as checkpoint_path is None" if cfg.checkpoint_path is None else ""
        return f"{why} before a checkpoint was saved{because}" if why == "interrupted" else f"{why}{because}"
    command = ["sae-nfm", "train", *_without_resume(arguments.argv), "--resume_from_checkpoint", checkpoint]
    return f"{why}; to go on: {shlex.join(command)}"


def _without_resume(argv: Sequence[str]) -> list[str]:
    plain = [arg.partition("=")[0].replace("-", "_") for arg in argv]
    flags = [i for i, arg in enumerate(plain) if arg == "__resume_from_checkpoint"]
    values = [i + 1 for i in flags if "=" not in argv[i] and not "".join(argv[i + 1 : i + 2]).startswith("--")]
    return [arg for i, arg in enumerate(argv) if i not in {*flags, *values}]
