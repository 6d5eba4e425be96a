"""Pairs found in an error: the regression is least squares, and pairs that only fire with a planted one are not found for it."""

import numpy as np
import pytest
from scipy import sparse

from sae_nfm.analysis import found_pairs
from sae_nfm.analysis.pair_search import _Screen

PLANTED = {(0, 1): 0, (2, 3): 1}
CHILD_OF_1 = 6


@pytest.fixture(scope="module")
def samples():
    """Ten features; 6 fires only where 1 does; the error has the products of (0, 1) and (2, 3), and noise."""
    draw = np.random.default_rng(0)
    fires = draw.random((6_000, 10)) < 0.2
    fires[:, CHILD_OF_1] = fires[:, 1] & (draw.random(6_000) < 0.6)
    code = np.where(fires, 1 + 0.3 * draw.standard_normal(fires.shape), 0).clip(0).astype(np.float32)
    directions = draw.standard_normal((2, 12))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    products = np.stack([code[:, i] * code[:, j] for i, j in PLANTED], axis=1)
    error = products @ directions + 0.3 * draw.standard_normal((6_000, 12))
    return code, error.astype(np.float32), directions


def test_a_pair_is_regressed_as_by_least_squares(samples):
    code, error, _ = samples
    pairs = np.array([[0, 1], [1, 6], [4, 5]])
    directions, weight, together = _Screen(sparse.csr_array(code), error).of(pairs)
    for number, (i, j) in enumerate(pairs):
        product = code[:, i] * code[:, j]
        design = np.stack([code[:, i], code[:, j], product], axis=1).astype(np.float64)
        expected, left, *_ = np.linalg.lstsq(design, error.astype(np.float64))
        np.testing.assert_allclose(directions[number], expected[2], atol=1e-5)  # error and sums with it are float32
        without = np.linalg.lstsq(design[:, :2], error.astype(np.float64))[1]
        np.testing.assert_allclose((directions[number] ** 2).sum() * weight[number], (without - left).sum(), rtol=1e-3)
        assert together[number] == (product > 0).sum()


def test_planted_pairs_are_found_and_their_companions_are_not(samples):
    code, error, planted = samples
    screen = _Screen(sparse.csr_array(code), error).all_but(np.zeros((0, 2), np.int64))
    companion = [0, CHILD_OF_1]
    energy = {tuple(pair): value for pair, value in zip(screen.features.tolist(), screen.energy, strict=True)}
    alone = energy[tuple(companion)]
    found = found_pairs(sparse.csr_array(code), error, 3)
    assert sorted(map(tuple, found.features[:2].tolist())) == sorted(PLANTED)
    for pair, direction in zip(found.features[:2].tolist(), found.directions, strict=False):
        expected = planted[PLANTED[tuple(pair)]]
        assert direction @ expected / np.linalg.norm(direction) > 0.99
        assert np.linalg.norm(direction) == pytest.approx(1, abs=0.1)  # of noise 0.3 on some 240 tokens
    assert found.energy[2] < 0.1 * found.energy[1]
    assert alone > 10 * found.energy[2]  # else this says nothing: by itself the companion explains much
    assert len(found_pairs(sparse.csr_array(code), error, 10**6).features) <= 45


def test_pairs_that_fire_together_are_fitted_to_each_other(samples):
    code, _, directions = samples
    products = np.stack([code[:, 0] * code[:, 1], code[:, 0] * code[:, CHILD_OF_1]], axis=1)
    found = found_pairs(sparse.csr_array(code), (products @ directions).astype(np.float32), 2, rounds=8)
    assert sorted(map(tuple, found.features.tolist())) == [(0, 1), (0, CHILD_OF_1)]
    for pair, direction in zip(found.features.tolist(), found.directions, strict=True):
        expected = directions[0 if pair == [0, 1] else 1]
        assert np.linalg.norm(direction - expected) < 0.05  # of 1; the first to be found begins with half of the other


def test_nothing_fires_together():
    code = np.eye(5, dtype=np.float32)
    assert len(found_pairs(sparse.csr_array(code), np.ones((5, 3), np.float32), 4).features) == 0
