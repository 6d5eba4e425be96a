"""`sae-nfm train`: SAELens's training, from flags, seeded, resumable to the same bits, its result whole."""

import json
import re
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import runner_config, saved_base, tiny_model, token_dataset, training_config
from datasets import Dataset, DatasetDict
from sae_lens import SAE
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner, _parse_cfg_args
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.util import temporary_seed
from safetensors.torch import load_file
from small_training import SIZES

from sae_nfm import read_training_record
from sae_nfm.cli.train import make_parser, parse
from sae_nfm.data.datasets import local_dataset
from sae_nfm.evaluation.saelens_evals import EvaluateConfig, evaluate_saved
from sae_nfm.explorer.run import ExploreConfig, run_explore
from sae_nfm.models.load import load_model
from sae_nfm.training.run import how_to_go_on
from sae_nfm_cli import main

HOOK = "blocks.0.hook_resid_post"
ALL = sorted(SAE_TRAINING_CLASS_REGISTRY)


@pytest.fixture(scope="module")
def model(shared):
    return load_model(shared / "model")


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory) -> Path:
    """The joint_nfm SAE of `flags`, with the seed that is used unless one is given."""
    folder = tmp_path_factory.mktemp("trained") / "sae"
    assert main([*flags(shared), "--output_path", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def flags(shared: Path, *more: str, architecture: str = "joint_nfm") -> list[str]:
    sparse = ["--k", "4"] if "k" in SAE_TRAINING_CLASS_REGISTRY[architecture][1].__dataclass_fields__ else []
    if architecture == "sequential_nfm":
        sparse = ["--base", str(saved_base(d_in=16, d_sae=32, k=4))]
    hook = "blocks.0.mlp.hook_in" if "transcoder" in architecture else HOOK
    where = ["--model_name", str(shared / "model"), "--hook_name", hook, "--dataset_path", str(shared / "text.jsonl")]
    return ["train", "--architecture", architecture, *SIZES, *sparse, *where, *more]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "sae_weights.safetensors")


def same(a: str | Path, b: str | Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def record(folder: str | Path) -> list[dict]:
    lines = read_training_record(Path(folder) / "training.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_the_embedded_model_needs_no_flags_but_sizes(capsys):
    sizes = "--training_tokens 512 --train_batch_size_tokens 128 --context-size 64 --d-sae 48 --nfm_dim 8"
    assert main(["train", *sizes.split(), "--store_batch_size_prompts", "4", "--n_batches_in_buffer", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed == (
        "SAE:    output\nRecord: output/training.jsonl\nIn Python:\n    import sae_nfm\n    from sae_lens import SAE\n"
        '    sae = SAE.load_from_disk("output")\n'
    )
    assert sorted(path.name for path in Path().iterdir()) == ["output"]
    sae = SAE.load_from_disk("output")
    assert (sae.cfg.architecture(), sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k) == ("joint_nfm", 256, 48, 32)
    assert sae.cfg.metadata.dataset_path == sae.cfg.metadata.model_name == "sae-nfm-demo"
    last = record("output")[-1]
    assert last["tokens"] == 512
    assert last["held_out/sparsity/l0"] == pytest.approx(32, abs=1)  # rescaled activations below zero are cut off
    assert json.loads(Path("output/runner_cfg.json").read_text())["output_path"] == "output"


@pytest.mark.parametrize("architecture", ALL)
def test_every_architecture_trains_as_saelens_trains_it(architecture, shared, model):
    """The same flags through SAELens's own parser and runner, with the seed set around them, give the same bits."""
    argv = flags(shared, "--log_to_wandb", "False", architecture=architecture)
    if architecture == "matryoshka_batchtopk":  # SAELens has no default
        argv += ["--matryoshka_widths", "8", "32"]
    assert main([*argv, "--output_path", "ours"]) == 0
    d_out = ["--d_out", "16"] if "transcoder" in architecture else []
    with temporary_seed(42):
        theirs = LanguageModelSAETrainingRunner(
            _parse_cfg_args([*argv[1:], "--d_in", "16", *d_out, "--output_path", "theirs"]),
            override_model=model,
            override_dataset=local_dataset(str(shared / "text.jsonl"), seed=42),
        )
        theirs.run()
    assert same("ours", "theirs")
    sae = SAE.load_from_disk("ours")
    assert sae.cfg.d_in == 16
    assert sae.cfg.to_dict() == SAE.load_from_disk("theirs").cfg.to_dict()


@pytest.mark.parametrize(
    ("more", "trained_as"),
    [
        ("--encoder batchtopk --k 3.5", {"encoder": "batchtopk", "k": 3.5, "topk_threshold_lr": 0.01}),
        (
            "--encoder=jumprelu --l0_coefficient 0.2 --jumprelu_bandwidth 1",
            {"l0_coefficient": 0.2, "jumprelu_bandwidth": 1.0},
        ),
    ],
)
def test_encoders_of_joint_nfm(more, trained_as, shared, capsys):
    """With SAELens's defaults of each encoder; the same flags through SAELens's parser give the same config."""
    argv = [*(flag for flag in flags(shared) if flag not in ("--k", "4")), *more.split()]
    assert main([*argv, "--inference_refinement_steps", "2", "--output_path", "ours"]) == 0
    sae, ours = SAE.load_from_disk("ours"), parse(argv[1:]).cfg.sae
    theirs = _parse_cfg_args([*argv[1:], "--d_in", "512"]).sae
    assert replace(ours, metadata=theirs.metadata, normalize_activations="none") == theirs
    assert (sae.cfg.encoder, sae.cfg.k, sae.cfg.refinement_steps) == ("jumprelu", None, 2)
    details = sae.cfg.metadata.training_architecture_details
    assert details | trained_as == details
    assert (sae.threshold > 0).all()
    short = re.search(r"topk_threshold_lr is 0.01: in (\d+) steps .* goes (\d+)% of the way", capsys.readouterr().err)
    assert (short is not None) == (sae.cfg.rescale_acts_by_decoder_norm is True)
    if short is not None:
        steps, way = map(int, short.groups())
        assert way == round(100 * (1 - 0.99**steps))
    shown = make_parser(["--encoder", "jumprelu"]).help()
    assert "--l0_coefficient FLOAT" in shown
    assert "INT|FLOAT" in shown
    assert "average. jumprelu has none.\n" in shown  # and no default


@pytest.mark.parametrize(
    ("model_class_name", "hook_name", "d_in", "reshape"),
    [
        ("HookedTransformer", "blocks.0.mlp.hook_post", 40, "none"),
        ("HookedTransformer", "blocks.0.attn.hook_z", 16, "hook_z"),
        ("TransformerBridge", "blocks.0.hook_resid_post", 16, "none"),
        ("AutoModelForCausalLM", "transformer.h.0.mlp.c_fc", 40, "none"),
    ],
)
def test_width_and_heads_are_measured(model_class_name, hook_name, d_in, reshape, shared):
    argv = flags(shared, "--model_class_name", model_class_name, "--hook_name", hook_name, "--evaluate-every", "8")
    assert (
        main([*argv, "--held_out", str(shared / "tokens.parquet"), "--dataset_path", str(shared / "tokens.parquet")])
        == 0
    )
    cfg = SAE.load_from_disk("output").cfg
    assert (cfg.d_in, cfg.reshape_activations, cfg.metadata.model_class_name) == (d_in, reshape, model_class_name)
    assert "held_out/model_behavior_preservation/kl_div_with_sae" in record("output")[-1]


def test_one_head(shared):
    assert main(flags(shared, "--hook_name", "blocks.0.attn.hook_q", "--hook_head_index", "1")) == 0
    cfg = SAE.load_from_disk("output").cfg
    assert (cfg.d_in, cfg.reshape_activations, cfg.metadata.hook_head_index) == (8, "none", 1)


def test_the_seed_decides_everything_and_the_caller_s_random_state_stays(shared, trained):
    torch.manual_seed(8)
    before = torch.get_rng_state()
    assert main(flags(shared, "--output_path", "a", "--seed", "42")) == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert same(trained, "a")
    assert main(flags(shared, "--output_path", "b", "--seed", "43")) == 0
    assert not same("a", "b")


@pytest.mark.parametrize("architecture", ["joint_nfm", "jumprelu"])
def test_interrupted_and_resumed_with_the_printed_command_it_is_the_same_run(architecture, shared, capsys, monkeypatch):
    argv = flags(shared, "--record_every", "1", "--evaluate_every", "3", architecture=architecture)
    argv += ["--held_out", str(shared / "text.jsonl"), "--normalize_activations", "expected_average_only_in"]
    assert main([*argv, "--output_path", "whole"]) == 0
    training_class, steps = SAE_TRAINING_CLASS_REGISTRY[architecture][0], []
    forward = training_class.training_forward_pass

    def interrupted_forward(self, *args, **kwargs):
        steps.append(None)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGTERM)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training_class, "training_forward_pass", interrupted_forward)
        assert main([*argv, "--output_path", "parts"]) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    (checkpoint,) = Path("checkpoints").glob("*/*")
    assert checkpoint.name == "320"
    command = shlex.join(["sae-nfm", *argv, "--output_path", "parts", "--resume_from_checkpoint", str(checkpoint)])
    assert told == f"sae-nfm: interrupted; to go on: {command}"
    assert not Path("parts").exists()
    assert main(shlex.split(command)[1:]) == 0
    assert same("whole", "parts")
    assert record("whole") == record("parts")
    assert not list(Path().glob("*.partial"))


def test_the_newest_checkpoint_of_a_folder_is_resumed(shared):
    argv = flags(shared, "--n_checkpoints", "3", "--checkpoint_path", "kept")
    assert main([*argv, "--output_path", "a"]) == 0
    newest = max(Path("kept").glob("*/*"), key=lambda path: int(path.name))
    assert main([*argv, "--output_path", "b", "--resume_from_checkpoint", "kept"]) == 0
    assert int(newest.name) > 64 * 4
    before, after = (read_training_record(f"{output}/training.jsonl") for output in ("a", "b"))
    assert before[0] == after[0]  # the seconds, too: it did not begin anew
    assert record("a") == record("b")
    assert same("a", "b")


def test_how_to_go_on(tmp_path):
    argv = ["--lr", "1e-3", "--resume-from-checkpoint", "old/1", "--held_out", "a b.txt"]
    told = "interrupted; to go on: sae-nfm train --lr 1e-3 --held_out 'a b.txt' --resume_from_checkpoint old/1"
    assert how_to_go_on(parse(argv)) == told
    assert how_to_go_on(parse(["--resume_from_checkpoint=old/1"])).endswith("train --resume_from_checkpoint old/1")
    assert how_to_go_on(parse([])) == "interrupted before a checkpoint was saved"
    assert (
        how_to_go_on(parse(["--checkpoint_path"]))
        == "interrupted before a checkpoint was saved, as checkpoint_path is None"
    )


def test_an_earlier_sae_is_kept(shared, trained, capsys):
    shutil.copytree(trained, "output")
    for seed in ("2", "3"):
        assert main(flags(shared, "--seed", seed)) == 0
    assert re.search(r"before: output\.2\n", capsys.readouterr().out)
    assert same("output.1", trained)
    assert not same("output", "output.1")
    assert not same("output", "output.2")
    assert not same("output.1", "output.2")


def test_a_run_that_fails_leaves_the_earlier_sae_alone(shared, trained, monkeypatch):
    shutil.copytree(trained, "output")
    before = weights("output")

    def fails(self, *args, **kwargs):
        raise MemoryError("as if")

    monkeypatch.setattr(SAE_TRAINING_CLASS_REGISTRY["joint_nfm"][0], "save_inference_model", fails)
    assert main(flags(shared, "--seed", "1")) == 1
    after = weights("output")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in Path().iterdir()) == ["output", "output.partial"]


def test_without_an_output_nothing_is_written(shared, capsys):
    assert main(flags(shared, "--output_path", "None")) == 0
    assert capsys.readouterr().out == "Trained; output_path is None, so nothing was written.\n"
    assert not list(Path().iterdir())


def test_checkpoints_are_named(shared, capsys):
    assert main(flags(shared, "--n_checkpoints", "1", "--wandb_id", "mine")) == 0
    assert "Checkpoints: checkpoints/mine\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hook_name", "blocks.0.hook_resid_pst"], r"'blocks\.0\.hook_resid_pst'.*\bblocks\.0\.hook_resid_post\b"),
        (["--hook_name", "blocks.0.attn.hook_pattern"], r"shape \(1, 2, 2, 2\).*\[batch, pos, d_in\]"),
        (["--hook_head_index", "2"], r"hook_head_index is 2\b.*\bheads\b"),
        (["--model_name", "no-such-model"], "model 'no-such-model'"),
        (["--model_class_name", "GPT"], "model_class_name .*'HookedTransformer'.*'GPT'"),
        (["--dataset_path="], "embedded tokens.*--dataset"),
        (["--dataset_path", "no.jsonl"], r"\bno\.jsonl\b.*\.parquet"),
        (["--dataset_path", "short.txt"], r"'short\.txt'.*\b16 tokens\b.*context_size"),
        (["--held_out", "short.txt"], r"held-out.*\b16 tokens\b"),
        (["--held_out", "no.txt"], r"\bno\.txt\b"),
        (["--d_in", "7"], r"d_in is 7\b.*'blocks\.0\.hook_resid_post'.*\bwidth 16; leave d_in out"),
        (["--architecture", "topk", "--k", "99"], r"\bk is 99\b.*\b1\b.*d_sae = 32\b"),
        (["--training_tokens", "10"], r"training_tokens is 10\b.*\b64\b"),
        (["--context_size", "33"], r"context_size is 33\b.*\b32\b"),
        (["--store_batch_size_prompts", "0"], r"store_batch_size_prompts .* 0\b"),
        (["--n_batches_in_buffer", "1"], r"n_batches_in_buffer.* 16\b.* 64\b"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--from_pretrained_path", "no"], "from_pretrained_path is 'no'.*folder"),
        (["--resume_from_checkpoint", "no"], "'no'.*checkpoint.*folder"),
        (["--lr_scheduler_name", "x"], "scheduler: x"),
        (["--output_path", "short.txt"], r"output_path is 'short\.txt'.*file.*folder"),
        (["--output_path", "."], r"output_path is '\.'.*\(short\.txt\).*folder"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(more, message, shared, capsys):
    Path("short.txt").write_text("t1 t2")
    assert main(flags(shared, *more)) == 2
    told = capsys.readouterr().err.rpartition("sae-nfm: ")[2]
    assert re.search(message, told), told
    assert told.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["short.txt"]


def test_a_hub_name_is_left_to_saelens(shared, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(flags(shared, "--dataset_path", "no/such")) == 2
    assert re.search(r"'no/such'.*\bfile\b.*\bhub\b", capsys.readouterr().err)
    assert local_dataset("no/such") is None


def test_a_pretrained_sae_of_another_width_is_refused(shared, capsys):
    assert main(flags(shared, "--hook_name", "blocks.0.mlp.hook_post", "--save_final_checkpoint", "True")) == 0
    (final,) = Path("checkpoints").glob("*/final_512")
    assert main(flags(shared, "--from_pretrained_path", str(final), "--output_path", "b")) == 2
    assert re.search(rf"'{re.escape(str(final))}'.*d_in 40\b.*hook point 16\b", capsys.readouterr().err)
    argv = flags(shared, "--from_pretrained_path", str(final), "--hook_name", "blocks.0.mlp.hook_post", "--lr", "0")
    assert main([*argv, "--output_path", "b"]) == 0
    assert same("output", "b")  # at learning rate 0 it is what it was


def test_defaults_train_on_any_model(shared, capsys):
    """SAELens's own would hold 2,560 tokens, fewer than its batch, and rows longer than this model reads."""
    where = ["--model_name", str(shared / "model"), "--hook_name", HOOK, "--dataset_path", str(shared / "text.jsonl")]
    sizes = ["--d_sae", "32", "--k", "4", "--training_tokens", "4096", "--feature_sampling_window", "1"]
    assert main(["train", *where, *sizes]) == 0
    cfg = json.loads(Path("output/runner_cfg.json").read_text())
    assert (cfg["context_size"], cfg["train_batch_size_tokens"], cfg["n_batches_in_buffer"]) == (32, 4096, 128)
    told = capsys.readouterr().err
    assert "context_size is 32" in told
    assert "special tokens ('<bos>') are not left out, but trained on" in told


def test_a_buffer_that_is_too_small_is_refused_before_the_model_is_loaded(capsys):
    sizes = ["--n_batches_in_buffer", "3", "--train_batch_size_tokens", "512", "--context_size", "128"]
    assert main(["train", "--model_name", "no-such-model", *sizes]) == 2
    assert re.search(r"n_batches_in_buffer.* 384\b.* 512\b", capsys.readouterr().err)


def test_excluded_special_tokens_are_named(shared, capsys):
    assert main(flags(shared, "--exclude_special_tokens", "true")) == 0
    assert "special tokens left out: '<bos>' (0)" in capsys.readouterr().err
    assert main(flags(shared, "--exclude_special_tokens", "[3, 0]", "--output_path", "b")) == 0
    assert "special tokens left out: 't3' (3), '<bos>' (0)" in capsys.readouterr().err


def test_a_token_id_beyond_the_vocabulary_stops_before_the_training(shared, capsys):
    rows = token_dataset(64)["tokens"][:]
    rows[41][3] = 50
    Dataset.from_dict({"tokens": rows}).save_to_disk("rows")
    assert main(flags(shared, "--dataset_path", "rows")) == 2
    assert re.search(r"row 41\b.* 50 at position 3\b.* 49\b", capsys.readouterr().err)
    assert [path.name for path in Path().iterdir()] == ["rows"]


def test_a_token_id_beyond_the_vocabulary_of_a_stream(tmp_path):
    """Streamed rows are looked at one by one, through SAELens's runner too: -1 would be read as the last id."""
    rows = token_dataset(64)["tokens"][:]
    rows[41][3] = -1
    cfg = runner_config(training_config("joint_nfm"), tmp_path / "sae", steps=20)
    stream = Dataset.from_dict({"tokens": rows}).to_iterable_dataset()
    runner = LanguageModelSAETrainingRunner(cfg, override_model=tiny_model(), override_dataset=stream)
    with pytest.raises(ValueError, match=r"row 41\b.* -1 at position 3\b"):
        runner.run()


@pytest.mark.slow
def test_the_text_of_a_training_is_known_again(shared, tmp_path, capsys):
    """Under another name, in another kind of file, as a part of a larger one; other text is not."""
    lines = (shared / "text.jsonl").read_text().splitlines(keepends=True)
    texts = [json.loads(line)["text"] for line in lines]
    Path("train.jsonl").write_text("".join(lines[:75]))
    assert main(flags(shared, "--dataset_path", "train.jsonl", "--training_tokens", "4096")) == 0
    Path("train.jsonl").rename("copy.jsonl")  # what the metadata name is gone
    Dataset.from_dict({"text": texts[:75][::-1]}).to_parquet("same.parquet")
    Path("other.jsonl").write_text("".join(lines[75:]))
    Path("larger.jsonl").write_text("".join(lines[75:] + lines[:75]))
    few = {"sae": "output", "batch_size_prompts": 32, "n_eval_reconstruction_batches": 5}
    few |= {"n_eval_sparsity_variance_batches": 5, "compute_l2_norms": False, "compute_ce_loss": False}
    told = {
        name: evaluate_saved(EvaluateConfig(**few, held_out=name))
        for name in ("copy.jsonl", "same.parquet", "other.jsonl", "larger.jsonl")
    }
    kinds = {name: one.data.partition(": ")[2].partition(" (")[0] for name, one in told.items()}
    assert kinds == {
        "copy.jsonl": "training tokens",
        "same.parquet": "training tokens",
        "other.jsonl": "held-out tokens",
        "larger.jsonl": "tokens that are training tokens in part",
    }
    assert "Special tokens ('<bos>') are not left out, but counted." in told["copy.jsonl"].words()
    explored = run_explore(ExploreConfig(sae="output", held_out="copy.jsonl", output="explored", n_tokens=2_000))
    assert "text: training tokens (" in explored.words()


@pytest.mark.slow
def test_a_resumed_run_leaves_the_sketch_of_an_uninterrupted_one(shared):
    """Text of several epochs, resumed in a later one."""
    argv = flags(shared, "--training_tokens", "8192", "--n_checkpoints", "2", "--wandb_id", "x")
    assert main([*argv, "--output_path", "a"]) == 0
    first, *_ = sorted(Path("checkpoints/x").iterdir(), key=lambda path: int(path.name.removeprefix("final_")))
    assert main([*argv, "--output_path", "b", "--resume_from_checkpoint", str(first)]) == 0
    one, other = (Path(name, "training_text.safetensors").read_bytes() for name in ("a", "b"))
    assert one == other


def test_kinds_of_data(shared, tmp_path):
    tokens = token_dataset(8)
    tokens.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": tokens, "test": tokens.select([0])}).save_to_disk(tmp_path / "splits")
    texts = tmp_path / "texts"
    (texts / "b").mkdir(parents=True)
    (texts / "a.txt").write_text("one")
    (texts / "b" / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    assert local_dataset(str(tmp_path / "saved"))["tokens"] == tokens["tokens"]
    assert local_dataset(str(tmp_path / "splits"))["tokens"] == tokens["tokens"]
    assert len(local_dataset(str(tmp_path / "splits"), split="test")) == 1
    assert sorted(local_dataset(str(texts))["text"]) == ["one", "three", "two"]
    rows = local_dataset(str(shared / "tokens.parquet"), seed=3)["tokens"]
    assert sorted(rows) == sorted(token_dataset(64)["tokens"])
    assert rows == local_dataset(str(shared / "tokens.parquet"), seed=3)["tokens"]
    assert rows != local_dataset(str(shared / "tokens.parquet"), seed=4)["tokens"]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("./no", FileNotFoundError, r"'\./no'.*\.parquet.*\.jsonl.*\.txt"),
        ("a.tsv", FileNotFoundError, r"'a\.tsv'.*suffix"),
        ("empty", ValueError, r"folder 'empty'.*\.parquet.*\.jsonl.*\.txt"),
        ("splits", ValueError, "'splits'.*splits test .*'train'"),
        ("mixed", ValueError, r"mixed/b\.parquet.*columns \(text, tokens\)"),
    ],
)
def test_data_that_cannot_be_read(source, error, message):
    Path("a.tsv").write_text("x")
    Path("empty").mkdir()
    DatasetDict({"test": token_dataset(2)}).save_to_disk("splits")
    Path("mixed").mkdir()
    Path("mixed/a.txt").write_text("x")
    token_dataset(2).to_parquet("mixed/b.parquet")
    with pytest.raises(error, match=message):
        local_dataset(source)
