"""What a pair does to the model's predictions: directly, to first order, and when it is removed; and the pairs of a prompt.

An effect is what is there because of the pair: with it less without it, in units of the target (logits). For o = o_ij on a token:

    direct     <o, d>     d: gradient of the target through the final normalisation, its scale held, and the unembedding
    gradient   <o, g>     g: gradient of the target through the rest of the model
    frozen     target - target when f_i f_j v_i*v_j is taken out of the pooled vector and the model rerun, gates held
    free       the same, gates free to flip: what removing the pair really does

With gates held the interaction path's output changes by o exactly, so `frozen` differs from `gradient` only by how far the
rest of the model is from linear, and from `direct` by what later layers do with the pair. `attribute_token` has the figures of a
token's pairs beside those of the other terms: single features of the linear path, and the biases.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_nfm.architectures import PathWeights
from sae_nfm.attribution.direct_logits import SCALE, DirectPath, Target
from sae_nfm.attribution.pairs import (
    HIDDEN,
    INTERACTION,
    TokenPairs,
    TokenReads,
    along,
    bias_terms,
    norms,
    reading,
    reads_of,
    single_features,
    strongest,
    written,
)
from sae_nfm.attribution.results import PairEffect, TokenAttribution, Written
from sae_nfm.common import ShortRepr
from sae_nfm.kernels import open_gates, wide
from sae_nfm.models import HookFunction, LanguageModel, check_finite, keeping, special_token_ids, splice, token_text

POOLED, RECONS, OUTPUT = "hook_nfm_pooled", "hook_sae_recons", "hook_sae_output"


@dataclass(frozen=True, kw_only=True, repr=False)
class PromptRun(ShortRepr):
    """A prompt through the model with the SAE in place."""

    tokens: Int[Tensor, " pos"]
    reads: TokenReads
    """What the paths read and wrote, at every position."""
    logits: Float[Tensor, "pos d_vocab"]
    in_place: Bool[Tensor, " pos"]
    """Where the SAE is in place: not at special tokens, which pass it by."""
    scale: Float[Tensor, "pos 1"] | None
    """Scale of the final normalisation; None where the model has none of TransformerLens's."""
    unit: Float[Tensor, "pos 1"]
    """Length at the hook point of a unit vector that a path writes: not 1 where the SAE normalises its input as it runs."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A pair to be taken out of one position's pooled vector."""

    position: int
    first: int
    second: int
    target: Target


@dataclass(frozen=True, kw_only=True, repr=False)
class Removed(ShortRepr):
    """What happened when a pair was removed."""

    frozen: float
    """Effect on the target, gates held."""
    free: float
    """The same, gates free to flip."""
    flipped: float
    """Share of the token's gates that flipped."""
    written_frozen: Float[Tensor, " d_in"]
    """What the interaction path wrote because of it, gates held: measured."""
    written_free: Float[Tensor, " d_in"]


@torch.no_grad()
def run_prompt(model: LanguageModel, sae: SAE[Any], tokens: Int[Tensor, " pos"]) -> PromptRun:
    """Run a prompt with the SAE spliced in; for errors see `attributable` and `splice`."""
    seen = dict[str, Any]()
    with observed(model, sae, seen):
        logits = wide(model(tokens[None])[0])
    check_finite(logits, torch.ones_like(tokens[None], dtype=torch.bool), "with the SAE in place the model's logits")
    special = torch.tensor(special_token_ids(model), dtype=tokens.dtype, device=tokens.device)
    scale = seen.get(SCALE)
    return PromptRun(
        tokens=tokens,
        reads=reads_of(sae, seen),
        logits=logits,
        in_place=~torch.isin(tokens, special),
        scale=None if scale is None else scale[0],
        unit=unit_written(seen)[0],
    )


def gradients(
    model: LanguageModel,
    sae: SAE[Any],
    tokens: Int[Tensor, " pos"],
    targets: Sequence[tuple[int, Target]],
    *,
    batch_rows: int = 16,
) -> Float[Tensor, "targets d_in"]:
    """g: gradients of targets with respect to what the interaction path writes, each at its own position.

    Args:
        targets: (position, target); several can be at one position.
    """
    starts = range(0, len(targets), batch_rows)
    return torch.cat([_gradients(model, sae, tokens, targets[start : start + batch_rows]) for start in starts])


def _gradients(
    model: LanguageModel, sae: SAE[Any], tokens: Tensor, targets: Sequence[tuple[int, Target]]
) -> Float[Tensor, "targets d_in"]:
    leaves, rows = list[Tensor](), torch.arange(len(targets))
    positions = torch.tensor([position for position, _ in targets])

    def leaf(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        leaves.append(value.detach().requires_grad_())
        return leaves[0]

    with torch.enable_grad(), splice(model, sae) as found, found.hooks({INTERACTION: leaf}):
        logits = wide(model(tokens.expand(len(targets), -1))[rows, positions])
        weights = torch.stack([target.weights for _, target in targets]).to(logits)
        (g,) = torch.autograd.grad((logits * weights).sum(), leaves)
    return wide(g[rows, positions])


@torch.no_grad()
def remove_pairs(
    model: LanguageModel, sae: SAE[Any], run: PromptRun, removals: Sequence[Removal], *, batch_rows: int = 16
) -> list[Removed]:
    """Take pairs out of the pooled vector, one at a time, and rerun the model, with gates held and free.

    Args:
        run: the prompt with nothing removed.
        removals: what to remove; pairs that do not fire change nothing.
    """
    batches = (removals[start : start + batch_rows] for start in range(0, len(removals), batch_rows))
    return [one for batch in batches for one in _removed(model, sae, run, batch, PathWeights.of(sae))]


def _removed(
    model: LanguageModel, sae: SAE[Any], run: PromptRun, removals: Sequence[Removal], weights: PathWeights
) -> list[Removed]:
    at = (torch.arange(len(removals)), torch.tensor([removal.position for removal in removals]))
    pooled, gates = _pooled_parts(run.reads, removals, weights), run.reads.gates[at[1]]
    seen, outcomes = dict[str, Tensor](), list[tuple[Tensor, Tensor]]()

    def take_out(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return value.index_put(at, value[at] - pooled.to(value))

    def hold_gates(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        held = (wide(seen[HIDDEN][at]) * gates) @ weights.W_2 + weights.b_2
        return value.index_put(at, held.to(value))

    free: dict[str, HookFunction] = {POOLED: take_out, HIDDEN: keeping(seen, HIDDEN)}
    for hooks in (free | {INTERACTION: hold_gates}, free):
        with splice(model, sae) as spliced, spliced.hooks(hooks), spliced.hooks({INTERACTION: keeping(seen, "inter")}):
            outcomes.append((wide(model(run.tokens.expand(len(removals), -1))[at]), wide(seen["inter"][at])))
    for removal, (frozen, freed) in zip(removals, zip(outcomes[0][0], outcomes[1][0], strict=True), strict=True):
        if not (frozen.isfinite().all() and freed.isfinite().all()):
            raise ValueError(
                f"with the pair {removal.first} x {removal.second} removed the model's logits are not finite at position "
                f"{removal.position}; load the model in a data type of wider range (bfloat16 or float32)"
            )
    flipped = (open_gates(sae.cfg.head, seen[HIDDEN][at]) != gates).double().mean(-1)
    (frozen, inter_frozen), (freed, inter_free) = outcomes
    before = run.reads.interaction[at[1]]

    def effect(n: int, logits: Tensor) -> float:
        return float(removals[n].target.of((run.logits[removals[n].position] - logits[n]).double()))

    return [
        Removed(
            frozen=effect(n, frozen),
            free=effect(n, freed),
            flipped=float(flipped[n]),
            written_frozen=before[n] - inter_frozen[n],
            written_free=before[n] - inter_free[n],
        )
        for n in range(len(removals))
    ]


def _pooled_parts(
    reads: TokenReads, removals: Sequence[Removal], weights: PathWeights
) -> Float[Tensor, "removals nfm_dim"]:
    """What each removal takes out."""
    parts: list[Tensor] = []
    for removal in removals:
        indices, values = reads.read.indices[removal.position], reads.read.values[removal.position]
        f_i, f_j = (values[indices == feature].sum() for feature in (removal.first, removal.second))
        parts.append(f_i * f_j * weights.products(*torch.tensor([[removal.first], [removal.second]]))[0])
    return torch.stack(parts)


@contextmanager
def observed(model: LanguageModel, sae: SAE[Any], seen: dict[str, Any]) -> Generator[None]:
    """The SAE in place, and in `seen` what `reading` sees, its reconstruction and the final normalisation's scale."""
    kept = {name: keeping(seen, name) for name in (RECONS, OUTPUT)}
    scale: list[Any] = [(SCALE, keeping(seen, SCALE))] if SCALE in model.hook_dict else []
    with splice(model, sae) as found, found.hooks(reading(sae, seen) | kept), model.hooks(fwd_hooks=scale):
        yield


def unit_written(seen: dict[str, Any]) -> Float[Tensor, "rows pos 1"]:
    """Length at the hook point of a unit vector that a path writes, from what `observed` has seen: both are affine."""
    before, after = (wide(seen[name]).flatten(2).std(-1, keepdim=True) for name in (RECONS, OUTPUT))
    return torch.where(before > 0, after / before, 1.0)


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
        target: what to measure effects on, at the token's position.
        rank_by: norm of what is written, or an absolute effect.

    Raises:
        ValueError: for a position the SAE is not in place at, or a ranking by a direct path that there is not.
    """
    if not 0 <= position < len(run.tokens) or not run.in_place[position]:
        others = ", ".join(map(str, run.in_place.nonzero()[:, 0].tolist())) or "none: the prompt has no other token"
        raise ValueError(
            f"the SAE is not in place at token {position} of {len(run.tokens)}: special tokens (BOS, EOS, padding) pass it by; "
            f"give one of {others}"
        )
    effects, weights = _Effects(model, sae, run, position, target), PathWeights.of(sae)
    reads = run.reads.of(torch.tensor([position]))
    pairs = TokenPairs.of(reads.read, selves=weights.selves)
    if rank_by == "norm":
        ranking = norms(pairs, reads.gates, weights)[0]
    else:
        ranking = along(reads.read, reads.gates, weights, effects.direction(rank_by)[None])[0]
    chosen = pairs.chosen(strongest(ranking, pairs.fires[0], top))
    return TokenAttribution(
        position=position,
        token=token_text(model, int(run.tokens[position])),
        target=target.name,
        value=float(target.of(run.logits[position].double())),
        gates_open=float(reads.gates.double().mean()),
        pairs_firing=int((pairs.fires & ~pairs.is_self).sum()),
        pairs=effects.of_pairs(chosen, written(chosen, reads.gates, weights)[0]),
        features=_linear(reads, weights, effects, top, rank_by),
        **_terms(pairs, reads, weights, effects),
    )


def _terms(pairs: TokenPairs, reads: TokenReads, weights: PathWeights, effects: "_Effects") -> dict[str, Any]:
    """The path's output and the terms that make it up."""
    whole, (constant, gated) = reads.interaction[0], bias_terms(reads.gates, weights)
    vectors, squares = written(pairs, reads.gates, weights)[0], pairs.is_self[0]
    terms = {"all pairs": vectors[~squares].sum(0), "b_2": constant}
    terms |= {"all squares": vectors[squares].sum(0)} if weights.selves else {"(b_1 * D) W_2": gated[0]}
    everything, bias, last = (effects.of(name, vector) for name, vector in terms.items())
    off = (torch.stack(list(terms.values())).sum(0) - whole).norm() / whole.norm().clamp_min(1e-30)
    return {
        "path_norm": float(whole.norm()),
        "sum_error": float(off),
        "all_pairs": everything,
        "all_squares": last if weights.selves else None,
        "biases": (bias,) if weights.selves else (bias, last),
    }


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
            logits = wide(self._direct.logits((vector * self._unit)[None], self._scale)[0])
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
        keys = list(zip(pairs.first[0].tolist(), pairs.second[0].tolist(), strict=True))
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
        return tuple(token_text(self._model, token) for token in logits.topk(min(NAMED, len(logits))).indices.tolist())


def _linear(
    reads: TokenReads, weights: PathWeights, effects: _Effects, top: int, rank_by: RankBy
) -> tuple[Written, ...]:
    if weights.W_lin is None:
        return ()
    vectors = single_features(reads.read, weights)[0]
    values = vectors.norm(dim=-1) if rank_by == "norm" else vectors @ effects.direction(rank_by)
    chosen = strongest(values, reads.read.values[0] != 0, top)
    return tuple(effects.of(str(int(reads.read.indices[0, i])), vectors[i]) for i in chosen)
