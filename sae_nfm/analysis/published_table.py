"""A `GaugeReport` as a table: each figure of arXiv 2507.00269 about norms and paths, and one line for each control it needs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sae_nfm.analysis.path_statistics import FunctionalFigures, Inhibition
from sae_nfm.analysis.sae_report import GaugeReport, WeightReport
from sae_nfm.analysis.weight_norms import WeightFigures
from sae_nfm.stats import Estimate, PermutedCorrelation

Figure = Estimate | float | None
DEALT_OUT = "rows dealt out to other features, p = {:.2g}"


@dataclass(frozen=True, kw_only=True)
class FigureRow:
    """One line: a statistic and a control."""

    name: str
    """What is measured."""
    published: Figure
    """As arXiv 2507.00269 defines it, or plain where it reports none; None where the SAE has no such thing."""
    controlled: Figure
    """Under the control; None where that cannot be had."""
    control: str
    """What the control is, and why there is none where there is none."""


def figure_rows(report: GaugeReport) -> list[FigureRow]:
    """Every figure with its controls, norms first, then what paths do on tokens."""
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
    """Figures of the weights beside the same ones in another gauge, another unit, or before training."""
    references = {
        "rows in one unit": weights.one_unit,
        f"rows in one unit, {gauge}": weights.canonical,
        "rows times root-mean-square activation": weights.weighted,
        "random initialisation": weights.initial,
    }
    trained = _summary(weights.as_trained)
    for control, figures in references.items():
        other = {} if figures is None else _summary(figures)
        for name, published in trained.items():
            yield FigureRow(name=name, published=published, controlled=other.get(name), control=control)


def _summary(figures: WeightFigures) -> dict[str, float | None]:
    dip, mixture = figures.dip, figures.mixture
    return (
        {
            "mean squared decoder norm": float(figures.squared_norm.double().mean()),
            "modes of the squared norm: p-value of the dip test": None if dip is None else dip.p_value,
            "modes of the squared norm: Gaussians preferred by BIC": (
                None if mixture is None else float(mixture.preferred.n_components)
            ),
            "components for 90 % of variance": float(figures.components),
        }
        | {f"share of weight norm, {name}": float(one.double().mean()) for name, one in figures.shares.named().items()}
        | {f"Spearman of squared norm and share, {name}": _rho(one) for name, one in figures.share_correlations.items()}
    )


def _nulls(weights: WeightReport, paths: FunctionalFigures) -> Iterator[FigureRow]:
    """Correlations beside what they are for unrelated rows."""
    trained, units = weights.as_trained, {"": weights.as_trained, ", canonical gauge": weights.canonical}
    units[", weighted"] = weights.weighted
    for unit, figures in units.items():
        for name, found in figures.share_correlations.items() if figures else ():
            yield from _null(f"Spearman of squared norm and share{unit}, {name}", found, DEALT_OUT)
    for name, found in trained.norm_correlations.items():
        published, own = trained.share_correlations[name], _rho(found)
        control = "the path's own norm in place of its share"
        yield FigureRow(
            name=f"Spearman of squared norm and share, {name}",
            published=_rho(published),
            controlled=own,
            control=control,
        )
    for name, found in paths.share_correlations.items():
        yield from _null(f"Spearman of energy and share of contributions on tokens, {name}", found, DEALT_OUT)
    pairing = "random pairing, p = {:.2g}"
    yield from _null("Spearman of squared norm and participation ratio", trained.participation, pairing)
    yield from _null("Spearman of squared norm and firing frequency", weights.frequency, pairing)


def _null(name: str, found: PermutedCorrelation | None, control: str) -> Iterator[FigureRow]:
    if found is not None:
        control = control.format(found.p_value)
        yield FigureRow(name=name, published=found.observed, controlled=found.null_mean, control=control)


def _sides(trained: WeightFigures) -> Iterator[FigureRow]:
    """Shares on both sides of the published squared norm."""
    n = len(trained.squared_norm)
    for side, split in (("below", trained.below), ("above", trained.above)):
        for name, share in trained.shares.named().items():
            yield FigureRow(
                name=f"share of weight norm, {name}, squared norm {side} {trained.threshold}",
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
            label = f"share of what the integration paths write, {name}"
            yield FigureRow(name=label, published=share, controlled=controlled, control=control)


def _residual(paths: FunctionalFigures) -> Iterator[FigureRow]:
    residual = paths.residual
    if residual is None:
        return
    share, of_path, gain = paths.magnitude_shares["interaction"], residual.r2, residual.gain_of_path
    left = replace(of_path, estimate=1 - of_path.estimate, low=1 - of_path.high, high=1 - of_path.low)
    lines: list[tuple[str, Figure, Figure, str]] = [
        ("nonlinear share of what is written", share, paths.nonlinear_of_output, "energy, of the whole output"),
        (
            "nonlinear share of what is written",
            share,
            residual.of_output,
            "the same, less what is linear in f (held out)",
        ),
        ("nonlinear share of the interaction path", 1.0, left, "less what is linear in f (held out); published: all"),
        ("error the path saves over its mean", gain, residual.gain_of_residual, "over its own linear prediction"),
    ]
    for name, published, controlled, control in lines:
        yield FigureRow(name=name, published=published, controlled=controlled, control=control)


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
