"""A secondary SAE in place of the hidden code of the interaction path.

    h = z W_1 + b_1                           hidden code of the primary, [nfm_dim], at `hook_nfm_hidden_pre`
    g = TopK(ReLU(h W_enc' + b_enc'))         features of the secondary SAE, at `hook_secondary_acts_post`
    h_hat = g W_dec' + b_dec'                 its reconstruction, at `hook_secondary_recons`
    inter = ReLU(h_hat) W_2 + b_2

With an error term h_hat + (h - h_hat*) goes on instead, h_hat* what is made of h without hooks (at `hook_secondary_error`, no
gradient): h itself up to rounding, unless a hook changes the features.

All three are hook points of the PRIMARY, so that under a splice they are `<site>.hook_secondary_acts_post` and so on, there for
clamps and in caches. Hook points of the secondary itself are silent while it is attached: SAELens could not switch them off
where it computes the primary's own error term. `model.add_sae(secondary)` would do nothing, since the primary calls its own hook
points.

Source: arXiv 2507.00269, secondary SAE (300 to 7,500 features, k = 250).
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import _disable_hooks  # pyright: ignore[reportPrivateUsage]
from torch import Tensor

from sae_nfm.architectures.nfm_paths import HIDDEN_CODE_HOOKS, NFMPaths
from sae_nfm.architectures.transcoder_config import refuse_transcoder
from sae_nfm.loading import digest

HIDDEN = "hook_nfm_hidden_pre"
"""Hook point of the hidden code."""
PRIMARY_DIGEST = "primary_digest"
"""Key of a secondary SAE's metadata: `primary_digest` of the SAE it was trained on."""
SECONDARY_HOOKS = ("hook_secondary_acts_post", "hook_secondary_recons", "hook_secondary_error")
"""Hook points of the primary; something passes through them only while a secondary SAE is attached."""
HIDDEN_CODE_HOOKS += SECONDARY_HOOKS


@dataclass(frozen=True, kw_only=True)
class Secondary:
    """A secondary SAE in place of the hidden code (`NFMPaths.hidden_code`)."""

    sae: SAE[Any]
    """[*batch, nfm_dim] to [*batch, nfm_dim]."""
    error_term: bool
    """Whether what it does not reconstruct is added, so that only a change of its features changes anything."""

    def __call__(self, primary: NFMPaths, hidden: Float[Tensor, "*batch nfm_dim"]) -> Float[Tensor, "*batch nfm_dim"]:
        """The hidden code by way of the secondary SAE's features, through the hook points of the primary."""
        secondary = self.sae
        if secondary.b_dec.device != hidden.device:
            secondary.to(hidden.device)
        hook_acts, hook_recons, hook_error = (getattr(primary, name) for name in SECONDARY_HOOKS)
        with _disable_hooks(secondary):
            acts = hook_acts(secondary.encode(hidden))
            recons = hook_recons(secondary.decode(acts).to(hidden.dtype))
            if not self.error_term:
                return recons
            with torch.no_grad():  # encoded again: with some normalisations an encoding can be decoded only once
                clean = secondary.decode(secondary.encode(hidden)).to(hidden.dtype)
                error = hook_error(hidden - clean)
            return recons + error


def secondary_of(sae: SAE[Any]) -> Secondary | None:
    """The secondary SAE that is attached to an SAE; None where there is none."""
    attached = sae.hidden_code if isinstance(sae, NFMPaths) else None
    return attached if isinstance(attached, Secondary) else None


def attach_secondary(sae: SAE[Any], secondary: SAE[Any], *, error_term: bool = False) -> ExitStack:
    """Put a secondary SAE in place of the hidden code, for a while or until `detach_secondary`.

        with attach_secondary(sae, secondary):
            logits = model.run_with_saes(tokens, saes=[sae])

        attach_secondary(sae, secondary)    # stays

    It goes along with a `deepcopy` of the primary and to the primary's device, keeps its own data type, and is no part of what
    `state_dict`, `parameters` and `save_model` of the primary have.

    Args:
        sae: the primary, an inference SAE with an interaction path.
        secondary: an SAE of any architecture of SAELens that reads and writes nfm_dim dimensions.
        error_term: add what it does not reconstruct.

    Raises a ValueError when the two do not go together, or something is attached already.
    """
    return place_secondary(check_secondary(sae, secondary), Secondary(sae=secondary, error_term=error_term))


def place_secondary(primary: NFMPaths, attached: Secondary) -> ExitStack:
    """`attach_secondary` for two SAEs that `check_secondary` has seen."""
    if primary.hidden_code is not None:
        raise ValueError("a secondary SAE is attached already; take it off first, with detach_secondary(sae)")
    primary.hidden_code = attached

    def leave() -> None:
        if primary.hidden_code is attached:
            primary.hidden_code = None

    stack = ExitStack()  # which does nothing unless it is entered and left
    stack.callback(leave)
    return stack


def detach_secondary(sae: SAE[Any]) -> None:
    """Take the secondary SAE off again. Raises a ValueError when none is attached."""
    if not isinstance(sae, NFMPaths) or secondary_of(sae) is None:
        raise ValueError("no secondary SAE is attached, so there is none to detach")
    sae.hidden_code = None


@torch.no_grad()
def primary_digest(sae: SAE[Any]) -> str:
    """By what a secondary SAE knows its primary again: the weights in float32, of whatever type they are."""
    return digest({name: value.float() for name, value in sae.state_dict().items()})


def check_secondary(sae: SAE[Any], secondary: SAE[Any]) -> NFMPaths:
    """The primary, when a secondary SAE can take the place of its hidden code, else a ValueError that says what does not fit."""
    primary = check_primary(sae)
    d_in, nfm_dim, metadata = secondary.cfg.d_in, primary.cfg.nfm_dim, secondary.cfg.metadata
    if hasattr(secondary.cfg, "d_out") or metadata.hook_name_out not in (None, metadata.hook_name):
        raise ValueError(
            f"the secondary is a transcoder (architecture {secondary.cfg.architecture()!r}); give an SAE, which writes what "
            "it reads"
        )
    if d_in != nfm_dim:
        raise ValueError(
            f"the secondary SAE has d_in {d_in}, and the primary's hidden code has nfm_dim {nfm_dim} dimensions; give one that "
            f"was trained on this primary's {HIDDEN}"
        )
    if metadata.hook_name is not None and not metadata.hook_name.endswith(HIDDEN):
        raise ValueError(
            f"the secondary SAE was trained at {metadata.hook_name!r}, and a hidden code is at a hook point that ends in "
            f"{HIDDEN}; give one that was trained there"
        )
    trained_on = metadata.get(PRIMARY_DIGEST)
    if trained_on is not None and trained_on != (found := primary_digest(primary)):
        raise ValueError(
            f"the secondary SAE was trained on another primary (its {PRIMARY_DIGEST} is {trained_on}, this one's {found}); "
            f"give that one, or set secondary.cfg.metadata.{PRIMARY_DIGEST} = None to attach it all the same"
        )
    return primary


def check_primary(sae: SAE[Any]) -> NFMPaths:
    """The SAE, when it has a hidden code that can be replaced; a ValueError without an interaction path, or in training."""
    refuse_transcoder(sae, "a secondary SAE in place of the hidden code")
    if not isinstance(sae, NFMPaths) or sae.cfg.head == "none":
        what = f"head {sae.cfg.head!r}" if isinstance(sae, NFMPaths) else f"architecture {sae.cfg.architecture()!r}"
        raise ValueError(
            f"an SAE with {what} has no interaction path, hence no hidden code; give a primary with head 'fm', 'bilinear' or "
            "'mlp'"
        )
    if isinstance(sae, TrainingSAE):
        raise ValueError(
            "the primary is in training, and its training steps would pass the secondary SAE by; save it with "
            "save_inference_model and load it with SAE.load_from_disk"
        )
    return sae
