"""Whether an SAE was trained on a text, by what the text says: not by its name, its kind of file, or how it is cut into rows.

    passage    `LENGTH` consecutive tokens, none of them special; at every place of the text one begins
    sketch     hashes of passages, of many the smallest ones alone
    share      of the passages of a text whose hashes would be in the sketch of the training text: how many are in it

A training through SAELens's runner leaves the sketch of all rows that it drew in the folder of the SAE. Held-out text shares next
to nothing with it (of the embedded model's, one passage in 100,000), the training text everything, a file that has some of its
documents that part.

Source: Broder 1997, On the resemblance and containment of documents (bottom sketches); Brown et al. 2020, arXiv 2005.14165.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens import ActivationsStore
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from sae_nfm import demo
from sae_nfm.common import checked, whole
from sae_nfm.common.file_errors import reading
from sae_nfm.common.options import FETCHED_MODEL
from sae_nfm.data.datasets import SMOLLM2_TEXT, TOKEN_COLUMNS, data_column, first_rows, local_dataset
from sae_nfm.models import LanguageModel, special_token_ids

FILENAME = "training_text.safetensors"
LENGTH = 10
"""Tokens of a passage."""
MOST, FEWEST, PART = 65_536, 2_048, 500
"""Hashes that are kept in memory; hashes in a file, at least and one in so many passages: enough to find a text of 20,000 tokens
again in one of 50 million."""
ENOUGH = 20
"""Passages to compare, without which nothing is said."""
LOOKED_AT = 500_000
"""Tokens of a training text that are read where no sketch of it was left."""
END = np.iinfo(np.uint64).max
Hashes = NDArray[np.uint64]
MULTIPLIERS: Hashes = np.random.default_rng(0).integers(0, 2**63, LENGTH, dtype=np.uint64) * 2 + 1


@dataclass(frozen=True, kw_only=True)
class TextSketch:
    """What is kept of a text."""

    hashes: Hashes
    """Ascending, each once."""
    largest: int
    """Every passage of the text with a hash up to this one is among them."""

    @classmethod
    def of(cls, rows: Iterable[Any], special: Sequence[int], *, joined: bool = False) -> "TextSketch":
        """The sketch of rows of token ids, as by a `SketchCollector`."""
        collector = SketchCollector(special, joined=joined)
        for row in rows:
            collector.add(row)
        return collector.sketch()

    def save(self, folder: str | Path) -> None:
        """Write it into a folder."""
        from safetensors.numpy import save_file  # importing the package stays cheap

        with whole(Path(folder) / FILENAME) as partial:
            save_file({"hashes": self.hashes, "largest": np.array([self.largest], np.uint64)}, partial)

    def shortened(self) -> "TextSketch":
        """One with as many hashes as its text needs: `FEWEST`, or one in `PART` passages."""
        wanted = max(FEWEST, int(len(self.hashes) * (END / max(1, self.largest)) / PART))
        if len(self.hashes) <= wanted:
            return self
        return TextSketch(hashes=self.hashes[:wanted].copy(), largest=int(self.hashes[wanted - 1]))

    @classmethod
    def load(cls, folder: str | Path) -> "TextSketch | None":
        """What `save` wrote; None where there is none."""
        path = Path(folder) / FILENAME
        if not path.is_file():
            return None
        from safetensors.numpy import load_file

        with reading(checked(path), "the sketch of a training text"):
            tensors = load_file(path)
            return cls(hashes=tensors["hashes"], largest=int(tensors["largest"][0]))

    def share_of(self, other: "TextSketch") -> tuple[float, int]:
        """The share of another text's passages that are in this one, and how many were compared."""
        compared = other.hashes[other.hashes <= min(self.largest, other.largest)]
        return float(np.isin(compared, self.hashes).mean()) if len(compared) else 0.0, len(compared)


class SketchCollector:
    """Makes the sketch of a text whose rows come one after another.

    Args:
        special: ids of special tokens.
        joined: whether a row goes on where the one before ended, special tokens at its beginning apart: then passages across
            that place count too, so that another cut of the text is known again.
    """

    def __init__(self, special: Sequence[int], *, joined: bool = False) -> None:
        self._special, self._joined = np.array(special, dtype=np.int64), joined
        self._before = np.zeros(0, np.int64)
        self._new, self._waiting = list[Hashes](), 0
        self._kept, self._largest = np.zeros(0, np.uint64), int(END)

    def add(self, row: Any) -> None:
        """Take in a row of token ids."""
        ids = np.asarray(row, dtype=np.int64)
        if self._joined:
            starts = np.flatnonzero(~np.isin(ids, self._special))
            ids = np.concatenate([self._before, ids[starts[0] :] if len(starts) else ids[:0]])
            self._before = ids[max(0, len(ids) - LENGTH + 1) :]
        if len(ids) < LENGTH:
            return
        windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), LENGTH) @ MULTIPLIERS
        if len(self._special):
            marks = np.concatenate([[0], np.isin(ids, self._special).cumsum()])
            windows = windows[marks[LENGTH:] == marks[:-LENGTH]]
        hashes = (windows ^ (windows >> np.uint64(29))) * MULTIPLIERS[
            0
        ]  # linear so far: neighbours would be near each other
        hashes ^= hashes >> np.uint64(32)
        self._new.append(hashes[hashes <= self._largest])
        self._waiting += len(self._new[-1])
        if self._waiting > MOST:
            self.sketch()

    def add_sketch(self, sketch: TextSketch) -> None:
        """Take in the text of another sketch, such as a checkpoint's."""
        self._new.append(sketch.hashes)
        self._largest = min(self._largest, sketch.largest)

    def sketch(self) -> TextSketch:
        """The sketch of what was taken in so far."""
        kept = np.unique(np.concatenate([self._kept, *self._new]))
        self._kept, self._new, self._waiting = kept[kept <= self._largest], [], 0
        if len(self._kept) > MOST:
            self._kept = self._kept[:MOST]
            self._largest = int(self._kept[-1])
        return TextSketch(hashes=self._kept, largest=self._largest)


def told_of_text(
    model: LanguageModel,
    text: Tensor | TextSketch | Iterable[Sequence[int]],
    *,
    metadata: SAEMetadata,
    folder: str | Path | None = None,
    source: str | None = None,
) -> str:
    """Whether an SAE was trained on a text, in words that begin with "held-out tokens", "training tokens" or what they are.

    Args:
        text: rows of token ids, or the sketch of them.
        metadata: the SAE's. The data set that they name is looked at where there is no sketch of the training text.
        folder: where the SAE was loaded from, and its sketch is.
        source: what the text was opened as.
    """
    special = special_token_ids(model)
    if not isinstance(text, TextSketch):
        text = TextSketch.of(text.cpu().numpy() if isinstance(text, Tensor) else text, special)
    name = metadata.dataset_path
    known, all_of_it = None if folder is None else TextSketch.load(folder), True
    if known is None and name:
        if source is not None and name == source and name != demo.MODEL_NAME:
            return f"training tokens (the SAE's metadata name {name!r} as what it was trained on)"
        known, all_of_it = _sketch_of(model, metadata.context_size, name)
    if known is None:
        why = f"it was trained on {name!r}, which is not here" if name else "its metadata name no training text"
        return f"tokens of which cannot be told whether the SAE was trained on them ({why})"
    share, compared = known.share_of(text)
    shown = f"{share:.0%}" if share >= 0.01 else "less than 1%" if share else "none"
    found = f"{shown} of {compared:,} passages compared are in the SAE's training text"
    if compared < ENOUGH or (share < 0.01 and not all_of_it):
        why = (
            f"{compared} passages of {LENGTH} tokens can be compared"
            if all_of_it
            else "its training text was read in part"
        )
        return f"tokens of which cannot be told whether the SAE was trained on them ({why})"
    if share >= 0.01:
        return f"{'training tokens' if share >= 0.8 else 'tokens that are training tokens in part'} ({found})"
    return f"held-out tokens ({found})"


def _sketch_of(model: LanguageModel, context_size: int | None, name: str) -> tuple[TextSketch | None, bool]:
    """The sketch of a training text by its name, and whether all of it was read; None where it is not at hand."""
    special = special_token_ids(model)
    if name == demo.MODEL_NAME:
        rows: Any = np.stack(cast(Any, demo.load_tokens("train").with_format("numpy"))["tokens"][:])
        return TextSketch.of(rows, special), True
    try:
        dataset = local_dataset(str(SMOLLM2_TEXT) if name == FETCHED_MODEL else name)
    except (FileNotFoundError, ValueError):  # gone, or another thing by now
        return None, False
    if dataset is None or context_size is None:
        return None, False
    wanted = max(1, LOOKED_AT // context_size)
    found = first_rows(ActivationsStore, model, dataset, context_size, wanted)
    rows, is_text = torch.stack(found).numpy() if found else [], data_column(dataset) not in TOKEN_COLUMNS
    return TextSketch.of(rows, special, joined=is_text), len(found) < wanted
