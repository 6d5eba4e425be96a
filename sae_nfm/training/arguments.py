"""The flags of `sae-nfm train`: SAELens's own, for every architecture in its registry, with defaults that work offline.

The parser is made as SAELens makes its own (`sae_lens.llm_sae_training_runner`): the runner's config with the SAE's config
as a subgroup that `--architecture` chooses. Flags that a later SAELens or another plugin adds are there without a change.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, make_dataclass
from dataclasses import field as dataclass_field
from functools import cache, partial
from typing import Any

import simple_parsing
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TrainingSAEConfig
from sae_lens.config import dict_field
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_nfm import demo
from sae_nfm.architectures.joint_config import ARCHITECTURE
from sae_nfm.cli.parser import CommandParser, underscored
from sae_nfm.training.starting_saes import OtherSAEs

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
SAELENS_SAE = {"d_in": 512, "d_sae": 1_024}
"""SAELens's own command line gives these to fields that have no default."""

SECTIONS = {
    "model and hook point": (
        *("architecture", "model_name", "model_class_name", "hook_name", "hook_head_index", "primary"),
        *("model_from_pretrained_kwargs", "model_kwargs"),
    ),
    "data": (
        *("dataset_path", "context_size", "training_tokens", "exclude_special_tokens", "seqpos_slice", "prepend_bos"),
        *("sequence_separator_token", "disable_concat_sequences", "is_dataset_tokenized", "use_chat_formatting"),
        *("streaming", "dataset_trust_remote_code", "use_cached_activations", "cached_activations_path"),
    ),
}
"""The help's sections before that of the SAE."""
LATER_SECTIONS = {
    "training": (
        *("seed", "train_batch_size_tokens", "lr", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps", "lr_end"),
        *("n_restart_cycles", "adam_beta1", "adam_beta2", "n_batches_for_norm_estimate", "dead_feature_window"),
        *("feature_sampling_window", "dead_feature_threshold", "from_pretrained_path", "warm_start"),
    ),
    "outputs, checkpoints, evaluation": (
        *(
            "output_path",
            "adapter",
            "checkpoint_path",
            "n_checkpoints",
            "save_final_checkpoint",
            "resume_from_checkpoint",
        ),
        *("record_every", "held_out", "evaluate_every", "n_eval_batches", "eval_batch_size_prompts", "verbose"),
    ),
    "device and speed": (
        *("device", "llm_device", "act_store_device", "dtype", "store_batch_size_prompts", "n_batches_in_buffer"),
        *("activations_mixing_fraction", "prefetch_llm_batches", "autocast", "autocast_lm", "compile_llm"),
        *("llm_compilation_mode", "compile_sae", "sae_compilation_mode"),
    ),
}
"""The help's sections after it."""
HIDDEN = ("hook_eval", "metadata", "sae_lens_version", "sae_lens_training_version", "base_config", "base_sha256")
"""Flags that are accepted and do nothing, or nothing good."""

TOLD = {
    "model_name": f"The language model: {demo.MODEL_NAME} (embedded in the package, offline), a local Hugging Face folder, "
    "or a name on the hub.",
    "model_class_name": "HookedTransformer, TransformerBridge or AutoModelForCausalLM; with the last, hook names are the "
    "module names of Hugging Face.",
    "dataset_path": "Training text or tokens: a .parquet, .jsonl or .txt file, a folder of them, a data set saved by "
    "`datasets`, or a hub name. Without it: tokens of the embedded model, with that model.",
    "seed": "Seed of initialisation and data order, on the CPU and the GPU. (SAELens has the flag and reads it nowhere.)",
    "d_in": "Width of the hook point. It is measured; give it only as a check.",
    "d_sae": "Number of features.",
    "sae.dtype": "Data type of the SAE's parameters.",
    "sae.device": "Device the SAE is made on; it is moved to --device.",
    "apply_b_dec_to_input": "Whether b_dec is subtracted before encoding.",
    "normalize_activations": "Normalisation of the inputs; expected_average_only_in and covariance_whitening are estimated on "
    "n_batches_for_norm_estimate batches and folded into the weights in the end.",
    "matryoshka_widths": "Widths of the nested dictionaries, ascending; an eighth, a quarter, a half and all of d_sae unless "
    "given.",
    "reshape_activations": "Whether heads are flattened. It is found out at the hook point.",
    "output_path": "Folder of the finished SAE and of training.jsonl. An SAE that is there already is kept under another "
    "name; a folder of other things is refused.",
    "checkpoint_path": "Checkpoints go to a folder of the run's own in here, one folder each, named by the tokens trained on. "
    "None: no checkpoints, not even on SIGTERM or Ctrl-C.",
    "resume_from_checkpoint": "A checkpoint, or a folder of checkpoints, of which the newest is taken. With the flags of the "
    "interrupted run the result is the same, bit for bit on a CPU.",
    "seqpos_slice": "Positions of each row that are trained on, as start, end and step; `1 None` leaves out position 0.",
    "exclude_special_tokens": "true: leave BOS, EOS and padding out. A JSON list such as [0,50256]: these token ids.",
    "n_eval_batches": "Batches of an evaluation while training, held out or (with wandb) SAELens's on the training text.",
    "log_to_wandb": "Log to Weights & Biases; the other options here say how. training.jsonl is written in any case.",
    "log_activations_store_to_wandb": "SAELens has the flag and reads it nowhere.",
    "log_optimizer_state_to_wandb": "Likewise.",
    "log_weights_to_wandb": "Upload the weights with each checkpoint and in the end.",
    "wandb_project": "Project.",
    "wandb_id": "Id of the run; its checkpoints' folder is named by it, logged or not.",
    "run_name": "Name of the run; unless given it is made of architecture, size, rate and tokens.",
    "wandb_entity": "User or team.",
    "wandb_log_frequency": "Steps from one logged line to the next.",
    "eval_every_n_wandb_logs": "Logged lines from one of SAELens's evaluations to the next.",
}


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What is measured while training."""

    record_every: int = 10
    """Steps from one line of training.jsonl (losses and metrics, no wandb needed) to the next."""
    held_out: str | None = None
    """Held-out text, evaluated on while training: as dataset_path. Without it: with the embedded model on its own tokens,
    tokens held out from them; else none."""
    evaluate_every: int = 100
    """Steps from one held-out evaluation to the next; the last step is always evaluated. 0: never."""

    def __post_init__(self) -> None:
        """Refuse steps that cannot be counted."""
        if self.record_every < 1:
            raise ValueError(f"record_every is {self.record_every}; give a positive number of steps")
        if self.evaluate_every < 0:
            raise ValueError(f"evaluate_every is {self.evaluate_every}; give a number of steps, or 0 for never")


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """A command line of `sae-nfm train`, understood."""

    cfg: LanguageModelSAERunnerConfig[Any]
    """SAELens's config, as its own command line would make it."""
    record: RecordConfig
    """What is measured while training."""
    others: OtherSAEs
    """Other SAEs that it is trained from or on."""
    given: frozenset[str]
    """Names of the flags that were given; the others have defaults."""
    argv: tuple[str, ...]
    """The command line after `sae-nfm train`."""


def parse(argv: Sequence[str], *, examples: Sequence[tuple[str, str]] = ()) -> TrainArguments:
    """Understand a command line after `sae-nfm train`.

    Args:
        argv: the command line.
        examples: for the help.

    Raises:
        ValueError: for a flag or value that does not work, in one line.
    """
    underscores = underscored(argv)
    chosen = _chosen(underscores)
    parser = make_parser(chosen.architecture, embedded=chosen.model_name == demo.MODEL_NAME, examples=examples)
    parsed = parser.parse_args(underscores)
    if getattr(parsed.cfg.sae, "matryoshka_widths", None) == []:  # SAELens has no default and refuses to go on
        parsed.cfg.sae.matryoshka_widths = sorted({max(1, parsed.cfg.sae.d_sae // part) for part in (8, 4, 2, 1)})
    given = frozenset(arg[2:].partition("=")[0] for arg in underscores if arg.startswith("--"))
    return TrainArguments(cfg=parsed.cfg, record=parsed.record, others=parsed.others, given=given, argv=tuple(argv))


def _chosen(argv: Sequence[str]) -> argparse.Namespace:
    """The two flags that other defaults depend on."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model_name", nargs="?", default=demo.MODEL_NAME)
    first.add_argument("--architecture", "--sae", nargs="?", default=ARCHITECTURE)
    chosen, _ = first.parse_known_args(argv)
    if chosen.architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"SAELens can train no architecture {chosen.architecture!r}; give one of {', '.join(SAE_TRAINING_CLASS_REGISTRY)}"
        )
    return chosen


def make_parser(
    architecture: str = ARCHITECTURE, *, embedded: bool = True, examples: Sequence[tuple[str, str]] = ()
) -> CommandParser:
    """The parser; defaults and help are for this architecture, on the embedded model or on another."""
    title = f"the SAE ({architecture})"
    parser = CommandParser(
        prog="sae-nfm train",
        usage="%(prog)s [--architecture NAME] [--model_name NAME] [options]",
        description=DESCRIPTION.format(
            architecture=architecture, model="the embedded model" if embedded else "a model given by name"
        ),
        epilog=EPILOG,
        examples=examples,
        sections=SECTIONS | {title: ()} | LATER_SECTIONS,
        titles={
            SAE_TRAINING_CLASS_REGISTRY[architecture][1].__name__: title,
            "LoggingConfig": "Weights & Biases",
        },
        hidden=HIDDEN,
        told=TOLD | {"architecture": f"The SAE's architecture: {', '.join(SAE_TRAINING_CLASS_REGISTRY)}."},
        measured=("d_in", "reshape_activations", "matryoshka_widths"),
        usual=_saelens_defaults(architecture),
    )
    parser.add_arguments(_config_class(embedded, tuple(SAE_TRAINING_CLASS_REGISTRY)), dest="cfg")
    parser.add_arguments(RecordConfig, dest="record")
    parser.add_arguments(OtherSAEs, dest="others")
    return parser


@cache  # simple_parsing reads a class's source once for each field, unless it knows the class
def _config_class(embedded: bool, architectures: tuple[str, ...]) -> type[LanguageModelSAERunnerConfig[Any]]:
    """SAELens's runner config with other defaults; a subgroup for the SAE."""
    ours = {"model_name": demo.MODEL_NAME, **EMBEDDED} if embedded else {}
    sae = SAELENS_SAE | (EMBEDDED_SAE if embedded else {})
    configs = {name: SAE_TRAINING_CLASS_REGISTRY[name][1] for name in architectures}
    choices: dict[str, Any] = {
        # one that stands on another SAE takes its sizes from that
        name: partial(
            config, **{f.name: sae[f.name] for f in fields(config) if f.name in sae and not _has_base(config)}
        )
        for name, config in configs.items()
    }
    types = {f.name: f.type for f in fields(LanguageModelSAERunnerConfig)}
    special = {
        "sae": simple_parsing.subgroups(choices, default=ARCHITECTURE, alias="--architecture", metavar="NAME"),
        "logger": dataclass_field(default_factory=partial(LoggingConfig, log_to_wandb=False)),
        "seqpos_slice": simple_parsing.field(default=(None,), type=_position, nargs="*"),
        "exclude_special_tokens": simple_parsing.field(
            default=ours.get("exclude_special_tokens", False), type=_tokens, metavar="bool|list"
        ),
    }
    if ours:
        special["model_from_pretrained_kwargs"] = dict_field({})  # as it is loaded: nothing folded, nothing centred
    plain = {name: dataclass_field(default=value) for name, value in ours.items() if name not in special}
    types |= {"sae": TrainingSAEConfig, "logger": LoggingConfig}
    return make_dataclass(
        "TrainConfig",
        [(name, types[name], field) for name, field in (special | plain).items()],
        bases=(LanguageModelSAERunnerConfig,),
    )


def _has_base(config: type[TrainingSAEConfig]) -> bool:
    return "base" in {f.name for f in fields(config)}


def _position(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _tokens(text: str) -> bool | list[int]:
    value = json.loads(text.lower())
    if isinstance(value, bool):
        return value
    if isinstance(value, list) and all(isinstance(token, int) for token in value):
        return value
    raise ValueError(text)


def _saelens_defaults(architecture: str) -> dict[str, Any]:
    """Defaults of SAELens's own command line, by field."""
    found: dict[str, Any] = {"architecture": "standard"}
    for config in (LanguageModelSAERunnerConfig, LoggingConfig, SAE_TRAINING_CLASS_REGISTRY[architecture][1]):
        found |= {f.name: f.default for f in fields(config) if f.default is not MISSING}
    return found | SAELENS_SAE


DESCRIPTION = """\
Train an SAE of any architecture that SAELens knows on the activations of a language model. The flags are SAELens's own, those
of `python -m sae_lens.llm_sae_training_runner`; dashes may stand for underscores. Without a flag: joint_nfm on the embedded
model and its tokens, offline, in about a minute.

The defaults below are those for {architecture} on {model}. Others: `sae-nfm train --architecture gated --model_name gpt2 --help`;
on another model than the embedded one they are SAELens's, but for wandb, which is off."""
EPILOG = """\
Ctrl-C or SIGTERM saves a checkpoint and prints the command that goes on from it. Exit status: 0 done, 2 a mistake in the
command (nothing is written), 130 interrupted."""
