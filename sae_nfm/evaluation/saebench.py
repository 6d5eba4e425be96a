"""SAEBench on any SAELens SAE, joint_nfm included: its core, sparse probing (sae-probes) and MDL, on a model given as an object.

    python -m sae_nfm.evaluation.saebench runs/mine --evaluation sparse_probing

SAEBench loads hub models and hub data by name. Here the model and the text may be local, so that core and sparse probing run
offline: sae-probes brings its 113 data sets with it. What it measures of joint_nfm: core decodes, so all paths count; sparse
probing and MDL's description length read the features alone, so the paths count only through the encoder they were trained with.

SAEBench 0.6 cannot live beside this package's other requirements; `INSTALL` sets up an environment of its own, and this module
imports without it.

Source: Karvonen et al. 2025, SAEBench (arXiv 2503.09532); Kantamneni et al. 2025, sae-probes (arXiv 2502.16681).
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
import tyro
from sae_lens import SAE, ActivationsStore, HookedSAETransformer, TrainingSAE
from sae_lens.util import temporary_seed

from sae_nfm.architectures import refuse_transcoder
from sae_nfm.common import check_choice, check_positive, check_writable, listed, whole, write_json
from sae_nfm.common.options import SavedSAEOptions
from sae_nfm.data import check_data, open_dataset, own_text
from sae_nfm.evaluation.saelens_evals import store_as_in_training
from sae_nfm.loading import load_sae, quiet_saelens
from sae_nfm.models import check_context, check_device, load_model, loader_kwargs, site_at

INSTALL = """\
    python3.11 -m venv .saebench
    .saebench/bin/pip install torch==2.13.0
    .saebench/bin/pip install sae-bench==0.6.0 sae-lens==6.54.12 transformer-lens==3.9.0 loguru
    .saebench/bin/pip uninstall --yes torchvision
    .saebench/bin/pip install --no-deps --editable .
    .saebench/bin/python -m sae_nfm.evaluation.saebench --help"""
"""Sets up an environment with SAEBench, from the folder of this package's sources."""
PROBE_TOKENS = 1024
"""Longest text, in tokens, that sae-probes reads; a model with a shorter context reads its last tokens."""


EvaluationName = Literal["core", "sparse_probing", "mdl"]


@dataclass(frozen=True, kw_only=True)
class SAEBenchConfig(SavedSAEOptions):
    """Which SAEs, which evaluation, on what."""

    saes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of saved SAEs, or released ones as release:sae_id."""
    evaluation: EvaluationName = "sparse_probing"
    """core: KL, cross-entropy, reconstruction, sparsity. sparse_probing: sae-probes. mdl: description length (needs CUDA)."""
    held_out: str | None = None
    """Text or tokens for core and mdl: a file, a folder or a hub name; the embedded model's held-out tokens unless given."""
    context_size: int | None = None
    """Tokens in a row for core; the one in the SAE's metadata unless given."""
    batch_size_prompts: int = 16
    """Rows in a batch for core and mdl."""
    batches: int = 10
    """Batches for each half of core."""
    probing_datasets: tuple[str, ...] = ()
    """Which of sae-probes's data sets; all 113 unless given."""
    ks: tuple[int, ...] = (1, 2, 5)
    """How many features a probe reads."""
    seed: int = 42
    """Seed of the probes' splits and of mdl."""
    output: str = "runs/saebench"
    """Folder for SAEBench's result files, the probes and the cached activations of the model. The cache goes by the model's
    name: take another folder for another model of that name."""

    def __post_init__(self) -> None:
        check_choice("evaluation", self.evaluation, get_args(EvaluationName))
        check_positive(self, "batch_size_prompts", "batches")
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks is {self.ks}; give one or more positive numbers of features")
        if self.evaluation == "mdl" and torch.device(self.device).type != "cuda":
            raise ValueError(
                f"device is {self.device!r}, but SAEBench 0.6's mdl calls .cuda() whatever its device; give --device cuda"
            )


@dataclass(frozen=True, kw_only=True)
class Score:
    """What SAEBench found for one SAE, and its own result file."""

    sae: str
    evaluation: EvaluationName
    metrics: dict[str, float]
    """SAEBench's metrics by its names: accuracies, AUCs and F1 in [0, 1], KL and CE in nats, description lengths in bits."""
    file: Path

    def words(self) -> str:
        """The metrics, aligned, and where the file is."""
        lines = listed(self.metrics, max(map(len, self.metrics)))
        return "\n".join([f"{self.sae}: SAEBench {self.evaluation}", *lines, f"    {self.file}"])


def require() -> None:
    """Raise an ImportError that says how to set SAEBench's environment up, where it is not there."""
    missing = [name for name in ("sae_bench", "sae_probes") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{' and '.join(missing)} cannot be imported here: SAEBench 0.6 needs numpy < 2 and datasets < 4, so it has an "
            f"environment of its own. Set it up in the folder of sae-nfm's sources, and use its python:\n{INSTALL}"
        )


def selected_saes(saes: Mapping[str, SAE[Any]]) -> list[tuple[str, SAE[Any]]]:
    """What the `selected_saes` argument of every SAEBench evaluation takes: copies, decoder rows of norm 1.

    SAEBench folds decoder norms for SAEs it loads and only warns for SAEs it is given. Where SAELens cannot fold them exactly
    (TopK without `rescale_acts_by_decoder_norm`) they stay, as for the SAEs SAEBench loads. Each name is SAEBench's "release" and
    begins its file's name.

    Raises:
        ValueError: for a training SAE, or one whose metadata does not say where it belongs.
    """
    return [(name, _prepared(name, sae)) for name, sae in saes.items()]


def _prepared(name: str, sae: SAE[Any]) -> SAE[Any]:
    if isinstance(sae, TrainingSAE):
        raise ValueError(f"{name!r} is an SAE in training; save it with save_inference_model and load that")
    unknown = [field for field in ("model_name", "hook_name") if sae.cfg.metadata.get(field) is None]
    if unknown:
        raise ValueError(f"the metadata of {name!r} has no {' and no '.join(unknown)}; set it, as sae.cfg.metadata")
    copy = deepcopy(sae).eval()
    with suppress(NotImplementedError):  # how SAELens says that this SAE's norms cannot be folded
        copy.fold_W_dec_norm()
    return copy


def evaluate(saes: Mapping[str, SAE[Any]], model: HookedSAETransformer, config: SAEBenchConfig) -> tuple[Score, ...]:
    """Run one evaluation on SAE objects; SAEBench's files go to `config.output`.

    Raises:
        ImportError: where SAEBench is not there.
        ValueError, FileNotFoundError: for an SAE, hook point, text or size that does not fit.
    """
    require()
    check_writable(config.output, folder=True)
    for name, sae in saes.items():
        refuse_transcoder(sae, "SAEBench")
        metadata = sae.cfg.metadata
        if metadata.hook_name is not None and (site := site_at(model, metadata.hook_name)).d_in != sae.cfg.d_in:
            raise ValueError(f"{name!r} has d_in {sae.cfg.d_in}, but {site.hook_name!r} has width {site.d_in}")
    run = {"core": _core, "sparse_probing": _sparse_probing, "mdl": _mdl}[config.evaluation]
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    return tuple(run(name, sae, model, config, folder) for name, sae in selected_saes(saes))


def evaluate_saved(config: SAEBenchConfig) -> tuple[Score, ...]:
    """Run one evaluation on saved or released SAEs of one model; raises as `evaluate`."""
    require()
    check_device(config.device)
    if not config.saes:
        raise ValueError("there is no SAE; give folders of saved SAEs, or release:sae_id")
    names = {sae: sae.strip("/").replace("/", "_").replace(":", "_") for sae in config.saes}
    saes = {name: load_sae(sae, device=config.device) for sae, name in names.items()}
    models = {config.model or sae.cfg.metadata.model_name for sae in saes.values()}
    if len(models) > 1 or None in models:
        raise ValueError(f"the SAEs' metadata name the models {', '.join(map(str, models))}; give one with --model")
    loaded = [sae.cfg.metadata for sae in saes.values()]
    (name,), kwargs = models, loader_kwargs(loaded[0], str(*models))
    if any(one.model_class_name not in (None, "HookedTransformer") for one in loaded):
        raise ValueError("SAEBench takes a HookedTransformer, and an SAE was trained on a model of another class")
    if any(loader_kwargs(one, str(name)) != kwargs for one in loaded):
        raise ValueError("the SAEs' metadata differ in model_from_pretrained_kwargs; evaluate them one by one")
    return evaluate(saes, load_model(str(name), config.device, model_class_name="HookedTransformer", **kwargs), config)


def _core(name: str, sae: SAE[Any], model: HookedSAETransformer, config: SAEBenchConfig, folder: Path) -> Score:
    from sae_bench.evals.core import main as core  # pyright: ignore[reportMissingImports]
    from sae_bench.evals.core.eval_config import CoreEvalConfig  # pyright: ignore[reportMissingImports]

    sae_id, sae, _ = core.general_utils.load_and_format_sae(name, sae, config.device)
    computed = [field for field in CoreEvalConfig.__dataclass_fields__ if field.startswith("compute_")]
    excluded = bool(sae.cfg.metadata.get("exclude_special_tokens", True))
    settings = CoreEvalConfig(
        model_name=sae.cfg.model_name,
        batch_size_prompts=config.batch_size_prompts,
        n_eval_reconstruction_batches=config.batches,
        n_eval_sparsity_variance_batches=config.batches,
        dataset=config.held_out or config.model or sae.cfg.metadata.model_name,
        context_size=config.context_size or sae.cfg.metadata.context_size,
        exclude_special_tokens_from_reconstruction=excluded,
        **dict.fromkeys(computed, True),
    )
    store = _store(sae, model, config)
    special = [getattr(model.tokenizer, f"{kind}_token_id", None) for kind in ("pad", "eos", "bos")]
    ignored = {token for token in special if token is not None}
    groups, features = core.run_evals(sae, store, model, settings, ignore_tokens=ignored)
    groups["misc_metrics"] = core.calculate_misc_metrics(features)
    result = {"sae_set": name, "sae_id": sae_id, "eval_cfg": settings, "metrics": groups, "feature_metrics": features}
    file = Path(core.general_utils.get_results_filepath(str(folder / "core"), name, sae_id))
    cleaned = core.replace_nans_with_negative_one(result)
    versions = core.get_sae_lens_version(), core.get_sae_bench_version()
    with whole(file) as partial:
        core.save_single_eval_result(cleaned, core.get_eval_uuid(), *versions, str(partial), sae)
    metrics = {metric: float(value) for group in groups.values() for metric, value in group.items()}
    return Score(sae=name, evaluation="core", metrics=metrics, file=file)


def _sparse_probing(
    name: str, sae: SAE[Any], model: HookedSAETransformer, config: SAEBenchConfig, folder: Path
) -> Score:
    from sae_bench.evals.sparse_probing_sae_probes import main as probing  # pyright: ignore[reportMissingImports]
    from sae_bench.evals.sparse_probing_sae_probes.eval_config import (  # pyright: ignore[reportMissingImports]
        SparseProbingSaeProbesEvalConfig,
    )
    from sae_probes import DATASETS  # pyright: ignore[reportMissingImports]
    from sae_probes.generate_model_activations import (  # pyright: ignore[reportMissingImports]
        ensure_dataset_activations,
    )

    datasets, label = list(config.probing_datasets or DATASETS), str(model.cfg.model_name).replace("/", "_")
    if unknown := sorted(set(datasets) - set(DATASETS)):
        raise ValueError(f"sae-probes has no data set {', '.join(unknown)}; it has {', '.join(DATASETS)}")
    cache = folder / "activations"
    ensure_dataset_activations(  # else sae-probes fetches the model by its name
        model_name=label,
        dataset_short_names=datasets,
        hook_names=[sae.cfg.metadata.hook_name],
        model_cache_path=cache,
        device=config.device,
        max_seq_len=min(PROBE_TOKENS, model.cfg.n_ctx),
        model=model,
    )
    # sae-probes takes results it finds for those of this SAE; the weights' digest makes them so
    settings = SparseProbingSaeProbesEvalConfig(
        model_name=label,
        random_seed=config.seed,
        dataset_names=datasets,
        ks=list(config.ks),
        results_path=str(folder / "probes" / _digest(sae, config)),
        model_cache_path=str(cache),
    )
    file = Path(probing.general_utils.get_results_filepath(str(folder / "sparse_probing"), name, "custom_sae"))
    file.parent.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=folder, suffix=".partial") as unfinished:
        probing.run_eval(settings, [(name, sae)], config.device, unfinished)
        os.replace(Path(unfinished) / file.name, file)
    found: dict[str, dict[str, float | None]] = json.loads(file.read_text())["eval_result_metrics"]
    metrics = {key: value for group in found.values() for key, value in group.items() if value is not None}
    return Score(sae=name, evaluation="sparse_probing", metrics=metrics, file=file)


def _mdl(name: str, sae: SAE[Any], model: HookedSAETransformer, config: SAEBenchConfig, folder: Path) -> Score:
    from sae_bench.evals.mdl import main as mdl  # pyright: ignore[reportMissingImports]
    from sae_bench.evals.mdl.eval_config import MDLEvalConfig  # pyright: ignore[reportMissingImports]

    sae_id, sae, _ = mdl.general_utils.load_and_format_sae(name, sae, config.device)
    settings = MDLEvalConfig(
        k_values=[None],  # the SAE's own sparsity, as in SAEBench's command line
        num_bins_values=[8, 16, 32, 64],
        mse_epsilon_threshold=0.2,
        model_name=sae.cfg.model_name,
        random_seed=config.seed,
        sae_batch_size=config.batch_size_prompts,
    )
    mdl.config = settings  # its functions read a global that its own command line alone sets
    with temporary_seed(config.seed), torch.no_grad():
        rows = mdl.run_eval_single_sae(settings, sae, model, config.device, _dataset(sae, config))
    file = Path(mdl.general_utils.get_results_filepath(str(folder / "mdl"), name, sae_id))
    content = {"eval_config": asdict(settings), "eval_results": rows, "sae_cfg_dict": sae.cfg.to_dict()}
    write_json(file, content)
    metrics = {f"description_length_{row['num_bins']}_bins": float(row["description_length"]) for row in rows}
    return Score(sae=name, evaluation="mdl", metrics=metrics, file=file)


def _store(sae: SAE[Any], model: HookedSAETransformer, config: SAEBenchConfig) -> ActivationsStore:
    metadata, dataset = sae.cfg.metadata, _dataset(sae, config)
    context_size = config.context_size or metadata.context_size
    if context_size is None:
        raise ValueError("the SAE's metadata has no context_size; give --context-size")
    check_context(model, context_size)
    check_data(model, dataset, context_size, config.held_out)
    with quiet_saelens():
        return store_as_in_training(
            sae, model, dataset, context_size, batch_size_prompts=config.batch_size_prompts, device=config.device
        )


def _dataset(sae: SAE[Any], config: SAEBenchConfig) -> Any:
    if config.held_out is not None:
        return open_dataset(config.held_out, split="validation")
    return own_text(config.model or sae.cfg.metadata.model_name, "validation")


def _digest(sae: SAE[Any], config: SAEBenchConfig) -> str:
    """Of the weights and of what the probes depend on."""
    digest = hashlib.sha256(json.dumps([sae.cfg.to_dict(), config.seed, config.ks], default=str).encode())
    for key, weight in sorted(sae.state_dict().items()):
        digest.update(key.encode() + weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see `--help`. Returns 2 for a mistake, which is told in one line."""
    try:
        scores = evaluate_saved(tyro.cli(SAEBenchConfig, args=argv))
    except (ImportError, ValueError, FileNotFoundError) as error:
        print(f"sae_nfm.evaluation.saebench: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(score.words() for score in scores))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
