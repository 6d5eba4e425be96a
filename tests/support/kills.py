"""Work that ends before its nth write event: by an exception, or in a forked process by a signal that nothing sees coming."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


class KilledError(BaseException):
    """In place of a signal."""


EVENTS = ("open", "replace", "rename", "unlink", "mkdir", "rmdir", "link")


def killed_at(monkeypatch: pytest.MonkeyPatch, nth: int, work: Callable[[], object]) -> bool:
    """Do something and raise before the nth change of a directory or opening of a file to write; whether it came so far."""
    seen = 0

    def counted(name: str) -> None:
        original = getattr(os, name)

        def event(*args: object, **kwargs: object) -> object:
            nonlocal seen
            writes = name != "open" or (len(args) > 1 and int(str(args[1])) & (os.O_WRONLY | os.O_CREAT))
            if writes:
                seen += 1
                if seen >= nth:  # whatever a block does on its way out does not happen either
                    raise KilledError
            return original(*args, **kwargs)

        context.setattr(os, name, event)

    with monkeypatch.context() as context:
        for name in EVENTS:
            counted(name)
        try:
            work()
        except KilledError:
            return True
    return False


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
"""Audit events that change a directory, or a file's length; the opening of a file to write is one, too."""


def is_write(event: str, args: tuple[object, ...]) -> bool:
    if event != "open":
        return event in CHANGES
    path, mode, flags = args
    if str(path).startswith(("/dev/", "/proc/")):
        return False
    return bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or bool(
        isinstance(mode, str) and set(mode) & set("wax+")
    )


def forked(work: Callable[[], object], root: Path, kill_at: int | None = None) -> tuple[int, int]:
    """Do something in a process of its own, killed before its nth write event below `root`: its signal or status, its events."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        status, seen = 70, 0

        def count(event: str, args: tuple[object, ...]) -> None:
            nonlocal seen
            if is_write(event, args) and (not isinstance(args[0], str | bytes | os.PathLike) or below(args[0])):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        def below(path: str | bytes | os.PathLike[str]) -> bool:
            return os.fsdecode(os.path.abspath(path)).startswith(str(root))

        with open(os.devnull, "w") as nothing:
            for stream in (1, 2):
                os.dup2(nothing.fileno(), stream)
        sys.addaudithook(count)
        try:
            work()
            status = 0
        finally:
            os.write(write, str(seen).encode())
            os._exit(status)
    os.close(write)
    said = b"".join(iter(lambda: os.read(read, 64), b""))
    os.close(read)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), int(said or b"0")
