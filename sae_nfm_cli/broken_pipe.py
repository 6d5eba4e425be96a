"""Output that nobody reads to its end, as in `sae-nfm ... | head`."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
BROKEN_PIPE = 141
"""Exit status: 128 and the number of SIGPIPE, as a shell has it."""


def quiet_on_broken_pipe(run: Callable[[], T]) -> T | int:
    """What `run` returns; `BROKEN_PIPE` where it prints to a pipe that has been closed."""
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()  # here, where it can be answered; at exit Python would complain of it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
