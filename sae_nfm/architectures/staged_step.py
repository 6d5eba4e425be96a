"""What the paths of a joint_nfm write in a training step, summed up while its features are chosen in stages.

A path that is a sum over features gains from stage to stage what the new ones write, so that each feature is read once, and the
gradient of each weight is one sum over the entries of all stages (`sums.Shared`). The others are made anew in every stage: the
interaction path, and the linear one where it reads the n strongest. All in at least float32.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sae_nfm.architectures.nfm_paths import Paths
from sae_nfm.kernels import SparseActs, dispatch, reference, sums, wide


class StagedPaths:
    """Sums over the features chosen so far; activations are [n_tokens, k].

    Args:
        sae: whose weights they are, a training SAE.
        W_dec: its decoder, as the step reads it, and the norms that its rows are divided by; None for 1.
        reads_all: whether the linear path reads all features chosen, and so is part of the sum of the direct path.
    """

    def __init__(self, sae: Any, W_dec: Tensor, norms: Tensor | None, *, reads_all: bool) -> None:
        self.sae, self.reads_all = sae, reads_all
        self.per_norm = None if norms is None else reference.divisor(wide(norms)).reciprocal()
        self.W_dec = sums.Shared(wide(W_dec))
        self.W_lin = sums.Shared(wide(sae.W_lin)) if reads_all else None
        self.U = sums.Shared(wide(sae.U)) if sae.cfg.use_square_path else None
        self.direct: Tensor | None = None
        self.square: Tensor | None = None
        nothing = self.W_dec.weight.new_zeros(1, 1)
        self.without_features = self._interaction(SparseActs(nothing.long(), nothing))

    def add(self, new: SparseActs) -> None:
        """Add what features write that were not chosen before."""
        values = new.values if self.per_norm is None else new.values * dispatch.of_active(self.per_norm, new)
        self.direct = _plus(self.direct, self.W_dec.rows(new.indices, values))
        if self.W_lin is not None:
            self.direct = self.direct + self.W_lin.rows(new.indices, new.values)
        if self.U is not None:
            squares = new.values.square() / self.sae.cfg.square_scale
            self.square = _plus(self.square, self.U.rows(new.indices, squares))

    def explained(self, acts: SparseActs) -> Tensor:
        """y: what all paths write more than without any feature, given all that were added; pure inference, without dropout."""
        assert self.direct is not None
        found = self.direct if self.square is None else self.direct + self.square
        linear, interaction = self._linear(acts), self._interaction(acts)
        if linear is not None:
            found = found + linear
        if interaction is not None and self.without_features is not None:
            found = found + (interaction - self.without_features)
        return found

    def written(self, acts: SparseActs, dropout: Callable[[Tensor], Tensor]) -> Paths:
        """All paths with their biases, in the type of the parameters; the linear one in the direct where it reads all."""
        assert self.direct is not None
        sae, linear = self.sae, self._linear(acts)
        bias = sae.b_dec + sae.b_lin if self.reads_all else sae.b_dec
        paths = (
            self.direct + bias,
            None if linear is None else linear + sae.b_lin,
            self.square,
            self._interaction(acts, dropout),
        )
        return Paths(*(None if path is None else path.to(sae.dtype) for path in paths))  # pyright: ignore[reportArgumentType]

    def _read(self, acts: SparseActs) -> SparseActs:
        n = self.sae.cfg.nfm_top_k
        return acts if n is None or n >= acts.indices.shape[-1] else reference.top_n(acts, n)

    def _linear(self, acts: SparseActs) -> Tensor | None:
        if self.reads_all or not self.sae.cfg.use_linear_path:
            return None
        return dispatch.weighted_rows(self._read(acts), wide(self.sae.W_lin))

    def _interaction(
        self, acts: SparseActs, dropout: Callable[[Tensor], Tensor] = lambda pooled: pooled
    ) -> Tensor | None:
        sae = self.sae
        if sae.cfg.head == "none":
            return None
        V, W_1, b_1, W_2, b_2 = (wide(getattr(sae, name)) for name in ("V", "W_1", "b_1", "W_2", "b_2"))
        pooled = dropout(dispatch.pooled(sae.cfg.head, self._read(acts), V))
        return reference.interaction_output(reference.hidden_pre(pooled, W_1, b_1), W_2, b_2)


def _plus(summed: Tensor | None, more: Tensor) -> Tensor:
    return more if summed is None else summed + more
