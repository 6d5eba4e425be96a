"""How features move over training: known transitions are found, equal checkpoints do not move, wrong folders are refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from builders import random_activations, random_sae, runner_config, tiny_model, token_dataset, training_config
from sae_lens import SAE, LanguageModelSAETrainingRunner, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import temporary_seed
from scipy import stats
from simulated_evidence import counts_by_chance

from sae_nfm import demo
from sae_nfm.analysis.path_contributions import feature_energies, token_paths
from sae_nfm.architectures.joint_config import JointNFMTrainingSAEConfig
from sae_nfm.architectures.joint_training import JointNFMTrainingSAE
from sae_nfm.data import CacheConfig, run_cache
from sae_nfm.experiments.dynamics.measure import (
    PATHS,
    Checkpoint,
    GroupedTokens,
    MeanShares,
    checkpoints_of_run,
    grouped_energies,
    load_checkpoint,
    tertiles,
    transitions,
)
from sae_nfm.experiments.dynamics.run import DynamicsConfig, run_dynamics
from sae_nfm.stats.estimates import clustered_mean

HOOK, D_IN, D_SAE, K = "blocks.2.hook_resid_post", 256, 30, 6
SCALE = 0.5
LOW, MIDDLE, HIGH = 0.1, 0.5, 0.9


def metadata(**changes) -> SAEMetadata:
    return SAEMetadata(**({"model_name": demo.MODEL_NAME, "hook_name": HOOK, "context_size": 256} | changes))


def joint(shares, **overrides) -> JointNFMTrainingSAE:
    """A direct and a linear path alone, so that a feature's integration share is what its rows say, on any tokens."""
    settings = {"d_in": D_IN, "d_sae": len(shares), "k": K, "nfm_dim": 4, "head": "none", "metadata": metadata()}
    settings |= {"rescale_acts_by_decoder_norm": False, "normalize_activations": "expected_average_only_in"}
    sae = random_sae(JointNFMTrainingSAEConfig(**(settings | overrides)))
    rows = torch.randn(D_IN, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=torch.Generator().manual_seed(4)))
        share = torch.tensor(shares)[:, None]
        sae.W_dec.copy_((1 - share) * rows / rows.norm())
        sae.W_lin.copy_(share * rows / rows.norm())
    return sae


def topk(**overrides) -> TopKTrainingSAE:
    settings = {"d_in": D_IN, "d_sae": 40, "k": K, "metadata": metadata()}
    settings |= {"normalize_activations": "expected_average_only_in"}
    return random_sae(TopKTrainingSAEConfig(**(settings | overrides)))


def save(run: Path, saes, scale: float | None = SCALE) -> Path:
    """Checkpoints as SAELens leaves them in training."""
    for number, sae in enumerate(saes, 1):
        folder = run / str(1_000 * number)  # of which the last is 10,000: no alphabetical order
        sae.save_model(folder)
        if scale is not None:
            scaler = {"scaling_factor": scale, "has_whitening": False}
            (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    return run


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Ten features each at 0.1, 0.5 and 0.9; then the first ten have 0.9, and the last ten 0.1."""
    root = tmp_path_factory.mktemp("dynamics")
    before, after = [LOW] * 10 + [MIDDLE] * 10 + [HIGH] * 10, [HIGH] * 10 + [MIDDLE] * 10 + [LOW] * 10
    run = save(root / "joint" / "id", [joint(before), joint(after), joint(after)])
    reference = save(root / "topk" / "id", [topk(), topk()])
    cfg = DynamicsConfig(
        checkpoints=str(run.parent),
        reference=str(reference),
        held_out_tokens=1_024,
        n_permutations=199,
        output=str(root / "out"),
    )
    return cfg, run_dynamics(cfg, command="sae-nfm dynamics")


def test_on_cached_activations_it_is_the_same(found, tmp_path):
    cfg, result = found
    cache = CacheConfig(hook=(HOOK,), split="validation", tokens=cfg.held_out_tokens, output=str(tmp_path / "cache"))
    run_cache(cache)
    cached = run_dynamics(replace(cfg, activations=cache.output, output=str(tmp_path / "out")))
    frames = [pd.read_parquet(Path(folder) / "features.parquet") for folder in (cfg.output, tmp_path / "out")]
    pd.testing.assert_frame_equal(*frames, rtol=1e-5)  # rows go through the model in other batches
    assert cached.steps[0].transitions == result.steps[0].transitions
    run_cache(replace(cache, split="train", output=str(tmp_path / "train")))
    with pytest.raises(ValueError, match="a row of tokens is not in"):
        run_dynamics(replace(cfg, activations=str(tmp_path / "train"), output=str(tmp_path / "other")))


# Checkpoints with known transitions.


def test_known_transitions_are_counted(found):
    _, result = found
    moved, still = (step for step in result.steps if step.run == "joint_nfm")
    active = result.checkpoints[0].active  # the encoder is the same at all checkpoints
    assert moved.features == still.features == active > 20  # 4 rows are enough for most of the 30 features
    table = np.array(moved.transitions["raw"].table)
    assert table[[0, 1, 2], [2, 1, 0]].sum() == active  # 0.1 to 0.9, 0.5 to 0.5, 0.9 to 0.1
    counted = moved.transitions["raw"]
    assert counted.to_identity.observed == table[2, 0] > 5
    assert counted.to_identity.low <= counted.to_identity.expected < counted.to_identity.observed
    assert counted.to_identity.p_value < 0.05
    assert moved.spearman["integration share, raw"] < -0.9  # within a third rounding ranks features
    change = moved.change["raw"]
    expected = (HIGH - LOW) * (int(table[0, 2]) - int(table[2, 0])) / active
    assert change.estimate == pytest.approx(expected, abs=1e-6)  # float32 rows


def test_shares_are_those_of_the_rows(found):
    _, result = found
    first = result.checkpoints[0]
    sizes = np.array(result.steps[0].transitions["raw"].table).sum(1)
    expected = np.array([LOW, MIDDLE, HIGH]) @ sizes / sizes.sum()
    for estimate in (first.shares["raw"]["linear"], first.shares["raw"]["integration"]):
        assert estimate.estimate == pytest.approx(expected, abs=1e-6)
        assert (estimate.low, estimate.high) == pytest.approx((expected, expected), abs=1e-6)  # the same on all tokens
    assert first.shares["canonical"]["direct"].estimate == pytest.approx(1)  # nothing but linear paths
    assert first.canonical_norm == pytest.approx(1 / SCALE, rel=1e-5)  # |w + l| = 1 in normalised units
    assert first.norm == pytest.approx((1 - expected) / SCALE, rel=1e-5)


def test_equal_checkpoints_do_not_move(found):
    _, result = found
    still = result.steps[1]
    assert (still.before, still.after) == (2_000, 3_000)
    for counted in (still.transitions["raw"], still.reordered["raw"]):
        assert counted.to_identity.observed == counted.to_integration.observed == 0
        assert counted.stayed.observed == still.features > counted.stayed.high
    # shares of the same weights on the same tokens; correlations of ranks are sums, rounded as the machine adds
    assert still.change["raw"].estimate == pytest.approx(0, abs=1e-12)
    assert still.change["raw"].p_value == pytest.approx(1)
    assert still.spearman["integration share, raw"] == pytest.approx(1)
    assert still.spearman["frequency"] == pytest.approx(1)
    assert still.spearman["integration share, canonical"] is None  # 0 throughout


def test_reference_has_norms_and_firing_alone(found):
    _, result = found
    rows = [row for row in result.checkpoints if row.run == "topk"]
    assert [row.tokens for row in rows] == [1_000, 2_000]
    assert all(row.shares == {} and row.canonical_norm is None and row.norm > 0 for row in rows)
    (step,) = (one for one in result.steps if one.run == "topk")
    assert step.spearman == {"norm": pytest.approx(1), "frequency": pytest.approx(1)}
    assert not step.change
    assert not step.transitions


def test_files_and_words(found):
    cfg, result = found
    features = pd.read_parquet(Path(cfg.output) / "features.parquet")
    assert len(features) == 3 * D_SAE + 2 * 40
    one = features[(features.run == "joint_nfm") & (features.tokens == 1_000) & (features.frequency > 0)]
    assert np.allclose(one.linear_raw, np.repeat([LOW, MIDDLE, HIGH], 10)[one.feature], atol=1e-6)  # float32 rows
    assert len(one) == result.checkpoints[0].active
    assert features[features.frequency == 0].linear_raw.isna().all()
    saved = json.loads((Path(cfg.output) / "results.json").read_text())
    assert saved["steps"][0]["transitions"]["raw"]["table"] == [
        list(r) for r in result.steps[0].transitions["raw"].table
    ]
    assert saved["provenance"]["command"] == "sae-nfm dynamics"
    text = result.words()
    assert "raw gauge: from 1,000 to 3,000 tokens the mean integration share changes by" in text
    assert "one seed" in text


# Transitions and their null.


def test_a_table_by_hand():
    before, after = np.array([0.1, 0.2, 0.5, 0.8, 0.9, 0.9]), np.array([0.1, 0.9, 0.5, 0.1, 0.2, 0.9])
    found = transitions(before, after, (0.3, 0.6), seed=0)
    assert found.table == ((1, 0, 1), (0, 1, 0), (2, 0, 1))
    assert (found.to_identity.observed, found.to_integration.observed, found.stayed.observed) == (2, 1, 3)


def test_tertiles_by_hand():
    assert tertiles([np.array([0.0, np.nan, 3.0]), np.array([1.0, 2.0])]) == (1.0, 2.0)


def test_own_thirds_do_not_see_a_shift():
    before = np.linspace(0.1, 0.4, 30)
    fixed = transitions(before, before + 0.4, tertiles([before, before + 0.4]), seed=0)
    assert fixed.to_integration.observed == 10
    assert transitions(before, before + 0.4, seed=0).stayed.observed == 30


def test_the_null_is_the_exact_one():
    """With margins fixed, one cell of a table is hypergeometric."""
    rng = np.random.default_rng(0)
    before, after = rng.random(300), rng.random(300)
    found = transitions(before, after, (0.3, 0.6), seed=1, n_permutations=20_000)
    table = np.array(found.table)
    exact = stats.hypergeom(300, table[2].sum(), table[:, 0].sum())
    # 20,000 draws: a mean is off by sd / 141, a quantile by one at most
    assert found.to_identity.expected == pytest.approx(exact.mean(), abs=5 * exact.std() / 141)
    assert (found.to_identity.low, found.to_identity.high) == pytest.approx(exact.ppf([0.025, 0.975]), abs=1)


def test_size_of_the_test():
    """Identities that mean nothing are found to mean something in 5 % of the draws, or fewer, as counts are whole numbers."""
    rng = np.random.default_rng(0)
    p = [transitions(*rng.random((2, 90)), seed=i, n_permutations=199).stayed.p_value for i in range(200)]
    _, most = counts_by_chance(200)
    assert (np.array(p) < 0.05).sum() <= most


@pytest.mark.parametrize("after", [np.ones(2), np.array([0.1, np.nan, 0.2])])
def test_shares_that_cannot_be_paired(after):
    with pytest.raises(ValueError, match=r"\bactive in both\b"):
        transitions(np.ones(3), after, (0.3, 0.6), seed=0)


# Sums by document.


@pytest.mark.parametrize("options", [{}, {"nfm_top_k": None}, {"rescale_acts_by_decoder_norm": False}], ids=str)
def test_sums_of_groups_are_the_energies_of_their_tokens(options):
    sae = random_sae(training_config("joint_nfm", dtype="float64", **options))
    x = random_activations(rows=40).double()
    tokens = GroupedTokens.of(x, torch.arange(40) // 8)
    grouped = grouped_energies(sae, tokens)
    for without, kept in ((None, x), (3, x[tokens.groups != 3])):
        mine, other = grouped.energies(without), feature_energies(sae, token_paths(sae, kept))
        assert mine.tokens == other.tokens == len(kept)
        for name in ("active", "second_moment", "read_second_moment", *PATHS):
            assert torch.allclose(getattr(mine, name), getattr(other, name), equal_nan=True), name


def test_mean_shares_leave_documents_out():
    """The jackknife of a plain mean is that of `clustered_mean`."""
    values, documents = np.random.default_rng(0).random(30), np.arange(30) // 5
    without = np.array([values[documents != one].mean() for one in range(6)])
    mine = MeanShares(whole=values.mean(), without=without, tokens=np.full(6, 5.0)).estimate()
    other = clustered_mean(values, documents)
    assert (mine.estimate, mine.low, mine.high) == pytest.approx((other.estimate, other.low, other.high))
    assert (mine.n, mine.n_clusters, mine.p_value) == (30, 6, None)


def test_one_document():
    with pytest.raises(ValueError, match=r"\bat least 2\b"):
        GroupedTokens.of(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))


# Checkpoints.


def test_normalisation_is_folded_in(tmp_path):
    sae = joint([0.2] * 12, rescale_acts_by_decoder_norm=True, head="fm")
    save(tmp_path, [sae, sae])
    loaded = load_checkpoint(checkpoints_of_run(tmp_path)[0])
    x = random_activations(d_in=D_IN)
    assert torch.allclose(loaded(x), sae(SCALE * x) / SCALE, rtol=1e-4, atol=1e-4)  # float32, a sum over 256


def test_checkpoints_of_a_training(tmp_path):
    """The last one is the SAE that the training ended with."""
    cfg = training_config("joint_nfm", normalize_activations="expected_average_only_in")
    options = {"n_checkpoints": 2, "save_final_checkpoint": True, "checkpoint_path": str(tmp_path / "checkpoints")}
    with temporary_seed(0):
        runner = LanguageModelSAETrainingRunner(
            runner_config(cfg, tmp_path / "sae", steps=8, **options),
            override_dataset=token_dataset(96),
            override_model=tiny_model(),
        )
        runner.run()
    found = checkpoints_of_run(tmp_path / "checkpoints")
    assert [one.tokens for one in found] == [192, 384, 512]
    x = random_activations()
    last, finished = load_checkpoint(found[-1]), SAE.load_from_disk(tmp_path / "sae")
    assert torch.allclose(last(x), finished(x), atol=1e-5)  # decoder norms are folded in one of them
    assert not torch.allclose(load_checkpoint(found[0])(x), finished(x), atol=1e-2)


def test_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\b0 checkpoints\b.*\b2\b"):
        checkpoints_of_run(tmp_path)
    save(tmp_path, [joint([0.5] * 8)])
    with pytest.raises(FileNotFoundError, match=r"\b1 checkpoints\b"):
        checkpoints_of_run(tmp_path)


def test_checkpoints_of_two_runs(tmp_path):
    for name in ("one", "two"):
        save(tmp_path / name, [joint([0.5] * 8)] * 2)
    with pytest.raises(ValueError, match=r"\b2 runs\b.*/one, .*/two"):
        checkpoints_of_run(tmp_path)


def test_checkpoints_of_two_runs_in_one_folder(tmp_path):
    save(tmp_path, [joint([0.5] * 8)] * 2)
    first, second = (one.folder for one in checkpoints_of_run(tmp_path))
    for folder, rate in ((first, 1e-3), (second, 5e-3)):
        (folder / "runner_cfg.json").write_text(json.dumps({"lr": rate, "output_path": str(rate), "sae": {"k": 4}}))
    with pytest.raises(
        ValueError, match=rf"{second} is of another run than {first}: lr is 0.005 there, and 0.001 here"
    ):
        checkpoints_of_run(tmp_path)


def test_a_checkpoint_without_its_normalisation(tmp_path):
    folder = save(tmp_path, [joint([0.5] * 8)] * 2, scale=None)
    with pytest.raises(ValueError, match=r"activation_scaler\.json"):
        load_checkpoint(checkpoints_of_run(folder)[0])


def test_a_damaged_checkpoint(tmp_path):
    folder = save(tmp_path, [joint([0.5] * 8)] * 2)
    (folder / "1000" / "sae_weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"1000\b.*\bdamaged\b"):
        load_checkpoint(Checkpoint(tokens=1_000, folder=folder / "1000"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda path: {"checkpoints": str(save(path, [topk()] * 2))},
            r"\ba topk SAE\b.*\bjoint_nfm\b",
        ),
        (
            lambda path: {"reference": str(save(path, [joint([0.5] * 8)] * 2))},
            r"\ba joint_nfm SAE\b.*\btopk\b",
        ),
        (
            lambda path: {
                "reference": str(save(path, [topk(metadata=metadata(hook_name="blocks.1.hook_resid_post"))] * 2))
            },
            r"\bhook_name\b.*'blocks\.1\.hook_resid_post'.*'blocks\.2\.hook_resid_post'",
        ),
        (
            lambda path: {"checkpoints": str(save(path, [joint([0.5] * 8), joint([0.5] * 9)]))},
            r"\bd_sae\b.*\b9\b.*\b8\b",
        ),
        (
            lambda path: {"checkpoints": str(save(path, [joint([0.5] * 8, metadata=metadata(model_name=None))] * 2))},
            r"\bmodel_name\b.*--model",
        ),
        (
            lambda path: {"checkpoints": str(save(path, [joint([0.5] * 8, metadata=metadata(model_name="gpt2"))] * 2))},
            r"--held-out.*'gpt2'",
        ),
    ],
    ids=["a topk run", "a joint reference", "another hook point", "another size", "no model", "no text"],
)
def test_runs_that_do_not_go_together(found, tmp_path, wrong, message):
    cfg = replace(found[0], held_out_tokens=512, output=str(tmp_path / "out"), **wrong(tmp_path / "wrong"))
    with pytest.raises(ValueError, match=message):
        run_dynamics(cfg)
    assert not (tmp_path / "out").exists()


def test_no_canonical_gauge(found, tmp_path):
    saes = [joint([0.3, 0.6] * 8, head="fm", nfm_top_k=3)] * 2
    changed = {"checkpoints": str(save(tmp_path / "run", saes)), "reference": None, "held_out_tokens": 512}
    cfg = replace(found[0], **changed, output=str(tmp_path / "out"))
    result = run_dynamics(cfg)
    assert result.not_canonical is not None
    assert set(result.edges) == set(result.checkpoints[0].shares) == {"raw"}
    assert "There is no canonical gauge: nfm_top_k is 3" in result.words()


def test_refused_before_anything_is_read():
    with pytest.raises(ValueError, match=r"\bheld_out_tokens\b.*\b0\b"):
        DynamicsConfig(checkpoints="nowhere", held_out_tokens=0)
    with pytest.raises(ValueError, match=r"\bcontext_size\b.*\b1\b.*\b2\b"):
        DynamicsConfig(checkpoints="nowhere", context_size=1)
