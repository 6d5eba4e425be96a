"""The job of `sae-nfm completion`: a script that completes commands, options and file names in a shell, made by tyro."""

from dataclasses import dataclass
from typing import Literal

from sae_nfm.cli.parser import completion_script
from sae_nfm_cli.commands import COMMANDS

Shell = Literal["bash", "zsh", "fish", "tcsh"]


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """For which shell."""

    shell: Shell
    """The shell that the script is for."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The script of a shell."""

    shell: Shell
    script: str

    def words(self) -> str:
        """The script as it is."""
        return self.script


def completion(config: CompletionConfig) -> Completion:
    """Write the script for the options that all commands have now."""
    parsers = ((name, command.make_parser(name)) for name, command in COMMANDS.items())
    return Completion(shell=config.shell, script=completion_script(parsers, config.shell))
