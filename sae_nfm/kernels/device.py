"""What depends on the device: where Triton kernels replace torch's operations, the type of a product, the rates that
`dispatch.choose` compares: matrix products and gathers of rows.
"""

import importlib.util
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial, reduce
from statistics import median
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

P = ParamSpec("P")
T = TypeVar("T")
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
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def ranks_in_bfloat16(weight: Tensor) -> bool:
    """Whether a product with a weight of float32 is made faster in bfloat16: on a CPU that has instructions for it.

    Measured on AVX-512 BF16: 2.2 times as fast.
    """
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and _has_bfloat16()


@cache
def _has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage] (there is no public question)


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Within it, operations on a device have the type of their arguments."""
    known = torch.amp.is_autocast_available(device.type)  # it is not for the meta device
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def autocast_as_now(device: torch.device) -> AbstractContextManager[Any]:
    """Within it, later, operations on a device have the type that they have now."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, which torch.compile leaves as it is: its tracer cannot follow a derivative within a derivative."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


def is_transformed() -> bool:
    """Whether a transform of torch.func (vmap, jvp, jacfwd, ...) or forward-mode differentiation is at work."""
    # torch has no public question for either
    transforms: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
    return forward_ad._current_level >= 0 or transforms.peek_interpreter_stack() is not None  # pyright: ignore[reportPrivateUsage]


def sees_numbers(*tensors: Tensor) -> bool:
    """Whether what is computed of tensors may depend on the numbers in them and leave out what autograd alone needs not.

    It may not on the meta device, of stand-ins (fake tensors), while a graph is compiled or traced, and under transforms.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or is_transformed()
        or any(tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors)
    )


def wide(tensor: Tensor) -> Tensor:
    """At least float32: for sums over many entries, products of activations, and operations that know no half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def promoted_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The type that a sum of those that are given has."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors if tensor is not None))


class DeviceRates(NamedTuple):
    """What a device reaches."""

    flop_per_second: float
    """Of matrix products."""
    gathered_bytes_per_second: float
    """Of rows of float32 that are read in any order and summed."""


CPU = DeviceRates(90e9, 55e9)
"""Measured on one core (AVX-512), rows in its last cache. Not measured where it is used: a run has to choose as it did before."""
CUDA = {torch.float32: DeviceRates(5e13, 2e12), torch.bfloat16: DeviceRates(5e14, 2e12)}
"""What an H100 should reach, from its data sheet; for estimates on a machine without the GPU."""
TOKENS, ACTIVE, FEATURES, WIDTH = 4096, 32, 32768, 512
"""What is timed: a product [TOKENS, WIDTH] [WIDTH, FEATURES], and ACTIVE rows of [FEATURES, WIDTH] for each token."""
ROUNDS, LAUNCHES = 5, 10
"""How often time is taken, and for how many products or sums at a time: what a GPU is asked for takes a while to reach it."""


def device_rates(device: torch.device | str, dtype: torch.dtype = torch.float32) -> DeviceRates | None:
    """The rates for products of a type; a GPU that is present is measured at the first call. None for other devices."""
    device = torch.device(device)
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        return None
    if not torch.cuda.is_available():
        return CUDA.get(dtype, CUDA[torch.float32])
    index = torch.cuda.current_device() if device.index is None else device.index  # pyright: ignore[reportUnnecessaryComparison]
    matmul = torch.backends.cuda.matmul  # torch refuses the older question after an answer by the newer one
    may_use_tf32: Any = matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return _measured(index, dtype, may_use_tf32, "cuda" in TRITON_DEVICES)


@cache
def _measured(index: int, dtype: torch.dtype, *_that_decide: Any) -> DeviceRates:
    return measure_rates(torch.device("cuda", index), dtype)


@torch.no_grad()
def measure_rates(device: torch.device, dtype: torch.dtype) -> DeviceRates:
    """Time products and sums of gathered rows, outside autocast; random numbers are the measurement's own."""
    from sae_nfm.kernels.sums import sum_by_token  # which asks this module for the device

    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(FEATURES, WIDTH, device=device, generator=generator)
    indices = torch.randint(FEATURES, (TOKENS, ACTIVE), device=device, generator=generator)
    values = torch.ones(TOKENS, ACTIVE, device=device)
    left, right = rows[:TOKENS].to(dtype), rows.T.to(dtype)
    with torch.autocast(device.type, enabled=False):
        product = _seconds(lambda: left @ right, device)
        gather = _seconds(lambda: sum_by_token(indices, values, rows), device)
    return DeviceRates(2 * TOKENS * WIDTH * FEATURES / product, 4 * TOKENS * ACTIVE * WIDTH / gather)


def _seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    found: list[float] = []
    for _ in range(ROUNDS + 1):
        wait()
        begin = time.perf_counter()
        for _ in range(LAUNCHES):
            work()
        wait()
        found.append((time.perf_counter() - begin) / LAUNCHES)
    return median(found[1:])  # the first also compiles
