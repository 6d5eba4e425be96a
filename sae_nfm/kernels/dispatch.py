"""What a joint NFM-SAE spends its time on, each operation in two forms of one signature, chosen by `kernel`.

    "dense"     the reference: matrices [batch, d_sae], matrix products, plain autograd
    "sparse"    forward and backward over the k active entries of each token

The sparse form makes neither [batch, d_sae] nor [batch, k, d_out], but for the encoder's product x W_enc, since all features
have to be ranked: it is made in pieces that are not kept (`topk`). Everything else is three sums over the active entries
(`sums`, `sparse_sums`). Second derivatives are those of the dense form.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.saes.topk_sae import calculate_topk_aux_acts
from torch import Tensor
from torch.nn import functional as F

from sae_nfm.kernels import reference
from sae_nfm.kernels.device import autocast_off, device_rates, product_dtype, uses_triton, wide
from sae_nfm.kernels.heads import BILINEAR, POOLS
from sae_nfm.kernels.reference import Acts, SparseActs
from sae_nfm.kernels.sparse_sums import BothDecoders, OfActive, PairPool, RowNorms, TopHiddenPre
from sae_nfm.kernels.sums import Routing, Rows
from sae_nfm.kernels.topk import hidden_pre

Kernel = Literal["dense", "sparse"]


class DeadActs(NamedTuple):
    """Activations of some features only: column j of `acts` is feature `features[j]`."""

    features: Int[Tensor, " n_features"]
    acts: Acts


def encode(
    sae_in: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    scale: Float[Tensor, " d_sae"] | None,
    k: int,
    *,
    kernel: Kernel = "sparse",
    gradient: Kernel = "sparse",
) -> SparseActs:
    """The TopK encoder: the k largest of `(x W_enc + b_enc) * scale`, in no order, then ReLU.

    Differentiable in the four tensors. Among equal entries any choice is valid, and the two forms may choose differently.

    Args:
        sae_in: the encoder's input, b_dec subtracted where the SAE does so.
        scale: decoder norms with `rescale_acts_by_decoder_norm`, else None.
        gradient: the form in which the sparse one makes the gradients of input and weight; dense ones are matrix products.
    """
    acts = _top(sae_in, W_enc, b_enc, scale, k, kernel, gradient)
    return SparseActs(acts.indices, acts.values.relu())


def weighted_rows(
    acts: Acts, weight: Float[Tensor, "d_sae d_out"], routing: Routing | None = None, *, kernel: Kernel = "sparse"
) -> Float[Tensor, "*batch d_out"]:
    """`sum_i f_i weight_i`, differentiable in the values and the weight; dense activations are multiplied as they are.

    `routing` is `sums.route(acts.indices, d_sae)` to share; with None a backward pass that needs it makes its own.
    """
    if not isinstance(acts, SparseActs):
        return acts @ weight
    if kernel == "dense":
        values = acts.values.to(product_dtype(weight))  # as the product would, but before there is a matrix of them
        return to_dense(SparseActs(acts.indices, values), len(weight)) @ weight
    rows = Rows.apply(*_flat(acts), weight, routing, None)
    return rows.reshape(*acts.indices.shape[:-1], weight.shape[-1])


def _flat(acts: SparseActs) -> tuple[Tensor, Tensor]:
    """Indices and values, [n_tokens, k]."""
    k = acts.indices.shape[-1]
    return acts.indices.reshape(-1, k), acts.values.reshape(-1, k)


def both_decoders(
    acts: Acts,
    W_dec: Float[Tensor, "d_sae d_in"],
    norms: Float[Tensor, " d_sae"] | None,
    W_lin: Float[Tensor, "d_sae d_in"],
    routing: Routing | None = None,
    *,
    kernel: Kernel = "sparse",
) -> Float[Tensor, "*batch d_in"]:
    """The direct and the linear path where they read the same features, `sum_i f_i (W_dec_i / n_i + W_lin_i)`.

    The dense form multiplies with the sum of the matrices. The sparse form reads the active rows of both, which costs less
    than adding all rows, and sums over the tokens of a feature once for both gradients. The norms n are those of the rows of
    W_dec with `rescale_acts_by_decoder_norm`, else None; a row of norm 0 contributes 0.
    """
    norms = None if norms is None else reference.divisor(norms)
    if kernel == "dense" or not isinstance(acts, SparseActs):
        return weighted_rows(acts, W_lin + (W_dec if norms is None else W_dec / norms[:, None]), kernel="dense")
    rows = BothDecoders.apply(*_flat(acts), W_dec, norms, W_lin, routing)
    return rows.reshape(*acts.indices.shape[:-1], W_dec.shape[-1])


def bi_interaction(
    acts: Acts, V: Float[Tensor, "d_sae nfm_dim"], routing: Routing | None = None, *, kernel: Kernel = "sparse"
) -> Float[Tensor, "*batch nfm_dim"]:
    """`sum_{i<j} f_i f_j v_i*v_j`, as `reference.bi_interaction` in at least float32; arguments as `weighted_rows`.

    The sparse form keeps each token's strongest feature s out of the difference of squares:

        z = f_s v_s * r + 1/2 [r^2 - sum_{i != s} f_i^2 v_i^2],    r = sum_{i != s} f_i v_i

    One feature that outweighs all others then costs no precision. Measured in float32 with k = 32 and one feature 10^4 times
    the others: relative error of z 1e-7, of the plain formula 6e-4. A single feature gives exactly 0.
    """
    if not isinstance(acts, SparseActs):
        return reference.bi_interaction(acts, V)
    if kernel == "dense":
        return reference.bi_interaction(to_dense(acts, len(V)), V)
    if uses_triton(V):
        z = PairPool.apply(*_flat(acts), V.to(reference.ranged(V.dtype)), routing)
        return z.reshape(*acts.indices.shape[:-1], V.shape[-1])
    rows, values = wide(V), wide(acts.values)
    top = values.abs().argmax(dim=-1, keepdim=True)
    strongest = values.gather(-1, top) * F.embedding(acts.indices.gather(-1, top)[..., 0], rows)
    others = SparseActs(acts.indices, values.scatter(-1, top, 0.0))
    rest = weighted_rows(others, rows, routing)
    squares = weighted_rows(reference.squared(others), rows.square(), routing)
    return (strongest * rest + 0.5 * (rest.square() - squares)).to(reference.ranged(V.dtype))


def square_output(
    acts: Acts,
    U: Float[Tensor, "d_sae d_in"],
    scale: float,
    routing: Routing | None = None,
    *,
    kernel: Kernel = "sparse",
) -> Float[Tensor, "*batch d_in"]:
    """`(f^2 / scale) U` in at least float32, as `reference.square_output`; the other arguments as in `weighted_rows`."""
    if not isinstance(acts, SparseActs):
        return reference.square_output(acts, U, scale)
    with autocast_off(U.device):
        squares = SparseActs(acts.indices, wide(acts.values).square())
        return (weighted_rows(squares, wide(U), routing, kernel=kernel) / scale).to(U.dtype)


def pooled(
    head: str,
    acts: SparseActs,
    V: Float[Tensor, "d_sae n_columns"],
    routing: Routing | None = None,
    *,
    kernel: Kernel = "sparse",
) -> Float[Tensor, "*batch nfm_dim"]:
    """The z of a head (`heads`) from the active features: in the forms above; a registered head by autograd."""
    if head == "fm":
        return bi_interaction(acts, V, routing, kernel=kernel)
    if head == "mlp" and kernel == "sparse":
        return weighted_rows(acts, V.to(reference.ranged(V.dtype)), routing)
    if head == BILINEAR and kernel == "sparse":
        embedded = weighted_rows(SparseActs(acts.indices, wide(acts.values)), wide(V), routing)
        return reference.of_halves(embedded).to(reference.ranged(V.dtype))
    return POOLS[head](to_dense(acts, len(V)) if kernel == "dense" else acts, V)


def of_active(
    per_feature: Float[Tensor, " d_sae"], acts: SparseActs, routing: Routing | None = None
) -> Float[Tensor, "*batch k"]:
    """A number of each active feature; its gradient is the same bits every time. `routing` as in `weighted_rows`."""
    return OfActive.apply(per_feature, acts.indices, routing)


def row_norms(
    weight: Float[Tensor, "d_sae d_out"], *, kernel: Kernel = "sparse"
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, "d_sae d_out"]]:
    """The norm of each row, and the weight to go on with: one pass over the matrix then makes the gradient of both uses."""
    return (weight.norm(dim=-1), weight) if kernel == "dense" else RowNorms.apply(weight)


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
        everything = torch.arange(len(dead_mask), device=dead_mask.device)
        return DeadActs(everything, calculate_topk_aux_acts(k, hidden_pre(sae_in, W_enc, b_enc, scale), dead_mask))
    dead = (W_enc.index_select(1, features), b_enc[features], None if scale is None else scale[features])
    if k == len(features):
        return DeadActs(features, hidden_pre(sae_in, *dead))
    kernel = choose(len(features), k, sae_in.device, product_dtype(W_enc))
    acts = _top(sae_in, *dead, k, kernel)
    return DeadActs(features, acts if kernel == "sparse" else to_dense(acts, len(features)))


def to_dense(acts: SparseActs, d_sae: int) -> Float[Tensor, "*batch d_sae"]:
    """The same activations as a dense tensor."""
    return reference.dense_acts(acts, d_sae)


def to_coo(acts: SparseActs, d_sae: int) -> Tensor:
    """The same activations as a coalesced COO tensor [*batch, d_sae] with k stored entries a token, zeros included.

    It is what SAELens's trainer takes for its statistics. To decode, keep the `SparseActs`: the gradient of a COO tensor's
    values is slow.
    """
    indices, order = acts.indices.int().sort(dim=-1)  # int32 sorts faster
    batch, k = indices.shape[:-1], indices.shape[-1]
    tokens = torch.arange(batch.numel(), device=indices.device).repeat_interleave(k)
    of_token = [tokens] if len(batch) == 1 else torch.unravel_index(tokens, batch)  # which waits for a GPU
    position = torch.stack([*of_token, indices.flatten().long()])
    values = acts.values.gather(-1, order).flatten()
    return torch.sparse_coo_tensor(position, values, (*batch, d_sae), is_coalesced=True, check_invariants=False)


def choose(d_sae: int, k: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Kernel:
    """The form that should be faster for a product that reads k of d_sae features, made in `dtype` where it is dense.

    The encoder's product x W_enc is common to both. Every other product (a decoder's output, its two gradients, the encoder's)
    costs, for each token and column of the other matrix,

        dense     2 d_sae FLOP   / FLOP/s of matrix products
        sparse    4 k bytes      / bytes/s of gathers

    so that neither the batch nor d_in matters, and sparse wins below k / d_sae = bytes/s / (2 FLOP/s). On CPU that is 0.31,
    where training steps for d_in from 64 to 1024 and d_sae from 1024 to 8192 crossed between 1/4 and 1/2. A GPU is measured
    when it is first asked about (`device_rates`). By the data sheet of one with tensor cores it is 0.02 in float32 and 0.002 in
    bfloat16: k = 32 of 50,000 is sparse; of the paper's k = 1024 the decoders are dense products, while the pooling of 512,
    always in float32, is sparse. Other devices lack the operations.
    """
    rates = device_rates(device, dtype)
    if rates is None:
        return "dense"
    sparse, dense = 4 * k / rates.gathered_bytes_per_second, 2 * d_sae / rates.flop_per_second
    return "sparse" if sparse < dense else "dense"


def _top(
    sae_in: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    scale: Tensor | None,
    k: int,
    kernel: Kernel,
    gradient: Kernel = "sparse",
) -> SparseActs:
    """The k largest scaled pre-activations of each token, whatever their sign."""
    if kernel == "dense":
        return reference.top_n(hidden_pre(sae_in, W_enc, b_enc, scale), k)
    batch = sae_in.shape[:-1]
    x = sae_in.reshape(-1, sae_in.shape[-1])
    indices, values = TopHiddenPre.apply(x, W_enc, b_enc, scale, k, gradient == "dense")
    return SparseActs(indices.reshape(*batch, k), values.reshape(*batch, k))
