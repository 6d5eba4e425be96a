"""Tokens sampled from the embedded model, as a data set that SAELens reads without tokenising anything."""

from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

Split = Literal["train", "validation"]

TOKENS_DIR = Path(__file__).parent / "data"
"""The packaged folder of the token files, one `<split>.parquet` each."""

_ON_DISK = pa.schema([("tokens", pa.list_(pa.uint16())), ("document_id", pa.uint16())])
_LOADED = pa.schema([("tokens", pa.list_(pa.int32())), ("document_id", pa.int32())])


def load_tokens(split: Split | str = "train") -> Dataset:
    """Tokens that the embedded model wrote at temperature 1: one row, one independent sample.

    Columns:
        tokens: list of 256 int32, the model's whole context, beginning with BOS (id 0).
        document_id: int32, unique over both splits. The row is the independent unit: rows were sampled
            independently of each other, the tokens of a row were not; resample and count rows, not tokens.

    Where the model wrote id 0 in the middle of a row, the text goes on as a new document, in that row and its
    context. Such rows are kept: the language model was trained on windows of this kind.

    Raises:
        ValueError: `split` is neither "train" nor "validation".
        FileNotFoundError: the package was installed without its data files.
    """
    if split not in get_args(Split):
        raise ValueError(f"split={split!r} does not exist; give one of {', '.join(map(repr, get_args(Split)))}")
    return Dataset(read_rows(TOKENS_DIR / f"{split}.parquet").cast(_LOADED))


def read_rows(path: Path) -> pa.Table:
    """The table of one token file, as it is on disk: `tokens` (list of uint16), `document_id` (uint16).

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no token file {path}; write one with `python docs/embedded_model/sample.py`")
    return pq.read_table(path, schema=_ON_DISK)


def write_rows(path: Path, tokens: list[list[int]], document_ids: list[int]) -> None:
    """Write a token file (zstd). Ids have to fit into uint16, or pyarrow raises."""
    table = pa.table({"tokens": tokens, "document_id": document_ids}, schema=_ON_DISK)
    pq.write_table(table, path, compression="zstd", compression_level=19)
