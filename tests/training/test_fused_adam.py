"""The fused Adam: where it is on, and that it is the same Adam."""

import pytest
import torch
from builders import WITH_ENCODER, random_sae, trainer, training_config
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

from sae_nfm.training.fused_adam import fuse


def forms(optimizer):
    return [group["fused"] for group in optimizer.param_groups]


@pytest.mark.parametrize("architecture", WITH_ENCODER)
@pytest.mark.parametrize(("kernel", "form"), [("auto", True), ("sparse", True), ("dense", None)])
def test_where_it_is_on(architecture, kernel, form):
    assert forms(trainer(random_sae(training_config(architecture, kernel=kernel))).optimizer) == [form]


def test_saelens_own_architectures_keep_their_optimizer():
    assert forms(trainer(TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4))).optimizer) == [None]


@pytest.mark.parametrize("given", [{"fused": False}, {"foreach": False}, {"foreach": True}])
def test_a_form_that_was_given_stays(given):
    optimizer = torch.optim.Adam([torch.zeros(3, requires_grad=True)], **given)
    before = forms(optimizer)
    fuse(optimizer)
    assert forms(optimizer) == before


def test_it_stays_off_where_torch_has_none():
    optimizer = torch.optim.Adam([torch.zeros(3, device="meta", requires_grad=True)])
    fuse(optimizer)
    assert forms(optimizer) == [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_update(dtype):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(40, 9, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        weights[1].copy_(weights[0])
    plain, fused = (torch.optim.Adam([weight], lr=1e-2, betas=(0.8, 0.95)) for weight in weights)
    fuse(fused)
    for _ in range(20):
        gradient = torch.randn(40, 9, generator=generator, dtype=dtype)
        for weight, optimizer in zip(weights, (plain, fused), strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    # twenty steps of 0.01 and a few roundings each, relative to weights of order 1
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(weights[1], weights[0], rtol=tolerance, atol=tolerance)
