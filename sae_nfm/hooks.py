"""SAEs in place of a hook point, on every kind of language model, taken off again whatever happens.

`HookedSAETransformer` and `SAETransformerBridge` attach an SAE themselves; on `HookedProxyLM` a hook runs it. Special tokens
bypass the SAE in one way on all three: their ids are read on the way into the model, and what the SAE was given there is
put back at its output. (SAELens's `exclude_special_tokens` is for the first kind alone, and without effect in `generate`.)
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE, HookedSAETransformer, SAETransformerBridge
from sae_lens.load_model import HookedProxyLM
from sae_lens.util import get_special_token_ids
from torch import Tensor, nn

from sae_nfm.models import LanguageModel, resolve_hook_name

HookFunction = Callable[..., Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Splice:
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
def splice(model: LanguageModel, sae: SAE[Any]) -> Generator[Splice]:
    """Put the SAE in place of the hook point its metadata names, by a name of either kind; special tokens bypass it.

    Raises:
        ValueError: when the model has no such hook point.
    """
    hook_name = resolve_hook_name(model, sae.cfg.metadata.hook_name)
    if isinstance(model, HookedProxyLM):
        attached, entrance = _on_proxy(model, sae, hook_name), model.model
    elif isinstance(model, SAETransformerBridge):
        attached, entrance = _on_bridge(model, sae, hook_name), model.original_model
    else:
        attached, entrance = _on_hooked(model, sae, hook_name), model.embed
    with attached as found, _bypass(found, entrance, special_token_ids(model)):
        yield found


def special_token_ids(model: LanguageModel) -> list[int]:
    """Ids of BOS, EOS, padding and separator tokens of the model's tokenizer; none without a tokenizer."""
    tokenizer: Any = model.tokenizer
    return sorted(get_special_token_ids(tokenizer)) if tokenizer is not None else []


@contextmanager
def _on_hooked(model: HookedSAETransformer, sae: SAE[Any], hook_name: str) -> Generator[Splice]:
    """Attached under the name this kind of model looks for; the SAE flattens heads, also where a bridge did it for it."""
    cfg, flattens = sae.cfg, sae.hook_z_reshaping_mode
    given = cfg.metadata.hook_name, cfg.reshape_activations
    cfg.metadata.hook_name = hook_name
    try:
        if hook_name.endswith("_z") and not flattens:
            cfg.reshape_activations = "hook_z"
            sae.turn_on_forward_pass_hook_z_reshaping()
        with model.saes([sae], use_error_term=False):
            yield Splice(owner=model, prefix=f"{hook_name}.")
    finally:
        cfg.metadata.hook_name, cfg.reshape_activations = given
        if not flattens:
            sae.turn_off_forward_pass_hook_z_reshaping()


@contextmanager
def _on_bridge(model: SAETransformerBridge, sae: SAE[Any], hook_name: str) -> Generator[Splice]:
    conversion = model.hook_dict[hook_name].hook_conversion
    try:
        with model.saes([sae], use_error_term=False):
            yield Splice(owner=model, prefix=f"{hook_name}.")
    finally:
        # SAELens leaves a new hook point behind, under half its name (so that hooks would not be found) and without what
        # tells heads apart.
        left = model.hook_dict[hook_name]
        left.name, left.hook_conversion = hook_name, conversion


@contextmanager
def _on_proxy(model: HookedProxyLM, sae: SAE[Any], hook_name: str) -> Generator[Splice]:
    def run(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return sae.hook_sae_output(sae.decode(sae.encode(value)).to(value.dtype))

    with model.hooks(fwd_hooks=[(hook_name, run)]):
        yield Splice(owner=sae, prefix="")


@contextmanager
def _bypass(found: Splice, entrance: nn.Module, special: list[int]) -> Generator[None]:
    """At special tokens, put what comes into the SAE in place of what comes out.

    Args:
        found: the attached SAE.
        entrance: a module of the model that is called with the token ids.
        special: token ids.
    """
    seen: dict[str, Tensor] = {}

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
        tokens = args[0] if args else kwargs["input_ids"]
        before = seen.get("tokens")
        if before is not None and tokens.shape[1] == 1 and len(tokens) == len(before):  # `generate` goes on, or may
            tokens = torch.cat([before, tokens], dim=1)
        seen["tokens"] = tokens

    def keep(value: Tensor, hook: Any) -> None:  # noqa: ARG001
        seen["original"] = value

    def restore(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        tokens = seen["tokens"][:, -value.shape[1] :].to(value.device)
        is_special = torch.isin(tokens, torch.tensor(special, dtype=tokens.dtype, device=tokens.device))
        original = seen["original"].reshape(value.shape).to(value.dtype)
        return torch.where(is_special.reshape(*tokens.shape, *[1] * (value.ndim - 2)), original, value)

    handle = entrance.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with found.hooks({"hook_sae_input": keep, "hook_sae_output": restore}):
            yield
    finally:
        handle.remove()
