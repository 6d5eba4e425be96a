import hashlib
import json
from pathlib import Path

import convert_lm
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sample
import torch
import train_lm as train_lm_step
import verbatim
from sae_lens import ActivationsStore, LanguageModelSAERunnerConfig, LoggingConfig, StandardTrainingSAEConfig
from sample import SampleConfig, replace_long_passages, sample_rows
from train_lm import TrainConfig, train_lm
from verbatim import LIMIT, longest_runs, token_stream

from sae_nfm.data.datasets import read_documents
from sae_nfm.demo import load_model, load_tokens
from sae_nfm.demo.model import MODEL_DIR, hooked_gpt2, load_gpt2, load_tokenizer
from sae_nfm.demo.tokens import TOKENS_DIR, read_rows, write_rows

SPLITS = ("train", "validation")
CORPUS = Path(__file__).parents[3] / "shared" / "data" / "corpus-train.parquet"
SEARCHED = {
    TOKENS_DIR / "train.parquet": "abccc6faa47b520eabdede3674090279d9ad87b1bc6d0055a9c4fc4f88038498",
    TOKENS_DIR / "validation.parquet": "3e391b41d9b3a6e13fe2d1eea4bd12a2e1436760b70ee472d5d6cda066fed7bc",
    MODEL_DIR / "tokenizer.json": "cf672951220671e728a567447686e72d848d05d6b114317537a6f832c6ca725b",
}
"""sha256 of the packaged tokens that were looked for in the corpus, and of the tokenizer that the corpus was read with."""


@pytest.fixture(scope="module")
def rows():
    """The tokens of each split, [row, pos]."""
    return {split: np.array(load_tokens(split)["tokens"][:]) for split in SPLITS}


# The packaged tokens


def test_shape_and_range(rows):
    assert {split: tokens.shape for split, tokens in rows.items()} == {
        "train": (3600, 256),
        "validation": (400, 256),
    }
    for tokens in rows.values():
        assert (tokens[:, 0] == 0).all()
        assert tokens.min() >= 0
        assert tokens.max() < 4096


def test_columns_are_int32():
    for split in SPLITS:
        features = load_tokens(split).features
        assert features["tokens"].feature.dtype == features["document_id"].dtype == "int32"


def test_the_vocabulary_is_used(rows):
    assert len(np.unique(rows["train"])) > 3900


def test_document_ids_are_unique_over_both_splits():
    ids = [document for split in SPLITS for document in load_tokens(split)["document_id"]]
    assert len(set(ids)) == len(ids) == 4000


def test_no_row_stands_twice(rows):
    assert len(np.unique(np.concatenate(list(rows.values())), axis=0)) == 4000


def test_files_are_small():
    assert sum((TOKENS_DIR / f"{split}.parquet").stat().st_size for split in SPLITS) <= 4_000_000


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"\bsplit\b.*'test'.*'train', 'validation'"):
        load_tokens("test")


def test_tokens_are_samples_of_the_model(rows):
    """Over samples, -log p of the token has the mean of its distribution's entropy; also late in a row."""
    tokens = torch.tensor(rows["validation"][:16])
    with torch.no_grad():
        log_p = load_model()(tokens)[:, :-1].log_softmax(dim=-1)
    ce = -log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    for part in (slice(None), slice(128, None)):
        difference = (ce - entropy)[:, part].mean(dim=-1)  # one number a row: rows are the independent units
        bound = 4 * difference.std() / len(difference) ** 0.5
        assert abs(difference.mean()) < bound < 0.3  # samples of temperature 0.9 would be 0.5 nats below


def test_saelens_reads_the_tokens_as_they_are(rows):
    config = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=256, d_sae=256),
        hook_name="blocks.2.hook_resid_post",
        dataset_path="",
        streaming=False,
        context_size=256,
        training_tokens=256,
        n_batches_in_buffer=2,
        store_batch_size_prompts=2,
        train_batch_size_tokens=256,
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    store = ActivationsStore.from_config(load_model(), config, override_dataset=load_tokens("validation"))
    assert torch.equal(store.get_batch_tokens(3), torch.tensor(rows["validation"][:3]))


# Sampling


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny language model, its text file and the training's result."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    words = rng.choice(["alpha", "beta", "gamma", "sees", "the", "café"], size=4000)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    config = tiny_config(folder / "text.txt", folder / "model")
    return config, train_lm(config)


def tiny_config(text, output, **changes):
    shape = {"n_layers": 1, "d_model": 32, "n_heads": 2, "n_ctx": 16, "d_vocab": 300}
    training = {"n_steps": 60, "warmup_steps": 5, "learning_rate": 1e-2}
    return TrainConfig(text=text, output=output, **(shape | training | changes))


def test_sampling_with_the_cache_follows_the_whole_forward_pass(tiny):
    """Nearly at temperature 0 each token has the largest logit of the uncached, hooked model."""
    gpt2, tokenizer = load_gpt2(tiny[0].output), load_tokenizer(tiny[0].output)
    tokens = sample_rows(gpt2, 1, torch.Generator().manual_seed(0), temperature=1e-5)
    with torch.no_grad():
        logits = hooked_gpt2(gpt2, tokenizer, name="tiny")(tokens)[0, :-1]
    assert tokens[0, 0] == 0
    taken = logits.gather(-1, tokens[0, 1:, None]).squeeze(-1)
    # a draw may take what is a few temperatures below, and the cache adds in another order
    torch.testing.assert_close(taken, logits.amax(dim=-1), atol=1e-3, rtol=0)
    assert (logits.topk(2).values.diff().abs() > 1e-2).float().mean() > 0.5  # else this says nothing


def test_sampling_is_a_function_of_the_seed(tiny, tmp_path):
    model = load_gpt2(tiny[0].output)
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = SampleConfig(n_train=5, n_validation=2, batch_size=3, seed=seed, output=tmp_path / name)
        sample.sample(config, model)
        tables = [read_rows(tmp_path / name / f"{split}.parquet") for split in SPLITS]
        texts.append([table["tokens"].to_pylist() for table in tables])
        assert [table["document_id"].to_pylist() for table in tables] == [[0, 1, 2, 3, 4], [5, 6]]
    assert texts[0] == texts[1] != texts[2]
    assert all(len(row) == 16 and row[0] == 0 for split in texts[0] for row in split)


def test_long_passages_are_replaced_until_none_is_left():
    corpus = np.arange(100)
    planted, fresh = np.arange(10, 18), np.array([7, 3, 9, 1, 50, 40, 30, 20])
    rows = np.stack([fresh, planted, fresh[::-1]])
    draws = iter([planted[None] + 1, fresh[None] + 1])
    assert replace_long_passages(rows, corpus, lambda n: next(draws), limit=4) == 2
    assert rows.tolist() == [fresh.tolist(), (fresh + 1).tolist(), fresh[::-1].tolist()]


@pytest.mark.parametrize("field", ["n_train", "n_validation", "batch_size", "limit"])
def test_bad_sampling_config(field):
    with pytest.raises(ValueError, match=rf"\b{field}\b.*\b0\b"):
        SampleConfig(**{field: 0})
    with pytest.raises(ValueError, match=r"\btemperature\b.*\b0\.0\b"):
        SampleConfig(temperature=0.0)


# The verbatim check


def test_longest_runs_agree_with_brute_force():
    rng = np.random.default_rng(0)
    for n_symbols in (2, 5, 50):
        rows, corpus = rng.integers(n_symbols, size=(6, 12)), rng.integers(n_symbols, size=40)
        runs = {tuple(corpus[i:j]) for i in range(40) for j in range(i + 1, 41)}
        longest, where = longest_runs(rows, corpus)
        for row, length, start in zip(rows, longest, where, strict=True):
            shared = [j - i for i in range(12) for j in range(i + 1, 13) if tuple(row[i:j]) in runs]
            assert length == max(shared, default=0)
            assert length == 0 or tuple(row[start : start + length]) in runs


def test_a_planted_passage_is_found_and_random_text_is_not():
    rng = np.random.default_rng(1)
    rows, corpus = rng.integers(4096, size=(20, 256)), rng.integers(4096, size=50_000)
    rows[7, 100:140] = corpus[30_000:30_040]
    longest, where = longest_runs(rows, corpus)
    assert (longest[7], where[7]) == (40, 100)
    assert np.delete(longest, 7).max() < 5


def test_runs_do_not_cross_rows_or_the_end_of_the_corpus():
    rows = np.array([[1, 2, 3], [4, 5, 6]])
    assert longest_runs(rows, np.array([1, 2, 3, 4, 5, 6]))[0].tolist() == [3, 3]
    assert longest_runs(rows, np.array([9, 1, 2]))[0].tolist() == [2, 0]


def test_command_line_of_the_check(tmp_path, capsys):
    text = "It was a bright cold day, and the clocks of the whole town were striking all at once, again."
    (tmp_path / "corpus.txt").write_text(text)
    ids = load_tokenizer(MODEL_DIR)(text)["input_ids"]
    rng = np.random.default_rng(2)
    for name, planted in (("clean", 5), ("copied", 20)):
        rows = rng.integers(1, 4096, size=(2, 64))
        rows[1, 10 : 10 + planted] = ids[:planted]
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "train.parquet", rows[:1].tolist(), [0])
        write_rows(tmp_path / name / "validation.parquet", rows[1:].tolist(), [1])
    command = ["--corpus", str(tmp_path / "corpus.txt"), "--limit", "10", "--tokens"]
    verbatim.main([*command, str(tmp_path / "clean")])
    with pytest.raises(SystemExit, match="1"):
        verbatim.main([*command, str(tmp_path / "copied")])
    assert "1 rows with a run of 10 tokens or more" in capsys.readouterr().out


def test_the_tokens_are_those_that_were_searched_for_passages_of_the_corpus():
    """The search itself is slow: `test_no_long_passage_of_the_corpus_is_in_the_tokens`."""
    for path, digest in SEARCHED.items():
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        assert found == digest, (
            f"{path.name} has changed: run `python -m pytest -m slow tests/demo/test_demo_data.py`, and when that passes put "
            f"{found} in SEARCHED"
        )


@pytest.mark.slow  # 13 s of tokenizing and searching
@pytest.mark.skipif(not CORPUS.is_file(), reason="needs the corpus that the model was trained on")
def test_no_long_passage_of_the_corpus_is_in_the_tokens(rows):
    longest, _ = longest_runs(np.concatenate(list(rows.values())), verbatim.corpus_tokens(CORPUS))
    assert 8 < longest.max() < LIMIT  # the model does write common phrases: a shorter maximum is a broken check


# The corpus


def test_documents_of_each_kind_of_file(tmp_path):
    pq.write_table(pa.table({"source": ["x"] * 3, "text": ["one", None, "two\nlines"]}), tmp_path / "c.parquet")
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("one", " ", "two\nlines")) + "\n")
    (tmp_path / "c.txt").write_text("one\n\ntwo")
    assert read_documents(tmp_path / "c.parquet") == read_documents(tmp_path / "c.jsonl") == ["one", "two\nlines"]
    assert read_documents(tmp_path / "c.txt") == ["one\n\ntwo"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", r"a\.txt.*no text"),
        ("a.jsonl", '{"txt": "x"}\n{"txt": "y"}', r"a\.jsonl.*\['txt'\].*'text'"),
        ("a.jsonl", '{"text": ', r"line 1\b.*a\.jsonl.*JSON"),
        ("a.tsv", "text", r"'\.tsv'.*\.parquet.*\.jsonl.*\.txt"),
    ],
)
def test_bad_corpus_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_missing_corpus_files_and_columns(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        read_documents(tmp_path / "none.txt")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c\.parquet.*\['body'\].*'text'"):
        read_documents(tmp_path / "c.parquet")


def test_token_stream_has_bos_before_each_document():
    tokenizer = load_tokenizer(MODEL_DIR)
    stream = token_stream(["The film", "was"], tokenizer.backend_tokenizer)
    assert stream.tolist() == tokenizer("The film")["input_ids"] + tokenizer("was")["input_ids"]
    assert (stream == 0).sum() == 2


# Training a language model


def test_training_lowers_the_loss_and_writes_a_loadable_folder(tiny):
    config, result = tiny
    assert len(result.loss_nats) == config.n_steps
    assert abs(result.loss_nats[0] - np.log(load_gpt2(config.output).config.vocab_size)) < 0.1  # untrained: uniform
    assert np.mean(result.loss_nats[-5:]) < 0.6 * result.loss_nats[0]
    tokenizer = load_tokenizer(config.output)
    ids = tokenizer("the café sees 漢")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids[1:]) == "the café sees 漢"
    assert result.n_corpus_tokens == len(tokenizer(config.text.read_text(encoding="utf-8"))["input_ids"])


def test_the_written_model_is_the_trained_one(tiny):
    config, result = tiny
    stream = torch.tensor(load_tokenizer(config.output)(config.text.read_text(encoding="utf-8"))["input_ids"])
    windows = stream[: 16 * 50].view(50, 16)
    with torch.no_grad():
        loss = load_gpt2(config.output)(input_ids=windows, labels=windows).loss
    assert abs(loss - np.mean(result.loss_nats[-5:])) < 0.3  # other windows of the same text


def test_training_is_a_function_of_the_seed_and_leaves_the_global_one_alone(tiny, tmp_path):
    config, _ = tiny
    before = torch.get_rng_state()
    losses = [
        train_lm(tiny_config(config.text, tmp_path / str(n), n_steps=3, seed=seed)).loss_nats
        for n, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]


def test_a_text_shorter_than_a_window_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("the the")
    with pytest.raises(ValueError, match=r"short\.txt.*\bn_ctx\b.*\b16\b"):
        train_lm(tiny_config(tmp_path / "short.txt", tmp_path / "model"))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_steps": 0}, r"\bn_steps\b.*\b0\b"),
        ({"n_heads": 3}, r"\bd_model\b.*\b32\b.*\bn_heads\b.*\b3\b"),
        ({"d_vocab": 256}, r"\bd_vocab\b.*\b256\b.*\b257\b"),
    ],
)
def test_bad_training_config(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(Path("text.txt"), Path("model"), **change)


@pytest.mark.parametrize(
    ("step", "help_of_a_field"),
    [
        (train_lm_step, "Optimiser steps."),
        (convert_lm, "Hugging Face folder of a GPT-2-shaped model"),
        (sample, "Seed of the torch.Generator"),
        (verbatim, "Shortest run, in tokens"),
    ],
)
def test_every_step_explains_itself(capsys, step, help_of_a_field):
    with pytest.raises(SystemExit, match="0"):
        step.main(["--help"])
    assert help_of_a_field in " ".join(capsys.readouterr().out.split())
