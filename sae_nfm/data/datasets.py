"""Text and tokens: from a file, by a name on the hub, or embedded in the package."""

import json
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict
from jaxtyping import Int
from sae_lens import ActivationsStore
from torch import Tensor

from sae_nfm import demo
from sae_nfm.loading import quiet_saelens
from sae_nfm.models import OFFLINE, LanguageModel, device_of

SUFFIXES = (".parquet", ".jsonl", ".txt")
"""Kinds of corpus files."""


def read_documents(path: Path) -> list[str]:
    """The documents of a corpus file; blank ones are left out.

    A document is a value of the column `text` of a .parquet, the "text" of a line of a .jsonl, a whole .txt. Raises a
    FileNotFoundError where there is no such file, a ValueError for another suffix, no `text` in the file, or no text at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no corpus file {path}; give a .parquet or .jsonl with `text`, or a .txt")
    match path.suffix:
        case ".parquet":
            names = pq.read_schema(path).names
            if "text" not in names:
                raise ValueError(f"corpus file {path} has columns {names}; expected one named 'text'")
            documents = [text or "" for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]
        case ".jsonl":
            lines = enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
            documents = [_json_text(line, path, n) for n, line in lines if line.strip()]
        case ".txt":
            documents = [path.read_text(encoding="utf-8")]
        case suffix:
            raise ValueError(f"corpus file {path} ends in {suffix!r}; expected .parquet, .jsonl or .txt")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"corpus file {path} has no text; give a file with at least one document that is not blank")
    return documents


def _json_text(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} of {path} is not JSON ({error}); expected one object a line") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'line {number} of {path} has no "text" string; expected {{"text": "..."}}')
    return record["text"]


TOKEN_COLUMNS = {"input_ids", "tokens"}
"""Columns that SAELens takes for token ids."""


def load_splits(dataset: str | None, validation: str | None, model_name: str, seed: int = 0) -> tuple[Any, Any]:
    """Training and held-out data, as data sets with a `text` or a `tokens` column.

    Documents of a training file are shuffled with `seed`; the held-out ones are the same for every seed.

    Raises a ValueError or FileNotFoundError for a source that is missing, empty or unreadable, or only half given.
    """
    if dataset is None and validation is None:
        if model_name != demo.MODEL_NAME:
            raise ValueError(
                f"the embedded tokens suit the embedded model only; {model_name!r} needs --dataset and --held-out"
            )
        return demo.load_tokens("train"), demo.load_tokens("validation")
    if dataset is None:
        raise ValueError(f"--held-out is {validation!r} but there is no --dataset to train on; give both")
    if validation is None and (Path(dataset).suffix in SUFFIXES or Path(dataset).exists()):
        raise ValueError(f"--dataset is the file {dataset!r}; give held-out text too, with --held-out FILE")
    return open_dataset(dataset, split="train", seed=seed), open_dataset(validation or dataset, split="validation")


def held_out_tokens(model: LanguageModel, dataset: Any, context_size: int, n_tokens: int) -> Int[Tensor, "rows pos"]:
    """The first rows of a data set, cut as SAELens cuts them for training, at most `n_tokens` (at least one row).

    Raises a ValueError when the text does not fill one row, or the model has no tokenizer for it.
    """
    refuse_without_tokenizer(model, dataset)
    rows = first_rows(ActivationsStore, model, dataset, context_size, max(1, n_tokens // context_size))
    if not rows:
        raise ValueError(f"the held-out text does not fill one row of {context_size} tokens; give more")
    return torch.stack(rows).to(device_of(model))


def first_rows(
    store_class: type[ActivationsStore], model: LanguageModel, dataset: Any, context_size: int, n_rows: int
) -> list[Int[Tensor, " pos"]]:
    """The rows that a store of SAELens's gives first, on the CPU; fewer where the data set ends before."""
    rows: list[Tensor] = []
    with quiet_saelens(), suppress(StopIteration):
        store = store_class.from_config_multi_hook(
            model=cast(Any, model),  # SAELens takes more than it says
            dataset=dataset,
            hook_names=["tokens only"],
            hook_d_ins={"tokens only": 1},
            context_size=context_size,
            total_training_tokens=1,
            device="cpu",
        )
        while len(rows) < n_rows:
            rows.append(store.get_batch_tokens(1, raise_at_epoch_end=True, move_to_model_device=False)[0])
    return rows


def refuse_without_tokenizer(model: LanguageModel, dataset: Any) -> None:
    """Raise a ValueError when the data set is text and the model has no tokenizer; SAELens would fail an assertion."""
    tokenizer: Any = model.tokenizer
    if tokenizer is None and not TOKEN_COLUMNS & set(columns := next(iter(dataset), {})):
        raise ValueError(
            f"the model has no tokenizer, and the data set has {', '.join(columns)}; give one of token ids, in a column "
            f"{' or '.join(sorted(TOKEN_COLUMNS))}, or load the model with a tokenizer"
        )


def local_dataset(source: str, *, split: str = "train", seed: int = 0) -> Any | None:
    """The data set at a path, with a `text` or a tokens column; None where the source is no path, but a name on the hub.

    Args:
        source: a .parquet (a column `text`, `tokens` or `input_ids`), .jsonl or .txt file; a folder of such files; a folder
            written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.
        split: which split of a `DatasetDict`.
        seed: of the order of a file's documents, which often go source by source. A data set on disk keeps its order.

    Raises a FileNotFoundError where nothing is at a path, a ValueError where it has no text or is of another kind.
    """
    path = Path(source)
    if path.is_dir():
        if saved := _saved(path, split):
            return saved
        files = sorted(inside for inside in path.rglob("*") if inside.suffix in SUFFIXES)
        if not files:
            kinds = ", ".join(SUFFIXES)
            raise ValueError(f"the folder {source!r} has no {kinds} file and is no data set on disk; give one that is")
        return _of_files(files, seed)
    if path.suffix in SUFFIXES:
        return _of_files([path], seed)
    if path.exists() or path.is_absolute() or source.startswith((".", "~")):
        kind = "has another suffix" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"the data {source!r} {kind}; give a {', '.join(SUFFIXES)} file, a folder of them, or a data set on disk or the hub"
        )
    return None


def open_dataset(source: str, *, split: str, seed: int = 0) -> Any:
    """The data set at a path, as `local_dataset` reads it, or streamed from the hub."""
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
