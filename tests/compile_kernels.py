"""Compile every Triton kernel for GPUs, without one: `python tests/compile_kernels.py` prints JSON, a list of kernels.

Triton's compiler needs a target, not a device. Arguments are those of some widths, as a launch would specialise them: pointers
and sizes that 16 divides, strides of 1.
"""

import inspect
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sae_nfm import triton_pairs, triton_sums

TARGETS = ((80, "fp32", (768,)), (90, "fp32", (768, 300, 64, 1)), (90, "bf16", (768, 64)))
"""Compute capability, type of the numbers, widths."""
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


def kernels() -> list[JITFunction]:
    modules = (triton_sums, triton_pairs)
    return [value for module in modules for _, value in inspect.getmembers(module) if isinstance(value, JITFunction)]


if __name__ == "__main__":
    print(
        json.dumps(
            [
                compiled(kernel, dtype, capability, width)
                for capability, dtype, widths in TARGETS
                for kernel in kernels()
                for width in (widths if "CHUNK" in kernel.arg_names else widths[:1])
            ]
        )
    )
