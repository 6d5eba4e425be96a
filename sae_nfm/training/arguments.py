"""What `sae-nfm train` is asked to do: SAELens's config of a run, what is recorded, and other SAEs that it starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata

from sae_nfm import demo
from sae_nfm.architectures.joint_config import ARCHITECTURE
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


def trainable(architecture: str) -> type[TrainingSAEConfig]:
    """The config class of an architecture.

    Raises:
        ValueError: for one that SAELens does not know.
    """
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"SAELens can train no architecture {architecture!r}; give one of {', '.join(SAE_TRAINING_CLASS_REGISTRY)}"
        )
    return SAE_TRAINING_CLASS_REGISTRY[architecture][1]


def option_names(sae_class: type[TrainingSAEConfig]) -> dict[type, dict[str, str]]:
    """The fields of each config class of a run, by the names of their options: "sae.dtype" where the run has a dtype too."""
    run = [f.name for f in fields(LanguageModelSAERunnerConfig) if f.name not in ("sae", "logger")]
    names = {config: {f.name: f.name for f in fields(config)} for config in (LoggingConfig, RecordConfig, OtherSAEs)}
    of_sae = {f"sae.{f.name}" if f.name in run else f.name: f.name for f in fields(sae_class) if f.init}
    return {LanguageModelSAERunnerConfig: {name: name for name in run}, sae_class: of_sae} | names


def defaults(sae_class: type[TrainingSAEConfig], model_name: str) -> dict[str, Any]:
    """Our defaults by option, where SAELens has others or none."""
    embedded = model_name == demo.MODEL_NAME
    ours: dict[str, Any] = {"log_to_wandb": False}
    if embedded:  # the model as it is loaded: nothing folded, nothing centred
        ours |= {"model_name": demo.MODEL_NAME, "model_from_pretrained_kwargs": {}} | EMBEDDED
    names = {f.name for f in fields(sae_class)}
    if "base" not in names:  # one that stands on another SAE takes its sizes from that
        sae = SAELENS_SAE | (EMBEDDED_SAE if embedded else {})
        ours |= {name: value for name, value in sae.items() if name in names}
    return ours


def train_arguments(given: Mapping[str, Any], *, argv: Sequence[str]) -> TrainArguments:
    """What `sae-nfm train` does with these options.

    Args:
        given: values by option, as in `option_names`, "architecture" too; the others have defaults.
        argv: the same as arguments of the command.

    Raises:
        ValueError: for an option or value that does not work.
    """
    sae_class = trainable(given.get("architecture", ARCHITECTURE))
    names = option_names(sae_class)
    unknown = set(given).difference(("architecture",), *names.values())
    if unknown:
        raise ValueError(f"`sae-nfm train` has no option {sorted(unknown)[0]}; `sae-nfm train --help` has every option")
    values = defaults(sae_class, given.get("model_name", demo.MODEL_NAME)) | dict(given)
    built: dict[type, dict[str, Any]] = {}
    for config, options in names.items():
        hints = get_type_hints(config)
        found = {option: name for option, name in options.items() if option in values}
        built[config] = {name: _checked(option, hints[name], values[option]) for option, name in found.items()}
    if "matryoshka_widths" in names[sae_class] and not built[sae_class].get(
        "matryoshka_widths"
    ):  # SAELens has no default
        built[sae_class]["matryoshka_widths"] = sorted({max(1, values["d_sae"] // part) for part in (8, 4, 2, 1)})
    return TrainArguments(
        cfg=LanguageModelSAERunnerConfig(
            sae=sae_class(**built[sae_class]),
            logger=LoggingConfig(**built[LoggingConfig]),
            **built[LanguageModelSAERunnerConfig],
        ),
        record=RecordConfig(**built[RecordConfig]),
        others=OtherSAEs(**built[OtherSAEs]),
        given=frozenset(given),
        argv=tuple(argv),
    )


def _checked(option: str, hint: Any, value: Any) -> Any:
    """A value of the type that it should have."""
    if hint is SAEMetadata:
        return SAEMetadata(**value)
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{option} is {value!r}: {error.errors()[0]['msg']}") from error
