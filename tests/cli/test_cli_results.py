"""Results as words and as JSON, errors in one line, exit statuses."""

import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from math import inf, nan
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from sae_lens.training._interruption import InterruptedException
from tqdm.auto import tqdm

from sae_nfm.attribution.run import AttributeConfig, attribute
from sae_nfm.cli.jobs import Demo
from sae_nfm.cli.main import as_json
from sae_nfm.comparison.results import CompareResult
from sae_nfm_cli import main
from sae_nfm_cli.commands import COMMANDS, Command

Kind = Literal["nothing", "ValueError", "missing", "silent", "KeyError", "RuntimeError", "ctrl-c", "sigterm"]
ERRORS: dict[Kind, BaseException] = {
    "ValueError": ValueError("k is 0;\n  give a positive number"),
    "missing": FileNotFoundError("no folder 'x'; give one"),
    "silent": ValueError(),
    "KeyError": KeyError("weights"),
    "RuntimeError": RuntimeError("shapes\ndiffer"),
    "ctrl-c": KeyboardInterrupt(),
    "sigterm": InterruptedException("interrupted; to go on: sae-nfm train"),
}


@dataclass(frozen=True, kw_only=True)
class FailConfig:
    """How to fail."""

    kind: Kind = "nothing"
    """Of which kind."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """What came of it."""

    command: str
    """The command line."""
    figure: float
    """No number."""

    def words(self) -> str:
        """For the terminal."""
        return f"{self.command}: {self.figure}"


def fail(config: FailConfig, *, command: str) -> Failed:
    """Fail, or print as libraries do and return."""
    if config.kind in ERRORS:
        raise ERRORS[config.kind]
    print("Loaded the model")
    for _ in tqdm(range(2), desc="Working"):
        pass
    return Failed(command=command, figure=nan)


@pytest.fixture(autouse=True)
def failing(monkeypatch):
    """`sae-nfm fail`."""
    command = Command(summary="fail", config=f"{__name__}:FailConfig", run=f"{__name__}:fail")
    monkeypatch.setitem(COMMANDS, "fail", command)


def test_words_by_default(capsys):
    assert main(["fail", "--kind", "nothing"]) == 0
    assert capsys.readouterr().out == "Loaded the model\nsae-nfm fail --kind nothing: nan\n"


def test_nothing_but_json_on_stdout(capsys):
    assert main(["fail", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"command": "sae-nfm fail --json", "figure": None}
    assert "Loaded the model" in err
    assert "Working" in err


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("kind", "status", "told"),
    [
        ("ValueError", 2, "k is 0; give a positive number"),
        ("missing", 2, "no folder 'x'; give one"),
        ("silent", 1, "ValueError; .*--debug.*"),
        ("KeyError", 1, "KeyError: 'weights'; .*--debug.*"),
        ("RuntimeError", 1, "RuntimeError: shapes differ; .*--debug.*"),
        ("ctrl-c", 130, r"interrupted\b.*\.partial.*"),
        ("sigterm", 130, "interrupted; to go on: sae-nfm train"),
    ],
)
def test_an_error_is_one_line_and_a_status(kind, status, told, as_json, capsys):
    assert main(["fail", "--kind", kind, *["--json"] * as_json]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"sae-nfm: {told}\n", err)


@pytest.mark.parametrize(("kind", "status"), [("ValueError", 2), ("KeyError", 1), ("ctrl-c", 130)])
def test_debug_puts_the_traceback_before_the_line(kind, status, capsys):
    assert main(["fail", "--debug", "--kind", kind]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Traceback (most recent call last):\n")
    assert "raise ERRORS[config.kind]" in err
    assert err.splitlines()[-1].startswith("sae-nfm: ")


def test_debug_of_a_mistake_in_the_options(capsys):
    assert main(["fail", "--knd", "x", "--debug"]) == 2
    assert "in parse" in capsys.readouterr().err


def test_what_follows_two_dashes_is_no_switch(capsys):
    assert main(["attribute", "--against", "x", "--", "--debug"]) == 2
    assert re.fullmatch("sae-nfm: .*against.*'x'.*--logit.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("argv", [["--help"], ["fail"], ["fail", "--json"]])
def test_a_closed_pipe_is_quiet(argv, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(argv) == 141
    assert "Error" not in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class Everything:
    """What results hold."""

    figures: tuple[float, ...]
    """Numbers and what is none."""
    by_layer: dict[int, float]
    """Keys that are no text."""
    where: Path
    """A path."""
    inner: Failed | None
    """A result in it."""

    def words(self) -> str:
        """None."""
        return ""


def test_json_of_everything_a_result_holds():
    figures = (1.5, nan, inf, -inf, np.float64(2.5), np.float32(0.5), np.int64(3))
    inner = Failed(command="é", figure=1.0)
    result = Everything(figures=figures, by_layer={2: 0.25}, where=Path("runs/demo"), inner=inner)
    assert json.loads(as_json(result)) == {
        "figures": [1.5, None, None, None, 2.5, 0.5, 3],
        "by_layer": {"2": 0.25},
        "where": "runs/demo",
        "inner": {"command": "é", "figure": 1.0},
    }


def test_the_json_of_a_command_is_what_it_saves(tmp_path, capsys):
    saved = tmp_path / "attribution.json"
    argv = ["attribute", "The film was not good", "--json", "--save", str(saved)]
    assert main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(saved.read_text())
    result = attribute(AttributeConfig(prompt="The film was not good"))
    assert printed["tokens"] == json.loads(json.dumps([asdict(token) for token in result.tokens]))


def test_demo_prints_where_everything_is():
    config = {"training_tokens": 4096, "learning_rates": [0.005], "dataset": None}
    comparison = CompareResult(rows=(), provenance={"config": config, "seeds": [0]})
    demo = Demo(comparison=comparison, results=Path("runs/demo/results.json"), report=Path("runs/demo/report.html"))
    told = demo.words().splitlines()
    assert told[-2:] == ["Results: runs/demo/results.json", "Report:  runs/demo/report.html"]
    printed = json.loads(as_json(demo))
    assert printed["comparison"]["provenance"] == comparison.provenance
    assert (printed["results"], printed["report"]) == ("runs/demo/results.json", "runs/demo/report.html")
