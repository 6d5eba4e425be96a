"""sae_nfm: sparse autoencoders trained jointly with a Neural Factorization Machine, as a SAELens plugin.

Importing the package registers the architectures `joint_nfm` and `sequential_nfm` with SAELens.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from sae_nfm.attribution import attribution_table as attribute
    from sae_nfm.evaluation import evaluation_table

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
    "attribute",
    "evaluation_table",
    "read_training_record",
    "record_training",
]

_LAZY = {"attribute": ("attribution", "attribution_table"), "evaluation_table": ("evaluation", "evaluation_table")}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        package, function = _LAZY[name]
        return getattr(import_module(f"{__name__}.{package}"), function)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


answer_to_old_names()
register()
