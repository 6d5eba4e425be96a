"""Activations of known features: rates, hierarchy and energy as asked for, by hand and by seed."""

from dataclasses import replace

import pytest
import torch

from sae_nfm.data import EASIER, IDENTIFIED, NOT_IDENTIFIED, Samples, SyntheticConfig, SyntheticData

SMALL = SyntheticConfig(d_in=16, features=48, mean_l0=6, children=0.25, pairs=4, pair_rate=0.03, pair_share=0.2, seed=1)
ROWS = 20_000


@pytest.fixture(scope="module")
def small():
    data = SyntheticData.of(SMALL)
    return data, data.sample(ROWS, 0)


def test_features_fire_as_often_as_they_should(small: tuple[SyntheticData, Samples]):
    data, samples = small
    fires = (samples.acts > 0).float()
    # four standard errors of a rate over ROWS, and z < -1 / spread (4e-4 of all) is no firing
    allowed = 4 * (data.rates * (1 - data.rates) / ROWS).sqrt() + 4e-4
    assert ((fires.mean(0) - data.rates).abs() < allowed).all()
    assert float(data.rates.sum()) == pytest.approx(SMALL.mean_l0, rel=1e-5)
    assert float(fires.sum(1).mean()) == pytest.approx(SMALL.mean_l0, rel=0.01)


def test_a_child_fires_only_with_its_parent_and_half_as_often_at_most(small: tuple[SyntheticData, Samples]):
    data, samples = small
    children = (data.parents >= 0).nonzero()[:, 0]
    assert len(children) == 12
    parents = data.parents[children]
    assert (data.parents[parents] == -1).all()
    fires = samples.acts > 0
    assert fires[:, children].any(0).all()
    assert not (fires[:, children] & ~fires[:, parents]).any()
    assert (data.rates[parents] >= 2 * data.rates[children]).all()


def test_pairs_fire_together_and_their_products_have_their_share(small: tuple[SyntheticData, Samples]):
    data, samples = small
    assert sorted(set(data.pairs.flatten().tolist())) == sorted(data.pairs.flatten().tolist())
    assert (data.parents[data.pairs] == -1).all()
    together = (samples.acts[:, data.pairs] > 0).all(-1).float().mean(0)
    assert (together > 0.8 * SMALL.pair_rate).all()
    linear, products = (part.var(0).sum() for part in data.parts(samples.acts))
    assert float(products / (linear + products)) == pytest.approx(0.2, rel=0.05)  # calibrated on other samples


def test_activations_by_hand(small: tuple[SyntheticData, Samples]):
    data, samples = small
    row = samples.acts[7].double()
    expected = sum(row[i] * data.directions[i].double() for i in range(48))
    for (i, j), direction in zip(data.pairs.tolist(), data.pair_directions, strict=True):
        expected = expected + row[i] * row[j] * direction.double()
    torch.testing.assert_close(samples.x[7].double(), expected, rtol=1e-5, atol=1e-5)  # float32 sums of order 1
    torch.testing.assert_close(data.directions.norm(dim=-1), torch.ones(48))
    firing = samples.acts[samples.acts > 0]
    assert float(firing.mean()) == pytest.approx(1, abs=0.01)
    assert float(firing.std()) == pytest.approx(SMALL.spread, abs=0.01)


def test_seeds_make_everything_and_disturb_nothing(small: tuple[SyntheticData, Samples]):
    data, samples = small
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = SyntheticData.of(SMALL)
    assert torch.equal(again.sample(ROWS, 0).x, samples.x)
    assert torch.equal(torch.get_rng_state(), before)
    batches = again.batches(100, 3)
    first, second = next(batches), next(batches)
    assert torch.equal(first.x, data.sample(100, 3).x)
    assert not torch.equal(first.x, second.x)
    assert not torch.equal(first.x, data.sample(100, 4).x)
    other = SyntheticData.of(replace(SMALL, seed=2))
    assert not torch.equal(other.directions, data.directions)
    assert not torch.equal(other.pairs, data.pairs)


def test_the_sets_of_the_docs():
    for config in (IDENTIFIED, NOT_IDENTIFIED, EASIER):
        data = SyntheticData.of(replace(config, pairs=0, pair_share=0.0))
        assert float(data.rates.sum()) == pytest.approx(config.mean_l0, rel=1e-5)
        assert int((data.parents >= 0).sum()) == 512
    assert not len(SyntheticData.of(IDENTIFIED).pairs)


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("d_in", 0, "d_in"),
        ("children", 1.0, "children"),
        ("spread", -1.0, "spread"),
        ("pair_rate", 1.5, "pair_rate"),
        ("pair_share", 1.0, "pair_share"),
        ("pair_share", 0.0, "pairs is 4"),
        ("pairs", 19, "pairs is 19"),
        ("mean_l0", 40.0, "mean_l0 40"),
        ("mean_l0", 0.1, "mean_l0 0.1"),
        ("zipf_exponent", 0.0, "zipf_exponent"),
    ],
)
def test_what_cannot_be_made_is_refused(field: str, value: float, names: str):
    with pytest.raises(ValueError, match=names):
        SyntheticData.of(replace(SMALL, **{field: value}))
