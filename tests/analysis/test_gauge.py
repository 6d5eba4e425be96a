"""Norms, shares and the gauge: by hand, against scikit-learn and scipy, and where they change or must not."""

import copy
import math

import numpy as np
import pytest
import torch
from builders import D_MODEL, D_SAE, inference_sae, random_activations, random_sae, trainer, training_config
from sae_lens import SAE, TopKTrainingSAEConfig
from scipy.stats import spearmanr

from sae_nfm.analysis import gauge
from sae_nfm.analysis.results import FigureRow
from sae_nfm.analysis.sae_report import figure_rows, gauge_report
from sae_nfm.analysis.weight_norms import (
    PathNorms,
    PathRows,
    components_for_variance,
    correlation,
    participation_ratio,
    share_correlations,
    varies,
    weight_figures,
)
from sae_nfm.architectures import nfm_config
from sae_nfm.stats.estimates import Estimate

# float32 sums of at most 32 terms of order 1, in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def rows_by_hand() -> PathRows:
    """Norms 3, 1 (direct), 4, 0 (linear) and 3, 1 (nonlinear)."""
    return PathRows(
        direct=torch.tensor([[3.0, 0.0], [0.6, 0.8]]),
        linear=torch.tensor([[0.0, 4.0], [0.0, 0.0]]),
        nonlinear=torch.tensor([[2.0, 2.0, 1.0], [0.0, 1.0, 0.0]]),
    )


def test_shares_by_hand():
    shares = rows_by_hand().norms().shares()
    assert shares.direct.tolist() == pytest.approx([0.3, 0.5])
    assert shares.linear.tolist() == pytest.approx([0.4, 0.0])
    assert shares.nonlinear.tolist() == pytest.approx([0.3, 0.5])
    assert shares.integration.tolist() == pytest.approx([0.7, 0.5])
    assert shares.mean(torch.tensor([True, False])).linear.item() == pytest.approx(0.4)


def test_rows_times_a_factor_by_hand():
    norms = rows_by_hand().times(torch.tensor([2.0, 10.0]), torch.tensor([1.0, 3.0])).norms()
    assert norms.direct.tolist() == pytest.approx([6.0, 10.0])
    assert norms.linear.tolist() == pytest.approx([4.0, 0.0])
    assert norms.nonlinear.tolist() == pytest.approx([3.0, 3.0])


def test_a_path_that_is_not_there_has_no_share():
    shares = PathRows(direct=torch.tensor([[3.0, 4.0], [0.0, 0.0]])).norms().shares()
    assert shares.direct.tolist() == pytest.approx([1.0, 0.0])  # a row of zeros has no share of anything
    assert shares.integration.tolist() == [0.0, 0.0]


def test_participation_ratio_by_hand():
    rows = torch.tensor([[0.0, 5.0, 0.0, 0.0], [2.0, -2.0, 2.0, 2.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert participation_ratio(rows).tolist() == pytest.approx([1.0, 4.0, 2.0, 0.0])


def test_components_for_variance_by_hand():
    """Variances 8, 1.5 and 0.5 about a mean: 80 %, 95 %, 100 %."""
    axes = torch.cat(
        [torch.diag(torch.tensor([8.0, 1.5, 0.5]).sqrt()), -torch.diag(torch.tensor([8.0, 1.5, 0.5]).sqrt())]
    )
    rows = axes + torch.tensor([100.0, 0.0, 0.0])
    assert [components_for_variance(rows, fraction) for fraction in (0.7, 0.9, 0.99)] == [1, 2, 3]


def random_norms(n: int = 60, seed: int = 0) -> PathNorms:
    direct, linear, nonlinear = torch.rand(3, n, generator=torch.Generator().manual_seed(seed)) + 0.1
    return PathNorms(direct=direct, linear=linear, nonlinear=nonlinear)


def test_share_correlations_are_spearmans_against_recomputed_shares():
    norms = random_norms()
    found = share_correlations(norms, seed=0, n_permutations=200)
    for name, share in norms.shares().named().items():
        assert found[name].observed == pytest.approx(spearmanr(norms.direct**2, share).statistic)
    # unrelated weights: strongly negative by construction, and the null says so
    assert found["integration"].observed < -0.5
    assert found["integration"].null_mean == pytest.approx(found["integration"].observed, abs=0.15)
    assert found["integration"].p_value > 0.05
    assert found["direct"].observed == pytest.approx(-found["integration"].observed)


def test_a_real_dependence_beats_the_null():
    """Integration rows that grow with the decoder row: the share stays flat where unrelated weights would make it fall."""
    norms = random_norms()
    grown = PathNorms(direct=norms.direct, linear=norms.direct * norms.linear, nonlinear=norms.direct * norms.nonlinear)
    found = share_correlations(grown, seed=0, n_permutations=200)["integration"]
    assert found.observed > found.null_high
    assert found.p_value < 0.05


def test_what_does_not_vary_has_no_correlation():
    norms = random_norms()
    ones = torch.ones(60)
    found = share_correlations(PathNorms(direct=norms.direct, linear=0 * ones, nonlinear=0 * ones), seed=0)
    assert found == dict.fromkeys(("integration", "linear", "nonlinear", "direct"))
    # equal up to rounding, as the rows of an initial decoder are
    jittered = ones + 1e-7 * norms.linear
    assert len(set(jittered.tolist())) > 1
    assert not varies(jittered)
    assert correlation(jittered, norms.direct, seed=0) is None


def test_the_split_by_hand():
    rows = PathRows(direct=torch.cat([0.4 * torch.ones(4, 1), 0.5 * torch.ones(8, 1)]), linear=torch.full((12, 1), 0.1))
    figures = weight_figures(rows, seed=0, n_permutations=99)
    assert (figures.below.n, figures.above.n) == (4, 8)
    assert figures.below.shares.direct.item() == pytest.approx(0.8)
    assert figures.above.shares.linear.item() == pytest.approx(1 / 6)
    empty = weight_figures(rows, seed=0, threshold=0.01, n_permutations=99)
    assert (empty.below.n, empty.below.shares, empty.above.n) == (0, None, 12)


def test_a_planted_second_mode_is_found():
    generator = torch.Generator().manual_seed(0)
    norms = torch.cat(
        [0.22 + 0.01 * torch.randn(150, generator=generator), 0.6 + 0.01 * torch.randn(150, generator=generator)]
    )
    directions = torch.nn.functional.normalize(torch.randn(300, 6, generator=generator), dim=-1)
    two = weight_figures(PathRows(direct=norms[:, None] * directions), seed=0, n_permutations=99)
    one = weight_figures(PathRows(direct=norms[150:, None] * directions[150:]), seed=0, n_permutations=99)
    assert two.dip.p_value < 0.01 < 0.2 < one.dip.p_value
    assert (two.mixture.preferred.n_components, one.mixture.preferred.n_components) == (2, 1)


# The SAE at the edge.


def joint(seed: int = 0, inference: bool = False, **overrides) -> SAE:
    cfg = training_config("joint_nfm", **({"nfm_top_k": None} | overrides))
    return inference_sae(cfg, seed) if inference else random_sae(cfg, seed)


RESCALED = pytest.mark.parametrize("rescaled", [True, False], ids=["rescaled", "plain"])


@RESCALED
def test_published_norms_survive_saving(rescaled, tmp_path):
    sae = joint(rescale_acts_by_decoder_norm=rescaled)
    sae.save_inference_model(str(tmp_path))
    loaded = SAE.load_from_disk(str(tmp_path))
    before, after = gauge.as_trained(sae), gauge.as_trained(loaded)
    torch.testing.assert_close(before.direct, sae.W_dec.detach(), **CLOSE)
    torch.testing.assert_close(before.linear, sae.W_lin.detach(), **CLOSE)
    for name in ("direct", "linear", "nonlinear"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), **CLOSE)
    torch.testing.assert_close(gauge.encoder_scale(loaded), gauge.encoder_scale(sae), **CLOSE)


@RESCALED
@pytest.mark.parametrize("inference", [True, False], ids=["inference", "training"])
def test_rows_as_read_write_the_direct_and_the_linear_path(rescaled, inference):
    sae, x = joint(rescale_acts_by_decoder_norm=rescaled, inference=inference), random_activations()
    acts, rows = sae.encode(x), gauge.as_read(sae)
    paths = sae.decode_paths(acts)
    torch.testing.assert_close(acts @ rows.direct + sae.b_dec, paths.direct, **CLOSE)
    torch.testing.assert_close(acts @ rows.linear + sae.b_lin, paths.linear, **CLOSE)


def shifted(sae: SAE, seed: int) -> SAE:
    """(W_dec + D, W_lin - D); without rescaling, where that is the same function."""
    moved = copy.deepcopy(sae)
    shift = torch.randn(D_SAE, D_MODEL, generator=torch.Generator().manual_seed(seed))
    moved.W_dec.data += shift
    moved.W_lin.data -= shift
    return moved


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_a_move_through_the_gauge_changes_published_shares_and_no_canonical_one(seed):
    sae = joint(rescale_acts_by_decoder_norm=False, dtype="float64")  # the default tolerances of float64 then hold
    moved, x = shifted(sae, seed), random_activations().double()
    torch.testing.assert_close(moved(x), sae(x))
    published, other = (gauge.as_trained(one).norms().shares() for one in (sae, moved))
    assert (published.linear - other.linear).abs().max() > 0.1
    one, two = (gauge.as_read(gauge.canonical(s)) for s in (sae, moved))
    torch.testing.assert_close(one.direct, two.direct)
    torch.testing.assert_close(one.norms().shares().direct, two.norms().shares().direct)
    assert one.norms().linear.abs().max() == 0


@RESCALED
@torch.no_grad()
def test_the_canonical_copy_is_the_same_function_and_the_original_is_left_alone(rescaled):
    sae, x = joint(rescale_acts_by_decoder_norm=rescaled, inference=True), random_activations()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    fixed = gauge.canonical(sae)
    torch.testing.assert_close(fixed(x), sae(x), **CLOSE)
    rows = gauge.as_read(sae)
    torch.testing.assert_close(gauge.as_read(fixed).direct, rows.direct + rows.linear, **CLOSE)
    torch.testing.assert_close(gauge.encoder_scale(fixed), gauge.encoder_scale(sae), **CLOSE)
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())


def test_where_there_is_no_canonical_gauge_the_reason_is_given():
    with pytest.raises(ValueError, match=r"nfm_top_k.*\b3\b.*\bNone\b"):
        gauge.canonical(joint(nfm_top_k=3))


def topk(rescaled: bool = True) -> SAE:
    cfg = TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=4, rescale_acts_by_decoder_norm=rescaled)
    sae = nfm_config.random_initialisation(cfg, 0)
    sae.W_dec.data *= torch.linspace(0.5, 2, D_SAE)[:, None]  # at first all rows have one norm
    return sae


def test_a_topk_sae_is_canonical():
    sae = topk()
    torch.testing.assert_close(gauge.canonical(sae).W_dec, sae.W_dec)
    assert (gauge.as_trained(sae).linear, gauge.as_trained(sae).nonlinear) == (None, None)
    torch.testing.assert_close(gauge.as_read(sae).direct.norm(dim=-1), torch.ones(D_SAE))


# Training moves through the gauge, or does not.

STILL = {
    "nfm_top_k": None,
    "rescale_acts_by_decoder_norm": False,
    "aux_loss_coefficient": 0.0,
    "nfm_dropout": 0.0,
    "use_square_path": False,
}
"""What leaves both decoders with the same gradient."""
STEPS = 20


def trained_drift(**overrides) -> gauge.GaugeDrift:
    sae = joint(**(STILL | overrides))
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    trainer(sae, total_training_samples=24 * STEPS).fit()
    return gauge.gauge_drift(before, sae.state_dict())


@pytest.mark.parametrize("kernel", ["dense", "sparse"])
def test_adam_leaves_the_gauge_where_it_was(kernel):
    drift = trained_drift(kernel=kernel)
    assert drift.travel > 1e-3  # 20 steps at 1e-3, both decoders the same way
    # Each step rounds W_dec and W_lin (entries of about 0.3, spacing 3e-8) by themselves: 20 roundings at the very worst.
    assert drift.largest_drift < 20 * 2**-24
    assert drift.ratio < 1e-4


@pytest.mark.parametrize(
    "change",
    [
        {"rescale_acts_by_decoder_norm": True},
        {"nfm_top_k": 2},
        {"aux_loss_coefficient": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_breaks_the_symmetry_moves_through_the_gauge(change):
    assert trained_drift(**change).ratio > 1e-2


def test_drift_by_hand():
    before = {"W_dec": torch.zeros(2, 2), "W_lin": torch.zeros(2, 2)}
    after = {"W_dec": torch.tensor([[3.0, 1.0], [0.0, 0.0]]), "W_lin": torch.tensor([[-1.0, 1.0], [0.0, 0.0]])}
    drift = gauge.gauge_drift(before, after)
    assert (drift.drift, drift.largest_drift, drift.travel) == pytest.approx((2.0, 4.0, math.sqrt(2)))
    assert math.isnan(gauge.gauge_drift(before, before).ratio)


def test_drift_refuses_what_it_cannot_compare(tmp_path):
    state = joint().state_dict()
    with pytest.raises(ValueError, match=r"after.*\bW_lin\b.*\bjoint_nfm\b"):
        gauge.gauge_drift(state, topk().state_dict())
    with pytest.raises(ValueError, match=r"\bW_dec\b.*before.*training"):
        gauge.gauge_drift(state | {"folded_W_dec_norm": 2 * torch.ones(D_SAE)}, state)
    with pytest.raises(ValueError, match=r"W_dec.*\(32, 16\).*\(5, 16\)"):
        gauge.gauge_drift(state, state | {"W_dec": torch.zeros(5, D_MODEL), "W_lin": torch.zeros(5, D_MODEL)})


# Random initialisation.


def test_random_initialisation_is_seeded_and_touches_no_global_state():
    cfg = training_config("joint_nfm", nfm_weight_init_std=0.01, nfm_embedding_init_std=0.05)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, two, other = (nfm_config.random_initialisation(cfg, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.W_lin, two.W_lin)
    assert not torch.equal(one.W_lin, other.W_lin)
    assert one.V.std().item() == pytest.approx(0.05, rel=0.2)  # 256 draws: standard error 4 %
    assert one.cfg is not cfg


def test_a_saved_sae_remembers_how_it_was_initialised(tmp_path):
    sae = joint(nfm_embedding_init_std=0.07, decoder_init_norm=0.3)
    sae.save_inference_model(str(tmp_path))
    cfg = nfm_config.training_config(SAE.load_from_disk(str(tmp_path)))
    assert (cfg.nfm_embedding_init_std, cfg.decoder_init_norm, cfg.k) == (0.07, 0.3, 4)
    norms = nfm_config.random_initialisation(cfg, 0).W_dec.norm(dim=-1)
    torch.testing.assert_close(norms, torch.full((D_SAE,), 0.3))
    forgotten = joint(inference=True)
    forgotten.cfg.metadata.training_architecture_details = None
    with pytest.raises(ValueError, match=r"metadata.*training_architecture"):
        nfm_config.training_config(forgotten)


# The report.


def report(sae: SAE, **overrides):
    x = torch.cat([random_activations(seed=seed) for seed in range(20)])
    documents = torch.arange(20).repeat_interleave(24)
    return gauge_report(sae, x, documents, **({"seed": 0, "n_permutations": 99, "initial": None} | overrides))


@pytest.fixture(scope="module")
def plain() -> SAE:
    return joint(rescale_acts_by_decoder_norm=False, inference=True)


@pytest.fixture(scope="module")
def plain_report(plain):
    return report(plain, initial=training_config("joint_nfm"))


def test_a_report_has_each_figure_with_its_control(plain, plain_report):
    sae, found = plain, plain_report
    rows = figure_rows(found)
    assert all(isinstance(row, FigureRow) and row.name and row.control for row in rows)
    assert len({(row.name, row.control) for row in rows}) == len(rows)
    by_name = {(row.name, row.control): row for row in rows}
    norm = by_name["mean squared decoder norm", "rows in one unit, canonical gauge"]
    assert norm.published == pytest.approx(sae.W_dec.square().sum(-1).mean().item(), rel=1e-5)
    assert norm.controlled == pytest.approx((sae.W_dec + sae.W_lin).square().sum(-1).mean().item(), rel=1e-5)
    share = by_name["share of what the integration paths write, linear", "energy about the mean"]
    assert isinstance(share.published, Estimate)
    assert share.published.low < share.published.estimate < share.published.high
    assert found.weights.initial.squared_norm.mean().item() == pytest.approx(0.01, rel=1e-4)  # decoder_init_norm 0.1


def test_a_report_says_why_there_is_no_canonical_gauge():
    found = report(joint(nfm_top_k=3))
    assert found.weights.canonical is None
    assert found.canonical_paths is None
    without = [row for row in figure_rows(found) if "canonical gauge: none, nfm_top_k is 3" in row.control]
    assert {row.name for row in without} > {"mean squared decoder norm", "pair outputs that oppose a feature of theirs"}
    assert all(row.controlled is None for row in without)


def test_under_rescaling_one_unit_is_not_the_parameters():
    sae = joint(rescale_acts_by_decoder_norm=True)
    weights = report(sae).weights
    torch.testing.assert_close(weights.one_unit.squared_norm, weights.as_trained.squared_norm, **CLOSE)
    n, linear, nonlinear = (getattr(sae, name).norm(dim=-1) for name in ("W_dec", "W_lin", "V"))
    torch.testing.assert_close(weights.as_trained.shares.direct, n / (n + linear + nonlinear), **CLOSE)
    torch.testing.assert_close(weights.one_unit.shares.direct, 1 / (1 + linear + nonlinear), **CLOSE)


def test_a_topk_sae_is_reported_by_the_same_functions():
    sae = topk(rescaled=False)
    found = report(sae, initial="from metadata")
    assert set(found.weights.as_trained.share_correlations.values()) == {None}
    assert found.weights.as_trained.shares.direct.tolist() == pytest.approx([1.0] * D_SAE)
    assert (found.paths.gains, found.paths.residual, found.paths.inhibition, found.paths.pairs) == (None,) * 4
    assert found.paths.magnitude_shares == {}
    absent = {row.name.split(",")[0] for row in figure_rows(found) if row.published is None}
    # no path to share with; and of the features of one side of the split there are none
    assert absent <= {"Spearman of squared norm and share", "share of weight norm"}


def test_paths_in_the_canonical_gauge_do_not_depend_on_where_one_started(plain, plain_report):
    one, two = plain_report, report(shifted(plain, 0))
    assert one.paths.inhibition.mean.estimate != pytest.approx(two.paths.inhibition.mean.estimate, rel=0.1)
    first, second = one.canonical_paths, two.canonical_paths
    assert first.pairs.fraction_negative.estimate == pytest.approx(second.pairs.fraction_negative.estimate)
    torch.testing.assert_close(first.energies.direct, second.energies.direct, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert one.paths.gauge_free_inhibition.mean.estimate == pytest.approx(
        two.paths.gauge_free_inhibition.mean.estimate, rel=1e-4
    )
    assert np.isclose(one.paths.nonlinear_of_output.estimate, two.paths.nonlinear_of_output.estimate, rtol=1e-4)
