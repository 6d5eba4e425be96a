"""Cached activations: those of the model, found by tokens, whole after any kill, and never those of something else."""

import dataclasses
import resource
import shutil
from collections import namedtuple

import pyarrow as pa
import pytest
import torch
from builders import CONTEXT, D_MODEL, HOOK, HOOK_Z, runner_config, tiny_model, token_dataset, training_config
from datasets import load_from_disk
from kills import forked, killed_at
from sae_lens import ActivationsStore, LanguageModelSAETrainingRunner
from sae_lens.util import temporary_seed

from sae_nfm.common import FileError, locked, partial_folder
from sae_nfm.data import ActivationCache, CacheConfig, activation_cache, cached_runner, cached_splits, run_cache
from sae_nfm.data.activation_cache import identity_of, rows_of, write_cache

OTHER_HOOK = "blocks.0.hook_mlp_out"
HOOKS = (HOOK, OTHER_HOOK, HOOK_Z)
ROWS, SHARD_BYTES = 72, 32 * CONTEXT * D_MODEL * 4  # three shards; batches are those of the store in `runner_config`


def write(folder, *, model=None, dataset=None, rows=ROWS, dtype="float32", hooks=HOOKS, **origin):
    """A cache of the tiny model's first rows, in shards of 32 rows."""
    model, dataset = model or tiny_model(), dataset or token_dataset(ROWS + 8)
    tokens = rows_of(model, dataset, CONTEXT, rows * CONTEXT, "rows")
    identity = identity_of(model, hooks, tokens, model_name="tiny", dataset="rows", dtype=dtype, **origin)
    return write_cache(model, tokens, identity, folder, shard_bytes=SHARD_BYTES).folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cache") / "cache")


def files(folder):
    """All files, but for the one that says when they were written."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "digests.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("hook_name", HOOKS)
def test_the_models_activations_in_any_order(folder, hook_name):
    cache, order = ActivationCache(folder), torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor(cache.dataset()["tokens"])
    assert torch.equal(tokens, torch.tensor(token_dataset(ROWS + 8)["tokens"][:ROWS]))
    model, found = tiny_model(), cache.activations(tokens[order], hook_name)
    expected = model.run_with_cache(tokens)[1][hook_name]
    torch.testing.assert_close(found[order.argsort()], expected, atol=1e-6, rtol=0)  # other batches round otherwise
    cache.check_rows()
    cache.check(model, HOOKS, CONTEXT)


def test_half_precision_rounds(tmp_path, folder):
    half, full = ActivationCache(write(tmp_path / "half", dtype="float16")), ActivationCache(folder)
    tokens = torch.tensor(full.dataset()["tokens"])
    expected = full.activations(tokens, HOOK)
    assert torch.equal(half.activations(tokens, HOOK), expected.half().float())
    assert half.identity.bytes < full.identity.bytes * 0.7  # at 16 dimensions ids and offsets count
    half.check(tiny_model(), [HOOK], CONTEXT)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_saelens_reads_it(tmp_path, dtype):
    """And SAELens's store asks for nothing but the folder of the hook point."""
    folder = write(tmp_path / "cache", dtype=dtype)
    cached = {"use_cached_activations": True, "cached_activations_path": str(folder / HOOK)}
    cfg = runner_config(training_config("joint_nfm"), folder, steps=1, **cached)
    store = ActivationsStore.from_config(tiny_model(), cfg, override_dataset=token_dataset(4))
    found, tokens = store.get_raw_llm_batch()
    rows = tokens.view(-1, CONTEXT)
    assert torch.equal(found.view(len(rows), CONTEXT, -1), ActivationCache(folder).activations(rows.long(), HOOK))
    assert set(load_from_disk(str(folder / HOOK)).column_names) == {HOOK, "token_ids", "crc32"}


def test_the_order_is_drawn_over_all_rows(folder):
    cache, drawn = ActivationCache(folder), [ActivationCache(folder, order_seed=seed) for seed in (3, 3, 4)]
    one, same, other = (torch.tensor(one.dataset()["tokens"]) for one in drawn)
    assert torch.equal(drawn[0].activations(one, HOOK), cache.activations(one, HOOK))
    assert len({one.name for one in (cache, *drawn)}) == 3
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert sorted(one.tolist()) == sorted(cache.tokens.tolist())
    assert {row.tobytes() for row in one[:32].numpy()} - {row.tobytes() for row in cache.tokens[:32]}


@pytest.mark.parametrize("killed_at_shard", range(3))
def test_a_kill_at_any_shard(folder, tmp_path, monkeypatch, killed_at_shard):
    shard, left = activation_cache._write_shard, [killed_at_shard]

    def killed(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return shard(*args)

    monkeypatch.setattr(activation_cache, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    computed = []
    monkeypatch.setattr(activation_cache, "_write_shard", lambda *args: (computed.append(args[-1]), shard(*args))[1])
    write(tmp_path / "cache")
    assert len(computed) == 3 - killed_at_shard
    assert files(tmp_path / "cache") == files(folder)


def test_a_kill_while_a_shard_is_written(folder, tmp_path, monkeypatch):
    """At write events spread over the whole: what is there afterwards is no cache, and the next call makes one."""
    for nth in (1, 9, 20, 40, 60):
        output = tmp_path / str(nth) / "cache"
        killed = killed_at(monkeypatch, nth, lambda output=output: write(output))
        assert killed == (not output.exists())
        write(output)
        assert files(output) == files(folder)
        assert [path.name for path in output.parent.iterdir()] == ["cache"]


@pytest.mark.slow
def test_a_kill_at_every_write_event(folder, tmp_path):
    """SIGKILL in a process of its own."""
    status, events = forked(lambda: write(tmp_path / "whole" / "cache"), tmp_path)
    assert status == 0
    for nth in range(1, events + 1):
        output = tmp_path / str(nth) / "cache"
        assert forked(lambda output=output: write(output), tmp_path, nth)[0] == 9
        if output.exists():
            ActivationCache(output).check_rows()
        write(output)
        assert files(output) == files(folder)
        shutil.rmtree(output.parent)


def test_an_interrupted_cache_of_something_else(tmp_path, monkeypatch):
    shard, begun = activation_cache._write_shard, []

    def killed(*args):
        begun.append(args)
        return shard(*args) if len(begun) == 1 else 1 / 0

    monkeypatch.setattr(activation_cache, "_write_shard", killed)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"dtype is 'float16', and 'float32'"):
        write(tmp_path / "cache", dtype="float16")
    with pytest.raises(ValueError, match=r"rows is 71, and 72"):
        write(tmp_path / "cache", rows=71)
    assert list(partial_folder(tmp_path / "cache").glob("*/*.arrow"))


def test_what_is_there_already(folder, tmp_path, capsys):
    """The same cache is left alone where all of it is whole; anything else goes aside, as every command does it."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = files(copy)
    assert write(copy) == copy
    assert files(copy) == before
    flip(copy)
    write(copy)
    assert files(copy) == before
    assert "damaged" in capsys.readouterr().err
    write(copy, dtype="float16")
    assert ActivationCache(copy).identity.dtype == "float16"
    assert ActivationCache(tmp_path / "copy.2").identity.dtype == "float32"


def flip(folder, row=40):
    """A bit of an activation in the second shard."""
    path, x = sorted((folder / HOOK).glob("*.arrow"))[1], ActivationCache(folder)._columns[HOOK].activations(row)
    content = bytearray(path.read_bytes())
    content[content.index(x.tobytes())] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    flip(copy)
    cache = ActivationCache(copy)
    tokens = torch.tensor(cache.dataset()["tokens"])
    with pytest.raises(ValueError, match=r"row 40 in .*damaged"):
        cache.activations(tokens, HOOK)
    assert cache.activations(tokens[:32], HOOK).shape == (32, CONTEXT, D_MODEL)  # the shard before is whole


def test_tokens_that_are_not_those_that_were_cached(folder, tmp_path):
    """Activations are found by their tokens, which no checksum of a row covers."""
    shard = shutil.copytree(folder, tmp_path / "copy") / HOOK / "data-00001-of-00003.arrow"
    with pa.ipc.open_stream(shard.read_bytes()) as stream:
        table = stream.read_all()
    changed = table.column("token_ids").combine_chunks().flatten().to_numpy().copy()
    changed[5] += 1
    ids = pa.FixedSizeListArray.from_arrays(pa.array(changed), CONTEXT)
    place = table.schema.get_field_index("token_ids")
    table = table.set_column(place, table.schema.field(place), ids)
    with pa.ipc.new_stream(shard, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match=r"its tokens \(sha256 \w+\) are not those"):
        ActivationCache(tmp_path / "copy")


def test_held_out_text_of_the_data_set_that_was_cached_whole(tmp_path):
    """Documents that are held out of a data set are left out of its cache only where that was asked for."""
    cache = ActivationCache(write(tmp_path / "cache", held_out="other.parquet"))
    with pytest.raises(ValueError, match=r"held_out is 'rows', and was 'other.parquet'"):
        cached_splits(cache, "rows")


@pytest.mark.parametrize(("order_seed", "joined"), [(None, True), (0, False)])
def test_rows_are_joined_in_their_own_order_only(tmp_path, order_seed, joined):
    """What trained_text takes for passages must not run from one row into one that did not follow it."""
    folder = write(tmp_path / "cache", joined=True, hooks=(HOOK,))
    cfg = runner_config(training_config("joint_nfm"), tmp_path / "run", steps=4)
    runner = cached_runner(cfg, folder, order_seed=order_seed, override_model=tiny_model())
    assert runner.activations_store.rows_joined is joined


def test_damaged_files(folder, tmp_path):
    """Every kind of file, removed, cut short, or of another cache."""
    other = write(tmp_path / "other", model=tiny_model(torch.float64))
    names = ["activations.json", f"{HOOK}/state.json", f"{HOOK}/dataset_info.json"]
    names += [f"{HOOK}/data-00001-of-00003.arrow"]
    for name in names:
        for damage in ("removed", "cut", "other"):
            copy = shutil.copytree(folder, tmp_path / "copy")
            if damage == "removed":
                (copy / name).unlink()
            elif damage == "cut":
                (copy / name).write_bytes((copy / name).read_bytes()[:-300])
            else:
                shutil.copyfile(other / name, copy / name)
            if damage == "other" and name.endswith(("state.json", "info.json")):  # they are the same
                ActivationCache(copy)
            else:
                with pytest.raises((ValueError, OSError), match=r"copy.*[;,]") as raised:
                    ActivationCache(copy).check_rows()
                assert "\n" not in str(raised.value)
            shutil.rmtree(copy)


def test_what_it_refuses(folder, tmp_path, monkeypatch):
    cache, tokens = ActivationCache(folder), torch.tensor(token_dataset(ROWS + 8)["tokens"])
    with pytest.raises(ValueError, match="is not in"):
        cache.activations(tokens[-2:], HOOK)
    with pytest.raises(ValueError, match=f"context_size of this training is {CONTEXT - 1}, and {CONTEXT}"):
        cache.check(tiny_model(), [HOOK], CONTEXT - 1)
    with pytest.raises(ValueError, match="hook_resid_pre"):
        cache.check(tiny_model(), ["blocks.0.hook_resid_pre"], CONTEXT)
    other = tiny_model()
    with torch.no_grad():
        other.unembed.W_U[0, 0] += 1
    with pytest.raises(ValueError, match="model_sha256"):
        cache.check(other, [HOOK], CONTEXT)
    other = tiny_model()
    other.cfg.eps, other.blocks[0].ln1.eps = 1.0, 1.0  # no weight
    with pytest.raises(ValueError, match="differ from those"):
        cache.check(other, [HOOK], CONTEXT)
    with pytest.raises(ValueError, match="model_dtype of this training is 'bfloat16', and 'float32'"):
        cache.check(tiny_model(torch.bfloat16), [HOOK], CONTEXT)
    with pytest.raises(ValueError, match=rf"fills {ROWS + 8} rows.* at most {(ROWS + 8) * CONTEXT} tokens"):
        write(tmp_path / "long", rows=ROWS + 9)
    with pytest.raises(FileNotFoundError, match="sae-nfm cache"):
        ActivationCache(tmp_path)
    with pytest.raises(FileNotFoundError, match="one hook point of a cache"):
        ActivationCache(folder / HOOK)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(activation_cache, "disk_usage", lambda _: usage(free=1000))
    with pytest.raises(ValueError, match="GB are free"):
        write(tmp_path / "full")
    monkeypatch.undo()
    write(tmp_path / "full", dtype="float16")  # what was refused has left nothing that is in the way


def test_two_processes(folder, tmp_path):
    with locked(tmp_path / "cache", "sae-nfm cache"), pytest.raises(ValueError, match=r"being written by process \d+"):
        write(tmp_path / "cache")
    write(tmp_path / "cache")
    assert files(tmp_path / "cache") == files(folder)


def test_one_place_by_two_names(tmp_path):
    hooks = ("blocks.1.hook_resid_post", "blocks.1.hook_out")
    with pytest.raises(ValueError, match="two are one place"):
        run_cache(CacheConfig(hook=hooks, output=str(tmp_path / "cache")))


def test_no_room(tmp_path):
    """A limit on the size of a file stands for a full disk: one sentence, nothing that is half a shard."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(FileError, match=r"cache' cannot be written: file too large"):
            write(tmp_path / "cache")

    assert forked(limited, tmp_path)[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_saelens_says_nothing_about_its_model(folder, tmp_path):
    theirs = shutil.copytree(folder / HOOK, tmp_path / "theirs")
    with pytest.raises(FileNotFoundError, match="--use_cached_activations"):
        ActivationCache(theirs)


@pytest.mark.parametrize(
    ("factor", "dtype", "said"), [(1e9, "float16", "store float32"), (float("nan"), "float32", "fault")]
)
def test_activations_that_are_not_finite(tmp_path, factor, dtype, said):
    model = tiny_model()
    with torch.no_grad():
        model.blocks[0].mlp.b_out[0] = factor
    with pytest.raises(ValueError, match=said):
        write(tmp_path / "cache", model=model, dtype=dtype)


def trained(folder, tmp_path, cached, **overrides):
    """A run from the cache or from the model; the cached one's model would give other activations if it were asked."""
    hook = overrides.pop("hook_name", HOOK)
    sae = training_config("joint_nfm", hook, **overrides.pop("sae", {}))
    cfg = runner_config(sae, tmp_path / str(cached), steps=4, **overrides)
    with temporary_seed(0):
        if cached:
            runner = cached_runner(cfg, folder, override_model=tiny_model())
            with torch.no_grad():
                runner.model.embed.W_E.zero_()
        else:
            dataset = ActivationCache(folder).dataset()
            runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=tiny_model())
        return runner.run()


HEAD = {"d_in": D_MODEL // 2, "reshape_activations": "none"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hook_name": HOOK_Z},
        {"hook_name": HOOK_Z, "hook_head_index": 1, "sae": HEAD},
        {"exclude_special_tokens": True, "seqpos_slice": (2, None)},
        {"prefetch_llm_batches": 2, "sae": {"normalize_activations": "expected_average_only_in"}},
    ],
    ids=["residual", "heads", "one head", "positions", "prefetched"],
)
def test_a_training_on_it_is_one_on_the_model(folder, tmp_path, settings):
    live, cached = (trained(folder, tmp_path, cached, **settings) for cached in (False, True))
    assert ActivationCache(folder).name == cached.cfg.metadata.activations
    assert live.state_dict().keys() == cached.state_dict().keys()
    for name, tensor in live.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("prepend_bos", False), ("autocast_lm", True), ("disable_concat_sequences", True), ("context_size", 8)],
)
def test_what_a_cache_cannot_honour(folder, tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"{name}.* is {value}, and"):
        trained(folder, tmp_path, True, **{name: value})


def test_several_epochs_are_said(folder, tmp_path, capsys):
    trained(folder, tmp_path, True, training_tokens=ROWS * CONTEXT * 2)
    assert "trained on about 2.0 times" in capsys.readouterr().err


def test_the_identity_names_every_setting(folder):
    own = ActivationCache(folder).identity
    assert own.hooks == {HOOK: (D_MODEL,), OTHER_HOOK: (D_MODEL,), HOOK_Z: (2, D_MODEL // 2)}
    assert all(getattr(own, field.name) is not None for field in dataclasses.fields(own) if field.name != "held_out")
