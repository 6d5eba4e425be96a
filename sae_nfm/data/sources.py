"""Training or held-out data by where it lies: a file, a folder, a data set on disk. A hub name is left to SAELens."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict

from sae_nfm.data.datasets import TOKEN_COLUMNS
from sae_nfm.data.text_files import SUFFIXES, read_documents
from sae_nfm.models import OFFLINE


def local_dataset(source: str, *, split: str = "train", seed: int = 0) -> Any | None:
    """The data set at a path, with a `text` or a tokens column; None where the source is no path, but a name on the hub.

    Args:
        source: a .parquet (a column `text`, `tokens` or `input_ids`), .jsonl or .txt file; a folder of such files; a folder
            written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.
        split: which split of a `DatasetDict`.
        seed: of the order of a file's documents, which often go source by source. A data set on disk keeps its order.

    Raises:
        FileNotFoundError: there is nothing at a path.
        ValueError: it has no text, or is of another kind.
    """
    path = Path(source)
    if path.is_dir():
        return _saved(path, split) or _of_files(_files_in(path), seed)
    if path.suffix in SUFFIXES:
        return _of_files([path], seed)
    if path.exists() or path.is_absolute() or source.startswith((".", "~")):
        kind = "has another suffix" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"the data {source!r} {kind}; give a {', '.join(SUFFIXES)} file, a folder of them, or a data set on disk or the hub"
        )
    return None


def open_dataset(source: str, *, split: str, seed: int = 0) -> Any:
    """The data set at a path, as `local_dataset` reads it, or streamed from the hub.

    Raises:
        ValueError, FileNotFoundError: there is no such data, or no such split.
    """
    local = local_dataset(source, split=split, seed=seed)
    if local is not None:
        return local
    with explained_hub(source):
        return datasets.load_dataset(source, split=split, streaming=True)


@contextmanager
def explained_hub(name: str) -> Generator[None]:
    """Say of a data set that the hub does not give that it is not there."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(f"{name!r} is neither a file nor a data set the hub can give; {OFFLINE}") from error


def _saved(folder: Path, split: str) -> Any | None:
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return None
    saved = datasets.load_from_disk(str(folder))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(
            f"the data set in {str(folder)!r} has the splits {', '.join(map(str, saved))} and no {split!r}; give the folder of "
            "one split"
        )
    return saved[split]


def _files_in(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    if not files:
        raise ValueError(
            f"the folder {str(folder)!r} has no {', '.join(SUFFIXES)} file and is no data set on disk; give one that is"
        )
    return files


def _of_files(files: list[Path], seed: int) -> Dataset:
    columns = {_token_column(path) for path in files}
    if columns == {None}:
        documents = [document for path in files for document in read_documents(path)]
        return Dataset.from_dict({"text": documents}).shuffle(seed=seed)
    if len(columns) > 1:
        raise ValueError(
            f"{', '.join(map(str, files[:4]))} have different columns ({', '.join(map(str, sorted(map(str, columns))))}); "
            "give text or tokens, not both"
        )
    (column,) = columns
    rows = pa.concat_tables([pq.read_table(path, columns=[column]) for path in files])
    return Dataset(rows.cast(pa.schema([(column, pa.list_(pa.int64()))]))).shuffle(seed=seed)


def _token_column(path: Path) -> str | None:
    if path.suffix != ".parquet" or not path.is_file():
        return None
    names = pq.read_schema(path).names
    return next((name for name in sorted(TOKEN_COLUMNS, reverse=True) if name in names), None)
