"""Options that mean the same in every command: its config class inherits those that it has. Checks of their values."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

EMBEDDED_MODEL = "sae-nfm-demo"
"""Name of the language model that the package has inside."""
FETCHED_MODEL = "smollm2"
"""Name of the language model that `sae-nfm models fetch smollm2` fetches."""
PACKAGED_SAE = f"{EMBEDDED_MODEL}:blocks.2.hook_resid_post"
"""The SAE that the package has inside, as release:sae_id."""
DEFAULT_HOOKS = {FETCHED_MODEL: "blocks.9.hook_resid_post"}
"""Where SAEs are trained unless told otherwise, by model; in others it is `DEFAULT_HOOK`."""
DEFAULT_HOOK = "blocks.2.hook_resid_post"
SAMPLED = {
    EMBEDDED_MODEL: "The tokens were sampled from the embedded model itself: no evidence about real text.",
    FETCHED_MODEL: "The text was sampled from SmolLM2 itself (answers to prompts, seed 0, temperature 0.8): no evidence about "
    "real text.",
}
"""What is to be said of the text that comes with a model."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The language model and the place in it, for commands that train."""

    model: str = EMBEDDED_MODEL
    """TransformerLens model name, local Hugging Face folder or smollm2 (`sae-nfm models fetch smollm2`); by default the embedded
    model."""
    hook: str | None = None
    """Hook point whose activations are reconstructed; by default blocks.2.hook_resid_post, of smollm2
    blocks.9.hook_resid_post."""
    device: str = "cpu"
    """Device of the language model and the SAEs."""


@dataclass(frozen=True, kw_only=True)
class SavedSAEOptions:
    """The language model, for commands that take a trained SAE, whose metadata name model and hook point."""

    model: str | None = None
    """TransformerLens model name, local Hugging Face folder or smollm2; by default the one in the SAE's metadata."""
    device: str = "cpu"
    """Device of the language model and the SAEs."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The text, for commands that train."""

    dataset: str | None = None
    """Training text or tokens: a .parquet, .arrow, .jsonl, .json, .csv or .txt file (also .gz, .zst), a folder, a data set saved
    by `datasets`, or one on the hub as name or name:config; by default text sampled from the model itself, which the embedded one
    and smollm2 have."""
    held_out: str | None = None
    """Held-out text, likewise; by default the validation or test split of the data set, one document in ten where it has a
    training split only, or the model's own text."""


@dataclass(frozen=True, kw_only=True)
class HeldOutOptions:
    """The text, for commands that take a trained SAE."""

    held_out: str | None = None
    """Held-out text or tokens: a .parquet, .arrow, .jsonl, .json, .csv or .txt file (also .gz, .zst), a folder, a data set on
    disk or on the hub (name or name:config); by default the model's own, which the embedded one and smollm2 have."""
    split: str = "validation"
    """Split of the held-out text, where it has several."""
    context_size: int | None = None
    """Tokens in a row; by default the one in the SAE's metadata."""


def sampled_text(model: str | None, given: str | None) -> str:
    """What is to be said of the text of a run: that it was sampled from the model, where none was `given`; else nothing."""
    return SAMPLED.get(model or "", "") if given is None else ""


def check_positive(settings: Any, *names: str) -> None:
    """Raise a ValueError for the first of these fields that is not > 0; None stands for "off" and passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise a ValueError for a value that is none of the choices."""
    if value not in (known := list(choices)):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
