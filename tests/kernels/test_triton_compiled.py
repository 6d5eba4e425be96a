"""The Triton kernels, compiled for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no package for this platform")


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request, tmp_path_factory):
    """Compiled anew, in a process without the interpreter; `all` are the widths between the narrowest and the widest, too."""
    script = Path(__file__).parents[1] / "support" / "compile_kernels.py"
    command = [sys.executable, str(script), request.param]
    cache = tmp_path_factory.mktemp("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_every_kernel_compiles(compiled):
    names = {"_sum_by_token", "_sum_by_feature", "_dots", "_transpose", "_block_maxima", "_block_scores"}
    names |= {"_pool", "_grad_values", "_grad_V"}
    found = {(row["kernel"], row["dtype"], row["capability"]) for row in compiled}
    targets = ((80, "fp32"), (90, "fp32"), (90, "bf16"))
    assert found == {(name, dtype, capability) for name in names for capability, dtype in targets}


def test_no_kernel_spills_registers(compiled):
    assert [row for row in compiled if row["spilled_bytes"]] == []


def test_rows_are_read_sixteen_bytes_at_a_time(compiled):
    """Eight of them in flight, one for each entry of a step of the loop."""
    rows = [row for row in compiled if row["dtype"] == "fp32" and row["width"] in (768, 300)]
    gathering = [row for row in rows if not row["kernel"].startswith("_block")]
    assert {row["width"] for row in gathering} == {768, 300}
    for capability in (80, 90):
        assert len({row["kernel"] for row in gathering if row["capability"] == capability}) == 7
    assert [row for row in gathering if row["wide_loads"] < 8] == []
