"""Train the packaged SAE: the main job on the embedded model for longer, then its joint_nfm as package data.

    python docs/embedded_model/train_sae.py

The run itself is `sae-nfm demo` with the settings below: joint_nfm, its variant with the square path, and TopK SAEs of the same
width and of the same parameter count, on one stream of the embedded tokens. joint_nfm is then rounded to half precision and
written with its release (pretrained.yaml) and its card, which has the table of the run.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from safetensors.torch import load_file, save
from whole_folder import written_whole

from sae_nfm import demo
from sae_nfm.comparison import DemoConfig, compare_once
from sae_nfm.comparison.results import CompareResult
from sae_nfm.data import datasets
from sae_nfm.demo.tokens import TOKENS_DIR
from sae_nfm.evaluation.fidelity import Arm, Fidelity, evaluate
from sae_nfm.hub import PACKAGED, CardSAE, PackageSource, Release, model_card, release_entry, write_releases

SAES_DIR = TOKENS_DIR / "sae"
"""The packaged folder of SAEs, one folder for each."""
TRAINED = "joint_nfm"
"""Which SAE of the run is packaged."""


@dataclass(frozen=True, kw_only=True)
class TrainSAEConfig:
    """How to train the packaged SAE, and where everything goes."""

    training_tokens: int = 1_200_000
    """Activations trained on: the embedded tokens about one and a third times over."""
    lr: float = 3e-3
    """Adam's learning rate."""
    seed: int = 0
    """Seed of initialisation and data order."""
    run: Path = Path("runs/demo-sae")
    """Folder of the run: its SAEs in float32, results.json, training.jsonl. A finished run there is used again."""
    output: Path = SAES_DIR
    """Folder for the SAE in half precision and its card; the packaged one unless told otherwise."""
    releases: Path = PACKAGED
    """File for its release; the packaged one unless told otherwise."""


def train_sae(config: TrainSAEConfig) -> CompareResult:
    """Train where no finished run is there, round, and write the SAE, its card and its release."""
    run = DemoConfig(
        training_tokens=config.training_tokens,
        held_out_tokens=102_400,  # all there are
        nfm_top_fraction=1,
        lr=config.lr,
        seed=config.seed,
        output=str(config.run),
    )
    command = "python docs/embedded_model/train_sae.py"
    result = _finished(run) or compare_once(run, command=command)
    folder = config.output / run.hook
    package(config.run / "saes", folder)
    fvu = result.row(TRAINED).fvu
    assert fvu is not None
    entry = release_entry(folder, variance_explained=1 - fvu)
    source = PackageSource(package="sae_nfm", folder="demo/data/sae")
    write_releases(
        [Release(name=demo.MODEL_NAME, model=demo.MODEL_NAME, source=source, saes=(entry,))], config.releases
    )
    card = CardSAE(
        entry=entry,
        row=TRAINED,
        config=json.loads((folder / SAE_CFG_FILENAME).read_text()),
        runner=json.loads((folder / RUNNER_CFG_FILENAME).read_text()),
    )
    with written_whole(config.output) as unfinished:
        (unfinished / "README.md").write_text(model_card(demo.MODEL_NAME, [card], result=result, license="mit"))
    return result


def _finished(run: DemoConfig) -> CompareResult | None:
    results = Path(run.output) / "results.json"
    if not results.is_file():
        return None
    result = CompareResult.load(results)
    found, wanted = result.provenance["config"], asdict(run.comparison())
    names = ("training_tokens", "learning_rates", "seeds")
    if other := [name for name in names if list(np.ravel(found[name])) != list(np.ravel(wanted[name]))]:
        raise ValueError(f"{results} is of a run with another {', '.join(other)}; give another folder with --run")
    return result


def package(saes: Path, folder: Path) -> None:
    """Write SAELens's four files: weights in half precision, which loading takes back to float32, no names of folders.

    Raises:
        ValueError: a weight is not finite in half precision.
    """
    weights = {name: weight.half() for name, weight in load_file(saes / TRAINED / SAE_WEIGHTS_FILENAME).items()}
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise ValueError("a weight is not finite in half precision; expected magnitudes below 65,504")
    shared = saes / RUNNER_CFG_FILENAME  # of 0.1.0: one file for all SAEs
    file = shared if shared.is_file() else saes / TRAINED / RUNNER_CFG_FILENAME
    runner = json.loads(file.read_text()) | {"output_path": None, "checkpoint_path": None}
    config = json.loads((saes / TRAINED / SAE_CFG_FILENAME).read_text())
    with written_whole(folder) as unfinished:
        # written here, because safetensors' own files are readable by their owner alone
        (unfinished / SAE_WEIGHTS_FILENAME).write_bytes(save(weights))
        (unfinished / SPARSITY_FILENAME).write_bytes((saes / TRAINED / SPARSITY_FILENAME).read_bytes())
        (unfinished / SAE_CFG_FILENAME).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        (unfinished / RUNNER_CFG_FILENAME).write_text(json.dumps(runner, indent=1, sort_keys=True) + "\n")


@torch.no_grad()
def effect_of_rounding(config: TrainSAEConfig, hook_name: str) -> dict[str, Fidelity]:
    """Fidelity of the SAE as trained and as packaged, on all held-out tokens."""
    folders = {"float32": config.run / "saes" / TRAINED, "half precision": config.output / hook_name}
    arms = [Arm(name=name, sae=SAE.load_from_disk(folder).eval()) for name, folder in folders.items()]
    model = demo.load_model()
    held_out = datasets.held_out_tokens(model, demo.load_tokens("validation"), model.cfg.n_ctx, 102_400)
    return evaluate(model, held_out, arms)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see `--help`."""
    config = tyro.cli(TrainSAEConfig, args=argv)
    result = train_sae(config)
    print(f"{result.words()}\n")
    for name, fidelity in effect_of_rounding(config, result.provenance["config"]["hook"]).items():
        print(f"{name}: FVU {fidelity.fvu:.5f}, KL {fidelity.kl_nats:.5f}, CE {fidelity.ce_delta_nats:+.5f} nats")
    for file in sorted(config.output.rglob("*")):
        if file.is_file():
            print(f"{file.stat().st_size:>10,} bytes  {file}")


if __name__ == "__main__":
    main()
