"""What is not finite ends a run: nothing of it is published, no checkpoint has it, and what to do about it is said."""

import copy
import itertools
from math import inf

import pytest
import torch
from builders import HOOK, runner_config, saved_base, tiny_model, token_dataset, training_config
from sae_lens import (
    LanguageModelSAETrainingRunner,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.training._interruption import InterruptedException
from sae_lens.util import temporary_seed
from safetensors.torch import load_file
from small_training import SIZES
from tokenizers.pre_tokenizers import WhitespaceSplit

from sae_nfm.comparison import run as comparison
from sae_nfm.comparison.run import choices, rounds_of, sweep
from sae_nfm.convert import save_adapter, warm_started
from sae_nfm.training import DivergedError, NotFiniteError, StreamConfig, TrainingArm, multi_arm, train_arms
from sae_nfm.training.resume import exact_resume
from sae_nfm_cli import main

ROWS = token_dataset(60)
NAN = float("nan")


def train(cfg, dataset=ROWS, model=None):
    with temporary_seed(0):
        runner = LanguageModelSAETrainingRunner(
            copy.deepcopy(cfg), override_dataset=dataset, override_model=model or tiny_model()
        )
        return runner.run()


def broken_model(token: int, value: float = NAN):
    """A model that makes something not finite of one token."""
    model = tiny_model()
    with torch.no_grad():
        model.W_E[token, 3] = value
    return model


@pytest.mark.parametrize("architecture", ["joint_nfm", "sequential_nfm"])
@pytest.mark.parametrize("prefetch", [False, 2])
def test_a_rate_that_is_too_high_stops_the_run(architecture, prefetch, tmp_path):
    cfg = runner_config(
        training_config(architecture),
        tmp_path / "out",
        steps=8,
        lr=1e30,
        n_checkpoints=7,
        checkpoint_path=str(tmp_path / "checkpoints"),
        prefetch_llm_batches=prefetch,
    )
    with pytest.raises(
        DivergedError, match=r"diverged in step [1-3] .*(loss|gradient) is (nan|inf).*lr 1e\+30.*checkpoint"
    ):
        train(cfg)
    assert not (tmp_path / "out").exists()
    for file in tmp_path.glob("checkpoints/**/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


@pytest.mark.parametrize("what", ["loss", "gradient", "overflow"])
def test_the_first_step_that_is_not_finite_changes_no_weight(what, tmp_path, monkeypatch):
    cfg = runner_config(training_config("joint_nfm"), tmp_path / "out", steps=6)
    sae_class = type(LanguageModelSAETrainingRunner(copy.deepcopy(cfg), ROWS, tiny_model()).sae)
    forward, done, seen = sae_class.training_forward_pass, itertools.count(), {}

    def forward_then_break(self, step_input):
        output = forward(self, step_input)
        if next(done) == 3:
            seen.update({name: value.detach().clone() for name, value in self.named_parameters()}, sae=self)
            if what == "loss":
                output.loss = output.loss * torch.inf
            elif what == "gradient":
                output.loss.register_hook(lambda gradient: gradient * torch.inf)
            else:  # finite gradients whose squares are not
                output.loss = output.loss * 1e25
        return output

    monkeypatch.setattr(sae_class, "training_forward_pass", forward_then_break)
    with pytest.raises(DivergedError, match=r"in step 3 \(counted from 0\), after 192 tokens"):
        train(cfg)
    sae = seen.pop("sae")
    assert what == "overflow" or all(torch.equal(value, sae.get_parameter(name)) for name, value in seen.items())
    assert all(value.isfinite().all() for value in sae.parameters())


def test_weights_that_the_last_step_broke_are_not_published(tmp_path):
    """Finite, and of a size with which the output overflows."""
    cfg = runner_config(training_config("joint_nfm"), tmp_path / "out", steps=1, lr=1e30)
    with pytest.raises(DivergedError, match="reconstruction of the last batch is not finite"):
        train(cfg)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "position"),
    [({}, 5), ({"seqpos_slice": (2, None), "exclude_special_tokens": [0, 7]}, 5), ({"prefetch_llm_batches": 2}, 15)],
    ids=["plain", "some left out", "prefetched"],
)
def test_an_activation_that_is_not_finite_is_found_in_the_data(settings, position, tmp_path):
    tokens = torch.tensor(token_dataset(60)[:]["tokens"])
    tokens[tokens == 9] = 8
    tokens[:, 3] = 7
    tokens[37, position] = 9
    rows = ROWS.from_dict({"tokens": tokens.tolist()})
    cfg = runner_config(training_config("joint_nfm"), tmp_path / "out", steps=14, **settings)
    told = rf"at '{HOOK}' is nan, in a sequence of 16 tokens from row 37 of the data set \(counted from 0\)"
    with pytest.raises(NotFiniteError, match=told):
        train(cfg, rows, broken_model(9))
    order = list(range(59, -1, -1))
    shuffled = rows.select(order)
    with pytest.raises(NotFiniteError, match=r"from row 22 of .*row 37 before it was shuffled"):
        train(cfg, shuffled, broken_model(9))


def test_a_text_that_is_not_finite_is_found(tmp_path):
    words = [" ".join(f"t{1 + (i * j) % 8}" for j in range(9)) for i in range(40)]
    words[21] = "t1 t2 t9 t3"
    model = broken_model(9, float("inf"))
    model.tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    cfg = runner_config(training_config("joint_nfm"), tmp_path / "out", steps=9)
    with pytest.raises(NotFiniteError, match=r"from rows 2[01] to 2[123] of the data set"):
        train(cfg, ROWS.from_dict({"text": words}), model)


@pytest.mark.parametrize("normalize_activations", ["none", "expected_average_only_in"])
def test_activations_that_are_all_zero_are_refused(normalize_activations, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        for parameter in (model.W_E, model.W_pos, *model.blocks[0].parameters()):
            parameter.zero_()
    cfg = runner_config(
        training_config("joint_nfm", normalize_activations=normalize_activations), tmp_path / "out", steps=4
    )
    with pytest.raises(ValueError, match=rf"all activations at '{HOOK}' are zero"):
        train(cfg, model=model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": float("inf")}, "lr must be a finite number, got inf"),
        ({"lr": NAN}, "lr must be a finite number, got nan"),
        ({"lr": -1e-3, "lr_end": 0.0}, r"lr must be >= 0, got -0\.001"),
        ({"activations_mixing_fraction": 2.0}, r"activations_mixing_fraction must be in \[0, 1\], got 2\.0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"feature_sampling_window": 0}, "feature_sampling_window must be > 0, got 0"),
        ({"lr_warm_up_steps": 5}, r"lr_warm_up_steps is 5 and lr_decay_steps 0, but the run has 4 steps"),
        (
            {"lr_warm_up_steps": 3, "lr_decay_steps": 2},
            r"lr_warm_up_steps is 3 and lr_decay_steps 2, but the run has 4 steps",
        ),
        ({"lr_decay_steps": -1}, "lr_decay_steps must be >= 0, got -1"),
    ],
)
def test_settings_that_cannot_work(settings, message, tmp_path):
    cfg = runner_config(training_config("joint_nfm"), tmp_path / "out", steps=4, **settings)
    with pytest.raises(ValueError, match=message):
        train(cfg)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "dtype is float16.*float32, or bfloat16"),
        ({"decoder_init_norm": 0.0}, r"decoder_init_norm must be > 0, got 0\.0"),
        ({"decoder_init_norm": NAN}, "decoder_init_norm must be a finite number, got nan"),
        ({"aux_loss_coefficient": -1.0}, r"aux_loss_coefficient must be >= 0, got -1\.0"),
    ],
)
def test_saes_that_cannot_work(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(runner_config(training_config("joint_nfm", **settings), tmp_path / "out", steps=4))


def test_nothing_begins_with_or_is_saved_with_weights_that_are_not_finite(tmp_path):
    sae = warm_started(saved_base(d_in=16, d_sae=32, k=4))
    with torch.no_grad():
        sae.V[3, 2] = NAN
    cfg = runner_config(sae.cfg, tmp_path / "out", steps=4, hook_name=HOOK)
    with pytest.raises(ValueError, match=r"the SAE to begin with has values that are not finite .* in 'V'"):
        exact_resume(LanguageModelSAETrainingRunner(cfg, ROWS, tiny_model(), sae))
    sequential = LanguageModelSAETrainingRunner(
        runner_config(training_config("sequential_nfm"), tmp_path / "out", steps=4), ROWS, tiny_model()
    ).sae
    with torch.no_grad():
        sequential.W_2[0, 0] = torch.inf
    saves = (sae.save_model, sae.save_inference_model, sequential.save_inference_model)
    for save in (*saves, lambda path: save_adapter(sequential, path)):
        with pytest.raises(ValueError, match=r"the SAE to save has values that are not finite .* in '(V|W_2)'"):
            save(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))
    broken = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4))
    with torch.no_grad():
        broken.W_dec[0, 0] = NAN
    with pytest.raises(ValueError, match=r"the SAE to start from has values that are not finite .* in 'W_dec'"):
        warm_started(broken)


def arm(name, **changes):
    settings = {"d_in": 16, "d_sae": 32, "k": 4, "normalize_activations": "expected_average_only_in"}
    return TrainingArm(name=name, family=name, sae=TopKTrainingSAEConfig(**(settings | changes)))


STREAM = StreamConfig(
    model_name="tiny", hook_name=HOOK, dataset="rows", training_tokens=640, context_size=16, batch_size=64, seed=0
)


def test_where_one_of_several_diverges_the_others_are_finished(tmp_path):
    arms = {name: arm(name) for name in ("a", "b", "c")}
    rates = {"a": 1e30, "b": 1e-2, "c": 1e-2}
    alone = {"b": arms["b"]}
    train_arms(STREAM, alone, rates, tiny_model(), ROWS, tmp_path / "alone")
    with pytest.raises(
        DivergedError, match=r"training of 'a' diverged in step 1 .*lr 1e\+30.*; the others are finished"
    ):
        train_arms(STREAM, arms, rates, tiny_model(), ROWS, tmp_path / "together")
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == ["b", "c"]
    assert not (tmp_path / "together.partial").exists()
    one, other = (load_file(tmp_path / name / "b" / "sae_weights.safetensors") for name in ("alone", "together"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for some in (arms, {"a": arms["a"]}):
        with pytest.raises(DivergedError) as found:
            train_arms(STREAM, some, rates, tiny_model(), ROWS, tmp_path / "together")
        assert list(found.value.saes) == ["a"]


def test_a_rate_that_diverges_is_a_result_of_the_sweep(tmp_path):
    """Its FVU is infinite, the others' are not touched, and the sweep goes on where it was when it is called again."""
    arms, held_out = {name: arm(name) for name in ("a", "b")}, torch.tensor(token_dataset(8, seed=5)[:]["tokens"])

    def swept(rates):
        on = {"stream": STREAM, "model": tiny_model(), "dataset": ROWS}
        return sweep([*rounds_of(arms, rates, (True,))], 4, held_out, tmp_path, on)

    rows = swept((1e-2, 1e30))
    assert [(row.arm, row.learning_rate, row.fvu == inf, row.l0 == 0) for row in rows] == [
        ("a", 1e-2, False, False),
        ("b", 1e-2, False, False),
        ("a", 1e30, True, True),
        ("b", 1e30, True, True),
    ]
    assert choices(rows, (1e-2, 1e30)) == {"a": (1e-2, True), "b": (1e-2, True)}
    assert swept((1e-2, 1e30, 1e20))[:4] == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.json", "sweep.json.sha256"]


def test_an_sae_that_breaks_the_model_is_one_that_diverged(tmp_path, monkeypatch):
    """Finite, and the logits are not: the other SAEs of the sweep are measured."""
    arms, held_out = {name: arm(name) for name in ("a", "b")}, torch.tensor(token_dataset(8, seed=5)[:]["tokens"])
    evaluate = comparison.evaluate

    def raises(model, tokens, saes):
        if any(one.name == "a" for one in saes):
            raise ValueError("under 'a' the model's logits are not finite; leave the arm out, or correct it")
        return evaluate(model, tokens, saes)

    monkeypatch.setattr(comparison, "evaluate", raises)
    on = {"stream": STREAM, "model": tiny_model(), "dataset": ROWS}
    rows = sweep([*rounds_of(arms, (1e-2,), (True,))], 4, held_out, tmp_path, on)
    assert [(row.arm, row.fvu == inf) for row in rows] == [("a", True), ("b", False)]


def test_an_arm_that_diverged_stands_still_after_an_interruption(tmp_path, monkeypatch):
    arms, rates = {name: arm(name) for name in ("a", "b")}, {"a": 1e30, "b": 1e-2}

    def interrupted(*args, **kwargs):
        raise InterruptedException

    monkeypatch.setattr(multi_arm, "read_training_record", interrupted)
    with pytest.raises(InterruptedException):
        train_arms(STREAM, arms, rates, tiny_model(), ROWS, tmp_path / "saes")
    monkeypatch.undo()
    (begun,) = (tmp_path / "saes.partial").iterdir()
    assert "diverged in step" in (begun / "diverged.json").read_text()
    with pytest.raises(
        ValueError, match=r"learning_rate of 'b' is 0\.5, and was 0\.01 when its training in .* was begun"
    ):
        multi_arm._claim_round(begun, {"b": multi_arm._settings(STREAM, arms["b"], 0.5)})


@pytest.mark.parametrize("architecture", ["joint_nfm", "topk"])
def test_the_command_says_what_to_lower_and_leaves_nothing(architecture, shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    where = [
        "--model_name",
        str(shared / "model"),
        "--hook_name",
        HOOK,
        "--dataset_path",
        str(shared / "tokens.parquet"),
    ]
    argv = ["train", "--architecture", architecture, *SIZES, "--k", "4", *where, "--lr", "1e30"]
    assert main(argv) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "diverged in step 1" in told
    assert "lr 1e+30" in told
    assert not list(tmp_path.iterdir())


def test_several_processes_are_refused(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    commands = (["train"], ["demo"], ["compare"], ["secondary"], ["reproduce"])
    for argv in commands:
        assert main(argv) == 2
        assert "WORLD_SIZE is 2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="WORLD_SIZE is 2"):
        train(runner_config(training_config("joint_nfm"), tmp_path / "out", steps=2))
    with pytest.raises(ValueError, match="WORLD_SIZE is 2"):
        train_arms(STREAM, {"a": arm("a")}, {"a": 1e-2}, tiny_model(), ROWS, tmp_path / "saes")
    assert not list(tmp_path.iterdir())
