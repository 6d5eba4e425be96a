"""What a training run costs, found by making its steps on tensors that have shapes and no numbers.

    model forward    Hugging Face's model on the "meta" device, under the loader and up to the hook point of the run
    SAE step         SAELens's trainer, forward to Adam, on fake tensors
    buffer           SAELens's mixing buffer on fake tensors

FLOPs are those torch counts (matrix products, attention); bytes are those of all storages alive at one time. Nothing here
needs the device, its memory, or weights.
"""

import weakref
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from sae_lens import HookedSAETransformer, LanguageModelSAERunnerConfig, SAETrainer, SAETransformerBridge
from sae_lens.config import SAETrainerConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.mixing_buffer import mixing_buffer
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens import HookedTransformerConfig
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from typing_extensions import override

from sae_nfm.models import LanguageModel, config_fields
from sae_nfm.training import fuse

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


def sae_step(cfg: LanguageModelSAERunnerConfig[Any], sae_config: TrainingSAEConfig) -> Cost:
    """A training step of SAELens's trainer in its dense form, with what a step without dead features keeps and makes.

    Adam works on all parameters at once on CUDA, which takes one more number a parameter, and one by one elsewhere; in its
    fused form (`fused_adam`) it takes none.
    """
    batch, dense = cfg.train_batch_size_tokens, {"device": "cpu"}
    if hasattr(sae_config, "kernel"):
        dense["kernel"] = "dense"
    settings = SAETrainerConfig(
        total_training_samples=STEPS * batch,
        train_batch_size_samples=batch,
        lr=cfg.lr,
        lr_end=cfg.lr,
        device="cpu",
        autocast=cfg.autocast,
    )
    live, flops = LiveBytes(), FlopCounterMode(display=False)
    with FakeTensorMode(), live:
        sae_class, _ = SAE_TRAINING_CLASS_REGISTRY[sae_config.architecture()]
        trainer = _Trainer(settings, sae_class(replace(sae_config, **dense)), iter(()))
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
    """The model as its loader would give it, on the "meta" device: every hook point, no weights.

    Raises:
        ValueError: for a class that `sae_nfm.models.load.load_model` does not have.
    """
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
