"""A corpus as batches of what the interaction path reads: the only place where the analysis of pairs runs the language model."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_nfm.architectures import attributable
from sae_nfm.attribution.direct_logits import SCALE, DirectPath, Target
from sae_nfm.attribution.pair_effects import observed, unit_written
from sae_nfm.attribution.path_activations import TokenReads, reads_of
from sae_nfm.models import LanguageModel, counted_tokens

PAIRS_AT_ONCE = 2**19
"""Pairs of a batch at most, times tokens: some 100 MB in all tensors and tables of them."""
REMEMBERED = 2**28
"""Bytes of what the paths read and wrote that a corpus remembers between two passes: here 100,000 tokens at d_in 256."""


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Counted tokens of some rows."""

    reads: TokenReads
    row: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]
    """Its position there."""
    directions: Float[Tensor, "#tokens d_in"] | None = None
    """Along which effects are measured, in the space of what the path writes; None for none."""

    @property
    def size(self) -> int:
        """Bytes of what the paths read and wrote."""
        reads = self.reads
        parts = (*reads.read, reads.gates, reads.interaction, *(() if reads.linear is None else (reads.linear,)))
        return sum(part.nbytes for part in parts)

    def split(self, n_pairs: int) -> Iterator["TokenBatch"]:
        """In pieces of at most about `n_pairs` pairs."""
        n = self.reads.read.indices.shape[-1]
        size = max(1, n_pairs // max(1, n * (n - 1) // 2))
        several = self.directions is not None and len(self.directions) > 1
        for reads, start in zip(self.reads.split(size), range(0, len(self.row), size), strict=True):
            piece = slice(start, start + size)
            directions = self.directions[piece] if several and self.directions is not None else self.directions
            yield TokenBatch(reads=reads, row=self.row[piece], position=self.position[piece], directions=directions)


class Corpus:
    """Rows of tokens that can be gone through several times.

    What the first batches read is remembered, up to `REMEMBERED` bytes; for the others the language model runs in every pass.

    Args:
        tokens: held-out rows, each beginning with BOS where the model wants one.
        target: measure each pair's direct effect on it; or a fixed direction [d_in] in the space of what the path writes.

    Raises:
        ValueError: see `attributable` and `DirectPath`; or no token is counted (not special, not in position 0).
    """

    def __init__(
        self,
        model: LanguageModel,
        sae: SAE[Any],
        tokens: Int[Tensor, "rows pos"],
        *,
        target: Target | Float[Tensor, " d_in"] | None = None,
        batch_rows: int = 16,
        show_progress: bool = True,
    ) -> None:
        self.sae = attributable(sae)
        self._model, self.tokens, self._target = model, tokens, target
        self._batch_rows, self._show_progress = batch_rows, show_progress
        self._remembered, self._left = dict[int, TokenBatch](), REMEMBERED
        self._direct = DirectPath(model, sae) if isinstance(target, Target) else None
        if not counted_tokens(model, tokens).any():
            raise ValueError(f"no tokens to read: all {tokens.numel()} are special or at position 0; provide more text")

    @property
    def directed(self) -> bool:
        """Whether there is a target or a direction that effects are on."""
        return self._target is not None

    def batches(self, what: str) -> Iterator[TokenBatch]:
        """One pass.

        Args:
            what: is done with them, for the progress bar.
        """
        with tqdm(total=len(self.tokens), desc=what, unit="row", disable=not self._show_progress) as progress:
            for first in range(0, len(self.tokens), self._batch_rows):
                rows = self.tokens[first : first + self._batch_rows]
                counted = counted_tokens(self._model, rows)
                if counted.any():
                    yield from self._batch(rows, counted, first).split(PAIRS_AT_ONCE)
                progress.update(len(rows))

    def _batch(self, rows: Tensor, counted: Tensor, first: int) -> TokenBatch:
        if first in self._remembered:
            return self._remembered[first]
        batch = self._read(rows, counted, first)
        if batch.size <= self._left:
            self._remembered[first] = batch
            self._left -= batch.size
        return batch

    @torch.no_grad()
    def _read(self, rows: Tensor, counted: Tensor, first: int) -> TokenBatch:
        seen = dict[str, Any]()
        with observed(self._model, self.sae, seen):
            self._model(rows)
        row, position = counted.nonzero(as_tuple=True)
        reads = reads_of(seen).of(counted.flatten())
        directions = self._target[None] if isinstance(self._target, Tensor) else None
        if isinstance(self._target, Target):
            assert self._direct is not None
            scale = seen[SCALE][counted] if SCALE in seen else None
            directions = self._direct.directions([self._target], scale, reads.interaction) * unit_written(seen)[counted]
        return TokenBatch(reads=reads, row=row + first, position=position, directions=directions)

    def text(self, row: int, position: int, *, before: int = 12, after: int = 4) -> str:
        """A token within its row, in [[double brackets]]; ids where the model has no tokenizer."""
        tokenizer: Any = self._model.tokenizer
        ids = self.tokens[row].tolist()
        parts = (ids[max(0, position - before) : position], [ids[position]], ids[position + 1 : position + 1 + after])
        if tokenizer is None:
            left, token, right = (" ".join(map(str, part)) for part in parts)
        else:
            left, token, right = (tokenizer.decode(part) for part in parts)
        return f"{left}[[{token}]]{right}"


def first_reads(batches: Iterable[TokenBatch], n_tokens: int) -> TokenReads:
    """What the first tokens read, at most `n_tokens` of them, in memory at once; narrower reads are filled up with zeros."""
    found, total = list[TokenReads](), 0
    for batch in batches:
        size = min(n_tokens - total, len(batch.row))
        found.append(next(batch.reads.split(size)))
        total += size
        if total >= n_tokens:
            break
    return TokenReads.joined(found)
