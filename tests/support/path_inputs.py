"""SAEs, activations and tokens that the analyses of paths are tested on."""

import torch
from builders import (
    CONTEXT,
    D_VOCAB,
    inference_sae,
    random_activations,
    random_sae,
    training_config,
)
from sae_lens import SAE


def joint(inference: bool = False, **overrides) -> SAE:
    """In float64, where sums in any order agree to the default tolerance."""
    cfg = training_config("joint_nfm", dtype="float64", **overrides)
    return inference_sae(cfg) if inference else random_sae(cfg)


def activations(seed: int = 1, rows: int = 24) -> torch.Tensor:
    return random_activations(rows=rows, seed=seed).double()


def random_tokens(rows: int = 12) -> torch.Tensor:
    tokens = torch.randint(1, D_VOCAB, (rows, CONTEXT), generator=torch.Generator().manual_seed(4))
    tokens[:, 0] = 0
    tokens[1, 7] = 0  # a BOS in the middle of a row
    return tokens
