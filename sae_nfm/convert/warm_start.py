"""A `joint_nfm` that begins as a trained TopK or JumpReLU SAE: its encoder and decoder, with a new NFM beside them.

    sae = warm_started("runs/topk", nfm_dim=64, nfm_top_k=16)
    cfg = LanguageModelSAERunnerConfig(sae=sae.cfg, hook_name=sae.cfg.metadata.hook_name, ...)
    SAETrainingRunner(cfg, override_sae=sae).run()

What decides the features (k or thresholds, rescaling, b_dec in the input, the hook point) is the SAE's. Its own activation
normalisation has to be in its weights, and the training does without: the trainer would estimate a scale again and rescale the
inputs that the weights were made for. Normalisations without statistics of the data, computed token by token, stay as they are.

A checkpoint's weights are for inputs that the trainer has scaled or whitened, by what stands in activation_scaler.json beside
them. SAELens's own loading leaves that file alone, so that the SAE would be given inputs it was not trained for: it is folded.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE, JumpReLUSAE, TopKSAE
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting, read_sae_components_from_disk
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from sae_nfm.architectures import (
    SKIP_TRANSCODER,
    TRANSCODER,
    UNFOLDED,
    InferenceFields,
    JointNFMSAE,
    JointNFMTrainingSAE,
    NFMFields,
    random_initialisation,
    refuse_unknown_keys,
)
from sae_nfm.architectures.joint_config import JointNFMSAEConfig, JointNFMTrainingSAEConfig
from sae_nfm.common import reading
from sae_nfm.convert.files import FETCH_ANEW, checked, read_json, whole_number
from sae_nfm.kernels import BILINEAR
from sae_nfm.loading import check_folder, digest, load_sae, refuse_not_finite

WARM_START_DIGEST = "warm_start_digest"
"""Key of the metadata of an SAE that began as another: that one's `digest`."""

PLAIN = ("topk", "jumprelu")
"""Architectures of SAELens that are an encoder of joint_nfm; SAELens saves batchtopk and matryoshka_batchtopk as jumprelu."""
OTHERS = {
    "joint_nfm": "it has an NFM already; train it further with SAELens's from_pretrained_path",
    "sequential_nfm": "it has an NFM already; train it further with SAELens's from_pretrained_path",
    **dict.fromkeys((TRANSCODER, SKIP_TRANSCODER), "it reads one place and writes another"),
    "abstopk": "its features are chosen by their absolute value, and can be negative",
    **dict.fromkeys(("batchtopk", "matryoshka_batchtopk"), "its threshold is in the finished SAE, a jumprelu"),
}
"""Why other architectures are refused; of what is not named here joint_nfm has no encoder."""


def plain_sae(folder: str | Path, device: str = "cpu") -> SAE[Any]:
    """A saved TopK or JumpReLU SAE that takes activations as the language model has them.

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
    assert isinstance(sae, TopKSAE | JumpReLUSAE)
    if sae.cfg.normalize_activations in UNFOLDED:
        fold_normalisation(sae, folder / ACTIVATION_SCALER_CFG_FILENAME)
    return sae


def _refuse_other_architectures(architecture: str, source: str) -> None:
    if architecture not in PLAIN:
        why = OTHERS.get(architecture, "joint_nfm has no encoder of this kind")
        raise ValueError(f"{source} is a {architecture} SAE: {why}; give a {' or '.join(PLAIN)} SAE")


def _strict_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """SAELens's `sae_lens_disk_loader`, for these SAEs only, with every tensor checked."""
    cfg_path, weights_path = Path(path) / SAE_CFG_FILENAME, Path(path) / SAE_WEIGHTS_FILENAME
    config = handle_config_defaulting(read_json(cfg_path) | {"device": device} | (cfg_overrides or {}))
    architecture = config.get("architecture", "standard")
    _refuse_other_architectures(architecture, repr(str(path)))
    d_in, d_sae = (whole_number(config, key, cfg_path) for key in ("d_in", "d_sae"))
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if architecture == "topk":
        whole_number(config, "k", cfg_path, at_most=d_sae)
    else:
        shapes["threshold"] = (d_sae,)
    with reading(weights_path, remedy=FETCH_ANEW):
        config, tensors = read_sae_components_from_disk(config, weights_path, device)
    return config, checked(tensors, shapes, weights_path)


def fold_normalisation(sae: SAE[Any], path: Path) -> None:
    """Fold a checkpoint's normalisation into its SAE, by the activation_scaler.json at `path`; a ValueError without it."""
    mode, scaler = sae.cfg.normalize_activations, ActivationScaler()
    if path.is_file():
        read_json(path)  # says so where it is damaged
        with reading(path, "the scaler of a checkpoint", remedy=FETCH_ANEW):
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


OF_THE_SAE = (
    *("d_in", "d_sae", "k", "rescale_acts_by_decoder_norm", "apply_b_dec_to_input", "normalize_activations"),
    "reshape_activations",
)
"""Fields that decide the features, of an SAE that has them: always those of the SAE."""


@torch.no_grad()
def warm_started(sae: SAE[Any] | str | Path, *, seed: int = 0, **fields: Any) -> JointNFMTrainingSAE:
    """A training SAE with the encoder and decoder of a TopK or JumpReLU SAE, and an NFM as at the start of any training.

    The new paths write little at first, so the output is nearly the SAE's; exactly the SAE's with `nfm_weight_init_std=0`, but
    then W_1 is zero too and the interaction path never learns. `folded_W_dec_norm` is 1: norms that SAELens divided out when
    it saved the SAE are not in its file.

    Args:
        sae: the SAE, for inference or in training; or its folder (a checkpoint's normalisation is folded); or release:sae_id.
        seed: of the NFM's initial weights; no global seed changes.
        fields: other fields of `JointNFMTrainingSAEConfig`: nfm_dim, nfm_top_k, head, initial scales, device, dtype, ...

    Raises:
        ValueError, FileNotFoundError: for another architecture, an SAE whose normalisation is not folded, a field that is the
            SAE's to decide or that there is none of, or no SAE of this name.
    """
    start = sae if isinstance(sae, SAE) else plain_by_name(str(sae))
    _refuse_other_architectures(start.cfg.architecture(), "the SAE to start from")
    refuse_unknown_keys(JointNFMTrainingSAEConfig, fields)
    _refuse_unfolded(start, fields)
    refuse_not_finite(start.state_dict(), "the SAE to start from")
    taken = {name: getattr(start.cfg, name) for name in OF_THE_SAE if hasattr(start.cfg, name)}
    taken["encoder"] = start.cfg.architecture()
    for name in taken.keys() & fields.keys():
        if fields[name] != taken[name]:
            raise ValueError(f"{name} is {fields[name]!r}, but the SAE to start from has {taken[name]!r}; leave it out")
    usual = {"device": start.cfg.device, "dtype": start.cfg.dtype, "metadata": deepcopy(start.cfg.metadata)}
    started = random_initialisation(JointNFMTrainingSAEConfig(**(usual | fields | taken)), seed)
    assert isinstance(started, JointNFMTrainingSAE)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        if hasattr(started, name):
            getattr(started, name).copy_(getattr(start, name))
    setattr(started.cfg.metadata, WARM_START_DIGEST, digest(start.state_dict()))
    return started


@torch.no_grad()
def with_silent_nfm(sae: SAE[Any] | str | Path, *, seed: int = 0, **fields: Any) -> JointNFMSAE:
    """The same function as a TopK or JumpReLU SAE's, as a `joint_nfm`: every added path is there and writes exactly zero.

    W_lin, W_2, U and the biases are zero, V and W_1 small and random, by `seed`. So the paths that write have a gradient from the
    first step of training on, and V and W_1 from the second. `fields`: of `NFMFields` and, for
    an SAE that is not the same function then, `InferenceFields`. Raises as `warm_started`.
    """
    started = warm_started(sae, seed=seed, **fields)
    for name in ("W_lin", "W_2", "U"):
        if hasattr(started, name):
            getattr(started, name).zero_()
    cfg = started.cfg
    same = (*OF_THE_SAE, "encoder", *NFMFields.__dataclass_fields__, "dtype", "device")
    given = {name: getattr(cfg, name) for name in same}
    saved = cfg.get_inference_sae_cfg_dict()
    given |= {name: saved[name] for name in InferenceFields.__dataclass_fields__}
    told = {
        name: value
        for name, value in cfg.metadata.items()
        if not name.startswith(("training_architecture", WARM_START_DIGEST))
    }
    silent = JointNFMSAE(JointNFMSAEConfig(**given, metadata=SAEMetadata(**told)))
    silent.load_state_dict(started.state_dict())
    return silent


def plain_by_name(name: str) -> SAE[Any]:
    """A TopK or JumpReLU SAE by its folder (a checkpoint has its normalisation folded) or as release:sae_id."""
    return plain_sae(name) if Path(name).is_dir() else load_sae(name)


def _refuse_unfolded(start: SAE[Any], fields: dict[str, Any]) -> None:
    if start.cfg.normalize_activations in UNFOLDED:
        raise ValueError(
            f"the SAE to start from has normalize_activations {start.cfg.normalize_activations!r}: its weights are for inputs "
            "that the trainer has normalised, by statistics that are not in it. Give the folder of its checkpoint, where they "
            "are, or fold them first (fold_activation_norm_scaling_factor, fold_activation_whitening)"
        )
    if fields.get("normalize_activations") in UNFOLDED:
        raise ValueError(
            f"normalize_activations is {fields['normalize_activations']!r}: the trainer would estimate a scale and rescale the "
            "inputs that the SAE's weights were made for; leave it out"
        )


def check_takes_pairs(sae: SAE[Any]) -> None:
    """Raise a ValueError for an SAE that `with_pairs` cannot add pairs to."""
    cfg, architecture = sae.cfg, sae.cfg.architecture()
    added = any(getattr(cfg, name, False) for name in ("use_linear_path", "use_square_path"))
    if architecture not in ("topk", "staged_topk", "joint_nfm") or getattr(cfg, "encoder", "topk") != "topk" or added:
        raise ValueError(
            "pairs are added to an SAE of the architecture topk or staged_topk, or joint_nfm with encoder 'topk' and neither "
            f"linear nor square path, not to this {architecture}; give one of these"
        )
    if cfg.normalize_activations != "none":
        raise ValueError(
            "pairs are added to an SAE that reads activations as they are, and this one has normalize_activations "
            f"{cfg.normalize_activations!r}; give a finished SAE trained without a normalisation of single tokens"
        )


@torch.no_grad()
def with_pairs(
    sae: SAE[Any],
    pairs: Int[Tensor, "pairs 2"],
    directions: Float[Tensor, "pairs d_in"],
    *,
    renewed: Bool[Tensor, " d_sae"],
    seed: int = 0,
) -> JointNFMSAE:
    """A `joint_nfm` with the features of a TopK SAE, whose interaction path writes f_i f_j u for each pair and nothing else.

    Its head is "bilinear": A has a one at each pair's first feature, B at its second, W_2 has the directions.

    Args:
        sae: topk, staged_topk, or a joint_nfm whose own interaction path is replaced; for inference.
        pairs: two features of each.
        directions: u of each, before the normalisation of activations is undone.
        renewed: features that begin anew, with random weights.
        seed: of these; no global seed changes.

    Raises a ValueError as `check_takes_pairs`.
    """
    check_takes_pairs(sae)
    cfg, names = sae.cfg, (*OF_THE_SAE, *InferenceFields.__dataclass_fields__)
    taken: dict[str, Any] = {name: getattr(cfg, name) for name in names if hasattr(cfg, name)}
    taken |= {
        "head": BILINEAR,
        "nfm_dim": len(pairs),
        "use_linear_path": False,
        "device": cfg.device,
        "dtype": cfg.dtype,
    }
    told = {name: value for name, value in cfg.metadata.items() if not name.startswith("training_architecture")}
    told[WARM_START_DIGEST] = digest(sae.state_dict())
    joint = JointNFMSAE(JointNFMSAEConfig(**taken, metadata=SAEMetadata(**told)))
    fresh = random_initialisation(
        JointNFMTrainingSAEConfig(d_in=cfg.d_in, d_sae=cfg.d_sae, k=cfg.k, use_linear_path=False, head="none"), seed
    )
    joint.V.zero_()
    numbers = torch.arange(len(pairs))
    joint.V[pairs[:, 0], numbers], joint.V[pairs[:, 1], len(pairs) + numbers] = 1.0, 1.0
    joint.W_2.copy_(directions)
    joint.b_2.zero_()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(joint, name).copy_(getattr(sae, name))
    joint.W_enc[:, renewed], joint.W_dec[renewed], joint.b_enc[renewed] = (
        fresh.W_enc[:, renewed],
        fresh.W_dec[renewed],
        0.0,
    )
    return joint
