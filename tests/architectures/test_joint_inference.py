"""Features chosen in stages and refined through the decoder: against the definition, exact cases, and what a user may meet."""

import dataclasses
import json
from copy import deepcopy

import pytest
import torch
from builders import covering_pairs, edited, inference_sae, random_activations, random_sae, trainer, training_config
from inference_oracle import inferred
from sae_lens import SAE, MatchingPursuitSAE, MatchingPursuitSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.topk_sae import TopK
from scipy.optimize import nnls
from step_forms import step
from torch.func import jacfwd, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from sae_nfm import (
    JointNFMTrainingSAE,
    JointNFMTrainingSAEConfig,
    SequentialNFMTrainingSAE,
    StagedTopKSAE,
    StagedTopKSAEConfig,
    StagedTopKTrainingSAE,
    StagedTopKTrainingSAEConfig,
)
from sae_nfm.architectures import attach_secondary, parameter_count, refined
from sae_nfm.kernels import heads
from sae_nfm.kernels.ranking import Gram
from sae_nfm.kernels.reference import powers, weighted_rows

K = 4


@pytest.fixture
def third_order():
    """A head of somebody else's: the sum over triples of f_i f_j f_l v_i*v_j*v_l."""

    def pool(acts, V):
        one, two, three = (weighted_rows(powers(acts, n), V.pow(n)) for n in (1, 2, 3))
        return (one**3 - 3 * one * two + 2 * three) / 6

    heads.register_head("third_order", pool)
    yield
    del heads.POOLS["third_order"]


def made(architecture, training=False, seed=0, **fields):
    """A tiny SAE with every path on unless told otherwise; sequential ones have no stages."""
    if architecture == "staged_topk":
        for name in ("head", "use_linear_path", "use_square_path", "nfm_top_k", "nfm_dropout"):
            fields.pop(name, None)
        given = {"d_in": 16, "d_sae": 32, "k": K} | fields
        cfg = StagedTopKTrainingSAEConfig(**given)
    else:
        cfg = training_config(architecture, **fields)
    return (random_sae if training else inference_sae)(cfg, seed)


OPTIONS = {
    "architecture": ("joint_nfm", "staged_topk", "sequential_nfm"),
    "head": ("fm", "mlp", "none", "third_order", "bilinear"),
    "nfm_top_k": (None, 2, K),
    "rescale_acts_by_decoder_norm": (True, False),
    "use_linear_path": (True, False),
    "use_square_path": (True, False),
    "apply_b_dec_to_input": (True, False),
    "normalize_activations": ("none", "layer_norm", "constant_norm_rescale"),
    "selection_stages": (1, 2, 3, K),
    "selection_candidates": (None, K + 1, K + 4),
    "refinement_steps": (0, 1, 3),
    "training": (True, False),
    "keeps_scores": (True, False),
}


def keeps(n_tokens, d_sae, n_products, n_stages):
    """In place of `Gram.pays`: wherever it can be."""
    return n_products > 0 and n_stages > 1


@pytest.mark.parametrize(
    "options", [dict(zip(OPTIONS, row.values, strict=True)) for row in covering_pairs(**OPTIONS)], ids=str
)
@torch.no_grad()
def test_activations_are_those_of_the_definition(third_order, monkeypatch, options):
    if options.pop("keeps_scores"):
        monkeypatch.setattr(Gram, "pays", keeps)
    stages, steps = options["selection_stages"], options["refinement_steps"]
    if options["architecture"] == "sequential_nfm":
        del options["selection_stages"], options["selection_candidates"]
    sae, x = made(**options, dtype="float64"), random_activations(rows=6).double()
    expected, clear = inferred(sae, x, stages, steps)
    assert clear.sum() >= 3
    torch.testing.assert_close(sae.encode(x)[clear], expected[clear], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [K, 2 * K])
@torch.no_grad()
def test_the_strongest_that_are_read_may_become_a_part_of_those_chosen(monkeypatch, k):
    """With another TopK than the config's the linear path reads K of k features, and what one writes depends on the others."""
    sae, x, found = (
        made("joint_nfm", nfm_top_k=K, selection_stages=3, dtype="float64"),
        random_activations().double(),
        [],
    )
    sae.activation_fn, sae.W_lin.data = TopK(k), 20 * sae.W_lin
    for pays in (keeps, lambda *given: False):
        monkeypatch.setattr(Gram, "pays", pays)
        found.append(sae.encode(x))
    torch.testing.assert_close(*found)
    assert (found[0] > 0).sum(dim=-1).max() == k


@pytest.mark.parametrize("kept", [[0, 1, 2], [1, 5, 7], [29, 30, 31], [3, 15, 31]])
@pytest.mark.parametrize("keeps_scores", [True, False])
@torch.no_grad()
def test_a_hook_that_leaves_fewer_features_than_stages_choose(monkeypatch, keeps_scores, kept):
    if keeps_scores:
        monkeypatch.setattr(Gram, "pays", keeps)
    kept, x, found = torch.tensor(kept), random_activations(rows=6).double(), []

    def ban(value, hook):
        return torch.full_like(value, -torch.inf).index_copy(-1, kept, value[..., kept])

    for candidates in (None, K + 2):
        sae = made("staged_topk", dtype="float64", selection_stages=K, selection_candidates=candidates)
        sae.W_dec.data = 0.1 * sae.W_dec  # so little is explained that one would be chosen again
        with sae.hooks(fwd_hooks=[("hook_sae_acts_pre", ban)]):
            found.append(sae.encode(x))
    torch.testing.assert_close(*found)
    assert found[0][:, kept].count_nonzero() == found[0].count_nonzero() > 0


def unit_dictionary(d_sae, d_in, seed=0):
    rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows / rows.norm(dim=-1, keepdim=True)


def tied(rows, k, **fields):
    """A staged TopK SAE whose encoder is the transpose of its decoder."""
    d_sae, d_in = rows.shape
    sae = StagedTopKSAE(StagedTopKSAEConfig(d_in=d_in, d_sae=d_sae, k=k, dtype="float64", **fields))
    sae.load_state_dict(sae.state_dict() | {"W_dec": rows, "W_enc": rows.T.contiguous()})
    return sae


def sparse_codes(rows, d_sae, k, seed=1):
    """Activations from 1 to 3 of k features a token."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, d_sae, generator=generator).topk(k, dim=-1).indices
    strengths = 1 + 2 * torch.rand(rows, k, generator=generator, dtype=torch.float64)
    return torch.zeros(rows, d_sae, dtype=torch.float64).scatter(-1, chosen, strengths)


@pytest.mark.parametrize("stages", [1, 3, 8])
@torch.no_grad()
def test_an_orthonormal_dictionary_is_read_exactly_without_refinement(stages):
    rows = torch.linalg.qr(unit_dictionary(20, 20))[0]
    f = sparse_codes(30, 20, 8)
    sae = tied(rows, 8, selection_stages=stages)
    torch.testing.assert_close(sae.encode(f @ rows), f, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_true_features_of_an_incoherent_dictionary_are_found_and_their_strengths():
    rows = unit_dictionary(200, 400)
    assert (rows @ rows.T - torch.eye(200, dtype=torch.float64)).abs().max() <= 0.3
    f = sparse_codes(60, 200, 8)
    plain, refined = (tied(rows, 8, selection_stages=8, refinement_steps=r).encode(f @ rows) for r in (0, 20))
    assert ((plain > 0) == (f > 0)).all()
    assert (plain - f).abs().max() > 0.1  # one after the other, strengths are off
    torch.testing.assert_close(refined, f, rtol=0, atol=1e-3)


@torch.no_grad()
def test_refinement_reaches_the_least_squares_on_the_same_features_and_not_more():
    rows = unit_dictionary(40, 12)
    x = random_activations(rows=16, d_in=12).double()
    errors = []
    for steps in (0, 5, 150):
        sae = tied(rows, 6, selection_stages=2, refinement_steps=steps)
        f = sae.encode(x)
        errors.append((f @ rows - x).norm(dim=-1))
        chosen = tied(rows, 6, selection_stages=2).encode(x) > 0
    found = [nnls(rows[own].T.numpy(), row.numpy())[1] for own, row in zip(chosen, x, strict=True)]
    bound = torch.tensor(found, dtype=torch.float64)
    assert (errors[0] > bound + 0.01).any()
    for error in errors:
        assert (error >= bound - 1e-9).all()
    torch.testing.assert_close(errors[-1], bound, rtol=1e-2, atol=1e-6)


@torch.no_grad()
def test_one_feature_a_stage_is_matching_pursuit():
    rows, k = unit_dictionary(40, 12), 5
    settings = {"residual_threshold": 0.0, "max_iterations": k, "stop_on_duplicate_support": False}
    pursuit = MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=12, d_sae=40, dtype="float64", **settings))
    pursuit.load_state_dict({"W_dec": rows, "b_dec": torch.zeros(12, dtype=torch.float64)})
    x = random_activations(rows=64, d_in=12).double()
    theirs, ours = pursuit.encode(x), tied(rows, k, selection_stages=k).encode(x)
    once = (theirs > 0).sum(dim=-1) == k  # it may choose a feature twice, which is not allowed here
    assert once.sum() > 40
    torch.testing.assert_close(ours[once], theirs[once])


@pytest.mark.parametrize("architecture", ["joint_nfm", "staged_topk", "sequential_nfm"])
def test_one_stage_without_refinement_is_the_encoder_alone_bit_for_bit(architecture):
    sae, x = made(architecture), random_activations()
    of = sae.base if architecture == "sequential_nfm" else sae
    plain = TopKSAE(
        TopKSAEConfig(d_in=16, d_sae=32, k=K, rescale_acts_by_decoder_norm=of.cfg.rescale_acts_by_decoder_norm)
    )
    plain.load_state_dict({name: of.state_dict()[name] for name in plain.state_dict()})
    assert torch.equal(sae.encode(x), plain.encode(x))


@pytest.mark.parametrize("architecture", ["joint_nfm", "sequential_nfm"])
def test_folders_from_before_there_was_inference_load(architecture, tmp_path):
    sae, x = made(architecture), random_activations()
    sae.save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    for name in ("selection_stages", "refinement_steps"):
        config.pop(name, None)
    edited(tmp_path / "cfg.json", json.dumps(config))
    assert torch.equal(SAE.load_from_disk(tmp_path)(x), sae(x))


def test_a_folder_of_a_staged_sae_says_how_it_infers(tmp_path):
    made("staged_topk", selection_stages=2).save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    del config["selection_stages"]
    edited(tmp_path / "cfg.json", json.dumps(config))
    with pytest.raises(ValueError, match="lacks 'selection_stages'"):
        SAE.load_from_disk(tmp_path)


FORMS = {"selection_stages": 2, "refinement_steps": 3}


@pytest.mark.parametrize("architecture", ["joint_nfm", "staged_topk"])
def test_matrices_or_active_features_batches_or_single_tokens(architecture):
    """In float32; the tolerance is rounding times the few operations between a pre-activation and the output."""
    x = random_activations(rows=12)
    dense, sparse, coo = (made(architecture, training=True, **FORMS, **of) for of in
                          ({"kernel": "dense"}, {"kernel": "sparse"}, {"use_sparse_activations": True}))  # fmt: skip
    acts = coo.encode(x)
    assert acts.is_sparse
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(acts.to_dense(), dense.encode(x), **close)
    torch.testing.assert_close(coo(x), dense(x), **close)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), dense(x), **close)
        torch.testing.assert_close(torch.cat([dense(row[None]) for row in x]), dense(x), **close)
        torch.testing.assert_close(dense(x.reshape(3, 4, -1)), dense(x).reshape(3, 4, -1), **close)
        assert dense(x[:0]).shape == x[:0].shape


@pytest.mark.parametrize("architecture", ["joint_nfm", "staged_topk", "sequential_nfm"])
@pytest.mark.parametrize("head", ["fm", "third_order"])
@torch.no_grad()
def test_no_refinement_raises_the_error_of_a_token(third_order, architecture, head):
    """With nonlinear paths so strong that a step along the gradient often leads uphill; in float32, to its rounding."""
    x, stayed, before = 3 * random_activations(rows=100), 0, None
    for steps in (0, 1, 3):
        sae = made(architecture, head=head, refinement_steps=steps)
        for name in ("V", "U"):
            if hasattr(sae, name):
                getattr(sae, name).mul_(4)
        f = sae.encode(x)
        error = (sae(x) - x).square().sum(dim=-1)
        if before is not None:
            assert (error <= before[0] * (1 + 1e-5)).all()
            stayed += int((f == before[1]).all(dim=-1).sum())
        before = error, f
    assert stayed > 0 or architecture == "staged_topk"


def other_hook(calls, name, change=None):
    def note(value, hook):
        calls.append(name)
        return value if change is None else change(value)

    return name, note


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("architecture", ["joint_nfm", "staged_topk", "sequential_nfm"])
def test_hooks_fire_once(architecture, training):
    fields = {"refinement_steps": 2} | ({} if architecture == "sequential_nfm" else {"selection_stages": 3})
    sae, calls = made(architecture, training=training, dtype="float64", **fields), []
    x = random_activations().double()
    names = [name for name in sae.hook_dict if "secondary" not in name and name != "hook_sae_error"]
    hooks = [other_hook(calls, name) for name in names]
    plain = sae(x)
    assert torch.equal(sae.run_with_hooks(x, fwd_hooks=hooks), plain)
    assert sorted(calls) == sorted(names)
    sae.use_error_term = True
    calls.clear()
    torch.testing.assert_close(sae.run_with_hooks(x, fwd_hooks=hooks), x)
    assert sorted(calls) == sorted(names)


def test_the_first_stage_is_what_is_hooked_and_a_change_there_holds_in_every_stage():
    sae, x, seen = made("joint_nfm", **FORMS), random_activations(), []
    with torch.no_grad():
        sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_pre", lambda v, hook: seen.append(v))])
        torch.testing.assert_close(seen[0], (x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        found = sae.encode(x)
        banned = int(found.sum(dim=0).argmax())

        def ban(value, hook):
            value[..., banned] = -torch.inf
            return value

        with sae.hooks(fwd_hooks=[("hook_sae_acts_pre", ban)]):
            without = sae.encode(x)
    assert (found[:, banned] > 0).any()
    assert (without[:, banned] == 0).all()
    assert ((without > 0).sum(dim=-1) <= K).all()


def test_the_code_holds_whatever_becomes_of_a_path():
    """Ablations and edits of paths change the output, not the features; a clamp of a feature stays."""
    sae, x, seen = made("joint_nfm", **FORMS), random_activations(), []
    code = sae.encode(x)
    zero = lambda value, hook: torch.zeros_like(value)  # noqa: E731
    note = ("hook_sae_acts_post", lambda value, hook: seen.append(value))
    for name in ("hook_nfm_linear", "hook_nfm_interaction", "hook_nfm_square_in", "hook_nfm_pooled", "hook_sae_recons"):
        out = sae.run_with_hooks(x, fwd_hooks=[note, (name, zero)])
        assert torch.equal(seen.pop(), code)
        assert not torch.allclose(out, sae(x))

    def clamp(value, hook):
        value = value.clone()
        value[..., 5] = 9.0
        return value

    expected = sae.decode(clamp(code, None))
    assert torch.equal(sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", clamp)]), expected)
    secondary = TopKSAE(TopKSAEConfig(d_in=8, d_sae=16, k=2))
    with attach_secondary(sae, secondary):
        assert torch.equal(sae.encode(x), code)
        assert not torch.allclose(sae(x), sae.decode_paths(code).direct)
    trained = made("joint_nfm", training=True, nfm_dropout=0.5, **FORMS)
    output = step(trained, x)
    assert torch.equal(output.feature_acts, trained.encode(x))


@pytest.mark.parametrize(
    ("architecture", "rescale"),
    [("joint_nfm", True), ("joint_nfm", False), ("staged_topk", True), ("sequential_nfm", False)],
)
def test_gradients_are_those_of_finite_differences(third_order, architecture, rescale):
    """Of the output by the input and by the weights, where no choice changes; steps through refinements included."""
    fields = {"refinement_steps": 2, "rescale_acts_by_decoder_norm": rescale, "head": "third_order", "nfm_top_k": None}
    fields |= {} if architecture == "sequential_nfm" else {"selection_stages": 2}
    sae = made(architecture, training=True, dtype="float64", **fields)
    if architecture == "sequential_nfm":
        sae.nfm_scale.fill_(2.0)
    x = random_activations(rows=3).double().requires_grad_()
    weights = [weight for weight in sae.parameters() if weight.requires_grad]
    generator = torch.Generator().manual_seed(4)
    towards = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((sae(x) * towards).sum(), [x, *weights])
    assert all((gradient != 0).any() for gradient in gradients)
    for changed, expected in (([x], gradients[:1]), (weights, gradients[1:])):
        along = [torch.randn(at.shape, generator=generator, dtype=torch.float64) for at in changed]
        values, supports = [], []
        with torch.no_grad():
            for move in (1e-6, -2e-6):
                for at, direction in zip(changed, along, strict=True):
                    at += move * direction
                values.append((sae(x) * towards).sum())
                supports.append(sae.encode(x) != 0)
            for at, direction in zip(changed, along, strict=True):
                at += 1e-6 * direction
        assert torch.equal(*supports)
        slope = sum((gradient * direction).sum() for gradient, direction in zip(expected, along, strict=True))
        torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["joint_nfm", "staged_topk"])
@pytest.mark.parametrize("sparse", [True, False])
def test_the_dead_feature_loss_reads_the_first_stage_and_the_last_residual(architecture, sparse):
    coo = {"use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": False}
    sae, x = made(architecture, training=True, **FORMS, **coo), random_activations()
    dead = torch.arange(32) < 20
    output = step(sae, x, dead)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(output.hidden_pre, pre)
    top = pre.masked_fill(~dead, -torch.inf).topk(8, dim=-1)
    recons = torch.zeros_like(pre).scatter(-1, top.indices, top.values) @ sae.W_dec
    expected = (recons - (x - sae(x)).detach()).square().sum(dim=-1).mean()
    torch.testing.assert_close(output.losses["auxiliary_reconstruction_loss"], expected)
    # a step decodes with the sum of both decoders where these read the same
    weights, error = list(sae.parameters()), (sae(x) - x).square().sum(dim=-1).mean()
    found = torch.autograd.grad(output.losses["mse_loss"], weights, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(error, weights), rtol=1e-4, atol=1e-4)
    output.loss.backward()
    assert all(weight.grad.isfinite().all() for weight in weights)


@pytest.mark.parametrize("architecture", ["joint_nfm", "staged_topk", "sequential_nfm"])
def test_saelens_trains_it(architecture):
    fields = {"refinement_steps": 1} | ({} if architecture == "sequential_nfm" else {"selection_stages": 2})
    sae = made(architecture, training=True, **fields)
    before = {name: weight.clone() for name, weight in sae.state_dict().items()}
    trainer(sae).fit()
    assert sum(not torch.equal(before[name], weight) for name, weight in sae.state_dict().items()) >= 4


@pytest.mark.parametrize("architecture", ["joint_nfm", "staged_topk", "sequential_nfm"])
def test_the_saved_sae_infers_as_its_training_config_says(architecture, tmp_path):
    own = {"refinement_steps": 1, "inference_refinement_steps": 3}
    if architecture != "sequential_nfm":
        own |= {"selection_stages": 2, "inference_selection_stages": 4}
    sae, x = made(architecture, training=True, dtype="float64", **own), random_activations().double()
    sae.save_inference_model(tmp_path / "saved")
    sae.save_model(tmp_path / "checkpoint")
    details = json.loads((tmp_path / "saved" / "cfg.json").read_text())["metadata"]["training_architecture_details"]
    for folder in ("saved", "checkpoint"):  # SAELens reads a checkpoint as an inference SAE too
        loaded = SAE.load_from_disk(tmp_path / folder)
        for name, value in own.items():
            assert not name.startswith("inference_") or getattr(loaded.cfg, name.removeprefix("inference_")) == value
            assert details[name] == value
    again = type(sae).load_from_disk(tmp_path / "checkpoint")
    assert {name: getattr(again.cfg, name) for name in own} == own
    sae.cfg.refinement_steps = 3
    if architecture != "sequential_nfm":
        sae.cfg.selection_stages = 4
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "saved")(x), sae(x))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"selection_stages": 0}, r"selection_stages .*from 1 to k = 4.* 0$"),
        ({"selection_stages": 5}, r"selection_stages .*from 1 to k = 4.* 5$"),
        ({"selection_candidates": 3}, r"selection_candidates must be from k = 4 to d_sae = 8.* 3$"),
        ({"selection_candidates": 9}, r"selection_candidates must be from k = 4 to d_sae = 8.* 9$"),
        ({"inference_selection_stages": 5}, r"inference_selection_stages .* 5$"),
        ({"refinement_steps": -1}, r"refinement_steps must be >= 0, got -1"),
        ({"inference_refinement_steps": -1}, r"inference_refinement_steps must be >= 0, got -1"),
        ({"refinement_steps": 2, "normalize_activations": "covariance_whitening"}, "whitening"),
        ({"inference_refinement_steps": 2, "normalize_activations": "covariance_whitening"}, "whitening"),
    ],
)
@pytest.mark.parametrize("config_class", [JointNFMTrainingSAEConfig, StagedTopKTrainingSAEConfig])
def test_settings_that_cannot_work(config_class, bad, message):
    with pytest.raises(ValueError, match=message):
        config_class(**({"d_in": 3, "d_sae": 8, "k": 4} | bad))


def test_a_staged_sae_as_a_base_keeps_its_own_features():
    base, x = made("staged_topk", **FORMS), random_activations()
    sae = SequentialNFMTrainingSAE.wrap(base, nfm_dim=4)
    assert torch.equal(sae.encode(x), base.encode(x))
    assert torch.equal(sae.decode_paths(sae.encode(x)).direct, base(x))


def test_a_sequential_sae_is_refined_towards_the_input_as_hooked():
    sae, x = made("sequential_nfm", dtype="float64", refinement_steps=2), random_activations().double()
    halve = ("hook_sae_input", lambda value, hook: value / 2)
    torch.testing.assert_close(sae.run_with_hooks(x, fwd_hooks=[halve]), sae(x / 2))
    assert sae.base_input is None


def test_a_subclass_that_decodes_otherwise_is_inferred_through_what_it_decodes():
    class Halved(StagedTopKSAE):
        def decode_paths(self, feature_acts):
            paths = super().decode_paths(feature_acts)
            return paths._replace(direct=paths.direct / 2)

    sae, x = made("staged_topk", dtype="float64", selection_stages=2), random_activations().double()
    other = Halved(sae.cfg)
    other.load_state_dict(sae.state_dict())
    nothing = torch.zeros(1, 32, dtype=torch.float64)
    first = inference_of_first_stage(sae, x)
    explained = (sae.decode_paths(first).direct - sae.decode_paths(nothing).direct) / 2
    pre = ((x - sae.b_dec - explained) @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(
        dim=-1
    ) ** sae.cfg.rescale_acts_by_decoder_norm
    second = pre.masked_fill(first != 0, -torch.inf).topk(2, dim=-1)
    expected = first.scatter(-1, second.indices, second.values.relu())
    torch.testing.assert_close(other.encode(x), expected)


def inference_of_first_stage(sae, x):
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    pre = pre * sae.W_dec.norm(dim=-1) ** sae.cfg.rescale_acts_by_decoder_norm
    top = pre.topk(2, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def test_another_activation_function_is_refused_where_it_would_be_passed_over():
    sae = made("joint_nfm", **FORMS)
    sae.activation_fn = torch.nn.ReLU()
    with pytest.raises(ValueError, match=r"activation_fn is ReLU.*selection_stages = 1"):
        sae(random_activations())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["joint_nfm", "sequential_nfm"])
def test_inference_within_a_compiled_sae(architecture):
    fields = {"refinement_steps": 2} | ({} if architecture == "sequential_nfm" else {"selection_stages": 2})
    sae, x = made(architecture, **fields), random_activations()
    torch.testing.assert_close(torch.compile(sae, backend="eager")(x), sae(x), rtol=1e-4, atol=1e-4)


def test_the_command_lines_offer_it():
    given = [
        "--d_in",
        "16",
        "--d_sae",
        "64",
        "--k",
        "8",
        "--selection_stages",
        "4",
        "--inference_refinement_steps",
        "5",
    ]
    cfg = _parse_cfg_args(["--architecture", "staged_topk", *given]).sae
    assert isinstance(cfg, StagedTopKTrainingSAEConfig)
    saved = cfg.get_inference_sae_cfg_dict()
    assert (cfg.refinement_steps, saved["selection_stages"], saved["refinement_steps"]) == (0, 4, 5)
    assert parameter_count(cfg) == sum(p.numel() for p in StagedTopKTrainingSAE(cfg).parameters())


def test_a_base_with_negative_activations_is_not_refined():
    from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig

    base = AbsTopKSAE(AbsTopKSAEConfig(d_in=16, d_sae=32, k=4))
    with pytest.raises(ValueError, match="abstopk"):
        SequentialNFMTrainingSAE.wrap(base, nfm_dim=4, inference_refinement_steps=2)


class Largest(TorchDispatchMode):
    """The most numbers of one tensor that is made within it."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.found = max(self.found, one.numel())
        return out


@pytest.mark.parametrize("gradient", [True, False])
def test_no_tensor_has_a_direction_for_each_active_feature(gradient):
    """Tokens times features is the largest; k d_in numbers a token would be twice as many."""
    k, d_in, d_sae, rows = 16, 64, 512, 64
    fields = {"use_square_path": True, "nfm_dim": 8, "selection_stages": 2, "refinement_steps": 1}
    sae = JointNFMTrainingSAE(JointNFMTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **fields))
    with Largest() as largest, torch.set_grad_enabled(gradient):
        out = sae(random_activations(rows=rows, d_in=d_in))
        if gradient:
            out.sum().backward()
    assert largest.found <= max(rows * d_sae, d_in * d_sae) < rows * k * d_in


@pytest.mark.parametrize("architecture", ["joint_nfm", "sequential_nfm"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@torch.no_grad()
def test_half_precision_is_inferred_in_float32(architecture, dtype):
    fields = {"refinement_steps": 3} | ({} if architecture == "sequential_nfm" else {"selection_stages": 2})
    sae, x = made(architecture, **fields).to(getattr(torch, dtype)), random_activations()
    wide = deepcopy(sae).float()
    acts, expected = sae.encode(x), wide.encode(x.to(sae.dtype).float())
    assert acts.dtype == sae.dtype
    same = ((acts > 0) == (expected > 0)).all(dim=-1)  # the encoder's own rounding chooses otherwise now and then
    assert same.float().mean() > 0.6
    rounding = 4 * torch.finfo(sae.dtype).eps
    torch.testing.assert_close(acts[same].float(), expected[same], rtol=8 * rounding, atol=8 * rounding)
    with torch.autocast("cpu", torch.bfloat16):
        found = wide.encode(x)
    same = ((found > 0) == (expected > 0)).all(dim=-1)
    assert same.float().mean() > 0.6
    # of the encoder's product alone in bfloat16: a refined activation is then that of float32 but for where it began
    torch.testing.assert_close(found[same], expected[same], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("architecture", ["joint_nfm", "sequential_nfm"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_inference_under_transforms_and_without_gradients(architecture):
    fields = {"refinement_steps": 1} | ({} if architecture == "sequential_nfm" else {"selection_stages": 2})
    sae, x = made(architecture, dtype="float64", **fields), random_activations(rows=4).double()
    plain = sae(x).detach()
    torch.testing.assert_close(vmap(sae)(x), plain)
    expected = torch.autograd.functional.jacobian(sae, x[0])
    torch.testing.assert_close(jacrev(sae)(x[0]), expected)
    torch.testing.assert_close(jacfwd(sae)(x[0]), expected)
    with torch.inference_mode():
        torch.testing.assert_close(sae(x), plain)
        torch.testing.assert_close(deepcopy(sae)(x), plain)
    meta = deepcopy(sae).to("meta")
    if architecture == "joint_nfm":
        assert meta(x.to("meta")).shape == x.shape


@pytest.mark.parametrize(
    "architecture",
    [
        "topk",
        "batchtopk",
        "jumprelu",
        "gated",
        "standard",
        "matching_pursuit",
        "staged_topk",
        "joint_nfm",
        "sequential_nfm",
    ],
)
@torch.no_grad()
def test_an_sae_of_any_architecture_is_refined_on_the_features_it_chose(architecture, tmp_path):
    fields = {"max_iterations": K, "decoder_init_norm": 1.0} if architecture == "matching_pursuit" else {"k": K}
    if architecture in ("joint_nfm", "sequential_nfm", "staged_topk"):
        trained = made(architecture, training=True)
    else:
        known = {field.name for field in dataclasses.fields(get_sae_training_class(architecture)[1])}
        fields = {name: value for name, value in fields.items() if name in known}
        trained = random_sae(get_sae_training_class(architecture)[1](d_in=16, d_sae=32, **fields))
    if architecture == "batchtopk":
        trained.topk_threshold.fill_(1.0)
    trained.save_inference_model(tmp_path / "sae")
    sae, x, state = SAE.load_from_disk(tmp_path / "sae").eval(), random_activations(), torch.get_rng_state()
    plain, fitted = refined(sae, 0), refined(sae, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not fitted.training
    before, after = sae.encode(x), fitted.encode(x)
    assert torch.equal(plain.encode(x), before)
    torch.testing.assert_close(plain.decode(before), sae.decode(before))
    assert not after[before == 0].any()
    assert (after >= 0).all()
    error, fitted_error = ((x - one.decode(acts)).square().sum(-1) for one, acts in ((sae, before), (fitted, after)))
    assert (fitted_error <= error * (1 + 1e-5)).all()  # decoded from a matrix here
    assert fitted_error.sum() < 0.9 * error.sum()
    if architecture == "topk":  # as on any base
        same = SequentialNFMTrainingSAE.wrap(sae, head="none", use_linear_path=False, refinement_steps=3)
        torch.testing.assert_close(after, same.encode(x), atol=1e-4, rtol=1e-4)  # float32, another order of sums
    assert getattr(sae.cfg, "refinement_steps", 0) == 0


def test_what_cannot_be_refined():
    transcoder = SAE.from_dict(
        {"architecture": "transcoder", "d_in": 16, "d_sae": 32, "d_out": 16, "apply_b_dec_to_input": False}
    )
    with pytest.raises(ValueError, match="'transcoder' cannot be a base: it reads one place and writes another"):
        refined(transcoder, 2)
    for one in (made("staged_topk"), TopKSAE(TopKSAEConfig(d_in=16, d_sae=32, k=K))):
        with pytest.raises(ValueError, match=r"refinement_steps must be >= 0, got -1"):
            refined(one, -1)
