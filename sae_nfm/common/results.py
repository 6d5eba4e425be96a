"""Results of commands as JSON files: first their kind, then the fields of their dataclass, checked when they are read.

{"kind": "factorial/1", "design": ..., ...}      <command>/<version of the file's form>
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import TypeAdapter, ValidationError

from sae_nfm.common.files import write_json

KIND = "kind"
RESULTS_FILENAME, REPORT_FILENAME = "results.json", "report.html"
"""What a command writes into its output folder, and the page of it."""
T = TypeVar("T")
S = TypeVar("S", bound="SavedResult")


class SavedResult:
    """A result that is a frozen dataclass, with its JSON form."""

    kind: ClassVar[str]
    """`<command>/<version>`. A new version wherever a field is renamed, removed or means something else."""

    @classmethod
    def command(cls) -> str:
        """The command that writes such a file."""
        return f"sae-nfm {cls.kind.partition('/')[0]}"

    def content(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return asdict(self)  # pyright: ignore[reportArgumentType]  (every result is a dataclass)

    @classmethod
    def from_0_1_0(cls, content: dict[str, Any]) -> dict[str, Any]:
        """The content of a file of 0.1.0 in today's form, where that has changed; goes with `before_kinds`."""
        return content

    def save(self, path: str | Path) -> None:
        """Write as JSON, under a temporary name first."""
        write_json(path, with_kind(self.kind, self.content()))

    @classmethod
    def load(cls: type[S], path: str | Path) -> S:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when the file is of another kind, or damaged.
        """
        try:
            return as_result(cls, json.loads(Path(path).read_text()))
        except ValueError as error:  # JSON's and pydantic's are of this kind
            raise ValueError(
                f"{path} is not a valid result of `{cls.command()}` ({error}); rerun the command to regenerate it"
            ) from error


def as_result(result: type[S], content: Any) -> S:
    """JSON content as a result.

    Raises:
        ValueError: when its kind or its fields are others; in one line.
    """
    given = without_kind(result.kind, content)
    given = given if KIND in content else in_todays_form(result, given)
    unknown = given.keys() - {field.name for field in fields(result)}  # pyright: ignore[reportArgumentType]
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r}")
    try:
        return TypeAdapter(result).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}") from error


def in_todays_form(result: type[SavedResult], content: dict[str, Any]) -> dict[str, Any]:
    """The content of a file of 0.1.0 as `result` has it; as it is where it is no such file."""
    try:
        return result.from_0_1_0(content)
    except (KeyError, TypeError, ValueError):
        return content


def with_kind(kind: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file, its kind first."""
    return {KIND: kind, **content}


def without_kind(kind: str, content: Any) -> dict[str, Any]:
    """The content of a file less its kind. One without a kind passes: it is of 0.1.0 (`before_kinds`).

    Raises:
        ValueError: when it is of another kind, or no JSON object.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected an object of kind {kind!r}")
    given = content.get(KIND, kind)
    if given != kind:
        raise ValueError(f"its kind is {given!r}, expected {kind!r}")
    return {name: value for name, value in content.items() if name != KIND}
