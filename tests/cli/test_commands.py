"""The table of commands, their help and their examples."""

import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import is_dataclass
from typing import get_type_hints

import pytest
from sae_lens import TopKSAE, TopKSAEConfig

from sae_nfm import __version__
from sae_nfm.common.options import RANGES, REAL, WHOLE
from sae_nfm_cli import main
from sae_nfm_cli.commands import COMMANDS, GROUPS, Command, imported
from sae_nfm_cli.overview import answer, overview

EXAMPLES = [pytest.param(*example, id=example[1]) for command in COMMANDS.values() for example in command.examples]


def help_of(name, capsys):
    assert main([name, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", ["80", "100", "300"])
def test_the_overview_has_a_line_for_every_command(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    text = overview()
    lines = text.splitlines()
    assert max(map(len, lines)) <= min(int(columns), 100)
    for title, commands in GROUPS.items():
        first = lines.index(f"{title}:") + 1
        shown = [tuple(line.split(None, 1)) for line in lines[first : first + len(commands)]]
        assert shown == [(name, command.summary) for name, command in commands.items()]
    assert "positional arguments" not in text


def test_first_steps_can_be_taken():
    _, _, steps = overview().partition("first steps:\n")
    lines = [line for line in steps.splitlines() if line.startswith("  sae-nfm ")]
    assert len(lines) == 3
    for line in lines:
        _, name, *argv = shlex.split(line, comments=True)
        COMMANDS[name].make_parser(name, argv).parse(argv)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sae-nfm {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["trian"], "'trian'.*'train'.*`sae-nfm --help`"),
        (["dryrun", "x"], "'dryrun'.*'dry-run'.*`sae-nfm --help`"),
        (["xyzzy"], "'xyzzy'[^']*`sae-nfm --help`"),  # no other name: none is near
        (["--json"], "--json .*`sae-nfm --help`"),
    ],
)
def test_no_such_command(argv, told, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"sae-nfm: .*{told}.*\n", err)


def test_no_command_at_all_is_a_mistake_with_the_overview(capsys):
    assert main([]) == 2
    assert capsys.readouterr() == ("", overview() + "\n")
    assert main(["-h"]) == 0
    assert capsys.readouterr() == (overview(), "")


WITHOUT_THE_PACKAGE = """
import contextlib, io, json, sys
from sae_nfm_cli import main

answers = {}
for argument in ("--help", "--version", "trian"):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([argument])
    heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"sae_nfm", "torch", "numpy", "sae_lens"})
    answers[argument] = [status, out.getvalue(), err.getvalue(), heavy]
print(json.dumps(answers))
"""


def test_help_version_and_a_mistyped_command_import_nothing(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answers = json.loads(done.stdout)
    assert answers["--help"] == [0, overview(), "", []]
    assert answers["--version"] == [0, f"sae-nfm {__version__}\n", "", []]
    status, out, err, heavy = answers["trian"]
    assert (status, out, heavy) == (2, "", [])
    assert "'train'" in err


def test_a_command_is_not_answered_here():
    assert [answer([name, "--help"]) for name in COMMANDS] == [None] * len(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name, capsys, monkeypatch):
    """Usage, what it does, examples, options, common options last; every option described; nothing wider than the terminal."""
    parser = COMMANDS[name].make_parser(name)
    for columns, render in ((80, lambda: help_of(name, capsys)), (100, parser.help)):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = render()
        places = [text.index(part) for part in (f"usage: sae-nfm {name} ", "\nexamples:\n", "\ncommon options:\n")]
        assert 0 == places[0] < places[1] < places[2]
        assert "options:\n" not in text[places[2] + 20 :]
        assert all(len(line) <= columns or len(line.split()) <= 2 for line in text.splitlines())
        for noise in ("Config(", "(default: None", "section0", "(default: ())", "\x1b"):
            assert noise not in text
    assert [option.name for option in parser.options if not option.help and not option.hidden] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_two_examples_of_its_own(name):
    own = [line for _, line in COMMANDS[name].examples if f"sae-nfm {name}" in line]
    assert 2 <= len(own) <= 3
    assert len({told for told, _ in COMMANDS[name].examples}) == len(COMMANDS[name].examples)


@pytest.mark.parametrize(("told", "line"), EXAMPLES)
def test_every_example_is_understood(told, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    TopKSAE(TopKSAEConfig(d_in=4, d_sae=8, k=2)).save_model("runs/demo/saes/topk")  # a base is read with the options
    assert max(len(told) + 4, len(line) + 2) <= 80
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    _, _, rest = " ".join(map(shlex.quote, words)).partition("sae-nfm ")
    command, *argv = shlex.split(rest.partition(" '>")[0].partition(" ')")[0])
    assert COMMANDS[command].make_parser(command, argv).parse(argv) is not None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_returns_a_dataclass_with_words(name):
    returned = get_type_hints(imported(COMMANDS[name].run))["return"]
    assert is_dataclass(returned)
    assert callable(returned.words)


def test_a_command_without_a_description_is_described_by_its_summary():
    command = Command(summary="print a script", config="sae_nfm.cli.main:CompletionConfig", run="x:y")
    assert command.make_parser("completion").description == "Print a script."


def test_defaults_are_shown_as_they_are_typed(capsys):
    text = " ".join(help_of("factorial", capsys).split())
    assert "(default: -4.0 0.0 1.0 4.0)" in text
    assert "--output FOLDER" in text
    assert "(default: runs/factorial)" in text
    assert "--stimuli STR" in text


def test_hidden_flags_are_accepted_and_not_shown(capsys):
    assert "hook_eval" not in help_of("train", capsys)
    argv = ["--hook_eval", "x", "--metadata", '{"a": 1}']
    cfg = COMMANDS["train"].make_parser("train", argv).parse(argv).cfg
    assert cfg.hook_eval == "x"
    assert cfg.sae.metadata["a"] == 1


REQUIRED = {
    "attribute": {"prompt": "t1"},
    "convert": {"source": "source", "output": "output"},
    "dynamics": {"checkpoints": "folder"},
    "evaluate": {"sae": "runs/mine"},
    "pairs": {"sae": "runs/staged"},
    "recovery": {"saes": "runs/compare"},
}
COMMANDS_AND_ARCHITECTURES = [
    *((name, ()) for name in COMMANDS if name not in ("train", "completion")),
    *(
        ("train", ("--architecture", kind))
        for kind in ("joint_nfm", "jumprelu", "gated", "batchtopk", "matching_pursuit")
    ),
]


@pytest.mark.parametrize(("name", "argv"), COMMANDS_AND_ARCHITECTURES)
def test_every_number_has_a_range(name, argv):
    """None of them accepts what is no number, or what no run can have; the error begins with the option."""
    parser = COMMANDS[name].make_parser(name, argv)
    usual = {option.name: option.default for option in parser.options} | REQUIRED.get(name, {})
    seen = 0
    for option in parser.options:
        kinds = {kind for kind in (int, float) if re.search(rf"\b{kind.__name__}\b", str(option.type))}
        if not kinds or "Literal" in str(option.type) or option.convert is not None:
            continue
        plain = option.name.rpartition(".")[2]
        low, high = (
            float(end.strip("[]()")) for end in RANGES.get(plain, WHOLE if kinds == {int} else REAL).split(", ")
        )
        wrong = [math.nan, math.inf] if float in kinds else []
        wrong += [-1] if low > -1 else []
        wrong += [10**12] if high < 10**12 else []
        for value in wrong:
            given = [value] if re.search("tuple|list", str(option.type)) else value
            chosen = {"architecture": argv[1], option.name: given} if argv else usual | {option.name: given}
            with pytest.raises(ValueError, match=rf"^{plain}s? (must be|is|are) |^seeds are .*{plain} is "):
                parser.build(chosen, frozenset({"architecture", option.name}))
        seen += 1
    assert seen > 0 or name in ("report", "export", "push", "pull", "manifest", "models")


def test_a_number_out_of_its_range_is_a_mistake_in_the_command(capsys):
    assert main(["compare", "--learning-rates", "1e-3", "nan"]) == 2
    assert capsys.readouterr().err == "sae-nfm: learning_rates must be a finite number, got nan\n"
