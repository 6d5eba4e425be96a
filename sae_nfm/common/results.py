"""Results of commands: JSON files with their kind and the fields of a dataclass, provenance, and tables for the terminal.

{"kind": "factorial/1", "design": ..., ...}      <command>/<version of the file's form>
"""

import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from sae_nfm.common.files import checked, write_json

KIND = "kind"
RESULTS_FILENAME, REPORT_FILENAME = "results.json", "report.html"
"""What a command writes into its output folder, and the page of it."""
PACKAGES = ("sae-nfm", "sae-lens", "transformer-lens", "torch", "transformers", "datasets")
"""Packages whose versions every result says."""
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
        """The content of a file of 0.1.0 in today's form, where that has changed; goes with `kind_by_keys`."""
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
        checked(path)
        try:
            return as_result(cls, json.loads(Path(path).read_text(encoding="utf-8")))
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
    """The content of a file less its kind. One without a kind passes: it is of 0.1.0 (`kind_by_keys`).

    Raises:
        ValueError: when it is of another kind, or no JSON object.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected an object of kind {kind!r}")
    given = content.get(KIND, kind)
    if given != kind:
        raise ValueError(f"its kind is {given!r}, expected {kind!r}")
    return {name: value for name, value in content.items() if name != KIND}


def kind_by_keys(content: Mapping[str, Any], results: Iterable[type[SavedResult]]) -> str | None:
    """The kind of a file of 0.1.0, which does not say it; None without any. To be deleted after 0.2, with `golden/0.1.0`.

    It is that of the first class that has all fields of the file and lacks only fields with a default.
    """
    for result in results:
        known: Any = fields(result)  # pyright: ignore[reportArgumentType]  (every result is a dataclass)
        required = {field.name for field in known if field.default is MISSING and field.default_factory is MISSING}
        if required <= in_todays_form(result, dict(content)).keys() <= {field.name for field in known}:
            try:
                as_result(result, content)
            except ValueError:  # the fields of another class have the same names
                continue
            return result.kind
    return None


def provenance(
    config: Any, *, command: str | None = None, packages: tuple[str, ...] = (), **facts: Any
) -> dict[str, Any]:
    """What a saved result says of its origin: settings, the command that repeats it, versions of `PACKAGES` and of further
    packages, and as `facts`, by name, what else it depends on.
    """
    return {
        "config": dict(config) if isinstance(config, Mapping) else asdict(config),
        "command": command,
        **facts,
        "versions": {name: importlib.metadata.version(name) for name in (*PACKAGES, *packages)}
        | {"python": platform.python_version()},
    }


def remark(text: str) -> None:
    """Say on stderr what a user should know and no error is, such as rows that were left out."""
    print(f"sae-nfm: {text}", file=sys.stderr)


HELD_OUT = "held-out tokens"


def text_of(provenance: Mapping[str, Any]) -> str:
    """What a result says of its text: whether the SAE was trained on it (`data.told_of_text`); older files do not say."""
    return str(provenance.get("text", HELD_OUT))


def not_held_out(provenance: Mapping[str, Any]) -> list[str]:
    """A sentence where the text of a result is not held out, or that cannot be told."""
    text = text_of(provenance)
    return [] if text.startswith(HELD_OUT) else [f"The text is not known to be held out: {text}."]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """A table for the terminal: header, ruler, rows; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]).rstrip()
        for first, *rest in lines
    ]
    return [texts[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *texts[1:]]


def listed(values: dict[str, float], width: int) -> list[str]:
    """Indented lines of a name and a number; whole numbers have no decimals."""
    return [f"    {name:<{width}}  {_number(value):>14}" for name, value in values.items()]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def short_repr(self: Any) -> str:
    """A result in one line: numbers and short texts as they are, of a tensor or an array its type and shape."""
    names = getattr(self, "_fields", None) or [one.name for one in fields(self) if one.repr]
    return f"{type(self).__name__}({', '.join(f'{name}={_short(getattr(self, name))}' for name in names)})"


def _short(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return (
            f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            if len(value.shape)
            else f"{value.item():.6g}"
        )
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return "{" + ", ".join(f"{key!r}: {_short(one)}" for key, one in items) + "}"
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        items = list(cast(Any, value))
        more = f", ... {len(items)} in all" if len(items) > 4 else "," * (len(items) == 1)
        return f"({', '.join(map(_short, items[:4]))}{more})"
    text = repr(value)
    return text if len(text) <= 200 and "\n" not in text else f"<{type(value).__name__}>"


class ShortRepr:
    """What a result is printed as: `short_repr`."""

    __repr__ = short_repr
