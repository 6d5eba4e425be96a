"""The stand-in for a language model where there are only samples: each row's tokens give its samples, nothing else happens."""

import numpy as np
import pytest
import torch

from sae_nfm.models import SAMPLES_HOOK, SamplesShape, find_site, samples_model
from sae_nfm.models.samples import numbered_rows

SHAPE = SamplesShape(d_in=6, rows=300, held_out_rows=20, context_size=16, mean_square=6.0, source_sha256="ab" * 32)
X = np.random.default_rng(0).standard_normal((320, 16, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return samples_model(SHAPE, lambda number: X[number])


def test_the_tokens_of_a_row_are_its_number_and_no_others(model):
    rows = numbered_rows(0, 70_000, 12)
    assert rows[[0, 1, 256, 69_999], :4].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 17, 111]]
    passages = rows[:, 4:].numpy().astype(np.uint8).copy().view(np.uint64)
    assert len(np.unique(passages)) == len(rows)
    assert (rows.min(), rows.max()) == (0, 255)
    assert torch.equal(numbered_rows(40, 60, 12), rows[40:60])


def test_samples_of_rows_in_any_order(model):
    chosen = torch.tensor([319, 0, 257, 7])
    tokens = numbered_rows(0, 320, 16)[chosen]
    logits, cache = model.run_with_cache(tokens)
    x = torch.from_numpy(X)[chosen]
    assert torch.equal(cache[SAMPLES_HOOK], x)
    assert torch.equal(cache["blocks.0.hook_resid_post"], x)
    torch.testing.assert_close(logits, x @ model.W_U, rtol=0, atol=1e-5)  # float32 sums of 6 terms of order 1
    assert torch.equal(model.run_with_cache(tokens[:, :9])[1][SAMPLES_HOOK], x[:, :9])
    assert float(logits.std()) == pytest.approx(1, rel=0.1)  # of samples of the mean square that was given


def test_it_is_a_model_at_that_hook_point(model):
    assert find_site(model, SAMPLES_HOOK).d_in == 6
    again = samples_model(SHAPE, lambda number: X[number])
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_rows_that_are_not_there(model):
    with pytest.raises(ValueError, match=r"number 320.*are 320 rows of 16"):
        model(numbered_rows(320, 321, 16))
    with pytest.raises(ValueError, match="rows of 17 tokens"):
        model(numbered_rows(0, 1, 17))


@pytest.mark.parametrize("change", [{"context_size": 3}, {"rows": 2**32}, {"mean_square": 0.0}])
def test_shapes_that_cannot_be(change):
    with pytest.raises(ValueError, match="context_size must be"):
        SamplesShape(**{**SHAPE.content(), **change})
