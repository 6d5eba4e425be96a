"""Files of other packages' checkpoints, read without running anything that is in them.

A .pt file is a pickle, which can run code while it is read. `torch.load(weights_only=True)` makes tensors and plain
containers alone and refuses the rest. What is read is then compared with what its config says, tensor by tensor.
"""

import json
import re
import struct
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 (its error, not its reader)
from typing import Any, cast

import torch
from sae_lens import SAE, SAEConfig
from sae_lens.constants import DTYPE_TO_STR
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file
from torch import Tensor

from sae_nfm.common import reading
from sae_nfm.common.files import checked as undamaged
from sae_nfm.loading import check_state_dict

FETCH_ANEW = "fetch it anew"
LARGEST_JSON = 256 * 2**20
"""Bytes of a JSON file that is read; statistics of activations may be one."""
DAMAGED = (
    *(UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError),
    *(OSError, OverflowError, struct.error),
)
"""What reading a pickle that is damaged, or that asks for more than tensors, ends in, tried on thousands of damaged files
(OSError: a truncated archive). What does not fit into memory is neither."""


def check_file(path: Path) -> None:
    """Raise a FileNotFoundError where there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; {FETCH_ANEW}, or give where it is")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a ValueError or FileNotFoundError when it is something else, or not there."""
    check_file(path)
    undamaged(path)
    with reading(path, "JSON", remedy=FETCH_ANEW):
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object; {FETCH_ANEW}")
    return cast(dict[str, Any], content)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a ValueError or FileNotFoundError when it is damaged, or not there."""
    check_file(path)
    undamaged(path)
    with reading(path, remedy=FETCH_ANEW):
        return load_file(path)


def read_torch(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote of a dictionary: tensors, numbers, text, containers of these.

    Raises:
        ValueError, FileNotFoundError: when reading it would run code, it is damaged or no dictionary, or not there.
    """
    check_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        wants = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wants is None:
            said = (str(error).splitlines() or [""])[0][:120]
            raise ValueError(f"{str(path)!r} is damaged ({type(error).__name__}: {said}); {FETCH_ANEW}") from error
        raise ValueError(
            f"{str(path)!r} holds more than tensors: reading it would run {wants[1]}, so nothing of it was read or run. Have "
            "whoever made it save the tensors alone, as torch.save(model.state_dict(), path)"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not a dictionary of tensors; {FETCH_ANEW}")
    return cast(dict[str, Any], content)


def checked(content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, as wide as they have to be; `shapes` has the name and shape of every tensor there has to be.

    Raises:
        ValueError: for a missing or an extra tensor, another shape, something else, or a value that is not finite.
    """
    others = sorted(name for name, value in content.items() if not isinstance(value, Tensor))
    if others:
        raise ValueError(f"{str(path)!r} holds more than tensors ({', '.join(others)}); save a state_dict alone")
    expected = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        check_state_dict(content, expected)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error
    return dict(content)


def two_sizes(content: Mapping[str, Any], name: str, path: Path) -> tuple[int, int]:
    """Rows and columns of the matrix `name`, which say how large everything else is."""
    matrix = content.get(name)
    if not isinstance(matrix, Tensor) or matrix.ndim != 2:
        found = ", ".join(sorted(content)[:6]) or "nothing"
        raise ValueError(f"{str(path)!r} has no matrix {name!r} (it has {found}); give another file or format")
    return matrix.shape[0], matrix.shape[1]


def whole_number(config: Mapping[str, Any], key: str, path: Path, at_most: int | None = None) -> int:
    """A positive whole number of a config; a ValueError for anything else, or more than `at_most`, the number of features."""
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} is {value!r} in {str(path)!r}; a positive whole number was expected: restore the file")
    if at_most is not None and value > at_most:
        raise ValueError(f"{key} is {value} in {str(path)!r}, of only {at_most} features; restore the file")
    return value


def dtype_name(weights: Mapping[str, Tensor], path: Path) -> str:
    """SAELens's name of the type that loses nothing of any of the weights."""
    dtype = reduce(torch.promote_types, (weight.dtype for weight in weights.values()))
    if dtype not in DTYPE_TO_STR:
        raise ValueError(f"{str(path)!r} has weights of {dtype}; convert to one of {', '.join(DTYPE_TO_STR.values())}")
    return DTYPE_TO_STR[dtype]


def metadata_of(**known: Any) -> SAEMetadata:
    """Metadata with what is known, and `prepend_bos` as SAELens's own loaders have it: no file says."""
    return SAEMetadata(prepend_bos=True, **{name: value for name, value in known.items() if value is not None})


def built(cfg: SAEConfig, weights: Mapping[str, Tensor], path: Path) -> SAE[Any]:
    """The SAE of a config and its weights, by SAELens's own way of loading."""

    def converter(*_: Any, **__: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return cfg.to_dict(), dict(weights)

    return SAE.load_from_disk(path, converter=converter)
