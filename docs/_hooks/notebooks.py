"""The notebooks of tutorials/ as pages of the site, with the outputs they were saved with; nothing is executed.

nbconvert makes Markdown of them. A plotly figure stays its JSON in the page and is drawn by one local copy of plotly.js.
"""

import json
import re
from html import escape
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from plotly.offline import get_plotlyjs  # noqa: TID251  the script alone; nothing is drawn here

PLOTLY = "application/vnd.plotly.v1+json"
SCRIPTS = '\n\n<script src="../assets/plotly.min.js"></script>\n<script src="../assets/figures.js"></script>\n'
ANSI, REWRITTEN = re.compile(r"\x1b\[[0-9;]*m"), re.compile(r"[^\n]*\r(?!\n)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the section Tutorials, in the order of their numbers; without notebooks it goes."""
    pages = [f"tutorials/{path.stem}.md" for path in notebooks(config)]
    nav = [{"Tutorials": pages} if "Tutorials" in item else item for item in config.nav or []]
    config.nav = [item for item in nav if item != {"Tutorials": []}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, its images, and plotly.js where one has a figure."""
    figures = False
    for path in notebooks(config):
        text, images = page(nbformat.read(path, as_version=4), path.stem)
        figures |= SCRIPTS in text
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        for name, content in images.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    if figures:
        files.append(File.generated(config, "assets/plotly.min.js", content=get_plotlyjs()))
    return files


def notebooks(config: MkDocsConfig) -> list[Path]:
    """The notebooks that the site has."""
    found = (Path(config.config_file_path).parent / "tutorials").glob("*.ipynb")
    return sorted(found, key=lambda path: (len(path.stem.partition("_")[0]), path.stem))


def page(notebook: NotebookNode, stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the images that it shows, by name."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../docs/", "](../").replace("](../README.md", "](../index.md")
            cell.source = re.sub(r"(\]\([\w/]+)\.ipynb", r"\1.md", cell.source)
        elif cell.cell_type == "code":
            cell.outputs = [_shown(output) for output in cell.outputs]
    resources = {"unique_key": stem, "output_files_dir": stem}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources=resources)
    drawn = SCRIPTS if 'class="plotly-figure"' in text else ""
    return text + drawn, resources.get("outputs", {})


def _shown(output: NotebookNode) -> NotebookNode:
    """An output as the HTML that the page has for it; images are left to nbconvert."""
    data = output.get("data", {})
    if PLOTLY in data:
        figure = json.dumps({key: data[PLOTLY][key] for key in ("data", "layout")}).replace("</", "<\\/")
        height = data[PLOTLY]["layout"].get("height", 420)  # kept free until the figure is drawn
        json_of_figure = f'<script type="application/json">{figure}</script>'
        html = f'<div class="plotly-figure" style="min-height: {height}px">{json_of_figure}</div>'
    elif "text/html" in data:
        # without indentation and empty lines, which Markdown would take for code and for the end of the HTML
        lines = [line.strip() for line in data["text/html"].splitlines() if line.strip()]
        html = "\n".join(['<div class="output-html">', *lines, "</div>"])
    elif "image/png" in data or "image/svg+xml" in data:
        return output
    else:
        text = output.get("text", data.get("text/plain", "\n".join(output.get("traceback", []))))
        text = escape(REWRITTEN.sub("", ANSI.sub("", text)).rstrip("\n"))
        html = f'<div class="output-text"><pre>{text}</pre></div>'
    return nbformat.v4.new_output("display_data", data={"text/html": html})
