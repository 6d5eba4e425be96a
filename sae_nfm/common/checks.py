"""Checks of settings: each error says what was given and what is expected."""

from collections.abc import Iterable
from typing import Any


def check_positive(settings: Any, *names: str) -> None:
    """Raise a ValueError for the first of these fields that is not > 0; None stands for "off" and passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise a ValueError for a value that is none of the choices."""
    if value not in (known := list(choices)):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
