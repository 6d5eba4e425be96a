import re
import textwrap
from pathlib import Path

import pytest

from sae_nfm.demo.model import MODEL_DIR, load_tokenizer
from sae_nfm.experiments.factorial.stimuli import PACKAGED, load_stimuli

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
        ('"true"', "true", r"cell 4, words, entry 1\b.*\bTrue\b.*\bquotes\b"),
        ("[g, h, i]", "[g]", r"cell 3, words\b.*\b1\b.*\b2\b"),
        ("[g, h, i]", "g", r"cell 3, words\b.*'g'.*\blist\b"),
        ("u four", "u three", r"\bsentence 'u three'.*\bonce\b"),
        ("[c, d]", "[c, a]", r"\bword 'a'.*\bonce\b"),
        (", u four", "", r"cell 4, sentences\b.*\b3\b.*\b4\b"),
        ("[cold, new]", "[cool, new]", r"cell 1\b.*\btone\b.*'cool'.*\bwarm, cold\b"),
        ("[cold, new]", "[cold]", r"cell 1\b.*\blevels\b.*\['cold'\]"),
        (
            "[cold, new]",
            "[cold, old]",
            "cells .*cold-old, warm-new, warm-old, cold-old.*warm-new, warm-old, cold-new, cold-old",
        ),
        ("[new, old]", "[new, new]", r"\bage\b.*\['new', 'new'\]"),
        ("  age: [new, old]\n", "", r"\bfactors\b.*\{'tone': \['warm', 'cold'\]\}"),
        ("words: [c, d]", "targets: [c, d]", r"cell 1\b.*\blevels, targets, sentences\b.*\blevels, words, sentences\b"),
        ("[e one,", '[" e one",', r"cell 1, sentences, entry 1\b.*' e one'"),
    ],
)
def test_mistakes_are_told_where_they_are(tmp_path, old: str, new: str, told: str):
    assert old in MINIMAL
    path = written(tmp_path, MINIMAL.replace(old, new))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{told}"):
        load_stimuli(path)


def test_what_is_no_yaml_or_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"mine\.yaml\b.*\bYAML\b"):
        load_stimuli(written(tmp_path, "factors: ["))
    with pytest.raises(ValueError, match=r"'text'.*\bfactors, cells\b"):
        load_stimuli(written(tmp_path, "text"))
    with pytest.raises(FileNotFoundError, match=r"'other'.*\.yaml\b.*\bformality-emotion, sentiment-register\b"):
        load_stimuli("other")
