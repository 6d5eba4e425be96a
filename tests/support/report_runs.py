"""Runs made of results at hand, and what is drawn in a report's figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_nfm.report.blocks import Block, Figure, Section
from sae_nfm.report.plots import Row
from sae_nfm.report.run_folder import Found, Run


def run_of(folder: Path, *results: Any, **paths: Sequence[Path]) -> Run:
    """A run with these results, each in a folder of its own, and records or measurements."""
    found = tuple(
        Found(result=result, path=folder / str(number) / "results.json", label=str(number))
        for number, result in enumerate(results)
    )
    none: dict[str, Any] = {"records": (), "measurements": (), "saes": (), "explorers": ()}
    return Run(folder=folder, results=found, **(none | paths))


def figures(blocks: Section | Sequence[Block]) -> list[Figure]:
    """The figures, whose captions, titles and names are checked on the way."""
    blocks = blocks.blocks if isinstance(blocks, Section) else blocks
    found = [block for block in blocks if isinstance(block, Figure)]
    names = [figure.name for figure in found]
    assert len(set(names)) == len(names)
    for figure in found:
        assert figure.title
        assert len(figure.caption.split()) > 15  # a stranger needs more than a label
        assert len(figure.data)
        assert not any("second" in column for column in figure.data.columns)  # no timings
    return found


def plots(section: Section) -> list[str]:
    """Every plot as JSON, with its data."""
    return [f"{figure.plot.to_json()} {figure.data.to_json()}" for figure in figures(section)]


def labels(plot: Any) -> list[str]:
    """Labels of the rows of a dot plot, lines joined and headings without their tags."""
    return [text.replace("<br>", " ").removeprefix("<b>").removesuffix("</b>") for text in plot.layout.yaxis.ticktext]


def marks(figure: Figure) -> set[tuple[Any, ...]]:
    """What a dot plot draws: row, legend entry, x, and the ends of its interval, rounded to 9 digits."""
    rows, found = labels(figure.plot), set[tuple[Any, ...]]()
    for trace in figure.plot.data:
        for place, x in enumerate(trace.x):
            low, high = trace.error_x.arrayminus, trace.error_x.array
            ends = () if low is None else (round(x - low[place], 9), round(x + high[place], 9))
            found.add((rows[round(trace.y[place])], trace.name, round(x, 9), *ends))
    return found


def row(key: str) -> Row:
    return Row(key=key, label=key)
