"""One loader for every kind of data set: encodings, missing text, splits, token ids."""

import gzip
import json
import shutil
from pathlib import Path

import datasets as hf
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import D_VOCAB, tiny_model, token_dataset
from datasets import Dataset, DatasetDict

from sae_nfm.data import check_data, datasets, held_out_rows
from sae_nfm.data.datasets import load_splits, local_dataset, open_dataset, read_documents

LINES = '{"text": "café"}\n{"text": null}\n\n{"other": 1}\n{"text": " "}\n{"text": "two\\nlines"}'
DOCUMENTS = ["café", "two\nlines"]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("16.jsonl", LINES.encode("utf-16")),
        ("16be.jsonl", b"\xfe\xff" + LINES.encode("utf-16-be")),
        ("32.jsonl", LINES.encode("utf-32")),
        ("crlf.jsonl", LINES.replace("\n", "\r\n").encode() + b"\r\n"),
        ("two files.jsonl", b"\xef\xbb\xbf" + LINES.replace("\n\n", "\n\ufeff").encode()),
        ("UPPER.JSONL", LINES.encode()),
        ("packed.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("packed.jsonl.zst", bytes(pa.compress(LINES.encode(), "zstd", asbytes=True))),
        ("list.json", ("[" + ",".join(filter(None, LINES.split("\n"))) + "]").encode()),
        ("lines.json", LINES.encode()),
        ("nan.json", json.dumps({"text": ["café", None, float("nan"), " ", "two\nlines"]}).encode()),
        ("a.csv", '\ufeffid,text\n1,café\n2,\n3,NaN\n4," "\n5,"two\nlines"\n'.encode()),
    ],
)
def test_encodings_and_missing_text(name, content, tmp_path, capsys):
    path = write(tmp_path / name, content)
    assert read_documents(path) == DOCUMENTS
    assert sorted(local_dataset(str(path))["text"]) == DOCUMENTS
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == f"sae-nfm: 3 of 5 rows of {path} have no text (null or blank) and are left out"


def test_a_mark_is_no_text(tmp_path):
    assert read_documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo")) == ["one\ntwo"]
    assert read_documents(write(tmp_path / "b.txt", "one".encode("utf-16"))) == ["one"]


def test_missing_text_on_disk_and_in_columns(tmp_path, capsys):
    text = ["café", None, " ", "two\nlines"]
    Dataset.from_dict({"text": text}).save_to_disk(tmp_path / "saved")
    shutil.copy(tmp_path / "saved" / "data-00000-of-00001.arrow", tmp_path / "a.arrow")
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array(text).dictionary_encode()}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"tokens": [[1, 2], None]}), tmp_path / "tokens.parquet")
    capsys.readouterr()
    for name in ("saved", "a.arrow", "a.parquet", "b.parquet"):
        assert sorted(local_dataset(str(tmp_path / name))["text"]) == DOCUMENTS
        assert "2 of 4 rows" in capsys.readouterr().err
    assert list(local_dataset(str(tmp_path / "tokens.parquet"))["tokens"]) == [[1, 2]]
    assert "1 of 2 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ncaf\xe9", r"a\.txt.*UTF-8.*byte 7, in line 2, is 0xe9.*iconv"),
        ("a.jsonl", LINES.encode("utf-16-le"), r"a\.jsonl.*NUL in line 1\b.*UTF-16"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}', r"line 2 of .*a\.jsonl has a int"),
        ("a.jsonl", b'{"text": ["a"]}', r"line 1 of .*a\.jsonl has a list"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"line 1 of .*a\.jsonl.*surrogate"),
        ("a.jsonl", b'{"tokens": [1, true]}', r"line 1 of .*a\.jsonl.*whole numbers"),
        ("a.jsonl", b'{"input_ids": [1.0]}', r"line 1 of .*a\.jsonl.*whole numbers"),
        ("a.json", b'{"text": ', r"a\.json is not JSON"),
        ("a.json", b"[1]", r"object 1 of .*a\.json is a int"),
        ("a.csv", b"id,text\n1,a, b\n", r"line 2 of .*a\.csv has 3 fields, its header 2"),
        ("a.csv", b'text\n"a\n', r"a\.csv' is damaged"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], r"a\.jsonl\.gz.* is damaged"),
        ("a.jsonl.gz", LINES.encode(), r"a\.jsonl\.gz.*[Nn]ot a gzipped file"),
        ("a.jsonl.zst", bytes(pa.compress(LINES.encode(), "zstd", asbytes=True))[:-3], r"a\.jsonl\.zst.* is damaged"),
        *((f"a{kind}", b"", rf"a{kind}\b") for kind in (".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt.gz")),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        local_dataset(str(write(tmp_path / name, content)))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, 2]), r"'text' of .*a\.parquet .*int64.*strings"),
        (pa.array([None, None]), r"'text' of .*a\.parquet .*nulls"),
        (pa.array([b"\xff"]).view(pa.string()), r"a\.parquet' is damaged"),
    ],
)
def test_columns_of_another_type(column, message, tmp_path):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        local_dataset(str(tmp_path / "a.parquet"))


def test_folders_hidden_files_and_twins(tmp_path, capsys):
    for name, content in {
        "a.txt": b"a",
        "b.jsonl": b'{"text": "b"}',
        "._b.jsonl": b"\0",
        ".x/c.txt": b"c",
        "dataset_info.json": b"{}",
    }.items():
        write(tmp_path / name, content)
    assert sorted(local_dataset(str(tmp_path))["text"]) == ["a", "b"]
    assert "1 .txt files, 1 .jsonl files" in capsys.readouterr().err
    write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"text": "b"}'))
    with pytest.raises(ValueError, match=r"b\.jsonl .*compressed too"):
        local_dataset(str(tmp_path))


def parts(folder: Path, **splits: int) -> str:
    """A folder in the layout of the hub, so many documents a split."""
    for split, n in splits.items():
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": [f"{split} {i}" for i in range(n)]}), path)
    return str(folder)


def test_splits_that_names_of_files_say(tmp_path, capsys):
    whole = parts(tmp_path / "a", train=5, validation=2, test=1)
    train, held_out = load_splits(whole, None, "any")
    assert {text.split()[0] for text in train["text"]} == {"train"}
    assert {text.split()[0] for text in held_out["text"]} == {"validation"}
    assert list(open_dataset(whole, split="test")["text"]) == ["test 0"]
    assert capsys.readouterr().err == ""
    _, held_out = load_splits(parts(tmp_path / "b", train=5, test=1), None, "any")
    assert list(held_out["text"]) == ["test 0"]
    assert "test split is the held-out text" in capsys.readouterr().err
    assert len(open_dataset(parts(tmp_path / "c", validation=3), split="train")) == 3  # one split is the whole


@pytest.fixture
def a_hub(monkeypatch):
    """`datasets` with data sets by name: what it was asked for, and how."""
    known: dict[str, hf.DatasetDict] = {}

    def load_dataset(name, config=None, *, split=None, streaming=False):
        found = known[f"{name}:{config}" if config else name]
        whole = {key: one.to_iterable_dataset() if streaming else one for key, one in found.items()}
        return whole if split is None else whole[split]

    monkeypatch.setattr(hf, "load_dataset", load_dataset)
    return known


@pytest.mark.parametrize("kind", ["hub", "hub, downloaded", "saved", "folder"])
def test_a_training_split_only_is_divided_by_document(kind, tmp_path, a_hub, capsys):
    texts = [f"document {i}" for i in range(200)] + ["twice"] * 2 + [""]
    source, split = str(tmp_path / "set"), DatasetDict({"train": Dataset.from_dict({"text": texts})})
    if kind.startswith("hub"):
        source = "someone/texts:english"
        a_hub[source] = split
    elif kind == "saved":
        split.save_to_disk(source)
    else:
        write(tmp_path / "set" / "train.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
    streaming = kind != "hub, downloaded"
    train = datasets.training_data(source, source, seed=3, streaming=streaming)
    held_out = open_dataset(source, split="validation", streaming=streaming)
    sides = [[row["text"] for row in side] for side in (train, held_out)]
    assert sorted(sides[0] + sides[1]) == sorted(text for text in texts if text)
    assert not set(sides[0]) & set(sides[1])
    assert 8 <= len(sides[1]) <= 35  # 10 % of 202 by content, five standard deviations
    told = capsys.readouterr().err
    assert "one document in 10" in told
    assert "left out" in told
    both = load_splits(source, None, "any", seed=3)
    assert [[row["text"] for row in side] for side in both] == sides
    alone = datasets.training_data(source, None, seed=3, streaming=streaming)  # nothing held out: all of it
    assert len(list(alone)) == 202


def test_streamed_rows_of_another_type(a_hub):
    a_hub["a/b"] = DatasetDict({"train": Dataset.from_dict({"text": [1, 2]})})
    a_hub["a/c"] = DatasetDict({"train": Dataset.from_dict({"tokens": [[1, 2], [1.5, 2]]})})
    a_hub["a/d"] = DatasetDict({"train": Dataset.from_dict({"story": ["x"]})})
    for name, message in (("a/b", "row 0 of 'a/b'"), ("a/c", "row 0 of 'a/c'"), ("a/d", "columns story")):
        with pytest.raises(ValueError, match=message):
            list(open_dataset(name, split="train"))


def rows_of_ids(change=None) -> list[list[int]]:
    rows = token_dataset(9)["tokens"][:]
    for row, place, value in change or ():
        rows[row][place] = value
    return rows


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([(7, 5, D_VOCAB)], rf"row 7\b.* {D_VOCAB} at position 5\b.* {D_VOCAB - 1}"),
        ([(3, 0, -1), (8, 2, 10**6)], r"row 3\b.* -1 at position 0\b"),
    ],
)
def test_an_id_beyond_the_vocabulary(change, message, streamed):
    dataset = Dataset.from_dict({"input_ids": rows_of_ids(change)})
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    with pytest.raises(ValueError, match=message):
        held_out_rows(tiny_model(), dataset, 16, 10**6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2, 3, 4], [1, 2]], r"row 1\b.*2 tokens, fewer than context_size 4"),
        ([[1, 2, 3, 4], []], r"row 1\b.*0 tokens"),
        ([[1, 2, 3, 4], [1, None, 3, 4]], r"row 1\b.*None"),
        ([[1.0, 2, 3, 4]], "whole numbers"),
        ([[True, False, True, True]], "whole numbers"),
    ],
)
def test_rows_that_are_no_rows_of_ids(rows, message):
    with pytest.raises(ValueError, match=message):
        check_data(tiny_model(), Dataset.from_dict({"tokens": rows}), 4)


def test_ids_of_another_tokenizer(tmp_path):
    model, dataset = tiny_model(), token_dataset(2)
    model.tokenizer.save_pretrained(tmp_path / "same")
    for words, fits in (("same", True), ("other", False)):
        tokenizer = model.tokenizer.__class__.from_pretrained(tmp_path / "same")
        if not fits:
            tokenizer.add_tokens(["more"])
        tokenizer.save_pretrained(tmp_path / words)
        (tmp_path / "sae_lens.json").write_text(json.dumps({"tokenizer_name": str(tmp_path / words)}))
        if fits:
            check_data(model, dataset, 16, str(tmp_path))
        else:
            with pytest.raises(ValueError, match=r"sae_lens\.json.*other"):
                check_data(model, dataset, 16, str(tmp_path))


def test_rows_at_hand_are_read_once_and_stay_as_they_are():
    dataset = token_dataset(5)
    check_data(tiny_model(), dataset, 16)
    assert torch.equal(torch.tensor(dataset["tokens"][:]), torch.tensor(token_dataset(5)["tokens"][:]))
