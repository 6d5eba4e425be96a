"""The mathematics of a Neural Factorization Machine on SAE features, as pure functions.

Per token, with feature activations `f` ([d_sae], k of them non-zero), `f_n` the n largest of them and `*` element-wise:

    linear path       f_n W_lin + b_lin
    pooled            z = 1/2 [(f_n V)^2 - (f_n^2)(V^2)] = sum_{i<j} f_i f_j v_i*v_j            [nfm_dim]
    hidden_pre        h = z W_1 + b_1                                                            [nfm_dim]
    interaction path  ReLU(h) W_2 + b_2
    square path       (f^2 / c) U     the diagonal i = j that the pooling leaves out, at full rank

Every function takes the activations either dense or as `SparseActs` and costs O(active features) in the second form.

Source: arXiv 2507.00269 (joint SAE + NFM); He & Chua 2017, arXiv 1708.05027, eq. 4 (bi-interaction pooling in linear
time); Rendle 2010 (factorization machines). The square path is this package's own.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


class SparseActs(NamedTuple):
    """Active features of each token: which, and how strongly. The indices of one token are distinct."""

    indices: Int[Tensor, "*batch k"]
    values: Float[Tensor, "*batch k"]


Acts = Float[Tensor, "*batch d_sae"] | SparseActs
Pool = Callable[[Acts, Tensor], Tensor]
"""From activations and V [d_sae, nfm_dim] to the pooled vector z [*batch, nfm_dim]."""


def sparse_acts_from_coo(feature_acts: Tensor, k: int) -> SparseActs | None:
    """The same activations as `SparseActs`, differentiable in the values; None unless each token stores k entries.

    From a COO tensor [*batch, d_sae], as SAELens's TopK makes it; a hook may leave another number of entries.
    """
    coo = feature_acts.coalesce()
    batch, indices, values = coo.shape[:-1], coo.indices(), coo.values()
    if values.numel() != batch.numel() * k:
        return None
    token = torch.zeros_like(indices[-1])
    for dim, size in enumerate(batch):
        token = token * size + indices[dim]
    if not torch.equal(token, torch.arange(batch.numel(), device=token.device).repeat_interleave(k)):
        return None
    # copies, since torch.compile cannot guard a view whose base is sparse
    return SparseActs(indices[-1].clone().reshape(*batch, k), values.clone().reshape(*batch, k))


def sparse_acts_from_dense(feature_acts: Float[Tensor, "*batch d_sae"], k: int) -> SparseActs | None:
    """The same activations as `SparseActs`; None where an edit left a negative one, or more than k active a token."""
    if not feature_acts.numel() or feature_acts.amin() < 0 or feature_acts.count_nonzero(dim=-1).amax() > k:
        return None
    values, indices = feature_acts.topk(k, dim=-1, sorted=False)
    return SparseActs(indices, values)


def top_n(acts: Acts, n: int) -> SparseActs:
    """The n largest entries of each token's activations; among equal entries any choice is valid."""
    sparse = isinstance(acts, SparseActs)
    values, position = (acts.values if sparse else acts).topk(n, dim=-1, sorted=False)
    return SparseActs(acts.indices.gather(-1, position) if sparse else position, values)


def weighted_rows(acts: Acts, weight: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "*batch d_out"]:
    """`sum_i f_i weight_i`: a dense product, or a gather of the active rows."""
    if not isinstance(acts, SparseActs):
        return acts @ weight
    k = acts.indices.shape[-1]
    rows = F.embedding_bag(
        acts.indices.reshape(-1, k), weight, per_sample_weights=acts.values.reshape(-1, k).to(weight.dtype), mode="sum"
    )
    return rows.reshape(*acts.indices.shape[:-1], weight.shape[-1])


def with_values(acts: Acts, change: Callable[[Tensor], Tensor]) -> Acts:
    """The activations with a function of each value, in the form given."""
    return SparseActs(acts.indices, change(acts.values)) if isinstance(acts, SparseActs) else change(acts)


def powers(acts: Acts, exponent: int) -> Acts:
    """`f^exponent`, in the form given."""
    return with_values(acts, lambda f: f.pow(exponent))


def squared(acts: Acts) -> Acts:
    """`f^2`, in the form given."""
    return powers(acts, 2)


def at_least_float32(pool: Pool) -> Pool:
    """A pooling computed in at least float32, also under autocast; the result has the dtype of V."""

    @wraps(pool)
    def widened(acts: Acts, V: Tensor) -> Tensor:
        with torch.autocast(device_type=V.device.type, enabled=False):
            wide = V.to(torch.promote_types(V.dtype, torch.float32))
            return pool(with_values(acts, lambda f: f.to(wide.dtype)), wide).to(V.dtype)

    return widened


@at_least_float32
def bi_interaction(acts: Acts, V: Float[Tensor, "d_sae nfm_dim"]) -> Float[Tensor, "*batch nfm_dim"]:
    """Bi-interaction pooling `1/2 [(f V)^2 - (f^2)(V^2)]`, the sum over pairs i < j of `f_i f_j v_i*v_j`.

    It is a difference of squares, and where one feature dominates a bfloat16 difference would be rounding error. In float32 that
    error is about 1e-7 times the sum of f_i^2 v_i^2: small beside the pairs unless one feature outweighs all others by orders
    of magnitude, as with a single feature, where z is 0 and the error is all there is.

    Source: He & Chua 2017, eq. 4.
    """
    return 0.5 * (weighted_rows(acts, V).square() - weighted_rows(squared(acts), V.square()))


def hidden_pre(
    pooled: Float[Tensor, "*batch nfm_dim"], W_1: Float[Tensor, "nfm_dim nfm_dim"], b_1: Float[Tensor, " nfm_dim"]
) -> Float[Tensor, "*batch nfm_dim"]:
    """The interaction hidden pre-activation `h = z W_1 + b_1`, the code that a secondary SAE decomposes."""
    return pooled @ W_1 + b_1


def interaction_output(
    hidden: Float[Tensor, "*batch nfm_dim"], W_2: Float[Tensor, "nfm_dim d_in"], b_2: Float[Tensor, " d_in"]
) -> Float[Tensor, "*batch d_in"]:
    """What the nonlinear path writes: `ReLU(h) W_2 + b_2`."""
    return hidden.relu() @ W_2 + b_2


def square_output(acts: Acts, U: Float[Tensor, "d_sae d_in"], scale: float) -> Float[Tensor, "*batch d_in"]:
    """What the square path writes, `(f^2 / scale) U`: how a feature's direction bends with its strength."""
    return weighted_rows(squared(acts), U) / scale


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
    counts = flat.new_zeros(d_sae + 1).index_add_(0, flat + 1, torch.ones_like(flat))  # bincount waits for a GPU
    return Routing(entries, entries // indices.shape[-1], counts.cumsum(0))
