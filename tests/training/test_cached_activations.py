"""Activation caches, SAELens's and ours: joint_nfm trained from the cache is joint_nfm trained on the live model."""

import json
import re
import shutil

import pytest
import torch
from builders import CONTEXT, D_MODEL, inference_sae, runner_config, token_dataset, training_config
from sae_lens import SAE, CacheActivationsRunner, CacheActivationsRunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.util import temporary_seed
from safetensors.torch import load_file
from small_training import SIZES
from tiny_models import HF_BLOCK, write_checkpoint

from sae_nfm import read_training_record
from sae_nfm.data import ActivationCache
from sae_nfm.loading.saelens import quiet_saelens
from sae_nfm.models.load import load_model
from sae_nfm_cli import main

ROWS, BATCH_ROWS = 64, 16
HOOK_NAME = HF_BLOCK["neox"]
LOADING = {"model_class_name": "AutoModelForCausalLM"}  # the one class that SAELens itself loads from a folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "neox", "neox")


@pytest.fixture(scope="module")
def cached(checkpoint, tmp_path_factory):
    """The rows' activations on disk, in the rows' order."""
    bytes_per_batch = BATCH_ROWS * CONTEXT * D_MODEL * 4
    cfg = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name=str(checkpoint),
        model_batch_size=BATCH_ROWS,
        hook_name=HOOK_NAME,
        d_in=D_MODEL,
        training_tokens=ROWS * CONTEXT,
        context_size=CONTEXT,
        new_cached_activations_path=str(tmp_path_factory.mktemp("activations")),
        shuffle=False,
        buffer_size_gb=bytes_per_batch * 1.5 / 1e9,
        device="cpu",
        **LOADING,
    )
    with quiet_saelens():
        CacheActivationsRunner(cfg, override_dataset=token_dataset(ROWS)).run()
    return cfg.new_cached_activations_path


def train(checkpoint, folder, **overrides):
    cfg = runner_config(
        training_config("joint_nfm", HOOK_NAME), folder, steps=6, model_name=str(checkpoint), **LOADING, **overrides
    )
    with torch.enable_grad(), temporary_seed(0), quiet_saelens():
        LanguageModelSAETrainingRunner(cfg, override_dataset=token_dataset(ROWS)).run()
    return SAE.load_from_disk(folder)


@pytest.mark.parametrize("activations_mixing_fraction", [0.0, 0.5])
@pytest.mark.parametrize("exclude_special_tokens", [False, True])
def test_trained_from_the_cache_is_trained_live(
    activations_mixing_fraction, exclude_special_tokens, checkpoint, cached, tmp_path
):
    """Bit by bit: the cache has float32, the batches are the same, mixed or not."""
    settings = {
        "activations_mixing_fraction": activations_mixing_fraction,
        "exclude_special_tokens": exclude_special_tokens,
    }
    live = train(checkpoint, tmp_path / "live", **settings)
    cache = {"use_cached_activations": True, "cached_activations_path": cached}
    from_cache = train(checkpoint, tmp_path / "cached", **cache, **settings)
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, from_cache.state_dict()[name]), name
    settings["exclude_special_tokens"] = not exclude_special_tokens  # another stream trains another SAE
    other = train(checkpoint, tmp_path / "other", **cache, **settings)
    assert not torch.equal(other.W_dec, live.W_dec)


@torch.no_grad()
def test_the_sae_from_the_cache_is_used_like_any_other(checkpoint, cached, tmp_path):
    sae = train(checkpoint, tmp_path, use_cached_activations=True, cached_activations_path=cached)
    assert sae.cfg.metadata.hook_name == HOOK_NAME
    tokens = torch.tensor(token_dataset(4)["tokens"])
    _, cache = load_model(checkpoint, **LOADING).run_with_cache(tokens, names_filter=[HOOK_NAME])
    assert sae(cache[HOOK_NAME]).isfinite().all()
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    model = load_model(checkpoint)
    with_error = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    torch.testing.assert_close(with_error, model(tokens), atol=1e-5, rtol=0)  # float32 logits of size 2


HOOKED, PRIMARY_HOOK = "blocks.0.hook_resid_post", "blocks.0.hook_resid_post.hook_nfm_hidden_pre"


def cached_by_command(shared, output, *more):
    """A cache of texts, which are cut into rows as a training cuts them."""
    argv = ["--model", str(shared / "model"), "--dataset", str(shared / "text.jsonl"), "--hook", HOOKED]
    sizes = ["--context-size", str(CONTEXT), "--tokens", str(80 * CONTEXT), "--output", str(output)]
    assert main(["cache", *argv, *sizes, *more]) == 0
    return str(output)


@pytest.fixture(scope="module")
def ours(shared, tmp_path_factory):
    return cached_by_command(shared, tmp_path_factory.mktemp("ours") / "cache")


def flags(shared, folder, *more):
    # the seed of the order of documents is the cache's
    sizes = (
        f"--hook_name {HOOKED} --k 4 --seed 0 --store_batch_size_prompts 16 --n_batches_in_buffer 16 --evaluate_every 4"
    )
    data = ["--model_name", str(shared / "model"), "--held_out", str(shared / "tokens.parquet")]
    argv = ["train", *SIZES, *sizes.split(), *data]
    return [*argv, "--output_path", str(folder / "sae"), "--checkpoint_path", str(folder / "checkpoints"), *more]


def assert_same(one, other, tolerance=1e-6):
    """Up to the rounding of products over another number of rows."""
    one, other = (load_file(folder / "sae" / "sae_weights.safetensors") for folder in (one, other))
    for name, tensor in one.items():
        torch.testing.assert_close(
            other[name], tensor, atol=tolerance, rtol=0, msg=lambda told, name=name: f"{name}: {told}"
        )


def test_train_on_a_cache_is_train_on_the_model(shared, ours, tmp_path):
    """Text, evaluated while it trains: weights, the sketch of the text and the evaluations; the files name the cache."""
    live, cached = tmp_path / "live", tmp_path / "cached"
    data = ["--dataset_path", str(shared / "text.jsonl")]
    assert main(flags(shared, live, *data)) == 0
    assert main(flags(shared, cached, "--activations", ours)) == 0
    assert_same(live, cached)
    sketches = [(folder / "sae" / "training_text.safetensors").read_bytes() for folder in (live, cached)]
    assert sketches[0] == sketches[1]
    name = "held_out/model_behavior_preservation/kl_div_with_sae"
    lines = [read_training_record(folder / "sae" / "training.jsonl")[-1][name] for folder in (live, cached)]
    assert lines[1] == pytest.approx(lines[0], abs=1e-5)
    cfg = json.loads((cached / "sae" / "runner_cfg.json").read_text())
    assert (cfg["cached_activations_path"], cfg["dataset_path"]) == (ours, str(shared / "text.jsonl"))
    metadata = SAE.load_from_disk(cached / "sae").cfg.metadata
    assert metadata.activations == ActivationCache(ours).name
    assert main(flags(shared, tmp_path / "drawn", "--activations", ours, "--shuffle_rows", "true")) == 0
    with pytest.raises(AssertionError):
        assert_same(live, tmp_path / "drawn")


def test_a_run_goes_on_with_its_own_cache(shared, ours, tmp_path, capsys):
    """Moved or not, drawn anew or not, it ends with the same bits; with another one, or none, it says which."""
    shuffled = ["--shuffle_rows", "true", "--n_checkpoints", "2", "--wandb_id", "run"]
    assert main(flags(shared, tmp_path, "--activations", ours, *shuffled)) == 0
    (tmp_path / "sae").rename(tmp_path / "whole")
    moved = str(shutil.copytree(ours, tmp_path / "moved"))
    first = min((tmp_path / "checkpoints" / "run").glob("[0-9]*"), key=lambda path: int(path.name))
    resumed = [*shuffled, "--resume_from_checkpoint", str(first)]
    assert main(flags(shared, tmp_path, "--activations", moved, *resumed)) == 0
    for name, tensor in load_file(tmp_path / "whole" / "sae_weights.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "sae" / "sae_weights.safetensors")[name])
    half = cached_by_command(shared, tmp_path / "half", "--dtype", "float16")
    for other in (["--activations", half, *resumed], ["--dataset_path", str(shared / "text.jsonl"), *resumed[2:]]):
        capsys.readouterr()
        assert main(flags(shared, tmp_path, *other)) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"activations is (None|'80 rows of 16 tokens in float16.*'), and '80 rows.* in float32", told)
    assert main(flags(shared, tmp_path, "--activations", ours, *resumed[2:])) == 2  # in their own order
    assert "and '80 rows" in (told := capsys.readouterr().err)
    assert "drawn with seed 0' in the checkpoint" in told


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--context_size", "8"], "context_size of this training is 8, and 16"),
        (
            ["--hook_name", "blocks.1.hook_resid_post"],
            "'blocks.1.hook_resid_post', and .* has blocks.0.hook_resid_post",
        ),
        (["--model_name", "sae-nfm-demo", "--held_out", "None"], "context_size|tokenizer_sha256|model_sha256"),
        (["--dataset_path", "other.jsonl"], "'other.jsonl', and '.*text.jsonl'"),
        (["--sequence_separator_token", "eos"], "'eos', and 'bos'"),
        (["--model_kwargs", '{"x": 1}'], "model_kwargs"),
    ],
)
def test_what_does_not_fit_is_said_with_both_values(shared, ours, tmp_path, capsys, more, said):
    argv = [*flags(shared, tmp_path, "--activations", ours), *more]
    assert main(argv) == 2
    assert re.search(said, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "sae").exists()


def test_a_secondary_sae_on_a_cache_of_what_its_primary_reads(shared, ours, tmp_path):
    primary = tmp_path / "primary"
    inference_sae(training_config("joint_nfm", HOOKED)).save_model(primary)
    more = ["--architecture", "topk", "--primary", str(primary), "--hook_name", PRIMARY_HOOK, "--evaluate_every", "0"]
    live, cached = tmp_path / "live", tmp_path / "cached"
    assert main([*flags(shared, live, "--dataset_path", str(shared / "text.jsonl")), *more]) == 0
    assert main([*flags(shared, cached, "--activations", ours), *more]) == 0
    assert_same(live, cached)


@pytest.mark.parametrize(
    ("model_class", "hook"), [("TransformerBridge", HOOKED), ("AutoModelForCausalLM", HF_BLOCK["gpt2"])]
)
def test_every_class_of_model(shared, tmp_path, model_class, hook):
    where = ["--model", str(shared / "model"), "--dataset", str(shared / "text.jsonl"), "--hook", hook]
    cached = [*where, "--model-class-name", model_class, "--context-size", str(CONTEXT), "--tokens", str(80 * CONTEXT)]
    assert main(["cache", *cached, "--output", str(tmp_path / "cache")]) == 0
    more = ["--hook_name", hook, "--model_class_name", model_class, "--evaluate_every", "0", "--training_tokens", "128"]
    assert main([*flags(shared, tmp_path / "live", "--dataset_path", str(shared / "text.jsonl")), *more]) == 0
    own_hook = more if model_class == "AutoModelForCausalLM" else more[2:]  # the bridge's own name is the cache's
    argv = [arg for arg in flags(shared, tmp_path / "cached") if arg not in ("--hook_name", HOOKED)]
    assert main([*argv, *own_hook, "--activations", str(tmp_path / "cache")]) == 0
    assert_same(tmp_path / "live", tmp_path / "cached")
