"""`kill -9` before a write event of each command that writes a folder, and what the next run of it makes of the rest."""

import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from damage import damaged, outcome
from kills import forked
from safetensors.torch import load_file
from torch import equal

from sae_nfm.cli.jobs import run_demo
from sae_nfm.common import differences, files, is_finished, read_json, read_parquet
from sae_nfm.common.results import SavedResult
from sae_nfm.comparison import CompareConfig, DemoConfig, run_compare
from sae_nfm.comparison.results import CompareResult
from sae_nfm.experiments.dynamics.results import DynamicsResult
from sae_nfm.experiments.dynamics.run import DynamicsConfig, run_dynamics
from sae_nfm.experiments.factorial.results import FactorialResult
from sae_nfm.experiments.factorial.run import FactorialConfig, run_factorial
from sae_nfm.experiments.reproduce.results import ReproduceResult
from sae_nfm.experiments.reproduce.run import ReproduceConfig, run_reproduce
from sae_nfm.experiments.secondary.results import SecondaryResult
from sae_nfm.experiments.secondary.run import SecondaryConfig, run_secondary
from sae_nfm.explorer.results import Explorer
from sae_nfm.loading import digest, load_sae
from sae_nfm.training import read_training_record
from sae_nfm_cli import main

pytestmark = pytest.mark.slow
EVERY = int(os.environ.get("EVERY_NTH_WRITE", "41"))
"""Which write events to kill before: an odd number, for every second is over an older run; 1 takes an hour for some commands."""
SIZES: dict[str, Any] = {
    "training_tokens": 512,
    "held_out_tokens": 192,
    "context_size": 32,
    "d_sae": 48,
    "nfm_dim": 4,
    "batch_size": 128,
}
TRAIN = [
    "train",
    *["--d_sae", "48", "--nfm_dim", "4", "--k", "4", "--context_size", "32", "--training_tokens", "768"],
    *["--train_batch_size_tokens", "128", "--store_batch_size_prompts", "4", "--n_batches_in_buffer", "16"],
    *["--n_checkpoints", "2", "--record_every", "1"],
]


def train(output: Path) -> None:
    os.chdir(output.parent)
    checkpoints = ["--checkpoint_path", str(output.parent / "checkpoints"), "--wandb_id", "mine"]
    assert main([*TRAIN, *checkpoints, "--output_path", str(output)]) == 0


def demo(output: Path) -> None:
    run_demo(DemoConfig(**SIZES, k=4, output=str(output)))


def compare(output: Path) -> None:
    arms = ("joint_nfm", "topk")
    run_compare(
        CompareConfig(
            **SIZES,
            k=(4,),
            arms=arms,
            seeds=(0,),
            learning_rates=(5e-3, 1e-2),
            sweep_tokens=256,
            sweep_held_out_tokens=64,
            output=str(output),
        )
    )


def secondary(output: Path) -> None:
    sizes = {name: SIZES[name] for name in ("training_tokens", "held_out_tokens", "context_size", "batch_size")}
    run_secondary(
        SecondaryConfig(**sizes, primary=str(given("sae")), expansion=2, k=(2,), fit_tokens=64, output=str(output))
    )


def factorial(output: Path) -> None:
    run_factorial(
        FactorialConfig(
            sae=str(given("sae")),
            clamps=(4.0,),
            absolute=(),
            min_stimuli=2,
            max_pairs=40,
            n_permutations=9,
            output=str(output),
        )
    )


def dynamics(output: Path) -> None:
    run_dynamics(
        DynamicsConfig(checkpoints=str(given("checkpoints")), held_out_tokens=512, n_permutations=9, output=str(output))
    )


def reproduce(output: Path) -> None:
    sizes = SIZES | {"training_tokens": 256}
    run_reproduce(ReproduceConfig(**sizes, k=4, fit_tokens=256, n_permutations=9, sentences=0, output=str(output)))


RUNS: Mapping[str, Callable[[Path], None]] = {
    run.__name__: run for run in (train, demo, compare, secondary, factorial, dynamics, reproduce)
}
_given: dict[str, Path] = {}


def given(name: str) -> Path:
    return _given[name]


@pytest.fixture(scope="module", autouse=True)
def trained(tmp_path_factory: pytest.TempPathFactory, once: Callable[..., Path]) -> None:
    """What the commands after training work on."""

    def make(folder: Path) -> None:
        folder.mkdir()
        status, _ = forked(lambda: train(folder / "sae"), folder)
        assert status == 0

    folder = once("killed", make)
    _given.update(sae=folder / "sae", checkpoints=folder / "checkpoints")


RESULTS: Mapping[str, type[SavedResult]] = {
    "demo": CompareResult,
    "compare": CompareResult,
    "secondary": SecondaryResult,
    "factorial": FactorialResult,
    "dynamics": DynamicsResult,
    "reproduce": ReproduceResult,
}


def told(name: str, output: Path) -> str:
    """What a finished run says, without what times, folders and versions of it say."""
    if name == "train":
        lines = read_training_record(output / "training.jsonl")
        return repr([{key: value for key, value in line.items() if key != "seconds"} for line in lines])
    result = RESULTS[name].load(output / "results.json")
    rows = result.table() if isinstance(result, CompareResult) else getattr(result, "rows", None) or result
    return repr(rows) if name in ("demo", "compare") else repr(rows).partition("provenance=")[0]


def same_weights(one: Path, other: Path) -> bool:
    files = sorted(path.relative_to(one) for path in one.rglob("sae_weights.safetensors"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("sae_weights.safetensors"))
    for file in files:
        mine, theirs = load_file(one / file), load_file(other / file)
        if not all(equal(mine[tensor], theirs[tensor]) for tensor in mine):
            return False
    return True


@pytest.mark.parametrize("name", RUNS)
def test_killed_before_any_write_event_and_run_again(name: str, tmp_path: Path) -> None:
    run = RUNS[name]
    root = tmp_path / "whole"
    root.mkdir()
    status, events = forked(lambda: run(root / "out"), root)
    assert status == 0
    assert differences(root / "out") == []
    expected = told(name, root / "out")
    assert events > 10
    for nth in range(1, events + 1, EVERY):
        killed = tmp_path / str(nth)
        over = nth % 2 and name != "reproduce"  # whose SAEs name their base by its place, which a copy has not
        shutil.copytree(root, killed) if over else killed.mkdir()  # over an older run, or none
        output = killed / "out"
        shutil.rmtree(killed / "checkpoints", ignore_errors=True)
        assert forked(lambda output=output: run(output), killed, nth)[0] in (9, 0), nth
        finished = [
            path for path in (output, killed / "out.1", killed / "out.partial") if path.is_dir() and is_finished(path)
        ]
        assert all(differences(path) == [] and told(name, path) == expected for path in finished), nth
        assert finished or not over or name in ("compare", "secondary", "reproduce"), nth  # the older run is somewhere
        if name in ("compare", "secondary") and over:
            assert told(name, output) == expected, nth  # extended in its place
        assert forked(lambda output=output: run(output), killed)[0] == 0, nth
        assert is_finished(output), nth
        assert differences(output) == [], nth
        assert told(name, output) == expected, nth
        assert same_weights(root / "out", output), nth
        left = [path.name for path in killed.rglob("*") if path.name.endswith((".partial", ".lock"))]
        assert [one for one in left if "checkpoints" not in one and not one[0].isdigit()] == [], (nth, left)
        shutil.rmtree(killed)


def readers(path: Path) -> Callable[[], object] | None:
    """What reads a file of a run."""
    match path.name:
        case "sae_weights.safetensors" | "cfg.json":
            return lambda: digest(load_sae(str(path.parent)).state_dict())
        case "results.json":
            return lambda: _result(path)
        case "training.jsonl":
            return lambda: read_training_record(path)
        case "explorer.json.gz":
            return lambda: Explorer.load(path).provenance
        case files.DIGESTS_FILENAME:
            return lambda: differences(path.parent)
        case _ if path.suffix == ".json":
            return lambda: read_json(path)
        case _ if path.suffix == ".parquet":
            return lambda: read_parquet(path).to_dict()
        case _:
            return None


def _result(path: Path) -> object:
    kind = read_json(path)["kind"].partition("/")[0]
    return RESULTS[kind].load(path).content()


def test_six_hundred_damaged_files_are_named_or_harmless(tmp_path: Path) -> None:
    for name, run in RUNS.items():
        (tmp_path / name).mkdir()
        assert forked(lambda run=run, name=name: run(tmp_path / name / "out"), tmp_path)[0] == 0
    found = {path: readers(path) for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    known = {path: read for path, read in found.items() if read is not None}
    assert len(known) > 60
    draw = random.Random(1)
    for nth in range(600):
        path = list(known)[nth % len(known)]
        right = f"read {known[path]()!r}"
        said = outcome(path, damaged(path.read_bytes(), draw), known[path])
        assert said in ("named", right), (nth, path, said[:300])


def test_sixty_damaged_files_of_a_checkpoint_are_named_or_harmless(tmp_path: Path) -> None:
    """By going on from it, and comparing what that ends with."""
    shutil.copytree(given("checkpoints"), tmp_path / "checkpoints")
    checkpoint = min(
        (path.parent for path in tmp_path.rglob("runner_cfg.json")),
        key=lambda path: int(path.name.removeprefix("final_")),
    )
    output = tmp_path / "sae"

    def go_on() -> None:
        os.chdir(tmp_path)
        more = ["--checkpoint_path", "None", "--resume_from_checkpoint", str(checkpoint), "--output_path", str(output)]
        os._exit(main([*TRAIN, *more]))

    draw, inside = random.Random(2), sorted(path for path in checkpoint.iterdir() if path.is_file())
    assert len(inside) >= 7
    for nth in range(61):
        path = inside[nth % len(inside)]
        good = path.read_bytes()
        path.write_bytes(damaged(good, draw))
        status, _ = forked(go_on, tmp_path)
        path.write_bytes(good)
        assert status == 2 or (status == 0 and same_weights(given("sae"), output)), (nth, path, status)
        shutil.rmtree(output, ignore_errors=True)
