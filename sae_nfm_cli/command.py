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
    config: str = ""
    """Its configuration class, as module:name."""
    parser: str = ""
    """A function that makes its parser of arguments and examples, as module:name, where that depends on the arguments."""
    run: str
    """The function that does it, given the configuration, and returns a `Result`."""
    keeps_command: bool = False
    """Whether that is given the command line too, for the provenance."""
    arguments: tuple[str, ...] = ()
    """The fields of its configuration that are arguments without a flag."""

    def make_parser(self, name: str, argv: Sequence[str] = ()) -> "CommandParser":
        """The parser of the arguments that follow its name."""
        from sae_nfm.cli.parser import CommandParser, options_of

        if self.parser:
            return imported(self.parser)(argv, examples=self.examples)
        config_class = imported(self.config)
        return CommandParser(
            prog=f"sae-nfm {name}",
            description=self.description or f"{self.summary[0].upper()}{self.summary[1:]}.",
            examples=self.examples,
            options=options_of(config_class, positional=self.arguments),
            build=lambda values, _given: config_class(**values),
        )

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
