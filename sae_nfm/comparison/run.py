"""The job of `sae-nfm compare`: arms at matched width, parameters and FLOPs, over several seeds, with a verdict for each claim.

`compare_once` is its small form for `sae-nfm demo`: one seed, one learning rate, rescaling as sweeps chose it (off for SAEs in
stages, else on), every combination of paths, no verdicts.

    for every k:     sweep the learning rate of each arm, and rescaling (a seed and held-out tokens of its own)
    for every seed:  train all arms on one stream of activations -> sums over held-out documents
    then:            table over seeds, verdicts over seeds and documents

The learning rate of an arm: it is trained at every candidate, for fewer tokens, on a seed that is not among the compared, and
takes the rate with the lowest FVU on text that nothing is reported on; one at which its training diverges has FVU inf. With
`rescaling` both on and off, each rate is tried both ways by those that have the choice, and the best of all is taken. Where a
coefficient sets the L0, FVUs are comparable at one L0 only: they are interpolated at k.

Every step leaves finished files and is not done again: an interrupted comparison goes on from `<output>.partial`, and a finished
one with more arms, seeds or values of k trains what is new in its place, marked as unfinished until the table is of all. In the
output folder:

    compare.json                the configuration, which must stay the same
    k<k>/sweep.json             every SAE of the sweep
    k<k>/seed-<seed>/<arm>/     SAELens's files, training.jsonl, trained.json, documents.parquet, and with R refinements
                                refined-<R>.parquet
    documents.parquet           sums by k, seed, arm and document (`held_out_sums`)
    results.json, rows.csv      everything else

Source: the controls that arXiv 2507.00269 lacks, see `results.CLAIMS`.
"""

import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE, HookedSAETransformer
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor
from tqdm.auto import tqdm

from sae_nfm.common import (
    check_extension,
    check_output,
    provenance,
    publishing,
    read_json,
    remark,
    seal,
    whole,
    write_json,
    write_parquet,
)
from sae_nfm.common.files import sha256_of_file
from sae_nfm.common.options import DEFAULT_HOOK, DEFAULT_HOOKS
from sae_nfm.common.outputs import Publication
from sae_nfm.common.results import RESULTS_FILENAME, with_kind, without_kind
from sae_nfm.comparison.arms import ArmSizes, interpolation_weights, is_rescaled, rescaled, training_arms
from sae_nfm.comparison.config import CompareConfig, DemoConfig
from sae_nfm.comparison.plan import ROWS_TIMED, Step, measured_costs, words
from sae_nfm.comparison.results import STAGED, CompareResult, SweepRow, answers, changes, renamed
from sae_nfm.comparison.table import evaluated, evaluated_once, tidy
from sae_nfm.data import (
    ActivationCache,
    CacheIdentity,
    TokenRows,
    cached_splits,
    check_data,
    datasets,
    held_out_rows,
    rows_and_others,
    told_of_text,
)
from sae_nfm.evaluation import Arm, evaluate
from sae_nfm.models import Site, find_site, load_model
from sae_nfm.training import (
    DivergedError,
    StreamConfig,
    TrainingArm,
    read_training_record,
    record_line,
    refuse_several_processes,
    train_arms,
    trained_tokens,
)

ADDED_LATER = ("arms", "k", "seeds", "standard_l1", "gated_l1", "jumprelu_l0", "refinement_steps", "n_checkpoints")
ADDED_LATER += ("output",)
"""What may change in a comparison that has been begun: there can be more of it."""
SETTINGS_KIND, SWEEP_KIND = "compare-settings/1", "sweep/1"
RECORD_FILENAME = "training.jsonl"
PARTS = ("compare.json", "documents.parquet", "rows.csv", "k*")
"""What lies in the output folder beside the results."""
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
    cache: CacheIdentity | None = None
    """What training reads in place of the model's activations."""

    @classmethod
    def of(cls, cfg: CompareConfig) -> "Prepared":
        """Load model and text.

        Raises:
            ValueError, FileNotFoundError: for a model, hook point, data set or size that does not work.
        """
        refuse_several_processes()
        cache = None if cfg.activations is None else ActivationCache(cfg.activations)
        cfg = cfg if cache is None else of_cache(cfg, cache.identity.named(cache.folder))
        model = load_model(cfg.model, cfg.device)
        assert cfg.hook is not None  # its config, or the cache, has put one there
        site = find_site(model, cfg.hook)
        context_size = min(cfg.context_size, model.cfg.n_ctx)
        if cache is None:
            seed = 0 if cfg.shuffle else cfg.seeds[0]
            train, validation = datasets.load_splits(cfg.dataset, cfg.held_out, cfg.model, seed)
            check_data(model, train, context_size, cfg.dataset)
        else:
            cache.check(model, [site.hook_name], context_size)
            train, validation = cached_splits(cache, cfg.held_out)
        read = (model, validation, context_size, cfg.held_out_tokens)
        if cfg.sweeps:
            held_out, swept = rows_and_others(*read, cfg.sweep_held_out_tokens)
        else:
            held_out = swept = held_out_rows(*read)
        identity = None if cache is None else cache.identity
        made: dict[str, Any] = {"model": model, "site": site, "train": train, "cache": identity}
        return cls(cfg=replace(cfg, hook=site.hook_name), held_out=held_out, sweep_held_out=swept, **made)

    def arms(self, k: int, tokens: int) -> dict[str, TrainingArm]:
        """The SAEs to train for so many tokens."""
        cfg = self.cfg
        read = max(1, round(cfg.nfm_top_fraction * k))
        sizes = ArmSizes(
            **{name: getattr(cfg, name) for name in ("d_sae", "nfm_dim", "nfm_dropout", "device")},
            d_in=self.site.d_in,
            k=k,
            nfm_top_k=None if read == k else read,
            **{name: getattr(cfg, name) for name in ("selection_stages", "selection_candidates", "refinement_steps")},
            warm_up_steps=self.stream(0, tokens).steps // 20,
            reshape_activations=self.site.reshape_activations,
        )
        coefficients = {"standard": cfg.standard_l1, "gated": cfg.gated_l1, "jumprelu": cfg.jumprelu_l0}
        arms = training_arms(cfg.chosen_arms, sizes, coefficients)
        return {name: rescaled(arm, cfg.rescaled[0]) for name, arm in arms.items()}

    def stream(self, seed: int, tokens: int) -> StreamConfig:
        """The activations of a seed."""
        cfg = self.cfg
        return StreamConfig(
            model_name=cfg.model,
            hook_name=self.site.hook_name,
            dataset=cfg.dataset or cfg.model,
            training_tokens=tokens,
            context_size=self.held_out.tokens.shape[1],
            seed=seed,
            **{name: getattr(cfg, name) for name in ("batch_size", "n_checkpoints", "device")},
        )

    def rows(self, seed: int) -> ActivationCache | None:
        """The cache in the order of a seed; None where the model computes activations."""
        if self.cfg.activations is None:
            return None
        return ActivationCache(self.cfg.activations, order_seed=seed if self.cfg.shuffle else None)

    def training(self, seed: int, tokens: int) -> dict[str, Any]:
        """What `train_arms` trains on: stream, model, data in the order of the seed, cache."""
        stream, cache = self.stream(seed, tokens), self.rows(seed)
        if cache is not None:
            stream, dataset = replace(stream, activations=cache.name), cache.dataset()
        else:
            dataset = self.train.shuffle(seed=seed) if self.cfg.shuffle else self.train
        return {"stream": stream, "model": self.model, "dataset": dataset, "cache": cache}

    def read(self, n_rows: int) -> Callable[[], Tensor]:
        """Of so many rows, the activations [rows, pos, ...] as training reads them."""
        hook, cache = self.site.hook_name, self.rows(0)
        if cache is not None:
            tokens = torch.from_numpy(cache.tokens[:n_rows].astype("int64"))
            return lambda: cache.activations(tokens, hook)
        tokens, stop = self.held_out.tokens[:n_rows], extract_stop_at_layer_from_tlens_hook_name(hook)
        return lambda: self.model.run_with_cache(tokens, names_filter=[hook], stop_at_layer=stop, prepend_bos=False)[1][
            hook
        ]

    def settings(self, *left_out: str) -> dict[str, Any]:
        """The configuration as JSON has it, and the held-out tokens, by which a run is known to be the same."""
        settings = {name: value for name, value in asdict(self.cfg).items() if name not in left_out}
        settings |= {"activations": None if self.cache is None else str(self.cache)}
        return json.loads(json.dumps(settings | {"held-out tokens": _sha256(self.held_out.tokens)}))

    def provenance(self, command: str | None, folder: Path, trained: Path) -> dict[str, Any]:
        """What a result of this configuration has to say for itself; the folder has its SAEs, `trained` is one of them."""
        metadata = SAEMetadata(dataset_path=self.cfg.dataset or self.cfg.model, context_size=self.cfg.context_size)
        weights = sorted(folder.rglob(SAE_WEIGHTS_FILENAME))
        return provenance(
            json.loads(json.dumps(asdict(self.cfg) | {"arms": self.cfg.chosen_arms})),
            command=command,
            saes={path.parent.relative_to(folder).as_posix(): sha256_of_file(path) for path in weights},
            text=told_of_text(self.model, self.held_out.tokens, metadata=metadata, folder=trained),
            seeds=list(self.cfg.seeds),
            platform=f"{sys.platform} {platform.machine()}, {torch.get_num_threads()} threads",
            held_out_tokens_sha256=_sha256(self.held_out.tokens),
            **({} if self.cache is None else {"cached_activations": str(self.cache)}),  # pyright: ignore[reportArgumentType]
        )


def of_cache(cfg: CompareConfig, own: CacheIdentity) -> CompareConfig:
    """The configuration with model, hook point, row length and text of a cache; a ValueError, with both values, for others."""
    dataset = None if own.dataset == own.model else own.dataset
    found = {"model": own.model, "dataset": dataset, "context_size": own.context_size}
    for name, value in found.items():
        if (given := getattr(cfg, name)) not in (value, None):
            raise ValueError(
                f"{name} is {given!r}, and {value!r} in the cache {cfg.activations!r}; leave it out, or cache that"
            )
    if own.model_class_name != "HookedTransformer":
        raise ValueError(
            f"the cache {cfg.activations!r} is of a {own.model_class_name}, and a comparison runs a HookedTransformer; cache that"
        )
    hook = cfg.hook
    if hook is None:
        usual = DEFAULT_HOOKS.get(own.model, DEFAULT_HOOK)
        hook = next(iter(own.hooks)) if len(own.hooks) == 1 else usual
        remark(f"of the cache: model {own.model}, {hook}, rows of {own.context_size} tokens")
    return replace(cfg, **found, hook=hook, held_out=cfg.held_out or own.held_out)


def compare_once(
    cfg: DemoConfig, *, command: str | None = None, prepared: Prepared | None = None, folder: Path | None = None
) -> CompareResult:
    """Train every SAE once, evaluate it with every combination of its paths, write everything to the output folder.

    There are `saes/<arm>`, `training.jsonl` and `results.json` then; a run that was there before is kept beside it.

    Args:
        folder: where to write, for one who publishes it together with other files; nothing is published then.

    Raises:
        ValueError, FileNotFoundError: as `Prepared.of`, or for an output that is something else; nothing is written then.
    """
    if folder is None:
        check_output(cfg.output)
    prepared = prepared or Prepared.of(cfg.comparison())
    if folder is None:
        with publishing_demo(prepared, command) as made:
            return _compare_once(cfg, prepared, made.folder, command)
    return _compare_once(cfg, prepared, folder, command)


def publishing_demo(prepared: Prepared, command: str | None) -> AbstractContextManager[Publication]:
    """The output of a demo: what an interrupted one left is kept where it had the same settings and data."""
    settings = prepared.settings("output") | {"data": getattr(prepared.train, "_fingerprint", None)}
    return publishing(prepared.cfg.output, "demo", command=command, settings=settings)


def _compare_once(cfg: DemoConfig, prepared: Prepared, folder: Path, command: str | None) -> CompareResult:
    k, seed, saes = cfg.k, cfg.seed, folder / "saes"
    arms = {name: rescaled(arm, name not in STAGED) for name, arm in prepared.arms(k, cfg.training_tokens).items()}
    on = prepared.training(seed, cfg.training_tokens)
    on["stream"] = replace(on["stream"], fewest_steps_counted=COUNTED_STEPS)
    train_arms(arms=arms, learning_rates=dict.fromkeys(arms, cfg.lr), folder=saes, **on)
    if not (folder / RECORD_FILENAME).is_file():  # else an interrupted run came so far
        lines = [line for name in arms for line in read_training_record(saes / name / RECORD_FILENAME)]
        with whole(folder / RECORD_FILENAME) as partial:
            partial.write_text("".join(map(record_line, sorted(lines, key=lambda line: line["step"]))))
    for name in arms:
        (saes / name / RECORD_FILENAME).unlink(missing_ok=True)
        seal(saes / name)
    steps = cfg.refinement_steps
    rows = evaluated_once(
        prepared.model, prepared.held_out, arms, saes, k=k, seed=seed, device=cfg.device, refinement_steps=steps
    )
    origin = prepared.provenance(command, folder, saes / next(iter(arms)))
    result = CompareResult(rows=tuple(rows), changes=changes(rows), provenance=origin)
    result.save(folder / RESULTS_FILENAME)
    return result


def run_compare(
    cfg: CompareConfig, *, command: str | None = None, prepared: Prepared | None = None, folder: Path | None = None
) -> CompareResult:
    """Sweep, train, evaluate and judge; writes everything to `cfg.output`, and takes from there what is done.

    Args:
        prepared: the configuration, where it has been loaded already.
        folder: where to write, for one who publishes it together with other files.

    Raises:
        ValueError, FileNotFoundError: for a model, hook point, data set or size that does not work, and for an output folder of
            another configuration; nothing is written then.
    """
    if folder is None:
        check_extension(cfg.output, "compare", PARTS)
    prepared = prepared or Prepared.of(cfg)
    prepared.held_out.check_documents()
    if folder is None:
        with publishing(cfg.output, "compare", command=command, extend=PARTS) as made:
            return _run_compare(prepared, made.folder, command)
    return _run_compare(prepared, folder, command)


def _run_compare(prepared: Prepared, output: Path, command: str | None) -> CompareResult:
    cfg = prepared.cfg
    all_arms: dict[int, Mapping[str, TrainingArm]] = {k: prepared.arms(k, cfg.training_tokens) for k in cfg.k}
    _claim_folder(output, prepared)
    _say_plan(prepared, all_arms, output)
    swept: list[SweepRow] = []
    rounds = {k: sum(len(one.arms) for one in _rounds(cfg, arms)) for k, arms in all_arms.items()}
    total = sum(rounds[k] + len(arms) * len(cfg.seeds) for k, arms in all_arms.items())
    with tqdm(total=total, desc="Comparing", unit="SAE") as progress:
        for k in cfg.k:
            arms, rates, rows = _at_their_best(prepared, k, all_arms[k], output / f"k{k}")
            all_arms[k] = arms
            swept += rows
            progress.update(rounds[k])
            for seed in cfg.seeds:
                folder, on = output / f"k{k}" / f"seed-{seed}", prepared.training(seed, cfg.training_tokens)
                try:
                    train_arms(arms=arms, learning_rates=rates, folder=folder, **on)
                except DivergedError as error:
                    remedy = "leave it out with --arms, or give lower --learning-rates and another output folder"
                    raise DivergedError(f"{error}. In {folder}: {remedy}") from None
                evaluated(prepared.model, prepared.held_out, tuple(arms), folder, cfg.device, cfg.refinement_steps)
                progress.update(len(arms))
    rows, documents = tidy(output, all_arms, cfg.seeds, cfg.refinement_steps)
    found, missing = answers(documents, cfg.k, len(cfg.seeds))
    parts: Any = {"rows": rows, "sweep": swept, "answers": found, "missing": missing}
    trained = output / f"k{cfg.k[0]}" / f"seed-{cfg.seeds[0]}" / next(iter(all_arms[cfg.k[0]]))
    origin = prepared.provenance(command, output, trained)
    result = CompareResult(**{k: tuple(v) for k, v in parts.items()}, provenance=origin)
    write_parquet(documents, output / "documents.parquet")
    result.save_rows(output / "rows.csv")
    result.save(output / RESULTS_FILENAME)
    return result


def _say_plan(prepared: Prepared, all_arms: Mapping[int, Mapping[str, TrainingArm]], output: Path) -> None:
    """Say what is left to do and how long it will take, unless there is nothing left."""
    cfg, steps, left = prepared.cfg, list[Step](), dict[str, TrainingArm]()
    evaluated_on = prepared.held_out.tokens.numel()
    for k, arms in all_arms.items():
        folder = output / f"k{k}"
        swept = read_sweep(folder / "sweep.json") if (folder / "sweep.json").is_file() else []
        sizes: dict[str, Any] = {"tokens": cfg.sweep_tokens, "held_out_tokens": cfg.sweep_held_out_tokens}
        todo = [
            (f"rate {one.name}", one.left(swept), sizes | {"done": trained_tokens(folder / f"sweep {one.name}")})
            for one in _rounds(cfg, arms)
        ]
        sizes = {"tokens": cfg.training_tokens, "held_out_tokens": evaluated_on, "refined": cfg.refinement_steps > 0}
        for seed in cfg.seeds:
            own = {name: arm for name, arm in arms.items() if not (folder / f"seed-{seed}" / name).exists()}
            todo.append((f"seed {seed}", own, sizes | {"done": trained_tokens(folder / f"seed-{seed}")}))
        for what, own, sizes in todo:
            own = {f"{name} {k}": arm for name, arm in own.items()}
            sizes["done"] = {f"{name} {k}": tokens for name, tokens in sizes["done"].items()}
            steps.append(Step(what=f"k {k}, {what}", arms=tuple(own), **sizes))
            left |= own
    if left:
        costs = measured_costs(
            left,
            prepared.held_out.tokens[:ROWS_TIMED],
            read=prepared.read(ROWS_TIMED),
            forward=prepared.model,
            batch_size=cfg.batch_size,
            device=cfg.device,
            refinement_steps=cfg.refinement_steps,
        )
        remark(f"the plan:\n{words(steps, costs, cfg.batch_size)}")


@dataclass(frozen=True, kw_only=True)
class Round:
    """Arms that a sweep trains together: all at one rate, with or without rescaling."""

    name: str
    learning_rate: float
    arms: Mapping[str, TrainingArm]

    def left(self, rows: Sequence[SweepRow]) -> dict[str, TrainingArm]:
        """Those that have no row yet."""
        return {name: arm for name, arm in self.arms.items() if not any(self._is_of(row, arm) for row in rows)}

    def _is_of(self, row: SweepRow, arm: TrainingArm) -> bool:
        as_before = row.rescaling is None and is_rescaled(arm) is not False
        return (row.arm, row.learning_rate) == (arm.name, self.learning_rate) and (
            as_before or row.rescaling == is_rescaled(arm)
        )


def rounds_of(arms: Mapping[str, TrainingArm], rates: Sequence[float], rescaling: Sequence[bool]) -> Iterator[Round]:
    """The rounds of a sweep; an arm without the choice of rescaling is in the first of each rate."""
    for rate in rates:
        for on in rescaling:
            own = {name: rescaled(arm, on) for name, arm in arms.items()}
            if on != rescaling[0]:
                own = {name: arm for name, arm in own.items() if is_rescaled(arm) is not None}
            if own:
                yield Round(name=f"{rate:g}{'' if on else ', not rescaled'}", learning_rate=rate, arms=own)


def _rounds(cfg: CompareConfig, arms: Mapping[str, TrainingArm]) -> list[Round]:
    return [*rounds_of(arms, cfg.learning_rates, cfg.rescaled)] if cfg.sweeps else []


def sweep(
    rounds: Sequence[Round],
    k: int,
    held_out: Int[Tensor, "rows pos"],
    folder: Path,
    on: Mapping[str, Any],
) -> list[SweepRow]:
    """Train (`on`: `Prepared.training`) and evaluate the arms of each round that `sweep.json` lacks.

    Raises a ValueError where one was begun with other settings.
    """
    path = folder / "sweep.json"
    rows = read_sweep(path) if path.is_file() else []
    for one in rounds:
        left, trained = one.left(rows), folder / f"sweep {one.name}"
        if not left:
            shutil.rmtree(trained, ignore_errors=True)  # where a process was killed just before it did so
            continue
        diverged: Mapping[str, str] = {}
        try:
            rates = dict.fromkeys(left, one.learning_rate)
            train_arms(arms=left, learning_rates=rates, folder=trained, **on)
        except DivergedError as error:
            diverged = error.saes
            if not diverged:
                raise
        names = [name for name in left if name not in diverged]
        measured = _measured(on["model"], held_out, trained, names, on["stream"].device)
        for name, arm in left.items():
            l0, fvu = measured.get(name, (0.0, inf))
            how: Any = {"family": arm.family, "learning_rate": one.learning_rate, "rescaling": is_rescaled(arm)}
            rows.append(SweepRow(k=k, arm=name, l0=l0, fvu=fvu, **how))
        write_json(path, with_kind(SWEEP_KIND, {"rows": [asdict(row) for row in rows]}))
        if trained.exists():  # else all diverged
            shutil.rmtree(trained)
    return [row for row in rows if any(row.arm in one.arms for one in rounds)]


def _measured(
    model: HookedSAETransformer, held_out: Int[Tensor, "rows pos"], folder: Path, names: Sequence[str], device: str
) -> dict[str, tuple[float, float]]:
    """L0 and FVU by name. Left out is an SAE that is finite, and what it writes, or the model makes of that, is not."""
    saes = [Arm(name=name, sae=SAE.load_from_disk(folder / name, device=device).eval()) for name in names]
    try:
        found = evaluate(model, held_out, saes)
    except (FloatingPointError, ValueError) as error:
        if "not finite" not in str(error):
            raise
        others = [name for name in names if len(names) > 1]
        return {one: row for name in others for one, row in _measured(model, held_out, folder, [name], device).items()}
    return {name: (own.l0, own.fvu) for name, own in found.items() if isfinite(own.fvu) and isfinite(own.kl_nats)}


def read_sweep(path: Path) -> list[SweepRow]:
    """The rows of a `sweep.json`."""
    content = read_json(path)
    rows = content if isinstance(content, list) else without_kind(SWEEP_KIND, content)["rows"]  # a list in 0.1.0
    return [SweepRow(**row) for row in rows]


def choices(rows: Sequence[SweepRow], rates: Sequence[float]) -> dict[str, tuple[float, bool | None]]:
    """Rate and rescaling of each family: the lowest FVU; the middle rate where none brought its L0s around k."""
    found = dict[str, tuple[float, bool | None]]()
    for family in dict.fromkeys(row.family for row in rows):
        own = [row for row in rows if row.family == family]
        fvus = {
            (rate, way): _fvu_at_k([row for row in own if (row.learning_rate, row.rescaling) == (rate, way)])
            for rate in rates
            for way in dict.fromkeys(row.rescaling for row in own)
        }
        best = min(fvus, key=lambda one: fvus[one])
        found[family] = best if isfinite(fvus[best]) else (sorted(rates)[len(rates) // 2], own[0].rescaling)
    return found


def _fvu_at_k(members: Sequence[SweepRow]) -> float:
    """FVU of an arm at one rate, interpolated at k where it has several SAEs; infinite where that says nothing."""
    weights: list[float] | None = [1.0]
    if len(members) != 1 or members[0].arm != members[0].family:
        weights = interpolation_weights([row.l0 for row in members], members[0].k) if members else None
    if weights is None:
        return inf
    fvu = sum(weight * row.fvu for weight, row in zip(weights, members, strict=True) if weight)
    return fvu if isfinite(fvu) else inf


def _at_their_best(
    prepared: Prepared, k: int, arms: Mapping[str, TrainingArm], folder: Path
) -> tuple[Mapping[str, TrainingArm], dict[str, float], list[SweepRow]]:
    """The SAEs with the rescaling that the sweep chose, the rate of each, and the sweep."""
    cfg = prepared.cfg
    if not cfg.sweeps:
        return arms, dict.fromkeys(arms, cfg.learning_rates[0]), []
    on, rounds = prepared.training(cfg.sweep_seed, cfg.sweep_tokens), _rounds(cfg, prepared.arms(k, cfg.sweep_tokens))
    rows = sweep(rounds, k, prepared.sweep_held_out.tokens, folder, on)
    best = choices(rows, cfg.learning_rates)
    rows = [replace(row, chosen=(row.learning_rate, row.rescaling) == best[row.family]) for row in rows]
    made = {name: rescaled(arm, best[arm.family][1] is not False) for name, arm in arms.items()}
    return made, {name: best[arm.family][0] for name, arm in arms.items()}, rows


def _claim_folder(output: Path, prepared: Prepared) -> None:
    """Write the configuration, or compare it with the one that is there; a ValueError where it is another."""
    path = output / "compare.json"
    wanted = prepared.settings(*ADDED_LATER)
    if not path.exists():
        write_json(path, with_kind(SETTINGS_KIND, wanted))
        return
    # folders of 0.1.0 have older names, and older ones not what had one value only
    once = {"nfm_top_fraction": 1.0, "shuffle": True, "rescaling": ["on"], "selection_stages": 4}
    found = once | renamed(without_kind(SETTINGS_KIND, read_json(path)))
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{name} is {value!r}, and {found.get(name)!r} in the comparison begun in {prepared.cfg.output!r}; give the "
                "same value, or another output folder"
            )


def _sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()
