"""Whether a training run works and fits, and how long it takes at least, before anything is downloaded or trained.

    sae-nfm dry-run paper

The run is a file (`Experiment`) that says nothing that the command line of `sae-nfm train` could not:

    train:    any flags of `sae-nfm train`
    model:    the model's config.json; left out, it is read from the folder `train.model_name`
    device:   name, memory_gib, and optionally rates (`Device`)

Shapes, parameters and memory come from the run's own classes on tensors that have shapes and no numbers:

    model forward    Hugging Face's model on the "meta" device, under the loader and up to the hook point of the run
    SAE step         SAELens's trainer, forward to Adam, on fake tensors
    buffer           SAELens's mixing buffer on fake tensors

FLOPs are those torch counts (matrix products, attention); bytes are those of all storages alive at one time. Times are lower
bounds: all products and memory traffic at the rates given, a vendor's peak rates or measured by `profiling.arms`.
Not counted: what the device's driver and allocator take (about 1 GiB on CUDA), evaluation while training, the dead-feature loss.
"""

import json
import math
import shlex
import weakref
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from sae_lens import (
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    SAETrainer,
    SAETransformerBridge,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.mixing_buffer import mixing_buffer
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name, str_to_dtype
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens import HookedTransformerConfig
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from typing_extensions import override

from sae_nfm.architectures import FEW_FEATURES, JointNFMTrainingSAEConfig, StagedTopKTrainingSAEConfig
from sae_nfm.architectures.staged_step import sums_by_feature
from sae_nfm.common import check_numbers, reading
from sae_nfm.comparison import training_flops
from sae_nfm.kernels import TOKENS_AT_ONCE, dispatch, embedding_width
from sae_nfm.kernels.ranking import Gram
from sae_nfm.models import LanguageModel, check_context, check_device, config_fields, is_folder, site_at
from sae_nfm.profiling.arms import Sizes, time_cases
from sae_nfm.profiling.results import Device, DryRun, MemoryRow
from sae_nfm.training import TrainArguments, fuse, train_arguments

CONFIGS = Path(__file__).parent / "configs"
"""Experiments that come with the package; each goes by its name without .yaml, too."""
SECTIONS = ("train", "model", "device")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A training run that can be checked before it is made."""

    name: str
    train: dict[str, Any]
    """Flags of `sae-nfm train`."""
    model: dict[str, Any] | None
    """The model's config.json; None reads it from the model's folder."""
    device: Device

    def argv(self) -> list[str]:
        """The arguments of `sae-nfm train`."""
        return [word for flag, value in self.train.items() for word in (f"--{flag}", *_words(value))]

    def command(self) -> str:
        """The command line."""
        return shlex.join(["sae-nfm", "train", *self.argv()])

    def arguments(self) -> TrainArguments:
        """What `sae-nfm train` makes of it, SAELens's runner config included."""
        given = {option.replace("-", "_"): value for option, value in self.train.items()}
        return train_arguments(given, argv=self.argv())

    def model_config(self) -> PretrainedConfig:
        """The model's Hugging Face configuration."""
        if self.model is not None:
            return AutoConfig.for_model(**self.model)
        name = str(self.train.get("model_name"))
        if not is_folder(name):
            raise ValueError(f"{name!r} is no local folder; give its config.json as `model:` of {self.name}.yaml")
        return AutoConfig.from_pretrained(name, local_files_only=True)


def load_experiment(source: str | Path) -> Experiment:
    """Read an experiment: a .yaml file, or the name of one that comes with the package.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has other keys than it should, or lacks one.
    """
    path = Path(source)
    if path.suffix != ".yaml":
        path = CONFIGS / f"{source}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise FileNotFoundError(f"there is no experiment {str(source)!r}; give a .yaml file, or one of {known}")
    with reading(path, "YAML", remedy="correct it; `sae-nfm dry-run --help` has an example"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    _check_keys(path, "", content, SECTIONS, needed=("train", "device"))
    known = tuple(field.name for field in fields(Device))
    _check_keys(path, "device.", content["device"], known, needed=("name", "memory_gib"))
    if not isinstance(content["train"], dict) or not isinstance(content.get("model"), dict | None):
        raise ValueError(f"{path}: train and model are lists of `key: value`")
    device = Device(**content["device"])
    return Experiment(name=path.stem, train=content["train"], model=content.get("model"), device=device)


def _check_keys(path: Path, prefix: str, content: Any, known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    keys = set(content) if isinstance(content, dict) else set[str]()
    unknown, missing = sorted(map(str, keys - set(known))), sorted(set(needed) - keys)
    if unknown or missing:
        found = [f"has the unknown {prefix}{key}" for key in unknown] + [f"lacks {prefix}{key}" for key in missing]
        raise ValueError(f"{path} {', '.join(found)}; it takes {', '.join(prefix + key for key in known)}")


def _words(value: Any) -> list[str]:
    """A value as it is typed."""
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    return [str(value)]


STEPS = 2
"""Steps of the trainer: Adam makes its moments in the first."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one thing costs."""

    flops_per_token: float
    """FLOPs of matrix products and attention, a multiplication and an addition counting as two."""
    resident_bytes: int
    """Bytes alive all the time."""
    peak_bytes: int
    """Bytes alive at the worst time."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations within it made and that still live, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, int] = {}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count the storage of a tensor made elsewhere, too."""
        if tensor.layout is not torch.strided:  # made of others, which were counted
            return
        storage = tensor.untyped_storage()
        key = storage._cdata  # pyright: ignore[reportPrivateUsage] (torch's identity of a storage)
        if key not in self._live:
            self._live[key] = storage.nbytes()
            self.now += self._live[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._live.pop(key)


class _Trainer(SAETrainer[Any, Any]):
    """SAELens's trainer in a run without dead features: how many there are is a number, which fake tensors do not have."""

    @property
    @override
    def dead_neurons(self) -> Any:
        return None


def _unread(acts: Tensor) -> None:
    """In place of following the threshold of a batch, a number too."""


def sae_step(cfg: LanguageModelSAERunnerConfig[Any], sae_config: TrainingSAEConfig) -> Cost:
    """A training step of SAELens's trainer in its dense form, with what a step without dead features keeps and makes.

    Adam works on all parameters at once on CUDA, which takes one more number a parameter, and one by one elsewhere; in its
    fused form (`fused_adam`) it takes none.
    """
    batch, dense = cfg.train_batch_size_tokens, {"device": "cpu"}
    if hasattr(sae_config, "kernel"):
        dense["kernel"] = "dense"
    settings: Any = {"device": "cpu", "autocast": cfg.autocast, "lr": cfg.lr, "lr_end": cfg.lr}
    settings |= {"total_training_samples": STEPS * batch, "train_batch_size_samples": batch}
    live, flops = LiveBytes(), FlopCounterMode(display=False)
    with FakeTensorMode(), live:
        sae_class, _ = SAE_TRAINING_CLASS_REGISTRY[sae_config.architecture()]
        trainer = _Trainer(SAETrainerConfig(**settings), sae_class(replace(sae_config, **dense)), iter(()))
        if hasattr(trainer.sae, "update_topk_threshold"):
            trainer.sae.update_topk_threshold = _unread
        if getattr(sae_config, "kernel", "dense") != "dense":
            fuse(trainer.optimizer)
        for group in trainer.optimizer.param_groups:
            group["foreach"] = not group["fused"] and torch.device(cfg.device).type == "cuda"
        for _ in range(STEPS):
            with flops:
                trainer.step(torch.zeros(batch, sae_config.d_in, dtype=trainer.sae.dtype))
        return Cost(flops_per_token=flops.get_total_flops() / batch, resident_bytes=live.now, peak_bytes=live.peak)


def activation_buffer(cfg: LanguageModelSAERunnerConfig[Any], d_in: int) -> Cost:
    """SAELens's buffer of activations: between refills, and when it is shuffled, where it exists three times."""
    row = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    rows, loaded, size = cfg.n_batches_in_buffer * row, 0, cfg.store_batch_size_prompts * row

    def batches() -> Generator[Tensor]:
        nonlocal loaded
        while True:
            loaded += size
            yield torch.zeros(size, d_in, dtype=getattr(torch, cfg.dtype))

    live, resident = LiveBytes(), 0
    with FakeTensorMode(), live:
        served = mixing_buffer(rows, cfg.train_batch_size_tokens, batches(), cfg.activations_mixing_fraction)
        while loaded < 2 * (rows + size):
            next(served)
            resident = max(resident, live.now)
    return Cost(flops_per_token=0, resident_bytes=resident, peak_bytes=live.peak)


def shape_of_model(config: PretrainedConfig, model_class_name: str, dtype: torch.dtype) -> LanguageModel:
    """The model as its loader would give it, on the "meta" device: every hook point, no weights."""
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if model_class_name == "AutoModelForCausalLM":
        return HookedProxyLM(hf, cast(Any, None))
    if model_class_name == "TransformerBridge":
        return SAETransformerBridge.boot_transformers(
            "no name", hf_model=hf, tokenizer=_no_tokenizer(), device="meta", dtype=dtype
        ).eval()
    if model_class_name == "HookedTransformer":
        own = {"init_weights": False, "dtype": dtype, "device": "meta", "tokenizer_name": None}
        shape = HookedTransformerConfig.from_dict(config_fields(hf) | own)
        with torch.device("meta"):
            return HookedSAETransformer(shape, move_to_device=False).eval()
    raise ValueError(
        f"model_class_name is {model_class_name!r}; give HookedTransformer, TransformerBridge or AutoModelForCausalLM"
    )


def model_forward(model: LanguageModel, cfg: LanguageModelSAERunnerConfig[Any]) -> Cost:
    """The forward pass by which SAELens's store takes activations, up to the hook point where the loader can stop there.

    `resident_bytes` are the weights; `peak_bytes` those of the activations alone.
    """
    weights = [*model.parameters(), *model.buffers()]
    tokens = torch.zeros(cfg.store_batch_size_prompts, cfg.context_size, dtype=torch.long, device="meta")
    live, flops = LiveBytes(), FlopCounterMode(display=False)
    for tensor in weights:
        live.count(tensor)
    held, live.peak = live.now, live.now
    with torch.no_grad(), live, flops:
        model.run_with_cache(
            tokens,
            names_filter=[cfg.hook_name],
            stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(cfg.hook_name),
            prepend_bos=False,
            **cfg.model_kwargs,
        )
    return Cost(
        flops_per_token=flops.get_total_flops() / tokens.numel(), resident_bytes=held, peak_bytes=live.peak - held
    )


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """What a bridge asks for, where no text is read."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<bos>": 0}, unk_token="<bos>")),
        bos_token="<bos>",
        eos_token="<bos>",
        pad_token="<bos>",
        add_bos_token=True,  # else TransformerLens loads the tokenizer again, by its name
        name_or_path="no name",
    )


GIB, PHASES = 2**30, ("always", "step", "refill")


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
    needed = _needed(memory, cfg, device)
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
    if hasattr(cfg.sae, "d_out"):
        raise ValueError(
            f"a dry run knows steps on one hook point, and a {cfg.sae.architecture()} is trained on two; a joint_nfm at hook_name"
            " needs about as much, but for a row of twice the width"
        )
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
    if not isinstance(sae, JointNFMTrainingSAEConfig | StagedTopKTrainingSAEConfig) or cfg.compile_sae:
        return "dense"
    if getattr(sae, "encoder", "topk") != "topk" or sae.refinement_steps > 0:
        return "dense"
    if sae.kernel != "auto":
        return sae.kernel
    dtype = torch.bfloat16 if cfg.autocast else getattr(torch, sae.dtype)
    return dispatch.choose(sae.d_sae, sae.k, cfg.device, dtype) if sae.d_sae >= FEW_FEATURES else "dense"


def _sparse_step(cfg: LanguageModelSAERunnerConfig[Any]) -> Cost:
    """The sparse step of joint_nfm, which fake tensors cannot make (how often a feature is active is a number), by formula.

    Above weights, gradients and moments the worse of: a matrix that a gradient is made from, beside the gradient; the scores
    of the tokens that are ranked at a time, or those that `Gram` keeps. Plus 8 k + 8 d_in numbers a token. Each stage but the
    first adds 3 d_in + m numbers a token (m: columns of V) and the squares of V; together they need 12 m a token, and W_enc
    transposed. The fused Adam has no temporaries.
    """
    sae, device = cfg.sae, torch.device(cfg.device).type
    sizes = [math.prod(shape) for shape in _shapes(sae).values()]
    scores = min(cfg.train_batch_size_tokens, TOKENS_AT_ONCE.get(device, cfg.train_batch_size_tokens)) * sae.d_sae
    later = sae.selection_stages - 1
    n_products = sums_by_feature(sae, sae.k) if sae.selection_candidates is None else 0
    if Gram.pays(cfg.train_batch_size_tokens, sae.d_sae, n_products, sae.selection_stages):
        # scores of all, what is subtracted of them, and rows of W_dec W_enc
        scores = sae.d_sae * (2 * cfg.train_batch_size_tokens + n_products * sae.d_sae)
    m = 0 if sae.head == "none" else embedding_width(sae.head, sae.nfm_dim)
    tokens = cfg.train_batch_size_tokens * (8 * (sae.k + sae.d_in) + later * (3 * sae.d_in + m) + 12 * m * (later > 0))
    matrices = sae.d_sae * (later * m + sae.d_in * (later > 0))
    itemsize = str_to_dtype(sae.dtype).itemsize
    numbers = 3 * sum(sizes)
    return Cost(
        flops_per_token=training_flops(sae, n_tokens=cfg.train_batch_size_tokens),
        resident_bytes=itemsize * numbers,
        peak_bytes=itemsize * (numbers + sum(sizes) + matrices + max(*sizes, scores) + tokens),
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


def _needed(memory: Sequence[MemoryRow], cfg: LanguageModelSAERunnerConfig[Any], device: Device) -> float:
    """GiB at the worse time; a ValueError where the device has less."""
    here = sorted((row for row in memory if row.device == str(cfg.device)), key=lambda row: -row.gib)
    at = {phase: sum(row.gib for row in memory if row in here and row.phase == phase) for phase in PHASES}
    needed = at["always"] + max(at["step"], at["refill"])
    if needed <= device.memory_gib:
        return needed
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

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be."""
        check_numbers(self)


def check(config: DryRunConfig) -> DryRun:
    """The dry run that the command line asks for; for errors see `load_experiment` and `dry_run`."""
    experiment = load_experiment(config.experiment)
    if config.memory_gib is not None:
        experiment = replace(experiment, device=replace(experiment.device, memory_gib=config.memory_gib))
    return dry_run(experiment, measure_rates=config.measure_rates)
