"""`sae-nfm pairs`: a dictionary that hides planted pairs in composite features, and the joint_nfm that has them."""

import json
import shutil

import pytest
import torch
from sae_lens import SAE

from sae_nfm import JointNFMTrainingSAEConfig, StagedTopKTrainingSAEConfig
from sae_nfm.architectures import random_initialisation
from sae_nfm.convert import with_pairs
from sae_nfm.data import Truth
from sae_nfm.experiments.pairs import PairsConfig, PairsResult, run_pairs
from sae_nfm.experiments.synthetic import recovery
from sae_nfm.experiments.synthetic.run import SyntheticRunConfig, run_synthetic
from sae_nfm.training.run import train, train_arguments

PLANTED = SyntheticRunConfig(
    d_in=64, features=32, mean_l0=3, children=0.25, pairs=4, pair_rate=0.03, pair_share=0.1, decoys=3, samples=12_800, seed=3,
    held_out_samples=3_200,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    run_synthetic(SyntheticRunConfig(**(vars(PLANTED) | {"output": str(folder / "samples")})))
    return folder


@pytest.fixture(scope="module")
def staged(folder):
    """An SAE with the true features and, for each planted pair, one that stands for both and what they write together."""
    truth = Truth.load(folder / "samples")
    i, j = truth.pairs.unbind(-1)
    together = truth.directions[i] + truth.directions[j] + truth.pair_directions
    rows = torch.cat([truth.directions, together])
    cfg = StagedTopKTrainingSAEConfig(d_in=64, d_sae=36, k=8, selection_stages=8, rescale_acts_by_decoder_norm=False)
    cfg.metadata.model_name, cfg.metadata.hook_name = str(folder / "samples"), "blocks.0.hook_resid_pre"
    cfg.metadata.context_size = 32
    sae = random_initialisation(cfg, seed=0)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_((rows / rows.norm(dim=-1, keepdim=True)).T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    sae.save_inference_model(folder / "staged")
    return folder / "staged"


@pytest.fixture(scope="module")
def result(folder, staged):
    cfg = PairsConfig(
        sae=str(staged), activations=str(folder / "samples"), pairs=4, tokens=12_800, output=str(folder / "found")
    )
    return run_pairs(cfg, command="sae-nfm pairs")


def test_planted_pairs_are_found_behind_composite_features(folder, result):
    truth = Truth.load(folder / "samples")
    assert set(result.composites) == {32, 33, 34, 35}
    planted = {tuple(sorted(pair)) for pair in truth.pairs.tolist()}
    assert {tuple(sorted(parts)) for parts in result.composites.values()} == planted
    assert {(row.first, row.second) for row in result.pairs} == planted
    assert "ranking, not a test" in result.words()
    assert PairsResult.load(folder / "found/results.json").pairs == result.pairs


def test_the_saved_sae_writes_these_pairs_alone(folder, staged, result):
    base, joint = SAE.load_from_disk(staged), SAE.load_from_disk(folder / "found/sae")
    assert (joint.cfg.selection_stages, joint.cfg.refinement_steps) == (8, 0)  # those of the SAE, not of the search
    assert not torch.equal(joint.W_enc[:, 32:], base.W_enc[:, 32:])
    torch.testing.assert_close(joint.W_dec[:32], base.W_dec[:32], rtol=0, atol=0)
    code = torch.rand(20, 36, generator=torch.Generator().manual_seed(0)).double()
    code[:, 32:] = 0
    with torch.no_grad():
        written = joint.double().decode(code) - base.double().decode(code)
        expected = torch.zeros_like(written)
        for number, row in enumerate(result.pairs):
            expected += code[:, row.first, None] * code[:, row.second, None] * joint.W_2[number]
    torch.testing.assert_close(written, expected)


def test_training_goes_on_from_it(folder, result):
    given = {
        "from_pretrained_path": str(folder / "found/sae"), "activations": str(folder / "samples"), "training_tokens": 6_400,
        "train_batch_size_tokens": 256, "lr": 1e-3, "output_path": str(folder / "joint"), "d_sae": 36, "k": 8,
    }  # fmt: skip
    train(train_arguments(given, argv=()))
    truth = Truth.load(folder / "samples")
    x = torch.randn(1, 64)
    sae = SAE.load_from_disk(folder / "joint").eval()
    assert (sae.cfg.head, sae.cfg.selection_stages) == ("bilinear", 8)
    acts = truth.acts()
    x = acts @ truth.directions + acts[:, truth.pairs].prod(-1) @ truth.pair_directions
    row = recovery(sae, x, truth, "joint", acts)
    scores = {str(one.score): one for one in row.pairs}
    assert scores["exact, energy"].precision == 1.0
    assert json.loads((folder / "joint/cfg.json").read_text())["nfm_dim"] == len(result.pairs)


def test_samples_that_were_moved(folder, staged, result, tmp_path):
    moved = shutil.copytree(folder / "samples", tmp_path / "moved")
    sae, elsewhere = SAE.load_from_disk(staged), tmp_path / "staged"
    sae.cfg.metadata.model_name = "samples-that-are-not-here"
    sae.save_model(elsewhere)
    cfg = PairsConfig(
        sae=str(elsewhere), activations=str(moved), pairs=4, tokens=12_800, output=str(tmp_path / "found")
    )
    assert run_pairs(cfg).pairs == result.pairs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae": "joint"}, r"\bjoint_nfm\b.*\blinear\b"),
        ({"dataset": "x.txt"}, r"\bdataset\b.*x\.txt.*leave one out"),
        ({"pairs": 0}, r"\bpairs\b.*> 0"),
    ],
)
def test_refused(folder, staged, changes, message):
    usual = {"sae": str(staged), "activations": str(folder / "samples"), "output": str(folder / "none")}
    if changes.get("sae"):
        sae = random_initialisation(JointNFMTrainingSAEConfig(d_in=64, d_sae=36, k=8), seed=0)
        sae.save_inference_model(folder / "with-linear")
        changes = {"sae": str(folder / "with-linear")}
    with pytest.raises(ValueError, match=message):
        run_pairs(PairsConfig(**usual | changes))
    assert not (folder / "none").exists()


def test_an_sae_that_never_fires(folder, staged):
    silent = SAE.load_from_disk(staged)
    silent.b_enc.data.fill_(-100.0)
    silent.save_model(folder / "silent")
    where = {"activations": str(folder / "samples"), "output": str(folder / "none")}
    cfg = PairsConfig(sae=str(folder / "silent"), refinement_steps=0, **where)
    with pytest.raises(ValueError, match=r"no two features .*silent.* fire together.*\btokens = 100000"):
        run_pairs(cfg)
    assert not (folder / "none").exists()


def test_per_token_normalisation_is_refused():
    cfg = StagedTopKTrainingSAEConfig(d_in=8, d_sae=16, k=2, normalize_activations="layer_norm")
    sae = random_initialisation(cfg, seed=0)
    none = torch.zeros(16, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"normalize_activations.*'layer_norm'"):
        with_pairs(sae, torch.tensor([[0, 1]]), torch.zeros(1, 8), renewed=none)
