"""Tokens on their way into a language model: their ids, their places in the whole sequence, and which of them are padding.

    real       no padding: as the attention mask says, else as `real_tokens` infers it from the ids
    place      real tokens before it in its row, those in a cache of keys and values among them
    counted    real, not special (BOS, EOS, padding, separators), not at place 0

A run on a cache goes on where the cache ends; every other run begins at place 0, also one that follows a shorter one. The prompt
is what `generate` was given; outside `generate` the tokens of the run, or on a cache those of the first run on it.
"""

import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import HookedSAETransformer
from sae_lens.load_model import HookedProxyLM
from sae_lens.util import get_special_token_ids
from torch import Tensor, nn
from transformer_lens.utilities.tokenize_utils import get_attention_mask

from sae_nfm.common import ShortRepr
from sae_nfm.models.load import LanguageModel

Mask = Bool[Tensor, "rows pos"]


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


def is_special(model: LanguageModel, tokens: Int[Tensor, "rows pos"]) -> Mask:
    """True at special tokens (BOS, EOS, padding, separators)."""
    return torch.isin(tokens, torch.tensor(special_token_ids(model), dtype=tokens.dtype, device=tokens.device))


def real_tokens(
    model: LanguageModel, tokens: Int[Tensor, "rows pos"], attention_mask: Tensor | None = None
) -> Bool[Tensor, "rows pos"]:
    """True at all tokens but padding: where the attention mask is not 0.

    Without a mask, padding is a run of the tokenizer's padding token at an end of a row. Where that token is BOS, EOS or a
    separator too, which rows of text can begin and end with, it is padding only where some row has two of it at that end, or
    at the left of a tokenizer that pads there; the last one at the left is BOS where every row begins with it. Give the mask
    where rows are padded otherwise.

    Raises:
        ValueError: for a mask of another shape, or one with padding between tokens.
    """
    if attention_mask is not None:
        real = attention_mask.to(tokens.device) != 0
        if real.shape != tokens.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(real.shape)}, the tokens {tuple(tokens.shape)}; give one number for each"
            )
        if (real[:, 1:] & ~real[:, :-1]).sum(1).add(real[:, 0]).gt(1).any():
            raise ValueError("attention_mask has padding between tokens; give rows that are padded at their ends only")
        return real
    tokenizer: Any = model.tokenizer
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or not tokens.numel():
        return torch.ones_like(tokens, dtype=torch.bool)
    is_pad = tokens == pad
    left, right = (is_pad if end == "left" else is_pad.flip(1) for end in ("left", "right"))
    left, right = (run.long().cumprod(1).sum(1) for run in (left, right))
    others = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "sep"))
    if pad in others:
        at_left = tokenizer.padding_side == "left" or int(left.max()) > 1
        begun = int(
            left.min()
        )  # padding and BOS are one id: a batch has a row without padding, whose first token tells
        prepended = getattr(getattr(model, "cfg", None), "default_prepend_bos", True) is not False
        bos = pad == tokenizer.bos_token_id and (begun == 1 or (begun > 1 and prepended))
        left = (left - int(bos)).clamp(min=0) if at_left else torch.zeros_like(left)
        right = right if int(right.max()) > 1 else torch.zeros_like(right)
    column, width = torch.arange(tokens.shape[1], device=tokens.device), tokens.shape[1]
    return (column >= left[:, None]) & (column < width - right[:, None])


def places_of(real: Mask) -> Int[Tensor, "rows pos"]:
    """The number of real tokens before each token."""
    return real.long().cumsum(1) - real.long()


def counted_tokens(
    model: LanguageModel, tokens: Int[Tensor, "rows pos"], attention_mask: Tensor | None = None
) -> Bool[Tensor, "rows pos"]:
    """True where a token enters the averages: real (`real_tokens`), not special, not the first real token of its row."""
    real = real_tokens(model, tokens, attention_mask)
    return real & (places_of(real) > 0) & ~is_special(model, tokens)


def check_counted(counted: Bool[Tensor, "rows pos"]) -> None:
    """Raise a ValueError where `counted_tokens` are none."""
    if not counted.any():
        raise ValueError(f"no tokens to read: all {counted.numel()} are special or at position 0; provide more text")


def check_finite(
    values: Float[Tensor, "tokens *width"], counted: Bool[Tensor, "rows pos"], what: str, first_row: int = 0
) -> None:
    """Raise a ValueError that says at which counted token the values, one of each, are not finite, and of what."""
    bad = ~values.isfinite().flatten(1).all(-1) if values.ndim > 1 else ~values.isfinite()
    if bad.any():
        row, position = counted.nonzero()[bad.nonzero()[0, 0].to(counted.device)].tolist()
        raise ValueError(
            f"{what} are not finite (first at row {first_row + row}, position {position}; {int(bad.sum())} of {len(bad)} tokens)"
            ", so no average over tokens is defined; edit by less, leave it out, or load the model in a type of wider range "
            "(bfloat16, float32)"
        )


def run_rows(
    model: LanguageModel, tokens: Int[Tensor, "rows pos"], real: Bool[Tensor, "rows pos"] | None = None
) -> Tensor:
    """Logits of rows of tokens, padding neither attended to nor counted in positions; `real` as `real_tokens` has it."""
    inferred, tokenizer = real_tokens(model, tokens), model.tokenizer
    real = inferred if real is None else real
    told = torch.equal(real, inferred)
    if isinstance(model, HookedSAETransformer) and tokenizer is not None and tokenizer.padding_side == "left":
        told = told and tokenizer.pad_token_id not in tokens[:, 0].tolist()  # else it makes a mask of its own
    if real.all() and told:
        return model(tokens)
    mask: dict[str, Any] = {"attention_mask": real.long()}
    if not isinstance(model, HookedProxyLM):
        return model(tokens, **mask)
    return model.model(tokens, **mask, **_positions(model.model, real)).logits


def _positions(inner: Any, real: Mask) -> dict[str, Any]:
    """Positions that a Hugging Face model does not take from the attention mask by itself."""
    takes = "position_ids" in inspect.signature(inner.forward).parameters
    return {"position_ids": places_of(real)} if takes else {}


def real_batches(
    model: LanguageModel, tokens: Int[Tensor, "rows pos"], batch_rows: int, attention_mask: Tensor | None = None
) -> Iterator[tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]]:
    """Rows in batches, with their real tokens: these are inferred from all rows together, as `real_tokens` does."""
    real = real_tokens(model, tokens, attention_mask)
    yield from zip(tokens.split(batch_rows), real.split(batch_rows), strict=True)


def token_text(model: LanguageModel, *tokens: int) -> str:
    """The text of some tokens; their numbers where the model has no tokenizer."""
    tokenizer: Any = model.tokenizer
    return " ".join(map(str, tokens)) if tokenizer is None else tokenizer.decode(list(tokens))


@dataclass(eq=False, repr=False)
class TokensRead(ShortRepr):
    """What went into a model in its last run; shared by all contexts of `tokens_read` on one model."""

    model: "ref[LanguageModel]"
    ids: Int[Tensor, "rows here"] | None = None
    """Token ids of the run, those in the cache not among them; None where it was given activations."""
    real: Mask | None = None
    """Which tokens are real, those in the cache before those of the run; None where the run has no rows of tokens."""
    offset: int = 0
    """Tokens in the cache."""
    prompt: int = 0
    """Tokens of the prompt, padding among them."""
    on_cache: bool = False
    """Whether the run has a cache."""
    guards: list[Callable[[], str | None]] = field(default_factory=list[Callable[[], "str | None"]])
    """What must hold when a run begins: each says what does not."""
    inner: nn.Module | None = None
    """The Hugging Face model, where it is one."""
    masking: int = 0
    """How many contexts of `masked_padding` there are."""
    users: int = 0
    leave: ExitStack = field(default_factory=ExitStack)
    _before: Tensor | None = None
    """Ids of the run before."""
    _embedded: Tensor | None = None
    """Ids that were embedded outside of a run, as `HookedTransformer.generate` does."""
    _generating: int | None = None
    """Tokens of the prompt in `generate`, 0 as long as they are not known; None outside."""
    _inside: dict[str, Any] | None = None
    """Arguments of a run of a HookedTransformer that has not embedded its tokens yet."""
    _caches: list[tuple["ref[Any]", int, Mask]] = field(default_factory=list[tuple["ref[Any]", int, Mask]])
    """Prompt and real tokens of each cache that was seen."""

    def ids_on(self, device: torch.device) -> Int[Tensor, "rows here"]:
        """The ids of the run; a ValueError where it was given none."""
        if self.ids is None:
            raise ValueError(
                "special tokens cannot be told, because the model was given activations and no token ids (inputs_embeds, or "
                "start_at_layer without tokens=); give token ids, or special_tokens='changed'"
            )
        return self.ids.to(device)

    def real_on(self, device: torch.device) -> Bool[Tensor, "rows here"]:
        """Which tokens of the run are real."""
        assert self.real is not None
        return self.real[:, self.offset :].to(device)

    def special_on(self, device: torch.device) -> Bool[Tensor, "rows here"]:
        """Which tokens of the run are special, or padding; a ValueError where its ids are needed and not known."""
        model, real = self.model(), self.real_on(device)
        assert model is not None
        return ~real | is_special(model, self.ids_on(device)) if special_token_ids(model) else ~real

    def counted_on(self, device: torch.device) -> Bool[Tensor, "rows here"]:
        """Which tokens of the run are counted; a ValueError as of `special_on`."""
        assert self.real is not None
        return (places_of(self.real)[:, self.offset :] > 0).to(device) & ~self.special_on(device)

    def check_shape(self, value: Tensor) -> None:
        """Raise a ValueError for activations [rows, here, ...] that are not those of the run's tokens."""
        shape = None if self.real is None else (len(self.real), self.real.shape[1] - self.offset)
        if value.shape[:2] != shape:
            raise ValueError(
                f"activations {tuple(value.shape)} are not those of the tokens {shape} that the model read last; while an edit "
                "or a splice is at work, run the SAE in the model only"
            )

    def enter(
        self, ids: Tensor | None, shape: tuple[int, int], offset: int, mask: Tensor | None, cache: Any = None
    ) -> None:
        """A run begins: [rows, here] tokens or activations after `offset` tokens in a cache."""
        (rows, here), model = shape, self.model()
        assert model is not None
        known = next((found for found in self._caches if cache is not None and found[0]() is cache), None)
        known = known if offset and known is not None and len(known[2]) == rows else None
        device = torch.device("cpu") if ids is None else ids.device
        if mask is not None and mask.ndim == 2 and mask.shape[1] >= offset + here:
            real = mask[:, : offset + here] != 0
        else:
            before = torch.ones(rows, offset, dtype=torch.bool, device=device)
            if known is not None and known[2].shape[1] >= offset:
                before = known[2][:, :offset].to(device)
            now = torch.ones(rows, here, dtype=torch.bool, device=device)
            real = torch.cat([before, real_tokens(model, ids) if ids is not None and not offset else now], 1)
        self.ids, self.real, self.offset, self.on_cache = ids, real, offset, cache is not None
        if self._generating is not None:
            self._generating = self.prompt = self._generating or offset + here
        elif known is not None:
            self.prompt = known[1]
        elif cache is not None or not self._grown(ids):
            self.prompt = offset + here
        self.remember(cache)

    def _grown(self, ids: Tensor | None) -> bool:
        """Whether a run without cache is the next of a `generate` that is not `generating`: bound before its tokens were read."""
        before = self._before
        if ids is None or before is None or ids[:, :-1].shape != before.shape or not torch.equal(ids[:, :-1], before):
            return False
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_name not in ("generate", "generate_stream"):
            frame = frame.f_back
        return frame is not None

    def remember(self, cache: Any) -> None:
        """The cache holds this run, too."""
        if cache is None or self.real is None or not hasattr(cache, "__weakref__"):
            return
        others = [found for found in self._caches if (other := found[0]()) is not None and other is not cache]
        self._caches = [*others, (ref(cache), self.prompt, self.real)]

    def begin(self) -> None:
        """A run begins; a ValueError where something that was put in place is not there any more."""
        self._before, self.ids, self.real = None if self.offset else self.ids, None, None
        for guard in self.guards:
            if (missing := guard()) is not None:
                raise ValueError(
                    f"{missing} (by model.reset_hooks(), reset_saes() or add_sae() there, while it was at work), so that this "
                    "run would go without; leave the context and enter it again"
                )

    @contextmanager
    def generating(self, prompt: int) -> Generator[None]:
        """Runs within it go on with one prompt."""
        before, self._embedded = self._generating, None
        self._generating = prompt or before or 0
        try:
            yield
        finally:
            self._generating = before

    def run_hooked(self, run: Callable[..., Any], given: Any, kwargs: dict[str, Any]) -> Any:
        """A run of a HookedTransformer."""
        self.begin()
        if kwargs.get("start_at_layer") is not None:
            if not isinstance(given, Tensor) or given.ndim != 3:
                what = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"type {type(given).__name__}"
                raise ValueError(
                    f"start_at_layer needs the residual stream [rows, pos, d_model]; the input has {what}: give that, or "
                    "leave start_at_layer out"
                )
            cache, ids = kwargs.get("past_kv_cache"), kwargs.get("tokens")
            offset = 0 if cache is None else cache[0].past_keys.shape[1]
            shape = (len(given), given.shape[1])
            if ids is None and kwargs["start_at_layer"] == 0 and self._embedded is not None:
                ids = self._embedded[:, -shape[1] :]  # of what `generate` has embedded, all or the last one
            ids = None if ids is None or ids.shape != shape else ids
            self.enter(ids, shape, offset, kwargs.get("attention_mask"), cache)
            return run(given, **kwargs)
        given, kwargs = self._with_mask(given, kwargs)
        self._inside = kwargs
        try:
            return run(given, **kwargs)
        finally:
            self._inside = None

    def _with_mask(self, given: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Arguments of a run that begins a text, with an attention mask where `masked_padding` is to give one."""
        cache, model = kwargs.get("past_kv_cache", kwargs.get("past_key_values")), self.model()
        ids = isinstance(given, Tensor) and given.ndim == 2 and not given.is_floating_point()
        if (
            model is None
            or not self.masking
            or not ids
            or cache is not None
            or kwargs.get("attention_mask") is not None
        ):
            return given, kwargs
        real = real_tokens(model, given)
        positions = {} if self.inner is None else _positions(self.inner, real)
        return given, kwargs if real.all() else kwargs | {"attention_mask": real.long()} | positions

    def embed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        """A HookedTransformer embeds token ids, in a run or before one."""
        ids: Tensor = args[0] if args else kwargs["tokens"]
        if self._inside is None:
            before = self._embedded
            goes_on = before is not None and ids.shape == (len(before), 1)
            self._embedded = torch.cat([before, ids], 1) if goes_on and before is not None else ids
            return
        given, self._inside, self._embedded, model = self._inside, None, None, self.model()
        cache, mask, tokenizer = (
            given.get("past_kv_cache"),
            given.get("attention_mask"),
            getattr(model, "tokenizer", None),
        )
        offset = 0 if cache is None else cache[0].past_keys.shape[1]
        if mask is None and tokenizer is not None and (cache is not None or tokenizer.padding_side == "left"):
            mask = get_attention_mask(tokenizer, ids, getattr(model, "cfg").default_prepend_bos)  # noqa: B009 (as in the run)
        if mask is not None and cache is not None:
            before = cache.previous_attention_mask
            mask = torch.cat([before[:, :offset].to(mask.device), mask], 1)
        self.enter(ids, (len(ids), ids.shape[1]), offset, mask, cache)

    def run_hf(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A run of a Hugging Face model begins."""
        self.begin()
        if "input_ids" in kwargs or args:
            ids, kwargs = self._with_mask(kwargs.get("input_ids", args[0] if args else None), kwargs)
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given |= given.get("kwargs", {})
        ids, embeds, cache = (given.get(name) for name in ("input_ids", "inputs_embeds", "past_key_values"))
        first = ids if ids is not None else embeds
        if first is None:
            return None
        offset = 0
        if cache is not None:
            offset = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else cache[0][0].shape[-2]
        mask = given.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) else None
        self.enter(ids, (len(first), first.shape[1]), offset, mask, cache)
        return args, kwargs

    def after_hf(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        """It has ended, and may have made a cache."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self.remember(cache)


_READ: "WeakKeyDictionary[nn.Module, TokensRead]" = WeakKeyDictionary()
"""What is read of a model; of a Hugging Face model inside another it is that one's."""


def _run(self: Any, input: Any, **kwargs: Any) -> Any:
    """`HookedSAETransformer.forward`, while its tokens are read (not those of a copy that was made meanwhile)."""
    read, run = _READ.get(self), partial(type(self).forward, self)
    return run(input, **kwargs) if read is None else read.run_hooked(run, input, kwargs)


def _noting_the_prompt(name: str) -> Callable[..., Any]:
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        read, run = _READ.get(self), partial(getattr(type(self), name), self)
        if read is None:
            return run(*args, **kwargs)
        given = [kwargs.get(key) for key in ("inputs_embeds", "input", "inputs", "input_ids")]
        first = next((one for one in (*given, *args[:1]) if one is not None), None)
        prompt = first.shape[min(1, first.ndim - 1)] if isinstance(first, Tensor) else 0
        with read.generating(prompt):
            made = run(*args, **kwargs)
        return _in_steps(read, prompt, made) if inspect.isgenerator(made) else made

    return generate


def _in_steps(read: TokensRead, prompt: int, steps: Any) -> Generator[Any]:
    with read.generating(prompt):
        yield from steps


_GENERATE = {name: _noting_the_prompt(name) for name in ("generate", "generate_stream", "hf_generate")}


@contextmanager
def tokens_read(model: LanguageModel) -> Generator[TokensRead]:
    """Read the tokens on their way into the model, and check as a run begins that what was put in place is there."""
    read = _READ.setdefault(model, TokensRead(model=ref(model)))
    read.users += 1
    if read.users == 1:
        read.leave = _install(model, read)
    try:
        yield read
    finally:
        read.users -= 1
        if not read.users:
            read.leave.close()
            del _READ[model]


@contextmanager
def masked_padding(model: LanguageModel) -> Generator[None]:
    """Within it, rows of token ids that are given to the model without an attention mask get one where they are padded."""
    with tokens_read(model) as read:
        read.masking += 1
        try:
            yield
        finally:
            read.masking -= 1


def _install(model: LanguageModel, read: TokensRead) -> ExitStack:
    """Methods are put into the dictionary of the object, as bound methods, so that a copy of the model has its own."""
    stack, parts = ExitStack(), [model]
    if isinstance(model, HookedSAETransformer):
        stack.callback(model.embed.register_forward_pre_hook(read.embed, with_kwargs=True).remove)
        _put(stack, model, "forward", _run)
    else:
        inner: Any = model.model if isinstance(model, HookedProxyLM) else model.original_model
        stack.callback(inner.register_forward_pre_hook(read.run_hf, with_kwargs=True).remove)
        stack.callback(inner.register_forward_hook(read.after_hf).remove)
        _READ[inner], read.inner = read, inner
        stack.callback(_READ.pop, inner, None)
        parts.append(inner)
    for part in parts:
        for name, method in _GENERATE.items():
            if hasattr(type(part), name):
                _put(stack, part, name, method)
    return stack


def _put(stack: ExitStack, part: nn.Module, name: str, method: Callable[..., Any]) -> None:
    if name not in vars(part):
        vars(part)[name] = MethodType(method, part)
        stack.callback(vars(part).pop, name, None)
