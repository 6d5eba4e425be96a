"""A corpus of text: read from a file, and as the stream of tokens on which a language model is trained."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Int
from tokenizers import Tokenizer

SUFFIXES = (".parquet", ".jsonl", ".txt")
"""Kinds of corpus files."""

BOS_ID = 0
"""`<|endoftext|>`: BOS, EOS and padding in one, before every document."""


def read_documents(path: Path) -> list[str]:
    """The documents of a corpus file; blank ones are left out.

    A document is a value of the column `text` of a .parquet, the "text" of a line of a .jsonl, a whole .txt.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, no `text` in the file, or no text at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no corpus file {path}; give a .parquet or .jsonl with `text`, or a .txt")
    match path.suffix:
        case ".parquet":
            documents = _parquet_texts(path)
        case ".jsonl":
            documents = [_json_text(line, path, n) for n, line in _lines(path) if line.strip()]
        case ".txt":
            documents = [path.read_text(encoding="utf-8")]
        case suffix:
            raise ValueError(f"corpus file {path} ends in {suffix!r}; expected .parquet, .jsonl or .txt")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"corpus file {path} has no text; give a file with at least one document that is not blank")
    return documents


def token_stream(documents: Sequence[str], tokenizer: Tokenizer) -> Int[np.ndarray, " token"]:
    """All documents one after another, BOS (id 0) before each: training windows are cut from this stream."""
    encodings = tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
    return np.concatenate([np.array([BOS_ID, *encoding.ids], dtype=np.int64) for encoding in encodings])


def _parquet_texts(path: Path) -> list[str]:
    names = pq.read_schema(path).names
    if "text" not in names:
        raise ValueError(f"corpus file {path} has columns {names}; expected one named 'text'")
    return [text or "" for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]


def _lines(path: Path) -> list[tuple[int, str]]:
    return list(enumerate(path.read_text(encoding="utf-8").split("\n"), start=1))


def _json_text(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} of {path} is not JSON ({error}); expected one object a line") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'line {number} of {path} has no "text" string; expected {{"text": "..."}}')
    return record["text"]
