"""How many of the known features, pairs and squares an SAE has found.

    features     matched one to one by cosine, then compared by how they fire (`analysis.feature_matching`)
    pairs        every pair of true features, i < j, stands for the pair of SAE features matched with the two
    squares      every true feature, for the SAE feature matched with it

Pairs are ranked by what the interaction path writes for them, on samples, exactly (`attribution.pairs`), and by weights alone;
and, of any SAE, by what its code leaves over. With r the error, g = f_i f_j, and q what a least-squares fit of f_i and f_j
leaves of g:

    c = sum q r / sum q^2               the error that goes with the product, per unit of it
    score = |sum q r|^2 / sum q^2 |r|^2        about 1 where errors are independent of the pair

Squares likewise, by what the square path and the squares of a bilinear head write, f_i^2 (u_i / c + (a_i * b_i) W_2), and with
g = f_i^2, q and r what a fit of f_i and of whether it fires leaves: else whatever fires together with a square would seem one.

A score that tells planted pairs from all others may only say which features fire together: planted pairs do. So how often they
fire together is scored too, and planted pairs are compared with decoys, which fire together as often and write nothing. Controls
of squares are a feature's firing rate and energy, and decoys the features of these pairs, whose rates are raised as much.

All that is written is measured in the units of the samples, also where an SAE normalises each.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from scipy.sparse import csr_array
from scipy.stats import mannwhitneyu
from torch import Tensor
from torch.nn import functional as F

from sae_nfm.analysis import dead_features, feature_directions, firing_scores, matched, mcc
from sae_nfm.analysis.gauge import as_read
from sae_nfm.architectures import NFMDecoder, NFMPaths, PathWeights, refuse_transcoder
from sae_nfm.attribution import RECONS, TokenPairs, norms, reading, reads_of, written
from sae_nfm.attribution.pairs import INTERACTION, TokenReads
from sae_nfm.common import ShortRepr
from sae_nfm.data import Truth
from sae_nfm.experiments.synthetic.results import Floor, PairScore, RecoveryRow, Score
from sae_nfm.kernels import PAIRED, wide
from sae_nfm.models import keeping, reconstruction

SAMPLES_AT_ONCE = 1024
FEWEST = 10
"""Samples on which a pair has to fire for what the code leaves over to be told."""
ACTS, LINEAR_IN, SQUARE = "hook_sae_acts_post", "hook_nfm_linear_in", "hook_nfm_square"


@dataclass(frozen=True, kw_only=True, repr=False)
class Passed(ShortRepr):
    """What passed an SAE on the samples."""

    code: Float[Tensor, "samples d_sae"]
    residual: Float[Tensor, "samples d_in"]
    unit: Float[Tensor, "samples 1"]
    """Length among the samples of a unit that a path writes: not 1 where the SAE normalises each sample."""
    shares: dict[str, Float[Tensor, "samples d_in"]]
    """What the interaction and the square path write, in the units of the samples."""
    read: Float[Tensor, "samples d_sae"] | None
    """The code as the linear path reads it, with `nfm_top_k` in joint_nfm."""
    reads: TokenReads | None
    """With an interaction path whose pairs can be told apart."""

    @classmethod
    def of(cls, sae: SAE[Any], x: Float[Tensor, "samples d_in"]) -> "Passed":
        """One pass."""
        own, reads, hooks = sae.hook_dict, list[TokenReads](), (ACTS, RECONS)
        paired = isinstance(sae, NFMPaths) and sae.cfg.head in PAIRED
        names = {INTERACTION, SQUARE} & own.keys()
        chooses = isinstance(sae, NFMDecoder) and sae.cfg.nfm_top_k is not None and sae.cfg.use_linear_path
        found: dict[str, list[Tensor]] = {name: [] for name in ("code", "residual", "unit", "read", *names)}
        for part in x.split(SAMPLES_AT_ONCE):
            seen = dict[str, Any]()
            kept = {name: keeping(seen, name) for name in (*hooks, *names, *([LINEAR_IN] if chooses else []))}
            out = reconstruction(sae, part, (reading(sae, seen) if paired else {}) | kept)
            before, after = wide(seen[RECONS]).std(-1, keepdim=True), wide(out).std(-1, keepdim=True)
            unit = torch.where(before > 0, after / before, 1.0)
            code = seen[ACTS]
            passed = {"code": code.to_dense() if code.is_sparse else code, "residual": part - out, "unit": unit}
            passed |= {name: wide(seen[name]) * unit for name in names} | ({"read": seen[LINEAR_IN]} if chooses else {})
            for name, value in passed.items():
                found[name].append(value)
            if paired:
                reads.append(reads_of(sae, seen))
        whole = {name: torch.cat(parts) if parts else None for name, parts in found.items()}
        same: Any = {name: whole[name] for name in ("code", "residual", "unit", "read")}
        shares: Any = {name: whole[name] for name in names}
        return cls(**same, shares=shares, reads=TokenReads.joined(reads) if reads else None)


@torch.no_grad()
def recovery(
    sae: SAE[Any], x: Float[Tensor, "samples d_in"], truth: Truth, name: str, acts: Float[Tensor, "samples features"]
) -> RecoveryRow:
    """What an SAE has found, on held-out samples whose true activations are `acts`.

    Raises a ValueError for one of another width, or whose directions are not finite.
    """
    refuse_transcoder(sae, "this measurement")
    passed = Passed.of(sae, x)
    code, directions = passed.code, mean_directions(sae, passed)
    matching = matched(directions, truth.directions)
    firing = firing_scores(code, acts, matching)
    found = torch.full((len(truth.directions),), -1)
    found[matching.true] = matching.features
    variance = float((x - x.mean(0)).double().square().sum())
    energy = {name: float((y - y.mean(0)).double().square().sum()) for name, y in passed.shares.items()}
    scores, chosen, pairs = dict[Score, Scored](), code[:, found.clamp(min=0)] * (found >= 0), truth.of_two_features()
    if len(pairs.pairs):
        scores = {Score.LEFT: left_over(chosen, passed.residual, pairs), Score.TOGETHER: (_together(chosen), None)}
        if passed.reads is not None:
            weights = PathWeights.of(sae)
            scores = attributed(weights, passed.reads, chosen, pairs, found, passed.unit) | scores
    squares = square_scores(sae, passed, chosen, found) if len(truth.pairs) > len(pairs.pairs) else {}
    return RecoveryRow(
        sae=name,
        architecture=sae.cfg.architecture(),
        refinement_steps=getattr(sae.cfg, "refinement_steps", 0),
        parameters=sum(weights.numel() for weights in sae.parameters()),
        l0=float((code > 0).sum() / len(code)),
        fvu=float(passed.residual.double().square().sum()) / variance,
        f1=float(firing.f1.mean()),
        precision=float(firing.precision.mean()),
        recall=float(firing.recall.mean()),
        mcc=mcc(directions, truth.directions),
        mean_cosine=matching.mean_cosine,
        dead=int(dead_features(code).sum()),
        interaction_share=energy[INTERACTION] / variance if INTERACTION in energy else None,
        square_share=energy[SQUARE] / variance if SQUARE in energy else None,
        mean_directions=passed.read is not None,
        pairs=tuple(pair_score(name, values, along, pairs) for name, (values, along) in scores.items()),
        squares=tuple(square_score(name, values, along, truth) for name, (values, along) in squares.items()),
    )


def mean_directions(sae: SAE[Any], passed: Passed) -> Float[Tensor, "d_sae d_in"]:
    """`feature_directions`; where a feature has no single one, what it writes on average for each unit of its activation.

    That is W_dec + p W_lin, p = sum f f_n / sum f^2 over samples, of a linear path that reads the strongest features only.
    """
    if passed.read is None:
        return feature_directions(sae)
    rows, f = as_read(sae), wide(passed.code)
    assert rows.linear is not None
    share = (f * passed.read).sum(0) / f.square().sum(0).clamp(min=torch.finfo(f.dtype).tiny)
    return rows.direct + share[:, None] * rows.linear


Scored = tuple[Float[Tensor, "features features"], Float[Tensor, "pairs d_in"] | None]
"""A score of each pair of true features, and what is found to be written for each planted one."""
SquareScored = tuple[Float[Tensor, " features"], Float[Tensor, "features d_in"] | None]
"""A score of the square of each true feature, and what is found to be written for it."""


@torch.no_grad()
def attributed(
    weights: PathWeights,
    reads: TokenReads,
    acts: Float[Tensor, "samples features"],
    truth: Truth,
    found: Int[Tensor, " features"],
    unit: Float[Tensor, "samples 1"] | None = None,
) -> dict[Score, Scored]:
    """The scores of pairs by what the interaction path writes for them.

    Args:
        reads: what that path read and wrote on the samples.
        acts: of the SAE's features in the order of the true ones that they are matched with, 0 where there is none.
        found: of each true feature the number of the SAE's; -1 without.
        unit: length among the samples of a unit that the path writes; None for 1.
    """
    n = len(truth.directions)
    true_of = torch.full((len(weights.V),), -1)
    true_of[found[found >= 0]] = (found >= 0).nonzero()[:, 0]
    planted = _numbers(truth.pairs, n)
    energy, size, count = (torch.zeros(n * n, dtype=torch.float64) for _ in range(3))
    direction = torch.zeros(truth.pair_directions.shape, dtype=torch.float64)
    units = torch.ones(len(reads.gates), 1) if unit is None else unit
    for part, unit in zip(reads.split(SAMPLES_AT_ONCE), units.split(SAMPLES_AT_ONCE), strict=True):
        pairs = TokenPairs.of(part.read)
        i, j = true_of[pairs.first], true_of[pairs.second]
        both = pairs.fires & (i >= 0) & (j >= 0)
        flat, own = (i * n + j)[both], (norms(pairs, part.gates, weights) * unit)[both].double()
        for total, values in ((energy, own.square()), (size, own), (count, torch.ones_like(own))):
            total.index_add_(0, flat, values)
        chosen = both & (planted[i, j] >= 0)
        gates = part.gates[:, None].expand(-1, chosen.shape[1], -1)[chosen]
        wrote = written(pairs.flat(chosen), gates, weights)[:, 0] * unit.expand_as(chosen)[chosen][:, None]
        direction.index_add_(0, planted[i, j][chosen], wrote.double())
    energy, size, count = (total.view(n, n) + total.view(n, n).T for total in (energy, size, count))
    return {
        Score.ENERGY: (energy, direction),
        Score.FIRING: (size / count.clamp(min=1), None),
        Score.WEIGHTS: (_by_weights(weights, reads, acts, found), None),
    }


def left_over(acts: Float[Tensor, "samples features"], residual: Float[Tensor, "samples d_in"], truth: Truth) -> Scored:
    """What goes with the product of two activations in the error of an SAE; 0 for pairs that fire together too seldom."""
    n, code, r = acts.shape[1], csr_array(acts.double().numpy()), residual.double().numpy()
    error, by_feature = np.square(r).sum(-1), code.tocsc()
    squares, fires = code.power(2), csr_array((acts > 0).double().numpy())

    def summed(one: Any, other: Any) -> Any:
        """sum_t one_ti other_tj, [features, features]."""
        return (one.T @ other).toarray()

    weighted = code * error[:, None]
    second, third, along_one = summed(code, code), summed(squares, code), code.T @ r  # third[i, j] = sum f_i^2 f_j
    second_error, third_error, often = summed(code, weighted), summed(squares, weighted), summed(fires, fires)
    scores, planted = np.zeros((n, n)), _numbers(truth.pairs, n).numpy()
    found = np.zeros(truth.pair_directions.shape)
    diagonal, tiny = second.diagonal(), np.finfo(np.float64).tiny
    for i in range(n):
        at = slice(*by_feature.indptr[i : i + 2])
        rows, f = by_feature.indices[at], by_feature.data[at]
        product = code[rows] * f[:, None]
        # of q = g - a f_i - b f_j, by the normal equations of f_i and f_j
        determinant = np.maximum(second[i, i] * diagonal - np.square(second[i]), tiny)
        a = (third[i] * diagonal - third[:, i] * second[i]) / determinant
        b = (third[:, i] * second[i, i] - third[i] * second[i]) / determinant
        along = product.T @ r[rows] - a[:, None] * along_one[i] - b[:, None] * along_one
        noise = product.power(2).T @ error[rows]
        noise += np.square(a) * second_error[i, i] + np.square(b) * second_error.diagonal()
        noise += 2 * (a * b * second_error[i] - a * third_error[i] - b * third_error[:, i])
        scores[i] = np.where(often[i] >= FEWEST, np.square(along).sum(-1) / np.maximum(noise, 1e-30), 0.0)
        own = planted[i] >= 0
        found[planted[i][own]] = along[own]  # as long as sum q^2, which a cosine does not see
    return torch.from_numpy(scores), torch.from_numpy(found)


def squares_left_over(
    acts: Float[Tensor, "samples features"], residual: Float[Tensor, "samples d_in"]
) -> tuple[Float[Tensor, " features"], Float[Tensor, "features d_in"]]:
    """What goes with the square of an activation in the error of an SAE; 0 for features that fire too seldom."""
    f, r, fires = acts.double(), residual.double(), (acts > 0).double()
    n = fires.sum(0).clamp(min=1)
    mean, square = f.sum(0) / n, f.square().sum(0) / n
    spread = (square - mean.square()).clamp(min=1e-30)
    slope = (f.pow(3).sum(0) / n - mean * square) / spread
    q = (f.square() - square - slope * (f - mean)) * fires
    # of the error, by the same fit: alpha f + beta where the feature fires
    errors = fires.T @ r / n[:, None]
    alpha = (f.T @ r / n[:, None] - mean[:, None] * errors) / spread[:, None]
    beta, weight = errors - mean[:, None] * alpha, q.square()
    noise = (weight * r.square().sum(-1, keepdim=True)).sum(0)
    noise -= 2 * (((weight * f).T @ r * alpha).sum(-1) + (weight.T @ r * beta).sum(-1))
    noise += (weight * f.square()).sum(0) * alpha.square().sum(-1) + weight.sum(0) * beta.square().sum(-1)
    noise += 2 * (weight * f).sum(0) * (alpha * beta).sum(-1)
    along = q.T @ r
    return torch.where(n >= FEWEST, along.square().sum(-1) / noise.clamp(min=1e-30), 0.0), along


def square_scores(
    sae: SAE[Any],
    passed: Passed,
    acts: Float[Tensor, "samples features"],
    found: Int[Tensor, " features"],
) -> dict[Score, SquareScored]:
    """The scores of squares of true features; arguments as of `attributed`."""
    f = acts.double()
    scores: dict[Score, SquareScored] = {
        Score.LEFT: squares_left_over(acts, passed.residual),
        Score.RATE: ((f > 0).double().mean(0), None),
        Score.FEATURE_ENERGY: (f.square().mean(0), None),
    }
    writes = list[tuple[Tensor, Tensor]]()
    if isinstance(sae, NFMPaths) and sae.cfg.use_square_path:
        writes.append((f.square(), wide(sae.U) / sae.cfg.square_scale))
    if passed.reads is not None and (weights := PathWeights.of(sae)).selves:
        every, read = torch.arange(sae.cfg.d_sae), passed.reads.read
        own = torch.zeros(len(acts), sae.cfg.d_sae).to(read.values).scatter_add_(1, read.indices, read.values)
        writes.append(((own[:, found.clamp(min=0)].double().square()), weights.products(every, every) @ weights.W_2))
    if not writes:
        return scores
    unit, there = passed.unit.double(), found >= 0
    parts = [(values * unit, rows[found.clamp(min=0)].double() * there[:, None]) for values, rows in writes]
    squared = sum(one * other * (u * v).sum(-1) for one, u in parts for other, v in parts)
    squared = torch.as_tensor(squared).clamp(min=0)
    direction = torch.stack([values.sum(0)[:, None] * rows for values, rows in parts]).sum(0)
    usual = squared.sqrt().sum(0) / (f > 0).sum(0).clamp(min=1)
    return {Score.ENERGY: (squared.sum(0), direction), Score.FIRING: (usual, None)} | scores


def oracle(x: Float[Tensor, "samples d_in"], acts: Float[Tensor, "samples features"], truth: Truth) -> PairScore | None:
    """Pairs by what the true features leave over; None where no pair is planted."""
    truth = truth.of_two_features()
    if not len(truth.pairs):
        return None
    return pair_score(Score.LEFT, *left_over(acts, x - acts @ truth.directions, truth), truth)


def square_oracle(
    x: Float[Tensor, "samples d_in"], acts: Float[Tensor, "samples features"], truth: Truth
) -> PairScore | None:
    """Squares likewise; None where none is planted."""
    if len(truth.pairs) == len(truth.of_two_features().pairs):
        return None
    return square_score(Score.LEFT, *squares_left_over(acts, x - acts @ truth.directions), truth)


def _together(acts: Float[Tensor, "samples features"]) -> Float[Tensor, "features features"]:
    """Samples on which both fire, over those on which either does."""
    fires = csr_array((acts > 0).double().numpy())
    both, often = torch.from_numpy((fires.T @ fires).toarray()), (acts > 0).double().sum(0)
    return both / (often[:, None] + often - both).clamp(min=1)


def _numbers(pairs: Int[Tensor, "pairs 2"], n: int) -> Int[Tensor, "features features"]:
    """The number of a pair at both of its places; -1 elsewhere."""
    numbers = torch.full((n, n), -1)
    for i, j in (pairs.T, pairs.flip(-1).T):
        numbers[i, j] = torch.arange(len(pairs))
    return numbers


def pair_score(
    name: Score,
    values: Float[Tensor, "features features"],
    directions: Float[Tensor, "pairs d_in"] | None,
    truth: Truth,
) -> PairScore:
    """How well planted pairs are told from all others, and from decoys, by a score of all pairs."""
    i, j = torch.triu_indices(len(values), len(values), 1)
    planted, decoys = ((_numbers(pairs, len(values)) >= 0)[i, j] for pairs in (truth.pairs, truth.decoys))
    return _score(name, values[i, j], planted, decoys, directions, truth.pair_directions)


def square_score(
    name: Score, values: Float[Tensor, " features"], directions: Float[Tensor, "features d_in"] | None, truth: Truth
) -> PairScore:
    """How well features whose square is planted are told from all others, and from those of decoys, by a score of features."""
    own = truth.pairs[:, 0] == truth.pairs[:, 1]
    features, planted, decoys = truth.pairs[own, 0], *torch.zeros(2, len(values), dtype=torch.bool)
    planted[features], decoys[truth.decoys.flatten()] = True, True
    found = None if directions is None else directions[features]
    return _score(name, values, planted, decoys & ~planted, found, truth.pair_directions[own])


def _score(
    name: Score,
    own: Float[Tensor, " scored"],
    planted: Bool[Tensor, " scored"],
    decoys: Bool[Tensor, " scored"],
    directions: Float[Tensor, "planted d_in"] | None,
    true: Float[Tensor, "planted d_in"],
) -> PairScore:
    cosine = None if directions is None else F.cosine_similarity(directions, true.double(), dim=-1)
    return PairScore(
        score=name,
        auroc=auroc(own[planted], own[~planted]),
        auroc_decoys=auroc(own[planted], own[decoys]) if decoys.any() else None,
        precision=float(planted[own.argsort(descending=True, stable=True)[: int(planted.sum())]].double().mean()),
        cosine=None if cosine is None else float(cosine.mean()),
    )


def _by_weights(
    weights: PathWeights, reads: TokenReads, acts: Float[Tensor, "samples features"], found: Int[Tensor, " features"]
) -> Float[Tensor, "features features"]:
    """||((v_i * v_j) W_1 E[D]) W_2|| E[f_i | i active] E[f_j | j active]; 0 where one is not found."""
    usual = acts.sum(0) / (acts > 0).sum(0).clamp(min=1)
    V, B = (None if rows is None else rows[found.clamp(min=0)] * usual[:, None] for rows in (weights.V, weights.B))
    assert V is not None
    onward = (weights.W_1 * reads.gates.to(V.dtype).mean(0)) @ weights.reduced()
    if B is None:
        return torch.stack([((row * V) @ onward).norm(dim=-1) for row in V]).double()
    return torch.stack([((a * B + b * V) @ onward).norm(dim=-1) for a, b in zip(V, B, strict=True)]).double()


def auroc(positive: Float[Tensor, " positive"], negative: Float[Tensor, " negative"]) -> float:
    """Probability that a positive has the higher score, ties counted half."""
    statistic: Any = mannwhitneyu(positive.numpy(), negative.numpy(), method="asymptotic").statistic
    return float(statistic) / (len(positive) * len(negative))


def floor(
    x: Float[Tensor, "samples d_in"], acts: Float[Tensor, "samples features"], truth: Truth, k: int, kind: Any
) -> Floor:
    """What the truth leaves with the k strongest features of each sample; `kind` is g of pairs (`data.synthetic`)."""
    strongest = acts.topk(min(k, acts.shape[1]), dim=-1)
    kept = torch.zeros_like(acts).scatter_(1, strongest.indices, strongest.values)
    variance = float((x - x.mean(0)).double().square().sum())
    linear = kept @ truth.directions
    first, second = kept[:, truth.pairs].unbind(-1)
    whole = linear + kind(first, second) @ truth.pair_directions
    left = [float((x - part).double().square().sum()) / variance for part in (whole, linear)]
    return Floor(k=k, fvu=left[0], fvu_linear=left[1])
