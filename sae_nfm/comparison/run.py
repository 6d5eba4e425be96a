"""The job of `sae-nfm compare`: arms at matched width, parameters and FLOPs, over several seeds, with a verdict for each claim.

`compare_once` is its small form for `sae-nfm demo`: one seed, one learning rate, every combination of paths, no verdicts.

    for every k:     sweep the learning rate of each arm (a seed and held-out tokens of its own)
    for every seed:  train all arms on one stream of activations -> sums over held-out documents
    then:            table over seeds, verdicts over seeds and documents

The learning rate of an arm: it is trained at every candidate, for fewer tokens, on a seed that is not among the compared, and
takes the rate with the lowest FVU on text that nothing is reported on. Where a coefficient sets the L0, FVUs are comparable at
one L0 only: they are interpolated at k.

Every step leaves finished files and is not done again: an interrupted comparison goes on, one with more arms, seeds or values of
k trains what is new. In the output folder:

    compare.json                the configuration, which must stay the same
    k<k>/sweep.json             every SAE of the sweep
    k<k>/seed-<seed>/<arm>/     SAELens's files, training.jsonl, trained.json, documents.parquet
    documents.parquet           sums by k, seed, arm and document (`held_out_sums`)
    results.json, rows.csv      everything else

Source: the controls that arXiv 2507.00269 lacks, see `results.CLAIMS`.
"""

import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE, HookedSAETransformer
from torch import Tensor
from tqdm.auto import tqdm

from sae_nfm import demo
from sae_nfm.common import provenance, whole, write_json
from sae_nfm.common.results import RESULTS_FILENAME, with_kind, without_kind
from sae_nfm.comparison.arms import ArmSizes, interpolation_weights, training_arms
from sae_nfm.comparison.config import CompareConfig, DemoConfig
from sae_nfm.comparison.results import CompareResult, SweepRow, answers, changes, renamed
from sae_nfm.comparison.table import evaluated, evaluated_once, tidy
from sae_nfm.data import TokenRows, check_data, datasets, held_out_rows
from sae_nfm.evaluation import Arm, evaluate
from sae_nfm.models import Site, find_site, load_model
from sae_nfm.training import StreamConfig, TrainingArm, read_training_record, record_line, train_arms

ADDED_LATER = ("arms", "k", "seeds", "standard_l1", "gated_l1", "jumprelu_l0", "n_checkpoints", "output")
"""What may change in a comparison that has been begun: there can be more of it."""
SETTINGS_KIND, SWEEP_KIND = "compare-settings/1", "sweep/1"
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
        check_data(model, train, context_size, cfg.dataset)
        held_out = swept = held_out_rows(model, validation, context_size, cfg.held_out_tokens)
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
            **{name: getattr(cfg, name) for name in ("d_sae", "nfm_dim", "nfm_dropout", "device")},
            d_in=self.site.d_in,
            k=k,
            nfm_top_k=None if read == k else read,
            warm_up_steps=self.stream(0, tokens).steps // 20,
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
            seed=seed,
            **{name: getattr(cfg, name) for name in ("batch_size", "n_checkpoints", "device")},
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
    rows = evaluated_once(prepared.model, prepared.held_out, arms, saes, k=k, seed=seed, device=cfg.device)
    result = CompareResult(rows=tuple(rows), changes=changes(rows), provenance=prepared.provenance(command))
    result.save(output / RESULTS_FILENAME)
    return result


def run_compare(cfg: CompareConfig, *, command: str | None = None) -> CompareResult:
    """Sweep, train, evaluate and judge; writes everything to `cfg.output`, and takes from there what is done.

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
                evaluated(prepared.model, prepared.held_out, tuple(arms), folder, cfg.device)
                progress.update(len(arms))
    rows, documents = tidy(output, all_arms, cfg.seeds)
    found, missing = answers(documents, cfg.k, len(cfg.seeds))
    parts: Any = {"rows": rows, "sweep": swept, "answers": found, "missing": missing}
    result = CompareResult(**{k: tuple(v) for k, v in parts.items()}, provenance=prepared.provenance(command))
    with whole(output / "documents.parquet") as partial:
        documents.to_parquet(partial, index=False)
    result.save_rows(output / "rows.csv")
    result.save(output / RESULTS_FILENAME)
    return result


def sweep(
    stream: StreamConfig,
    arms: Mapping[str, TrainingArm],
    candidates: Sequence[float],
    k: int,
    model: HookedSAETransformer,
    dataset: Any,
    held_out: Int[Tensor, "rows pos"],
    folder: Path,
) -> list[SweepRow]:
    """Train and evaluate each arm at each rate that `sweep.json` lacks; a ValueError where one was begun with other settings."""
    path = folder / "sweep.json"
    rows = read_sweep(path) if path.is_file() else []
    for rate in candidates:
        done = {row.arm for row in rows if row.learning_rate == rate}
        left = {name: arm for name, arm in arms.items() if name not in done}
        if not left:
            continue
        trained = folder / f"sweep {rate:g}"
        train_arms(stream, left, dict.fromkeys(left, rate), model, dataset, trained)
        saes = [Arm(name=name, sae=SAE.load_from_disk(trained / name, device=stream.device).eval()) for name in left]
        for name, fidelity in evaluate(model, held_out, saes).items():
            family, l0, fvu = arms[name].family, fidelity.l0, fidelity.fvu
            rows.append(SweepRow(k=k, arm=name, family=family, learning_rate=rate, l0=l0, fvu=fvu))
        write_json(path, with_kind(SWEEP_KIND, {"rows": [asdict(row) for row in rows]}))
        shutil.rmtree(trained)
    return [row for row in rows if row.arm in arms]


def read_sweep(path: Path) -> list[SweepRow]:
    """The rows of a `sweep.json`."""
    content = json.loads(path.read_text())
    rows = content if isinstance(content, list) else without_kind(SWEEP_KIND, content)["rows"]  # a list in 0.1.0
    return [SweepRow(**row) for row in rows]


def chosen_rates(rows: Sequence[SweepRow], candidates: Sequence[float]) -> dict[str, float]:
    """The rate of each family: the lowest FVU; the middle candidate where no rate brought its L0s around k."""
    rates = dict[str, float]()
    for family in dict.fromkeys(row.family for row in rows):
        own = [row for row in rows if row.family == family]
        fvus = {rate: _fvu_at_k([row for row in own if row.learning_rate == rate]) for rate in candidates}
        best = min(fvus, key=lambda rate: fvus[rate])
        rates[family] = best if isfinite(fvus[best]) else sorted(candidates)[len(candidates) // 2]
    return rates


def _fvu_at_k(members: Sequence[SweepRow]) -> float:
    """FVU of an arm at one rate, interpolated at k where it has several SAEs; infinite where that says nothing."""
    weights: list[float] | None = [1.0]
    if len(members) != 1 or members[0].arm != members[0].family:
        weights = interpolation_weights([row.l0 for row in members], members[0].k) if members else None
    if weights is None:
        return inf
    fvu = sum(weight * row.fvu for weight, row in zip(weights, members, strict=True) if weight)
    return fvu if isfinite(fvu) else inf


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
    """Write the configuration, or compare it with the one that is there; a ValueError where the folder holds other things."""
    path = output / "compare.json"
    wanted = {name: value for name, value in asdict(prepared.cfg).items() if name not in ADDED_LATER}
    wanted = json.loads(json.dumps(wanted | {"held-out tokens": _sha256(prepared.held_out.tokens)}))
    if not path.exists():
        if output.exists() and (not output.is_dir() or any(p.name != "compare.json.partial" for p in output.iterdir())):
            raise ValueError(f"output is {str(output)!r}, which holds other things; give a new folder")
        write_json(path, with_kind(SETTINGS_KIND, wanted))
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
