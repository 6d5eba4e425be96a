"""Edits: what is changed inside an SAE while it is at work in a language model.

    Edit        what passes one hook point of the SAE, such as the features f at `hook_sae_acts_post`, for all paths
    PairEdit    what one pair of features adds to the pooled vector: f_i f_j v_i*v_j
    ReadEdit    the features as ONE path reads them

Each clamps, scales or adds, at all tokens, at some positions or by a mask; what it is not meant to change keeps its bits.
Several act in the order given: at one hook point each sees what the ones before it left, and a `PairEdit` or a `ReadEdit` the
features as all edits at `hook_sae_acts_post` leave them. `hooks.Splice` has them for an arm, `editing.editing` for a while.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor
from typing_extensions import override

from sae_nfm.common import check_choice
from sae_nfm.interventions.edit_targets import (
    Index,
    Where,
    check_hook_point,
    check_index,
    check_where,
    check_width,
    entries_text,
    where_text,
    width_of,
    with_entries,
)
from sae_nfm.interventions.path_inputs import FEATURES, PATHS, WRITTEN_AT, Path, PathReads, read_by_paths
from sae_nfm.loading import digest

Mode = Literal["clamp", "scale", "add"]


@dataclass(frozen=True, kw_only=True)
class SAEEdit(ABC):
    """A change inside an SAE; what the kinds have in common."""

    mode: Mode
    """ "clamp": `value` in place of what is there; "scale": `value` times it; "add": `value` more."""
    value: float | Tensor
    """A number, or where several entries are edited a vector with one for each."""
    where: Where = None
    """The tokens: None for all; positions in the whole sequence, negative ones counted from the end of the prompt; or a mask
    Bool[rows pos] of the prompt, for one batch. A position beyond the prompt acts once `generate` has reached it."""

    def __post_init__(self) -> None:
        """Refuse what no SAE could take."""
        check_choice("mode", self.mode, get_args(Mode))
        value = torch.as_tensor(self.value)
        if value.ndim > 1 or value.dtype == torch.bool or value.is_complex() or not value.isfinite().all():
            given = self.value if value.ndim == 0 else f"a tensor {tuple(value.shape)} of {value.dtype}"
            raise ValueError(f"value is {given}; give a finite number, or a vector of them")
        check_where(self.where)

    @property
    @abstractmethod
    def hook_point(self) -> str:
        """The hook point of the SAE at which it acts."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """A text that differs where the effect differs."""

    @abstractmethod
    def check(self, sae: SAE[Any]) -> None:
        """Raise a ValueError when the SAE, as it is now, has nothing that this could change."""

    @abstractmethod
    def edited(
        self,
        sae: SAE[Any],
        value: Float[Tensor, "rows here width"],
        reads: PathReads,
        chosen: Bool[Tensor, "rows here"],
    ) -> Float[Tensor, "rows here width"]:
        """What goes on in place of what passes the hook point.

        Args:
            value: what passes, heads flattened.
            reads: what the path `needs` reads in this pass.
            chosen: the tokens to be changed.
        """

    @property
    def needs(self) -> Path | None:
        """The path whose reading of the features it needs to know."""
        return None

    def _applied(self, before: Tensor) -> Tensor:
        """The mode, on numbers whose last dimension is that of the value."""
        value = torch.as_tensor(self.value, dtype=before.dtype, device=before.device)
        if self.mode == "clamp":
            return value.expand_as(before)
        return before * value if self.mode == "scale" else before + value

    def _text(self, of: str) -> str:
        value = f"vector {digest({'': self.value})}" if isinstance(self.value, Tensor) else repr(float(self.value))
        return f"{self.mode} {value} {of}, {where_text(self.where)}"


@dataclass(frozen=True, kw_only=True)
class Edit(SAEEdit):
    """A change of what passes one hook point of an SAE. At `hook_sae_acts_post` it reaches every path.

    Raises:
        ValueError: for an empty or repeated index, or a vector of another length.
    """

    at: str
    """The hook point, by its name on the SAE, such as "hook_sae_acts_post" or "hook_nfm_hidden_pre"."""
    index: Index = None
    """Entries of the last dimension (heads flattened), such as features; None for all."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_index(self.index, self.value)

    @property
    @override
    def hook_point(self) -> str:
        return self.at

    @property
    @override
    def identity(self) -> str:
        return self._text(f"at {self.at}, {entries_text(self.index)}")

    @override
    def check(self, sae: SAE[Any]) -> None:
        check_hook_point(sae, self.at)
        width = width_of(sae, self.at)
        if width is not None:
            check_width(self.at, width, self.index, self.value)

    @override
    def edited(self, sae: SAE[Any], value: Tensor, reads: PathReads, chosen: Tensor) -> Tensor:
        check_width(self.at, value.shape[-1], self.index, self.value)
        return torch.where(chosen[..., None], with_entries(value, self.index, self._applied), value)


@dataclass(frozen=True, kw_only=True)
class PairEdit(SAEEdit):
    """A change of c = f_i f_j, the coefficient of v_i*v_j in the pooled vector; nothing else about the two features changes.

        scale    z + (m - 1) c v_i*v_j        clamp    z + (m - c) v_i*v_j        add    z + m v_i*v_j

    f as the interaction path reads it, zero outside its strongest n (`nfm_top_k`): there c is 0, which scaling leaves at 0.

    Raises:
        ValueError: for a pair that is no pair, or a value that is no number.
    """

    pair: tuple[int, int]
    """Two features, i and j."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.pair) != 2 or self.pair[0] == self.pair[1]:
            raise ValueError(f"pair is {self.pair!r}; give two different features, such as (3, 17)")
        check_index(self.pair, 0.0)
        if torch.as_tensor(self.value).ndim:
            raise ValueError(f"value is a tensor {tuple(torch.as_tensor(self.value).shape)}; give a number for a pair")

    @property
    @override
    def hook_point(self) -> str:
        return WRITTEN_AT["interaction"]

    @property
    @override
    def identity(self) -> str:
        return self._text(f"pair {sorted(self.pair)}")

    @override
    def check(self, sae: SAE[Any]) -> None:
        check_hook_point(read_by_paths(sae), self.hook_point)
        if sae.cfg.head != "fm":
            raise ValueError(f"the SAE's head is {sae.cfg.head!r}, which pools features, not pairs; give head 'fm'")
        check_width(FEATURES, sae.cfg.d_sae, self.pair, self.value)

    @override
    def edited(self, sae: SAE[Any], value: Tensor, reads: PathReads, chosen: Tensor) -> Tensor:
        (i, j), V, read = self.pair, read_by_paths(sae).V, reads["interaction"]
        coefficient = (read[..., i] * read[..., j])[..., None]
        change = (self._applied(coefficient) - coefficient) * (V[i] * V[j])
        return torch.where(chosen[..., None], value + change.to(value.dtype), value)

    @property
    @override
    def needs(self) -> Path:
        return "interaction"


@dataclass(frozen=True, kw_only=True)
class ReadEdit(SAEEdit):
    """A change of the features as one path reads them; what the other paths read stays.

        linear        adds (f'_n - f_n) W_lin            at hook_nfm_linear
        square        adds ((f'^2 - f^2) / c) U          at hook_nfm_square
        interaction   adds z(f'_n) - z(f_n)              at hook_nfm_pooled
        direct        adds what f' - f writes            at hook_sae_recons

    What was read before is what passed `hook_nfm_linear_in` and so on, where an `Edit` of what a path reads acts itself; here
    the difference is added where the path writes, so that tokens which are not chosen keep their bits.

    The path's choice of its n strongest features (`nfm_top_k`) is not made again: a feature outside it is read as 0, so that
    scaling leaves it out, while clamp and add let the path read it beside the n. An `Edit` at `hook_sae_acts_post` is the
    same edit of every path's reading as long as it does not change that choice (always where n is None); where it does, a
    feature it lifts into the n pushes another out, and one that it removes makes room for the next.

    Raises:
        ValueError: for an unknown path, an empty or repeated index, or a vector of another length.
    """

    path: Path
    """The path."""
    index: Index = None
    """Features; None for all."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("path", self.path, PATHS)
        check_index(self.index, self.value)

    @property
    @override
    def hook_point(self) -> str:
        return WRITTEN_AT[self.path]

    @property
    @override
    def identity(self) -> str:
        return self._text(f"as read by the {self.path} path, {entries_text(self.index)}")

    @override
    def check(self, sae: SAE[Any]) -> None:
        if self.path != "direct":
            read_by_paths(sae)
        check_hook_point(sae, self.hook_point)
        check_width(FEATURES, sae.cfg.d_sae, self.index, self.value)

    @override
    def edited(self, sae: SAE[Any], value: Tensor, reads: PathReads, chosen: Tensor) -> Tensor:
        read = reads[self.path]
        after = torch.where(chosen[..., None], with_entries(read, self.index, self._applied), read)
        change = reads.change(sae, self.path, after)
        return torch.where(chosen[..., None], value + change.to(value.dtype), value)

    @property
    @override
    def needs(self) -> Path:
        return self.path
