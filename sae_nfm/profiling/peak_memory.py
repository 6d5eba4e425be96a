"""Peak memory of training steps. Each arm steps in a process of its own, `python -m sae_nfm.profiling.peak_memory JSON`,
which answers with JSON.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from sae_nfm.profiling.arms import Case, Sizes, Stepper, Timings, activations, one_line, synchronize

PEAK_STEPS = 5
"""Steps after which the peak of memory is read."""


def measure_peaks(cases: Sequence[Case], timings: dict[Case, Timings]) -> dict[Case, int]:
    """Peak memory of every case that could be timed."""
    torch.cuda.empty_cache()  # what this process keeps for reuse, its workers may need
    found: dict[Case, int] = {}
    possible = [case for case in cases if timings[case].reason is None]
    for case in tqdm(possible, desc="Peak memory", unit="process", leave=False):
        try:
            found[case] = peak_of_steps(*case, n_steps=PEAK_STEPS, threads=torch.get_num_threads())
        except RuntimeError as error:
            timings[case].reason = f"no peak memory: {one_line(error)}"
    return found


def peak_of_steps(arm: str, sizes: Sizes, *, n_steps: int, threads: int) -> int:
    """Bytes that a fresh process's memory rises by for training steps: gradients, optimizer state, all that lives meanwhile.

    CPU: peak resident size, less that of the process before its first step. CUDA: the same of allocated device memory.

    Raises:
        RuntimeError: when the process fails, with its last words.
    """
    task = {
        "arm": arm,
        "n_steps": n_steps,
        "threads": threads,
        "sizes": {field.name: getattr(sizes, field.name) for field in fields(Sizes)},
    }
    command = [sys.executable, "-m", "sae_nfm.profiling.peak_memory", json.dumps(task)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        said = process.stderr.strip().splitlines()
        raise RuntimeError(said[-1] if said else f"ended by signal {-process.returncode}, perhaps out of memory")
    answer = json.loads(process.stdout.splitlines()[-1])
    return answer["peak_bytes"] - answer["peak_bytes_before"]


def _peak_bytes(device: str) -> int:
    """The most memory so far. Not ru_maxrss where Linux tells: that counts the parent's memory before exec, too."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _work(task: dict[str, Any]) -> dict[str, int]:
    torch.set_num_threads(task["threads"])
    sizes = Sizes(**task["sizes"])
    step = Stepper(task["arm"], sizes, activations(sizes))
    if torch.device(sizes.device).type == "cuda":  # what making the SAE took is over; a process's peak size stays
        torch.cuda.reset_peak_memory_stats(sizes.device)
    before = _peak_bytes(sizes.device)
    for _ in range(task["n_steps"]):
        step()
    synchronize(sizes.device)
    return {"peak_bytes": _peak_bytes(sizes.device), "peak_bytes_before": before}


if __name__ == "__main__":
    print(json.dumps(_work(json.loads(sys.argv[1]))))
