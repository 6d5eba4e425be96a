"""The completion scripts, used in a real shell."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from sae_nfm.cli.main import CompletionConfig, completion
from sae_nfm_cli import main
from sae_nfm_cli.commands import COMMANDS


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "sae-nfm.bash"
    path.write_text(completion(CompletionConfig(shell="bash")).words())
    return path


COMMAND_WORDS = (("fac",), ("re",), ("",))
EXPECTED = {
    ("factorial", "--cla"): ["--clamps"],
    ("train", "--nfm-t"): ["--nfm-top-k"],  # of the default architecture; underscores are understood too
    ("train", "--hook-e"): [],  # hidden
    ("evaluate", "--compute-k"): ["--compute-kl"],
    ("compare", "--js"): ["--json"],
    ("attribute", "--rank-by", ""): ["norm", "direct", "gradient"],
    ("demo", "--dataset", ""): ["folder", "text.txt"],
    ("convert", "--statistics", "te"): ["text.txt"],
}
ASK = """
asked() { COMP_WORDS=(sae-nfm "$@"); COMP_CWORD=$#; COMPREPLY=(); _tyro_sae_nfm; echo "${COMPREPLY[@]}"; }
source "$0"
"""


@pytest.fixture(scope="module")
def offered(script, tmp_path_factory) -> dict[tuple[str, ...], list[str]]:
    """What one bash offers for the last word of each line, in a folder with one file and one folder."""
    here = tmp_path_factory.mktemp("here")
    (here / "text.txt").touch()
    (here / "folder").mkdir()
    lines = [*COMMAND_WORDS, *EXPECTED]
    code = ASK + "".join(f"asked {shlex.join(words)}\n" for words in lines)
    command = ["bash", "--norc", "-c", code, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, check=True)
    assert done.stderr == ""
    return dict(zip(lines, (line.split() for line in done.stdout.splitlines()), strict=True))


def test_the_bash_script_is_valid(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


def test_commands(offered):
    assert offered["fac",] == ["factorial"]
    assert offered["re",] == ["recovery", "report", "reproduce"]
    assert set(offered["",]) == {*COMMANDS, "-h", "--help"}


@pytest.mark.parametrize("words", EXPECTED, ids=" ".join)
def test_options_and_files(words, offered):
    assert sorted(offered[words]) == sorted(EXPECTED[words])


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells_know_commands_and_options(shell, capsys):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for wanted in ("factorial", "clamps", "dry-run", "nfm-top-k"):
        assert wanted in text


def test_another_shell(capsys):
    assert main(["completion", "ksh"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    told = "'ksh'.*shell.*bash.*zsh.*fish.*tcsh.*`sae-nfm completion --help`"  # quoted or not: that is Python's
    assert re.fullmatch(f"sae-nfm: .*{told}.*\n", err)
