"""The console script `sae-nfm`: help, version and mistyped commands at once; `sae_nfm` is imported only to run a command.

It stands beside the package because `import sae_nfm` registers the architectures, and so imports torch and SAELens.
"""

import sys
from collections.abc import Sequence

from sae_nfm_cli.broken_pipe import quiet_on_broken_pipe
from sae_nfm_cli.overview import answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Any error is one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def answered() -> int:
        status = answer(argv)
        if status is not None:
            return status
        from sae_nfm.cli import run

        return run(argv[0], argv[1:])

    return quiet_on_broken_pipe(answered)
