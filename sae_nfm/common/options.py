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


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The language model and the place in it, for commands that train."""

    model: str = EMBEDDED_MODEL
    """TransformerLens model name or local Hugging Face folder; by default the embedded model."""
    hook: str = "blocks.2.hook_resid_post"
    """Hook point whose activations are reconstructed."""
    device: str = "cpu"
    """Device of the language model and the SAEs."""


@dataclass(frozen=True, kw_only=True)
class SavedSAEOptions:
    """The language model, for commands that take a trained SAE, whose metadata name model and hook point."""

    model: str | None = None
    """TransformerLens model name or local Hugging Face folder; by default the one in the SAE's metadata."""
    device: str = "cpu"
    """Device of the language model and the SAEs."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The text, for commands that train."""

    dataset: str | None = None
    """Training text or tokens: a .parquet, .arrow, .jsonl, .json, .csv or .txt file (also .gz, .zst), a folder, a data set saved
    by `datasets`, or one on the hub as name or name:config; by default tokens sampled from the embedded model."""
    held_out: str | None = None
    """Held-out text, likewise; by default the validation or test split of the data set, one document in ten where it has a
    training split only, or the embedded tokens."""


@dataclass(frozen=True, kw_only=True)
class HeldOutOptions:
    """The text, for commands that take a trained SAE."""

    held_out: str | None = None
    """Held-out text or tokens: a .parquet, .arrow, .jsonl, .json, .csv or .txt file (also .gz, .zst), a folder, a data set on
    disk or on the hub (name or name:config); by default the embedded model's held-out tokens."""
    split: str = "validation"
    """Split of the held-out text, where it has several."""
    context_size: int | None = None
    """Tokens in a row; by default the one in the SAE's metadata."""


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
