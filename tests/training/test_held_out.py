"""Held-out evaluation while training: SAELens's figures, on the same text each time, and nothing changes for the training."""

import copy

import pytest
import torch
from builders import ARCHITECTURES, D_MODEL, D_SAE, runner_config, tiny_model, token_dataset, training_config
from sae_lens import (
    SAE,
    ActivationsStore,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.util import temporary_seed

from sae_nfm import HeldOut, read_training_record, record_training

HELD_OUT = token_dataset(12, seed=9)
KL = "held_out/model_behavior_preservation/kl_div_with_sae"
for_every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def train(cfg, path, held_out):
    with temporary_seed(0):
        runner = LanguageModelSAETrainingRunner(
            copy.deepcopy(cfg), override_dataset=token_dataset(80), override_model=tiny_model()
        )
        with record_training(runner, path, every=4, held_out=held_out):
            return runner.run(), read_training_record(path.with_name(path.name + ".partial"))


@pytest.mark.parametrize(("architecture", "prefetch"), [("joint_nfm", 2), ("sequential_nfm", False)])
def test_weights_are_the_same_bits_with_and_without(tmp_path, architecture, prefetch):
    sae_cfg = training_config(architecture, nfm_dropout=0.2, normalize_activations="expected_average_only_in")
    cfg = runner_config(sae_cfg, tmp_path / "out", steps=10, prefetch_llm_batches=prefetch)
    with_it, lines = train(cfg, tmp_path / "with.jsonl", HeldOut(dataset=HELD_OUT, every=3, n_batches=1))
    without, _ = train(cfg, tmp_path / "without.jsonl", None)
    assert [line["step"] for line in lines if KL in line] == [0, 3, 6, 9]
    assert [line["step"] for line in lines] == [0, 3, 4, 6, 8, 9]
    for (name, one), other in zip(with_it.named_parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other), name


@for_every_architecture
@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_post", "blocks.0.attn.hook_z"])
def test_figures_are_those_of_saelens_on_the_final_sae(tmp_path, architecture, hook_name):
    sae_cfg = training_config(architecture, hook_name=hook_name, normalize_activations="expected_average_only_in")
    cfg = runner_config(sae_cfg, tmp_path / "out", steps=5, exclude_special_tokens=True)
    _, lines = train(cfg, tmp_path / "record.jsonl", HeldOut(dataset=HELD_OUT, every=100, n_batches=1))
    sae, model = SAE.load_from_disk(tmp_path / "out"), tiny_model()
    store = ActivationsStore.from_sae(model, sae, dataset=HELD_OUT, context_size=16, store_batch_size_prompts=16)
    figures = EvalConfig(
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    expected, _ = run_evals(sae, store, model, ActivationScaler(), figures)
    found = {key.removeprefix("held_out/"): value for key, value in lines[-1].items() if key.startswith("held_out/")}
    flat = {f"{group}/{key}": value for group, values in expected.items() for key, value in values.items()}
    assert flat.keys() == found.keys()
    # 12 held-out rows in batches of 16: the second evaluation of a row is the first again. The SAE was folded in between,
    # and l1 is a sum of activations, whose unit the fold changes.
    for name in flat.keys() - {"sparsity/l1"}:
        assert found[name] == pytest.approx(flat[name], rel=2e-4), name


@pytest.mark.parametrize(
    "normalize_activations", ["none", "expected_average_only_in", "covariance_whitening", "layer_norm"]
)
def test_the_squared_error_of_a_record_is_in_the_model_s_units(normalize_activations, tmp_path):
    """That of the folded SAE on the same activations, as `run_evals` has it; the loss is in the trainer's units."""
    sae_cfg = training_config("joint_nfm", normalize_activations=normalize_activations)
    cfg = runner_config(sae_cfg, tmp_path / "out", steps=3, lr=0.0, lr_end=0.0, activations_mixing_fraction=0.0)
    with temporary_seed(0):
        runner = LanguageModelSAETrainingRunner(cfg, override_dataset=token_dataset(80), override_model=tiny_model())
        served, step = [], ActivationScaler.scale
        with pytest.MonkeyPatch.context() as patch, record_training(runner, tmp_path / "record.jsonl", every=1):
            patch.setattr(ActivationScaler, "scale", lambda self, acts: step(self, served.append(acts) or acts))
            runner.run()
    lines, sae = read_training_record(tmp_path / "record.jsonl"), SAE.load_from_disk(tmp_path / "out")
    errors = [float((sae(acts) - acts).square().sum(dim=-1).mean()) for acts in served]
    # the SAE did not change; its fold, in float32, rounds
    assert [line["metrics/mse"] for line in lines] == pytest.approx(errors, rel=1e-3)
    same = normalize_activations in ("none", "layer_norm")
    assert (lines[0]["metrics/mse"] == pytest.approx(lines[0]["losses/mse_loss"], rel=1e-5)) == same
    assert {line["details/dead_feature_window"] for line in lines} == {1_000}


def test_evaluated_on_the_same_rows_each_time(tmp_path):
    cfg = runner_config(training_config("joint_nfm"), tmp_path / "out", steps=4, lr=0.0, lr_end=0.0)
    _, lines = train(cfg, tmp_path / "record.jsonl", HeldOut(dataset=HELD_OUT, every=1, n_batches=1))
    held_out = [{key: value for key, value in line.items() if key.startswith("held_out/")} for line in lines]
    assert len(held_out) == 4
    assert all(figures == held_out[0] for figures in held_out)  # nothing was learnt


def test_several_saes_have_figures_of_their_own(tmp_path):
    hook_names = {"joint": "blocks.0.hook_resid_post", "topk": "blocks.1.hook_resid_post"}
    cfg = MultiSAETrainingRunnerConfig(
        saes={"joint": training_config("joint_nfm"), "topk": TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=4)},
        hook_names=hook_names,
        context_size=16,
        training_tokens=4 * 64,
        train_batch_size_tokens=64,
        store_batch_size_prompts=8,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
    )
    runner = MultiSAETrainingRunner(cfg, override_dataset=token_dataset(80), override_model=tiny_model())
    with record_training(runner, tmp_path / "r.jsonl", held_out=HeldOut(dataset=HELD_OUT, every=50, n_batches=1)):
        runner.run()
    kl = {(line["sae"], line["step"]): line[KL] for line in read_training_record(tmp_path / "r.jsonl")}
    assert kl.keys() == {(name, step) for name in hook_names for step in (0, 3)}
    assert len(set(kl.values())) == 4


@pytest.mark.parametrize("field", ["every", "n_batches"])
def test_bad_settings(field):
    with pytest.raises(ValueError, match=rf"\b{field} must be > 0, got 0\b"):
        HeldOut(**({"dataset": HELD_OUT} | {field: 0}))
