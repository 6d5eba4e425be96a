"""What paths do on tokens: contributions that sum exactly, projections and gains by hand, a planted linear and quadratic path."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from builders import (
    CONTEXT,
    D_MODEL,
    D_SAE,
    D_VOCAB,
    HOOK_Z,
    inference_sae,
    random_activations,
    random_sae,
    tiny_model,
    training_config,
)
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from scipy.stats import ttest_1samp
from sklearn.linear_model import Ridge

from sae_nfm import gauge, interaction
from sae_nfm.functional import feature_energies, pair_contributions, path_sizes, read_activations, token_paths
from sae_nfm.hooks import Splice
from sae_nfm.inhibition import centred, gains_of_arms, pair_projections, projection, squared_error_gains
from sae_nfm.interaction import SparseActs
from sae_nfm.linear_part import divided, linear_part
from sae_nfm.path_figures import functional_figures
from sae_nfm.sae import Paths

EVERY_KIND = pytest.mark.parametrize(
    "options",
    [
        {},
        {"nfm_top_k": None},
        {"rescale_acts_by_decoder_norm": False},
        {"head": "mlp"},
        {"normalize_activations": "layer_norm"},
        {"kernel": "sparse"},
    ],
    ids=str,
)


def joint(inference: bool = False, **overrides) -> SAE:
    """In float64, where sums in any order agree to the default tolerance."""
    cfg = training_config("joint_nfm", dtype="float64", **overrides)
    return inference_sae(cfg) if inference else random_sae(cfg)


def activations(seed: int = 1, rows: int = 24) -> torch.Tensor:
    return random_activations(rows=rows, seed=seed).double()


# Contributions.


@EVERY_KIND
@pytest.mark.parametrize("inference", [True, False], ids=["inference", "training"])
@torch.no_grad()
def test_contributions_sum_to_what_the_paths_write(options, inference):
    sae = joint(inference, **options)
    tokens, rows = token_paths(sae, activations()), gauge.as_read(sae)
    acts, read, paths = tokens.acts, tokens.read, tokens.paths

    def total(acts, rows):
        return (acts.values[..., None] * rows[acts.indices]).sum(1)

    torch.testing.assert_close(total(acts, rows.direct) + sae.b_dec, paths.direct)
    torch.testing.assert_close(total(read, rows.linear) + sae.b_lin, paths.linear)
    torch.testing.assert_close(total(interaction.squared(acts), sae.U) / sae.cfg.square_scale, paths.square)
    parts = pair_contributions(read, sae.V, sae.W_1, sae.W_2, tokens.gates, sae.cfg.head)
    gated_bias = (sae.b_1 * tokens.gates) @ sae.W_2 + sae.b_2
    torch.testing.assert_close(parts.sum(1) + gated_bias, paths.interaction)
    assert parts.abs().max() > 0.01


@EVERY_KIND
@torch.no_grad()
def test_energies_are_means_of_squared_contributions(options):
    sae = joint(**options)
    tokens, rows = token_paths(sae, activations()), gauge.as_read(sae)
    found, pairs = (
        feature_energies(sae, tokens),
        pair_contributions(tokens.read, sae.V, sae.W_1, sae.W_2, tokens.gates, sae.cfg.head),
    )
    f = sae.encode(activations())
    for i in range(D_SAE):
        active = [t for t in range(len(f)) if f[t, i] > 0]
        assert found.active[i] == len(active)
        assert found.second_moment[i].item() == pytest.approx((f[:, i] ** 2).mean().item())
        if not active:
            assert found.direct[i].isnan()
            continue
        at = [(t, s) for t in active for s in range(tokens.read.indices.shape[1]) if tokens.read.indices[t, s] == i]
        expected = {
            "direct": sum((f[t, i] * rows.direct[i]).square().sum() for t in active),
            "linear": sum((tokens.read.values[t, s] * rows.linear[i]).square().sum() for t, s in at),
            "nonlinear": sum(pairs[t, s].square().sum() for t, s in at),
            "square": sum((f[t, i] ** 2 * sae.U[i] / 2.0).square().sum() for t in active),
        }
        for name, energy in expected.items():
            assert float(getattr(found, name)[i]) == pytest.approx(float(energy) / len(active)), (name, i)
    assert found.frequency.sum().item() == pytest.approx((f > 0).double().sum(1).mean().item())


def test_pair_contributions_by_hand():
    """Two features 2 and 3, v = (1, 1) and (1, -1): z = (6, -6); W_1 the identity, both gates open, W_2 = 10."""
    acts = SparseActs(torch.tensor([[0, 1]]), torch.tensor([[2.0, 3.0]]))
    V = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    parts = pair_contributions(acts, V, torch.eye(2), 10 * torch.eye(2), torch.tensor([[True, True]]))
    assert parts.tolist() == [[[30.0, -30.0], [30.0, -30.0]]]
    closed = pair_contributions(acts, V, torch.eye(2), 10 * torch.eye(2), torch.tensor([[True, False]]))
    assert closed.tolist() == [[[30.0, 0.0], [30.0, 0.0]]]
    alone = pair_contributions(acts, V, torch.eye(2), 10 * torch.eye(2), torch.tensor([[True, True]]), head="mlp")
    assert alone.tolist() == [[[20.0, 20.0], [30.0, -30.0]]]


@torch.no_grad()
def test_removing_a_feature_with_gates_held_takes_twice_its_contribution():
    sae = joint(nfm_top_k=None)
    sae.b_1.data += 100  # every gate open whatever is removed
    tokens = token_paths(sae, activations())
    parts = pair_contributions(tokens.read, sae.V, sae.W_1, sae.W_2, tokens.gates)
    f = sae.encode(activations())
    for t in range(3):
        without = f[t].clone()
        without[tokens.read.indices[t, 0]] = 0
        change = tokens.paths.interaction[t] - sae.decode_paths(without[None]).interaction[0]
        torch.testing.assert_close(change, 2 * parts[t, 0])


@torch.no_grad()
def test_shares_by_hand():
    """One token, two paths; magnitudes 2 and 1, so 2/3; a constant has no energy about its mean."""
    linear = torch.tensor([[2.0, -2.0], [2.0, -2.0], [2.0, -2.0]])
    inter = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])
    sizes = path_sizes(Paths(torch.zeros(3, 2), linear, None, inter))
    assert sizes.magnitude["linear"].tolist() == [2.0] * 3
    assert sizes.share(sizes.magnitude, "linear") == pytest.approx(2 / 3)
    assert sizes.share(sizes.energy, "linear") == 0
    assert sizes.energy["interaction"].sum().item() == pytest.approx(
        2 * (1 + 1 + 1 - 1 / 3)
    )  # variance about 1/3, twice


def test_a_topk_sae_has_its_direct_path_only():
    sae = TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=4))
    sae.load_state_dict({name: tensor for name, tensor in random_sae(training_config("joint_nfm")).state_dict().items()
                         if name in sae.state_dict()})  # fmt: skip
    x = random_activations()
    tokens = token_paths(sae, x)
    torch.testing.assert_close(tokens.paths.total(), sae(x))
    assert set(tokens.paths.present()) == {"direct"}
    assert feature_energies(sae, tokens).nonlinear.nan_to_num().abs().max() == 0


def test_what_cannot_be_looked_at_is_refused():
    standard = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE))
    with pytest.raises(ValueError, match="an SAE of architecture 'standard' has no k; give a joint_nfm or a TopK SAE"):
        token_paths(standard, random_activations())
    with pytest.raises(ValueError, match="3 documents for 24 tokens; give one for each token"):
        token_paths(joint(), activations(), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="intervals are over documents: give token_paths the document of each token"):
        functional_figures(joint(), token_paths(joint(), activations()), seed=0)


# In the language model.


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def random_tokens(rows: int = 12) -> torch.Tensor:
    tokens = torch.randint(1, D_VOCAB, (rows, CONTEXT), generator=torch.Generator().manual_seed(4))
    tokens[:, 0] = 0
    tokens[1, 7] = 0  # a BOS in the middle of a row
    return tokens


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_post", HOOK_Z])
@torch.no_grad()
def test_activations_are_the_models_at_counted_tokens(hook_name, model):
    sae, tokens = inference_sae(training_config("joint_nfm", hook_name)), random_tokens()
    documents = torch.arange(12)[:, None].expand(-1, CONTEXT)
    x, found = read_activations(model, sae, tokens, documents, batch_rows=5)
    _, cache = model.run_with_cache(tokens, names_filter=hook_name)
    places = [(r, p) for r in range(12) for p in range(1, CONTEXT) if tokens[r, p] != 0]
    torch.testing.assert_close(x, torch.stack([cache[hook_name][place].flatten() for place in places]))
    assert found.tolist() == [row for row, _ in places]
    # the SAE makes of them what it makes of them in the model, and is left as it was
    heads = sae.hook_z_reshaping_mode
    paths = token_paths(sae, x).paths
    assert sae.hook_z_reshaping_mode == heads
    alone = torch.cat([sae(cache[hook_name][place][None]).reshape(1, -1) for place in places])
    torch.testing.assert_close(paths.total(), alone, rtol=1e-4, atol=1e-5)  # float32, one row at a time
    with pytest.raises(ValueError, match="no token to read: 32 tokens, all special or in position 0"):
        read_activations(model, sae, torch.zeros(2, 16, dtype=torch.long))


# Inhibition.


def test_projection_by_hand():
    found = projection(torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, 3.0]]), torch.tensor([[2.0, 0.0]] * 3))
    assert found.coefficient.tolist() == [0.5, -0.5, 0.0]
    assert found.cosine.tolist() == pytest.approx([0.5**0.5, -1.0, 0.0])
    assert (found.fraction_negative, found.mean, found.mean_negative) == (pytest.approx(1 / 3), 0.0, -0.5)
    assert projection(torch.ones(2, 2), torch.ones(2, 2)).mean_negative is None


@torch.no_grad()
def test_pair_projections_are_those_of_a_loop_over_pairs():
    sae = joint(nfm_top_k=None)
    tokens, rows = token_paths(sae, activations()), gauge.as_read(sae).direct * torch.linspace(0.5, 2, D_SAE)[:, None]
    tokens.acts.values[0, 1] = 0  # a token with fewer active features
    found = pair_projections(tokens.acts, tokens.gates, rows, sae.V, sae.W_1, sae.W_2)
    for t in (0, 1, 7):
        active = [(int(i), f) for i, f in zip(tokens.acts.indices[t], tokens.acts.values[t], strict=True) if f > 0]
        each, mutual = [], 0
        for a in range(len(active)):
            for b in range(a):
                (i, f), (j, g) = active[a], active[b]
                written = (((f * g * sae.V[i] * sae.V[j]) @ sae.W_1) * tokens.gates[t]) @ sae.W_2
                both = [float(written @ rows[n] / rows[n].norm()) for n in (i, j)]
                each, mutual = each + both, mutual + (max(both) < 0)
        assert (found.projections[t], found.mutual[t]) == (len(each), mutual)
        assert found.negative[t] == sum(value < 0 for value in each)
        assert found.strength[t].item() == pytest.approx(sum(map(abs, each)))
        assert found.negative_strength[t].item() == pytest.approx(-sum(value for value in each if value < 0))
        assert found.direct_strength[t].item() == pytest.approx(sum(float(f * rows[i].norm()) for i, f in active))
    assert found.projections[0] == 6  # three features, two directions for each pair


def test_a_planted_inhibition_is_found():
    """A path that writes minus a tenth of the direct path is negative on every token, whatever constant either has."""
    direct = activations(rows=200)
    added = -0.1 * direct + 5
    assert projection(added, direct).fraction_negative < 1
    found = projection(centred(added), centred(direct))
    assert found.fraction_negative == 1
    torch.testing.assert_close(found.coefficient, torch.full((200,), -0.1, dtype=torch.float64))


# Gains.


def path_outputs(rows: int = 50) -> tuple[torch.Tensor, Paths]:
    x, direct, linear, inter = (activations(seed, rows) for seed in range(4))
    return x, Paths(direct, linear, None, inter)


def test_the_overlap_on_squared_error_is_twice_the_inner_product():
    x, paths = path_outputs()
    gains = squared_error_gains(x, paths)
    expected = ((x - paths.direct) ** 2).sum(-1) - ((x - paths.direct - paths.linear) ** 2).sum(-1)
    np.testing.assert_allclose(gains.linear, expected.numpy())
    np.testing.assert_allclose(gains.overlap, 2 * (paths.linear * paths.interaction).sum(-1).numpy())
    kept = squared_error_gains(x, paths, keep_means=True)
    np.testing.assert_allclose(
        kept.overlap, 2 * (centred(paths.linear) * centred(paths.interaction)).sum(-1).numpy(), atol=1e-12
    )


def test_a_constant_moved_between_paths_changes_zero_ablation_only():
    x, paths = path_outputs()
    moved = paths._replace(linear=paths.linear + 3, interaction=paths.interaction - 3)
    np.testing.assert_allclose(squared_error_gains(x, paths).both, squared_error_gains(x, moved).both)
    assert abs(squared_error_gains(x, paths).overlap - squared_error_gains(x, moved).overlap).min() > 1
    kept, other = (squared_error_gains(x, one, keep_means=True) for one in (paths, moved))
    np.testing.assert_allclose(kept.overlap, other.overlap)
    np.testing.assert_allclose(kept.nonlinear, other.nonlinear)
    with pytest.raises(ValueError, match="gains of two paths need both: this SAE has no linear or no interaction path"):
        squared_error_gains(x, paths._replace(linear=None))


ARMS = {"direct": "direct only", "linear": "+ linear", "nonlinear": "+ nonlinear", "both": "all"}


def tidy_rows() -> pd.DataFrame:
    kl = {"direct only": [1.0, 2.0], "+ linear": [0.5, 1.0], "+ nonlinear": [0.75, 1.5], "all": [0.5, 0.75]}
    rows = [(7, 0, 1 + p, arm, value) for arm, values in kl.items() for p, value in enumerate(values)]
    frame = pd.DataFrame(rows, columns=["document", "row", "position", "arm", "kl_nats"])
    return frame.astype({"arm": "category"}).sample(frac=1, random_state=0)


def test_gains_of_arms_by_hand():
    gains = gains_of_arms(tidy_rows(), ARMS)
    assert gains.base.tolist() == [1.0, 2.0]
    assert (gains.linear.tolist(), gains.nonlinear.tolist(), gains.both.tolist()) == (
        [0.5, 1.0],
        [0.25, 0.5],
        [0.5, 1.25],
    )
    assert gains.overlap.tolist() == [0.25, 0.25]
    assert gains.documents.tolist() == [7, 7]


def test_rows_that_are_not_those_of_four_arms_are_refused():
    rows = tidy_rows()
    with pytest.raises(
        ValueError, match="arms are given for both; name one for each of direct, linear, nonlinear, both"
    ):
        gains_of_arms(rows, {"both": "all"})
    with pytest.raises(ValueError, match="no rows of arm every path; there are "):
        gains_of_arms(rows, ARMS | {"both": "every path"})
    with pytest.raises(
        ValueError, match="the rows have no column ce_nats; they have document, row, position, arm, kl_nats"
    ):
        gains_of_arms(rows, ARMS, "ce_nats")
    with pytest.raises(ValueError, match="a token stands more than once in an arm"):
        gains_of_arms(pd.concat([rows, rows]), ARMS)
    with pytest.raises(ValueError, match="kl_nats is missing for some tokens of some arms"):
        gains_of_arms(rows.iloc[1:], ARMS)


# The linear part.


def planted(n: int = 1500, d_sae: int = 12, k: int = 4, signed: bool = True) -> SparseActs:
    """k active features a token, of independent size and, where signed, of independent sign."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(d_sae, generator=generator)[:k] for _ in range(n)])
    values = torch.rand(n, k, generator=generator, dtype=torch.float64) + 0.5
    signs = torch.randint(0, 2, (n, k), generator=generator) * 2 - 1
    return SparseActs(indices, values * signs if signed else values)


def weights(d_sae: int = 12, width: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(d_sae, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_linear_path_is_linear():
    acts, A = planted(), weights()
    found = linear_part(acts, interaction.weighted_rows(acts, A) + 2, 12, seed=0)
    assert found.r2 == pytest.approx(1, abs=1e-6)  # the smallest penalty, 1e-4, shrinks by about 1e-4 and squares that
    torch.testing.assert_close(found.weight, A, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.bias, torch.full((5,), 2.0, dtype=torch.float64), rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_a_path_without_products_and_gates_is_linear_in_what_it_reads():
    """Of an SAE: head "mlp", every gate open."""
    sae = joint(head="mlp")
    sae.b_1.data += 100
    tokens = token_paths(sae, activations(rows=600))
    found = linear_part(tokens.acts, tokens.paths.interaction, D_SAE, seed=0, top_n=3)
    assert found.r2 == pytest.approx(1, abs=1e-5)  # the smallest penalty shrinks
    assert linear_part(tokens.acts, tokens.paths.interaction, D_SAE, seed=0).r2 < 0.99  # all four are not what it reads


def test_products_of_independent_signs_are_not_linear():
    acts = planted()
    found = linear_part(acts, interaction.bi_interaction(acts, weights()), 12, seed=0)
    assert abs(found.r2) < 0.05  # 12 coefficients fitted to 900 tokens explain 1.3 % by chance


def test_products_of_features_that_are_never_negative_have_a_linear_part():
    acts = planted(signed=False)
    assert linear_part(acts, interaction.bi_interaction(acts, weights()), 12, seed=0).r2 > 0.1
    assert linear_part(acts, interaction.bi_interaction(acts, weights().abs()), 12, seed=0).r2 > 0.5


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_the_fit_is_scikit_learns_ridge(penalty):
    acts, documents = planted(n=300), torch.arange(300) // 10
    target = interaction.bi_interaction(acts, weights()) + interaction.weighted_rows(acts, weights(seed=2))
    dense = torch.zeros(300, 12, dtype=torch.float64).scatter_(1, acts.indices, acts.values).numpy()
    fit = divided(documents.numpy(), 0).fit
    spread = ((dense[fit] - dense[fit].mean(0)) ** 2).sum() / 12
    ridge = Ridge(alpha=penalty * spread).fit(dense[fit], target[fit].numpy())
    for solver in ("normal equations", "conjugate gradient"):
        found = linear_part(acts, target, 12, seed=0, documents=documents, penalties=[penalty], solver=solver)
        np.testing.assert_allclose(
            found.weight.numpy(), ridge.coef_.T, rtol=1e-4, atol=1e-5
        )  # conjugate gradient: 1e-6
        np.testing.assert_allclose(found.bias.numpy(), ridge.intercept_, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.predict(acts), torch.from_numpy(ridge.predict(dense)), rtol=1e-4, atol=1e-4)
    residual = target[found.test_tokens] - torch.from_numpy(ridge.predict(dense))[found.test_tokens]
    deviation = target[found.test_tokens] - target[fit].mean(0)
    assert found.r2 == pytest.approx(1 - float((residual**2).sum() / (deviation**2).sum()), rel=1e-5)


def test_the_penalty_is_the_best_on_the_second_part():
    acts = planted(n=60, d_sae=40)
    noisy = torch.randn(60, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = linear_part(acts, noisy, 40, seed=0)
    assert found.penalty >= 10  # nothing to be learnt
    assert max(found.validation_r2) == found.validation_r2[[1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100].index(found.penalty)]
    assert found.validation_r2[0] < -0.5


def test_no_document_is_in_two_parts():
    documents = np.repeat(np.arange(30), np.arange(30) + 1)
    parts = divided(documents, 0)
    found = [set(documents[part]) for part in (parts.fit, parts.validation, parts.test)]
    assert [len(one) for one in found] == [18, 6, 6]
    assert set.union(*found) == set(range(30))
    assert sorted(np.concatenate([parts.fit, parts.validation, parts.test])) == list(range(len(documents)))
    assert not np.array_equal(divided(documents, 1).test, parts.test)
    with pytest.raises(
        ValueError, match="4 documents cannot be divided into three parts of 60, 20 and 20 %; give at least 5"
    ):
        divided(np.arange(4), 0)


def test_only_the_strongest_features_are_read_when_asked():
    acts, A = planted(signed=False), weights()
    target = interaction.weighted_rows(interaction.top_n(acts, 2), A)
    assert linear_part(acts, target, 12, seed=0, top_n=2).r2 == pytest.approx(1, abs=1e-6)
    assert linear_part(acts, target, 12, seed=0).r2 < 0.99


def test_a_regression_that_cannot_be_is_refused():
    acts = planted(n=10)
    with pytest.raises(ValueError, match="10 tokens with features, 9 outputs; give one of each for every token"):
        linear_part(acts, torch.zeros(9, 3), 12, seed=0)
    with pytest.raises(ValueError, match=r"penalties are \(0.0,\); give at least one, all positive"):
        linear_part(acts, torch.zeros(10, 3), 12, seed=0, penalties=[0.0])


# Parts of the interaction path, spliced.


@pytest.fixture(scope="module")
def fitted(model):
    sae = inference_sae(training_config("joint_nfm"))
    x, _ = read_activations(model, sae, random_tokens(40))
    tokens = token_paths(sae, x)
    return sae, x, tokens, linear_part(tokens.acts, tokens.paths.interaction, D_SAE, seed=0)


@pytest.mark.parametrize("kept", ["linear", "residual"])
@torch.no_grad()
def test_a_part_in_place_of_the_path(kept, fitted):
    sae, x, tokens, part = fitted
    predicted = part.predict(tokens.acts)
    inter = {"linear": predicted, "residual": tokens.paths.interaction - predicted + part.mean}[kept]
    expected = tokens.paths._replace(interaction=inter).total()
    torch.testing.assert_close(part.reconstruct(sae, kept)(x), expected, rtol=1e-4, atol=1e-5)  # float32
    assert (inter - tokens.paths.interaction).abs().max() > 0.01
    assert not any(hook.fwd_hooks for hook in sae.hook_dict.values())


@torch.no_grad()
def test_parts_are_interventions_in_the_model(model, fitted):
    """The linear part alone as the model sees it: its logits are those of an SAE whose path is that linear map."""
    sae, _, _, part = fitted
    tokens = random_tokens(6)
    same = copy.deepcopy(sae)
    assert same.cfg.nfm_top_k == 3  # the linear path reads other features than the prediction, so compare through hooks
    with part.substitution(sae, "linear").on(model):
        found = model(tokens)
    arm = Splice(sae=sae)
    with (
        arm.on(model),
        model.hooks(
            fwd_hooks=[(f"{arm.hook_name}.{name}", function) for name, function in part.hooks("linear").items()]
        ),
    ):
        expected = model(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with arm.on(model):
        assert (model(tokens) - found).abs().max() > 1e-3
    one, other = (part.substitution(sae, kept).identity for kept in ("linear", "residual"))
    assert one != other


def test_an_sae_without_the_path_has_no_part_of_it(fitted):
    with pytest.raises(ValueError, match="an SAE without an interaction path has no linear part of it"):
        fitted[3].reconstruct(joint(head="none"), "linear")


# All figures.


@pytest.fixture(scope="module")
def figures():
    sae = joint(nfm_top_k=None, inference=True, rescale_acts_by_decoder_norm=False)
    x, documents = activations(rows=480), torch.arange(20).repeat_interleave(24)
    tokens = token_paths(sae, x, documents)
    return sae, tokens, functional_figures(sae, tokens, seed=0, n_permutations=99)


def test_figures_are_those_of_their_functions(figures):
    sae, tokens, found = figures
    paths, sizes = tokens.paths, path_sizes(tokens.paths)
    assert sum(share.estimate for share in found.magnitude_shares.values()) == pytest.approx(1)
    for name, share in found.magnitude_shares.items():
        assert share.estimate == pytest.approx(sizes.share(sizes.magnitude, name))
        assert share.n_clusters == 20
    added = paths.linear + paths.interaction
    one, two = found.inhibition, projection(added, paths.direct)
    assert one.fraction_negative.estimate == pytest.approx(two.fraction_negative)
    assert one.mean.estimate == pytest.approx(two.mean)
    free = projection(centred(paths.interaction), centred(paths.direct + paths.linear))
    assert found.gauge_free_inhibition.mean.estimate == pytest.approx(free.mean, rel=1e-5)
    gains = squared_error_gains(tokens.x, paths)
    assert found.gains.overlap.estimate == pytest.approx(gains.overlap.mean() / gains.base.mean())
    per_document = gains.overlap.reshape(20, 24).mean(1)  # equal documents: a t-test over their means
    assert found.gains.overlap.p_value == pytest.approx(ttest_1samp(per_document, 0).pvalue)
    pairs = pair_projections(tokens.read, tokens.gates, sae.W_dec, sae.V, sae.W_1, sae.W_2)
    assert found.pairs.fraction_negative.estimate == pytest.approx(pairs.fraction_negative)
    assert found.pairs.negative_strength.estimate == pytest.approx(pairs.fraction_negative_strength)


@torch.no_grad()
def test_the_residual_is_what_the_linear_map_leaves(figures):
    sae, tokens, found = figures
    residual, chosen = found.residual, found.residual.part.test_tokens
    assert residual.r2.estimate == pytest.approx(residual.part.r2)
    x_hat = residual.part.reconstruct(sae, "linear")(tokens.x)
    linear = (tokens.x - x_hat)[chosen].square().sum()
    whole = (tokens.x - sae(tokens.x))[chosen].square().sum()
    assert residual.gain_of_residual.estimate == pytest.approx(float(1 - whole / linear))
    assert residual.r2.low < residual.r2.estimate < residual.r2.high
    assert residual.gain_of_residual.estimate != pytest.approx(residual.gain_of_path.estimate, rel=1e-2)
