"""A training step in the sparse and the dense form, to compare."""

import copy

import pytest
from builders import WITH_ENCODER, random_sae, training_config
from sae_lens.saes.sae import TrainStepInput

from sae_nfm.architectures.joint_training import SparseStepOutput

HOOK = ("hook_sae_acts_post", lambda value, hook: None)
"""Changes nothing, and has a step made as SAELens makes it."""
for_every_architecture = pytest.mark.parametrize("architecture", WITH_ENCODER)


def step(sae, x, dead=None, logging=False):
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x, coefficients={"l0": 0.3}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=logging
        )
    )


def of_sparse_step(output):
    """Whether a step worked on the active features alone."""
    return isinstance(output, SparseStepOutput)


def both_kernels(cfg, **overrides):
    """The same SAE twice, float64 so that nothing hides behind rounding."""
    sae = random_sae(training_config(cfg, **overrides, dtype="float64"))
    other = copy.deepcopy(sae)
    sae.cfg.kernel, other.cfg.kernel = "sparse", "dense"
    return sae, other
