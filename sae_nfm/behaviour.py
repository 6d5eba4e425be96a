"""What splicing an SAE into a language model does to its activations and to its predictions.

One loop over held-out tokens serves every arm: the model runs once as it is and once per arm with the SAE spliced in at
its hook point, the arm's paths switched off. Special tokens (BOS, EOS, padding) bypass the SAE, as in SAELens's splice,
and are left out of every average; so is position 0, whose norm would dominate the variance.
"""

from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from sae_lens.evals import ExplainedVarianceCalculator
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from sae_nfm.hooks import HookFunction, Splice, special_token_ids, splice
from sae_nfm.models import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Arm:
    """An SAE spliced in at its own hook point, some of its paths written as zero."""

    name: str
    """Unique name of the arm."""
    sae: SAE[Any]
    """The SAE; `cfg.metadata.hook_name` says where it goes."""
    off: tuple[str, ...] = ()
    """Hook points of the SAE, such as "hook_nfm_linear", whose value is replaced by zero."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How faithful a spliced model is to the original, averaged over held-out tokens."""

    fvu: float
    """Fraction of variance unexplained: squared error over squared distance from the held-out mean."""
    l0: float
    """Active features per token."""
    kl_nats: float
    """KL(original || spliced) of the next-token distributions, nats per token."""
    ce_nats: float
    """Cross-entropy of the spliced model, nats per token."""
    ce_delta_nats: float
    """Increase of cross-entropy over the original model, nats per token."""
    tokens: int
    """Tokens averaged over."""


class _Sums:
    """Running sums of one arm, in float64."""

    def __init__(self) -> None:
        self.explained_variance = ExplainedVarianceCalculator()
        self.values: dict[str, float] = defaultdict(float)

    def add(self, **terms: Tensor) -> None:
        for name, term in terms.items():
            self.values[name] += term.cpu().double().sum().item()

    def fidelity(self) -> Fidelity:
        s = self.values
        n = s["tokens"]
        return Fidelity(
            fvu=1 - self.explained_variance.compute(),
            l0=s["active"] / n,
            kl_nats=s["kl"] / n,
            ce_nats=s["ce"] / s["predictions"],
            ce_delta_nats=(s["ce"] - s["ce_original"]) / s["predictions"],
            tokens=int(n),
        )


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: Int[Tensor, "rows pos"],
    arms: Sequence[Arm],
    *,
    batch_rows: int = 16,
    show_progress: bool = True,
) -> dict[str, Fidelity]:
    """Fidelity of every arm on the same tokens.

    Args:
        model: the language model, from any of `sae_nfm.models.load_model`'s loaders.
        tokens: held-out rows, each beginning with BOS where the model wants one.
        arms: what to splice in; names must differ.
        batch_rows: rows per forward pass.
        show_progress: whether to show a progress bar.

    Raises:
        ValueError: for two arms of one name, or when no token is left to average over.
    """
    if len({arm.name for arm in arms}) != len(arms):
        raise ValueError(f"arm names {[arm.name for arm in arms]} repeat; give every arm a name of its own")
    sums = {arm.name: _Sums() for arm in arms}
    batches = tokens.split(batch_rows)
    for batch in tqdm(batches, desc="Evaluating", disable=not show_progress):
        mask = counted_tokens(model, batch)
        if not mask.any():
            continue
        original = model(batch).float().log_softmax(-1)
        ce_original = _next_token_ce(original, batch, mask)
        for arm in arms:
            seen, spliced = _run_spliced(model, batch, arm)
            spliced = spliced.float().log_softmax(-1)
            kl = F.kl_div(spliced, original, reduction="none", log_target=True).sum(-1)
            ce = _next_token_ce(spliced, batch, mask)
            x, x_hat, acts = (seen[name][mask].flatten(1).float() for name in ("in", "out", "acts"))
            sums[arm.name].explained_variance.add_batch(x_hat, x)
            sums[arm.name].add(
                tokens=mask,
                active=acts != 0,
                kl=kl[mask],
                ce=ce,
                ce_original=ce_original,
                predictions=mask[:, :-1],
            )
    if arms and not sums[arms[0].name].values:
        raise ValueError(
            f"no token to evaluate on: {tokens.numel()} tokens, all special or in position 0; give more held-out text"
        )
    return {name: s.fidelity() for name, s in sums.items()}


def counted_tokens(model: LanguageModel, tokens: Int[Tensor, "rows pos"]) -> Bool[Tensor, "rows pos"]:
    """True where a token enters the averages: not special (BOS, EOS, padding), not in position 0."""
    special = torch.tensor(special_token_ids(model), dtype=tokens.dtype, device=tokens.device)
    mask = ~torch.isin(tokens, special)
    mask[:, 0] = False
    return mask


@contextmanager
def spliced(model: LanguageModel, arm: Arm) -> Generator[LanguageModel]:
    """The model with the arm's SAE in place of its hook point; removed again whatever happens.

    Raises:
        ValueError: when the model has no such hook point, or the SAE no such path.
    """
    with _splice_arm(model, arm):
        yield model


@contextmanager
def _splice_arm(model: LanguageModel, arm: Arm) -> Generator[Splice]:
    unknown = [name for name in arm.off if name not in arm.sae.hook_dict]
    if unknown:
        raise ValueError(f"the SAE of {arm.name!r} has no {', '.join(unknown)}; it has {', '.join(arm.sae.hook_dict)}")
    with splice(model, arm.sae) as found, found.hooks(dict.fromkeys(arm.off, _zero)):
        yield found


def _zero(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
    return torch.zeros_like(value)


def _run_spliced(
    model: LanguageModel, batch: Tensor, arm: Arm
) -> tuple[dict[str, Tensor], Float[Tensor, "rows pos d_vocab"]]:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> HookFunction:
        def hook_fn(value: Tensor, hook: Any) -> None:  # noqa: ARG001
            seen[name] = value

        return hook_fn

    names = {"hook_sae_input": "in", "hook_sae_output": "out", "hook_sae_acts_post": "acts"}
    with _splice_arm(model, arm) as found, found.hooks({hook: keep(name) for hook, name in names.items()}):
        logits = model(batch)
    return seen, logits


def _next_token_ce(log_probs: Tensor, tokens: Tensor, mask: Tensor) -> Float[Tensor, " predictions"]:
    """Negative log-probability of the token after each counted position that has one."""
    nll = -log_probs[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return nll[mask[:, :-1]]
