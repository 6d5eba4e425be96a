"""The architectures of this package: name, inference config; what SAELens's doors are made strict for."""

from sae_nfm.config import JointNFMSAEConfig
from sae_nfm.nfm_fields import NFMFields

INFERENCE_CONFIGS: dict[str, type[NFMFields]] = {config.architecture(): config for config in (JointNFMSAEConfig,)}
"""Inference config by the architecture's name."""
