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
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import vjp

from sae_nfm.kernels import sums
from sae_nfm.kernels.device import is_transformed, ranks_in_bfloat16
from sae_nfm.kernels.reference import SparseActs, divisor
from sae_nfm.kernels.sparse_sums import OfActive, Transposed
from sae_nfm.kernels.topk import top_hidden_pre

Encoder = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Input [*batch, d_in], W_enc, b_enc, and the decoder norms that scale the pre-activations, if any."""


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
) -> SparseActs:
    """Features chosen in stages of these sizes, in the order of stages; entries of one token are distinct.

    Args:
        hidden_pre: what the first stage ranks. Later ones subtract what the features chosen explain of it, so that whatever a
            hook changed there holds in every stage.
        explained: y, from activations to [*batch, d_in].
        norms: n, None for 1.
        candidates: of how many features, those that the first stage ranks highest, later stages choose; None for all.
    """
    batch, d_sae = hidden_pre.shape[:-1], hidden_pre.shape[-1]
    if candidates is not None and batch.numel() * candidates >= d_sae and not is_transformed():
        # W_enc is transposed for it, which only so many tokens are worth
        acts = _select_among(hidden_pre.reshape(-1, d_sae), explained, W_enc, norms, sizes, candidates)
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


def _select_among(
    hidden_pre: Float[Tensor, "n_tokens d_sae"],
    explained: Callable[[SparseActs], Tensor],
    W_enc: Tensor,
    norms: Tensor | None,
    sizes: Sequence[int],
    candidates: int,
) -> SparseActs:
    """`select` among candidates, whose scores alone are made anew."""
    columns = sums.Shared(Transposed.apply(W_enc))
    scores, ranked = hidden_pre.detach().topk(candidates, dim=-1, sorted=False)
    pool = Pool(ranked, scores, columns.weight, norms)
    acts: SparseActs | None = None
    for size in sizes:
        seen = None if acts is None else explained(acts)
        indices = pool.take(size, seen)
        values = hidden_pre.gather(-1, indices)
        if seen is not None:
            fed_back = columns.dots(indices, seen)
            values = values - (fed_back if norms is None else fed_back * norms[indices])
        acts = _joined(acts, SparseActs(indices, values.relu()))
    assert acts is not None
    return acts


class Summed(Protocol):
    """What features write, summed up as they are chosen."""

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
    columns = sums.Shared(Transposed.apply(W_enc))
    if candidates is None:
        pool = Everything(encoder, columns.weight)
    else:
        pool = Pool(*top_hidden_pre(sae_in, W_enc, b_enc, norms, candidates), columns.weight, norms)
    acts: SparseActs | None = None
    for size in sizes:
        explained = None if acts is None else paths.explained(acts)
        unexplained = sae_in if explained is None else sae_in - explained
        indices = pool.take(size, explained)
        values = columns.dots(indices, unexplained) + OfActive.apply(b_enc, indices, None)
        if norms is not None:
            values = values * OfActive.apply(norms, indices, None)
        new = SparseActs(indices, values.relu())
        paths.add(new)
        acts = _joined(acts, new)
    assert acts is not None
    return acts


class Pool:
    """Candidates of each token, and what becomes of their scores.

    Args:
        indices: which features, those that an encoder ranks highest.
        scores: their pre-activations, times n.
        columns: W_enc transposed in memory.
        norms: n, None for 1.
    """

    def __init__(
        self,
        indices: Int[Tensor, "n_tokens candidates"],
        scores: Float[Tensor, "n_tokens candidates"],
        columns: Float[Tensor, "d_sae d_in"],
        norms: Float[Tensor, " d_sae"] | None,
    ) -> None:
        self.indices, self.columns = indices, columns
        # above those taken, even one that a hook has set to -inf
        self.scores = scores.clamp(min=torch.finfo(scores.dtype).min)
        self.norms = None if norms is None else norms[indices]

    @torch.no_grad()
    def take(self, size: int, explained: Float[Tensor, "n_tokens d_in"] | None) -> Int[Tensor, "n_tokens size"]:
        """The largest, of those not taken yet, once what is explained is subtracted."""
        scores = self.scores
        if explained is not None:
            fed_back = sums.dots(self.indices, explained, self.columns)
            scores = scores - (fed_back if self.norms is None else fed_back * self.norms)
        position = scores.topk(size, dim=-1, sorted=False).indices
        self.scores = self.scores.scatter(-1, position, -torch.inf)
        return self.indices.gather(-1, position)


class Everything:
    """All features as candidates, ranked anew in every stage.

    Where the device multiplies bfloat16 faster, that ranks, and the exact scores of twice as many features as are wanted decide.
    Measured on a trained SAE (2,048 features, k 32, 4 stages): the choice of all of 8,160 tokens is that of the exact ranking.

    Args:
        encoder: as of `select_sparsely`.
        columns: W_enc transposed in memory.
    """

    @torch.no_grad()
    def __init__(self, encoder: Encoder, columns: Float[Tensor, "d_sae d_in"]) -> None:
        self.encoder, self.columns = encoder, columns
        self.rough = encoder[1].bfloat16() if ranks_in_bfloat16(encoder[1]) else None
        self.taken: Tensor | None = None

    @torch.no_grad()
    def take(self, size: int, explained: Float[Tensor, "n_tokens d_in"] | None) -> Int[Tensor, "n_tokens size"]:
        """The largest, of those not taken yet, once what is explained is subtracted."""
        sae_in, W_enc, b_enc, norms = self.encoder
        if explained is None or self.taken is None:
            self.taken = top_hidden_pre(sae_in, W_enc, b_enc, norms, size)[0]
            return self.taken
        unexplained, wanted = sae_in - explained, self.taken.shape[-1] + size
        if self.rough is None:
            indices, scores = top_hidden_pre(unexplained, W_enc, b_enc, norms, wanted)
        else:
            more = min(wanted + size, len(b_enc))
            indices = top_hidden_pre(unexplained.bfloat16(), self.rough, b_enc, norms, more)[0]
            scores = sums.dots(indices, unexplained, self.columns) + b_enc[indices]
            scores = scores if norms is None else scores * norms[indices]
        taken = (indices[..., None] == self.taken[:, None]).any(dim=-1)
        position = scores.masked_fill(taken, -torch.inf).topk(size, dim=-1, sorted=False).indices
        found = indices.gather(-1, position)
        self.taken = torch.cat([self.taken, found], dim=-1)
        return found


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
