"""Files that are whole or not there: written under a temporary name, then renamed."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
