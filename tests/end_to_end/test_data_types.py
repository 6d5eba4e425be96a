"""An SAE in 16 bits goes through everything that takes an SAE, with the figures of the same SAE in float32."""

import copy

import pytest
import torch
from builders import D_VOCAB, HOOK, inference_sae, random_sae, rows_of_tokens, tiny_model, training_config
from sae_lens import SAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from secondary_inputs import secondary_sae

from sae_nfm.analysis import (
    feature_energies,
    figure_rows,
    gauge_report,
    gauges,
    linear_part,
    read_activations,
    squared_norms,
    token_paths,
)
from sae_nfm.architectures import SequentialNFMTrainingSAE, attach_secondary, primary_digest
from sae_nfm.attribution import Corpus, DirectPath, Target, attribute_token, pair_sums, run_prompt
from sae_nfm.attribution.graph import interaction_graph
from sae_nfm.attribution.pair_table import PathWeights, first_reads, pair_controls
from sae_nfm.convert import warm_started
from sae_nfm.convert.warm_start import with_silent_nfm
from sae_nfm.data.documents import TokenRows
from sae_nfm.evaluation import Arm, evaluate, measure
from sae_nfm.evaluation.saebench import selected_saes
from sae_nfm.experiments.factorial.measure import feature_candidates, pair_candidates, secondary_candidates
from sae_nfm.explorer.activations import firings_of
from sae_nfm.interventions import Edit, PairEdit, ReadEdit, Splice, control_arms, fit_activations, path_means
from sae_nfm.interventions.steering import directions, mean_gates

TARGET = Target.logit(7, D_VOCAB, "t7")
CLOSE = 0.05
"""Relative: features and weights are rounded by 0.4 % in bfloat16, and pairs have products of several of them."""


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(3)
    found = torch.randint(1, D_VOCAB, (8, 16), generator=generator)
    found[:, 0] = 0
    return found


def documents(tokens):
    return torch.arange(len(tokens))[:, None].expand(tokens.shape).contiguous()


def joint(dtype):
    sae = inference_sae(training_config("joint_nfm", nfm_top_k=None))
    # rounded first, so that only what is computed of them differs
    return sae.to(torch.bfloat16).to(dtype)


def pair(model, sae, tokens):
    x, _ = read_activations(model, sae, tokens)
    first = sae.encode(x)[0].nonzero()[:2, 0].tolist()
    return first[0], first[1]


def figures(report):
    return torch.tensor([row.published for row in figure_rows(report) if isinstance(row.published, float)])


def of_token(model, sae, tokens):
    found = attribute_token(model, sae, run_prompt(model, sae, tokens[0]), 5, TARGET, rank_by="direct")
    assert found.sum_error < 0.02  # what the path wrote was rounded to bfloat16
    return torch.tensor([found.value, found.all_pairs.norm, found.path_norm])


def of_corpus(model, sae, tokens):
    corpus = Corpus(model, sae, tokens, target=TARGET, show_progress=False)
    sums, weights = pair_sums(corpus), PathWeights.of(sae)
    interaction_graph(sums, weights, n=5, directed=True)
    pair_controls(first_reads(corpus.batches(""), 64), weights, seed=0, n_permutations=3)
    return torch.tensor([sums.energy])


def of_gauge(model, sae, tokens):
    x, places = read_activations(model, sae, tokens, documents(tokens))
    paths = token_paths(sae, x, places)
    linear_part(paths.acts, paths.paths.interaction, sae.cfg.d_sae, seed=0, documents=places)
    gauge_report(sae, x, places, seed=0, initial=None, n_permutations=9)
    squared_norms(sae, topk=None, seed=0)
    energies = feature_energies(sae, paths)
    assert all(rows.direct.dtype == torch.float32 for rows in gauges(sae).values())
    return torch.stack([energies.second_moment.sum(), energies.nonlinear.nansum(), energies.square.nansum()])


def of_interventions(model, sae, tokens):
    features = pair(model, sae, tokens)
    edits = [
        Edit(at="hook_sae_acts_post", index=(features[0],), mode="scale", value=2.0),
        PairEdit(pair=features, mode="scale", value=0.0),
        ReadEdit(path="linear", index=(features[0],), mode="clamp", value=0.0),
    ]
    means = path_means(model, sae, tokens, ["hook_nfm_linear"])
    arms = {"plain": Splice(sae=sae), "edited": Splice(sae=sae, edits=edits), "mean": Splice(sae=sae, ablated=means)}
    gates, _ = mean_gates(model, sae, features, tokens)
    assert all(abs(float(one.norm()) - 1) < 1e-5 for one in directions(sae, features, gates).values())
    found = evaluate(model, tokens, [Arm(name="sae", sae=sae)], show_progress=False)["sae"]
    return torch.tensor([found.kl_nats, found.fvu, found.l0, len(arms)])


def of_measurement(model, sae, tokens, folder):
    arms = control_arms(Splice(sae=sae), fit_activations(model, tokens, HOOK), scales=(0.0, 1.0))
    measure(model, TokenRows(tokens=tokens, documents=documents(tokens)), arms, folder, show_progress=False)
    return torch.ones(1)


def of_candidates(model, sae, tokens):
    prompts = [tuple(row.tolist()) for row in tokens]
    pairs = pair_candidates(model, sae, prompts, "mean")
    secondary = secondary_sae(dtype="float32").to(torch.bfloat16)
    secondary_candidates(model, sae, secondary, prompts, "mean")
    singles = feature_candidates(model, sae, prompts, "mean")
    return torch.tensor([pairs.values.sum(), singles.values.sum()])


def of_explorer(model, sae, tokens):
    return torch.tensor(firings_of(model, sae, tokens, show_progress=False).values).float().sum()[None]


EVERYTHING = [of_token, of_corpus, of_interventions, of_candidates, of_explorer]


@pytest.mark.parametrize(
    ("what", "model_dtype"),
    [(what, dtype) for what in EVERYTHING for dtype in (torch.float32, torch.bfloat16)] + [(of_gauge, torch.bfloat16)],
)
def test_an_sae_in_bfloat16(what, model_dtype, tokens):
    model = tiny_model(model_dtype)
    exact, ours = (what(model, joint(dtype), tokens) for dtype in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(ours.double(), exact.double(), rtol=CLOSE, atol=1e-3)


def test_controls_of_an_sae_in_bfloat16(tokens, tmp_path):
    of_measurement(tiny_model(torch.bfloat16), joint(torch.bfloat16), tokens, tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_made_of_an_sae_in_16_bits(dtype, tokens, tmp_path):
    """Warm starts, bases, secondary SAEs, folds, copies for SAEBench, saving and loading keep its type and its function."""
    metadata = SAEMetadata(model_name="tiny", hook_name=HOOK)
    topk = random_sae(TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4, dtype=dtype, metadata=metadata))
    topk.save_inference_model(tmp_path / "topk")
    start = SAE.load_from_disk(tmp_path / "topk")
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    expected = start(x)
    for made in (with_silent_nfm(start), warm_started(start), SequentialNFMTrainingSAE.wrap(start, nfm_dim=4)):
        assert made.dtype == start.dtype == getattr(torch, dtype)
        assert made(x).isfinite().all()
    # float16 and bfloat16 weights are folded once more
    torch.testing.assert_close(with_silent_nfm(start)(x), expected, rtol=0.02, atol=0.1)
    sae = inference_sae(training_config("joint_nfm", nfm_top_k=None)).to(getattr(torch, dtype))
    secondary = secondary_sae(dtype="float32").to(getattr(torch, dtype))
    with attach_secondary(sae, secondary):
        assert sae(x).isfinite().all()
    assert len(primary_digest(sae)) == 16
    assert [one(x).dtype for _, one in selected_saes({"mine": copy.deepcopy(sae)})] == [sae.dtype]
    sae.save_model(tmp_path / "joint")
    loaded = SAE.load_from_disk(tmp_path / "joint")
    torch.testing.assert_close(loaded(x), sae(x), rtol=0, atol=0)
    torch.testing.assert_close(loaded.folded()(x), sae(x), rtol=0.02, atol=0.2)
    assert SAE.load_from_disk(tmp_path / "joint", dtype="float32").dtype == torch.float32


def test_the_direct_path_of_a_model_in_16_bits(tokens):
    model, sae = tiny_model(torch.bfloat16), joint(torch.bfloat16)
    run = run_prompt(model, sae, rows_of_tokens()[0])
    found = DirectPath(model, sae).directions([TARGET], run.scale, run.reads.interaction)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
