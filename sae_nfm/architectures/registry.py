"""The architectures of this package: name, inference config; what SAELens's doors are made strict for."""

from copy import deepcopy
from typing import Any, cast

import torch
from sae_lens import SAE, TrainingSAE, TrainingSAEConfig
from sae_lens.registry import get_sae_training_class

from sae_nfm.architectures.joint_config import JointNFMSAEConfig
from sae_nfm.architectures.sequential_config import SequentialNFMSAEConfig

INFERENCE_CONFIGS: dict[str, type[JointNFMSAEConfig] | type[SequentialNFMSAEConfig]] = {
    config.architecture(): config for config in (JointNFMSAEConfig, SequentialNFMSAEConfig)
}
"""Inference config by the architecture's name."""


def random_initialisation(cfg: TrainingSAEConfig, seed: int) -> TrainingSAE[Any]:
    """An SAE as it is before its first step: the reference that every figure of weights needs. No global seed changes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_sae_training_class(cfg.architecture())[0](deepcopy(cfg))


def training_config(sae: SAE[Any]) -> TrainingSAEConfig:
    """The config an SAE was trained with, as far as initialisation reads it; from its metadata for an inference SAE.

    Raises:
        ValueError: when the metadata does not have it.
    """
    if isinstance(sae, TrainingSAE):
        return cast(TrainingSAEConfig, sae.cfg)
    metadata = sae.cfg.metadata
    details, architecture = metadata.training_architecture_details, metadata.training_architecture
    if details is None or architecture is None:
        raise ValueError(
            "the SAE's metadata does not say how it was trained (training_architecture, training_architecture_details); "
            "give the training config to random_initialisation yourself"
        )
    return get_sae_training_class(architecture)[1].from_dict(sae.cfg.to_dict() | details)
