"""Options that mean the same in every command: its config class inherits those that it has."""

from dataclasses import dataclass

EMBEDDED_MODEL = "sae-nfm-demo"
"""Name of the language model that the package has inside."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The language model and the place in it."""

    model: str = EMBEDDED_MODEL
    """TransformerLens model name or local Hugging Face folder; by default the embedded model."""
    hook: str = "blocks.2.hook_resid_post"
    """Hook point whose activations are reconstructed."""
    device: str = "cpu"
    """Device of the language model and the SAEs."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The text."""

    dataset: str | None = None
    """Training text: a parquet, jsonl or txt file, or a hub data set; by default tokens sampled from the embedded model."""
    held_out: str | None = None
    """Held-out text, likewise; by default a hub data set's validation split, or the embedded tokens."""
