"""Cached activations: those of the model, found by tokens, whole after any kill, and never those of something else."""

import dataclasses
import shutil
from collections import namedtuple

import pytest
import torch
from builders import CONTEXT, D_MODEL, HOOK, runner_config, tiny_model, token_dataset, training_config
from datasets import load_from_disk
from sae_lens import ActivationsStore, LanguageModelSAETrainingRunner
from sae_lens.util import temporary_seed

from sae_nfm.data import ActivationCache, activation_cache, read_from_cache
from sae_nfm.data.activation_cache import CacheIdentity, model_digest, tokenizer_digest, write_cache
from sae_nfm.models import find_site

OTHER_HOOK = "blocks.0.hook_mlp_out"
ROWS, SHARD = 40, 12


def write(folder, *, model=None, dataset=None, rows=ROWS, dtype="float32", context=CONTEXT):
    """A cache of the tiny model's first rows at two hook points, in shards of twelve rows."""
    model = model or tiny_model()
    sites = [find_site(model, hook) for hook in (HOOK, OTHER_HOOK)]
    identity = CacheIdentity(
        model="tiny",
        model_class_name="HookedTransformer",
        model_dtype="float32",
        model_sha256=model_digest(model),
        tokenizer_sha256=tokenizer_digest(model),
        hooks={site.hook_name: site.d_in for site in sites},
        dataset="rows",
        context_size=context,
        dtype=dtype,
        rows=rows,
    )
    write_cache(model, sites, dataset or token_dataset(ROWS + 8), folder, identity, rows_per_shard=SHARD)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cache") / "cache")


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("hook_name", [HOOK, OTHER_HOOK])
def test_the_models_activations_in_any_order(folder, hook_name):
    cache, order = ActivationCache(folder), torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor(cache.dataset()["tokens"])
    assert torch.equal(tokens, torch.tensor(token_dataset(ROWS + 8)["tokens"][:ROWS]))
    model, found = tiny_model(), cache.activations(tokens[order], hook_name)
    for rows, chosen in zip(
        tokens.split(16), found[order.argsort()].split(16), strict=True
    ):  # in the batches of the cache
        assert torch.equal(chosen, model.run_with_cache(rows)[1][hook_name])


def test_half_precision_rounds(tmp_path, folder):
    half, full = ActivationCache(write(tmp_path / "half", dtype="float16")), ActivationCache(folder)
    tokens = torch.tensor(full.dataset()["tokens"])
    expected = full.activations(tokens, HOOK)
    assert torch.equal(half.activations(tokens, HOOK), expected.half().float())
    assert half.identity.bytes < full.identity.bytes * 0.6


def test_saelens_reads_it(folder):
    cached = {"use_cached_activations": True, "cached_activations_path": str(folder / HOOK)}
    cfg = runner_config(training_config("joint_nfm"), folder, steps=1, **cached)
    store = ActivationsStore.from_config(tiny_model(), cfg, override_dataset=token_dataset(4))
    found, tokens = store.get_raw_llm_batch()
    rows = tokens.view(-1, CONTEXT)
    assert torch.equal(found.view(len(rows), CONTEXT, -1), ActivationCache(folder).activations(rows.long(), HOOK))
    assert set(load_from_disk(str(folder / HOOK)).column_names) == {HOOK, "token_ids", "crc32"}


@pytest.mark.parametrize("killed_at", range(4))
def test_a_kill_at_any_shard(folder, tmp_path, monkeypatch, killed_at):
    shard, left = activation_cache._write_shard, [killed_at]

    def killed(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        shard(*args)

    monkeypatch.setattr(activation_cache, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    computed = []
    monkeypatch.setattr(activation_cache, "_write_shard", lambda *args: (computed.append(args[-1]), shard(*args)))
    write(tmp_path / "cache")
    assert len(computed) == 4 - killed_at
    assert files(tmp_path / "cache") == files(folder)


def test_an_interrupted_cache_of_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(activation_cache, "_write_shard", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"dtype is 'float16', and 'float32'"):
        write(tmp_path / "cache", dtype="float16")


def test_a_flipped_bit_is_found(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shard = sorted((copy / HOOK).glob("*.arrow"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    cache = ActivationCache(copy)
    tokens = torch.tensor(cache.dataset()["tokens"])
    with pytest.raises(ValueError, match=r"row \d+ in .*damaged"):
        cache.activations(tokens, HOOK)
    assert cache.activations(tokens[:SHARD], HOOK).shape == (SHARD, CONTEXT, D_MODEL)  # the shard before is whole


def test_what_it_refuses(folder, tmp_path, monkeypatch):
    cache, tokens = ActivationCache(folder), torch.tensor(token_dataset(ROWS + 8)["tokens"])
    with pytest.raises(ValueError, match="is not in"):
        cache.activations(tokens[-2:], HOOK)
    with pytest.raises(ValueError, match=f"context_size of this training is {CONTEXT - 1}, and {CONTEXT}"):
        cache.check(tiny_model(), HOOK, CONTEXT - 1)
    with pytest.raises(ValueError, match="hook_resid_pre"):
        cache.check(tiny_model(), "blocks.0.hook_resid_pre", CONTEXT)
    other = tiny_model()
    with torch.no_grad():
        other.unembed.W_U[0, 0] += 1
    with pytest.raises(ValueError, match="model_sha256"):
        cache.check(other, HOOK, CONTEXT)
    cache.check(tiny_model(), HOOK, CONTEXT)
    with pytest.raises(ValueError, match="exists"):
        write(folder)
    with pytest.raises(ValueError, match=rf"fills {ROWS + 8} rows"):
        write(tmp_path / "long", rows=ROWS + 9)
    with pytest.raises(FileNotFoundError, match="sae-nfm cache"):
        ActivationCache(tmp_path)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(activation_cache.shutil, "disk_usage", lambda _: usage(free=1000))
    with pytest.raises(ValueError, match="GB are free"):
        write(tmp_path / "full")


@pytest.mark.parametrize(
    ("factor", "dtype", "said"), [(1e9, "float16", "store float32"), (float("nan"), "float32", "fault")]
)
def test_activations_that_are_not_finite(tmp_path, factor, dtype, said):
    model = tiny_model()
    with torch.no_grad():
        model.blocks[0].mlp.b_out[0] = factor
    with pytest.raises(ValueError, match=said):
        write(tmp_path / "cache", model=model, dtype=dtype)


def test_a_training_on_it_ends_with_the_same_bits(folder, tmp_path):
    """The runner's language model is replaced by one that would give other activations: it is not asked."""
    trained, cache = [], ActivationCache(folder)
    for cached in (False, True):
        cfg = runner_config(
            training_config("joint_nfm"),
            tmp_path / str(cached),
            steps=4,
        )
        with temporary_seed(0):
            runner = LanguageModelSAETrainingRunner(cfg, override_dataset=cache.dataset(), override_model=tiny_model())
            if cached:
                read_from_cache(runner.activations_store, cache)
                with torch.no_grad():
                    runner.model.embed.W_E.zero_()
            trained.append(runner.run().state_dict())
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_the_identity_names_every_setting(folder):
    own = ActivationCache(folder).identity
    assert own.hooks == {HOOK: D_MODEL, OTHER_HOOK: D_MODEL}
    assert all(
        getattr(own, field.name) is not None for field in dataclasses.fields(own) if field.name != "tokenizer_sha256"
    )
