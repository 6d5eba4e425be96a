"""Runs one command of `sae-nfm`: parses its arguments, prints its result, and reports any error in one line.

Also the job of `sae-nfm completion`, which needs the options of all commands: a script made by tyro.
"""

import io
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from pydantic_core import to_json
from sae_lens.training._interruption import InterruptedException

from sae_nfm.common.results import SavedResult, with_kind
from sae_nfm_cli.commands import COMMANDS, Result

UNEXPECTED, MISTAKE, INTERRUPTED = 1, 2, 130
"""Exit statuses; the last is 128 and the signal's number, as a shell has it."""


def run(name: str, argv: Sequence[str]) -> int:
    """Run one of `COMMANDS` with these arguments; returns the exit status. Any error is one line on stderr."""
    given = argv[: argv.index("--")] if "--" in argv else argv
    told = trace = ""
    status = 0
    try:
        parser = COMMANDS[name].make_parser(name, argv)
        if "-h" in given or "--help" in given:
            print(parser.help(), end="")
            return status
        config = parser.parse(argv)
        # what libraries print while it works is not the result
        with redirect_stdout(sys.stderr) if "--json" in given else nullcontext():
            result = COMMANDS[name].result(config, shlex.join(["sae-nfm", name, *argv]))
        print(as_json(result) if "--json" in given else result.words())
    except BrokenPipeError:
        raise  # for `quiet_on_broken_pipe`
    except (KeyboardInterrupt, InterruptedException) as stop:
        told, status = str(stop) or "interrupted; finished files are whole, others end in .partial", INTERRUPTED
        trace = traceback.format_exc()
    # the outermost place: whoever typed the command is told of any error in one line, and has --debug for the rest
    except Exception as error:
        told, status = _in_one_line(error)
        trace = traceback.format_exc()
    # here, where the error and its frames, with their progress bars, are gone
    if status:
        print(f"{trace if '--debug' in given else ''}sae-nfm: {told}", file=sys.stderr)
    return status


def _in_one_line(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit status."""
    said = " ".join(str(error).split())
    if isinstance(error, ValueError | FileNotFoundError) and said:
        return said, MISTAKE
    kind = type(error).__name__
    return f"{f'{kind}: {said}' if said else kind}; run again with --debug for the traceback", UNEXPECTED


def as_json(result: Result) -> str:
    """A result as its `save` writes it: its fields; null for what is no number, paths as text."""
    content = with_kind(result.kind, result.content()) if isinstance(result, SavedResult) else result
    return to_json(content, indent=1, inf_nan_mode="null", fallback=_plain).decode()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return dict(value) if isinstance(value, Mapping) else str(value)


Shell = Literal["bash", "zsh", "fish", "tcsh"]


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """For which shell."""

    shell: Shell
    """The shell that the script is for."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The script of a shell, which completes commands, options and file names."""

    shell: Shell
    script: str

    def words(self) -> str:
        """The script as it is."""
        return self.script


def completion(config: CompletionConfig) -> Completion:
    """Write the script for the options that all commands have now."""
    kinds = [
        Annotated[command.make_parser(name).root(), tyro.conf.subcommand(name=name)]
        for name, command in COMMANDS.items()
    ]
    union: Any = reduce(or_, kinds)
    args = ["--tyro-print-completion", config.shell]
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        tyro.cli(union, prog="sae-nfm", args=args, config=(tyro.conf.OmitArgPrefixes,))
    return Completion(shell=config.shell, script=printed.getvalue())
