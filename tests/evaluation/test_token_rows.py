"""Rows on disk: what is written is read, sums are those of the rows, and nothing unfinished is taken for a result."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from sae_nfm.evaluation.token_table import (
    SCHEMA,
    VALUES,
    Activations,
    Manifest,
    begin,
    document_sums,
    is_finished,
    read_rows,
    table,
    write_part,
)

ARMS = ("a", "b", "elsewhere")
HOOK_NAMES = {"a": "here", "b": "here", "elsewhere": "there"}


def manifest(**changes):
    settings = {
        "model": "m",
        "tokens": "t",
        "documents": "d",
        "arms": {name: f"arm {name}" for name in ARMS},
        "hook_names": HOOK_NAMES,
        "seed": 0,
        "batch_rows": 2,
        "batches_per_part": 1,
        "parts": 3,
    }
    return Manifest(**(settings | changes))


def part(seed, documents):
    """Columns of each arm and activations of each hook point, random; every third token has no next one."""
    rng, n = np.random.default_rng(seed), len(documents)
    columns = {
        name: {"document": np.array(documents), "row": np.arange(n), "position": np.arange(n) % 7}
        | {value: rng.standard_normal(n) for value in VALUES}
        for name in ARMS
    }
    for found in columns.values():
        found["ce_nats"][::3] = found["ce_delta_nats"][::3] = np.nan
    return columns, {"here": rng.standard_normal((n, 4)) + 3, "there": rng.standard_normal((n, 2)) - 5}


PARTS = (part(0, [0, 0, 0, 1, 1]), part(1, [1, 1, 4, 4, 4, 4, 5]), part(2, [5, 7]))


def written(folder, parts=PARTS):
    begin(folder, manifest())
    for number, (columns, x) in enumerate(parts):
        tables = [table(name, ARMS, found) for name, found in columns.items()]
        sums = {at: Activations.of(columns["a"]["document"], values) for at, values in x.items()}
        write_part(folder, number, tables, sums)
    return folder


def expected_rows():
    frames = [pd.DataFrame(found).assign(arm=name) for columns, _ in PARTS for name, found in columns.items()]
    return pd.concat(frames, ignore_index=True)


def test_round_trip(tmp_path):
    found, expected = read_rows(written(tmp_path / "rows")), expected_rows()
    assert list(found.columns) == SCHEMA.names
    assert found["arm"].astype(str).tolist() == expected["arm"].tolist()  # parts, and rows in them, in order
    assert found.dtypes.astype(str).to_dict() == {
        "document": "int32", "row": "int32", "position": "int16", "arm": "category"
    } | dict.fromkeys(VALUES, "float32")  # fmt: skip
    for name in ("document", "row", "position", *VALUES):
        assert np.array_equal(found[name], expected[name].astype(found[name].dtype), equal_nan=name in VALUES), name
    on_disk = pq.read_table(tmp_path / "rows" / "part-00000.parquet")
    assert on_disk.schema.equals(SCHEMA)
    assert on_disk["ce_nats"].null_count == 3 * 2  # no next token: null, not NaN
    assert (
        pq.ParquetFile(tmp_path / "rows" / "part-00000.parquet").metadata.row_group(0).column(4).compression == "ZSTD"
    )


def test_some_columns_and_arms(tmp_path):
    folder, expected = written(tmp_path / "rows"), expected_rows()
    found = read_rows(folder, ["kl_nats", "document"], ["b"])
    assert list(found.columns) == ["kl_nats", "document"]
    assert np.array_equal(found["kl_nats"], expected[expected["arm"] == "b"]["kl_nats"].astype(np.float32))
    assert len(read_rows(folder, arms=["a", "elsewhere"])) == 2 * 14
    with pytest.raises(ValueError, match=r"\barm 'c'.*\ba, b, elsewhere\b"):
        read_rows(folder, arms=["a", "c"])
    with pytest.raises(ValueError, match=r"\bcolumn 'kl'.*\bdocument, row, position, arm, kl_nats\b"):
        read_rows(folder, ["kl"])


def test_document_sums_are_those_of_the_rows(tmp_path):
    """Documents 1 and 5 run over two parts."""
    found = document_sums(written(tmp_path / "rows"))
    assert found["arm"].tolist() == [name for name in ARMS for _ in range(5)]
    assert found["document"].tolist() == [0, 1, 4, 5, 7] * 3
    assert found[found["arm"] == "a"]["tokens"].tolist() == [3, 4, 4, 2, 1]
    rows = expected_rows()
    for _, line in found.iterrows():
        own = rows[(rows["arm"] == line["arm"]) & (rows["document"] == line["document"])]
        assert line["predictions"] == own["ce_nats"].notna().sum()
        for name in VALUES:
            assert line[name] == pytest.approx(own[name].sum(), abs=1e-6), name  # float32 rows of size 1


def test_variance_energy_is_about_the_mean_of_all_tokens(tmp_path):
    found = document_sums(written(tmp_path / "rows"))
    documents = np.concatenate([columns["a"]["document"] for columns, _ in PARTS])
    for name, at in HOOK_NAMES.items():
        x = np.concatenate([activations[at] for _, activations in PARTS])
        energy = np.square(x - x.mean(0)).sum(1)
        expected = [energy[documents == document].sum() for document in (0, 1, 4, 5, 7)]
        own = found[found["arm"] == name]["variance_energy"]
        assert own.tolist() == pytest.approx(expected, rel=1e-12)  # float64; a mean of 3 to 5 standard deviations


def test_a_part_in_which_no_token_counts(tmp_path):
    empty = ({}, {})
    found = document_sums(written(tmp_path / "rows", [PARTS[0], empty, PARTS[2]]))
    assert found[found["arm"] == "b"]["tokens"].tolist() == [3, 2, 1, 1]
    assert len(read_rows(tmp_path / "rows")) == 3 * 7


def test_an_unfinished_measurement_is_not_read(tmp_path):
    folder = written(tmp_path / "rows")
    (folder / "part-00001.parquet").rename(folder / "part-00001.parquet.partial")
    assert [is_finished(folder, number) for number in range(3)] == [True, False, True]
    for read in (read_rows, document_sums):
        with pytest.raises(ValueError, match=r"\b2 of 3 parts\b.*`measure`"):
            read(folder)
    with pytest.raises(FileNotFoundError, match=r"nowhere\b.*\bmanifest\.json\b"):
        read_rows(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"settings: seed\b.*\b0\b.*\b1\b"),
        ({"tokens": "u"}, r"settings: tokens\b.*'t'.*'u'"),
        ({"arms": {"a": "arm a", "b": "another", "c": "new"}}, r"settings: .*\barms \(b, elsewhere, c\)"),
        (
            {"batch_rows": 4, "documents": "e"},
            r"settings: documents\b.*'d'.*'e'.*\bbatch_rows\b.*\b2\b.*\b4\b",
        ),
    ],
)
def test_another_measurement_is_refused(tmp_path, changes, message):
    begin(tmp_path / "rows", manifest())
    begin(tmp_path / "rows", manifest())
    with pytest.raises(ValueError, match=message) as error:
        begin(tmp_path / "rows", manifest(**changes))
    assert str(tmp_path / "rows") in str(error.value)
    others = {field.name for field in dataclasses.fields(Manifest)} - changes.keys()
    assert not [name for name in others if f"{name} (" in str(error.value)]


def test_other_things_are_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"\bother things\b.*\bmanifest\.json\b"):
        begin(tmp_path, manifest())
    (tmp_path / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest()) | {"mine": 1}))
    with pytest.raises(ValueError, match=r"\bmanifest\.json is not\b.*'mine'"):
        begin(tmp_path, manifest())


def test_every_setting_is_compared():
    for field in dataclasses.fields(Manifest):
        if field.name not in ("hook_names", "parts"):  # these follow from the others
            changed = {"arms": {}} if field.name == "arms" else {field.name: "other"}
            assert manifest().changes(manifest(**changed)), field.name
