"""The mathematics of a Neural Factorization Machine on SAE features, as pure functions.

Per token, with feature activations `f` ([d_sae], k of them non-zero), `f_n` the n largest of them and `*` element-wise:

    linear path       f_n W_lin + b_lin
    pooled            z = 1/2 [(f_n V)^2 - (f_n^2)(V^2)] = sum_{i<j} f_i f_j v_i*v_j            [nfm_dim]
    hidden_pre        h = z W_1 + b_1                                                            [nfm_dim]
    interaction path  ReLU(h) W_2 + b_2
    square path       (f^2 / c) U     the diagonal i = j that the pooling leaves out, at full rank

With the bilinear head z = (f_n A) * (f_n B), h = z and the interaction path h W_2 + b_2 (`heads`).

Every function takes the activations either dense or as `SparseActs` and costs O(active features) in the second form.

Source: arXiv 2507.00269 (joint SAE + NFM); He & Chua 2017, arXiv 1708.05027, eq. 4 (bi-interaction pooling in linear
time); Rendle 2010 (factorization machines). The square path is this package's own.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from typing_extensions import override

from sae_nfm.common import short_repr
from sae_nfm.kernels.device import autocast_off, is_transformed, product_dtype
from sae_nfm.kernels.sums import ByFeature, Dots, Rows, route


class SparseActs(NamedTuple):
    """Active features of each token: which, and how strongly. The indices of one token are distinct."""

    __repr__ = short_repr

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
    """The n largest entries of each token's activations, all where there are fewer; among equal entries any choice is valid."""
    sparse = isinstance(acts, SparseActs)
    given = acts.values if sparse else acts
    values, position = given.topk(min(n, given.shape[-1]), dim=-1, sorted=False)
    return SparseActs(acts.indices.gather(-1, position) if sparse else position, values)


def dense_acts(acts: SparseActs, d_sae: int) -> Float[Tensor, "*batch d_sae"]:
    """The same activations as a dense tensor."""
    zeros = acts.values.new_zeros(*acts.values.shape[:-1], d_sae)
    return zeros.scatter_(-1, acts.indices, acts.values)


Backward = Callable[..., Any]


def or_again(formula: Callable[..., Any]) -> Callable[[Backward], Backward]:
    """Of a backward pass that cannot be differentiated: with `create_graph`, autograd's own of a formula takes its place.

    The formula is given the saved tensors and returns the arguments of `forward` and what it makes of them by plain operations.
    """

    def decorate(backward: Backward) -> Backward:
        once = once_differentiable(backward)

        def either(ctx: Any, *grads: Tensor | None) -> Any:
            if not torch.is_grad_enabled():
                return once(ctx, *grads)
            # aliases, since one argument may be made of another
            args, made = formula(*(saved if saved is None else saved.view_as(saved) for saved in ctx.saved_tensors))
            pairs = [(one, grad) for one, grad in zip(made, grads, strict=True) if one is not None and grad is not None]
            wanted = [arg for arg, needed in zip(args, ctx.needs_input_grad, strict=True) if needed]
            outputs, above = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, above, create_graph=True, materialize_grads=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)

        return either

    return decorate


class _Bag(torch.autograd.Function):
    """`F.embedding_bag` by its own backward pass, which cannot be differentiated; with `create_graph` by `sums`."""

    @staticmethod
    @override
    def forward(ctx: Any, indices: Tensor, weight: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(indices, weight, values)
        with torch.enable_grad():
            ctx.own = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in (weight, values)]
            ctx.rows = F.embedding_bag(indices, ctx.own[0], per_sample_weights=ctx.own[1], mode="sum")
        return ctx.rows.detach()

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        indices, weight, values = ctx.saved_tensors
        _, needs_weight, needs_values = ctx.needs_input_grad
        if torch.is_grad_enabled():
            by_feature = ByFeature.apply(indices, values, grad, route(indices, len(weight))) if needs_weight else None
            return None, by_feature, Dots.apply(indices, grad, weight, None, None) if needs_values else None
        wanted = [tensor for tensor in ctx.own if tensor.requires_grad]
        found = iter(torch.autograd.grad(ctx.rows, wanted, grad, retain_graph=True))
        return None, *(next(found) if tensor.requires_grad else None for tensor in ctx.own)


def weighted_rows(acts: Acts, weight: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "*batch d_out"]:
    """`sum_i f_i weight_i`: a dense product, or a gather of the active rows."""
    if not isinstance(acts, SparseActs):
        return acts @ weight
    if is_transformed():
        return dense_acts(acts, len(weight)) @ weight
    k = acts.indices.shape[-1]
    indices, values = acts.indices.reshape(-1, k), acts.values.reshape(-1, k).to(weight.dtype)
    differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if differentiable and weight.requires_grad:
        rows = _Bag.apply(indices, weight, values)
    elif differentiable and values.requires_grad:
        rows = Rows.apply(indices, values, weight, None, None)
    else:
        rows = F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")
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
    """A pooling computed in at least float32, also under autocast; the result has the dtype of V, float32 for float16."""

    @wraps(pool)
    def widened(acts: Acts, V: Tensor) -> Tensor:
        with autocast_off(V.device):
            wide = V.to(torch.promote_types(V.dtype, torch.float32))
            return pool(with_values(acts, lambda f: f.to(wide.dtype)), wide).to(ranged(V.dtype))

    return widened


def ranged(dtype: torch.dtype) -> torch.dtype:
    """float32 in place of float16, whose range ends at 65,504: the square of an activation of 256."""
    return torch.float32 if dtype == torch.float16 else dtype


def in_range(weight: Tensor) -> AbstractContextManager[Any]:
    """Within it, autocast makes no products with a weight in float16."""
    return autocast_off(weight.device) if product_dtype(weight) == torch.float16 else nullcontext()


def divisor(norms: Float[Tensor, " *rows"]) -> Float[Tensor, " *rows"]:
    """Norms to divide by: infinity for one without a finite reciprocal, so that a dead row contributes 0, without gradient."""
    return norms.masked_fill(~norms.reciprocal().isfinite(), torch.inf)


@at_least_float32
def bi_interaction(acts: Acts, V: Float[Tensor, "d_sae nfm_dim"]) -> Float[Tensor, "*batch nfm_dim"]:
    """Bi-interaction pooling `1/2 [(f V)^2 - (f^2)(V^2)]`, the sum over pairs i < j of `f_i f_j v_i*v_j`.

    It is a difference of squares, and where one feature dominates a bfloat16 difference would be rounding error. In float32 that
    error is about 1e-7 times the sum of f_i^2 v_i^2: small beside the pairs unless one feature outweighs all others by orders
    of magnitude, as with a single feature, where z is 0 and the error is all there is.

    Source: He & Chua 2017, eq. 4.
    """
    return 0.5 * (weighted_rows(acts, V).square() - weighted_rows(squared(acts), V.square()))


def summed(acts: Acts, V: Float[Tensor, "d_sae nfm_dim"]) -> Float[Tensor, "*batch nfm_dim"]:
    """`weighted_rows` within the range of float32."""
    with in_range(V):
        return weighted_rows(with_values(acts, lambda f: f.to(ranged(f.dtype))), V.to(ranged(V.dtype)))


@at_least_float32
def bilinear(acts: Acts, V: Float[Tensor, "d_sae n_columns"]) -> Float[Tensor, "*batch nfm_dim"]:
    """`(f A) * (f B)` with V = [A | B]: all pairs `f_i f_j (a_i*b_j + a_j*b_i)` and squares `f_i^2 a_i*b_i`."""
    return of_halves(weighted_rows(acts, V))


def of_halves(embedded: Float[Tensor, "*batch n_columns"]) -> Float[Tensor, "*batch nfm_dim"]:
    """The product of the left and the right half."""
    left, right = embedded.chunk(2, dim=-1)
    return left * right


def per_norm(acts: Tensor, W_dec: Float[Tensor, "d_sae d_in"]) -> Tensor:
    """Activations, dense or COO, over the norms of their decoder rows; 0 for a dead row."""
    return acts * (1 / divisor(W_dec.norm(dim=-1)))


def hidden_pre(
    pooled: Float[Tensor, "*batch nfm_dim"], W_1: Float[Tensor, "nfm_dim nfm_dim"], b_1: Float[Tensor, " nfm_dim"]
) -> Float[Tensor, "*batch nfm_dim"]:
    """The interaction hidden pre-activation `h = z W_1 + b_1`, the code that a secondary SAE decomposes."""
    dtype = torch.promote_types(pooled.dtype, W_1.dtype)
    with in_range(W_1):
        return pooled.to(dtype) @ W_1.to(dtype) + b_1


def interaction_output(
    hidden: Float[Tensor, "*batch nfm_dim"],
    W_2: Float[Tensor, "nfm_dim d_in"],
    b_2: Float[Tensor, " d_in"],
    *,
    gated: bool = True,
) -> Float[Tensor, "*batch d_in"]:
    """What the nonlinear path writes: `ReLU(h) W_2 + b_2`, or without gates `h W_2 + b_2`; in float16 where the weights are."""
    dtype = torch.promote_types(hidden.dtype, W_2.dtype)
    with in_range(W_2):
        written = (hidden.to(dtype).relu() if gated else hidden.to(dtype)) @ W_2.to(dtype) + b_2
    return written.half() if W_2.dtype == torch.float16 else written


def square_output(acts: Acts, U: Float[Tensor, "d_sae d_in"], scale: float) -> Float[Tensor, "*batch d_in"]:
    """What the square path writes, `(f^2 / scale) U`, in at least float32: how a feature's direction bends with its strength."""
    dtype = torch.promote_types(U.dtype, torch.float32)
    with autocast_off(U.device):
        squares = squared(with_values(acts, lambda f: f.to(dtype)))
        return (weighted_rows(squares, U.to(dtype)) / scale).to(U.dtype)
