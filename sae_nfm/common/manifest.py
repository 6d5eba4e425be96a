"""The job of `sae-nfm manifest`: the digests of a folder or a file as it is now, and what has changed in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_nfm.common.files import DIGESTS_FILENAME, SAE_CONFIG, SIDECAR, accept_file, digests, found_files, seal
from sae_nfm.common.outputs import foreign_names


@dataclass(frozen=True, kw_only=True)
class ManifestConfig:
    """What to accept as it is."""

    path: str
    """Folder of a run or of a saved SAE, or one result file."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `sae-nfm manifest` found, and where the digests are now."""

    written: tuple[str, ...]
    """Files with digests, written anew."""
    changed: tuple[str, ...]
    """Each file that was not what its digest said, in words."""
    files: int
    """Files that have a digest."""

    def words(self) -> str:
        """What changed, and that it is accepted."""
        lines = ["Accepted as they are now:", *(f"  {one}" for one in self.changed)] if self.changed else []
        lines = lines or ["Nothing had changed."]
        return "\n".join([*lines, f"Digests of {self.files:,} files: {', '.join(self.written)}"])


def accept(config: ManifestConfig) -> Manifest:
    """Write digests of what is there; no other file is touched.

    Raises:
        ValueError: for a folder that has no SAE and no result of a command.
        FileNotFoundError: where there is no such folder or file.
    """
    path = Path(config.path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {config.path!r}; give the folder of a run or of an SAE, or a result file")
    if path.is_file():
        changed, where = accept_file(path)
        return Manifest(written=(str(where),), changed=(path.name,) if changed else (), files=1)
    inside = sorted({file.parent for name in (DIGESTS_FILENAME, SAE_CONFIG) for file in path.rglob(name)} - {path})
    own = (path / DIGESTS_FILENAME).is_file() or not foreign_names(path)
    if not own and not inside:
        raise ValueError(f"{config.path!r} has no saved SAE and no result of a command; give the folder of one")
    told = list[str]()
    files = 0
    # inner folders first: the outer ones list the digests of their digests
    folders = [*sorted(inside, key=lambda folder: -len(folder.parts)), *([path] if own else [])]
    for folder in folders:
        was = _digests(folder)
        now = found_files(folder)
        files += sum(not name.endswith(DIGESTS_FILENAME) for name in now)
        listed = {} if was is None else was["files"]
        names = [name for name in {**listed, **now} if not name.endswith(DIGESTS_FILENAME)]
        label = folder.relative_to(path).as_posix()
        for name in names:
            shown = name if label == "." else f"{label}/{name}"
            if name not in listed and was is not None:
                told.append(f"{shown} (new)")
            elif name not in now:
                told.append(f"{shown} (gone)")
            elif name in listed and listed[name]["sha256"] != now[name]["sha256"]:
                told.append(shown)
        seal(folder, None if was is None else was["run"])
    for sidecar in sorted(path.rglob(f"*{SIDECAR}")):
        if (file := sidecar.with_name(sidecar.name.removesuffix(SIDECAR))).is_file():
            changed, _ = accept_file(file)
            files += 1
            told += [file.relative_to(path).as_posix()] if changed else []
    written = tuple(str(folder / DIGESTS_FILENAME) for folder in folders)
    return Manifest(written=written, changed=tuple(told), files=files)


def _digests(folder: Path) -> dict[str, Any] | None:
    try:
        return digests(folder)
    except ValueError:  # damaged: written anew
        return None
