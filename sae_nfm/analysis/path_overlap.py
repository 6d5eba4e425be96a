"""Inhibition by what paths do, not by the sign of weights, and how far the gains of two paths overlap.

    projection         a_t = <o_t, d_t> / ||d_t||^2, what the integration paths (o) do along the direct path (d) on token t
    pair projections   <o_ij, w_i / ||w_i||> and <o_ij, w_j / ||w_j||>, what a pair's output does along its two features
    sub-additivity     gain(linear) + gain(nonlinear) - gain(both)

On squared error ||x - direct - ...||^2 the last is 2 <linear, nonlinear>, so it says how far the two paths write the same, and
x does not enter. Path outputs have means that biases can move between paths; `centred` leaves them out.

Source: arXiv 2507.00269, component analysis (gains of -50.9 %, -8.6 % and together -51.6 %) and signed integration weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from sae_nfm.analysis.path_contributions import CELLS
from sae_nfm.architectures import Paths
from sae_nfm.kernels import SparseActs


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One vector of each token along another."""

    coefficient: Float[Tensor, " tokens"]
    """a_t: -0.1 takes a tenth of the other vector away; 0 where that is zero."""
    cosine: Float[Tensor, " tokens"]

    @property
    def fraction_negative(self) -> float:
        """Share of tokens with a negative projection; 1/2 for directions that have nothing to do with each other."""
        return float((self.coefficient < 0).double().mean())

    @property
    def mean(self) -> float:
        """Mean coefficient."""
        return float(self.coefficient.double().mean())

    @property
    def mean_negative(self) -> float | None:
        """Mean coefficient over the tokens where it is negative; None where it never is."""
        negative = self.coefficient[self.coefficient < 0].double()
        return float(negative.mean()) if len(negative) else None


def centred(vectors: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
    """Vectors less their mean over tokens."""
    return vectors - vectors.mean(0)


def projection(added: Float[Tensor, "tokens d"], onto: Float[Tensor, "tokens d"]) -> Projection:
    """Project what is added onto what is there, token by token."""
    inner, tiny = (added * onto).sum(-1), torch.finfo(onto.dtype).tiny
    return Projection(
        coefficient=inner / onto.square().sum(-1).clamp_min(tiny),
        cosine=inner / (added.norm(dim=-1) * onto.norm(dim=-1)).clamp_min(tiny),
    )


def integration(paths: Paths) -> Float[Tensor, "tokens d_in"] | None:
    """Linear and nonlinear output together; None when both are off."""
    parts = [path for path in (paths.linear, paths.interaction) if path is not None]
    return torch.stack(parts).sum(0) if parts else None


@dataclass(frozen=True, kw_only=True)
class PairProjections:
    """Pair outputs along the directions of both features, added up within each token, [tokens] each.

    Each pair has two projections. Ratios of sums, such as `negative / projections`, are the figures; sums by token are what
    an interval over documents needs.
    """

    projections: Float[Tensor, " tokens"]
    """Number of projections: two for each pair of active features."""
    negative: Float[Tensor, " tokens"]
    """How many are negative: the pair inhibits the feature."""
    mutual: Float[Tensor, " tokens"]
    """Pairs that inhibit both their features."""
    strength: Float[Tensor, " tokens"]
    """Sum of absolute projections."""
    negative_strength: Float[Tensor, " tokens"]
    direct_strength: Float[Tensor, " tokens"]
    """Sum of f_i ||w_i|| over the same features: what the direct path writes along their directions."""

    @property
    def fraction_negative(self) -> float:
        """Share of projections that are negative; 1/2 for weights without structure."""
        return float(self.negative.sum() / self.projections.sum())

    @property
    def fraction_negative_strength(self) -> float:
        """Share of the summed absolute projection that is negative."""
        return float(self.negative_strength.sum() / self.strength.sum())


@torch.no_grad()
def pair_projections(
    read: SparseActs,
    gates: Bool[Tensor, "tokens nfm_dim"],
    directions: Float[Tensor, "d_sae d_in"],
    V: Float[Tensor, "d_sae nfm_dim"],
    W_1: Float[Tensor, "nfm_dim nfm_dim"],
    W_2: Float[Tensor, "nfm_dim d_in"],
) -> PairProjections:
    """Project o_ij = f_i f_j ((v_i * v_j) W_1 D) W_2 on both features' directions, for all pairs of every token.

    Args:
        read: features that the interaction path reads; pairs with a value of 0 are left out.
        directions: decoder rows, as read or in the canonical gauge.
    """
    n, units = read.indices.shape[-1], directions / directions.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    size = max(1, CELLS // (n * max(n, *W_2.shape)))
    parts = [
        _pair_sums(SparseActs(indices, values), gate, units, directions, V, W_1, W_2)
        for indices, values, gate in zip(
            read.indices.split(size), read.values.split(size), gates.split(size), strict=True
        )
    ]
    return PairProjections(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _pair_sums(
    read: SparseActs, gates: Tensor, units: Tensor, directions: Tensor, V: Tensor, W_1: Tensor, W_2: Tensor
) -> dict[str, Tensor]:
    rows = read.values[..., None] * V[read.indices]  # f_i v_i, [tokens n m]
    along = ((units[read.indices] @ W_2.T) * gates[:, None]) @ W_1.T  # z -> projection on w_i, [tokens n m]
    on_first = (rows * along) @ rows.mT  # [tokens i j]: pair i, j along w_i
    active = read.values > 0
    pairs = active[:, :, None] & active[:, None] & ~torch.eye(active.shape[-1], dtype=torch.bool, device=active.device)
    on_first = torch.where(pairs, on_first, 0)
    negative = on_first < 0
    return {
        "projections": pairs.sum((1, 2)).float(),
        "negative": negative.sum((1, 2)).float(),
        "mutual": (negative & negative.mT).sum((1, 2)).float() / 2,
        "strength": on_first.abs().sum((1, 2)),
        "negative_strength": on_first.clamp_max(0).abs().sum((1, 2)),
        "direct_strength": (read.values * directions.norm(dim=-1)[read.indices]).sum(1),
    }


@dataclass(frozen=True, kw_only=True)
class Gains:
    """How much less error (or KL) each token has with a path than with the direct path alone, [tokens] each."""

    base: NDArray[np.float64]
    linear: NDArray[np.float64]
    nonlinear: NDArray[np.float64]
    """Gain of the interaction path by itself."""
    both: NDArray[np.float64]
    documents: NDArray[np.int64] | None = None

    @property
    def overlap(self) -> NDArray[np.float64]:
        """gain(linear) + gain(nonlinear) - gain(both): positive where the paths gain the same thing twice."""
        return self.linear + self.nonlinear - self.both


@torch.no_grad()
def squared_error_gains(
    x: Float[Tensor, "tokens d_in"], paths: Paths, documents: Tensor | None = None, *, keep_means: bool = False
) -> Gains:
    """Gains on squared error over the direct path.

    Args:
        x: what is reconstructed, in the space of the paths.
        paths: what each writes.
        keep_means: leave a path's mean over tokens in its place when it is off (mean ablation). Zero ablation, the published
            one, takes a constant away that biases could hold in any path.

    Raises:
        ValueError: without a linear or an interaction path.
    """
    if paths.linear is None or paths.interaction is None:
        raise ValueError("gains of two paths need both: this SAE has no linear or no interaction path")
    linear, nonlinear = paths.linear.double(), paths.interaction.double()
    base = x.double() - paths.direct.double()
    if keep_means:
        base = base - linear.mean(0) - nonlinear.mean(0)
        linear, nonlinear = centred(linear), centred(nonlinear)

    def gain(added: Tensor) -> NDArray[np.float64]:
        return (base.square().sum(-1) - (base - added).square().sum(-1)).cpu().numpy()

    return Gains(
        base=base.square().sum(-1).cpu().numpy(),
        linear=gain(linear),
        nonlinear=gain(nonlinear),
        both=gain(linear + nonlinear),
        documents=None if documents is None else documents.cpu().numpy(),
    )


def gains_of_arms(rows: pd.DataFrame, arms: Mapping[str, str], measure: str = "kl_nats") -> Gains:
    """Gains on KL, or another measure, from tidy rows of four arms.

    Args:
        rows: with columns document, row, position, arm and the measure, one row for each token and arm.
        arms: names of the arms "direct", "linear" (direct + linear), "nonlinear" and "both".
        measure: the column; smaller is better.

    Raises:
        ValueError: for a missing role, arm or column, a token that is given twice, or one that an arm lacks.
    """
    token, roles = ["document", "row", "position"], ("direct", "linear", "nonlinear", "both")
    if set(arms) != set(roles):
        raise ValueError(f"arms are given for {', '.join(sorted(arms))}; name one for each of {', '.join(roles)}")
    if missing := [name for name in (*token, "arm", measure) if name not in rows.columns]:
        raise ValueError(f"the rows have no column {', '.join(missing)}; they have {', '.join(map(str, rows.columns))}")
    chosen = rows.loc[rows["arm"].isin(list(arms.values())), [*token, "arm", measure]]
    if chosen.duplicated([*token, "arm"]).any():
        raise ValueError("a token stands more than once in an arm; give the rows of one measurement")
    wide = chosen.astype({"arm": str}).pivot(index=token, columns="arm", values=measure)
    if absent := [name for name in arms.values() if name not in wide.columns]:
        raise ValueError(
            f"no rows of arm {', '.join(absent)}; there are {', '.join(sorted(map(str, set(rows['arm']))))}"
        )
    values = {role: wide[name].to_numpy(np.float64) for role, name in arms.items()}
    if any(np.isnan(one).any() for one in values.values()):
        raise ValueError(f"{measure} is missing for some tokens of some arms; give arms measured on the same tokens")
    return Gains(
        base=values["direct"],
        **{role: values["direct"] - values[role] for role in roles[1:]},
        documents=wide.index.get_level_values("document").to_numpy(np.int64),
    )
