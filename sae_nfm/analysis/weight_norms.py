"""Norms of a feature's weights in each path, their shares, and how far the shares follow from the norms: on matrices alone.

A feature has one row in each path: w_i of W_dec, l_i of W_lin, v_i of V. The published share of a path is its part of
||w_i|| + ||l_i|| + ||v_i||, correlated over features with ||w_i||^2. That norm stands in the denominator too, so the correlation
is near -1 (integration) and +1 (direct) for weights that have nothing to do with each other: the null permutes the rows of the
integration paths over features and recomputes the shares.

Squared norms are drawn as histograms: as trained, in the canonical gauge, of a TopK SAE, before training.

    decoder            ||w_i||^2             in the unit of the trained encoder, the published one
    encoder x decoder  ||e_i||^2 ||w_i||^2   e_i: the encoder's column

SAELens folds the decoder norms of a TopK SAE into its encoder when it saves it (all ||w_i|| are 1 then), and a norm can be traded
between the two without changing the SAE. The product does not depend on that, nor on how activations are normalised.

Source: arXiv 2507.00269, analysis of decoder norms (shares, Spearman, the split at 0.2, principal components; SAE unimodal with
mean 0.4, joint bimodal with means 0.05 and 0.37, not tested); null, dip test, canonical gauge and product are this package's.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from safetensors import SafetensorError
from sklearn.decomposition import PCA
from torch import Tensor

from sae_nfm.analysis import gauge
from sae_nfm.analysis.gauge import PathNorms, PathRows, PathShares
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
from sae_nfm.architectures import random_initialisation, training_config
from sae_nfm.architectures.joint_config import ARCHITECTURE
from sae_nfm.common import DamagedFileError, ShortRepr, read_json
from sae_nfm.common.file_errors import cause_of
from sae_nfm.loading import load_sae
from sae_nfm.stats import DipTest, MixtureComparison, PermutedCorrelation, compare_mixtures, dip_test, permuted_spearman

SPLIT = 0.2
"""The squared decoder norm at which arXiv 2507.00269 divides the features."""
SPREAD = 1e-4
"""Values whose standard deviation is a smaller fraction of their mean are equal up to rounding: they have no ranks."""
MIN_FEATURES = 10
"""Fewer have no shape that a mixture could describe."""
N_PERMUTATIONS = 1_999
"""Permutations of a null."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Features on one side of a squared norm."""

    n: int
    shares: PathShares | None
    """Their mean shares; None when there is no such feature."""


@dataclass(frozen=True, kw_only=True, repr=False)
class WeightFigures(ShortRepr):
    """The published statistics of a feature's weights, in one gauge and one unit."""

    squared_norm: Float[Tensor, " d_sae"]
    shares: PathShares
    threshold: float
    below: Split
    above: Split
    share_correlations: Mapping[str, PermutedCorrelation | None]
    """||w_i||^2 with each share, against rows permuted over features; None where one of the two does not vary."""
    norm_correlations: Mapping[str, PermutedCorrelation | None]
    """||w_i||^2 with ||l_i|| ("linear") and ||v_i|| ("nonlinear") themselves: no term in common, so the null is at 0."""
    participation: PermutedCorrelation | None
    """||w_i||^2 with the participation ratio of w_i."""
    components: int
    """Principal components of the rows w_i for 90 % of their variance."""
    dip: DipTest | None
    """One mode of ||w_i||^2 against several; None where it does not vary."""
    mixture: MixtureComparison | None
    """One Gaussian for ||w_i||^2 against two."""


def weight_figures(
    rows: PathRows, *, seed: int, threshold: float = SPLIT, n_permutations: int = N_PERMUTATIONS
) -> WeightFigures:
    """All statistics of this module.

    Args:
        rows: in one unit, see `gauge`; at least 10 features.
        threshold: squared norm that divides the features; the published 0.2 means something in the published unit only.

    Raises:
        ValueError: for fewer than 10 features.
    """
    if len(rows.direct) < MIN_FEATURES:
        raise ValueError(f"{len(rows.direct)} features; shapes over features need at least {MIN_FEATURES}")
    norms = rows.norms()
    squared, shares = norms.direct.square(), norms.shares()
    small, values = squared < threshold, _array(squared) if varies(squared) else None
    return WeightFigures(
        squared_norm=squared,
        shares=shares,
        threshold=threshold,
        below=_split(shares, small),
        above=_split(shares, ~small),
        share_correlations=share_correlations(norms, seed=seed, n_permutations=n_permutations),
        norm_correlations={
            name: correlation(squared, norm, seed=seed, n_permutations=n_permutations)
            for name, norm in (("linear", norms.linear), ("nonlinear", norms.nonlinear))
        },
        participation=correlation(squared, participation_ratio(rows.direct), seed=seed, n_permutations=n_permutations),
        components=components_for_variance(rows.direct),
        dip=None if values is None else dip_test(values),
        mixture=None if values is None else compare_mixtures(values, seed=seed),
    )


def share_correlations(
    norms: PathNorms, *, seed: int, n_permutations: int = N_PERMUTATIONS
) -> dict[str, PermutedCorrelation | None]:
    """Spearman correlation of ||w_i||^2 with each share, against integration rows permuted over features.

    The same permutations serve every share; None where the share or the norm does not vary.
    """
    squared = norms.direct.square()

    def against(name: str) -> PermutedCorrelation:
        return permuted_spearman(
            _array(squared),
            lambda order: _array(norms.permuted(torch.tensor(order)).shares().named()[name]),
            seed=seed,
            n_permutations=n_permutations,
        )

    return {
        name: against(name) if varies(share) and varies(squared) else None
        for name, share in norms.shares().named().items()
    }


def correlation(
    one: Float[Tensor, " n"], other: Float[Tensor, " n"], *, seed: int, n_permutations: int = N_PERMUTATIONS
) -> PermutedCorrelation | None:
    """Spearman correlation over features against a random pairing; None where one of the two does not vary."""
    if not (varies(one) and varies(other)):
        return None
    return permuted_spearman(_array(one), _array(other), seed=seed, n_permutations=n_permutations)


def participation_ratio(rows: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, " d_sae"]:
    """Over how many dimensions of the model a row spreads: `(sum_d w_d^2)^2 / sum_d w_d^4`, from 1 to d_in; 0 for no row."""
    squares = rows.double().square()
    return squares.sum(-1).square() / squares.square().sum(-1).clamp_min(torch.finfo(torch.float64).tiny)


def components_for_variance(rows: Float[Tensor, "n d_in"], fraction: float = 0.9) -> int:
    """Principal components that explain at least `fraction` of the variance of the rows around their mean."""
    fitted = PCA(n_components=fraction, svd_solver="full").fit(rows.double().cpu().numpy())
    return int(fitted.n_components_)


def varies(values: Float[Tensor, " n"]) -> bool:
    """Whether values differ by more than rounding, so that their ranks mean something."""
    wide = values.double()
    return float(wide.std()) > SPREAD * float(wide.abs().mean())


def _split(shares: PathShares, chosen: Tensor) -> Split:
    n = int(chosen.sum())
    return Split(n=n, shares=shares.mean(chosen) if n else None)


def _array(values: Tensor) -> NDArray[np.float64]:
    return values.detach().cpu().double().numpy()


BINS = 60
"""Bins of a histogram."""
LARGEST_N = 4
"""SAEs of a run that are looked at; a comparison of many seeds has more."""


@torch.no_grad()
def squared_norms(sae: SAE[Any], *, topk: SAE[Any] | None, seed: int, bins: int = BINS) -> tuple[SquaredNorms, ...]:
    """Both measures of a joint_nfm SAE, which is not changed.

    Args:
        topk: a TopK SAE to compare with.
        seed: of the random initialisation, which is left out where the metadata do not say how the SAE was trained.
    """
    fixed, reason = gauge.canonical_or_reason(sae)
    named = {AS_TRAINED: sae, CANONICAL: fixed, TOPK: topk}
    saes = {name: one for name, one in named.items() if one is not None}
    with suppress(ValueError):
        saes[INITIAL] = random_initialisation(training_config(sae), seed)
    values = {name: _values(one) for name, one in saes.items()}
    return tuple(
        _histograms(measure, {name: own[measure] for name, own in values.items()}, bins, reason)
        for measure in get_args(Measure)
    )


def norms_of_saes(
    folders: Sequence[Path], root: Path, *, seed: int = 0, damaged: dict[Path, str] | None = None
) -> NormsResult:
    """Both measures of the first `LARGEST_N` joint SAEs with a linear path, beside a TopK SAE of their width and parent folder.

    Args:
        folders: of saved SAEs of any architecture.
        root: of the run; SAEs are named by their folders relative to it.
        damaged: gets the folders that cannot be read, each with the reason; without it that is an error.
    """

    def loaded(folder: Path) -> SAE[Any] | None:
        try:
            return load_sae(str(folder)).eval()
        except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
            if damaged is None:
                raise
            damaged[folder] = cause_of(error)
            return None

    configs: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        try:
            configs[folder] = dict(read_json(folder / SAE_CFG_FILENAME))
        except (DamagedFileError, OSError) as error:
            if damaged is None:
                raise
            damaged[folder] = cause_of(error.__cause__ or error)
    joint = [f for f, cfg in configs.items() if cfg.get("architecture") == ARCHITECTURE and cfg.get("use_linear_path")]
    found: list[SAENorms] = []
    for folder in joint[:LARGEST_N]:
        if (sae := loaded(folder)) is None:
            continue
        wanted = "topk", folder.parent, sae.cfg.d_sae
        beside = (o for o, cfg in configs.items() if (cfg.get("architecture"), o.parent, cfg.get("d_sae")) == wanted)
        norms = squared_norms(sae, topk=next((one for one in map(loaded, beside) if one is not None), None), seed=seed)
        found.append(SAENorms(sae=folder.relative_to(root).as_posix(), norms=norms))
    return NormsResult(saes=tuple(found))


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
