"""The hook points of what each path reads: what passes them, what editing it does, and that they cost nothing when not in use."""

import pytest
import torch
from builders import ARCHITECTURES, NFM_READS, inference_sae, random_activations, random_sae, training_config

from sae_nfm.kernels import dispatch

PATHS = ("linear", "square", "interaction")
EXACT = {"atol": 1e-12, "rtol": 0}  # float64, values of size 1 to 10
FORMS = pytest.mark.parametrize("kernel", ["dense", "sparse"])
for_every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def new_sae(architecture="joint_nfm", **overrides):
    return inference_sae(training_config(architecture, dtype="float64", **overrides)).requires_grad_(False)


def run(sae, acts, **hooks):
    """What decode's paths write, with functions at hook points."""
    with sae.hooks(fwd_hooks=list(hooks.items())):
        return sae.decode_paths(acts).present()


def passing(sae, acts):
    """What passes each hook point."""
    seen = {}
    run(sae, acts, **{name: lambda value, hook: seen.update({hook.name: value.clone()}) for name in NFM_READS})
    return seen


def features(sae):
    return sae.encode(random_activations().double())


@FORMS
@for_every_architecture
def test_what_passes_is_what_the_path_reads(architecture, kernel):
    """f for the square path, its three strongest for the others; from these the paths follow by their formulae."""
    sae = new_sae(architecture, kernel=kernel)
    acts = features(sae)
    seen, paths = passing(sae, acts), run(sae, acts)
    strongest = torch.zeros_like(acts).scatter(-1, *acts.topk(3, dim=-1)[::-1])
    assert torch.equal(seen["hook_nfm_square_in"], acts)
    assert torch.equal(seen["hook_nfm_linear_in"], strongest)
    assert torch.equal(seen["hook_nfm_interaction_in"], strongest)
    torch.testing.assert_close(paths["linear"], strongest @ sae.W_lin + sae.b_lin, **EXACT)
    torch.testing.assert_close(paths["square"], acts.square() @ sae.U / sae.cfg.square_scale, **EXACT)


@FORMS
@for_every_architecture
def test_a_hook_that_changes_nothing_changes_no_bit(architecture, kernel):
    sae = new_sae(architecture, kernel=kernel)
    acts = features(sae)
    plain, hooked = run(sae, acts), run(sae, acts, **dict.fromkeys(NFM_READS, lambda value, hook: value.clone()))
    assert all(torch.equal(plain[name], hooked[name]) for name in plain)


@FORMS
@pytest.mark.parametrize("path", PATHS)
@for_every_architecture
def test_an_edit_reaches_that_path_alone(architecture, path, kernel):
    """Active features made stronger, and a feature switched on that is not active: as if the path had been given these."""
    sae = new_sae(architecture, nfm_top_k=None, kernel=kernel)
    acts = features(sae)
    silent = int((acts != 0).any(0).logical_not().nonzero()[0, 0]) if (acts == 0).all(0).any() else 0
    lifted = 1.5 * acts
    lifted[:, silent] = 2.0
    plain = run(sae, acts)
    for edited in (1.5 * acts, lifted):
        found = run(sae, acts, **{f"hook_nfm_{path}_in": lambda value, hook, edited=edited: edited})
        torch.testing.assert_close(found[path], run(sae, edited)[path], **EXACT)
        assert (found[path] - plain[path]).abs().max() > 0.01
        assert all(torch.equal(found[name], plain[name]) for name in plain if name != path)


def test_an_edit_in_place_counts_too():
    def off(value, hook):
        value[..., :] = 0.0

    sae = new_sae(kernel="sparse")
    found = run(sae, features(sae), hook_nfm_linear_in=off)
    torch.testing.assert_close(found["linear"], sae.b_lin.expand_as(found["linear"]), **EXACT)


def test_without_hooks_no_matrix_is_made(monkeypatch):
    sae = new_sae(kernel="sparse")
    acts = features(sae)
    monkeypatch.setattr(dispatch, "to_dense", lambda *_: pytest.fail("a matrix of all features"))
    run(sae, acts)


@for_every_architecture
def test_gradients_pass_in_a_step(architecture):
    """A training step with hooks there is the step without, and its gradients arrive at the hook points."""
    losses, arrived = [], {}
    for hooked in (False, True):
        sae = random_sae(training_config(architecture, dtype="float64"))
        hooks = [(name, lambda grad, hook: arrived.update({hook.name: grad})) for name in NFM_READS]
        x = random_activations().double()
        with sae.hooks(bwd_hooks=hooks if hooked else []):
            loss = (sae(x) - x).square().sum()
            loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses, **EXACT)
    if architecture == "joint_nfm":  # a frozen base's features have no gradient
        assert set(arrived) == set(NFM_READS)
