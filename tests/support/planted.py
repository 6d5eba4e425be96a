"""An SAE whose error is known, and a model in which its effect can be worked out by hand."""

import torch
from builders import CONTEXT, D_MODEL, D_VOCAB, HOOK, tiny_model
from sae_lens import SAE, HookedSAETransformer, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformer_lens import HookedTransformerConfig


def linear_model() -> HookedSAETransformer:
    """A random model of one block without normalisation: logits are linear in the residual stream after the block."""
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=D_MODEL,
        n_heads=1,
        d_head=8,
        d_mlp=8,
        n_ctx=CONTEXT,
        d_vocab=D_VOCAB,
        act_fn="relu",
        normalization_type=None,
        seed=0,
        device="cpu",
    )
    with torch.random.fork_rng():
        model = HookedSAETransformer(cfg, tiny_model().tokenizer, default_padding_side="right").eval()
    model.requires_grad_(False).W_U.mul_(4)
    return model


def planted_sae(shift: Tensor) -> SAE:
    """x_hat = relu(x) - relu(-x) + shift = x + shift, to the bit where the shift is zero."""
    cfg = StandardSAEConfig(
        d_in=D_MODEL, d_sae=2 * D_MODEL, apply_b_dec_to_input=False, metadata=SAEMetadata(hook_name=HOOK)
    )
    sae, eye = SAE.from_dict(cfg.to_dict()), torch.eye(D_MODEL)
    both = torch.cat([eye, -eye])
    sae.load_state_dict({"W_enc": both.T, "W_dec": both, "b_enc": torch.zeros(2 * D_MODEL), "b_dec": shift})
    return sae.requires_grad_(False)
