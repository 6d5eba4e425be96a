"""Features chosen in stages and refined through the decoder: against the definition, exact cases, and what a user may meet."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from builders import covering_pairs, inference_sae, random_activations, random_sae, trainer, training_config
from inference_oracle import inferred
from sae_lens import SAE, MatchingPursuitSAE, MatchingPursuitSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import TrainStepInput
from scipy.optimize import nnls
from step_forms import step
from torch.func import jacfwd, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from sae_nfm import JointNFMTrainingSAE, StagedTopKSAE, StagedTopKSAEConfig, StagedTopKTrainingSAEConfig
from sae_nfm.architectures import attach_secondary
from sae_nfm.kernels import heads, inference
from sae_nfm.kernels.reference import SparseActs, powers, weighted_rows

K = 4


@pytest.fixture
def third_order():
    """A head of somebody else's: the sum over triples of f_i f_j f_l v_i*v_j*v_l."""

    def pool(acts, V):
        one, two, three = (weighted_rows(powers(acts, n), V.pow(n)) for n in (1, 2, 3))
        return (one**3 - 3 * one * two + 2 * three) / 6

    heads.register_head("third_order", pool)
    yield
    del heads.POOLS["third_order"]


def made(architecture, training=False, seed=0, **fields):
    """A tiny SAE with every path on unless told otherwise; sequential ones have no stages."""
    if architecture == "staged_topk":
        for name in ("head", "use_linear_path", "use_square_path", "nfm_top_k", "nfm_dropout"):
            fields.pop(name, None)
        given = {"d_in": 16, "d_sae": 32, "k": K} | fields
        cfg = StagedTopKTrainingSAEConfig(**given)
    else:
        cfg = training_config(architecture, **fields)
    return (random_sae if training else inference_sae)(cfg, seed)


OPTIONS = {
    "architecture": ("joint_nfm", "staged_topk", "sequential_nfm"),
    "head": ("fm", "mlp", "none", "third_order"),
    "nfm_top_k": (None, 2, K),
    "rescale_acts_by_decoder_norm": (True, False),
    "use_linear_path": (True, False),
    "use_square_path": (True, False),
    "apply_b_dec_to_input": (True, False),
    "normalize_activations": ("none", "layer_norm", "constant_norm_rescale"),
    "selection_stages": (1, 2, 3, K),
    "refinement_steps": (0, 1, 4),
    "training": (True, False),
}


@pytest.mark.parametrize("options", [dict(zip(OPTIONS, row.values, strict=True)) for row in covering_pairs(**OPTIONS)], ids=str)
@torch.no_grad()
def test_activations_are_those_of_the_definition(third_order, options):
    stages, steps = options["selection_stages"], options["refinement_steps"]
    if options["architecture"] == "sequential_nfm":
        del options["selection_stages"]
    sae, x = made(**options, dtype="float64"), random_activations(rows=6).double()
    expected, clear = inferred(sae, x, stages, steps)
    assert clear.sum() >= 3
    torch.testing.assert_close(sae.encode(x)[clear], expected[clear], rtol=1e-9, atol=1e-9)
