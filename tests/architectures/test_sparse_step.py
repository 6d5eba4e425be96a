"""A training step on the active features alone is the dense step: losses, gradients, statistics, trajectory."""

import dataclasses
import itertools

import pytest
import torch
from builders import D_SAE, covering_pairs, random_activations, random_sae, trainer, training_config
from kernel_inputs import Operations
from sae_lens import SAETrainer, TopKTrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.util import temporary_seed
from step_forms import HOOK, both_kernels, for_every_architecture, of_sparse_step, step

from sae_nfm.architectures import JointNFMTrainingSAE
from sae_nfm.kernels import reference


@for_every_architecture
@pytest.mark.parametrize(
    ("stages", "paths", "nfm_top_k", "rescale", "kernel"),
    covering_pairs(
        stages=[
            {},
            {"selection_stages": 3},
            {"selection_stages": 4, "selection_candidates": 5},
        ],
        paths=[
            {},
            {"use_square_path": False},
            {"head": "mlp"},
            {"head": "bilinear"},
            {"head": "none", "use_square_path": False},
            {"use_linear_path": False},
            {"apply_b_dec_to_input": False},
        ],
        nfm_top_k=[None, 3, 4],
        rescale=[True, False],
        kernel=["sparse", "dense"],
    ),
)
def test_losses_and_gradients(architecture, stages, paths, nfm_top_k, rescale, kernel):
    """Either form of the step against SAELens's, which a dense step with hooks is."""
    options = {"rescale_acts_by_decoder_norm": rescale, "nfm_top_k": nfm_top_k}
    sae, saelens = both_kernels(architecture, **options, **paths, **stages)
    sae.cfg.kernel = kernel
    x = random_activations().double()
    with saelens.hooks(fwd_hooks=[HOOK]):
        ours, reference = step(sae, x), step(saelens, x)
    assert of_sparse_step(ours) == (kernel == "sparse")
    assert not of_sparse_step(reference)
    for output in (ours, reference):
        assert not output.feature_acts.is_sparse
        # an addition of a subclass or a trainer to the loss reaches the weights through what the step returns
        more = output.feature_acts.square().sum() + output.hidden_pre.square().mean()
        (output.loss + more).backward()
    torch.testing.assert_close(ours.sae_out, reference.sae_out)
    torch.testing.assert_close(ours.loss, reference.loss)
    torch.testing.assert_close(ours.feature_acts, reference.feature_acts)
    torch.testing.assert_close(ours.hidden_pre, reference.hidden_pre)
    for name, parameter in saelens.named_parameters():
        torch.testing.assert_close(dict(sae.named_parameters())[name].grad, parameter.grad, msg=name)
        assert parameter.grad.abs().sum() > 0, name


@for_every_architecture
@pytest.mark.parametrize("nfm_top_k", [None, 3])
def test_two_projections_are_summed_from_stage_to_stage(architecture, nfm_top_k):
    """Features of a later stage make products with those of the stages before, in both projections."""
    sae, dense = both_kernels(architecture, head="bilinear", selection_stages=4, nfm_top_k=nfm_top_k)
    for one in (sae, dense):  # larger products make each stage's activations many times those of the one before
        one.V.data *= 0.1
    ours, reference = (step(one, random_activations().double()) for one in (sae, dense))
    assert (of_sparse_step(ours), of_sparse_step(reference)) == (True, False)
    for output in (ours, reference):
        output.loss.backward()
    torch.testing.assert_close(ours.sae_out, reference.sae_out)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(dict(sae.named_parameters())[name].grad, parameter.grad, msg=name)


@for_every_architecture
@pytest.mark.parametrize("use_sparse_activations", [True, False])
def test_the_dense_step_multiplies_with_the_sum_of_the_decoders(architecture, use_sparse_activations):
    """Two decoders read the same features: one product in place of two, unless hooks want the paths one by one."""
    options = {"use_sparse_activations": use_sparse_activations, "rescale_acts_by_decoder_norm": False}
    products = {}
    for nfm_top_k, hooks in itertools.product((None, 3, 4), ((), (HOOK,))):
        _, dense = both_kernels(architecture, nfm_top_k=nfm_top_k, **options)
        with Operations() as operations, dense.hooks(fwd_hooks=list(hooks)):
            step(dense, random_activations().double())
        products[nfm_top_k, hooks] = sum(operations.count[name] for name in ("mm", "addmm", "_embedding_bag"))
    assert products[None, ()] == products[None, (HOOK,)] - 1
    assert products[4, ()] == products[4, (HOOK,)] - 1  # 4 is k
    assert products[3, ()] == products[3, (HOOK,)]


@for_every_architecture
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("use_sparse_activations", [True, False])
def test_looking_at_the_paths_does_not_change_a_bit(architecture, kernel, use_sparse_activations):
    gradients = []
    for keep_paths in (True, False):
        sae = both_kernels(
            architecture,
            nfm_top_k=None,
            use_sparse_activations=use_sparse_activations,
            rescale_acts_by_decoder_norm=False,
        )[0]
        sae.cfg.kernel, sae.keep_paths = kernel, keep_paths
        step(sae, random_activations().double()).loss.backward()
        gradients.append([parameter.grad for parameter in sae.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@for_every_architecture
@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "sparse"},
        {"kernel": "sparse", "nfm_top_k": 16, "head": "mlp"},
        {"kernel": "sparse", "head": "bilinear"},
        {"kernel": "dense"},
        {"kernel": "dense", "use_sparse_activations": True},
    ],
)
def test_two_threads_give_the_same_bits_every_time(architecture, options):
    """Sums over the tokens of a feature are made in a fixed order: no operation adds from several threads at once."""
    settings = {"d_sae": 256, "k": 32, "nfm_top_k": None} | options
    sae, x = random_sae(training_config(architecture, **settings)), random_activations(rows=1024)
    dead = torch.arange(256) < 40
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(3):
            sae.zero_grad()
            step(sae, x, dead).loss.backward()
            found.append([parameter.grad.clone() for parameter in sae.parameters()])
    finally:
        torch.set_num_threads(threads)
    for again in found[1:]:
        torch.testing.assert_close(again, found[0], rtol=0, atol=0)


@for_every_architecture
def test_the_gradient_of_the_activations(architecture):
    """Nobody asks for it in training; who does has it from either form, with b_dec's, which depends on it."""
    gradients = []
    for sae in both_kernels(architecture):
        x = random_activations().double().requires_grad_()
        gradients.append(torch.autograd.grad(step(sae, x).loss, [x, sae.b_dec]))
    torch.testing.assert_close(*gradients)


@for_every_architecture
@pytest.mark.parametrize(
    ("n_dead", "normalisation", "rescale"),
    covering_pairs(
        n_dead=[1, 3, 7, 20], normalisation=["none", "constant_norm_rescale", "layer_norm"], rescale=[True, False]
    ),
)
def test_dead_feature_loss(architecture, n_dead, normalisation, rescale):
    sparse, dense = both_kernels(
        architecture, normalize_activations=normalisation, rescale_acts_by_decoder_norm=rescale
    )
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))[:n_dead]] = True
    x = random_activations().double()
    losses = [step(sae, x, dead).losses["auxiliary_reconstruction_loss"] for sae in (sparse, dense)]
    assert losses[1] > 0
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for name, parameter in dense.named_parameters():
        grad = dict(sparse.named_parameters())[name].grad
        grad = torch.zeros_like(parameter) if grad is None else grad
        torch.testing.assert_close(
            grad, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, msg=name
        )


@for_every_architecture
@pytest.mark.parametrize("nfm_top_k", [None, 3])  # None: a dense step sums the decoders
@pytest.mark.parametrize("normalisation", ["none", "constant_norm_rescale", "layer_norm"])
def test_metrics_of_the_paths(architecture, normalisation, nfm_top_k):
    sparse, dense = both_kernels(architecture, normalize_activations=normalisation, nfm_top_k=nfm_top_k)
    x = random_activations().double()
    metrics = [{n: metric() for n, metric in step(sae, x, logging=True).metrics.items()} for sae in (sparse, dense)]
    assert metrics[0].keys() == metrics[1].keys()
    torch.testing.assert_close(*metrics)
    for sae in (sparse, dense):
        unlogged = step(sae, x).metrics
        assert set(unlogged) == {"fvu_all"}
        torch.testing.assert_close(unlogged["fvu_all"](), metrics[1]["fvu_all"])


@for_every_architecture
@pytest.mark.parametrize("hook_name", ["hook_sae_acts_post", "hook_sae_acts_pre", "hook_nfm_pooled", "hook_sae_recons"])
def test_hooks_act_in_a_sparse_step_too(architecture, hook_name):
    sparse, dense = both_kernels(architecture)
    x, outputs = random_activations().double(), []
    for sae in (sparse, dense):
        with sae.hooks(fwd_hooks=[(hook_name, lambda value, hook: 0.5 * value)]):
            outputs.append(step(sae, x).sae_out)
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0], step(dense, x).sae_out)


@for_every_architecture
@pytest.mark.parametrize("kind", ["fwd_hooks", "bwd_hooks"])
def test_the_decoders_are_not_summed_past_a_hook(architecture, kind):
    """A hook of either direction sees the linear path also where both decoders read the same features."""
    for sae in both_kernels(architecture, nfm_top_k=None):
        seen = []
        with sae.hooks(**{kind: [("hook_nfm_linear", lambda value, hook, seen=seen: seen.append(value))]}):
            step(sae, random_activations().double()).loss.backward()
        assert len(seen) == 1


@for_every_architecture
def test_a_summed_step_leaves_the_paths_of_later_decoding(architecture):
    _, dense = both_kernels(architecture, nfm_top_k=None)
    x = random_activations().double()
    before = dense.decode_paths(dense.encode(x)).present()
    step(dense, x)
    after = dense.decode_paths(dense.encode(x)).present()
    torch.testing.assert_close(after, before, rtol=0, atol=0)  # no parameter has changed: the same sums


@for_every_architecture
def test_the_gradient_of_b_dec_is_summed_in_float32_under_autocast(architecture):
    """-W_enc g for a gradient g of the encoder's bias; in bfloat16 it would be wrong in the third digit."""
    sae, x = random_sae(training_config(architecture, kernel="sparse")), random_activations()
    g = torch.randn(D_SAE, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, b_enc = sae._encoder_input(x)
    (gradient,) = torch.autograd.grad((b_enc * g).sum(), sae.b_dec)
    # 32 terms of order 0.3 in float32, in another order: 1e-6; bfloat16 is wrong by 1e-3 and more
    torch.testing.assert_close(gradient, -(sae.W_enc @ g), rtol=1e-5, atol=1e-5)


@for_every_architecture
@pytest.mark.parametrize(("nfm_top_k", "routes"), [(None, 1), (3, 2)])
def test_a_sparse_step_orders_its_entries_once(architecture, nfm_top_k, routes):
    """Once for all paths, once more for the features that the NFM reads, for the encoder, and for SAELens's statistics."""
    sae, _ = both_kernels(architecture, nfm_top_k=nfm_top_k)
    with Operations() as operations, sae.counted():
        output = step(sae, random_activations().double())
        assert output.feature_acts.is_sparse
        output.loss.backward()
    assert operations.count["argsort"] + operations.count["sort"] == routes + 2


def saelens_trainer(sae, steps, **settings):
    cfg = {
        "total_training_samples": steps * 24,
        "train_batch_size_samples": 24,
        "lr": 1e-2,
        "lr_end": 1e-2,
        "dead_feature_window": 3,
        "feature_sampling_window": 20,
        "n_batches_for_norm_estimate": 4,
    }
    batches = (random_activations(seed=seed).double() for seed in itertools.count(10))
    return SAETrainer(SAETrainerConfig(**(cfg | settings)), sae, batches)


@for_every_architecture
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nfm_top_k": None, "nfm_dropout": 0.2},
        {"rescale_acts_by_decoder_norm": False, "normalize_activations": "expected_average_only_in"},
    ],
    ids=["all paths", "summed decoders, dropout", "scaled, norms as they are"],
)
def test_same_trajectory(architecture, options):
    """Thirty steps of SAELens's trainer with the same seed, dead features among them; in float64, so that no rounding decides
    which feature is chosen.
    """
    runs = []
    for kernel in ("sparse", "dense"):
        sae = random_sae(training_config(architecture, **options, kernel=kernel, dtype="float64"))
        saelens, losses, dead = saelens_trainer(sae, steps=30), [], []
        one_step = saelens.step

        def remember(batch, one_step=one_step, losses=losses, dead=dead, saelens=saelens):
            dead.append(int(saelens.dead_neurons.sum()))
            output = one_step(batch)
            losses.append(output.loss.item())
            return output

        saelens.step = remember
        with temporary_seed(0):
            saelens.fit()
        runs.append((torch.tensor(losses, dtype=torch.float64), dead, saelens))
    (ours, dead, sparse), (reference, dead_reference, dense) = runs
    assert max(dead) > 0
    assert dead == dead_reference
    assert reference[-5:].mean() < 0.8 * reference[:5].mean()
    # rounding of 1e-16 a step, which Adam's division by small second moments enlarges
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=0)
    assert torch.equal(sparse.act_freq_scores, dense.act_freq_scores)
    assert torch.equal(sparse.n_forward_passes_since_fired, dense.n_forward_passes_since_fired)
    assert sparse.sae.cfg.metadata.l0 == pytest.approx(dense.sae.cfg.metadata.l0)


@for_every_architecture
def test_no_matrix_of_all_features_is_kept(architecture):
    """What a sparse step saves for its backward pass has no [batch, d_sae] tensor."""
    rows = 48
    sae = random_sae(training_config(architecture, kernel="sparse"))
    shapes = []

    def note(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step(sae, random_activations(rows=rows), torch.arange(D_SAE) % 6 == 0)
    assert (rows, 4) in shapes
    assert (rows, D_SAE) not in shapes


@for_every_architecture
def test_trainer_logs_what_it_logs_of_a_dense_step(architecture):
    logs = []
    for kernel in ("sparse", "dense"):
        saelens = trainer(random_sae(training_config(architecture, kernel=kernel)))
        logs.append(saelens.build_train_step_log_dict(saelens.step(random_activations()), n_training_samples=24))
    ours, reference = logs
    assert {key for key in reference if not key.startswith("metrics/")} <= ours.keys() <= reference.keys()
    for key, value in ours.items():
        assert value == pytest.approx(reference[key], rel=1e-5), key


@for_every_architecture
@pytest.mark.parametrize("nfm_top_k", [None, 3])
@pytest.mark.parametrize("edit", ["none", "negative", "more", "fewer"])
def test_decoding_without_a_gradient_reads_the_active_features_alone(architecture, nfm_top_k, edit):
    sparse, dense = both_kernels(architecture, nfm_top_k=nfm_top_k)
    x = random_activations().double()
    with torch.no_grad():
        acts = dense.encode(x)
        acts = {
            "none": acts,
            "negative": -acts,
            "more": acts + 0.1,
            "fewer": acts * (torch.arange(D_SAE) % 2),
        }[edit]
        torch.testing.assert_close(sparse.decode(acts), dense.decode(acts))
        assert (reference.sparse_acts_from_dense(acts, 4) is None) == (edit in ("more", "negative"))
        assert sparse.decode(acts[:0]).shape == (0, 16)
    # where a gradient is wanted, it reaches features that are not active, too
    acts.requires_grad_()
    sparse.decode(acts).sum().backward()
    assert (acts.grad[acts == 0] != 0).any() or edit == "more"


def test_unknown_kernel():
    with pytest.raises(ValueError, match=r"kernel.*'auto', 'dense', 'sparse'.*'quick'"):
        training_config("joint_nfm", kernel="quick")


def in_subclass(name, method):
    return lambda sae: setattr(sae, "__class__", type("Changed", (type(sae),), {name: method}))


def doubled(self, *args, **kwargs):
    acts, hidden_pre = TopKTrainingSAE.encode_with_hidden_pre(self, *args, **kwargs)
    return 2 * acts, hidden_pre


CHANGES = {
    "aux loss": in_subclass("calculate_aux_loss", lambda self, **_: {"mine": torch.tensor(7.0)}),
    "aux loss of an instance": lambda sae: setattr(sae, "calculate_aux_loss", lambda **_: {"mine": torch.tensor(7.0)}),
    "dead-feature loss": in_subclass("calculate_topk_aux_loss", lambda self, **_: torch.tensor(7.0)),
    "encoder": in_subclass("encode_with_hidden_pre", doubled),
    "decoder": in_subclass("decode", lambda self, acts: 0.5 * (acts @ self.W_dec)),
    "paths": in_subclass("_interaction", lambda self, read: None),
    "activation function": lambda sae: setattr(sae, "activation_fn", torch.nn.ReLU()),
    "k of the activation function": lambda sae: setattr(sae.activation_fn, "k", 2),
    "hidden code": lambda sae: setattr(sae, "hidden_code", lambda sae, hidden: 0 * hidden),
}


@for_every_architecture
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_subclass_changes_is_changed_in_every_step(architecture, change):
    """SAELens documents which methods to override; none of them is passed by, at whatever number of features."""
    outputs = []
    x, dead = random_activations().double(), torch.arange(D_SAE) < 5
    for sae in both_kernels(architecture):
        usual = step(sae, x, dead)
        CHANGES[change](sae)
        outputs.append(step(sae, x, dead))
        assert not torch.allclose(outputs[-1].loss, usual.loss)
    ours, reference = outputs
    assert ours.losses.keys() == reference.losses.keys()
    torch.testing.assert_close(ours.loss, reference.loss, rtol=0, atol=0)  # both are SAELens's step


@for_every_architecture
def test_only_saelens_s_own_trainer_counts_a_coo_tensor(architecture):
    """Whoever else reads the features of a step has them dense, a step that a subclass extends included."""
    read = []

    def extended(self, step_input):
        output = JointNFMTrainingSAE.training_forward_pass(self, step_input)
        read.append(output.feature_acts.is_sparse)
        return output

    sae = random_sae(training_config(architecture, kernel="sparse"))
    counted = trainer(sae)
    output = counted.step(random_activations())
    assert of_sparse_step(output)
    assert not output.feature_acts.is_sparse
    in_subclass("training_forward_pass", extended)(sae)
    counted.step(random_activations())
    assert read == [False]


@for_every_architecture
def test_pre_activations_are_those_of_the_step_or_none(architecture):
    sae = random_sae(training_config(architecture, kernel="sparse"))
    output = step(sae, random_activations())
    with torch.no_grad():
        sae.W_enc.mul_(2)
    with pytest.raises(RuntimeError, match="weights have changed"):
        _ = output.hidden_pre
    copied = dataclasses.replace(step(sae, random_activations()), loss=None)
    assert copied.loss is None
    assert copied.hidden_pre.shape == copied.feature_acts.shape == (24, D_SAE)
