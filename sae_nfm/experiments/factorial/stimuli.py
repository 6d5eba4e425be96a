"""Stimuli of a 2x2 experiment: sentences and target words, in four cells crossed by two factors.

A YAML file:

    factors:                              # two, each with two levels
      sentiment: [positive, negative]
      register: [modern, archaic]
    cells:                                # all four combinations, in any order
      - levels: [positive, modern]        # in the order of the factors
        words: [good, great, "true"]      # target words; quote what YAML reads as something else (true, no, 10)
        sentences:                        # what comes before the words, so each ends where one could follow
          - The film is funny, warm and
          - ...

Cells are numbered as the signs of their levels go: 0 is (first, first), 1 (first, second), 2 (second, first), 3 (second, second).
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from numpy.typing import NDArray

from sae_nfm.common import reading

PACKAGED = Path(__file__).parent / "stimulus_sets"
"""Sets that come with the package; each goes by its name without .yaml, too."""
FEWEST_SENTENCES = 4
"""In a cell: two in each half, without which there is no spread to test against."""
FEWEST_WORDS = 2
"""In a cell."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """What stimuli are crossed by."""

    name: str
    levels: tuple[str, str]
    """Its two levels; effects are the first less the second."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of levels."""

    levels: tuple[str, str]
    sentences: tuple[str, ...]
    """The stimuli: prompts that a target word can follow."""
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its levels, joined."""
        return "-".join(self.levels)


@dataclass(frozen=True, kw_only=True)
class StimulusSet:
    """A checked set of stimuli."""

    name: str
    factors: tuple[Factor, Factor]
    cells: tuple[Cell, Cell, Cell, Cell]
    """The cells 0 to 3."""

    @property
    def sentences(self) -> list[str]:
        """All stimuli, cell by cell: the items."""
        return [sentence for cell in self.cells for sentence in cell.sentences]

    @property
    def cell_of_sentence(self) -> NDArray[np.int64]:
        """[items], 0 to 3."""
        return np.repeat(np.arange(4), [len(cell.sentences) for cell in self.cells])

    @property
    def words(self) -> list[str]:
        """All target words, bucket by bucket."""
        return [word for cell in self.cells for word in cell.words]

    @property
    def cell_of_word(self) -> NDArray[np.int64]:
        """[words], 0 to 3."""
        return np.repeat(np.arange(4), [len(cell.words) for cell in self.cells])


def load_stimuli(source: str | Path) -> StimulusSet:
    """Read a set of stimuli: a .yaml file, or the name of one that comes with the package.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not as this module describes; the message says where.
    """
    path = Path(source) if Path(source).suffix in (".yaml", ".yml") else PACKAGED / f"{source}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PACKAGED.glob("*.yaml")))
        raise FileNotFoundError(f"there are no stimuli {str(source)!r}; give a .yaml file, or one of {known}")
    with reading(path, "YAML", remedy="correct it; docs/factorial.md has an example"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return _stimulus_set(path.stem, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _stimulus_set(name: str, content: Any) -> StimulusSet:
    _check_keys("the file", content, ("factors", "cells"))
    factors = _factors(content["factors"])
    cells = [_cell(f"cell {i}", cell, factors) for i, cell in enumerate(_sequence("cells", content["cells"]), 1)]
    by_levels = {cell.levels: cell for cell in cells}
    wanted = list(itertools.product(factors[0].levels, factors[1].levels))
    if len(cells) != 4 or set(by_levels) != set(wanted):
        given = ", ".join(cell.name for cell in cells)
        raise ValueError(f"the cells are {given}; give each of {', '.join('-'.join(w) for w in wanted)} once")
    _refuse_repeats("sentence", [sentence for cell in cells for sentence in cell.sentences])
    _refuse_repeats("word", [word for cell in cells for word in cell.words])
    ordered = cast(tuple[Cell, Cell, Cell, Cell], tuple(by_levels[levels] for levels in wanted))
    return StimulusSet(name=name, factors=factors, cells=ordered)


def _factors(content: Any) -> tuple[Factor, Factor]:
    if not isinstance(content, dict) or len(content) != 2:
        raise ValueError(f"factors is {content!r}; give two, each as `name: [level, level]`")
    found = list[Factor]()
    for name, given in content.items():
        levels = _texts(f"factor {name}", given)
        if len(levels) != 2 or levels[0] == levels[1]:
            raise ValueError(f"factor {name} has the levels {list(levels)}; give two different ones")
        found.append(Factor(name=_text("factors", name), levels=(levels[0], levels[1])))
    return found[0], found[1]


def _cell(where: str, content: Any, factors: tuple[Factor, Factor]) -> Cell:
    _check_keys(where, content, ("levels", "words", "sentences"))
    levels = _texts(f"{where}, levels", content["levels"])
    for factor, level in zip(factors, levels, strict=False):
        if level not in factor.levels:
            raise ValueError(f"{where} has the {factor.name} {level!r}; give one of {', '.join(factor.levels)}")
    if len(levels) != 2:
        raise ValueError(f"{where} has the levels {list(levels)}; give one of each factor")
    sentences = _texts(f"{where}, sentences", content["sentences"], FEWEST_SENTENCES)
    words = _texts(f"{where}, words", content["words"], FEWEST_WORDS)
    return Cell(levels=(levels[0], levels[1]), sentences=sentences, words=words)


def _texts(where: str, content: Any, fewest: int = 0) -> tuple[str, ...]:
    found = tuple(_text(f"{where}, entry {i}", text) for i, text in enumerate(_sequence(where, content), 1))
    if len(found) < fewest:
        raise ValueError(f"{where}: there are {len(found)}; give at least {fewest}")
    return found


def _sequence(where: str, content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise ValueError(f"{where} is {content!r}; give a list")
    return content


def _text(where: str, content: Any) -> str:
    if not isinstance(content, str):
        raise ValueError(f"{where} is {content!r}, which YAML does not read as text; put it in quotes")
    if not content or content != content.strip():
        raise ValueError(f"{where} is {content!r}; give text without spaces at its ends")
    return content


def _check_keys(where: str, content: Any, known: tuple[str, ...]) -> None:
    if not isinstance(content, dict) or set(content) != set(known):
        given = ", ".join(map(str, content)) if isinstance(content, dict) else repr(content)
        raise ValueError(f"{where} has {given}; it takes exactly {', '.join(known)}")


def _refuse_repeats(what: str, texts: list[str]) -> None:
    repeated = sorted({text for text in texts if texts.count(text) > 1})
    if repeated:
        raise ValueError(f"the {what} {repeated[0]!r} is there more than once; give each {what} once, in one cell")
