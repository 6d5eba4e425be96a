"""Files that are whole or not there: written under a temporary name, then renamed."""

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SAE_CONFIG = "cfg.json"
"""What SAELens calls the config in the folder of a saved SAE."""


@contextmanager
def whole(path: str | Path) -> Generator[Path]:
    """A temporary name beside `path` to write to, `<path>.partial`; it becomes `path` when the block ends well.

    Missing folders are made. After an exception the partial file stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)


def write_json(path: str | Path, content: Any, **options: Any) -> None:
    """Write JSON to a whole file; options are those of `json.dumps`."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1, **options) + "\n")


def partial_folder(output_path: str) -> Path:
    """Where an output is written until it is complete."""
    output = Path(output_path).absolute()
    return output.with_name(output.name + ".partial")


def check_output(output_path: str | None) -> None:
    """Raise a ValueError for an output that is a file, or a folder with files and no SAE."""
    if output_path is None or not Path(output_path).exists():
        return
    output = Path(output_path)
    if not output.is_dir():
        raise ValueError(f"output_path is {output_path!r}, a file; give a folder")
    names = sorted(path.name for path in output.iterdir())
    if names and SAE_CONFIG not in names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(f"output_path is {output_path!r}, which contains other files ({shown}); give a new folder")


def discard_unstarted(output_path: str) -> None:
    """Remove `<output>.partial` if it has empty files only, as where a run failed before its first step."""
    partial = partial_folder(output_path)
    if all(path.stat().st_size == 0 for path in partial.iterdir()):
        shutil.rmtree(partial)


def publish(output_path: str) -> Path | None:
    """Rename `<output>.partial` to the output; an SAE that was there is renamed to `<output>.1` and so on, which is returned."""
    output, kept = Path(output_path), None
    if output.is_dir() and any(output.iterdir()):
        number = 1
        while (kept := output.with_name(f"{output.name}.{number}")).exists():
            number += 1
        output.rename(kept)
    os.replace(partial_folder(output_path), output)
    return kept
