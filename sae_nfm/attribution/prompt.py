"""The pairs of a prompt's tokens: what each writes, which tokens that promotes, what happens when it is removed.

Figures of `attribution` and `pair_effects` for a few tokens, beside those of the other terms: single features of the linear path,
and the biases.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from sae_nfm.architectures import PathWeights
from sae_nfm.attribution.direct_logits import DirectPath, Target
from sae_nfm.attribution.pair_effects import PromptRun, Removal, gradients, remove_pairs
from sae_nfm.attribution.pairs import TokenPairs, along, bias_terms, norms, single_features, strongest, written
from sae_nfm.attribution.path_activations import TokenReads
from sae_nfm.attribution.results import PairEffect, TokenAttribution, Written
from sae_nfm.models import LanguageModel

RankBy = Literal["norm", "direct", "gradient"]
NAMED = 3
"""Tokens named as promoted and suppressed."""


def attribute_token(
    model: LanguageModel,
    sae: SAE[Any],
    run: PromptRun,
    position: int,
    target: Target,
    *,
    top: int = 10,
    rank_by: RankBy = "norm",
) -> TokenAttribution:
    """The strongest pairs of one token, and single features of the linear path.

    Args:
        position: of the token.
        target: what to measure effects on, there.
        rank_by: norm of what is written, or an absolute effect.

    Raises:
        ValueError: for a position the SAE is not in place at, or a ranking by a direct path that there is not.
    """
    _check_position(run, position)
    effects, weights = _Effects(model, sae, run, position, target), PathWeights.of(sae)
    reads = run.reads.of(torch.tensor([position]))
    pairs = TokenPairs.of(reads.read)
    chosen = pairs.chosen(strongest(_ranking(pairs, reads, weights, effects, rank_by), pairs.fires[0], top))
    return TokenAttribution(
        position=position,
        token=_text(model, int(run.tokens[position])),
        target=target.name,
        value=float(target.of(run.logits[position].double())),
        gates_open=float(reads.gates.double().mean()),
        pairs_firing=int(pairs.fires.sum()),
        pairs=effects.of_pairs(chosen, written(chosen, reads.gates, weights)[0]),
        features=_linear(reads, weights, effects, top, rank_by),
        **_terms(pairs, reads, weights, effects),
    )


def _terms(pairs: TokenPairs, reads: TokenReads, weights: PathWeights, effects: "_Effects") -> dict[str, Any]:
    """The path's output and the terms that make it up."""
    whole, (constant, gated) = reads.interaction[0], bias_terms(reads.gates, weights)
    terms = [written(pairs, reads.gates, weights)[0].sum(0), constant, gated[0]]
    everything, *biases = map(effects.of, ("all pairs", "b_2", "(b_1 * D) W_2"), terms)
    off = (torch.stack(terms).sum(0) - whole).norm() / whole.norm().clamp_min(1e-30)
    return {"path_norm": float(whole.norm()), "sum_error": float(off), "all_pairs": everything, "biases": tuple(biases)}


def _ranking(
    pairs: TokenPairs, reads: TokenReads, weights: PathWeights, effects: "_Effects", rank_by: RankBy
) -> Float[Tensor, " pairs"]:
    if rank_by == "norm":
        return norms(pairs, reads.gates, weights)[0]
    return along(reads.read, reads.gates, weights, effects.direction(rank_by)[None])[0]


def _check_position(run: PromptRun, position: int) -> None:
    if not 0 <= position < len(run.tokens) or not run.in_place[position]:
        raise ValueError(
            f"the SAE is not in place at token {position} of {len(run.tokens)}: special tokens (BOS, EOS, padding) pass it by; "
            f"give one of {_listed(run.in_place)}"
        )


class _Effects:
    """What vectors written at one position do to a target."""

    def __init__(self, model: LanguageModel, sae: SAE[Any], run: PromptRun, position: int, target: Target) -> None:
        self._model, self._sae, self._run, self._position = model, sae, run, position
        self._gradient = gradients(model, sae, run.tokens, [(position, target)])[0]
        self._unit, self._target = run.unit[position], target
        self._scale = None if run.scale is None else run.scale[position][None]
        try:
            self._direct = DirectPath(model, sae)
        except ValueError:  # another kind of model or hook point: everything else can be had
            self._direct = None

    def direction(self, kind: RankBy) -> Float[Tensor, " d_in"]:
        """Along which a vector's effect lies."""
        if kind == "gradient":
            return self._gradient
        if self._direct is None:
            raise ValueError("there is no direct path to rank by here; rank by norm or gradient")
        return self._direct.directions([self._target], self._scale, self._gradient[None])[0] * self._unit

    @torch.no_grad()
    def of(self, name: str, vector: Float[Tensor, " d_in"]) -> Written:
        """Statistics of one vector."""
        direct, promotes, suppresses = None, (), ()
        if self._direct is not None:
            logits = self._direct.logits((vector * self._unit)[None], self._scale)[0]
            direct = float(self._target.of(logits.double()))
            if vector.any():
                promotes, suppresses = self._named(logits), self._named(-logits)
        return Written(
            name=name,
            norm=float(vector.norm()),
            direct=direct,
            gradient=float(vector @ self._gradient),
            promotes=promotes,
            suppresses=suppresses,
        )

    def of_pairs(self, pairs: TokenPairs, vectors: Float[Tensor, "pairs d_in"]) -> tuple[PairEffect, ...]:
        """Statistics of pairs, which are removed one by one."""
        keys = _keys(pairs)
        removals = [Removal(position=self._position, first=i, second=j, target=self._target) for i, j in keys]
        removed = remove_pairs(self._model, self._sae, self._run, removals)
        return tuple(
            PairEffect(
                first=i,
                second=j,
                product=float(product),
                written=self.of(f"{i} x {j}", vector),
                frozen=measured.frozen,
                free=measured.free,
                flipped=measured.flipped,
                prediction_error=float((measured.written_frozen - vector).norm() / vector.norm().clamp_min(1e-30)),
            )
            for (i, j), product, vector, measured in zip(keys, pairs.product[0], vectors, removed, strict=True)
        )

    def _named(self, logits: Tensor) -> tuple[str, ...]:
        return tuple(_text(self._model, token) for token in logits.topk(min(NAMED, len(logits))).indices.tolist())


def _linear(
    reads: TokenReads, weights: PathWeights, effects: _Effects, top: int, rank_by: RankBy
) -> tuple[Written, ...]:
    if weights.W_lin is None:
        return ()
    vectors = single_features(reads.read, weights)[0]
    values = vectors.norm(dim=-1) if rank_by == "norm" else vectors @ effects.direction(rank_by)
    chosen = strongest(values, reads.read.values[0] != 0, top)
    return tuple(effects.of(str(int(reads.read.indices[0, i])), vectors[i]) for i in chosen)


def _keys(pairs: TokenPairs) -> list[tuple[int, int]]:
    return list(zip(pairs.first[0].tolist(), pairs.second[0].tolist(), strict=True))


def _text(model: LanguageModel, token: int) -> str:
    tokenizer: Any = model.tokenizer
    return str(token) if tokenizer is None else tokenizer.decode([token])


def _listed(mask: Tensor) -> str:
    return ", ".join(map(str, mask.nonzero()[:, 0].tolist())) or "none: the prompt has no other token"
