"""The documentation site: every page is in it, every reference resolves, and nothing is loaded from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
GENERATED = {"contributing.md"}
LINK = re.compile(r"\]\(([^)\s]+)\)")


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "_hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named_files(nav: list) -> list[str]:
    found = []
    for item in nav:
        values = list(item.values()) if isinstance(item, dict) else [item]
        for value in values:
            found += named_files(value) if isinstance(value, list) else [value]
    return found


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading).strip("-") for heading in plain}


def test_the_navigation_has_every_page_once():
    in_nav = named_files(CONFIG["nav"])
    assert len(in_nav) == len(set(in_nav))
    assert set(in_nav) - GENERATED == {path.relative_to(DOCS).as_posix() for path in PAGES}


def test_every_page_says_something():
    short = [path.name for path in PAGES if len(path.read_text().split()) < 20]
    assert short == ["changelog.md"]  # which includes CHANGELOG.md


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in LINK.findall(text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or file.suffix != ".md" or anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", sorted(DOCS.glob("api/*.md")), ids=lambda path: path.stem)
def test_every_documented_name_is_there(page):
    entries = re.findall(r"^::: (\S+)\n +options:\n +members: \[(.*)\]$", page.read_text(), re.MULTILINE)
    assert len(entries) == page.read_text().count("\n::: ")
    for module, members in entries:
        found = import_module(module)
        for name in members.split(", "):
            assert hasattr(found, name), f"{module} has no {name}"
            described = getattr(found, name).__doc__
            assert described or name == name.upper(), f"{module}.{name} has no docstring"


def test_nothing_is_loaded_from_elsewhere():
    assert CONFIG["theme"]["font"] is False
    assert "offline" in CONFIG["plugins"]
    (python,) = (plugin["mkdocstrings"] for plugin in CONFIG["plugins"] if isinstance(plugin, dict))
    assert python["handlers"]["python"]["inventories"] == []
    scripts = [*CONFIG["extra"]["polyfills"], *CONFIG["extra_css"], *CONFIG.get("extra_javascript", [])]
    assert all((DOCS / script).is_file() for script in scripts)
    # material's offline plugin takes the shim that is named so, in place of one on a CDN
    assert any("iframe-worker" in script for script in CONFIG["extra"]["polyfills"])


def test_a_notebook_becomes_a_page():
    cell = nbformat.v4.new_code_cell("figure")
    figure = {"data": [{"y": [1, 2], "name": "</script>"}], "layout": {"height": 300}, "config": {}}
    cell.outputs = [
        nbformat.v4.new_output("stream", text="10%\r100%\n\x1b[31ma < b\x1b[0m\n"),
        nbformat.v4.new_output("display_data", data={"application/vnd.plotly.v1+json": figure, "text/html": "a CDN"}),
        nbformat.v4.new_output("display_data", data={"image/png": "iVBORw0KGgo="}),
        nbformat.v4.new_output(
            "execute_result", data={"text/html": "<table>\n    <tr>\n\n</table>", "text/plain": "no"}
        ),
    ]
    link = nbformat.v4.new_markdown_cell("[a](../docs/concepts.md#gauge) [b](2_next.ipynb)")
    text, images = hook("notebooks").page(nbformat.v4.new_notebook(cells=[link, cell]), "1_train")
    assert "[a](../concepts.md#gauge) [b](2_next.md)" in text
    assert "<pre>100%\na &lt; b</pre>" in text
    assert '"name": "<\\/script>"' in text
    assert "a CDN" not in text
    assert '<div class="output-html">\n<table>\n<tr>\n</table>\n</div>' in text
    assert len(images) == 1
    assert next(iter(images)) in text
    assert text.count("plotly.min.js") == 1


def test_links_out_of_docs_lead_to_pages():
    repository_files = hook("repository_files")
    assert repository_files.site_link("../README.md") == "index.md"
    assert repository_files.site_link("../tutorials/1_train.ipynb") == "tutorials/1_train.md"
    assert (
        repository_files.site_link("../sae_nfm/cli/main.py") == "../sae_nfm/cli/main.py"
    )  # and the strict build refuses it
    nav = [{"A": [{"Results": "results.md"}, "b.md"]}]
    assert list(repository_files.named_pages(nav)) == [("results.md", "Results")]


def test_formulae_become_mathml(caplog):
    formulae, page = hook("formulae"), type("Page", (), {"file": type("File", (), {"src_uri": "a.md"})})
    made = formulae.on_page_content('<p><span class="arithmatex">\\(f_i &lt; 1\\)</span></p>', page=page)
    assert made.startswith("<p><math ")
    assert "<msub><mi>f</mi><mi>i</mi></msub><mo>&#x0003C;</mo><mn>1</mn>" in made
    assert not caplog.records
    formulae.on_page_content('<div class="arithmatex">\\[\\nosuchcommand x\\]</div>', page=page)
    assert "is not understood" in caplog.text


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://0.0.0.0:9",
        "https_proxy": "http://0.0.0.0:9",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert not re.search(r'<(?:script|img|iframe)[^>]*\bsrc="(?:https?:)?//', text), page.name
        assert not re.search(r'<link[^>]*rel="(?:stylesheet|preconnect|preload)"[^>]*href="(?:https?:)?//', text), (
            page.name
        )
    assert "<math" in (tmp_path / "concepts.html").read_text()
    assert "JointNFMTrainingSAEConfig" in (tmp_path / "api" / "training.html").read_text()


@pytest.mark.slow
def test_the_table_of_splicing_is_what_its_code_prints(capsys):
    """Each way of splicing does what the page says, to the printed digits: the packaged SAE, on the CPU."""
    page = (DOCS / "splicing.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "splicing.md", "exec"), {})
    said = re.findall(r"^    ((?:model|Splice).*?)  +([\d.]+) +([\d.]+)$", page, re.MULTILINE)
    found = re.findall(r"^((?:model|Splice).*?)  +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, *_ in found] == [name for name, *_ in said]
    assert len(said) == 6
    for (_, *numbers), (_, *expected) in zip(found, said, strict=True):
        assert [*map(float, numbers)] == pytest.approx([*map(float, expected)], abs=2e-3)  # float32 on another machine
