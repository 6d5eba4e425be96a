"""Sums over the active entries alone, and their derivatives.

With [bj] the j-th active feature of token b, f_bj its value, w_i the row of feature i and g_b a vector of token b:

    `sum_by_token`      sum_j f_bj w_[bj]    F.embedding_bag over the features of a token
    `sum_by_feature`    sum_b f_bi g_b       F.embedding_bag over the tokens of a feature: the same entries, ordered by `route`
    `dots`              <g_b, w_[bj]>        torch.sparse.sampled_addmm

They are the three derivatives of one form, sum_bj f_bj <g_b, w_[bj]>, so that each one's gradients are the other two:
`Rows`, `ByFeature`, `Dots`, which can be differentiated as often as one likes. On a GPU with Triton they are the kernels of
`triton_sums`. None of them makes [batch, d_sae] or [batch, k, d_out].

A weight that is read several times in a step can be `Shared`: its gradient is then one sum over the entries of all reads.
"""

import warnings
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from sae_nfm.common import short_repr
from sae_nfm.kernels.device import sees_numbers, uses_triton, wide

Grads = tuple[Tensor | None, ...]


class Routing(NamedTuple):
    """The active entries ordered by feature, for sums over the tokens of a feature; made by `route`."""

    __repr__ = short_repr

    entries: Int[Tensor, " n_entries"]
    """Positions in the flattened [n_tokens, k] activations; those of one feature are adjacent, in the order of tokens."""
    tokens: Int[Tensor, " n_entries"]
    """The token of each entry."""
    starts: Int[Tensor, " d_sae_plus_1"]
    """Where each feature's entries begin; the last number is n_entries."""


def route(indices: Int[Tensor, "*batch k"], d_sae: int) -> Routing:
    """Order the active entries by feature: once for all kernels that read features at the same indices."""
    return _ordered(indices.flatten(), None, d_sae, indices.shape[-1])


def _ordered(flat: Tensor, tokens: Tensor | None, d_sae: int, k: int = 1) -> Routing:
    """Entries by feature; their tokens, or None where each token has k of them in turn."""
    entries = flat.int().argsort(stable=True)  # int32 sorts faster
    counts = flat.new_zeros(d_sae + 1).index_add_(0, flat + 1, torch.ones_like(flat))  # bincount waits for a GPU
    return Routing(entries, entries // k if tokens is None else tokens[entries], counts.cumsum(0))


def triton() -> ModuleType:
    """The kernels, loaded where they are used first: Triton need not be installed, and takes a second to import."""
    from sae_nfm.kernels import triton_sums

    return triton_sums


def sum_values(routing: Routing | None, values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    """`sum_b f_bi`, [d_sae], in an order that does not depend on the threads; without a routing it makes one if it needs it."""
    if uses_triton(values):
        n_tokens = values.numel() // values.shape[-1]
        return sum_by_feature(routing or route(indices, d_sae), values, values.new_ones(n_tokens, 1))[:, 0]
    return values.new_zeros(d_sae).index_add_(0, indices.flatten(), values.flatten())


def sum_by_token(indices: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """`sum_j f_bj w_[bj]`, [n_tokens, d_out]; detached, else the bag prepares a backward pass of its own."""
    if uses_triton(rows):
        return triton().sum_by_token(indices, values, rows)
    return F.embedding_bag(indices, rows.detach().contiguous(), per_sample_weights=values.detach(), mode="sum")


def sum_by_feature(routing: Routing, values: Tensor, by_token: Tensor) -> Tensor:
    """`sum_b f_bi g_b`, [d_sae, d_out], 0 for features that no token uses."""
    if uses_triton(by_token):
        return triton().sum_by_feature(routing, values, by_token)
    weights, rows = values.detach().flatten()[routing.entries], by_token.detach().contiguous()
    bags: dict[str, Any] = {"offsets": routing.starts, "include_last_offset": True}
    return F.embedding_bag(routing.tokens, rows, per_sample_weights=weights, mode="sum", **bags)


def dots(indices: Tensor, by_token: Tensor, rows: Tensor) -> Tensor:
    """`<g_b, w_[bj]>`, [n_tokens, k], in the type of g, which is at least float32."""
    if uses_triton(rows):
        return triton().dots(indices, by_token, rows)
    if rows.device.type not in ("cpu", "cuda") or not sees_numbers(
        by_token, rows
    ):  # elsewhere there is no sampled product
        return (by_token @ rows.to(by_token.dtype).T).gather(-1, indices)
    n_tokens, k = indices.shape
    starts, zeros = k * torch.arange(n_tokens + 1, device=indices.device), by_token.new_zeros(n_tokens * k)
    shape = (n_tokens, len(rows))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        pattern = torch.sparse_csr_tensor(starts, indices.flatten(), zeros, shape, check_invariants=False)
        products = torch.sparse.sampled_addmm(pattern, by_token, rows.to(by_token.dtype).T, beta=0.0)
    return products.values().reshape(n_tokens, k)


class Uses:
    """Reads of a shared weight in the backward pass at work: indices, values and the vectors of tokens, of each."""

    def __init__(self) -> None:
        self._of_pass: tuple[int, list[tuple[Tensor, Tensor, Tensor]]] = (-1, [])

    def note(self, indices: Tensor, values: Tensor, by_token: Tensor) -> None:
        """Note one; what another pass left, which did not want the weight's gradient, is forgotten."""
        task = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage] (there is no public question)
        if self._of_pass[0] != task:
            self._of_pass = (task, [])
        self._of_pass[1].append((indices, values, by_token))

    def taken(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Those of the pass at work, once."""
        task, found = self._of_pass
        self._of_pass = (-1, [])
        return found if task == torch._C._current_graph_task_id() else []  # pyright: ignore[reportPrivateUsage]


class _Share(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, weight: Tensor, uses: Uses) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.uses, ctx.d_sae = uses, len(weight)
        return weight.view_as(weight)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        uses = ctx.uses.taken()
        if uses:
            found = _sum_of_uses(uses, ctx.d_sae)
            grad = found if grad is None else grad + found
        return grad, None


def _sum_of_uses(uses: list[tuple[Tensor, Tensor, Tensor]], d_sae: int) -> Tensor:
    """As if each read had tokens of its own."""
    entries = torch.cat([indices.flatten() for indices, _, _ in uses])
    widths = torch.cat([indices.new_full((len(indices),), indices.shape[1]) for indices, _, _ in uses])
    tokens = torch.arange(len(widths), device=widths.device).repeat_interleave(widths, output_size=len(entries))
    values = torch.cat([values.flatten() for _, values, _ in uses])
    return sum_by_feature(_ordered(entries, tokens, d_sae), values, torch.cat([by_token for _, _, by_token in uses]))


class Shared:
    """A weight [d_sae, d_out] that several reads of a step share."""

    def __init__(self, weight: Tensor) -> None:
        self.uses = Uses()
        self.weight: Tensor = _Share.apply(weight, self.uses)  # pyright: ignore[reportAttributeAccessIssue]

    def rows(self, indices: Tensor, values: Tensor) -> Tensor:
        """`sum_j f_bj w_[bj]`, [n_tokens, d_out]."""
        return Rows.apply(indices, values, self.weight, None, self.uses)  # pyright: ignore[reportReturnType]

    def dots(self, indices: Tensor, by_token: Tensor) -> Tensor:
        """`<g_b, w_[bj]>`, [n_tokens, k]."""
        return Dots.apply(indices, by_token, self.weight, None, self.uses)  # pyright: ignore[reportReturnType]


class Rows(torch.autograd.Function):
    """`sum_by_token`; with the routing to share or None, and the uses of a shared weight or None."""

    @staticmethod
    @override
    def forward(
        ctx: Any, indices: Tensor, values: Tensor, weight: Tensor, routing: Routing | None, uses: Uses | None
    ) -> Tensor:
        ctx.save_for_backward(indices, values, weight)
        ctx.routing, ctx.uses = routing, uses
        return sum_by_token(indices, values.to(weight.dtype), weight)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        indices, values, weight = ctx.saved_tensors
        grad, grad_values, grad_weight = wide(grad), None, None
        if ctx.needs_input_grad[1]:
            grad_values = Dots.apply(indices, grad, weight, ctx.routing, None)
        if ctx.needs_input_grad[2]:
            grad_weight = _grad_weight(ctx, indices, wide(values), grad, len(weight))
        return None, grad_values, grad_weight, None, None


class Dots(torch.autograd.Function):
    """`dots`; arguments as of `Rows`."""

    @staticmethod
    @override
    def forward(
        ctx: Any, indices: Tensor, by_token: Tensor, weight: Tensor, routing: Routing | None, uses: Uses | None
    ) -> Tensor:
        ctx.save_for_backward(indices, by_token, weight)
        ctx.routing, ctx.uses = routing, uses
        return dots(indices, by_token, weight)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        indices, by_token, weight = ctx.saved_tensors
        grad_by_token = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_by_token = Rows.apply(indices, grad, weight, ctx.routing, None)
        if ctx.needs_input_grad[2]:
            grad_weight = _grad_weight(ctx, indices, wide(grad), by_token, len(weight))
        return None, grad_by_token, grad_weight, None, None


def _grad_weight(ctx: Any, indices: Tensor, values: Tensor, by_token: Tensor, d_sae: int) -> Tensor | None:
    if ctx.uses is not None and not torch.is_grad_enabled():
        ctx.uses.note(indices, values, by_token)
        return None
    return ByFeature.apply(indices, values, by_token, ctx.routing or route(indices, d_sae))  # pyright: ignore[reportReturnType]


class ByFeature(torch.autograd.Function):
    """`sum_by_feature`, [d_sae, d_out], 0 for features that no token uses."""

    @staticmethod
    @override
    def forward(ctx: Any, indices: Tensor, values: Tensor, by_token: Tensor, routing: Routing) -> Tensor:
        ctx.save_for_backward(indices, values, by_token)
        ctx.routing = routing
        return sum_by_feature(routing, values, by_token)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        indices, values, by_token = ctx.saved_tensors
        grad_values = grad_by_token = None
        if ctx.needs_input_grad[1]:
            grad_values = Dots.apply(indices, by_token, grad, ctx.routing, None)
        if ctx.needs_input_grad[2]:
            grad_by_token = Rows.apply(indices, values, grad, ctx.routing, None)
        return None, grad_values, grad_by_token, None
