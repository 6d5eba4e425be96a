"""Files that are whole or not there, each with its sha256: written under a temporary name, then renamed; checked when read.

Digests of a folder stand in its `digests.json`, that of a single file in `<file>.sha256`, which `sha256sum -c` reads:

    {"kind": "digests/1", "finished": true, "run": {...}, "files": {"cfg.json": {"sha256": "...", "bytes": 512}}, "sha256": "..."}

The last value is of the rest of the file. A folder inside that has digests of its own is listed by its `digests.json`. A digest
is written before its file, with that of the older file beside it: whenever a process is killed, what is there passes. Files
without a digest (of 0.1.0, of SAELens, by hand) are read as they are.
"""

import errno
import hashlib
import json
import os
import secrets
import socket
import stat
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sae_nfm.common.file_errors import DamagedFileError, FileError, quoted, reading, writing

SAE_CONFIG = "cfg.json"
"""What SAELens calls the config in the folder of a saved SAE."""
DIGESTS_FILENAME, DIGESTS_KIND, SIDECAR = "digests.json", "digests/1", ".sha256"
PARTIAL, LOCK = ".partial", ".lock"
ANCESTORS = 8
"""Folders above a file in which its digest is looked for."""
UNLISTED = ".arrow"
"""Suffix of files without a digest: too large to be read twice, they have a checksum of each row."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)
Digest = dict[str, Any]
"""sha256 and bytes of a file, and as `before` those of the file that it replaces."""

_begun: dict[Path, dict[str, Any]] = {}
"""Folders that this process is filling, each with the content of its `digests.json`."""


@contextmanager
def whole(path: str | Path) -> Generator[Path]:
    """A temporary name beside `path` to write to; it becomes `path`, with its digest, when the block ends well.

    Missing folders are made. After an exception nothing is left. A FileError where the path cannot be written, or is that of a
    device, which would be replaced.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FileError(f"{quoted(path)} is no regular file, and would be replaced by one; give another path")
    with writing(path), _whole(path) as temporary:
        yield temporary


@contextmanager
def _whole(path: Path) -> Generator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == UNLISTED:
        with _replacing(path) as temporary:
            yield temporary
        return
    begun = [folder for folder in _begun if path.absolute().is_relative_to(folder)]
    if begun and not _sidecar(path).exists():
        with _replacing(path) as temporary:
            yield temporary
            _note(max(begun, key=lambda folder: len(folder.parts)), path, _digest(temporary))
        return
    with locked(path.with_name(f".{path.name[:200]}"), wait=10):
        for left in path.parent.glob(f".{escape(path.name[:200])}.*{PARTIAL}"):
            left.unlink(missing_ok=True)  # of a process that was killed
        with _replacing(path) as temporary:
            yield temporary
            found = _digest(temporary)
            listing = _listing(path)
            if listing is None:
                before = _read_sidecar(path) or ([_digest(path)] if path.is_file() else [])
                _write_sidecar(path, [found, *before])
            else:
                _note(listing, path, found)
        if listing is None:
            _write_sidecar(path, [found])
        else:
            _note(listing, path, found, replaced=True)


def write_json(path: str | Path, content: Any, **options: Any) -> None:
    """Write JSON to a whole file; options are those of `json.dumps`."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1, **options) + "\n", encoding="utf-8")


def write_parquet(table: Any, path: str | Path) -> None:
    """Write a data frame to a whole parquet file, without its index and with a checksum for every page."""
    with whole(path) as partial:
        table.to_parquet(partial, index=False, write_page_checksum=True)


def read_parquet(path: str | Path) -> Any:
    """A data frame from a parquet file of ours, its digest and the checksums of its pages checked."""
    import pandas as pd  # where no table is read, results are read without it

    checked(path)
    with reading(path, "a parquet file"):
        return pd.read_parquet(path, page_checksum_verification=True)


def checked(path: str | Path) -> Path:
    """The path of a file of ours, to be read; a ValueError where it is not the file that was written."""
    path = Path(path)
    if path.is_file() and (wanted := _wanted(path)) and not _matches(path, wanted):
        raise ValueError(
            f"{quoted(path)} is damaged or was edited: its sha256 is not the one it was written with; {_remedy(path)}"
        )
    return path


def read_json(path: str | Path) -> Any:
    """The content of a JSON file of ours, its digest checked; a ValueError that names the file where it is damaged."""
    checked(path)
    with reading(path, "JSON"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def check_digests(folder: str | Path, *names: str) -> None:
    """Check these files of a folder, or all that lie directly in it; a ValueError that names the first which is another one."""
    for path in [Path(folder) / name for name in names] or sorted(Path(folder).iterdir()):
        checked(path)


def accept_file(path: Path) -> tuple[bool, Path]:
    """Write the digest of a file as it is now: whether it was another one, and where its digest stands."""
    found, listing = _digest(path), _listing_or_none(path)
    try:
        changed = found["sha256"] not in [one["sha256"] for one in _wanted(path)]
    except ValueError:  # the digest itself is damaged
        changed = True
    if listing is None:
        _write_sidecar(path, [found])
        return changed, _sidecar(path)
    _note(listing, path, found, replaced=True)
    return changed, listing / DIGESTS_FILENAME


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    return str(_digest(path)["sha256"])


def is_finished(folder: str | Path) -> bool:
    """Whether a folder is the output of a run that wrote all of it (and has digests: not of 0.1.0)."""
    return (found := digests(folder)) is not None and bool(found["finished"])


def digests(folder: str | Path) -> dict[str, Any] | None:
    """The content of a folder's `digests.json`; None without one. A ValueError where it is damaged."""
    path = Path(folder) / DIGESTS_FILENAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except ValueError as error:
        raise DamagedFileError(f"{quoted(path)} is damaged ({error}); {_remedy(path)}") from error
    if not isinstance(content, dict) or len({"kind", "finished", "run", "files", "sha256"} & set(content)) < 4:
        return None  # somebody else's file of that name
    if content.get("kind") != DIGESTS_KIND or content.pop("sha256", None) != _sha256_of(content):
        raise DamagedFileError(f"{quoted(path)} is damaged or was edited: its digest is not its own; {_remedy(path)}")
    return content


def note_files(folder: str | Path, *paths: Path) -> None:
    """List files just written by another package in the `digests.json` of their folder, which is made where there is none."""
    folder = Path(folder).absolute()
    if folder in _begun:
        return
    try:
        content = digests(folder)
    except ValueError:  # of what was there before
        content = None
    content = content or {"finished": True, "run": {}, "files": {}}
    content["files"] |= {_name(folder, path): _digest(path) for path in paths}
    _write_digests(folder, content)


def seal(folder: str | Path, run: Mapping[str, Any] | None = None) -> None:
    """Write `digests.json` of everything in a folder, which is finished by it; `run` says what made it."""
    folder = Path(folder)
    _write_digests(folder, {"finished": True, "run": dict(run or {}), "files": found_files(folder)})
    _begun.pop(folder.absolute(), None)


def found_files(folder: Path) -> dict[str, Digest]:
    """The digests of all files in a folder as they are now; those of folders with digests of their own are left to these."""
    found: dict[str, Digest] = {}
    for path in _files(folder):
        _sync(path)
        found[path.relative_to(folder).as_posix()] = _digest(path)
    return found


def begin(folder: Path, run: Mapping[str, Any], *, mark: bool) -> None:
    """From now on files that this process writes into the folder are listed in its `digests.json`, unfinished until `seal`.

    mark: write that file at once, and not with the first of the others.
    """
    content = (digests(folder) or {"files": {}}) | {"finished": False, "run": dict(run)}
    _begun[folder.absolute()] = content
    if mark:
        _write_digests(folder, content)


def give_up(folder: Path) -> None:
    """The opposite of `begin`."""
    _begun.pop(folder.absolute(), None)


def differences(folder: str | Path) -> list[tuple[str, str]]:
    """What in the folder of a run is not as that run wrote it: names of files or SAEs in it, each with what is wrong.

    Nothing where it has no digests. An SAE that the run did not write counts, unless it is of another run inside; other files
    do not.
    """
    folder = Path(folder)
    content = digests(folder)
    if content is None:
        return []
    found: list[tuple[str, str]] = []
    listed = content["files"]
    for name, wanted in listed.items():
        path = folder / name
        inside = path.name == DIGESTS_FILENAME
        label = path.parent.relative_to(folder).as_posix() if inside else name
        if not path.is_file():
            found.append((label, "its digests are missing" if inside else "it is missing"))
        elif not _matches(path, [*_both(wanted), *_read_sidecar(path)]):
            found.append((label, "it is not the one that the run wrote"))
        elif inside:
            found += [(f"{label}/{name}", said) for name, said in differences(path.parent)]
    configs = [] if (folder / SAE_CONFIG).is_file() else sorted(folder.rglob(SAE_CONFIG))
    for sae in (config.parent for config in configs):
        inside = sae.relative_to(folder).as_posix()
        ours = {f"{inside}/{name}" for name in (SAE_CONFIG, DIGESTS_FILENAME)} & set(listed)
        between = [one for one in (sae, *sae.parents) if folder in one.parents]
        if not ours and not any((digests(one) or {"run": {}})["run"].get("name") for one in between):
            found.append((inside, "it is not of this run, or of one that is not finished"))
    return found


@contextmanager
def locked(path: Path, command: str | None = None, *, wait: float = 0) -> Generator[None]:
    """Hold `path` for this process, by a lock on `<path>.lock` that the operating system ends with the process.

    A ValueError that names the holder where another process has it for longer than `wait` seconds.
    """
    lock_path = path.with_name(path.name + LOCK)
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path, timeout=max(wait, 0.2), poll_interval=0.05, mode=0o644)
    try:
        lock.acquire()
    except (Timeout, RuntimeError, OSError) as error:
        # older versions of filelock raise a NotImplementedError where the file system has no flock
        if isinstance(error, NotImplementedError) or getattr(error, "errno", 0) in NO_LOCKS:
            raise ValueError(
                f"the file system of {str(path.parent)!r} has no locks; give an output on another one"
            ) from error
        if not isinstance(error, Timeout | RuntimeError):  # RuntimeError: this very thread has it
            raise
        raise ValueError(
            f"{str(path)!r} is being written by {_holder(lock_path)}; wait until it has finished, or give another output"
        ) from error
    try:
        if not wait:
            told = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            lock_path.write_text(json.dumps(told | {"command": command or " ".join(sys.argv[:1])}))
        yield
    finally:
        lock_path.unlink(missing_ok=True)  # while it is held: who waits for it looks for the name again
        lock.release()
        with suppress(OSError):  # there is something in it
            for folder in missing:
                folder.rmdir()


def _holder(lock_path: Path) -> str:
    with suppress(OSError, ValueError, KeyError):
        told = json.loads(lock_path.read_text())
        return f"process {told['pid']} on {told['host']} since {told['since']} ({told['command']})"
    return "another process"


@contextmanager
def _replacing(path: Path) -> Generator[Path]:
    """A new file of an unforeseeable name beside `path`, of the mode that `path` has; it is renamed to it in the end."""
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}{PARTIAL}")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file, suppress(OSError):
        os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    with suppress(OSError):  # some file systems cannot
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(path: Path) -> Digest:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": found, "bytes": os.fstat(file.fileno()).st_size}


def _matches(path: Path, wanted: list[Digest]) -> bool:
    """Whether a file is one of those; its content is read only where its size is right."""
    same_size = [one["sha256"] for one in wanted if one.get("bytes") in (None, path.stat().st_size)]
    return bool(same_size) and _digest(path)["sha256"] in same_size


def _both(entry: Digest) -> list[Digest]:
    return [entry, *([entry["before"]] if "before" in entry else [])]


def _wanted(path: Path) -> list[Digest]:
    """The digests that a file may have; empty where none is known."""
    if found := _read_sidecar(path):
        return found
    listing = _listing(path)
    content = None if listing is None else digests(listing)
    return [] if listing is None or content is None else _both(content["files"][_name(listing, path)])


def _listing(path: Path) -> Path | None:
    """The nearest folder whose `digests.json` lists the file."""
    for folder in list(path.absolute().parents)[:ANCESTORS]:
        content = digests(folder)
        if content is not None and _name(folder, path) in content["files"]:
            return folder
    return None


def _name(folder: Path, path: Path) -> str:
    return path.absolute().relative_to(folder).as_posix()


def _note(folder: Path, path: Path, found: Digest, *, replaced: bool = False) -> None:
    """List a file's digest, with that of the file that it is about to replace."""
    content = _begun.get(folder) or digests(folder)
    assert content is not None
    name, entry = _name(folder, path), found
    if not replaced and path.is_file():
        entry = found | {"before": _digest(path)}
    content["files"][name] = entry
    _write_digests(folder, content)


def _write_digests(folder: Path, content: Mapping[str, Any]) -> None:
    content = {"kind": DIGESTS_KIND, **content}
    with _replacing(folder / DIGESTS_FILENAME) as temporary:
        temporary.write_text(json.dumps(content | {"sha256": _sha256_of(content)}, indent=1) + "\n", encoding="utf-8")


def _sha256_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + SIDECAR)


def _read_sidecar(path: Path) -> list[Digest]:
    """The digests in `<file>.sha256`; empty where there is no such file. A ValueError where it is damaged."""
    sidecar = _sidecar(path)
    if not sidecar.is_file():
        return []
    words = [line.split(maxsplit=1) for line in sidecar.read_text(encoding="utf-8", errors="replace").splitlines()]
    found = [{"sha256": line[0]} for line in words if len(line) == 2 and line[1].lstrip("*") == path.name]
    if not found or len(found) < len(words):
        raise DamagedFileError(
            f"{quoted(sidecar)} is damaged: a sha256 and {path.name!r} were expected; {_remedy(path)}"
        )
    return found


def _write_sidecar(path: Path, found: list[Digest]) -> None:
    with _replacing(_sidecar(path)) as temporary:
        temporary.write_text("".join(f"{one['sha256']}  {path.name}\n" for one in found), encoding="utf-8")


def _remedy(path: Path) -> str:
    accepted = path.parent if path.name == DIGESTS_FILENAME else _listing_or_none(path) or path
    return f"restore it, or run `sae-nfm manifest {accepted}` to accept it as it is now"


def _listing_or_none(path: Path) -> Path | None:
    try:
        return None if _sidecar(path).is_file() else _listing(path)
    except ValueError:
        return path.parent


def _files(folder: Path) -> Iterator[Path]:
    """Files whose digests a folder lists: not its own `digests.json`, no temporary files, none that has a digest elsewhere."""
    covered: set[Path] = set()
    for parent, folders, names in os.walk(folder):
        folders.sort()
        here = Path(parent)
        content = None if here == folder else digests(here)
        if content is not None and content["finished"]:
            covered |= {here / name for name in content["files"]}
        for path in (here / name for name in sorted(names)):
            hidden = path.name.startswith(".") and path.suffix in (PARTIAL, LOCK)
            own = path == folder / DIGESTS_FILENAME or path.name.endswith(SIDECAR) or _sidecar(path).exists()
            own = own or path.suffix == UNLISTED
            if not hidden and not own and path not in covered and path.is_file():
                yield path
