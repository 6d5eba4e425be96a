"""Transcoders in `sae-nfm train`, `cache`, `evaluate`, `attribute`: on pairs of the same tokens, resumed to the same bits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from builders import CONTEXT, D_MODEL, runner_config, tiny_model, token_dataset
from sae_lens import SAE, LanguageModelSAETrainingRunner, MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.util import temporary_seed
from safetensors.torch import load_file
from small_training import SIZES

from sae_nfm import read_training_record
from sae_nfm.architectures import (
    SKIP_TRANSCODER,
    TRANSCODER,
    JointNFMSkipTranscoderTrainingConfig,
    JointNFMTranscoderTrainingConfig,
)
from sae_nfm.attribution.run import AttributeConfig, attribute
from sae_nfm.data import open_dataset
from sae_nfm.evaluation.fidelity import Arm, evaluate
from sae_nfm.evaluation.saelens_evals import EvaluateConfig, evaluate_saved, store_as_in_training
from sae_nfm.evaluation.transcoders import affine_map, fvu
from sae_nfm.models import load_model
from sae_nfm.models.mlp_sites import pair_hooks
from sae_nfm.training.activation_stream import ActivationStream
from sae_nfm_cli import main

READ, WRITTEN = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
MORE = ["--k", "4", "--d_sae", "32", "--exclude_special_tokens", "true"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def flags(shared: Path, output: Path, *more: str, architecture: str = TRANSCODER) -> list[str]:
    where = ["--model", str(shared / "model"), "--output", str(output), "--checkpoint_path", "None"]
    return ["train", "--architecture", architecture, *SIZES, *MORE, *where, *more]


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory) -> Path:
    """A skip transcoder, evaluated on held-out text while it trains."""
    folder = tmp_path_factory.mktemp("transcoder") / "skip"
    text = str(shared / "text.jsonl")
    more = ["--hook-name", READ, "--dataset", text, "--held_out", text, "--evaluate_every", "4"]
    assert main(flags(shared, folder, *more, architecture=SKIP_TRANSCODER)) == 0
    return folder


@pytest.fixture(scope="module")
def cache(shared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "both"
    argv = [
        "cache",
        "--model",
        str(shared / "model"),
        "--hook",
        READ,
        WRITTEN,
        "--dataset",
        str(shared / "tokens.parquet"),
    ]
    assert main([*argv, "--context-size", "16", "--output", str(folder)]) == 0
    return folder


def test_a_transcoder_is_trained_and_says_what_it_reads_and_writes(trained):
    sae = SAE.load_from_disk(trained)
    metadata = sae.cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out, metadata.hook_head_index_out) == (READ, WRITTEN, None)
    assert (sae.cfg.d_in, sae.cfg.d_out, sae.cfg.architecture()) == (D_MODEL, D_MODEL, SKIP_TRANSCODER)
    assert sae.W_skip.any()
    lines = read_training_record(trained / "training.jsonl")
    first, last = lines[0], lines[-1]
    assert last["losses/mse_loss"] < first["losses/mse_loss"]
    assert last["metrics/fvu_all"] == pytest.approx(1 - last["metrics/explained_variance"], abs=1e-4)


def held_out_rows_of(sae, model, shared, rows: int, batches: int) -> torch.Tensor:
    """As SAELens's store cuts the text."""
    text = open_dataset(str(shared / "text.jsonl"), split="validation")
    store = store_as_in_training(sae, model, text, CONTEXT, batch_size_prompts=rows, device="cpu")
    return torch.cat([store.get_batch_tokens() for _ in range(batches)])


def test_held_out_lines_are_what_evaluate_says(trained, shared):
    """The last line's, of the SAE as it was saved; by SAELens's names."""
    line = read_training_record(trained / "training.jsonl")[-1]
    sae, model = SAE.load_from_disk(trained), load_model(shared / "model")
    runner_cfg = json.loads((trained / "runner_cfg.json").read_text())
    tokens = held_out_rows_of(sae, model, shared, runner_cfg["store_batch_size_prompts"], runner_cfg["n_eval_batches"])
    found = evaluate(model, tokens, [Arm(name="sae", sae=sae)], show_progress=False)["sae"]
    assert line["held_out/model_behavior_preservation/kl_div_with_sae"] == pytest.approx(found.kl_nats, rel=1e-3)
    assert line["held_out/model_performance_preservation/ce_loss_with_sae"] == pytest.approx(found.ce_nats, rel=1e-4)
    assert line["held_out/reconstruction_quality/explained_variance"] == pytest.approx(1 - found.fvu, abs=1e-3)
    assert line["held_out/sparsity/l0"] == pytest.approx(found.l0)


def test_rows_of_a_batch_are_what_one_mlp_reads_and_writes():
    """After mixing: the MLP run on the left half of a batch makes the right half."""
    runner = make_runner(runner_cfg_of(Path("x")))
    pair_hooks(runner)
    pair_hooks(runner)  # a second time changes nothing
    mlp = runner.model.blocks[1].mlp
    served = ActivationStream(runner.activations_store)
    for _ in range(6):  # beyond one buffer
        x, y = runner.sae.halves(next(served))
        torch.testing.assert_close(mlp(x[None])[0], y, rtol=1e-4, atol=1e-5)
    assert len(torch.unique(x, dim=0)) > 32


def runner_cfg_of(folder: Path, config=JointNFMTranscoderTrainingConfig, **settings):
    cfg = config(d_in=D_MODEL, d_out=D_MODEL, d_sae=32, k=4, nfm_dim=8, metadata=SAEMetadata(hook_name=READ))
    return runner_config(cfg, folder, steps=10, **settings)


def make_runner(cfg):
    with temporary_seed(0):
        return LanguageModelSAETrainingRunner(cfg, override_dataset=token_dataset(64), override_model=tiny_model())


def run(cfg):
    runner = make_runner(cfg)
    with temporary_seed(1):
        runner.run()


@pytest.mark.parametrize("config", [JointNFMTranscoderTrainingConfig, JointNFMSkipTranscoderTrainingConfig])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, config):
    """Through SAELens's own runner, which a transcoder makes exact by itself, as every architecture here; or it is refused."""
    run(runner_cfg_of(tmp_path / "whole", config, n_checkpoints=1, checkpoint_path=str(tmp_path / "checkpoints")))
    folder = next((tmp_path / "checkpoints").glob("*/*"))
    assert 0 < int(folder.name) < 640
    run(runner_cfg_of(tmp_path / "resumed", config, resume_from_checkpoint=str(folder)))
    whole, resumed = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("whole", "resumed"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    other = runner_cfg_of(tmp_path / "other", config, resume_from_checkpoint=str(folder))
    other.hook_name = "blocks.0.mlp.hook_in"
    with pytest.raises(ValueError, match=r"hook_name is 'blocks.0.mlp.hook_in', and 'blocks.1.mlp.hook_in'"):
        run(other)


def test_from_a_cache_of_both_the_same_bits_as_from_the_model(shared, cache, tmp_path):
    rows = [
        "--seed",
        "0",
        "--store_batch_size_prompts",
        "16",
    ]  # as many as go through the model at once when they are cached
    live = ["--hook_name", READ, "--dataset", str(shared / "tokens.parquet")]
    assert main(flags(shared, tmp_path / "live", *rows, *live)) == 0
    assert (
        main(flags(shared, tmp_path / "cached", *rows, "--activations", str(cache))) == 0
    )  # both hook points are found
    live, cached = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("live", "cached"))
    assert live.keys() == cached.keys()
    for name, tensor in live.items():
        assert torch.equal(tensor, cached[name]), name


def test_caches_that_do_not_fit_are_refused(shared, cache, tmp_path, capsys):
    one = tmp_path / "one"
    argv = [
        "cache",
        "--model",
        str(shared / "model"),
        "--dataset",
        str(shared / "tokens.parquet"),
        "--context-size",
        "16",
    ]
    assert main([*argv, "--hook", READ, "--output", str(one)]) == 0
    assert main(flags(shared, tmp_path / "a", "--activations", str(one))) == 2
    said = capsys.readouterr().err
    assert f"'{WRITTEN}'" in said
    assert READ in said
    # the output's rows of another text: the tokens of both are compared with those that were written down
    other = tmp_path / "other"
    text = [*argv[:3], "--dataset", str(shared / "text.jsonl"), *argv[5:]]
    assert main([*text, "--hook", READ, WRITTEN, "--tokens", "1024", "--output", str(other)]) == 0
    mixed = tmp_path / "mixed"
    shutil.copytree(cache, mixed)
    shutil.rmtree(mixed / WRITTEN)
    shutil.copytree(other / WRITTEN, mixed / WRITTEN)
    assert main(flags(shared, tmp_path / "b", "--activations", str(mixed))) == 2
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
    said = capsys.readouterr().err
    assert WRITTEN in said
    assert said.count("sha256") == 2  # of both


def test_what_training_refuses(shared, trained, tmp_path, capsys):
    data = ["--dataset", str(shared / "tokens.parquet")]

    def said(*more: str, architecture: str = TRANSCODER) -> str:
        assert main(flags(shared, tmp_path / "no", *data, *more, architecture=architecture)) == 2
        assert not (tmp_path / "no").exists()
        return capsys.readouterr().err

    assert READ in said("--hook_name", "blocks.1.ln2.hook_normalized")
    assert f"'{WRITTEN}'" in said("--hook_name", READ, "--hook_name_out", "blocks.1.hook_resid_post")
    assert "hook_head_index" in said("--hook_name", READ, "--hook_head_index", "0")
    assert "d_out is 7" in said("--hook_name", READ, "--d_out", "7")
    assert "selection_stages is 2" in said("--hook_name", READ, "--selection_stages", "2")
    assert "AutoModelForCausalLM" in said("--hook_name", READ, "--model_class_name", "AutoModelForCausalLM")
    assert "--primary" in said("--hook_name", READ, "--primary", str(trained))
    assert "--warm_start" in said("--hook_name", READ, "--warm_start", str(trained))
    assert "'joint_nfm_skip_transcoder'" in said("--hook_name", READ, "--from_pretrained_path", str(trained))
    assert "transcoder" in said("--hook_name", "blocks.1.hook_mlp_out", "--primary", str(trained), architecture="topk")
    assert "blocks.0.mlp.hook_in" in said("--hook_name", "blocks.0.attn.hook_z")


def test_runners_and_evaluations_of_saelens_that_would_be_wrong(trained):
    sae, model = SAE.load_from_disk(trained), tiny_model()
    cfg = runner_cfg_of(Path("x")).sae
    several = MultiSAETrainingRunnerConfig(saes={"one": cfg}, hook_names=READ, model_name="tiny", context_size=CONTEXT)
    several.logger.log_to_wandb = False
    runner = MultiSAETrainingRunner(several, override_dataset=token_dataset(16), override_model=model)
    with pytest.raises(ValueError, match="'one' is a transcoder"):
        runner.run()
    single = make_runner(runner_cfg_of(Path("x")))
    with pytest.raises(ValueError, match="a transcoder writes another hook point"):
        run_evals(sae, single.activations_store, model, ActivationScaler(), EvalConfig(compute_l2_norms=True))
    assert isinstance(single, LanguageModelSAETrainingRunner)


def test_evaluate_measures_the_output_beside_an_affine_map(trained, shared, capsys):
    config = {"sae": str(trained), "held_out": str(shared / "text.jsonl"), "n_eval_sparsity_variance_batches": 8}
    result = evaluate_saved(EvaluateConfig(**config, batch_size_prompts=4, n_eval_reconstruction_batches=2))
    assert result.hook_name == WRITTEN
    found = result.metrics["beside_the_best_affine_map"]
    assert found["tokens_fitted"] + found["tokens"] > 100
    sae, model = SAE.load_from_disk(trained), load_model(shared / "model")
    rows = held_out_rows_of(sae, model, shared, 4, 2)
    fidelity = evaluate(model, rows, [Arm(name="sae", sae=sae)], show_progress=False)["sae"]
    preserved = result.metrics["model_behavior_preservation"]
    assert preserved["kl_div_with_sae"] == pytest.approx(fidelity.kl_nats, rel=1e-4)
    assert preserved["kl_div_with_ablation"] > 0
    with pytest.raises(ValueError, match="compute_kl is False"):
        evaluate_saved(EvaluateConfig(**config, compute_kl=False))


def test_an_affine_map_is_least_squares():
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    y = x @ torch.arange(15.0).view(5, 3) + 2
    assert fvu(y, affine_map(x, y)(x)) < 1e-10
    assert fvu(y, y.mean(0).expand_as(y)) == pytest.approx(1)


def test_attribute_on_a_transcoder(trained, shared):
    found = attribute(AttributeConfig(sae=str(trained), prompt="t3 t5 t7", top=2, model=str(shared / "model")))
    assert found.hook_name == WRITTEN
    (token,) = found.tokens
    assert token.sum_error < 1e-4
    for pair in token.pairs:
        assert pair.prediction_error < 1e-3


REFUSING = {
    "explore": ["explore", "{sae}", "--held-out", "{text}", "--output", "out"],
    "factorial": ["factorial", "--sae", "{sae}", "--output", "out"],
    "secondary": ["secondary", "--primary", "{sae}", "--output", "out"],
    "dry-run": ["dry-run", "--model", "{model}", "train", "--architecture", TRANSCODER],
    "sequential": [
        "train",
        "--architecture",
        "sequential_nfm",
        "--base",
        "{sae}",
        "--model",
        "{model}",
        "--output",
        "out",
    ],
}


@pytest.mark.parametrize("command", REFUSING)
def test_commands_that_need_an_sae_say_so(command, trained, shared, capsys):
    where = {"sae": str(trained), "text": str(shared / "text.jsonl"), "model": str(shared / "model")}
    assert main([part.format(**where) for part in REFUSING[command]]) == 2
    said = capsys.readouterr().err
    assert "transcoder" in said, said
    assert not Path("out").exists()
