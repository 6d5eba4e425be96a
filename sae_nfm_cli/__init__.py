"""The console script `sae-nfm`: help, version and mistyped commands at once; `sae_nfm` is imported only to run a command.

It stands beside the package because `import sae_nfm` registers the architectures, and so imports torch and SAELens.
"""

import errno
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from sae_nfm_cli.overview import answer

WAITING = ("OMP_WAIT_POLICY", "passive")
"""What torch's threads do while they wait for each other: sleep. Spinning, as they would, takes nearly twice the time where
another program has one of the cores. What is computed is the same. Read when torch is imported."""


FAILED, BROKEN_PIPE = 1, 141
"""Exit statuses where what is printed reaches nobody: on a full device or a closed stdout, and in `sae-nfm ... | head` (128 and
the number of SIGPIPE)."""


class ClosedStream(io.TextIOBase):
    """A standard stream that was closed before the program began, as by `>&-`: writing to it is an error, as it should be."""

    encoding = "utf-8"

    def write(self, text: str) -> int:  # noqa: ARG002
        """Raise an OSError."""
        raise OSError(errno.EBADF, "it is closed", "stdout")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Any error is one line on stderr."""
    _make_streams_usable()
    try:
        try:
            return _status(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, where it can be answered; at exit Python would complain of it
    except OSError as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        print(f"sae-nfm: stdout cannot be written: {error.strerror or error}", file=sys.stderr)
        return FAILED


def _make_streams_usable() -> None:
    """Characters that a terminal does not have become escapes; no file gets the number of a standard stream that is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stdout is None:
        sys.stdout = ClosedStream()
    if sys.stderr is None:  # print() would take stdout for it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _status(argv: Sequence[str]) -> int:
    status = answer(argv)
    if status is not None:
        return status
    os.environ.setdefault(*WAITING)
    from sae_nfm.cli.main import run

    return run(argv[0], argv[1:])
