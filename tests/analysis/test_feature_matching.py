"""Features against true ones: by hand, against SAELens, and in the canonical gauge."""

import copy

import pytest
import torch
from builders import inference_sae, random_sae, training_config
from sae_lens.synthetic import compute_classification_metrics

from sae_nfm.analysis import dead_features, feature_directions, firing_scores, matched, mcc


def test_a_matching_by_hand():
    # greedy would give feature 0 to true 0 (0.96) and leave 0.28 for true 1; together 0.8 + 0.96 is more than 0.96 + 0.28
    true = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    features = torch.tensor([[0.96, 0.28], [1.6, 1.2], [0.0, 0.0]])
    matching = matched(features[:2].flip(1), true)
    assert (matching.true.tolist(), matching.features.tolist()) == ([0, 1], [1, 0])
    assert matching.cosines.tolist() == pytest.approx([0.6, 0.96])
    assert matched(features, true).cosines.tolist() == pytest.approx([0.96, 0.6])
    assert matched(features, true).mean_cosine == pytest.approx(0.78)


def test_a_reversed_direction_is_not_the_same_feature():
    true = torch.eye(2)
    features = torch.tensor([[-1.0, 0.0], [0.8, 0.6]])
    assert matched(features, true).cosines.tolist() == pytest.approx([0.8, 0.0])
    assert mcc(features, true) == pytest.approx(0.8)  # SAELens's takes |cosine|: 1 and 0.6


def test_a_dictionary_is_found_in_any_order_and_length():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(7, 5, generator=generator)
    order = torch.randperm(7, generator=generator)
    features = torch.cat([3.0 * true[order], torch.zeros(2, 5)])
    matching = matched(features, true)
    assert torch.equal(order[matching.features], matching.true)
    assert mcc(features, true) == pytest.approx(matching.mean_cosine, abs=1e-6) == 1


def test_firing_by_hand():
    true_acts = torch.tensor([[1.0, 0, 0], [2.0, 1, 0], [0, 1, 0], [0, 0, 0]])
    acts = torch.tensor([[0, 0.5, 9], [1.0, 0.5, 0], [0, 0.5, 9], [0, 0.5, 0]])
    matching = matched(torch.tensor([[0.0, 1, 0], [1.0, 0, 0], [0, 0, 1.0]]), torch.eye(3))
    scores = firing_scores(acts, true_acts, matching)
    # true 0 fires on 0, 1 and feature 1 always; true 1 fires on 1, 2 and feature 0 on 1; true 2 never fires and is not scored
    assert scores.true.tolist() == [0, 1]
    assert scores.precision.tolist() == pytest.approx([0.5, 1.0])
    assert scores.recall.tolist() == pytest.approx([1.0, 0.5])
    assert scores.f1.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert torch.equal(firing_scores(acts.to_sparse(), true_acts, matching).f1, scores.f1)


def test_a_true_feature_that_nothing_is_found_for_counts_with_0():
    true_acts = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    one = matched(torch.tensor([[1.0, 0, 0], [0, 2.0, 0]]), torch.eye(3))
    scores = firing_scores(torch.tensor([[1.0, 0], [0, 0]]), true_acts, one)
    assert scores.f1.tolist() == [1, 0, 0]  # true 1: its feature is dead; true 2: there is none


def test_firing_where_the_nearest_is_the_matched_is_that_of_saelens():
    generator = torch.Generator().manual_seed(0)
    true = torch.eye(6)
    features = true + 0.1 * torch.randn(6, 6, generator=generator)
    acts, true_acts = ((torch.rand(50, 6, generator=generator) - 0.6).relu() for _ in range(2))
    scores = firing_scores(acts, true_acts, matched(features, true))
    theirs = compute_classification_metrics(acts, true_acts, features, true)
    ours = (scores.precision.mean(), scores.recall.mean(), scores.f1.mean())
    # theirs in float32
    assert [float(value) for value in ours] == pytest.approx(
        [theirs.precision, theirs.recall, theirs.f1_score], rel=1e-5
    )


def test_dead_features():
    acts = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1e-9]])
    assert dead_features(acts).tolist() == [True, False, False]
    assert dead_features(acts.to_sparse()).tolist() == [True, False, False]


@pytest.mark.parametrize("rescaled", [True, False])
def test_directions_are_what_a_unit_of_a_feature_adds(rescaled: bool):
    cfg = training_config(
        "joint_nfm", nfm_top_k=None, head="none", use_square_path=False, rescale_acts_by_decoder_norm=rescaled
    )
    sae = inference_sae(cfg)
    directions = feature_directions(sae)
    units = sae.decode(torch.eye(cfg.d_sae)) - sae.decode(torch.zeros(1, cfg.d_sae))
    torch.testing.assert_close(directions, units, rtol=1e-5, atol=1e-5)  # differences of numbers of order 1 in float32


def test_directions_do_not_know_the_gauge():
    sae = random_sae(training_config("joint_nfm", nfm_top_k=None, rescale_acts_by_decoder_norm=False))
    moved = copy.deepcopy(sae)
    shift = torch.randn(sae.W_lin.shape, generator=torch.Generator().manual_seed(3))
    moved.W_dec.data += shift
    moved.W_lin.data -= shift
    one, other = feature_directions(sae), feature_directions(moved)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # sums in another order
    assert mcc(one, other) == pytest.approx(1, abs=1e-5)
    assert mcc(sae.W_dec.detach(), moved.W_dec.detach()) < 0.9


def test_what_has_no_direction_or_no_score_is_refused():
    with pytest.raises(ValueError, match="nfm_top_k is 3"):
        feature_directions(inference_sae(training_config("joint_nfm")))
    assert feature_directions(inference_sae(training_config("sequential_nfm"))).shape == (32, 16)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        matched(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        mcc(torch.full((2, 3), torch.nan), torch.ones(2, 3))
    matching = matched(torch.eye(2), torch.eye(2))
    with pytest.raises(ValueError, match="3 tokens"):
        firing_scores(torch.ones(3, 2), torch.ones(4, 2), matching)
    with pytest.raises(ValueError, match="no true feature fires"):
        firing_scores(torch.ones(3, 2), torch.zeros(3, 2), matching)
