"""The arms of a comparison: what they are, that they match as they say, and how they are trained."""

import hashlib
import os
import signal
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from builders import CONTEXT, D_MODEL, HOOK, tiny_model, token_dataset
from sae_lens import SAE, SAETrainer, TopKTrainingSAEConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training._interruption import InterruptedException
from safetensors.torch import load_file
from torch.nn.utils import parameters_to_vector

from sae_nfm.architectures.joint_config import (
    JointNFMTrainingSAEConfig,
    StagedTopKTrainingSAEConfig,
    parameter_count,
)
from sae_nfm.architectures.nfm_config import random_initialisation
from sae_nfm.comparison.arms import (
    ArmSizes,
    flop_matched_width,
    folded_parameter_count,
    inference_flops,
    interpolation_weights,
    matched_width,
    training_arms,
    training_flops,
)
from sae_nfm.comparison.config import ALL_ARMS, DEFAULT_ARMS
from sae_nfm.training.multi_arm import StreamConfig, multiply_decoder_steps, train_arms
from sae_nfm.training.results import Trained, read_training_record

DOUBLED = "topk doubled decoder rate"
SIZES = ArmSizes(d_in=D_MODEL, d_sae=48, k=4, nfm_dim=6)
COEFFICIENTS = {"standard": (0.1, 1.0), "gated": (0.1, 1.0), "jumprelu": (0.1, 1.0)}
STREAM = StreamConfig(
    model_name="tiny",
    hook_name=HOOK,
    dataset="tokens",
    training_tokens=640,
    context_size=CONTEXT,
    batch_size=64,
    seed=3,
)


def counted(cfg):
    sae = get_sae_training_class(cfg.architecture())[0](cfg)
    return sum(parameter.numel() for parameter in sae.parameters())


def arms(*names, sizes=SIZES):
    return training_arms(names, sizes, COEFFICIENTS)


def train(names, folder, stream=STREAM, rate=1e-2, rates=None, sizes=SIZES):
    chosen = arms(*names, sizes=sizes)
    train_arms(
        stream, chosen, rates or dict.fromkeys(chosen, rate), tiny_model(), token_dataset(200), folder
    )  # fmt: skip


def weights(folder):
    return load_file(folder / "sae_weights.safetensors")


def assert_same_bits(one, other):
    assert weights(one).keys() == weights(other).keys()
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name


def test_matched_widths_at_the_papers_scale():
    joint = JointNFMTrainingSAEConfig(d_in=3200, d_sae=50_000, k=1024, nfm_dim=300)
    # by hand: 3 x 160M + 50,000 + 2 x 3,200 + 15M + 300 x 301 + 300 x 3200 + 3200
    assert parameter_count(joint) == 496_109_900
    assert matched_width(parameter_count(joint), 3200) == round(496_106_700 / 6401) == 77_505
    assert (
        matched_width(folded_parameter_count(joint), 3200) == round((496_109_900 - 160_003_200 - 3200) / 6401) == 52_508
    )


def test_flops_by_hand():
    # d 4, S 10, k 2, m 3: encoder 2*4*10 + 2*2*4 = 96, direct path 6*2*4 = 48
    topk = TopKTrainingSAEConfig(d_in=4, d_sae=10, k=2)
    assert training_flops(topk) == 96 + 48
    joint = JointNFMTrainingSAEConfig(d_in=4, d_sae=10, k=2, nfm_dim=3)
    # pooling 12*2*3, head 6*9 + 6*3*4; reading all features, the linear path shares the products of W_dec
    assert training_flops(joint) == 144 + 72 + 54 + 72
    assert training_flops(replace(joint, nfm_top_k=1)) == 144 + 6 * 1 * 4 + 36 + 54 + 72
    assert training_flops(replace(joint, head="mlp")) == 144 + 36 + 54 + 72
    assert training_flops(replace(joint, head="bilinear")) == 144 + 72 + 72  # f A and f B, and W_2
    assert training_flops(replace(joint, head="none")) == 144
    assert training_flops(replace(joint, head="none", use_linear_path=False, use_square_path=True)) == 144 + 48
    assert training_flops(arms("standard")["standard 0.1"].sae, l0=5) == 2 * 16 * 48 + 8 * 5 * 16
    assert training_flops(arms("gated")["gated 1"].sae, l0=5) == 2 * 16 * 48 + 16 * 5 * 16


def test_flops_of_inference_by_hand():
    # d 4, S 10, k 2, m 3: encoder 80, direct path 2*2*4
    topk = TopKTrainingSAEConfig(d_in=4, d_sae=10, k=2)
    assert inference_flops(topk) == 80 + 16
    # three products of the decoder each, and the decode of the first error
    assert inference_flops(topk, refinement_steps=5) == 80 + 16 + 16 * (3 * 5 + 1)
    joint = JointNFMTrainingSAEConfig(d_in=4, d_sae=10, k=2, nfm_dim=3)
    # pooling 4*2*3, head 2*9 + 2*3*4
    assert inference_flops(joint) == 80 + 16 + 24 + 18 + 24
    paths = replace(joint, use_square_path=True, nfm_top_k=1)
    assert inference_flops(paths) == 80 + 16 + 8 + 16 + 12 + 18 + 24
    # stages of 1, 1, 2 features: all are ranked twice more, after 1 and after 2 are decoded
    staged = StagedTopKTrainingSAEConfig(d_in=4, d_sae=10, k=4, selection_stages=3)
    assert inference_flops(staged) == 80 + (80 + 8) + (80 + 16) + 32
    # 40 tokens keep their scores: 2*4*10*10 once for all; 2*1*10 for the one chosen before, a dot of 4 for the one chosen then
    assert inference_flops(staged, n_tokens=40) == 80 + 800 / 40 + (20 + 8 + 8) + (20 + 16 + 2 * 8) + 32
    assert training_flops(staged, n_tokens=40) == (80 + 32 + 96) + 800 / 40 + (20 + 24 + 8 + 8) + (20 + 48 + 2 * 8 + 16)
    assert inference_flops(staged, n_tokens=9) == inference_flops(staged)  # too few: ten rows
    # squares have rows too, and 3 hidden units a column each of them
    own = replace(joint, k=2, selection_stages=2, use_linear_path=False, use_square_path=True)
    once = (2 * 800 + 2 * 3 * 4 * 10) / 1000
    decoded = lambda active: 2 * active * 4 + 2 * active * 4 + 4 * active * 3 + 18 + 24  # noqa: E731
    assert inference_flops(own, n_tokens=1000) == 80 + once + (2 * 20 + 2 * 3 * 10 + 8 + decoded(1)) + decoded(2)
    # the second and the third stage rank 6 features
    assert inference_flops(replace(staged, selection_candidates=6)) == 80 + (48 + 8) + (48 + 16) + 32
    assert training_flops(staged) == (80 + 32 + 96) + (80 + 24 + 8) + (80 + 48 + 16)
    once = replace(staged, selection_stages=1)
    assert training_flops(replace(once, refinement_steps=2)) == (training_flops(once) + 3 * 7 * 32)
    assert inference_flops(replace(joint, k=2, selection_stages=2)) == 80 + (80 + 8 + 12 + 18 + 24) + 16 + 24 + 18 + 24
    pursuit = arms("matching_pursuit")["matching_pursuit"].sae  # d 16, S 48, four times
    assert inference_flops(pursuit, l0=3.5) == 4 * (2 * 16 * 48 + 4 * 16) + 2 * 3.5 * 16
    assert training_flops(pursuit, l0=3.5) == 4 * (2 * 16 * 48 + 12 * 16) + 6 * 3.5 * 16
    assert inference_flops(arms("gated")["gated 1"].sae, l0=5) == 2 * 16 * 48 + 2 * 5 * 16


def test_flops_of_unknown_l0_are_refused():
    with pytest.raises(ValueError, match=r"\bL0\b.*\bjumprelu\b"):
        training_flops(arms("jumprelu")["jumprelu 1"].sae)


@pytest.mark.parametrize("d_in", [16, 24])
@pytest.mark.parametrize("nfm_dim", [3, 16])
def test_matching_holds_for_counted_parameters_and_flops(d_in, nfm_dim):
    sizes = replace(SIZES, d_in=d_in, nfm_dim=nfm_dim, refinement_steps=5)
    made = {name: arm.sae for name, arm in arms(*ALL_ARMS, sizes=sizes).items()}
    joint, feature = made["joint_nfm"], 2 * d_in + 1
    assert abs(counted(made["topk matched"]) - counted(joint)) <= feature / 2
    # the square path has no bias, the linear one has: d_in numbers fewer than joint_nfm
    assert abs(counted(made["topk matched"]) - counted(made["joint_nfm square"])) <= feature / 2 + d_in
    folded = random_initialisation(joint, 0)
    folded.fold_linear_path()
    kept = parameters_to_vector(p for name, p in folded.named_parameters() if name not in ("W_lin", "b_lin"))
    assert abs(counted(made["topk matched folded"]) - len(kept)) <= feature / 2
    assert abs(training_flops(made["topk matched flops"]) - training_flops(joint)) <= d_in
    staged = made["staged_topk"]
    flops = inference_flops(staged, refinement_steps=5, n_tokens=2048)
    assert abs(inference_flops(made["topk matched inference"]) - flops) <= d_in
    assert made["topk matched inference"].d_sae > 2 * 48
    assert made["topk matched flops"].d_sae == flop_matched_width(joint) > joint.d_sae
    assert counted(made["joint_nfm mlp"]) == counted(joint)
    assert abs(counted(made["joint_nfm square"]) - counted(joint)) == d_in
    assert counted(made["joint_nfm bilinear"]) > counted(joint) > counted(made["joint_nfm without nonlinear"])
    for form in ("", " staged"):
        assert abs(counted(made[f"joint_nfm bilinear{form} matched"]) - counted(joint)) <= 48 + d_in / 2
        assert abs(counted(made[f"joint_nfm without nonlinear{form} matched"]) - counted(joint)) <= (3 * d_in + 1) / 2
    assert counted(made["matching_pursuit"]) == d_in * 48 + d_in
    assert abs(counted(made["matching_pursuit matched"]) - counted(made["topk"])) <= d_in / 2
    assert made["staged_topk matched"].d_sae == made["topk matched"].d_sae
    for name in ("topk", DOUBLED, "batchtopk", "matryoshka", "staged_topk"):
        assert counted(made[name]) == 2 * d_in * 48 + 48 + d_in


def test_folding_needs_a_foldable_path():
    with pytest.raises(ValueError, match=r"\blinear path\b.*\bW_dec\b"):
        folded_parameter_count(arms("joint_nfm half")["joint_nfm half"].sae)


def test_joint_arms_differ_from_joint_nfm_in_what_their_name_says():
    made = {name: arm.sae.to_dict() | {"metadata": None} for name, arm in arms(*ALL_ARMS).items()}
    joint = made["joint_nfm"]
    assert (joint["nfm_top_k"], joint["head"], joint["use_linear_path"]) == (None, "fm", True)
    for name, changed in {
        "joint_nfm half": {"nfm_top_k": 2},
        "joint_nfm square": {"use_linear_path": False, "use_square_path": True, "square_scale": 2.0},
        "joint_nfm without linear": {"use_linear_path": False},
        "joint_nfm without nonlinear": {"head": "none"},
        "joint_nfm mlp": {"head": "mlp"},
        "joint_nfm staged": {"selection_stages": 4},
        "joint_nfm square staged": {"use_linear_path": False, "use_square_path": True, "square_scale": 2.0}
        | {"selection_stages": 4},
        "joint_nfm without nonlinear staged": {"head": "none", "selection_stages": 4},
        "joint_nfm without nonlinear matched": {
            "head": "none",
            "d_sae": made["joint_nfm without nonlinear matched"]["d_sae"],
        },
        "joint_nfm without nonlinear staged matched": made["joint_nfm without nonlinear matched"]
        | {"selection_stages": 4},
        "joint_nfm mlp staged": {"head": "mlp", "selection_stages": 4},
        "joint_nfm bilinear": {"head": "bilinear"},
        "joint_nfm bilinear staged": {"head": "bilinear", "selection_stages": 4},
        "joint_nfm bilinear matched": {"head": "bilinear", "nfm_dim": made["joint_nfm bilinear matched"]["nfm_dim"]},
        "joint_nfm bilinear staged matched": made["joint_nfm bilinear matched"] | {"selection_stages": 4},
    }.items():
        assert made[name] == joint | changed
    assert made["staged_topk"] == made["topk"] | {
        "architecture": "staged_topk",
        "kernel": "auto",
        "selection_stages": 4,
        "selection_candidates": None,
        "refinement_steps": 0,
        "inference_selection_stages": None,
        "inference_refinement_steps": None,
    }
    assert set(DEFAULT_ARMS) <= set(ALL_ARMS)
    assert {arm.decoder_rate for arm in arms(*ALL_ARMS).values() if arm.name != DOUBLED} == {1.0}


def test_arms_with_a_coefficient_are_one_sae_for_each():
    made = arms("topk", "jumprelu")
    assert [(arm.name, arm.family, arm.coefficient) for arm in made.values()] == [
        ("topk", "topk", None),
        ("jumprelu 0.1", "jumprelu", 0.1),
        ("jumprelu 1", "jumprelu", 1.0),
    ]
    assert made["jumprelu 0.1"].sae.l0_coefficient == 0.1
    assert arms("standard")["standard 1"].sae.l1_coefficient == 1
    assert arms("gated")["gated 1"].sae.l1_coefficient == 1


def test_unknown_arms_and_missing_coefficients():
    with pytest.raises(ValueError, match=r"'topq', 'relu'.*'joint_nfm', 'joint_nfm half', "):
        arms("topk", "topq", "relu")
    with pytest.raises(ValueError, match=r"\bgated\b.*\bcoefficients\b"):
        training_arms(["gated"], SIZES, {})


def test_interpolation_in_log_l0_by_hand():
    # log 20 lies half way between log 10 and log 40
    assert interpolation_weights([40.0, 10.0, 90.0], 20.0) == pytest.approx([0.5, 0.5, 0.0])
    assert interpolation_weights([10.0, 40.0], 10.0) == pytest.approx([1.0, 0.0])
    assert interpolation_weights([10.0, 40.0], 40.0) == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize(
    ("l0s", "target"), [([10.0, 40.0], 41.0), ([10.0, 40.0], 9.0), ([32.0], 33.0), ([0.0, 5.0], 1.0)]
)
def test_interpolation_never_extrapolates(l0s, target):
    assert interpolation_weights(l0s, target) is None


def test_an_arm_is_the_same_to_the_last_bit_whatever_is_trained_beside_it(tmp_path):
    # dropout draws, the wider SAE changes what initialisation draws: neither may reach the others
    sizes = replace(SIZES, nfm_dropout=0.5)
    everything = ["joint_nfm", "topk", "topk matched", "matryoshka", "jumprelu"]
    train(everything, tmp_path / "together", sizes=sizes)
    train(["topk"], tmp_path / "alone", sizes=sizes)
    train(["joint_nfm"], tmp_path / "alone", sizes=sizes)
    train(["topk matched", "jumprelu"], tmp_path / "alone", sizes=sizes)
    for name in ("topk", "joint_nfm", "topk matched", "jumprelu 1"):
        assert_same_bits(tmp_path / "together" / name, tmp_path / "alone" / name)
    train(["topk"], tmp_path / "other seed", stream=replace(STREAM, seed=4))
    assert not torch.equal(*(weights(tmp_path / run / "topk")["W_enc"] for run in ("alone", "other seed")))


def test_every_arm_sees_the_same_batches(tmp_path, monkeypatch):
    seen, step = defaultdict(hashlib.sha256), SAETrainer.step

    def hashed(self, batch):
        seen[type(self.sae).__name__, self.sae.cfg.d_sae].update(batch.numpy().tobytes())
        return step(self, batch)

    monkeypatch.setattr(SAETrainer, "step", hashed)
    names = ["joint_nfm", "topk", "topk matched", "batchtopk"]
    train(names[:2], tmp_path / "run", sizes=replace(SIZES, nfm_dropout=0.5))
    train(names, tmp_path / "run", sizes=replace(SIZES, nfm_dropout=0.5))
    assert len(seen) == 4
    assert len({digest.hexdigest() for digest in seen.values()}) == 1


def test_learning_rates_are_each_arms_own(tmp_path):
    rates = {"topk": 1e-2, "topk matched": 3e-3}
    train(list(rates), tmp_path, rates=rates)
    for name, rate in rates.items():
        used = [
            line["details/current_learning_rate"] for line in read_training_record(tmp_path / name / "training.jsonl")
        ]
        assert max(used) == rate
        assert Trained.load(tmp_path / name).settings["learning_rate"] == rate
    train(["topk"], tmp_path / "other", rate=3e-3)
    assert not torch.equal(weights(tmp_path / "topk")["W_dec"], weights(tmp_path / "other" / "topk")["W_dec"])


def test_the_doubled_decoder_moves_as_at_twice_the_rate(tmp_path):
    def one_step(rate, factor):
        sae = random_initialisation(arms("topk")["topk"].sae, seed=0)
        trainer = SAETrainer.__new__(SAETrainer)
        trainer.sae, trainer.optimizer = sae, torch.optim.Adam(sae.parameters(), lr=rate)
        multiply_decoder_steps(trainer, factor)
        for _ in range(3):  # a gradient that does not depend on the weights
            for index, parameter in enumerate(sae.parameters()):
                parameter.grad = torch.full_like(parameter, 1.0 + index)
            trainer.optimizer.step()
        return sae

    doubled, plain, fast = one_step(1e-3, 2.0), one_step(1e-3, 1.0), one_step(2e-3, 1.0)
    torch.testing.assert_close(doubled.W_dec, fast.W_dec)
    assert torch.equal(doubled.W_enc, plain.W_enc)
    assert torch.equal(doubled.b_dec, plain.b_dec)


def test_finished_arms_are_left_alone_and_a_folder_says_what_it_is(tmp_path):
    train(["topk"], tmp_path / "run")
    before = (tmp_path / "run" / "topk" / "sae_weights.safetensors").stat()
    train(["topk", "standard"], tmp_path / "run")
    assert (tmp_path / "run" / "topk" / "sae_weights.safetensors").stat() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "nothing unfinished is left"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["standard 0.1", "standard 1", "topk"]
    trained = Trained.load(tmp_path / "run" / "topk")
    assert trained.parameters == counted(arms("topk")["topk"].sae)
    assert trained.tokens_per_second > 0
    assert {line["sae"] for line in read_training_record(tmp_path / "run" / "topk" / "training.jsonl")} == {"topk"}
    assert SAE.load_from_disk(tmp_path / "run" / "topk").cfg.metadata.hook_name == HOOK


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 1e-3}, r"learning_rate of 'topk' is 0\.001\b.*\b0\.01\b"),
        ({"sizes": replace(SIZES, d_sae=40)}, r"d_sae of 'topk' is 40\b.*\b48\b"),
        ({"stream": replace(STREAM, training_tokens=1280)}, r"training_tokens of 'topk' is 1280\b.*\b640\b"),
    ],
)
def test_an_arm_trained_otherwise_is_an_error(changes, message, tmp_path):
    train(["topk"], tmp_path)
    with pytest.raises(ValueError, match=message):
        train(["topk"], tmp_path, **changes)


def test_interrupted_and_resumed_to_the_same_bits_with_an_arm_added(tmp_path, monkeypatch):
    sizes, begun = replace(SIZES, nfm_dropout=0.5), ["joint_nfm", DOUBLED]
    train([*begun, "topk"], tmp_path / "whole", sizes=sizes)
    step, calls = SAETrainer.step, []

    def step_then_signal(self, batch):
        calls.append(self)
        if len(calls) == 9:  # in the fifth of ten steps, of the first of two arms
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(InterruptedException):
        patch.setattr(SAETrainer, "step", step_then_signal)
        train(begun, tmp_path / "run", sizes=sizes)
    assert not (tmp_path / "run").exists()
    counted_steps = defaultdict(int)

    def counting(self, batch):
        counted_steps[type(self.sae).__name__] += 1
        return step(self, batch)

    monkeypatch.setattr(SAETrainer, "step", counting)
    train([*begun, "topk"], tmp_path / "run", sizes=sizes)
    assert counted_steps == {"JointNFMTrainingSAE": 5, "TopKTrainingSAE": 5 + 10}, "five steps were behind"
    for name in [*begun, "topk"]:
        assert_same_bits(tmp_path / "whole" / name, tmp_path / "run" / name)
        record = read_training_record(tmp_path / "run" / name / "training.jsonl")
        assert [line["tokens"] for line in record] == sorted({line["tokens"] for line in record})
    assert not list(tmp_path.rglob("*.partial"))
