"""Samples from elsewhere as a folder: what was given comes back from the cache and from the model, wherever the folder lies."""

import shutil

import numpy as np
import pytest
import torch

from sae_nfm.data import ActivationCache, cached_splits, open_dataset, own_text, write_array
from sae_nfm.data.samples import write_samples
from sae_nfm.models import SAMPLES_HOOK, is_samples, load_model

CONTEXT, ROWS, HELD_OUT = 16, 40, 3
X = np.random.default_rng(0).standard_normal((CONTEXT * (ROWS + HELD_OUT) + 5, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("samples") / "samples"
    write_array(torch.from_numpy(X), made, held_out_samples=CONTEXT * HELD_OUT, context_size=CONTEXT)
    return made


def test_every_sample_is_there_once(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    model, cache = load_model(str(moved)), ActivationCache(moved)
    assert is_samples(moved)
    cache.check_rows()
    cache.check(model, [SAMPLES_HOOK], CONTEXT)
    train, held_out = cached_splits(cache, None)
    parts = [torch.tensor(part["tokens"]) for part in (train, held_out)]
    assert list(map(len, parts)) == [ROWS, HELD_OUT]
    found = [model.run_with_cache(part)[1][SAMPLES_HOOK].flatten(0, 1) for part in parts]
    assert torch.equal(torch.cat(found), torch.from_numpy(X[:-5]))
    assert torch.equal(cache.activations(parts[0], SAMPLES_HOOK).flatten(0, 1), found[0])
    for split, part in (("train", train), ("validation", held_out)):
        assert own_text(str(moved), split)["tokens"] == part["tokens"]
        assert open_dataset(str(moved), split=split)["tokens"] == part["tokens"]


def test_a_second_call_computes_nothing(folder):
    made = write_array(X, folder, held_out_samples=CONTEXT * HELD_OUT, context_size=CONTEXT)
    assert not made.computed


def test_other_samples_of_the_same_shape_are_written_anew(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    made = write_array(2 * X, copy, held_out_samples=CONTEXT * HELD_OUT, context_size=CONTEXT)
    assert made.computed
    assert made.kept is not None
    rows = torch.tensor(own_text(str(copy), "validation")["tokens"])
    found = load_model(str(copy)).run_with_cache(rows)[1][SAMPLES_HOOK].flatten(0, 1)
    assert torch.equal(found, torch.from_numpy(2 * X[CONTEXT * ROWS : -5]))


def test_another_sample_to_train_on_is_another_folder(folder, tmp_path):
    """The held-out ones, all that logits are scaled by, are the same."""
    copy, changed = shutil.copytree(folder, tmp_path / "copy"), X.copy()
    changed[5, 0] += 1
    made = write_array(changed, copy, held_out_samples=CONTEXT * HELD_OUT, context_size=CONTEXT, dtype="float16")
    assert made.computed
    assert made.identity.dtype == "float16"
    assert made.identity.model_sha256 != ActivationCache(folder).identity.model_sha256
    again = write_array(changed, copy, held_out_samples=CONTEXT * HELD_OUT, context_size=CONTEXT, dtype="float16")
    assert not again.computed


def test_the_model_takes_nothing_else(folder):
    for other in ({"model_class_name": "TransformerBridge"}, {"dtype": "float16"}):
        with pytest.raises(ValueError, match="samples and no model"):
            load_model(str(folder), **other)
    load_model(str(folder), center_writing_weights=False)  # which SAELens's runner always says


@pytest.mark.parametrize(
    ("x", "named"),
    [
        (X[0], r"shape \(6,\)"),
        (X[: CONTEXT * HELD_OUT], "do not fill a row"),
        (np.where(np.arange(len(X))[:, None] == len(X) - 10, np.nan, X), "finite"),
    ],
)
def test_samples_that_are_refused(tmp_path, x, named):
    with pytest.raises(ValueError, match=named):
        write_array(x, tmp_path / "made", held_out_samples=CONTEXT * HELD_OUT, context_size=CONTEXT)
    assert not (tmp_path / "made").exists()


def test_rows_without_a_shape_in_common(tmp_path):
    with pytest.raises(ValueError, match="shape"):
        write_samples(lambda _: X[0], tmp_path / "made", rows=2, held_out_rows=1, made_with={})
