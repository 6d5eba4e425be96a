"""Which logits features and pairs move on the direct path: through the final normalisation and the unembedding alone.

For a vector v that a path writes, with the scale of the final normalisation held:

    logits(v) = factor * N(v) W_U,     less the mean over all tokens

N is the linear part of the final normalisation and `factor` its 1 / scale averaged over the held-out tokens
(`Firings.logit_factor`), so that this is the exact mean of what v adds on these tokens. A soft cap is left out.

The vector of a feature is what one unit of it writes: W_dec_i; and where W_dec and W_lin are one decoder up to gauge, their sum,
which no gauge changes.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from sae_nfm.analysis import gauges, has_canonical
from sae_nfm.attribution import DirectPath
from sae_nfm.explorer.contexts import starts_of
from sae_nfm.explorer.data import Ints, TokenEffects
from sae_nfm.models import LanguageModel

AT_ONCE = 128
"""Vectors whose logits [vectors, d_vocab] exist at one time: with 250,000 tokens, 128 MB."""


def direction_name(sae: SAE[Any]) -> str:
    """Along which rows a feature's logits are."""
    return "W_dec + W_lin" if has_canonical(sae) else "W_dec"


def directions(sae: SAE[Any], features: Ints) -> Float[Tensor, "features d_in"]:
    """What one unit of some features writes there."""
    *_, rows = gauges(sae).values()
    return rows.direct[torch.from_numpy(features).to(rows.direct.device)]


def note_without(model: LanguageModel, sae: SAE[Any]) -> str:
    """Why there are no logits; empty where there are."""
    try:
        DirectPath(model, sae)
    except ValueError as error:
        return str(error)
    return ""


@torch.no_grad()
def token_effects(
    model: LanguageModel,
    sae: SAE[Any],
    vectors: Float[Tensor, "some d_in"],
    of: Ints,
    total: int,
    factor: float,
    n: int,
) -> TokenEffects:
    """The n logits that move most up, and down, for each vector; token ids as the model's.

    Args:
        model: the language model.
        sae: its SAE.
        vectors: what is written.
        of: which feature or pair each is of, ascending; the others have no logits.
        total: features, or pairs.
        factor: see the module.
        n: up and down; 0 for none.
    """
    tokens, values = [np.zeros((0, 2 * n), dtype=np.int64)], [np.zeros((0, 2 * n))]
    for some in vectors.split(AT_ONCE) if n and len(of) else ():
        logits = _logits(model, sae, some, factor)
        if 2 * n > logits.shape[-1]:
            raise ValueError(f"logits is {n}, up and down, but the model has {logits.shape[-1]} tokens; give fewer")
        up, down = logits.topk(n), logits.topk(n, largest=False)
        tokens.append(torch.cat([up.indices, down.indices], -1).cpu().numpy())
        values.append(torch.cat([up.values, down.values], -1).double().cpu().numpy())
    lengths = np.zeros(total, dtype=np.int64)
    lengths[of] = 2 * n
    return TokenEffects(
        starts=starts_of(lengths), token=np.concatenate(tokens).ravel(), value=np.concatenate(values).ravel()
    )


def _logits(model: LanguageModel, sae: SAE[Any], vectors: Tensor, factor: float) -> Float[Tensor, "some d_vocab"]:
    """What vectors add to the logits, less the mean over all tokens."""
    weight = next(model.parameters())
    scale = torch.full((1, 1), 1 / factor).to(weight)
    logits = DirectPath(model, sae).logits(vectors.to(weight), scale).float()
    return logits - logits.mean(-1, keepdim=True)
