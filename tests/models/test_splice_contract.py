"""A loaded SAE inside a language model: splice, hooks, interventions, SAELens's evaluation and ours."""

import math

import pytest
import torch
from builders import (
    ARCHITECTURES,
    CONTEXT,
    D_MODEL,
    HOOK,
    HOOK_Z,
    NFM_HOOKS,
    NFM_READS,
    inference_sae,
    random_sae,
    runner_config,
    tiny_model,
    token_dataset,
    training_config,
)
from sae_lens import SAE, ActivationsStore, LanguageModelSAETrainingRunner, MatchingPursuitTrainingSAEConfig
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.util import temporary_seed

from sae_nfm.evaluation.fidelity import Arm, evaluate
from sae_nfm.interventions import Edit, Splice

for_every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
ROUNDING = {"atol": 1e-12, "rtol": 0}  # float64, values of size 1 to 10


@pytest.fixture(scope="module")
def model():
    """In float64, so that "exactly" can be told from "nearly"."""
    return tiny_model(torch.float64)


@pytest.fixture(scope="module")
def model32():
    return tiny_model()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def sae(request):
    return inference_sae(training_config(request.param, dtype="float64"))


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor(token_dataset(8)["tokens"])


def clamp(value, hook):
    """The first feature or dimension held at 2."""
    value = value.clone()
    value[..., 0] = 2.0
    return value


def pooled_pairs(f, V):
    """The sum over pairs i < j of f_i f_j v_i*v_j, pair by pair."""
    i, j = torch.triu_indices(len(V), len(V), offset=1)
    return torch.einsum("...p,pd->...d", f[..., i] * f[..., j], V[i] * V[j])


def predicted_change(sae, hook_name, before):
    """What the intervention `clamp` adds to the SAE's output, from the weights."""
    after = clamp(before, None)
    if hook_name == "hook_sae_acts_post":
        return sae.decode(after) - sae.decode(before)
    if hook_name == "hook_nfm_linear_in":
        return (after - before) @ sae.W_lin
    if hook_name == "hook_nfm_square_in":
        return (after.square() - before.square()) @ sae.U / sae.cfg.square_scale
    if hook_name == "hook_nfm_interaction_in":
        before, after = (pooled_pairs(f, sae.V) for f in (before, after))
    if hook_name in ("hook_nfm_interaction_in", "hook_nfm_pooled"):
        before, after = (pooled @ sae.W_1 + sae.b_1 for pooled in (before, after))
    if hook_name in ("hook_nfm_interaction_in", "hook_nfm_pooled", "hook_nfm_hidden_pre"):
        before, after = (hidden.relu() @ sae.W_2 + sae.b_2 for hidden in (before, after))
    return after - before


@torch.no_grad()
def test_error_term_restores_the_model(model, sae, tokens):
    clean = model(tokens)
    with_error = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    torch.testing.assert_close(with_error, clean, **ROUNDING)
    without = model.run_with_saes(tokens, saes=[sae], use_error_term=False)
    assert (without - clean).abs().max() > 0.1
    torch.testing.assert_close(model(tokens), clean, **ROUNDING)  # the splice is gone


@torch.no_grad()
def test_nfm_hooks_are_in_the_cache(model, sae, tokens):
    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=False)
    widths = {
        "hook_nfm_pooled": sae.cfg.nfm_dim,
        "hook_nfm_hidden_pre": sae.cfg.nfm_dim,
        **dict.fromkeys(NFM_READS, sae.cfg.d_sae),
    }
    for name in NFM_HOOKS:
        assert cache[f"{HOOK}.{name}"].shape == (*tokens.shape, widths.get(name, sae.cfg.d_in))
    direct = sae.decode_paths(cache[f"{HOOK}.hook_sae_acts_post"]).direct
    paths = sum(cache[f"{HOOK}.hook_nfm_{name}"] for name in ("linear", "square", "interaction"))
    torch.testing.assert_close(cache[f"{HOOK}.hook_sae_recons"], direct + paths, **ROUNDING)


@torch.no_grad()
@pytest.mark.parametrize("use_error_term", [True, False])
@pytest.mark.parametrize("hook_name", ["hook_sae_acts_post", *NFM_HOOKS])
def test_intervention_has_the_predicted_effect(model, sae, tokens, hook_name, use_error_term):
    """The error term is computed with hooks off; a hook it cannot switch off would cancel its own intervention."""
    with model.saes([sae], use_error_term=use_error_term):
        logits, before = model.run_with_cache(tokens)
        with model.hooks(fwd_hooks=[(f"{HOOK}.{hook_name}", clamp)]):
            edited_logits, after = model.run_with_cache(tokens)
    predicted = predicted_change(sae, hook_name, before[f"{HOOK}.{hook_name}"])
    measured = after[f"{HOOK}.hook_sae_output"] - before[f"{HOOK}.hook_sae_output"]
    torch.testing.assert_close(measured, predicted, **ROUNDING)
    assert (edited_logits - logits).abs().max() > 0.01
    if use_error_term:  # then the model does what it does when the prediction is added at the hook point
        shifted = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda value, hook: value + predicted)])
        torch.testing.assert_close(edited_logits, shifted, **ROUNDING)


@torch.no_grad()
def test_special_tokens_bypass_the_splice(model, sae, tokens):
    with model.saes([sae], use_error_term=False, exclude_special_tokens=True):
        _, spliced = model.run_with_cache(tokens)
    _, clean = model.run_with_cache(tokens)
    torch.testing.assert_close(spliced[f"{HOOK}.hook_sae_output"][:, 0], clean[HOOK][:, 0], **ROUNDING)
    assert (spliced[f"{HOOK}.hook_sae_output"][:, 1:] - clean[HOOK][:, 1:]).abs().max() > 0.1


@for_every_architecture
def test_activations_store_from_a_loaded_sae(architecture, model32, tokens, tmp_path):
    inference_sae(training_config(architecture)).save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    store = ActivationsStore.from_sae(
        model32, loaded, token_dataset(8), train_batch_size_tokens=32, n_batches_in_buffer=8, total_tokens=64
    )
    _, cache = model32.run_with_cache(tokens)
    torch.testing.assert_close(store.get_activations(store.get_batch_tokens(8)), cache[HOOK].detach())
    with temporary_seed(0):
        batch = store.next_batch()
    distances = torch.cdist(batch, cache[HOOK].flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist")
    assert batch.shape == (32, 16)
    assert distances.min(dim=1).values.max() < 1e-5  # each is the activation of some token
    assert loaded(batch).isfinite().all()


@for_every_architecture
@pytest.mark.parametrize("hook_name", [HOOK, HOOK_Z])
def test_saelens_evaluation_agrees_with_ours(architecture, hook_name, model32, tokens, tmp_path):
    inference_sae(training_config(architecture, hook_name)).save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    # The dataset is one batch long, so that every batch of SAELens's is all of it.
    store = ActivationsStore.from_sae(model32, loaded, token_dataset(8), total_tokens=8)
    config = get_eval_everything_config(batch_size_prompts=8, n_eval_reconstruction_batches=1)
    # SAELens averages over all tokens, BOS included, unless special tokens are excluded; evaluate always leaves out
    # special tokens and position 0, which here is BOS. SAELens's losses also lack the last position, as ours do.
    theirs, features = run_evals(loaded, store, model32, ActivationScaler(), config, exclude_special_tokens=True)
    numbers = {name: number for group in theirs.values() for name, number in group.items()}
    assert all(math.isfinite(number) for number in numbers.values())
    assert {len(values) for values in features.values()} == {loaded.cfg.d_sae}
    ours = evaluate(model32, tokens, [Arm(name="sae", sae=loaded)], batch_rows=3, show_progress=False)["sae"]
    assert ours.tokens == 8 * (CONTEXT - 1)
    original = ours.ce_nats - ours.ce_delta_nats
    assert {
        "kl_div_with_sae": ours.kl_nats,
        "ce_loss_with_sae": ours.ce_nats,
        "ce_loss_without_sae": original,
        "explained_variance": 1 - ours.fvu,
        "l0": ours.l0,
    } == pytest.approx(
        {name: numbers[name] for name in numbers if name in _COMPARED}, rel=1e-5, abs=1e-5
    )  # float32 logits
    assert ours.kl_nats > 0.01


_COMPARED = ("kl_div_with_sae", "ce_loss_with_sae", "ce_loss_without_sae", "explained_variance", "l0")


@for_every_architecture
def test_hook_z_from_training_to_splice(architecture, model32, tokens, tmp_path):
    cfg = training_config(architecture, HOOK_Z)
    with temporary_seed(0):
        trained = LanguageModelSAETrainingRunner(
            runner_config(cfg, tmp_path, steps=3), override_model=model32, override_dataset=token_dataset(64)
        ).run()
    loaded = SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        clean, cache = model32.run_with_cache(tokens)
        with_error = model32.run_with_saes(tokens, saes=[loaded], use_error_term=True)
        torch.testing.assert_close(with_error, clean, atol=1e-5, rtol=0)  # float32 logits of size 1
        _, spliced = model32.run_with_cache_with_saes(tokens, saes=[loaded], use_error_term=False)
    heads = spliced[f"{HOOK_Z}.hook_sae_output"]
    assert heads.shape == (8, CONTEXT, 2, 8)
    torch.testing.assert_close(heads.flatten(-2), trained(cache[HOOK_Z].flatten(-2)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_codes_of_matching_pursuit_are_counted_and_edited(trained, model32, tokens):
    """SAELens's own encode passes no hook point, so that an edit there would do nothing."""
    metadata = SAEMetadata(model_name="tiny", hook_name=HOOK)
    settings = {"max_iterations": 4, "decoder_init_norm": 1.0, "metadata": metadata}
    cfg = MatchingPursuitTrainingSAEConfig(d_in=D_MODEL, d_sae=48, **settings)
    sae = random_sae(cfg) if trained else inference_sae(cfg)
    seen = []
    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda value, hook: seen.append(value))]):
        sae(tokens.new_ones(2, cfg.d_in).float())
    assert not seen, "SAELens has the hook point now: leave ours out"
    x = model32.run_with_cache(tokens, names_filter=[HOOK])[1][HOOK][:, 1:]
    found = evaluate(model32, tokens, [Arm(name="pursuit", sae=sae)], show_progress=False)["pursuit"]
    assert found.l0 == pytest.approx((sae.encode(x) != 0).sum(-1).double().mean().item())
    spliced = Splice(sae=sae, edits=[Edit(at="hook_sae_acts_post", index=3, mode="clamp", value=2.0)])
    clamped = sae.encode(x)
    clamped[..., 3] = 2.0
    torch.testing.assert_close(spliced.reconstruct(x), sae.decode(clamped), atol=1e-5, rtol=0)
    with spliced.on(model32) as trace:
        model32(tokens)
    assert (trace.acts[:, 1:, 3] == 2).all()
    assert "encode" not in vars(sae)
