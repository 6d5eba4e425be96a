"""TopK SAEs that SAELens saved, with the activation normalisation folded: finished ones, and checkpoints of training.

A checkpoint's weights are for inputs that the trainer has scaled or whitened; by what stands in activation_scaler.json beside
them. SAELens's own loading leaves that file alone, so that the SAE would be given inputs it was not trained for.
"""

from pathlib import Path
from typing import Any

from sae_lens import SAE, TopKSAE
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import (
    handle_config_defaulting,
    read_sae_components_from_disk,
)
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from sae_nfm.architectures import UNFOLDED
from sae_nfm.convert.files import checked, damage_explained, read_json, whole_number
from sae_nfm.loading import check_folder

ONLY_TOPK = {
    "joint_nfm": "it has an NFM already; train it further with SAELens's from_pretrained_path",
    "sequential_nfm": "it has an NFM already; train it further with SAELens's from_pretrained_path",
    "abstopk": "its features are chosen by their absolute value, and can be negative",
}
"""Why other architectures are refused; whatever is not named here has no k features a token."""


def topk_sae(folder: str | Path, device: str = "cpu") -> TopKSAE:
    """A saved TopK SAE that takes activations as the language model has them.

    Args:
        folder: of a finished SAE (cfg.json and sae_weights.safetensors), or a checkpoint of training, with
            activation_scaler.json where the trainer normalised the activations.

    Raises:
        ValueError, FileNotFoundError: for another architecture, a damaged, mismatched or missing file, or a normalisation
            whose statistics are not there.
    """
    folder = Path(folder)
    check_folder(folder)
    sae = SAE.load_from_disk(folder, device=device, converter=_strict_loader)
    assert isinstance(sae, TopKSAE)
    if sae.cfg.normalize_activations in UNFOLDED:
        fold_normalisation(sae, folder / ACTIVATION_SCALER_CFG_FILENAME)
    return sae


def refuse_other_architectures(architecture: str, source: str) -> None:
    """Raise a ValueError for anything but "topk", with the reason."""
    if architecture != "topk":
        why = ONLY_TOPK.get(architecture, "it has no fixed number of active features")
        raise ValueError(f"{source} is a {architecture} SAE: {why}; give a topk SAE")


def _strict_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """SAELens's `sae_lens_disk_loader`, for TopK SAEs only, with every tensor checked."""
    cfg_path, weights_path = Path(path) / SAE_CFG_FILENAME, Path(path) / SAE_WEIGHTS_FILENAME
    config = handle_config_defaulting(read_json(cfg_path) | {"device": device} | (cfg_overrides or {}))
    refuse_other_architectures(config.get("architecture", "standard"), repr(str(path)))
    d_in, d_sae = (whole_number(config, key, cfg_path) for key in ("d_in", "d_sae"))
    whole_number(config, "k", cfg_path, at_most=d_sae)
    with damage_explained(weights_path):
        config, tensors = read_sae_components_from_disk(config, weights_path, device)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    return config, checked(tensors, shapes, weights_path)


def fold_normalisation(sae: SAE[Any], path: Path) -> None:
    """Fold a checkpoint's normalisation into its SAE, by the statistics in the activation_scaler.json at `path`.

    Raises:
        ValueError: when they are not there.
    """
    mode, scaler = sae.cfg.normalize_activations, ActivationScaler()
    if path.is_file():
        read_json(path)  # says so where it is damaged
        scaler.load(path)
    if mode == "expected_average_only_in" and scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    elif mode == "covariance_whitening" and (white := scaler.whitening) is not None:
        sae.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
    else:
        raise ValueError(
            f"{str(path.parent)!r} is for inputs normalised by {mode!r}, and {path.name} with the statistics is not beside it or "
            "lacks them; give the whole folder of the checkpoint, or the finished SAE"
        )
