"""Norms, shares and paths of one SAE: the published statistics beside their controls, in one frozen result.

Weights are reported as trained (published), in one unit, in the canonical gauge, weighted by activation, and at random
initialisation; what paths do on tokens as `path_figures` has it, for the SAE and for its copy in the canonical gauge. The same
functions serve joint_nfm and plain TopK SAEs; what an SAE does not have is None. `figure_rows` makes a table of it.

Source: arXiv 2507.00269, analysis of decoder norms and components; the controls are this package's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, TrainingSAEConfig
from torch import Tensor

from sae_nfm.analysis import gauge
from sae_nfm.analysis.path_contributions import FeatureEnergies, token_paths
from sae_nfm.analysis.path_statistics import FunctionalFigures, Inhibition, functional_figures
from sae_nfm.analysis.results import Figure, FigureRow, Statistic
from sae_nfm.analysis.weight_norms import MIN_FEATURES, N_PERMUTATIONS, WeightFigures, correlation, weight_figures
from sae_nfm.architectures import random_initialisation, training_config
from sae_nfm.stats import PermutedCorrelation

PERMUTED, PAIRED = "rows permuted over features", "random pairing"


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
    """Measure an SAE on activations, such as `functional.read_activations` returns.

    Args:
        sae: joint_nfm or TopK, at least 10 features; it is not changed.
        x: activations as the SAE takes them, heads flattened.
        documents: the document of each token; at least 5.
        seed: of permutations, divisions and the random initialisation.
        initial: how the SAE was initialised, for the reference; None leaves that out.

    Raises:
        ValueError: for too few features or documents, another kind of SAE, or metadata that do not say how it was trained.
    """
    fixed, reason = gauge.canonical_or_reason(sae)
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
        *_inhibition(paths, canonical, gauge),
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
            yield FigureRow(**_named(*what), published=published, controlled=other.get(what), control=control)


def _named(statistic: Statistic | str, path: str) -> dict[str, Any]:
    """Name, statistic and path of a line: a statistic of a path, or another one by its name."""
    if isinstance(statistic, Statistic):
        return {"name": statistic.of(path), "statistic": statistic, "path": path}
    return {"name": statistic}


def _summary(figures: WeightFigures) -> dict[tuple[Statistic | str, str], float | None]:
    dip, mixture = figures.dip, figures.mixture
    correlations = figures.share_correlations.items()
    return (
        {
            ("mean squared decoder norm", ""): float(figures.squared_norm.double().mean()),
            ("modes of the squared norm: p-value of the dip test", ""): None if dip is None else dip.p_value,
            ("modes of the squared norm: Gaussians preferred by BIC", ""): (
                None if mixture is None else float(mixture.preferred.n_components)
            ),
            ("components for 90 % of variance", ""): float(figures.components),
        }
        | {(Statistic.NORM_SHARE, path): float(one.double().mean()) for path, one in figures.shares.named().items()}
        | {(Statistic.CORRELATION, path): _rho(one) for path, one in correlations}
    )


def _nulls(weights: WeightReport, paths: FunctionalFigures) -> Iterator[FigureRow]:
    """Correlations beside what they are for unrelated rows."""
    trained = weights.as_trained
    for path, found in trained.share_correlations.items():
        yield from _null(Statistic.CORRELATION, path, found)
    for unit, figures in {"canonical gauge": weights.canonical, "weighted": weights.weighted}.items():
        for path, found in figures.share_correlations.items() if figures else ():
            yield from _null(f"{Statistic.CORRELATION}, {unit}, {path}", "", found)
    for path, found in trained.norm_correlations.items():
        yield FigureRow(
            **_named(Statistic.CORRELATION, path),
            published=_rho(trained.share_correlations[path]),
            controlled=_rho(found),
            control="the path's own norm in place of its share",
        )
    for path, found in paths.share_correlations.items():
        yield from _null(f"Spearman of energy and share of contributions on tokens, {path}", "", found)
    yield from _null("Spearman of squared norm and participation ratio", "", trained.participation, PAIRED)
    yield from _null("Spearman of squared norm and firing frequency", "", weights.frequency, PAIRED)


def _null(
    statistic: Statistic | str, path: str, found: PermutedCorrelation | None, control: str = PERMUTED
) -> Iterator[FigureRow]:
    if found is not None:
        yield FigureRow(
            **_named(statistic, path),
            published=found.observed,
            controlled=found.null_mean,
            control=f"{control}, p = {found.p_value:.2g}",
            p_value=found.p_value,
        )


def _sides(trained: WeightFigures) -> Iterator[FigureRow]:
    """Shares on both sides of the published squared norm."""
    n = len(trained.squared_norm)
    for side, split in (("below", trained.below), ("above", trained.above)):
        for name, share in trained.shares.named().items():
            yield FigureRow(
                name=f"{Statistic.NORM_SHARE.of(name)}, squared norm {side} {trained.threshold}",
                published=None if split.shares is None else float(split.shares.named()[name]),
                controlled=float(share.double().mean()),
                control=f"all {n} features; {split.n} are {side}",
            )


def _sizes(paths: FunctionalFigures, canonical: FunctionalFigures | None, gauge: str) -> Iterator[FigureRow]:
    for name, share in paths.magnitude_shares.items():
        controls: dict[str, Figure] = {
            "energy about the mean": paths.energy_shares[name],
            f"energy about the mean, {gauge}": None if canonical is None else canonical.energy_shares[name],
        }
        for control, controlled in controls.items():
            yield FigureRow(**_named(Statistic.WRITTEN, name), published=share, controlled=controlled, control=control)


def _residual(paths: FunctionalFigures) -> Iterator[FigureRow]:
    residual = paths.residual
    if residual is None:
        return
    share, of_path, gain = paths.magnitude_shares["interaction"], residual.r2, residual.gain_of_path
    of_output = "nonlinear share of what is written"
    lines: list[tuple[str, Figure, Figure, str]] = [
        (of_output, share, paths.nonlinear_of_output, "energy, of the whole output"),
        (of_output, share, residual.of_output, "the same, less what is linear in f (held out)"),
        (
            "nonlinear share of the interaction path",
            1.0,
            of_path.complement(),
            "less what is linear in f (held out); published: all",
        ),
        ("error the path saves over its mean", gain, residual.gain_of_residual, "over its own linear prediction"),
    ]
    for name, published, controlled, control in lines:
        of = Statistic.WRITTEN if name == of_output else Statistic.OTHER
        yield FigureRow(name=name, statistic=of, published=published, controlled=controlled, control=control)


def _gains(paths: FunctionalFigures) -> Iterator[FigureRow]:
    one, other = paths.gains, paths.gains_keeping_means
    for name in ("linear", "nonlinear", "both", "overlap") if one and other else ():
        published, controlled = getattr(one, name), getattr(other, name)
        control = "a path's mean kept in place when it is off"
        yield FigureRow(
            name=f"gain on squared error, {name}", published=published, controlled=controlled, control=control
        )


def _inhibition(paths: FunctionalFigures, canonical: FunctionalFigures | None, gauge: str) -> Iterator[FigureRow]:
    one, other = paths.inhibition, paths.gauge_free_inhibition
    control = "nonlinear along direct + linear, about their means: free of the gauge"

    def figure(found: Inhibition | None, name: str) -> Figure:
        return None if found is None else getattr(found, name)

    if one is not None:
        for field, name in (
            ("fraction_negative", "tokens on which integration opposes the direct path"),
            ("mean", "mean projection of integration on the direct path"),
        ):
            yield FigureRow(name=name, published=figure(one, field), controlled=figure(other, field), control=control)
    if paths.pairs is not None:
        pairs = None if canonical is None else canonical.pairs
        yield FigureRow(
            name="pair outputs that oppose a feature of theirs",
            published=paths.pairs.fraction_negative,
            controlled=None if pairs is None else pairs.fraction_negative,
            control=gauge,
        )


def _rho(found: PermutedCorrelation | None) -> float | None:
    return None if found is None else found.observed
