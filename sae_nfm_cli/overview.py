"""What `sae-nfm` answers without doing anything: its help, its version, and that there is no such command.

Nothing here imports more than the standard library, so that the answer comes at once.
"""

import argparse
import difflib
import importlib.metadata
import shutil
import sys
from collections.abc import Sequence

from sae_nfm_cli.commands import COMMANDS, GROUPS, WIDTH

FIRST_STEPS = """\
first steps:
  sae-nfm demo                               # four SAEs, one table
  sae-nfm attribute "The film was not good"  # pairs on a token
  sae-nfm report runs                        # every result, in one offline page

`sae-nfm COMMAND --help` has examples and options, docs/times.md how long they
take. Every command takes --json and --debug. Exit status: 0 done, 1 the run
failed, 2 a mistake in the command, its files or the place for its output, 130
interrupted.
"""


def overview() -> str:
    """The help of `sae-nfm`: the commands by what one wants."""
    width = min(shutil.get_terminal_size().columns, WIDTH)
    parser = argparse.ArgumentParser(
        prog="sae-nfm",
        usage="sae-nfm COMMAND [options]",
        description="Find out how a language model's features interact, and whether to believe it.",
        epilog=FIRST_STEPS,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=14, width=width),
        add_help=False,
    )
    for title, commands in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, command in commands.items():
            group.add_argument(name, help=command.summary)
    return parser.format_help()


def answer(argv: Sequence[str]) -> int | None:
    """Print what needs no command to run, given the arguments after `sae-nfm`.

    Returns:
        The exit status; None when they begin with a command.
    """
    first = argv[0] if argv else None
    if first in COMMANDS:
        return None
    if first in ("-h", "--help"):
        print(overview(), end="")
        return 0
    if first == "--version":
        print(f"sae-nfm {importlib.metadata.version('sae-nfm')}")
        return 0
    print(overview() if first is None else f"sae-nfm: {_unknown(first)}", file=sys.stderr)
    return 2


def _unknown(first: str) -> str:
    if first.startswith("-"):
        return f"{first} is no option of sae-nfm itself; give a command first, `sae-nfm --help` has them"
    near = difflib.get_close_matches(first, COMMANDS, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no command {first!r}; {guess}`sae-nfm --help` has them all"
