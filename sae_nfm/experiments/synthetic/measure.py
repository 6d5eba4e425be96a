"""How many of the known features and pairs an SAE has found.

    features     matched one to one by cosine, then compared by how they fire (`analysis.feature_matching`)
    pairs        every pair of true features, i < j, stands for the pair of SAE features matched with the two

Pairs are ranked by what the interaction path writes for them, on samples, exactly (`attribution.pairs`), and by weights alone;
and, of any SAE, by what its code leaves over. With r the error, g = f_i f_j, and q what a least-squares fit of f_i and f_j
leaves of g:

    c = sum q r / sum q^2               the error that goes with the product, per unit of it
    score = |sum q r|^2 / sum q^2 |r|^2        about 1 where errors are independent of the pair

A score that tells planted pairs from all others may only say which features fire together: planted pairs do. So how often they
fire together is scored too, and planted pairs are compared with decoys, which fire together as often and write nothing.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from scipy.stats import mannwhitneyu
from torch import Tensor
from torch.nn import functional as F

from sae_nfm.analysis import dead_features, feature_directions, firing_scores, matched, mcc
from sae_nfm.architectures import PathWeights, refuse_transcoder
from sae_nfm.attribution import TokenPairs, norms, written
from sae_nfm.attribution.pairs import TokenReads, token_reads
from sae_nfm.data import Truth
from sae_nfm.experiments.synthetic.results import Floor, PairScore, RecoveryRow, Score

SAMPLES_AT_ONCE = 1024
FEWEST = 10
"""Samples on which a pair has to fire for what the code leaves over to be told."""


@torch.no_grad()
def recovery(
    sae: SAE[Any], x: Float[Tensor, "samples d_in"], truth: Truth, name: str, acts: Float[Tensor, "samples features"]
) -> RecoveryRow:
    """What an SAE has found, on held-out samples whose true activations are `acts`.

    Raises a ValueError as `feature_directions`.
    """
    refuse_transcoder(sae, "this measurement")
    directions = feature_directions(sae)
    parts = [(part, sae.encode(part)) for part in x.split(SAMPLES_AT_ONCE)]
    code = torch.cat([own.to_dense() if own.is_sparse else own for _, own in parts])
    residual = torch.cat([part - sae.decode(own) for part, own in parts])
    matching = matched(directions, truth.directions)
    firing = firing_scores(code, acts, matching)
    found = torch.full((len(truth.directions),), -1)
    found[matching.true] = matching.features
    variance = float((x - x.mean(0)).double().square().sum())
    share, scores = None, dict[Score, Scored]()
    chosen, truth = code[:, found.clamp(min=0)] * (found >= 0), truth.of_two_features()
    if len(truth.pairs):
        scores = {Score.LEFT: left_over(chosen, residual, truth), Score.TOGETHER: (_together(chosen), None)}
    if _attributes(sae):
        reads = TokenReads.joined([token_reads(sae, part) for part, _ in parts])
        written_by = reads.interaction.double()
        share = float((written_by - written_by.mean(0)).square().sum()) / variance
        if len(truth.pairs):
            scores = attributed(PathWeights.of(sae), reads, chosen, truth, found) | scores
    return RecoveryRow(
        sae=name,
        architecture=sae.cfg.architecture(),
        refinement_steps=getattr(sae.cfg, "refinement_steps", 0),
        parameters=sum(weights.numel() for weights in sae.parameters()),
        l0=float((code > 0).sum() / len(code)),
        fvu=float(residual.double().square().sum()) / variance,
        f1=float(firing.f1.mean()),
        precision=float(firing.precision.mean()),
        recall=float(firing.recall.mean()),
        mcc=mcc(directions, truth.directions),
        mean_cosine=matching.mean_cosine,
        dead=int(dead_features(code).sum()),
        interaction_share=share,
        pairs=tuple(pair_score(name, values, directions, truth) for name, (values, directions) in scores.items()),
    )


def _attributes(sae: SAE[Any]) -> bool:
    return getattr(sae.cfg, "head", None) == "fm"


Scored = tuple[Float[Tensor, "features features"], Float[Tensor, "pairs d_in"] | None]
"""A score of each pair of true features, and what is found to be written for each planted one."""


@torch.no_grad()
def attributed(
    weights: PathWeights,
    reads: TokenReads,
    acts: Float[Tensor, "samples features"],
    truth: Truth,
    found: Int[Tensor, " features"],
) -> dict[Score, Scored]:
    """The scores of pairs by what the interaction path writes for them.

    Args:
        reads: what that path read and wrote on the samples.
        acts: of the SAE's features in the order of the true ones that they are matched with, 0 where there is none.
        found: of each true feature the number of the SAE's; -1 without.
    """
    n = len(truth.directions)
    true_of = torch.full((len(weights.V),), -1)
    true_of[found[found >= 0]] = (found >= 0).nonzero()[:, 0]
    planted = _numbers(truth.pairs, n)
    energy, size, count = (torch.zeros(n * n, dtype=torch.float64) for _ in range(3))
    direction = torch.zeros(truth.pair_directions.shape, dtype=torch.float64)
    for part in reads.split(SAMPLES_AT_ONCE):
        pairs = TokenPairs.of(part.read)
        i, j = true_of[pairs.first], true_of[pairs.second]
        both = pairs.fires & (i >= 0) & (j >= 0)
        flat, own = (i * n + j)[both], norms(pairs, part.gates, weights)[both].double()
        for total, values in ((energy, own.square()), (size, own), (count, torch.ones_like(own))):
            total.index_add_(0, flat, values)
        chosen = both & (planted[i, j] >= 0)
        gates = part.gates[:, None].expand(-1, chosen.shape[1], -1)[chosen]
        direction.index_add_(0, planted[i, j][chosen], written(pairs.flat(chosen), gates, weights)[:, 0].double())
    energy, size, count = (total.view(n, n) + total.view(n, n).T for total in (energy, size, count))
    return {
        Score.ENERGY: (energy, direction),
        Score.FIRING: (size / count.clamp(min=1), None),
        Score.WEIGHTS: (_by_weights(weights, reads, acts, found), None),
    }


def left_over(acts: Float[Tensor, "samples features"], residual: Float[Tensor, "samples d_in"], truth: Truth) -> Scored:
    """What goes with the product of two activations in the error of an SAE; 0 for pairs that fire together too seldom."""
    n, acts, residual = acts.shape[1], acts.double(), residual.double()
    squares, error = acts.square(), residual.square().sum(-1)
    second, third, along_one = acts.T @ acts, squares.T @ acts, acts.T @ residual  # third[i, j] = sum f_i^2 f_j
    weighted = acts * error[:, None]
    second_error, third_error = acts.T @ weighted, (squares * error[:, None]).T @ acts
    fires, scores = (acts > 0).double(), torch.zeros(n, n, dtype=torch.float64)
    found, planted = torch.zeros(truth.pair_directions.shape, dtype=torch.float64), _numbers(truth.pairs, n)
    for i in range(n):
        rows = acts[:, i].nonzero()[:, 0]
        product = acts[rows, i, None] * acts[rows]
        often = fires[rows].sum(0)
        # of q = g - a f_i - b f_j, by the normal equations of f_i and f_j
        determinant = (second[i, i] * second.diagonal() - second[i].square()).clamp(min=torch.finfo(torch.float64).tiny)
        a = (third[i] * second.diagonal() - third[:, i] * second[i]) / determinant
        b = (third[:, i] * second[i, i] - third[i] * second[i]) / determinant
        along = product.T @ residual[rows] - a[:, None] * along_one[i] - b[:, None] * along_one
        noise = (
            product.square().T @ error[rows] + a.square() * second_error[i, i] + b.square() * second_error.diagonal()
        )
        noise += 2 * (a * b * second_error[i] - a * third_error[i] - b * third_error[:, i])
        scores[i] = torch.where(often >= FEWEST, along.square().sum(-1) / noise.clamp(min=1e-30), 0.0)
        at = planted[i] >= 0
        found[planted[i][at]] = along[at]  # as long as sum q^2, which a cosine does not see
    return scores, found


def oracle(x: Float[Tensor, "samples d_in"], acts: Float[Tensor, "samples features"], truth: Truth) -> PairScore | None:
    """Pairs by what the true features leave over; None where no pair is planted."""
    truth = truth.of_two_features()
    if not len(truth.pairs):
        return None
    return pair_score(Score.LEFT, *left_over(acts, x - acts @ truth.directions, truth), truth)


def _together(acts: Float[Tensor, "samples features"]) -> Float[Tensor, "features features"]:
    """Samples on which both fire, over those on which either does."""
    fires = (acts > 0).double()
    both, often = fires.T @ fires, fires.sum(0)
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
    own = values[i, j]
    cosine = None if directions is None else F.cosine_similarity(directions, truth.pair_directions.double(), dim=-1)
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
    V = weights.V[found.clamp(min=0)] * usual[:, None]
    onward = (weights.W_1 * reads.gates.to(V.dtype).mean(0)) @ weights.reduced()
    return torch.stack([((row * V) @ onward).norm(dim=-1) for row in V]).double()


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
