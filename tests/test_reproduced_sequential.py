"""Sequential training in a reproduction: on a comparison's TopK SAE, its tokens and settings; figures against plain sums."""

import os
import shutil
import signal

import pytest
import torch
from builders import inference_sae, random_activations, training_config
from sae_lens import SAE, SAETrainer
from sae_lens.training._interruption import InterruptedException

from sae_nfm import demo
from sae_nfm.baselines import ArmSizes, training_arms
from sae_nfm.behaviour import measure
from sae_nfm.controls import fit_activations
from sae_nfm.documents import held_out_rows
from sae_nfm.functional import read_activations
from sae_nfm.hooks import Splice
from sae_nfm.matched_training import StreamConfig, Trained, train_arms
from sae_nfm.models import load_model
from sae_nfm.reproduced_rows import KEPT, NOT_MEASURED, Behaviour
from sae_nfm.reproduced_sequential import (
    ADAPTER,
    AT_EQUAL_DISTANCE,
    BASE,
    PUBLISHED,
    SEQUENTIAL,
    rows_without_base,
    sequential_arms,
    sequential_rows,
    train_sequential,
    written_shares,
)
from sae_nfm.resampling import Bootstrap
from sae_nfm.token_rows import read_rows

HOOK = "blocks.2.hook_resid_post"
RATES = {"topk": 3e-3, "joint_nfm": 4e-3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A comparison's folder of one seed, and the sequential SAEs on it."""
    root, model = tmp_path_factory.mktemp("sequential"), load_model(demo.MODEL_NAME)
    stream = StreamConfig(
        model_name=demo.MODEL_NAME,
        hook_name=HOOK,
        dataset=demo.MODEL_NAME,
        training_tokens=4_096,
        context_size=256,
        batch_size=1_024,
        seed=1,
    )
    arms = training_arms(list(RATES), ArmSizes(d_in=256, d_sae=64, k=8, nfm_dim=8), {})
    data = demo.load_tokens("train").shuffle(seed=1)
    train_arms(stream, arms, RATES, model, data, root / "seed-1")
    return root, model, data, train_sequential(root / "seed-1", model, data, root / "out", "cpu")


@pytest.fixture(scope="module")
def behaviour(trained):
    root, model, _, saes = trained
    text = demo.load_tokens("validation")
    rows, fitted = held_out_rows(model, text, 256, 1_536), held_out_rows(model, text, 256, 512, skip_tokens=1_536)
    arms = sequential_arms(model, saes, fitted, fit_activations(model, fitted.tokens, HOOK))
    arms |= {BASE: Splice(sae=SAE.load_from_disk(root / "seed-1" / BASE).eval())}
    folder = measure(model, rows, arms, root / "rows")
    return Behaviour(folder=folder, arms=tuple(arms), answers=(), bootstrap=Bootstrap(seed=0))


@pytest.fixture(scope="module")
def activations(trained):
    _, model, _, saes = trained
    rows = held_out_rows(model, demo.load_tokens("validation"), 256, 1_536)
    return read_activations(model, saes[SEQUENTIAL], rows.tokens, rows.documents)


@pytest.fixture(scope="module")
def shares(trained, activations):
    return written_shares(trained[3][SEQUENTIAL], *activations, seed=0)


# Training.


def test_trained_on_the_frozen_base_with_the_comparisons_settings(trained):
    root, _, _, saes = trained
    base = SAE.load_from_disk(root / "seed-1" / BASE)
    for sae in saes.values():
        for name, tensor in base.state_dict().items():
            assert torch.equal(sae.base.state_dict()[name], tensor), name
    wanted, there = (Trained.load(root / name).settings for name in ("out/sequential", "seed-1/topk"))
    for name in ("training_tokens", "batch_size", "seed", "context_size", "hook_name", "dataset"):
        assert wanted[name] == there[name], name
    assert wanted["learning_rate"] == RATES["joint_nfm"]
    assert (saes[SEQUENTIAL].cfg.nfm_dim, saes[SEQUENTIAL].cfg.head, saes[ADAPTER].cfg.head) == (8, "fm", "none")
    assert "hook_nfm_linear" in saes[ADAPTER].hook_dict


def test_finished_ones_are_taken_as_they_are(trained):
    root, model, data, saes = trained
    before = {path: path.stat().st_mtime_ns for path in sorted((root / "out").rglob("*"))}
    again = train_sequential(root / "seed-1", model, data, root / "out", "cpu")
    assert {path: path.stat().st_mtime_ns for path in sorted((root / "out").rglob("*"))} == before
    for name, tensor in saes[SEQUENTIAL].state_dict().items():
        assert torch.equal(again[SEQUENTIAL].state_dict()[name], tensor)


@pytest.mark.slow
def test_interrupted_it_leaves_a_partial_folder_and_goes_on(trained, tmp_path, monkeypatch):
    root, model, data, saes = trained
    step, calls = SAETrainer.step, []

    def step_then_signal(self, batch):
        calls.append(self)
        if len(calls) == 5:  # in the third of four steps, of the first of two SAEs
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(InterruptedException):
        patch.setattr(SAETrainer, "step", step_then_signal)
        train_sequential(root / "seed-1", model, data, tmp_path / "out", "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    resumed = train_sequential(root / "seed-1", model, data, tmp_path / "out", "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for name, sae in saes.items():
        for key, tensor in sae.state_dict().items():
            assert torch.equal(resumed[name].state_dict()[key], tensor), key


def test_another_base_is_refused(trained, tmp_path):
    root, model, data, _ = trained
    shutil.copytree(root / "seed-1", tmp_path / "seed-1")
    shutil.copytree(root / "out", tmp_path / "out")
    with pytest.raises(ValueError, match=r"base of 'sequential' is .* give it as it was, or another output folder"):
        train_sequential(tmp_path / "seed-1", model, data, tmp_path / "out", "cpu")


# Figures.


def test_without_its_paths_it_is_the_base(behaviour):
    one, other = (
        read_rows(behaviour.folder, ["row", "position", "kl_nats", "error_energy"], [name])
        for name in (f"{SEQUENTIAL}: direct only", BASE)
    )
    assert one.equals(other)


def test_figures_are_ratios_of_means(behaviour, shares):
    rows = sequential_rows(behaviour, shares)

    def change(column: str, arm: str, against: str) -> float:
        means = [
            read_rows(behaviour.folder, [column], [name])[column].astype("float64").mean() for name in (arm, against)
        ]
        return pytest.approx(float(means[0] / means[1] - 1))

    error, kl, *_, ratio = PUBLISHED
    for name, column in ((error, "error_energy"), (kl, "kl_nats")):
        matched, kept, alone, worth = [row for row in rows if row.name == name]
        assert matched.here.estimate == change(column, SEQUENTIAL, BASE)
        assert matched.controlled is None
        assert matched.control.endswith("there is none here")
        assert kept.controlled.estimate == change(column, SEQUENTIAL, f"{SEQUENTIAL}: direct only{KEPT}")
        assert "cut to its top 250 features" in kept.control
        assert alone.controlled.estimate == change(column, ADAPTER, BASE)
        assert worth.controlled.estimate == change(column, SEQUENTIAL, ADAPTER)
    (linear,) = [row for row in rows if row.name == f"{kl}, linear"]
    assert linear.here.estimate == change("kl_nats", f"{SEQUENTIAL}: direct + linear", BASE)
    assert linear.published == "-"
    for row, control in zip([row for row in rows if row.name == ratio], AT_EQUAL_DISTANCE[1:], strict=True):
        assert row.here.estimate - 1 == change("kl_nats", SEQUENTIAL, f"{SEQUENTIAL}: isotropic")
        assert row.controlled.estimate - 1 == change("kl_nats", SEQUENTIAL, f"{SEQUENTIAL}: {control}")


def test_shares_are_of_what_the_paths_write(trained, activations, shares):
    sae, (x, _) = trained[3][SEQUENTIAL], activations
    with torch.no_grad():
        paths = sae.decode_paths(sae.encode(x))
    sizes = [float(path.double().abs().mean()) for path in (paths.linear, paths.interaction)]
    energies = [float(path.double().var(0, correction=0).sum()) for path in (paths.linear, paths.interaction)]
    assert shares.magnitude.estimate == pytest.approx(sizes[0] / sum(sizes))
    assert shares.energy.estimate == pytest.approx(energies[0] / sum(energies))
    assert shares.magnitude.estimate + shares.nonlinear_magnitude.estimate == pytest.approx(1)
    assert shares.energy.estimate + shares.nonlinear_energy.estimate == pytest.approx(1)
    assert shares.magnitude.n_clusters == 6


def test_an_interaction_path_that_is_linear_has_no_residual(activations):
    """With gates that are always open and one feature a token at most there are no pairs: what is left is a constant."""
    sae = inference_sae(training_config("sequential_nfm", k=1, nfm_top_k=None, use_square_path=False))
    x = random_activations(rows=200)
    shares = written_shares(sae, x, torch.arange(200) // 10, seed=0)
    assert shares.nonlinear_magnitude.estimate > 0.01  # biases
    assert shares.nonlinear_energy.estimate == pytest.approx(0, abs=1e-12)
    assert shares.nonlinear_residual.estimate == pytest.approx(0, abs=1e-12)


def test_rows_without_a_base():
    rows = rows_without_base("none here")
    assert [row.name for row in rows] == list(PUBLISHED)
    assert {(row.here, row.controlled, row.control, row.verdict) for row in rows} == {
        (None, None, "none here", NOT_MEASURED)
    }
