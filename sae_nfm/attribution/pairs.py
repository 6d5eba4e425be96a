"""What each pair of features writes through the interaction path on a token: an exact sum, with the gates held.

On one token let D = diag(h > 0), * between vectors element-wise, and f the features as the path reads them. Then

    inter = b_2 + (b_1 * D) W_2 + sum_{i<j} o_ij,      o_ij = f_i f_j ((v_i * v_j) W_1 D) W_2
    lin   = b_lin + sum_i f_i W_lin_i

up to float error. Removing a pair for real can flip gates: o_ij is exactly what goes with it while D stays as it is
(`pair_effects` measures both). Pairs are [tokens, pairs], those of the features that a token reads; nothing here is
d_sae^2. They stand in the order of their features, i < j, which also decides between equal ones.

Source: the pooling is He & Chua 2017 (arXiv 1708.05027), eq. 3, in arXiv 2507.00269; the decomposition is this package's own.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_nfm.analysis import CELLS
from sae_nfm.architectures import PathWeights
from sae_nfm.kernels import SparseActs


@dataclass(frozen=True, kw_only=True)
class TokenPairs:
    """The pairs of the features that each token reads."""

    first: Int[Tensor, "tokens pairs"]
    """The lower feature, i."""
    second: Int[Tensor, "tokens pairs"]
    product: Float[Tensor, "tokens pairs"]
    """f_i f_j; 0 where the pair does not fire."""

    @classmethod
    def of(cls, read: SparseActs) -> "TokenPairs":
        """All n (n - 1) / 2 of each token."""
        a, b = torch.triu_indices(read.indices.shape[-1], read.indices.shape[-1], 1, device=read.indices.device)
        first, second = read.indices[:, a], read.indices[:, b]
        return cls(first=first, second=second, product=read.values[:, a] * read.values[:, b])

    def chosen(self, columns: Int[Tensor, " chosen"]) -> "TokenPairs":
        """Some columns."""
        first, second, product = (part[:, columns] for part in (self.first, self.second, self.product))
        return TokenPairs(first=first, second=second, product=product)

    def flat(self, mask: Bool[Tensor, "tokens pairs"]) -> "TokenPairs":
        """Single pairs, each as a token of its own: [pairs, 1]."""
        first, second, product = (part[mask][:, None] for part in (self.first, self.second, self.product))
        return TokenPairs(first=first, second=second, product=product)

    @property
    def fires(self) -> Bool[Tensor, "tokens pairs"]:
        """Whether both features are active."""
        return self.product != 0


def written(
    pairs: TokenPairs, gates: Bool[Tensor, "tokens nfm_dim"], weights: PathWeights
) -> Float[Tensor, "tokens pairs d_in"]:
    """o_ij of every pair: a vector for each, so for a few tokens or pairs; `norms` and `along` make numbers of many."""
    pooled = pairs.product[..., None] * weights.V[pairs.first] * weights.V[pairs.second]
    return ((pooled @ weights.W_1) * gates[:, None]) @ weights.W_2


@torch.no_grad()
def norms(
    pairs: TokenPairs, gates: Float[Tensor, "tokens nfm_dim"] | Bool[Tensor, "tokens nfm_dim"], weights: PathWeights
) -> Float[Tensor, "tokens pairs"]:
    """||o_ij||, in chunks of tokens of which the largest tensor is [tokens, pairs, nfm_dim].

    Args:
        pairs: of some tokens.
        gates: D; numbers between 0 and 1 hold gates at their average.
    """
    reduced, found, n_pairs = weights.reduced(), list[Tensor](), pairs.product.shape[1]
    m, rank = reduced.shape
    size = max(1, CELLS // (max(1, n_pairs) * (m + rank) + m * rank))
    parts = (pairs.first, pairs.second, pairs.product, gates.to(reduced.dtype)[:, None])
    for first, second, product, gate in zip(*(part.split(size) for part in parts), strict=True):
        pooled = weights.V[first] * weights.V[second]
        if n_pairs > rank:  # one matrix a token, from pooled to output, costs less
            output = pooled @ ((weights.W_1 * gate) @ reduced)
        else:
            output = ((pooled @ weights.W_1) * gate) @ reduced
        found.append((product * output.norm(dim=-1)).abs())
    return torch.cat(found) if found else pairs.product.abs()


@torch.no_grad()
def along(
    read: SparseActs,
    gates: Bool[Tensor, "tokens nfm_dim"],
    weights: PathWeights,
    directions: Float[Tensor, "#tokens d_in"],
) -> Float[Tensor, "tokens pairs"]:
    """<o_ij, u_t> for all pairs of `TokenPairs.of(read)`, at the cost of [tokens, n, nfm_dim].

    Args:
        read: features as the path reads them.
        directions: u, one for all tokens or one for each.
    """
    pooled_direction = ((directions @ weights.W_2.T) * gates) @ weights.W_1.T
    n, found = read.indices.shape[-1], list[Tensor]()
    a, b = torch.triu_indices(n, n, 1, device=read.indices.device)
    size = max(1, CELLS // max(1, n * max(n, weights.V.shape[1])))
    for indices, values, direction in zip(
        *(part.split(size) for part in (read.indices, read.values, pooled_direction)), strict=True
    ):
        rows = values[..., None] * weights.V[indices]
        found.append(((rows * direction[:, None]) @ rows.mT)[:, a, b])
    return torch.cat(found)


def bias_terms(
    gates: Bool[Tensor, "tokens nfm_dim"], weights: PathWeights
) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "tokens d_in"]]:
    """b_2, and (b_1 * D) W_2: what the interaction path writes on a token without any pair, gates held."""
    return weights.b_2, (weights.b_1 * gates) @ weights.W_2


def single_features(read: SparseActs, weights: PathWeights) -> Float[Tensor, "tokens n d_in"]:
    """f_i W_lin_i, what each feature writes through the linear path.

    Raises:
        ValueError: without a linear path.
    """
    if weights.W_lin is None:
        raise ValueError("the linear path is off (use_linear_path is False): no feature writes through it")
    return read.values[..., None] * weights.W_lin[read.indices]


def strongest(values: Float[Tensor, " pairs"], fires: Bool[Tensor, " pairs"], n: int) -> Int[Tensor, " found"]:
    """Where the n largest absolute values are, largest first; equal ones in their order, pairs that do not fire left out."""
    order = torch.where(fires, values.abs(), -1.0).sort(descending=True, stable=True).indices
    return order[: min(n, int(fires.sum()))]
