"""The options of `sae-nfm train`: SAELens's own, for every architecture in its registry, with defaults that work offline.

They are the fields of SAELens's runner config, of the architecture's config and of the logging config, as in SAELens's own
command line (`sae_lens.llm_sae_training_runner`): what a later SAELens or another plugin adds is there without a change.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, replace
from typing import Any

from sae_lens import LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_nfm import demo
from sae_nfm.architectures.joint_config import ARCHITECTURE
from sae_nfm.cli.parser import CommandParser, Option, options_of, respelt, typed
from sae_nfm.common.options import FETCHED_MODEL
from sae_nfm.training.run import (
    SAELENS_SAE,
    TrainArguments,
    defaults,
    option_names,
    train_arguments,
    trainable,
    usual_values,
)

SAE, WANDB = "SAE", "Weights & Biases"
SECTIONS = {
    "model and hook point": (
        *("architecture", "model_name", "model_class_name", "hook_name", "hook_name_out", "hook_head_index", "primary"),
        *("model_from_pretrained_kwargs", "model_kwargs"),
    ),
    "data": (
        *("dataset_path", "context_size", "training_tokens", "exclude_special_tokens", "seqpos_slice", "prepend_bos"),
        *("sequence_separator_token", "disable_concat_sequences", "is_dataset_tokenized", "use_chat_formatting"),
        *(
            "streaming",
            "activations",
            "shuffle_rows",
            "dataset_trust_remote_code",
            "use_cached_activations",
            "cached_activations_path",
        ),
    ),
    SAE: (),
    "training": (
        *("seed", "train_batch_size_tokens", "lr", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps", "lr_end"),
        *("n_restart_cycles", "adam_beta1", "adam_beta2", "n_batches_for_norm_estimate", "dead_feature_window"),
        *("feature_sampling_window", "dead_feature_threshold", "from_pretrained_path", "warm_start"),
    ),
    "outputs, checkpoints, evaluation": (
        *("output_path", "adapter", "checkpoint_path", "n_checkpoints", "save_final_checkpoint"),
        "resume_from_checkpoint",
        *("record_every", "held_out", "evaluate_every", "n_eval_batches", "eval_batch_size_prompts", "verbose"),
    ),
    "device and speed": (
        *("device", "llm_device", "act_store_device", "dtype", "store_batch_size_prompts", "n_batches_in_buffer"),
        *("activations_mixing_fraction", "prefetch_llm_batches", "autocast", "autocast_lm", "compile_llm"),
        *("llm_compilation_mode", "compile_sae", "sae_compilation_mode"),
    ),
    WANDB: (),
}
"""The sections of the help with their options in order; an option that is nowhere stands in that of its class."""
HIDDEN = ("hook_eval", "metadata", "sae_lens_version", "sae_lens_training_version", "base_config", "base_sha256")
"""SAELens flags that have no effect here or are unsupported; they are accepted and not shown."""

TOLD = {
    "model_name": f"The language model: {demo.MODEL_NAME} (embedded in the package, offline), smollm2 (once "
    "`sae-nfm models fetch smollm2` has fetched it), a local Hugging Face folder, or a name on the hub.",
    "model_class_name": "HookedTransformer, TransformerBridge or AutoModelForCausalLM; with the last, hook names are the "
    "module names of Hugging Face.",
    "dataset_path": "Training text or tokens: a .parquet, .arrow, .jsonl, .json, .csv or .txt file (also .gz, .zst), a folder of "
    "them, a data set saved by `datasets`, or a hub name (name or name:config). Without it: the text of their own that the "
    "embedded model and smollm2 have.",
    "seed": "Seed of initialisation and data order, on the CPU and the GPU. (SAELens has the flag and reads it nowhere.)",
    "d_in": "Width of the hook point. It is measured; give it only as a check.",
    "d_out": "Width of what a transcoder writes. It is measured; give it only as a check.",
    "d_sae": "Number of features.",
    "dtype": "Data type of the activations on their way to the SAE; it is not that of the SAE, which --sae.dtype sets.",
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
    "resume_from_checkpoint": "A checkpoint, or a folder of checkpoints, of which the newest of a run with these flags is taken. "
    "The result is that of an uninterrupted run, bit for bit on a CPU. Other flags than the run's are refused, but for outputs, "
    "logging, evaluation and devices, and more training_tokens at a constant rate without decay.",
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
DESCRIPTION = """\
Train an SAE of any architecture that SAELens knows on the activations of a language model. The flags are SAELens's own, those
of `python -m sae_lens.llm_sae_training_runner`; dashes may stand for underscores. Without a flag: joint_nfm on the embedded
model and its tokens, offline, in about a minute.

The defaults below are those for {architecture} on {model}. Others: `sae-nfm train --architecture gated --model_name gpt2 --help`;
on another model than the embedded one and smollm2 they are SAELens's, but for wandb, which is off, a buffer that holds a batch,
and rows no longer than the model reads. SAELens's default trains on special tokens too; those of the two leave them out."""
EPILOG = """\
Ctrl-C or SIGTERM saves a checkpoint and prints the command that goes on from it. Exit status: 0 done, 1 the training
diverged or its data were lost (it says what to do), 2 a mistake in the command (nothing is written), 130 interrupted."""


def make_parser(argv: Sequence[str] = (), *, examples: Sequence[tuple[str, str]] = ()) -> CommandParser:
    """The parser; its options and defaults are for the architecture, which SAELens must know, and the model of `argv`."""
    chosen = _chosen(argv)
    sae_class = trainable(chosen["architecture"])
    architectures = f"The SAE's architecture: {', '.join(SAE_TRAINING_CLASS_REGISTRY)}."
    options = [Option(name="architecture", type=str, default=ARCHITECTURE, help=architectures, aliases=("sae",))]
    for config, names in option_names(sae_class).items():
        section = {sae_class: SAE, LoggingConfig: WANDB}.get(config, "")
        by_field = {option.name: option for option in options_of(config)}
        options += [replace(by_field[name], name=option, section=section) for option, name in names.items()]
    ours = defaults(sae_class, chosen["model_name"], chosen.get("encoder"))
    usual = SAELENS_SAE | {"architecture": "standard"} | usual_values(sae_class, chosen.get("encoder"))

    def build(values: Mapping[str, Any], given: frozenset[str]) -> TrainArguments:
        return train_arguments({name: value for name, value in values.items() if name in given}, argv=argv)

    names = {demo.MODEL_NAME: "the embedded model", FETCHED_MODEL: FETCHED_MODEL}
    model = names.get(chosen["model_name"], "a model given by name")
    return CommandParser(
        prog="sae-nfm train",
        description=DESCRIPTION.format(architecture=chosen["architecture"], model=model),
        epilog=EPILOG,
        examples=examples,
        options=_in_sections([_shown(option, ours, usual) for option in options]),
        build=build,
        underscores=True,
    )


def parse(argv: Sequence[str]) -> TrainArguments:
    """Understand the arguments of `sae-nfm train`; a ValueError of one line for a flag or value that does not work."""
    return make_parser(argv).parse(argv)


def _in_sections(options: Sequence[Option]) -> list[Option]:
    """The options in the order of `SECTIONS`."""
    titles = list(SECTIONS)
    places = {name: (titles.index(title), i) for title, found in SECTIONS.items() for i, name in enumerate(found)}

    def place(option: Option) -> tuple[int, int]:
        return places.get(option.name, (titles.index(option.section) if option.section in titles else len(titles), 0))

    ordered = sorted(options, key=place)
    return [replace(option, section=[*titles, "other"][place(option)[0]]) for option in ordered]


def _chosen(argv: Sequence[str]) -> dict[str, str]:
    """The options that other defaults depend on; "encoder" where it was given."""
    chosen = {"model_name": demo.MODEL_NAME, "architecture": ARCHITECTURE}
    names = {"model_name": ("model",), "architecture": ("sae",), "encoder": ()}
    options = [Option(name=name, type=str, aliases=aliases) for name, aliases in names.items()]
    args, _ = respelt(argv, options, underscores=True)
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag.removeprefix("--") in names and flag.startswith("--") and (equals or i + 1 < len(args)):
            chosen[flag.removeprefix("--")] = value if equals else args[i + 1]
    return chosen


def _shown(option: Option, defaults: Mapping[str, Any], saelens: Mapping[str, Any]) -> Option:
    """An option with our default and help, and with SAELens's default in the help where ours differs."""
    usual = saelens.get(option.name, option.default)
    default, hint, convert, metavar = defaults.get(option.name, option.default), None, None, None
    if option.name in MEASURED:
        hint = ""
    elif usual is not MISSING and default != usual:
        hint = f"(default: {typed(default)}; SAELens's: {typed(usual)})"
    elif option.name in CONVERTED and default not in (None, {}):
        hint = f"(default: {typed(default)})"
    if option.name in CONVERTED:
        convert, metavar = CONVERTED[option.name]
    return replace(
        option,
        default=default,
        help=TOLD.get(option.name, option.help),
        hint=hint,
        convert=convert,
        metavar=metavar,
        aliases=option.aliases or ALIASES.get(option.name, ()),
        hidden=option.name in HIDDEN,
    )


def _tokens(text: str) -> bool | list[int]:
    value = json.loads(text.lower())
    if isinstance(value, bool):
        return value
    if isinstance(value, list) and all(isinstance(token, int) for token in value):
        return value
    raise ValueError(text)


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


CONVERTED = {
    "exclude_special_tokens": (_tokens, "BOOL|LIST"),
    "model_kwargs": (_json_object, "JSON"),
    "model_from_pretrained_kwargs": (_json_object, "JSON"),
    "metadata": (_json_object, "JSON"),
    "base_config": (_json_object, "JSON"),
}
"""Options whose type no command line has: what makes their value of the text, and what stands for it in the help."""
MEASURED = ("d_in", "d_out", "reshape_activations", "matryoshka_widths")
"""Options whose default says nothing, as another value is measured or computed."""
ALIASES = {"model_name": ("model",), "hook_name": ("hook",), "dataset_path": ("dataset",), "output_path": ("output",)}
"""What SAELens's options are called in the other commands."""
