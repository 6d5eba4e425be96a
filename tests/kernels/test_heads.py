"""Heads that a user registers: the third-order pooling of docs/extending.md, through everything an SAE goes through."""

import itertools
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from builders import (
    HOOK,
    inference_sae,
    random_activations,
    random_sae,
    rows_of_tokens,
    tiny_model,
    trainer,
    training_config,
)
from path_inputs import activations, joint
from sae_lens import SAE
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.saes.sae import TrainStepInput
from step_forms import of_sparse_step

from sae_nfm import JointNFMSAEConfig, JointNFMTrainingSAEConfig
from sae_nfm.analysis.path_contributions import feature_energies, token_paths
from sae_nfm.architectures import joint_config
from sae_nfm.architectures.nfm_paths import attributable
from sae_nfm.cli.parser import description
from sae_nfm.comparison.arms import training_flops
from sae_nfm.experiments.factorial.measure import pair_candidates
from sae_nfm.interventions.edits import PairEdit, ReadEdit
from sae_nfm.interventions.intervene import Splice
from sae_nfm.kernels import dispatch, heads, reference
from sae_nfm.kernels.reference import SparseActs
from sae_nfm_cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
DEFINITION = EXAMPLE.partition("\nmodel")[0]
HEAD = "third_order"
NOT_KNOWN = r"head\b.*'third_order'.*'fm', 'mlp', 'bilinear', 'none'.*register_head"
for_every_architecture = pytest.mark.parametrize("architecture", ["joint_nfm", "sequential_nfm"])


@pytest.fixture
def unregistered():
    """Heads that are registered in the test are gone after it."""
    before = dict(heads.POOLS)
    yield
    heads.POOLS.clear()
    heads.POOLS.update(before)


@pytest.fixture
def third_order(unregistered):
    """The page's head, registered as it is there."""
    names: dict = {}
    exec(DEFINITION, names)
    return names[HEAD]


def step(sae, x):
    return sae.training_forward_pass(
        TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=True)
    )


def sparse_and_dense():
    """Activations [2, 3, 9] of 5 active features in both forms, and V [9, 4], float64."""
    generator = torch.Generator().manual_seed(0)
    sparse = reference.top_n(torch.rand(2, 3, 9, generator=generator, dtype=torch.float64), 5)
    dense = torch.zeros(2, 3, 9, dtype=torch.float64).scatter(-1, sparse.indices, sparse.values)
    return sparse, dense, torch.randn(9, 4, generator=generator, dtype=torch.float64)


def test_third_order_by_hand(third_order):
    """Of three features there is one triple: 1 * 2 * 3 times v_1 * v_2 * v_3 = 2 * -1 * 5."""
    V = torch.tensor([[2.0], [-1.0], [5.0]])
    assert third_order(torch.tensor([[1.0, 2.0, 3.0]]), V).item() == pytest.approx(-60.0)


def test_third_order_is_the_sum_over_triples(third_order):
    sparse, dense, V = sparse_and_dense()
    rows = dense[..., None] * V
    triples = sum(
        rows[..., i, :] * rows[..., j, :] * rows[..., m, :] for i, j, m in itertools.combinations(range(9), 3)
    )
    torch.testing.assert_close(third_order(dense, V), triples)
    torch.testing.assert_close(third_order(sparse, V), triples)
    assert triples.abs().min() > 1e-4


def test_gradients_of_both_forms(third_order):
    sparse, dense, V = sparse_and_dense()
    pool = heads.POOLS[HEAD]
    dense.requires_grad_()
    V.requires_grad_()
    values = sparse.values.requires_grad_()
    assert torch.autograd.gradcheck(pool, (dense, V))
    assert torch.autograd.gradcheck(lambda values, V: pool(SparseActs(sparse.indices, values), V), (values, V))


def test_a_registered_head_is_computed_in_float32_under_autocast(third_order):
    sparse, _, V = sparse_and_dense()
    exact = third_order(sparse, V)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = heads.POOLS[HEAD](SparseActs(sparse.indices, sparse.values.float()), V.float())
    torch.testing.assert_close(wide, exact.float(), rtol=1e-4, atol=1e-6)  # differences of cubes
    half = heads.POOLS[HEAD](SparseActs(sparse.indices, sparse.values.bfloat16()), V.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("nfm_top_k", [None, 3])
def test_a_sparse_step_is_the_dense_one(third_order, rescale, nfm_top_k):
    sparse = joint(head=HEAD, rescale_acts_by_decoder_norm=rescale, nfm_top_k=nfm_top_k)
    dense = deepcopy(sparse)
    sparse.cfg.kernel, dense.cfg.kernel = "sparse", "dense"
    ours, reference = step(sparse, activations()), step(dense, activations())
    assert (of_sparse_step(ours), of_sparse_step(reference)) == (True, False)
    ours.loss.backward()
    reference.loss.backward()
    torch.testing.assert_close(ours.sae_out, reference.sae_out)
    torch.testing.assert_close(
        {name: metric() for name, metric in ours.metrics.items()},
        {name: metric() for name, metric in reference.metrics.items()},
    )
    for (name, one), (_, other) in zip(sparse.named_parameters(), dense.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
        assert other.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_two_threads_give_the_same_bits_every_time(third_order, kernel):
    """The gradients of a pooling that autograd differentiates; `test_sparse_step` has the rest of a step."""
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    top = torch.rand(1024, 256, generator=generator).topk(16)
    acts = SparseActs(top.indices, top.values.requires_grad_())
    V = torch.randn(256, 8, generator=generator).requires_grad_()
    torch.set_num_threads(2)
    found = []
    try:
        for _ in range(3):
            z = dispatch.pooled(HEAD, acts, V, kernel=kernel)
            found.append(torch.autograd.grad(z.square().sum(), [acts.values, V]))
    finally:
        torch.set_num_threads(threads)
    for again in found[1:]:
        torch.testing.assert_close(again, found[0], rtol=0, atol=0)


@for_every_architecture
@pytest.mark.parametrize("head", [HEAD, "bilinear"])
def test_training_with_saelens_trainer_moves_every_weight_of_the_head(third_order, architecture, head):
    sae = random_sae(training_config(architecture, head=head))
    before = {name: parameter.clone() for name, parameter in sae.named_parameters()}
    saelens = trainer(sae)
    losses = [float(saelens.step(random_activations(seed=7)).loss) for _ in range(20)]
    assert losses[-1] < losses[0]
    for name in ("V", "W_2", "b_2") if head == "bilinear" else ("V", "W_1", "b_1", "W_2", "b_2"):
        assert not torch.equal(before[name], getattr(sae, name)), name


@for_every_architecture
@pytest.mark.parametrize("head", [HEAD, "bilinear"])
@torch.no_grad()
def test_saved_for_inference_and_loaded(third_order, architecture, head, tmp_path):
    sae, x = random_sae(training_config(architecture, head=head, dtype="float64")), activations()
    if architecture == "sequential_nfm":
        step(sae, x)  # finds the scale that saving folds into V and W_2
        assert sae.nfm_scale > 0
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.head == head
    for name, path in sae.decode_paths(sae.encode(x)).present().items():
        torch.testing.assert_close(loaded.decode_paths(loaded.encode(x)).present()[name], path, msg=name)
    # of the active features alone
    loaded.cfg.kernel = "sparse"
    torch.testing.assert_close(loaded(x), sae(x))


@pytest.mark.parametrize("rescale", [True, False])
@torch.no_grad()
def test_folds(third_order, rescale):
    sae = joint(head=HEAD, rescale_acts_by_decoder_norm=rescale, nfm_top_k=None)
    x, scale = activations(), 0.3
    folded = deepcopy(sae)
    folded.fold_activation_norm_scaling_factor(scale)
    torch.testing.assert_close(folded(x), sae(scale * x) / scale)
    folded.fold_linear_path()  # with rescaling it folds decoder norms, too
    torch.testing.assert_close(folded(x), sae(scale * x) / scale)


@for_every_architecture
@torch.no_grad()
def test_ablating_the_path_takes_its_output_away(third_order, architecture):
    model, tokens = tiny_model(torch.float64), rows_of_tokens()
    sae = inference_sae(training_config(architecture, head=HEAD, dtype="float64"))
    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=False)
    assert cache[f"{HOOK}.hook_nfm_pooled"].shape == (*tokens.shape, 8)
    x = cache[f"{HOOK}.hook_sae_input"]
    whole, without = (Splice(sae=sae, ablated=off).reconstruct(x) for off in ({}, {"hook_nfm_interaction": None}))
    torch.testing.assert_close(without + cache[f"{HOOK}.hook_nfm_interaction"], whole)
    assert (whole - without).abs().max() > 0.1


@torch.no_grad()
def test_a_read_edit_acts_on_the_pooling(third_order):
    """Features as the interaction path alone reads them, doubled: an homogeneous pooling of degree 3 grows by 8."""
    sae, x = inference_sae(training_config("joint_nfm", head=HEAD, dtype="float64")), activations()[None]
    b = sae.decode_paths(sae.encode(x))
    edited = Splice(sae=sae, edits=[ReadEdit(path="interaction", mode="scale", value=2.0)]).reconstruct(x)
    z = heads.POOLS[HEAD](reference.top_n(sae.encode(x), 3), sae.V)
    expected = b.total() - b.interaction + (8 * z @ sae.W_1 + sae.b_1).relu() @ sae.W_2 + sae.b_2
    torch.testing.assert_close(edited, expected)


def test_what_needs_pairs_refuses(third_order):
    sae, model = inference_sae(training_config("joint_nfm", head=HEAD)), tiny_model()
    with pytest.raises(ValueError, match=r"head 'third_order'.*\bfm\b"):
        attributable(sae)
    with pytest.raises(ValueError, match=r"head.*'third_order'.*'fm'"):
        Splice(sae=sae, edits=[PairEdit(pair=(1, 2), mode="scale", value=0.0)])
    assert pair_candidates(model, sae, [(0, 1, 2)], "mean") is None
    with pytest.raises(ValueError, match=r"head 'third_order'"):
        feature_energies(sae, token_paths(sae, random_activations()))


def test_its_size_and_cost_are_those_of_mlp(third_order):
    own, mlp = (training_config("joint_nfm", head=head) for head in (HEAD, "mlp"))
    assert joint_config.parameter_count(own) == sum(parameter.numel() for parameter in random_sae(own).parameters())
    assert training_flops(own) == training_flops(mlp)


def test_saelens_command_line_takes_it_and_help_names_the_others(third_order):
    flags = ["--d_in", "16", "--d_sae", "64", "--k", "8", "--head", HEAD]
    assert _parse_cfg_args(["--architecture", "joint_nfm", *flags]).sae.head == HEAD
    assert description(JointNFMTrainingSAEConfig, "head") == (
        'The nonlinear path. "fm" pools products of feature pairs, "mlp" is the same head on f_n V without the product (a '
        'capacity control), "bilinear" multiplies two projections, (f_n A) * (f_n B), squares of features included, and writes '
        'the product without a gate, "none" leaves the path out; or a head of your own (`heads.register_head`).'
    )


def test_a_head_that_is_not_known(third_order, unregistered, tmp_path, capsys):
    """Where nothing has registered it: loaded, built, given on the command line."""
    random_sae(training_config("joint_nfm", head=HEAD)).save_inference_model(tmp_path)
    del heads.POOLS[HEAD]
    with pytest.raises(ValueError, match=NOT_KNOWN):
        SAE.load_from_disk(tmp_path)
    with pytest.raises(ValueError, match=NOT_KNOWN):
        JointNFMSAEConfig(d_in=3, d_sae=8, k=4, head=HEAD)
    assert main(["train", "--head", HEAD, "--output_path", str(tmp_path / "none")]) == 2
    assert re.search(NOT_KNOWN, " ".join(capsys.readouterr().err.split()))


def only_dense(acts, V):
    return reference.weighted_rows(acts, V) if isinstance(acts, torch.Tensor) else V[acts.indices].sum(-2)


@pytest.mark.parametrize(
    ("name", "pool", "told"),
    [
        ("fm", reference.weighted_rows, "already.*'fm', 'mlp', 'bilinear', 'none'"),
        ("none", reference.weighted_rows, "already"),
        ("third-order", reference.weighted_rows, "letters"),
        ("short", lambda acts, V: reference.weighted_rows(acts, V)[..., :2], r"\(2, 3, 2\).*\[2, 3, 12\]"),
        ("two_forms", only_dense, "SparseActs"),
        ("units", lambda acts, V: reference.weighted_rows(reference.squared(acts), V), "2 f.*2 V"),
    ],
)
def test_what_cannot_be_a_head(unregistered, name, pool, told):
    before = dict(heads.POOLS)
    with pytest.raises(ValueError, match=f"head.*'{name}'.*{told}"):
        heads.register_head(name, pool)
    assert before == heads.POOLS


def test_a_name_is_given_once(third_order):
    with pytest.raises(ValueError, match="'third_order' already"):
        heads.register_head(HEAD, third_order)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_page_runs(unregistered, tmp_path, monkeypatch, capsys):
    """As it stands there, but for the number of tokens and features."""
    monkeypatch.chdir(tmp_path)
    code = EXAMPLE
    for full, small in (
        ('"training_tokens": 200_000', '"training_tokens": 2_048'),
        ('"n_batches_for_norm_estimate": 10', '"n_batches_for_norm_estimate": 1'),
        ("d_sae=2048", "d_sae=256"),
        ("65_536", "1_024"),
        (', "fm", "mlp", "none"', ","),
    ):
        assert full in code
        code = code.replace(full, small)
    exec(code, {})
    shown = capsys.readouterr().out
    assert re.findall(r"^(\w+) +FVU \d\.\d{4} ", shown, re.MULTILINE) == [HEAD]
    assert len([line for line in EXAMPLE.splitlines() if line]) < 30
    assert SAE.load_from_disk(tmp_path / "runs" / HEAD).cfg.head == HEAD


def test_links_of_the_page_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert target.startswith("https://") or (Path(__file__).parents[2] / "docs" / target).exists(), target
