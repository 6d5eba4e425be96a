"""What a joint NFM-SAE spends its time on, each operation in two forms of one signature, chosen by `kernel`.

    "dense"     the reference: matrices [batch, d_sae], matrix products, plain autograd
    "sparse"    forward and backward over the k active entries of each token

With [bj] the j-th active feature of token b, f_bj its value, w_i the row of feature i and g_b a vector of token b, the sparse
form consists of three sums, none of which makes [batch, d_sae] or [batch, k, d_out]:

    `_sum_by_token`      sum_j f_bj w_[bj]    F.embedding_bag over the features of a token
    `_sum_by_feature`    sum_b f_bi g_b       F.embedding_bag over the tokens of a feature: the same entries, ordered by `route`
    `_dots`              <g_b, w_[bj]>        torch.sparse.sampled_addmm

One product [batch, d_sae] is left, the encoder's x W_enc: all features have to be ranked. It is made in pieces that are not
kept. The sparse form can be differentiated once; for second derivatives take the dense one.
"""

import math
import warnings
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.saes.topk_sae import calculate_topk_aux_acts
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from typing_extensions import override

from sae_nfm import interaction
from sae_nfm.interaction import Acts, SparseActs

Kernel = Literal["dense", "sparse"]
Grads = tuple[Tensor | None, ...]

TOKENS_AT_ONCE = {"cpu": 512, "cuda": 4096}
"""Tokens whose pre-activations [tokens, d_sae] exist at one time. CPU: measured, fewer read W_enc too often. CUDA: a guess."""
TRANSPOSED_BYTES = 2**24
"""Size of the pieces in which W_enc and its gradient are transposed; larger ones come from the system, page by page."""


class Routing(NamedTuple):
    """The active entries ordered by feature, for sums over the tokens of a feature; made by `route`."""

    entries: Int[Tensor, " n_entries"]
    """Positions in the flattened [n_tokens, k] activations; those of one feature are adjacent, in the order of tokens."""
    tokens: Int[Tensor, " n_entries"]
    """The token of each entry."""
    starts: Int[Tensor, " d_sae_plus_1"]
    """Where each feature's entries begin; the last number is n_entries."""


class DeadActs(NamedTuple):
    """Activations of some features only: column j of `acts` is feature `features[j]`."""

    features: Int[Tensor, " n_features"]
    acts: Acts


def route(indices: Int[Tensor, "*batch k"], d_sae: int) -> Routing:
    """Order the active entries by feature: once for all kernels that read features at the same indices."""
    flat = indices.flatten()
    entries = flat.argsort(stable=True)
    starts = F.pad(torch.bincount(flat, minlength=d_sae).cumsum(0), (1, 0))
    return Routing(entries, entries // indices.shape[-1], starts)


def encode(
    sae_in: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    scale: Float[Tensor, " d_sae"] | None,
    k: int,
    *,
    kernel: Kernel = "sparse",
) -> SparseActs:
    """The TopK encoder: the k largest of `(x W_enc + b_enc) * scale`, in no order, then ReLU.

    Differentiable in the four tensors. Among equal entries any choice is valid, and the two forms may choose differently.

    Args:
        sae_in: the encoder's input, b_dec subtracted where the SAE does so.
        W_enc: encoder weight.
        b_enc: encoder bias.
        scale: decoder norms with `rescale_acts_by_decoder_norm`, else None.
        k: active features a token.
        kernel: the form, see the module.
    """
    acts = _top(sae_in, W_enc, b_enc, scale, k, kernel)
    return SparseActs(acts.indices, acts.values.relu())


def weighted_rows(
    acts: Acts,
    weight: Float[Tensor, "d_sae d_out"],
    routing: Routing | None = None,
    *,
    kernel: Kernel = "sparse",
) -> Float[Tensor, "*batch d_out"]:
    """`sum_i f_i weight_i`, differentiable in the values and the weight; dense activations are multiplied as they are.

    Args:
        acts: activations.
        weight: one row per feature.
        routing: `route(acts.indices, d_sae)` to share; with None a backward pass that needs it makes its own.
        kernel: the form, see the module.
    """
    if not isinstance(acts, SparseActs):
        return acts @ weight
    if kernel == "dense":
        return to_dense(acts, len(weight)) @ weight
    batch, k = acts.indices.shape[:-1], acts.indices.shape[-1]
    rows = _WeightedRows.apply(acts.indices.reshape(-1, k), acts.values.reshape(-1, k), weight, routing)
    return rows.reshape(*batch, weight.shape[-1])


def bi_interaction(
    acts: Acts,
    V: Float[Tensor, "d_sae nfm_dim"],
    routing: Routing | None = None,
    *,
    kernel: Kernel = "sparse",
) -> Float[Tensor, "*batch nfm_dim"]:
    """`sum_{i<j} f_i f_j v_i*v_j`, as `interaction.bi_interaction` in at least float32; arguments as `weighted_rows`.

    The sparse form keeps each token's strongest feature s out of the difference of squares:

        z = f_s v_s * r + 1/2 [r^2 - sum_{i != s} f_i^2 v_i^2],    r = sum_{i != s} f_i v_i

    One feature that outweighs all others then costs no precision. Measured in float32 with k = 32 and one feature 10^4 times
    the others: relative error of z 1e-7, of the plain formula 6e-4. A single feature gives exactly 0.
    """
    if not isinstance(acts, SparseActs):
        return interaction.bi_interaction(acts, V)
    if kernel == "dense":
        return interaction.bi_interaction(to_dense(acts, len(V)), V)
    wide, values = _wide(V), _wide(acts.values)
    top = values.abs().argmax(dim=-1, keepdim=True)
    strongest = values.gather(-1, top) * wide[acts.indices.gather(-1, top)[..., 0]]
    others = SparseActs(acts.indices, values.scatter(-1, top, 0.0))
    rest = weighted_rows(others, wide, routing)
    squares = weighted_rows(interaction.squared(others), wide.square(), routing)
    return (strongest * rest + 0.5 * (rest.square() - squares)).to(V.dtype)


def row_norms(weight: Float[Tensor, "d_sae d_out"], *, kernel: Kernel = "sparse") -> Float[Tensor, " d_sae"]:
    """The norm of each row. The gradient takes one pass over the matrix, in torch's own three."""
    return weight.norm(dim=-1) if kernel == "dense" else _RowNorms.apply(weight)


def top_dead(
    sae_in: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    scale: Float[Tensor, " d_sae"] | None,
    dead_mask: Bool[Tensor, " d_sae"],
    k_aux: int,
    *,
    kernel: Kernel = "sparse",
) -> DeadActs:
    """What SAELens's dead-feature loss reads: the k_aux largest pre-activations of dead features, without ReLU.

    The dense form computes and returns all d_sae columns; the sparse form only the dead ones, as a dense matrix where these
    are few. Fewer dead features than k_aux are all taken. The other arguments are those of `encode`.
    """
    features = dead_mask.nonzero()[:, 0]
    k = min(k_aux, len(features))
    if kernel == "dense":
        hidden_pre = _hidden_pre(sae_in, W_enc, b_enc, scale)
        everything = torch.arange(len(dead_mask), device=dead_mask.device)
        return DeadActs(everything, calculate_topk_aux_acts(k, hidden_pre, dead_mask))
    dead = (W_enc.index_select(1, features), b_enc[features], None if scale is None else scale[features])
    if k == len(features):
        return DeadActs(features, _hidden_pre(sae_in, *dead))
    kernel = choose(len(features), k, sae_in.device.type)
    acts = _top(sae_in, *dead, k, kernel)
    return DeadActs(features, acts if kernel == "sparse" else to_dense(acts, len(features)))


def to_dense(acts: SparseActs, d_sae: int) -> Float[Tensor, "*batch d_sae"]:
    """The same activations as a dense tensor."""
    zeros = acts.values.new_zeros(*acts.values.shape[:-1], d_sae)
    return zeros.scatter(-1, acts.indices, acts.values)


def to_coo(acts: SparseActs, d_sae: int) -> Tensor:
    """The same activations as a coalesced COO tensor [*batch, d_sae] with k stored entries a token, zeros included.

    It is what SAELens's trainer takes for its statistics. To decode, keep the `SparseActs`: the gradient of a COO tensor's
    values is slow.
    """
    indices, order = acts.indices.sort(dim=-1)
    batch, k = indices.shape[:-1], indices.shape[-1]
    tokens = torch.arange(batch.numel(), device=indices.device).repeat_interleave(k)
    position = torch.stack([*torch.unravel_index(tokens, batch), indices.flatten()])
    values = acts.values.gather(-1, order).flatten()
    return torch.sparse_coo_tensor(position, values, (*batch, d_sae), is_coalesced=True, check_invariants=False)


RATES = {"cpu": (90e9, 55e9), "cuda": (100e12, 1.2e12)}
"""Matrix products in FLOP/s and gathers of float32 rows in bytes/s. CPU: measured on one core (AVX-512), rows in its last cache.
CUDA: not measured, what an A100 should reach with TF32 products."""


def choose(d_sae: int, k: int, device_type: str) -> Kernel:
    """The form that should be faster for k of d_sae active features.

    The encoder's product x W_enc is common to both. Every other product (a decoder's output, its two gradients, the encoder's)
    costs, for each token and column of the other matrix,

        dense     2 d_sae FLOP   / FLOP/s of matrix products
        sparse    4 k bytes      / bytes/s of gathers

    so that neither the batch nor d_in matters, and sparse wins below k / d_sae = bytes/s / (2 FLOP/s): 0.31 on CPU, where
    training steps for d_in from 64 to 1024 and d_sae from 1024 to 8192 crossed between 1/4 and 1/2, and 0.006 on a GPU with
    tensor cores by the estimate: k = 32 of 50,000 is sparse, the paper's k = 1024 dense. Other devices lack the operations.
    """
    if device_type not in RATES:
        return "dense"
    flops, gathered_bytes = RATES[device_type]
    return "sparse" if 4 * k / gathered_bytes < 2 * d_sae / flops else "dense"


def _hidden_pre(sae_in: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None) -> Tensor:
    hidden_pre = sae_in @ W_enc + b_enc
    return hidden_pre if scale is None else hidden_pre * scale


def _top(sae_in: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, k: int, kernel: Kernel) -> SparseActs:
    """The k largest scaled pre-activations of each token, whatever their sign."""
    if kernel == "dense":
        values, indices = _hidden_pre(sae_in, W_enc, b_enc, scale).topk(k, dim=-1, sorted=False)
        return SparseActs(indices, values)
    batch = sae_in.shape[:-1]
    indices, hidden_pre = _TopHiddenPre.apply(sae_in.reshape(-1, sae_in.shape[-1]), W_enc, b_enc, scale, k)
    values = hidden_pre if scale is None else hidden_pre * scale[indices]
    return SparseActs(indices.reshape(*batch, k), values.reshape(*batch, k))


class _TopHiddenPre(torch.autograd.Function):
    """Indices and values of `x W_enc + b_enc` where `scale` times it is largest; the factor itself is left to autograd."""

    @staticmethod
    @override
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, k: int
    ) -> tuple[Tensor, Tensor]:
        indices, hidden_pre = _rank(x, W_enc, b_enc, scale, k)
        ctx.save_for_backward(x, W_enc, indices)
        return indices, hidden_pre

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, _: Any, grad: Tensor) -> Grads:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W_enc, indices = ctx.saved_tensors
        (d_in, d_sae), (needs_x, needs_W) = W_enc.shape, ctx.needs_input_grad[:2]
        grad, routing = _wide(grad), route(indices, d_sae)
        grad_x = torch.empty_like(x) if needs_x else None
        grad_W = torch.empty_like(W_enc) if needs_W else None
        step = max(1, TRANSPOSED_BYTES // (d_sae * grad.element_size()))
        for rows in (slice(start, start + step) for start in range(0, d_in, step)):
            if grad_x is not None:
                grad_x[:, rows] = _sum_by_token(indices, grad, _wide(W_enc[rows].T))
            if grad_W is not None:
                grad_W[rows] = _sum_by_feature(routing, grad, _wide(x[:, rows])).T
        grad_b = grad.new_zeros(d_sae).index_add_(0, indices.flatten(), grad.flatten())
        return grad_x, grad_W, grad_b, None, None


def _rank(x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Indices and pre-activations [n_tokens, k] of the entries that are largest once scaled."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        # cast here: autocast would remember its copy of W_enc, made without gradient, for later uses of the parameter
        x, W_enc = (tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in (x, W_enc))
    at_once = TOKENS_AT_ONCE.get(x.device.type, len(x))
    promotes = any(tensor is not None and tensor.dtype != x.dtype for tensor in (b_enc, scale))
    # memory from the system is slow, so all pieces use the same; a result of another dtype has its own
    buffers = [None if promotes else x.new_empty(min(at_once, len(x)), len(b_enc)) for _ in range(2)]
    found: list[tuple[Tensor, Tensor]] = []
    for part in x.split(max(at_once, 1)):
        product, scaled = (None if buffer is None else buffer[: len(part)] for buffer in buffers)
        hidden_pre = torch.add(torch.mm(part, W_enc, out=product), b_enc, out=product)
        indices = _top_indices(hidden_pre if scale is None else torch.mul(hidden_pre, scale, out=scaled), k)
        found.append((indices, hidden_pre.gather(-1, indices)))
    indices, hidden_pre = (torch.cat(parts) for parts in zip(*found, strict=True))
    return indices, hidden_pre


def _top_indices(scores: Float[Tensor, "n_tokens d_sae"], k: int) -> Int[Tensor, "n_tokens k"]:
    """Where the k largest entries of each row are.

    On CPU two selections among fewer numbers: there are k entries as large as any in the k blocks of largest maximum, and
    among the columns that are left over from the division into blocks.
    """
    n_tokens, d_sae = scores.shape
    size = 2 ** round(math.log2(d_sae / k) / 2)  # near sqrt(d_sae / k): as many maxima as candidates
    if size < 4 or scores.device.type != "cpu":
        return scores.topk(k, dim=-1, sorted=False).indices
    n_blocks = d_sae // size
    blocks = scores[:, : size * n_blocks].unflatten(-1, (size, n_blocks))  # a block is every n_blocks-th column
    best = blocks.amax(dim=1).topk(k, dim=-1, sorted=False).indices
    members = best[:, None] + n_blocks * torch.arange(size)[:, None]
    left_over = torch.arange(size * n_blocks, d_sae).expand(n_tokens, -1)
    candidates = torch.cat([members.flatten(1), left_over], dim=-1)
    return candidates.gather(-1, scores.gather(-1, candidates).topk(k, dim=-1, sorted=False).indices)


class _WeightedRows(torch.autograd.Function):
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
        grad, grad_values, grad_weight = _wide(grad), None, None
        if ctx.needs_input_grad[1]:
            grad_values = _dots(indices, grad, _wide(weight))
        if ctx.needs_input_grad[2]:
            grad_weight = _sum_by_feature(ctx.routing or route(indices, len(weight)), _wide(values), grad)
        return None, grad_values, grad_weight, None


class _RowNorms(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        norms = weight.norm(dim=-1)
        ctx.save_for_backward(weight, norms)
        return norms

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, norms = ctx.saved_tensors
        return weight * torch.where(norms == 0, 0.0, grad / norms)[:, None]  # 0 where the norm is 0, as in torch


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


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: for sums over many entries, and for operations that know no half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
