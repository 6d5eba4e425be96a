"""Files of the repository outside docs/ in the site, and the words of links to pages.

Pages are written so that they read well as files too: a link to another one has its file name for text, and README.md is where it
is. In the site CONTRIBUTING.md is a page, such links lead to pages, and their text is the page's name in the navigation.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {"../README.md": "index.md", "../CHANGELOG.md": "changelog.md", "../CONTRIBUTING.md": "contributing.md"}
"""Where a link from docs/ to a file beside docs/ leads in the site."""
OUTSIDE = re.compile(r"(?<=\]\()\.\./[^)#\s]+")
NAMED_BY_FILE = re.compile(r"\[([\w/]+\.md)\](?=\((?:\.\./)?([\w/]+\.md)[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add CONTRIBUTING.md."""
    source = Path(config.config_file_path).parent / "CONTRIBUTING.md"
    text = re.sub(r"(?<=\]\()docs/", "", source.read_text(encoding="utf-8"))
    files.append(File.generated(config, "contributing.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Lead links out of docs/ to their pages, and name links by their page. Others stay, and are warned about."""
    titles = dict(named_pages(config.nav or []))
    markdown = NAMED_BY_FILE.sub(lambda found: f"[{titles.get(found[2], found[1])}]", markdown)
    if "/" in page.file.src_uri:
        return markdown
    return OUTSIDE.sub(lambda found: site_link(found[0]), markdown)


def site_link(target: str) -> str:
    """The page of a file beside docs/, or the target itself where it has none."""
    notebook = re.fullmatch(r"\.\./(tutorials/\w+)\.ipynb", target)
    return f"{notebook[1]}.md" if notebook else PAGES.get(target, target)


def named_pages(nav: list[Any]) -> Iterator[tuple[str, str]]:
    """(file, name) of every page that the navigation names."""
    for item in nav:
        for name, value in item.items() if isinstance(item, dict) else ():
            if isinstance(value, str):
                yield value, name
            else:
                yield from named_pages(value)
