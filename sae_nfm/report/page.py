"""One self-contained HTML page of a run: plotly and every script inlined, nothing fetched, opens offline."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from sae_nfm.report.blocks import Block, Embedded, Heading, Prose, Section, Table, Verbatim
from sae_nfm.report.chapters import Chapter, sections
from sae_nfm.report.html import section_html
from sae_nfm.report.run_folder import Found, Run

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""Content security policy: the browser itself refuses anything that is not in the page."""
NO_VERDICT = "Nothing here compares anything: what there is stands below."


def render_run(run: Run) -> str:
    """The page of a run as one string."""
    return page(run, *sections(run))


def page(run: Run, there: Sequence[Section], missing: Sequence[Chapter]) -> str:
    """The page of a run whose sections are made, with what stands before and after them."""
    after = [*([what_is_missing(missing)] if missing else []), provenance(run)]
    return render(
        f"{run.folder.resolve().name}: how features interact", subtitle(run), [summary(run, there), *there, *after]
    )


def render(title: str, about: str, content: Sequence[Section]) -> str:
    """Sections as a page."""
    embedded = [block.id for section in content for block in section.blocks if isinstance(block, Embedded)]
    scripts, styles = _assets(".js", embedded), _assets(".css", embedded)
    links = "".join(f'<li><a href="#{section.id}">{escape(section.title)}</a></li>' for section in content)
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{''.join(styles)}</style></head><body>",
            '<a class="skip" href="#content">To the content</a>',
            f'<header><h1>{escape(title)}</h1><p class="about">{escape(about)}</p></header>',
            f'<nav aria-label="Sections"><details open><summary>Sections</summary><ol>{links}</ol></details></nav>',
            '<main id="content" tabindex="-1"><noscript>Figures and the explorer need JavaScript; nothing is fetched.</noscript>',
            *(section_html(section) for section in content),
            f"</main><script>{get_plotlyjs()}</script>",
            *(f"<script>{script}</script>" for script in scripts),
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
    blocks: list[Block] = []
    for section in there:
        if section.verdicts:
            blocks += [Heading(text=section.title), Prose(lines=section.verdicts, listed=True)]
    return Section(
        id="summary",
        title="Summary",
        lead=f"{_what(run)} What was found, in words; losses and null results are said as plainly as wins.",
        blocks=blocks or [Prose(lines=[NO_VERDICT])],
    )


def what_is_missing(missing: Sequence[Chapter]) -> Section:
    """Chapters without a result, each with the command that makes one."""
    rows = [(chapter.TITLE, " or ".join(chapter.COMMANDS)) for chapter in missing]
    return Section(
        id="missing",
        title="What is missing",
        lead="These chapters have no result in this folder. Each command writes one; run `sae-nfm report RUN` again afterwards.",
        blocks=[
            Table(columns=("chapter", "command"), rows=rows, caption="RUN is this folder.", text_columns=(0, 1)),
        ],
    )


def provenance(run: Run) -> Section:
    """Where each result comes from and how to repeat it."""
    blocks = [block for found in run.results for block in _origin(run, found)]
    return Section(
        id="provenance",
        title="How to repeat it",
        lead="Configuration, seeds, versions and digests of every result above, and the command that makes it again.",
        blocks=blocks or [Prose(lines=["No result here says how it was made."])],
    )


def subtitle(run: Run) -> str:
    """Models and hook points that the results are about."""
    places: list[str] = []
    for found in run.results:
        config = _config(found)
        hook, model = (
            config.get(name) or config.get(f"{name}_name") for name in ("hook", "model")
        )  # those of 0.1 last
        if hook and model:
            places.append(f"{hook} of {model}")
    return "; ".join(dict.fromkeys(places))


def _what(run: Run) -> str:
    about = subtitle(run)
    return f"Sparse autoencoders at {about}." if about else "Sparse autoencoders."


def _origin(run: Run, found: Found[Any]) -> list[Block]:
    origin: dict[str, Any] = getattr(found.result, "provenance", {})
    if not origin:
        return []
    command = origin.get("command")
    told = {key: value for key, value in origin.items() if key != "command"}
    repeat = f"$ {command}" if command else "Made from Python; the configuration is below."
    return [
        Heading(text=run.label(found.path)),
        Prose(lines=[repeat]),
        Verbatim(title="Configuration, versions, digests", text=json.dumps(told, indent=1, default=str)),
    ]


def _config(found: Found[Any]) -> dict[str, Any]:
    config = getattr(found.result, "provenance", {}).get("config")
    return config if isinstance(config, dict) else {}
