"""Which tokens an edit changes: all, some positions, or those of a mask, also while `generate` goes on.

Positions are those of the whole sequence. In `generate` the first run's tokens are the prompt; with a cache of keys and values
the later runs carry one token each, without one the sequence so far and one more. Either way a run whose tokens are those of
the run before and one more goes on with the same prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_nfm.architectures import SECONDARY_HOOKS, NFMPaths, secondary_of
from sae_nfm.loading import digest
from sae_nfm.models import LanguageModel, SpecialTokens, TokensRead, is_special

Where = tuple[int, ...] | Tensor | None
"""Tokens by position, negative ones counted from the end of the prompt; by a mask, Bool[rows pos] of the prompt; or all."""


def check_where(where: Where) -> None:
    """Raise a ValueError for tokens that cannot be told."""
    if isinstance(where, Tensor):
        if where.dtype != torch.bool or where.ndim != 2:
            raise ValueError(
                f"where is a tensor {tuple(where.shape)} of {where.dtype}; give a mask of bool, [rows, pos], True where the "
                "edit is to act"
            )
    elif where is not None and (not where or not all(type(position) is int for position in where)):
        raise ValueError(
            f"where is {where!r}; give positions such as (3, -1), a mask [rows, pos], or None for all tokens"
        )


def where_text(where: Where) -> str:
    """The tokens, in words that tell two choices apart."""
    if where is None:
        return "all tokens"
    return f"mask {digest({'': where})}" if isinstance(where, Tensor) else f"positions {sorted(where)}"


@dataclass
class TokensInTurn:
    """What is known of the tokens whose activations pass, run after run."""

    model: LanguageModel | None = None
    """The model; None where an SAE runs by itself, on whole sequences."""
    read: TokensRead | None = None
    """The ids that went into it."""
    special_tokens: SpecialTokens = "changed"
    """Whether edits leave special tokens out."""
    _before: Int[Tensor, "rows pos"] | None = field(default=None, init=False)
    _prompt: int = field(default=0, init=False)

    def chosen(self, where: Where, value: Float[Tensor, "rows here width"]) -> Bool[Tensor, "rows here"]:
        """Whether an edit acts, at the tokens whose activations pass.

        Raises:
            ValueError: when the tokens of the prompt do not include what was asked for.
        """
        rows, here = value.shape[:2]
        ids = None if self.read is None else self.read.on(value.device)
        if ids is not None and (len(ids) != rows or ids.shape[1] < here):
            raise ValueError(
                f"activations {tuple(value.shape)} are not those of the tokens {tuple(ids.shape)} that the model read last; "
                "while an edit is at work, run the SAE in the model only"
            )
        length = here if ids is None else ids.shape[1]
        mask = self._mask(where, rows, length, self._prompt_of(ids, length), value.device)
        if ids is not None and self.model is not None and self.special_tokens == "kept":
            mask = mask & ~is_special(self.model, ids)
        return mask[:, length - here :]

    def _prompt_of(self, ids: Int[Tensor, "rows pos"] | None, length: int) -> int:
        """How many tokens the prompt has."""
        before, self._before = self._before, ids
        goes_on = (
            ids is not None
            and before is not None
            and len(before) == len(ids)
            and before.shape[1] in (length, length - 1)
            and torch.equal(before, ids[:, : before.shape[1]])
        )
        if not goes_on:
            self._prompt = length
        return self._prompt

    @staticmethod
    def _mask(where: Where, rows: int, length: int, prompt: int, device: torch.device) -> Bool[Tensor, "rows pos"]:
        if where is None:
            return torch.ones(rows, length, dtype=torch.bool, device=device)
        mask = torch.zeros(rows, length, dtype=torch.bool, device=device)
        if isinstance(where, Tensor):
            if where.shape != (rows, prompt):
                raise ValueError(
                    f"where is a mask of {tuple(where.shape)} tokens, the prompt has {(rows, prompt)}; give a mask of its shape"
                )
            mask[:, :prompt] = where.to(device)
            return mask
        positions = [position + prompt if position < 0 else position for position in where]
        if min(positions) < 0:
            raise ValueError(
                f"where has position {min(where)}, and the prompt has {prompt} tokens; give positions from {-prompt}"
            )
        mask[:, [position for position in positions if position < length]] = True
        return mask


SWITCHES = {
    **dict.fromkeys(("hook_nfm_linear_in", "hook_nfm_linear"), "linear path is switched off (use_linear_path)"),
    **dict.fromkeys(("hook_nfm_square_in", "hook_nfm_square"), "square path is switched off (use_square_path)"),
    **dict.fromkeys(
        (*(f"hook_nfm_{at}" for at in ("interaction_in", "pooled", "hidden_pre", "interaction")), *SECONDARY_HOOKS),
        "interaction path is switched off (head 'none')",
    ),
}
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
    secondary = secondary_of(sae)
    if at in SECONDARY_HOOKS and secondary is None:
        raise ValueError(
            f"nothing passes {at}: no secondary SAE is attached; attach one first, with secondary.attach_secondary"
        )
    if at == SECONDARY_HOOKS[2] and secondary is not None and not secondary.error_term:
        raise ValueError(f"nothing passes {at}: the secondary SAE is attached without an error term")


def width_of(sae: SAE[Any], at: str) -> int | None:
    """Numbers a token has at a hook point, heads flattened; None where it is another architecture's own."""
    cfg = sae.cfg
    if at in ("hook_sae_acts_pre", "hook_sae_acts_post") or (at.startswith("hook_nfm_") and at.endswith("_in")):
        return cfg.d_sae
    if at == "hook_sae_input":
        return cfg.d_in
    if at in ("hook_sae_recons", "hook_sae_error", "hook_sae_output"):
        return getattr(cfg, "d_out", cfg.d_in)
    if not isinstance(sae, NFMPaths):
        return None
    if at == SECONDARY_HOOKS[0]:
        return None if (attached := secondary_of(sae)) is None else attached.sae.cfg.d_sae
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
