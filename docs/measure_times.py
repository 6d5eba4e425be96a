"""Measure how long commands take and write docs/times.md: `python docs/measure_times.py`, on a machine that does nothing else.

Each command runs once, in order, in one temporary folder; those of make run in the repository. Lines of an earlier measurement
stay for commands that are left out: `python docs/measure_times.py demo train` measures those whose line has one of the words.
"""

import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

PAGE, ROOT = Path(__file__).parent / "times.md", Path(__file__).parent.parent
COMMANDS = (
    ("sae-nfm --help", "the commands"),
    ("sae-nfm demo", "four SAEs, table, page; what `make demo` does once all is installed"),
    ("sae-nfm report runs", "the page of the demo's folder"),
    ("sae-nfm train --output_path runs/mine", "joint_nfm, 200,000 tokens"),
    ("sae-nfm train --n_checkpoints 6 --wandb_id mine --output_path runs/checked", "the same, with checkpoints"),
    ("sae-nfm dynamics checkpoints/mine", "six checkpoints"),
    ("sae-nfm evaluate sae-nfm-demo:blocks.2.hook_resid_post", "SAELens's metrics of the packaged SAE"),
    ("sae-nfm explore", "20,000 tokens"),
    ("sae-nfm export runs/explorer features.jsonl", "its features as JSON lines"),
    ('sae-nfm attribute "The film was not good"', "one token"),
    ("sae-nfm attribute --corpus", "pairs over 20,000 tokens"),
    ("sae-nfm factorial", "a 2x2 experiment"),
    ("sae-nfm secondary", "SAEs on the hidden code"),
    ("sae-nfm dry-run paper", "the published run, not made"),
    ("sae-nfm convert runs/demo/saes/topk runs/silent", "a TopK SAE becomes a joint_nfm"),
    ("sae-nfm speed", "all arms"),
    ("sae-nfm compare --arms joint_nfm topk --seeds 0 --learning-rates 5e-3", "two arms, one seed, no sweep"),
    ("sae-nfm reproduce", "one seed"),
    ("make demo-smollm2", "SmolLM2: four SAEs, a prompt, the page; fetching it included"),
    ("make lint", "ruff, import contracts, pyright"),
    ("make test", "the tests"),
    ("make tutorials", "eight notebooks"),
    ("make docs", "the site"),
    ("make test-slow", "the heavier checks"),
)
HEAD = """\
# Times

How long commands take, the start of Python and its imports included: wall seconds, and CPU seconds of all cores. Every
command with its defaults on the embedded model, offline, by itself on the machine. What is not in the table was not measured.
Other pages and the help texts state no times, but for the CPU minutes of `make demo-smollm2`; `make times` measures these
anew.

| command | what it does | wall (s) | CPU (s) |
|---|---|---|---|
"""


def measure(line: str, folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a command that has to succeed."""
    words = shlex.split(line)
    if words[0] == "sae-nfm":
        words[0] = str(Path(sys.executable).parent / "sae-nfm")
    used, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, cwd=ROOT if words[0] == "make" else folder, check=True, stdout=subprocess.DEVNULL)
    wall, now = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def row(line: str, told: str, wall: float, cpu: float) -> str:
    """A line of the table; two digits where they say something."""
    seconds = (f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in (wall, cpu))
    return f"| `{line}` | {told} | {' | '.join(seconds)} |"


def machine() -> str:
    """What the times hold for."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name, flags = found[1] if found else platform.processor(), Path("/proc/cpuinfo").read_text()
    level = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    packages = ", ".join(f"{package} {version(package)}" for package in ("sae-nfm", "sae-lens", "torch"))
    return (
        f"{name}, {len(os.sched_getaffinity(0))} virtual cores, {level}; {platform.system()}, Python "
        f"{platform.python_version()}, {packages}; {time.strftime('%Y-%m-%d')}."
    )


def main(words: list[str]) -> None:
    """Measure, and write the page after every command."""
    text = PAGE.read_text() if PAGE.exists() else ""
    rows = dict(re.findall(r"^(\| `(?:[^`]+)`) (.*)$", text, re.MULTILINE))
    with tempfile.TemporaryDirectory() as folder:
        for line, told in COMMANDS:
            if not words or any(word in line for word in words):
                measured = row(line, told, *measure(line, Path(folder)))
                print(measured, flush=True)
                key = f"| `{line}`"
                rows[key] = measured.removeprefix(f"{key} ")
                lines = [f"| `{line}` {rows[f'| `{line}`']}\n" for line, _ in COMMANDS if f"| `{line}`" in rows]
                PAGE.write_text(f"{HEAD}{''.join(lines)}\n{machine()}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
