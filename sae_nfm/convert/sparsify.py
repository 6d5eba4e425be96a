"""TopK SAEs of the package `sparsify` (EleutherAI; `sae` in its first versions): a folder with cfg.json and sae.safetensors.

    f = TopK_k(ReLU((x - b_dec) W_enc + b_enc)), x_hat = f W_dec + b_dec

This is `decode(encode(x))`. Where `multi_topk` was on, the package's `forward` returns what the 4 k strongest features
reconstruct, its second training loss, and not this. `normalize_decoder` concerns training alone. Refused is what computes
something else: transcoders, skip connections, groupmax, signed features.

SAELens's own loader (`sparsify_disk_loader`, 6.54.12) is not used: it transposes W_dec, so that such a file does not load at
all; subtracts b_dec from the input only where normalize_decoder is off, whereas sparsify always does; rounds the weights to
bfloat16; calls every module of a layer hook_resid_post; and reads transcoders and signed SAEs as if they were neither.

Source: eai-sparsify 1.3.3; Gao et al. 2024 (arXiv 2406.04093).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import TopKSAEConfig
from sae_lens.constants import SAE_CFG_FILENAME, SPARSIFY_WEIGHTS_FILENAME
from torch import Tensor

from sae_nfm.convert.files import checked, dtype_name, metadata_of, read_json, read_safetensors, whole_number

SAME_FUNCTION = (
    *("d_in", "expansion_factor", "num_latents", "k", "normalize_decoder", "multi_topk", "lookup_max_order"),
    "gram_table_hash",
)
"""Keys of cfg.json that are read, or leave the function as it is."""
REFUSED = {
    "transcode": "it is a transcoder, which reads one hook point and writes another",
    "skip_connection": "a linear map of the input is added to the output, which a TopK SAE has no place for",
    "embed_skip": "a map of the embedding is added to the output, which a TopK SAE has no place for",
    "gram_lookup": "a table of n-gram means is subtracted from the input, which a TopK SAE has no place for",
    "signed": "its features can be negative, and those of a TopK SAE cannot",
}
"""Keys that must be off, and why."""


def sparsify_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """SAELens's disk loader for it: `SAE.load_from_disk(path, converter=sparsify_loader)`.

    Args:
        path: the folder of one SAE, whose name is its hook point in the model (layers.10).
        cfg_overrides: entries of the config to replace.

    Returns:
        The config of a SAELens topk SAE, and its weights.

    Raises:
        ValueError, FileNotFoundError: for an SAE that is no TopK SAE, a damaged or mismatched file, a missing one.
    """
    folder = Path(path).absolute()
    cfg_path, weights_path = folder / SAE_CFG_FILENAME, folder / SPARSIFY_WEIGHTS_FILENAME
    config = read_json(cfg_path)
    _refuse_other_functions(config, cfg_path)
    d_in = whole_number(config, "d_in", cfg_path)
    if config.get("num_latents"):  # 0 stands for the expansion factor, and the first versions have no such key
        d_sae = whole_number(config, "num_latents", cfg_path)
    else:
        d_sae = d_in * whole_number(config, "expansion_factor", cfg_path)
    k = whole_number(config, "k", cfg_path, at_most=d_sae)
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    tensors = checked(read_safetensors(weights_path), shapes, weights_path)
    same: dict[str, Any] = {"dtype": dtype_name(tensors, weights_path), "metadata": _metadata(folder)}
    cfg = TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device=device, apply_b_dec_to_input=True, **same)
    weights = {
        "W_enc": tensors["encoder.weight"].T.contiguous(),
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    return cfg.to_dict() | (cfg_overrides or {}), weights


def _refuse_other_functions(config: Mapping[str, Any], path: Path) -> None:
    problems = [f"{key} is on: {why}" for key, why in REFUSED.items() if config.get(key)]
    if (activation := config.get("activation", "topk")) != "topk":
        problems.append(f"activation is {activation!r}, and only 'topk' has a counterpart")
    known = {*SAME_FUNCTION, *REFUSED, "activation"}
    problems += [f"the key {key!r} is not known here" for key in sorted(config) if key not in known and config[key]]
    if problems:
        raise ValueError(f"{str(path)!r} cannot be converted: {'; '.join(problems)}")


def _metadata(folder: Path) -> Any:
    """What the run's config.json, one folder up, says of the model, and the folder's name of the hook point."""
    run = folder.parent / "config.json"
    told = read_json(run) if run.is_file() else {}
    block = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)", folder.name)
    hook_name = "hook_embed" if folder.name == "embed_tokens" else None
    return metadata_of(
        model_name=told.get("model"),
        dataset_path=told.get("dataset"),
        context_size=told.get("ctx_len"),
        hook_name=f"blocks.{block[1]}.hook_resid_post" if block else hook_name,
    )
