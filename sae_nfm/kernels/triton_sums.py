# pyright: basic, reportCallIssue=false, reportArgumentType=false
"""The sums of `sums` and the block maxima of `topk` as Triton kernels: twins of one signature, for GPUs.

Each program sums the entries of one token or feature for one chunk of columns, several rows at a time, in float32 at least,
and in one fixed order: two runs give the same bits. Chunks are the slow dimension of the grid, so that the columns of a
matrix that programs read at one time fit the last cache where the whole matrix does not.

Widths are constants of a kernel, compiled once for each: Triton otherwise reads rows of a width that 16 does not divide
number by number. Import this module only where Triton is installed. With TRITON_INTERPRET=1 in the environment before the
first import, the kernels run on CPU tensors, one program after the other: slow, for tests.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from sae_nfm.kernels.device import promoted_dtype
from sae_nfm.kernels.sums import Routing

CHUNKS = (512, 256, 128)
"""Columns of a program, for matrices at least as wide as the last; the fewest columns beyond the matrix win."""
IN_FLIGHT = 1024
"""Numbers of gathered rows that a program has in flight at least; 8 rows in any case."""
TILE = 64
"""Rows and columns that a program transposes."""
BLOCKS = 256
"""Blocks whose maxima a program finds, candidates that it scores."""


def launch(kernel: Any, n_programs: int, width: int, summed: Tensor, *args: Tensor | int) -> None:
    """Run a program for each token or feature and each chunk of a width, on the device of the tensors.

    The kernel gets the arguments, tensors without gaps, then the width and its constants; `summed` has the type of what it adds.
    """
    chunk = chunk_of(width)
    with torch.cuda.device_of(summed):  # Triton launches on the current device
        kernel[n_programs, triton.cdiv(width, chunk)](
            *(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args),
            width,
            CHUNK=chunk,
            ENTRIES=entries_of(chunk),
            SUM=sum_type(summed),
            num_warps=warps_of(chunk),
        )


def sum_by_token(indices: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """`sum_j f_bj w_[bj]`, [n_tokens, d_out]."""
    (n_tokens, k), d_out = indices.shape, rows.shape[1]
    out = rows.new_empty(n_tokens, d_out)
    launch(_sum_by_token, n_tokens, d_out, rows, indices, values, rows, out, k)
    return out


def sum_by_feature(routing: Routing, values: Tensor, by_token: Tensor) -> Tensor:
    """`sum_b f_bi g_b`, [d_sae, d_out], 0 for features that no token uses."""
    d_sae, d_out = len(routing.starts) - 1, by_token.shape[1]
    out = by_token.new_empty(d_sae, d_out)
    ordered = (routing.starts, routing.tokens, routing.entries)
    launch(_sum_by_feature, d_sae, d_out, by_token, *ordered, values, by_token, out)
    return out


def dots(indices: Tensor, by_token: Tensor, rows: Tensor) -> Tensor:
    """`<g_b, w_[bj]>`, [n_tokens, k]."""
    shares = shares_of(indices, by_token, rows.shape[1])
    launch(_dots, len(indices), rows.shape[1], rows, indices, by_token, rows, shares, *indices.shape)
    return shares.sum(dim=0)


def shares_of(indices: Tensor, like: Tensor, width: int) -> Tensor:
    """Room for what each chunk of a width adds to a number of each entry, [n_chunks, n_tokens, k]."""
    return like.new_empty(triton.cdiv(width, chunk_of(width)), *indices.shape)


def pool_pairs(indices: Tensor, values: Tensor, V: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bi-interaction pooling: z in the type of V, and for its gradients f_s v_s and r in the type of the values.

    With s the strongest feature of a token, r = sum_{i != s} f_i v_i, and g the gradient of z, these and the gradients below are

        z          = f_s v_s * r + 1/2 [r^2 - sum_{i != s} f_i^2 v_i^2]
        dL/df_i    = < g v_i, others_i >              others_i = r                        for i = s
        dL/dv_i    = sum_b f_bi g_b * others_bi                = f_s v_s + r - f_i v_i    else

    in one pass over the gathered rows of V each: the same sums as `dispatch.bi_interaction` makes of several passes, and as exact
    where one feature outweighs the others. The case i = s stands apart since a GPU fuses product and difference: the product's
    rounding error would remain of f_s v_s - f_s v_s, not 0. Indices and values are [n_tokens, k], values in float32 at least;
    `top` [n_tokens] is the position of the strongest feature; the results are [n_tokens, nfm_dim].
    """
    (n_tokens, k), nfm_dim = indices.shape, V.shape[1]
    z, strongest, rest = V.new_empty(n_tokens, nfm_dim), *values.new_empty(2, n_tokens, nfm_dim)
    launch(_pool, n_tokens, nfm_dim, V, indices, values, V, top, z, strongest, rest, k)
    return z, strongest, rest


def pair_grad_values(
    indices: Tensor, values: Tensor, V: Tensor, top: Tensor, strongest: Tensor, rest: Tensor, grad: Tensor
) -> Tensor:
    """dL/df [n_tokens, k], for the gradient [n_tokens, nfm_dim] of z; the other arguments from `pool_pairs`."""
    shares, pooled = shares_of(indices, values, V.shape[1]), (top, strongest, rest)
    launch(_grad_values, len(indices), V.shape[1], V, indices, values, V, *pooled, grad, shares, *indices.shape)
    return shares.sum(dim=0)


def pair_grad_V(
    routing: Routing, values: Tensor, V: Tensor, top: Tensor, strongest: Tensor, rest: Tensor, grad: Tensor
) -> Tensor:
    """dL/dV [d_sae, nfm_dim]; arguments as above."""
    out, ordered = V.new_empty(V.shape), (routing.starts, routing.tokens, routing.entries)
    pooled = (top, strongest, rest)
    launch(_grad_V, *V.shape, V, *ordered, values, V, *pooled, grad, out, values.shape[1])
    return out


def transpose(source: Tensor, out: Tensor) -> None:
    """`out.copy_(source.T)`."""
    n_rows, n_columns = source.shape
    grid = (triton.cdiv(n_rows, TILE), triton.cdiv(n_columns, TILE))
    with torch.cuda.device_of(source):
        _transpose[grid](source, out, n_rows, n_columns, *source.stride(), *out.stride(), TILE=TILE)


def block_maxima(product: Tensor, bias: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """The largest of the scores `(product + bias) * scale` [n_tokens, d_sae] in each block, to out [n_tokens, n_blocks].

    Column c is in block c % n_blocks.
    """
    d_sae, n_blocks = product.shape[1], out.shape[1]
    _launch_blocks(_block_maxima, out, product, bias, scale, out, d_sae, n_blocks, triton.cdiv(d_sae, n_blocks))


def block_scores(product: Tensor, bias: Tensor, scale: Tensor | None, blocks: Tensor, n_blocks: int) -> Tensor:
    """The scores of all members of some blocks, [n_tokens, n_chosen * size]; -inf for a member beyond the last column.

    Member j of block c is column j n_blocks + c; the members of one block are adjacent; `blocks` [n_tokens, n_chosen].
    """
    (n_tokens, d_sae), n_chosen = product.shape, blocks.shape[1]
    size = triton.cdiv(d_sae, n_blocks)
    out = product.new_empty(n_tokens, n_chosen * size, dtype=promoted_dtype(product, bias, scale))
    _launch_blocks(_block_scores, out, product, bias, scale, blocks.contiguous(), out, d_sae, n_blocks, n_chosen, size)
    return out


def _launch_blocks(
    kernel: Any, out: Tensor, product: Tensor, bias: Tensor, scale: Tensor | None, *args: Tensor | int
) -> None:
    n_tokens, n_columns = out.shape
    with torch.cuda.device_of(out):
        kernel[n_tokens, triton.cdiv(n_columns, BLOCKS)](
            product,
            bias.contiguous(),
            (bias if scale is None else scale).contiguous(),
            *args,
            SCALED=scale is not None,
            BLOCKS=BLOCKS,
            SUM=sum_type(out),
        )


def chunk_of(d_out: int) -> int:
    """Columns of a program for rows of that width."""
    if d_out < CHUNKS[-1]:
        return max(16, triton.next_power_of_2(d_out))
    return min(CHUNKS, key=lambda chunk: -d_out % chunk)


def entries_of(chunk: int) -> int:
    """Rows that a program of so many columns has in flight."""
    return max(8, IN_FLIGHT // chunk)


def warps_of(chunk: int) -> int:
    """Warps of a program whose threads read 16 bytes of float32 at a time."""
    return max(1, chunk // 128)


def sum_type(tensor: Tensor) -> Any:
    """The type in which kernels add."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@triton.jit
def _sum_by_token(
    indices, values, rows, out, k, d_out: constexpr, CHUNK: constexpr, ENTRIES: constexpr, SUM: constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = columns < d_out
    total = tl.zeros([CHUNK], dtype=SUM)
    for first in range(0, k, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        active = entries < k
        index = tl.load(indices + token * k + entries, mask=active, other=0).to(tl.int64)
        value = tl.load(values + token * k + entries, mask=active, other=0.0).to(SUM)
        mask = active[:, None] & inside[None, :]
        row = tl.load(rows + index[:, None] * d_out + columns[None, :], mask=mask, other=0.0).to(SUM)
        total += tl.sum(value[:, None] * row, axis=0)
    tl.store(out + token * d_out + columns, total, mask=inside)


@triton.jit
def _sum_by_feature(
    starts, tokens, order, values, by_token, out, d_out: constexpr, CHUNK: constexpr, ENTRIES: constexpr, SUM: constexpr
):
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = columns < d_out
    start = tl.load(starts + feature)
    stop = tl.load(starts + feature + 1)
    total = tl.zeros([CHUNK], dtype=SUM)
    for first in range(start, stop, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        active = entries < stop
        token = tl.load(tokens + entries, mask=active, other=0).to(tl.int64)
        value = tl.load(values + tl.load(order + entries, mask=active, other=0), mask=active, other=0.0).to(SUM)
        mask = active[:, None] & inside[None, :]
        row = tl.load(by_token + token[:, None] * d_out + columns[None, :], mask=mask, other=0.0).to(SUM)
        total += tl.sum(value[:, None] * row, axis=0)
    tl.store(out + feature * d_out + columns, total, mask=inside)


@triton.jit
def _dots(
    indices, by_token, rows, shares, n_tokens, k, d_out: constexpr, CHUNK: constexpr, ENTRIES: constexpr, SUM: constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = columns < d_out
    g = tl.load(by_token + token * d_out + columns, mask=inside, other=0.0).to(SUM)
    mine = shares + (tl.program_id(1).to(tl.int64) * n_tokens + token) * k
    for first in range(0, k, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        active = entries < k
        index = tl.load(indices + token * k + entries, mask=active, other=0).to(tl.int64)
        mask = active[:, None] & inside[None, :]
        row = tl.load(rows + index[:, None] * d_out + columns[None, :], mask=mask, other=0.0).to(SUM)
        tl.store(mine + entries, tl.sum(g[None, :] * row, axis=1), mask=active)


@triton.jit
def _transpose(source, out, n_rows, n_columns, source_row, source_column, out_row, out_column, TILE: constexpr):
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    column = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    read = source + row[:, None] * source_row + column[None, :] * source_column
    tile = tl.load(read, mask=(row[:, None] < n_rows) & (column[None, :] < n_columns))
    write = out + column[:, None] * out_row + row[None, :] * out_column
    tl.store(write, tl.trans(tile), mask=(column[:, None] < n_columns) & (row[None, :] < n_rows))


@triton.jit
def _block_maxima(
    product, bias, scale, out, d_sae, n_blocks, size, SCALED: constexpr, BLOCKS: constexpr, SUM: constexpr
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    largest = tl.full([BLOCKS], float("-inf"), dtype=SUM)
    for member in range(size):
        column = member * n_blocks + block
        inside = (block < n_blocks) & (column < d_sae)
        score = tl.load(product + token * d_sae + column, mask=inside, other=0.0).to(SUM)
        score += tl.load(bias + column, mask=inside, other=0.0).to(SUM)
        if SCALED:
            score *= tl.load(scale + column, mask=inside, other=0.0).to(SUM)
        largest = tl.maximum(largest, tl.where(inside, score, float("-inf")))
    tl.store(out + token * n_blocks + block, largest, mask=block < n_blocks)


@triton.jit
def _block_scores(
    product,
    bias,
    scale,
    blocks,
    out,
    d_sae,
    n_blocks,
    n_chosen,
    size,
    SCALED: constexpr,
    BLOCKS: constexpr,
    SUM: constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    candidate = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    present = candidate < n_chosen * size
    block = tl.load(blocks + token * n_chosen + candidate // size, mask=present, other=0)
    column = (candidate % size) * n_blocks + block
    inside = present & (column < d_sae)
    score = tl.load(product + token * d_sae + column, mask=inside, other=0.0).to(SUM)
    score += tl.load(bias + column, mask=inside, other=0.0).to(SUM)
    if SCALED:
        score *= tl.load(scale + column, mask=inside, other=0.0).to(SUM)
    tl.store(out + token * n_chosen * size + candidate, tl.where(inside, score, float("-inf")), mask=present)


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
