"""The products of a sparse step with gradients made of sums over the active entries alone (`sums`).

Gradients that are to be differentiated again (`create_graph`) are those of the dense formula, by autograd (`or_again`).
"""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from sae_nfm.kernels import topk
from sae_nfm.kernels.device import product_dtype, uses_triton, wide
from sae_nfm.kernels.reference import SparseActs, bi_interaction, dense_acts, or_again
from sae_nfm.kernels.sums import Grads, Routing, dots, route, sum_by_feature, sum_by_token, sum_values, triton

TRANSPOSED_BYTES = 3 * 2**23
"""Size of the pieces in which W_enc and its gradient are transposed, at most; 32 MiB come from the system, page by page."""
TRANSPOSED_ROWS = 256
"""Rows of W_enc in a piece, at most: with 512, the numbers of a column are 2 KiB apart and displace each other in the cache."""
TRANSPOSED_FEATURES = 512
"""Features of a piece that are transposed at a time. Measured on CPU."""


class TopHiddenPre(torch.autograd.Function):
    """`topk.top_hidden_pre`, differentiable in the values; `dense` makes the gradients of x and W_enc as products."""

    @staticmethod
    @override
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, k: int, dense: bool
    ) -> tuple[Tensor, Tensor]:
        indices, values = topk.top_hidden_pre(x, W_enc, b_enc, scale, k)
        ctx.save_for_backward(x, W_enc, b_enc, scale, indices, values)
        ctx.product_dtype = product_dtype(x) if dense else None
        return indices, values

    @staticmethod
    def _formula(*saved: Any) -> Any:
        *args, indices, _ = saved
        return (*args, None, None), (None, topk.hidden_pre(*args).gather(-1, indices))

    @staticmethod
    @override
    @or_again(_formula)
    def backward(ctx: Any, _: Any, grad: Tensor) -> Grads:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W_enc, _, scale, indices, values = ctx.saved_tensors
        grad, routing, grad_scale = wide(grad), route(indices, W_enc.shape[1]), None
        if scale is not None:
            chosen = wide(scale)[indices]
            grad_scale = sum_values(
                routing, torch.where(chosen == 0, 0.0, grad * wide(values) / chosen), indices, len(scale)
            )
            grad = grad * chosen
        if ctx.product_dtype is None:
            grads = _encoder_grads(x, W_enc, indices, grad, routing, *ctx.needs_input_grad[:2])
        else:
            grads = _encoder_products(x, W_enc, indices, grad.to(ctx.product_dtype), *ctx.needs_input_grad[:2])
        return *grads, sum_values(routing, grad, indices, W_enc.shape[1]), grad_scale, None, None


def _encoder_grads(
    x: Tensor, W_enc: Tensor, indices: Tensor, grad: Tensor, routing: Routing, needs_x: bool, needs_W: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and W_enc from the active entries, for some rows of W_enc at a time."""
    d_in, d_sae = W_enc.shape
    grad_x = torch.empty_like(x) if needs_x else None
    grad_W = torch.empty_like(W_enc) if needs_W else None
    step = d_in if W_enc.is_cuda else max(1, min(TRANSPOSED_ROWS, TRANSPOSED_BYTES // (d_sae * grad.element_size())))
    for rows in (slice(start, start + step) for start in range(0, d_in, step)):
        if grad_x is not None:
            grad_x[:, rows] = sum_by_token(indices, grad, wide(W_enc[rows].T))
        if grad_W is not None:
            _transpose(sum_by_feature(routing, grad, wide(x[:, rows])), grad_W[rows])
    return grad_x, grad_W


def _encoder_products(
    x: Tensor, W_enc: Tensor, indices: Tensor, grad: Tensor, needs_x: bool, needs_W: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The same gradients as products with the matrix [n_tokens, d_sae] of the gradient, in the type that this has."""
    matrix = grad.new_zeros(len(grad), W_enc.shape[1]).scatter_(-1, indices, grad)
    grad_x = (matrix @ W_enc.to(grad.dtype).T).to(x.dtype) if needs_x else None
    grad_W = (x.to(grad.dtype).T @ matrix).to(W_enc.dtype) if needs_W else None
    return grad_x, grad_W


class Transposed(torch.autograd.Function):
    """A matrix transposed in memory."""

    @staticmethod
    @override
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        return _transposed(matrix)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Transposed.apply(grad)


def _transposed(matrix: Tensor) -> Tensor:
    made = matrix.new_empty(matrix.shape[::-1])
    _transpose(matrix.detach(), made)
    return made


class OfActive(torch.autograd.Function):
    """A number of each active feature. Indexing would do, but its gradient adds in an order that depends on the threads."""

    @staticmethod
    @override
    def forward(ctx: Any, per_feature: Tensor, indices: Tensor, routing: Routing | None) -> Tensor:
        ctx.save_for_backward(per_feature, indices)
        ctx.routing, ctx.d_sae = routing, len(per_feature)
        return per_feature.index_select(0, indices.flatten()).reshape(indices.shape)

    @staticmethod
    def _formula(per_feature: Tensor, indices: Tensor) -> Any:
        return (per_feature, indices, None), (per_feature[indices],)

    @staticmethod
    @override
    @or_again(_formula)
    def backward(ctx: Any, grad: Tensor) -> Grads:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, indices = ctx.saved_tensors
        return sum_values(ctx.routing, grad, indices, ctx.d_sae), None, None


class BothDecoders(torch.autograd.Function):
    """`sum_i f_i (W_dec_i / n_i + W_lin_i)`: one sum over tokens is the gradient of both, but for n_i (1 without norms)."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        indices: Tensor,
        values: Tensor,
        W_dec: Tensor,
        norms: Tensor | None,
        W_lin: Tensor,
        routing: Routing | None,
    ) -> Tensor:
        ctx.save_for_backward(indices, values, W_dec, norms, W_lin)
        ctx.routing = routing
        unscaled = values if norms is None else values / norms[indices]
        direct = sum_by_token(indices, unscaled.to(W_dec.dtype), W_dec)
        return direct.add_(sum_by_token(indices, values.to(W_lin.dtype), W_lin))

    @staticmethod
    def _formula(indices: Tensor, values: Tensor, W_dec: Tensor, norms: Tensor | None, W_lin: Tensor) -> Any:
        unscaled = values if norms is None else values / norms[indices]
        return (indices, values, W_dec, norms, W_lin, None), (
            _rows(indices, unscaled, W_dec) + _rows(indices, values, W_lin),
        )

    @staticmethod
    @override
    @or_again(_formula)
    def backward(ctx: Any, grad: Tensor) -> Grads:  # pyright: ignore[reportIncompatibleMethodOverride]
        indices, values, W_dec, norms, W_lin = ctx.saved_tensors
        _, needs_values, needs_W_dec, needs_norms, needs_W_lin, _ = ctx.needs_input_grad
        grad, values, routing = wide(grad), wide(values), ctx.routing
        if needs_W_dec or needs_norms or needs_W_lin:
            routing = ctx.routing or route(indices, len(W_dec))
        per_norm = None if norms is None else torch.where(norms == 0, 0.0, 1 / wide(norms))
        grad_values = grad_W_dec = grad_norms = grad_W_lin = None
        if needs_values or needs_norms:
            direct = dots(indices, grad, W_dec)
            if per_norm is not None:
                direct *= per_norm[indices]
                if needs_norms:
                    grad_norms = -per_norm * sum_values(routing, values * direct, indices, len(W_dec))
            if needs_values:
                grad_values = direct.add_(dots(indices, grad, W_lin))
        if needs_W_dec or needs_W_lin:
            grad_W_lin = sum_by_feature(routing, values, grad)
            grad_W_dec = grad_W_lin if per_norm is None else grad_W_lin * per_norm[:, None]
        return None, grad_values, grad_W_dec, grad_norms, grad_W_lin, None


class RowNorms(torch.autograd.Function):
    """The norm of each row, and the matrix itself; one pass adds what comes back from both.

    It adds to the matrix's gradient in place, as the functions here make one that nobody else holds: a fresh one of this size
    takes four times as long.
    """

    @staticmethod
    @override
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        norms = weight.norm(dim=-1)
        ctx.save_for_backward(weight, norms)
        ctx.set_materialize_grads(False)
        return norms, weight

    @staticmethod
    def _formula(weight: Tensor, _: Tensor) -> Any:
        return (weight,), (weight.norm(dim=-1), weight * 1)

    @staticmethod
    @override
    @or_again(_formula)
    def backward(ctx: Any, grad: Tensor | None, grad_weight: Tensor | None) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, norms = ctx.saved_tensors
        if grad is None:
            return grad_weight
        factor = torch.where(norms == 0, 0.0, grad / norms)[:, None]  # 0 where the norm is 0, as in torch
        return weight * factor if grad_weight is None else grad_weight.contiguous().addcmul_(weight, factor)


def _rows(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """`sum_i f_i weight_i` as a dense product."""
    return dense_acts(SparseActs(indices, values.to(weight.dtype)), len(weight)) @ weight


def _transpose(source: Tensor, out: Tensor) -> None:
    """`out.copy_(source.T)`, which torch does on one CPU thread; a product it spreads over all."""
    if uses_triton(out):
        triton().transpose(source, out)
        return
    for columns in (slice(start, start + TRANSPOSED_FEATURES) for start in range(0, len(source), TRANSPOSED_FEATURES)):
        torch.mul(source[columns].T, 1.0, out=out[:, columns])


class PairPool(torch.autograd.Function):
    """`dispatch.bi_interaction`, with the routing to share or None; indices and values [n_tokens, k]."""

    @staticmethod
    @override
    def forward(ctx: Any, indices: Tensor, values: Tensor, V: Tensor, routing: Routing | None) -> Tensor:
        top = values.abs().argmax(dim=-1)
        z, strongest, rest = triton().pool_pairs(indices, wide(values), V, top)
        ctx.save_for_backward(indices, values, V, top, strongest, rest)
        ctx.routing = routing
        return z

    @staticmethod
    def _formula(indices: Tensor, values: Tensor, V: Tensor, *_: Tensor) -> Any:
        return (indices, values, V, None), (bi_interaction(dense_acts(SparseActs(indices, values), len(V)), V),)

    @staticmethod
    @override
    @or_again(_formula)
    def backward(ctx: Any, grad: Tensor) -> Grads:  # pyright: ignore[reportIncompatibleMethodOverride]
        indices, values, V, top, strongest, rest = ctx.saved_tensors
        pooled = (top, strongest, rest)
        wide_values, grad_values, grad_V = wide(values), None, None
        if ctx.needs_input_grad[1]:
            grad_values = triton().pair_grad_values(indices, wide_values, V, *pooled, grad)
        if ctx.needs_input_grad[2]:
            routing = ctx.routing or route(indices, len(V))
            grad_V = triton().pair_grad_V(routing, wide_values, V, *pooled, grad)
        return None, grad_values, grad_V, None
