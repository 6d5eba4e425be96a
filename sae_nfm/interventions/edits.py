"""Edits: what is changed inside an SAE while it is at work in a language model.

    Edit        what passes one hook point of the SAE, such as the features f at `hook_sae_acts_post`, for all paths
    PairEdit    what one pair of features adds to the pooled vector: f_i f_j v_i*v_j
    ReadEdit    the features as ONE path reads them

Each clamps, scales or adds, at all tokens, at some positions or by a mask; what it is not meant to change keeps its bits.
Several act in the order given: at one hook point each sees what the ones before it left, and a `PairEdit` or a `ReadEdit` the
features as all edits at `hook_sae_acts_post` leave them.

    with Splice(sae=sae, edits=[one]).on(model):        # an arm
        with editing(model, sae, [another]):            # and more, for a while; after those of the splice
            logits = model(tokens)

    model.add_sae(sae, use_error_term=True)             # SAELens's own way
    with editing(model, sae, [one]): ...

The clean pass that SAELens's error term is computed from has the hooks switched off, and the edits with them.

    path          reads, at                                   writes (or pools), at
    direct        f      hook_sae_acts_post                   f W_dec          hook_sae_recons
    linear        f_n    hook_nfm_linear_in                   f_n W_lin        hook_nfm_linear
    square        f      hook_nfm_square_in                   (f^2 / c) U      hook_nfm_square
    interaction   f_n    hook_nfm_interaction_in              z                hook_nfm_pooled

f_n are the n largest entries of f (`nfm_top_k`; all where it is None).

Positions are those of the whole sequence, padding left out: position 1 is the second token of each row that is no padding, in one
run as in several on a cache of keys and values. Negative ones are counted from the end of the prompt: what `generate` was
given; outside `generate` the tokens of the run, or on a cache those of the first run on it. Padding is never edited.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import index as whole_number
from typing import Any, Literal, cast, get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float
from sae_lens import SAE, SAETransformerBridge, TrainingSAE
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import _disable_hooks  # pyright: ignore[reportPrivateUsage]
from sae_lens.saes.topk_sae import act_times_W_dec
from torch import Tensor, nn
from typing_extensions import override

from sae_nfm.architectures import SECONDARY_HOOKS, NFMPaths, secondary_of
from sae_nfm.common import ShortRepr, check_choice
from sae_nfm.kernels import BILINEAR, PAIRED, POOLS, reference
from sae_nfm.loading import digest
from sae_nfm.models import Attached, HookFunction, LanguageModel, SpecialTokens, TokensRead, places_of, tokens_read

Path = Literal["direct", "linear", "square", "interaction"]
PATHS: tuple[Path, ...] = get_args(Path)
FEATURES = "hook_sae_acts_post"
READ_AT: dict[Path, str] = {path: FEATURES if path == "direct" else f"hook_nfm_{path}_in" for path in PATHS}
WRITTEN_AT: dict[Path, str] = {
    "direct": "hook_sae_recons",
    "linear": "hook_nfm_linear",
    "square": "hook_nfm_square",
    "interaction": "hook_nfm_pooled",
}
"""Where a change of what a path reads is put into effect: other tokens keep their bits."""

Features = Float[Tensor, "rows pos d_sae"]


class PathReads(dict[Path, Tensor]):
    """What each path reads in one pass through an SAE, [rows, pos, d_sae], after the edits so far: zero where it does not."""

    def change(self, sae: SAE[Any], path: Path, read: Features) -> Float[Tensor, "rows pos width"]:
        """Let a path read other features; what that adds where it writes."""
        before, self[path] = self[path], read
        if path == "direct":
            if not isinstance(sae, NFMPaths):
                rescale = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
                return act_times_W_dec(read - before, sae.W_dec, rescale)
            with _disable_hooks(sae):  # what the direct path is, the architecture says
                return sae.decode_paths(read).direct - sae.decode_paths(before).direct
        sae = read_by_paths(sae)
        if path == "linear":
            return reference.weighted_rows(read - before, sae.W_lin)
        if path == "square":
            c = sae.cfg.square_scale
            return reference.square_output(read, sae.U, c) - reference.square_output(before, sae.U, c)
        pool = POOLS[sae.cfg.head]
        return pool(read, sae.V) - pool(before, sae.V)


def read_by_paths(sae: SAE[Any]) -> NFMPaths:
    """The SAE, when its paths read features in the units of `hook_sae_acts_post`.

    A ValueError for one without an NFM, or one in training that reads them in units of its own.
    """
    if not isinstance(sae, NFMPaths):
        raise ValueError(
            f"an SAE of the architecture {sae.cfg.architecture()!r} has a direct path only; give a joint_nfm or "
            "sequential_nfm SAE"
        )
    if isinstance(sae, TrainingSAE) and hasattr(sae, "nfm_scale"):
        raise ValueError(
            "this SAE is in training and reads features in units of its own (nfm_scale); save it with save_inference_model "
            "and load that"
        )
    return sae


Where = tuple[int, ...] | Tensor | None
"""Tokens by position (or positions), negative ones counted from the end of the prompt; by a mask of the prompt; or all."""


def check_where(where: Any) -> None:
    """Raise a ValueError for tokens that cannot be told."""
    if isinstance(where, Tensor):
        if where.dtype != torch.bool or where.ndim != 2:
            raise ValueError(
                f"where is a tensor {tuple(where.shape)} of {where.dtype}; give a mask of bool, [rows, pos], True where the "
                "edit is to act"
            )
    elif where is not None and (
        not isinstance(where, tuple) or not where or not all(type(position) is int for position in where)
    ):
        raise ValueError(f"where is {where!r}; give positions such as (3, -1), a mask [rows, pos], or None for all")


@dataclass
class TokensInTurn:
    """The tokens whose activations pass, run after run; with special tokens "kept", edits leave those out."""

    read: TokensRead | None = None
    """None where an SAE runs by itself, on whole sequences."""
    special_tokens: SpecialTokens = "changed"

    def chosen(self, where: Where, value: Float[Tensor, "rows here width"]) -> Bool[Tensor, "rows here"]:
        """Whether an edit acts, at the tokens whose activations pass. A ValueError when the prompt lacks some of them."""
        read, device = self.read, value.device
        if read is None:
            whole = torch.ones(value.shape[:2], dtype=torch.bool, device=device)
            return _chosen(where, whole, value.shape[1], on_cache=False)
        read.check_shape(value)
        assert read.real is not None
        mask = _chosen(where, read.real.to(device), read.prompt, on_cache=read.on_cache)[:, read.offset :]
        return mask & ~read.special_on(device) if self.special_tokens == "kept" else mask


def _chosen(where: Where, real: Bool[Tensor, "rows pos"], prompt: int, *, on_cache: bool) -> Bool[Tensor, "rows pos"]:
    """The tokens of whole sequences so far; those of the prompt are the first ones, padding among them."""
    if where is None:
        return real
    if isinstance(where, Tensor):
        rows, width = where.shape
        if rows != len(real) or width < prompt or (width > prompt and not on_cache):
            expected = (len(real), prompt)
            raise ValueError(f"where is a mask {tuple(where.shape)}, expected that of the prompt, {expected}")
        mask = torch.zeros_like(real)
        there = min(width, real.shape[1])
        mask[:, :there] = where[:, :there].to(real.device)
        return mask & real
    lengths = real[:, :prompt].sum(1, keepdim=True)
    if min(where) + int(lengths.min()) < 0:
        short = int(lengths.min())
        raise ValueError(f"where has {min(where)}, the prompt has {short} tokens; give positions from {-short}")
    positions = torch.tensor(where, device=real.device)
    wanted = torch.where(positions < 0, positions + lengths, positions)
    return (places_of(real)[..., None] == wanted[:, None]).any(-1) & real


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


def _as_tuple(given: Any) -> Any:
    """One number, or a list, range, array or tensor of them, as a tuple; anything else as it is, to be refused."""
    if given is None or isinstance(given, (bool, str)) or (isinstance(given, Tensor) and given.dtype == torch.bool):
        return given
    several = given.tolist() if isinstance(given, (Tensor, np.ndarray)) else given
    with suppress(TypeError):
        return (
            (whole_number(several),)
            if not isinstance(several, Iterable)
            else tuple(map(whole_number, cast(Any, several)))
        )
    return given


def check_index(index: Any, value: float | Tensor) -> None:
    """Raise a ValueError for entries that cannot be told apart, or a vector that is not one number for each."""
    if index is None:
        return
    if (
        not isinstance(index, tuple)
        or not index
        or not all(type(entry) is int and entry >= 0 for entry in index)
        or len(set(index)) < len(index)
    ):
        raise ValueError(f"index is {index!r}; give different entries from 0 up, such as (3, 17), or None for all")
    if isinstance(value, Tensor) and value.ndim and len(value) != len(index):
        raise ValueError(f"value has {len(value)} numbers, index has {len(index)} entries; give one number for each")


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
        raise ValueError(f"nothing passes {at}: no secondary SAE is attached; attach one first (attach_secondary)")
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
    return getattr(cfg, "d_out", cfg.d_in) if at in SWITCHES or at == "hook_skip" else None


def with_entries(
    value: Float[Tensor, "*batch width"], index: Index, function: Callable[[Tensor], Tensor]
) -> Float[Tensor, "*batch width"]:
    """A function applied to some entries of the last dimension; the others keep their bits."""
    if index is None:
        return function(value)
    entries = torch.tensor(index, device=value.device)
    return value.index_copy(-1, entries, function(value.index_select(-1, entries)))


def _entries(index: Index) -> str:
    return "all entries" if index is None else f"entries {list(index)}"


Mode = Literal["clamp", "scale", "add"]


@dataclass(frozen=True, kw_only=True, repr=False)
class SAEEdit(ShortRepr, ABC):
    """A change inside an SAE; what the kinds have in common."""

    mode: Mode
    """ "clamp": `value` in place of what is there; "scale": `value` times it; "add": `value` more."""
    value: float | Tensor
    """A number, or where several entries are edited a vector with one for each."""
    where: Where = None
    """The tokens: None for all; positions in the whole sequence, padding left out, negative ones counted from the end of the
    prompt; or a mask Bool[rows pos] of the prompt, for one batch. A position beyond the prompt acts once it is reached."""

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        value = torch.as_tensor(self.value)
        if value.ndim > 1 or value.dtype == torch.bool or value.is_complex() or not value.isfinite().all():
            given = self.value if value.ndim == 0 else f"a tensor {tuple(value.shape)} of {value.dtype}"
            raise ValueError(f"value is {given}; give a finite number, or a vector of them")
        object.__setattr__(self, "where", _as_tuple(self.where))
        check_where(self.where)

    @property
    def hook_point(self) -> str:
        """The hook point of the SAE at which it acts."""
        assert self.needs is not None
        return WRITTEN_AT[self.needs]

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
        """What goes on in place of what passes the hook point, heads flattened, at the chosen tokens.

        `reads` has what the path `needs` reads in this pass.
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
        if isinstance(self.where, Tensor):
            tokens = f"mask {digest({'': self.where})}"
        else:
            tokens = "all tokens" if self.where is None else f"positions {sorted(self.where)}"
        return f"{self.mode} {value} {of}, {tokens}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Edit(SAEEdit):
    """A change of what passes one hook point of an SAE. At `hook_sae_acts_post` it reaches every path.

        Edit(at="hook_sae_acts_post", index=7, mode="clamp", value=10.0)             # feature 7 at 10, at all tokens
        Edit(at="hook_nfm_interaction", mode="scale", value=0.0, where=(1, -1))      # no interaction, at two tokens

    Args:
        at: hook point, by its name on the SAE.
        index: entries of the last dimension, one or several; None for all.
        mode: "clamp", "scale" or "add".
        value: a number, or a vector with one for each entry.
        where: positions, padding left out and negative ones from the end of the prompt; a mask [rows, pos]; None for all.
    """

    at: str
    """The hook point, by its name on the SAE, such as "hook_sae_acts_post" or "hook_nfm_hidden_pre"."""
    index: Index = None
    """Entries of the last dimension (heads flattened), such as features: one, or several; None for all."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "index", _as_tuple(self.index))
        check_index(self.index, self.value)

    @property
    @override
    def hook_point(self) -> str:
        return self.at

    @property
    @override
    def identity(self) -> str:
        return self._text(f"at {self.at}, {_entries(self.index)}")

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


@dataclass(frozen=True, kw_only=True, repr=False)
class PairEdit(SAEEdit):
    """A change of c = f_i f_j, the coefficient of v_i*v_j in the pooled vector; nothing else about the two features changes.

    With head "bilinear" the coefficient of a_i*b_j + a_j*b_i; and, of a feature with itself, of f_i^2 that of a_i*b_i.

        scale    z + (m - 1) c v_i*v_j        clamp    z + (m - c) v_i*v_j        add    z + m v_i*v_j

        PairEdit(pair=(3, 17), mode="scale", value=0.0)      # the pair taken out

    f as the interaction path reads it, zero outside its strongest n (`nfm_top_k`): there c is 0, which scaling leaves at 0.
    """

    pair: tuple[int, int]

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pair", _as_tuple(self.pair))
        if len(self.pair) != 2:
            raise ValueError(f"pair is {self.pair!r}; give two features, such as (3, 17)")
        check_index(self.pair if self.pair[0] != self.pair[1] else self.pair[:1], 0.0)
        if torch.as_tensor(self.value).ndim:
            raise ValueError(f"value is a tensor {tuple(torch.as_tensor(self.value).shape)}; give a number for a pair")

    @property
    @override
    def identity(self) -> str:
        return self._text(f"pair {sorted(self.pair)}")

    @override
    def check(self, sae: SAE[Any]) -> None:
        check_hook_point(read_by_paths(sae), self.hook_point)
        if sae.cfg.head not in PAIRED:
            raise ValueError(
                f"the SAE's head is {sae.cfg.head!r}, which pools features, not pairs; give head 'fm' or 'bilinear'"
            )
        if sae.cfg.head != BILINEAR and self.pair[0] == self.pair[1]:
            raise ValueError(
                f"pair is {self.pair!r}, and the SAE's head {sae.cfg.head!r} has no squares of single features; give two "
                "different features, such as (3, 17)"
            )
        check_width(FEATURES, sae.cfg.d_sae, self.pair, self.value)

    @override
    def edited(self, sae: SAE[Any], value: Tensor, reads: PathReads, chosen: Tensor) -> Tensor:
        (i, j), V, read = self.pair, read_by_paths(sae).V, reads["interaction"]
        coefficient = (read[..., i] * read[..., j])[..., None]
        if sae.cfg.head == BILINEAR:
            A, B = V.chunk(2, dim=-1)
            unit = A[i] * B[j] + A[j] * B[i] if i != j else A[i] * B[i]
        else:
            unit = V[i] * V[j]
        change = (self._applied(coefficient) - coefficient) * unit
        return torch.where(chosen[..., None], value + change.to(value.dtype), value)

    @property
    @override
    def needs(self) -> Path:
        return "interaction"


@dataclass(frozen=True, kw_only=True, repr=False)
class ReadEdit(SAEEdit):
    """A change of the features as one path reads them; what the other paths read stays.

        linear        adds (f'_n - f_n) W_lin            at hook_nfm_linear
        square        adds ((f'^2 - f^2) / c) U          at hook_nfm_square
        interaction   adds z(f'_n) - z(f_n)              at hook_nfm_pooled
        direct        adds what f' - f writes            at hook_sae_recons

        ReadEdit(path="linear", index=7, mode="clamp", value=10.0)

    What was read before is what passed `hook_nfm_linear_in` and so on, where an `Edit` of what a path reads acts itself; here
    the difference is added where the path writes, so that tokens which are not chosen keep their bits.

    The path's choice of its n strongest features (`nfm_top_k`) is not made again: a feature outside it is read as 0, so that
    scaling leaves it out, while clamp and add let the path read it beside the n. An `Edit` at `hook_sae_acts_post` is the
    same edit of every path's reading as long as it does not change that choice (always where n is None); where it does, a
    feature it lifts into the n pushes another out, and one that it removes makes room for the next.
    """

    path: Path
    index: Index = None
    """Features; None for all."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("path", self.path, PATHS)
        object.__setattr__(self, "index", _as_tuple(self.index))
        check_index(self.index, self.value)

    @property
    @override
    def identity(self) -> str:
        return self._text(f"as read by the {self.path} path, {_entries(self.index)}")

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


READS = "sae_nfm path reads"
"""Key in the context of the hook point of the features: what the paths read in this pass."""
PATH_READ_AT: dict[str, Path] = {point: path for path, point in READ_AT.items()}
_SPLICED: "WeakKeyDictionary[nn.Module, list[tuple[SAE[Any], Attached]]]" = WeakKeyDictionary()
"""SAEs that a `Splice` has put into a model."""


@contextmanager
def editing(
    model: LanguageModel, sae: SAE[Any], edits: Sequence[SAEEdit], *, special_tokens: SpecialTokens = "kept"
) -> Generator[None]:
    """Edit an SAE that is at work in a model already, by `Splice` or the model's own `add_sae`.

    Contexts nest: edits of the inner one act after those of the outer one. Features in the trace of a splice are those before
    an inner context's edits. With special_tokens "kept", edits leave special tokens out, also where the SAE does not.

    Args:
        sae: the SAE itself, not a copy.
        edits: in the order in which they act.

    Raises:
        ValueError: when the SAE is not at work in the model, or has nothing that an edit could change.
    """
    with at_work(model, sae, _attached(model, sae), edits, special_tokens):
        yield


@contextmanager
def at_work(
    model: LanguageModel, sae: SAE[Any], found: Attached, edits: Sequence[SAEEdit], special_tokens: SpecialTokens
) -> Generator[None]:
    """Edits in an SAE whose hook points are known; inner contexts of `editing` find it. Raises as `hook_functions`."""
    spliced, entry = _SPLICED.setdefault(model, []), (sae, found)
    spliced.append(entry)
    try:
        with tokens_read(model) as read:
            tokens = TokensInTurn(read=read, special_tokens=special_tokens)
            with found.hooks(hook_functions(sae, edits, tokens)):
                yield
    finally:
        spliced.remove(entry)
        sae.hook_sae_acts_post.ctx.pop(READS, None)


def hook_functions(sae: SAE[Any], edits: Sequence[SAEEdit], tokens: TokensInTurn) -> dict[str, HookFunction]:
    """Functions that make edits, by hook point of an SAE. A ValueError when the SAE has nothing that an edit could change.

    Where what a path reads is edited or needed, the last thing done at its hook point is to note it for those who need it: in
    nested contexts the innermost notes it as the path gets it.
    """
    by_point = defaultdict[str, list[SAEEdit]](list)
    for edit in edits:
        edit.check(sae)
        by_point[edit.hook_point].append(edit)
    for edit in edits:
        if edit.needs is not None:
            by_point[READ_AT[edit.needs]]  # an empty list, where none is there
    return {point: _in_turn(sae, point, several, tokens) for point, several in by_point.items()}


def _in_turn(sae: SAE[Any], point: str, edits: Sequence[SAEEdit], tokens: TokensInTurn) -> HookFunction:
    def edit_all(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        context, edited = sae.hook_sae_acts_post.ctx, (value.to_dense() if value.is_sparse else value).flatten(2)
        reads: PathReads = context.setdefault(READS, PathReads())
        for edit in edits:
            if edit.needs is not None and edit.needs not in reads:
                raise ValueError(f"{edit.identity!r} needs the features of the same pass; call encode before decode")
            edited = edit.edited(sae, edited, reads, tokens.chosen(edit.where, edited))
        if point in PATH_READ_AT:
            reads[PATH_READ_AT[point]] = edited
        return edited.reshape(value.shape)

    return edit_all


def _attached(model: LanguageModel, sae: SAE[Any]) -> Attached:
    for other, found in reversed(_SPLICED.get(model, [])):
        if other is sae:
            return found
    metadata = sae.cfg.metadata
    if not isinstance(model, HookedProxyLM) and any(other is sae for other in model.acts_to_saes.values()):
        if metadata.hook_head_index is not None:
            raise ValueError(
                f"the SAE is of head {metadata.hook_head_index} of {metadata.hook_name!r}, and add_sae puts it in place of all "
                "heads; use Splice(sae=sae).on(model), which leaves the others as they are"
            )
        if isinstance(model, SAETransformerBridge):
            return Attached(owner=model, prefix=model.get_sae_hook_name(sae, ""), model=model)
        return Attached(owner=model, prefix=f"{metadata.hook_name_out or metadata.hook_name}.", model=model)
    raise ValueError(
        f"the SAE for {metadata.hook_name!r} is not at work in this model; put it there first, with "
        "hooks.Splice(sae=sae).on(model) or model.add_sae(sae)"
    )
