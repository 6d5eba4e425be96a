"""What paths do on tokens: contributions that sum exactly, energies and shares by hand, activations of the model."""

import pytest
import torch
from builders import (
    CONTEXT,
    D_MODEL,
    D_SAE,
    HOOK_Z,
    inference_sae,
    random_activations,
    random_sae,
    tiny_model,
    training_config,
)
from path_inputs import activations, joint, random_tokens
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

from sae_nfm.analysis import gauge, path_contributions
from sae_nfm.analysis.path_contributions import (
    feature_energies,
    pair_contributions,
    path_sizes,
    read_activations,
    token_paths,
)
from sae_nfm.analysis.sae_report import functional_figures
from sae_nfm.architectures.joint_sae import Paths
from sae_nfm.kernels import reference
from sae_nfm.kernels.reference import SparseActs

EVERY_KIND = pytest.mark.parametrize(
    "options",
    [
        {},
        {"nfm_top_k": None},
        {"rescale_acts_by_decoder_norm": False},
        {"head": "mlp"},
        {"head": "bilinear"},
        {"normalize_activations": "layer_norm"},
        {"kernel": "sparse"},
    ],
    ids=str,
)


# Contributions.


def contributions(sae, tokens):
    W_1 = getattr(sae, "W_1", None)
    return pair_contributions(tokens.read, sae.V, W_1, sae.W_2, tokens.gates, sae.cfg.head)


@EVERY_KIND
@pytest.mark.parametrize("inference", [True, False], ids=["inference", "training"])
@torch.no_grad()
def test_contributions_sum_to_what_the_paths_write(options, inference):
    sae = joint(inference, **options)
    tokens, rows = token_paths(sae, activations()), gauge.as_read(sae)
    acts, read, paths = tokens.acts, tokens.read, tokens.paths

    def total(acts, rows):
        return (acts.values[..., None] * rows[acts.indices]).sum(1)

    torch.testing.assert_close(total(acts, rows.direct) + sae.b_dec, paths.direct)
    torch.testing.assert_close(total(read, rows.linear) + sae.b_lin, paths.linear)
    torch.testing.assert_close(total(reference.squared(acts), sae.U) / sae.cfg.square_scale, paths.square)
    parts = contributions(sae, tokens)
    gated_bias = sae.b_2 if sae.cfg.head == "bilinear" else (sae.b_1 * tokens.gates) @ sae.W_2 + sae.b_2
    torch.testing.assert_close(parts.sum(1) + gated_bias, paths.interaction)
    assert parts.abs().max() > 0.01


@EVERY_KIND
@torch.no_grad()
def test_energies_are_means_of_squared_contributions(options):
    sae = joint(**options)
    tokens, rows = token_paths(sae, activations()), gauge.as_read(sae)
    found, pairs = (
        feature_energies(sae, tokens),
        contributions(sae, tokens),
    )
    f = sae.encode(activations())
    for i in range(D_SAE):
        active = [t for t in range(len(f)) if f[t, i] > 0]
        assert found.active[i] == len(active)
        assert found.second_moment[i].item() == pytest.approx((f[:, i] ** 2).mean().item())
        if not active:
            assert found.direct[i].isnan()
            continue
        at = [(t, s) for t in active for s in range(tokens.read.indices.shape[1]) if tokens.read.indices[t, s] == i]
        expected = {
            "direct": sum((f[t, i] * rows.direct[i]).square().sum() for t in active),
            "linear": sum((tokens.read.values[t, s] * rows.linear[i]).square().sum() for t, s in at),
            "nonlinear": sum(pairs[t, s].square().sum() for t, s in at),
            "square": sum((f[t, i] ** 2 * sae.U[i] / 2.0).square().sum() for t in active),
        }
        for name, energy in expected.items():
            assert float(getattr(found, name)[i]) == pytest.approx(float(energy) / len(active)), (name, i)
    assert found.frequency.sum().item() == pytest.approx((f > 0).double().sum(1).mean().item())


def test_pair_contributions_by_hand():
    """Two features 2 and 3, v = (1, 1) and (1, -1): z = (6, -6); W_1 the identity, both gates open, W_2 = 10."""
    acts = SparseActs(torch.tensor([[0, 1]]), torch.tensor([[2.0, 3.0]]))
    V = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    parts = pair_contributions(acts, V, torch.eye(2), 10 * torch.eye(2), torch.tensor([[True, True]]))
    assert parts.tolist() == [[[30.0, -30.0], [30.0, -30.0]]]
    closed = pair_contributions(acts, V, torch.eye(2), 10 * torch.eye(2), torch.tensor([[True, False]]))
    assert closed.tolist() == [[[30.0, 0.0], [30.0, 0.0]]]
    alone = pair_contributions(acts, V, torch.eye(2), 10 * torch.eye(2), torch.tensor([[True, True]]), head="mlp")
    assert alone.tolist() == [[[20.0, 20.0], [30.0, -30.0]]]
    # (2 + 3) (2 - 3) = -5: 4 of the first feature's square, -9 of the second's, and nothing of 6 (1 * -1 + 1 * 1)
    both = pair_contributions(acts, V, None, torch.eye(1), torch.tensor([[True]]), head="bilinear")
    assert both.tolist() == [[[4.0], [-9.0]]]


@torch.no_grad()
def test_removing_a_feature_with_gates_held_takes_twice_its_contribution():
    sae = joint(nfm_top_k=None)
    sae.b_1.data += 100  # every gate open whatever is removed
    tokens = token_paths(sae, activations())
    parts = pair_contributions(tokens.read, sae.V, sae.W_1, sae.W_2, tokens.gates)
    f = sae.encode(activations())
    for t in range(3):
        without = f[t].clone()
        without[tokens.read.indices[t, 0]] = 0
        change = tokens.paths.interaction[t] - sae.decode_paths(without[None]).interaction[0]
        torch.testing.assert_close(change, 2 * parts[t, 0])


@torch.no_grad()
def test_shares_by_hand():
    """One token, two paths; magnitudes 2 and 1, so 2/3; a constant has no energy about its mean."""
    linear = torch.tensor([[2.0, -2.0], [2.0, -2.0], [2.0, -2.0]])
    inter = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])
    sizes = path_sizes(Paths(torch.zeros(3, 2), linear, None, inter))
    assert sizes.magnitude["linear"].tolist() == [2.0] * 3
    assert sizes.share(sizes.magnitude, "linear") == pytest.approx(2 / 3)
    assert sizes.share(sizes.energy, "linear") == 0
    assert sizes.energy["interaction"].sum().item() == pytest.approx(
        2 * (1 + 1 + 1 - 1 / 3)
    )  # variance about 1/3, twice


def test_a_topk_sae_has_its_direct_path_only():
    sae = TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=4))
    sae.load_state_dict({name: tensor for name, tensor in random_sae(training_config("joint_nfm")).state_dict().items()
                         if name in sae.state_dict()})  # fmt: skip
    x = random_activations()
    tokens = token_paths(sae, x)
    torch.testing.assert_close(tokens.paths.total(), sae(x))
    assert set(tokens.paths.present()) == {"direct"}
    assert feature_energies(sae, tokens).nonlinear.nan_to_num().abs().max() == 0


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_the_number_of_active_features_may_vary(training, monkeypatch):
    """Chunks of tokens with other numbers come together, and each path is that of `decode_paths`."""
    monkeypatch.setattr(path_contributions, "CELLS", 5 * D_SAE)
    cfg = training_config("joint_nfm", encoder="jumprelu", k=None)
    sae, x = (random_sae if training else inference_sae)(cfg), random_activations()
    sae.threshold.abs_()  # as a training step makes it
    tokens, acts = token_paths(sae, x), sae.encode(x)
    assert (acts > 0).sum(-1).unique().numel() > 2
    found = torch.zeros_like(acts).scatter(-1, tokens.acts.indices, tokens.acts.values)
    torch.testing.assert_close(found, acts)
    for name, path in sae.decode_paths(acts).present().items():
        torch.testing.assert_close(getattr(tokens.paths, name), path)
    energies = feature_energies(sae, tokens)
    assert energies.nonlinear.isfinite().any()


def test_what_cannot_be_looked_at_is_refused():
    standard = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE))
    with pytest.raises(ValueError, match=r"'standard'.*\bk\b.*joint_nfm"):
        token_paths(standard, random_activations())
    with pytest.raises(ValueError, match=r"\b3 documents\b.*\b24 tokens"):
        token_paths(joint(), activations(), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"documents.*token_paths"):
        functional_figures(joint(), token_paths(joint(), activations()), seed=0)


# In the language model.


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_post", HOOK_Z])
@torch.no_grad()
def test_activations_are_the_models_at_counted_tokens(hook_name, model):
    sae, tokens = inference_sae(training_config("joint_nfm", hook_name)), random_tokens()
    documents = torch.arange(12)[:, None].expand(-1, CONTEXT)
    x, found = read_activations(model, sae, tokens, documents, batch_rows=5)
    _, cache = model.run_with_cache(tokens, names_filter=hook_name)
    places = [(r, p) for r in range(12) for p in range(1, CONTEXT) if tokens[r, p] != 0]
    torch.testing.assert_close(x, torch.stack([cache[hook_name][place].flatten() for place in places]))
    assert found.tolist() == [row for row, _ in places]
    # the SAE makes of them what it makes of them in the model, and is left as it was
    heads = sae.hook_z_reshaping_mode
    paths = token_paths(sae, x).paths
    assert sae.hook_z_reshaping_mode == heads
    alone = torch.cat([sae(cache[hook_name][place][None]).reshape(1, -1) for place in places])
    torch.testing.assert_close(paths.total(), alone, rtol=1e-4, atol=1e-5)  # float32, one row at a time
    with pytest.raises(ValueError, match=r"no tokens.*\b32\b.*special"):
        read_activations(model, sae, torch.zeros(2, 16, dtype=torch.long))
