"""Results of commands as JSON files: written by their fields, read back and checked against the fields of their class."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import TypeAdapter, ValidationError

from sae_nfm.common.files import write_json

T = TypeVar("T")
S = TypeVar("S", bound="SavedResult")


class SavedResult:
    """A result that is a frozen dataclass, with its JSON form."""

    command: ClassVar[str]
    """What writes such a file."""

    def save(self, path: str | Path) -> None:
        """Write as JSON, under a temporary name first."""
        write_json(path, asdict(self))  # pyright: ignore[reportArgumentType]  (every result is a dataclass)

    @classmethod
    def load(cls: type[S], path: str | Path) -> S:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when the file is something else.
        """
        try:
            return as_result(cls, json.loads(Path(path).read_text()))
        except ValueError as error:  # JSON's and pydantic's are of this kind
            raise ValueError(
                f"{path} is not what `{cls.command}` writes ({_first(error)}); make it anew with that command"
            ) from error


def as_result(result: type[T], content: Any) -> T:
    """JSON content as a result.

    Raises:
        ValueError: when its fields are others.
    """
    return TypeAdapter(result).validate_python(content)


def _first(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"
