"""Whether a training run works and fits, and how long it takes at least, before anything is downloaded or trained.

    sae-nfm dry-run paper

Shapes, parameters and memory come from the run's own classes on tensors without numbers (`simulated_run`). Times are lower
bounds: all products and memory traffic at the rates given, a vendor's peak rates or measured by `profiling.arms`.
Not counted: what the device's driver and allocator take (about 1 GiB on CUDA), evaluation while training, the dead-feature loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, TopKTrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.util import str_to_dtype

from sae_nfm.architectures import FEW_FEATURES, JointNFMTrainingSAEConfig
from sae_nfm.comparison import training_flops
from sae_nfm.kernels import TOKENS_AT_ONCE, dispatch
from sae_nfm.models import LanguageModel, check_context, check_device, site_at
from sae_nfm.profiling.arms import Sizes, time_cases
from sae_nfm.profiling.fake_run import Cost, activation_buffer, model_forward, sae_step, shape_of_model
from sae_nfm.profiling.results import Device, DryRun, MemoryRow
from sae_nfm.profiling.run_spec import Experiment, load_experiment
from sae_nfm.training import TrainArguments

GIB = 2**30


def dry_run(experiment: Experiment, *, measure_rates: bool = False) -> DryRun:
    """Check a training run and count what it takes.

    Args:
        experiment: the run.
        measure_rates: whether to measure the rates on the run's device, which must be there, whatever the file says; those
            that the file lacks are measured always.

    Raises:
        ValueError: for flags, hook point, width or context that do not fit together, and for a run that needs more memory
            than the device has.
    """
    arguments = experiment.arguments()
    cfg, model = arguments.cfg, _fitted_model(experiment, arguments)
    device = _with_rates(experiment.device, cfg, measure_rates)
    forward, kernel, shapes = model_forward(model, cfg), _kernel(cfg), _shapes(cfg.sae)
    step = _sparse_step(cfg) if kernel == "sparse" else sae_step(cfg, cfg.sae)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    memory = _memory(cfg, parameters, step, forward, activation_buffer(cfg, cfg.sae.d_in))
    needed = _needed(memory, cfg)
    _refuse_too_large(needed, memory, cfg, device)
    steps = math.ceil(cfg.training_tokens / cfg.train_batch_size_tokens)
    model_seconds, sae_seconds = _seconds(cfg, device, parameters, step, forward, steps)
    topk = TopKTrainingSAEConfig(d_in=cfg.sae.d_in, d_sae=cfg.sae.d_sae, k=1)
    return DryRun(
        name=experiment.name,
        command=experiment.command(),
        device=device,
        rates_measured=device != experiment.device,
        hook_name=cfg.hook_name,
        model_parameters=sum(parameter.numel() for parameter in model.parameters()),
        shapes=shapes,
        parameters=parameters,
        topk_parameters=sum(math.prod(shape) for shape in _shapes(topk).values()),
        kernel=kernel,
        memory=memory,
        needed_gib=needed,
        steps=steps,
        model_flops_per_token=forward.flops_per_token,
        sae_flops_per_token=step.flops_per_token,
        model_seconds=model_seconds,
        sae_seconds=sae_seconds,
    )


def _fitted_model(experiment: Experiment, arguments: TrainArguments) -> LanguageModel:
    """The model's shape; what the hook point decides is set in the run's config, as `train.fit_to_model` does."""
    cfg = arguments.cfg
    kwargs = cfg.model_from_pretrained_kwargs or {}
    dtype = str_to_dtype(kwargs.get("dtype", kwargs.get("torch_dtype", "float32")))
    model = shape_of_model(experiment.model_config(), cfg.model_class_name, dtype)
    site = site_at(model, cfg.hook_name, cfg.hook_head_index)
    if "d_in" in arguments.given and cfg.sae.d_in != site.d_in:
        raise ValueError(f"d_in is {cfg.sae.d_in}, but {site.hook_name!r} has width {site.d_in}; leave d_in out")
    cfg.hook_name = site.hook_name
    cfg.sae = replace(cfg.sae, d_in=site.d_in, reshape_activations=site.reshape_activations)
    check_context(model, cfg.context_size)
    return model


def _shapes(cfg: TrainingSAEConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, of the SAE on the device "meta"."""
    sae_class, _ = SAE_TRAINING_CLASS_REGISTRY[cfg.architecture()]
    sae = sae_class(replace(cfg, device="meta"))
    return {name: tuple(parameter.shape) for name, parameter in sae.named_parameters()}


def _kernel(cfg: LanguageModelSAERunnerConfig[Any]) -> str:
    """The form of the direct path that `NFMDecoder.form_of` would choose on the run's device."""
    sae = cfg.sae
    if not isinstance(sae, JointNFMTrainingSAEConfig) or cfg.compile_sae:
        return "dense"
    if sae.kernel != "auto":
        return sae.kernel
    dtype = torch.bfloat16 if cfg.autocast else getattr(torch, sae.dtype)
    return dispatch.choose(sae.d_sae, sae.k, cfg.device, dtype) if sae.d_sae >= FEW_FEATURES else "dense"


def _sparse_step(cfg: LanguageModelSAERunnerConfig[Any]) -> Cost:
    """The sparse step of joint_nfm, which fake tensors cannot make (how often a feature is active is a number), by formula.

    Above weights, gradients and moments the worse of: a matrix that a gradient is made from, beside the gradient; the scores
    of the tokens that are ranked at a time. Plus 8 k + 8 d_in numbers a token. The fused Adam has no temporaries.
    """
    sae, device = cfg.sae, torch.device(cfg.device).type
    sizes = [math.prod(shape) for shape in _shapes(sae).values()]
    scores = min(cfg.train_batch_size_tokens, TOKENS_AT_ONCE.get(device, cfg.train_batch_size_tokens)) * sae.d_sae
    tokens = cfg.train_batch_size_tokens * 8 * (sae.k + sae.d_in)
    itemsize = str_to_dtype(sae.dtype).itemsize
    numbers = 3 * sum(sizes)
    return Cost(
        flops_per_token=training_flops(sae),
        resident_bytes=itemsize * numbers,
        peak_bytes=itemsize * (numbers + sum(sizes) + max(*sizes, scores) + tokens),
    )


def _memory(
    cfg: LanguageModelSAERunnerConfig[Any], parameters: int, step: Cost, forward: Cost, buffer: Cost
) -> tuple[MemoryRow, ...]:
    weights = parameters * str_to_dtype(cfg.sae.dtype).itemsize
    sae, llm, store = (str(device) for device in (cfg.device, cfg.llm_device, cfg.act_store_device))
    rows = [
        ("SAE weights", weights, "always", sae),
        ("Adam's moments", 2 * weights, "always", sae),
        ("gradients", weights, "step", sae),
        ("step's activations and temporaries", step.peak_bytes - 4 * weights, "step", sae),
        ("model weights", forward.resident_bytes, "always", llm),
        ("model's activations", forward.peak_bytes, "refill", llm),
        ("activation buffer", buffer.resident_bytes, "always", store),
        ("buffer, while it is shuffled", buffer.peak_bytes - buffer.resident_bytes, "refill", store),
    ]
    return tuple(MemoryRow(name=name, gib=size / GIB, phase=phase, device=device) for name, size, phase, device in rows)


def _needed(memory: Sequence[MemoryRow], cfg: LanguageModelSAERunnerConfig[Any]) -> float:
    def at(phase: str) -> float:
        return sum(row.gib for row in memory if row.phase == phase and row.device == str(cfg.device))

    return at("always") + max(at("step"), at("refill"))


def _refuse_too_large(
    needed: float, memory: Sequence[MemoryRow], cfg: LanguageModelSAERunnerConfig[Any], device: Device
) -> None:
    if needed <= device.memory_gib:
        return
    here = sorted((row for row in memory if row.device == str(cfg.device)), key=lambda row: -row.gib)
    parts = ", ".join(f"{row.name} {row.gib:.2f}" for row in here[:4])
    raise ValueError(
        f"the run needs {needed:.2f} GiB at once, {device.name} has {device.memory_gib:g} (largest: {parts}); lower d_sae, "
        "train_batch_size_tokens or n_batches_in_buffer, or put model and buffer elsewhere with llm_device, act_store_device"
    )


def _with_rates(device: Device, cfg: LanguageModelSAERunnerConfig[Any], measure: bool) -> Device:
    if not measure and None not in (device.flop_per_second, device.bytes_per_second):
        return device
    check_device(str(cfg.device))
    dtype = "bfloat16" if cfg.sae.dtype == "bfloat16" else "float32"
    sizes = Sizes(dtype=dtype, autocast=cfg.autocast, device=str(cfg.device), d_in=1, d_sae=1, batch=1)
    _, found = time_cases([], sizes, repeats=3, warm_up=1, limit_gib=0, with_inference=False)
    if measure:
        device = replace(device, flop_per_second=None, bytes_per_second=None, model_flop_per_second=None)
    return replace(
        device,
        flop_per_second=device.flop_per_second or found.flop_per_second,
        bytes_per_second=device.bytes_per_second or found.bytes_per_second,
    )


def _seconds(
    cfg: LanguageModelSAERunnerConfig[Any], device: Device, parameters: int, step: Cost, forward: Cost, steps: int
) -> tuple[float, float]:
    """Seconds of the model and of the SAE's steps.

    A step's memory traffic is that of `speed.floor_seconds`, without its gathers: weights read and gradients written (2 P
    numbers), Adam (7 P).
    """
    assert device.flop_per_second is not None
    assert device.bytes_per_second is not None
    estimated = cfg.sae.normalize_activations in ("expected_average_only_in", "covariance_whitening")
    batch = cfg.train_batch_size_tokens
    tokens = cfg.training_tokens + cfg.n_batches_for_norm_estimate * batch * estimated
    model = tokens * forward.flops_per_token / (device.model_flop_per_second or device.flop_per_second)
    traffic = 9 * parameters * str_to_dtype(cfg.sae.dtype).itemsize / device.bytes_per_second
    return model, steps * (batch * step.flops_per_token / device.flop_per_second + traffic)


@dataclass(frozen=True, kw_only=True)
class DryRunConfig:
    """Which run to check, and for which device."""

    experiment: str = "paper"
    """A .yaml file, or the name of an experiment that comes with the package."""
    memory_gib: float | None = None
    """Memory of the device in GiB, in place of the file's."""
    measure_rates: bool = False
    """Measure the rates on the run's device, in place of the file's."""


def check(config: DryRunConfig) -> DryRun:
    """The dry run that the command line asks for.

    Raises:
        ValueError, FileNotFoundError: for a file that is no experiment, and as `dry_run`.
    """
    experiment = load_experiment(config.experiment)
    if config.memory_gib is not None:
        experiment = replace(experiment, device=replace(experiment.device, memory_gib=config.memory_gib))
    return dry_run(experiment, measure_rates=config.measure_rates)
