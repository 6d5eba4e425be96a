"""A small secondary SAE, and what it makes of a hidden code by a formula of its own."""

import torch
from builders import HOOK, inference_sae
from sae_lens import TopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata

NFM_DIM, K, FEATURE = 8, 3, 4
ACTS, RECONS, ERROR = (f"hook_secondary_{name}" for name in ("acts_post", "recons", "error"))
ROUNDING = {"atol": 1e-12, "rtol": 0}  # float64, values of size 1 to 10
ROUNDING32 = {"atol": 2e-5, "rtol": 0}  # float32 through two blocks, logits and activations of size 1 to 5


def secondary_sae(dtype="float64", hook_name=f"{HOOK}.hook_nfm_hidden_pre", d_in=NFM_DIM, **overrides):
    metadata = SAEMetadata(hook_name=hook_name)
    cfg = TopKTrainingSAEConfig(d_in=d_in, d_sae=24, k=K, dtype=dtype, metadata=metadata, **overrides)
    return inference_sae(cfg, seed=5).requires_grad_(False)


def naive_acts(secondary, hidden):
    """The k largest of ReLU((h - b_dec) W_enc + b_enc), each times its decoder norm, by sorting."""
    norms = secondary.W_dec.norm(dim=-1)
    strength = ((hidden - secondary.b_dec) @ secondary.W_enc + secondary.b_enc).relu() * norms
    threshold = strength.sort(dim=-1, descending=True).values[..., K - 1 : K]
    return torch.where(strength >= threshold, strength, 0.0)


def naive_decode(secondary, acts):
    return acts / secondary.W_dec.norm(dim=-1) @ secondary.W_dec + secondary.b_dec


def hidden_of(primary, x):
    seen = []
    with primary.hooks(fwd_hooks=[("hook_nfm_hidden_pre", lambda value, hook: seen.append(value))]):
        primary(x)
    return seen[0]


def interaction(primary, hidden):
    return hidden.relu() @ primary.W_2 + primary.b_2


def clamp(value, hook):
    value = value.clone()
    value[..., FEATURE] = 3.0
    return value
