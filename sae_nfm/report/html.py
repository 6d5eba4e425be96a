"""From blocks to HTML. Every text is escaped; every figure carries its plot and its data as JSON, drawn by assets/page.js."""

import base64
import json
import math
from collections.abc import Sequence
from functools import singledispatch
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.io as pio

from sae_nfm.report.blocks import Block, Embedded, Figure, Heading, Prose, Section, Table, Verbatim


def section_html(section: Section) -> str:
    """A section with its heading and blocks."""
    blocks = "".join(block_html(block, section.id) for block in section.blocks)
    return (
        f'<section id="{section.id}" aria-labelledby="{section.id}-title"><h2 id="{section.id}-title">'
        f"{escape(section.title)}</h2>"
        f'<p class="lead">{escape(section.lead)}</p>{blocks}</section>'
    )


@singledispatch
def block_html(block: Block, section: str) -> str:  # noqa: ARG001
    """A block of a section.

    Args:
        block: the block.
        section: the section's id.
    """
    raise TypeError(f"{type(block).__name__} is no block")


@block_html.register
def _(block: Figure, section: str) -> str:
    anchor = f"{section}-{block.name}"
    content = {
        "plot": json.loads(pio.to_json(block.plot, validate=False) or "{}"),
        "data": _values(block.data),
    }
    return (
        f'<figure id="{anchor}"><h3>{escape(block.title)}</h3>'
        f'<div class="figure" id="{anchor}-plot" role="img" aria-label="{escape(block.title)}" '
        f'aria-describedby="{anchor}-caption" style="min-height:{block.plot.layout.height or 400}px"></div>'
        f'<figcaption id="{anchor}-caption">{escape(block.caption)} '
        f'<button type="button" class="download" data-figure="{anchor}">Download the data (CSV)</button></figcaption>'
        f"{json_script(f'{anchor}-data', content)}</figure>"
    )


@block_html.register
def _(block: Table, section: str) -> str:  # noqa: ARG001
    words = set(block.text_columns)

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=words' if column in words else ''}>{escape(text)}</{tag}>"
            for column, text in enumerate(row)
        )

    strong = block.strong or [False] * len(block.rows)
    body = "".join(
        f"<tr{' class=strong' if bold else ''}>{cells('td', row)}</tr>"
        for row, bold in zip(block.rows, strong, strict=True)
    )
    return (
        f'<figure class="table"><div class="scroll" tabindex="0" role="region" aria-label="{escape(block.caption)}"><table>'
        f"<thead><tr>{cells('th', block.columns)}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<figcaption>{escape(block.caption)}</figcaption></figure>"
    )


@block_html.register
def _(block: Prose, section: str) -> str:  # noqa: ARG001
    if block.listed:
        return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in block.lines)}</ul>"
    return "".join(f"<p>{escape(line)}</p>" for line in block.lines)


@block_html.register
def _(block: Heading, section: str) -> str:  # noqa: ARG001
    return f"<h3>{escape(block.text)}</h3>"


@block_html.register
def _(block: Verbatim, section: str) -> str:  # noqa: ARG001
    return f"<details><summary>{escape(block.title)}</summary><pre>{escape(block.text)}</pre></details>"


@block_html.register
def _(block: Embedded, section: str) -> str:  # noqa: ARG001
    data = base64.b64encode(block.data).decode()
    return (
        f'<div id="{block.id}" class="embedded">{escape(block.fallback)}</div>'
        f'<script type="application/octet-stream" id="{block.id}-data">{data}</script>'
    )


def _values(data: pd.DataFrame) -> dict[str, Any]:
    """Columns and rows, every number to its last digit (pandas's own JSON rounds), None for what is missing or has no bound."""
    bounded: Any = data.replace([math.inf, -math.inf], math.nan).astype(object)
    there: Any = bounded.where(bounded.notna(), None)
    rows = [
        [value.item() if isinstance(value, np.generic) else value for value in row] for row in there.to_numpy().tolist()
    ]
    return {"columns": [str(name) for name in data.columns], "data": rows}


def json_script(anchor: str, content: Any) -> str:
    """JSON inside a page: nothing in it can end the element."""
    text = (
        json.dumps(content, separators=(",", ":"), allow_nan=False).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    )
    return f'<script type="application/json" id="{anchor}">{text}</script>'
