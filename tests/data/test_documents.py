"""Held-out rows with document identity: SAELens's tokens, and whose each of them is."""

from types import SimpleNamespace

import pytest
import torch
from builders import tiny_model, token_dataset
from datasets import Dataset
from tiny_models import write_checkpoint

from sae_nfm.data.datasets import held_out_tokens
from sae_nfm.data.documents import TokenRows, held_out_rows, rows_and_others
from sae_nfm.models.load import load_model

LOADERS = ("HookedTransformer", "TransformerBridge", "AutoModelForCausalLM")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("documents") / "gpt2", "gpt2")
    return {loader: load_model(folder, model_class_name=loader) for loader in LOADERS}


def text(*documents):
    """Documents of the words t1 ... t49, by number; 0 is a special token in the text."""
    words = [" ".join("<bos>" if n == 0 else f"t{n}" for n in document) for document in documents]
    return Dataset.from_dict({"text": words})


def random_text(n: int = 40) -> Dataset:
    """Of 1 to 30 words, special tokens at every place, the first too."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 31, (n,), generator=generator)
    documents = [torch.randint(0, 50, (length,), generator=generator) for length in lengths]
    documents = [document.where(torch.rand(len(document), generator=generator) > 0.1, 0) for document in documents]
    return text(*(document.tolist() for document in documents))


@pytest.mark.parametrize("loader", LOADERS)
def test_hand_made_text(models, loader):
    """Document 1 runs over two rows, document 2 begins with a special token (so that none is put before it)."""
    dataset = text([11, 12, 13], [21, 22, 23, 24, 25, 26], [0, 31, 32], [41, 42])
    found = held_out_rows(models[loader], dataset, context_size=6, n_tokens=100)
    assert found.tokens.tolist() == [[0, 11, 12, 13, 0, 21], [0, 22, 23, 24, 25, 26], [0, 31, 32, 0, 41, 42]]
    assert found.documents.tolist() == [[-1, 0, 0, 0, -1, 1], [-1, 1, 1, 1, 1, 1], [-1, 2, 2, -1, 3, 3]]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("context_size", [2, 7, 16])
@pytest.mark.parametrize("n_tokens", [1, 100, 10**6])
def test_tokens_are_those_of_held_out_tokens(models, loader, context_size, n_tokens):
    dataset, model = random_text(), models[loader]
    found = held_out_rows(model, dataset, context_size, n_tokens)
    assert torch.equal(found.tokens, held_out_tokens(model, dataset, context_size, n_tokens))
    assert torch.equal(found.documents == -1, found.tokens == 0)
    for number, document in enumerate(dataset["text"]):  # whole documents, put together again from their tokens
        words = [int(word[1:]) for word in document.split() if word != "<bos>"]
        taken = found.tokens[found.documents == number].tolist()
        assert taken == words[: len(taken)]
        if n_tokens == 10**6 and number < 30:
            assert taken == words


@pytest.mark.parametrize("dataset", [random_text(), token_dataset(8, context=16)])
def test_skipped_tokens_are_the_rows_before(models, dataset):
    model = models["HookedTransformer"]
    both = held_out_rows(model, dataset, 16, 6 * 16)
    rest = held_out_rows(model, dataset, 16, n_tokens=4 * 16, skip_tokens=2 * 16 + 3)
    assert torch.equal(both.tokens[2:], rest.tokens)
    assert torch.equal(both.documents[2:], rest.documents)
    one_less = held_out_rows(model, dataset, 16, n_tokens=10**6, skip_tokens=1)  # n_tokens=1 takes a row as well
    assert torch.equal(one_less.tokens, held_out_tokens(model, dataset, 16, 10**6)[1:])


@pytest.mark.parametrize(
    ("first", "others", "cut", "end"), [(3, 2, 3, 5), (5, 3, 5, 8), (6, 3, 6, 8), (7, 4, 6, 8), (100, 100, 6, 8), (1, 100, 1, 8)]
)  # fmt: skip
def test_a_text_too_short_for_both_is_divided(first, others, cut, end, capsys):
    dataset = token_dataset(8, context=16)
    all_rows = torch.tensor(dataset["tokens"])
    rows, rest = rows_and_others(tiny_model(), dataset, 16, first * 16, others * 16)
    assert torch.equal(rows.tokens, all_rows[:cut])
    assert torch.equal(rest.tokens, all_rows[cut:end])
    assert rest.documents[0, 1] == cut
    said = capsys.readouterr().err
    assert (f"{cut} to measure on" in said) == (first + others > 8)


def test_one_row_cannot_be_divided():
    with pytest.raises(ValueError, match=r"held-out text fills one row of 16 tokens"):
        rows_and_others(tiny_model(), token_dataset(1, context=16), 16, 16, 16)


@pytest.mark.parametrize("column", ["tokens", "input_ids"])
def test_each_row_of_token_ids_is_a_document(column):
    rows = torch.tensor(token_dataset(5, context=16)["tokens"])
    rows[2, 4] = 0
    dataset = Dataset.from_dict({column: rows.tolist(), "document_id": [7, 7, 8, 8, 9]})
    found = held_out_rows(tiny_model(), dataset, context_size=12, n_tokens=100)
    assert torch.equal(found.tokens, rows[:, :12])
    expected = torch.arange(5)[:, None].expand(5, 12).clone()
    expected[:, 0] = expected[2, 4] = -1
    assert torch.equal(found.documents, expected)


def test_without_a_tokenizer_no_token_is_special():
    model = tiny_model()
    model.tokenizer = None
    found = held_out_rows(model, token_dataset(2), context_size=16, n_tokens=32)
    assert found.documents.tolist() == [[0] * 16, [1] * 16]
    with pytest.raises(ValueError, match=r"tokenizer.*text"):
        held_out_rows(model, random_text(), context_size=16, n_tokens=32)


def test_errors_say_what_is_wrong(models):
    model = models["HookedTransformer"]
    with pytest.raises(ValueError, match=r"held-out text.*\b16 tokens"):
        held_out_rows(model, text([1, 2, 3]), 16, 100)
    with pytest.raises(ValueError, match=r"held-out text.*\b4 tokens\b.*\b2 rows\b.*\bskip_tokens\b.*\b8\b"):
        held_out_rows(model, text([1, 2, 3, 4, 5, 6, 7]), 4, 100, skip_tokens=8)
    with pytest.raises(ValueError, match=r"\btokens\b.*\(2, 3\).*\bdocuments\b.*\(2,\)"):
        TokenRows.__post_init__(
            SimpleNamespace(tokens=torch.zeros(2, 3), documents=torch.zeros(2))
        )  # before shapes are checked
