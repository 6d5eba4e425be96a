"""Which features come next: the largest scores of those not chosen yet, once what the chosen ones explain is subtracted.

    `Everything`    multiplies what is not explained with W_enc again
    `Gram`          subtracts rows of W_dec W_enc from scores that it keeps, as Batch-OMP does (Rubinstein et al. 2008)
    `Pool`          makes the scores of some candidates alone anew

For T stages of n tokens, d = d_in, S = d_sae and C candidates they take about 2 T n d S FLOPs, 2 n d S + 2 S d S, and
2 n d S + 2 T n d C. Scores have no gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from sae_nfm.kernels import sums
from sae_nfm.kernels.device import ranks_in_bfloat16
from sae_nfm.kernels.reference import SparseActs
from sae_nfm.kernels.topk import largest, top_hidden_pre

Encoder = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Input [*batch, d_in], W_enc, b_enc, and the decoder norms that scale the pre-activations, if any."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What y, which features write together, is made of: y(f) = f rows + f^2 squares + code(f) mixed."""

    rows: Float[Tensor, "d_sae d_in"]
    squares: Float[Tensor, "d_sae d_in"] | None = None
    mixed: Float[Tensor, "n_codes d_in"] | None = None
    code: Callable[[SparseActs], Float[Tensor, "n_tokens n_codes"]] | None = None
    """There with `mixed`; 0 without any feature."""

    @property
    def n_products(self) -> int:
        """How many parts have a row for each feature."""
        return 1 + (self.squares is not None)


class Ranking(ABC):
    """Features in the order in which they are chosen."""

    @abstractmethod
    def take(
        self, size: int, acts: SparseActs | None, explained: Float[Tensor, "n_tokens d_in"] | None
    ) -> Int[Tensor, "n_tokens size"]:
        """The largest of those not taken yet.

        Args:
            acts: all that were taken, in that order; None for the first.
            explained: what they write.
        """


class Pool(Ranking):
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

    @override
    @torch.no_grad()
    def take(self, size: int, acts: SparseActs | None, explained: Tensor | None) -> Tensor:
        scores = self.scores
        if explained is not None:
            fed_back = sums.dots(self.indices, explained, self.columns)
            scores = scores - (fed_back if self.norms is None else fed_back * self.norms)
        position = scores.topk(size, dim=-1, sorted=False).indices
        self.scores = self.scores.scatter(-1, position, -torch.inf)
        return self.indices.gather(-1, position)


class Everything(Ranking):
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

    @override
    @torch.no_grad()
    def take(self, size: int, acts: SparseActs | None, explained: Tensor | None) -> Tensor:
        sae_in, W_enc, b_enc, norms = self.encoder
        if acts is None or explained is None:
            return top_hidden_pre(sae_in, W_enc, b_enc, norms, size)[0]
        unexplained, wanted = sae_in - explained, acts.indices.shape[-1] + size
        if self.rough is None:
            indices, scores = top_hidden_pre(unexplained, W_enc, b_enc, norms, wanted)
        else:
            more = min(wanted + size, len(b_enc))
            indices = top_hidden_pre(unexplained.bfloat16(), self.rough, b_enc, norms, more)[0]
            scores = sums.dots(indices, unexplained, self.columns) + b_enc[indices]
            scores = scores if norms is None else scores * norms[indices]
        taken = (indices[..., None] == acts.indices[:, None]).any(dim=-1)
        position = scores.masked_fill(taken, -torch.inf).topk(size, dim=-1, sorted=False).indices
        return indices.gather(-1, position)


class Gram(Ranking):
    """All features as candidates, whose scores are kept: rows of (what a feature writes) W_enc are subtracted.

    Args:
        scores: pre-activations of all features, times n; they are changed.
        parts: what is subtracted.
        W_enc: with at least float32, as everything here.
        norms: n, None for 1.
    """

    @torch.no_grad()
    def __init__(
        self,
        scores: Float[Tensor, "n_tokens d_sae"],
        parts: Parts,
        W_enc: Float[Tensor, "d_in d_sae"],
        norms: Float[Tensor, " d_sae"] | None,
    ) -> None:
        # above those taken, even one that a hook has set to -inf
        self.scores = scores.clamp_(min=torch.finfo(scores.dtype).min)
        scaled = W_enc if norms is None else W_enc * norms
        self.rows, self.squares, self.mixed = (
            None if part is None else part.detach() @ scaled for part in (parts.rows, parts.squares, parts.mixed)
        )
        self.code, self.last_code = parts.code, scores.new_zeros(())
        self.n_taken = 0

    @staticmethod
    def pays(n_tokens: int, d_sae: int, n_products: int, n_stages: int) -> bool:
        """Whether it is cheaper than to rank everything anew, in the memory of five times the scores at most.

        Args:
            n_products: of how many parts of y the rows are multiplied with W_enc (`Parts.n_products`).
        """
        return 0 < n_products * d_sae <= min(4, (n_stages - 1) / 2) * n_tokens

    @override
    @torch.no_grad()
    def take(self, size: int, acts: SparseActs | None, explained: Tensor | None) -> Tensor:
        if acts is not None:
            indices, values = (part[:, self.n_taken :].detach() for part in acts)
            self.n_taken = acts.indices.shape[-1]
            for rows, written in ((self.rows, values), (self.squares, values.square())):
                if rows is not None:
                    self.scores.sub_(sums.sum_by_token(indices, written, rows))
            if self.mixed is not None and self.code is not None:
                code = self.code(acts)
                self.scores.addmm_(code - self.last_code, self.mixed, alpha=-1)
                self.last_code = code
            self.scores.scatter_(-1, indices, -torch.inf)
        return largest(self.scores, size)
