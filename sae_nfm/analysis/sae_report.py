"""Norms, shares and paths of one SAE: the published statistics beside their controls, in one frozen result.

Weights are reported as trained (published), in one unit, in the canonical gauge, weighted by activation, and at random
initialisation; what paths do on tokens for the SAE and for its copy in the canonical gauge, with intervals over documents:

    as published (biases in, zero ablation)              control (means over tokens left out or kept in place)
    share of the mean absolute value, by path            share of the energy about the mean; of the whole output
    sign of linear + nonlinear along direct              sign of nonlinear along direct + linear: free of the gauge
    gains of the paths on squared error, their overlap   the same under mean ablation; what the nonlinear residual gains

The same functions serve joint_nfm and plain TopK SAEs; what an SAE does not have is None. `figure_rows` makes a table of it.

Source: arXiv 2507.00269, analysis of decoder norms and components; the controls are this package's.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sae_lens import SAE, TrainingSAEConfig
from torch import Tensor

from sae_nfm.analysis import gauge
from sae_nfm.analysis.gauge import as_read
from sae_nfm.analysis.linear_component import LinearPart, linear_part
from sae_nfm.analysis.path_contributions import (
    FeatureEnergies,
    PathSizes,
    TokenPaths,
    centred,
    feature_energies,
    integration,
    pair_projections,
    path_sizes,
    projection,
    squared_error_gains,
    token_paths,
)
from sae_nfm.analysis.results import Figure, FigureRow, Statistic
from sae_nfm.analysis.weight_norms import (
    MIN_FEATURES,
    N_PERMUTATIONS,
    PathNorms,
    WeightFigures,
    correlation,
    share_correlations,
    weight_figures,
)
from sae_nfm.architectures import NFMDecoder, random_initialisation, training_config
from sae_nfm.kernels import BILINEAR, heads
from sae_nfm.stats import Estimate, PermutedCorrelation, clustered_mean, ratio_of_means

Documents = NDArray[np.int64]
PERMUTED, PAIRED = "rows permuted over features", "random pairing"


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
    """What the paths do on tokens; None for what an SAE without the paths in question does not have."""

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
    """Pairs along the decoder rows; heads "fm" and "bilinear" only."""
    gains: Mapping[str, Estimate] | None
    """Gains on squared error of "linear", "nonlinear" and "both", as fractions of the error of the direct path alone, and their
    "overlap", tested against 0. Zero ablation, the published one."""
    gains_keeping_means: Mapping[str, Estimate] | None
    """The same by mean ablation."""
    residual: ResidualFigures | None
    """What is left of the interaction path after a linear map."""


@torch.no_grad()
def functional_figures(
    sae: SAE[Any], tokens: TokenPaths, *, seed: int, n_permutations: int = N_PERMUTATIONS, with_residual: bool = True
) -> FunctionalFigures:
    """All statistics of what paths do on tokens.

    Args:
        tokens: `token_paths` of it, with documents.
        seed: of the permutations and of the division of documents.
        with_residual: whether to fit the linear map.

    Raises:
        ValueError: when documents are not known, or fewer than 5.
    """
    if tokens.documents is None:
        raise ValueError("intervals are over documents: give token_paths the document of each token")
    documents, paths, sizes = tokens.documents.cpu().numpy(), tokens.paths, path_sizes(tokens.paths)
    energies, output = feature_energies(sae, tokens), centred(paths.total().float()).square().sum(-1)
    added, nonlinear, linear = integration(paths), paths.interaction, paths.direct
    if paths.linear is not None:
        linear = linear + paths.linear
    has_both = paths.linear is not None and nonlinear is not None
    return FunctionalFigures(
        energies=energies,
        sizes=sizes,
        magnitude_shares=_shares(sizes.magnitude, documents),
        energy_shares=_shares(sizes.energy, documents),
        nonlinear_of_output=None if nonlinear is None else _ratio(sizes.energy["interaction"], output, documents),
        share_correlations=_share_correlations(energies, seed, n_permutations),
        inhibition=None if added is None else _inhibition(added, paths.direct, documents),
        gauge_free_inhibition=None
        if nonlinear is None
        else _inhibition(centred(nonlinear), centred(linear), documents),
        pairs=_pair_inhibition(sae, tokens, documents),
        gains=_relative_gains(tokens, documents, keep_means=False) if has_both else None,
        gains_keeping_means=_relative_gains(tokens, documents, keep_means=True) if has_both else None,
        residual=_beyond_linear(sae, tokens, documents, output, seed) if with_residual else None,
    )


def _shares(measure: Mapping[str, Tensor], documents: Documents) -> dict[str, Estimate]:
    parts = {name: one for name, one in measure.items() if name != "direct"}
    total = torch.stack(list(parts.values())).sum(0) if parts else None
    return {name: _ratio(one, total, documents) for name, one in parts.items()}


def _share_correlations(
    energies: FeatureEnergies, seed: int, n_permutations: int
) -> dict[str, PermutedCorrelation | None]:
    active = energies.active > 0
    if int(active.sum()) < 3:
        return dict.fromkeys(("integration", "linear", "nonlinear", "direct"))
    norms = {name: getattr(energies, name)[active].sqrt() for name in ("direct", "linear", "nonlinear")}
    return share_correlations(PathNorms(**norms), seed=seed, n_permutations=n_permutations)


def _inhibition(added: Tensor, onto: Tensor, documents: Documents) -> Inhibition:
    found = projection(added, onto)
    centre = clustered_mean(_array(found.coefficient < 0) - 0.5, documents)
    return Inhibition(
        fraction_negative=_against_half(centre, lambda value: value + 0.5),
        mean=clustered_mean(found.coefficient.cpu().numpy(), documents),
        mean_negative=found.mean_negative,
    )


def _against_half(found: Estimate, share: Callable[[float], float]) -> Estimate:
    """A share that was tested against 1/2, from what was tested in its place."""
    ends = {name: share(getattr(found, name)) for name in ("estimate", "low", "high")}
    return replace(found, **ends, test=f"share, against 1/2: {found.test}")


def _pair_inhibition(sae: SAE[Any], tokens: TokenPaths, documents: Documents) -> PairInhibition | None:
    if not isinstance(sae, NFMDecoder) or sae.cfg.head not in heads.PAIRED or tokens.gates is None:
        return None
    V, B, W_2 = sae.V.detach(), None, sae.W_2.detach()
    if sae.cfg.head == BILINEAR:
        (V, B), W_1 = V.chunk(2, dim=-1), torch.eye(len(W_2)).to(W_2)
    else:
        W_1 = sae.W_1.detach()
    found = pair_projections(tokens.read, tokens.gates, as_read(sae).direct, V, W_1, W_2, B)
    doubled = ratio_of_means(2 * _array(found.negative), _array(found.projections), documents)
    return PairInhibition(
        fraction_negative=_against_half(doubled, lambda value: value / 2),
        negative_strength=_ratio(found.negative_strength, found.strength, documents),
        relative_strength=_ratio(found.strength, found.direct_strength, documents),
    )


def _relative_gains(tokens: TokenPaths, documents: Documents, *, keep_means: bool) -> dict[str, Estimate]:
    gains = squared_error_gains(tokens.x, tokens.paths, keep_means=keep_means)
    names, tested = ("linear", "nonlinear", "both", "overlap"), clustered_mean(gains.overlap, documents)
    found = {name: _ratio(getattr(gains, name), gains.base, documents) for name in names}
    overlap = replace(found["overlap"], p_value=tested.p_value, test=f"p-value: {tested.test}")
    return found | {"overlap": overlap}


def _beyond_linear(
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
    return ResidualFigures(
        part=part,
        r2=ratio_of_means(part.squared_error.numpy(), part.deviation.numpy(), held_out).complement(),
        of_output=_ratio(part.squared_error, output[chosen], held_out),
        gain_of_path=ratio_of_means(whole, with_mean, held_out).complement(),
        gain_of_residual=ratio_of_means(whole, with_linear, held_out).complement(),
    )


def _ratio(a: Any, b: Any, documents: Documents) -> Estimate:
    """A share: nothing is tested, since no share is singled out."""
    return replace(ratio_of_means(_array(a), _array(b), documents), p_value=None)


def _array(values: Tensor | NDArray[Any]) -> NDArray[Any]:
    return values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values


@dataclass(frozen=True, kw_only=True)
class WeightReport:
    """Statistics of a feature's weights, as published and under controls."""

    as_trained: WeightFigures
    one_unit: WeightFigures
    """Rows as read, times the trained encoder's scale: all read one activation, with the published decoder norms. Differs from
    `as_trained` under rescaling only."""
    canonical: WeightFigures | None
    """In the canonical gauge and that unit; None where there is none."""
    not_canonical: str | None
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
    paths: FunctionalFigures
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
    """Measure an SAE on activations, such as `read_activations` returns.

    Args:
        sae: joint_nfm or TopK, at least 10 features; it is not changed.
        x: activations as the SAE takes them, heads flattened.
        documents: the document of each token; at least 5.
        seed: of permutations, divisions and the random initialisation.
        initial: how the SAE was initialised, for the reference; None leaves that out.

    Raises:
        ValueError: for too few features or documents, another kind of SAE, or metadata that do not say how it was trained.
    """
    settings: Any = {"seed": seed, "n_permutations": n_permutations}
    fixed, reason = gauge.canonical_or_reason(sae)
    tokens = token_paths(sae, x, documents)
    paths = functional_figures(sae, tokens, **settings)
    cfg = training_config(sae) if initial == "from metadata" else initial
    weights = _weight_report(sae, fixed, reason, cfg, paths.energies, settings)
    canonical_paths = None if fixed is None else paths
    if tokens.paths.linear is not None and fixed is not None:
        canonical_tokens = token_paths(fixed, x, documents)
        canonical_paths = functional_figures(fixed, canonical_tokens, **settings, with_residual=False)
    return GaugeReport(weights=weights, paths=paths, canonical_paths=canonical_paths)


def _weight_report(
    sae: SAE[Any],
    fixed: SAE[Any] | None,
    reason: str | None,
    initial: TrainingSAEConfig | None,
    energies: FeatureEnergies,
    settings: Any,
) -> WeightReport:
    def trained(of: SAE[Any]) -> WeightFigures:
        return weight_figures(gauge.as_trained(of), **settings)

    def in_one_unit(of: SAE[Any]) -> WeightFigures:
        return weight_figures(as_read(of).times(gauge.encoder_scale(of)), **settings)

    as_trained = trained(sae)
    return WeightReport(
        as_trained=as_trained,
        one_unit=in_one_unit(sae),
        canonical=None if fixed is None else in_one_unit(fixed),
        not_canonical=reason,
        weighted=_weighted(sae if fixed is None else fixed, energies, settings),
        initial=None if initial is None else trained(random_initialisation(initial, settings["seed"])),
        frequency=correlation(as_trained.squared_norm, energies.frequency, **settings),
    )


def _weighted(sae: SAE[Any], energies: FeatureEnergies, settings: Any) -> WeightFigures | None:
    size, read_size = energies.second_moment.sqrt(), energies.read_second_moment.sqrt()
    rows = as_read(sae).times(size, read_size).of(energies.active > 0)
    if len(rows.direct) < MIN_FEATURES:
        return None
    return weight_figures(rows, threshold=float(rows.direct.norm(dim=-1).square().median()), **settings)


def figure_rows(report: GaugeReport) -> list[FigureRow]:
    """Every statistic with its controls, norms first, then what paths do on tokens."""
    weights, paths, canonical = report.weights, report.paths, report.canonical_paths
    gauge = "canonical gauge" + (f": none, {weights.not_canonical}" if weights.not_canonical else "")
    return [
        *_references(weights, gauge),
        *_nulls(weights, paths),
        *_sides(weights.as_trained),
        *_sizes(paths, canonical, gauge),
        *_residual(paths),
        *_gains(paths),
        *_inhibitions(paths, canonical, gauge),
    ]


def _references(weights: WeightReport, gauge: str) -> Iterator[FigureRow]:
    """Statistics of the weights beside the same ones in another gauge, another unit, or before training."""
    references = {
        "rows in one unit": weights.one_unit,
        f"rows in one unit, {gauge}": weights.canonical,
        "rows times root-mean-square activation": weights.weighted,
        "random initialisation": weights.initial,
    }
    trained = _summary(weights.as_trained)
    for control, figures in references.items():
        other = {} if figures is None else _summary(figures)
        for what, published in trained.items():
            yield _row(*what, published, other.get(what), control)


def _row(
    statistic: Statistic | str, path: str, /, published: Figure, controlled: Figure, control: str, **more: Any
) -> FigureRow:
    """A line about a statistic of a path, or about another one by its name."""
    if isinstance(statistic, Statistic):
        more |= {"name": statistic.of(path), "statistic": statistic, "path": path}
    else:
        more["name"] = statistic
    return FigureRow(published=published, controlled=controlled, control=control, **more)


def _summary(figures: WeightFigures) -> dict[tuple[Statistic | str, str], float | None]:
    dip, mixture, modes = figures.dip, figures.mixture, "modes of the squared norm"
    return {
        ("mean squared decoder norm", ""): float(figures.squared_norm.double().mean()),
        (f"{modes}: p-value of the dip test", ""): None if dip is None else dip.p_value,
        (f"{modes}: Gaussians preferred by BIC", ""): mixture and float(mixture.preferred.n_components),
        ("components for 90 % of variance", ""): float(figures.components),
        **{(Statistic.NORM_SHARE, path): float(one.double().mean()) for path, one in figures.shares.named().items()},
        **{(Statistic.CORRELATION, path): _rho(one) for path, one in figures.share_correlations.items()},
    }


def _nulls(weights: WeightReport, paths: FunctionalFigures) -> Iterator[FigureRow]:
    """Correlations beside what they are for unrelated rows."""
    trained = weights.as_trained
    for path, found in trained.share_correlations.items():
        yield from _null(Statistic.CORRELATION, path, found)
    for unit, figures in {"canonical gauge": weights.canonical, "weighted": weights.weighted}.items():
        for path, found in figures.share_correlations.items() if figures else ():
            yield from _null(f"{Statistic.CORRELATION}, {unit}, {path}", "", found)
    for path, found in trained.norm_correlations.items():
        published, control = _rho(trained.share_correlations[path]), "the path's own norm in place of its share"
        yield _row(Statistic.CORRELATION, path, published, _rho(found), control)
    for path, found in paths.share_correlations.items():
        yield from _null(f"Spearman of energy and share of contributions on tokens, {path}", "", found)
    yield from _null("Spearman of squared norm and participation ratio", "", trained.participation, PAIRED)
    yield from _null("Spearman of squared norm and firing frequency", "", weights.frequency, PAIRED)


def _null(
    statistic: Statistic | str, path: str, found: PermutedCorrelation | None, control: str = PERMUTED
) -> Iterator[FigureRow]:
    if found is not None:
        control = f"{control}, p = {found.p_value:.2g}"
        yield _row(statistic, path, found.observed, found.null_mean, control, p_value=found.p_value)


def _sides(trained: WeightFigures) -> Iterator[FigureRow]:
    """Shares on both sides of the published squared norm."""
    n = len(trained.squared_norm)
    for side, split in (("below", trained.below), ("above", trained.above)):
        for name, share in trained.shares.named().items():
            what = f"{Statistic.NORM_SHARE.of(name)}, squared norm {side} {trained.threshold}"
            published = None if split.shares is None else float(split.shares.named()[name])
            yield _row(what, "", published, float(share.double().mean()), f"all {n} features; {split.n} are {side}")


def _sizes(paths: FunctionalFigures, canonical: FunctionalFigures | None, gauge: str) -> Iterator[FigureRow]:
    for name, share in paths.magnitude_shares.items():
        yield _row(Statistic.WRITTEN, name, share, paths.energy_shares[name], "energy about the mean")
        fixed = None if canonical is None else canonical.energy_shares[name]
        yield _row(Statistic.WRITTEN, name, share, fixed, f"energy about the mean, {gauge}")


def _residual(paths: FunctionalFigures) -> Iterator[FigureRow]:
    residual = paths.residual
    if residual is None:
        return
    share, name, of = paths.magnitude_shares["interaction"], "nonlinear share of what is written", Statistic.WRITTEN
    yield _row(name, "", share, paths.nonlinear_of_output, "energy, of the whole output", statistic=of)
    less_linear = "less what is linear in f (held out)"
    yield _row(name, "", share, residual.of_output, f"the same, {less_linear}", statistic=of)
    name = "nonlinear share of the interaction path"
    yield _row(name, "", 1.0, residual.r2.complement(), f"{less_linear}; published: all")
    name, control = "error the path saves over its mean", "over its own linear prediction"
    yield _row(name, "", residual.gain_of_path, residual.gain_of_residual, control)


def _gains(paths: FunctionalFigures) -> Iterator[FigureRow]:
    if paths.gains and paths.gains_keeping_means:
        for name, gain in paths.gains.items():
            control = "a path's mean kept in place when it is off"
            yield _row(f"gain on squared error, {name}", "", gain, paths.gains_keeping_means[name], control)


def _inhibitions(paths: FunctionalFigures, canonical: FunctionalFigures | None, gauge: str) -> Iterator[FigureRow]:
    one, other = paths.inhibition, paths.gauge_free_inhibition
    control = "nonlinear along direct + linear, about their means: free of the gauge"
    fields = {
        "fraction_negative": "tokens on which integration opposes the direct path",
        "mean": "mean projection of integration on the direct path",
    }
    for field, name in fields.items() if one else ():
        yield _row(name, "", getattr(one, field), getattr(other, field, None), control)
    if paths.pairs is not None:
        fixed = None if canonical is None or canonical.pairs is None else canonical.pairs.fraction_negative
        yield _row("pair outputs that oppose a feature of theirs", "", paths.pairs.fraction_negative, fixed, gauge)


def _rho(found: PermutedCorrelation | None) -> float | None:
    return None if found is None else found.observed
