"""Features that stand for several others which fire together, taken apart into these.

    w_c = sum_a alpha_ca w_a + u_c            w of length 1; features a one after the other, by what is left of w_c
    composite:  at least 2 features a, all alpha_ca >= SMALLEST_SHARE, |u_c|^2 <= MOST_LEFT; once more, of features alone
                that are not composite
    apart:      f_a + sum_c alpha_ca (|w_c| / |w_a|) f_c in place of f_a, f_c = 0, and f_c u_c added to the error

With k features a token, one feature for two that fire together is cheaper than both, and what the two write together beyond
their sum comes with it. So products are hidden in such features: neither the two fire, nor is anything left over.

Source: that decoder directions are sums of others, arXiv 2502.04878 (meta-SAEs); the greedy search is matching pursuit.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from sae_nfm.common import ShortRepr

SMALLEST_SHARE = 0.35
"""Coefficient of a feature in a composite, where both have length 1: well above the cosine of two random directions."""
MOST_LEFT = 0.75
"""Share of a composite's squared length that other features leave."""
MOST_PARTS = 4
RIDGE = 1e-6
"""Of the fit: two features may have one direction."""
Code = sparse.csr_array
"""Activations [tokens, d_sae]."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Composites(ShortRepr):
    """Which features are composite, and of what."""

    parts: sparse.csr_array
    """[d_sae, d_sae]: what one unit of a composite is in units of other features; of any other feature, itself."""
    rest: Float[Tensor, "d_sae d_in"]
    """What one unit of a composite writes beyond its parts; 0 of any other feature."""
    composite: Bool[Tensor, " d_sae"]

    def apart(self, code: Code, error: NDArray[np.float32]) -> tuple[Code, NDArray[np.float32]]:
        """A code without composites, and its error; what both make together stays the same."""
        rest, composite = self.rest.numpy(), self.composite.numpy()
        error = error + (code[:, composite] @ rest[composite]).astype(np.float32)
        return sparse.csr_array(code @ self.parts), error


@torch.no_grad()
def composites(directions: Float[Tensor, "d_sae d_in"], fires: Bool[Tensor, " d_sae"]) -> Composites:
    """The composite features of a dictionary.

    Args:
        directions: what one unit of each feature writes (`feature_directions`).
        fires: features that fire at all; others are neither composites nor parts.
    """
    norms = directions.norm(dim=-1)
    unit = directions / norms.clamp(min=torch.finfo(norms.dtype).tiny)[:, None]
    none = torch.zeros_like(fires)
    parts, shares, left, composite = _taken_apart(unit, fires, _taken_apart(unit, fires, none)[-1])
    rows, columns = (composite[:, None] & (shares > 0)).nonzero(as_tuple=True)
    of, plain = parts[rows, columns], (~composite).nonzero()[:, 0]
    values = torch.cat([shares[rows, columns] * norms[rows] / norms[of], torch.ones(len(plain))])
    places = torch.cat([torch.stack([rows, of]), torch.stack([plain, plain])], dim=1).numpy()
    return Composites(
        parts=sparse.csr_array((values.numpy(), (places[0], places[1])), shape=(len(unit), len(unit))),
        rest=torch.where(composite[:, None], left * norms[:, None], 0.0),
        composite=composite,
    )


def _taken_apart(
    unit: Float[Tensor, "d_sae d_in"], fires: Bool[Tensor, " d_sae"], no_part: Bool[Tensor, " d_sae"]
) -> tuple[Tensor, Tensor, Tensor, Bool[Tensor, " d_sae"]]:
    """Parts of each feature and their shares [d_sae, MOST_PARTS], what is left of it, and which features are composite."""
    d_sae, going = len(unit), fires.clone()
    parts, shares = torch.zeros(d_sae, 0, dtype=torch.long), torch.zeros(d_sae, 0)
    left, found = unit, torch.zeros(d_sae, dtype=torch.long)
    for number in range(1, MOST_PARTS + 1):
        along = left @ unit.T
        along.fill_diagonal_(-1.0)
        along[:, ~fires | no_part] = -1.0
        trial = torch.cat([parts, along.scatter(1, parts, -1.0).argmax(-1, keepdim=True)], dim=1)
        chosen = unit[trial]
        gram, target = chosen @ chosen.mT, (chosen @ unit[:, :, None])[..., 0]
        fitted = torch.linalg.solve(gram + RIDGE * torch.eye(number), target)
        going = going & (fitted >= SMALLEST_SHARE).all(-1)
        found[going] = number
        padded = torch.cat([shares, torch.zeros(d_sae, 1)], dim=1)
        parts, shares = trial, torch.where(going[:, None], fitted, padded)
        left = unit - (shares[..., None] * chosen).sum(1)
    return parts, shares, left, (found >= 2) & (left.square().sum(-1) <= MOST_LEFT)
