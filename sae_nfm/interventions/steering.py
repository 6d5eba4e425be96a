"""Steering with what a pair of features writes, against steering with the two features themselves.

    pair      ((v_i * v_j) W_1 D) W_2     what the interaction path writes for the pair, gates D ("bilinear": all open)
    sum       d_i + d_j
    first     d_i                         d_i: what feature i writes for each unit of its activation, direct and linear path
    second    d_j                         together (W_dec_i + W_lin_i, which the gauge does not change)
    random    uniform on the sphere

D is the share of tokens on which each gate is open, over the tokens where the interaction path reads both features: this is what
the pair writes there on average for each unit of f_i f_j. Every direction has norm 1, and alpha times it is added to the
activation at every token that is not special, so that all arms move it by the same distance.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from sae_nfm.architectures import PathWeights
from sae_nfm.interventions.edits import READ_AT, PairEdit
from sae_nfm.interventions.intervene import Substitution, TokenContext, counted_tokens, splice
from sae_nfm.interventions.results import Steered, SteeringComparison
from sae_nfm.kernels import open_gates
from sae_nfm.loading import digest
from sae_nfm.models import LanguageModel, SharedPrefix, check_finite, keeping, real_batches, real_tokens, run_rows

READ, HIDDEN = READ_AT["interaction"], "hook_nfm_hidden_pre"
SteeringArm = Literal["pair", "sum", "first", "second"]
ARMS: tuple[SteeringArm, ...] = get_args(SteeringArm)
IN_UNITS_OF_THE_MODEL = ("none", "expected_average_only_in")
"""Normalisations under which what an SAE writes points the same way in the model, up to one scale."""


@torch.no_grad()
def mean_gates(
    model: LanguageModel, sae: SAE[Any], pair: tuple[int, int], tokens: Int[Tensor, "rows pos"], *, batch_rows: int = 16
) -> tuple[Float[Tensor, " nfm_dim"], int]:
    """The share of tokens on which each gate h > 0 is open, float32, and the number of these tokens.

    They are the counted tokens where the interaction path reads both features; a ValueError when there is none, or no such pair.
    """
    PairEdit(pair=pair, mode="scale", value=1.0).check(sae)
    is_open, n = torch.zeros(sae.cfg.nfm_dim), 0
    for batch, real in real_batches(model, tokens, batch_rows):
        seen = dict[str, Tensor]()
        with splice(model, sae) as found, found.hooks({name: keeping(seen, name) for name in (READ, HIDDEN)}):
            run_rows(model, batch, real)
        read = seen[READ][..., list(pair)]
        both = (read != 0).all(-1) & counted_tokens(model, batch, real).to(read.device)
        is_open += open_gates(sae.cfg.head, seen[HIDDEN][both]).sum(0).cpu()
        n += int(both.sum())
    if n == 0:
        raise ValueError(
            f"the interaction path reads features {pair[0]} and {pair[1]} together on none of {tokens.numel()} tokens, so their "
            "gates are not known; give text on which both are active"
        )
    return is_open / n, n


@torch.no_grad()
def pair_direction(sae: SAE[Any], pair: tuple[int, int], gates: Float[Tensor, " nfm_dim"]) -> Float[Tensor, " d_in"]:
    """((v_i * v_j) W_1 D) W_2: what a pair writes for each unit of f_i f_j, gates D (of one token, or shares)."""
    PairEdit(pair=pair, mode="scale", value=1.0).check(sae)
    weights = PathWeights.of(sae)
    pooled = weights.products(*torch.tensor(pair)[:, None])[0]
    return ((pooled @ weights.W_1) * gates.to(weights.V)) @ weights.W_2


@torch.no_grad()
def feature_direction(sae: SAE[Any], feature: int) -> Float[Tensor, " d_in"]:
    """What a feature writes through the direct and the linear path for each unit of its activation (where both read it)."""
    direction = sae.W_dec[feature].detach()
    if getattr(getattr(sae, "base", sae).cfg, "rescale_acts_by_decoder_norm", False):  # the direct path is the base's
        direction = direction / direction.norm()
    W_lin = PathWeights.of(sae).W_lin
    return direction if W_lin is None else direction + W_lin[feature]


def directions(
    sae: SAE[Any], pair: tuple[int, int], gates: Float[Tensor, " nfm_dim"]
) -> dict[SteeringArm, Float[Tensor, " d_in"]]:
    """The direction of each arm, norm 1; a ValueError when one is zero, or the SAE writes in another space than the model's."""
    normalisation = getattr(sae, "base", sae).cfg.normalize_activations
    if normalisation not in IN_UNITS_OF_THE_MODEL:
        raise ValueError(
            f"the SAE's normalize_activations is {normalisation!r}, so what it writes is no one direction in the model; fold "
            "it, or give an SAE without"
        )
    first, second = (feature_direction(sae, feature) for feature in pair)
    found = dict(zip(ARMS, (pair_direction(sae, pair, gates), first + second, first, second), strict=True))
    for arm, direction in found.items():
        if not direction.norm() > 0:
            raise ValueError(f"the direction of {arm!r} is zero for features {pair[0]}, {pair[1]}; give another pair")
    return {arm: direction.float() / direction.float().norm() for arm, direction in found.items()}


def steering(at: str, direction: Float[Tensor, " d"], alpha: float, *, head: int | None = None) -> Substitution:
    """The intervention that adds alpha times a direction at a hook point (or one head there), at all tokens but special ones."""
    step = alpha * direction

    def add(x: Tensor, context: TokenContext) -> Tensor:  # noqa: ARG001
        return x + step.to(x)

    return Substitution(at=at, head=head, function=add, description=f"steering by {digest({'': step})}")


@torch.no_grad()
def compare_steering(
    model: LanguageModel,
    sae: SAE[Any],
    pair: tuple[int, int],
    tokens: Int[Tensor, "rows pos"],
    *,
    alphas: Sequence[float],
    target: int | None = None,
    gate_tokens: Int[Tensor, "gate_rows gate_pos"] | None = None,
    n_random: int = 3,
    seed: int = 0,
    batch_rows: int = 16,
    show_progress: bool = True,
) -> SteeringComparison:
    """Steer with a pair, with the sum of its features, with each of them and at random, at the same distances.

    Args:
        tokens: rows of text, one document each; the effect is averaged over the counted tokens of each.
        alphas: distances, in the units of the activations; negative ones point the other way.
        target: a token id whose log-probability as the next token is followed.
        gate_tokens: text on which the gates are averaged; None takes `tokens`.
        seed: of the random directions.
    """
    _check(model, tokens, alphas, target, n_random)
    gates, n = mean_gates(model, sae, pair, tokens if gate_tokens is None else gate_tokens, batch_rows=batch_rows)
    found = directions(sae, pair, gates)
    generator = torch.Generator().manual_seed(seed)
    drawn = F.normalize(torch.randn(n_random, getattr(sae.cfg, "d_out", sae.cfg.d_in), generator=generator), dim=-1)
    # where a transcoder writes
    at = str(sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name)
    head = sae.cfg.metadata.hook_head_index
    arms = {(arm, 0): direction for arm, direction in found.items()}
    arms |= {("random", draw): direction for draw, direction in enumerate(drawn)}
    steered = {
        (*arm, float(alpha)): steering(at, arms[arm], float(alpha), head=head) for arm in arms for alpha in alphas
    }
    rows, sizes = list[Steered](), list[Tensor]()
    starts, real = range(0, len(tokens), batch_rows), real_tokens(model, tokens)
    for start in tqdm(starts, desc="Steering", unit="batch", disable=not show_progress):
        here = slice(start, start + batch_rows)
        measured, norms = _measured(model, tokens[here], real[here], steered, target, start)
        rows += measured
        sizes.append(norms)
    return SteeringComparison(
        pair=pair,
        hook_name=at,
        target=target,
        rows=tuple(rows),
        cosines={arm: float(found["pair"] @ found[arm]) for arm in ARMS[1:]},
        activation_norm=float(torch.cat(sizes).mean()),
        gate_tokens=n,
        open_gates=float(gates.mean()),
        seed=seed,
    )


def _measured(
    model: LanguageModel,
    batch: Int[Tensor, "rows pos"],
    real: Bool[Tensor, "rows pos"],
    arms: Mapping[tuple[str, int, float], Substitution],
    target: int | None,
    first: int,
) -> tuple[list[Steered], Float[Tensor, " tokens"]]:
    mask, norms, found = counted_tokens(model, batch, real), torch.zeros(0), list[Steered]()
    prefix = SharedPrefix(model, {intervention.hook_name for intervention in arms.values()})
    with prefix.shared():
        clean = run_rows(model, batch, real)
    original = [logits[counted].float().log_softmax(-1) for logits, counted in zip(clean, mask, strict=True)]
    check_finite(torch.cat(original), mask, "the model's own logits", first)
    for (arm, draw, alpha), intervention in arms.items():
        with intervention.on(model) as trace, prefix.shared(intervention.hook_name):
            logits = run_rows(model, batch, real)
        norms = trace.x[mask].float().norm(dim=-1).cpu()
        for row, p in enumerate(original):
            if not len(p):
                continue
            q = logits[row][mask[row]].float().log_softmax(-1)
            check_finite(q, mask[row][None], f"steered by {alpha:g} along {arm!r} the model's logits", first + row)
            kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean().item()
            change = None if target is None else (q[:, target] - p[:, target]).mean().item()
            where: dict[str, Any] = {"arm": arm, "draw": draw, "alpha": alpha, "row": first + row, "tokens": len(p)}
            found.append(Steered(**where, kl_nats=kl, target_change_nats=change))
    return found, norms


def _check(
    model: LanguageModel, tokens: Int[Tensor, "rows pos"], alphas: Sequence[float], target: int | None, n_random: int
) -> None:
    if not alphas or not all(map(math.isfinite, alphas)) or 0 in alphas or len(set(alphas)) < len(alphas):
        raise ValueError(f"alphas are {list(alphas)}; give different finite distances, none of them 0")
    if n_random < 1:
        raise ValueError(f"n_random is {n_random}; give at least 1, there is no control without it")
    if not counted_tokens(model, tokens).any():
        raise ValueError(f"no token to steer: {tokens.numel()} tokens, all special or in position 0; give more text")
    if target is not None:
        width = model(tokens[:1]).shape[-1]
        if not 0 <= target < width:
            raise ValueError(f"target is {target}; give a token id from 0 to {width - 1}")
