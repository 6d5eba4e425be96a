"""The job of `sae-nfm compare`: arms at matched width, parameters and FLOPs, over several seeds, with a verdict for each claim.

`compare_once` is its small form for `sae-nfm demo`: one seed, one learning rate, every combination of paths, no verdicts.

    for every k:     sweep the learning rate of each arm (a seed and held-out tokens of its own)
    for every seed:  train all arms on one stream of activations -> sums over held-out documents
    then:            table over seeds, verdicts over seeds and documents

Every step leaves finished files and is not done again: an interrupted comparison goes on, one with more arms, seeds or values of
k trains what is new. In the output folder:

    compare.json                the configuration, which must stay the same
    k<k>/sweep.json             every SAE of the sweep
    k<k>/seed-<seed>/<arm>/     SAELens's files, training.jsonl, trained.json, documents.parquet
    documents.parquet           sums by k, seed, arm and document (`held_out_sums`)
    results.json, rows.csv      everything else

Source: the controls that arXiv 2507.00269 lacks, see `claims`.
"""

import hashlib
import json
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import HookedSAETransformer
from torch import Tensor
from tqdm.auto import tqdm

from sae_nfm import demo
from sae_nfm.common import provenance, whole, write_json
from sae_nfm.common.results import RESULTS_FILENAME, with_kind, without_kind
from sae_nfm.comparison.arms import ArmSizes, training_arms
from sae_nfm.comparison.claims import answers
from sae_nfm.comparison.config import CompareConfig, DemoConfig
from sae_nfm.comparison.lr_sweep import chosen_rates, sweep
from sae_nfm.comparison.results import CompareResult, SweepRow, changes, renamed
from sae_nfm.comparison.table import evaluated, evaluated_once, tidy
from sae_nfm.data import TokenRows, datasets, held_out_rows
from sae_nfm.models import Site, find_site, load_model
from sae_nfm.training import StreamConfig, TrainingArm, read_training_record, record_line, train_arms

ADDED_LATER = ("arms", "k", "seeds", "standard_l1", "gated_l1", "jumprelu_l0", "n_checkpoints", "output")
"""What may change in a comparison that has been begun: there can be more of it."""
SETTINGS_KIND = "compare-settings/1"
RECORD_FILENAME = "training.jsonl"
COUNTED_STEPS = 50
"""Last steps of a demo's training, at least, over which it is counted how often each feature is active."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A configuration with what it names loaded: what the steps of a comparison work with."""

    cfg: CompareConfig
    model: HookedSAETransformer
    site: Site
    train: Any
    held_out: TokenRows
    sweep_held_out: TokenRows

    @classmethod
    def of(cls, cfg: CompareConfig) -> "Prepared":
        """Load model and text.

        Raises:
            ValueError, FileNotFoundError: for a model, hook point, data set or size that does not work.
        """
        model = load_model(cfg.model, cfg.device)
        site = find_site(model, cfg.hook)
        seed = 0 if cfg.shuffle else cfg.seeds[0]
        train, validation = datasets.load_splits(cfg.dataset, cfg.held_out, cfg.model, seed)
        context_size = min(cfg.context_size, model.cfg.n_ctx)
        held_out = held_out_rows(model, validation, context_size, cfg.held_out_tokens)
        swept = held_out
        if cfg.sweeps:
            skipped = held_out.tokens.numel()
            swept = held_out_rows(model, validation, context_size, cfg.sweep_held_out_tokens, skipped)
        cfg = replace(cfg, hook=site.hook_name)
        return cls(cfg=cfg, model=model, site=site, train=train, held_out=held_out, sweep_held_out=swept)

    def arms(self, k: int, tokens: int) -> dict[str, TrainingArm]:
        """The SAEs to train for so many tokens."""
        cfg = self.cfg
        read = max(1, round(cfg.nfm_top_fraction * k))
        sizes = ArmSizes(
            d_in=self.site.d_in,
            d_sae=cfg.d_sae,
            k=k,
            nfm_dim=cfg.nfm_dim,
            nfm_top_k=None if read == k else read,
            nfm_dropout=cfg.nfm_dropout,
            warm_up_steps=self.stream(0, tokens).steps // 20,
            device=cfg.device,
            reshape_activations=self.site.reshape_activations,
        )
        coefficients = {"standard": cfg.standard_l1, "gated": cfg.gated_l1, "jumprelu": cfg.jumprelu_l0}
        return training_arms(cfg.chosen_arms, sizes, coefficients)

    def stream(self, seed: int, tokens: int) -> StreamConfig:
        """The activations of a seed."""
        cfg = self.cfg
        return StreamConfig(
            model_name=cfg.model,
            hook_name=self.site.hook_name,
            dataset=cfg.dataset or demo.MODEL_NAME,
            training_tokens=tokens,
            context_size=self.held_out.tokens.shape[1],
            batch_size=cfg.batch_size,
            seed=seed,
            n_checkpoints=cfg.n_checkpoints,
            device=cfg.device,
        )

    def data(self, seed: int) -> Any:
        """The training data in the order of a seed."""
        return self.train.shuffle(seed=seed) if self.cfg.shuffle else self.train

    def provenance(self, command: str | None) -> dict[str, Any]:
        """What a result of this configuration has to say for itself."""
        return provenance(
            json.loads(json.dumps(asdict(self.cfg) | {"arms": self.cfg.chosen_arms})),
            command=command,
            seeds=list(self.cfg.seeds),
            platform=f"{sys.platform} {platform.machine()}, {torch.get_num_threads()} threads",
            held_out_tokens_sha256=_sha256(self.held_out.tokens),
        )


def compare_once(cfg: DemoConfig, *, command: str | None = None, prepared: Prepared | None = None) -> CompareResult:
    """Train every SAE once, evaluate it with every combination of its paths, write everything to the output folder.

    There are `saes/<arm>`, `training.jsonl` and `results.json` then; SAEs that were there before are replaced. What is trained
    lies in `saes.partial` until all is there.

    Args:
        cfg: what to do.
        command: how to repeat it, for the provenance.
        prepared: `Prepared.of(cfg.comparison())`, where that is there already.

    Raises:
        ValueError, FileNotFoundError: as `Prepared.of`; nothing is written then.
    """
    prepared = prepared or Prepared.of(cfg.comparison())
    k, seed, output = cfg.k, cfg.seed, Path(cfg.output)
    arms = prepared.arms(k, cfg.training_tokens)
    saes, unfinished = output / "saes", output / "saes.partial"
    for folder in output.glob("saes.partial*"):
        shutil.rmtree(folder)
    stream = replace(prepared.stream(seed, cfg.training_tokens), fewest_steps_counted=COUNTED_STEPS)
    train_arms(stream, arms, dict.fromkeys(arms, cfg.lr), prepared.model, prepared.data(seed), unfinished)
    records = {name: read_training_record(unfinished / name / RECORD_FILENAME) for name in arms}
    lines = sorted((line for own in records.values() for line in own), key=lambda line: line["step"])
    for name in arms:
        (unfinished / name / RECORD_FILENAME).unlink()
    with whole(output / RECORD_FILENAME) as partial:
        partial.write_text("".join(map(record_line, lines)))
    shutil.rmtree(saes, ignore_errors=True)
    unfinished.rename(saes)
    rows = evaluated_once(prepared.model, prepared.held_out.tokens, arms, saes, k=k, seed=seed, device=cfg.device)
    result = CompareResult(rows=tuple(rows), changes=changes(rows), provenance=prepared.provenance(command))
    result.save(output / RESULTS_FILENAME)
    return result


def run_compare(cfg: CompareConfig, *, command: str | None = None) -> CompareResult:
    """Sweep, train, evaluate and judge; writes everything to `cfg.output`, and takes from there what is done.

    Args:
        cfg: what to do.
        command: how to repeat it, for the provenance.

    Raises:
        ValueError, FileNotFoundError: for a model, hook point, data set or size that does not work, and for an output folder of
            another configuration; nothing is written then.
    """
    prepared = Prepared.of(cfg)
    cfg, output = prepared.cfg, Path(cfg.output)
    all_arms = {k: prepared.arms(k, cfg.training_tokens) for k in cfg.k}
    _claim_folder(output, prepared)
    swept: list[SweepRow] = []
    rounds = len(cfg.learning_rates) if cfg.sweeps else 0
    total = sum(map(len, all_arms.values())) * (rounds + len(cfg.seeds))
    with tqdm(total=total, desc="Comparing", unit="SAE") as progress:
        for k, arms in all_arms.items():
            rates, rows = _learning_rates(prepared, k, output / f"k{k}")
            swept += rows
            progress.update(rounds * len(arms))
            for seed in cfg.seeds:
                folder, stream = output / f"k{k}" / f"seed-{seed}", prepared.stream(seed, cfg.training_tokens)
                train_arms(stream, arms, rates, prepared.model, prepared.data(seed), folder)
                evaluated(prepared.model, prepared.held_out, arms, folder, cfg.device)
                progress.update(len(arms))
    rows, documents = tidy(output, all_arms, cfg.seeds)
    found, missing = answers(documents, cfg.k, len(cfg.seeds))
    result = CompareResult(
        rows=tuple(rows),
        sweep=tuple(swept),
        answers=tuple(found),
        missing=tuple(missing),
        provenance=prepared.provenance(command),
    )
    with whole(output / "documents.parquet") as partial:
        documents.to_parquet(partial, index=False)
    result.save_rows(output / "rows.csv")
    result.save(output / RESULTS_FILENAME)
    return result


def _learning_rates(prepared: Prepared, k: int, folder: Path) -> tuple[dict[str, float], list[SweepRow]]:
    """The rate of each SAE, and the sweep behind it."""
    cfg = prepared.cfg
    arms = prepared.arms(k, cfg.sweep_tokens)
    if not cfg.sweeps:
        return dict.fromkeys(arms, cfg.learning_rates[0]), []
    stream, held_out = prepared.stream(cfg.sweep_seed, cfg.sweep_tokens), prepared.sweep_held_out.tokens
    order = prepared.data(cfg.sweep_seed)
    rows = sweep(stream, arms, cfg.learning_rates, k, prepared.model, order, held_out, folder)
    rates = chosen_rates(rows, cfg.learning_rates)
    rows = [replace(row, chosen=row.learning_rate == rates[row.family]) for row in rows]
    return {name: rates[arm.family] for name, arm in arms.items()}, rows


def _claim_folder(output: Path, prepared: Prepared) -> None:
    """Write the configuration, or compare it with the one that is there.

    Raises:
        ValueError: for a field that differs, or a folder that holds other things.
    """
    path = output / "compare.json"
    wanted = {name: value for name, value in asdict(prepared.cfg).items() if name not in ADDED_LATER}
    wanted = json.loads(json.dumps(wanted | {"held-out tokens": _sha256(prepared.held_out.tokens)}))
    if not path.exists():
        if output.exists() and (not output.is_dir() or any(p.name != "compare.json.partial" for p in output.iterdir())):
            raise ValueError(f"output is {str(output)!r}, which holds other things; give a new folder")
        write_json(path, with_kind("compare-settings/1", wanted))
        return
    # folders of 0.1.0 have older names, and not what had one value only
    found = {"nfm_top_fraction": 1.0, "shuffle": True} | renamed(
        without_kind(SETTINGS_KIND, json.loads(path.read_text()))
    )
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{name} is {value!r}, and {found.get(name)!r} in the comparison begun in {str(output)!r}; give the same value, "
                "or another output folder"
            )


def _sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()
