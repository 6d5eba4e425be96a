"""A decoder row of norm 0 contributes 0, in every form of every SAE: the other features go on as without it."""

import copy

import pytest
import torch
from builders import (
    D_MODEL,
    D_SAE,
    covering_pairs,
    inference_sae,
    random_activations,
    random_sae,
    trainer,
    training_config,
)
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from secondary_inputs import secondary_sae
from step_forms import HOOK, step

from sae_nfm.architectures import SequentialNFMTrainingSAE, attach_secondary

DEAD, OTHERS = 5, torch.arange(D_SAE) != 5


def with_a_dead_row(sae, norm=0.0):
    with torch.no_grad():
        sae.W_dec[DEAD] *= norm
        sae.b_enc[DEAD] += 100.0  # without its norm the feature would be the strongest
    return sae


@pytest.mark.parametrize(
    ("kernel", "hooked", "nfm_top_k", "rescale", "use_sparse", "norm"),
    covering_pairs(
        kernel=["sparse", "dense"],
        hooked=[True, False],
        nfm_top_k=[None, 3],
        rescale=[True, False],
        use_sparse=[True, False],
        norm=[0.0, 1e-320],
    ),
)
def test_every_form_of_a_step(kernel, hooked, nfm_top_k, rescale, use_sparse, norm):
    settings = {"nfm_top_k": nfm_top_k, "rescale_acts_by_decoder_norm": rescale, "use_sparse_activations": use_sparse}
    sae = with_a_dead_row(random_sae(training_config("joint_nfm", kernel=kernel, dtype="float64", **settings)), norm)
    x, dead = random_activations().double(), torch.arange(D_SAE) < 9
    with sae.hooks(fwd_hooks=[HOOK] * hooked):
        output = step(sae, x, dead, logging=True)
    output.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in sae.parameters())
    assert all(torch.isfinite(metric()) for metric in output.metrics.values())
    with torch.no_grad():
        acts = sae.encode(x).to_dense()
        paths = sae.decode_paths(acts)
        direct = sae.b_dec + (acts / sae.W_dec.norm(dim=-1) if rescale else acts)[:, OTHERS] @ sae.W_dec[OTHERS]
    torch.testing.assert_close(paths.direct, direct)
    torch.testing.assert_close(output.sae_out, paths.total())
    if rescale:
        assert (acts[:, DEAD].abs() < 1e-300).all()  # its pre-activation is multiplied with its norm
        assert (sae.W_dec.grad[DEAD] == 0).all() or norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_folds_and_saving(dtype, tmp_path):
    sae = with_a_dead_row(random_sae(training_config("joint_nfm", nfm_top_k=None))).to(dtype)
    x = random_activations().to(dtype)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    norms = loaded.trained_W_dec_norm()
    assert torch.isfinite(norms).all()
    assert norms[DEAD] < 1e-4
    canonical = loaded.folded()
    exact = copy.deepcopy(sae).double()
    for one in (loaded, canonical):
        assert torch.isfinite(one(x)).all()
        # float16 has 5e-4, and outputs of order 10; the folds round every weight once more
        assert (one(x).double() - exact(x.double())).abs().mean() < (1e-5 if dtype == torch.float32 else 0.1)


def test_a_training_goes_on():
    saelens = trainer(with_a_dead_row(random_sae(training_config("joint_nfm"))))
    saelens.fit()
    assert all(torch.isfinite(parameter).all() for parameter in saelens.sae.parameters())


def topk(**overrides):
    return random_sae(TopKTrainingSAEConfig(**({"d_in": D_MODEL, "d_sae": D_SAE, "k": 4} | overrides)))


@pytest.mark.parametrize("saved", [True, False])
def test_a_base_of_a_sequential_nfm(saved, tmp_path):
    base = with_a_dead_row(topk())
    if saved:
        base.save_inference_model(tmp_path)
        base = SAE.load_from_disk(tmp_path)
    sae = SequentialNFMTrainingSAE.wrap(base, nfm_dim=8, train_base=True)
    output = step(sae, random_activations())
    output.loss.backward()
    assert torch.isfinite(output.sae_out).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in sae.parameters())


@pytest.mark.parametrize("kind", [TopKTrainingSAE, BatchTopKTrainingSAE])
def test_saelens_s_own_topk(kind):
    """It is what ours are compared with, a base, and a secondary SAE."""
    config = {TopKTrainingSAE: TopKTrainingSAEConfig, BatchTopKTrainingSAE: BatchTopKTrainingSAEConfig}[kind]
    sae = with_a_dead_row(random_sae(config(d_in=D_MODEL, d_sae=D_SAE, k=4)))
    output = step(sae, random_activations(), torch.arange(D_SAE) < 9)
    output.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in sae.parameters())


def test_a_secondary_sae():
    secondary, primary = with_a_dead_row(secondary_sae()), inference_sae(training_config("joint_nfm", dtype="float64"))
    with attach_secondary(primary, secondary):
        assert torch.isfinite(primary(random_activations().double())).all()
