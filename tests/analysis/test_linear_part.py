"""The linear part of the interaction path: planted linear and quadratic paths, and its parts spliced."""

import copy

import numpy as np
import pytest
import torch
from builders import D_SAE, inference_sae, tiny_model, training_config
from path_inputs import activations, joint, random_tokens
from sklearn.linear_model import Ridge

from sae_nfm.analysis.linear_component import divided, linear_part
from sae_nfm.analysis.path_contributions import read_activations, token_paths
from sae_nfm.interventions.intervene import Splice
from sae_nfm.kernels import reference
from sae_nfm.kernels.reference import SparseActs


@pytest.fixture(scope="module")
def model():
    return tiny_model()


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
    found = linear_part(acts, reference.weighted_rows(acts, A) + 2, 12, seed=0)
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
    found = linear_part(acts, reference.bi_interaction(acts, weights()), 12, seed=0)
    assert abs(found.r2) < 0.05  # 12 coefficients fitted to 900 tokens explain 1.3 % by chance


def test_products_of_features_that_are_never_negative_have_a_linear_part():
    acts = planted(signed=False)
    assert linear_part(acts, reference.bi_interaction(acts, weights()), 12, seed=0).r2 > 0.1
    assert linear_part(acts, reference.bi_interaction(acts, weights().abs()), 12, seed=0).r2 > 0.5


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_the_fit_is_scikit_learns_ridge(penalty):
    acts, documents = planted(n=300), torch.arange(300) // 10
    target = reference.bi_interaction(acts, weights()) + reference.weighted_rows(acts, weights(seed=2))
    dense = torch.zeros(300, 12, dtype=torch.float64).scatter_(1, acts.indices, acts.values).numpy()
    fit, _, _ = divided(documents.numpy(), 0)
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
    found = [set(documents[part]) for part in parts]
    assert [len(one) for one in found] == [18, 6, 6]
    assert set.union(*found) == set(range(30))
    assert sorted(np.concatenate(parts)) == list(range(len(documents)))
    assert not np.array_equal(divided(documents, 1)[2], parts[2])
    with pytest.raises(ValueError, match=r"\b4 documents\b.*\b5\b"):
        divided(np.arange(4), 0)


def test_only_the_strongest_features_are_read_when_asked():
    acts, A = planted(signed=False), weights()
    target = reference.weighted_rows(reference.top_n(acts, 2), A)
    assert linear_part(acts, target, 12, seed=0, top_n=2).r2 == pytest.approx(1, abs=1e-6)
    assert linear_part(acts, target, 12, seed=0).r2 < 0.99


def test_a_regression_that_cannot_be_is_refused():
    acts = planted(n=10)
    with pytest.raises(ValueError, match=r"\b10 tokens\b.*\b9 outputs\b"):
        linear_part(acts, torch.zeros(9, 3), 12, seed=0)
    with pytest.raises(ValueError, match=r"\bpenalties\b.*\(0\.0,\)"):
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
    with pytest.raises(ValueError, match=r"\binteraction path\b"):
        fitted[3].reconstruct(joint(head="none"), "linear")
