"""`sae-nfm speed`: its arms do what they are called, its arithmetic is right; how fast anything was is not asserted."""

import copy
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from builders import random_activations
from sae_lens.saes.sae import TrainStepInput
from step_forms import of_sparse_step

from sae_nfm.architectures.joint_config import parameter_count
from sae_nfm.architectures.joint_training import JointNFMTrainingSAE
from sae_nfm.kernels import device
from sae_nfm.profiling import arms
from sae_nfm.profiling.arms import (
    ARMS,
    INFERENCE_ARMS,
    JOINT_ARMS,
    JOINT_AUTO,
    JOINT_TORCH,
    ON_REQUEST,
    PUBLISHED,
    PublishedNFMTrainingSAE,
    Sizes,
    Stepper,
    activations,
    joint_config,
    peak_of_steps,
    reason_against,
    time_cases,
)
from sae_nfm.profiling.results import Rates, SpeedResult
from sae_nfm.profiling.run import SpeedConfig, floor_seconds, measure_speed

TINY = {"d_in": 16, "d_sae": 64, "k": 4, "nfm_dim": 8, "batch": 32, "repeats": 3, "warm_up": 1, "memory": False}


@pytest.fixture(scope="module", autouse=True)
def little_to_rate():
    """The machine's rates by a small product and a small copy: a figure here is no finding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(arms.RATE_SIZE, "cpu", 64)
        patch.setattr(arms, "COPIED_BYTES", 2**16)
        yield


@pytest.fixture(scope="module")
def result() -> SpeedResult:
    return measure_speed(SpeedConfig(**TINY))


@pytest.fixture(scope="module")
def scan() -> SpeedResult:
    return measure_speed(SpeedConfig(**TINY, scan="d_sae", scan_to=300))


def test_every_arm_is_timed_and_compared_with_topk(result):
    rows = {row.arm: row for row in result.rows}
    left_out = ("joint_nfm no Triton", *ON_REQUEST)  # a GPU has the first
    assert list(rows) == [arm for arm in ARMS if arm not in left_out]
    for name, row in rows.items():
        assert row.reason is None, name
        low, high = row.step_quartiles
        assert 0 < low <= row.step_seconds <= high
        assert row.step_over_topk == row.step_seconds / rows["topk"].step_seconds
        assert (row.inference_seconds is not None) == (name in INFERENCE_ARMS)
        assert (row.floor_seconds is not None) == (name in JOINT_ARMS)
        if row.floor_seconds is not None:
            assert row.floor_seconds == floor_seconds(Sizes(**sizes_of(TINY)), result.rates)
            assert row.step_over_floor == row.step_seconds / row.floor_seconds
        if row.inference_seconds is not None:
            assert row.inference_over_topk == row.inference_seconds / rows["topk"].inference_seconds


def sizes_of(settings: dict) -> dict:
    return {name: settings[name] for name in ("d_in", "d_sae", "k", "nfm_dim", "batch")}


def test_the_table_has_every_figure(result):
    lines = result.words().splitlines()
    assert max(map(len, lines)) <= 110
    for row in result.rows:
        line = next(line for line in lines if line.startswith(row.arm + " "))
        assert f"{1e3 * row.step_seconds:,.1f}" in line
        assert f"{row.step_over_topk:.3f}" in line
    assert "d_in 16, d_sae 64, k 4, nfm_dim 8, batch 32, float32" in lines[0]
    assert f"{result.provenance['threads']} threads" in lines[0]


def test_arms_of_k_iterations_are_timed_where_they_are_asked_for():
    arms = ("matching_pursuit", "staged_topk in k stages", "topk")
    found = measure_speed(SpeedConfig(**TINY, arms=arms))
    assert [(row.arm, row.reason) for row in found.rows] == [(arm, None) for arm in arms]
    assert min(row.inference_over_topk for row in found.rows) > 0


def test_the_arms_in_stages_infer_as_they_say():
    sizes = Sizes(**sizes_of(TINY))
    for arm, stages, candidates in (("", 1, None), (" in 4 stages", 4, None), (" in 4 stages, candidates", 4, 16)):
        for name in ("staged_topk", "joint_nfm") if arm else ("staged_topk",):
            cfg = ARMS[name + arm](sizes).cfg
            assert (cfg.selection_stages, cfg.selection_candidates, cfg.refinement_steps) == (stages, candidates, 0)
            assert cfg.get_inference_sae_cfg_dict()["refinement_steps"] == (5 if arm else 0)
    assert ARMS["staged_topk in k stages"](replace(sizes, k=7)).cfg.selection_stages == 7


def test_arms_take_the_form_they_are_named_for():
    sizes = Sizes(**sizes_of(TINY))
    x = activations(sizes)[0]

    def is_sparse(arm):
        step_input = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
        output = ARMS[arm](sizes).training_forward_pass(step_input)
        return of_sparse_step(output) or output.feature_acts.is_sparse

    joint = ("dense", "sparse", "auto")
    assert [ARMS[f"joint_nfm {kernel}"](sizes).cfg.kernel for kernel in joint] == list(joint)
    assert {arm: is_sparse(arm) for arm in ARMS if arm not in (JOINT_AUTO, JOINT_TORCH)} == {
        "joint_nfm dense": False,
        "joint_nfm sparse": True,
        "joint_nfm published": False,
        "sequential_nfm": False,
        "topk": False,
        "topk fused Adam": False,
        "topk COO": True,
        "staged_topk": False,
        "staged_topk in 4 stages": False,
        "staged_topk in 4 stages, candidates": False,
        "staged_topk in k stages": False,
        "joint_nfm in 4 stages": False,
        "joint_nfm in 4 stages, candidates": False,
        "matching_pursuit": False,
        "batchtopk": False,
    }


def test_the_fused_adam_is_the_one_arm_s_alone():
    sizes = Sizes(**sizes_of(TINY))
    for arm, form in {"topk": None, "topk fused Adam": True}.items():
        optimizer = Stepper(arm, sizes, activations(sizes)).trainer.optimizer
        assert [group["fused"] for group in optimizer.param_groups] == [form]


@pytest.mark.parametrize("nfm_top_k", [None, 3])
def test_the_published_formulation_is_the_same_function(nfm_top_k):
    cfg = joint_config(Sizes(**sizes_of(TINY), nfm_top_k=nfm_top_k, dtype="float64"), "dense")
    published = PublishedNFMTrainingSAE(cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in published.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    dense = JointNFMTrainingSAE(copy.deepcopy(cfg))
    dense.load_state_dict(published.state_dict())
    x = random_activations(d_in=cfg.d_in).double()
    losses = []
    for sae in (published, dense):
        step_input = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
        losses.append(sae.training_forward_pass(step_input).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for (name, ours), (_, theirs) in zip(published.named_parameters(), dense.named_parameters(), strict=True):
        assert theirs.grad.abs().sum() > 0, name
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)  # float64: its default tolerance is 1e-7


def test_activations_are_a_seeded_residual_stream():
    sizes = Sizes(d_in=64, batch=500)
    batches = activations(sizes)
    assert all(torch.equal(*pair) for pair in zip(batches, activations(sizes), strict=True))
    assert not torch.equal(batches[0], activations(replace(sizes, seed=1))[0])
    assert not torch.equal(batches[0], batches[1])
    assert batches[0].norm(dim=-1).mean().item() == pytest.approx(8.0, rel=1e-5)  # sqrt(64), in float32
    variances = torch.linalg.eigvalsh(batches[0].T.cov())
    assert (
        variances[-16:].sum() > 0.6 * variances.sum()
    )  # a quarter of the directions; alike, they would have a quarter


def test_steps_train():
    step = Stepper("topk", Sizes(**sizes_of(TINY)), activations(Sizes(**sizes_of(TINY))))
    before = step.trainer.sae.W_enc.detach().clone()
    for _ in range(3):
        step()
    assert step.trainer.n_training_steps == 3
    assert step.trainer.n_training_samples == 3 * 32
    assert not torch.equal(step.trainer.sae.W_enc, before)


def test_rates_by_hand(result, monkeypatch):
    """As many operations as a square product has, as many bytes as a copy reads and writes, in the least of all rounds."""
    ticks = itertools.chain.from_iterable((now, now + seconds) for now, seconds in enumerate((0.5, 0.25, 0.125, 0.5)))
    monkeypatch.setattr(arms, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    _, rates = time_cases([], Sizes(**sizes_of(TINY)), repeats=1, warm_up=1, limit_gib=0, with_inference=False)
    assert rates.flop_per_second == pytest.approx(2 * 64**3 / 0.125)
    assert rates.bytes_per_second == pytest.approx(2 * 2**16 / 0.25)
    assert result.rates.flop_per_second > 0
    assert result.rates.bytes_per_second > 0


def test_floor_by_hand():
    sizes = Sizes(d_in=4, d_sae=10, k=3, nfm_dim=2, batch=5)
    rates = Rates(flop_per_second=100.0, bytes_per_second=1000.0)
    # W_enc, W_dec, W_lin 40 each, V 20, b_enc 10, b_dec, b_lin, b_2 4 each, W_1 4, b_1 2, W_2 8
    parameters = 3 * 40 + 20 + 10 + 3 * 4 + 4 + 2 + 8
    assert parameter_count(joint_config(sizes)) == parameters
    product = 2 * 5 * 4 * 10
    all_read = 9 * parameters + 5 * (4 * 3 * 4 + 3 * 3 * 2)
    assert floor_seconds(sizes, rates) == pytest.approx(product / 100 + 4 * all_read / 1000, rel=1e-12)
    two_read = 9 * parameters + 5 * (4 * 3 * 4 + 3 * 2 * 2 + 3 * 2 * 4)
    top_2 = replace(sizes, nfm_top_k=2, dtype="bfloat16")
    assert floor_seconds(top_2, rates) == pytest.approx(product / 100 + 2 * two_read / 1000, rel=1e-12)
    # at 5000 FLOP/s a column of a product is 5 * 2 * 10 / 5000 s a batch, less than the 5 * 3 * 4 / 1000 of its gathers
    fast = replace(rates, flop_per_second=5000.0)
    dense = (product + 5 * 2 * 10 * (4 * 4 + 3 * 2)) / 5000
    assert floor_seconds(sizes, fast) == pytest.approx(dense + 4 * 9 * parameters / 1000, rel=1e-12)


def test_the_arm_without_triton(monkeypatch):
    sizes, seen = Sizes(**sizes_of(TINY)), {}
    for arm in (JOINT_AUTO, JOINT_TORCH):
        step = Stepper(arm, sizes, activations(sizes))
        monkeypatch.setattr(step.trainer, "step", lambda _, arm=arm: seen.update({arm: device.TRITON_DEVICES}))
        step()
    assert seen == {JOINT_AUTO: ("cuda",), JOINT_TORCH: ()}
    assert device.TRITON_DEVICES == ("cuda",)
    said = "there are no Triton kernels on cpu: the same as joint_nfm auto"
    assert reason_against(JOINT_TORCH, sizes, 1.0) == said
    assert reason_against(JOINT_TORCH, replace(sizes, device="cuda:1"), 1.0) is None


def test_a_scan_doubles_the_size(scan):
    assert [(row.arm, row.d_sae) for row in scan.rows] == [
        (arm, d_sae) for d_sae in (64, 128, 256) for arm in ("joint_nfm auto", "topk")
    ]
    steps = {(row.arm, row.d_sae): row.step_seconds for row in scan.rows}
    for row in scan.rows:
        if row.d_sae == 64:
            assert row.step_over_previous is row.step_over_first is None
        else:
            assert row.step_over_previous == steps[row.arm, row.d_sae] / steps[row.arm, row.d_sae // 2]
            assert row.step_over_first == steps[row.arm, row.d_sae] / steps[row.arm, 64]
        assert row.step_over_topk == steps[row.arm, row.d_sae] / steps["topk", row.d_sae]
        assert f"{row.arm}, {row.d_sae}" in scan.words()
    assert "d_sae 64" not in scan.words().splitlines()[0]


def test_a_scan_of_nfm_dim_ends_at_eight_times_the_first():
    settings = TINY | {"nfm_dim": 4, "repeats": 1}
    result = measure_speed(SpeedConfig(**settings, scan="nfm_dim", arms=("joint_nfm sparse",)))
    assert [(row.arm, row.nfm_dim) for row in result.rows] == [("joint_nfm sparse", m) for m in (4, 8, 16, 32)]
    assert all(row.step_over_topk is None for row in result.rows)  # topk was not asked for
    assert all(row.step_quartiles is None for row in result.rows)  # of one round


def test_the_file(tmp_path):
    path = tmp_path / "new" / "speed.json"
    result = measure_speed(SpeedConfig(**TINY, arms=("topk", PUBLISHED), save=str(path)))
    assert SpeedResult.load(path) == result
    assert sorted(file.name for file in path.parent.iterdir()) == ["speed.json", "speed.json.sha256"]
    provenance = json.loads(path.read_text())["provenance"]
    assert provenance["config"]["d_sae"] == 64
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["threads"] == torch.get_num_threads()


def test_threads_are_set_for_the_run_alone():
    had = torch.get_num_threads()
    result = measure_speed(SpeedConfig(**TINY | {"repeats": 1}, arms=("topk",), threads=had + 1))
    assert result.provenance["threads"] == had + 1
    assert torch.get_num_threads() == had


def test_what_reason_against_says_so():
    sizes = Sizes(d_sae=8192, nfm_dim=64, batch=2048)  # 2^11 2^13 2^6 numbers of 4 bytes: 4 GiB, four times
    assert reason_against(PUBLISHED, sizes, 15.9) == "does not fit: 16.0 GiB"
    assert reason_against(PUBLISHED, sizes, 16.0) is None
    assert reason_against("topk", sizes, 0.0) is None
    result = measure_speed(SpeedConfig(**TINY, memory_limit_gib=1e-6, arms=(PUBLISHED, "topk")))
    published, topk = result.rows
    assert published.reason == "does not fit: 0.0 GiB"
    assert published.step_seconds is published.step_over_topk is None
    assert topk.step_over_topk == pytest.approx(1.0)
    assert "does not fit: 0.0 GiB" in result.words()


def test_an_arm_that_the_device_does_not_support_is_a_row_with_the_reason():
    # the device "meta" has shapes alone, so that no step can ask how many features are dead
    result = measure_speed(SpeedConfig(**TINY, device="meta", arms=("topk", "batchtopk")))
    for row in result.rows:
        assert row.step_seconds is row.step_over_topk is row.inference_seconds is None
        assert "meta" in row.reason
        assert row.reason[:40] in result.words()


def test_peak_memory_comes_from_a_process_of_its_own():
    sizes = Sizes(d_in=64, d_sae=4096, k=4, nfm_dim=8, batch=256)
    peak = peak_of_steps("topk", sizes, n_steps=2, threads=1)
    # at least Adam's moments of two matrices of 1 MiB, and pre-activations of 4 MiB
    assert 8 * 2**20 < peak < 2**30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 65}, r"\bk\b.*\bd_sae\b.*\b64\b.*\b65\b"),
        ({"nfm_top_k": 5}, r"\bnfm_top_k\b.*\bk\b.*\b4\b.*\b5\b"),
        ({"batch": 0}, r"\bbatch\b.*\b0\b"),
        ({"repeats": 0}, r"\brepeats\b.*\b0\b"),
        ({"warm_up": 0}, r"\bwarm_up\b.*\b0\b"),
        ({"threads": 0}, r"\bthreads\b.*\b0\b"),
        ({"dtype": "float16"}, r"\bdtype\b.*'float32'.*'bfloat16'.*'float16'"),
        ({"scan": "k"}, r"\bscan\b.*'d_sae'.*'nfm_dim'.*'k'"),
        ({"scan_to": 128}, r"\bscan_to\b.*\b128\b.*--scan\b"),
        ({"scan": "d_sae", "scan_to": 100}, r"\bscan_to\b.*\b100\b.*\bd_sae\b.*\b64\b"),
        ({"arms": ("topk", "relu")}, r"\barms\b.*" + ", ".join(map(repr, ARMS)) + ".*'relu'"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        SpeedConfig(**TINY | settings)


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match=r"\bdevice\b.*'abacus'"):
        measure_speed(SpeedConfig(**TINY, device="abacus"))


def test_something_else_is_no_result(tmp_path):
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"other\.json.*\brates\b"):
        SpeedResult.load(tmp_path / "other.json")
