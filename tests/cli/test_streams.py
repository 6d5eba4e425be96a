"""Standard streams that are full, closed or of few characters: a result that was saved is never lost by them."""

import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sae_nfm.cli.main import Lenient, as_json
from sae_nfm.common.file_errors import FileError
from sae_nfm_cli import ClosedStream, main
from sae_nfm_cli.commands import COMMANDS, Command


class Worked:
    """The result of a command that prints while it works, and saves."""

    def __init__(self, path):
        self.path = path

    def words(self):
        return "the result é\x1b[2J"


def work(config):
    for _ in range(3000):
        print("progress \x1b[31m")
    config.path.write_text("whole", encoding="utf-8")
    return Worked(config.path)


class Parser:
    def __init__(self, path):
        self.path = path

    def parse(self, argv):
        return self


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """The file that the command `work` saves."""
    path = tmp_path / "saved"
    monkeypatch.setitem(COMMANDS, "work", Command(summary="", run=f"{__name__}:work"))
    monkeypatch.setattr(Command, "make_parser", lambda self, name, argv=(): Parser(path))
    monkeypatch.setattr("sae_nfm_cli.commands.imported", lambda target: work)
    return path


@pytest.mark.parametrize("stdout", ["full", "closed", "None"])
def test_what_cannot_be_printed_is_saved(stdout, saved, monkeypatch, capsys):
    streams = {"full": lambda: open("/dev/full", "w"), "closed": ClosedStream, "None": lambda: None}  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", streams[stdout]())
    assert main(["work"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("sae-nfm: the output could not be printed (")
    assert told.endswith(f"; it is saved in {saved}\n")
    assert saved.read_text() == "whole"


def test_a_pipe_that_nobody_reads_stops_nothing(saved, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    assert main(["work"]) == 141
    assert capsys.readouterr().err == ""
    assert saved.read_text() == "whole"


def test_characters_that_a_terminal_lacks_or_obeys_are_escapes(saved, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["work"]) == 0
    lines = stdout.buffer.getvalue().split(b"\n")
    assert lines[0] == b"progress \\x1b[31m"
    assert lines[-2:] == [b"the result \\xe9\\x1b[2J", b""]


def test_no_stderr_is_no_stdout(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["no-such-command"]) == 2
    assert capsys.readouterr().out == ""


def test_lenient_is_a_stream():
    stream = Lenient(sys.stdout)
    assert (stream.encoding, stream.isatty()) == (sys.stdout.encoding, sys.stdout.isatty())
    with pytest.raises(OSError, match="closed"):
        ClosedStream().write("x")


def test_statuses(saved, monkeypatch, capsys):
    """A failed run is 1, the place of an output 2; an exception may say its own status."""

    class Diverged(RuntimeError):
        exit_status = 1

    for error, status, told in (
        (OSError(28, "No space left on device"), 2, f"'{saved}' cannot be written: no space left on device; free some"),
        (
            RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 6080 vs 5972"),
            2,
            "as on a full disk",
        ),
        (PermissionError(13, "Permission denied", "/x"), 2, "'/x': permission denied\n"),
        (FileNotFoundError(2, "No such file or directory", "/x"), 2, "there is no file '/x'\n"),
        (FileError("'x' cannot be written: full"), 2, "'x' cannot be written: full\n"),
        (Diverged("the loss is nan\nat step 3"), 1, "sae-nfm: the loss is nan at step 3\n"),
        (RuntimeError("a \x1b[2J"), 1, "RuntimeError: a \\x1b[2J; run again with --debug"),
    ):

        def fail(config, error=error):
            raise error

        monkeypatch.setattr("sae_nfm_cli.commands.imported", lambda target, fail=fail: fail)
        assert main(["work"]) == status
        out, err = capsys.readouterr()
        assert told in err
        assert (out, err.count("\n")) == ("", 1)


def test_text_that_is_no_text_is_json():
    @dataclass
    class Odd:
        name: str
        path: Path
        nothing: float

    content = json.loads(as_json(Odd("na\udcc3", Path("\udcff"), float("nan"))))
    assert content == {"name": "na\udcc3", "path": "\udcff", "nothing": None}


@pytest.mark.parametrize(
    "line",
    ["attribute x --save", "report . --save", "train --output_path", "compare --output", "convert a", "export a"],
)
def test_a_place_that_cannot_be_written_is_told_at_once(line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sae_nfm_cli.commands.Command.result", lambda *args: pytest.fail("it began"))
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "x.jsonl"
    assert main([*line.split(), str(place)]) == 2
    assert capsys.readouterr().err.startswith(
        f"sae-nfm: '{place}' cannot be written: not a directory; a part of the path"
    )
