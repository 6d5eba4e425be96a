"""What a pair does to the model's predictions: directly, to first order, and when it is removed.

An effect is what is there because of the pair: with it less without it, in units of the target (logits). For o = o_ij on a token:

    direct     <o, d>     d: gradient of the target through the final normalisation, its scale held, and the unembedding
    gradient   <o, g>     g: gradient of the target through the rest of the model
    frozen     target - target when f_i f_j v_i*v_j is taken out of the pooled vector and the model rerun, gates held
    free       the same, gates free to flip: what removing the pair really does

With gates held the interaction path's output changes by o exactly, so `frozen` differs from `gradient` only by how far the
rest of the model is from linear, and from `direct` by what later layers do with the pair.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_nfm.architectures import PathWeights
from sae_nfm.attribution.direct_logits import SCALE, Target
from sae_nfm.attribution.path_activations import HIDDEN, INTERACTION, TokenReads, reading, reads_of
from sae_nfm.models import HookFunction, LanguageModel, keeping, special_token_ids, splice

POOLED, RECONS, OUTPUT = "hook_nfm_pooled", "hook_sae_recons", "hook_sae_output"


@dataclass(frozen=True, kw_only=True)
class PromptRun:
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


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What happened when a pair was removed."""

    frozen: float
    """Effect on the target with the gates held, model rerun."""
    free: float
    """Effect on the target with gates free to flip."""
    flipped: float
    """Share of the token's gates that flipped."""
    written_frozen: Float[Tensor, " d_in"]
    """What the interaction path wrote because of it, gates held: measured."""
    written_free: Float[Tensor, " d_in"]


@torch.no_grad()
def run_prompt(model: LanguageModel, sae: SAE[Any], tokens: Int[Tensor, " pos"]) -> PromptRun:
    """Run a prompt with the SAE spliced in.

    Raises:
        ValueError: see `attribution.attributable` and `splicing.splice`.
    """
    seen = dict[str, Any]()
    with observed(model, sae, seen):
        logits = model(tokens[None])[0]
    special = torch.tensor(special_token_ids(model), dtype=tokens.dtype, device=tokens.device)
    scale = seen.get(SCALE)
    return PromptRun(
        tokens=tokens,
        reads=reads_of(seen),
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
        logits = model(tokens.expand(len(targets), -1))[rows, positions]
        weights = torch.stack([target.weights for _, target in targets]).to(logits)
        (g,) = torch.autograd.grad((logits * weights).sum(), leaves)
    return g[rows, positions]


@torch.no_grad()
def remove_pairs(
    model: LanguageModel, sae: SAE[Any], run: PromptRun, removals: Sequence[Removal], *, batch_rows: int = 16
) -> list[Removed]:
    """Take pairs out of the pooled vector, one at a time, and rerun the model, with gates held and free.

    Args:
        run: the prompt with nothing removed.
        removals: what to remove; pairs that do not fire change nothing.
    """
    weights, found = PathWeights.of(sae), list[Removed]()
    for start in range(0, len(removals), batch_rows):
        found += _removed(model, sae, run, removals[start : start + batch_rows], weights)
    return found


def _removed(
    model: LanguageModel, sae: SAE[Any], run: PromptRun, removals: Sequence[Removal], weights: PathWeights
) -> list[Removed]:
    at = (torch.arange(len(removals)), torch.tensor([removal.position for removal in removals]))
    pooled, gates = _pooled_parts(run.reads, removals, weights), run.reads.gates[at[1]]
    seen, outcomes = dict[str, Tensor](), list[tuple[Tensor, Tensor]]()

    def take_out(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return value.index_put(at, value[at] - pooled.to(value))

    def hold_gates(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return value.index_put(at, (seen[HIDDEN][at] * gates) @ weights.W_2 + weights.b_2)

    free: dict[str, HookFunction] = {POOLED: take_out, HIDDEN: keeping(seen, HIDDEN)}
    for hooks in (free | {INTERACTION: hold_gates}, free):
        with splice(model, sae) as spliced, spliced.hooks(hooks), spliced.hooks({INTERACTION: keeping(seen, "inter")}):
            outcomes.append((model(run.tokens.expand(len(removals), -1))[at], seen["inter"][at]))
    flipped = ((seen[HIDDEN][at] > 0) != gates).double().mean(-1)
    (frozen, inter_frozen), (freed, inter_free) = outcomes
    before = run.reads.interaction[at[1]]

    def effect(n: int, logits: Tensor) -> float:
        target = removals[n].target
        return float(target.of((run.logits[removals[n].position] - logits[n]).double()))

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
    """f_i f_j v_i*v_j of each removal."""
    parts: list[Tensor] = []
    for removal in removals:
        indices, values = reads.read.indices[removal.position], reads.read.values[removal.position]
        f_i, f_j = (values[indices == feature].sum() for feature in (removal.first, removal.second))
        parts.append(f_i * f_j * weights.V[removal.first] * weights.V[removal.second])
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
    before, after = (seen[name].flatten(2).std(-1, keepdim=True) for name in (RECONS, OUTPUT))
    return torch.where(before > 0, after / before, 1.0)
