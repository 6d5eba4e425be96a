"""Runs one command of `sae-nfm`: parses its arguments, prints its result, and reports any error in one line.

Also the job of `sae-nfm completion`, which needs the options of all commands: a script made by tyro.
"""

import io
import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python
from sae_lens.training._interruption import InterruptedException
from typing_extensions import override

from sae_nfm.common.file_errors import (
    FULL,
    FileError,
    about_writing,
    cause_of,
    check_writable,
    printable,
    quoted,
    unwritable,
)
from sae_nfm.common.results import SavedResult, with_kind
from sae_nfm_cli.commands import COMMANDS, Result

UNEXPECTED, MISTAKE, INTERRUPTED = 1, 2, 130
"""Exit statuses: a failure of the run; a mistake in the command, its files or the place for its output; 128 and the signal's
number, as a shell has it. An exception may have an `exit_status` of its own; its text is then a whole sentence."""
OUTPUTS = ("output", "output_path", "save", "graph", "folder", "path", "results", "report")
"""Fields of configurations and results that say where a result is."""


class Lenient(io.TextIOBase):
    """Standard output while a command works: what cannot be written there is dropped, since it must not end the work.

    Control characters in names and texts are escaped.
    """

    def __init__(self, stream: Any) -> None:
        self.stream, self.lost = stream, False

    @override
    def write(self, text: str) -> int:
        try:
            self.stream.write(printable(text, keep="\n\t\r"))
        except (OSError, ValueError):  # ValueError: closed meanwhile
            self.lost = True
        return len(text)

    @override
    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    @override
    def isatty(self) -> bool:
        return self.stream.isatty()

    @override
    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    @override
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.stream.encoding


def run(name: str, argv: Sequence[str]) -> int:
    """Run one of `COMMANDS` with these arguments; returns the exit status. Any error is one line on stderr.

    Raises:
        BrokenPipeError: nobody reads the output; `sae_nfm_cli.main` answers it.
    """
    given = argv[: argv.index("--")] if "--" in argv else argv
    told = trace = ""
    status, config = 0, None
    try:
        parser = COMMANDS[name].make_parser(name, argv)
        if "-h" in given or "--help" in given:
            return _printed(parser.help().rstrip("\n"))
        config = parser.parse(argv)
        for place in _places(config):  # before anything is loaded or computed
            check_writable(place, folder=not place.is_file())
        # what libraries print while it works is not the result
        with redirect_stdout(sys.stderr if "--json" in given else Lenient(sys.stdout)):
            result = COMMANDS[name].result(config, shlex.join(["sae-nfm", name, *argv]))
        text = as_json(result) if "--json" in given else printable(result.words(), keep="\n\t")
        status = _printed(text, dict.fromkeys(_places(result) + _places(config)))
    except BrokenPipeError:
        raise  # for `sae_nfm_cli.main`
    except (KeyboardInterrupt, InterruptedException) as stop:
        told, status = str(stop) or "interrupted; finished files are whole, others end in .partial", INTERRUPTED
        trace = traceback.format_exc()
    # the outermost place: whoever typed the command is told of any error in one line, and has --debug for the rest
    except Exception as error:
        told, status = _in_one_line(error, _places(config))
        trace = traceback.format_exc()
    # here, where the error and its frames, with their progress bars, are gone
    if told:
        print(f"{trace if '--debug' in given else ''}sae-nfm: {printable(told)}", file=sys.stderr)
    return status


def _printed(text: str, places: Iterable[Path] = ()) -> int:
    """Print to the end; returns the exit status. Where that is impossible (a pipe that nobody reads apart), stderr says so."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        with suppress(OSError, ValueError):  # what is left in the buffer would be an error again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        saved = ", ".join(str(place) for place in places if place.exists())
        where = f"it is saved in {saved}" if saved else "it is saved nowhere"
        told = f"the output could not be printed ({cause_of(error)}); {where}"
        print(f"sae-nfm: {printable(told)}", file=sys.stderr)
        return UNEXPECTED
    return 0


def _places(settings: Any) -> list[Path]:
    """Where a command writes, by its configuration, or where its result is."""
    own = [getattr(settings, name, None) for name in OUTPUTS]
    run = getattr(settings, "cfg", None)  # of `train`
    return [Path(value) for value in (*own, getattr(run, "output_path", None)) if isinstance(value, str | Path)]


def _in_one_line(error: Exception, places: Sequence[Path] = ()) -> tuple[str, int]:
    """What to say of an error, and the exit status; `places` are the outputs of the command."""
    said = " ".join(str(error).split())
    status = getattr(error, "exit_status", None)
    if status is not None and said:
        return said, status
    if isinstance(error, FileError) and places and ".partial" in error.path:
        return str(unwritable(places[0], error)), MISTAKE
    if isinstance(error, FileError) or (isinstance(error, ValueError | FileNotFoundError) and said):
        return _with_path(error, said), MISTAKE
    if about_writing(error):
        full = not isinstance(error, OSError) or error.errno in FULL
        named = getattr(error, "filename", None)
        if full and named is None and places:
            return str(unwritable(places[0], error)), MISTAKE
        if named is not None:
            return f"{quoted(named)}: {cause_of(error)}", MISTAKE
    kind = type(error).__name__
    return f"{f'{kind}: {said}' if said else kind}; run again with --debug for the traceback", UNEXPECTED


def _with_path(error: Exception, said: str) -> str:
    """A system's "[Errno 2] No such file or directory: 'x'" in words; other texts as they are."""
    named = getattr(error, "filename", None)
    return f"there is no file {quoted(named)}" if isinstance(error, FileNotFoundError) and named is not None else said


def as_json(result: Result) -> str:
    """A result as its `save` writes it: its fields; null for what is no number, paths as text."""
    content = with_kind(result.kind, result.content()) if isinstance(result, SavedResult) else result
    try:
        return to_json(content, indent=1, inf_nan_mode="null", fallback=_plain).decode()
    except PydanticSerializationError:  # a path or text of bytes that are not UTF-8
        return json.dumps(to_jsonable_python(content, inf_nan_mode="null", fallback=_plain), indent=1)


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
