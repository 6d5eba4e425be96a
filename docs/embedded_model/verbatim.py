"""Check that no long passage of the training corpus stands verbatim in the sampled tokens.

    python docs/embedded_model/verbatim.py --corpus FILE.parquet

Exact, without hashing. Every position of both texts starts as a run of length 0; a step extends the runs by
one token and keeps those that occur in both; a row's longest run is the last length at which it had one left.
A run is one of tokens: words that the model spelt in other tokens than the tokenizer would do not continue it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Int
from tokenizers import Tokenizer

from sae_nfm.data import read_documents
from sae_nfm.demo.model import MODEL_DIR, load_tokenizer
from sae_nfm.demo.tokens import TOKENS_DIR, read_rows

BOS_ID = 0
"""`<|endoftext|>`: BOS, EOS and padding in one, before every document."""

LIMIT = 20
"""Shortest run, in tokens, that counts as a long passage: about 15 words. What any two texts of one kind share (stage
directions, names of speakers, set phrases) is shorter; a sentence that could be recognised as copied is longer."""


def token_stream(documents: Sequence[str], tokenizer: Tokenizer) -> Int[np.ndarray, " token"]:
    """All documents one after another, BOS (id 0) before each: training windows are cut from this stream."""
    encodings = tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
    return np.concatenate([np.array([BOS_ID, *encoding.ids], dtype=np.int64) for encoding in encodings])


@dataclass(frozen=True, kw_only=True)
class VerbatimConfig:
    """Which tokens to compare with which corpus."""

    corpus: Path
    """Corpus that the language model was trained on: .parquet or .jsonl with `text`, or .txt."""
    tokens: Path = TOKENS_DIR
    """Folder of the token files; the packaged one unless told otherwise."""
    limit: int = LIMIT
    """Shortest run, in tokens, that counts as a long passage."""


def longest_runs(
    rows: Int[np.ndarray, "row pos"], corpus: Int[np.ndarray, " token"]
) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    """For each row, the length in tokens of the longest run shared with the corpus, and where it starts."""
    n_rows, n_pos = rows.shape
    text = np.concatenate([rows.ravel(), corpus]).astype(np.int64)
    ends = np.concatenate([np.repeat(np.arange(1, n_rows + 1) * n_pos, n_pos), np.full(corpus.size, text.size)])
    starts = np.arange(text.size)
    runs = np.zeros_like(starts)  # equal numbers, equal tokens: identifies the run at each start
    longest, where = np.zeros((2, n_rows), dtype=np.int64)
    length = 0
    while True:
        fits = starts + length < ends[starts]
        starts, runs = starts[fits], runs[fits]
        values, runs = np.unique(runs * (text.max() + 1) + text[starts + length], return_inverse=True)
        occurs = np.zeros((2, values.size), dtype=bool)  # in the rows, in the corpus
        occurs[(starts >= rows.size).astype(int), runs] = True
        shared = occurs[0, runs] & occurs[1, runs]
        starts, runs = starts[shared], runs[shared]
        found = starts[starts < rows.size]
        if found.size == 0:
            return longest, where
        length += 1
        longest[found // n_pos], where[found // n_pos] = length, found % n_pos


def corpus_tokens(path: Path) -> Int[np.ndarray, " token"]:
    """A corpus file as the stream of the embedded model's tokens."""
    return token_stream(read_documents(path), load_tokenizer(MODEL_DIR).backend_tokenizer)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see `--help`. Exits with 1 when a long passage was found."""
    config = tyro.cli(VerbatimConfig, args=argv)
    corpus = corpus_tokens(config.corpus)
    n_long = 0
    for split in ("train", "validation"):
        rows = np.array(read_rows(config.tokens / f"{split}.parquet")["tokens"].to_pylist())
        longest, _ = longest_runs(rows, corpus)
        n_long += int((longest >= config.limit).sum())
        print(describe(split, longest))
    print(f"{n_long} rows with a run of {config.limit} tokens or more in a corpus of {corpus.size:,} tokens")
    if n_long:
        raise SystemExit(1)


def describe(name: str, longest: Int[np.ndarray, " row"]) -> str:
    """One line on the distribution, over rows, of the longest run in tokens."""
    levels = (50, 90, 99, 100)
    values = np.percentile(longest, levels).round().astype(int)
    return f"{name}: longest shared run per row, tokens: " + ", ".join(
        f"{level}% {value}" for level, value in zip(levels, values, strict=True)
    )


if __name__ == "__main__":
    main()
