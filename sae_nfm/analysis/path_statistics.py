"""The published statistics of what paths do on tokens, each beside its control, with intervals over documents.

    as published (biases in, zero ablation)              control (means over tokens left out or kept in place)
    share of the mean absolute value, by path            share of the energy about the mean; of the whole output
    sign of linear + nonlinear along direct              sign of nonlinear along direct + linear: free of the gauge
    gains of the paths on squared error, their overlap   the same under mean ablation; what the nonlinear residual gains

Source: arXiv 2507.00269, component analysis; the controls are this package's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sae_lens import SAE
from torch import Tensor

from sae_nfm.analysis.gauge import as_read
from sae_nfm.analysis.linear_component import LinearPart, linear_part
from sae_nfm.analysis.path_contributions import FeatureEnergies, PathSizes, TokenPaths, feature_energies, path_sizes
from sae_nfm.analysis.path_overlap import (
    Gains,
    PairProjections,
    Projection,
    centred,
    integration,
    pair_projections,
    projection,
    squared_error_gains,
)
from sae_nfm.analysis.weight_norms import N_PERMUTATIONS, PathNorms, share_correlations
from sae_nfm.architectures import NFMDecoder, Paths
from sae_nfm.stats import Estimate, PermutedCorrelation, clustered_mean, ratio_of_means

Documents = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Inhibition:
    """How often and how far one output opposes another, over tokens."""

    fraction_negative: Estimate
    """Share of tokens with a negative projection, tested against 1/2."""
    mean: Estimate
    """Mean projection coefficient: -0.1 takes a tenth of the other output away."""
    mean_negative: float | None
    """Mean coefficient where it is negative; None where it never is."""


@dataclass(frozen=True, kw_only=True)
class PairInhibition:
    """How often pairs write against the directions of their own features."""

    fraction_negative: Estimate
    """Share of negative projections, two for each pair, tested against 1/2."""
    negative_strength: Estimate
    """Share of the summed absolute projection that is negative."""
    relative_strength: Estimate
    """Summed absolute projection over what the direct path writes along the same directions."""


@dataclass(frozen=True, kw_only=True)
class GainFigures:
    """Gains on squared error, as fractions of the error of the direct path alone."""

    linear: Estimate
    nonlinear: Estimate
    """Gain of the interaction path by itself."""
    both: Estimate
    overlap: Estimate
    """gain(linear) + gain(nonlinear) - gain(both), tested against 0."""


@dataclass(frozen=True, kw_only=True)
class ResidualFigures:
    """What of the interaction path's output is not linear in the features, on tokens the regression has not seen."""

    part: LinearPart
    r2: Estimate
    """Its R^2, tested against 0."""
    of_output: Estimate
    """Energy of the residual over the energy of the whole output about its mean."""
    gain_of_path: Estimate
    """Error that the path saves over its own mean, as a fraction of the error with its mean in its place."""
    gain_of_residual: Estimate
    """Error that the path saves over its linear prediction, as a fraction of the error with the prediction in its place."""


@dataclass(frozen=True, kw_only=True)
class FunctionalFigures:
    """What the paths do on tokens."""

    energies: FeatureEnergies
    sizes: PathSizes
    magnitude_shares: Mapping[str, Estimate]
    """Each integration path's part of their summed mean absolute values (published: 94 % linear, 6 % nonlinear)."""
    energy_shares: Mapping[str, Estimate]
    """The same of their energies about the mean over tokens."""
    nonlinear_of_output: Estimate | None
    """Energy of the interaction path over that of the whole output, both about the mean: free of the gauge."""
    share_correlations: Mapping[str, PermutedCorrelation | None]
    """E[f_i^2] ||w_i||^2 over active tokens with the shares of root-mean-square contributions, permuted rows as the null."""
    inhibition: Inhibition | None
    """Linear + nonlinear along direct, as they are."""
    gauge_free_inhibition: Inhibition | None
    """Nonlinear along direct + linear, about their means."""
    pairs: PairInhibition | None
    """Pairs along the decoder rows; head "fm" only."""
    gains: GainFigures | None
    """Zero ablation, the published one."""
    gains_keeping_means: GainFigures | None
    """Mean ablation."""
    residual: ResidualFigures | None
    """What is left of the interaction path after a linear map."""


@torch.no_grad()
def functional_figures(
    sae: SAE[Any],
    tokens: TokenPaths,
    *,
    seed: int,
    n_permutations: int = N_PERMUTATIONS,
    with_residual: bool = True,
) -> FunctionalFigures:
    """All statistics of this module; None for what an SAE without the paths in question does not have.

    Args:
        tokens: `token_paths` of it, with documents.
        seed: of the permutations and of the division of documents.
        with_residual: whether to fit the linear map.

    Raises:
        ValueError: when documents are not known, or fewer than 5.
    """
    if tokens.documents is None:
        raise ValueError("intervals are over documents: give token_paths the document of each token")
    documents, paths = tokens.documents.cpu().numpy(), tokens.paths
    energies, sizes = feature_energies(sae, tokens), path_sizes(paths)
    output = _energy(paths.total())
    has_both = paths.linear is not None and paths.interaction is not None
    added = integration(paths)
    return FunctionalFigures(
        energies=energies,
        sizes=sizes,
        magnitude_shares=_shares(sizes.magnitude, documents),
        energy_shares=_shares(sizes.energy, documents),
        nonlinear_of_output=(
            _ratio(sizes.energy["interaction"], output, documents) if paths.interaction is not None else None
        ),
        share_correlations=_share_correlations(energies, seed, n_permutations),
        inhibition=None if added is None else _inhibition(projection(added, paths.direct), documents),
        gauge_free_inhibition=_gauge_free(paths, documents),
        pairs=_pairs(sae, tokens, documents),
        gains=_gains(squared_error_gains(tokens.x, paths), documents) if has_both else None,
        gains_keeping_means=(
            _gains(squared_error_gains(tokens.x, paths, keep_means=True), documents) if has_both else None
        ),
        residual=_residual(sae, tokens, documents, output, seed) if with_residual else None,
    )


def _shares(measure: Mapping[str, Tensor], documents: Documents) -> dict[str, Estimate]:
    parts = {name: one for name, one in measure.items() if name != "direct"}
    if not parts:
        return {}
    total = torch.stack(list(parts.values())).sum(0)
    return {name: _ratio(one, total, documents) for name, one in parts.items()}


def _share_correlations(
    energies: FeatureEnergies, seed: int, n_permutations: int
) -> dict[str, PermutedCorrelation | None]:
    active = energies.active > 0
    if int(active.sum()) < 3:
        return dict.fromkeys(("integration", "linear", "nonlinear", "direct"))
    direct, linear, nonlinear = (one[active].sqrt() for one in (energies.direct, energies.linear, energies.nonlinear))
    return share_correlations(
        PathNorms(direct=direct, linear=linear, nonlinear=nonlinear), seed=seed, n_permutations=n_permutations
    )


def _inhibition(found: Projection, documents: Documents) -> Inhibition:
    centre = clustered_mean((found.coefficient < 0).double().cpu().numpy() - 0.5, documents)
    return Inhibition(
        fraction_negative=replace(
            centre,
            estimate=centre.estimate + 0.5,
            low=centre.low + 0.5,
            high=centre.high + 0.5,
            test=f"share, against 1/2: {centre.test}",
        ),
        mean=clustered_mean(found.coefficient.cpu().numpy(), documents),
        mean_negative=found.mean_negative,
    )


def _gauge_free(paths: Paths, documents: Documents) -> Inhibition | None:
    if paths.interaction is None:
        return None
    linear = paths.direct if paths.linear is None else paths.direct + paths.linear
    return _inhibition(projection(centred(paths.interaction), centred(linear)), documents)


def _pairs(sae: SAE[Any], tokens: TokenPaths, documents: Documents) -> PairInhibition | None:
    if not isinstance(sae, NFMDecoder) or sae.cfg.head != "fm" or tokens.gates is None:
        return None
    found: PairProjections = pair_projections(
        tokens.read, tokens.gates, as_read(sae).direct, sae.V.detach(), sae.W_1.detach(), sae.W_2.detach()
    )
    doubled = ratio_of_means(2 * _array(found.negative), _array(found.projections), documents)
    return PairInhibition(
        fraction_negative=replace(
            doubled,
            estimate=doubled.estimate / 2,
            low=doubled.low / 2,
            high=doubled.high / 2,
            test=f"share, against 1/2: {doubled.test}",
        ),
        negative_strength=_ratio(found.negative_strength, found.strength, documents),
        relative_strength=_ratio(found.strength, found.direct_strength, documents),
    )


def _gains(gains: Gains, documents: Documents) -> GainFigures:
    overlap = clustered_mean(gains.overlap, documents)
    return GainFigures(
        linear=_ratio(gains.linear, gains.base, documents),
        nonlinear=_ratio(gains.nonlinear, gains.base, documents),
        both=_ratio(gains.both, gains.base, documents),
        overlap=replace(
            _ratio(gains.overlap, gains.base, documents), p_value=overlap.p_value, test=f"p-value: {overlap.test}"
        ),
    )


def _residual(
    sae: SAE[Any], tokens: TokenPaths, documents: Documents, output: Tensor, seed: int
) -> ResidualFigures | None:
    target = tokens.paths.interaction
    if target is None:
        return None
    part = linear_part(tokens.acts, target, sae.cfg.d_sae, seed=seed, documents=tokens.documents)
    chosen = part.test_tokens.to(target.device)
    held_out, acts = documents[part.test_tokens.numpy()], tokens.acts
    predicted = part.predict(type(acts)(acts.indices[chosen], acts.values[chosen]))
    without = (tokens.x - tokens.paths.total() + target)[chosen]  # what the other paths leave
    whole, with_mean, with_linear = (
        _array((without - one).double().square().sum(-1)) for one in (target[chosen], part.mean.to(target), predicted)
    )
    explained = ratio_of_means(part.squared_error.numpy(), part.deviation.numpy(), held_out)
    return ResidualFigures(
        part=part,
        r2=explained.complement(),
        of_output=_ratio(part.squared_error, output[chosen], held_out),
        gain_of_path=_saved(whole, with_mean, held_out),
        gain_of_residual=_saved(whole, with_linear, held_out),
    )


def _saved(error: NDArray[Any], without: NDArray[Any], documents: Documents) -> Estimate:
    """1 - error / without, tested against 0."""
    return ratio_of_means(error, without, documents).complement()


def _ratio(a: Tensor | NDArray[Any], b: Tensor | NDArray[Any], documents: Documents) -> Estimate:
    """A share: nothing is tested, since no share is singled out."""
    return replace(ratio_of_means(_array(a), _array(b), documents), p_value=None)


def _energy(output: Float[Tensor, "tokens d_in"]) -> Float[Tensor, " tokens"]:
    return centred(output.float()).square().sum(-1)


def _array(values: Tensor | NDArray[Any]) -> NDArray[Any]:
    return values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
