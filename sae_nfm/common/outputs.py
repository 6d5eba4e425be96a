"""The output folder of a command: made as `<output>.partial`, and there by one rename when all of it is.

    check the output -> lock -> <output>.partial -> digests -> an older run becomes <output>.1 -> <output>

Nothing is ever removed but what a run has left in `<output>.partial`. A process that is killed between the last two renames
leaves the new run finished under its temporary name; the next command on this output renames it first.
"""

import importlib.metadata
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

from sae_nfm.common.file_errors import FileError, check_writable, unwritable
from sae_nfm.common.files import (
    DIGESTS_FILENAME,
    LOCK,
    PARTIAL,
    SAE_CONFIG,
    begin,
    digests,
    give_up,
    is_finished,
    locked,
    seal,
)

LEFT_BY_RUNS = ("results.json", "compare.json", "explorer.json.gz", "training.jsonl")
"""Files that say what a folder is where it has no digests, as of 0.1.0; of an SAE it is `cfg.json`."""
BESIDE_RESULTS = ("results.json", "report.html", "norms.json", "explorer.json.gz")
"""What may lie in the folder of any run."""


def final_place(output: str | Path) -> Path:
    """Where an output will be: absolute, and through a link the folder that it leads to."""
    return Path(output).resolve() if Path(output).is_symlink() else Path(os.path.abspath(output))


def partial_folder(output: str | Path) -> Path:
    """Where an output is written until it is complete."""
    final = final_place(output)
    return final.with_name(final.name + PARTIAL)


def check_output(output: str | Path | None, option: str = "output", *, only_sae: bool = False) -> None:
    """Raise a ValueError for an output that cannot be renamed, or is something else than an earlier run.

    Args:
        option: its name in the message.
        only_sae: of the runs an SAE only.
    """
    if output is None:
        return
    final, given = final_place(output), f"{option} is {str(output)!r}"
    if os.path.lexists(final) and not final.is_dir():
        raise ValueError(f"{given}, a file; give a folder")
    check_writable(output, folder=True)
    if not final.exists():
        return
    if names := foreign_names(final):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(f"{given}, which contains other files ({shown}); give a new folder")
    if only_sae and any(final.iterdir()) and not (final / SAE_CONFIG).is_file():
        raise ValueError(f"{given}, which contains a run and no SAE; give a new folder")
    if Path.cwd().is_relative_to(final):
        raise ValueError(f"{given}, the folder you are in; give the name of a folder in it")
    if os.path.ismount(final):
        raise ValueError(f"{given}, where a disk is mounted, so it cannot be renamed; give a folder in it")


def foreign_names(folder: Path) -> list[str]:
    """What in a folder no command of this package has written; of an SAE, or without digests, nothing or all."""
    if (folder / SAE_CONFIG).is_file():
        return []
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and not p.name.endswith(PARTIAL))
    content = digests(folder)
    if content is None:
        left = [folder / name for name in LEFT_BY_RUNS if (folder / name).is_file()]
        return names if all(map(_is_foreign, left)) else []
    ours = {name.partition("/")[0] for name in content["files"]} | {DIGESTS_FILENAME}
    return [
        name
        for name in names
        if name not in ours and not name.endswith((".sha256", LOCK)) and not (folder / f"{name}.sha256").is_file()
    ]


def _is_foreign(file: Path) -> bool:
    """Whether a results.json is somebody else's: ours say their kind, or since 0.1.0 where they are from."""
    if file.name != "results.json":
        return False
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return True
    return not (isinstance(content, dict) and {"kind", "provenance"} & set(content))


def check_extension(output: str | Path, name: str, parts: Collection[str]) -> None:
    """Raise a ValueError where an output has something else than a run, begun or finished, of the command of this name.

    parts: names, or patterns of them, in the output folder of such a run, beside `BESIDE_RESULTS`.
    """
    final, other = final_place(output), f"give a new folder, or that of a `sae-nfm {name}`"
    if not final.is_dir() or not any(final.iterdir()):
        check_output(output)
        return
    check_writable(output, folder=True)
    content, results = digests(final), final / "results.json"
    ran = None if content is None else content["run"].get("name")
    if ran is None and results.is_file() and not _is_foreign(results):
        ran = str(json.loads(results.read_text(encoding="utf-8")).get("kind", name)).partition("/")[0]
    if ran not in (None, name):
        raise ValueError(f"output is {str(output)!r}, which holds a run of `sae-nfm {ran}`; {other}")
    known = {*BESIDE_RESULTS, DIGESTS_FILENAME}
    names = sorted(path.name for path in final.iterdir() if not path.name.startswith("."))
    known |= {n for n in names if n.endswith((PARTIAL, ".sha256")) or any(fnmatch(n, part) for part in parts)}
    names = [n for n in names if n not in known]
    if content is None and names:
        raise ValueError(f"output is {str(output)!r}, which holds other things ({', '.join(names[:3])}); {other}")


_places: dict[Path, Path] = {}
"""Folders that this process is filling, with the output that each becomes."""


def final_path(path: Path) -> Path:
    """Where a file or folder will be when its output is published; itself where it is of none."""
    for folder, output in _places.items():
        if path.absolute().is_relative_to(folder):
            return output / path.absolute().relative_to(folder)
    return path


def present_path(path: Path) -> Path:
    """The opposite of `final_path`: where a file or folder is now."""
    for folder, output in _places.items():
        if path.absolute().is_relative_to(final_place(output)):
            return folder / path.absolute().relative_to(final_place(output))
    return path


@dataclass(kw_only=True)
class Publication:
    """An output that is being made."""

    folder: Path
    """Where its files are written."""
    kept: Path | None = None
    """Where a run lies now that was there before; known when it is published."""


@contextmanager
def publishing(
    output: str | Path,
    name: str,
    *,
    command: str | None = None,
    settings: Any = None,
    keep: bool = False,
    leave: bool = False,
    extend: Collection[str] | None = None,
) -> Generator[Publication]:
    """A folder to write an output to; when the block ends well it is at the output's place, an older one beside it.

    Within the block no other process can have the same output.

    Args:
        name: of the command, such as demo.
        command: what is run, for the digests and for who finds the output locked.
        settings: as JSON has them, all that the files depend on. Where an interrupted run had the same, what it left is kept.
        keep: whether it is kept whatever it had.
        leave: whether what is there after an exception is left, for a person to look at.
        extend: names in such an output (`check_extension`). One that is there is added to in its place, marked as unfinished
            meanwhile, and what an interrupted run left is kept.

    Raises:
        ValueError: for an output as `check_output` has it, or one that another process is writing.
    """
    final = final_place(output)
    with locked(final, command):
        complete_publication(final)
        for left in final.parent.glob(f".{escape(final.name)}.*{PARTIAL}"):
            if left.is_dir() and _is_ours(left):
                shutil.rmtree(left)  # by a process that was killed
        if extend is None:
            check_output(output)
        else:
            check_extension(output, name, extend)
            keep = True
        run: dict[str, Any] = {
            "name": name,
            "id": secrets.token_hex(8),
            "command": command,
            "version": importlib.metadata.version("sae-nfm"),
        }
        run |= {"begun": time.strftime("%Y-%m-%d %H:%M:%S"), "settings": settings}
        in_place = extend is not None and final.is_dir() and any(final.iterdir())
        folder = final if in_place else _claimed(final, settings, keep=keep)
        begin(folder, run, mark=not in_place)
        _places[folder] = Path(output)
        made = Publication(folder=folder)
        try:
            with _named_by(output):
                yield made
                seal(folder, run)
        except BaseException:
            give_up(folder)
            if not in_place:
                _tidy(folder, keep=keep or leave or settings is not None)
            raise
        finally:
            del _places[folder]
        if not in_place:
            made.kept = publish(output)


@contextmanager
def _named_by(output: str | Path) -> Generator[None]:
    """What cannot be written of a run in the making is told by its output."""
    try:
        yield
    except FileError as error:
        if PARTIAL not in error.path:
            raise
        raise unwritable(output, error) from error


def complete_publication(output: str | Path) -> bool:
    """Rename a run that is finished but for its rename, as where a process was killed just then; whether there was one."""
    folder = partial_folder(output)
    ready = folder.is_dir() and _is_ours(folder) and is_finished(folder)
    if ready:
        publish(output)
    return ready


def publish(output: str | Path) -> Path | None:
    """Rename `<output>.partial` to the output; a run that was there is renamed to `<output>.1` and so on, which is returned."""
    final, kept = final_place(output), None
    if final.is_dir() and any(final.iterdir()):
        number = 1
        while os.path.lexists(kept := final.with_name(f"{final.name}.{number}")):
            number += 1
        final.rename(kept)
    os.replace(partial_folder(final), final)
    return None if kept is None else Path(output).with_name(kept.name)


def _claimed(final: Path, settings: Any, *, keep: bool) -> Path:
    """The partial folder: as an interrupted run left it where that is to be kept, else new and empty."""
    folder = partial_folder(final)
    if os.path.lexists(folder):
        if not _is_ours(folder):
            raise ValueError(
                f"{str(folder)!r} is a link, a file, or somebody else's; move it away, or give another output"
            )
        content = digests(folder)
        if keep or (content is not None and settings is not None and content["run"].get("settings") == settings):
            for left in folder.rglob(f".*{PARTIAL}"):
                left.unlink()  # of a process that was killed
            return folder
        if content is None and any(
            not path.name.startswith(".") for path in folder.iterdir()
        ):  # not of this version: it may hold anything
            number = 1
            while os.path.lexists(aside := final.with_name(f"{final.name}.{number}{PARTIAL}")):
                number += 1
            folder.rename(aside)
        else:
            _remove(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    return folder


def _is_ours(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _tidy(folder: Path, *, keep: bool) -> None:
    """After an exception: take away a folder that nothing can be resumed from."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS_FILENAME]
    if not keep or all(path.stat().st_size == 0 for path in files):
        _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a partial folder, out of the way first: none that is half deleted is taken for one that is half made."""
    hidden = folder.with_name(f".{folder.stem}.{secrets.token_hex(8)}{PARTIAL}")
    folder.rename(hidden)
    shutil.rmtree(hidden)
