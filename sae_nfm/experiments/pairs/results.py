"""Pairs found in what a code leaves over: as words for the terminal and as JSON."""

from dataclasses import dataclass
from typing import Any, ClassVar

from sae_nfm.common.results import SavedResult, aligned

SHOWN = 20
"""Pairs in the table."""


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """One pair."""

    first: int
    second: int
    together: int
    """Tokens on which both fire, once composite features are taken apart."""
    share: float
    """Squared error that its product explains, over the variance of the activations."""
    size: float
    """Length of what one unit of the product writes, in units of what the SAE reads."""


@dataclass(frozen=True, kw_only=True)
class PairsResult(SavedResult):
    """All pairs, and the composite features that were taken apart."""

    kind: ClassVar[str] = "pairs/1"

    tokens: int
    fvu: float
    """Of the SAE's features alone, without an interaction path."""
    pairs: tuple[PairRow, ...]
    """The one that explains most first."""
    composites: dict[int, tuple[int, ...]]
    """The parts of each composite feature. They begin anew in the SAE that is saved."""
    provenance: dict[str, Any]
    folder: str | None = None
    """Where the joint_nfm is."""

    def words(self) -> str:
        """The first pairs, and what they are worth."""
        head = ("pair", "together", "share of variance", "size")
        lines = [
            (f"{row.first} x {row.second}", f"{row.together:,}", f"{row.share:.4%}", f"{row.size:.3f}")
            for row in self.pairs[:SHOWN]
        ]
        more = len(self.pairs) - SHOWN
        table = aligned([head, *lines]) + ([f"... and {more} more"] if more > 0 else [])
        share = sum(row.share for row in self.pairs)
        told = [
            f"{len(self.composites)} features are composite: they stand for several others, into which they were taken apart.",
            f"All {len(self.pairs)} pairs explain {share:.2%} of the variance, of {self.fvu:.2%} that the features leave.",
            "This is a ranking, not a test: without any interaction the first pairs are those where features are missing.",
        ]
        return "\n".join([f"{self.tokens:,} tokens", "", *table, "", *told])
