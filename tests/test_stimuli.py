import textwrap
from pathlib import Path

import pytest

from sae_nfm.demo.model import MODEL_DIR, load_tokenizer
from sae_nfm.stimuli import PACKAGED, load_stimuli

MINIMAL = """
factors:
  tone: [warm, cold]
  age: [new, old]
cells:
  - levels: [cold, new]
    words: [c, d]
    sentences: [e one, e two, e three, e four]
  - levels: [warm, new]
    words: [a, b]
    sentences: [s one, s two, s three, s four, s five]
  - levels: [warm, old]
    words: [g, h, i]
    sentences: [t one, t two, t three, t four]
  - levels: [cold, old]
    words: ["true", k]
    sentences: [u one, u two, u three, u four]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(textwrap.dedent(text))
    return path


def test_cells_stand_in_the_order_of_their_signs(tmp_path):
    stimuli = load_stimuli(written(tmp_path, MINIMAL))
    assert stimuli.name == "mine"
    assert [factor.name for factor in stimuli.factors] == ["tone", "age"]
    assert [cell.name for cell in stimuli.cells] == ["warm-new", "warm-old", "cold-new", "cold-old"]
    assert stimuli.sentences[:2] == ["s one", "s two"]
    assert stimuli.cell_of_sentence.tolist() == [0] * 5 + [1] * 4 + [2] * 4 + [3] * 4
    assert stimuli.words == ["a", "b", "g", "h", "i", "c", "d", "true", "k"]
    assert stimuli.cell_of_word.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["formality-emotion", "sentiment-register"])
def test_packaged_sets_are_large_enough_and_vary(name: str):
    stimuli = load_stimuli(name)
    tokenizer = load_tokenizer(MODEL_DIR)
    for cell in stimuli.cells:
        assert len(cell.sentences) >= 40
        assert len(cell.words) == 12
        starts = {" ".join(sentence.split()[:3]) for sentence in cell.sentences}
        assert len(starts) > 0.9 * len(cell.sentences)  # no template filled in
    lengths = {len(tokenizer(f" {word}", add_special_tokens=False).input_ids) for word in stimuli.words}
    assert {1, 2} <= lengths  # words of one token and of several are both exercised
    assert load_stimuli(PACKAGED / f"{name}.yaml") == stimuli


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"true"', "true", "cell 4, words, entry 1 is True, which YAML does not read as text; put it in quotes"),
        ("[g, h, i]", "[g]", "cell 3, words: there are 1; give at least 2"),
        ("[g, h, i]", "g", "cell 3, words is 'g'; give a list"),
        ("u four", "u three", "the sentence 'u three' is there more than once; give each sentence once, in one cell"),
        ("[c, d]", "[c, a]", "the word 'a' is there more than once; give each word once, in one cell"),
        (", u four", "", "cell 4, sentences: there are 3; give at least 4"),
        ("[cold, new]", "[cool, new]", "cell 1 has the tone 'cool'; give one of warm, cold"),
        ("[cold, new]", "[cold]", "cell 1 has the levels ['cold']; give one of each factor"),
        ("[cold, new]", "[cold, old]", "the cells are cold-old, warm-new, warm-old, cold-old; give each of "
         "warm-new, warm-old, cold-new, cold-old once"),
        ("[new, old]", "[new, new]", "factor age has the levels ['new', 'new']; give two different ones"),
        ("  age: [new, old]\n", "", "factors is {'tone': ['warm', 'cold']}; give two, each as `name: [level, level]`"),
        ("words: [c, d]", "targets: [c, d]", "cell 1 has levels, targets, sentences; it takes exactly levels, words, "
         "sentences"),
        ("[e one,", '[" e one",', "cell 1, sentences, entry 1 is ' e one'; give text without spaces at its ends"),
    ],
)  # fmt: skip
def test_mistakes_are_told_where_they_are(tmp_path, old: str, new: str, told: str):
    assert old in MINIMAL
    path = written(tmp_path, MINIMAL.replace(old, new))
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole message is compared)
        load_stimuli(path)
    assert str(caught.value) == f"{path}: {told}"


def test_what_is_no_yaml_or_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"mine\.yaml is no YAML: "):
        load_stimuli(written(tmp_path, "factors: ["))
    with pytest.raises(ValueError, match=r"the file has 'text'; it takes exactly factors, cells$"):
        load_stimuli(written(tmp_path, "text"))
    with pytest.raises(
        FileNotFoundError,
        match=r"^there are no stimuli 'other'; give a \.yaml file, or one of formality-emotion, sentiment-register$",
    ):
        load_stimuli("other")
