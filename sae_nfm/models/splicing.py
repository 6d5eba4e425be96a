"""How an SAE, or anything else, gets between the modules of a language model of any kind, and off again.

`HookedSAETransformer` and `SAETransformerBridge` attach an SAE themselves; on `HookedProxyLM` a hook runs it. Special tokens
bypass the SAE in one way on all three: their ids are read on the way into the model, and what the SAE was given there is
put back at its output. (SAELens's `exclude_special_tokens` is for the first kind alone, and without effect in `generate`.)
"""

import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, HookedSAETransformer, SAETransformerBridge
from sae_lens.analysis.hooked_sae_transformer import get_deep_attr
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitTrainingSAE
from sae_lens.saes.sae import _disable_hooks  # pyright: ignore[reportPrivateUsage]
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from sae_nfm.models.load import LanguageModel, resolve_hook_name
from sae_nfm.models.tokens_read import TokensRead as TokensRead
from sae_nfm.models.tokens_read import check_counted as check_counted
from sae_nfm.models.tokens_read import counted_tokens as counted_tokens
from sae_nfm.models.tokens_read import is_special as is_special
from sae_nfm.models.tokens_read import special_token_ids as special_token_ids
from sae_nfm.models.tokens_read import token_text as token_text
from sae_nfm.models.tokens_read import tokens_read as tokens_read

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
    model: LanguageModel | None = None
    """The model, which sees to it that the functions are there when it runs; None where an SAE runs by itself."""
    writes: nn.Module | None = None
    """Of a transcoder: what is in the place of the hook point it writes. None of an SAE, which writes what it reads."""

    @contextmanager
    def hooks(self, functions: Mapping[str, HookFunction]) -> Generator[None]:
        """Add functions of (value, hook) to hook points of the SAE, by their names on the SAE, for a while."""
        named = {self.prefix + name: function for name, function in functions.items()}
        with hooked(self.owner, named, self.model):
            yield

    @contextmanager
    def replaced(self, function: HookFunction) -> Generator[None]:
        """Show a function, for a while, what the model computed in the place where the SAE's output goes on."""
        if self.writes is None:
            with self.hooks({"hook_sae_input": function}):
                yield
            return
        handle = self.writes.register_forward_pre_hook(lambda _, given: function(given[0], None))
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def hooked(
    owner: LanguageModel | SAE[Any], functions: Mapping[str, HookFunction], model: LanguageModel | None
) -> Generator[None]:
    """Add functions to hook points for a while; a run of the model that finds one gone is a ValueError."""
    with owner.hooks(fwd_hooks=list[Any](functions.items())):
        if model is None or not functions:
            yield
            return
        points: list[Any] = [_hook_point(owner, name) for name in functions]
        put = [(name, point, point.fwd_hooks[-1]) for name, point in zip(functions, points, strict=True)]

        def missing() -> str | None:
            for name, point, handle in put:
                if _hook_point(owner, name) is not point or all(other is not handle for other in point.fwd_hooks):
                    return f"what an intervention does at {name!r} was taken out"
            return None

        try:
            with _guarded(model, missing):
                yield
        finally:  # also at points that are the model's no more
            for _, point, handle in put:
                handle.hook.remove()
                point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]


@contextmanager
def _guarded(model: LanguageModel, missing: Callable[[], str | None]) -> Generator[None]:
    with tokens_read(model) as read:
        read.guards.append(missing)
        try:
            yield
        finally:
            read.guards.remove(missing)


def _hook_point(owner: Any, name: str) -> Any:
    points = owner._hook_registry if isinstance(owner, SAETransformerBridge) else owner.hook_dict  # pyright: ignore[reportPrivateUsage] (quick)
    return points.get(name)


@contextmanager
def splice(
    model: LanguageModel, sae: SAE[Any], special_tokens: SpecialTokens = "kept", *, use_error_term: bool = False
) -> Generator[Attached]:
    """Put the SAE in place of the hook point its metadata names, by a name of either kind; special tokens bypass it if "kept".

    An SAE of one head (hook_head_index) takes the place of that head; the others keep their bits. A transcoder takes the place
    of what it writes (hook_name_out). With an error term, what is not reconstructed is added, so that only what hooks change
    inside the SAE changes anything.

    Raises a ValueError when the model has no such hook point, or something is in its place already or hooked to it.
    """
    hook_name = sae.cfg.metadata.hook_name
    if hook_name is None:
        raise ValueError("the SAE's metadata has no hook_name, so it is not known where to splice it in; set it")
    if is_transcoder(sae):
        _check_transcoder(model, sae)
        hook_name = str(sae.cfg.metadata.hook_name_out)
    with claimed(model, hook_name) as hook_name:
        if isinstance(model, HookedProxyLM):
            attached = _on_proxy(model, sae, hook_name, use_error_term)
        elif _hook_point(model, hook_name).fwd_hooks:
            raise ValueError(
                f"there are hook functions at {hook_name!r}, which would not run while an SAE is in its place; take them off "
                "(model.reset_hooks()), or add them to the SAE's hook points within the splice"
            )
        elif isinstance(model, SAETransformerBridge):
            attached = _on_bridge(model, sae, hook_name, use_error_term)
        else:
            attached = _on_hooked(model, sae, hook_name, use_error_term)
        with (
            _code_hooked(sae),
            attached as found,
            nullcontext() if special_tokens == "changed" else _bypass(model, found),
        ):
            yield found


def is_transcoder(sae: SAE[Any]) -> bool:
    """Whether an SAE writes another hook point than it reads."""
    metadata = sae.cfg.metadata
    return metadata.hook_name_out not in (None, metadata.hook_name)


def _check_transcoder(model: LanguageModel, sae: SAE[Any]) -> None:
    read = str(sae.cfg.metadata.hook_name)
    if isinstance(model, HookedProxyLM):
        raise ValueError(
            "a transcoder is spliced into a HookedTransformer or a TransformerBridge; load the model as one of these"
        )
    if hasattr(sae, "W_skip") and "hook_skip" not in sae.hook_dict:
        raise ValueError(
            f"SAELens's splice leaves W_skip of the architecture {sae.cfg.architecture()!r} out; train a "
            "joint_nfm_skip_transcoder, whose skip stays"
        )
    if _hook_point(model, resolve_hook_name(model, read)).fwd_hooks:
        raise ValueError(
            f"there are hook functions at {read!r}, which SAELens would take off together with the transcoder that reads there; "
            "take them off (model.reset_hooks())"
        )


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
        with _code_hooked(sae), Attached(owner=sae, prefix="").hooks(hooks):
            return sae.decode(sae.encode(x)).to(x.dtype)
    finally:
        if heads:
            sae.turn_on_forward_pass_hook_z_reshaping()


@contextmanager
def _code_hooked(sae: SAE[Any]) -> Generator[None]:
    """Let the code of SAELens's matching pursuit pass `hook_sae_acts_post`, as every other architecture's does, for a while."""
    if not isinstance(sae, (MatchingPursuitSAE, MatchingPursuitTrainingSAE)) or "encode" in vars(sae):
        yield
        return
    encode: Callable[[Tensor], Tensor] = sae.encode
    sae.encode = lambda x: sae.hook_sae_acts_post(encode(x))
    try:
        yield
    finally:
        del sae.encode


@contextmanager
def _on_hooked(model: HookedSAETransformer, sae: SAE[Any], hook_name: str, use_error_term: bool) -> Generator[Attached]:
    """Attached under the name this kind of model looks for; the SAE flattens heads, also where a bridge did it for it."""
    cfg, flattens = sae.cfg, sae.hook_z_reshaping_mode
    metadata, transcodes = cfg.metadata, is_transcoder(sae)
    given, written = (metadata.hook_name, cfg.reshape_activations), metadata.hook_name_out
    if transcodes:
        metadata.hook_name, metadata.hook_name_out = resolve_hook_name(model, str(metadata.hook_name)), hook_name
    else:
        metadata.hook_name = hook_name
    try:
        if hook_name.endswith("_z") and not flattens and cfg.metadata.hook_head_index is None:
            cfg.reshape_activations = "hook_z"
            sae.turn_on_forward_pass_hook_z_reshaping()
        with model.saes([sae], use_error_term=use_error_term), _in_place(model, sae, hook_name) as writes:
            yield Attached(owner=model, prefix=f"{hook_name}.", model=model, writes=writes)
    finally:
        metadata.hook_name, cfg.reshape_activations = given
        if transcodes:  # an SAE's metadata have no such entry, not even an empty one
            metadata.hook_name_out = written
        if not flattens:
            sae.turn_off_forward_pass_hook_z_reshaping()


@contextmanager
def _on_bridge(model: SAETransformerBridge, sae: SAE[Any], hook_name: str, use_error_term: bool) -> Generator[Attached]:
    conversion = model.hook_dict[hook_name].hook_conversion
    try:
        with model.saes([sae], use_error_term=use_error_term), _in_place(model, sae, hook_name) as writes:
            yield Attached(owner=model, prefix=f"{hook_name}.", model=model, writes=writes)
    finally:
        # SAELens leaves a new hook point behind, under half its name (so that hooks would not be found) and without what
        # tells heads apart.
        left = model.hook_dict[hook_name]
        left.name, left.hook_conversion = hook_name, conversion


@contextmanager
def _in_place(model: Any, sae: SAE[Any], hook_name: str) -> Generator[nn.Module | None]:
    """The SAE that SAELens has attached, on one head where it is of one, and for as long as nobody takes it off.

    What it has put in place, of a transcoder; there SAELens would encode the output where it has not seen the input.
    """
    wrapper, head = get_deep_attr(model, hook_name), sae.cfg.metadata.hook_head_index
    if head is not None:
        of_head: Callable[[Tensor], Tensor] = partial(type(wrapper).forward, wrapper)

        def on_one_head(value: Tensor) -> Tensor:
            return on_head(value, head, sae.cfg.d_in, of_head)

        wrapper.forward = on_one_head

    def missing() -> str | None:
        there = get_deep_attr(model, hook_name) is wrapper
        return None if there else f"the SAE in place of {hook_name!r} was taken out"

    def refuse_unread(_: nn.Module, given: Any) -> None:  # noqa: ARG001
        if wrapper._captured_input is None:
            raise ValueError(
                f"the transcoder has not seen what passes {sae.cfg.metadata.hook_name!r}, which the model did not compute in "
                "this run; give hook points of one block"
            )

    reading = wrapper.register_forward_pre_hook(refuse_unread) if is_transcoder(sae) else None
    try:
        with _guarded(model, missing):
            yield None if reading is None else wrapper
    finally:
        if reading is not None:
            reading.remove()


def on_head(value: Tensor, head: int, d_head: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function applied to one head of activations [rows pos heads d_head], or with heads flattened; others keep their bits."""
    heads = value.unflatten(-1, (-1, d_head)) if value.ndim == 3 else value
    changed = function(heads[:, :, head]).to(value.dtype)
    index = torch.tensor([head], device=value.device)
    return heads.index_copy(2, index, changed[:, :, None]).reshape(value.shape)


@contextmanager
def _on_proxy(model: HookedProxyLM, sae: SAE[Any], hook_name: str, use_error_term: bool) -> Generator[Attached]:
    def run(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        made = sae.decode(sae.encode(value))
        if use_error_term:
            with torch.no_grad(), _disable_hooks(sae):
                error = value - sae.decode(sae.encode(value))
            made = made + sae.hook_sae_error(error)
        return sae.hook_sae_output(made.to(value.dtype))

    with hooked(model, {hook_name: run}, model):
        yield Attached(owner=sae, prefix="", model=model)


def passing(
    model: LanguageModel, hook_name: str, x: Tensor, tokens: Int[Tensor, "rows pos"], names: Sequence[str]
) -> dict[str, Tensor]:
    """What passes hook points of the SAE in place of one, by their names on the model, had it come there with activations x."""
    seen: dict[str, Tensor] = {}
    with tokens_read(model) as read, hooked(model, {name: keeping(seen, name) for name in names}, model):
        read.begin()
        read.enter(tokens, (len(tokens), tokens.shape[1]), 0, None)
        get_deep_attr(model, hook_name)(x)
    return seen


@contextmanager
def _bypass(model: LanguageModel, found: Attached) -> Generator[None]:
    """At special tokens, put what comes into the SAE in place of what comes out."""
    seen: dict[str, Tensor] = {}

    with tokens_read(model) as read:

        def restore(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            read.check_shape(value)
            special = read.special_on(value.device)
            original = seen["original"].reshape(value.shape).to(value.dtype)
            return torch.where(special.reshape(*special.shape, *[1] * (value.ndim - 2)), original, value)

        with found.replaced(keeping(seen, "original")), found.hooks({"hook_sae_output": restore}):
            yield


class SharedPrefix:
    """What a model computes of some rows before interventions act, once for all of them instead of once for each.

        prefix = SharedPrefix(model, [one.hook_name for one in interventions])
        with prefix.shared():
            clean = run_rows(model, rows)
        for one in interventions:
            with one.on(model), prefix.shared(one.hook_name):
                logits = run_rows(model, rows)

    The first run keeps the residual stream after the blocks before each hook point. In those that follow the same blocks hand
    it on in place of computing it: the same bits, everything else as ever. They compute it anew where that is not certain: where
    hooks are on them or they were changed, another input reaches the first of them, or gradients are kept; and in all models
    but a HookedSAETransformer, where more than the residual stream may go from block to block.
    """

    def __init__(self, model: LanguageModel, hook_names: Iterable[str]) -> None:
        self._blocks: list[Any] = list(model.blocks) if isinstance(model, HookedSAETransformer) else []
        self._needed = {_blocks_before(name) for name in hook_names} & set(range(1, len(self._blocks) + 1))
        self._given: list[Any] = []
        """What the first block was given when the others were kept."""
        self._kept: dict[int, tuple[list[Any], Tensor]] = {}
        """After so many blocks: what they consisted of, the residual stream."""

    @contextmanager
    def shared(self, hook_name: str | None = None) -> Generator[None]:
        """Within it the model runs on the rows, whole: with an intervention at that hook point at work already, or without."""
        n, patched = _blocks_before(hook_name or ""), any("forward" in vars(block) for block in self._blocks)
        with ExitStack() as stack:
            if not self._kept and self._needed and not patched:
                stack.callback(self._blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                for needed in self._needed:
                    point = self._blocks[needed - 1].hook_resid_post
                    stack.callback(point.register_forward_pre_hook(self._keep).remove)
            elif n in self._kept and not patched:
                replayed = self._replayed(n)
                for block in self._blocks[:n]:
                    block.__dict__["forward"] = partial(replayed, block)
                    stack.callback(block.__dict__.pop, "forward")
            yield

    def _enter(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        self._given, self._kept = [*args, *kwargs.values()], {}

    def _keep(self, point: Any, args: tuple[Tensor]) -> None:
        n = next(n for n in self._needed if self._blocks[n - 1].hook_resid_post is point)
        if (parts := self._unhooked(n)) is not None:
            self._kept[n] = parts, args[0].clone()

    def _replayed(self, n: int) -> Callable[..., Tensor]:
        (parts, residual), same = self._kept[n], False

        def forward(block: Any, given: Tensor, **kwargs: Any) -> Tensor:
            nonlocal same
            if block is self._blocks[0]:
                pairs = zip([given, *kwargs.values()], self._given, strict=True)
                same = self._unhooked(n) == parts and all(
                    a is b is None or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
                    for a, b in pairs
                )
            if not same:
                return type(block).forward(block, given, **kwargs)
            return block.hook_resid_post(residual.clone()) if block is self._blocks[n - 1] else given

        return forward

    def _unhooked(self, n: int) -> list[Any] | None:
        """What the first n blocks consist of, but for points and the last one's output; None where others' hooks are on them."""
        spared = set(self._blocks[n - 1].hook_resid_post.modules())
        parts = [part for block in self._blocks[:n] for part in block.modules() if part not in spared]
        hooks = [hook for part in parts for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
        if torch.is_grad_enabled() or any(getattr(hook, "__self__", None) is not self for hook in hooks):
            return None
        skipped = (HookPoint, type(self._blocks[0]))
        weights = [w for part in parts for w in part.parameters(recurse=False)]
        return [(id(w), None if w.is_inference() else w._version) for w in weights] + [
            (part, vars(part).get("forward")) for part in parts if type(part) not in skipped
        ]


def _blocks_before(hook_name: str) -> int:
    """How many blocks are done, but for handing on their output, when the turn of a hook point comes; 0 where it is in none."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    return 0 if found is None else int(found[1]) + (found[2] in ("hook_resid_post", "hook_out"))
