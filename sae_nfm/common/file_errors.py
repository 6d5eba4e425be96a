"""Errors of files in one sentence: which file, what is wrong with it, what to do. Text that is safe to print.

with reading(path, "a result of `sae-nfm compare`", remedy="rerun the command"):
    content = json.loads(path.read_text(encoding="utf-8"))
with writing(path):
    path.write_bytes(content)
"""

import errno
import json
import os
import re
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

RESTORE = "restore it from a copy, or make it again"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room for a file, or for one as large."""
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or give another place"),
    **dict.fromkeys(FORBIDDEN, "give a place that you may write to"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a part of the path is a file; give another path"),
    errno.EFBIG: "the file system, or `ulimit -f`, allows no file as large; give another place",
    errno.EISDIR: "it is a folder; give the name of a file",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "a folder on the way is missing or was removed; give another place, or run again",
    errno.EMFILE: "raise `ulimit -n`",
}
LIBRARIES = re.compile(
    r"os error (\d+)|code: (\d+)|inline_container|PytorchStreamWriter|unexpected pos \d+|requested and \d+ written"
)
"""What safetensors (its system's error in numbers), torch and numpy (without) say where a file cannot be written."""
TEMPORARY = re.compile(r"\.partial\b|\.sae-nfm-")
"""In names that are not the user's."""
UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\U000e0000-\U000e007f]"
)
"""Characters that move a terminal's cursor or colour, end a line, turn the direction of reading, or cannot be seen."""


class FileError(OSError):
    """A file or folder that cannot be read or written; its text is a sentence with the path and the cause."""

    def __init__(self, message: str, number: int | None = None, path: str = "") -> None:
        super().__init__(message)
        self.errno, self.path = number, path


class DamagedFileError(ValueError):
    """A file whose content is not what it should be; its text is a sentence with the path and the cause."""


def printable(text: object, keep: str = "") -> str:
    """The text with control characters, line ends and marks of direction as Python's escapes, but for those to keep."""
    return UNSAFE.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), str(text)
    )


def quoted(path: object) -> str:
    """A path or name as a message or Python code has it."""
    return printable(repr(str(path)))


def python_string(text: object) -> str:
    """The text as a string of Python code, in double quotes, on one line, whatever is in it."""
    return printable(json.dumps(str(text), ensure_ascii=False))


def cause_of(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror[0].lower() + error.strerror[1:])
    said = printable(" ".join(str(error).split()))[:200]
    if isinstance(error, KeyError):
        return f"{said} is missing"
    return said or type(error).__name__


@contextmanager
def reading(path: str | os.PathLike[str], what: str = "", *, remedy: str = RESTORE) -> Generator[None]:
    """Within it, whatever goes wrong is about this file: keep it to the lines that read and decode.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: the system does not let it be read.
        DamagedFileError: it is not `what` it should be (damaged, unless given), whatever its decoder raised; a ValueError that
            names the file stays as it is.
    """
    try:
        yield
    except (FileError, DamagedFileError, MemoryError):
        raise
    except FileNotFoundError as error:
        if error.errno is None:  # a sentence already
            raise
        raise FileNotFoundError(f"there is no file {quoted(error.filename or path)}; {remedy}") from None
    except Exception as error:  # of a dozen decoders, each with errors of its own
        if type(error) is ValueError and str(path) in str(error):  # a sentence already, and of no decoder
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise FileError(f"{quoted(path)} cannot be read: {cause_of(error)}", error.errno, str(path)) from error
        state = f"not {what}" if what else "damaged"
        raise DamagedFileError(f"{quoted(path)} is {state} ({cause_of(error)}); {remedy}") from error


@contextmanager
def writing(path: str | os.PathLike[str]) -> Generator[None]:
    """Within it, what keeps a file from being written becomes a FileError that names this path, and others a FileError named.

    That of a caller who knows the path that the user gave stands first: contexts may stand within one another.
    """
    try:
        yield
    except FileError as error:
        if not error.path or error.path == str(path):
            raise
        raise unwritable(path, error) from error
    except Exception as error:  # libraries that write say it in ways of their own; others are raised again
        if not about_writing(error):
            raise
        raise unwritable(path, error) from error


def about_writing(error: BaseException) -> bool:
    """Whether this is an error of the file system, as the system or a library that writes files says it."""
    if isinstance(error, OSError) and error.errno is not None:
        return not isinstance(error, ConnectionError)
    return type(error).__module__.startswith(("safetensors", "builtins")) and bool(LIBRARIES.search(str(error)))


def unwritable(path: str | os.PathLike[str], error: BaseException) -> FileError:
    """The FileError of a path that an error of the system, or of a library, is about."""
    found = LIBRARIES.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(next(filter(None, found.groups()), 0)) if found else 0
    cause = os.strerror(number).lower() if number else str(error) if isinstance(error, FileError) else ""
    if not cause:
        cause = f"the file ended early ({cause_of(error)}), as on a full disk"
        number = errno.ENOSPC
    other = str(getattr(error, "filename", None) or getattr(error, "path", ""))
    shown = other and not TEMPORARY.search(other) and Path(other) != Path(path)
    where = f" (at {quoted(other)})" if shown else ""
    remedy = REMEDIES.get(number or 0, "give another place")
    return FileError(f"{quoted(path)} cannot be written: {cause}{where}; {remedy}", number, str(path))


def check_writable(path: str | os.PathLike[str] | None, *, folder: bool = False) -> None:
    """Raise a FileError where an output, a file or a `folder`, could not be written; None passes. Nothing is left behind.

    To be called before anything is computed: four kilobytes are written beside it, or in it where it is a folder that exists.
    """
    if path is None:
        return
    given = Path(path)
    with writing(given):
        if "\0" in str(given):
            raise FileError(f"{quoted(given)} cannot be written: a path has no character of code 0", errno.EINVAL)
        if given.is_dir() and not folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if given.exists() and folder and not given.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if given.exists() and not given.is_dir() and not given.is_file():
            raise FileError(f"{quoted(given)} is no regular file, and would be replaced by one; give another path")
        target = given.absolute()
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(f"{target}.partial.12345678")  # as long as the temporary names
        existing = [target] if folder and given.is_dir() else []
        existing += [target.parent] if target.parent != target else []
        for place in existing:
            while not os.path.lexists(place):
                place = place.parent
            with tempfile.TemporaryFile(dir=place, prefix=".sae-nfm-") as probe:
                probe.write(bytes(4096))
                probe.flush()
