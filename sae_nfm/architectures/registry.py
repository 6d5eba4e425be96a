"""The architectures of this package: name, inference config; what SAELens's doors are made strict for."""

from sae_nfm.architectures.joint_config import JointNFMSAEConfig
from sae_nfm.architectures.sequential_config import SequentialNFMSAEConfig

INFERENCE_CONFIGS: dict[str, type[JointNFMSAEConfig] | type[SequentialNFMSAEConfig]] = {
    config.architecture(): config for config in (JointNFMSAEConfig, SequentialNFMSAEConfig)
}
"""Inference config by the architecture's name."""
