"""`joint_nfm`, `sequential_nfm` and secondary SAEs as SAELens configs and modules."""

from sae_nfm.architectures.joint_config import JointNFMSAEConfig, JointNFMTrainingSAEConfig, parameter_count
from sae_nfm.architectures.joint_sae import FEW_FEATURES, JointNFMSAE, NFMDecoder
from sae_nfm.architectures.joint_training import JointNFMTrainingSAE
from sae_nfm.architectures.nfm_config import (
    Kernel,
    NFMFields,
    NFMTrainingFields,
    refuse_missing_keys,
    refuse_unknown_keys,
)
from sae_nfm.architectures.nfm_paths import NFMPaths, Paths
from sae_nfm.architectures.path_metrics import TrainedPaths
from sae_nfm.architectures.path_weights import PathWeights, attributable
from sae_nfm.architectures.registry import INFERENCE_CONFIGS, random_initialisation, training_config
from sae_nfm.architectures.secondary import (
    HIDDEN,
    PRIMARY_DIGEST,
    SECONDARY_HOOKS,
    Secondary,
    attach_secondary,
    check_primary,
    check_secondary,
    detach_secondary,
    place_secondary,
    primary_digest,
    secondary_of,
)
from sae_nfm.architectures.sequential_base import UNFOLDED, as_base, check_base, load_base
from sae_nfm.architectures.sequential_config import SequentialNFMSAEConfig, SequentialNFMTrainingSAEConfig
from sae_nfm.architectures.sequential_sae import SequentialNFM, SequentialNFMSAE
from sae_nfm.architectures.sequential_training import SequentialNFMTrainingSAE

__all__ = [
    "FEW_FEATURES",
    "HIDDEN",
    "INFERENCE_CONFIGS",
    "PRIMARY_DIGEST",
    "SECONDARY_HOOKS",
    "UNFOLDED",
    "JointNFMSAE",
    "JointNFMSAEConfig",
    "JointNFMTrainingSAE",
    "JointNFMTrainingSAEConfig",
    "Kernel",
    "NFMDecoder",
    "NFMFields",
    "NFMPaths",
    "NFMTrainingFields",
    "PathWeights",
    "Paths",
    "Secondary",
    "SequentialNFM",
    "SequentialNFMSAE",
    "SequentialNFMSAEConfig",
    "SequentialNFMTrainingSAE",
    "SequentialNFMTrainingSAEConfig",
    "TrainedPaths",
    "as_base",
    "attach_secondary",
    "attributable",
    "check_base",
    "check_primary",
    "check_secondary",
    "detach_secondary",
    "load_base",
    "parameter_count",
    "place_secondary",
    "primary_digest",
    "random_initialisation",
    "refuse_missing_keys",
    "refuse_unknown_keys",
    "secondary_of",
    "training_config",
]
