"""What is found of known features and pairs: everything by an SAE that is the truth, nothing by the wrong measure."""

import shutil
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from datasets import load_from_disk

from sae_nfm import JointNFMTrainingSAEConfig, StagedTopKTrainingSAEConfig
from sae_nfm.architectures import PathWeights, random_initialisation
from sae_nfm.attribution import TokenPairs, written
from sae_nfm.attribution.pairs import token_reads
from sae_nfm.comparison.config import CompareConfig
from sae_nfm.comparison.run import run_compare
from sae_nfm.data import ActivationCache, SyntheticConfig, SyntheticData, Truth, samples
from sae_nfm.data.activation_cache import write_cache
from sae_nfm.data.synthetic import PAIR_FUNCTIONS
from sae_nfm.experiments.synthetic import RecoveryResult, recovery
from sae_nfm.experiments.synthetic.measure import (
    Passed,
    attributed,
    auroc,
    floor,
    left_over,
    mean_directions,
    oracle,
    pair_score,
    square_oracle,
    square_scores,
    squares_left_over,
)
from sae_nfm.experiments.synthetic.results import Score
from sae_nfm.experiments.synthetic.run import RecoveryConfig, SyntheticRunConfig, run_recovery, run_synthetic
from sae_nfm.models.samples import numbered_rows

PLANTED = SyntheticConfig(
    d_in=48, features=24, mean_l0=3, children=0.25, pairs=4, pair_rate=0.05, pair_share=0.2, decoys=3, seed=3
)


@pytest.fixture(scope="module")
def known():
    """Data whose directions, those of pairs too, are orthogonal, so that an encoder can be right; samples, the truth."""
    return drawn(PLANTED)


def drawn(config):
    data = SyntheticData.of(config)
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))[0]
        data.dictionary.feature_vectors.copy_(basis[:24])
        data.pair_directions.copy_(data.pair_directions.norm(dim=-1, keepdim=True) * basis[24:28])
    samples = data.sample(3_000, 0)
    return data, samples, Truth.of(data, samples.acts)


@pytest.fixture(scope="module")
def squared():
    """The same with four planted squares in place of pairs."""
    return drawn(replace(PLANTED, pair_kind="square"))


def the_truth(data, cls=JointNFMTrainingSAEConfig, head="fm", **options):
    """A joint_nfm whose features are the true ones, in reversed order, and whose interaction path writes the products."""
    sizes = {"d_in": 48, "d_sae": 24, "k": 24, "rescale_acts_by_decoder_norm": False}
    own = {"nfm_dim": 4, "head": head, "use_linear_path": False} if cls is JointNFMTrainingSAEConfig else {}
    own |= options
    sae = random_initialisation(cls(**sizes, **own), seed=0).eval()
    with torch.no_grad():
        for weights in sae.parameters():
            weights.zero_()
        sae.W_dec.copy_(data.directions.flip(0))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.fill_(-1e-5)  # rounding activates nothing
        if own and head == "fm":
            for number, pair in enumerate(data.pairs.tolist()):
                sae.V[[23 - feature for feature in pair], number] = 1.0
            sae.W_1.copy_(torch.eye(4))
            sae.W_2.copy_(data.pair_directions)
        if own and head == "bilinear":
            for number, (i, j) in enumerate(data.pairs.tolist()):
                sae.V[23 - i, number] = sae.V[23 - j, 4 + number] = 1.0
            sae.W_2.copy_(data.pair_directions)
        if own.get("use_square_path"):
            sae.U[23 - data.pairs[:, 0]] = own["square_scale"] * data.pair_directions
    return sae


@pytest.mark.parametrize("head", ["fm", "bilinear"])
def test_the_truth_finds_everything(known, head):
    data, (x, acts), truth = known
    row = recovery(the_truth(data, head=head), x, truth, "truth", acts)
    assert row.fvu < 1e-8
    for value in (row.f1, row.precision, row.recall, row.mcc, row.mean_cosine):
        assert value == pytest.approx(1, abs=1e-5)
    by = {one.score: one for one in row.pairs}
    for score in (Score.ENERGY, Score.FIRING, Score.WEIGHTS):
        assert (by[score].auroc, by[score].auroc_decoys, by[score].precision) == (1.0, 1.0, 1.0)
    assert by[Score.ENERGY].cosine == pytest.approx(1, abs=1e-6)
    products = data.parts(acts)[1].double()
    share = (products - products.mean(0)).square().sum() / (x - x.mean(0)).double().square().sum()
    assert row.interaction_share == pytest.approx(float(share), rel=1e-4)
    assert by[Score.TOGETHER].auroc > 0.75  # planted pairs fire together ...
    assert by[Score.TOGETHER].auroc_decoys < 0.75  # ... and so do decoys


@pytest.mark.parametrize(
    "options", [{"head": "bilinear"}, {"head": "none", "use_square_path": True, "square_scale": 2.0}]
)
def test_what_writes_the_planted_squares_finds_them(squared, options):
    data, (x, acts), truth = squared
    row = recovery(the_truth(data, **options), x, truth, "truth", acts)
    assert row.fvu < 1e-8
    assert row.pairs == ()
    by = {one.score: one for one in row.squares}
    for score in (Score.ENERGY, Score.FIRING):
        assert (by[score].auroc, by[score].auroc_decoys, by[score].precision) == (1.0, 1.0, 1.0)
    assert by[Score.ENERGY].cosine == pytest.approx(1, abs=1e-6)
    products = data.parts(acts)[1].double()
    share = float((products - products.mean(0)).square().sum() / (x - x.mean(0)).double().square().sum())
    square, head = row.square_share, row.interaction_share
    assert (square if head is None else head) == pytest.approx(share, rel=1e-4)
    assert (square is None) == (options["head"] == "bilinear")
    rate = by[Score.RATE]
    assert rate.auroc == pytest.approx(
        auroc(*((acts > 0).double().mean(0)[own] for own in (data.pairs[:, 0], others(data))))
    )
    assert rate.auroc_decoys < 0.85  # whose rates are raised as much


def others(data):
    return torch.tensor([i for i in range(24) if i not in data.pairs[:, 0].tolist()])


def test_the_linear_truth_leaves_the_squares_over(squared):
    data, (x, acts), truth = squared
    row = recovery(the_truth(data, StagedTopKTrainingSAEConfig), x, truth, "linear", acts)
    by = {one.score: one for one in row.squares}
    assert set(by) == {Score.LEFT, Score.RATE, Score.FEATURE_ENERGY}
    own = square_oracle(x, acts, truth)
    for one in (by[Score.LEFT], own):
        assert (one.auroc, one.auroc_decoys, one.precision) == (1.0, 1.0, 1.0)
        assert one.cosine == pytest.approx(1, abs=0.05)  # the few samples of a square have other squares in them
    assert square_oracle(x, acts, replace(truth, pairs=truth.decoys[[0] * 4])) is None


def test_what_is_left_over_of_a_square_is_a_least_squares_fit(squared):
    _, (_, acts), _ = squared
    y = torch.randn(len(acts), 48, generator=torch.Generator().manual_seed(1)).double()
    scores, along = squares_left_over(acts, y.float())
    f = acts[:, 7].double()
    linear = torch.stack([f, (f > 0).double()], dim=1)
    fit = torch.linalg.lstsq(torch.cat([f.square()[:, None], linear], dim=1), y.float().double()).solution[0]
    rest = f.square() - linear @ torch.linalg.lstsq(linear, f.square()[:, None]).solution[:, 0]
    torch.testing.assert_close(along[7] / rest.square().sum(), fit)
    on = f > 0
    error = (y.float().double() - linear @ torch.linalg.lstsq(linear[on], y.float().double()[on]).solution)[on]
    noise = (rest[on].square() * error.square().sum(-1)).sum()
    torch.testing.assert_close(scores[7], along[7].square().sum() / noise)
    assert scores.mean() == pytest.approx(1, abs=0.5)  # independent errors, of 24 features


def test_squares_of_two_paths_add_up(squared):
    """A square path and a bilinear head together, of random weights, in an SAE that normalises each sample."""
    data, (x, _), _ = squared
    x = x[:1_500]  # more than one part
    given = {"use_square_path": True, "square_scale": 2.0, "normalize_activations": "constant_norm_rescale"}
    sae = the_truth(data, head="bilinear", **given)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weights in (sae.V, sae.W_2, sae.U):
            weights.copy_(torch.randn(weights.shape, generator=generator))
        code = torch.cat([sae.encode(part) for part in x.split(500)]).double()
    unit = x.double().norm(dim=-1) / 48**0.5
    A, B = sae.V.detach().double().chunk(2, dim=-1)
    rows = sae.U.detach().double() / 2 + (A * B) @ sae.W_2.detach().double()
    found = torch.arange(23, -1, -1)
    with torch.no_grad():
        passed = Passed.of(sae, x)
        scored = square_scores(sae, passed, passed.code[:, found], found)
    energy = [sum(float((unit[t] * code[t, i] ** 2 * rows[i]).square().sum()) for t in range(1_500)) for i in found]
    np.testing.assert_allclose(scored[Score.ENERGY][0].numpy(), energy, rtol=1e-4)
    direction = torch.stack([(unit * code[:, i].square()).sum() * rows[i] for i in found])
    torch.testing.assert_close(scored[Score.ENERGY][1], direction, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("normalised", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("head", ["fm", "mlp"])
def test_a_share_is_of_what_ablating_the_path_takes_away(known, normalised, head):
    """In the units of the samples, whatever units the SAE works in, and over more samples than are read at once."""
    data, (x, acts), truth = known
    sae = the_truth(data, head=head, normalize_activations=normalised)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weights in (sae.V, sae.W_1, sae.W_2, sae.b_1):
            weights.copy_(torch.randn(weights.shape, generator=generator))
        without = deepcopy(sae)
        without.W_2.zero_()
        written = torch.cat([sae(part) - without(part) for part in x.split(500)]).double()
    row = recovery(sae, 3 * x, truth, "sae", acts)
    if normalised != "none":  # which rescales what is written with the samples
        assert row.interaction_share == pytest.approx(
            float((written - written.mean(0)).square().sum() / (x - x.mean(0)).double().square().sum()), rel=1e-4
        )
    row = recovery(sae, x, truth, "sae", acts)
    share = (written - written.mean(0)).square().sum() / (x - x.mean(0)).double().square().sum()
    assert row.interaction_share == pytest.approx(float(share), rel=1e-4)
    residual = torch.cat([part - sae(part) for part in x.split(700)]).double()
    assert row.fvu == pytest.approx(float(residual.square().sum() / (x - x.mean(0)).double().square().sum()), rel=1e-4)


def test_features_without_a_single_direction_have_a_mean_one(known):
    """A linear path that reads two of the active features: what a feature writes, regressed on its activation."""
    data, (x, acts), truth = known
    sae = the_truth(data, use_linear_path=True, nfm_top_k=2)
    with torch.no_grad():
        sae.W_lin.copy_(torch.randn(sae.W_lin.shape, generator=torch.Generator().manual_seed(2)))
        code = sae.encode(x)
    row, found = recovery(sae, x, truth, "sae", acts), mean_directions(sae, Passed.of(sae, x))
    assert row.mean_directions
    for i in (3, 20):
        strongest = code.topk(2, dim=-1).indices
        read = (strongest == i).any(-1) * code[:, i]
        wrote = code[:, i, None] * sae.W_dec[i] + read[:, None] * sae.W_lin[i]
        fit = torch.linalg.lstsq(code[:, i, None].double(), wrote.detach().double()).solution[0]
        torch.testing.assert_close(found[i].double(), fit, rtol=1e-4, atol=1e-5)
    assert not recovery(the_truth(data), x, truth, "sae", acts).mean_directions


def test_the_linear_truth_leaves_the_products_over(known):
    data, (x, acts), truth = known
    row = recovery(the_truth(data, StagedTopKTrainingSAEConfig), x, truth, "linear", acts)
    by = {one.score: one for one in row.pairs}
    assert set(by) == {Score.LEFT, Score.TOGETHER}
    assert row.interaction_share is None
    assert row.fvu == pytest.approx(floor(x, acts, truth, 24, PAIR_FUNCTIONS["product"]).fvu_linear, rel=1e-4)
    assert (by[Score.LEFT].auroc, by[Score.LEFT].auroc_decoys, by[Score.LEFT].precision) == (1.0, 1.0, 1.0)
    own = oracle(x, acts, truth)
    assert (own.auroc, own.auroc_decoys, own.precision) == (1.0, 1.0, 1.0)
    assert own.cosine == pytest.approx(by[Score.LEFT].cosine, abs=1e-3)  # the encoder's bias
    assert by[Score.LEFT].cosine == pytest.approx(1, abs=0.02)  # the few samples of a pair have other pairs in them


def test_what_is_left_over_is_a_least_squares_fit(known):
    data, (_, acts), truth = known
    residual = torch.randn(len(acts), 48, generator=torch.Generator().manual_seed(1))
    scores, found = left_over(acts, residual, truth)
    i, j = data.pairs[2].tolist()
    product, y = (acts[:, i] * acts[:, j]).double(), residual.double()
    design = torch.stack([product, acts[:, i].double(), acts[:, j].double()], dim=1)
    fit = torch.linalg.lstsq(design, y).solution[0]
    rest = product - design[:, 1:] @ torch.linalg.lstsq(design[:, 1:], product[:, None]).solution[:, 0]
    torch.testing.assert_close(found[2] / rest.square().sum(), fit)
    noise = (rest.square() * y.square().sum(-1)).sum()
    torch.testing.assert_close(scores[i, j], (rest[:, None] * y).sum(0).square().sum() / noise)
    torch.testing.assert_close(scores, scores.T)
    fires = (acts > 0).double()
    assert not scores[(fires.T @ fires) < 10].any()
    assert scores[scores > 0].mean() == pytest.approx(1, abs=0.15)  # independent errors


@pytest.mark.parametrize("head", ["fm", "bilinear"])
def test_the_energy_of_a_pair_is_the_sum_over_samples(known, head):
    data, (x, acts), truth = known
    sae = the_truth(data, head=head)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for weights in (sae.V, sae.W_2) if head == "bilinear" else (sae.V, sae.W_1, sae.W_2, sae.b_1):
            weights.copy_(torch.randn(weights.shape, generator=generator))
    x, found = x[:300], torch.arange(23, -1, -1)
    reads, weights = token_reads(sae, x), PathWeights.of(sae)
    unit = torch.linspace(0.5, 2.0, 300)[:, None]
    scored = attributed(weights, reads, acts[:300], truth, found, unit)
    pairs = TokenPairs.of(reads.read)
    energy, direction = np.zeros((24, 24)), np.zeros((4, 48))
    vectors = written(pairs, reads.gates, weights).double() * unit[..., None]
    planted = {tuple(sorted(pair)): number for number, pair in enumerate(data.pairs.tolist())}
    for token, column in pairs.fires.nonzero().tolist():
        i, j = sorted(23 - int(part[token, column]) for part in (pairs.first, pairs.second))
        energy[[i, j], [j, i]] += float(vectors[token, column].square().sum())
        if (i, j) in planted:
            direction[planted[i, j]] += vectors[token, column].numpy()
    np.testing.assert_allclose(scored[Score.ENERGY][0].numpy(), energy, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(scored[Score.ENERGY][1].numpy(), direction, rtol=1e-4, atol=1e-5)


def test_a_score_of_chance_and_ties(known):
    _, _, truth = known
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])) == 0.875
    flat = pair_score(Score.TOGETHER, torch.ones(24, 24, dtype=torch.float64), None, truth)
    assert (flat.auroc, flat.auroc_decoys, flat.cosine) == (0.5, 0.5, None)


@pytest.mark.parametrize("k", [1, 24])
def test_what_the_truth_itself_leaves(known, k):
    _, (x, acts), truth = known
    left = floor(x, acts, truth, k, PAIR_FUNCTIONS["product"])
    assert left.fvu_linear >= left.fvu - 1e-9
    assert left.fvu < 1e-9 if k == 24 else left.fvu > 0.1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Samples, SAEs trained on them, and what they found, as the three commands write them."""
    folder = tmp_path_factory.mktemp("synthetic")
    config = replace(PLANTED, d_in=24)
    planted = {name: getattr(config, name) for name in SyntheticConfig.__dataclass_fields__}
    samples = run_synthetic(
        SyntheticRunConfig(**planted, samples=12_800, held_out_samples=1_024, output=str(folder / "samples"))
    )
    compare = CompareConfig(
        activations=str(samples.folder),
        arms=("staged_topk", "joint_nfm"),
        seeds=(0,),
        k=(4,),
        d_sae=32,
        nfm_dim=4,
        training_tokens=12_288,
        batch_size=512,
        learning_rates=(1e-2,),
        output=str(folder / "compare"),
    )
    run_compare(compare)
    run_recovery(RecoveryConfig(saes=compare.output, samples=str(samples.folder), output=str(folder / "recovery")))
    return folder, config


def test_from_samples_to_what_was_found(run):
    folder, config = run
    result = RecoveryResult.load(folder / "recovery" / "results.json")
    assert (result.features, result.pairs, result.squares, result.decoys, result.samples) == (24, 4, 0, 3, 1_024)
    assert result.pair_share == pytest.approx(0.2, rel=0.25)  # of 1,024 samples
    assert [row.sae for row in result.rows] == ["k4/seed-0/joint_nfm"] * 2 + ["k4/seed-0/staged_topk"] * 2
    assert [row.refinement_steps for row in result.rows] == [0, 5] * 2
    for plain, refined in (result.rows[:2], result.rows[2:]):
        assert refined.fvu < plain.fvu < 0.6
    assert all(len(row.pairs) == (5 if row.architecture == "joint_nfm" else 2) for row in result.rows)
    said = result.words()
    assert "AUROC, decoys" in said
    assert "24 true features" in said
    assert "the true features" in said
    assert result.oracle.auroc > 0.95
    data = SyntheticData.of(config)
    truth = Truth.load(folder / "samples")
    x = torch.from_numpy(np.load(folder / "samples" / "held_out.npy")).flatten(0, 1)
    torch.testing.assert_close(sum(data.parts(truth.acts())), x, rtol=1e-5, atol=1e-5)  # float32 sums of order 1


def test_squares_are_counted_and_scored(run, tmp_path):
    folder, config = run
    planted = {name: getattr(config, name) for name in SyntheticConfig.__dataclass_fields__} | {"pair_kind": "square"}
    made = run_synthetic(
        SyntheticRunConfig(**planted, samples=256, held_out_samples=1_024, output=str(tmp_path / "squares"))
    )
    saes, output = str(folder / "compare" / "k4" / "seed-0" / "joint_nfm"), str(tmp_path / "out")
    result = run_recovery(RecoveryConfig(saes=saes, samples=str(made.folder), output=output))
    assert (result.pairs, result.squares, result.oracle) == (0, 4, None)
    assert [row.pairs for row in result.rows] == [(), ()]
    assert [len(row.squares) for row in result.rows] == [3, 3]
    assert result.oracle_squares.auroc > 0.95
    assert RecoveryResult.load(tmp_path / "out" / "results.json").rows == result.rows
    said = result.words()
    assert "4 squares of single features" in said
    assert "AUROC, all features" in said
    assert "control: energy of the feature" in said


def test_an_sae_that_cannot_be_measured_is_named_and_the_others_are_measured(run, tmp_path):
    """One of another width, one that diverged, and one whose linear path reads the strongest features only."""
    folder, _ = run
    good, saes = folder / "compare" / "k4" / "seed-0" / "joint_nfm", tmp_path / "saes"
    shutil.copytree(good, saes / "good")
    narrow = random_initialisation(JointNFMTrainingSAEConfig(d_in=8, d_sae=16, k=2), seed=0)
    narrow.save_inference_model(saes / "narrow")
    given = {"d_in": 24, "d_sae": 32, "k": 4, "nfm_dim": 4}
    random_initialisation(JointNFMTrainingSAEConfig(**given, nfm_top_k=2), seed=0).save_inference_model(saes / "n")
    asked = {"samples": str(folder / "samples"), "refinement_steps": (0,), "output": str(tmp_path / "out")}
    result = run_recovery(RecoveryConfig(saes=str(saes), **asked))
    assert [(row.sae, row.mean_directions) for row in result.rows] == [("good", False), ("n", True)]
    assert [one.sae for one in result.left_out] == ["narrow"]
    assert "d_in 8" in result.left_out[0].reason
    said = result.words()
    assert "Left out: narrow: it has d_in 8" in said
    assert "\nn*" in said
    assert "* The linear path reads the strongest features only" in said
    with pytest.raises(ValueError, match=r"no SAE .* can be measured: narrow: it has d_in 8"):
        run_recovery(RecoveryConfig(saes=str(saes / "narrow"), **asked))


def test_an_unfinished_sae_is_left_out_and_the_place_of_a_run_is_not(run, tmp_path):
    folder, _ = run
    sae = folder / "compare" / "k4" / "seed-0" / "joint_nfm"
    run_of_two = tmp_path / "begun.partial"  # the whole run may lie in such a folder
    for name in ("joint_nfm", "topk.partial"):
        shutil.copytree(sae, run_of_two / name)
    config = RecoveryConfig(
        saes=str(run_of_two), samples=str(folder / "samples"), refinement_steps=(0,), output=str(tmp_path / "out")
    )
    assert [row.sae for row in run_recovery(config).rows] == ["joint_nfm"]


def test_samples_that_were_begun_go_on_and_those_of_another_truth_do_not(run, tmp_path, monkeypatch):
    folder, config = run
    planted = {name: getattr(config, name) for name in SyntheticConfig.__dataclass_fields__}
    asked = {**planted, "samples": 12_800, "held_out_samples": 1_024, "output": str(tmp_path / "made")}
    monkeypatch.setattr(samples, "write_cache", partial(write_cache, shard_bytes=16 * 256 * 24 * 4))  # a shard a block
    drawn = SyntheticData.batch

    def broken(self, rows, seed, number):
        if number == 2:
            raise KeyboardInterrupt
        return drawn(self, rows, seed, number)

    with monkeypatch.context() as broken_off:
        broken_off.setattr(SyntheticData, "batch", broken)
        with pytest.raises(KeyboardInterrupt):
            run_synthetic(SyntheticRunConfig(**asked))
    with pytest.raises(ValueError, match=r"seed is 4, and 3 in the cache that was begun"):
        run_synthetic(SyntheticRunConfig(**{**asked, "seed": 4}))
    made = run_synthetic(SyntheticRunConfig(**asked))
    for name in ("truth.safetensors", "held_out.npy"):
        assert (made.folder / name).read_bytes() == (folder / "samples" / name).read_bytes()
    tokens = numbered_rows(0, 50, 256)
    for cache in (ActivationCache(made.folder), ActivationCache(folder / "samples")):
        x = cache.activations(tokens, "blocks.0.hook_resid_pre")
        assert torch.equal(x[40], torch.from_numpy(_row(config, 40)))


def _row(config, number):
    """The samples of a row, drawn by themselves."""
    x = SyntheticData.of(config).batch(16 * 256, 0, number // 16).x
    return x[number % 16 * 256 :][:256].detach().numpy()


def test_what_recovery_refuses(run, tmp_path):
    folder, _ = run
    good = {"saes": str(folder / "compare"), "samples": str(folder / "samples"), "output": str(tmp_path / "out")}
    for change, error, named in (
        ({"samples": str(tmp_path)}, FileNotFoundError, "no samples"),
        ({"saes": str(tmp_path)}, FileNotFoundError, "no saved SAE"),
    ):
        with pytest.raises(error, match=named):
            run_recovery(RecoveryConfig(**{**good, **change}))
    assert not (tmp_path / "out").exists()


def test_samples_from_a_file(tmp_path):
    x = np.random.default_rng(0).standard_normal((1_024, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    config = {"samples_file": str(tmp_path / "x.npy"), "held_out_samples": 256, "output": str(tmp_path / "made")}
    made = run_synthetic(SyntheticRunConfig(**config))
    assert made.identity.rows == 3
    assert torch.equal(torch.from_numpy(np.load(made.folder / "held_out.npy"))[0], torch.from_numpy(x[-256:]))
    with pytest.raises(FileNotFoundError, match="truth"):
        run_recovery(RecoveryConfig(saes=str(tmp_path), samples=str(made.folder), output=str(tmp_path / "out")))
    for nowhere in ("nowhere.npy", str(tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match=r"no .*nowhere"):
            run_synthetic(SyntheticRunConfig(**{**config, "samples_file": nowhere}))


def test_samples_from_activations_that_saelens_cached(run, tmp_path):
    folder, _ = run
    cached = folder / "samples" / "blocks.0.hook_resid_pre"  # as CacheActivationsRunner writes them
    config = {"samples_file": str(cached), "held_out_samples": 512, "output": str(tmp_path / "made")}
    made = run_synthetic(SyntheticRunConfig(**config))
    assert made.identity.rows == 48
    x = torch.tensor(load_from_disk(str(cached))["blocks.0.hook_resid_pre"])
    assert torch.equal(torch.from_numpy(np.load(made.folder / "held_out.npy")), x[-2:])
    assert torch.equal(
        ActivationCache(made.folder).activations(numbered_rows(0, 48, 256), "blocks.0.hook_resid_pre"), x[:-2]
    )
