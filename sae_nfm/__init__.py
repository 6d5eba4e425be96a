"""sae_nfm: sparse autoencoders trained jointly with a Neural Factorization Machine, as a SAELens plugin.

Importing the package registers the architectures `joint_nfm` and `sequential_nfm` with SAELens.
"""

from sae_nfm._old_names import answer_to_old_names
from sae_nfm._registration import register
from sae_nfm.architectures import (
    JointNFMSAE,
    JointNFMSAEConfig,
    JointNFMTrainingSAE,
    JointNFMTrainingSAEConfig,
    SequentialNFMSAE,
    SequentialNFMSAEConfig,
    SequentialNFMTrainingSAE,
    SequentialNFMTrainingSAEConfig,
)
from sae_nfm.training import HeldOut, read_training_record, record_training

__version__ = "0.2.0"
__all__ = [
    "HeldOut",
    "JointNFMSAE",
    "JointNFMSAEConfig",
    "JointNFMTrainingSAE",
    "JointNFMTrainingSAEConfig",
    "SequentialNFMSAE",
    "SequentialNFMSAEConfig",
    "SequentialNFMTrainingSAE",
    "SequentialNFMTrainingSAEConfig",
    "__version__",
    "read_training_record",
    "record_training",
]

answer_to_old_names()
register()
