"""What a page is made of: sections of prose, tables and figures, each figure with its data."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pandas as pd
import plotly.graph_objects as go

from sae_nfm.common import not_held_out
from sae_nfm.report.plots import Axis, Dot, dot_data, dot_rows
from sae_nfm.report.run_folder import Found

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure, what it shows, and the numbers in it."""

    name: str
    """Unique in its section: lower-case letters, digits and hyphens."""
    title: str
    """What to see, not how it is drawn."""
    plot: go.Figure
    """Drawn by a function of this package that computes nothing."""
    caption: str
    """For a stranger: what is drawn, in what units, what the control is, what it cannot show."""
    data: pd.DataFrame
    """What the download has: the numbers drawn, a row for each mark; no timings, so that a seed repeats them."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    strong: Sequence[bool] | None = None
    """Which rows are set in bold, such as whole SAEs among their ablations."""
    text_columns: Sequence[int] = (0,)
    """Columns of words, left-aligned and wrapped."""


@dataclass(frozen=True, kw_only=True)
class Prose:
    """Paragraphs, or a list."""

    lines: Sequence[str]
    """One paragraph or item each."""
    listed: bool = False


@dataclass(frozen=True, kw_only=True)
class Heading:
    """A heading inside a section, where it has several results."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Verbatim:
    """Text in a fixed-width font, folded away until asked for."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """The place of something that a script of the page fills."""

    id: str
    data: bytes
    """What it works on, embedded as base64 in an element `<id>-data`."""
    fallback: str
    """What stands there until then."""


Block = Figure | Table | Prose | Heading | Verbatim | Embedded


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page."""

    id: str
    title: str
    lead: str
    """What question it answers, in a sentence or two."""
    blocks: Sequence[Block]
    verdicts: Sequence[str] = ()
    """What it found, in sentences for the summary: null results and losses as plainly as wins."""


def section_of(
    found: Sequence[Found[T]],
    *,
    id: str,
    title: str,
    lead: str,
    blocks: Callable[[T, int], Iterable[Block]],
    findings: Callable[[T], Iterable[str]],
) -> Section | None:
    """The section of all results of one kind, where there are several each under its folder; None where none has blocks.

    `blocks` are those of a result and its number, from 0; `findings` those of a result, for the summary.
    """
    shown: list[Block] = []
    verdicts: list[str] = []
    for number, one in enumerate(found):
        own, told = list(blocks(one.result, number)), list(findings(one.result))
        if own and (warned := not_held_out(getattr(one.result, "provenance", {}))):
            own, told = [Prose(lines=warned), *own], [*told, *warned]
        if own and len(found) > 1:
            shown.append(Heading(text=one.label))
            told = [f"{one.label}: {finding}" for finding in told]
        shown += own
        verdicts += told
    return Section(id=id, title=title, lead=lead, blocks=shown, verdicts=verdicts) if shown else None


def dots_figure(name: str, title: str, dots: Sequence[Dot], axis: Axis, caption: str, **options: Any) -> Figure:
    """A figure of `dot_rows`, with its options."""
    return Figure(name=name, title=title, plot=dot_rows(dots, axis, **options), caption=caption, data=dot_data(dots))
