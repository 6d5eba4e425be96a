"""A folder of results that is complete or unchanged."""

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(folder: Path) -> Generator[Path]:
    """A temporary folder; when the block ends its files move into `folder`, over those of the same name.

    After an exception in the block nothing has moved. The temporary folder lies next to the final one: each
    move is a rename within one file system.

        with written_whole(output) as folder:
            model.save_pretrained(folder)
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        yield Path(temporary)
        folder.mkdir(exist_ok=True)
        for file in sorted(Path(temporary).iterdir()):
            os.replace(file, folder / file.name)
