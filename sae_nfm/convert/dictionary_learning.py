"""TopK SAEs of the package `dictionary_learning`: a trainer's folder with ae.pt and config.json.

    AutoEncoderTopK                         f = TopK_k(ReLU((x - b_dec) W_enc + b_enc)), x_hat = f W_dec + b_dec      -> topk
    BatchTopKSAE, MatryoshkaBatchTopKSAE    f = a where a > threshold, a = ReLU((x - b_dec) W_enc + b_enc)            -> jumprelu

Batch top-k is how the latter two are trained; at inference one threshold, estimated in training, stands in its place, and all
groups of a Matryoshka SAE are active. `normalize_activations` of its trainer needs nothing: it scales the biases back before
it saves. The weights' names are the same for both classes of the first two kinds, so config.json is needed.

SAELens's own loader (`dictionary_learning_sae_huggingface_loader_1`) computes the same for these classes, from the hub only;
it names every hook point resid_post, checks no shape and asks for no threshold.

Source: dictionary-learning 0.1.0; Gao et al. 2024 (arXiv 2406.04093); Bussmann et al. 2024 (arXiv 2412.06410).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import JumpReLUSAEConfig, TopKSAEConfig
from torch import Tensor

from sae_nfm.convert.files import check_file, checked, dtype_name, metadata_of, read_json, read_torch, whole_number

WEIGHTS_FILENAME, CONFIG_FILENAME = "ae.pt", "config.json"
CLASSES = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")


def dictionary_learning_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """SAELens's disk loader for it: `SAE.load_from_disk(path, converter=dictionary_learning_loader)`.

    Args:
        path: a trainer's folder, or one of its .pt files (checkpoints/ae_1000.pt).
        cfg_overrides: entries of the config to replace.

    Returns:
        The config of a SAELens SAE, topk or jumprelu, and its weights.

    Raises:
        ValueError, FileNotFoundError: for another class, a damaged or mismatched file, a missing one.
    """
    weights_path, config_path = _files(Path(path))
    config = read_json(config_path)
    trainer = _trainer(config, config_path)
    d_in, d_sae = (whole_number(trainer, key, config_path) for key in ("activation_dim", "dict_size"))
    k = whole_number(trainer, "k", config_path, at_most=d_sae)
    content = read_torch(weights_path)
    tensors = checked(content, _shapes(trainer["dict_class"], content, d_in, d_sae), weights_path)
    if (kept := int(tensors.get("k", k))) != k:
        raise ValueError(f"k is {kept} in {str(weights_path)!r} and {k} in {str(config_path)!r}; restore the files")
    weights = _saelens_weights(tensors)
    same: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "device": device, "apply_b_dec_to_input": True}
    same |= {"dtype": dtype_name(weights, weights_path), "metadata": _metadata(trainer, config.get("buffer"))}
    if trainer["dict_class"] == "AutoEncoderTopK":
        cfg = TopKSAEConfig(**same, k=k)
    else:
        cfg = JumpReLUSAEConfig(**same)
        if (threshold := float(tensors["threshold"])) < 0:
            raise ValueError(
                f"the threshold in {str(weights_path)!r} is {threshold}: training ended before it was estimated, and without it "
                "every positive feature would be active; train beyond threshold_start_step, or save the SAE with an estimate"
            )
        weights["threshold"] = torch.full((d_sae,), threshold)
    return cfg.to_dict() | (cfg_overrides or {}), weights


def _files(path: Path) -> tuple[Path, Path]:
    if path.suffix != ".pt":
        check_file(path / WEIGHTS_FILENAME)
        return path / WEIGHTS_FILENAME, path / CONFIG_FILENAME
    beside = path.parent / CONFIG_FILENAME
    return path, beside if beside.is_file() else path.parent.parent / CONFIG_FILENAME


def _trainer(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise ValueError(f"{str(path)!r} has no trainer with a dict_class (dictionary_learning); restore the file")
    if trainer["dict_class"] not in CLASSES:
        raise ValueError(
            f"{str(path)!r} is of a {trainer['dict_class']}; only {', '.join(CLASSES)} can be converted: the others are no TopK "
            "SAEs"
        )
    buffer = config.get("buffer")
    if isinstance(buffer, dict) and buffer.get("io") == "in_and_out":
        raise ValueError(f"{str(path)!r} is of a transcoder (buffer.io is 'in_and_out'), no SAE of one hook point")
    return trainer


def _shapes(dict_class: str, content: Mapping[str, Any], d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    numbers: dict[str, tuple[int, ...]] = {"k": (), "threshold": ()}
    if dict_class == "AutoEncoderTopK":  # older versions keep neither in the weights; its features need no threshold
        numbers = {name: shape for name, shape in numbers.items() if name in content}
    if dict_class == "MatryoshkaBatchTopKSAE":
        groups = content.get("group_sizes")
        numbers["group_sizes"] = tuple(groups.shape) if isinstance(groups, Tensor) else ()
        return numbers | {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    linear = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "decoder.weight": (d_in, d_sae)}
    return numbers | linear | {"b_dec": (d_in,)}


def _saelens_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "W_enc" in tensors:
        return {name: tensors[name].contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return {
        "W_enc": tensors["encoder.weight"].T.contiguous(),
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].T.contiguous(),
        "b_dec": tensors["b_dec"],
    }


def _metadata(trainer: Mapping[str, Any], buffer: object) -> Any:
    """What the files say of model and hook point; "resid_post_layer_8" is how the package's scripts name a block's output."""
    layer, site = trainer.get("layer"), trainer.get("submodule_name") or ""
    residual = type(layer) is int and "resid_post" in site
    return metadata_of(
        model_name=trainer.get("lm_name"),
        hook_name=f"blocks.{layer}.hook_resid_post" if residual else None,
        context_size=buffer.get("ctx_len") if isinstance(buffer, dict) else None,
    )
