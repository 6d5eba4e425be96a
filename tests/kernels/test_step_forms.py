"""Which form a training step has: the cost model's choice, for each product of it."""

import itertools

import pytest
import torch
from builders import D_SAE, covering_pairs, random_activations, random_sae, training_config
from step_forms import HOOK, both_kernels, for_every_architecture, of_sparse_step, step

from sae_nfm.architectures.joint_sae import FEW_FEATURES
from sae_nfm.architectures.joint_training import Forms
from sae_nfm.kernels import dispatch


@for_every_architecture
@pytest.mark.parametrize(
    ("forms", "nfm_top_k", "head"),
    covering_pairs(
        forms=[forms for forms in itertools.product(("sparse", "dense"), repeat=3) if "sparse" in forms],
        nfm_top_k=[None, 3],
        head=["fm", "mlp", "bilinear"],
    ),
)
def test_each_product_may_have_its_own_form(monkeypatch, architecture, forms, nfm_top_k, head):
    sae, saelens = both_kernels(architecture, nfm_top_k=nfm_top_k, head=head)
    monkeypatch.setattr(type(sae), "_forms", lambda self: Forms(*forms))
    x, dead = random_activations().double(), torch.arange(D_SAE) < 5
    with saelens.hooks(fwd_hooks=[HOOK]):
        ours, reference = step(sae, x, dead, logging=True), step(saelens, x, dead, logging=True)
    assert of_sparse_step(ours)
    assert ours.metrics.keys() == reference.metrics.keys()
    for name, metric in reference.metrics.items():
        torch.testing.assert_close(ours.metrics[name](), metric(), msg=name)
    for output in (ours, reference):
        output.loss.backward()
    torch.testing.assert_close(ours.loss, reference.loss)
    torch.testing.assert_close(ours.feature_acts.to_dense(), reference.feature_acts)
    for name, parameter in saelens.named_parameters():
        torch.testing.assert_close(dict(sae.named_parameters())[name].grad, parameter.grad, msg=name)


@for_every_architecture
def test_auto_asks_the_cost_model_for_each_product(monkeypatch, architecture):
    """The decoders in the type that a product has under autocast, the pooling in float32, each for what it reads."""
    asked = []

    def choose(d_sae, k, device, dtype):
        asked.append((d_sae, k, dtype))
        return "sparse" if dtype == torch.float32 else "dense"

    monkeypatch.setattr(dispatch, "choose", choose)
    sae = random_sae(training_config(architecture, d_sae=1024, k=8, nfm_top_k=3, kernel="auto"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sae._forms() == Forms(direct="dense", linear="dense", pooled="sparse")
        assert sae._steps_sparsely(random_activations())
        assert not sae.works_sparsely()
    assert asked[:3] == [(1024, 8, torch.bfloat16), (1024, 3, torch.bfloat16), (1024, 3, torch.float32)]
    assert sae._forms() == Forms(direct="sparse", linear="sparse", pooled="sparse")
    small = random_sae(training_config(architecture, d_sae=1023, k=8, kernel="auto"))
    assert small._forms() == Forms(direct="dense", linear="dense", pooled="dense")


@for_every_architecture
def test_auto_follows_the_cost_model(architecture):
    chosen = {}
    for d_sae, k in ((32, 4), (4096, 32), (2048, 1500)):
        sae = random_sae(training_config(architecture, d_sae=d_sae, k=k, nfm_top_k=None, kernel="auto"))
        chosen[d_sae, k] = "sparse" if of_sparse_step(step(sae, random_activations())) else "dense"
        assert chosen[d_sae, k] == (dispatch.choose(d_sae, k, "cpu") if d_sae >= FEW_FEATURES else "dense")
    assert chosen == {(32, 4): "dense", (4096, 32): "sparse", (2048, 1500): "dense"}
