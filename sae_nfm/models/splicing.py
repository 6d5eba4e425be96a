"""How an SAE, or anything else, gets between the modules of a language model of any kind, and off again.

`HookedSAETransformer` and `SAETransformerBridge` attach an SAE themselves; on `HookedProxyLM` a hook runs it. Special tokens
bypass the SAE in one way on all three: their ids are read on the way into the model, and what the SAE was given there is
put back at its output. (SAELens's `exclude_special_tokens` is for the first kind alone, and without effect in `generate`.)
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE, HookedSAETransformer, SAETransformerBridge
from sae_lens.load_model import HookedProxyLM
from sae_lens.util import get_special_token_ids
from torch import Tensor, nn

from sae_nfm.models.load import LanguageModel, resolve_hook_name

HookFunction = Callable[..., Tensor | None]
SpecialTokens = Literal["kept", "changed"]
"""Whether special tokens keep their activations, or are treated as all others are."""

_TAKEN: "WeakKeyDictionary[nn.Module, set[str]]" = WeakKeyDictionary()
"""Hook points at which something is in place, by model."""


@dataclass(frozen=True, kw_only=True)
class Attached:
    """An SAE at work in a language model."""

    owner: LanguageModel | SAE[Any]
    """Whose `hooks` reaches the hook points of the SAE."""
    prefix: str
    """What stands before their names there, such as "blocks.2.hook_resid_post."."""

    def hooks(self, functions: Mapping[str, HookFunction]) -> AbstractContextManager[Any]:
        """Add functions of (value, hook) to hook points of the SAE, by their names on the SAE, for a while."""
        named: list[Any] = [(self.prefix + name, function) for name, function in functions.items()]
        return self.owner.hooks(fwd_hooks=named)


@contextmanager
def splice(model: LanguageModel, sae: SAE[Any], special_tokens: SpecialTokens = "kept") -> Generator[Attached]:
    """Put the SAE in place of the hook point its metadata names, by a name of either kind; special tokens bypass it if "kept".

    Raises a ValueError when the model has no such hook point, or something is in its place already.
    """
    hook_name = sae.cfg.metadata.hook_name
    if hook_name is None:
        raise ValueError("the SAE's metadata has no hook_name, so it is not known where to splice it in; set it")
    with claimed(model, hook_name) as hook_name:
        if isinstance(model, HookedProxyLM):
            attached = _on_proxy(model, sae, hook_name)
        elif isinstance(model, SAETransformerBridge):
            attached = _on_bridge(model, sae, hook_name)
        else:
            attached = _on_hooked(model, sae, hook_name)
        with attached as found, nullcontext() if special_tokens == "changed" else _bypass(model, found):
            yield found


@contextmanager
def claimed(model: LanguageModel, hook_name: str) -> Generator[str]:
    """The model's own name of a hook point, which nothing else can take meanwhile; a ValueError where something has taken it."""
    taken = _TAKEN.setdefault(model, set())
    own = hook_name if hook_name in taken else resolve_hook_name(model, hook_name)
    if own in taken:
        raise ValueError(f"an intervention is at work at {hook_name!r} already; leave its context first")
    taken.add(own)
    try:
        yield own
    finally:
        taken.remove(own)


def special_token_ids(model: LanguageModel) -> list[int]:
    """Ids of BOS, EOS, padding and separator tokens of the model's tokenizer; none without a tokenizer."""
    tokenizer: Any = model.tokenizer
    return sorted(get_special_token_ids(tokenizer)) if tokenizer is not None else []


def special_tokens_words(model: LanguageModel, excluded: bool | Sequence[int] | None, otherwise: str) -> str:
    """Which special tokens are left out, in a sentence; `otherwise`: what is done with them where none are."""
    ids = list(special_token_ids(model) if excluded is True else excluded or ())
    if ids:
        named = ", ".join(f"{token_text(model, one)!r} ({one})" for one in ids[:8]) + (", ..." if len(ids) > 8 else "")
        return f"special tokens left out: {named}"
    own = [token_text(model, one) for one in special_token_ids(model)]
    return f"special tokens ({', '.join(map(repr, own[:4])) or 'there are none'}) are not left out, but {otherwise}"


def is_special(model: LanguageModel, tokens: Int[Tensor, "rows pos"]) -> Bool[Tensor, "rows pos"]:
    """True at special tokens (BOS, EOS, padding, separators)."""
    return torch.isin(tokens, torch.tensor(special_token_ids(model), dtype=tokens.dtype, device=tokens.device))


def counted_tokens(model: LanguageModel, tokens: Int[Tensor, "rows pos"]) -> Bool[Tensor, "rows pos"]:
    """True where a token enters the averages: not special (BOS, EOS, padding), not in position 0."""
    mask = ~is_special(model, tokens)
    mask[:, 0] = False
    return mask


def check_counted(counted: Bool[Tensor, "rows pos"]) -> None:
    """Raise a ValueError where `counted_tokens` are none."""
    if not counted.any():
        raise ValueError(f"no tokens to read: all {counted.numel()} are special or at position 0; provide more text")


def token_text(model: LanguageModel, *tokens: int) -> str:
    """The text of some tokens; their numbers where the model has no tokenizer."""
    tokenizer: Any = model.tokenizer
    return " ".join(map(str, tokens)) if tokenizer is None else tokenizer.decode(list(tokens))


@dataclass
class TokensRead:
    """The token ids that went into a model in its last run, with those before them while `generate` goes on."""

    ids: Tensor | None = None

    def on(self, device: torch.device) -> Int[Tensor, "rows pos"]:
        """The ids, on a device."""
        assert self.ids is not None
        return self.ids.to(device)


@contextmanager
def tokens_read(model: LanguageModel) -> Generator[TokensRead]:
    """Read the token ids on their way into the model."""
    entrance: nn.Module
    if isinstance(model, HookedProxyLM):
        entrance = model.model
    else:
        entrance = model.original_model if isinstance(model, SAETransformerBridge) else model.embed
    found = TokensRead()

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
        ids: Tensor = args[0] if args else kwargs["input_ids"]
        before = found.ids
        if before is not None and ids.shape[1] == 1 and len(ids) == len(before):  # `generate` goes on, or may
            ids = torch.cat([before, ids], dim=1)
        found.ids = ids

    handle = entrance.register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def keeping(seen: dict[str, Tensor], name: str) -> HookFunction:
    """A hook function that puts what passes into `seen`, under `name`."""

    def keep(value: Tensor, hook: Any) -> None:  # noqa: ARG001
        seen[name] = value

    return keep


def writing(name: str, vector: Tensor | None) -> HookFunction:
    """A hook function that puts a vector, or zero, in place of what passes at `name`, at every token."""

    def write(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        if vector is None:
            return torch.zeros_like(value)
        if len(vector) != value.shape[-1]:
            raise ValueError(f"the mean for {name} has {len(vector)} entries, what passes there has {value.shape[-1]}")
        return vector.to(value).expand_as(value)

    return write


def reconstruction(sae: SAE[Any], x: Float[Tensor, "*batch d"], hooks: Mapping[str, HookFunction]) -> Tensor:
    """What an SAE makes of activations by itself, at every position, heads flattened, with functions at its hook points."""
    heads = sae.hook_z_reshaping_mode
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        with Attached(owner=sae, prefix="").hooks(hooks):
            return sae.decode(sae.encode(x)).to(x.dtype)
    finally:
        if heads:
            sae.turn_on_forward_pass_hook_z_reshaping()


@contextmanager
def _on_hooked(model: HookedSAETransformer, sae: SAE[Any], hook_name: str) -> Generator[Attached]:
    """Attached under the name this kind of model looks for; the SAE flattens heads, also where a bridge did it for it."""
    cfg, flattens = sae.cfg, sae.hook_z_reshaping_mode
    given = cfg.metadata.hook_name, cfg.reshape_activations
    cfg.metadata.hook_name = hook_name
    try:
        if hook_name.endswith("_z") and not flattens:
            cfg.reshape_activations = "hook_z"
            sae.turn_on_forward_pass_hook_z_reshaping()
        with model.saes([sae], use_error_term=False):
            yield Attached(owner=model, prefix=f"{hook_name}.")
    finally:
        cfg.metadata.hook_name, cfg.reshape_activations = given
        if not flattens:
            sae.turn_off_forward_pass_hook_z_reshaping()


@contextmanager
def _on_bridge(model: SAETransformerBridge, sae: SAE[Any], hook_name: str) -> Generator[Attached]:
    conversion = model.hook_dict[hook_name].hook_conversion
    try:
        with model.saes([sae], use_error_term=False):
            yield Attached(owner=model, prefix=f"{hook_name}.")
    finally:
        # SAELens leaves a new hook point behind, under half its name (so that hooks would not be found) and without what
        # tells heads apart.
        left = model.hook_dict[hook_name]
        left.name, left.hook_conversion = hook_name, conversion


@contextmanager
def _on_proxy(model: HookedProxyLM, sae: SAE[Any], hook_name: str) -> Generator[Attached]:
    def run(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return sae.hook_sae_output(sae.decode(sae.encode(value)).to(value.dtype))

    with model.hooks(fwd_hooks=[(hook_name, run)]):
        yield Attached(owner=sae, prefix="")


@contextmanager
def _bypass(model: LanguageModel, found: Attached) -> Generator[None]:
    """At special tokens, put what comes into the SAE in place of what comes out."""
    seen: dict[str, Tensor] = {}

    with tokens_read(model) as read:

        def restore(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            special = is_special(model, read.on(value.device)[:, -value.shape[1] :])
            original = seen["original"].reshape(value.shape).to(value.dtype)
            return torch.where(special.reshape(*special.shape, *[1] * (value.ndim - 2)), original, value)

        with found.hooks({"hook_sae_input": keeping(seen, "original"), "hook_sae_output": restore}):
            yield
