"""The completion scripts, used in a real shell."""

import subprocess
from pathlib import Path

import pytest

from sae_nfm.completion import CompletionConfig, completion
from sae_nfm_cli import main
from sae_nfm_cli.commands import COMMANDS


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "sae-nfm.bash"
    path.write_text(completion(CompletionConfig(shell="bash")).words())
    return path


@pytest.fixture
def complete(script, tmp_path):
    """What bash offers for the last word of a line, in a folder with one file and one folder."""
    (tmp_path / "text.txt").touch()
    (tmp_path / "folder").mkdir()

    def offered(*words: str) -> list[str]:
        code = (
            'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_sae_nfm; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        command = ["bash", "--norc", "-c", code, str(script), "sae-nfm", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    return offered


def test_the_bash_script_is_valid(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


def test_commands(complete):
    assert complete("fac") == ["factorial"]
    assert complete("re") == ["report", "reproduce"]
    assert set(complete("")) == set(COMMANDS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["factorial", "--cla"], ["--clamps"]),
        (["train", "--nfm_t"], ["--nfm_top_k"]),  # of the default architecture
        (["train", "--no"], ["--normalize_activations"]),  # not --nostreaming and the like
        (["train", "--hook_e"], []),  # hidden
        (["evaluate", "--compute_k"], ["--compute_kl"]),
        (["compare", "--js"], ["--json"]),
        (["attribute", "--rank-by", ""], ["norm", "direct", "gradient"]),
        (["completion", "z"], ["zsh"]),
        (["demo", "--dataset", ""], ["folder", "text.txt"]),
        (["demo", "--output", ""], ["folder"]),
        (["demo", "--device", ""], []),
        (["push", ""], ["folder"]),
        (["push", "folder", ""], []),
        (["push", "--sae_id", ""], []),
        (["convert", "--statistics", "te"], ["text.txt"]),
        (["evaluate", "--output", "te"], ["text.txt"]),
    ],
)
def test_options_and_files(words, expected, complete):
    assert sorted(complete(*words)) == sorted(expected)


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_know_commands_and_options(shell, capsys):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for wanted in ("factorial", "clamps", "dry-run", "nfm_top_k"):
        assert wanted in text


def test_another_shell(capsys):
    assert main(["completion", "fish"]) == 2
    told = "argument SHELL: invalid choice: 'fish' (choose from 'bash', 'zsh', 'tcsh')"
    assert capsys.readouterr() == ("", f"sae-nfm: {told}; `sae-nfm completion --help` has every option\n")
