"""The page around the sections: what a folder holds, HTML of every block, summary, provenance, what is missing."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
from invented_comparison import ONCE, compared_once

from sae_nfm.common.results import as_result
from sae_nfm.comparison.results import CompareResult
from sae_nfm.report.blocks import Embedded, Figure, Heading, Prose, Section, Table, Verbatim, section_of
from sae_nfm.report.chapters import ORDER, chapters
from sae_nfm.report.command import ReportConfig, write_run_report
from sae_nfm.report.page import render
from sae_nfm.report.plots import styled, wrapped
from sae_nfm.report.run_folder import Found, Run, read_run

HOSTILE = '</script><script>alert(1)</script><b title="x">'


class Page(HTMLParser):
    """Ids, tags with attributes, and the text of every script element of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self._script: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if given.get("id"):
            self.ids.append(str(given["id"]))
        self._script = given.get("id") if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._script = None


def figure(**changes: Any) -> Figure:
    plot = styled(go.Figure(go.Scatter(x=[1, 2], y=[0.5, None], name=HOSTILE)), height=321)
    data = pd.DataFrame({"x": [1, 2], "y": [0.1 + 0.2, None], "high": [float("inf"), 1], "who": [HOSTILE, "b"]})
    return Figure(**({"name": "f", "title": "T", "plot": plot, "caption": "Cap", "data": data} | changes))


def section(*blocks: Any, **changes: Any) -> Section:
    return Section(**({"id": "s", "title": "S", "lead": "L", "blocks": blocks} | changes))


def saved(tmp_path: Path, name: str = "run", **changes: Any) -> Path:
    benchmark = replace(compared_once(), **changes) if changes else compared_once()
    benchmark.save(tmp_path / name / "results.json")
    return tmp_path / name


def test_a_figure_carries_its_plot_and_its_data_to_the_last_digit():
    page = Page(render("t", "a", [section(figure())]))
    content = json.loads(page.scripts["s-f-data"])
    assert content["data"] == {
        "columns": ["x", "y", "high", "who"],
        "data": [[1, 0.1 + 0.2, None, HOSTILE], [2, None, 1.0, "b"]],
    }
    assert content["plot"]["data"][0]["name"] == HOSTILE.replace("<", "&lt;")  # plotly makes links of what is left
    assert content["plot"]["layout"]["height"] == 321
    assert {"s-f", "s-f-plot", "s-f-caption", "s-f-data"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_no_text_becomes_markup():
    blocks = (
        figure(title=HOSTILE, caption=HOSTILE),
        Table(columns=(HOSTILE,), rows=[(HOSTILE,)], caption=HOSTILE),
        Prose(lines=[HOSTILE]),
        Prose(lines=[HOSTILE], listed=True),
        Heading(text=HOSTILE),
        Verbatim(title=HOSTILE, text=HOSTILE),
    )
    page = Page(render(HOSTILE, HOSTILE, [section(*blocks, title=HOSTILE, lead=HOSTILE)]))
    assert "b" not in [tag for tag, _ in page.tags]
    # plotly, page.js, and the figure's JSON
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 3


def test_a_page_asks_the_network_for_nothing():
    page = Page(render("t", "a", [section(figure())]))
    assert not [given for _, given in page.tags if given.get("src") or (given.get("href") or "#")[0] != "#"]
    assert ("meta", "default-src 'none'") in [(t, (g.get("content") or "").split(";")[0]) for t, g in page.tags]


def test_tables_mark_words_and_strong_rows():
    html = render(
        "t", "a", [section(Table(columns=("a", "b"), rows=[("x", "1"), ("y", "2")], caption="c", strong=[1, 0]))]
    )
    assert "<tr class=strong><td class=words>x</td><td>1</td></tr><tr><td class=words>y</td><td>2</td></tr>" in html


def test_embedded_bytes_bring_their_script():
    html = render("t", "a", [section(Embedded(id="explorer", data=b"\x00\xff", fallback="wait"))])
    assert Page(html).scripts["explorer-data"] == "AP8="
    assert 'getElementById("explorer")' in html
    assert 'getElementById("explorer")' not in render("t", "a", [section()])


def test_a_run_is_found_by_what_is_in_its_files(tmp_path):
    run = saved(tmp_path)
    saved(run, "inner", rows=ONCE[:1])
    (run / "other.json").write_text('{"rows": [], "comparisons": 1, "provenance": {}}')
    (run / "a.json").write_text("[1]")
    (run / "training.jsonl").write_text("")
    found = read_run(run)
    assert [(one.label, one.path.name, len(one.result.rows)) for one in found.of(CompareResult)] == [
        ("inner", "results.json", 1),
        (".", "results.json", len(ONCE)),
    ]
    assert found.results[1].result == compared_once()
    assert found.records == (run / "training.jsonl",)
    assert found.saes == found.measurements == found.explorers == ()


def test_a_result_is_of_one_class_only():
    content = json.loads(json.dumps({"kind": "compare/1", "rows": [], "changes": [], "provenance": {}}))
    assert as_result(CompareResult, content).rows == ()
    with pytest.raises(ValueError, match="provenance"):
        as_result(CompareResult, content | {"provenance": 1})
    with pytest.raises(ValueError, match="comparisons"):
        as_result(CompareResult, {"rows": [], "comparisons": 1, "provenance": {}})  # nor one of 0.1.0


def test_folders_without_results_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\bfolder\b.*nowhere'"):
        read_run(tmp_path / "nowhere")
    cfg = ReportConfig(run=str(tmp_path))
    with pytest.raises(ValueError, match=r"nothing to report.*\bresult\b.*\brecord\b.*\bSAE\b.*\bexplorer\b"):
        write_run_report(cfg)
    (tmp_path / "results.json").write_text("{")
    (tmp_path / "training.jsonl").write_text("{")
    (tmp_path / "explorer.json.gz").write_text("{")
    with pytest.raises(
        ValueError, match=r"nothing to report.*; results\.json is left out: .*; training\.jsonl .*; explorer"
    ):
        write_run_report(cfg)
    (tmp_path / "x.partial").mkdir()
    saved(tmp_path / "x.partial")
    with pytest.raises(ValueError, match=r"x\.partial/run' is the folder of an unfinished run"):
        read_run(tmp_path / "x.partial" / "run")
    assert sorted(path.name for path in tmp_path.rglob("*.html")) == []


LEFT_OUT = {
    "foreign.json": (b"{'a': 1}", "property name"),
    "latin.json": (b'{"a": "\xff\xfe"}', "utf-8"),
    "deep.json": (b"[" * 200_000, "recursion"),
    "cut/results.json": (b'{"kind": "compare/1", "rows": [', "Expecting value"),
    "newer.json": (
        b'{"kind": "compare/2", "provenance": {"versions": {"sae-nfm": "9.9"}}}',
        r"its kind is 'compare/2', written by sae-nfm 9.9, this version of sae-nfm, \d.*, reads 'compare/1'",
    ),
    "odd.json": (b'{"kind": ["compare/1"]}', "unhashable|kind"),
    "number.json": (b'{"kind": "speed/1", "rows": 1e999}', "arms|rows|valid|unknown"),
    "training.jsonl": (b'{"sae": "a", "tokens": 1}\n{"sae"', "training record"),
    "old/training.jsonl": (b"[1]\n", "training record|list"),
    "explorer.json.gz": (b"\x1f\x8b\x08\x00", "damaged"),
    "manifest.json": (b"{", "property name"),
    "sae/cfg.json": (b"\x00", "Expecting value"),
}


def test_what_cannot_be_read_is_left_out_and_named(tmp_path):
    """Every kind of file, each damaged or of somebody else: the page shows the others, and says which and why."""
    run = saved(tmp_path)
    before = write_run_report(ReportConfig(run=str(run)))
    for name, (content, _) in LEFT_OUT.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    (run / "sae" / "sae_weights.safetensors").write_bytes(b"")
    saved(run / "killed.partial")
    (run / "mine.txt").write_bytes(b"\xff")
    written = write_run_report(ReportConfig(run=str(run)))
    assert written.sections == before.sections
    reasons = dict(written.left_out)
    assert reasons.keys() == {*LEFT_OUT, "killed.partial"}
    for name, (_, reason) in LEFT_OUT.items():
        assert re.search(reason, reasons[name]), (name, reasons[name])
    html = written.path.read_text(encoding="utf-8")
    assert "What was left out" in html
    assert "newer.json" in html
    assert "newer.json" in written.words()
    assert len(read_run(run).of(CompareResult)) == 1  # not that of killed.partial


def test_what_cannot_be_drawn_is_left_out_and_named(tmp_path, monkeypatch):
    """A result whose fields are right and whose numbers no chapter can draw."""
    run = saved(tmp_path)
    saved(run, "odd", rows=())
    fidelity = import_module("sae_nfm.report.chapters.fidelity")
    drawn = fidelity.section

    def section(run: Run) -> Section | None:
        if any(not found.result.rows for found in run.of(CompareResult)):
            raise ZeroDivisionError("no rows")
        return drawn(run)

    monkeypatch.setattr(fidelity, "section", section)
    written = write_run_report(ReportConfig(run=str(run)))
    assert fidelity.TITLE in written.sections
    assert written.left_out == (("odd/results.json", "cannot be drawn (ZeroDivisionError: no rows)"),)


def test_names_in_files_do_not_become_ids(tmp_path):
    page = Page(render("t", "a", [section(figure(name='f"><script>alert(1)</script>'))]))
    assert [name for name in page.ids if not re.fullmatch(r"[\w.-]+", name)] == []


def test_the_page_of_a_run_has_its_verdicts_its_command_and_what_is_missing(tmp_path):
    run = saved(tmp_path, provenance=compared_once().provenance | {"command": "sae-nfm demo --seed 7"})
    written = write_run_report(ReportConfig(run=str(run), save=str(tmp_path / "page.html")))
    html = written.path.read_text()
    assert "FVU +25.0%, KL -20.0% (mixed)" in html
    assert "$ sae-nfm demo --seed 7" in html
    assert "sae-nfm factorial" in html
    titles = [chapter.TITLE for chapter in chapters()]
    assert len(titles) == len(set(titles)) == len(ORDER)
    assert set(written.sections) | {title for title, _ in written.missing} == set(titles)
    assert written.size == len(html.encode())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "page.html.sha256", "run"]
    anchors = re.findall(r'<li><a href="#([^"]+)">', html)
    assert set(anchors) <= set(Page(html).ids)
    assert anchors[0] == "summary"


def test_two_pages_of_one_run_are_equal_bytes(tmp_path):
    run = saved(tmp_path)
    pages = [
        write_run_report(ReportConfig(run=str(run), save=str(tmp_path / name))).path.read_bytes() for name in ("a", "b")
    ]
    assert pages[0] == pages[1]


def test_labels_are_wrapped():
    assert wrapped("all paths against the direct path", 14) == "all paths<br>against the<br>direct path"


def test_several_results_of_a_kind_are_told_apart(tmp_path):
    results = [Found(result=name, path=tmp_path, label=f"in {name}") for name in ("a", "b")]

    def section_with(found: list[Found[str]]) -> Section | None:
        return section_of(
            found,
            id="s",
            title="S",
            lead="L",
            blocks=lambda result, number: [Prose(lines=[f"{number} {result}"])],
            findings=lambda result: [f"found {result}"],
        )

    assert section_with([]) is None
    one, both = section_with(results[:1]), section_with(results)
    assert one is not None
    assert both is not None
    assert (one.blocks, one.verdicts) == ([Prose(lines=["0 a"])], ["found a"])
    assert both.blocks == [Heading(text="in a"), Prose(lines=["0 a"]), Heading(text="in b"), Prose(lines=["1 b"])]
    assert both.verdicts == ["in a: found a", "in b: found b"]
