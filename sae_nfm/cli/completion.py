"""The job of `sae-nfm completion`: a script that completes commands, options and file names in a shell, made by shtab."""

import argparse
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import shtab
import simple_parsing

from sae_nfm.cli.parser import CommandParser
from sae_nfm_cli.commands import COMMANDS

Shell = Literal["bash", "zsh", "tcsh"]


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """For which shell."""

    shell: Shell = simple_parsing.field(positional=True, metavar="SHELL")  # noqa: RUF009 (a dataclass field)
    """One of bash, zsh, tcsh."""

    def __post_init__(self) -> None:
        """Refuse other shells."""
        if self.shell not in get_args(Shell):
            raise ValueError(f"shell is {self.shell!r}; give one of {', '.join(get_args(Shell))}")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The script of a shell."""

    shell: Shell
    """The shell."""
    script: str
    """What it has to source."""

    def words(self) -> str:
        """The script as it is."""
        return self.script


def completion(config: CompletionConfig) -> Completion:
    """Write the script, of the options that all commands have now."""
    return Completion(shell=config.shell, script=shtab.complete(_all_commands(), shell=config.shell))


def _all_commands() -> argparse.ArgumentParser:
    """`sae-nfm` with every command as a subparser, each the parser that the command is read with."""
    parsers: dict[str, CommandParser] = {}
    for name, command in COMMANDS.items():
        parsers[f"sae-nfm {name}"] = command.make_parser(name).completed()
        for action in parsers[f"sae-nfm {name}"].shown_actions():
            complete = _complete(action)
            if complete is not None:
                setattr(action, "complete", complete)  # noqa: B010 (shtab's mark, which argparse does not declare)
    root = argparse.ArgumentParser(prog="sae-nfm")
    root.add_argument("--version", action="store_true", help="Show the version.")

    def made(prog: str, **_: Any) -> CommandParser:
        return parsers[prog]

    by_name: Any = made  # argparse would have a class that makes a new one
    commands = root.add_subparsers(prog="sae-nfm", parser_class=by_name, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary)
    return root


def _complete(action: argparse.Action) -> Any:
    """Files or folders where an option takes a path, which its type or its help says; None for other options."""
    is_path = getattr(action.type, "__name__", "") == "Path"
    is_text = getattr(action.type, "__name__", "str") in ("str", "Optional[str]") and not action.dest.endswith("_id")
    if action.nargs == 0 or action.choices is not None or not (is_path or is_text):
        return None
    found = action.help or ""
    if re.search(r"\bfiles?\b", found) or (is_path and "older" not in found):
        return shtab.FILE
    return shtab.DIRECTORY if re.search(r"\b[Ff]olders?\b", found) else None
