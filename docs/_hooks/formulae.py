"""TeX in the pages becomes MathML when the site is built: browsers draw it themselves, without a script or a font of ours."""

import logging
import re
from html import unescape
from typing import Any, Literal

from latex2mathml.converter import convert
from mkdocs.structure.pages import Page

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
LEFT_OVER = re.compile(r">[^<]*(?:\\|&amp;)[^<]*<")
"""TeX that latex2mathml does not know, which it passes on as text."""
BETTER = {r"\operatorname": r"\mathrm"} | {
    rf"\{size}{side}": "" for size in ("big", "Big", "bigg", "Bigg") for side in "lr"
}
"""Commands whose MathML browsers set badly: operators with a space before their argument, and brackets of a fixed size."""
log = logging.getLogger("mkdocs.hooks.formulae")


def on_page_content(html: str, *, page: Page, **_: Any) -> str:
    """Replace what pymdownx.arithmatex has marked."""
    html = BLOCK.sub(lambda found: f'<div class="formula">{mathml(found[1], "block", page)}</div>', html)
    return INLINE.sub(lambda found: mathml(found[1], "inline", page), html)


def mathml(tex: str, display: Literal["inline", "block"], page: Page) -> str:
    """One formula."""
    known = re.sub(r"\\[a-zA-Z]+", lambda found: BETTER.get(found[0], found[0]), unescape(tex).strip())
    made = convert(known, display=display)
    if left := LEFT_OVER.search(made):
        log.warning("%s: %s in the formula %s is not understood", page.file.src_uri, left[0][1:-1], tex.strip())
    return made
