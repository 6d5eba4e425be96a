"""Interventions: what is done to a language model's activations while it runs, on every kind of model.

    Splice         an SAE in place of a hook point, some of its paths ablated by zero or by a mean, some of its insides edited
    Substitution   a function in place of a hook point

Both leave special tokens (BOS, EOS, padding, separators) as they are, in every arm, unless told otherwise. SAELens's
`run_evals` bypasses them in the splice and ZEROES them in its ablation; `special_tokens="changed"` treats them as all other
tokens are, so that a zero ablation is SAELens's, and a splice is SAELens's with `exclude_special_tokens=False`.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from typing_extensions import override

from sae_nfm.architectures import SECONDARY_HOOKS, NFMPaths, Secondary, check_secondary, place_secondary, secondary_of
from sae_nfm.common import ShortRepr
from sae_nfm.interventions.edits import SAEEdit, TokensInTurn, at_work, hook_functions
from sae_nfm.interventions.results import NO_ROLE, ArmRole
from sae_nfm.loading import describe, digest
from sae_nfm.models import (
    Attached,
    HookFunction,
    LanguageModel,
    SpecialTokens,
    TokensRead,
    check_finite,
    claimed,
    counted_tokens,
    hooked,
    is_transcoder,
    keeping,
    on_head,
    real_batches,
    reconstruction,
    run_rows,
    site_at,
    special_token_ids,
    splice,
    tokens_read,
    writing,
)

__all__ = ["HookFunction", "Intervention", "SpecialTokens", "Splice", "Substitution", "TokenContext", "Trace"]
__all__ += ["counted_tokens", "digest", "path_means", "special_token_ids", "splice"]


class Trace:
    """What passed through an intervention's hook point in the model's last run, heads flattened."""

    x: Float[Tensor, "rows pos d"]
    """What the model computed."""
    x_hat: Float[Tensor, "rows pos d"]
    """What it went on with."""
    acts: Float[Tensor, "rows pos d_sae"] | None = None
    """Feature activations, where an SAE was at work."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Intervention(ShortRepr, ABC):
    """A change to what a language model computes at one hook point.

        with intervention.on(model, generator) as trace:
            logits = model(tokens)

    It is removed on exit, including on exceptions. Interventions at different hook points nest: the inner one sees what the outer
    one left of the activations. A second one at the same hook point is a ValueError.

    A new kind is a frozen dataclass that derives from this one and provides the three abstract members. `on` must treat
    special tokens as `special_tokens` says, claim its hook point (`splicing.claimed`, or `splice`, which does) and fill the
    trace in every run; it leaves every position of x that it does not mean to change bit for bit as it was, and so all
    that the model computes before its hook point, which a measurement computes once for all arms.
    """

    special_tokens: SpecialTokens = "kept"
    """Whether special tokens keep their activations, or are treated as all others are."""
    role: ArmRole = NO_ROLE
    """What it is in a measurement (`sae_nfm.evaluation.measure`); it changes nothing that it does."""

    @property
    @abstractmethod
    def hook_name(self) -> str:
        """Where it acts, by a name of either kind."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """A text that differs where the effect differs, by which a resumed measurement knows the arm again."""

    @abstractmethod
    def on(self, model: LanguageModel, generator: torch.Generator | None = None) -> AbstractContextManager[Trace]:
        """At work on a model for a while; `generator`, on the CPU so that draws are the same on every device, where a kind draws.

        Raises:
            ValueError: when the model has no such hook point, or something is in its place already.
        """


@dataclass(frozen=True, kw_only=True, repr=False)
class Splice(Intervention):
    """An SAE in place of the hook point that its metadata names, or of one head there (hook_head_index).

        with Splice(sae=sae, edits=[Edit(at="hook_sae_acts_post", index=7, mode="clamp", value=10.0)]).on(model) as trace:
            logits = model(tokens)
        trace.x, trace.x_hat, trace.acts       # what came in, what went on, features

    Unlike SAELens's `with model.saes(sae)` it keeps special tokens as they are, works on every kind of model and in `generate`,
    and refuses to run where its hooks were taken away (docs/splicing.md).

    Args:
        sae: the SAE; it is used as it is, not copied.
        ablated: paths that are written as zero (None) or as a vector.
        use_error_term: add what the SAE does not reconstruct.
        edits: changes of features, pairs and paths.
        special_tokens: "kept" or "changed".

    A transcoder takes the place of what it writes, its skip kept; `trace.x` is what the model computed there.

    A ValueError for a hook point the SAE does not have, a mean that is no vector, or an SAE other than a transcoder that reads
    one and writes another.
    """

    sae: SAE[Any]
    ablated: Mapping[str, Tensor | None] = field(default_factory=dict[str, "Tensor | None"])
    """Hook points of the SAE, such as "hook_nfm_linear", by what is written there at every token: None for zero, or a
    vector, such as the path's mean (`path_means`). Zero takes the mean of a path away with it; the mean leaves it in."""
    use_error_term: bool = False
    """Whether what the SAE does not reconstruct of its input is added, as by SAELens's `use_error_term`: then only what is
    ablated and edited changes anything. Special tokens are kept or changed as without it."""
    edits: Sequence[SAEEdit] = ()
    """What else is changed inside the SAE, in this order, after what is ablated; special tokens are left out where they are
    kept. In `reconstruct` the activations given are the prompt."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.ablated if name not in self.sae.hook_dict]
        if unknown:
            raise ValueError(f"the SAE has no {', '.join(unknown)}; it has {', '.join(self.sae.hook_dict)}")
        for name, value in self.ablated.items():
            if value is not None and value.ndim != 1:
                raise ValueError(f"the mean for {name} has shape {tuple(value.shape)}; give a vector, or None for zero")
        if is_transcoder(self.sae) and not hasattr(self.sae.cfg, "d_out"):
            metadata = self.sae.cfg.metadata
            raise ValueError(
                f"the SAE is no transcoder, and its metadata say that it reads {metadata.hook_name!r} and writes "
                f"{metadata.hook_name_out!r}; set hook_name_out = None where it reconstructs what it reads"
            )
        for edit in self.edits:
            if edit.hook_point not in SECONDARY_HOOKS:  # those need a secondary SAE when they are put to work
                edit.check(self.sae)

    @property
    @override
    def hook_name(self) -> str:
        metadata = self.sae.cfg.metadata
        return str(metadata.hook_name_out if is_transcoder(self.sae) else metadata.hook_name)

    @property
    @override
    def identity(self) -> str:
        parts = {name: "zero" if value is None else digest({"": value}) for name, value in self.ablated.items()}
        ablated = json.dumps(parts, sort_keys=True)
        text = f"{describe(self.sae, f' at {self.hook_name}')}, ablated {ablated}, special tokens {self.special_tokens}"
        if self.use_error_term:
            text += ", with error term"
        if self.edits:
            text += f", edits {json.dumps([edit.identity for edit in self.edits])}"
        if (secondary := secondary_of(self.sae)) is not None:
            text += f", hidden code through {describe(secondary.sae)}, error term {secondary.error_term}"
        return text

    @override
    @contextmanager
    def on(self, model: LanguageModel, generator: torch.Generator | None = None) -> Generator[Trace]:
        trace = Trace()

        def x(value: Tensor, hook: Any) -> None:  # noqa: ARG001
            trace.x = value.flatten(2)

        def x_hat(value: Tensor, hook: Any) -> None:  # noqa: ARG001
            trace.x_hat = value.flatten(2)

        def acts(value: Tensor, hook: Any) -> None:  # noqa: ARG001
            trace.acts = value

        with (
            splice(model, self.sae, self.special_tokens, use_error_term=self.use_error_term) as found,
            found.replaced(x),  # before anything is changed
            found.hooks(self._ablations()),
            at_work(model, self.sae, found, self.edits, self.special_tokens),
            found.hooks({"hook_sae_output": x_hat, "hook_sae_acts_post": acts}),
        ):
            yield trace

    def reconstruct(self, x: Float[Tensor, "rows pos d"]) -> Float[Tensor, "rows pos d"]:
        """What the SAE makes of activations by itself, at every position, its paths ablated and edits made, heads flattened.

        A ValueError for a transcoder with an error term, whose error is of what the model writes.
        """
        if self.use_error_term and is_transcoder(self.sae):
            raise ValueError(
                "a transcoder's error is of what the model writes, not of its input; splice it into the model"
            )
        with Attached(owner=self.sae, prefix="").hooks(self._ablations()):
            made = reconstruction(self.sae, x, hook_functions(self.sae, self.edits, TokensInTurn()))
        return made + (x - reconstruction(self.sae, x, {})) if self.use_error_term else made

    def _ablations(self) -> dict[str, HookFunction]:
        return {name: writing(name, value) for name, value in self.ablated.items()}


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenContext(ShortRepr):
    """Where the activations stand that a substitution is given; the generator, where one was given, is on the CPU."""

    counted: Bool[Tensor, "rows pos"]
    """True where a token is counted: not special, not in position 0 (`counted_tokens`)."""
    generator: torch.Generator | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Substitution(Intervention):
    """A function in place of a hook point.

        half = Substitution(at="blocks.2.hook_resid_post", function=lambda x, context: x / 2, description="half")
        with half.on(model):
            logits = model(tokens)

    The function is given every position, position 0 and special tokens among them; what it returns at special tokens is then
    replaced by what was there, unless they are to be changed.
    """

    at: str
    """The hook point, by a name of either kind."""
    function: Callable[[Tensor, TokenContext], Tensor]
    """From the original activations [rows pos d], heads flattened, and their context to what goes in their place, of that
    shape. It must not write into what it is given."""
    description: str
    """What the function does and all it depends on: a resumed measurement knows the function by this text only."""
    head: int | None = None
    """A single head, at a hook point that has them: x is [rows pos d_head], the other heads keep their bits. None for all."""

    @property
    @override
    def hook_name(self) -> str:
        return self.at

    @property
    @override
    def identity(self) -> str:
        at = self.at if self.head is None else f"{self.at}, head {self.head}"
        return f"{self.description} at {at}, special tokens {self.special_tokens}"

    @override
    @contextmanager
    def on(self, model: LanguageModel, generator: torch.Generator | None = None) -> Generator[Trace]:
        trace = Trace()
        d_head = 0 if self.head is None else site_at(model, self.at, self.head).d_in
        with claimed(model, self.at) as hook_name, tokens_read(model) as read:

            def substituted(x: Tensor) -> Tensor:
                special = read.special_on(x.device) if self.special_tokens == "kept" else None
                x_hat = self.function(x, _Context(read, x.device, generator))
                if x_hat.shape != x.shape:
                    raise ValueError(
                        f"{self.description!r} made {tuple(x_hat.shape)} of {tuple(x.shape)}; keep the shape"
                    )
                if special is not None:
                    x_hat = torch.where(special[..., None], x, x_hat)
                trace.x, trace.x_hat = x, x_hat.to(x.dtype)
                return trace.x_hat

            def substitute(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
                read.check_shape(value)
                if self.head is not None:
                    return on_head(value, self.head, d_head, substituted)
                return substituted(value.flatten(2)).reshape(value.shape)

            with hooked(model, {hook_name: substitute}, model):
                yield trace


class _Context(TokenContext):
    """Looks for the counted tokens when it is asked, since a run on activations does not know them."""

    def __init__(self, read: TokensRead, device: torch.device, generator: torch.Generator | None) -> None:
        self.__dict__.update(_read=read, _device=device, generator=generator)

    def __getattr__(self, name: str) -> Any:
        if name != "counted":
            raise AttributeError(name)
        return self.__dict__["_read"].counted_on(self.__dict__["_device"])


@torch.no_grad()
def path_means(
    model: LanguageModel, sae: SAE[Any], tokens: Int[Tensor, "rows pos"], names: Sequence[str], *, batch_rows: int = 16
) -> dict[str, Float[Tensor, " width"]]:
    """Mean over the counted tokens of what passes through hook points of an SAE, for ablation by the mean.

    The SAE sees the model's activations as they are; the held-out rows are better not those that will be evaluated on.
    A ValueError for a hook point the SAE does not have, such as "hook_nfm_linear", or when no token is counted.
    """
    Splice(sae=sae, ablated=dict.fromkeys(names))  # refuses unknown names
    sums, n = dict.fromkeys(names, torch.zeros(())), 0
    for batch, real in real_batches(model, tokens, batch_rows):
        mask, seen = counted_tokens(model, batch, real), dict[str, Tensor]()
        with splice(model, sae) as found, found.hooks({name: keeping(seen, name) for name in names}):
            run_rows(model, batch, real)
        n += int(mask.sum())
        for name in names:
            check_finite(seen[name][mask], mask, f"what passes {name!r}")
        sums = {name: sums[name] + seen[name][mask].flatten(1).sum(0, dtype=torch.float64).cpu() for name in names}
    if n == 0:
        raise ValueError(f"no token to average over: {tokens.numel()} tokens, all special or in position 0; give more")
    return {name: (total / n).float() for name, total in sums.items()}


@dataclass(frozen=True, kw_only=True, repr=False)
class SecondarySplice(Splice):
    """An SAE in place of its hook point, a secondary SAE in place of its hidden code (see `attach_secondary`).

    with SecondarySplice(sae=sae, secondary=secondary, error_term=True).on(model):
        logits = model(tokens)
    """

    secondary: SAE[Any]
    error_term: bool = False
    """Whether what the secondary SAE does not reconstruct is added."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_secondary(self.sae, self.secondary)

    @property
    @override
    def identity(self) -> str:
        with self._attached():
            return super().identity

    @override
    @contextmanager
    def on(self, model: LanguageModel, generator: torch.Generator | None = None) -> Generator[Trace]:
        with self._attached(), super().on(model, generator) as trace:
            yield trace

    @override
    def reconstruct(self, x: Float[Tensor, "rows pos d"]) -> Float[Tensor, "rows pos d"]:
        with self._attached():
            return super().reconstruct(x)

    def _attached(self) -> AbstractContextManager[Any]:
        assert isinstance(self.sae, NFMPaths)
        # `check_secondary`, whose digest takes seconds for a large SAE, is done once
        return place_secondary(self.sae, Secondary(sae=self.secondary, error_term=self.error_term))
