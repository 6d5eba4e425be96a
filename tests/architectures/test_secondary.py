"""A secondary SAE in place of the hidden code: by a naive formula, in language models, off again, and what is refused."""

import copy

import pytest
import torch
from builders import (
    ARCHITECTURES,
    D_MODEL,
    HOOK,
    inference_sae,
    random_activations,
    random_sae,
    tiny_model,
    token_dataset,
    training_config,
)
from sae_lens import SAE, TopKTrainingSAEConfig, TranscoderConfig
from sae_lens.saes.transcoder import Transcoder
from secondary_inputs import (
    ACTS,
    ERROR,
    NFM_DIM,
    RECONS,
    ROUNDING,
    ROUNDING32,
    K,
    clamp,
    hidden_of,
    interaction,
    naive_acts,
    naive_decode,
    secondary_sae,
)

from sae_nfm.architectures.secondary import (
    PRIMARY_DIGEST,
    Secondary,
    attach_secondary,
    detach_secondary,
    primary_digest,
    secondary_of,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(torch.float64).requires_grad_(False)


@pytest.fixture(params=ARCHITECTURES)
def primary(request):
    return inference_sae(training_config(request.param, dtype="float64")).requires_grad_(False)


@pytest.fixture
def secondary():
    return secondary_sae()


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor(token_dataset(4)["tokens"])


def test_the_reconstruction_goes_on_in_place_of_the_hidden_code(primary, secondary):
    x = random_activations().double()
    hidden, before = hidden_of(primary, x), primary(x)
    recons = naive_decode(secondary, naive_acts(secondary, hidden))
    with attach_secondary(primary, secondary):
        found = primary(x)
    expected = before - interaction(primary, hidden) + interaction(primary, recons)
    torch.testing.assert_close(found, expected, **ROUNDING)
    assert (found - before).abs().max() > 0.1


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_error_term_gives_the_hidden_code_back(primary, normalize):
    """Also where a secondary SAE's decoding forgets what its encoding remembered."""
    secondary, x = secondary_sae(normalize_activations=normalize), random_activations().double()
    before = primary(x)
    with attach_secondary(primary, secondary, error_term=True):
        torch.testing.assert_close(primary(x), before, **ROUNDING)
        with primary.hooks(fwd_hooks=[(ACTS, clamp)]):
            assert (primary(x) - before).abs().max() > 0.1
    with attach_secondary(primary, secondary):
        assert (primary(x) - before).abs().max() > 0.1


def test_error_term_has_no_gradient(primary, secondary):
    hidden = random_activations(d_in=NFM_DIM).double().requires_grad_()
    (expected,) = torch.autograd.grad(secondary.decode(secondary.encode(hidden)).sum(), hidden)
    attach_secondary(primary, secondary, error_term=True)
    (found,) = torch.autograd.grad(secondary_of(primary)(primary, hidden).sum(), hidden)
    torch.testing.assert_close(found, expected, **ROUNDING)


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("use_error_term", [False, True])
def test_a_clamped_feature_does_what_the_formula_predicts(
    model, primary, secondary, tokens, error_term, use_error_term
):
    """Under the primary's error term too, which SAELens computes with the primary's hooks switched off."""
    clean = model(tokens)
    with (
        attach_secondary(primary, secondary, error_term=error_term),
        model.saes([primary], use_error_term=use_error_term),
    ):
        logits, before = model.run_with_cache(tokens)
        with model.hooks(fwd_hooks=[(f"{HOOK}.{ACTS}", clamp)]):
            edited, after = model.run_with_cache(tokens)
    hidden, acts = before[f"{HOOK}.hook_nfm_hidden_pre"], before[f"{HOOK}.{ACTS}"]
    torch.testing.assert_close(acts, naive_acts(secondary, hidden), **ROUNDING)
    recons, changed = naive_decode(secondary, acts), naive_decode(secondary, clamp(acts, None))
    error = hidden - recons if error_term else 0.0
    predicted = interaction(primary, changed + error) - interaction(primary, recons + error)
    measured = after[f"{HOOK}.hook_sae_output"] - before[f"{HOOK}.hook_sae_output"]
    torch.testing.assert_close(measured, predicted, **ROUNDING)
    assert (edited - logits).abs().max() > 0.01
    if use_error_term:  # the model does what it does when the prediction is added at the hook point
        torch.testing.assert_close(logits, clean, **ROUNDING)
        shifted = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda value, hook: value + predicted)])
        torch.testing.assert_close(edited, shifted, **ROUNDING)


def test_features_reconstruction_and_error_are_in_the_cache(model, primary, secondary, tokens):
    with attach_secondary(primary, secondary, error_term=True):
        _, cache = model.run_with_cache_with_saes(tokens, saes=[primary], use_error_term=False)
    _, without = model.run_with_cache_with_saes(tokens, saes=[primary], use_error_term=False)
    acts = cache[f"{HOOK}.{ACTS}"]
    assert acts.shape == (*tokens.shape, 24)
    assert (acts != 0).sum(-1).amax() == K
    torch.testing.assert_close(cache[f"{HOOK}.{RECONS}"], naive_decode(secondary, acts), **ROUNDING)
    total = cache[f"{HOOK}.{RECONS}"] + cache[f"{HOOK}.{ERROR}"]
    torch.testing.assert_close(total, cache[f"{HOOK}.hook_nfm_hidden_pre"], **ROUNDING)
    assert not any(f"{HOOK}.{name}" in without for name in (ACTS, RECONS, ERROR))


def test_detached_it_is_as_it_was_bit_for_bit(model, primary, secondary, tokens):
    def seen():
        state = [value.clone() for value in primary.state_dict().values()]
        return [model.run_with_saes(tokens, saes=[primary], use_error_term=False), *state]

    before, hooks, own = seen(), list(primary.hook_dict), secondary.state_dict()
    with attach_secondary(primary, secondary):
        assert not torch.equal(seen()[0], before[0])
    assert all(map(torch.equal, seen(), before))
    attach_secondary(primary, secondary)  # stays
    assert not torch.equal(seen()[0], before[0])
    detach_secondary(primary)
    assert all(map(torch.equal, seen(), before))
    assert list(primary.hook_dict) == hooks
    assert all(torch.equal(own[name], value) for name, value in secondary.state_dict().items())


def test_leaving_takes_off_only_what_entering_put_on(primary, secondary):
    other = secondary_sae()
    with attach_secondary(primary, secondary):
        detach_secondary(primary)
        attach_secondary(primary, other)
    assert secondary_of(primary).sae is other


def test_an_exception_takes_it_off(primary, secondary):
    with pytest.raises(KeyError), attach_secondary(primary, secondary):
        raise KeyError
    assert secondary_of(primary) is None


def test_hooks_on_the_secondary_itself_are_silent(primary, secondary):
    x = random_activations().double()
    with attach_secondary(primary, secondary):
        before = primary(x)
        with secondary.hooks(fwd_hooks=[("hook_sae_acts_post", clamp)]):
            assert torch.equal(primary(x), before)


def test_a_copy_has_its_own(primary, secondary):
    x = random_activations().double()
    attach_secondary(primary, secondary)
    attached, twin = primary(x), copy.deepcopy(primary)
    detach_secondary(primary)
    secondary.W_dec.zero_()
    torch.testing.assert_close(twin(x), attached, **ROUNDING)
    assert secondary_of(primary) is None


def test_it_is_no_part_of_the_primary(primary, secondary, tmp_path):
    names, parameters = list(primary.state_dict()), sum(p.numel() for p in primary.parameters())
    with attach_secondary(primary, secondary):
        assert list(primary.state_dict()) == names
        assert sum(p.numel() for p in primary.parameters()) == parameters
        primary.save_model(tmp_path)
    loaded, x = SAE.load_from_disk(tmp_path), random_activations().double()
    assert secondary_of(loaded) is None
    assert torch.equal(loaded(x), primary(x))


def test_it_keeps_its_type_and_follows_to_the_device(primary, secondary):
    attach_secondary(primary, secondary, error_term=True)
    primary.to(torch.float32)
    x = random_activations()
    found = primary(x)
    assert (found.dtype, secondary.dtype) == (torch.float32, torch.float64)
    detach_secondary(primary)
    torch.testing.assert_close(found, primary(x), **ROUNDING32)
    attached = Secondary(sae=secondary, error_term=True)
    hidden = torch.empty(2, NFM_DIM, device="meta")  # another device than the secondary's
    assert attached(primary, hidden).device.type == "meta"
    assert secondary.b_dec.device.type == "meta"


def test_refused_primaries(secondary):
    topk = inference_sae(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=32, k=4))
    with pytest.raises(ValueError, match=r"'topk'.*\binteraction path\b.*\bprimary\b"):
        attach_secondary(topk, secondary)
    with pytest.raises(ValueError, match=r"head 'none'.*interaction path"):
        attach_secondary(inference_sae(training_config("joint_nfm", head="none")), secondary)
    with pytest.raises(ValueError, match=r"\bprimary is in training\b"):
        attach_secondary(random_sae(training_config("joint_nfm")), secondary)


def test_refused_secondaries(primary, secondary):
    with pytest.raises(ValueError, match=r"\bd_in 6\b.*\bnfm_dim 8\b"):
        attach_secondary(primary, secondary_sae(d_in=6))
    with pytest.raises(ValueError, match=rf"trained at '{HOOK}'.*\bhook_nfm_hidden_pre\b"):
        attach_secondary(primary, secondary_sae(hook_name=HOOK))
    transcoder = Transcoder(TranscoderConfig(d_in=NFM_DIM, d_out=NFM_DIM, d_sae=24, apply_b_dec_to_input=False))
    with pytest.raises(ValueError, match="'transcoder'"):
        attach_secondary(primary, transcoder)
    attach_secondary(primary, secondary_sae(hook_name=None))
    with pytest.raises(ValueError, match=r"\battached already\b.*\bdetach_secondary\b"):
        attach_secondary(primary, secondary)
    detach_secondary(primary)
    with pytest.raises(ValueError, match=r"\bno secondary SAE\b.*\bdetach\b"):
        detach_secondary(primary)
    assert secondary_of(primary) is None


def test_a_secondary_knows_its_primary(primary, secondary):
    secondary.cfg.metadata[PRIMARY_DIGEST] = primary_digest(primary)
    with attach_secondary(primary, secondary):
        pass
    primary.W_1[0, 0] += 1
    with pytest.raises(ValueError, match=rf"another primary .*{primary_digest(primary)}.*primary_digest = None"):
        attach_secondary(primary, secondary)
    secondary.cfg.metadata[PRIMARY_DIGEST] = None
    with attach_secondary(primary, secondary):
        pass


def test_the_digest_does_not_depend_on_the_type_it_is_loaded_in():
    sae = inference_sae(training_config("joint_nfm"))
    before = primary_digest(sae)
    assert primary_digest(copy.deepcopy(sae).to(torch.float64)) == before
    sae.b_1.data[0] += 1e-3
    assert primary_digest(sae) != before
