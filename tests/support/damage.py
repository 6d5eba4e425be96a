"""Files that are damaged in one place, and what a reader says to that."""

import random
from collections.abc import Callable
from pathlib import Path


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One flipped bit, or the file cut short; a twentieth is cut to nothing."""
    kind = draw.random()
    if kind < 0.05:
        return b""
    if kind < 0.25:
        return content[: draw.randrange(len(content))]
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def outcome(path: Path, content: bytes, read: Callable[[], object]) -> str:
    """What becomes of a file with other content: "named", "noticed" without its name, or what was read; it is restored."""
    good = path.read_bytes()
    path.write_bytes(content)
    try:
        return f"read {read()!r}"
    except (ValueError, OSError) as error:
        named = path.name.removesuffix(".sha256") in str(error)
        return "named" if named else f"noticed without its name: {error}"
    finally:
        path.write_bytes(good)
