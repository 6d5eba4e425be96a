"""What an explorer shows of one SAE: columns over its features, their contexts, the logits they move, the pairs they form.

Lists of different length are one long array with `starts`: those of item i are [starts[i] : starts[i + 1]]. Texts are in
`vocab`; a token is an index into it, and a position is an index into `stream.ids`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """The pieces of the held-out rows in which some context lies."""

    row_starts: Ints
    """Where each piece begins in `ids`, and where the last one ends."""
    ids: Ints
    """The tokens, piece after piece."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Contexts:
    """Tokens on which each feature fires, and where else in their windows it does."""

    starts: Ints
    """Of each feature, into `position`; one more than features."""
    position: Ints
    """The token, in the stream; of one feature descending by activation."""
    mark_starts: Ints
    """Of each context, into `offset` and `strength`; one more than contexts."""
    offset: Ints
    """A token of the window on which the feature fires, relative to the context's."""
    strength: Ints
    """Its activation there in 255ths of the feature's largest, 1 to 255."""

    def of(self, feature: int) -> range:
        """The contexts of a feature, as places in `position`."""
        return range(int(self.starts[feature]), int(self.starts[feature + 1]))

    def marks(self, context: int) -> Iterator[tuple[int, int]]:
        """Offset and strength of every mark of a context."""
        here = slice(self.mark_starts[context], self.mark_starts[context + 1])
        yield from zip(self.offset[here].tolist(), self.strength[here].tolist(), strict=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureFigures:
    """Figures of every feature, [d_sae]; 0 for one that never fired."""

    tokens: Ints
    """Tokens on which it fires (its activation is positive)."""
    max: Floats
    """Largest activation."""
    mean: Floats
    """Mean activation where it fires."""
    histogram: Ints
    """[d_sae, bins]: firings by activation; the bins divide (0, max] of each feature equally."""
    shares: Mapping[str, Mapping[str, Floats]]
    """By gauge and path: the path's part of the sum of the feature's root-mean-square contributions (`path_sums`)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenEffects:
    """Logits that move most, for each feature or pair: as many up, descending, as then down, ascending."""

    starts: Ints
    """Of each feature or pair; one more than there are."""
    token: Ints
    """The token."""
    value: Floats
    """What its logit gains, less the mean over all tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PairFigures:
    """Pairs of features, descending by energy."""

    first: Ints
    """The lower feature."""
    second: Ints
    """The higher one."""
    tokens: Ints
    """Tokens on which both are read."""
    share: Floats
    """Part of the summed energy ||o_ij||^2 of all pairs that fired."""
    norm: Floats
    """Mean ||o_ij|| where the pair fires."""
    max_norm: Floats
    """Largest ||o_ij||."""
    context_starts: Ints
    """Of each pair, into `position` and `context_norm`; one more than pairs."""
    position: Ints
    """A token on which the pair writes much, in the stream; of one pair descending by norm."""
    context_norm: Floats
    """||o_ij|| there."""
    logits: TokenEffects
    """For the mean of what the pair writes, every gate at its mean over all tokens; without any for the weaker pairs."""
    fired: int
    """Pairs that fired, those that are not kept here too."""
    firings: int
    """Pairs that fired, summed over tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Explorer:
    """Everything about one SAE on held-out text."""

    sae: str
    """The SAE, as given."""
    architecture: str
    """SAELens's name of its architecture."""
    model_name: str
    """The language model."""
    hook_name: str
    """Where the SAE is."""
    d_in: int
    """Width there."""
    d_sae: int
    """Number of features."""
    k: int | None
    """Features active on a token, where that is fixed."""
    tokens: int
    """Tokens looked at: not special, not in position 0."""
    documents: int
    """Documents they are from."""
    vocab: tuple[str, ...]
    """Texts of the tokens that occur anywhere in it."""
    stream: TokenTable
    """The text."""
    features: FeatureFigures
    """Figures of the features."""
    contexts: Contexts
    """Where each fires most."""
    quantile_contexts: Contexts
    """Firings of each from its whole range, at evenly spaced ranks."""
    window: tuple[int, int]
    """Tokens before and after a context's that its marks cover."""
    logits: TokenEffects
    """What a unit of each feature adds to the logits on the direct path."""
    logit_count: int
    """Logits up, and as many down."""
    logit_direction: str
    """Along which rows: "W_dec", or "W_dec + W_lin"."""
    logits_note: str
    """Why there are none; else empty."""
    pairs: PairFigures
    """Pairs of features on the interaction path."""
    provenance: Mapping[str, Any]
    """Configuration, versions, sha256 of tokens and SAE."""

    @property
    def alive(self) -> Ints:
        """The features that fired."""
        return np.flatnonzero(self.features.tokens).astype(np.int64)

    def save(self, path: str | Path) -> int:
        """Write it, under a temporary name first; returns the file's size in bytes. Equal content gives equal bytes."""
        from sae_nfm.explorer.file import write

        return write(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "Explorer":
        """Read what `save` wrote: `explorer.json.gz`, or the folder that has it.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is damaged, or of another format.
        """
        from sae_nfm.explorer.file import read

        return read(path)
