"""What the paths of a joint_nfm write in a training step, summed up while its features are chosen in stages.

A path that is a sum over features gains from stage to stage what the new ones write, and the pooled interactions the pairs that
these make, so that each feature is read once, and the gradient of each weight is one sum over the entries of all stages
(`sums.Shared`). Made anew in every stage are the paths that read the n strongest features, and the pooling of a registered head.
All in at least float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from sae_nfm.architectures.nfm_paths import Paths
from sae_nfm.kernels import BILINEAR, SparseActs, dispatch, reference, sums, wide
from sae_nfm.kernels.ranking import Parts


class StagedPaths:
    """Sums over the features chosen so far; activations are [n_tokens, k].

    Args:
        sae: whose weights they are, a training SAE.
        W_dec: its decoder, as the step reads it, and the norms that its rows are divided by; None for 1.
        reads_all: whether the linear path reads all features chosen, and so is part of the sum of the direct path.
    """

    def __init__(self, sae: Any, W_dec: Tensor, norms: Tensor | None, *, reads_all: bool) -> None:
        cfg = sae.cfg
        self.sae, self.norms, self.reads_all = sae, norms, reads_all
        self.per_norm = None if norms is None else reference.divisor(wide(norms)).reciprocal()
        self.W_dec = sums.Shared(wide(W_dec))
        self.W_lin = sums.Shared(wide(sae.W_lin)) if reads_all else None
        self.U = sums.Shared(wide(sae.U)) if cfg.use_square_path else None
        summed = cfg.head in ("fm", "mlp", BILINEAR) and cfg.nfm_top_k in (None, cfg.k)
        self.V = sums.Shared(wide(sae.V)) if summed else None
        self.direct: Tensor | None = None
        self.square: Tensor | None = None
        self.embedded: Tensor | None = None
        """sum_i f_i v_i, for "bilinear" of both projections."""
        self.pooled: Tensor | None = None
        self.code: Tensor | None = None
        """Hidden units, less what they are without any feature, when `explained` was last asked for."""
        nothing = self.W_dec.weight.new_zeros(1, 1)
        acts = SparseActs(nothing.long(), nothing)
        self.without_features = (
            None if cfg.head == "none" else self._hidden(dispatch.pooled(cfg.head, acts, wide(sae.V)))
        )

    @property
    def parts(self) -> Parts | None:
        """What `explained` is made of, asked for after it."""
        return parts_of(self.sae, self.norms, self.sae.cfg.k, lambda _: cast(Tensor, self.code))

    def add(self, new: SparseActs) -> None:
        """Add what features write that were not chosen before."""
        values = new.values if self.per_norm is None else new.values * dispatch.of_active(self.per_norm, new)
        self.direct = _plus(self.direct, self.W_dec.rows(new.indices, values))
        if self.W_lin is not None:
            self.direct = self.direct + self.W_lin.rows(new.indices, new.values)
        if self.U is not None:
            squares = new.values.square() / self.sae.cfg.square_scale
            self.square = _plus(self.square, self.U.rows(new.indices, squares))
        if self.V is not None:
            self._pool(new, self.V)

    def _pool(self, new: SparseActs, V: sums.Shared) -> None:
        """Add the pairs that new features make with those chosen before and with each other."""
        embedded = V.rows(new.indices, new.values)
        if self.sae.cfg.head == "mlp":
            self.pooled = _plus(self.pooled, embedded)
            return
        if self.sae.cfg.head == BILINEAR:
            self.embedded = _plus(self.embedded, embedded)
            self.pooled = reference.of_halves(self.embedded)
            return
        if self.embedded is not None:
            self.pooled = _plus(self.pooled, self.embedded * embedded)
        if new.indices.shape[-1] > 1:
            self.pooled = _plus(self.pooled, dispatch.bi_interaction(new, V.weight))
        elif self.pooled is None:
            self.pooled = torch.zeros_like(embedded)
        self.embedded = _plus(self.embedded, embedded)

    def explained(self, acts: SparseActs) -> Tensor:
        """y: what all paths write more than without any feature, given all that were added; pure inference, without dropout."""
        assert self.direct is not None
        found = self.direct if self.square is None else self.direct + self.square
        linear = self._linear(acts)
        if linear is not None:
            found = found + linear
        if self.without_features is not None:
            code = _gated(self.sae, self._hidden(self._pooled(acts))) - _gated(self.sae, self.without_features)
            self.code = code.detach()
            found = found + code @ wide(self.sae.W_2)
        return found

    def written(self, acts: SparseActs, dropout: Callable[[Tensor], Tensor]) -> Paths:
        """All paths with their biases, in the type of the parameters; the linear one in the direct where it reads all."""
        assert self.direct is not None
        sae, linear, interaction = self.sae, self._linear(acts), None
        bias = sae.b_dec + sae.b_lin if self.reads_all else sae.b_dec
        if sae.cfg.head != "none":
            hidden = self._hidden(dropout(self._pooled(acts)))
            interaction = reference.interaction_output(
                hidden, wide(sae.W_2), wide(sae.b_2), gated=sae.cfg.head != BILINEAR
            )
        paths = (self.direct + bias, None if linear is None else linear + sae.b_lin, self.square, interaction)
        return Paths(*(None if path is None else path.to(sae.dtype) for path in paths))  # pyright: ignore[reportArgumentType]

    def _linear(self, acts: SparseActs) -> Tensor | None:
        if self.reads_all or not self.sae.cfg.use_linear_path:
            return None
        return dispatch.weighted_rows(_read(self.sae.cfg, acts), wide(self.sae.W_lin))

    def _pooled(self, acts: SparseActs) -> Tensor:
        if self.pooled is not None:
            return self.pooled
        return dispatch.pooled(self.sae.cfg.head, _read(self.sae.cfg, acts), wide(self.sae.V))

    def _hidden(self, pooled: Tensor) -> Tensor:
        return _hidden(self.sae, pooled)


def sums_by_feature(cfg: Any, k: int) -> int:
    """How many parts of what k features write together have a row for each; 0 where what one writes depends on the others."""
    reads_all = not cfg.use_linear_path or cfg.nfm_top_k is None or cfg.nfm_top_k >= k
    return (1 + cfg.use_square_path) * reads_all


@torch.no_grad()
def parts_of(
    sae: Any, norms: Tensor | None, k: int, code: Callable[[SparseActs], Tensor] | None = None
) -> Parts | None:
    """What k features of a joint_nfm write together, by its weights alone and without dropout.

    None where its linear path reads the strongest features only: what one writes depends on the others then.

    Args:
        sae: in training or not.
        norms: what the rows of its decoder are divided by; None for 1.
        code: what the hidden units make of activations, where that is known.
    """
    cfg, W_dec = sae.cfg, wide(sae.W_dec)
    if not sums_by_feature(cfg, k):
        return None
    rows = W_dec if norms is None else W_dec / reference.divisor(wide(norms))[:, None]
    rows = rows + wide(sae.W_lin) if cfg.use_linear_path else rows
    squares = wide(sae.U) / cfg.square_scale if cfg.use_square_path else None
    if cfg.head == "none":
        return Parts(rows=rows, squares=squares)
    return Parts(rows=rows, squares=squares, mixed=wide(sae.W_2), code=code or partial(_code, sae))


def _code(sae: Any, acts: SparseActs) -> Tensor:
    def hidden(acts: SparseActs) -> Tensor:
        pooled = dispatch.pooled(sae.cfg.head, _read(sae.cfg, acts), wide(sae.V))
        return _gated(sae, _hidden(sae, pooled))

    nothing = acts.values.new_zeros(1, 1)
    return hidden(acts) - hidden(SparseActs(nothing.long(), nothing))


def _hidden(sae: Any, pooled: Tensor) -> Tensor:
    return pooled if sae.cfg.head == BILINEAR else reference.hidden_pre(pooled, wide(sae.W_1), wide(sae.b_1))


def _gated(sae: Any, hidden: Tensor) -> Tensor:
    return hidden if sae.cfg.head == BILINEAR else hidden.relu()


def _read(cfg: Any, acts: SparseActs) -> SparseActs:
    n = cfg.nfm_top_k
    return acts if n is None or n >= acts.indices.shape[-1] else reference.top_n(acts, n)


def _plus(summed: Tensor | None, more: Tensor) -> Tensor:
    return more if summed is None else summed + more
