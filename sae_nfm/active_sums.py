"""Sums over the active entries alone, and the gradients made of them.

With [bj] the j-th active feature of token b, f_bj its value, w_i the row of feature i and g_b a vector of token b:

    `_sum_by_token`      sum_j f_bj w_[bj]    F.embedding_bag over the features of a token
    `_sum_by_feature`    sum_b f_bi g_b       F.embedding_bag over the tokens of a feature: the same entries, ordered by `route`
    `_dots`              <g_b, w_[bj]>        torch.sparse.sampled_addmm

None of them makes [batch, d_sae] or [batch, k, d_out]. The functions can be differentiated once.
"""

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from typing_extensions import override

from sae_nfm import ranking

Grads = tuple[Tensor | None, ...]
TRANSPOSED_BYTES = 2**24
"""Size of the pieces in which W_enc and its gradient are transposed; larger ones come from the system, page by page."""
TRANSPOSED_FEATURES = 512
"""Features of a piece that are transposed at a time. Measured on CPU."""


class Routing(NamedTuple):
    """The active entries ordered by feature, for sums over the tokens of a feature; made by `route`."""

    entries: Int[Tensor, " n_entries"]
    """Positions in the flattened [n_tokens, k] activations; those of one feature are adjacent, in the order of tokens."""
    tokens: Int[Tensor, " n_entries"]
    """The token of each entry."""
    starts: Int[Tensor, " d_sae_plus_1"]
    """Where each feature's entries begin; the last number is n_entries."""


def route(indices: Int[Tensor, "*batch k"], d_sae: int) -> Routing:
    """Order the active entries by feature: once for all kernels that read features at the same indices."""
    flat = indices.flatten()
    entries = flat.int().argsort(stable=True)  # int32 sorts faster
    starts = F.pad(torch.bincount(flat, minlength=d_sae).cumsum(0), (1, 0))
    return Routing(entries, entries // indices.shape[-1], starts)


class TopHiddenPre(torch.autograd.Function):
    """`ranking.top_hidden_pre`, differentiable in the values."""

    @staticmethod
    @override
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, k: int
    ) -> tuple[Tensor, Tensor]:
        indices, values = ranking.top_hidden_pre(x, W_enc, b_enc, scale, k)
        ctx.save_for_backward(x, W_enc, scale, indices, values)
        return indices, values

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, _: Any, grad: Tensor) -> Grads:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W_enc, scale, indices, values = ctx.saved_tensors
        (d_in, d_sae), (needs_x, needs_W) = W_enc.shape, ctx.needs_input_grad[:2]
        grad, routing, grad_scale = wide(grad), route(indices, d_sae), None
        if scale is not None:
            chosen = wide(scale)[indices]
            grad_scale = _scatter(indices, torch.where(chosen == 0, 0.0, grad * wide(values) / chosen), d_sae)
            grad = grad * chosen
        grad_x = torch.empty_like(x) if needs_x else None
        grad_W = torch.empty_like(W_enc) if needs_W else None
        step = max(1, TRANSPOSED_BYTES // (d_sae * grad.element_size()))
        for rows in (slice(start, start + step) for start in range(0, d_in, step)):
            if grad_x is not None:
                grad_x[:, rows] = _sum_by_token(indices, grad, wide(W_enc[rows].T))
            if grad_W is not None:
                _transpose(_sum_by_feature(routing, grad, wide(x[:, rows])), grad_W[rows])
        return grad_x, grad_W, _scatter(indices, grad, d_sae), grad_scale, None


class WeightedRows(torch.autograd.Function):
    """`sum_i f_i weight_i`, with the routing to share or None."""

    @staticmethod
    @override
    def forward(ctx: Any, indices: Tensor, values: Tensor, weight: Tensor, routing: Routing | None) -> Tensor:
        ctx.save_for_backward(indices, values, weight)
        ctx.routing = routing
        return _sum_by_token(indices, values.to(weight.dtype), weight)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Grads:  # pyright: ignore[reportIncompatibleMethodOverride]
        indices, values, weight = ctx.saved_tensors
        grad, grad_values, grad_weight = wide(grad), None, None
        if ctx.needs_input_grad[1]:
            grad_values = _dots(indices, grad, wide(weight))
        if ctx.needs_input_grad[2]:
            grad_weight = _sum_by_feature(ctx.routing or route(indices, len(weight)), wide(values), grad)
        return None, grad_values, grad_weight, None


class RowNorms(torch.autograd.Function):
    """The norm of each row, and the matrix itself; one pass adds what comes back from both."""

    @staticmethod
    @override
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        norms = weight.norm(dim=-1)
        ctx.save_for_backward(weight, norms)
        ctx.set_materialize_grads(False)
        return norms, weight

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_weight: Tensor | None) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, norms = ctx.saved_tensors
        if grad is None:
            return grad_weight
        factor = torch.where(norms == 0, 0.0, grad / norms)[:, None]  # 0 where the norm is 0, as in torch
        return weight * factor if grad_weight is None else torch.addcmul(grad_weight, weight, factor)


def wide(tensor: Tensor) -> Tensor:
    """At least float32: for sums over many entries, and for operations that know no half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _transpose(source: Tensor, out: Tensor) -> None:
    """`out.copy_(source.T)`, which torch does on one CPU thread; a product it spreads over all."""
    for columns in (slice(start, start + TRANSPOSED_FEATURES) for start in range(0, len(source), TRANSPOSED_FEATURES)):
        torch.mul(source[columns].T, 1.0, out=out[:, columns])


def _scatter(indices: Tensor, values: Tensor, d_sae: int) -> Tensor:
    return values.new_zeros(d_sae).index_add_(0, indices.flatten(), values.flatten())


def _sum_by_token(indices: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """`sum_j f_bj w_[bj]`, [n_tokens, d_out]; detached, else the bag prepares a backward pass of its own."""
    return F.embedding_bag(indices, rows.detach().contiguous(), per_sample_weights=values.detach(), mode="sum")


def _sum_by_feature(routing: Routing, values: Tensor, by_token: Tensor) -> Tensor:
    """`sum_b f_bi g_b`, [d_sae, d_out], 0 for features that no token uses."""
    weights = values.detach().flatten()[routing.entries]
    return F.embedding_bag(
        routing.tokens,
        by_token.detach().contiguous(),
        routing.starts,
        per_sample_weights=weights,
        mode="sum",
        include_last_offset=True,
    )


def _dots(indices: Tensor, by_token: Tensor, rows: Tensor) -> Tensor:
    """`<g_b, w_[bj]>`, [n_tokens, k]."""
    n_tokens, k = indices.shape
    starts, zeros = k * torch.arange(n_tokens + 1, device=indices.device), by_token.new_zeros(n_tokens * k)
    shape = (n_tokens, len(rows))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        pattern = torch.sparse_csr_tensor(starts, indices.flatten(), zeros, shape, check_invariants=False)
        products = torch.sparse.sampled_addmm(pattern, by_token, rows.T, beta=0.0)
    return products.values().reshape(n_tokens, k)
