"""A pretrained SAE as the base of a sequential NFM: which one can be, and what is done to it first.

The base is a copy. Its activation normalisation is folded into its weights before anything is trained on it, since the fold at
the end of SAELens's training would rewrite the weights, and with them the features that the NFM was trained on.
"""

from typing import Any

from sae_lens import SAE, TrainingSAE
from safetensors import SafetensorError
from torch import Tensor

from sae_nfm.loading import load_sae, sha256_of

BASES = ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit")
"""Architectures that can be a base; SAELens saves batchtopk and matryoshka_batchtopk as jumprelu."""
_TRANSCODER = "it reads one place and writes another, so there is no residual x - sae at one hook point"
_HAS_NFM = "it has an NFM already; train it further with SAELens's from_pretrained_path"
REFUSED = {
    "transcoder": _TRANSCODER,
    "skip_transcoder": _TRANSCODER,
    "jumprelu_transcoder": _TRANSCODER,
    "jumprelu_skip_transcoder": _TRANSCODER,
    "temporal": "its features of a token depend on the tokens before it, but SAEs are trained on tokens in random order",
    "joint_nfm": _HAS_NFM,
    "sequential_nfm": _HAS_NFM,
}
"""Architectures that cannot, and why."""
UNFOLDED = ("expected_average_only_in", "covariance_whitening")
"""Normalisations with statistics of the data, which an SAE does not carry."""


def as_base(sae: SAE[Any], norm_scaling_factor: float | None = None) -> SAE[Any]:
    """A copy of an SAE, fit to be a base: for inference, normalisation folded, heads flattened by whoever calls it.

    Args:
        sae: the SAE, for inference or in training; it stays as it is.
        norm_scaling_factor: what its inputs were multiplied with in training, where that is not folded into it.

    Raises:
        ValueError: for an architecture that cannot be a base, or a normalisation that is not folded.
    """
    sae = for_inference(sae)
    architecture = sae.cfg.architecture()
    if architecture not in BASES:
        reason = REFUSED.get(architecture, "its conventions are not known here")
        raise ValueError(f"an SAE of the architecture {architecture!r} cannot be a base: {reason}; give one of {BASES}")
    if norm_scaling_factor is not None:
        if sae.cfg.normalize_activations not in ("none", UNFOLDED[0]):
            raise ValueError(
                f"norm_scaling_factor is for inputs normalised by {UNFOLDED[0]!r}, this SAE has "
                f"{sae.cfg.normalize_activations!r}; leave it out"
            )
        sae.fold_activation_norm_scaling_factor(norm_scaling_factor)
    if sae.cfg.normalize_activations in UNFOLDED:
        raise ValueError(
            f"the base's normalisation {sae.cfg.normalize_activations!r} is not folded into its weights: finish its training, "
            "or give the norm_scaling_factor that its inputs were multiplied with"
        )
    sae.cfg.reshape_activations = "none"
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae


def for_inference(sae: SAE[Any]) -> SAE[Any]:
    """A copy of an SAE as SAELens would save and load it for inference."""
    state_dict = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    if isinstance(sae, TrainingSAE):
        sae.process_state_dict_for_saving_inference(state_dict)
        config = sae.cfg.get_inference_sae_cfg_dict()
    else:
        config = sae.cfg.to_dict()
    metadata, device = config["metadata"], config["device"]
    # without metadata, whose model_from_pretrained_kwargs SAELens warns of; on "meta" nothing is drawn at random
    copied = SAE.from_dict(config | {"metadata": {"hook_name": metadata.get("hook_name")}, "device": "meta"})
    copied.cfg.metadata = type(copied.cfg.metadata)(**metadata)
    copied.load_state_dict(state_dict, assign=True)
    return copied.to(device=device)


def load_base(source: str, norm_scaling_factor: float | None, dtype: str, device: str = "cpu") -> SAE[Any]:
    """`as_base` of a saved SAE (its folder) or a released one (release:sae_id).

    Raises:
        FileNotFoundError, ValueError: when there is none, it is damaged, or it cannot be a base.
    """
    try:
        return as_base(load_sae(source, device=device, dtype=dtype), norm_scaling_factor)
    except SafetensorError as error:
        raise ValueError(f"the base {source!r} is damaged ({error}); restore it") from error


def base_config(base: SAE[Any]) -> dict[str, Any]:
    """What rebuilds the base, without what belongs to the SAE around it: plain values."""
    return {name: value for name, value in base.cfg.to_dict().items() if name not in ("metadata", "device")}


def check_base(tensors: dict[str, Tensor], sha256: str, source: str) -> None:
    """Compare a base's weights with those that the NFM was trained on. Raises a ValueError when they are others."""
    found = sha256_of(tensors)
    if found != sha256:
        name = f" {source!r}" if source else ""
        raise ValueError(
            f"the base{name} is not the one that this NFM was trained on, or it is damaged: the sha256 of its weights is "
            f"{found[:16]}..., not {sha256[:16]}...; restore the base, or train a new NFM on it"
        )
