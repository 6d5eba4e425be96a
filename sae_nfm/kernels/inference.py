"""Features inferred through the decoder: of which features, and how strongly, as pure functions of what decodes them.

    selection in T stages    stage t = 1..T chooses floor(t k / T) - floor((t-1) k / T) features, of those not chosen yet the
                             largest of n_i ((s - y(f)) W_enc + b_enc)_i, with that as their activation where it is > 0
    a refinement             d_i = (J^T r)_i / |column i|^2,   q = J d,   a = clip(r.q / q.q, 0, 1),   f <- ReLU(f + a d)

s is what the encoder reads, n the decoder norms that scale pre-activations (1 without rescaling), D(f) what all paths write,
y(f) = D(f) - D(0), r = x - D(f), J = dD/df on the features chosen, "column i" what feature i writes per unit through the direct
and the linear path. T = 1 is TopK, T = k matching pursuit without a second choice of a feature. The error of a refined token is
computed anew through D, and where it does not fall the token keeps what it had.

J is never made: J^T r is one vector-Jacobian product, J d the one Jacobian-vector product, as the transpose of the first, so that
D may be anything that can be differentiated twice. A refinement is decoded once, for its error and for the next one. Everything
is differentiable but the choice of features and of steps.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import vjp

from sae_nfm.kernels import sums, topk
from sae_nfm.kernels.device import is_transformed
from sae_nfm.kernels.ranking import Encoder, Everything, Gram, Parts, Pool, Ranking
from sae_nfm.kernels.reference import SparseActs, divisor
from sae_nfm.kernels.sparse_sums import OfActive, Transposed
from sae_nfm.kernels.topk import top_hidden_pre


def stage_sizes(k: int, stages: int) -> list[int]:
    """How many of k features each stage chooses."""
    return [t * k // stages - (t - 1) * k // stages for t in range(1, stages + 1)]


def select(
    hidden_pre: Float[Tensor, "*batch d_sae"],
    explained: Callable[[SparseActs], Tensor],
    W_enc: Float[Tensor, "d_in d_sae"],
    norms: Float[Tensor, " d_sae"] | None,
    sizes: Sequence[int],
    candidates: int | None = None,
    parts: Parts | None = None,
) -> SparseActs:
    """Features chosen in stages of these sizes, in the order of stages; entries of one token are distinct.

    Args:
        hidden_pre: what the first stage ranks. Later ones subtract what the features chosen explain of it, so that whatever a
            hook changed there holds in every stage.
        explained: y, from activations to [*batch, d_in].
        norms: n, None for 1.
        candidates: of how many features, those that the first stage ranks highest, later stages choose; None for all.
        parts: what y is made of, where that is known.
    """
    batch, d_sae = hidden_pre.shape[:-1], hidden_pre.shape[-1]
    flat = hidden_pre.reshape(-1, d_sae)
    ranking = _ranking(flat.detach(), W_enc, norms, len(sizes), candidates, parts)
    if ranking is not None:
        acts = _select_by(ranking, flat, explained, W_enc, norms, sizes)
        return SparseActs(*(part.reshape(*batch, -1) for part in acts))
    acts: SparseActs | None = None
    ranked = None if candidates is None else hidden_pre.detach().topk(candidates, dim=-1, sorted=False).indices
    for size in sizes:
        scores = hidden_pre
        if acts is not None:
            fed_back = explained(acts) @ W_enc
            scores = hidden_pre - (fed_back if norms is None else fed_back * norms)
        indices = _largest(scores.detach(), size, acts, ranked)
        acts = _joined(acts, SparseActs(indices, scores.gather(-1, indices).relu()))
    assert acts is not None
    return acts


def _ranking(
    scores: Tensor, W_enc: Tensor, norms: Tensor | None, n_stages: int, candidates: int | None, parts: Parts | None
) -> Ranking | None:
    """One that makes no scores of all features anew, where that pays."""
    if is_transformed():
        return None
    n_tokens, d_sae = scores.shape
    if candidates is not None and n_tokens * candidates >= d_sae:  # W_enc is transposed for it
        scores, ranked = scores.topk(candidates, dim=-1, sorted=False)
        return Pool(ranked, scores, Transposed.apply(W_enc.detach()), norms)
    if candidates is None and parts is not None and Gram.pays(n_tokens, d_sae, parts.n_products, n_stages):
        return Gram(scores.clone(), parts, W_enc.detach(), norms)
    return None


def _select_by(
    ranking: Ranking,
    hidden_pre: Float[Tensor, "n_tokens d_sae"],
    explained: Callable[[SparseActs], Tensor],
    W_enc: Tensor,
    norms: Tensor | None,
    sizes: Sequence[int],
) -> SparseActs:
    """`select` in the order of a ranking; the scores of the features chosen alone are made of what is explained."""
    columns = sums.Shared(Transposed.apply(W_enc))
    acts: SparseActs | None = None
    for size in sizes:
        seen = None if acts is None else explained(acts)
        indices = ranking.take(size, acts, seen)
        values = hidden_pre.gather(-1, indices)
        if seen is not None:
            fed_back = columns.dots(indices, seen)
            values = values - (fed_back if norms is None else fed_back * norms[indices])
        acts = _joined(acts, SparseActs(indices, values.relu()))
    assert acts is not None
    return acts


class Summed(Protocol):
    """What features write, summed up as they are chosen."""

    @property
    def parts(self) -> Parts | None:
        """What y is made of, as constants; None where it is not known to be that."""
        ...

    def add(self, new: SparseActs) -> None:
        """Add features that were not chosen before."""
        ...

    def explained(self, acts: SparseActs) -> Tensor:
        """y, given all that were added."""
        ...


def select_sparsely(encoder: Encoder, sizes: Sequence[int], paths: Summed, candidates: int | None) -> SparseActs:
    """`select` for one batch [n_tokens, d_in], forward and backward over the active features alone.

    Args:
        encoder: what it reads, W_enc, b_enc and n, None for 1.
        paths: every stage's features are added to it.
        candidates: as for `select`.
    """
    sae_in, W_enc, b_enc, norms = encoder
    columns, parts = sums.Shared(Transposed.apply(W_enc)), paths.parts
    if candidates is not None:
        ranking = Pool(*top_hidden_pre(sae_in, W_enc, b_enc, norms, candidates), columns.weight, norms)
    elif parts is not None and Gram.pays(len(sae_in), len(b_enc), parts.n_products, len(sizes)):
        with torch.no_grad():
            ranking = Gram(topk.hidden_pre(sae_in, W_enc, b_enc, norms), parts, W_enc, norms)
    else:
        ranking = Everything(encoder, columns.weight)
    acts: SparseActs | None = None
    for size in sizes:
        explained = None if acts is None else paths.explained(acts)
        unexplained = sae_in if explained is None else sae_in - explained
        indices = ranking.take(size, acts, explained)
        values = columns.dots(indices, unexplained) + OfActive.apply(b_enc, indices, None)
        if norms is not None:
            values = values * OfActive.apply(norms, indices, None)
        new = SparseActs(indices, values.relu())
        paths.add(new)
        acts = _joined(acts, new)
    assert acts is not None
    return acts


def _joined(acts: SparseActs | None, new: SparseActs) -> SparseActs:
    return new if acts is None else SparseActs(*(torch.cat(both, dim=-1) for both in zip(acts, new, strict=True)))


def _largest(scores: Tensor, size: int, chosen: SparseActs | None, ranked: Tensor | None) -> Tensor:
    if chosen is not None:  # below every other, even one that a hook has set to -inf
        scores = scores.clamp(min=torch.finfo(scores.dtype).min).scatter(-1, chosen.indices, -torch.inf)
    if ranked is None:
        return scores.topk(size, dim=-1, sorted=False).indices
    return ranked.gather(-1, scores.gather(-1, ranked).topk(size, dim=-1, sorted=False).indices)


def refine(
    values: Float[Tensor, "*batch n"],
    decode: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch d_in"],
    column_squares: Float[Tensor, "*#batch n"],
    steps: int,
    support: Bool[Tensor, "*batch n"] | None = None,
) -> Float[Tensor, "*batch n"]:
    """Activations >= 0 after so many refinements; the squared error of no token rises.

    Args:
        values: f, of the features chosen, or of all with `support` True where chosen.
        decode: D, from values to [*batch, d_in].
        x: what D is to write.
        column_squares: |column i|^2; a feature with 0 stays as it is.
    """
    rate = divisor(column_squares).reciprocal()
    if support is not None:
        rate = rate * support
    linearised = _by_transforms if is_transformed() or torch.is_inference_mode_enabled() else _by_autograd
    written, transposed = linearised(decode, values)
    moving = torch.ones_like(values[..., :1], dtype=torch.bool)
    for _ in range(steps):
        residual = x - written
        gradient, along = transposed(residual)
        direction = gradient * (rate * moving)  # where the error did not fall once, it would not the same way again
        change = along(direction)
        length = _dot(change, change)
        step = (_dot(residual, change) / length.where(length > 0, 1.0)).clamp(0, 1)
        moved = (values + step * direction).relu()
        rewritten, transposed = linearised(decode, moved)
        moving = _dot(x - rewritten, x - rewritten) < _dot(residual, residual)
        values, written = torch.where(moving, moved, values), torch.where(moving, rewritten, written)
    return values


Along = Callable[[Tensor], Tensor]
Linearised = tuple[Tensor, Callable[[Tensor], tuple[Tensor, Along]]]
"""What is written at some activations, and of a residual r what makes J^T r, with what makes J d of d."""


def _by_autograd(decode: Callable[[Tensor], Tensor], at: Tensor) -> Linearised:
    """The products with J and its transpose as derivatives of derivatives; differentiable themselves where gradients are made."""
    keeps = torch.is_grad_enabled()
    with torch.enable_grad():
        at = _leaf(at, keeps=keeps)
        written = decode(at)

    def transposed(residual: Tensor) -> tuple[Tensor, Along]:
        with torch.enable_grad():
            residual = _leaf(residual, keeps=keeps)
            (gradient,) = torch.autograd.grad(written, at, residual, create_graph=True)

        def along(direction: Tensor) -> Tensor:
            return torch.autograd.grad(gradient, residual, direction, create_graph=keeps, retain_graph=True)[0]

        return gradient if keeps else gradient.detach(), along

    return written if keeps else written.detach(), transposed


def _leaf(tensor: Tensor, *, keeps: bool) -> Tensor:
    """A tensor to differentiate by; with `keeps` it is still made of what it was made of."""
    return tensor.view_as(tensor) if keeps and tensor.requires_grad else tensor.detach().requires_grad_()


def _by_transforms(decode: Callable[[Tensor], Tensor], at: Tensor) -> Linearised:
    """The same by torch.func: within its transforms, and in inference mode, where autograd is not at work."""

    def of_residual(residual: Tensor) -> Tensor:
        return vjp(decode, at)[1](residual)[0]

    def transposed(residual: Tensor) -> tuple[Tensor, Along]:
        gradient, along = vjp(of_residual, residual)[:2]
        return gradient, lambda direction: along(direction)[0]

    return decode(at), transposed


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(dim=-1, keepdim=True)
