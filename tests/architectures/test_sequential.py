"""`sequential_nfm` on each architecture that can be its base: whose bits stay, what is trained, what it computes."""

import copy
import itertools
import re

import pytest
import torch
from builders import D_MODEL, D_SAE, HOOK, HOOK_Z, inference_sae, random_activations, saved_base, training_config
from sae_lens import SAE, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from safetensors.torch import load_file
from torch.nn import functional as F

from sae_nfm.analysis.gauge import as_read, as_trained
from sae_nfm.architectures.sequential_config import BASES, REFUSED, SequentialNFMTrainingSAEConfig
from sae_nfm.architectures.sequential_sae import SequentialNFM
from sae_nfm.architectures.sequential_training import SequentialNFMTrainingSAE
from sae_nfm.loading.strict import sha256_of

NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
for_every_base = pytest.mark.parametrize("architecture", BASES)


def base_of(architecture, seed=0, hook_name=HOOK, **fields):
    """A random inference SAE; less than half of its features are active."""
    settings = {"d_in": D_MODEL, "d_sae": D_SAE, "metadata": SAEMetadata(model_name="tiny", hook_name=hook_name)}
    settings |= {"k": 5} if "topk" in architecture else {}
    settings |= {"max_iterations": 4} if architecture == "matching_pursuit" else {}
    sae_class, config_class = get_sae_class(architecture)
    sae = sae_class(config_class(**(settings | fields)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if name in ("b_enc", "b_gate"):
                parameter -= 0.5
        if architecture == "matching_pursuit":
            sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True)
    return sae


def wrapped(base, seed=1, **fields):
    """A training SAE around it, every weight of the NFM random."""
    sae = SequentialNFMTrainingSAE.wrap(base, **({"nfm_dim": 6, "use_square_path": True} | fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae


def step_input(x, **coefficients):
    return TrainStepInput(
        sae_in=x, coefficients=coefficients, dead_neuron_mask=None, n_training_steps=0, is_logging_step=True
    )


def fit(sae, steps=20, lr=1e-2, **overrides):
    batches = (random_activations(seed=seed) for seed in itertools.count(10))
    settings = {"total_training_samples": 24 * steps, "train_batch_size_samples": 24, "lr": lr, "lr_end": lr}
    trainer = SAETrainer(SAETrainerConfig(**(settings | overrides)), sae, batches)
    trainer.fit()
    return trainer


def naive_nfm(sae, f, scale=1.0):
    """The NFM's three paths by loops over features and pairs, in float64; weights in units of `scale`."""
    f = f.double() / scale
    W = {name: parameter.double() for name, parameter in sae.named_parameters() if "." not in name}
    out = []
    for token in f:
        active = token.nonzero().flatten().tolist()
        read = sorted(active, key=lambda i: -float(token[i]))[: sae.cfg.nfm_top_k or len(active)]
        lin = W["b_lin"] + sum(token[i] * W["W_lin"][i] for i in read)
        pairs = [token[i] * token[j] * W["V"][i] * W["V"][j] for i, j in itertools.combinations(read, 2)]
        z = sum(pairs) if pairs else torch.zeros(sae.cfg.nfm_dim).double()
        inter = F.relu(z @ W["W_1"] + W["b_1"]) @ W["W_2"] + W["b_2"]
        square = sum((token[i] ** 2 / sae.cfg.square_scale * W["U"][i] for i in active), torch.zeros(D_MODEL).double())
        out.append(scale * (lin + inter + square))
    return torch.stack(out)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@for_every_base
def test_features_are_the_bases_bit_for_bit_and_its_decode_is_the_direct_path(architecture, normalisation):
    base, x = base_of(architecture, normalize_activations=normalisation), random_activations()
    sae = wrapped(base)
    assert torch.equal(sae.encode(x), base.encode(x))
    assert torch.equal(sae.decode_paths(sae.encode(x)).direct, base(x))
    assert 0 < (sae.encode(x) != 0).sum(-1).float().mean() < D_SAE / 2


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_decode_can_be_called_again(normalisation):
    """SAELens's per-token normalisations are forgotten by the first decode."""
    sae, x = wrapped(base_of("topk", normalize_activations=normalisation)), random_activations()
    f = sae.encode(x)
    assert torch.equal(sae.decode(f), sae.decode(f))


def test_rows_by_unit_of_activation():
    """Of a base that rescales, the decoder row at norm 1 is what one unit of its hooked activation writes."""
    sae = wrapped(base_of("topk", rescale_acts_by_decoder_norm=True))
    one = torch.zeros(1, D_SAE)
    one[0, 3] = 1.0
    torch.testing.assert_close(as_read(sae).direct[3], sae.decode_paths(one).direct[0] - sae.b_dec)
    torch.testing.assert_close(as_trained(sae).direct, sae.W_dec.detach())
    assert torch.equal(as_trained(sae).linear, sae.W_lin)


@pytest.mark.parametrize("kernel", ["dense", "sparse"])
@pytest.mark.parametrize("nfm_top_k", [None, 2])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_the_sum_of_all_paths_by_loops(architecture, nfm_top_k, kernel):
    sae = wrapped(base_of(architecture), kernel=kernel, nfm_top_k=nfm_top_k)
    x = random_activations()
    f = sae.base.encode(x)
    expected = sae.base.decode(f).double() + naive_nfm(sae, f)
    torch.testing.assert_close(sae(x).double(), expected, atol=1e-4, rtol=1e-4)  # float32 against float64
    loss = sae.training_forward_pass(step_input(x))  # finds the scale; the same weights, in its units
    scale = x.norm(dim=-1).mean() / D_MODEL**0.5
    torch.testing.assert_close(sae.nfm_scale, scale)
    expected = sae.base.decode(f).double() + naive_nfm(sae, f, float(scale))
    torch.testing.assert_close(loss.sae_out.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss.loss.double(), (expected - x).square().sum(-1).mean(), rtol=1e-4, atol=1e-4)


def test_negative_activations_reach_the_nfm():
    sae, x = wrapped(base_of("abstopk"), kernel="sparse"), random_activations()
    f = sae.encode(x)
    assert (f < 0).any()
    torch.testing.assert_close(sae(x).double(), sae.base(x).double() + naive_nfm(sae, f), atol=1e-4, rtol=1e-4)


@for_every_base
def test_a_frozen_base_has_no_gradient_no_optimizer_state_and_the_same_bits(architecture, tmp_path):
    base = base_of(architecture)
    before = sha256_of(base.state_dict())
    sae = wrapped(base)
    trainer = fit(sae)
    assert sha256_of(sae.base.state_dict()) == sha256_of(base.state_dict()) == before
    own = {id(parameter) for name, parameter in sae.named_parameters() if not name.startswith("base.")}
    assert {id(parameter) for parameter in trainer.optimizer.state} == own
    x = random_activations()
    output = sae.training_forward_pass(step_input(x))
    output.loss.backward()
    assert all(parameter.grad is None for parameter in sae.base.parameters())
    assert not output.feature_acts.requires_grad

    sae.save_inference_model(tmp_path)
    assert "nfm_scale" not in load_file(tmp_path / SAE_WEIGHTS_FILENAME)
    loaded = SAE.load_from_disk(tmp_path)
    assert torch.equal(loaded.encode(x), base.encode(x))
    torch.testing.assert_close(loaded(x), sae(x), atol=1e-5, rtol=1e-5)  # the scale is folded in: another order
    assert loaded.cfg.base_sha256 == before


@pytest.mark.parametrize("architecture", ["topk", "matching_pursuit", "standard"])
def test_training_lowers_the_error_below_the_bases(architecture):
    base = base_of(architecture)
    sae, x = SequentialNFMTrainingSAE.wrap(base, nfm_dim=6), random_activations()
    fit(sae, steps=80)
    assert (x - sae(x)).square().sum() < 0.9 * (x - base(x)).square().sum()


def test_unfrozen_everything_is_trained():
    sae = wrapped(base_of("topk"))
    sae.unfreeze()
    before = copy.deepcopy(sae.state_dict())
    trainer = fit(sae)
    assert len(trainer.optimizer.state) == len(list(sae.parameters()))
    changed = {name for name, tensor in sae.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(before)


def test_a_fine_tuned_base_is_saved_with_its_own_sha256(tmp_path):
    base = base_of("standard")
    sae = wrapped(base)
    sae.unfreeze(l1_coefficient=0.01)
    fit(sae)
    sae.save_inference_model(tmp_path / "sae")
    loaded, x = SAE.load_from_disk(tmp_path / "sae"), random_activations()
    torch.testing.assert_close(loaded(x), sae(x), atol=1e-5, rtol=1e-5)
    assert loaded.cfg.base_sha256 == sha256_of(sae.base.state_dict()) != sha256_of(base.state_dict())


def test_the_penalty_by_hand():
    sae, x = wrapped(base_of("standard"), train_base=True, l1_coefficient=0.5), random_activations()
    assert sae.get_coefficients() == {"l1": 0.5}
    output = sae.training_forward_pass(step_input(x, l1=0.5))
    expected = 0.5 * (sae.encode(x) * sae.W_dec.norm(dim=1)).sum(1).mean()
    torch.testing.assert_close(output.losses["l1_loss"], expected)
    torch.testing.assert_close(output.loss, output.losses["mse_loss"] + expected)


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_unfreezing_asks_what_holds_the_sparsity(architecture):
    sae = wrapped(base_of(architecture))
    with pytest.raises(ValueError, match=f"'{architecture}' base.*\\bl1_coefficient\\b"):
        sae.unfreeze()
    assert not sae.cfg.train_base
    with pytest.raises(ValueError, match="l1_coefficient"):
        wrapped(base_of(architecture), train_base=True)


def test_training_goes_on_from_a_saved_sae_as_the_same_function(tmp_path):
    sae, x = wrapped(base_of("topk")), random_activations()
    fit(sae)
    sae.save_inference_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    torch.testing.assert_close(again(x), sae(x), atol=1e-5, rtol=1e-5)
    out = again.training_forward_pass(step_input(x)).sae_out  # in the units of x again
    assert again.nfm_scale > 0
    torch.testing.assert_close(out, sae(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.W_2 * again.nfm_scale, sae.W_2 * sae.nfm_scale)


def test_dropout_acts_in_training_steps_alone():
    sae, x = wrapped(base_of("topk"), nfm_dropout=0.5), random_activations()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one, other = (sae.training_forward_pass(step_input(x)).sae_out for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(sae(x), sae(x))


@for_every_base
def test_error_term_and_hooks_act_as_on_any_sae(architecture):
    """SAELens switches hooks off by attribute for the clean pass: none may stay live within the base."""
    base, x = base_of(architecture), random_activations()
    trained = wrapped(base)
    sae = SAE.from_dict(trained.cfg.get_inference_sae_cfg_dict())
    sae.load_state_dict({name: tensor for name, tensor in trained.state_dict().items() if name != "nfm_scale"})
    assert not [name for name in sae.hook_dict if "." in name]
    sae._use_error_term = True
    torch.testing.assert_close(sae(x), x, atol=1e-5, rtol=1e-5)
    with sae.hooks(fwd_hooks=[("hook_sae_input", lambda value, hook: value + 1)]):
        changed = sae(x)
    sae._use_error_term = False
    expected = sae(x + 1) + (x - sae(x))
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-4)
    _, cache = sae.run_with_cache(x)
    assert torch.equal(cache["hook_sae_acts_post"], base.encode(x))


def test_a_copy_stands_on_a_copy_of_the_base():
    sae, x = wrapped(base_of("topk")), random_activations()
    copied = copy.deepcopy(sae)
    seen = []
    with copied.hooks(fwd_hooks=[("hook_sae_input", lambda value, hook: seen.append(value))]):
        assert torch.equal(copied(x), sae(x))
    assert len(seen) == 1
    with torch.no_grad():
        copied.base.W_dec.zero_()
    assert sae.base.W_dec.any()


def test_heads_are_flattened_around_the_base():
    base = base_of("topk", hook_name=HOOK_Z, reshape_activations="hook_z")
    trained = wrapped(base)
    sae = SAE.from_dict(trained.cfg.get_inference_sae_cfg_dict())
    sae.load_state_dict({name: tensor for name, tensor in trained.state_dict().items() if name != "nfm_scale"})
    x = random_activations().reshape(24, 2, D_MODEL // 2)
    assert sae(x).shape == x.shape
    assert torch.equal(sae.encode(x), base.encode(x))
    torch.testing.assert_close(sae(x).flatten(1), trained(x.flatten(1)))


def test_another_data_type(tmp_path):
    sae, x = wrapped(base_of("topk")), random_activations()
    wide = copy.deepcopy(sae).to(torch.float64)
    assert wide(x).dtype == torch.float64
    torch.testing.assert_close(wide(x).float(), sae(x), atol=1e-4, rtol=1e-4)
    wide.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert torch.equal(loaded(x), wide(x))
    narrow = SAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert narrow(x).dtype == torch.bfloat16
    again = copy.deepcopy(loaded).to(torch.bfloat16)
    assert torch.equal(again(x), narrow(x))
    again.save_model(tmp_path / "narrow")  # verified on loading by the bits that it has now
    assert torch.equal(SAE.load_from_disk(tmp_path / "narrow")(x), narrow(x))


def test_features_that_are_off_have_a_gradient_too():
    sae = wrapped(base_of("topk"), kernel="sparse")
    f = sae.encode(random_activations()).detach().requires_grad_()
    sae.decode(f).sum().backward()
    dense = wrapped(base_of("topk"), kernel="dense")
    other = f.detach().clone().requires_grad_()
    dense.decode(other).sum().backward()
    torch.testing.assert_close(f.grad, other.grad)
    assert f.grad[f == 0].abs().min() > 0


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk"])
def test_a_base_still_in_training_becomes_what_it_would_be_saved_as(architecture, tmp_path):
    fields = {"matryoshka_widths": [8, D_SAE]} if architecture == "matryoshka_batchtopk" else {}
    sae_class, config = get_sae_training_class(architecture)
    base = sae_class(config(d_in=D_MODEL, d_sae=D_SAE, k=5, **fields))
    x = random_activations()
    fit(base, steps=10)
    base.save_inference_model(tmp_path)
    sae = SequentialNFMTrainingSAE.wrap(base)
    assert torch.equal(sae.encode(x), SAE.load_from_disk(tmp_path).encode(x))
    assert sae.cfg.base_config["architecture"] == ("topk" if architecture == "topk" else "jumprelu")


def test_a_scale_that_is_not_folded_is_folded_into_the_base():
    base, x = base_of("topk", normalize_activations="expected_average_only_in"), random_activations()
    sae = SequentialNFMTrainingSAE.wrap(base, norm_scaling_factor=2.5)
    torch.testing.assert_close(sae.base(x), base(2.5 * x) / 2.5)
    assert base.cfg.normalize_activations == "expected_average_only_in"  # the caller's is as it was
    with pytest.raises(ValueError, match=r"'expected_average_only_in'.*\bnorm_scaling_factor\b"):
        SequentialNFMTrainingSAE.wrap(base)
    with pytest.raises(ValueError, match=r"norm_scaling_factor.*'layer_norm'"):
        SequentialNFMTrainingSAE.wrap(base_of("topk", normalize_activations="layer_norm"), norm_scaling_factor=2.5)


@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_transcoder", "temporal", "joint_nfm"])
def test_refused_architectures_say_why(architecture):
    if architecture == "joint_nfm":
        sae = SAE.from_dict(training_config("joint_nfm").get_inference_sae_cfg_dict())
    else:
        sae_class, config_class = get_sae_class(architecture)
        extra = {"d_out": D_MODEL, "apply_b_dec_to_input": False} if "transcoder" in architecture else {}
        sae = sae_class(config_class(d_in=D_MODEL, d_sae=512, **extra))
    with pytest.raises(ValueError, match=rf"{architecture!r}.*{re.escape(REFUSED[architecture])}.*'topk'"):
        SequentialNFMTrainingSAE.wrap(sae)


def test_folds_are_refused():
    sae = wrapped(base_of("topk"))
    for fold in (
        lambda: sae.fold_activation_norm_scaling_factor(2.0),
        lambda: sae.fold_activation_whitening(torch.zeros(16), torch.eye(16), torch.eye(16)),
        sae.fold_W_dec_norm,
    ):
        with pytest.raises(NotImplementedError, match=r"\bfold\b"):
            fold()


def test_what_the_config_refuses():
    base = str(saved_base(d_in=D_MODEL, d_sae=D_SAE, k=4))
    config = SequentialNFMTrainingSAEConfig(base=base)
    assert (config.d_in, config.d_sae, config.metadata.hook_name) == (D_MODEL, D_SAE, HOOK)
    with pytest.raises(ValueError, match=r"\bd_in is 17\b.*\b16\b"):
        SequentialNFMTrainingSAEConfig(base=base, d_in=17)
    with pytest.raises(ValueError, match=r"normalize_activations is 'layer_norm'.*'none'"):
        SequentialNFMTrainingSAEConfig(base=base, normalize_activations="layer_norm")
    with pytest.raises(ValueError, match=r"dtype is 'float32'.*'float64'"):
        SequentialNFMTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, base_config=config.base_config | {"dtype": "float64"})
    centred = saved_base(d_in=D_MODEL, d_sae=D_SAE, k=4, apply_b_dec_to_input=False)
    assert SequentialNFMTrainingSAEConfig(base=str(centred)).apply_b_dec_to_input is False
    with pytest.raises(ValueError, match=r"\bno base\b.*`base`"):
        TrainingSAE.from_dict(SequentialNFMTrainingSAEConfig(d_in=4, d_sae=4).to_dict())
    with pytest.raises(FileNotFoundError, match=r"'nowhere'.*folder"):
        SequentialNFMTrainingSAEConfig(base="nowhere")
    with pytest.raises(ValueError, match=r"\b17\b.*\bd_in = 16\b"):
        wrapped(base_of("topk")).encode(torch.zeros(3, 17))


def test_a_base_that_was_never_loaded_is_not_trained_on():
    """A config of a wrapped object names no base, so that a runner would make one at random."""
    config = wrapped(base_of("topk")).cfg
    sae = TrainingSAE.from_dict(config.to_dict())
    assert isinstance(sae, SequentialNFM)
    with pytest.raises(ValueError, match="base is not the one"):
        sae.training_forward_pass(step_input(random_activations()))


@pytest.mark.parametrize("k", [1, 2])
def test_tokens_with_fewer_features_than_the_nfm_reads(k):
    """As of a jumprelu base on quiet text: all of them are read."""
    sae = inference_sae(training_config("sequential_nfm", nfm_top_k=3, kernel="sparse", dtype="float64"))
    acts = torch.zeros(5, D_SAE, dtype=torch.float64)
    acts[:, 3 : 3 + k] = 1.5
    with torch.no_grad():
        found = sae.decode(acts)
        sae.cfg.kernel = "dense"
        torch.testing.assert_close(found, sae.decode(acts))
