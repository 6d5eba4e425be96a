"""Measure what inference through the decoder does to features: the figures of docs/joint-inference.md.

    python docs/measure_features.py synthetic OUTPUT --set identified --stages 1 --lr 5e-3
    python docs/measure_features.py summary OUTPUT
    python docs/measure_features.py effects OUTPUT "RUN/k32/seed-0/joint_nfm staged" --held-out TEXT
    python docs/measure_features.py probing OUTPUT RUN/k32/seed-0/topk ...

`synthetic` trains on activations of known features, and writes one line of `synthetic.jsonl` for each SAE and number of
refinements; lines that are there are not made again. `summary` makes tables of them, and of the decoders of several seeds.
`effects` compares predicted effects with measured ones, and those of one code with those of the other. `probing` needs
sae-probes, which brings its data sets (docs/saebench.md; of xgboost, which it imports, it needs nothing here).
"""

import argparse
import importlib.util
import itertools
import json
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sae_lens import LoggingConfig, SAETrainer, TrainingSAE, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopK
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from sae_nfm import JointNFMTrainingSAEConfig, StagedTopKTrainingSAEConfig
from sae_nfm.analysis import dead_features, feature_directions, firing_scores, matched, mcc
from sae_nfm.architectures import StagedTopKSAE, StagedTopKSAEConfig, random_initialisation
from sae_nfm.attribution import Target, attribute_token, run_prompt
from sae_nfm.data import EASIER, IDENTIFIED, NOT_IDENTIFIED, SyntheticData, held_out_rows, open_dataset
from sae_nfm.interventions import Edit, Splice, splice
from sae_nfm.loading import load_sae
from sae_nfm.models import keeping, load_model

SETS = {"identified": (IDENTIFIED, 12), "not identified": (NOT_IDENTIFIED, 16), "easier": (EASIER, 16)}
"""Truths, and k of the SAEs."""
BATCH, HELD_OUT, HELD_OUT_SEED = 1024, 20_000, 10_000
REFINEMENTS = (0, 5)
CONTEXT = 32
"""Tokens of a prompt; effects are those on the prediction at its last."""
PROBE_TEXTS, PROBE_TOKENS, FEWEST_OF_A_CLASS = 1200, 64, 150
"""Texts drawn of a data set, their last tokens, and how many of each class have to be among them."""
DENSE_AUC = 0.8
"""What a probe of all activations has to reach for a data set to count."""


def synthetic(arguments: argparse.Namespace) -> None:
    """Train SAEs on known features and compare what they found; `staged_topk` in one stage is TopK."""
    (config, k), file = SETS[arguments.set], arguments.output / "synthetic.jsonl"
    data, steps = SyntheticData.of(config), arguments.samples // BATCH
    x, acts = data.sample(HELD_OUT, HELD_OUT_SEED)
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for name, stages, seed in itertools.product(arguments.arms, arguments.stages, arguments.seeds):
        line = {"set": arguments.set, "arm": name, "stages": stages or k, "seed": seed, "lr": arguments.lr}
        line |= {"samples": arguments.samples, "d_sae": arguments.d_sae, "rescaled": arguments.rescaled}
        if any(line.items() <= one.items() for one in done):
            continue
        own: dict[str, Any] = {"d_in": config.d_in, "d_sae": arguments.d_sae, "k": k, "selection_stages": stages or k}
        own["rescale_acts_by_decoder_norm"] = arguments.rescaled
        cfg = StagedTopKTrainingSAEConfig(**own) if name == "staged_topk" else JointNFMTrainingSAEConfig(**own)
        start = time.process_time()
        sae = trained(cfg, seed, (batch.x for batch in data.batches(BATCH, seed)), steps, arguments.lr)
        line["seconds"] = round(time.process_time() - start, 1)
        directions = feature_directions(sae)
        torch.save(directions, arguments.output / _decoder(line))
        line |= {"parameters": sum(weights.numel() for weights in sae.parameters())}
        matching = matched(directions, data.directions)
        line |= {"mcc": mcc(directions, data.directions), "cosine": matching.mean_cosine}
        for sae.cfg.refinement_steps in REFINEMENTS:
            code, error = _code(sae, x)
            firing = firing_scores(code, acts, matching)
            scores = {name: float(getattr(firing, name).mean()) for name in ("f1", "precision", "recall")}
            scores |= {"refinements": sae.cfg.refinement_steps, "fvu": error / float((x - x.mean(0)).square().sum())}
            scores |= {"l0": float((code > 0).sum() / len(x)), "dead": int(dead_features(code).sum())}
            with file.open("a") as out:
                out.write(json.dumps(line | scores) + "\n")
            print(line | scores, flush=True)


def trained(
    cfg: TrainingSAEConfig,
    seed: int,
    batches: Iterator[Tensor],
    steps: int,
    lr: float,
    start: TrainingSAE[Any] | None = None,
) -> TrainingSAE[Any]:
    """SAELens's trainer, the rate warmed up over a twentieth of the steps and decayed over the last fifth, as in `compare`."""
    trainer_cfg = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=steps * BATCH,
        device="cpu",
        autocast=False,
        lr=lr,
        lr_end=lr / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=steps // 20,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=steps // 5,
        n_restart_cycles=1,
        train_batch_size_samples=BATCH,
        dead_feature_window=max(20, steps // 4),
        feature_sampling_window=steps // 2 + 1,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=10,
    )
    return SAETrainer(trainer_cfg, start or random_initialisation(cfg, seed), batches).fit().eval()


def _decoder(line: dict[str, Any]) -> str:
    names = ("set", "arm", "stages", "seed", "lr", "samples", "d_sae", "rescaled")
    return "_".join(str(line[name]) for name in names) + ".pt"


@torch.no_grad()
def _code(sae: Any, x: Tensor) -> tuple[Tensor, float]:
    """Activations, and the squared error in all."""
    parts = [(part, sae.encode(part)) for part in x.split(4096)]
    return torch.cat([code for _, code in parts]), float(sum((sae.decode(c) - p).square().sum() for p, c in parts))


def summary(arguments: argparse.Namespace) -> None:
    """Means (standard deviations) over seeds, and the stability of their decoders."""
    lines = pd.read_json(arguments.output / "synthetic.jsonl", lines=True)
    keys, columns = ["set", "arm", "stages", "lr", "samples"], ["fvu", "f1", "mcc", "cosine", "dead", "l0"]
    for key, group in lines.groupby([*keys, "refinements"]):
        seeds = group.sort_values("seed").to_dict("records")
        decoders = [torch.load(arguments.output / _decoder(line)) for line in seeds]
        stable = [mcc(one, other) for one, other in itertools.combinations(decoders, 2)]
        told = [f"{group[name].mean():.3f} ({group[name].std():.3f})" for name in columns]
        print(*key, len(seeds), *told, f"{np.mean(stable):.3f}" if stable else "-", sep=" | ")


def effects(arguments: argparse.Namespace) -> None:
    """Effects of pairs and features on the likeliest token's logit at the end of prompts: predicted, measured, by both codes."""
    for folder in arguments.saes:
        sae = load_sae(folder).eval()
        model = load_model(sae.cfg.metadata.model_name)
        rows = held_out_rows(model, _held_out(arguments), CONTEXT, arguments.prompts * CONTEXT).tokens
        pairs, features = list[dict[str, Any]](), list[dict[str, Any]]()
        for prompt, tokens in enumerate(rows):
            sae.cfg.refinement_steps = 0
            with torch.no_grad(), splice(model, sae):
                logits = model(tokens[None])[0, -1]
            target = Target.logit(int(logits.argmax()), len(logits), "the likeliest token")
            for sae.cfg.refinement_steps in REFINEMENTS:
                told = {"prompt": prompt, "refinements": sae.cfg.refinement_steps}
                if getattr(sae.cfg, "head", "none") == "fm":
                    found = attribute_token(model, sae, run_prompt(model, sae, tokens), CONTEXT - 1, target, top=8)
                    pairs += [
                        told
                        | {"pair": (p.first, p.second), "predicted": p.written.gradient, "measured": p.frozen}
                        | {"free": p.free, "off": p.prediction_error}
                        for p in found.pairs
                    ]
                features += [told | one for one in _ablations(model, sae, tokens, target)]
        for kind, table in (("pairs", pd.DataFrame(pairs)), ("features", pd.DataFrame(features))):
            if len(table):
                table.to_json(arguments.output / f"effects-{Path(folder).name}-{kind}.json", orient="records")
                _say(f"{folder} {kind}", table, ["prompt", "pair" if kind == "pairs" else "feature"])


def _held_out(arguments: argparse.Namespace) -> Any:
    return open_dataset(arguments.held_out, split="validation")


def _ablations(model: Any, sae: Any, tokens: Tensor, target: Target) -> Iterator[dict[str, Any]]:
    """Each active feature of the last token set to 0, all others held: to first order in the SAE's output, and for real."""
    seen = dict[str, Tensor]()

    def code(value: Tensor, hook: Any) -> None:  # noqa: ARG001
        seen["code"] = value.detach()[0, -1]

    def output(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        seen["output"] = value.detach().requires_grad_()
        return seen["output"]

    hooks = {"hook_sae_acts_post": code, "hook_sae_output": output}
    with torch.enable_grad(), splice(model, sae) as found, found.hooks(hooks):
        base = target.of(model(tokens[None])[0, -1].double())
        (gradient,) = torch.autograd.grad(base, [seen["output"]])
    with torch.no_grad():
        for feature in seen["code"].nonzero()[:, 0].tolist():
            ablated = seen["code"].clone()
            ablated[feature] = 0
            change = sae.decode(seen["code"][None]) - sae.decode(ablated[None])
            edit = Edit(at="hook_sae_acts_post", index=feature, mode="clamp", value=0.0, where=(-1,))
            output_hook = (f"{sae.cfg.metadata.hook_name}.hook_sae_output", keeping(seen, "edited"))
            with Splice(sae=sae, edits=(edit,)).on(model), model.hooks(fwd_hooks=[output_hook]):
                measured = base - target.of(model(tokens[None])[0, -1].double())
            off = (seen["output"] - seen["edited"])[0, -1] - change[0]
            yield {
                "feature": feature,
                "predicted": float((change[0] * gradient[0, -1]).sum()),
                "measured": float(measured),
                "off": float(off.norm() / change.norm()),
            }


def _say(title: str, table: pd.DataFrame, keys: list[str]) -> None:
    print(title)
    for refinements, own in table.groupby("refinements"):
        same = (own["predicted"] * own["measured"] > 0).mean()
        print(f"  R = {refinements}: {len(own)} effects, mean |measured| {own['measured'].abs().mean():.4g}", end=", ")
        rank, linear = (test(own["predicted"], own["measured"])[0] for test in (spearmanr, pearsonr))
        print(f"predicted and measured: rank {rank:.4f}, r {linear:.4f}, same sign {same:.4f}")
        print(f"    what is written is off by a part of {own['off'].max():.2g} at most", end="")
        flips = (
            f"; free gates flip the sign of {(own['free'] * own['measured'] < 0).mean():.4f}" if "free" in own else ""
        )
        print(flips)
    plain, refined = (table[table["refinements"] == count].set_index(keys)["measured"] for count in REFINEMENTS)
    both = pd.concat([plain, refined], axis=1, keys=["plain", "refined"], join="inner")
    r = pearsonr(both["plain"], both["refined"])[0]
    print(f"  of {len(plain)} effects of the plain code {len(both)} have a counterpart, r {r:.4f}")
    flips, size = both["plain"] * both["refined"] < 0, both["plain"].abs()
    strong = size >= size.groupby(level=0).transform(lambda one: one.nlargest(5).min())
    share = float(size[flips].sum() / size.sum())
    print(f"  signs flipped: {flips.mean():.4f} of all, {flips[strong].mean():.4f} of the five strongest of a prompt")
    print(f"  their part of the summed size {share:.4f}", end="; ")
    first = both.abs().groupby(level=0).idxmax()
    print(f"prompts whose strongest is another: {(first['plain'] != first['refined']).mean():.4f}")


def probing(arguments: argparse.Namespace) -> None:
    """sae-probes's data sets, splits and probes on the strongest features, on a part of its texts; whose dense probe is good."""
    if importlib.util.find_spec("xgboost") is None:  # imported for a baseline that is not run here
        sys.modules["xgboost"] = types.ModuleType("xgboost")
    from sae_probes import DATASETS  # pyright: ignore[reportMissingImports]
    from sae_probes import generate_model_activations as model_activations  # pyright: ignore[reportMissingImports]
    from sae_probes import utils_data as data  # pyright: ignore[reportMissingImports]
    from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization  # pyright: ignore[reportMissingImports]
    from sae_probes.utils_training import find_best_reg  # pyright: ignore[reportMissingImports]

    saes = {folder: _refinable(load_sae(folder).eval()) for folder in arguments.saes}
    metadata = next(iter(saes.values())).cfg.metadata
    model, lines = load_model(metadata.model_name), list[dict[str, Any]]()
    for dataset in DATASETS[arguments.first :: arguments.every]:
        texts, y = data.read_numbered_dataset_df(dataset)["prompt"], data.get_yvals(dataset)
        drawn = np.random.default_rng(42).permutation(len(y))[:PROBE_TEXTS]
        count = min(int((y[drawn] == label).sum()) for label in (0, 1))  # of each class
        if count < FEWEST_OF_A_CLASS:
            print(dataset, f"left out: {count} texts of a class", flush=True)
            continue
        train, test = data.get_train_test_indices(y[drawn], 2 * (count * 3 // 4), 2 * (count // 4))
        read = texts.iloc[drawn].tolist(), 32, min(PROBE_TOKENS, model.cfg.n_ctx), [metadata.hook_name], None, "cpu"
        x = model_activations._process_activations(model, *read)[metadata.hook_name].float()
        y_train, y_test = y[drawn][train], y[drawn][test]
        dense = _dense_auc(x[train].numpy(), y_train, x[test].numpy(), y_test)
        print(dataset, f"{len(train)} texts, dense {dense:.3f}", flush=True)
        if dense < DENSE_AUC:
            continue
        for folder, sae in saes.items():
            for sae.cfg.refinement_steps in REFINEMENTS:
                code, _ = _code(sae, x)
                order = get_sorted_indices(code[train], torch.as_tensor(y_train), mean_act_normalization)
                for k in (1, 2, 5, 16):
                    parts = (code[train][:, order[:k]], y_train, code[test][:, order[:k]], y_test)
                    line = {"dataset": dataset, "dense": dense, "sae": folder, "refinements": sae.cfg.refinement_steps}
                    lines.append(line | {"features": k, "auc": find_best_reg(*parts, seed=42).metrics.test_auc})
        pd.DataFrame(lines).to_json(arguments.output / "probing.json", orient="records")
    table = pd.DataFrame(lines)
    print(f"{table['dataset'].nunique()} data sets, dense {table.groupby('dataset')['dense'].first().mean():.4f}")
    print(table.pivot_table(index=["sae", "refinements"], columns="features", values="auc").round(4))


def _dense_auc(train: Any, y_train: Any, test: Any, y_test: Any) -> float:
    """Of a logistic regression on standardised activations, its penalty chosen on a fifth of the training texts."""

    def fitted(x: Any, y: Any, penalty: float) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=200)).fit(x, y)

    own, rest = (slice(len(train) // 5, None), slice(len(train) // 5))
    scores = {c: fitted(train[own], y_train[own], c).decision_function(train[rest]) for c in (1e-4, 1e-3, 1e-2, 1e-1)}
    best = max(scores, key=lambda c: roc_auc_score(y_train[rest], scores[c]))
    return float(roc_auc_score(y_test, fitted(train, y_train, best).decision_function(test)))


def _refinable(sae: Any) -> Any:
    """SAELens's TopK as the same SAE that can refine."""
    if sae.cfg.architecture() != "topk":
        return sae
    assert isinstance(sae.activation_fn, TopK)
    own = {"architecture": "staged_topk", "selection_stages": 1, "refinement_steps": 0}
    made = StagedTopKSAE(StagedTopKSAEConfig.from_dict(sae.cfg.to_dict() | own))
    made.load_state_dict(sae.state_dict(), strict=False)
    return made.eval()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    made = {job.__name__: commands.add_parser(job.__name__) for job in (synthetic, summary, effects, probing)}
    for name, one in made.items():
        one.set_defaults(run=globals()[name])
        one.add_argument("output", type=Path)
    one = made["synthetic"]
    one.add_argument("--set", choices=SETS, default="identified")
    one.add_argument("--arms", nargs="+", default=["staged_topk"], choices=["staged_topk", "joint_nfm"])
    one.add_argument("--stages", nargs="+", type=int, default=[1], help="0: as many as k")
    one.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    one.add_argument("--samples", type=int, default=750_000)
    one.add_argument("--d-sae", type=int, default=1024)
    one.add_argument("--lr", type=float, default=5e-3)
    one.add_argument("--rescaled", action="store_true")
    for name in ("effects", "probing"):
        made[name].add_argument("saes", nargs="+")
    made["effects"].add_argument("--held-out", required=True)
    made["effects"].add_argument("--prompts", type=int, default=40)
    made["probing"].add_argument("--first", type=int, default=0, help="number of the first data set")
    made["probing"].add_argument("--every", type=int, default=3, help="each how many-th of the 113 data sets")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
