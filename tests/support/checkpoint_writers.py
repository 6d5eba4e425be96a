"""Tiny checkpoints in the formats of other packages, of random tensors, and what they compute, written plainly in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import HOOK, random_sae
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_nfm.convert.run import ConvertConfig, Converted, convert

Tensors = dict[str, Tensor]


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0, std: float = 0.5) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: std * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_author(folder: Path, *, d_in: int = 5, d_sae: int = 11, nfm_dim: int = 3) -> tuple[Path, Tensors]:
    """The paper's author's file, and its tensors."""
    tensors = random_tensors(
        {
            "primary_sae.encoder.0.weight": (d_sae, d_in),
            "primary_sae.encoder.0.bias": (d_sae,),
            "primary_sae.decoder.weight": (d_in, d_sae),
            "nfm.feature_embeddings.weight": (d_sae, nfm_dim),
            "nfm.linear.weight": (d_in, d_sae),
            "nfm.linear.bias": (d_in,),
            "nfm.interaction_mlp.1.weight": (nfm_dim, nfm_dim),
            "nfm.interaction_mlp.1.bias": (nfm_dim,),
            "nfm.interaction_mlp.3.weight": (d_in, nfm_dim),
            "nfm.interaction_mlp.3.bias": (d_in,),
        }
    )
    path = folder / "joint_sae_nfm_model.pt"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return path, tensors


def write_statistics(folder: Path, d_in: int = 5, far: float = 30.0) -> tuple[Path, Tensor, Tensor]:
    """A JSON file with means up to `far` standard deviations from zero; mean and std."""
    generator = torch.Generator().manual_seed(7)
    std = 0.5 + torch.rand(d_in, generator=generator, dtype=torch.float64)
    mean = far * std * (2 * torch.rand(d_in, generator=generator, dtype=torch.float64) - 1)
    path = folder / "statistics.json"
    path.write_text(json.dumps({"mean": mean.tolist(), "std": std.tolist()}))
    return path, mean, std


def write_dictionary_learning(
    folder: Path, dict_class: str = "AutoEncoderTopK", *, d_in: int = 5, d_sae: int = 11, k: int = 3, **trainer: Any
) -> Tensors:
    """A trainer's folder; its tensors."""
    linear = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "decoder.weight": (d_in, d_sae)}
    if dict_class == "MatryoshkaBatchTopKSAE":
        linear = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in)}
    tensors = random_tensors(linear | {"b_dec": (d_in,)})
    tensors |= {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(0.4)}
    if dict_class == "MatryoshkaBatchTopKSAE":
        tensors["group_sizes"] = torch.tensor([d_sae // 2, d_sae - d_sae // 2])
    config = {"dict_class": dict_class, "activation_dim": d_in, "dict_size": d_sae, "k": k, "layer": 8}
    config |= {"lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_8"}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    (folder / "config.json").write_text(
        json.dumps({"trainer": config | trainer, "buffer": {"ctx_len": 128, "io": "out"}})
    )
    return tensors


def write_sparsify(
    folder: Path, *, d_in: int = 5, d_sae: int = 11, dtype: torch.dtype = torch.float32, **config: Any
) -> Tensors:
    """A SparseCoder's folder; its tensors."""
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(shapes).items()}
    usual = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": d_sae, "k": 3}
    usual |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d_in}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(usual | config))
    return tensors


def topk_in_training(
    *, d_in: int = 5, d_sae: int = 11, k: int = 3, hook_name: str = HOOK, **fields: Any
) -> TopKTrainingSAE:
    """SAELens's own, every parameter random."""
    metadata = SAEMetadata(model_name="tiny", hook_name=hook_name, context_size=16, prepend_bos=True)
    sae = random_sae(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, metadata=metadata, **fields))
    assert isinstance(sae, TopKTrainingSAE)
    return sae


def strongest(values: Tensor, k: int) -> Tensor:
    """The k largest entries of each row, the rest zero."""
    kept = torch.zeros_like(values)
    for row, entries in zip(kept, values, strict=True):
        for index in entries.sort(descending=True).indices[:k]:
            row[index] = entries[index]
    return kept


def author_forward(
    tensors: Tensors, x: Tensor, mean: Tensor, std: Tensor, k: int, nfm_top_k: int
) -> tuple[Tensor, Tensor]:
    """Features and reconstruction as the paper has them, pair by pair."""
    w = {name.partition(".")[2]: tensor.double() for name, tensor in tensors.items()}
    y = (x.double() - mean) / std
    f = strongest((y @ w["encoder.0.weight"].T + w["encoder.0.bias"]).relu(), k)
    f_n, V = strongest(f, nfm_top_k), w["feature_embeddings.weight"]
    z = sum(
        (f_n[:, i, None] * f_n[:, j, None] * V[i] * V[j] for j in range(len(V)) for i in range(j)),
        start=torch.zeros(len(x), V.shape[1], dtype=torch.float64),
    )
    hidden = (z @ w["interaction_mlp.1.weight"].T + w["interaction_mlp.1.bias"]).relu()
    y_hat = f @ w["decoder.weight"].T + f_n @ w["linear.weight"].T + w["linear.bias"]
    y_hat = y_hat + hidden @ w["interaction_mlp.3.weight"].T + w["interaction_mlp.3.bias"]
    return f, y_hat * std + mean


def write_all(folder: Path) -> None:
    """One source of each format, by its name, and statistics.json."""
    write_author(folder / "author")
    write_statistics(folder)
    topk_in_training().save_inference_model(folder / "saelens")
    write_dictionary_learning(folder / "dictionary_learning")
    write_sparsify(folder / "sparsify")


def convert_one(folder: Path, form: str, **options: Any) -> Converted:
    if form == "author":
        options = {"statistics": folder / "statistics.json", "k": 4, "nfm_top_k": 2} | options
    return convert(ConvertConfig(source=folder / form, output=folder / "out", **options))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON object or a dictionary of tensors in its file."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    elif path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    else:
        content = load_file(path)
        change(content)
        save_file(content, path)


def refused(message: str) -> Any:
    """Within it, a caller's mistake whose message has this (a regular expression)."""
    return pytest.raises((ValueError, FileNotFoundError), match=message)
