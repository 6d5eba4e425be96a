"""Squared norms of a feature's decoder row, as histograms: as trained, in the canonical gauge, of a TopK SAE, before training.

    decoder            ||w_i||^2             in the unit of the trained encoder, the published one
    encoder x decoder  ||e_i||^2 ||w_i||^2   e_i: the encoder's column

SAELens folds the decoder norms of a TopK SAE into its encoder when it saves it (all ||w_i|| are 1 then), and a norm can be traded
between the two without changing the SAE. The product does not depend on that, nor on how activations are normalised.

Source: arXiv 2507.00269, analysis of decoder norms (SAE unimodal with mean 0.4; joint bimodal with means 0.05 and 0.37, not
tested); the dip test, the canonical gauge and the product are this package's.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from torch import Tensor

from sae_nfm.analysis import gauge
from sae_nfm.analysis.results import (
    AS_TRAINED,
    CANONICAL,
    INITIAL,
    TOPK,
    Measure,
    NormHistogram,
    NormsResult,
    SAENorms,
    SquaredNorms,
)
from sae_nfm.analysis.weight_norms import MIN_FEATURES, varies
from sae_nfm.architectures import random_initialisation, training_config
from sae_nfm.architectures.joint_config import ARCHITECTURE
from sae_nfm.loading import load_sae
from sae_nfm.stats import dip_test

BINS = 60
"""Bins of a histogram."""
LARGEST_N = 4
"""SAEs of a run that are looked at; a comparison of many seeds has more."""


@torch.no_grad()
def squared_norms(sae: SAE[Any], *, topk: SAE[Any] | None, seed: int, bins: int = BINS) -> tuple[SquaredNorms, ...]:
    """Both measures.

    Args:
        sae: joint_nfm; it is not changed.
        topk: a TopK SAE to compare with.
        seed: of the random initialisation, which is left out where the metadata do not say how the SAE was trained.
    """
    saes, (fixed, reason) = {AS_TRAINED: sae}, gauge.canonical_or_reason(sae)
    if fixed is not None:
        saes[CANONICAL] = fixed
    if topk is not None:
        saes[TOPK] = topk
    with suppress(ValueError):
        saes[INITIAL] = random_initialisation(training_config(sae), seed)
    values = {name: _values(one) for name, one in saes.items()}
    return tuple(
        _histograms(measure, {name: own[measure] for name, own in values.items()}, bins, reason)
        for measure in get_args(Measure)
    )


def norms_of_saes(folders: Sequence[Path], root: Path, *, seed: int = 0) -> NormsResult:
    """Both measures of the first `LARGEST_N` joint SAEs with a linear path, beside a TopK SAE of their width and parent folder.

    Args:
        folders: of saved SAEs of any architecture.
        root: of the run; SAEs are named by their folders relative to it.
        seed: of the random initialisations.
    """
    configs = {folder: json.loads((folder / SAE_CFG_FILENAME).read_text()) for folder in folders}
    joint = [
        folder
        for folder, cfg in configs.items()
        if cfg.get("architecture") == ARCHITECTURE and cfg.get("use_linear_path")
    ]
    found: list[SAENorms] = []
    for folder in joint[:LARGEST_N]:
        beside = (
            other
            for other, cfg in configs.items()
            if (cfg.get("architecture"), other.parent, cfg["d_sae"])
            == ("topk", folder.parent, configs[folder]["d_sae"])
        )
        topk = next(beside, None)
        norms = squared_norms(_loaded(folder), topk=None if topk is None else _loaded(topk), seed=seed)
        found.append(SAENorms(sae=folder.relative_to(root).as_posix(), norms=norms))
    return NormsResult(saes=tuple(found))


def _loaded(folder: Path) -> SAE[Any]:
    return load_sae(str(folder)).eval()


def _values(sae: SAE[Any]) -> dict[Measure, Float[Tensor, " d_sae"]]:
    rows = gauge.as_read(sae).times(gauge.encoder_scale(sae))
    encoder, decoder = (weight.detach().float().square() for weight in (sae.W_enc, sae.W_dec))
    return {"decoder": rows.direct.square().sum(-1), "encoder x decoder": encoder.sum(0) * decoder.sum(-1)}


def _histograms(measure: Measure, values: Mapping[str, Tensor], bins: int, reason: str | None) -> SquaredNorms:
    arrays = {name: one.double().cpu().numpy() for name, one in values.items()}
    edges = np.linspace(0.0, max(float(array.max()) for array in arrays.values()), bins + 1)
    return SquaredNorms(
        measure=measure,
        edges=tuple(edges.tolist()),
        histograms=tuple(
            NormHistogram(
                name=name,
                counts=tuple(np.histogram(array, edges)[0].tolist()),
                mean=float(array.mean()),
                dip=dip_test(array) if len(array) >= MIN_FEATURES and varies(values[name]) else None,
            )
            for name, array in arrays.items()
        ),
        not_canonical=reason,
    )
