"""Errors of files: the path, the cause and what to do, whatever library they come from."""

import errno
import gzip
import json
import os
import resource
import signal

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from sae_nfm.common import whole
from sae_nfm.common.file_errors import (
    DamagedFileError,
    FileError,
    check_writable,
    printable,
    quoted,
    reading,
    writing,
)

WRITERS = {
    "x.json": lambda path: path.write_text(json.dumps({"name": "x" * 200}), encoding="utf-8"),
    "x.json.gz": lambda path: path.write_bytes(gzip.compress(bytes(range(256)), mtime=0)),
    "x.safetensors": lambda path: save_file({"a": np.arange(9)}, path),
    "x.parquet": lambda path: pd.DataFrame({"text": ["a", "b"] * 50}).to_parquet(path),
    "x.npz": lambda path: np.savez(path, mean=np.arange(30)),
    "x.yaml": lambda path: path.write_text("a: [1, 2]\nb: {c: 1}\n" * 9, encoding="utf-8"),
}
READERS = {
    "x.json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    "x.json.gz": lambda path: gzip.decompress(path.read_bytes()),
    "x.safetensors": load_file,
    "x.parquet": pd.read_parquet,
    "x.npz": lambda path: np.load(path)["mean"],
    "x.yaml": lambda path: yaml.safe_load(path.read_text(encoding="utf-8")),
}


@pytest.mark.parametrize("how", ["cut", "overwritten"])
@pytest.mark.parametrize("name", READERS)
def test_every_decoder_s_error_names_the_file(name, how, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 - 4] if how == "cut" else b"\xff\x00" + content[2:-8] + b"\xff" * 8)
    with (
        pytest.raises(DamagedFileError, match=r" is damaged \(.+\); fetch it anew$") as caught,
        reading(path, remedy="fetch it anew"),
    ):
        READERS[name](path)
    assert str(caught.value).startswith(f"'{path}'")
    assert str(caught.value).isprintable()


def test_other_content_is_what_it_is_not():
    for broken in (lambda: {}["arms"], lambda: json.loads("[" * 100_000), lambda: len(None)):
        with (
            pytest.raises(DamagedFileError, match=r"^'x' is not a result \(.+\); again$"),
            reading("x", "a result", remedy="again"),
        ):
            broken()


def test_what_cannot_be_read_is_told_by_its_path(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=rf"^there is no file '{tmp_path}/x'; again$"),
        reading(tmp_path / "x", remedy="again"),
    ):
        (tmp_path / "x").read_bytes()
    with pytest.raises(FileError, match=rf"^'{tmp_path}' cannot be read: is a directory$"), reading(tmp_path):
        tmp_path.read_bytes()


def test_an_error_that_is_a_sentence_already_stays():
    for inner in (DamagedFileError("a"), FileError("b"), FileNotFoundError("c")):
        with pytest.raises(type(inner), match=f"^{inner}$"), reading("x"), reading("y"):
            raise inner


@pytest.fixture
def no_room():
    """No file of this process becomes larger than 6,000 bytes, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


LARGE = np.random.default_rng(0).random(5000)
WRITING = {
    "bytes": lambda path: path.write_bytes(LARGE.tobytes()),
    "safetensors": lambda path: save_file({"a": LARGE}, path),
    "torch": lambda path: torch.save(torch.from_numpy(LARGE), path),
    "parquet": lambda path: pd.DataFrame({"a": LARGE}).to_parquet(path),
    "numpy": lambda path: np.save(path, LARGE),
}


@pytest.mark.parametrize("library", WRITING)
def test_a_full_disk_is_told_by_the_user_s_path(library, tmp_path, no_room):
    path = tmp_path / "mine.partial" / "x"
    path.parent.mkdir()
    with (
        pytest.raises(FileError, match=r"^'mine' cannot be written: .*; .*place$") as caught,
        writing("mine"),
        writing(path),
    ):
        WRITING[library](path)
    assert "partial" not in str(caught.value)
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)  # torch does not say which


def test_a_place_that_cannot_be_written_is_found_beforehand(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path, folder, cause in (
        (tmp_path / "file" / "x", False, "not a directory"),
        (tmp_path / "file" / "x", True, "not a directory"),
        (tmp_path / "file", True, "not a directory"),
        (tmp_path / "folder", False, "is a directory"),
        (tmp_path / ("x" * 250), False, "file name too long"),
        (tmp_path / "pipe", False, "no regular file"),
        ("/dev/null", False, "no regular file"),
        ("/proc/x", True, "no such file"),
        ("a\0b", False, "code 0"),
    ):
        with pytest.raises(FileError, match=f"cannot be written: .*{cause}|is no regular file") as caught:
            check_writable(path, folder=folder)
        assert quoted(path) in str(caught.value)
    for path, folder in (
        (tmp_path / "a" / "b", False),
        (tmp_path / "file", False),
        (tmp_path / "folder", True),
        (None, True),
    ):
        check_writable(path, folder=folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "pipe"]


def test_a_full_disk_is_found_beforehand(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sae_nfm.common.file_errors.bytes", full, raising=False)
    with pytest.raises(FileError, match="cannot be written: no space left on device; free some space"):
        check_writable(tmp_path / "x")


def test_printable_leaves_no_character_that_acts():
    acting = "\x1b[2J\r\n\x9b\u202e\u2066\u2028\x7f\u200b\udc80"
    assert printable(f"a{acting}é漢") == "a\\x1b[2J\\r\\n\\x9b\\u202e\\u2066\\u2028\\x7f\\u200b\\udc80é漢"
    assert printable("a\nb\x07", keep="\n") == "a\nb\\x07"
    assert quoted('a"\u202e\n') == "'a\"\\u202e\\n'"


def test_a_saved_file_names_its_path_and_replaces_no_device(tmp_path, no_room):
    with (
        pytest.raises(FileError, match=rf"^'{tmp_path}/x' cannot be written: file too large"),
        whole(tmp_path / "x") as partial,
    ):
        partial.write_bytes(LARGE.tobytes())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="no regular file"), whole(tmp_path / "pipe"):
        pass
    with (
        pytest.raises(FileError, match=r"/pipe/x' cannot be written: .*a part of the path is a file"),
        whole(tmp_path / "pipe" / "x"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
