"""Strict loading: a damaged or mismatched SAE folder is an error that names what is wrong, never a silent default.

The one error that is not ours to word comes where this package is not imported: SAELens then says `KeyError:
'joint_nfm'`, or another of ours. What to do about it stands in the folder (`write_note`) and in the metadata of its cfg.json.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from safetensors.torch import load_file
from torch import Tensor

from sae_nfm.common import reading

NOTE_FILENAME = "README.md"
NOTE = """# A sparse autoencoder of the architecture `{architecture}`

SAELens knows this architecture through a plugin, [sae-nfm](https://arxiv.org/abs/2507.00269). Without it, loading ends in
`KeyError: '{architecture}'`. With it:

    pip install sae-nfm

    import sae_nfm                # registers the architecture
    from sae_lens import SAE

    sae = SAE.load_from_disk("this folder")
"""
LARGEST_CONFIG = 64 * 2**20
"""Bytes of a cfg.json that is read; metadata of every feature may stand in it."""
SAVE_AGAIN = "save the SAE again (sae.save_model, or save_inference_model of a training SAE) or fetch it anew"


def check_state_dict(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare tensors read from a file with those the SAE has (on the meta device, too: names and shapes are read).

    Raises a ValueError for a missing or an extra tensor, another shape, or a value that is not finite.
    """
    problems = [f"tensor {name!r} is missing" for name in sorted(set(expected) - set(state_dict))]
    problems += [f"tensor {name!r} is unknown" for name in sorted(set(state_dict) - set(expected))]
    for name in sorted(set(expected) & set(state_dict)):
        given, wanted = tuple(state_dict[name].shape), tuple(expected[name].shape)
        if given != wanted:
            problems.append(f"tensor {name!r} has shape {given}, the config makes it {wanted}")
        elif not torch.isfinite(state_dict[name]).all():
            problems.append(f"tensor {name!r} holds values that are not finite (NaN or infinity)")
    if problems:
        raise ValueError(f"these are not the weights of this SAE: {'; '.join(problems)}; {SAVE_AGAIN}")


def refuse_not_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise a ValueError where a tensor of `what` holds a value that is not finite."""
    bad = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    if bad:
        raise ValueError(
            f"{what} has values that are not finite (NaN or infinity) in {', '.join(map(repr, bad))}; go back to "
            "a checkpoint before they appeared, or train again at a lower learning rate"
        )


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of named tensors: names, shapes, types, values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_folder(path: str | Path) -> None:
    """Raise a FileNotFoundError that names the folder or the file of a saved SAE that is missing."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}: give the folder of a saved SAE")
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{str(folder)!r} has no {name}: it is not a complete saved SAE; {SAVE_AGAIN}")
    if (size := (folder / SAE_CFG_FILENAME).stat().st_size) > LARGEST_CONFIG:
        raise ValueError(
            f"{str(folder / SAE_CFG_FILENAME)!r} has {size:,} bytes: it is no config of an SAE; {SAVE_AGAIN}"
        )


def check_sparsity(folder: str | Path, d_sae: int) -> None:
    """Raise a ValueError where the folder of an SAE has a sparsity file that is damaged, or not of its `d_sae` features."""
    path = Path(folder) / SPARSITY_FILENAME
    if not path.exists():
        return
    with reading(path, remedy=f"{SAVE_AGAIN}, or remove the file"):
        sparsity = load_file(path)["sparsity"]
        if tuple(sparsity.shape) != (d_sae,):
            raise ValueError(f"sparsity has shape {tuple(sparsity.shape)}, the SAE makes it {(d_sae,)}")
        if torch.isnan(sparsity).any():
            raise ValueError("it holds NaN")


def write_note(path: str | Path) -> None:
    """Say in a saved SAE's folder what loads it, unless a README.md (such as a model card) is there."""
    note = Path(path) / NOTE_FILENAME
    if not os.path.lexists(note):  # a link to nowhere would be followed
        architecture = json.loads((Path(path) / SAE_CFG_FILENAME).read_text(encoding="utf-8"))["architecture"]
        note.write_text(NOTE.format(architecture=architecture), encoding="utf-8")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The first 16 digits of `loading.sha256_of` named tensors."""
    return sha256_of(tensors)[:16]


def describe(sae: SAE[Any], where: str = "") -> str:
    """An SAE by its weights and what its config says of how they are used."""
    config = {name: value for name, value in sae.cfg.to_dict().items() if name not in ("metadata", "device")}
    return f"SAE {digest(sae.state_dict())}{where}, config {json.dumps(config, sort_keys=True)}"
