"""Pairs of features whose product the error of a code goes with, found one round after the other.

With e the error, g = f_i f_j, and q what a least-squares fit of f_i and f_j leaves of g:

    u = sum q e / sum q^2           what the pair writes per unit of its product
    energy = |u|^2 sum q^2          how much squared error that explains

    1. what the pairs found so far write is taken from the error, and their u are fitted anew
    2. of the other pairs those are added that have more energy than any other one of either of their features
    3. from 1 again, a few times; the pairs with the most energy are kept

A pair that fires with a strong one (a child of a feature with that feature's partner) has energy only as long as the strong one
is not found. There is no test in this: the first pairs of data without any are those where features are missing.

Source: forward selection; the statistic is that of a partial regression (Frisch and Waugh 1933, Econometrica 1:387).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from tqdm.auto import tqdm

from sae_nfm.analysis.composites import Code
from sae_nfm.common import ShortRepr

FEWEST_TOGETHER = 30
"""Tokens on which both features of a pair have to fire."""
Floats = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, repr=False)
class FoundPairs(ShortRepr):
    """Pairs, the one with the most energy first."""

    features: NDArray[np.int64]
    """[pairs, 2], the lower number first."""
    directions: Floats
    """[pairs, d_in]: what one unit of the product writes."""
    energy: Floats
    """[pairs]: squared error that it explains, over all tokens."""
    together: NDArray[np.int64]
    """[pairs]: tokens on which both fire."""


def found_pairs(code: Code, error: Floats, n: int, rounds: int = 3) -> FoundPairs:
    """The n pairs that explain most of the error [tokens, d_in] of a code [tokens, d_sae]; fewer where there are not so many."""
    d_sae, pairs = len(code.sum(0)), np.zeros((0, 2), np.int64)
    directions, energy, together = np.zeros((0, error.shape[1])), np.zeros(0), np.zeros(0, np.int64)
    for number in tqdm(range(rounds + 1), desc="Searching pairs", unit="round"):
        screen = _Screen(code, error - _written(code, pairs, directions))
        change, weight, together = screen.of(pairs)
        directions = directions + change
        energy = (directions**2).sum(1) * weight
        if number == rounds:
            break
        others = screen.all_but(pairs)
        best = np.zeros(d_sae)
        np.maximum.at(best, others.features, others.energy[:, None])
        mutual = (others.energy[:, None] >= best[others.features]).all(1) & (others.energy > 0)
        added = others.features[mutual][np.argsort(-others.energy[mutual], kind="stable")[:n]]
        pairs = np.concatenate([pairs, added])
        directions = np.concatenate([directions, screen.of(added)[0]])
    kept = np.argsort(-energy, kind="stable")[:n]
    return FoundPairs(features=pairs[kept], directions=directions[kept], energy=energy[kept], together=together[kept])


@dataclass(frozen=True, kw_only=True, repr=False)
class _Energies(ShortRepr):
    features: NDArray[np.int64]
    energy: Floats


class _Screen:
    """Regressions of one error on the product of each pair."""

    def __init__(self, code: Code, error: Floats) -> None:
        self.code, self.by_feature, self.error = code, code.tocsc(), error.astype(np.float32)
        self.along: Floats = code.T @ self.error
        self.squares: Floats = code.power(2).sum(0)

    def of(self, pairs: NDArray[np.int64]) -> tuple[Floats, Floats, NDArray[np.int64]]:
        """u, sum q^2 and the tokens on which both fire, of pairs [pairs, 2]."""
        directions = np.zeros((len(pairs), self.error.shape[1]))
        weight, together = np.zeros(len(pairs)), np.zeros(len(pairs), np.int64)
        for first in np.unique(pairs[:, 0]):
            own = pairs[:, 0] == first
            directions[own], weight[own], together[own] = self._regressed(int(first), pairs[own, 1])
        return directions, weight, together

    def all_but(self, pairs: NDArray[np.int64]) -> _Energies:
        """The energies of all pairs that fire together often enough, but for these."""
        d_sae = len(self.squares)
        left_out = set((pairs[:, 0] * d_sae + pairs[:, 1]).tolist())
        features, energies = [np.zeros((0, 2), np.int64)], [np.zeros(0)]
        for first in range(d_sae - 1):
            seconds = np.arange(first + 1, d_sae)
            directions, weight, together = self._regressed(first, seconds)
            kept = together >= FEWEST_TOGETHER
            kept[kept] = [first * d_sae + int(second) not in left_out for second in seconds[kept]]
            features.append(np.stack([np.full(kept.sum(), first), seconds[kept]], axis=1))
            energies.append((directions[kept] ** 2).sum(1) * weight[kept])
        return _Energies(features=np.concatenate(features), energy=np.concatenate(energies))

    def _regressed(self, first: int, seconds: NDArray[np.int64]) -> tuple[Floats, Floats, NDArray[np.int64]]:
        column = self.by_feature[:, [first]]
        tokens, a = column.indices, column.data.astype(np.float64)
        if not len(tokens):
            return np.zeros((len(seconds), self.error.shape[1])), np.zeros(len(seconds)), np.zeros(len(seconds), int)
        other = sparse.csc_array(self.code[tokens])[:, seconds]
        squared = other.power(2)
        ab, aab, abb, aabb = other.T @ a, other.T @ a**2, squared.T @ a, squared.T @ a**2
        aa, bb = self.squares[first], self.squares[seconds]
        det = aa * bb - ab**2
        usable = (det > 1e-9 * aa * bb) & (ab > 0)
        det = np.where(usable, det, 1.0)
        from_a, from_b = (aab * bb - abb * ab) / det, (abb * aa - aab * ab) / det
        weight = np.where(usable, aabb - from_a * aab - from_b * abb, 0.0)
        usable &= weight > 1e-9 * aabb
        along = other.T @ (a[:, None].astype(np.float32) * self.error[tokens])
        along = along - from_a[:, None] * self.along[first] - from_b[:, None] * self.along[seconds]
        directions = np.where(usable[:, None], along / np.where(usable, weight, 1.0)[:, None], 0.0)
        return directions, np.where(usable, weight, 0.0), np.diff(other.indptr)


def _written(code: Code, pairs: NDArray[np.int64], directions: Floats) -> Floats:
    """What pairs write, [tokens, d_in]."""
    by_feature = code.tocsc()
    products = by_feature[:, pairs[:, 0]].multiply(by_feature[:, pairs[:, 1]])
    return np.asarray(products.tocsr() @ directions)
