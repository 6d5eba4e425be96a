"""Activations of known features: rates, hierarchy and energy as asked for, by hand and by seed."""

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_nfm.data import EASIER, IDENTIFIED, NOT_IDENTIFIED, Samples, SyntheticConfig, SyntheticData, Truth

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


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        ("product", lambda one, other: one * other),
        ("gate", lambda one, other: one if other > 0 else 0.0),
        ("saturating", lambda one, other: math.tanh(one * other)),
        ("square", lambda one, other: one * one),
    ],
)
def test_what_pairs_write(kind, written):
    data = SyntheticData.of(replace(SMALL, pair_kind=kind, decoys=3))
    samples = data.sample(2_000, 0)
    (i, j), direction = data.pairs[1].tolist(), data.pair_directions[1].double()
    assert (i == j) == (kind == "square")
    row = samples.acts[:, i].argmax()
    others = data.parts(samples.acts[row : row + 1])[1][0].double() - direction * written(
        float(samples.acts[row, i]), float(samples.acts[row, j])
    )
    without = samples.acts[row : row + 1].clone()
    without[0, [i, j]] = 0.0
    torch.testing.assert_close(others, data.parts(without)[1][0].double(), rtol=1e-5, atol=1e-6)  # float32


def test_decoys_fire_together_as_often_and_write_nothing():
    data = SyntheticData.of(replace(SMALL, decoys=4))
    samples = data.sample(ROWS, 0)
    named = [*data.pairs.flatten().tolist(), *data.decoys.flatten().tolist()]
    assert len(set(named)) == len(named) == 16
    together = (samples.acts[:, torch.cat([data.pairs, data.decoys])] > 0).all(-1).float().mean(0)
    assert (together > 0.8 * SMALL.pair_rate).all()
    only = torch.zeros(1, SMALL.features)
    only[0, data.decoys.flatten()] = 1.0
    assert not data.parts(only)[1].any()


def test_a_batch_by_its_number(small: tuple[SyntheticData, Samples]):
    data, _ = small
    batches = data.batches(50, 3)
    assert [torch.equal(next(batches).x, data.batch(50, 3, number).x) for number in range(3)] == [True] * 3


def test_the_truth_as_a_file(small: tuple[SyntheticData, Samples], tmp_path: Path):
    data, samples = small
    truth = Truth.of(data, samples.acts[:500])
    truth.save(tmp_path)
    again = Truth.load(tmp_path)
    assert torch.equal(again.acts(), samples.acts[:500])
    assert all(torch.equal(getattr(again, field.name), getattr(truth, field.name)) for field in fields(Truth))
    with pytest.raises(FileNotFoundError, match="truth"):
        Truth.load(tmp_path / "other")
    with pytest.raises(ValueError, match="numbered from"):
        replace(truth, pairs=truth.pairs + 48)
    save_file({"pairs": truth.pairs}, tmp_path / "truth.safetensors")
    with pytest.raises(ValueError, match=r"tensors \['pairs'\]; expected .*'decoys'"):
        Truth.load(tmp_path)


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
        ("decoys", 15, "decoys 15"),
        ("pair_kind", "sum", "pair_kind"),
        ("mean_l0", 40.0, "mean_l0 40"),
        ("mean_l0", 0.1, "mean_l0 0.1"),
        ("zipf_exponent", 0.0, "zipf_exponent"),
    ],
)
def test_what_cannot_be_made_is_refused(field: str, value: float, names: str):
    with pytest.raises(ValueError, match=names):
        SyntheticData.of(replace(SMALL, **{field: value}))
