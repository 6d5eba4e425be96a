"""Composite features: which they are, and that taking them apart changes no token's activations."""

import numpy as np
import pytest
import torch
from scipy import sparse

from sae_nfm.analysis import composites


@pytest.fixture(scope="module")
def dictionary():
    """16 orthogonal directions of several lengths; 16 = 0 + 1 and more, 17 nearly 2 + 3 + 4, 18 a child of 5."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]
    lengths = torch.linspace(0.5, 2, 16)[:, None]
    plain = basis[:16] * lengths
    composite = torch.stack(
        [
            basis[0] + basis[1] + 0.9 * basis[20],
            2 * (basis[2] + 0.8 * basis[3] + 0.7 * basis[4]) + 0.1 * basis[21],
            basis[22] + 0.3 * basis[5],
        ]
    )
    return torch.cat([plain, composite]), basis


def test_what_is_composite(dictionary):
    directions, basis = dictionary
    found = composites(directions, torch.ones(19, dtype=torch.bool))
    assert found.composite.nonzero()[:, 0].tolist() == [16, 17]
    parts = found.parts.toarray()
    lengths = directions[:16].norm(dim=-1).numpy()
    expected = np.zeros(19)
    expected[[0, 1]] = 1 / lengths[[0, 1]]
    np.testing.assert_allclose(parts[16], expected, atol=1e-5)  # least squares with a ridge of 1e-6
    expected = np.zeros(19)
    expected[[2, 3, 4]] = np.array([2, 1.6, 1.4]) / lengths[[2, 3, 4]]
    np.testing.assert_allclose(parts[17], expected, atol=1e-5)
    np.testing.assert_array_equal(parts[[5, 18]], np.eye(19)[[5, 18]])
    torch.testing.assert_close(found.rest[16], 0.9 * basis[20], atol=1e-5, rtol=0)
    assert not found.rest[:16].any()


def test_features_that_never_fire_are_no_parts(dictionary):
    directions, _ = dictionary
    fires = torch.ones(19, dtype=torch.bool)
    fires[[1, 17]] = False
    assert not composites(directions, fires).composite.any()


@pytest.mark.parametrize("nested", [False, True])
def test_nothing_is_lost(dictionary, nested):
    directions, basis = dictionary
    if nested:  # a part that is composite itself
        directions = torch.cat([directions, (1.2 * directions[16] + 2.1 * basis[8])[None]])
    generator = torch.Generator().manual_seed(1)
    code = torch.rand(50, len(directions), generator=generator) * (torch.rand(50, 1, generator=generator) < 0.7)
    code[code < 0.6] = 0
    error = torch.randn(50, 24, generator=generator)
    found = composites(directions, torch.ones(len(directions), dtype=torch.bool))
    assert nested == bool(found.composite[19:].any())
    apart, left = found.apart(sparse.csr_array(code.numpy()), error.numpy())
    assert not apart.toarray()[:, found.composite.numpy()].any()
    whole, now = code @ directions + error, apart.toarray() @ directions.numpy() + left
    np.testing.assert_allclose(now, whole.numpy(), atol=1e-4)  # float32 sums of 19 terms, and the ridge
    assert (apart.toarray() > 0).sum() > (code > 0).sum()
