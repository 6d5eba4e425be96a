"""Every command that the package, its docs and its tutorials print can be typed."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_nfm_cli.commands import COMMANDS

ROOT = Path(__file__).parents[2]
NAMED = re.compile(rf"sae-nfm ({'|'.join(COMMANDS)})\b")
UNFINISHED = re.compile(r"is missing|Missing value")
"""What is missing in a command that a sentence names in part, as in "`sae-nfm convert --to joint_nfm`"."""


def pages() -> list[Path]:
    """Markdown and notebooks."""
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("tutorials/*.[mi][dp]*"))]


def in_page(path: Path) -> Iterator[tuple[str, bool]]:
    """Commands of a page, and whether each stands on lines of its own."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        whole = re.match(r"\s*(?:[!$] ?)?(sae-nfm .*)", line)
        if whole:
            yield whole[1], True
        for command in re.findall(r"`(sae-nfm [^`]*)`", line):
            yield command, False


def in_module(path: Path) -> Iterator[tuple[str, bool]]:
    """Commands in the strings of a module; what an f-string fills in stands as 1."""
    for node in ast.walk(ast.parse(path.read_text())):
        text = ""
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "1" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        if NAMED.match(text):
            yield from ((line, True) for line in re.split(r",? or (?=sae-nfm)", text))
        for command in re.findall(r"`(sae-nfm [^`]*)`", text):
            yield command, False


def found() -> list[tuple[str, bool, str]]:
    modules = [path for package in ("sae_nfm", "sae_nfm_cli") for path in sorted((ROOT / package).rglob("*.py"))]
    places = [(path, in_page(path)) for path in pages()] + [(path, in_module(path)) for path in modules]
    return [
        (" ".join(command.split()), whole, path.relative_to(ROOT).as_posix())
        for path, commands in places
        for command, whole in commands
        if NAMED.match(command) and "--help" not in command
    ]


@pytest.mark.parametrize(
    ("command", "whole"), [pytest.param(c, w, id=f"{place}: {c}") for c, w, place in dict.fromkeys(found())]
)
def test_a_printed_command_has_options_that_exist(command, whole, capsys):
    words = shlex.shlex(command, posix=True, punctuation_chars=">;")
    words.whitespace_split = True
    _, name, *argv = words
    argv = argv[: next((i for i, word in enumerate(argv) if set(word) <= set(">;")), None)]
    refused = ""
    try:
        COMMANDS[name].make_parser(name, argv).values(argv)
    except ValueError as error:
        refused = str(error)
    in_part = UNFINISHED.search(refused) and (not whole or not argv)
    assert refused == "" or in_part, refused
    assert capsys.readouterr().err == "", "an old spelling"


def test_commands_are_found_everywhere():
    """So that the test above has something to look at."""
    places = {place.split("/")[0] for _, _, place in found()}
    assert places == {"README.md", "docs", "tutorials", "sae_nfm", "sae_nfm_cli"}
