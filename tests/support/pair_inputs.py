"""What the tests of pair attribution share: random SAEs in float64, a hand-made SAE with one planted pair, slow sums."""

import itertools
from typing import Any

import torch
from builders import CONTEXT, D_MODEL, D_VOCAB, HOOK, inference_sae, random_activations, training_config
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from sae_nfm.architectures.joint_config import JointNFMSAEConfig
from sae_nfm.architectures.joint_sae import JointNFMSAE
from sae_nfm.architectures.nfm_paths import PathWeights
from sae_nfm.attribution.pairs import TokenReads


def pair_sae(architecture: str = "joint_nfm", **overrides: Any) -> SAE:
    """An inference SAE with random weights: rounding is 1e-15, so that the default tolerance of float64 is ample."""
    return inference_sae(training_config(architecture, dtype="float64", **overrides))


def x(rows: int = 12) -> Tensor:
    return random_activations(rows=rows).double()


def some_tokens(rows: int = 5) -> Tensor:
    tokens = torch.randint(1, D_VOCAB, (rows, CONTEXT), generator=torch.Generator().manual_seed(4))
    tokens[:, 0] = 0
    return tokens


def pairs_by_loop(sae: SAE, reads: TokenReads, token: int) -> dict[tuple[int, int], Tensor]:
    """o_ij of every pair that fires on a token, one at a time; with head "bilinear" squares too, from the saved tensors alone."""
    weights, d = PathWeights.of(sae), reads.gates[token].double()
    active = sorted((int(i), float(f)) for i, f in zip(*(part[token] for part in reads.read), strict=True) if f != 0)
    if sae.cfg.head == "bilinear":
        (A, B), W_2 = sae.V.detach().chunk(2, dim=-1), sae.W_2.detach()
        squares = {(i, i): f * f * (A[i] * B[i]) @ W_2 for i, f in active}
        return squares | {
            (i, j): f * g * (A[i] * B[j] + A[j] * B[i]) @ W_2 for (i, f), (j, g) in itertools.combinations(active, 2)
        }
    return {
        (i, j): (((f * g * weights.V[i] * weights.V[j]) @ weights.W_1) * d) @ weights.W_2
        for (i, f), (j, g) in itertools.combinations(active, 2)
    }


@torch.no_grad()
def planted_pair_sae(model: Any, token: int, *, planted: bool = True) -> JointNFMSAE:
    """Every dimension is a feature; features 2 and 5 together write what raises one logit of `linear_model`, nothing else.

    x_hat = x where x is positive: the decoder is the identity, and so is the encoder. One interaction dimension:
    z = f_2 f_5, h = z + 1 > 0, so the gate is always open; W_2 is the vector that moves the logit of `token` alone.
    """
    cfg = JointNFMSAEConfig(
        d_in=D_MODEL,
        d_sae=D_MODEL,
        k=D_MODEL,
        nfm_dim=1,
        rescale_acts_by_decoder_norm=False,
        apply_b_dec_to_input=False,
        use_linear_path=False,
        dtype="float64",
        metadata=SAEMetadata(model_name="tiny", hook_name=HOOK),
    )
    sae = JointNFMSAE(cfg)
    for parameter in sae.parameters():
        parameter.zero_()
    sae.W_enc.copy_(torch.eye(D_MODEL))
    sae.W_dec.copy_(torch.eye(D_MODEL))
    if planted:
        sae.V[[2, 5]] = 1.0
    sae.W_1.fill_(1.0)
    sae.b_1.fill_(1.0)
    sae.W_2[0] = model.W_U[:, token] / model.W_U[:, token].square().sum()
    return sae
