# pyright: basic, reportCallIssue=false, reportArgumentType=false
"""Bi-interaction pooling and its gradients as Triton kernels: one pass over the gathered rows of V each.

With s the strongest feature of a token, r = sum_{i != s} f_i v_i, and g the gradient of z:

    z          = f_s v_s * r + 1/2 [r^2 - sum_{i != s} f_i^2 v_i^2]
    dL/df_i    = < g v_i, others_i >              others_i = r                        for i = s
    dL/dv_i    = sum_b f_bi g_b * others_bi                = f_s v_s + r - f_i v_i    else

the same sums as `kernels.bi_interaction` makes of several passes, and as exact where one feature outweighs the others. The
case i = s stands apart since a GPU fuses product and difference: f_s v_s - f_s v_s would be the product's rounding error, not 0.
See `triton_sums` for how programs are laid out and tested.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from sae_nfm.kernels.reference import Routing
from sae_nfm.kernels.triton_sums import launch, shares_of


def pool(indices: Tensor, values: Tensor, V: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pool: z in the type of V, and for its gradients f_s v_s and r in the type of the values, [n_tokens, nfm_dim] each.

    Indices and values are [n_tokens, k], values in float32 at least; `top` [n_tokens] is the position of the strongest feature.
    """
    (n_tokens, k), nfm_dim = indices.shape, V.shape[1]
    z, strongest, rest = V.new_empty(n_tokens, nfm_dim), *values.new_empty(2, n_tokens, nfm_dim)
    launch(_pool, n_tokens, nfm_dim, V, indices, values, V, top, z, strongest, rest, k)
    return z, strongest, rest


def grad_values(
    indices: Tensor, values: Tensor, V: Tensor, top: Tensor, strongest: Tensor, rest: Tensor, grad: Tensor
) -> Tensor:
    """dL/df [n_tokens, k], for the gradient [n_tokens, nfm_dim] of z; the other arguments from `pool`."""
    shares, pooled = shares_of(indices, values, V.shape[1]), (top, strongest, rest)
    launch(_grad_values, len(indices), V.shape[1], V, indices, values, V, *pooled, grad, shares, *indices.shape)
    return shares.sum(dim=0)


def grad_V(
    routing: Routing, values: Tensor, V: Tensor, top: Tensor, strongest: Tensor, rest: Tensor, grad: Tensor
) -> Tensor:
    """dL/dV [d_sae, nfm_dim]; arguments as above."""
    out, ordered = V.new_empty(V.shape), (routing.starts, routing.tokens, routing.entries)
    pooled = (top, strongest, rest)
    launch(_grad_V, *V.shape, V, *ordered, values, V, *pooled, grad, out, values.shape[1])
    return out


@triton.jit
def _pool(
    indices, values, V, top, z, strongest, rest, k,
    nfm_dim: constexpr, CHUNK: constexpr, ENTRIES: constexpr, SUM: constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = columns < nfm_dim
    at_top = tl.load(top + token)
    s = tl.zeros([CHUNK], dtype=SUM)
    r = tl.zeros([CHUNK], dtype=SUM)
    squares = tl.zeros([CHUNK], dtype=SUM)
    for first in range(0, k, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        active = entries < k
        index = tl.load(indices + token * k + entries, mask=active, other=0).to(tl.int64)
        value = tl.load(values + token * k + entries, mask=active, other=0.0).to(SUM)
        mask = active[:, None] & inside[None, :]
        row = tl.load(V + index[:, None] * nfm_dim + columns[None, :], mask=mask, other=0.0).to(SUM)
        is_top = entries == at_top
        s += tl.sum(tl.where(is_top, value, 0.0)[:, None] * row, axis=0)
        other = tl.where(is_top, 0.0, value)[:, None] * row
        r += tl.sum(other, axis=0)
        squares += tl.sum(other * other, axis=0)
    at = token * nfm_dim + columns
    tl.store(z + at, s * r + 0.5 * (r * r - squares), mask=inside)
    tl.store(strongest + at, s, mask=inside)
    tl.store(rest + at, r, mask=inside)


@triton.jit
def _grad_values(
    indices, values, V, top, strongest, rest, grad, shares, n_tokens, k,
    nfm_dim: constexpr, CHUNK: constexpr, ENTRIES: constexpr, SUM: constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = columns < nfm_dim
    at = token * nfm_dim + columns
    at_top = tl.load(top + token)
    g = tl.load(grad + at, mask=inside, other=0.0).to(SUM)
    s = tl.load(strongest + at, mask=inside, other=0.0).to(SUM)
    r = tl.load(rest + at, mask=inside, other=0.0).to(SUM)
    mine = shares + (tl.program_id(1).to(tl.int64) * n_tokens + token) * k
    for first in range(0, k, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        active = entries < k
        index = tl.load(indices + token * k + entries, mask=active, other=0).to(tl.int64)
        value = tl.load(values + token * k + entries, mask=active, other=0.0).to(SUM)
        mask = active[:, None] & inside[None, :]
        row = tl.load(V + index[:, None] * nfm_dim + columns[None, :], mask=mask, other=0.0).to(SUM)
        is_top = (entries == at_top)[:, None]
        others = r[None, :] + tl.where(is_top, 0.0, s[None, :] - value[:, None] * row)
        tl.store(mine + entries, tl.sum(g[None, :] * row * others, axis=1), mask=active)


@triton.jit
def _grad_V(
    starts, tokens, order, values, V, top, strongest, rest, grad, out, k,
    nfm_dim: constexpr, CHUNK: constexpr, ENTRIES: constexpr, SUM: constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = columns < nfm_dim
    v = tl.load(V + feature * nfm_dim + columns, mask=inside, other=0.0).to(SUM)
    start = tl.load(starts + feature)
    stop = tl.load(starts + feature + 1)
    total = tl.zeros([CHUNK], dtype=SUM)
    for first in range(start, stop, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        active = entries < stop
        token = tl.load(tokens + entries, mask=active, other=0).to(tl.int64)
        entry = tl.load(order + entries, mask=active, other=0)
        value = tl.load(values + entry, mask=active, other=0.0).to(SUM)
        is_top = (entry == token * k + tl.load(top + token, mask=active, other=0))[:, None]
        at = token[:, None] * nfm_dim + columns[None, :]
        mask = active[:, None] & inside[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(SUM)
        s = tl.load(strongest + at, mask=mask, other=0.0).to(SUM)
        r = tl.load(rest + at, mask=mask, other=0.0).to(SUM)
        others = r + tl.where(is_top, 0.0, s - value[:, None] * v[None, :])
        total += tl.sum(value[:, None] * g * others, axis=0)
    tl.store(out + feature * nfm_dim + columns, total, mask=inside)
