"""Options that mean the same in every command: its config class inherits those that it has. Checks of their values."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import isfinite
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


ACTIVATIONS = "activations"
"""Key of an SAE's metadata: the cache that it was trained on, by `data.ActivationCache.name`."""


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Activations that were computed before, for commands that train."""

    activations: str | None = None
    """Folder of `sae-nfm cache`: its activations in place of the model's, its rows in place of a data set. Model, hook point
    and row length are its own."""
    shuffle_rows: bool = False
    """Read the rows of the cache in an order drawn from the seed; else in their own, as without a cache."""


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


WHOLE, REAL, ANY = "(0, 1e9]", "(0, inf)", "(-inf, inf)"
"""Ranges of whole and of other numbers that `RANGES` does not name; and what is finite."""
FROM_0, SHARE, SEED = "[0, inf)", "[0, 1]", f"[0, {2**31 - 1}]"
RANGES = {
    **dict.fromkeys(("training_tokens", "sweep_tokens", "held_out_tokens", "n_tokens"), REAL),
    **dict.fromkeys(
        ("lr", "lr_end", "dead_feature_threshold", "nfm_embedding_init_std", "nfm_weight_init_std", "spread"), FROM_0
    ),
    **dict.fromkeys(("l1_coefficient", "l0_coefficient", "aux_loss_coefficient", "pre_act_loss_coefficient"), FROM_0),
    **dict.fromkeys(
        ("standard_l1", "gated_l1", "jumprelu_l0", "jumprelu_init_threshold", "residual_threshold"), FROM_0
    ),
    **dict.fromkeys(
        ("lr_warm_up_steps", "lr_decay_steps", "l1_warm_up_steps", "l0_warm_up_steps", "warm_up"), "[0, 1e9]"
    ),
    **dict.fromkeys(("n_checkpoints", "dead_feature_window", "hook_head_index", "prefetch_llm_batches"), "[0, 1e9]"),
    **dict.fromkeys(("n_permutations", "sentences", "refinement_steps", "inference_refinement_steps"), "[0, 1e9]"),
    **dict.fromkeys(
        ("evaluate_every", "n_eval_batches", "before", "after", "control_tokens", "quantile_contexts"), "[0, 1e9]"
    ),
    **dict.fromkeys(("pairs", "decoys", "partners", "pair_contexts", "pair_logits", "contexts", "logits"), "[0, 1e9]"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "nfm_dropout", "pair_share", "children"), "[0, 1)"),
    **dict.fromkeys(("activations_mixing_fraction", "topk_threshold_lr", "pair_rate"), SHARE),
    **dict.fromkeys(("seed", "seeds", "sweep_seed"), SEED),
    **dict.fromkeys(("clamps", "absolute"), ANY),
    **dict.fromkeys(("exclude_special_tokens", "sequence_separator_token"), "[0, 1e9]"),
    "zipf_exponent": FROM_0,
    "seqpos_slice": "(-1e9, 1e9)",
    "nfm_top_fraction": "(0, 1]",
}
"""The numbers that settings may be, by name, in every command and config."""


def check_numbers(settings: Any) -> None:
    """Raise a ValueError for the first number out of its range among the fields of a dataclass; a field's default passes."""
    ours = type(settings).__module__.startswith(("sae_nfm.", "sae_lens."))
    for field in fields(settings):
        if getattr(settings, field.name) != field.default:
            check_number(field.name, getattr(settings, field.name), known=ours)


def check_number(name: str, value: Any, *, known: bool = True) -> None:
    """Raise a ValueError where a number, or one of several, is not in the range of that name; anything else passes.

    Unless `known`, as a field of another package's, a number that `RANGES` does not name may be any that is finite.
    """
    for one in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(one, bool) or not isinstance(one, (int, float)):
            continue
        left, low, high, right = re.fullmatch(
            r"([\[(])(.*), (.*)([\])])", RANGES.get(name, ANY if not known else WHOLE if isinstance(one, int) else REAL)
        ).groups()  # pyright: ignore[reportOptionalMemberAccess]
        if not isfinite(one):
            raise ValueError(f"{name} must be a finite number, got {one}")
        too_low = not (one > float(low) or (left == "[" and one == float(low)))
        too_high = not (one < float(high) or (right == "]" and one == float(high)))
        allowed = (
            f"{'>=' if left == '[' else '>'} {low}"
            if too_low
            else f"{'<=' if right == ']' else '<'} {float(high):,.10g}"
        )
        if 0 < float(high) <= 1:
            allowed = f"in {left}{low}, {high}{right}"
        if too_low or too_high:
            raise ValueError(f"{name} must be {allowed}, got {one}")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise a ValueError for a value that is none of the choices."""
    if value not in (known := list(choices)):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
