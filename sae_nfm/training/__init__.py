"""Training one SAE, or several on one activation stream; resuming and recording."""

from sae_nfm.training.arguments import TrainArguments, train_arguments
from sae_nfm.training.fused_adam import fuse, layer_trainer
from sae_nfm.training.multi_arm import StreamConfig, Trained, TrainingArm, initialised, train_arms
from sae_nfm.training.record_curves import Curve, TrainingCurves, training_curves
from sae_nfm.training.recorder import HeldOut, TrainingRecord, read_training_record, record_line, record_training
from sae_nfm.training.resume import layer_runners

__all__ = [
    "Curve",
    "HeldOut",
    "StreamConfig",
    "TrainArguments",
    "Trained",
    "TrainingArm",
    "TrainingCurves",
    "TrainingRecord",
    "fuse",
    "initialised",
    "layer_runners",
    "layer_trainer",
    "read_training_record",
    "record_line",
    "record_training",
    "train_arguments",
    "train_arms",
    "training_curves",
]
