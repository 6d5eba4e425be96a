"""Which annotations of the package are checked while tests run (`--jaxtyping-packages`): those with shapes.

The others are pyright's; a caller's mistake in them has a ValueError of its own, which a check would hide.
"""

from collections.abc import Callable
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments checked, where an annotation of it has a shape."""
    return _beartype(function) if any(map(_has_shape, function.__annotations__.values())) else function


def _has_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_has_shape, get_args(hint)))
