"""Weights of the interaction and the linear path of an SAE whose interaction path is a sum over pairs."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from sae_nfm.architectures.nfm_paths import NFMPaths


def attributable(sae: SAE[Any]) -> NFMPaths:
    """The SAE, when its interaction path is a sum over pairs with the gates held.

    Raises:
        ValueError: for an SAE without an NFM, another head than "fm", training with dropout, or a secondary SAE in place of
            the hidden code.
    """
    if not isinstance(sae, NFMPaths):
        raise ValueError(
            f"an SAE of the architecture {sae.cfg.architecture()!r} has no interaction path to attribute; give a joint_nfm or "
            "sequential_nfm SAE"
        )
    if sae.cfg.head != "fm":
        reason = "has no interaction path" if sae.cfg.head == "none" else "pools features, not products of pairs"
        raise ValueError(f'an SAE with head {sae.cfg.head!r} {reason}; pairs are attributed with head "fm"')
    if getattr(sae.cfg, "nfm_dropout", 0.0) > 0:
        raise ValueError(
            f"this SAE is in training with nfm_dropout {sae.cfg.nfm_dropout}, under which its pairs are not what it will "
            "use; save it for inference (save_inference_model) and load that"
        )
    if sae.hidden_code is not None:
        raise ValueError("a secondary SAE replaces the hidden code, which is then no sum over pairs; detach it first")
    return sae


@dataclass(frozen=True, kw_only=True)
class PathWeights:
    """Weights of the interaction and the linear path, for what reaches the SAE's output (before its normalisation is undone)."""

    V: Float[Tensor, "d_sae nfm_dim"]
    """Embeddings v_i."""
    W_1: Float[Tensor, "nfm_dim nfm_dim"]
    """From pooled to hidden."""
    b_1: Float[Tensor, " nfm_dim"]
    """Bias of the hidden code."""
    W_2: Float[Tensor, "nfm_dim d_in"]
    """From hidden to output."""
    b_2: Float[Tensor, " d_in"]
    """Bias of the output."""
    W_lin: Float[Tensor, "d_sae d_in"] | None
    """Rows of the linear path; None where it is off."""
    b_lin: Float[Tensor, " d_in"] | None
    """Its bias."""

    @classmethod
    def of(cls, sae: SAE[Any]) -> "PathWeights":
        """Those of an SAE. Raises a ValueError when its interaction path is no sum over pairs, see `attributable`."""
        sae = attributable(sae)
        written = sae._written  # pyright: ignore[reportPrivateUsage] (linear: what a path's weights make, as it is added)
        linear = sae.cfg.use_linear_path
        return cls(
            V=sae.V.detach(),
            W_1=sae.W_1.detach(),
            b_1=sae.b_1.detach(),
            W_2=written(sae.W_2.detach()),
            b_2=written(sae.b_2.detach()),
            W_lin=written(sae.W_lin.detach()) if linear else None,
            b_lin=written(sae.b_lin.detach()) if linear else None,
        )

    def reduced(self) -> Float[Tensor, "nfm_dim rank"]:
        """A matrix R of at most nfm_dim columns with ||y R|| = ||y W_2|| for every y: norms cost less with it."""
        return torch.linalg.qr(self.W_2.T, mode="r").R.T
