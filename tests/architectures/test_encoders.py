"""joint_nfm with BatchTopK and JumpReLU: SAELens's where the NFM is silent, refinement that keeps the encoder's choice."""

import json
from copy import deepcopy
from dataclasses import MISSING, fields, replace

import pytest
import torch
from builders import covering_pairs, random_activations, random_sae, trainer
from inference_oracle import inferred
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSAE,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from step_forms import step
from torch.func import jacrev, vmap

from sae_nfm import JointNFMSAE, JointNFMSAEConfig, JointNFMTrainingSAE, JointNFMTrainingSAEConfig
from sae_nfm.architectures import EncoderFields, JumpReLUJointNFMSAE, parameter_count, training_config
from sae_nfm.architectures.joint_config import ABSENT, ENCODERS, encoders_with
from sae_nfm.training.multi_arm import StreamConfig, TrainingArm, _refuse_others, _settings

D_IN, D_SAE = 16, 32
THEIRS = {
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
}
WIDE = {"jumprelu_bandwidth": 1.0, "jumprelu_init_threshold": 0.3}
"""A window in which many of a few tokens' pre-activations are."""
FORMS = {
    "batchtopk": {"encoder": "batchtopk", "k": 3.5},
    "batchtopk without rescaling": {"encoder": "batchtopk", "k": 4.0, "rescale_acts_by_decoder_norm": False},
    "step": {"encoder": "jumprelu", **WIDE},
    "step to the input": {"encoder": "jumprelu", "jumprelu_ste_to_input": True, **WIDE},
    "tanh": {
        "encoder": "jumprelu",
        "jumprelu_sparsity_loss_mode": "tanh",
        "pre_act_loss_coefficient": 0.1,
        "jumprelu_tanh_scale": 0.5,
        **WIDE,
    },
    "quadratic": {"encoder": "jumprelu", "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 5.0, **WIDE},
}
OF_NFM = {"nfm_dim": 8, "use_square_path": True, "square_scale": 2.0}
PLAIN = {"head": "none", "use_linear_path": False}
"""The control: the same encoder and inference without NFM."""


def config(form, **given):
    return JointNFMTrainingSAEConfig(
        **({"d_in": D_IN, "d_sae": D_SAE, "decoder_init_norm": 0.5, "dtype": "float64"} | OF_NFM | FORMS[form] | given)
    )


def of_saelens(cfg):
    """SAELens's training SAE with the same options."""
    sae_class, config_class = THEIRS[cfg.encoder]
    own = {field.name: getattr(cfg, field.name) for field in fields(config_class) if field.name != "metadata"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sae_class(config_class(**own))


def beside(form, **given):
    """A SAELens SAE and a joint one that is the same but for an NFM that writes zero."""
    cfg = config(form, **given)
    theirs, ours = of_saelens(cfg), random_sae(cfg)
    with torch.no_grad():
        for name in ("W_lin", "b_lin", "W_2", "b_2", "U"):
            if hasattr(ours, name):
                getattr(ours, name).zero_()
    ours.load_state_dict(ours.state_dict() | theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_with_a_silent_nfm_a_step_is_saelens_s(form, normalize, tmp_path):
    """Losses, features, gradients, thresholds, the saved SAE; float64, so that 1e-12 is the order of a sum and no more."""
    theirs, ours = beside(form, normalize_activations=normalize)
    assert isinstance(ours, type(theirs))
    x, dead = random_activations().double(), torch.arange(D_SAE) < 10
    for _ in range(2):
        expected, found = step(theirs, x, dead), step(ours, x, dead)
        assert expected.losses.keys() == found.losses.keys()
        assert all(value != 0 for value in expected.losses.values())
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=1e-12)
        assert torch.equal(found.feature_acts, expected.feature_acts)
    expected.loss.backward()
    found.loss.backward()
    for name, weight in theirs.named_parameters():
        assert weight.grad.any(), name
        torch.testing.assert_close(getattr(ours, name).grad, weight.grad, rtol=1e-10, atol=1e-10)
    assert ours.W_lin.grad.any()
    for sae, folder in ((theirs, tmp_path / "theirs"), (ours, tmp_path / "ours")):
        sae.fold_activation_norm_scaling_factor(0.7)
        sae.save_inference_model(folder)
    theirs, ours = SAE.load_from_disk(tmp_path / "theirs"), SAE.load_from_disk(tmp_path / "ours")
    assert isinstance(theirs, JumpReLUSAE)
    assert isinstance(ours, JumpReLUJointNFMSAE)
    torch.testing.assert_close(ours.threshold, theirs.threshold)
    assert theirs.threshold.min() > 0
    acts = theirs.encode(x)
    assert acts.any()
    torch.testing.assert_close(ours.encode(x), acts, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["batchtopk", "tanh"])
def test_without_an_nfm_a_training_is_saelens_s(form):
    """The plain control over steps of SAELens's trainer, its Adam too, with one coefficient that rises."""
    rising = {"l0_warm_up_steps": 3} if form == "tanh" else {}
    theirs, ours = beside(form, **PLAIN, **rising, use_square_path=False, kernel="dense")
    assert parameter_count(ours.cfg) == sum(p.numel() for p in theirs.parameters())
    for sae in (theirs, ours):
        trainer(sae, lr=1e-2).fit()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-9)


OPTIONS = {
    "head": ("fm", "mlp", "none", "bilinear"),
    "nfm_top_k": (None, 2, D_SAE),
    "use_linear_path": (True, False),
    "use_square_path": (True, False),
    "apply_b_dec_to_input": (True, False),
    "normalize_activations": ("none", "layer_norm", "constant_norm_rescale"),
    "refinement_steps": (0, 1, 3),
    "kind": ("training", "inference", "rescaled"),
}


@pytest.mark.parametrize(
    "options", [dict(zip(OPTIONS, row.values, strict=True)) for row in covering_pairs(**OPTIONS)], ids=str
)
@torch.no_grad()
def test_activations_above_a_threshold_are_those_of_the_definition(options):
    kind, steps = options.pop("kind"), options["refinement_steps"]
    sae = random_sae(config("step", **options))
    if kind == "training":
        sae.threshold.abs_()
    else:  # also below 0, as Adam's last step may leave one
        cfg = JointNFMSAEConfig.from_dict(sae.cfg.get_inference_sae_cfg_dict())
        weights = sae.state_dict()
        sae = JointNFMSAE(replace(cfg, rescale_acts_by_decoder_norm=kind == "rescaled"))
        sae.load_state_dict(weights)
    x = random_activations(rows=6).double()
    expected, clear = inferred(sae, x, 1, steps)
    assert clear.sum() >= 3
    assert (expected > 0).sum(-1).unique().numel() > 1
    torch.testing.assert_close(sae.encode(x)[clear], expected[clear], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["batchtopk", "tanh"])
def test_refinement_keeps_the_choice_and_what_the_encoder_learns_from_it(form):
    """In training: support, threshold and sparsity losses are the unrefined encoder's, no token's error is larger."""
    x, dead = random_activations().double(), torch.arange(D_SAE) < 10
    plain, refined = (random_sae(config(form, refinement_steps=steps)) for steps in (0, 3))
    for sae in (plain, refined):
        if hasattr(sae, "threshold"):
            sae.threshold.data.abs_()
    before, after = step(plain, x, dead), step(refined, x, dead)
    assert (after.feature_acts[before.feature_acts == 0] == 0).all()
    errors = [(output.sae_out - x).square().sum(-1) for output in (before, after)]
    assert (errors[1] <= errors[0] + 1e-9).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()
    torch.testing.assert_close(refined.encode(x), after.feature_acts, rtol=1e-9, atol=1e-9)  # a step adds both decoders
    if form == "batchtopk":
        assert after.feature_acts[after.feature_acts > 0].min() < before.feature_acts[before.feature_acts > 0].min()
        assert plain.topk_threshold == refined.topk_threshold > 0
        return
    for name in ("l0_loss", "pre_act_loss"):
        assert torch.equal(before.losses[name], after.losses[name])
    # the estimator of the choice's gradient is given that of a feature which was not chosen, as without refinement
    acts = before.feature_acts.detach().relu().requires_grad_()
    off = acts.detach() == 0
    (gradient,) = torch.autograd.grad(refined._refined_acts(x - refined.b_dec, acts)[off].sum(), acts)
    assert torch.equal(gradient, off.double())


def test_the_strongest_features_are_as_many_as_said_not_as_the_mean():
    """With nfm_top_k = k the two decoders of topk read the same features; of batchtopk a token may have more."""
    sae, x = random_sae(config("batchtopk", k=4.0, nfm_top_k=4)), random_activations().double()
    assert (sae.encode(x) > 0).sum(-1).max() > 4
    torch.testing.assert_close(step(sae, x).losses["mse_loss"], (sae(x) - x).square().sum(-1).mean())


@pytest.mark.parametrize("form", ["batchtopk", "tanh", "inference"])
def test_hooks_fire_once_and_the_code_holds(form):
    sae, calls = random_sae(config("tanh" if form == "inference" else form, refinement_steps=2)), []
    if form == "inference":
        weights = sae.state_dict()
        sae = JointNFMSAE(JointNFMSAEConfig.from_dict(sae.cfg.get_inference_sae_cfg_dict()))
        sae.load_state_dict(weights)
    x = random_activations().double()
    code, plain = sae.encode(x), sae(x)
    names = [name for name in sae.hook_dict if "secondary" not in name and name != "hook_sae_error"]
    hooks = [(name, lambda value, hook: calls.append(hook.name)) for name in names]
    assert torch.equal(sae.run_with_hooks(x, fwd_hooks=hooks), plain)
    assert sorted(calls) == sorted(names)
    seen = []
    zero = [("hook_sae_acts_post", lambda v, hook: seen.append(v)), ("hook_nfm_linear", lambda v, hook: 0 * v)]
    assert not torch.allclose(sae.run_with_hooks(x, fwd_hooks=zero), plain)
    assert torch.equal(seen[0], code)
    torch.testing.assert_close(sae.decode(code.to_sparse()), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_an_inferred_output_and_transforms():
    """Through two refinements, where no choice changes; of x, against finite differences, and under torch.func."""
    sae = JointNFMSAE(
        JointNFMSAEConfig(d_in=D_IN, d_sae=D_SAE, encoder="jumprelu", refinement_steps=2, dtype="float64", **OF_NFM)
    )
    generator = torch.Generator().manual_seed(3)
    for weight in sae.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    sae.threshold.data.abs_()
    x = random_activations(rows=4).double()
    found = torch.autograd.functional.jacobian(sae, x[0])
    steps = 1e-6 * torch.eye(D_IN, dtype=torch.float64)
    with torch.no_grad():
        up, down = x[0] + steps, x[0] - steps
        assert ((sae.encode(up) > 0) == (sae.encode(x[:1]) > 0)).all()
        torch.testing.assert_close(found.T, (sae(up) - sae(down)) / 2e-6, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(vmap(sae)(x), sae(x))
    torch.testing.assert_close(jacrev(sae)(x[0]), found)


def test_half_precision_keeps_the_thresholds_steps():
    """SAELens keeps the thresholds of a training in float32; what is refined is refined in float32."""
    sae, x = random_sae(config("tanh", dtype="float32", refinement_steps=1)), random_activations()
    sae.threshold.data.abs_()
    expected, sae = sae.encode(x), sae.to(torch.bfloat16)
    assert sae.threshold.dtype == torch.float32
    found = sae.encode(x)
    same = ((found > 0) == (expected > 0)).all(dim=-1)  # the encoder's own rounding chooses otherwise now and then
    assert same.float().mean() > 0.6
    torch.testing.assert_close(found[same].float(), expected[same], rtol=0.1, atol=0.1)  # bfloat16 of the start
    trainer(sae, lr=1e-2).fit()
    assert all(weight.isfinite().all() for weight in sae.parameters())


def test_the_penalty_reads_what_both_decoders_write():
    """With decoder norms of W_dec alone the same features would be free once W_lin writes them."""
    sae, x = random_sae(config("tanh")), random_activations().double()
    moved = deepcopy(sae)
    shift = 0.3 * torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved.W_dec.data += shift
    moved.W_lin.data -= shift
    losses, others = (step(one, x, torch.arange(D_SAE) < 10).losses for one in (sae, moved))
    torch.testing.assert_close(losses, others)


@pytest.mark.parametrize("form", ["batchtopk", "tanh"])
def test_saved_checkpointed_copied(form, tmp_path):
    own = {"refinement_steps": 1, "inference_refinement_steps": 2}
    sae, x = random_sae(config(form, **own)), random_activations().double()
    step(sae, x)
    sae.save_inference_model(tmp_path / "saved")
    sae.save_model(tmp_path / "checkpoint")
    saved = SAE.load_from_disk(tmp_path / "saved")
    assert isinstance(saved, JointNFMSAE)
    assert isinstance(saved, JumpReLUSAE)
    assert (saved.cfg.encoder, saved.cfg.k, saved.cfg.refinement_steps) == ("jumprelu", None, 2)
    assert parameter_count(saved.cfg) == sum(p.numel() for p in saved.parameters())
    as_inference = SAE.load_from_disk(tmp_path / "checkpoint")  # SAELens reads a checkpoint as an inference SAE too
    torch.testing.assert_close(as_inference(x), saved(x))
    for one in (deepcopy(saved), JointNFMSAE.load_from_disk(tmp_path / "saved")):
        assert type(one) is type(saved)
        assert torch.equal(one(x), saved(x))
    again = TrainingSAE.load_from_disk(tmp_path / "checkpoint")
    assert (type(again), again.cfg.encoder, again.cfg.k) == (type(sae), sae.cfg.encoder, sae.cfg.k)
    assert torch.equal(again(x), sae(x))
    assert torch.equal(deepcopy(sae)(x), sae(x))
    trained_as = training_config(saved)
    assert replace(trained_as, metadata=sae.cfg.metadata) == sae.cfg
    config_of = json.loads((tmp_path / "saved" / "cfg.json").read_text())
    details = config_of["metadata"]["training_architecture_details"]
    assert ("jumprelu_bandwidth" in details, "topk_threshold_lr" in details) == (form == "tanh", form == "batchtopk")


def test_the_options_are_saelens_s_own():
    """A field of SAELens's config that is new or has another default is noticed here; help says whose each option is."""
    ours = {field.name: field.default for field in fields(JointNFMTrainingSAEConfig)}
    for theirs in (BatchTopKTrainingSAEConfig, JumpReLUTrainingSAEConfig, TopKTrainingSAEConfig):
        for field in fields(theirs):
            if field.default is not MISSING and field.name not in ABSENT:
                assert ours[field.name] == field.default, field.name
    for encoder, theirs in ENCODERS.items():
        made = JointNFMTrainingSAEConfig(d_in=3, d_sae=128, encoder=encoder)
        assert all(getattr(made, name) == getattr(theirs, name, absent) for name, absent in ABSENT.items())
    assert encoders_with("k") == ["topk", "batchtopk"]
    assert encoders_with("d_in") == [*ENCODERS]


def test_arms_trained_before_there_were_encoders_are_the_same_arms():
    """What is written down of a topk arm is what was; of another encoder its options are."""
    stream = StreamConfig(
        model_name="m", hook_name="h", dataset="d", training_tokens=8, context_size=4, batch_size=4, seed=0
    )
    own = {field.name for field in fields(EncoderFields)}
    for form, given in (("topk", {}), ("tanh", FORMS["tanh"])):
        arm = TrainingArm(name=form, family=form, sae=JointNFMTrainingSAEConfig(d_in=16, d_sae=128, **given))
        written = _settings(stream, arm, 1e-3)
        assert own & written.keys() == given.keys() & own
        _refuse_others(form, written, written | {"l0_coefficient": 1.0}, "before")


@pytest.mark.parametrize(
    ("form", "bad", "message"),
    [
        ("batchtopk", {"selection_stages": 2}, "selection_stages is 2.*encoder 'topk' alone, not with 'batchtopk'"),
        ("step", {"inference_selection_stages": 2}, "inference_selection_stages is 2.*not with 'jumprelu'"),
        ("step", {"k": 4}, "k is 4.*thresholds"),
        (
            "step",
            {"rescale_acts_by_decoder_norm": True},
            "rescale_acts_by_decoder_norm is True.*'batchtopk'.*'jumprelu'",
        ),
        ("step", {"aux_loss_coefficient": 1.0}, "aux_loss_coefficient is 1.0"),
        ("step", {"topk_threshold_lr": 0.1}, "topk_threshold_lr is 0.1, an option of encoder 'batchtopk'"),
        ("step", {"target_l0": 5.0}, "'quadratic' needs a target_l0"),
        ("quadratic", {"target_l0": None}, "'quadratic' needs a target_l0"),
        ("step", {"jumprelu_sparsity_loss_mode": "l1"}, "jumprelu_sparsity_loss_mode must be one of"),
        ("batchtopk", {"l0_coefficient": 2.0}, "l0_coefficient is 2.0, an option of encoder 'jumprelu'"),
        ("batchtopk", {"use_sparse_activations": True}, "use_sparse_activations is True, an option of encoder 'topk'"),
        ("batchtopk", {"kernel": "sparse"}, "kernel 'sparse' works on exactly k"),
        ("batchtopk", {"k": 33.0}, "k must be at most d_sae = 32"),
        ("batchtopk", {"nfm_top_k": 33}, "nfm_top_k must be from 1 to d_sae = 32"),
        ("batchtopk", {"encoder": "topk"}, "k must be a whole number with encoder 'topk', got 3.5"),
        ("batchtopk", {"encoder": "gated"}, "encoder must be one of 'topk', 'batchtopk', 'jumprelu', got 'gated'"),
        ("batchtopk", {"refinement_steps": 1, "normalize_activations": "covariance_whitening"}, "whitening"),
    ],
)
def test_settings_that_cannot_work(form, bad, message):
    with pytest.raises(ValueError, match=message):
        config(form, **bad)


def test_for_inference_there_is_no_batch():
    with pytest.raises(ValueError, match="encoder of an SAE for inference must be one of 'topk', 'jumprelu'"):
        JointNFMSAEConfig(d_in=3, d_sae=8, encoder="batchtopk")
    with pytest.raises(ValueError, match="k is 4"):
        JointNFMSAEConfig(d_in=3, d_sae=8, encoder="jumprelu", k=4)
    sae = JointNFMSAE(JointNFMSAEConfig(d_in=3, d_sae=8, encoder="jumprelu"))
    sae.cfg.selection_stages = 2
    with pytest.raises(ValueError, match="selection_stages is 2"):
        sae(torch.ones(1, 3))


def test_a_class_of_one_s_own_is_derived_from_that_of_the_encoder():
    class Own(JointNFMTrainingSAE):
        pass

    assert type(Own(config("batchtopk", encoder="topk", k=4))) is Own
    with pytest.raises(ValueError, match=r"Own is for encoder 'topk'.*'jumprelu'.*JumpReLUJointNFMTrainingSAE"):
        Own(config("step"))

    class OwnJumpReLU(type(JointNFMTrainingSAE(config("step")))):
        pass

    assert type(OwnJumpReLU(config("step"))) is OwnJumpReLU
    with pytest.raises(ValueError, match="OwnJumpReLU is for encoder 'jumprelu'"):
        OwnJumpReLU(config("batchtopk"))


def test_saelens_s_command_line_offers_them():
    given = ["--architecture", "joint_nfm", "--d_in", "16", "--d_sae", "64"]
    cfg = _parse_cfg_args([*given, "--encoder", "batchtopk", "--k", "7.5"]).sae
    assert (cfg.encoder, cfg.k, cfg.rescale_acts_by_decoder_norm) == ("batchtopk", 7.5, True)
    cfg = _parse_cfg_args([*given, "--encoder", "jumprelu", "--l0_coefficient", "3"]).sae
    assert (cfg.encoder, cfg.k, cfg.l0_coefficient, cfg.rescale_acts_by_decoder_norm) == ("jumprelu", None, 3.0, False)
    cfg = _parse_cfg_args([*given, "--k", "7"]).sae
    assert (cfg.encoder, cfg.k, type(cfg.k)) == ("topk", 7, int)
