"""The console script `sae-nfm`: help, version and mistyped commands at once; `sae_nfm` is imported only to run a command.

It stands beside the package because `import sae_nfm` registers the architectures, and so imports torch and SAELens.
"""

import os
import sys
from collections.abc import Sequence

from sae_nfm_cli.broken_pipe import quiet_on_broken_pipe
from sae_nfm_cli.overview import answer

WAITING = ("OMP_WAIT_POLICY", "passive")
"""What torch's threads do while they wait for each other: sleep. Spinning, as they would, takes nearly twice the time where
another program has one of the cores. What is computed is the same. Read when torch is imported."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Any error is one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def answered() -> int:
        status = answer(argv)
        if status is not None:
            return status
        os.environ.setdefault(*WAITING)
        from sae_nfm.cli.main import run

        return run(argv[0], argv[1:])

    return quiet_on_broken_pipe(answered)
