"""An SAE of one head, spliced, edited, attributed, explored and controlled: the other heads keep their bits."""

import pytest
import torch
from builders import inference_sae, rows_of_tokens, training_config
from sae_lens.saes.sae import SAEMetadata
from tiny_models import write_checkpoint

from sae_nfm.attribution.pair_effects import Target, attribute_token, run_prompt
from sae_nfm.attribution.pair_table import Corpus, pair_sums
from sae_nfm.evaluation.fidelity import Arm, evaluate
from sae_nfm.explorer.run import explore
from sae_nfm.interventions import Edit, Splice, control_arms, fit_activations, path_means
from sae_nfm.interventions.edits import editing
from sae_nfm.interventions.steering import compare_steering
from sae_nfm.models import load_model, site_at, splice

KINDS = {"HookedTransformer": "blocks.0.attn.hook_{}", "TransformerBridge": "blocks.0.attn.{}.hook_out"}
OUTPUT = {"HookedTransformer": "blocks.0.attn.hook_z", "TransformerBridge": "blocks.0.attn.o.hook_in"}
D_HEAD = {"gpt2": 8, "llama": 12}
CLAMP = Edit(at="hook_sae_acts_post", index=1, mode="clamp", value=6.0, where=2)
ROUNDING = {"atol": 3e-5, "rtol": 0}  # float32 through two blocks


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("heads"), {}
    for family in D_HEAD:
        at = write_checkpoint(folder / family, family)
        for kind in KINDS:
            found[family, kind] = load_model(at, model_class_name=kind).requires_grad_(False)
    return found


def head_sae(family, at, head):
    metadata = SAEMetadata(model_name="tiny", hook_name=at, hook_head_index=head, context_size=16, prepend_bos=True)
    cfg = training_config("joint_nfm", at, d_in=D_HEAD[family], reshape_activations="none", metadata=metadata)
    return inference_sae(cfg).requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "kind", "of", "head"),
    [
        *(("gpt2", kind, "z", 1) for kind in KINDS),
        ("llama", "TransformerBridge", "k", 0),
        *(pytest.param("llama", kind, of, 0, marks=pytest.mark.slow) for kind in KINDS for of in "zqkv"),
    ],
)
def test_only_that_head_changes(models, family, kind, of, head):
    """Against a hook function by hand, with and without an error term; llama has one head of keys and values."""
    model, tokens = models[family, kind], rows_of_tokens()
    at = OUTPUT[kind] if of == "z" else KINDS[kind].format(of)
    sae, d = head_sae(family, at, head), D_HEAD[family]
    clean, special = model(tokens), (tokens == 0)[..., None]
    for use_error_term in (False, True):
        arm, seen = Splice(sae=sae, edits=[CLAMP], use_error_term=use_error_term), {}
        with arm.on(model) as trace:
            found = model(tokens)
        alone = Splice(sae=sae, use_error_term=use_error_term)
        edited = arm.reconstruct(trace.x)
        expected = torch.where(special, trace.x, edited)
        torch.testing.assert_close(trace.x_hat, expected, **ROUNDING)

        def by_hand(value, hook, expected=expected, seen=seen):
            heads = (value.unflatten(-1, (-1, d)) if value.ndim == 3 else value).clone()
            seen["x"] = heads[:, :, head].clone()
            heads[:, :, head] = expected
            return heads.reshape(value.shape)

        by_hand_logits = model.run_with_hooks(tokens, fwd_hooks=[(at, by_hand)])
        torch.testing.assert_close(found, by_hand_logits, **ROUNDING)
        assert torch.equal(seen["x"], trace.x)
        with alone.on(model):
            assert bool((model(tokens) - clean).abs().max() < 1e-4) is use_error_term
        assert (found - clean).abs().max() > 0.01
    assert torch.equal(model(tokens), clean)
    site = site_at(model, at, head)
    assert site.d_in == d
    with pytest.raises(ValueError, match=r"hook_head_index is 7; .* has heads 0 to [01]"):
        site_at(model, at, 7)
    with pytest.raises(ValueError, match=r"hook_head_index is 0.*no heads"):
        site_at(model, "blocks.0.hook_resid_post", 0)


@torch.no_grad()
def test_others_keep_their_bits(models):
    model, tokens = models["gpt2", "HookedTransformer"], rows_of_tokens()
    at = OUTPUT["HookedTransformer"]
    sae = head_sae("gpt2", at, 1)
    _, before = model.run_with_cache(tokens, names_filter=[at])
    with splice(model, sae, "changed"):
        out = model.blocks[0].attn.hook_z(before[at])
    assert torch.equal(out[:, :, 0], before[at][:, :, 0])
    assert not torch.equal(out[:, :, 1], before[at][:, :, 1])


@pytest.mark.parametrize("kind", ["HookedTransformer", pytest.param("TransformerBridge", marks=pytest.mark.slow)])
def test_everything_that_takes_an_sae_takes_one_of_a_head(models, kind, tmp_path):
    model, tokens = models["gpt2", kind], rows_of_tokens()
    at = OUTPUT[kind]
    sae = head_sae("gpt2", at, 1)
    fidelity = evaluate(model, tokens, [Arm(name="sae", sae=sae)], show_progress=False)["sae"]
    run = run_prompt(model, sae, tokens[2])
    target = Target.logit(3, run.logits.shape[-1], "t3")
    one = attribute_token(model, sae, run, 5, target, top=2)
    assert one.pairs_firing > 0
    assert one.sum_error < 1e-4
    with Splice(sae=sae).on(model) as trace, torch.no_grad():
        model(tokens)
    assert trace.x.shape == (3, 16, 8)
    sums = pair_sums(Corpus(model, sae, tokens, show_progress=False))
    found = explore(model, sae, tokens, name="head", show_progress=False)
    assert found.pairs.fired == len(sums.table) > 0
    assert found.tokens == fidelity.tokens
    activations = fit_activations(model, tokens, at, head=1)
    arms = control_arms(Splice(sae=sae), activations)
    with torch.no_grad(), arms["error x 1"].on(model) as by_control:
        logits = model(tokens)
    with torch.no_grad(), arms["sae"].on(model):
        torch.testing.assert_close(logits, model(tokens), **ROUNDING)
    assert by_control.x.shape == (3, 16, 8)
    with pytest.raises(ValueError, match="head 1"):
        control_arms(Splice(sae=sae), fit_activations(model, tokens, at, head=0))
    assert path_means(model, sae, tokens, ["hook_nfm_linear"])["hook_nfm_linear"].shape == (8,)
    pair = next(pair for pair in zip(*sums.features(), strict=True))
    steered = compare_steering(model, sae, tuple(map(int, pair)), tokens, alphas=[1.0], show_progress=False)
    assert all(row.kl_nats > 0 for row in steered.rows)
    model.add_sae(sae)
    try:
        with pytest.raises(ValueError, match="in place of all heads"), editing(model, sae, [CLAMP]):
            pass
    finally:
        model.reset_saes()
        model.hook_dict[at].name = at
