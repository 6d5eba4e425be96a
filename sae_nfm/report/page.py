"""One self-contained HTML page of a run: plotly and every script inlined, nothing fetched, opens offline."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from plotly.offline import get_plotlyjs

from sae_nfm.report.blocks import Embedded, Section
from sae_nfm.report.chapters import Chapter, sections
from sae_nfm.report.frame import provenance, subtitle, summary, what_is_missing
from sae_nfm.report.html import section_html
from sae_nfm.report.run_folder import Run

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""Content security policy: the browser itself refuses anything that is not in the page."""


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
