"""The controls: each at the distance of the arm under test, and what else each of them promises."""

from functools import partial

import numpy as np
import pytest
import torch
from builders import CONTEXT, D_MODEL, D_VOCAB, HOOK, inference_sae, tiny_model, training_config
from planted import linear_model, planted_sae
from tiny_models import write_checkpoint

from sae_nfm.data.documents import TokenRows
from sae_nfm.evaluation.error_controls import error_ratios
from sae_nfm.evaluation.fidelity import measure, outcomes
from sae_nfm.evaluation.token_table import document_sums, read_rows
from sae_nfm.interventions.equal_norm_controls import (
    SCALES,
    Activations,
    anchors,
    control_arms,
    covariance,
    fit_activations,
    isotropic,
    mixture,
    norm_kept,
    scaled,
    shuffled,
)
from sae_nfm.interventions.intervene import Splice, Substitution, counted_tokens
from sae_nfm.interventions.results import EQUAL_DISTANCE
from sae_nfm.models.load import load_model

RANDOM = ("isotropic", "isotropic, norm kept", "covariance", "covariance mixture", "shuffled error")
# float32 vectors of length 1 to 10: x + e - x loses as much
DISTANCE = {"rtol": 1e-5, "atol": 5e-6}


@pytest.fixture(scope="module")
def model():
    return tiny_model().requires_grad_(False)


@pytest.fixture(scope="module")
def sae():
    return inference_sae(training_config("joint_nfm")).requires_grad_(False)


def random_tokens(rows=4, seed=4):
    tokens = torch.randint(1, D_VOCAB, (rows, CONTEXT), generator=torch.Generator().manual_seed(seed))
    tokens[1:, 0] = 0  # the first row has no BOS
    tokens[1, 7] = 0
    return tokens


@pytest.fixture(scope="module")
def fitted(model):
    return fit_activations(model, random_tokens(rows=8, seed=5), HOOK, batch_rows=3)


@pytest.fixture(scope="module")
def arms(sae, fitted):
    return control_arms(Splice(sae=sae), fitted)


def generators(arms, seed=0):
    return {name: torch.Generator().manual_seed(seed + number) for number, name in enumerate(arms)}


def replaced(rule, x, x_hat, seed=0):
    return rule(x, x_hat - x, torch.Generator().manual_seed(seed))


def activations(mean, covariance):
    return Activations(hook_name=HOOK, mean=mean.double(), covariance=covariance.double(), tokens=9)


UNIT = activations(torch.zeros(8), torch.eye(8))
RULES = (
    isotropic,
    norm_kept,
    partial(covariance, UNIT),
    partial(mixture, UNIT),
    shuffled,
    partial(scaled, -1.0),
)
"""Those that keep the distance."""


def pairs(n=500, d=8, scale=0.5, seed=1):
    """Activations with a mean, and reconstructions at distances of `scale` times their size, more or less."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(n, d, generator=generator) + 1
    direction = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=-1)
    return x, x + scale * torch.rand(n, 1, generator=generator) * x.norm(dim=-1, keepdim=True) * direction


@pytest.mark.parametrize("rule", RULES, ids=EQUAL_DISTANCE)
@pytest.mark.parametrize("scale", [1e-4, 0.5, 3.0])
def test_every_control_keeps_the_distance(rule, scale):
    """Distances up to three times |x|: more than a point of the same norm can have."""
    x, x_hat = pairs(scale=scale)
    found = replaced(rule, x, x_hat)
    torch.testing.assert_close((found - x).norm(dim=-1), (x_hat - x).norm(dim=-1), **DISTANCE)
    assert ((found - x_hat).norm(dim=-1) > 1e-2 * (x_hat - x).norm(dim=-1)).all()  # and is not the arm under test


def test_keeping_the_norm():
    """By hand: x = (3, 4), r = 5 sqrt 2 is a quarter turn, (4, -3) or (-4, 3); r = 10 is -x; r = 12 is x - 12 x/5."""
    x = torch.tensor([[3.0, 4.0]]).repeat(3, 1)
    e = torch.tensor([[5.0, 5.0], [10.0, 0.0], [0.0, -12.0]])
    turned, opposite, beyond = replaced(norm_kept, x, x + e).tolist()
    assert turned in (pytest.approx([4, -3], abs=1e-5), pytest.approx([-4, 3], abs=1e-5))
    assert opposite == pytest.approx([-3, -4], abs=1e-5)
    assert beyond == pytest.approx(
        [-4.2, -5.6], abs=1e-5
    )  # of all points at distance 12, the one with norm nearest to 5


@pytest.mark.parametrize("scale", [1e-4, 0.5, 1.9])
def test_the_norm_is_kept(scale):
    x, x_hat = pairs(scale=scale)
    found = replaced(norm_kept, x, x_hat)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1), **DISTANCE)


def test_directions_are_uniform():
    """In d dimensions u_i^2 has mean 1/d and variance 2 (d - 1) / (d^2 (d + 2)), and u_i u_j and u_i have mean 0."""
    n, d = 20_000, 4
    x, x_hat = torch.full((n, d), 2.0), torch.full((n, d), 5.0)
    u = (replaced(isotropic, x, x_hat) - x) / 6
    five_errors = 5 * (2 * (d - 1) / (d**2 * (d + 2)) / n) ** 0.5
    torch.testing.assert_close(u.T @ u / n, torch.eye(d) / d, atol=five_errors, rtol=0)
    torch.testing.assert_close(u.mean(0), torch.zeros(d), atol=5 * (1 / d / n) ** 0.5, rtol=0)
    x_hat = x + 0.1  # on the sphere of radius |x|: around x, no direction across x is preferred
    change = replaced(norm_kept, x, x_hat) - x
    across = change - (change @ torch.ones(d) / d)[:, None]
    assert (across.mean(0) / across.norm(dim=-1).mean()).norm() < 5 / n**0.5


def test_covariance_noise_points_where_activations_do():
    """With variances 9, 1, 0 no noise along the third axis, and E[g_1^2 / |g|^2] = 3 / (3 + 1), the ratio of deviations."""
    n, spread = 20_000, torch.diag(torch.tensor([9.0, 1.0, 0.0], dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    fitted = activations(torch.tensor([1.0, 2.0, 3.0]), turn @ spread @ turn.T)
    torch.testing.assert_close(fitted.root @ fitted.root.T, fitted.covariance)
    x = torch.ones(n, 3)
    u = (replaced(partial(covariance, fitted), x, x + 1) - x) / 3**0.5 @ turn.float()
    assert u[:, 2].abs().max() < 1e-3  # float32 roots of an eigenvalue that is zero up to rounding
    assert u.square().mean(0)[0] == pytest.approx(0.75, abs=5 * (0.12 / n) ** 0.5)  # its variance is at most 0.12
    mixed = replaced(partial(mixture, fitted), x, x + 1) - x
    noise = fitted.noise(n, torch.Generator().manual_seed(0)) + torch.tensor([0.0, 1.0, 2.0])  # y - x
    torch.testing.assert_close(mixed, 3**0.5 * torch.nn.functional.normalize(noise, dim=-1), **DISTANCE)


def test_shuffled_errors_are_those_of_other_tokens():
    x, x_hat = pairs(n=40)
    x_hat[7] = x[7]  # an error of zero: no direction for the token that gets it, no distance for its own
    found = replaced(shuffled, x, x_hat) - x
    own = torch.nn.functional.normalize(x_hat - x, dim=-1)
    cosines = torch.nn.functional.normalize(found, dim=-1) @ own.T
    assert (cosines.max(dim=1).values > 0.9999).sum() == 38  # but for token 7, and the one that got its error
    givers = cosines.argmax(dim=1)[cosines.max(dim=1).values > 0.9999]
    assert len(set(givers.tolist())) == 38  # nobody's error twice
    assert not (cosines.diagonal() > 0.9999).any()  # nobody's own
    torch.testing.assert_close(found.norm(dim=-1), (x_hat - x).norm(dim=-1), **DISTANCE)


def test_flipped_and_scaled_errors():
    x, x_hat = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 0.0]])
    assert replaced(partial(scaled, -1.0), x, x_hat).tolist() == [[0.0, 4.0]]
    for scale, expected in {0.0: [1.0, 2.0], 0.25: [1.25, 1.5], 1.0: [2.0, 0.0], 2.0: [3.0, -2.0]}.items():
        assert replaced(partial(scaled, scale), x, x_hat).tolist() == [expected]


def test_arms_differ_at_counted_tokens_only(model, sae, arms):
    """Special tokens are as they were; a position 0 that is no special token is as in the arm under test."""
    tokens = random_tokens()
    with arms["sae"].on(model) as sae_trace:
        model(tokens)
    counted = counted_tokens(model, tokens)
    for name, arm in arms.items():
        with arm.on(model, torch.Generator().manual_seed(0)) as trace:
            model(tokens)
        assert torch.equal(trace.x_hat[tokens == 0], trace.x[tokens == 0]), name
        if name not in ("none", "zero", "mean"):
            torch.testing.assert_close(trace.x_hat[~counted], sae_trace.x_hat[~counted])
        if name in EQUAL_DISTANCE:
            distance = (sae_trace.x_hat - sae_trace.x).norm(dim=-1)
            torch.testing.assert_close((trace.x_hat - trace.x).norm(dim=-1), distance, **DISTANCE)
    assert set(arms) == {"sae", *EQUAL_DISTANCE, *(f"error x {scale:g}" for scale in SCALES), "none", "zero", "mean"}


def test_on_every_kind_of_model(tmp_path):
    """The same draws, so the same figures."""
    folder, tokens = write_checkpoint(tmp_path / "gpt2", "gpt2"), random_tokens()
    places = {None: HOOK, "TransformerBridge": "blocks.0.hook_out", "AutoModelForCausalLM": "transformer.h.0"}
    found = {}
    for kind, at in places.items():
        loaded = load_model(folder) if kind is None else load_model(folder, model_class_name=kind)
        sae = inference_sae(training_config("joint_nfm", at))
        arms = control_arms(Splice(sae=sae), fit_activations(loaded, random_tokens(8, seed=5), at))
        with torch.no_grad():
            found[kind] = dict(outcomes(loaded, tokens, arms, generators(arms)))
    usual = found.pop(None)
    assert max(float(outcome.kl_nats.max()) for outcome in usual.values()) > 1e-3  # else this says nothing
    for kind, outcomes_there in found.items():
        assert outcomes_there.keys() == usual.keys()
        for name, outcome in usual.items():
            there = outcomes_there[name].kl_nats
            torch.testing.assert_close(outcome.kl_nats, there, atol=2e-5, rtol=1e-4, msg=f"{kind}, {name}")  # float32


def test_mean_and_covariance_are_those_of_the_counted_tokens(model, fitted):
    tokens = random_tokens(rows=8, seed=5)
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    x = cache[HOOK][counted_tokens(model, tokens)].double().numpy()
    assert fitted.tokens == len(x) == 8 * 15 - 1
    np.testing.assert_allclose(fitted.mean, x.mean(0), rtol=1e-6, atol=1e-7)  # float32 sums within a batch
    np.testing.assert_allclose(fitted.covariance, np.cov(x, rowvar=False), rtol=1e-5, atol=1e-6)


def test_anchors(model, fitted):
    tokens = random_tokens()
    special = (tokens == 0)[..., None]
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    for name, value in {"none": cache[HOOK], "zero": torch.zeros(D_MODEL), "mean": fitted.mean.float()}.items():
        with anchors(fitted)[name].on(model) as trace:
            found = model(tokens)
        expected = torch.where(special, cache[HOOK], value.expand_as(cache[HOOK]))
        torch.testing.assert_close(trace.x_hat, expected)
        hooks = [(HOOK, lambda value, hook, expected=expected: expected)]
        torch.testing.assert_close(found, model.run_with_hooks(tokens, fwd_hooks=hooks))


def test_kl_of_small_isotropic_noise():
    """With linear logits, KL = 1/2 e F e^T to second order, F = W_U (diag p - p p^T) W_U^T, so its mean is r^2 tr F / (2 d)."""
    model, r, draws = linear_model(), 0.1, 400
    tokens = random_tokens(rows=2)[1:].expand(draws, CONTEXT)
    under_test = Splice(sae=planted_sae(torch.full((D_MODEL,), r / D_MODEL**0.5)))
    arms = control_arms(under_test, fit_activations(model, random_tokens(), HOOK))
    ((_, found),) = outcomes(model, tokens, {"isotropic": arms["isotropic"]}, generators(["isotropic"]))
    kl = found.kl_nats.reshape(draws, -1).double()
    p = model(tokens[:1])[counted_tokens(model, tokens[:1])].double().softmax(-1)
    w = model.W_U.double()
    trace = ((w.square() @ p.T) - (w @ p.T).square()).sum(0)
    expected = r**2 * trace / (2 * D_MODEL)
    errors = kl.std(0) / draws**0.5
    # five standard errors, and a third order of r |W_U| (0.02 relative)
    assert ((kl.mean(0) - expected).abs() < 5 * errors + 0.02 * expected).all()
    assert (errors < 0.05 * expected).all()


@pytest.fixture(scope="module")
def measured(model, arms, tmp_path_factory):
    """The rows of all arms in one run."""
    tokens = random_tokens(rows=6)
    documents = (torch.arange(6) // 2)[:, None].expand(tokens.shape).where(tokens != 0, -1)
    held_out = TokenRows(tokens=tokens, documents=documents)
    sizes = {"batch_rows": 2, "batches_per_part": 1, "show_progress": False}
    return measure(model, held_out, arms, tmp_path_factory.mktemp("controls") / "rows", **sizes)


def test_measured_rows_of_the_controls(measured, arms):
    """Distances, the ends of the sweep, and that nothing of an arm is left for the next."""
    rows = read_rows(measured)
    by_arm = {name: own.reset_index() for name, own in rows.groupby("arm", observed=True)}
    assert set(by_arm) == set(arms)
    for name in EQUAL_DISTANCE:
        np.testing.assert_allclose(by_arm[name]["error_norm"], by_arm["sae"]["error_norm"], rtol=1e-5)
    for scale in SCALES:
        norms = by_arm[f"error x {scale:g}"]["error_norm"]
        np.testing.assert_allclose(norms, scale * by_arm["sae"]["error_norm"], rtol=1e-5)
    assert not by_arm["none"][["kl_nats", "error_norm"]].any().any()
    np.testing.assert_allclose(by_arm["error x 1"]["kl_nats"], by_arm["sae"]["kl_nats"], rtol=1e-4, atol=2e-6)
    assert by_arm["mean"]["cosine"].notna().all()
    assert by_arm["zero"]["cosine"].eq(0).all()


def test_ratios_are_those_of_the_sums(measured):
    sums = document_sums(measured).groupby("arm", observed=True)["kl_nats"].sum()
    found = error_ratios(measured)
    assert list(found) == list(EQUAL_DISTANCE)
    for name, ratio in found.items():
        assert ratio.estimate == pytest.approx(sums["sae"] / sums[name], rel=1e-9)
        assert ratio.n_clusters == 3
    same = error_ratios(measured, "zero", ["zero"])["zero"]
    assert same.estimate == pytest.approx(1)
    with pytest.raises(ValueError, match=r"'isotropic, wide'.*\bsae, isotropic\b"):
        error_ratios(measured, controls=["isotropic, wide"])


def test_errors_say_what_is_wrong(model, sae, arms, fitted):
    for name in RANDOM:
        with pytest.raises(ValueError, match=r"\bgenerator\b"), arms[name].on(model):
            model(random_tokens())
    elsewhere = fit_activations(model, random_tokens(), "blocks.1.hook_resid_post")
    message = r"'blocks\.1\.hook_resid_post'.*\b16\b.*'blocks\.0"
    with pytest.raises(ValueError, match=message):
        control_arms(Splice(sae=sae), elsewhere)
    with pytest.raises(ValueError, match=r"\btwo tokens\b.*\b1 of 2\b"):
        fit_activations(model, torch.tensor([[0, 5]]), HOOK)
    assert len({arm.identity for arm in arms.values()}) == len(arms)
    again = control_arms(Splice(sae=sae), fit_activations(model, random_tokens(rows=6, seed=5), HOOK))
    changed = {name for name, arm in arms.items() if arm.identity != again[name].identity}
    assert changed == {"covariance", "covariance mixture", "mean"}
    assert all(isinstance(arm, Substitution) for name, arm in arms.items() if name != "sae")
