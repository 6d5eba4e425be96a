"""The console script `sae-nfm`: help, version and mistyped commands at once; `sae_nfm` is imported only to run a command.

It stands beside the package because `import sae_nfm` registers the architectures, and so imports torch and SAELens.
"""

import os
import sys
from collections.abc import Sequence

from sae_nfm_cli.overview import answer

WAITING = ("OMP_WAIT_POLICY", "passive")
"""What torch's threads do while they wait for each other: sleep. Spinning, as they would, takes nearly twice the time where
another program has one of the cores. What is computed is the same. Read when torch is imported."""


BROKEN_PIPE = 141
"""Exit status where nobody reads the output to its end, as in `sae-nfm ... | head`: 128 and the number of SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Any error is one line on stderr."""
    try:
        try:
            return _status(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, where it can be answered; at exit Python would complain of it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _status(argv: Sequence[str]) -> int:
    status = answer(argv)
    if status is not None:
        return status
    os.environ.setdefault(*WAITING)
    from sae_nfm.cli.main import run

    return run(argv[0], argv[1:])
