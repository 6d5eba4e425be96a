"""What the paths of an SAE write on tokens, feature by feature and as a whole.

A feature's contribution to each path on a token where it is active, with f as hooked, f_n what the NFM reads, and the gates
D = diag(h > 0) held at their values on that token:

    direct      f_i w_i                   w_i as read: with rescaling, the row divided by its norm
    linear      f_n,i l_i
    nonlinear   1/2 sum_{j != i} f_n,i f_n,j ((v_i * v_j) W_1 D) W_2       half of each pair; head "mlp": f_n,i (v_i W_1 D) W_2
                1/2 sum_{j != i} f_n,i f_n,j (a_i * b_j + a_j * b_i) W_2 + f_n,i^2 (a_i * b_i) W_2    with head "bilinear"
    square      (f_i^2 / c) u_i

Over the active features these sum to the paths' outputs, less b_dec, b_lin and (b_1 * D) W_2 + b_2. Removing feature i with the
gates held takes its pairs away whole: twice its nonlinear contribution (of "bilinear" its square once).

`token_paths` runs the SAE; everything else is arithmetic on what it returns. Inhibition is judged by what paths do, not by the
sign of weights, and the gains of two paths by how far they overlap:

    projection         a_t = <o_t, d_t> / ||d_t||^2, what the integration paths (o) do along the direct path (d) on token t
    pair projections   <o_ij, w_i / ||w_i||> and <o_ij, w_j / ||w_j||>, what a pair's output does along its two features
    sub-additivity     gain(linear) + gain(nonlinear) - gain(both)

On squared error ||x - direct - ...||^2 the last is 2 <linear, nonlinear>, so it says how far the two paths write the same, and
x does not enter. Path outputs have means that biases can move between paths; `centred` leaves them out.

Source: arXiv 2507.00269, component analysis (mean absolute value of path outputs, gains of -50.9 %, -8.6 % and together -51.6 %,
signed integration weights). The contributions are the exact pairs of its pooling, shared equally.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from sae_lens import SAE
from torch import Tensor

from sae_nfm.analysis.gauge import as_read, canonical, has_canonical
from sae_nfm.analysis.weight_norms import PathRows
from sae_nfm.architectures import NFMDecoder, NFMPaths, Paths, refuse_transcoder
from sae_nfm.common import ShortRepr
from sae_nfm.data import ActivationCache
from sae_nfm.interventions import counted_tokens, splice
from sae_nfm.kernels import BILINEAR, PAIRED, SparseActs, open_gates, reference, wide
from sae_nfm.models import (
    LanguageModel,
    check_counted,
    check_finite,
    real_batches,
    real_tokens,
    resolve_hook_name,
    run_rows,
)

CELLS = 2**24
"""Numbers in the largest tensor of a chunk of tokens: 64 MiB in float32."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenPaths(ShortRepr):
    """Features and path outputs on some tokens, in the SAE's normalised space and at least float32."""

    x: Float[Tensor, "tokens d_in"]
    """What is reconstructed."""
    acts: SparseActs
    """Active features as hooked, [tokens, k], with k the most of any token where their number varies; the rest have value 0."""
    read: SparseActs
    """Those that the linear and the interaction path read, [tokens, n]."""
    gates: Bool[Tensor, "tokens nfm_dim"] | None
    """h > 0; None without an interaction path."""
    paths: Paths
    """What each path writes, biases included."""
    documents: Int[Tensor, " tokens"] | None = None


@torch.no_grad()
def read_activations(
    model: LanguageModel,
    sae: SAE[Any],
    tokens: Int[Tensor, "rows pos"],
    documents: Int[Tensor, "rows pos"] | None = None,
    *,
    cache: ActivationCache | None = None,
    batch_rows: int = 16,
) -> tuple[Float[Tensor, "tokens d_in"], Int[Tensor, " tokens"] | None]:
    """Activations at the SAE's hook point and their documents, counted tokens only (not special, not in position 0).

    With a cache, which is looked into for these rows, the model computes nothing.

    Raises:
        ValueError: when the model has no such hook point, no token is counted, or rows are not in the cache.
    """
    real, read = real_tokens(model, tokens), list[Tensor]()
    counted = counted_tokens(model, tokens, real)
    check_counted(counted)

    def keep(value: Tensor, hook: Any) -> None:  # noqa: ARG001
        read.append(value.flatten(2))

    metadata = sae.cfg.metadata
    if cache is not None:
        value, head = (
            cache.activations(tokens, resolve_hook_name(model, str(metadata.hook_name))),
            metadata.hook_head_index,
        )
        read.append((value if head is None else value[:, :, head]).flatten(2))
    else:
        with splice(model, sae) as found, found.hooks({"hook_sae_input": keep}):
            for batch, part in real_batches(model, tokens, batch_rows, real):
                run_rows(model, batch, part)
    x = torch.cat(read)[counted]
    check_finite(x, counted, f"activations at {metadata.hook_name!r}")
    return x, None if documents is None else documents[counted.to(documents.device)]


@torch.no_grad()
def token_paths(
    sae: SAE[Any], x: Float[Tensor, "tokens d_in"], documents: Int[Tensor, " labels"] | None = None
) -> TokenPaths:
    """Run an SAE on activations and keep x and what each path writes, [tokens, d_in] each.

    Args:
        sae: joint_nfm or TopK, training or inference class.
        x: activations as the SAE takes them (one in training that normalises by a factor takes scaled ones), heads flattened.

    Raises:
        ValueError: for an SAE of another kind, or documents that are not one to a token.
    """
    if documents is not None and len(documents) != len(x):
        raise ValueError(f"{len(documents)} documents for {len(x)} tokens; give one for each token")
    refuse_transcoder(sae, "what its paths add to a reconstruction")
    k = getattr(sae.cfg, "k", None)
    if not isinstance(sae, NFMDecoder) and not isinstance(k, int):
        raise ValueError(f"an SAE of architecture {sae.cfg.architecture()!r} has no k; give a joint_nfm or a TopK SAE")
    heads = sae.hook_z_reshaping_mode
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        encoded = x.split(max(1, CELLS // sae.cfg.d_sae))
        if not isinstance(k, int):  # their number varies
            k = max([1, *(int((sae.encode(part) > 0).sum(dim=-1).amax()) for part in encoded if len(part))])
        parts = [_run(sae, part, k) for part in encoded]
    finally:
        if heads:
            sae.turn_on_forward_pass_hook_z_reshaping()
    return TokenPaths(
        x=_cat(part.x for part in parts),
        acts=SparseActs(*map(_cat, zip(*(part.acts for part in parts), strict=True))),
        read=SparseActs(*map(_cat, zip(*(part.read for part in parts), strict=True))),
        gates=_cat(part.gates for part in parts),
        paths=Paths(*map(_cat, zip(*(part.paths for part in parts), strict=True))),
        documents=documents,
    )


def _run(sae: SAE[Any], x: Tensor, k: int) -> TokenPaths:
    gates: list[Tensor] = []

    def keep(hidden: Tensor, hook: Any) -> None:  # noqa: ARG001
        gates.append(open_gates(sae.cfg.head, hidden))

    acts = sae.encode(x).to_dense()
    normalised = sae.run_time_activation_norm_fn_in(x.to(sae.dtype))
    if isinstance(sae, NFMDecoder):
        with sae.hooks(fwd_hooks=[("hook_nfm_hidden_pre", keep)] if sae.cfg.head != "none" else []):
            paths = sae.decode_paths(acts)
    else:
        rescales = bool(getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))
        unscaled = reference.per_norm(acts, sae.W_dec) if rescales else acts
        paths = Paths(unscaled @ sae.W_dec + sae.b_dec, None, None, None)
    sae.run_time_activation_norm_fn_out(paths.direct)  # forgets what the normalisation remembers of this input
    sparse = reference.sparse_acts_from_dense(acts, k)
    assert sparse is not None, "an encoder gave a negative feature, or more than k"
    n = getattr(sae.cfg, "nfm_top_k", None)
    read = sparse if n is None else reference.top_n(sparse, n)
    sparse, read = (SparseActs(acts.indices, wide(acts.values)) for acts in (sparse, read))
    paths = paths._replace(**{name: wide(path) for name, path in paths.present().items()})
    return TokenPaths(x=wide(normalised), acts=sparse, read=read, gates=gates[0] if gates else None, paths=paths)


def pair_contributions(
    read: SparseActs,
    V: Float[Tensor, "d_sae n_columns"],
    W_1: Float[Tensor, "nfm_dim nfm_dim"] | None,
    W_2: Float[Tensor, "nfm_dim d_in"],
    gates: Bool[Tensor, "tokens nfm_dim"],
    head: str = "fm",
) -> Float[Tensor, "tokens n d_in"]:
    """Each read feature's part of the interaction path's output, gates held; half of each pair with head "fm" or "bilinear".

    W_1 is None with "bilinear", whose squares belong to their feature whole.

    Raises:
        ValueError: for another head than "fm", "bilinear" and "mlp".
    """
    if head not in (*PAIRED, "mlp"):
        raise ValueError(
            f"what one feature writes through the head {head!r} is not known; give head 'fm', 'bilinear' or 'mlp'"
        )
    rows = wide(read.values)[..., None] * wide(V)[read.indices]
    if head == BILINEAR:
        (a, b), (all_a, all_b) = rows.chunk(2, dim=-1), rows.sum(1, keepdim=True).chunk(2, dim=-1)
        return 0.5 * (a * all_b + b * all_a) @ wide(W_2)
    assert W_1 is not None
    if head == "fm":
        rows = 0.5 * rows * (rows.sum(1, keepdim=True) - rows)
    return ((rows @ wide(W_1)) * gates[:, None]) @ wide(W_2)


@dataclass(frozen=True, kw_only=True, repr=False)
class FeatureEnergies(ShortRepr):
    """What a feature adds to each path when it is active: mean squared norm of its contribution, [d_sae] each.

    Means are over the tokens where the feature is active (where n < k it need not be read there); nan where it never is.
    """

    tokens: int
    active: Float[Tensor, " d_sae"]
    """Tokens on which each feature is active."""
    second_moment: Float[Tensor, " d_sae"]
    """E[f_i^2] over all tokens."""
    read_second_moment: Float[Tensor, " d_sae"]
    """E[f_n,i^2] over all tokens: of the feature as the NFM reads it."""
    direct: Float[Tensor, " d_sae"]
    linear: Float[Tensor, " d_sae"]
    nonlinear: Float[Tensor, " d_sae"]
    """Energy added to the interaction path."""
    square: Float[Tensor, " d_sae"]

    @property
    def frequency(self) -> Float[Tensor, " d_sae"]:
        """Share of tokens on which each feature is active."""
        return self.active / self.tokens

    def shares(self) -> dict[str, Float[Tensor, " d_sae"]]:
        """Each path's part of the sum of a feature's root-mean-square contributions: the published share, on tokens."""
        size = {name: getattr(self, name).sqrt() for name in ("direct", "linear", "nonlinear", "square")}
        total = torch.stack(list(size.values())).sum(0)
        return {name: one / total for name, one in size.items()}


@torch.no_grad()
def feature_energies(sae: SAE[Any], tokens: TokenPaths) -> FeatureEnergies:
    """Energies of every feature, for an SAE and what `token_paths` returned of it; a ValueError as of `pair_contributions`."""
    rows, acts, read, d_sae = as_read(sae), tokens.acts, tokens.read, sae.cfg.d_sae
    norms, n_tokens = rows.norms(), len(tokens.x)
    active = _by_feature(acts, (acts.values > 0).double(), d_sae)
    second = _by_feature(acts, acts.values.double().square(), d_sae)
    read_second = _by_feature(read, read.values.double().square(), d_sae)
    square = torch.zeros_like(second)
    if isinstance(sae, NFMDecoder) and sae.cfg.use_square_path:
        written = (sae.U.double().norm(dim=-1) / sae.cfg.square_scale).square()
        square = _by_feature(acts, acts.values.double().pow(4), d_sae) * written
    return FeatureEnergies(
        tokens=n_tokens,
        active=active,
        second_moment=second / n_tokens,
        read_second_moment=read_second / n_tokens,
        direct=second * norms.direct.double().square() / active,
        linear=read_second * norms.linear.double().square() / active,
        nonlinear=_by_feature(read, interaction_energies(sae, read, tokens.gates), d_sae) / active,
        square=square / active,
    )


def interaction_energies(sae: SAE[Any], read: SparseActs, gates: Tensor | None) -> Float[Tensor, "tokens n"]:
    """Squared norm of each read feature's `pair_contributions`, in chunks of tokens; 0 without an interaction path (gates)."""
    if gates is None:
        return torch.zeros_like(read.values, dtype=torch.float64)
    sized: Any = sae
    size = max(1, CELLS // (read.indices.shape[-1] * max(sized.cfg.d_in, sized.cfg.nfm_dim)))
    energies: list[Tensor] = []
    for indices, values, gate in zip(*(part.split(size) for part in (*read, gates)), strict=True):
        few = SparseActs(indices, values)
        W_1 = getattr(sized, "W_1", None)
        parts = pair_contributions(few, sized.V, W_1, sized.W_2, gate, sized.cfg.head)
        energies.append(parts.double().square().sum(-1))
    return torch.cat(energies)


@dataclass(frozen=True, kw_only=True, repr=False)
class PathSizes(ShortRepr):
    """How much each path writes, by path, [tokens] each: `statistics` makes shares with intervals of them."""

    magnitude: Mapping[str, Float[Tensor, " tokens"]]
    """Mean absolute value over the model's dimensions, biases included: the published measure."""
    energy: Mapping[str, Float[Tensor, " tokens"]]
    """Squared norm about the path's mean over tokens: what is the same at every token, biases too, is left out."""

    def share(self, measure: Mapping[str, Tensor], path: str) -> float:
        """The path's part of a measure over the integration paths (all but the direct one)."""
        total = sum(float(one.double().sum()) for name, one in measure.items() if name != "direct")
        return float(measure[path].double().sum()) / total


@torch.no_grad()
def path_sizes(paths: Paths) -> PathSizes:
    """Sizes of the paths that are switched on, "direct", "linear", "square", "interaction"."""
    present = {name: path.float() for name, path in paths.present().items()}
    return PathSizes(
        magnitude={name: path.abs().mean(-1) for name, path in present.items()},
        energy={name: (path - path.mean(0)).square().sum(-1) for name, path in present.items()},
    )


def _by_feature(acts: SparseActs, values: Tensor, d_sae: int) -> Float[Tensor, " d_sae"]:
    """Sums over tokens, in float64."""
    zeros = torch.zeros(d_sae, dtype=torch.float64, device=values.device)
    return zeros.index_add(0, acts.indices.flatten(), values.double().flatten())


def _cat(parts: Any) -> Any:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def present_paths(sae: SAE[Any]) -> list[str]:
    """The paths that are switched on, "direct", "linear", "square", "interaction"; an SAE without an NFM has the first."""
    if not isinstance(sae, NFMPaths):
        return ["direct"]
    cfg = sae.cfg
    switched = {"linear": cfg.use_linear_path, "square": cfg.use_square_path, "interaction": cfg.head != "none"}
    return ["direct", *(name for name, on in switched.items() if on)]


@torch.no_grad()
def gauges(sae: SAE[Any]) -> dict[str, PathRows]:
    """Rows that a unit of each feature writes, in every gauge that the SAE has."""
    found = {"as trained": as_read(sae)}
    if has_canonical(sae):
        found["canonical"] = as_read(canonical(sae))
    return found


class PathSums:
    """Sums over tokens, [d_sae] each, for an SAE of any architecture."""

    def __init__(self, sae: SAE[Any]) -> None:
        self._sae, sums = sae, torch.zeros(5, sae.cfg.d_sae, dtype=torch.float64)
        self._active, self._second, self._fourth, self._read, self._written = sums

    @torch.no_grad()
    def add(self, acts: Float[Tensor, "tokens d_sae"], gates: Bool[Tensor, "tokens nfm_dim"] | None) -> None:
        """Add some tokens: features as hooked at `hook_sae_acts_post`, and h > 0 (None without an interaction path)."""
        active = reference.top_n(acts, max(1, int((acts > 0).sum(-1).amax())))
        squares = active.values.double().square()
        for sums, values in ((self._active, active.values > 0), (self._second, squares), (self._fourth, squares**2)):
            self._add_sparse(sums, active, values)
        if not isinstance(self._sae, NFMPaths):
            return
        n: int | None = self._sae.cfg.nfm_top_k
        read = active if n is None else reference.top_n(acts, n)
        self._add_sparse(self._read, read, read.values.double().square())
        if gates is not None:
            self._add_sparse(self._written, read, interaction_energies(self._sae, read, gates))

    @staticmethod
    def _add_sparse(sums: Tensor, acts: SparseActs, values: Tensor) -> None:
        sums.index_add_(0, acts.indices.flatten().cpu(), values.flatten().double().cpu())

    @torch.no_grad()
    def shares(self) -> dict[str, dict[str, Float[Tensor, " d_sae"]]]:
        """By gauge and path, summing to 1 over the paths; 0 for a feature that never fired."""
        sae: Any = self._sae
        found = dict[str, dict[str, Tensor]]()
        for gauge, rows in gauges(sae).items():
            norms = rows.norms()
            energies = {
                "direct": self._second * norms.direct.double().cpu().square(),
                "linear": self._read * norms.linear.double().cpu().square(),
                "interaction": self._written,
            }
            if "square" in present_paths(sae):
                energies["square"] = self._fourth * (sae.U.double().norm(dim=-1).cpu() / sae.cfg.square_scale).square()
            sizes = {path: energies[path].sqrt() for path in present_paths(sae)}
            total = torch.stack(list(sizes.values())).sum(0)
            fires = (self._active > 0) & (total > 0)
            found[gauge] = {path: torch.where(fires, size / total, 0.0) for path, size in sizes.items()}
        return found


@dataclass(frozen=True, kw_only=True, repr=False)
class Projection(ShortRepr):
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
        """Mean coefficient where it is negative; None where it never is."""
        negative = self.coefficient[self.coefficient < 0].double()
        return float(negative.mean()) if len(negative) else None


def centred(vectors: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
    """Vectors less their mean over tokens."""
    return vectors - vectors.mean(0)


def projection(added: Float[Tensor, "tokens d"], onto: Float[Tensor, "tokens d"]) -> Projection:
    """Project what is added onto what is there, token by token."""
    added, onto = wide(added), wide(onto)
    inner, tiny = (added * onto).sum(-1), torch.finfo(onto.dtype).tiny
    return Projection(
        coefficient=inner / onto.square().sum(-1).clamp_min(tiny),
        cosine=inner / (added.norm(dim=-1) * onto.norm(dim=-1)).clamp_min(tiny),
    )


def integration(paths: Paths) -> Float[Tensor, "tokens d_in"] | None:
    """Linear and nonlinear output together; None when both are off."""
    parts = [path for path in (paths.linear, paths.interaction) if path is not None]
    return torch.stack(parts).sum(0) if parts else None


@dataclass(frozen=True, kw_only=True, repr=False)
class PairProjections(ShortRepr):
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
    B: Float[Tensor, "d_sae nfm_dim"] | None = None,
) -> PairProjections:
    """Project o_ij = f_i f_j ((v_i * v_j) W_1 D) W_2 on both features' directions, for all pairs of every token.

    Args:
        read: features that the interaction path reads; pairs with a value of 0 are left out.
        directions: decoder rows, as read or in the canonical gauge.
        B: the second projection of head "bilinear" (`PathWeights`); squares are no pairs.
    """
    n, units = read.indices.shape[-1], wide(directions) / wide(directions).norm(dim=-1, keepdim=True).clamp_min(1e-30)
    size = max(1, CELLS // (n * max(n, *W_2.shape)))
    chunks = zip(*(part.split(size) for part in (read.indices, wide(read.values), gates)), strict=True)
    weights = (units, wide(directions), wide(V), wide(W_1), wide(W_2), None if B is None else wide(B))
    parts = [_pair_sums(SparseActs(*acts), gate, *weights) for *acts, gate in chunks]
    return PairProjections(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _pair_sums(
    read: SparseActs,
    gates: Tensor,
    units: Tensor,
    directions: Tensor,
    V: Tensor,
    W_1: Tensor,
    W_2: Tensor,
    B: Tensor | None,
) -> dict[str, Tensor]:
    rows = read.values[..., None] * V[read.indices]  # f_i v_i, [tokens n m]
    along = ((units[read.indices] @ W_2.T) * gates[:, None]) @ W_1.T  # z -> projection on w_i, [tokens n m]
    if B is None:
        on_first = (rows * along) @ rows.mT  # [tokens i j]: pair i, j along w_i
    else:
        other = read.values[..., None] * B[read.indices]
        on_first = (rows * along) @ other.mT + (other * along) @ rows.mT
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


@dataclass(frozen=True, kw_only=True, repr=False)
class Gains(ShortRepr):
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
def squared_error_gains(x: Float[Tensor, "tokens d_in"], paths: Paths, *, keep_means: bool = False) -> Gains:
    """Gains on squared error over the direct path.

    Args:
        x: what is reconstructed, in the space of the paths.
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
        known = ", ".join(sorted(map(str, set(rows["arm"]))))
        raise ValueError(f"no rows of arm {', '.join(absent)}; there are {known}")
    values = {role: wide[name].to_numpy(np.float64) for role, name in arms.items()}
    if any(np.isnan(one).any() for one in values.values()):
        raise ValueError(f"{measure} is missing for some tokens of some arms; give arms measured on the same tokens")
    return Gains(
        base=values["direct"],
        **{role: values["direct"] - values[role] for role in roles[1:]},
        documents=wide.index.get_level_values("document").to_numpy(np.int64),
    )
