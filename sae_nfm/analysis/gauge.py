"""A feature's rows in each path as published and in the canonical gauge, and how far training moves through the gauge.

Where both decoders read the same f (nfm_top_k = None), (W_dec + D, W_lin - D) gives the same output for every D. Both then have
the same gradient, and under Adam with one rate, no rescaling, no dead-feature loss and no dropout on the path, W_dec - W_lin
stays at its initial value up to rounding: norms, shares and every statistic of the direct path alone are set by initialisation.
The canonical gauge is W_dec := W_dec + W_lin, W_lin := 0. With head "bilinear" the columns of A and of B trade their scale in
the same way; there they have equal norms (`NFMPaths.balance_projections`).

Rows are compared in one of three units, all `PathRows`:

    as_trained    the parameters as they stand, folded decoder norms multiplied back: the published figures
    as_read       what one unit of the activation hooked at `hook_sae_acts_post` writes or embeds
    canonical     as read, in the canonical gauge

Multiplied with `encoder_scale` the last two are in the unit of the trained encoder, in which the published squared norms are;
multiplied with the root-mean-square activation on tokens they no longer depend on how encoder and decoder share the scale.
The square path's rows are left out, since they multiply f^2; `functional` has its energy.

Source: arXiv 2507.00269, analysis of decoder norms; the gauge and its controls are this package's.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from sae_nfm.architectures import NFMDecoder, NFMPaths
from sae_nfm.common import ShortRepr
from sae_nfm.kernels import reference, wide


@dataclass(frozen=True, kw_only=True, repr=False)
class PathRows(ShortRepr):
    """The rows of every feature in each path, in one unit."""

    direct: Float[Tensor, "d_sae d_in"]
    linear: Float[Tensor, "d_sae d_in"] | None = None
    """Rows l_i; None without the path."""
    nonlinear: Float[Tensor, "d_sae nfm_dim"] | None = None
    """Embeddings v_i, with head "bilinear" (a_i, b_i); None without the interaction path."""

    def norms(self) -> "PathNorms":
        """Row norms; zero for a path that is not there."""
        direct = self.direct.norm(dim=-1)
        linear, nonlinear = (
            torch.zeros_like(direct) if rows is None else rows.norm(dim=-1) for rows in (self.linear, self.nonlinear)
        )
        return PathNorms(direct=direct, linear=linear, nonlinear=nonlinear)

    def times(self, factor: Float[Tensor, " d_sae"], read_factor: Float[Tensor, " d_sae"] | None = None) -> "PathRows":
        """Row i times `factor[i]`; the rows of the integration paths times `read_factor[i]` where that is given."""
        read = (factor if read_factor is None else read_factor)[:, None]
        linear, nonlinear = (None if rows is None else rows * read for rows in (self.linear, self.nonlinear))
        return PathRows(direct=self.direct * factor[:, None], linear=linear, nonlinear=nonlinear)

    def of(self, chosen: Tensor) -> "PathRows":
        """The rows of some features (a mask or indices)."""
        linear, nonlinear = (None if rows is None else rows[chosen] for rows in (self.linear, self.nonlinear))
        return PathRows(direct=self.direct[chosen], linear=linear, nonlinear=nonlinear)


@dataclass(frozen=True, kw_only=True, repr=False)
class PathShares(ShortRepr):
    """Part of a feature's weight norm in each path: a fraction of ||w_i|| + ||l_i|| + ||v_i||."""

    integration: Float[Tensor, "*d_sae"]
    """Of linear and nonlinear together, the published "total"."""
    linear: Float[Tensor, "*d_sae"]
    nonlinear: Float[Tensor, "*d_sae"]
    direct: Float[Tensor, "*d_sae"]

    def named(self) -> dict[str, Tensor]:
        """The shares by name, in the published order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def mean(self, chosen: Tensor) -> "PathShares":
        """Means over the chosen features (a mask or indices)."""
        return PathShares(**{name: share[chosen].mean() for name, share in self.named().items()})


@dataclass(frozen=True, kw_only=True, repr=False)
class PathNorms(ShortRepr):
    """Norms ||w_i||, ||l_i|| and ||v_i|| of a feature's rows."""

    direct: Float[Tensor, " d_sae"]
    linear: Float[Tensor, " d_sae"]
    nonlinear: Float[Tensor, " d_sae"]

    def shares(self) -> PathShares:
        """Each path's part of the sum of a feature's norms; 0 for a feature without any weight."""
        total = (self.direct + self.linear + self.nonlinear).clamp_min(torch.finfo(self.direct.dtype).tiny)
        return PathShares(
            integration=(self.linear + self.nonlinear) / total,
            linear=self.linear / total,
            nonlinear=self.nonlinear / total,
            direct=self.direct / total,
        )

    def permuted(self, order: Tensor) -> "PathNorms":
        """The integration rows of feature `order[i]` given to feature i, l and v of one feature together."""
        return PathNorms(direct=self.direct, linear=self.linear[order], nonlinear=self.nonlinear[order])


@torch.no_grad()
def as_trained(sae: SAE[Any]) -> PathRows:
    """Rows of the parameters as trained, the published unit: direct rows have the norms of `trained_W_dec_norm`.

    With `rescale_acts_by_decoder_norm` the three rows of a feature read activations of different size, so their published
    shares depend on the parameterisation too. A plain TopK SAE that SAELens folded has lost its norms: all are 1.
    """
    if not isinstance(sae, NFMPaths):
        return PathRows(direct=wide(sae.W_dec.detach()))
    direct = as_read(sae).direct * encoder_scale(sae)[:, None]
    return PathRows(direct=direct, linear=_weight(sae, "W_lin"), nonlinear=_weight(sae, "V"))


@torch.no_grad()
def as_read(sae: SAE[Any]) -> PathRows:
    """Rows that one unit of the hooked activation writes (direct, linear) or embeds (nonlinear)."""
    direct = wide(sae.W_dec.detach())
    if _rescales(sae):
        direct = direct / reference.divisor(direct.norm(dim=-1, keepdim=True))
    return PathRows(direct=direct, linear=_weight(sae, "W_lin"), nonlinear=_weight(sae, "V"))


@torch.no_grad()
def encoder_scale(sae: SAE[Any]) -> Float[Tensor, " d_sae"]:
    """The hooked activation per unit of the trained encoder's: the decoder norm with rescaling or after it was folded, else 1."""
    norms = wide(sae.W_dec.detach()).norm(dim=-1)
    scale = norms if _rescales(sae) else torch.ones_like(norms)
    return scale * sae.folded_W_dec_norm if isinstance(sae, NFMDecoder) else scale


def has_canonical(sae: SAE[Any]) -> bool:
    """Whether W_dec and W_lin are one decoder up to gauge: trained together, and reading the same features."""
    return isinstance(sae, NFMDecoder) and sae.cfg.use_linear_path and sae.cfg.nfm_top_k is None


def canonical(sae: SAE[Any]) -> SAE[Any]:
    """A copy in the canonical gauge, with the same output; a ValueError with `nfm_top_k`, see `NFMDecoder.fold_linear_path`.

    An SAE without a linear path is there already, but for the scale of two projections; so is a sequential NFM, whose base's
    decoder is given and not trained along.
    """
    copied = deepcopy(sae)
    if isinstance(copied, NFMPaths):
        copied.balance_projections()
    if isinstance(copied, NFMDecoder) and copied.cfg.use_linear_path:
        copied.fold_linear_path()
    return copied


def canonical_or_reason(sae: SAE[Any]) -> tuple[SAE[Any] | None, str | None]:
    """`canonical`, or None and why there is none."""
    try:
        return canonical(sae), None
    except ValueError as error:
        return None, str(error)


@dataclass(frozen=True, kw_only=True)
class GaugeDrift:
    """How far W_dec - W_lin moved between two states, beside how far W_dec + W_lin did; lengths per entry."""

    drift: float
    """Root-mean-square change of W_dec - W_lin, the direction in which the output does not change."""
    largest_drift: float
    travel: float
    """Root-mean-square change of W_dec + W_lin, the direction in which it does."""

    @property
    def ratio(self) -> float:
        """`drift / travel`: rounding (about 1e-6) where training leaves the gauge at its initial value; nan without travel."""
        return self.drift / self.travel if self.travel else float("nan")


@torch.no_grad()
def gauge_drift(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> GaugeDrift:
    """Drift between two checkpoints, or from initialisation.

    Args:
        before: state of a training SAE, with W_dec and W_lin as trained (no fold): a `state_dict()`, or the tensors of a
            checkpoint's sae_weights.safetensors.

    Raises:
        ValueError: when a state lacks either matrix, has other shapes, or folded decoder norms.
    """
    one, other = _decoders(before, "before"), _decoders(after, "after")
    if one[0].shape != other[0].shape:
        raise ValueError(
            f"W_dec is {tuple(one[0].shape)} before and {tuple(other[0].shape)} after; give two states of one SAE"
        )
    change_dec, change_lin = other[0] - one[0], other[1] - one[1]
    difference = change_dec - change_lin
    return GaugeDrift(
        drift=float(difference.square().mean().sqrt()),
        largest_drift=float(difference.abs().max()),
        travel=float((change_dec + change_lin).square().mean().sqrt()),
    )


def _rescales(sae: SAE[Any]) -> bool:
    config: dict[str, Any] = getattr(sae.cfg, "base_config", None) or vars(sae.cfg)
    return bool(config.get("rescale_acts_by_decoder_norm", False))


def _weight(sae: SAE[Any], name: str) -> Tensor | None:
    return wide(getattr(sae, name).detach()) if hasattr(sae, name) else None


def _decoders(state: Mapping[str, Tensor], which: str) -> tuple[Tensor, Tensor]:
    missing = [name for name in ("W_dec", "W_lin") if name not in state]
    if missing:
        names = ", ".join(missing)
        raise ValueError(f"the state {which} has no {names}; give the state of a joint_nfm SAE with a linear path")
    folded = state.get("folded_W_dec_norm")
    if folded is not None and not bool((folded == 1).all()):
        raise ValueError(
            f"decoder norms are folded out of W_dec in the state {which}; give a training checkpoint, not an SAE saved "
            "for inference"
        )
    return state["W_dec"].double(), state["W_lin"].double()
