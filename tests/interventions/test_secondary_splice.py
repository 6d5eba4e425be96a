"""A secondary SAE within a splice, on every kind of model: as an intervention, by hook names, in figures."""

import pytest
import torch
from builders import inference_sae, tiny_model, token_dataset, training_config
from secondary_inputs import (
    ACTS,
    FEATURE,
    NFM_DIM,
    ROUNDING32,
    clamp,
    hidden_of,
    interaction,
    naive_acts,
    naive_decode,
    secondary_sae,
)
from tiny_models import write_checkpoint

from sae_nfm.architectures.secondary import attach_secondary, secondary_of
from sae_nfm.evaluation.fidelity import Arm, evaluate
from sae_nfm.interventions.edits import Edit
from sae_nfm.interventions.intervene import SecondarySplice, Splice, Substitution
from sae_nfm.models.load import load_model, resolve_hook_name


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor(token_dataset(4)["tokens"])


PLACES = {
    "HookedTransformer": "blocks.0.hook_resid_post",
    "TransformerBridge": "blocks.0.hook_out",
    "AutoModelForCausalLM": "transformer.h.0",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("secondary") / "gpt2", "gpt2")
    return {kind: load_model(folder, model_class_name=kind).requires_grad_(False) for kind in PLACES}


@pytest.mark.parametrize("kind", PLACES)
def test_spliced_on_every_kind_of_model(models, kind, tokens):
    model, secondary = models[kind], secondary_sae("float32")
    primary = inference_sae(training_config("joint_nfm", PLACES[kind])).requires_grad_(False)
    clean = model(tokens)
    with Splice(sae=primary).on(model) as trace:
        logits, x, x_hat = model(tokens), trace.x, trace.x_hat
    with SecondarySplice(sae=primary, secondary=secondary, error_term=True).on(model) as trace:
        torch.testing.assert_close(model(tokens), logits, **ROUNDING32)
        torch.testing.assert_close(trace.x_hat, x_hat, **ROUNDING32)
    arm = SecondarySplice(sae=primary, secondary=secondary)
    with arm.on(model) as trace:
        found = model(tokens)
        torch.testing.assert_close(trace.x, x, **ROUNDING32)
    substitution = Substitution(
        at=PLACES[kind], function=lambda x, context: arm.reconstruct(x), description="the same, made of x"
    )
    with substitution.on(model):
        torch.testing.assert_close(model(tokens), found, **ROUNDING32)
    assert (found - logits).abs().max() > 0.05
    edit = Edit(at=ACTS, index=(FEATURE,), mode="clamp", value=3.0)
    with SecondarySplice(sae=primary, secondary=secondary, edits=[edit]).on(model) as trace:
        model(tokens)
    acts = naive_acts(secondary, hidden_of(primary, x))
    change = interaction(primary, naive_decode(secondary, clamp(acts, None)))
    change = change - interaction(primary, naive_decode(secondary, acts))
    made = torch.where((tokens == 0)[..., None], x, arm.reconstruct(x) + change)
    torch.testing.assert_close(trace.x_hat, made, **ROUNDING32)
    assert secondary_of(primary) is None
    assert torch.equal(model(tokens), clean)


@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge"])
def test_clamped_by_the_hook_name_of_the_model(models, kind, tokens):
    model, secondary = models[kind], secondary_sae("float32")
    primary = inference_sae(training_config("joint_nfm", PLACES[kind])).requires_grad_(False)
    clean = model(tokens)
    with attach_secondary(primary, secondary, error_term=True), model.saes([primary], use_error_term=True):
        torch.testing.assert_close(model(tokens), clean, **ROUNDING32)
        at = resolve_hook_name(model, f"{PLACES['HookedTransformer']}.{ACTS}")
        edited = model.run_with_hooks(tokens, fwd_hooks=[(at, clamp)])
    assert (edited - clean).abs().max() > 0.01


def test_figures_of_a_splice_are_those_of_an_attached_one(tokens):
    model, secondary = tiny_model().requires_grad_(False), secondary_sae("float32")
    primary = inference_sae(training_config("joint_nfm")).requires_grad_(False)
    with attach_secondary(primary, secondary):
        found = evaluate(model, tokens, [Arm(name="attached", sae=primary)], show_progress=False)["attached"]
    ablated = {"hook_nfm_hidden_pre": torch.zeros(NFM_DIM)}
    edit = Edit(at=ACTS, index=(FEATURE,), mode="clamp", value=3.0)
    arm = SecondarySplice(sae=primary, secondary=secondary)
    with arm.on(model) as trace:
        model(tokens)
    error = (trace.x_hat - trace.x)[:, 1:]
    deviation = trace.x[:, 1:] - trace.x[:, 1:].mean((0, 1))
    assert found.fvu == pytest.approx(float(error.square().sum() / deviation.square().sum()), rel=1e-5)  # float32 sums
    identities = {
        one.identity
        for one in (
            arm,
            Splice(sae=primary),
            SecondarySplice(sae=primary, secondary=secondary, error_term=True),
            SecondarySplice(sae=primary, secondary=secondary, ablated=ablated),
            SecondarySplice(sae=primary, secondary=secondary, edits=[edit]),
            SecondarySplice(sae=primary, secondary=secondary_sae("float32", rescale_acts_by_decoder_norm=False)),
        )
    }
    assert len(identities) == 6
