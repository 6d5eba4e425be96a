"""What interventions do to the counted tokens of a batch: the loop that every figure of a model's behaviour comes from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sae_nfm.interventions import Intervention, counted_tokens
from sae_nfm.models import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an intervention did at the counted tokens of a batch, in order."""

    x: Float[Tensor, "tokens d"]
    """What the model computed at the hook point."""
    x_hat: Float[Tensor, "tokens d"]
    """What it went on with."""
    acts: Float[Tensor, "tokens d_sae"] | None
    """Feature activations, where an SAE was at work and they were asked for."""
    has_next: Bool[Tensor, " tokens"]
    """Whether there is a next token: not in the last position."""
    kl_nats: Float[Tensor, " tokens"]
    """KL(original || changed) of the next-token distributions."""
    ce_nats: Float[Tensor, " tokens"]
    """Cross-entropy of the changed model; NaN where there is no next token."""
    ce_delta_nats: Float[Tensor, " tokens"]
    """Its increase over the original model; NaN likewise."""

    def columns(self) -> dict[str, Float[Tensor, " tokens"]]:
        """The figures of each token, by the names of `token_rows.SCHEMA`."""
        error = self.x_hat - self.x
        return {
            "kl_nats": self.kl_nats,
            "ce_nats": self.ce_nats,
            "ce_delta_nats": self.ce_delta_nats,
            "error_norm": error.norm(dim=-1),
            "error_energy": error.square().sum(-1),
            "cosine": F.cosine_similarity(self.x_hat, self.x, dim=-1),
            "x_norm": self.x.norm(dim=-1),
        }


def outcomes(
    model: LanguageModel,
    batch: Int[Tensor, "rows pos"],
    arms: Mapping[str, Intervention],
    generators: Mapping[str, torch.Generator] | None = None,
    *,
    with_acts: bool = True,
) -> Iterator[tuple[str, Outcome]]:
    """What each arm does to a batch: the loop behind `evaluate` and `measure`.

    KL and cross-entropy are computed in float32 from log-probabilities, a row at a time, whatever the model's type. A KL can be
    a rounding error below zero; of unchanged logits it is 0 exactly.

    Args:
        batch: rows that go into it at once.
        generators: for those that draw at random, by name.
        with_acts: whether to keep feature activations; wide SAEs need [tokens, d_sae] numbers for them.
    """
    mask = counted_tokens(model, batch)
    following = batch.roll(-1, dims=1)
    has_next = (torch.arange(batch.shape[1], device=batch.device) < batch.shape[1] - 1).expand(batch.shape)[mask]
    original = [logits[counted].float().log_softmax(-1) for logits, counted in zip(model(batch), mask, strict=True)]
    original_ce = [_nll(p, following[row][mask[row]]) for row, p in enumerate(original)]
    for name, arm in arms.items():
        with arm.on(model, (generators or {}).get(name)) as trace:
            logits = model(batch)
        kl, ce = list[Tensor](), list[Tensor]()
        for row, p in enumerate(original):
            q = logits[row][mask[row]].float().log_softmax(-1)
            kl.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
            ce.append(_nll(q, following[row][mask[row]]))
        yield (
            name,
            Outcome(
                x=trace.x[mask].float(),
                x_hat=trace.x_hat[mask].float(),
                acts=trace.acts.to_dense()[mask] if with_acts and trace.acts is not None else None,
                has_next=has_next,
                kl_nats=torch.cat(kl),
                ce_nats=torch.cat(ce).masked_fill(~has_next, torch.nan),
                ce_delta_nats=(torch.cat(ce) - torch.cat(original_ce)).masked_fill(~has_next, torch.nan),
            ),
        )


def _nll(log_probs: Float[Tensor, "tokens d_vocab"], following: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    return -log_probs.gather(-1, following[:, None]).squeeze(-1)
