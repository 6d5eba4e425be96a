"""The folder of a finished SAE: it appears whole, and what was there before is kept."""

import os
import shutil
from pathlib import Path

from sae_lens.constants import SAE_CFG_FILENAME


def partial_folder(output_path: str) -> Path:
    """Where an output lies until all of it is there."""
    output = Path(output_path).absolute()
    return output.with_name(output.name + ".partial")


def check_output(output_path: str | None) -> None:
    """Refuse an output folder that holds something other than an SAE.

    Raises:
        ValueError: for a file, or a folder with files and no SAE.
    """
    if output_path is None or not Path(output_path).exists():
        return
    output = Path(output_path)
    if not output.is_dir():
        raise ValueError(f"output_path is {output_path!r}, which is a file; give a folder")
    names = sorted(path.name for path in output.iterdir())
    if names and SAE_CFG_FILENAME not in names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(f"output_path is {output_path!r}, which holds other things ({shown}); give a new folder")


def discard_unstarted(output_path: str) -> None:
    """Remove `<output>.partial` where a run failed before its first step, so that nothing is in it but empty files."""
    partial = partial_folder(output_path)
    if all(path.stat().st_size == 0 for path in partial.iterdir()):
        shutil.rmtree(partial)


def publish(output_path: str) -> Path | None:
    """Rename `<output>.partial` to the output, whole; returns where an SAE that was there is kept, as `<output>.1` and so on."""
    output, kept = Path(output_path), None
    if output.is_dir() and any(output.iterdir()):
        number = 1
        while (kept := output.with_name(f"{output.name}.{number}")).exists():
            number += 1
        output.rename(kept)
    os.replace(partial_folder(output_path), output)
    return kept
