"""One training step as SAELens's trainer runs it: normalisations, dead features, sparse and short formats, metrics."""

import copy
import math

import pytest
import torch
from builders import D_SAE, WITH_ENCODER, random_activations, random_sae, trainer, training_config
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.util import temporary_seed

for_every_architecture = pytest.mark.parametrize("architecture", WITH_ENCODER)
NORMALISATIONS = (
    "none",
    "expected_average_only_in",
    "constant_norm_rescale",
    "layer_norm",
    "covariance_whitening",
)
PATHS = ("linear", "square", "interaction")


def step_input(sae_in, dead=None):
    return TrainStepInput(
        sae_in=sae_in, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
    )


def fvu(x, x_hat):
    return (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()


@for_every_architecture
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("sparse", [False, True])
def test_training_under_every_normalisation(architecture, normalisation, sparse):
    sae = random_sae(training_config(architecture, normalize_activations=normalisation, use_sparse_activations=sparse))
    saelens, outputs = trainer(sae), []
    step = saelens.step

    def remember(batch):
        outputs.append(step(batch))
        return outputs[-1]

    saelens.step = remember
    saelens.fit()
    assert all(math.isfinite(output.loss.item()) for output in outputs)
    assert outputs[-1].losses["auxiliary_reconstruction_loss"] > 0  # there were dead features
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


@for_every_architecture
@pytest.mark.parametrize("normalisation", ["expected_average_only_in", "covariance_whitening"])
def test_trainer_folds_its_normalisation_exactly(architecture, normalisation):
    sae = random_sae(training_config(architecture, normalize_activations=normalisation))
    before, saelens, scaler = copy.deepcopy(sae), trainer(sae, total_training_samples=0), ActivationScaler()
    estimate = {
        "expected_average_only_in": scaler.estimate_scaling_factor,
        "covariance_whitening": scaler.estimate_whitening,
    }[normalisation]
    estimate(16, trainer(before).data_provider, 4)
    saelens.fit()
    x = random_activations(seed=3)
    # float32 rounding, 1e-7 of outputs up to 14, through the factors that the fold moved
    torch.testing.assert_close(sae(x), scaler.unscale(before(scaler.scale(x))), atol=3e-5, rtol=0)


@for_every_architecture
@pytest.mark.parametrize("normalisation", ["constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("rescale", [True, False])
def test_dead_feature_loss_under_per_token_normalisation(architecture, normalisation, rescale):
    cfg = training_config(architecture, normalize_activations=normalisation, rescale_acts_by_decoder_norm=rescale)
    sae, dead = random_sae(cfg), torch.arange(D_SAE) % 6 == 0  # 6 dead features, fewer than d_in / 2
    x = random_activations()
    loss = sae.training_forward_pass(step_input(x, dead)).losses["auxiliary_reconstruction_loss"]
    loss.backward()
    assert torch.equal(sae.W_dec.grad.norm(dim=1) > 0, dead)
    assert torch.equal(sae.W_enc.grad.norm(dim=0) > 0, dead)
    assert torch.equal(sae.b_enc.grad != 0, dead)
    # In units of the input: inputs c times as large give a loss c^2 times as large, up to the host's 1e-5 in the
    # denominator of layer_norm.
    scaled = sae.training_forward_pass(step_input(8 * x, dead)).losses["auxiliary_reconstruction_loss"]
    torch.testing.assert_close(scaled, 64 * loss, atol=0, rtol=1e-3)


@for_every_architecture
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("nfm_top_k", [None, 3])
def test_sparse_activations_are_the_dense_ones(architecture, rescale, nfm_top_k):
    x, dead = random_activations(), torch.arange(D_SAE) % 6 == 0
    outputs, gradients = [], []
    for sparse in (True, False):
        sae = random_sae(
            training_config(
                architecture,
                use_sparse_activations=sparse,
                rescale_acts_by_decoder_norm=rescale,
                nfm_top_k=nfm_top_k,
            )
        )
        output = sae.training_forward_pass(step_input(x, dead))
        assert output.feature_acts.is_sparse is sparse
        output.loss.backward()
        outputs.append(output.sae_out)
        gradients.append({name: parameter.grad for name, parameter in sae.named_parameters()})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[1].values())
    # float32 sums in another order: 1e-6 of the largest output, 20, and of the largest gradient, 105
    torch.testing.assert_close(outputs[0], outputs[1], atol=2e-5, rtol=0)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=0)


@for_every_architecture
@pytest.mark.parametrize("rescale", [True, False])
def test_sparse_activations_edited_by_a_hook(architecture, rescale):
    """A hook may leave other numbers of features than k, unequal from token to token."""
    sae = random_sae(training_config(architecture, rescale_acts_by_decoder_norm=rescale))
    acts = sae.encode(random_activations())
    acts[::2, :] *= torch.arange(D_SAE) % 2  # about half of them
    acts[1, :7] = 1.0
    assert (acts != 0).sum(-1).unique().numel() > 2
    # float32 sums in another order: 1e-6 of the largest output, 20
    torch.testing.assert_close(sae.decode(acts.to_sparse()), sae.decode(acts), atol=2e-5, rtol=0)


@for_every_architecture
@pytest.mark.parametrize("sparse", [False, True])
def test_autocast_step_is_close_to_the_float32_step(architecture, sparse):
    losses = []
    for autocast in (True, False):
        sae = random_sae(training_config(architecture, use_sparse_activations=sparse))
        losses.append(trainer(sae, autocast=autocast).step(random_activations()).loss.item())
        assert all(parameter.isfinite().all() for parameter in sae.parameters())
    # bfloat16 rounds a residual to 8 bits, and squaring doubles the relative error
    assert losses[0] == pytest.approx(losses[1], rel=2 * 2**-8)
    assert losses[0] != losses[1]  # autocast was on


@for_every_architecture
def test_bfloat16_sae(architecture):
    half = random_sae(training_config(architecture, dtype="bfloat16"))
    full = random_sae(training_config(architecture))
    full.load_state_dict(half.state_dict())
    x = random_activations().bfloat16()
    output = half.training_forward_pass(step_input(x))
    output.loss.backward()
    assert output.sae_out.dtype == half.W_lin.grad.dtype == torch.bfloat16
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())
    # Where rounding leaves the selection of features alone, outputs differ by bfloat16's 8 bits in each of four products.
    same = ((half.encode(x) > 0) == (full.encode(x.float()) > 0)).all(-1)
    assert same.float().mean() > 0.8
    expected = full(x.float())[same]
    assert (half(x).float()[same] - expected).norm() < 4 * 2**-8 * expected.norm()


@for_every_architecture
@pytest.mark.parametrize("normalisation", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("kernel", ["dense", "sparse"])
def test_path_metrics_of_a_training_step(architecture, normalisation, kernel):
    sae = random_sae(training_config(architecture, normalize_activations=normalisation, kernel=kernel))
    sae.keep_paths = True
    x = random_activations()
    output = sae.training_forward_pass(step_input(x))
    metrics = {name: metric() for name, metric in output.metrics.items()}
    assert set(metrics) == {
        "fvu_all",
        "fvu_direct",
        *(f"fvu_direct+{name}" for name in PATHS),
        *(f"magnitude_{name}" for name in ("direct", *PATHS)),
        *(f"share_{name}" for name in PATHS),
    }

    def without(*names):
        zero = [(f"hook_nfm_{name}", lambda value, hook: torch.zeros_like(value)) for name in names]
        with sae.hooks(fwd_hooks=zero):
            return fvu(x, sae(x))

    torch.testing.assert_close(metrics["fvu_all"], fvu(output.sae_in, output.sae_out))
    # float32: the metric subtracts paths from the output, the forward pass never adds them
    torch.testing.assert_close(metrics["fvu_direct"], without(*PATHS), atol=1e-5, rtol=1e-4)
    for kept in PATHS:
        others = [name for name in PATHS if name != kept]
        torch.testing.assert_close(metrics[f"fvu_direct+{kept}"], without(*others), atol=1e-5, rtol=1e-4)
    assert sum(metrics[f"share_{name}"] for name in PATHS) == pytest.approx(1, abs=1e-6)


@for_every_architecture
def test_dropout_acts_in_training_steps_alone(architecture):
    sae = random_sae(training_config(architecture, nfm_dropout=0.5)).train()
    x = random_activations()
    with temporary_seed(0):
        first, second = (sae.training_forward_pass(step_input(x)).sae_out for _ in range(2))
        assert not torch.equal(first, second)
        assert torch.equal(sae(x), sae(x))
    assert torch.equal(sae(x), random_sae(training_config(architecture))(x))
