"""What a text has in common with a training text, by its passages: whatever its name, its rows and its order."""

import numpy as np
import pytest
import torch
from builders import tiny_model, token_dataset
from sae_lens.saes.sae import SAEMetadata

from sae_nfm.common import not_held_out
from sae_nfm.data.trained_text import FEWEST, FILENAME, LENGTH, MOST, SketchCollector, TextSketch, told_of_text

BOS = 0


def documents(seed: int, n: int, vocabulary: int = 5_000) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocabulary, rng.integers(30, 300)) for _ in range(n)]


def rows_of(texts: list[np.ndarray], context: int) -> list[np.ndarray]:
    """Rows that begin with BOS, as SAELens cuts text."""
    stream = np.concatenate([part for text in texts for part in (text, [BOS])][:-1])
    step = context - 1
    return [np.concatenate([[BOS], stream[i : i + step]]) for i in range(0, len(stream) - step, step)]


def share(trained, text, *, joined=True) -> float:
    found, compared = TextSketch.of(trained, [BOS], joined=joined).share_of(TextSketch.of(text, [BOS]))
    assert compared >= 100
    return found


def test_the_share_by_hand():
    one = TextSketch.of([np.arange(1, 31)], [])  # 21 passages
    other = TextSketch.of([np.arange(11, 61)], [])  # 41, of which those that begin at 11 to 21 are in both
    assert len(one.hashes) == 21
    assert one.share_of(other) == (11 / 41, 41)
    assert one.share_of(TextSketch.of([np.arange(9)], [])) == (0.0, 0)
    special = TextSketch.of([np.array([*range(1, 16), BOS, *range(20, 26)])], [BOS])
    assert len(special.hashes) == 15 - LENGTH + 1


@pytest.mark.parametrize("context", [16, 64, 200])
def test_rows_cut_otherwise_in_another_order_are_the_same_text(context):
    texts = documents(0, 60)
    trained, order = rows_of(texts, 64), np.random.default_rng(1).permutation(60)
    assert share(trained, rows_of([texts[i] for i in order], context)) > 0.97  # passages across documents are others
    assert share(trained, rows_of(documents(2, 60), context)) == 0
    half = [*(texts[i] for i in order[:30]), *documents(3, 30)]
    assert 0.35 < share(trained, rows_of(half, context)) < 0.65
    assert share(np.stack(trained), np.stack(trained[:20]), joined=False) == 1


def test_a_long_text_leaves_a_sample(tmp_path):
    rows = np.random.default_rng(4).integers(1, 50_000, (600, 256))
    whole, collector = TextSketch.of(rows, []), SketchCollector([])
    assert len(whole.hashes) == MOST
    short = whole.shortened()
    assert len(short.hashes) == FEWEST
    short.save(tmp_path)
    found = TextSketch.load(tmp_path)
    assert np.array_equal(found.hashes, short.hashes)
    part, compared = found.share_of(TextSketch.of(rows[:100], []))
    assert part == 1
    assert 240 < compared < 450  # a sixth of 2,048, five standard deviations
    for row in rows[300:]:  # a checkpoint's, and what came after it
        collector.add(row)
    collector.add_sketch(TextSketch.of(rows[:300], []))
    assert np.array_equal(collector.sketch().hashes, whole.hashes)
    assert TextSketch.load(tmp_path / "none") is None


def test_a_damaged_sketch_is_an_error_of_its_file(tmp_path):
    TextSketch.of([np.arange(1, 31)], []).save(tmp_path)
    path = tmp_path / FILENAME
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"training_text\.safetensors"):
        TextSketch.load(tmp_path)


def test_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    rows = torch.tensor(token_dataset(20)["tokens"])
    other = torch.tensor(token_dataset(20, seed=9)["tokens"])

    def told(text, *, folder=None, source=None, **metadata):
        return told_of_text(model, text, metadata=SAEMetadata(**metadata), folder=folder, source=source)

    TextSketch.of(rows.numpy(), [0]).save("sae")
    assert told(rows, folder="sae").startswith("training tokens (100% of 120 passages")
    assert told(other, folder="sae") == "held-out tokens (none of 120 passages compared are in the SAE's training text)"
    both = torch.cat([rows[:3], other])
    assert told(both, folder="sae").startswith("tokens that are training tokens in part (13% of 138")
    unknown = "tokens of which cannot be told whether the SAE was trained on them"
    assert told(rows[:2], folder="sae").startswith(f"{unknown} (12 passages")
    assert told(rows).startswith(f"{unknown} (its metadata name no training text")
    assert told(rows, dataset_path="me/data").startswith(f"{unknown} (it was trained on 'me/data', which is not here")
    assert told(rows, dataset_path="me/data", source="me/data").startswith("training tokens (the SAE's metadata name")
    token_dataset(20).to_parquet("rows.parquet")
    at_hand = {"dataset_path": "rows.parquet", "context_size": 16, "folder": "release:id"}
    assert told(rows, **at_hand).startswith("training tokens (100%")
    assert told(other, **at_hand).startswith("held-out tokens")


def test_a_result_says_so_unless_it_is_held_out():
    assert not_held_out({"text": "held-out tokens (none of 3)"}) == not_held_out({}) == []
    assert not_held_out({"text": "training tokens (all)"}) == [
        "The text is not known to be held out: training tokens (all)."
    ]
