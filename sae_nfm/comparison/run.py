"""The job of `sae-nfm compare`: arms at matched width, parameters and FLOPs, over several seeds, with a verdict for each claim.

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
from sae_nfm.common.results import with_kind
from sae_nfm.comparison.arms import ArmSizes, training_arms
from sae_nfm.comparison.claims import answers
from sae_nfm.comparison.config import CompareConfig
from sae_nfm.comparison.lr_sweep import SweepRow, chosen_rates, sweep
from sae_nfm.comparison.results import CompareResult
from sae_nfm.comparison.rows import evaluated, tidy
from sae_nfm.data import TokenRows, datasets, held_out_rows
from sae_nfm.models import Site, find_site, load_model
from sae_nfm.training import StreamConfig, TrainingArm, train_arms

__all__ = ["CompareConfig", "CompareResult", "run_compare"]

ADDED_LATER = ("arms", "k", "seeds", "standard_l1", "gated_l1", "jumprelu_l0", "n_checkpoints", "output")
"""What may change in a comparison that has been begun: there can be more of it."""


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """What the steps of a comparison work with."""

    cfg: CompareConfig
    model: HookedSAETransformer
    site: Site
    train: Any
    held_out: TokenRows
    sweep_held_out: TokenRows

    def arms(self, k: int, tokens: int) -> dict[str, TrainingArm]:
        """The SAEs to train for so many tokens."""
        cfg = self.cfg
        sizes = ArmSizes(
            d_in=self.site.d_in,
            d_sae=cfg.d_sae,
            k=k,
            nfm_dim=cfg.nfm_dim,
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
            model_name=cfg.model_name,
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
        return self.train.shuffle(seed=seed)


def run_compare(cfg: CompareConfig, *, command: str | None = None) -> CompareResult:
    """Sweep, train, evaluate and judge; writes everything to `cfg.output`, and takes from there what is done.

    Args:
        cfg: what to do.
        command: how to repeat it, for the provenance.

    Raises:
        ValueError, FileNotFoundError: for a model, hook point, data set or size that does not work, and for an output folder of
            another configuration; nothing is written then.
    """
    comparison = _prepared(cfg)
    cfg, output = comparison.cfg, Path(cfg.output)
    all_arms = {k: comparison.arms(k, cfg.training_tokens) for k in cfg.k}
    _claim_folder(output, cfg, comparison)
    swept: list[SweepRow] = []
    rounds = len(cfg.learning_rates) if cfg.sweeps else 0
    total = sum(map(len, all_arms.values())) * (rounds + len(cfg.seeds))
    with tqdm(total=total, desc="Comparing", unit="SAE") as progress:
        for k, arms in all_arms.items():
            rates, rows = _learning_rates(comparison, k, output / f"k{k}")
            swept += rows
            progress.update(rounds * len(arms))
            for seed in cfg.seeds:
                folder, stream = output / f"k{k}" / f"seed-{seed}", comparison.stream(seed, cfg.training_tokens)
                train_arms(stream, arms, rates, comparison.model, comparison.data(seed), folder)
                evaluated(comparison.model, comparison.held_out, arms, folder, cfg.device)
                progress.update(len(arms))
    rows, documents = tidy(output, all_arms, cfg.seeds)
    found, missing = answers(documents, cfg.k, len(cfg.seeds))
    result = CompareResult(
        rows=tuple(rows),
        sweep=tuple(swept),
        answers=tuple(found),
        missing=tuple(missing),
        provenance=_provenance(cfg, comparison, command),
    )
    with whole(output / "documents.parquet") as partial:
        documents.to_parquet(partial, index=False)
    result.save(output / "results.json")
    return result


def _prepared(cfg: CompareConfig) -> _Comparison:
    model = load_model(cfg.model_name, cfg.device)
    site = find_site(model, cfg.hook_name)
    cfg = replace(cfg, hook_name=site.hook_name)
    train, validation = datasets.load_splits(cfg.dataset, cfg.validation, cfg.model_name)
    context_size = min(cfg.context_size, model.cfg.n_ctx)
    held_out = held_out_rows(model, validation, context_size, cfg.validation_tokens)
    skipped = held_out.tokens.numel()
    sweep_held_out = held_out
    if cfg.sweeps:
        sweep_held_out = held_out_rows(model, validation, context_size, cfg.sweep_validation_tokens, skipped)
    return _Comparison(cfg=cfg, model=model, site=site, train=train, held_out=held_out, sweep_held_out=sweep_held_out)


def _learning_rates(comparison: _Comparison, k: int, folder: Path) -> tuple[dict[str, float], list[SweepRow]]:
    """The rate of each SAE, and the sweep behind it."""
    cfg = comparison.cfg
    arms = comparison.arms(k, cfg.sweep_tokens)
    if not cfg.sweeps:
        return dict.fromkeys(arms, cfg.learning_rates[0]), []
    stream, held_out = comparison.stream(cfg.sweep_seed, cfg.sweep_tokens), comparison.sweep_held_out.tokens
    order = comparison.data(cfg.sweep_seed)
    rows = sweep(stream, arms, cfg.learning_rates, k, comparison.model, order, held_out, folder)
    rates = chosen_rates(rows, cfg.learning_rates)
    return {name: rates[arm.family] for name, arm in arms.items()}, rows


def _claim_folder(output: Path, cfg: CompareConfig, comparison: _Comparison) -> None:
    """Write the configuration, or compare it with the one that is there.

    Raises:
        ValueError: for a field that differs, or a folder that holds other things.
    """
    path = output / "compare.json"
    wanted = {name: value for name, value in asdict(cfg).items() if name not in ADDED_LATER}
    wanted = json.loads(json.dumps(wanted | {"held-out tokens": _sha256(comparison.held_out.tokens)}))
    if not path.exists():
        if output.exists() and (not output.is_dir() or any(p.name != "compare.json.partial" for p in output.iterdir())):
            raise ValueError(f"output is {str(output)!r}, which holds other things; give a new folder")
        write_json(path, with_kind("compare-settings/1", wanted))
        return
    found = json.loads(path.read_text())
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{name} is {value!r}, and {found.get(name)!r} in the comparison begun in {str(output)!r}; give it as it was, or "
                "another output folder"
            )


def _sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()


def _provenance(cfg: CompareConfig, comparison: _Comparison, command: str | None) -> dict[str, Any]:
    return provenance(
        json.loads(json.dumps(asdict(cfg) | {"arms": cfg.chosen_arms})),
        command=command,
        seeds=list(cfg.seeds),
        platform=f"{sys.platform} {platform.machine()}, {torch.get_num_threads()} threads",
        held_out_tokens_sha256=_sha256(comparison.held_out.tokens),
    )
