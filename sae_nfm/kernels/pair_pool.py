"""Bi-interaction pooling on a GPU: forward and backward in one pass over the gathered rows of V each (`triton_pairs`)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from sae_nfm.kernels.sparse_sums import Grads, Routing, route, wide


class PairPool(torch.autograd.Function):
    """`kernels.bi_interaction`, with the routing to share or None; indices and values [n_tokens, k]."""

    @staticmethod
    @override
    def forward(ctx: Any, indices: Tensor, values: Tensor, V: Tensor, routing: Routing | None) -> Tensor:
        from sae_nfm.kernels import triton_pairs

        wide_values = wide(values)
        top = values.abs().argmax(dim=-1)
        z, strongest, rest = triton_pairs.pool(indices, wide_values, V, top)
        ctx.save_for_backward(indices, values, V, top, strongest, rest)
        ctx.routing = routing
        return z

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Grads:  # pyright: ignore[reportIncompatibleMethodOverride]
        from sae_nfm.kernels import triton_pairs

        indices, values, V, top, strongest, rest = ctx.saved_tensors
        pooled = (top, strongest, rest)
        wide_values, grad_values, grad_V = wide(values), None, None
        if ctx.needs_input_grad[1]:
            grad_values = triton_pairs.grad_values(indices, wide_values, V, *pooled, grad)
        if ctx.needs_input_grad[2]:
            routing = ctx.routing or route(indices, len(V))
            grad_V = triton_pairs.grad_V(routing, wide_values, V, *pooled, grad)
        return None, grad_values, grad_V, None
