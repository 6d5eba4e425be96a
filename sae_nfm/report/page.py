"""One self-contained HTML page of a run: plotly and every script inlined, nothing fetched, opens offline.

Every text is escaped; every figure carries its plot and its data as JSON, drawn by assets/page.js.
"""

import base64
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape as escape_markup
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
import plotly.io as pio
from plotly.offline import get_plotlyjs

from sae_nfm.common import final_path
from sae_nfm.common.file_errors import printable
from sae_nfm.evaluation.results import Evaluation
from sae_nfm.report.blocks import Block, Embedded, Figure, Heading, Prose, Section, Table, Verbatim
from sae_nfm.report.chapters import Chapter, commands_for, sections
from sae_nfm.report.run_folder import Found, Run

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""Content security policy: the browser itself refuses anything that is not in the page."""
NO_VERDICT = "Nothing here compares anything: what there is stands below."


def escape(text: str) -> str:
    """Text for HTML: neither markup, nor characters that cannot be seen or turn the direction of reading."""
    return escape_markup(printable(text, keep="\n\t"))


def render_run(run: Run) -> str:
    """The page of a run as one string."""
    there, missing, run = sections(run)
    return page(run, there, missing)


def page(run: Run, there: Sequence[Section], missing: Sequence[Chapter]) -> str:
    """The page of a run whose sections are made, with what stands before and after them."""
    left_out = [what_is_left_out(run)] if run.left_out else []
    after = [*left_out, *([what_is_missing(missing, run)] if missing else []), provenance(run)]
    title = f"{final_path(run.folder).resolve().name}: how features interact"
    return render(title, subtitle(run), [summary(run, there), *there, *after])


def render(title: str, about: str, content: Sequence[Section]) -> str:
    """Sections as a page."""
    embedded = [block.id for section in content for block in section.blocks if isinstance(block, Embedded)]
    links = "".join(f'<li><a href="#{section.id}">{escape(section.title)}</a></li>' for section in content)
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{''.join(_assets('.css', embedded))}</style></head><body>",
            '<a class="skip" href="#content">To the content</a>',
            f'<header><h1>{escape(title)}</h1><p class="about">{escape(about)}</p></header>',
            f'<nav aria-label="Sections"><details open><summary>Sections</summary><ol>{links}</ol></details></nav>',
            '<main id="content" tabindex="-1"><noscript>Figures and the explorer need JavaScript; nothing is fetched.</noscript>',
            *(section_html(section) for section in content),
            f"</main><script>{get_plotlyjs()}</script>",
            *(f"<script>{script}</script>" for script in _assets(".js", embedded)),
            "</body></html>",
        ]
    )


def _assets(suffix: str, embedded: Sequence[str]) -> list[str]:
    """The page's own file, and those of what is embedded: <id>.js and its parts, <id>_<part>.js."""
    folder = files("sae_nfm.report") / "assets"
    found = sorted((file for file in folder.iterdir() if file.name.endswith(suffix)), key=lambda file: file.name)
    return [
        file.read_text(encoding="utf-8")
        for name in ("page", *embedded)
        for file in found
        if file.name.removesuffix(suffix).split("_")[0] == name
    ]


def summary(run: Run, there: Sequence[Section]) -> Section:
    """What the other sections found, in words."""
    told = [section for section in there if section.verdicts]
    blocks = [
        block for section in told for block in (Heading(text=section.title), Prose(lines=section.verdicts, listed=True))
    ]
    about = subtitle(run)
    what = f"Sparse autoencoders at {about}." if about else "Sparse autoencoders."
    return Section(
        id="summary",
        title="Summary",
        lead=f"{what} What was found, in words; losses and null results are said as plainly as wins.",
        blocks=blocks or [Prose(lines=[NO_VERDICT])],
    )


def what_is_left_out(run: Run) -> Section:
    """Files that could not be read or drawn, and what is unfinished, each with the reason."""
    return Section(
        id="left-out",
        title="What was left out",
        lead="These are in the folder, and nothing on this page is from them.",
        blocks=[Table(columns=("file or folder", "why"), rows=run.left_out, caption="", text_columns=(0, 1))],
    )


def what_is_missing(missing: Sequence[Chapter], run: Run) -> Section:
    """Chapters without a result, each with the command that makes one."""
    rows = [(chapter.TITLE, " or ".join(commands_for(chapter, run))) for chapter in missing]
    columns = ("chapter", "command")
    return Section(
        id="missing",
        title="What is missing",
        lead="These chapters have no result in this folder. Each command writes one; run `sae-nfm report RUN` again afterwards.",
        blocks=[Table(columns=columns, rows=rows, caption="RUN is this folder.", text_columns=(0, 1))],
    )


def provenance(run: Run) -> Section:
    """Where each result comes from and how to repeat it."""
    return Section(
        id="provenance",
        title="How to repeat it",
        lead="Configuration, seeds, versions and digests of every result above, and the command that makes it again.",
        blocks=list(_origins(run)) or [Prose(lines=["No result here says how it was made."])],
    )


def _origins(run: Run) -> Iterator[Block]:
    for found in run.results:
        origin = _provenance(found)
        if origin:
            command = origin.get("command")
            told = {key: value for key, value in origin.items() if key != "command"}
            yield Heading(text=run.label(found.path))
            yield Prose(lines=[f"$ {command}" if command else "Made from Python; the configuration is below."])
            yield Verbatim(title="Configuration, versions, digests", text=json.dumps(told, indent=1, default=str))


def _provenance(found: Found[Any]) -> dict[str, Any]:
    return getattr(found.result, "provenance", {})


def subtitle(run: Run) -> str:
    """Models and hook points that the results are about."""
    places: list[str] = []
    for found in run.results:
        if isinstance(found.result, Evaluation):
            places.append(f"{found.result.hook_name} of {found.result.model_name}")
        config = _provenance(found).get("config")
        if isinstance(config, dict):
            hook, model = (config.get(name) or config.get(f"{name}_name") for name in ("hook", "model"))  # 0.1's last
            if hook and model:
                places.append(f"{hook} of {model}")
    return "; ".join(dict.fromkeys(places))


def section_html(section: Section) -> str:
    """A section with its heading and blocks."""
    return (
        f'<section id="{section.id}" aria-labelledby="{section.id}-title"><h2 id="{section.id}-title">'
        f"{escape(section.title)}</h2>"
        f'<p class="lead">{escape(section.lead)}</p>{"".join(_block(one, section.id) for one in section.blocks)}</section>'
    )


def _block(block: Block, section: str) -> str:
    match block:
        case Figure():
            return _figure(block, re.sub(r"[^\w.-]+", "-", f"{section}-{block.name}"))
        case Table():
            return _table(block)
        case Prose(lines=lines, listed=True):
            return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in lines)}</ul>"
        case Prose(lines=lines):
            return "".join(f"<p>{escape(text)}</p>" for text in lines)
        case Heading(text=text):
            return f"<h3>{escape(text)}</h3>"
        case Verbatim(title=title, text=text):
            return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
        case Embedded():
            data = base64.b64encode(block.data).decode()
            return (
                f'<div id="{block.id}" class="embedded">{escape(block.fallback)}</div>'
                f'<script type="application/octet-stream" id="{block.id}-data">{data}</script>'
            )


def _figure(block: Figure, anchor: str) -> str:
    plot = _without_markup(json.loads(pio.to_json(block.plot, validate=False) or "{}"))
    content = {"plot": plot, "data": _values(block.data)}
    return (
        f'<figure id="{anchor}"><h3>{escape(block.title)}</h3>'
        f'<div class="figure" id="{anchor}-plot" role="img" aria-label="{escape(block.title)}" '
        f'aria-describedby="{anchor}-caption" style="min-height:{block.plot.layout.height or 400}px"></div>'
        f'<figcaption id="{anchor}-caption">{escape(block.caption)} '
        f'<button type="button" class="download" data-figure="{anchor}">Download the data (CSV)</button></figcaption>'
        f"{json_script(f'{anchor}-data', content)}</figure>"
    )


def _table(block: Table) -> str:
    def cells(tag: str, row: Iterable[str]) -> str:
        return "".join(
            f"<{tag}{' class=words' if column in block.text_columns else ''}>{escape(text)}</{tag}>"
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


PLOT_MARKUP = re.compile(r"<(?!/?(?:b|i|br|sub|sup|extra)>)")


def _without_markup(plot: Any) -> Any:
    """A plot's JSON whose texts have no markup but plotly's own, which is ours: no name in a file becomes a link."""
    if isinstance(plot, str):
        return PLOT_MARKUP.sub("&lt;", printable(plot, keep="\n\t"))
    if isinstance(plot, dict):
        return {name: _without_markup(value) for name, value in plot.items()}
    return [_without_markup(value) for value in plot] if isinstance(plot, list) else plot


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
