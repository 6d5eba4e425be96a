"""Compile every Triton kernel for GPUs, without one: `python tests/compile_kernels.py few` prints JSON, a list of kernels.

Triton's compiler needs a target, not a device. Arguments are those of some widths, as a launch would specialise them: pointers
and sizes that 16 divides, strides of 1. `few` compiles each kernel for each type of numbers and capability, `all` for each of
these with more widths.
"""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# the package as it is before its __init__, which would import SAELens: three times as long as the compiler
sys.modules["sae_nfm"] = importlib.util.module_from_spec(importlib.util.find_spec("sae_nfm"))

from sae_nfm.kernels import triton_sums  # noqa: E402

TARGETS = {
    "few": ((80, "fp32", (300,)), (90, "fp32", (768, 1)), (90, "bf16", (768,))),
    "all": ((80, "fp32", (768,)), (90, "fp32", (768, 300, 64, 1)), (90, "bf16", (768, 64))),
}
"""Compute capability, type of the numbers, widths. Of `few`, width 1 is that of `active_sums.sum_values` alone."""
INTEGERS = {
    "k": 32,
    "n_tokens": 4096,
    "d_sae": 24576,
    "n_blocks": 768,
    "n_chosen": 32,
    "size": 32,
    "n_rows": 24576,
    "n_columns": 768,
    "source_row": 768,
    "source_column": 1,
    "out_row": 24576,
    "out_column": 1,
}
INT64 = ("indices", "starts", "tokens", "order", "top", "blocks")
CONSTANTS = {"TILE": triton_sums.TILE, "BLOCKS": triton_sums.BLOCKS, "SCALED": True, "SUM": tl.float32}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def source_of(kernel: JITFunction, dtype: str, width: int) -> ASTSource:
    chunk = triton_sums.chunk_of(width)
    constants = CONSTANTS | {"d_out": width, "nfm_dim": width, "CHUNK": chunk, "ENTRIES": triton_sums.entries_of(chunk)}
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants or INTEGERS.get(name) == 1:
            signature[name], constexprs[name] = "constexpr", constants.get(name, 1)
            continue
        signature[name] = "i32" if name in INTEGERS else "*i64" if name in INT64 else f"*{dtype}"
        if INTEGERS.get(name, 16) % 16 == 0:
            attributes[position,] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def compiled(kernel: JITFunction, dtype: str, capability: int, width: int) -> dict:
    source = source_of(kernel, dtype, width)
    chunk = triton_sums.chunk_of(width) if "CHUNK" in kernel.arg_names else 512
    warps = triton_sums.warps_of(chunk)  # 4, Triton's default, for those that name none
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", told)
    assert usage is not None, told
    registers, stack, _, local = map(int, usage.groups())
    return {
        "kernel": kernel.__name__,
        "dtype": dtype,
        "capability": capability,
        "width": width,
        "registers": registers,
        "spilled_bytes": stack + local,
        "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", found.asm["ptx"])),
    }


def widths_of(kernel: JITFunction, widths: tuple[int, ...], which: str) -> tuple[int, ...]:
    """Of those of a target; a kernel whose programs are no chunks of a width is compiled once."""
    if "CHUNK" not in kernel.arg_names:
        return widths[:1]
    return tuple(width for width in widths if width > 1 or which == "all" or kernel is triton_sums._sum_by_feature)


def kernels() -> list[JITFunction]:
    return [value for _, value in inspect.getmembers(triton_sums) if isinstance(value, JITFunction)]


if __name__ == "__main__":
    (which,) = sys.argv[1:]
    print(
        json.dumps(
            [
                compiled(kernel, dtype, capability, width)
                for capability, dtype, widths in TARGETS[which]
                for kernel in kernels()
                for width in widths_of(kernel, widths, which)
            ]
        )
    )
