"""What each pair of features writes through the interaction path on a token: an exact sum, with the gates held.

On one token let D = diag(h > 0), * between vectors element-wise, and f the features as the path reads them. Then

    inter = b_2 + (b_1 * D) W_2 + sum_{i<j} o_ij,      o_ij = f_i f_j ((v_i * v_j) W_1 D) W_2
    lin   = b_lin + sum_i f_i W_lin_i

up to float error. With head "bilinear" there is no D, no W_1 and no b_1, and squares of single features are terms as pairs are:

    inter = b_2 + sum_{i<j} o_ij + sum_i o_ii,         o_ij = f_i f_j (a_i * b_j + a_j * b_i) W_2,   o_ii = f_i^2 (a_i * b_i) W_2

whatever the token. Removing a pair for real can flip gates: o_ij is exactly what goes with it while D stays as it is
(`pair_effects` measures both). Pairs are [tokens, pairs], those of the features that a token reads; nothing here is
d_sae^2. They stand in the order of their features, i < j, which also decides between equal ones; a square is the pair of a
feature with itself, i = j, where `selves` asks for them.

Source: the pooling is He & Chua 2017 (arXiv 1708.05027), eq. 3, in arXiv 2507.00269; the decomposition is this package's own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F

from sae_nfm.analysis import CELLS
from sae_nfm.architectures import PathWeights, attributable
from sae_nfm.common import ShortRepr
from sae_nfm.kernels import SparseActs, open_gates, wide
from sae_nfm.models import HookFunction, keeping, reconstruction

READ, INTERACTION, LINEAR, HIDDEN = (
    f"hook_nfm_{name}" for name in ("interaction_in", "interaction", "linear", "hidden_pre")
)


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenReads(ShortRepr):
    """What the paths read and wrote on some tokens, in at least float32."""

    read: SparseActs
    """Features as the interaction path reads them, [tokens, n], in the order of their numbers; value 0: not active."""
    gates: Bool[Tensor, "tokens nfm_dim"]
    """h > 0; with head "bilinear" all open."""
    interaction: Float[Tensor, "tokens d_in"]
    """What passed hook_nfm_interaction."""
    linear: Float[Tensor, "tokens d_in"] | None
    """What passed hook_nfm_linear; None where that path is off."""

    def of(self, tokens: Tensor) -> "TokenReads":
        """Some of the tokens: a mask, or indices."""
        read, linear = SparseActs(*(part[tokens] for part in self.read)), self.linear
        linear = None if linear is None else linear[tokens]
        return TokenReads(read=read, gates=self.gates[tokens], interaction=self.interaction[tokens], linear=linear)

    @classmethod
    def joined(cls, parts: Sequence["TokenReads"]) -> "TokenReads":
        """All tokens of several; where a part reads fewer features, the columns left over have value 0."""
        n = max(part.read.indices.shape[-1] for part in parts)
        filled = [[F.pad(columns, (0, n - columns.shape[-1])) for columns in part.read] for part in parts]
        linear = [part.linear for part in parts if part.linear is not None]
        return cls(
            read=SparseActs(*map(torch.cat, zip(*filled, strict=True))),
            gates=torch.cat([part.gates for part in parts]),
            interaction=torch.cat([part.interaction for part in parts]),
            linear=torch.cat(linear) if linear else None,
        )

    def split(self, size: int) -> Iterator["TokenReads"]:
        """In pieces of at most `size` tokens."""
        for start in range(0, len(self.gates), size):
            yield self.of(torch.arange(start, min(start + size, len(self.gates)), device=self.gates.device))


def reading(sae: SAE[Any], seen: dict[str, Any]) -> dict[str, HookFunction]:
    """Hook functions that put what the interaction path reads, the hidden code and what each path writes into `seen`."""
    names = [READ, INTERACTION, HIDDEN, *([LINEAR] if attributable(sae).cfg.use_linear_path else [])]
    return {name: keeping(seen, name) for name in names}


def reads_of(sae: SAE[Any], seen: dict[str, Any]) -> TokenReads:
    """What `reading` of an SAE has seen, all tokens in one dimension."""
    flat = {name: wide(seen[name].flatten(0, -2)) for name in (HIDDEN, INTERACTION, LINEAR) if name in seen}
    read, linear = _in_order(wide(seen[READ].flatten(0, -2))), flat.get(LINEAR)
    gates = open_gates(sae.cfg.head, flat[HIDDEN])
    return TokenReads(read=read, gates=gates, interaction=flat[INTERACTION], linear=linear)


@torch.no_grad()
def token_reads(sae: SAE[Any], x: Float[Tensor, "tokens d_in"]) -> TokenReads:
    """Run an SAE (see `attributable`) by itself on activations, heads flattened."""
    seen = dict[str, Any]()
    reconstruction(sae, x, reading(sae, seen))
    return reads_of(sae, seen)


def _in_order(read: Float[Tensor, "tokens d_sae"]) -> SparseActs:
    """As many columns as the token with most active features has, features in the order of their numbers."""
    most = int((read != 0).sum(-1).amax()) if read.numel() else 0
    strongest = read.abs().topk(most, dim=-1, sorted=False).indices  # some architectures have negative ones
    indices = strongest.sort(dim=-1).values
    return SparseActs(indices, read.gather(-1, indices))


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenPairs(ShortRepr):
    """The pairs of the features that each token reads."""

    first: Int[Tensor, "tokens pairs"]
    """The lower feature, i."""
    second: Int[Tensor, "tokens pairs"]
    product: Float[Tensor, "tokens pairs"]
    """f_i f_j; 0 where the pair does not fire."""

    @classmethod
    def of(cls, read: SparseActs, *, selves: bool = False) -> "TokenPairs":
        """All n (n - 1) / 2 of each token; with `selves` (`PathWeights.selves`) the n squares too."""
        a, b = _columns(read, selves=selves)
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

    @property
    def is_self(self) -> Bool[Tensor, "tokens pairs"]:
        """Whether it is the square of one feature."""
        return self.first == self.second


def _columns(read: SparseActs, *, selves: bool) -> Int[Tensor, "2 pairs"]:
    """Of both features of each pair."""
    n = read.indices.shape[-1]
    return torch.triu_indices(n, n, 0 if selves else 1, device=read.indices.device)


def written(
    pairs: TokenPairs, gates: Bool[Tensor, "tokens nfm_dim"], weights: PathWeights
) -> Float[Tensor, "tokens pairs d_in"]:
    """o_ij of every pair: a vector for each, so for a few tokens or pairs; `norms` and `along` make numbers of many."""
    if weights.B is None:
        pooled = pairs.product[..., None] * weights.V[pairs.first] * weights.V[pairs.second]
    else:
        pooled = pairs.product[..., None] * weights.products(pairs.first, pairs.second)
    return ((pooled @ weights.W_1) * gates[:, None]) @ weights.W_2


@torch.no_grad()
def norms(
    pairs: TokenPairs, gates: Float[Tensor, "tokens nfm_dim"] | Bool[Tensor, "tokens nfm_dim"], weights: PathWeights
) -> Float[Tensor, "tokens pairs"]:
    """||o_ij||, in chunks of tokens of which the largest tensor is [tokens, pairs, nfm_dim].

    The gates are D; numbers between 0 and 1 hold gates at their average.
    """
    reduced, found, n_pairs = weights.reduced(), list[Tensor](), pairs.product.shape[1]
    m, rank = reduced.shape
    size = max(1, CELLS // (max(1, n_pairs) * (m + rank) + m * rank))
    parts = (pairs.first, pairs.second, pairs.product, gates.to(reduced.dtype)[:, None])
    for first, second, product, gate in zip(*(part.split(size) for part in parts), strict=True):
        pooled = weights.products(first, second)
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
    """<o_ij, u_t> for all pairs of `TokenPairs.of(read, selves=weights.selves)`, at the cost of [tokens, n, nfm_dim].

    u: for all tokens or for each.
    """
    pooled_direction = ((directions @ weights.W_2.T) * gates) @ weights.W_1.T
    n, found, (a, b) = read.indices.shape[-1], list[Tensor](), _columns(read, selves=weights.selves)
    size = max(1, CELLS // max(1, n * max(n, weights.V.shape[1])))
    for indices, values, direction in zip(*(part.split(size) for part in (*read, pooled_direction)), strict=True):
        rows = values[..., None] * weights.V[indices]
        if weights.B is None:
            products = (rows * direction[:, None]) @ rows.mT
        else:
            half = (rows * direction[:, None]) @ (values[..., None] * weights.B[indices]).mT
            products = half + half.mT
            products.diagonal(dim1=-2, dim2=-1).mul_(0.5)
        found.append(products[:, a, b])
    return torch.cat(found)


def bias_terms(
    gates: Bool[Tensor, "tokens nfm_dim"], weights: PathWeights
) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "tokens d_in"]]:
    """b_2, and (b_1 * D) W_2: what the interaction path writes on a token without any pair, gates held."""
    return weights.b_2, (weights.b_1 * gates) @ weights.W_2


def single_features(read: SparseActs, weights: PathWeights) -> Float[Tensor, "tokens n d_in"]:
    """f_i W_lin_i, what each feature writes through the linear path."""
    if weights.W_lin is None:
        raise ValueError("the linear path is off (use_linear_path is False): no feature writes through it")
    return read.values[..., None] * weights.W_lin[read.indices]


def strongest(values: Float[Tensor, " pairs"], fires: Bool[Tensor, " pairs"], n: int) -> Int[Tensor, " found"]:
    """Where the n largest absolute values are, largest first; equal ones in their order, pairs that do not fire left out."""
    order = torch.where(fires, values.abs(), -1.0).sort(descending=True, stable=True).indices
    return order[: min(n, int(fires.sum()))]
