"""SAELens's activation cache: joint_nfm trained from the cache is joint_nfm trained on the live model."""

import pytest
import torch
from builders import CONTEXT, D_MODEL, runner_config, token_dataset, training_config
from sae_lens import SAE, CacheActivationsRunner, CacheActivationsRunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.util import temporary_seed
from tiny_models import HF_BLOCK, write_checkpoint

from sae_nfm.loading.saelens import quiet_saelens
from sae_nfm.models.load import load_model

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
