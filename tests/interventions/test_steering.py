"""Steering: directions by hand, effects in a model whose logits are linear in what is steered, controls and words."""

import json
import re

import pytest
import torch
from builders import CONTEXT, D_MODEL, D_VOCAB, HOOK, inference_sae, tiny_model, training_config
from planted import linear_model
from simulated_evidence import quick_collection

from sae_nfm.interventions.intervene import counted_tokens, splice
from sae_nfm.interventions.steering import (
    compare_steering,
    directions,
    feature_direction,
    mean_gates,
    pair_direction,
    steering,
)
from sae_nfm.models.splicing import keeping

ROUNDING = {"atol": 1e-5, "rtol": 1e-5}  # float32 logits of size 1 to 10


@pytest.fixture(scope="module", autouse=True)
def collections_are_quick():
    with quick_collection():
        yield


@pytest.fixture(scope="module")
def model():
    return linear_model()


@pytest.fixture(scope="module")
def sae():
    """Half of the features are active on a token, so that pairs meet."""
    return inference_sae(training_config("joint_nfm", k=16, nfm_top_k=12)).requires_grad_(False)


@pytest.fixture(scope="module")
def tokens():
    found = torch.randint(1, D_VOCAB, (5, CONTEXT), generator=torch.Generator().manual_seed(4))
    found[:4, 0] = found[1, 7] = 0
    return found


@pytest.fixture(scope="module")
def pair(model, sae, tokens):
    """The two features that are strongest on one token."""
    _, cache = model.run_with_cache(tokens)
    first, second = sae.encode(cache[HOOK])[0, 3].topk(2).indices.tolist()
    return first, second


@pytest.fixture(scope="module")
def found(model, sae, pair, tokens):
    settings = {"alphas": (0.5, -2.0), "target": 7, "n_random": 2, "seed": 1, "batch_rows": 2}
    return compare_steering(model, sae, pair, tokens, **settings, show_progress=False)


def test_directions_by_hand():
    """v_0*v_1 = (2, -1) through W_1 = (1 1; 0 3) is (2, -1); the second gate is open on half of the tokens: (2, -0.5) W_2."""
    cfg = training_config("joint_nfm", d_in=2, d_sae=2, k=2, nfm_dim=2, nfm_top_k=None, use_square_path=False)
    sae = inference_sae(cfg).requires_grad_(False)
    weights = {"V": [[1, 1], [2, -1]], "W_1": [[1, 1], [0, 3]], "W_2": [[1, 0], [0, 2]]}
    weights |= {"W_dec": [[0, 5], [3, 4]], "W_lin": [[1, 0], [0, 1]]}
    for name, value in weights.items():
        getattr(sae, name).copy_(torch.tensor(value))
    gates = torch.tensor([1.0, 0.5])
    assert pair_direction(sae, (0, 1), gates).tolist() == [2, -1]
    assert pair_direction(sae, (1, 0), gates).tolist() == [2, -1]
    sae.cfg.rescale_acts_by_decoder_norm = False
    assert [feature_direction(sae, i).tolist() for i in (0, 1)] == [[1, 5], [3, 5]]
    sae.cfg.rescale_acts_by_decoder_norm = True  # a unit of activation writes a unit vector
    torch.testing.assert_close(feature_direction(sae, 1), torch.tensor([0.6, 1.8]))
    torch.testing.assert_close(
        directions(sae, (0, 1), gates)["sum"], torch.nn.functional.normalize(torch.tensor([1.6, 2.8]), dim=0)
    )


def test_gates_are_averaged_where_both_features_are_read(model, sae, pair, tokens):
    seen = {}
    with (
        splice(model, sae) as at,
        at.hooks({n: keeping(seen, n) for n in ("hook_sae_acts_post", "hook_nfm_hidden_pre")}),
    ):
        model(tokens)
    acts = seen["hook_sae_acts_post"]
    least = acts.topk(12, dim=-1).values.amin(-1)
    both = counted_tokens(model, tokens)
    for feature in pair:
        both = both & (acts[..., feature] >= least) & (acts[..., feature] > 0)
    gates, n = mean_gates(model, sae, pair, tokens, batch_rows=2)
    assert 1 < n == int(both.sum()) < int(counted_tokens(model, tokens).sum())
    torch.testing.assert_close(gates, (seen["hook_nfm_hidden_pre"][both] > 0).float().mean(0))


def test_effects_are_those_of_the_unembedding(model, sae, pair, tokens, found):
    """Logits are linear in the activation, so a step of alpha u changes them by alpha u W_U: KL and target follow."""
    step = directions(sae, pair, mean_gates(model, sae, pair, tokens)[0])
    logits, counted = model(tokens), counted_tokens(model, tokens)
    special = (tokens == 0)[..., None]
    p = logits.log_softmax(-1)
    rows = found.frame().set_index(["arm", "alpha", "row"])
    assert len(rows) == 5 * 2 * (4 + 2)
    for arm, direction in step.items():
        assert direction.norm().item() == pytest.approx(1)
        for alpha in (0.5, -2.0):
            moved = torch.where(special, 0, alpha * direction @ model.W_U)
            q = (logits + moved).log_softmax(-1)
            kl, change = (p.exp() * (p - q)).sum(-1), (q - p)[..., 7]
            for row in range(5):
                line = rows.loc[(arm, alpha, row)]
                assert line.tokens == counted[row].sum()
                assert line.kl_nats == pytest.approx(kl[row][counted[row]].mean().item(), rel=1e-4, abs=1e-6)
                assert line.target_change_nats == pytest.approx(
                    change[row][counted[row]].mean().item(), rel=1e-4, abs=1e-5
                )


def test_the_control_is_random_and_repeats(model, sae, pair, tokens, found):
    settings = {"alphas": (0.5, -2.0), "target": 7, "n_random": 2, "batch_rows": 5, "show_progress": False}
    again, other = (compare_steering(model, sae, pair, tokens, **settings, seed=seed) for seed in (1, 2))
    for a, b in zip(found.rows, sorted(again.rows, key=found_order(found)), strict=True):
        assert (a.arm, a.draw, a.alpha, a.row) == (b.arm, b.draw, b.alpha, b.row)
        assert a.kl_nats == pytest.approx(b.kl_nats, rel=1e-4, abs=1e-7)  # other batches, other rounding
    random = [{row.kl_nats for row in result.rows if row.arm == "random"} for result in (again, other)]
    assert not random[0] & random[1]
    assert {(row.arm, row.draw) for row in found.rows if row.arm == "random"} == {("random", 0), ("random", 1)}


def found_order(found):
    order = {(row.arm, row.draw, row.alpha, row.row): number for number, row in enumerate(found.rows)}
    return lambda row: order[row.arm, row.draw, row.alpha, row.row]


def test_the_same_distance_everywhere(model, tokens):
    """Every arm moves the activation by |alpha|, special tokens not at all."""
    direction = torch.nn.functional.normalize(torch.arange(1.0, D_MODEL + 1), dim=0)
    arm = steering(HOOK, direction, -2.0)
    with arm.on(model) as trace:
        model(tokens)
    distance = (trace.x_hat - trace.x).norm(dim=-1)
    torch.testing.assert_close(distance, torch.where(tokens == 0, 0.0, 2.0), **ROUNDING)
    assert arm.identity == steering(HOOK, direction.clone(), -2.0).identity != steering(HOOK, direction, 2.0).identity


def test_a_pair_that_writes_what_its_features_write(model, tokens):
    """W_2 made so that the pair writes d_0 + d_1: cosine 1, the same effect to rounding, and no difference is shown."""
    sae = inference_sae(training_config("joint_nfm", k=32, nfm_top_k=None, nfm_dim=1)).requires_grad_(False)
    sae.b_1.fill_(100.0)  # its one gate is always open
    sae.W_2.copy_(((feature_direction(sae, 0) + feature_direction(sae, 1)) / (sae.V[0] * sae.V[1] * sae.W_1))[None, 0])
    found = compare_steering(model, sae, (0, 1), tokens, alphas=[1.0], show_progress=False)
    assert found.cosines["sum"] == pytest.approx(1, abs=1e-6)
    assert found.open_gates == pytest.approx(1)
    means = found.means("kl_nats").loc[1.0]
    assert means["pair"] == pytest.approx(means["sum"], rel=1e-4)
    assert means["pair"] > 1e-3


def test_words(found, pair, tmp_path):
    words = found.words()
    assert f"features {pair[0]} and {pair[1]}, 5 rows of text" in words
    for alpha, difference in found.against_sum("kl_nats").items():
        means = found.means("kl_nats").loc[alpha]
        assert difference.estimate == pytest.approx(means["pair"] - means["sum"], rel=1e-6)
        assert difference.correction == "Holm over 2 tests"
        verdict = "no difference shown"
        if difference.p_value < 0.05:
            verdict = "larger for the pair" if difference.estimate > 0 else "larger for the sum"
        assert re.search(rf"pair - sum at {alpha:g}: .* over 5 rows: {verdict} \(Holm over 2 tests\)", words)
    assert "change of log p of token 7, nats" in words
    assert words.endswith("One SAE and one pair: nothing here is about other pairs or seeds.")
    found.save(tmp_path / "steering.json")
    content = json.loads((tmp_path / "steering.json").read_text())
    assert content["rows"][0]["kl_nats"] == found.rows[0].kl_nats


def test_one_row_is_no_claim(model, sae, pair, tokens):
    found = compare_steering(
        model, sae, pair, tokens[4:], alphas=[1.0], gate_tokens=tokens, n_random=1, show_progress=False
    )
    assert "One row of text: no interval, no claim." in found.words()
    assert {row.target_change_nats for row in found.rows} == {None}


def test_errors_say_what_is_wrong(model, sae, pair, tokens):
    def compare(sae=sae, pair=pair, tokens=tokens, alphas=(1.0,), **settings):
        return compare_steering(model, sae, pair, tokens, alphas=alphas, show_progress=False, **settings)

    with pytest.raises(ValueError, match=r"\balphas\b.*\[1\.0, 0\.0\]"):
        compare(alphas=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"\bn_random\b.*\b0\b.*\b1\b"):
        compare(n_random=0)
    with pytest.raises(ValueError, match=r"\btarget\b.*\b50\b.*\b49\b"):
        compare(target=50)
    with pytest.raises(ValueError, match=r"\bno token\b.*\b4 tokens\b"):
        compare(tokens=torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\bpair\b.*\(3, 3\)"):
        compare(pair=(3, 3))
    with pytest.raises(ValueError, match=r"\bhead\b.*'mlp'"):
        compare(sae=inference_sae(training_config("joint_nfm", head="mlp")))
    with pytest.raises(ValueError, match=r"\bnormalize_activations\b.*'layer_norm'"):
        compare(
            sae=inference_sae(training_config("joint_nfm", k=16, nfm_top_k=12, normalize_activations="layer_norm")),
            pair=(0, 1),
        )
    silent = inference_sae(training_config("joint_nfm", k=1, nfm_top_k=None))
    with pytest.raises(ValueError, match=r"\bfeatures 0 and 1\b.*\bnone of 80 tokens\b.*\bgates\b"):
        compare(sae=silent, pair=(0, 1))
    shut = inference_sae(training_config("joint_nfm", k=32, nfm_top_k=None)).requires_grad_(False)
    shut.b_1.fill_(-1e4)
    with pytest.raises(ValueError, match=r"'pair' is zero\b.*\bfeatures 0, 1\b"):
        compare(sae=shut, pair=(0, 1))


def test_on_a_model_with_normalisation(tokens, sae):
    """Nothing here needs a linear model: a larger step does more."""
    model = tiny_model().requires_grad_(False)
    _, cache = model.run_with_cache(tokens)
    first, second = sae.encode(cache[HOOK])[0, 3].topk(2).indices.tolist()
    found = compare_steering(model, sae, (first, second), tokens, alphas=(0.1, 1.0), show_progress=False)
    means = found.means("kl_nats")
    assert (means.loc[1.0] > 3 * means.loc[0.1]).all()
