"""Registers the architectures with SAELens, and makes SAELens's own doors strict and exact for them.

SAELens filters a config down to the fields it knows before any class of ours sees it (`SAEConfig.from_dict`), and reads the
weight file before our class exists. Two class methods of `SAE` therefore get a thin layer, for our architectures only:
`get_sae_config_class_for_architecture` returns our config class, whose `from_dict` refuses unknown keys, and
`load_from_disk` says what is wrong with an incomplete or truncated folder, and for any architecture with one whose files are
not those of its digests; what saves an SAE writes these. Its two runners get one too, for exact checkpoints where they train an
architecture of ours (`resume`), its trainer for a fused Adam (`fused_adam`) and for sparse statistics
(`JointNFMTrainingSAE.counted`), and its directory of releases has ours (`pretrained`). One function of its TopK gets a layer
for all: a decoder row of norm 0 contributes 0, where SAELens makes NaN of every token. Its evaluation refuses our transcoders.
Everything else of SAELens is untouched.
"""

import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import sae_lens
from packaging.version import Version
from sae_lens import SAE, SAETrainer, TrainingSAE, evals, registry
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes import abstopk_sae, matryoshka_batchtopk_sae, topk_sae
from sae_lens.saes.sae import SAEConfig
from safetensors import SafetensorError
from torch import Tensor

from sae_nfm.architectures import (
    INFERENCE_CONFIGS,
    SKIP_TRANSCODER,
    TRANSCODER,
    JointNFMSAE,
    JointNFMSAEConfig,
    JointNFMSkipTranscoder,
    JointNFMSkipTranscoderConfig,
    JointNFMSkipTranscoderTraining,
    JointNFMSkipTranscoderTrainingConfig,
    JointNFMTrainingSAE,
    JointNFMTrainingSAEConfig,
    JointNFMTranscoder,
    JointNFMTranscoderConfig,
    JointNFMTranscoderTraining,
    JointNFMTranscoderTrainingConfig,
    SequentialNFMSAE,
    SequentialNFMSAEConfig,
    SequentialNFMTrainingSAE,
    SequentialNFMTrainingSAEConfig,
    StagedTopKSAE,
    StagedTopKSAEConfig,
    StagedTopKTrainingSAE,
    StagedTopKTrainingSAEConfig,
    refuse_missing_keys,
)
from sae_nfm.common import check_digests
from sae_nfm.common.files import DIGESTS_FILENAME, note_files
from sae_nfm.hub import register_packaged_releases
from sae_nfm.kernels import reference
from sae_nfm.loading import SAVE_AGAIN, check_folder
from sae_nfm.training import layer_runners, layer_trainer

TESTED_FROM, TESTED_BELOW = Version("6.54.12"), Version("6.55")
_OURS = "_sae_nfm_original"


def register() -> None:
    """Make our architectures known to SAELens; calling it again, or importing the package anew, replaces our own entries.

    Raises:
        ValueError: when another package has registered the name.
    """
    version = Version(sae_lens.__version__)
    if not TESTED_FROM <= version < TESTED_BELOW:
        warnings.warn(
            f"sae_nfm is tested with sae-lens from {TESTED_FROM} to below {TESTED_BELOW}, this is {version}: "
            f"if something misbehaves, pip install 'sae-lens>={TESTED_FROM},<{TESTED_BELOW}'",
            stacklevel=3,
        )
    _enter(registry.SAE_CLASS_REGISTRY, (JointNFMSAE, JointNFMSAEConfig))
    _enter(registry.SAE_CLASS_REGISTRY, (SequentialNFMSAE, SequentialNFMSAEConfig))
    _enter(registry.SAE_TRAINING_CLASS_REGISTRY, (JointNFMTrainingSAE, JointNFMTrainingSAEConfig))
    _enter(registry.SAE_TRAINING_CLASS_REGISTRY, (SequentialNFMTrainingSAE, SequentialNFMTrainingSAEConfig))
    _enter(registry.SAE_CLASS_REGISTRY, (StagedTopKSAE, StagedTopKSAEConfig))
    _enter(registry.SAE_TRAINING_CLASS_REGISTRY, (StagedTopKTrainingSAE, StagedTopKTrainingSAEConfig))
    _enter(registry.SAE_CLASS_REGISTRY, (JointNFMTranscoder, JointNFMTranscoderConfig))
    _enter(registry.SAE_CLASS_REGISTRY, (JointNFMSkipTranscoder, JointNFMSkipTranscoderConfig))
    transcoders = registry.SAE_TRAINING_CLASS_REGISTRY
    _enter(transcoders, (JointNFMTranscoderTraining, JointNFMTranscoderTrainingConfig))
    _enter(transcoders, (JointNFMSkipTranscoderTraining, JointNFMSkipTranscoderTrainingConfig))
    _layer(SAE, "get_sae_config_class_for_architecture", _strict_config_class)
    _layer(SAE, "load_from_disk", _explained_load)
    _layer(SAE, "save_model", _noted_save)
    _layer(TrainingSAE, "save_inference_model", _noted_save)
    layer_runners(_layer, frozenset(INFERENCE_CONFIGS))
    layer_trainer(_layer, frozenset(INFERENCE_CONFIGS))
    _layer(SAETrainer, "_train_step", _counted_sparsely)
    for module in (topk_sae, abstopk_sae, matryoshka_batchtopk_sae):  # each has the function under its own name
        _layer(module, "act_times_W_dec", _dead_rows_contribute_nothing)
    for name in ("get_downstream_reconstruction_metrics", "get_sparsity_and_variance_metrics"):
        _layer(evals, name, _refused_for_transcoders)
    register_packaged_releases()


def _enter(table: dict[str, Any], entry: tuple[type[SAE[Any]], type[SAEConfig]]) -> None:
    name = entry[1].architecture()
    present = table.get(name)
    if present is not None and present[0].__module__ != entry[0].__module__:
        raise ValueError(
            f"architecture {name!r} is registered by {present[0].__module__} already; "
            "import one of the two packages per process"
        )
    table[name] = entry


def _layer(host: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace a function, method or class method of SAELens by `make(original)`; done anew, it replaces the earlier layer."""
    present = host.__dict__[name]
    current = present.__func__ if isinstance(present, classmethod) else present
    original = getattr(current, _OURS, current)
    layered = wraps(original)(make(original))
    setattr(layered, _OURS, original)
    setattr(host, name, classmethod(layered) if isinstance(present, classmethod) else layered)


def _strict_config_class(original: Any) -> Any:
    def get_sae_config_class_for_architecture(cls: Any, architecture: str) -> Any:
        return INFERENCE_CONFIGS.get(architecture) or original(cls, architecture)

    return get_sae_config_class_for_architecture


def _noted_save(original: Any) -> Any:
    """Digests for what is saved: always for our architectures, and where the folder has digests of an SAE that was there."""

    def save(self: Any, path: str | Path) -> Any:
        saved = original(self, path)
        ours = self.cfg.architecture() in INFERENCE_CONFIGS
        if ours or (Path(path) / DIGESTS_FILENAME).is_file():
            note_files(path, *map(Path, saved))
        return saved

    return save


def _counted_sparsely(original: Any) -> Any:
    def _train_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.sae.counted() if isinstance(self.sae, JointNFMTrainingSAE) else nullcontext():
            return original(self, *args, **kwargs)

    return _train_step


def _dead_rows_contribute_nothing(original: Any) -> Any:
    def act_times_W_dec(feature_acts: Tensor, W_dec: Tensor, rescale_acts_by_decoder_norm: bool) -> Tensor:
        if rescale_acts_by_decoder_norm:
            feature_acts = reference.per_norm(feature_acts, W_dec)
        return original(feature_acts, W_dec, False)

    return act_times_W_dec


def _refused_for_transcoders(original: Any) -> Any:
    """SAELens's evaluation of an SAE would take a transcoder's input for what it is to reconstruct."""

    def measured(sae: Any, *args: Any, **kwargs: Any) -> Any:
        if sae.cfg.architecture() in (TRANSCODER, SKIP_TRANSCODER):
            raise ValueError(
                "SAELens's evaluation puts an SAE in place of what it reads, and a transcoder writes another hook point; use "
                "`sae-nfm evaluate`, or sae_nfm.evaluation.evaluate"
            )
        return original(sae, *args, **kwargs)

    return measured


def _explained_load(original: Any) -> Any:
    def load_from_disk(cls: Any, path: str | Path, *args: Any, **kwargs: Any) -> Any:
        check_digests(path, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)
        other_format = "converter" in kwargs or len(args) > 2
        config = None if other_format else _our_config(path)
        if config is None:
            return original(cls, path, *args, **kwargs)
        check_folder(path)
        ours = INFERENCE_CONFIGS[config["architecture"]]
        refuse_missing_keys(ours, config, str(Path(path) / SAE_CFG_FILENAME))
        try:
            return original(cls, path, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"the weight file in {str(path)!r} is damaged ({error}); {SAVE_AGAIN}") from error

    return load_from_disk


def _our_config(path: str | Path) -> dict[str, Any] | None:
    """The saved config, where it is one of ours."""
    cfg_path = Path(path) / SAE_CFG_FILENAME
    if not cfg_path.is_file():
        return None
    try:
        config = json.loads(cfg_path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{cfg_path} is not JSON ({error}); {SAVE_AGAIN}") from error
    return config if isinstance(config, dict) and config.get("architecture") in INFERENCE_CONFIGS else None
