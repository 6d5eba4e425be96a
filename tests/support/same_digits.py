"""Do two versions of the code give the same digits? Three commands, small, run under each and compared number by number.

    python tests/support/same_digits.py save OLD        under the one version (about a minute on one core)
    python tests/support/same_digits.py save NEW        under the other
    python tests/support/same_digits.py compare OLD NEW

Both runs have to be on one machine: processors differ in the last digits. `save` calls `python -m sae_nfm` with the interpreter
it runs under; PYTHONPATH chooses another checkout. It leaves FOLDER/<command>, and what was printed in FOLDER/<command>.txt.

`compare` looks for every old number among the new ones of that command, wherever it now stands, so that file names, keys and
tables may change:

    weights     each *.safetensors: one with the same tensors (names, types, shapes, bytes)
    results     each finite float in *.json and *.json.gz, timings and what was asked for left out
    training    each number in training.jsonl, timings left out
    printed     each number, as it is printed; timings, paths and notes ("* ...") left out

It prints counts and what is missing, and exits with 1 if anything is.
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

COMMANDS = {
    "demo": "--training-tokens 4096 --validation-tokens 512 --context-size 32 --d-sae 96 --k 8 --nfm-dim 4 --batch-size 128 "
    "--nfm-top-fraction 1",
    "compare": "--arms all --seeds 0 1 --learning-rates 5e-3 1e-2 --training-tokens 2048 --validation-tokens 384 "
    "--context-size 32 --d-sae 96 --k 16 --nfm-dim 4 --batch-size 128 --sweep-tokens 512 --sweep-validation-tokens 128 "
    "--standard-l1 0.01 2",
    "reproduce": "--d-sae 64 --k 8 --nfm-dim 8 --context-size 32 --training-tokens 4096 --validation-tokens 192 "
    "--fit-tokens 512 --n-permutations 19 --sentences 4 --lr 4e-3 --seed 1",
}
"""The options of each command. In `demo` the NFM reads all features, so that there is a canonical gauge."""
SETTINGS = ("cfg.json", "runner_cfg.json")
"""SAELens's files of settings."""
NO_DIGITS = re.compile(
    r"(.*_)?(seconds?|created|date|versions?|command|path|platform|provenance|config|settings)", re.IGNORECASE
)
"""Keys of timings and settings."""
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?")
TIMINGS = "train tok/s"
"""Heading of the last column of a printed table."""
SHOWN = 20
"""How many missing numbers are listed for each command and kind."""
Named = Iterator[tuple[str, Any]]


def save(folder: Path) -> None:
    """Run the commands into a new folder."""
    folder.mkdir(parents=True)
    for command, options in COMMANDS.items():
        start = time.perf_counter()
        argv = [sys.executable, "-m", "sae_nfm", command, *options.split(), "--device", "cpu"]
        done = subprocess.run(
            [*argv, "--output", str(folder / command)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        (folder / f"{command}.txt").write_text(done.stdout, encoding="utf-8")
        print(f"{command}: {time.perf_counter() - start:.0f} s", flush=True)


def compare(old: Path, new: Path) -> int:
    """Print what is missing in `new`; returns how much."""
    total = 0
    for command in COMMANDS:
        for kind, numbers in {"weights": weights, "results": results, "training": training, "printed": printed}.items():
            before = list(numbers(old, command, timings=False))
            if not before:
                raise SystemExit(f"{old} has no {kind} of {command}; make it with `save`")
            there = {value for _, value in numbers(new, command, timings=True)}
            missing = [f"{where} = {value}" for where, value in before if value not in there]
            distinct = len({value for _, value in before})
            print(f"{command:<10} {kind:<9} {len(before):>7,} ({distinct:,} distinct), {len(missing):,} missing")
            for line in missing[:SHOWN]:
                print(f"    {line}")
            total += len(missing)
    print("the same digits" if not total else f"{total:,} missing in {new}")
    return total


def weights(folder: Path, command: str, *, timings: bool) -> Named:
    """The digest of the tensors in each file."""
    for path in sorted((folder / command).rglob("*.safetensors")):
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(path).items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode() + tensor.tobytes())
        yield str(path.relative_to(folder)), digest.hexdigest()


def results(folder: Path, command: str, *, timings: bool) -> Named:
    """The floats in JSON; with `timings` whole numbers too, and under all keys."""
    for path in sorted((folder / command).rglob("*.json*")):
        if path.name not in SETTINGS and path.name.endswith((".json", ".json.gz")):
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            for where, value in leaves(json.loads(content), f"{path.relative_to(folder)}: ", timings=timings):
                if timings or isinstance(value, float):
                    yield where, float(value)


def training(folder: Path, command: str, *, timings: bool) -> Named:
    """The numbers in training records."""
    for path in sorted((folder / command).rglob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            where = f"{path.relative_to(folder)}:{number} "
            yield from ((name, float(value)) for name, value in leaves(json.loads(line), where, timings=timings))


def leaves(content: Any, where: str, *, timings: bool) -> Named:
    """The finite numbers in JSON, each with the keys that lead to it."""
    if isinstance(content, dict):
        for key, value in content.items():
            if timings or not NO_DIGITS.fullmatch(key):
                yield from leaves(value, f"{where}.{key}", timings=timings)
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from leaves(value, f"{where}[{index}]", timings=timings)
    elif isinstance(content, int | float) and not isinstance(content, bool) and math.isfinite(content):
        yield where, content


def printed(folder: Path, command: str, *, timings: bool) -> Named:
    """The numbers in what was printed, without signs of + and commas; with `timings` all of them."""
    path, end = folder / f"{command}.txt", None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else (), 1):
        if TIMINGS in line or not line.strip():
            end = line.index(TIMINGS) if line.strip() else None
        if timings or not line.startswith("* "):
            shown = line if timings else re.sub(r"\S*/\S*", " ", line[:end])
            for found in NUMBER.findall(shown):
                yield f"{path.name}:{number} {line.strip()[:60]!r}", found.replace(",", "").removeprefix("+")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("save", help="run the commands into a new folder").add_argument("folder", type=Path)
    comparing = commands.add_parser("compare", help="look for the old numbers among the new ones")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    given = parser.parse_args()
    if given.command == "save":
        save(given.folder)
    else:
        sys.exit(compare(given.old, given.new) > 0)


if __name__ == "__main__":
    main()
