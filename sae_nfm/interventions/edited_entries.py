"""Which entries of what passes a hook point of an SAE an edit changes, and whether the SAE has them."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from sae_nfm.architectures import SECONDARY_HOOKS, NFMPaths

SWITCHES = {
    "hook_nfm_linear": "linear path is switched off (use_linear_path)",
    "hook_nfm_square": "square path is switched off (use_square_path)",
} | dict.fromkeys(
    ("hook_nfm_pooled", "hook_nfm_hidden_pre", "hook_nfm_interaction", *SECONDARY_HOOKS),
    "interaction path is switched off (head 'none')",
)
"""Hook points of paths that can be switched off, and what it says then."""
Index = tuple[int, ...] | None
"""Entries of the last dimension, or all."""


def check_index(index: Index, value: float | Tensor) -> None:
    """Raise a ValueError for entries that cannot be told apart, or a vector that is not one number for each."""
    if index is None:
        return
    if not index or not all(type(entry) is int and entry >= 0 for entry in index) or len(set(index)) < len(index):
        raise ValueError(
            f"index is {index!r}; give different entries, counted from 0, such as (3, 17), or None for all"
        )
    if isinstance(value, Tensor) and value.ndim and len(value) != len(index):
        raise ValueError(f"value has {len(value)} numbers, index has {len(index)} entries; give one number for each")


def entries_text(index: Index) -> str:
    """The entries, in words that tell two choices apart; in their order, since a vector's numbers stand in it."""
    return "all entries" if index is None else f"entries {list(index)}"


def check_width(at: str, width: int, index: Index, value: float | Tensor) -> None:
    """Raise a ValueError for entries beyond what passes a hook point, or a vector of another length."""
    if index is not None and max(index) >= width:
        raise ValueError(f"index has entry {max(index)}, and what passes {at} has {width}, counted from 0")
    if index is None and isinstance(value, Tensor) and value.ndim and len(value) != width:
        raise ValueError(f"value has {len(value)} numbers, and what passes {at} has {width}; give one number for each")


def check_hook_point(sae: SAE[Any], at: str) -> None:
    """Raise a ValueError for a hook point that an SAE, as it is now, lets nothing pass through."""
    if at not in sae.hook_dict:
        if isinstance(sae, NFMPaths) and at in SWITCHES:
            raise ValueError(f"nothing passes {at}: the SAE's {SWITCHES[at]}")
        raise ValueError(f"the SAE has no {at}; it has {', '.join(sae.hook_dict)}")
    secondary = sae.secondary if isinstance(sae, NFMPaths) else None
    if at in SECONDARY_HOOKS and secondary is None:
        raise ValueError(
            f"nothing passes {at}: no secondary SAE is attached; attach one first, with secondary.attach_secondary"
        )
    if at == SECONDARY_HOOKS[2] and secondary is not None and not secondary.error_term:
        raise ValueError(f"nothing passes {at}: the secondary SAE is attached without an error term")


def width_of(sae: SAE[Any], at: str) -> int | None:
    """Numbers a token has at a hook point, heads flattened; None where it is another architecture's own."""
    cfg = sae.cfg
    if at in ("hook_sae_acts_pre", "hook_sae_acts_post"):
        return cfg.d_sae
    if at == "hook_sae_input":
        return cfg.d_in
    if at in ("hook_sae_recons", "hook_sae_error", "hook_sae_output"):
        return getattr(cfg, "d_out", cfg.d_in)
    if not isinstance(sae, NFMPaths):
        return None
    if at == SECONDARY_HOOKS[0]:
        return None if sae.secondary is None else sae.secondary.sae.cfg.d_sae
    if at in ("hook_nfm_pooled", "hook_nfm_hidden_pre", *SECONDARY_HOOKS):
        return sae.cfg.nfm_dim
    return cfg.d_in if at in SWITCHES else None


def with_entries(
    value: Float[Tensor, "*batch width"], index: Index, function: Callable[[Tensor], Tensor]
) -> Float[Tensor, "*batch width"]:
    """A function applied to some entries of the last dimension; the others keep their bits."""
    if index is None:
        return function(value)
    entries = torch.tensor(index, device=value.device)
    return value.index_copy(-1, entries, function(value.index_select(-1, entries)))
