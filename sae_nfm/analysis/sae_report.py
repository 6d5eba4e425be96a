"""Norms, shares and paths of one SAE: the published figures beside their controls, in one frozen result.

Weights are reported as trained (published), in one unit, in the canonical gauge, weighted by activation, and at random
initialisation; what paths do on tokens as `path_figures` has it, for the SAE and for its copy in the canonical gauge. The same
functions serve joint_nfm and plain TopK SAEs; what an SAE does not have is None. `figure_rows` makes a table of it.

Source: arXiv 2507.00269, analysis of decoder norms and components; the controls are this package's.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, TrainingSAEConfig
from torch import Tensor

from sae_nfm.analysis import gauge
from sae_nfm.analysis.path_contributions import FeatureEnergies, token_paths
from sae_nfm.analysis.path_statistics import FunctionalFigures, functional_figures
from sae_nfm.analysis.weight_norms import MIN_FEATURES, N_PERMUTATIONS, WeightFigures, correlation, weight_figures
from sae_nfm.architectures import random_initialisation, training_config
from sae_nfm.stats import PermutedCorrelation


@dataclass(frozen=True, kw_only=True)
class WeightReport:
    """Figures of a feature's weights, as published and under controls."""

    as_trained: WeightFigures
    """The published figures."""
    one_unit: WeightFigures
    """Rows as read, times the trained encoder's scale: all read one activation, with the published decoder norms. Differs from
    `as_trained` under rescaling only."""
    canonical: WeightFigures | None
    """In the canonical gauge and that unit; None where there is none."""
    not_canonical: str | None
    """Why there is none."""
    weighted: WeightFigures | None
    """Rows times the root-mean-square activation on tokens, in the canonical gauge where there is one; split at the median. Of
    features that are active on the tokens only; None when those are fewer than 10."""
    initial: WeightFigures | None
    """As trained, of a random initialisation; None where the training config is not known."""
    frequency: PermutedCorrelation | None
    """Published squared norm with firing frequency."""


@dataclass(frozen=True, kw_only=True)
class GaugeReport:
    """Everything about one SAE."""

    weights: WeightReport
    """What the weights are."""
    paths: FunctionalFigures
    """What the paths do on tokens, in the SAE's own gauge."""
    canonical_paths: FunctionalFigures | None
    """The same in the canonical gauge, less `residual`, which no gauge changes; `paths` itself without a linear path, None where
    there is no such gauge."""


@torch.no_grad()
def gauge_report(
    sae: SAE[Any],
    x: Float[Tensor, "tokens d_in"],
    documents: Int[Tensor, " tokens"],
    *,
    seed: int,
    initial: TrainingSAEConfig | Literal["from metadata"] | None = "from metadata",
    n_permutations: int = N_PERMUTATIONS,
) -> GaugeReport:
    """Measure an SAE on activations, such as `functional.read_activations` returns.

    Args:
        sae: joint_nfm or TopK, at least 10 features; it is not changed.
        x: activations as the SAE takes them, heads flattened.
        documents: the document of each token; at least 5.
        seed: of permutations, divisions and the random initialisation.
        initial: how the SAE was initialised, for the reference; None leaves that out.
        n_permutations: of each null.

    Raises:
        ValueError: for too few features or documents, another kind of SAE, or metadata that do not say how it was trained.
    """
    fixed, reason = _canonical(sae)
    tokens = token_paths(sae, x, documents)
    paths = functional_figures(sae, tokens, seed=seed, n_permutations=n_permutations)
    cfg = training_config(sae) if initial == "from metadata" else initial
    weights = _weight_report(sae, fixed, reason, cfg, paths.energies, seed, n_permutations)
    canonical_paths = paths if fixed is not None else None
    if tokens.paths.linear is not None and fixed is not None:
        tokens = token_paths(fixed, x, documents)
        canonical_paths = functional_figures(
            fixed, tokens, seed=seed, n_permutations=n_permutations, with_residual=False
        )
    return GaugeReport(weights=weights, paths=paths, canonical_paths=canonical_paths)


def _canonical(sae: SAE[Any]) -> tuple[SAE[Any] | None, str | None]:
    try:
        return gauge.canonical(sae), None
    except ValueError as error:
        return None, str(error)


def _weight_report(
    sae: SAE[Any],
    fixed: SAE[Any] | None,
    reason: str | None,
    initial: TrainingSAEConfig | None,
    energies: FeatureEnergies,
    seed: int,
    n_permutations: int,
) -> WeightReport:
    settings: Any = {"seed": seed, "n_permutations": n_permutations}
    as_trained = weight_figures(gauge.as_trained(sae), **settings)
    reference = None if initial is None else random_initialisation(initial, seed)
    return WeightReport(
        as_trained=as_trained,
        one_unit=_in_one_unit(sae, settings),
        canonical=None if fixed is None else _in_one_unit(fixed, settings),
        not_canonical=reason,
        weighted=_weighted(sae if fixed is None else fixed, energies, settings),
        initial=None if reference is None else weight_figures(gauge.as_trained(reference), **settings),
        frequency=correlation(as_trained.squared_norm, energies.frequency, **settings),
    )


def _in_one_unit(sae: SAE[Any], settings: Any) -> WeightFigures:
    return weight_figures(gauge.as_read(sae).times(gauge.encoder_scale(sae)), **settings)


def _weighted(sae: SAE[Any], energies: FeatureEnergies, settings: Any) -> WeightFigures | None:
    size, read_size = energies.second_moment.sqrt(), energies.read_second_moment.sqrt()
    rows = gauge.as_read(sae).times(size, read_size).of(energies.active > 0)
    if len(rows.direct) < MIN_FEATURES:
        return None
    return weight_figures(rows, threshold=float(rows.direct.norm(dim=-1).square().median()), **settings)
