"""Text and tokens: from a file, by a name on the hub, or embedded in the package.

One loader serves every command. A source is

    a file              .parquet, .arrow, .jsonl, .json, .csv or .txt; the last four also with .gz or .zst behind
    a folder            of such files, whose names may say a split (train.jsonl, data/validation-00000-of-00002.parquet), or
                        written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`
    a name on the hub   `owner/name`, or `owner/name:config`

with a column of text (`text`) or of token ids (`tokens`, `input_ids`). Rows without text are left out, and a line says how many;
a value of another type is an error. A data set with nothing but a training split is divided by document: `is_held_out`.
"""

import csv
import gzip
import io
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from jaxtyping import Int
from pyarrow import compute
from sae_lens import ActivationsStore
from torch import Tensor

from sae_nfm import demo
from sae_nfm.common import remark
from sae_nfm.common.file_errors import reading
from sae_nfm.common.options import FETCHED_MODEL, SAMPLED
from sae_nfm.loading import quiet_saelens
from sae_nfm.models import OFFLINE, LanguageModel, device_of, is_samples
from sae_nfm.models.samples import SAMPLES_FILENAME, SamplesShape, numbered_rows

pc: Any = compute
"""Its functions are made at run time, so that no type is known."""
TEXTUAL = (".jsonl", ".json", ".csv", ".txt")
COMPRESSED = (".gz", ".zst")
SUFFIXES = (".parquet", ".arrow", *TEXTUAL)
"""Kinds of corpus files; the textual ones can be compressed."""
KINDS = f"{', '.join(SUFFIXES)} (the last four also .gz or .zst)"
TEXT_COLUMN = "text"
TOKEN_COLUMNS = {"input_ids", "tokens"}
"""Columns that SAELens takes for token ids."""
READ_BY_SAELENS = (TEXT_COLUMN, "problem", "conversation", "conversations", "messages")
"""Columns that it takes for text, the last three with chat formatting."""
DESCRIPTIONS = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "sae_lens.json",
    "manifest.json",
}
"""JSON files in folders of data that are no data."""
SMOLLM2_TEXT = Path(__file__).with_name("smollm2")
"""The packaged folder of documents sampled from SmolLM2; its README.md says how."""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
"""What a split is called in names of files, and on the hub."""
HELD_OUT_PART = 10
"""Of a data set with a training split only, one document in so many is held out."""


def suffix_of(path: Path) -> str:
    """The suffix of a corpus file, two where it is compressed: ".jsonl.gz"."""
    return "".join(path.suffixes[-2:] if path.suffix in COMPRESSED else path.suffixes[-1:]).lower()


def is_corpus_file(path: Path) -> bool:
    """Whether a file's name is one of a corpus."""
    suffix = suffix_of(path)
    return suffix in SUFFIXES or any(suffix == kind + packed for kind in TEXTUAL for packed in COMPRESSED)


def read_documents(path: Path) -> list[str]:
    """The documents of a corpus file; blank ones and nulls are left out, and a line says how many.

    A document is a value of the column `text` of a .parquet, .arrow or .csv, the "text" of a line of a .jsonl or of an object of
    a .json, a whole .txt. Raises a FileNotFoundError where there is no such file, a ValueError for another suffix, no `text` in
    the file, text of another type, or none at all, an encoding that is not UTF-8 (or -16 or -32 with its mark), a damaged file.
    """
    table = _read(path, (TEXT_COLUMN,))
    return _cleaned(table, str(path))[TEXT_COLUMN].to_pylist()


def _read(path: Path, wanted: Iterable[str] = ("tokens", "input_ids", TEXT_COLUMN)) -> pa.Table:
    """The first of the wanted columns that a file has, as it is there."""
    if not path.is_file():
        raise FileNotFoundError(f"no corpus file {path}; give a {KINDS} file with `text`")
    if not is_corpus_file(path):
        raise ValueError(f"corpus file {path} ends in {suffix_of(path)!r}; expected {KINDS}")
    kind = suffix_of(path).removesuffix(".gz").removesuffix(".zst")
    if kind == ".parquet":
        with reading(path):
            names = pq.read_schema(path).names
        column = _column(names, wanted, path)
        with reading(path):
            table = pq.read_table(path, columns=[column], page_checksum_verification=True)
            table.validate(full=True)  # bytes that are no UTF-8
        return table
    if kind == ".arrow":
        with reading(path):
            table = _read_arrow(path)
            table.validate(full=True)
        return table.select([_column(table.column_names, wanted, path)])
    with reading(path):
        raw = _unpacked(path)
    text = _decoded(raw, path)
    if kind == ".txt":
        return pa.table({TEXT_COLUMN: [text]})
    rows = _csv_rows(text, path) if kind == ".csv" else _json_rows(text, path, lines=kind == ".jsonl")
    return _table_of(rows, wanted, path)


def _column(names: Iterable[str], wanted: Iterable[str], path: Path) -> str:
    found = next((name for name in wanted if name in names), None)
    if found is None:
        raise ValueError(f"corpus file {path} has columns {list(names)}; expected one named {TEXT_COLUMN!r}")
    return found


def _read_arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        try:
            return pa.ipc.open_stream(source).read_all()  # as `datasets` writes them
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_file(source).read_all()


def _unpacked(path: Path) -> bytes:
    match path.suffix.lower():
        case ".gz":
            return gzip.decompress(path.read_bytes())
        case ".zst":
            packed = path.read_bytes()
            return pa.CompressedInputStream(pa.BufferReader(packed), "zstd").read() if packed else packed
        case _:
            return path.read_bytes()


MARKS = {
    b"\xef\xbb\xbf": "utf-8", b"\xff\xfe\x00\x00": "utf-32-le", b"\x00\x00\xfe\xff": "utf-32-be",
    b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be",
}  # fmt: skip
"""Byte order marks and what they say; those of UTF-32 before those of UTF-16, which they begin with."""


def _decoded(raw: bytes, path: Path) -> str:
    """The text of a file, its lines ended by newlines."""
    mark = next((mark for mark in MARKS if raw.startswith(mark)), b"")
    encoding, raw = MARKS.get(mark, "utf-8"), raw[len(mark) :]
    if encoding == "utf-8" and (place := raw.find(b"\0")) >= 0:
        raise ValueError(
            f"corpus file {path} has a NUL in line {raw[:place].count(10) + 1}: it is not text, or UTF-16 without a byte "
            "order mark; convert it, for example with `iconv -f utf-16le -t utf-8`"
        )
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].decode(encoding, errors="replace").count("\n") + 1
        raise ValueError(
            f"corpus file {path} is not {encoding.upper()}: byte {len(mark) + error.start}, in line {line}, is "
            f"0x{raw[error.start]:02x}; convert it, for example with `iconv -f latin1 -t utf-8`, once you know its encoding"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


Row = tuple[str, Mapping[str, Any]]
"""Where a row is, such as "line 3", and its values by column."""


def _json_rows(text: str, path: Path, *, lines: bool) -> Iterator[Row]:
    content: Any = None
    if not lines:
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            lines = error.msg == "Extra data"  # one object a line, as many a .json has
            if not lines and text.strip():
                raise ValueError(f"corpus file {path} is not JSON ({error}); expected a list of objects") from error
    if lines:
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip("\ufeff \t"):
                continue
            try:
                record = json.loads(line.lstrip("\ufeff"))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {number} of {path} is not JSON ({error}); expected one object a line"
                ) from error
            yield f"line {number}", _record(record, f"line {number}", path)
        return
    columns = isinstance(content, dict) and content and all(isinstance(value, list) for value in content.values())
    if columns and len({len(value) for value in content.values()}) == 1 and not TOKEN_COLUMNS & content.keys():
        content = [dict(zip(content, values, strict=True)) for values in zip(*content.values(), strict=True)]
    for number, record in enumerate(content if isinstance(content, list) else [content] if content else [], start=1):
        yield f"object {number}", _record(record, f"object {number}", path)


def _record(record: Any, where: str, path: Path) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f'{where} of {path} is a {type(record).__name__}; expected an object, {{"text": "..."}}')
    return record


def _csv_rows(text: str, path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text), strict=True)
    with reading(path):
        header, *rows = [(reader.line_num, row) for row in reader if row] or [(0, list[str]())]
    for number, row in rows:
        if len(row) != len(header[1]):
            raise ValueError(
                f"line {number} of {path} has {len(row)} fields, its header {len(header[1])}; put text in quotes"
            )
        values = (None if field in ("", "NaN", "nan") else field for field in row)  # as pandas writes what is missing
        yield f"line {number}", dict(zip(header[1], values, strict=True))


def _table_of(rows: Iterator[Row], wanted: Iterable[str], path: Path) -> pa.Table:
    """The first wanted column of rows, text or ids."""
    found = list(rows)
    names = dict.fromkeys(name for _, record in found for name in record)
    if not found:
        return pa.table({TEXT_COLUMN: pa.array([], pa.string())})
    column = _column(names, wanted, path)
    values: list[Any] = []
    for where, record in found:
        value = record.get(column)
        value = None if isinstance(value, float) and math.isnan(value) else value
        is_ids = isinstance(value, list) and all(type(one) is int for one in value)
        if value is not None and not (isinstance(value, str) if column == TEXT_COLUMN else is_ids):
            expected = "a string" if column == TEXT_COLUMN else "a list of token ids (whole numbers)"
            raise ValueError(f"{where} of {path} has a {type(value).__name__} for {column!r}; expected {expected}")
        if isinstance(value, str) and not _is_unicode(value):
            raise ValueError(
                f"{where} of {path} has half a surrogate pair in its text, which no encoding has; correct it"
            )
        values.append(value)
    return pa.table({column: pa.array(values, pa.string() if column == TEXT_COLUMN else pa.list_(pa.int64()))})


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _cleaned(table: pa.Table, source: str) -> pa.Table:
    """A table of one column without the rows that `_kept` leaves out."""
    (column,) = table.column_names
    kind = table.schema.field(column).type
    if pa.types.is_dictionary(kind):
        table = table.cast(pa.schema([(column, cast(Any, kind).value_type)]))
    return table.take(_kept(table, source))


def _kept(table: pa.Table, source: str) -> pa.Array:
    """Numbers of the rows of a table of one column that are no null and no blank text; a line counts the others.

    A ValueError for a column of another type than strings or lists of whole numbers, and where nothing is left.
    """
    (column,) = table.column_names
    kind, values = table.schema.field(column).type, table[column]
    is_text = any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
    if pa.types.is_null(kind) or not (_has_ids(kind) if column in TOKEN_COLUMNS else is_text):
        expected = "lists of whole numbers" if column in TOKEN_COLUMNS else "strings"
        shown = "nothing but nulls" if pa.types.is_null(kind) else f"values of the type {kind}"
        raise ValueError(f"the column {column!r} of {source} has {shown}; expected {expected}")
    there = pc.is_valid(values)
    if is_text:
        there = pc.and_kleene(there, pc.not_equal(pc.utf8_trim_whitespace(values.cast(pa.large_string())), ""))
    kept = pc.indices_nonzero(pc.fill_null(there, False))
    if not len(kept):
        raise ValueError(f"{source} has no text; give at least one document that is not blank")
    if len(kept) < len(table):
        left_out = len(table) - len(kept)
        remark(f"{left_out:,} of {len(table):,} rows of {source} have no {column} (null or blank) and are left out")
    return kept


def _has_ids(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in lists) and pa.types.is_integer(cast(Any, kind).value_type)


def load_splits(dataset: str | None, validation: str | None, model_name: str, seed: int = 0) -> tuple[Any, Any]:
    """Training and held-out data, as data sets with a `text` or a `tokens` column.

    Documents of a training file are shuffled with `seed`; the held-out ones are the same for every seed. Without held-out text
    it is the validation split of the data set, or its test split; of one that has a training split only, it is cut from that by
    document, and the training data are the rest.

    Raises a ValueError or FileNotFoundError for a source that is missing, empty or unreadable, or only half given.
    """
    if dataset is None and validation is None:
        return own_text(model_name, "train", seed=seed), own_text(model_name, "validation")
    if dataset is None:
        raise ValueError(f"--held-out is {validation!r} but there is no --dataset to train on; give both")
    splits = _splits(dataset, seed=seed, streaming=True)
    if validation is None and None in splits:
        raise ValueError(f"--dataset is the file {dataset!r}; give held-out text too, with --held-out FILE")
    train = _training_part(splits, dataset, validation or dataset)
    return train, open_dataset(validation or dataset, split="validation")


def held_out_data(dataset: str | None, validation: str | None, model_name: str) -> Any:
    """The held-out part of `load_splits` alone; the training data need not be there where they have no part in it."""
    if validation is None or validation == dataset:
        return load_splits(dataset, None, model_name)[1]
    return open_dataset(validation, split="validation")


def own_text(model_name: str | None, split: str, *, seed: int = 0) -> Any:
    """What comes with a model: tokens or documents sampled from the embedded one or SmolLM2, the rows of a folder of samples.

    A line says so of SmolLM2's, which are shuffled with `seed`. Raises a ValueError for any other model.
    """
    if model_name == demo.MODEL_NAME:
        return demo.load_tokens(split)
    if model_name is not None and is_samples(model_name):
        return open_dataset(model_name, split=split)
    if model_name != FETCHED_MODEL:
        wanted = "held-out text with --held-out" if split == "validation" else "--dataset and --held-out"
        raise ValueError(f"the embedded tokens suit the embedded model only; give {wanted} for {model_name!r}")
    if split == "train":
        remark(f"training text: {SAMPLED[FETCHED_MODEL]}")
    return open_dataset(str(SMOLLM2_TEXT), split=split, seed=seed)


def _numbered(shape: SamplesShape, split: str) -> Dataset:
    """The rows of samples to train on, or those held out, as tokens."""
    held_out = split == "validation"
    ends = (shape.rows, shape.rows + shape.held_out_rows) if held_out else (0, shape.rows)
    return Dataset.from_dict({"tokens": numbered_rows(*ends, shape.context_size).tolist()})


def training_data(dataset: str, held_out: str | None, *, seed: int = 0, streaming: bool = True) -> Any:
    """The data to train on: the training split, less what is held out where that is cut from it."""
    return _training_part(_splits(dataset, seed=seed, streaming=streaming), dataset, held_out)


def _training_part(splits: "Splits", dataset: str, held_out: str | None) -> Any:
    train = _chosen(splits, "train", dataset)
    return _part(train, held_out=False) if held_out == dataset and set(splits) == {"train"} else train


def is_held_out(content: str | Iterable[int]) -> bool:
    """Whether a document of a data set with a training split only is held out: one in ten, by its text or its token ids.

    That depends on nothing else, so that no document is on both sides, in whatever order, split or command it comes.
    """
    raw = content.encode(errors="replace") if isinstance(content, str) else str(list(map(int, content))).encode()
    return zlib.crc32(raw) % HELD_OUT_PART == 0


def _part(dataset: Any, *, held_out: bool) -> Any:
    """The documents of a training split that are held out, or the others."""
    column = data_column(dataset)

    def chosen(row: Mapping[str, Any]) -> bool:
        return is_held_out(row[column]) is held_out

    if isinstance(dataset, IterableDataset):
        return dataset.filter(chosen)
    found = [i for i, row in enumerate(dataset) if chosen(row)]
    if not found:
        side = "hold out" if held_out else "train on"
        raise ValueError(
            f"there is only a training split of {len(dataset)} documents, too few to {side}; give --held-out"
        )
    return dataset.select(found)


def data_column(dataset: Any) -> str:
    """The column of a data set that is read; a ValueError where it has none of `TOKEN_COLUMNS` and `READ_BY_SAELENS`."""
    columns = list(next(iter(dataset), {}))
    found = next((name for name in ("tokens", "input_ids", *READ_BY_SAELENS) if name in columns), None)
    if found is None:
        raise ValueError(
            f"the data set has the columns {', '.join(columns) or '(none: it is empty)'}; give one with {TEXT_COLUMN!r}, or with "
            f"token ids in {' or '.join(map(repr, sorted(TOKEN_COLUMNS)))}"
        )
    return found


def local_dataset(source: str, *, split: str = "train", seed: int = 0) -> Any | None:
    """The data set at a path, with a `text` or a tokens column; None where the source is no path, but a name on the hub.

    Args:
        source: a file or folder, see the module.
        split: which split, where there are several.
        seed: of the order of a file's documents, which often go source by source. A data set on disk keeps its order.

    Raises a FileNotFoundError where nothing is at a path, a ValueError where it has no text or is of another kind.
    """
    splits = _local_splits(source, seed)
    return None if splits is None else _chosen(splits, split, source)


def open_dataset(source: str, *, split: str, seed: int = 0, streaming: bool = True) -> Any:
    """The data set at a path, as `local_dataset` reads it, or streamed from the hub.

    For held-out text where there is no split of that name, see `load_splits`.
    """
    return _chosen(_splits(source, seed=seed, streaming=streaming), split, source)


Splits = Mapping[str | None, Callable[[], Any]]
"""How each split is read; None stands for a data set without splits."""


def _splits(source: str, *, seed: int, streaming: bool) -> Splits:
    if is_samples(source):
        shape = SamplesShape.load(Path(source) / SAMPLES_FILENAME)
        return {split: partial(_numbered, shape, split) for split in ("train", "validation")}
    local = _local_splits(source, seed)
    return _hub_splits(source, streaming=streaming) if local is None else local


def _chosen(splits: Splits, split: str, source: str) -> Any:
    """A split; where it is held-out text and not there, the one that stands for it, and a line that says so."""
    if None in splits or split in splits:
        return splits[None if None in splits else split]()
    other = next((name for name in ("test", *SPLITS["validation"]) if name in splits), None)
    if split == "validation" and other is not None:
        remark(f"{source!r} has no validation split; its {other} split is the held-out text")
        return splits[other]()
    if split == "validation" and set(splits) == {"train"}:
        remark(
            f"{source!r} has a training split only; one document in {HELD_OUT_PART} of it is held-out text, chosen by its content"
        )
        return _part(splits["train"](), held_out=True)
    raise ValueError(
        f"the data set in {source!r} has the splits {', '.join(map(str, splits))} and no {split!r}; give the folder of "
        "one split"
    )


def _hub_splits(source: str, *, streaming: bool) -> Splits:
    """The splits of a data set on the hub, `name` or `name:config`."""
    name, _, config = source.partition(":")
    with explained_hub(source):
        try:
            lazy = datasets.load_dataset(name, config or None, streaming=True)
        except ValueError as error:  # of several configurations none was named, or another one
            raise ValueError(f"{source!r}: {' '.join(str(error).split())}; give one as {name}:CONFIG") from error

    def load(split: str) -> Any:
        with explained_hub(source):
            whole = lazy[split] if streaming else datasets.load_dataset(name, config or None, split=split)
        return _with_text(whole, source)

    return {str(split): partial(load, str(split)) for split in lazy}


def _with_text(dataset: Any, source: str) -> Any:
    """A data set of the hub or on disk without rows that have no text; a ValueError for values of another type."""
    column = data_column(dataset)
    if column not in (*READ_BY_SAELENS[:2], *TOKEN_COLUMNS):
        return dataset  # conversations, which SAELens reads
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_row_check(source, column), with_indices=True)
    table = dataset.select_columns([column]).with_format("arrow")[:]
    kept = _kept(table, source)
    return dataset if len(kept) == len(dataset) else dataset.select(kept.to_pylist())


def _row_check(source: str, column: str) -> Callable[[Mapping[str, Any], int], bool]:
    """Of a row that is streamed, whether it has text; said of the first that has none."""
    said = list[int]()

    def has_text(row: Mapping[str, Any], number: int) -> bool:
        value = row[column]
        if value is None or (isinstance(value, str) and not value.strip()):
            if not said:
                remark(f"rows of {source!r} without {column} are left out; the first is row {number}")
            said.append(number)
            return False
        if not (_whole_numbers(torch.as_tensor(value)) if column in TOKEN_COLUMNS else isinstance(value, str)):
            raise ValueError(
                f"row {number} of {source!r} has {str(value)[:40]} for {column!r}; expected text or token ids"
            )
        return True

    return has_text


def _whole_numbers(ids: Tensor) -> bool:
    return ids.ndim == 1 and not ids.is_floating_point() and ids.dtype != torch.bool


@contextmanager
def explained_hub(name: str) -> Generator[None]:
    """Say of a data set that the hub does not give that it is not there."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(f"{name!r} is neither a file nor a data set the hub can give; {OFFLINE}") from error


def _local_splits(source: str, seed: int) -> Splits | None:
    """How the splits at a path are read; None where it is a name on the hub."""
    path = Path(source)
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return _saved_splits(path)
        inside = (file for file in path.rglob("*") if file.is_file() and is_corpus_file(file))
        files = sorted(file for file in inside if _is_data(file.relative_to(path)))
        if not files:
            raise ValueError(
                f"the folder {source!r} has no {', '.join(SUFFIXES)} file and is no data set on disk; give one that is"
            )
        _refuse_twins(files)
        return {split: partial(_of_files, of_split, seed, source) for split, of_split in _by_split(path, files).items()}
    if is_corpus_file(path):
        return {None: partial(_of_files, [path], seed, source)}
    if path.exists() or path.is_absolute() or source.startswith((".", "~")):
        kind = "has another suffix" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"the data {source!r} {kind}; give a {', '.join(SUFFIXES)} file, a folder of them, or a data set on disk or the hub"
        )
    return None


def _is_data(inside: Path) -> bool:
    hidden = any(part.startswith((".", "__")) for part in inside.parts)
    return not hidden and inside.name not in DESCRIPTIONS


def _refuse_twins(files: Iterable[Path]) -> None:
    """Raise a ValueError for a file that is there packed and unpacked."""
    for name, times in Counter(file.with_suffix("") if file.suffix in COMPRESSED else file for file in files).items():
        if times > 1:
            raise ValueError(f"{name} is there more than once, compressed too, and would be read twice; remove one")


def _by_split(folder: Path, files: Iterable[Path]) -> Mapping[str | None, list[Path]]:
    """Files by the split that their names or folders begin with, as on the hub; all under None where no two splits are named."""
    found: dict[str | None, list[Path]] = {}
    for file in files:
        named = [*file.relative_to(folder).parts[:-1], file.name.partition(".")[0]]
        words = {re.split(r"[-_\d]", name.lower(), maxsplit=1)[0] for name in named}
        found.setdefault(next((split for split, names in SPLITS.items() if words & set(names)), None), []).append(file)
    if "train" not in found:
        return {None: [file for own in found.values() for file in own]}
    if unnamed := found.pop(None, []):
        remark(f"{len(unnamed)} files of {str(folder)!r} are of no split, such as {unnamed[0].name}, and are left out")
    return found


def _saved_splits(folder: Path) -> Splits:
    with reading(folder, "a data set on disk"):
        saved = datasets.load_from_disk(str(folder))
    splits: Mapping[str | None, Any] = cast(Any, saved) if isinstance(saved, DatasetDict) else {None: saved}
    return {split: partial(_with_text, one, str(folder)) for split, one in splits.items()}


def _of_files(files: list[Path], seed: int, source: str) -> Dataset:
    tables = [_read(path) for path in files]
    columns = {str(path): table.column_names[0] for path, table in zip(files, tables, strict=True)}
    if len(set(columns.values())) > 1:
        raise ValueError(
            f"{', '.join(list(columns)[:4])} have different columns ({', '.join(sorted(set(columns.values())))}); "
            "give text or tokens, not both"
        )
    if len(kinds := Counter(suffix_of(path) for path in files)) > 1:
        remark(f"{source!r} has {', '.join(f'{n} {suffix} files' for suffix, n in kinds.items())}; all are read")
    table = pa.concat_tables([_cleaned(table, str(path)) for path, table in zip(files, tables, strict=True)])
    (column,) = table.column_names
    kind = pa.list_(pa.int64()) if column in TOKEN_COLUMNS else pa.large_string()
    return Dataset(table.cast(pa.schema([(column, kind)]))).shuffle(seed=seed)


def held_out_tokens(model: LanguageModel, dataset: Any, context_size: int, n_tokens: int) -> Int[Tensor, "rows pos"]:
    """The first rows of a data set, cut as SAELens cuts them for training, at most `n_tokens` (at least one row).

    Raises a ValueError when the text does not fill one row, or as `check_data`.
    """
    check_data(model, dataset, context_size)
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
    if store_class is ActivationsStore:  # others have numbers of documents in place of ids
        for number, row in enumerate(rows):
            check_ids(row, number, vocabulary_size(model), context_size)
    return rows


def refuse_without_tokenizer(model: LanguageModel, dataset: Any) -> None:
    """Raise a ValueError when the data set is text and the model has no tokenizer; SAELens would fail an assertion."""
    tokenizer: Any = model.tokenizer
    if tokenizer is None and not TOKEN_COLUMNS & set(columns := next(iter(dataset), {})):
        raise ValueError(
            f"the model has no tokenizer, and the data set has {', '.join(columns)}; give one of token ids, in a column "
            f"{' or '.join(sorted(TOKEN_COLUMNS))}, or load the model with a tokenizer"
        )


def check_data(model: LanguageModel, dataset: Any, context_size: int, source: str | None = None) -> None:
    """Refuse, before the model reads anything, what would fail in the middle of a training or be read as something else.

    Of a data set of token ids at hand every row is looked at; of one that is streamed the first, and the others as they come
    (`check_ids`).

    Raises:
        ValueError: for a data set without a column of text or ids, text without a tokenizer, token ids that are no whole numbers
            or are not in the model's vocabulary (row and id are named), rows shorter than `context_size`, or ids that
            the `sae_lens.json` of the folder `source` says are another tokenizer's.
    """
    refuse_without_tokenizer(model, dataset)
    column = data_column(dataset)
    if column not in TOKEN_COLUMNS:
        return
    if source is not None:
        _check_tokenizer(model, Path(source) / "sae_lens.json")
    size = vocabulary_size(model)
    if not isinstance(dataset, Dataset):
        check_ids(next(iter(dataset))[column], 0, size, context_size)
        return
    ids = dataset.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    if not _has_ids(ids.type):
        raise ValueError(f"the column {column!r} has values of the type {ids.type}; expected lists of whole numbers")
    lengths, flat = pc.list_value_length(ids), pc.list_flatten(ids)
    known = pc.and_(pc.greater_equal(flat, 0), pc.less(flat, size or 2**62))
    starts = pc.cumulative_sum(pc.fill_null(lengths, 0))
    wrong = pc.index(pc.fill_null(known, False), False).as_py()
    row = pc.index(pc.less(pc.fill_null(lengths, 0), context_size), True).as_py()
    if wrong >= 0:
        row = pc.index(pc.greater(starts, wrong), True).as_py()
    if row >= 0:
        check_ids(ids[row].as_py() or [], row, size, context_size)


def check_ids(ids: Any, row: int, size: int | None, context_size: int) -> None:
    """Raise a ValueError for a row of token ids that is too short, or has one outside a vocabulary of that size."""
    try:
        found = torch.as_tensor(ids)
    except (TypeError, RuntimeError):  # one of them is None
        found = torch.zeros(0)
    if not _whole_numbers(found) and len(ids):
        raise ValueError(f"row {row} of the token ids has {str(ids)[:60]}; expected a list of whole numbers")
    if len(found) < context_size:
        raise ValueError(
            f"row {row} of the token ids has {len(found)} tokens, fewer than context_size {context_size}; lower it, or leave out "
            "rows that are shorter"
        )
    wrong = (found < 0) | (found >= (2**62 if size is None else size))
    if wrong.any():
        place = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"row {row} of the token ids has {int(found[place])} at position {place}; the vocabulary of the model goes from 0 to "
            f"{'...' if size is None else size - 1}: tokenize the text with the tokenizer of this model"
        )


def vocabulary_size(model: LanguageModel) -> int | None:
    """Number of the model's token ids, padded ones included; None where its config does not say."""
    config: Any = getattr(model, "cfg", None) or getattr(model.model, "config", None)
    return getattr(config, "d_vocab", None) or getattr(config, "vocab_size", None)


def _check_tokenizer(model: LanguageModel, description: Path) -> None:
    """Compare the model's tokenizer with that which SAELens's `sae_lens.json` beside pretokenized data names."""
    if not description.is_file():
        return
    name = json.loads(description.read_text(encoding="utf-8")).get("tokenizer_name")
    tokenizer: Any = model.tokenizer
    if name is None or tokenizer is None or name == tokenizer.name_or_path:
        return
    try:
        from transformers import AutoTokenizer  # costs seconds, and is seldom needed

        theirs = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError):
        remark(
            f"{description} says that the ids are of the tokenizer {name!r}, which cannot be compared with the model's here"
        )
        return
    if theirs != tokenizer.get_vocab():
        raise ValueError(
            f"{description} says that the ids are of the tokenizer {name!r}, whose vocabulary is not the model's "
            f"({tokenizer.name_or_path!r}); tokenize the text for this model"
        )
