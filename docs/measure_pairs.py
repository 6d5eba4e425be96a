"""Measure where planted pairs are found, and how often linear data is said to have some: the figures of docs/synthetic.md.

    python docs/measure_pairs.py map OUTPUT --slice energy-rate
    python docs/measure_pairs.py map OUTPUT --slice width-samples
    python docs/measure_pairs.py calibration OUTPUT --verdicts 50

`map` trains a staged_topk for each cell of a slice, then from it a joint_nfm with the pairs that it leaves over, and writes
one line of `map.jsonl`. `calibration` plants nothing: each
verdict is of `sae-nfm compare` on other linear data, joint_nfm against the same SAE with the mlp head, five seeds of each.
What is there already is not made again.
"""

import argparse
import itertools
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from measure_features import BATCH, trained
from scipy.stats import binom

from sae_nfm import JointNFMTrainingSAE, JointNFMTrainingSAEConfig, StagedTopKTrainingSAEConfig
from sae_nfm.comparison import CompareConfig, run_compare
from sae_nfm.data import SyntheticConfig, SyntheticData, Truth
from sae_nfm.experiments.pairs import search
from sae_nfm.experiments.synthetic import recovery
from sae_nfm.experiments.synthetic.run import SyntheticRunConfig, run_synthetic
from sae_nfm.stats.seed_document_test import verdict_from_rows

PLANTED = SyntheticConfig(
    d_in=256, features=1024, mean_l0=12, pairs=64, pair_share=0.05, pair_rate=0.01, decoys=64, zipf_exponent=0.5
)
SLICES = {
    "energy-rate": (("pair_share", (0.01, 0.05, 0.2)), ("pair_rate", (0.003, 0.01, 0.03))),
    "width-samples": (("d_sae", (1024, 1536)), ("samples", (250_000, 1_000_000, 2_000_000))),
}
"""Axes of the map and their values; elsewhere it is 5 % of the variance, a rate of 1 %, `--d-sae` and `--samples`."""
HELD_OUT, HELD_OUT_SEED, SEARCHED = 20_000, 10_000, 100_000
LINEAR: dict[str, Any] = {
    "d_in": 64,
    "features": 256,
    "mean_l0": 6.0,
    "pairs": 0,
    "pair_share": 0.0,
    "pair_rate": 0.0,
    "decoys": 0,
}
TESTED = 0.05
"""Size of the test that a verdict is."""


def measure_map(arguments: argparse.Namespace) -> None:
    """Train on every cell of a slice, and score its pairs."""
    file, slice_ = arguments.output / "map.jsonl", SLICES[arguments.slice]
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for values in itertools.product(*(values for _, values in slice_)):
        cell = dict(zip((name for name, _ in slice_), values, strict=True))
        line = {"pair_share": PLANTED.pair_share, "pair_rate": PLANTED.pair_rate}
        line |= {
            name: getattr(arguments, name) for name in ("d_sae", "samples", "k", "stages", "nfm_dim", "lr", "seed")
        } | cell
        if any(line.items() <= one.items() for one in done):
            continue
        line |= _scores(line)
        done.append(line)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")


def _scores(cell: dict[str, Any]) -> dict[str, Any]:
    planted = replace(PLANTED, pair_share=cell["pair_share"], pair_rate=cell["pair_rate"], seed=cell["seed"])
    data, start, seed = SyntheticData.of(planted), time.process_time(), cell["seed"]
    sizes: dict[str, Any] = {"d_in": planted.d_in, "d_sae": cell["d_sae"], "k": cell["k"]}
    sizes |= {"selection_stages": cell["stages"], "rescale_acts_by_decoder_norm": False}
    batches = (batch.x for batch in data.batches(BATCH, seed))
    staged = trained(StagedTopKTrainingSAEConfig(**sizes), seed, batches, cell["samples"] // BATCH, cell["lr"])
    searched = torch.cat([next(batches) for _ in range(SEARCHED // BATCH)])
    found = search(staged, searched, cell["nfm_dim"])
    cfg = JointNFMTrainingSAEConfig(**sizes, head="bilinear", nfm_dim=cell["nfm_dim"], use_linear_path=False)
    joint = JointNFMTrainingSAE(cfg)
    joint.load_state_dict(found.started(staged, seed).state_dict(), strict=False)
    joint = trained(cfg, seed, batches, cell["samples"] // 4 // BATCH, 0.4 * cell["lr"], joint.train())
    seconds = round(time.process_time() - start, 1)
    x, acts = data.sample(HELD_OUT, HELD_OUT_SEED)
    return {"seconds": seconds} | {
        name: _measured(sae, x, Truth.of(data, acts), acts) for name, sae in (("staged", staged), ("pairs", joint))
    }


def _measured(sae: Any, x: torch.Tensor, truth: Truth, acts: torch.Tensor) -> dict[str, Any]:
    found = recovery(sae, x, truth, "sae", acts)
    return {name: getattr(found, name) for name in ("fvu", "f1", "mcc", "interaction_share")} | {
        str(one.score): {"all": one.auroc, "decoys": one.auroc_decoys, "precision": one.precision, "cosine": one.cosine}
        for one in found.pairs
    }


def calibration(arguments: argparse.Namespace) -> None:
    """Compare joint_nfm with its mlp head on data without a product, again and again."""
    lines = list[dict[str, Any]]()
    for number in range(arguments.verdicts):
        folder = arguments.output / f"{number:02d}"
        if not (folder / "results.json").exists():
            samples = folder.with_name(f"{number:02d}-samples")
            run_synthetic(
                SyntheticRunConfig(
                    **LINEAR,
                    seed=number,
                    samples=arguments.samples,
                    held_out_samples=6_400,
                    output=str(samples),
                )
            )
            run_compare(
                CompareConfig(
                    activations=str(samples),
                    arms=("joint_nfm", "joint_nfm mlp"),
                    seeds=(0, 1, 2, 3, 4),
                    k=(8,),
                    d_sae=256,
                    nfm_dim=32,
                    training_tokens=arguments.samples,
                    held_out_tokens=6_400,
                    batch_size=512,
                    learning_rates=(5e-3,),
                    output=str(folder),
                )
            )
            shutil.rmtree(samples)
            for weights in folder.rglob("*.safetensors"):
                weights.unlink()
        rows = pd.read_parquet(folder / "documents.parquet")
        rows = rows.assign(fvu=rows["error_energy"] / rows["variance_energy"])
        found = verdict_from_rows(rows, "fvu", arm="joint_nfm", against="joint_nfm mlp", weight="variance_energy")
        lines.append({"words": found.words, "p": found.difference.p_value, "change": found.relative.estimate})
        table = pd.DataFrame(lines)
        limit = int(binom.ppf(0.99, len(table), TESTED))
        table.to_json(arguments.output / "calibration.json", orient="records", indent=1)
        told = table["words"].value_counts().to_dict()
        print(f"{len(table)} verdicts: {told}; at most {limit} false ones expected of {TESTED:.0%} tests", flush=True)


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("map")
    one.add_argument("output", type=Path)
    one.add_argument("--slice", choices=SLICES, required=True)
    usual = {"d-sae": 1024, "samples": 1_000_000, "k": 16, "stages": 4, "nfm-dim": 96, "seed": 0}
    for name, default in usual.items():
        one.add_argument(f"--{name}", type=int, default=default)
    one.add_argument("--lr", type=float, default=5e-3)
    one.set_defaults(run=measure_map)
    one = commands.add_parser("calibration")
    one.add_argument("output", type=Path)
    one.add_argument("--verdicts", type=int, default=50)
    one.add_argument("--samples", type=int, default=102_400)
    one.set_defaults(run=calibration)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
