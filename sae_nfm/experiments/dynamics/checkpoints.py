"""The checkpoints of one training run, in order, each as an SAE that takes activations as the language model has them.

Weights of a checkpoint are for inputs that the trainer has normalised, by what stands in activation_scaler.json beside them;
that is folded in, so that all checkpoints of a run, and the SAE it ended with, are in one unit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_CFG_FILENAME

from sae_nfm.architectures import UNFOLDED
from sae_nfm.architectures.joint_config import ARCHITECTURE
from sae_nfm.convert import damage_explained, fold_normalisation, read_json
from sae_nfm.loading import check_folder

FEWEST = 2
"""Checkpoints without which nothing moves."""
FINAL = "final_"
"""Begins the name of the checkpoint that --save_final_checkpoint leaves."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint of a run."""

    tokens: int
    folder: Path


def checkpoints_of_run(path: str | Path) -> list[Checkpoint]:
    """The checkpoints of a run, by tokens trained on.

    Args:
        path: a folder of folders that are named by tokens (SAELens's `<checkpoint_path>/<id>`), or what holds just one such.

    Raises:
        FileNotFoundError: when there is no such folder, or it has fewer than two checkpoints.
        ValueError: when it has those of several runs.
    """
    found = [
        Checkpoint(tokens=tokens, folder=file.parent)
        for file in sorted(Path(path).glob(f"**/{SAE_CFG_FILENAME}"))
        if (tokens := _tokens(file.parent)) is not None
    ]
    runs = sorted({str(one.folder.parent) for one in found})
    if len(runs) > 1:
        raise ValueError(f"{str(path)!r} has the checkpoints of {len(runs)} runs; give one of {', '.join(runs[:4])}")
    by_tokens = {one.tokens: one for one in found}  # the final one, where another has as many tokens
    if len(by_tokens) < FEWEST:
        raise FileNotFoundError(
            f"{str(path)!r} has {len(by_tokens)} checkpoints of an SAE, and at least {FEWEST} are needed; train with "
            "--n_checkpoints, and give the folder whose folders are named by tokens, such as checkpoints/<id>"
        )
    return [by_tokens[tokens] for tokens in sorted(by_tokens)]


def load_checkpoint(checkpoint: Checkpoint, architecture: str = ARCHITECTURE, device: str = "cpu") -> SAE[Any]:
    """The SAE of a checkpoint, its normalisation folded in.

    Raises:
        ValueError, FileNotFoundError: for another architecture than the wanted one, or a damaged or missing file.
    """
    folder = checkpoint.folder
    check_folder(folder)
    found = read_json(folder / SAE_CFG_FILENAME).get("architecture")
    if found != architecture:
        raise ValueError(f"{str(folder)!r} is a checkpoint of a {found} SAE; give those of a {architecture} one")
    with damage_explained(folder):
        sae = SAE.load_from_disk(folder, device=device).eval()
    if sae.cfg.normalize_activations in UNFOLDED:
        fold_normalisation(sae, folder / ACTIVATION_SCALER_CFG_FILENAME)
    return sae


def _tokens(folder: Path) -> int | None:
    name = folder.name.removeprefix(FINAL)
    return int(name) if name.isdigit() else None
