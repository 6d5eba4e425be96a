"""What depends on the device: where Triton kernels work in place of torch's operations, and the type of a product."""

import importlib.util
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

TRITON_DEVICES: tuple[str, ...] = ("cuda",)
"""Types of the devices whose tensors Triton kernels work on. With its interpreter it could be "cpu"."""


def uses_triton(tensor: Tensor) -> bool:
    """Whether work on a tensor is done by Triton kernels: on a GPU, where Triton is installed."""
    return tensor.device.type in TRITON_DEVICES and _has_triton()


@contextmanager
def without_triton() -> Generator[None]:
    """Within it, torch's operations do all the work: to compare with them."""
    global TRITON_DEVICES
    before, TRITON_DEVICES = TRITON_DEVICES, ()
    try:
        yield
    finally:
        TRITON_DEVICES = before


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def product_dtype(weight: Tensor) -> torch.dtype:
    """The type in which a matrix product with a weight is made: its own, or autocast's."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype
