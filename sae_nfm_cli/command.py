"""One command of `sae-nfm`: what it is called with and what does it, by name, so that a table of them imports nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sae_nfm.cli.parser import CommandParser

WIDTH = 100
"""Columns that a help text takes at most."""


class Result(Protocol):
    """What a command returns: a frozen dataclass, whose fields are its JSON."""

    def words(self) -> str:
        """For the terminal."""
        ...


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command. Its modules are imported when it is called."""

    summary: str
    """Its line in `sae-nfm --help`."""
    description: str = ""
    """What its own help begins with; the summary unless given."""
    examples: tuple[tuple[str, str], ...] = ()
    """Command lines that work, each after what it does and how long that takes."""
    config: str
    """Its configuration class, or a function that makes a configuration of arguments and examples, as module:name."""
    parser: str = ""
    """The function that makes its parser of examples, where `config` is a function."""
    run: str
    """The function that does it, given the configuration, and returns a `Result`."""
    keeps_command: bool = False
    """Whether that is given the command line too, for the provenance."""
    arguments: str = ""
    """Its arguments without a flag, as its usage line names them."""
    dashes: bool = False
    """Whether its options are spelt with dashes in the help; both spellings are understood."""

    def make_parser(self, name: str) -> "CommandParser":
        """The parser of its arguments, those that follow its name."""
        from simple_parsing.wrappers.field_wrapper import DashVariant

        from sae_nfm.cli.parser import CommandParser

        if self.parser:
            return imported(self.parser)(examples=self.examples)
        parser = CommandParser(
            prog=f"sae-nfm {name}",
            usage=" ".join(["%(prog)s", *self.arguments.split(), "[options]"]),
            description=self.description or f"{self.summary[0].upper()}{self.summary[1:]}.",
            examples=self.examples,
            titles={imported(self.config).__name__: "options"},
            add_option_string_dash_variants=DashVariant.DASH if self.dashes else DashVariant.UNDERSCORE,
        )
        parser.add_arguments(imported(self.config), dest="config")
        return parser

    def parse(self, name: str, argv: Sequence[str]) -> Any:
        """Its configuration from the arguments that follow its name.

        Raises:
            ValueError: for arguments that do not work, in one line.
        """
        from sae_nfm.cli.parser import dashed, underscored

        if self.parser:
            return imported(self.config)(argv, examples=self.examples)
        return self.make_parser(name).parse_args(dashed(argv) if self.dashes else underscored(argv)).config

    def result(self, config: Any, line: str = "") -> Result:
        """Do it.

        Args:
            config: its configuration.
            line: the whole command line.
        """
        given = {"command": line} if self.keeps_command else {}
        return imported(self.run)(config, **given)


def imported(target: str) -> Any:
    """What "module:name" stands for."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
