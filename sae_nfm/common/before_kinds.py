"""Files of 0.1.0, which say no kind: recognised by their keys. To be deleted after 0.2, with the tests' `golden/0.1.0`."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from sae_nfm.common.results import SavedResult, as_result, in_todays_form


def kind_by_keys(content: Mapping[str, Any], results: Iterable[type[SavedResult]]) -> str | None:
    """The kind of the first class that has all fields of a file and lacks only fields with a default; None without any.

    Args:
        content: of a file without a kind.
        results: classes that it could be of.
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
