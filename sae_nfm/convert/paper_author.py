"""The paper's own checkpoints: `joint_sae_nfm_model.pt`, the state of its author's joint SAE and NFM.

With y the activation standardised per dimension, y = (x - mean) / std, the model is

    f     = TopK_k(ReLU(y W_enc + b_enc));   f_n its n largest
    y_hat = f W_dec + f_n W_lin + b_lin + ReLU(z W_1 + b_1) W_2 + b_2,   z = 1/2 [(f_n V)^2 - (f_n^2)(V^2)]
    x_hat = y_hat * std + mean

Neither k, n nor mean and std are in the file. The training script estimated mean and std anew for each chunk of 10,000 tokens,
so no single pair is the one it was trained with; take those of as many tokens as you can. They are folded into the weights.

The decoder has no bias, so `apply_b_dec_to_input` changes nothing before the fold. On, the fold makes b_dec the mean and the
encoder reads x - mean; off, it would subtract (mean / std) W_enc from b_enc, and features would be the difference of two large
numbers: in float32, with means of 10 std, their error was 8 times as large (1.4e-5 against 1.8e-6).

Source: arXiv 2507.00269 and the training script published with it.
"""

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sae_lens.util import str_to_dtype
from torch import Tensor

from sae_nfm.architectures import JointNFMSAE, JointNFMSAEConfig
from sae_nfm.common import reading
from sae_nfm.convert.files import (
    built,
    check_file,
    checked,
    dtype_name,
    metadata_of,
    read_json,
    read_safetensors,
    read_torch,
    two_sizes,
)

LARGEST_NPZ = 256 * 2**20
"""Bytes of statistics of activations that are read."""
WEIGHTS_FILENAME = "joint_sae_nfm_model.pt"
K, NFM_TOP_K = 1024, 512
"""What the paper used."""
AUTHORS_WEIGHTS = {
    "primary_sae.encoder.0.weight": ("W_enc", "d_sae d_in"),
    "primary_sae.encoder.0.bias": ("b_enc", "d_sae"),
    "primary_sae.decoder.weight": ("W_dec", "d_in d_sae"),
    "nfm.feature_embeddings.weight": ("V", "d_sae nfm_dim"),
    "nfm.linear.weight": ("W_lin", "d_in d_sae"),
    "nfm.linear.bias": ("b_lin", "d_in"),
    "nfm.interaction_mlp.1.weight": ("W_1", "nfm_dim nfm_dim"),
    "nfm.interaction_mlp.1.bias": ("b_1", "nfm_dim"),
    "nfm.interaction_mlp.3.weight": ("W_2", "d_in nfm_dim"),
    "nfm.interaction_mlp.3.bias": ("b_2", "d_in"),
}
"""The author's tensors: the name in `JointNFMSAE`, and the shape in the file."""
HOW_TO_COMPUTE = (
    "run the language model over text like that of training (WikiText-103), gather the activations at the hook point as "
    "acts [tokens, d_in], and save_file({'mean': acts.mean(0), 'std': acts.std(0)}, 'statistics.safetensors')"
)


@dataclass(frozen=True, kw_only=True)
class Standardisation:
    """What activations were standardised with, dimension by dimension."""

    mean: Float[Tensor, " d_in"]
    std: Float[Tensor, " d_in"]

    @classmethod
    def load(cls, path: Path, d_in: int) -> "Standardisation":
        """Read `mean` and `std` from a .safetensors, .npz or .json file.

        Raises:
            ValueError, FileNotFoundError: for another file or width, a number that is not finite, a std that is not positive.
        """
        reader = READERS.get(path.suffix)
        if reader is None:
            raise ValueError(f"the statistics are in {str(path)!r}; give a file of type {', '.join(READERS)}")
        check_file(path)
        content = reader(path)
        if set(content) != {"mean", "std"}:
            raise ValueError(f"{str(path)!r} has {', '.join(sorted(content)) or 'nothing'}; give mean and std only")
        mean, std = (_vector(content[name], name, path, d_in) for name in ("mean", "std"))
        if bad := int((std <= 0).sum()):
            raise ValueError(
                f"{bad} of the {d_in} standard deviations in {str(path)!r} are not positive; clamp them from below, as the "
                "training did (1e-8)"
            )
        return cls(mean=mean, std=std)

    def folded(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights of a joint_nfm without b_dec, for raw activations: `fold_activation_whitening` with M = diag(1 / std).

        Written out, because the product with a diagonal matrix takes minutes at the paper's size and this takes seconds. The
        weights, by `JointNFMSAE`'s names, are multiplied in float64 and are `dtype` afterwards.
        """
        factors: dict[str, Tensor] = dict.fromkeys(("W_dec", "W_lin", "b_lin", "W_2", "b_2"), self.std)
        factors["W_enc"] = (1 / self.std)[:, None]
        multiplied = {name: (weights[name].double() * factor).to(dtype) for name, factor in factors.items()}
        others = {name: weight.to(dtype) for name, weight in weights.items() if name not in multiplied}
        return others | multiplied | {"b_dec": self.mean.to(dtype)}


def _vector(value: Any, name: str, path: Path, d_in: int) -> Tensor:
    try:
        vector = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} in {str(path)!r} holds something other than numbers ({error})") from error
    if vector.numel() != d_in or vector.shape[-1:] != (d_in,):
        raise ValueError(
            f"{name} in {str(path)!r} has shape {tuple(vector.shape)}, the checkpoint has d_in = {d_in}; give the statistics "
            "of the hook point it was trained at"
        )
    if not torch.isfinite(vector).all():
        raise ValueError(f"{name} in {str(path)!r} holds values that are not finite (NaN or infinity); compute it anew")
    return vector.reshape(d_in)  # the training script keeps a dimension of size 1


def _read_npz(path: Path) -> dict[str, Any]:
    with reading(path, "an .npz file of plain numbers", remedy="write it with np.savez"):
        with zipfile.ZipFile(path) as archive:  # a few bytes may unpack to any number
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST_NPZ:
                raise ValueError(f"unpacked it has more than {LARGEST_NPZ:,} bytes")
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}


READERS: dict[str, Callable[[Path], Mapping[str, Any]]] = {
    ".safetensors": read_safetensors,
    ".npz": _read_npz,
    ".json": read_json,
}


@torch.no_grad()
def author_sae(path: Path, statistics: Path | None, *, k: int = K, nfm_top_k: int = NFM_TOP_K) -> JointNFMSAE:
    """The checkpoint as a `joint_nfm` SAE that takes and returns activations as the language model has them.

    Args:
        path: the .pt file, or the folder it is in; a training checkpoint's `model_state` is taken.
        statistics: file of the `Standardisation`.
        nfm_top_k: how many of the k active features the linear and the interaction path read.

    Raises:
        ValueError, FileNotFoundError: without statistics, for a file that is damaged, mismatched or missing, or a k that
            cannot be.
    """
    path = path / WEIGHTS_FILENAME if path.is_dir() else path
    check_file(path)
    if statistics is None:
        raise ValueError(
            f"{str(path)!r} was trained on activations standardised per dimension, and their mean and std are not in it: give "
            f"--statistics. To compute them, {HOW_TO_COMPUTE}"
        )
    tensors = _read(path)
    d_sae, d_in = tensors["primary_sae.encoder.0.weight"].shape
    standardised = Standardisation.load(statistics, d_in)
    # half precision, as the training script had it, would round every folded weight anew, and the mean to three digits
    dtype = dtype_name(tensors | {"folded": torch.empty(0)}, path)
    cfg = JointNFMSAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        nfm_dim=tensors["nfm.feature_embeddings.weight"].shape[1],
        nfm_top_k=nfm_top_k if nfm_top_k != k else None,
        apply_b_dec_to_input=True,
        rescale_acts_by_decoder_norm=False,
        dtype=dtype,
        metadata=metadata_of(),
    )
    sae = built(cfg, standardised.folded(_joint_weights(tensors), str_to_dtype(dtype)), path)
    assert isinstance(sae, JointNFMSAE)
    return sae


def _read(path: Path) -> dict[str, Tensor]:
    content = read_torch(path)
    content = content["model_state"] if isinstance(content.get("model_state"), dict) else content
    d_sae, d_in = two_sizes(content, "primary_sae.encoder.0.weight", path)
    nfm_dim = two_sizes(content, "nfm.feature_embeddings.weight", path)[1]
    sizes = {"d_in": d_in, "d_sae": d_sae, "nfm_dim": nfm_dim}
    shapes = {name: tuple(sizes[size] for size in shape.split()) for name, (_, shape) in AUTHORS_WEIGHTS.items()}
    return checked(content, shapes, path)


def _joint_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of `JointNFMSAE`; a linear layer of torch keeps its weight as [out, in]."""
    d_sae, d_in = tensors["primary_sae.encoder.0.weight"].shape
    weights = {"b_dec": torch.zeros(d_in), "folded_W_dec_norm": torch.ones(d_sae)}
    for name, (ours, _) in AUTHORS_WEIGHTS.items():
        transposed = tensors[name].ndim == 2 and ours != "V"  # an embedding, not a linear layer
        weights[ours] = (tensors[name].T if transposed else tensors[name]).contiguous()
    return weights
