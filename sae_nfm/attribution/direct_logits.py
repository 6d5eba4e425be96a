"""From a vector in the residual stream straight to the logits: no layer between, the final normalisation's scale held.

With the scale held both are linear, so that what vectors add to the logits adds up.

Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits (direct paths to the logits).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor, nn

from sae_nfm.common import ShortRepr
from sae_nfm.models import LanguageModel

SCALE = "ln_final.hook_scale"
ON_RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_out")
"""How hook points of HookedTransformer and of a bridge end at which what is written goes to the residual stream as it is."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Target(ShortRepr):
    """A number of the model's output at a token: a combination of the logits there."""

    name: str
    weights: Float[Tensor, " d_vocab"]
    """The combination. Weights that add up to 0 make it independent of what all logits share, which changes no prediction."""

    @classmethod
    def logit(cls, token: int, d_vocab: int, name: str, against: int | None = None) -> "Target":
        """The logit of a token less the mean of all logits, or less the logit of another token."""
        for one in (token, against):
            if one is not None and not 0 <= one < d_vocab:
                raise ValueError(f"token id {one} is not in the vocabulary; give one from 0 to {d_vocab - 1}")
        weights = torch.full((d_vocab,), -1 / d_vocab, dtype=torch.float64)
        if against is not None:
            weights = torch.zeros(d_vocab, dtype=torch.float64)
            weights[against] -= 1
        weights[token] += 1
        return cls(name=name, weights=weights)

    def of(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch"]:
        """Its value."""
        return logits @ self.weights.to(logits)


class DirectPath:
    """From what is written at the SAE's hook point straight to the logits: no later layer, the final scale held.

    A bridge computes its final normalisation by itself when its scale is written, and warns that this rounds differently.

    Raises:
        ValueError: where there is no such path: another kind of model, or a hook point that is not on the residual stream.
    """

    def __init__(self, model: LanguageModel, sae: SAE[Any]) -> None:
        at = str(sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name)
        # a bridge's own name of what an MLP writes is in front of a second normalisation, where there is one
        block = re.match(r"blocks\.(\d+)\.mlp\.hook_out$", at)
        normalised = block is not None and hasattr(cast(Any, model).blocks[int(block[1])], "ln2_post")
        if not (hasattr(model, "unembed") and at.endswith(ON_RESIDUAL)) or normalised:
            needed = "it takes a model with TransformerLens's unembed, and a hook point on its residual stream"
            raise ValueError(f"there is no direct path from {at!r} to the logits: {needed}")
        self._model: Any = model

    def logits(
        self, vectors: Float[Tensor, "tokens d_in"], scale: Float[Tensor, "#tokens 1"] | None
    ) -> Float[Tensor, "tokens d_vocab"]:
        """What vectors in the residual stream add to the logits, before a soft cap; linear in them. Scale: see `PromptRun`."""
        with_it, without = cast(nn.Module, self._model.unembed)(self._normalised(vectors, scale))
        return with_it - without

    def directions(
        self, targets: Sequence[Target], scale: Tensor | None, like: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, "tokens d_in"]:
        """The gradient d of each token's target.

        Args:
            targets: one for each token, or one for all.
            scale: of the final normalisation, [tokens, 1].
            like: vectors, for size, type and device.
        """
        with torch.enable_grad():
            at = torch.zeros_like(like).requires_grad_()
            weights = torch.stack([target.weights for target in targets]).to(at)
            onto = weights @ self._model.W_U.detach().T.to(at)
            (found,) = torch.autograd.grad((self._normalised(at, scale)[0] * onto).sum(), at)
        return found

    def _normalised(self, vectors: Tensor, scale: Tensor | None) -> Float[Tensor, "2 tokens d_in"]:
        """Vectors, and zeros, through the final normalisation with its scale held."""

        def held(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            assert scale is not None
            return scale[None].to(value).expand_as(value)

        with self._model.hooks(fwd_hooks=[] if scale is None else [(SCALE, held)]):
            both = torch.stack([vectors, torch.zeros_like(vectors)])
            return self._model.ln_final(both) if hasattr(self._model, "ln_final") else both
