"""Sequential training in a reproduction: on a comparison's TopK SAE, its tokens and settings; figures against plain sums."""

import json
import os
import shutil
import signal
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
from builders import inference_sae, random_activations, training_config
from finished_runs import SMALL
from sae_lens import SAE, SAETrainer
from sae_lens.training._interruption import InterruptedException

from sae_nfm import demo
from sae_nfm.analysis.path_contributions import read_activations
from sae_nfm.data.documents import held_out_rows
from sae_nfm.evaluation.token_table import read_manifest, read_rows
from sae_nfm.experiments.reproduce.results import SEQUENTIAL as PUBLISHED
from sae_nfm.experiments.reproduce.results import NoVerdict
from sae_nfm.experiments.reproduce.rows import (
    ADAPTER,
    AT_EQUAL_DISTANCE,
    BASE,
    SEQUENTIAL,
    Behaviour,
    keeping_means,
    rows_without_base,
    sequential_rows,
    train_sequential,
    written_shares,
)
from sae_nfm.models.load import load_model
from sae_nfm.stats.estimates import Bootstrap
from sae_nfm.training.results import TRAINED_FILENAME, Trained

pytest_plugins = ["finished_runs"]
JOINT, MATCHED = "joint_nfm", "topk matched"
NAMES = (SEQUENTIAL, ADAPTER)
ROWS = SMALL["held_out_tokens"] // SMALL["context_size"]


@pytest.fixture(scope="module")
def model():
    return load_model(demo.MODEL_NAME)


@pytest.fixture(scope="module")
def data():
    return demo.load_tokens("train").shuffle(seed=SMALL["seed"])


@pytest.fixture(scope="module")
def saes(reproduction):
    """The sequential SAEs, on the "topk" of the comparison."""
    return {name: SAE.load_from_disk(reproduction.folder / "sequential" / name).eval() for name in NAMES}


@pytest.fixture(scope="module")
def behaviour(reproduction):
    folder = reproduction.folder / "rows"
    arms = tuple(read_manifest(folder).arms)
    return Behaviour(folder=folder, arms=arms, answers=(), bootstrap=Bootstrap(seed=0))


@pytest.fixture(scope="module")
def activations(model, saes):
    rows = held_out_rows(model, demo.load_tokens("validation"), SMALL["context_size"], SMALL["held_out_tokens"])
    return read_activations(model, saes[SEQUENTIAL], rows.tokens, rows.documents)


@pytest.fixture(scope="module")
def shares(saes, activations):
    return written_shares(saes[SEQUENTIAL], *activations, seed=0)


# Training.


def test_trained_on_the_frozen_base_with_the_comparisons_settings(reproduction, saes):
    base = SAE.load_from_disk(reproduction.arms / BASE)
    for sae in saes.values():
        for name, tensor in base.state_dict().items():
            assert torch.equal(sae.base.state_dict()[name], tensor), name
    wanted, there = (
        Trained.load(folder).settings
        for folder in (reproduction.folder / "sequential" / "sequential", reproduction.arms / "topk")
    )
    for name in ("training_tokens", "batch_size", "seed", "context_size", "hook_name", "dataset"):
        assert wanted[name] == there[name], name
    assert wanted["learning_rate"] == SMALL["lr"]
    assert (saes[SEQUENTIAL].cfg.nfm_dim, saes[SEQUENTIAL].cfg.head, saes[ADAPTER].cfg.head) == (8, "fm", "none")
    assert "hook_nfm_linear" in saes[ADAPTER].hook_dict


def test_finished_ones_are_taken_as_they_are(reproduction, model, data, saes):
    folder = reproduction.folder / "sequential"
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
    again = train_sequential(reproduction.arms, model, data, folder, "cpu")
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))} == before
    for name, tensor in saes[SEQUENTIAL].state_dict().items():
        assert torch.equal(again[SEQUENTIAL].state_dict()[name], tensor)


def test_the_learning_rate_is_that_of_the_joint_one(reproduction, model, data, tmp_path):
    """Beside a joint one of another rate, on the same base, the finished ones would be others."""
    trained = Trained.load(reproduction.arms / JOINT)
    other = replace(trained, settings=trained.settings | {"learning_rate": 3e-3})
    (tmp_path / "seed-1" / JOINT).mkdir(parents=True)
    (tmp_path / "seed-1" / JOINT / TRAINED_FILENAME).write_text(json.dumps(asdict(other)))
    (tmp_path / "seed-1" / BASE).symlink_to(reproduction.arms / BASE)
    with pytest.raises(ValueError, match=rf"learning_rate.*'{SEQUENTIAL}'.*0\.003.*{SMALL['lr']}"):
        train_sequential(tmp_path / "seed-1", model, data, reproduction.folder / "sequential", "cpu")


@pytest.mark.slow
def test_interrupted_it_leaves_a_partial_folder_and_goes_on(reproduction, model, data, saes, tmp_path, monkeypatch):
    step, calls = SAETrainer.step, []

    def step_then_signal(self, batch):
        calls.append(self)
        if len(calls) == 3:  # in the second of two steps, of the first of two SAEs
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(InterruptedException):
        patch.setattr(SAETrainer, "step", step_then_signal)
        train_sequential(reproduction.arms, model, data, tmp_path / "out", "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    resumed = train_sequential(reproduction.arms, model, data, tmp_path / "out", "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for name, sae in saes.items():
        for key, tensor in sae.state_dict().items():
            assert torch.equal(resumed[name].state_dict()[key], tensor), key


def test_another_base_is_refused(reproduction, model, data, tmp_path):
    shutil.copytree(reproduction.arms, tmp_path / "seed-1")
    with pytest.raises(ValueError, match=rf"\bbase\b.*'{SEQUENTIAL}'.*seed-1"):
        train_sequential(tmp_path / "seed-1", model, data, reproduction.folder / "sequential", "cpu")


# Figures.


def test_without_its_paths_it_is_the_base(behaviour):
    one, other = (
        read_rows(behaviour.folder, ["row", "position", "kl_nats", "error_energy"], [name])
        for name in (f"{SEQUENTIAL}: direct only", BASE)
    )
    # the same sums in float32, of an SAE with paths and of one without
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-6)
    whole = read_rows(behaviour.folder, ["row", "position", "kl_nats", "error_energy"], [SEQUENTIAL])
    assert (abs(whole["error_energy"] / other["error_energy"] - 1) > 1e-3).mean() > 0.9, "else this says nothing"


def test_figures_are_ratios_of_means(behaviour, shares):
    alone = replace(behaviour, arms=tuple(name for name in behaviour.arms if name != MATCHED))
    rows, without = (sequential_rows(measured, shares) for measured in (behaviour, alone))

    def change(column: str, arm: str, against: str) -> float:
        means = [
            read_rows(behaviour.folder, [column], [name])[column].astype("float64").mean() for name in (arm, against)
        ]
        return pytest.approx(float(means[0] / means[1] - 1))

    error, kl, *_, ratio = PUBLISHED
    for name, column in ((error, "error_energy"), (kl, "kl_nats")):
        matched, kept, linear, worth = [row for row in rows if row.name == name]
        assert matched.here.estimate == change(column, SEQUENTIAL, BASE)
        assert matched.controlled.estimate == change(column, SEQUENTIAL, MATCHED)
        (unmatched, *_) = [row for row in without if row.name == name]
        assert unmatched.controlled is None
        assert unmatched.control.endswith("there is none here")
        assert kept.controlled.estimate == change(column, SEQUENTIAL, keeping_means(f"{SEQUENTIAL}: direct only"))
        assert "cut to its top 250 features" in kept.control
        assert linear.controlled.estimate == change(column, ADAPTER, BASE)
        assert worth.controlled.estimate == change(column, SEQUENTIAL, ADAPTER)
    (linear,) = [row for row in rows if row.name == f"{kl}, linear"]
    assert linear.here.estimate == change("kl_nats", f"{SEQUENTIAL}: direct + linear", BASE)
    assert linear.published is None
    for row, control in zip([row for row in rows if row.name == ratio], AT_EQUAL_DISTANCE[1:], strict=True):
        assert row.here.estimate - 1 == change("kl_nats", SEQUENTIAL, f"{SEQUENTIAL}: isotropic")
        assert row.controlled.estimate - 1 == change("kl_nats", SEQUENTIAL, f"{SEQUENTIAL}: {control}")


def test_the_rows_of_a_reproduction_are_these(reproduction, behaviour, shares):
    found = [row for row in reproduction.result.rows if row.section == "sequential"]
    assert [(row.name, row.published, row.control, row.verdict, row.unit) for row in found] == [
        (row.name, row.published, row.control, row.verdict, row.unit) for row in sequential_rows(behaviour, shares)
    ]


def test_shares_are_of_what_the_paths_write(saes, activations, shares):
    sae, (x, _) = saes[SEQUENTIAL], activations
    with torch.no_grad():
        paths = sae.decode_paths(sae.encode(x))
    sizes = [float(path.double().abs().mean()) for path in (paths.linear, paths.interaction)]
    energies = [float(path.double().var(0, correction=0).sum()) for path in (paths.linear, paths.interaction)]
    # means of what float32 wrote, in two ways
    assert shares.magnitude.estimate == pytest.approx(sizes[0] / sum(sizes), rel=1e-5)
    assert shares.energy.estimate == pytest.approx(energies[0] / sum(energies), rel=1e-5)
    assert shares.magnitude.estimate + shares.nonlinear_magnitude.estimate == pytest.approx(1)
    assert shares.energy.estimate + shares.nonlinear_energy.estimate == pytest.approx(1)
    assert shares.magnitude.n_clusters == ROWS


def test_an_interaction_path_that_is_linear_has_no_residual():
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
        (None, None, "none here", NoVerdict.NOT_MEASURED)
    }
