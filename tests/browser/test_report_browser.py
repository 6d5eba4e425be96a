"""A report in a real browser: it draws, links, downloads and fits, offline, on a desktop and on a phone."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from browser import DESKTOP, PHONE, no_sideways_scroll, watched
from invented_comparison import compared_once
from invented_explorer import content, packed
from playwright.sync_api import Locator, Page, expect

from sae_nfm.report.blocks import Figure, Section
from sae_nfm.report.page import render, render_run
from sae_nfm.report.plots import styled
from sae_nfm.report.run_folder import EXPLORER_FILENAME, RECORD_FILENAME, read_run

pytest_plugins = ["browser"]
MEGABYTES = 10
TABS = 12


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Of a benchmark, its training and an explorer, all invented; and of a figure whose data are hard to write as CSV."""
    run = tmp_path_factory.mktemp("run")
    compared_once().save(run / "demo" / "results.json")
    (run / EXPLORER_FILENAME).write_bytes(packed(content()))
    lines = [
        {"sae": sae, "tokens": 100 * step, "metrics/explained_variance": 0.5 + 0.1 * step, "metrics/fvu_direct": 0.4}
        for sae in ("joint", "topk", "matched")
        for step in range(1, 5)
    ]
    (run / "demo" / RECORD_FILENAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = run / "report.html"
    path.write_text(render_run(read_run(run)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def desktop(chromium, report) -> Iterator[Page]:
    with watched(chromium, report.as_uri(), size=DESKTOP) as page:
        yield page


def drawn(page: Page) -> list[Locator]:
    """All figures, each scrolled to and drawn."""
    figures = page.locator("div.figure").all()
    for figure in figures:
        figure.scroll_into_view_if_needed()
        expect(figure).to_have_attribute("data-ready", "true")
    return figures


def test_every_figure_has_data(desktop):
    figures = drawn(desktop)
    assert len(figures) >= 2
    for figure in figures:
        marks = figure.evaluate("""(div) => div.data.map((trace) => Math.max(
            ...["x", "y", "z", "values", "lat"].map((axis) => (trace[axis] && trace[axis].length) || 0)))""")
        assert marks, "no trace"
        assert all(marks), f"an empty trace: {marks}"
        assert figure.locator("svg.main-svg").first.is_visible()


def test_links_lead_to_what_is_there(desktop):
    hrefs = desktop.locator("a[href^='#']").evaluate_all("(links) => links.map((a) => a.getAttribute('href'))")
    sections = desktop.locator("main > section").evaluate_all("(found) => found.map((section) => '#' + section.id)")
    menu = desktop.locator("nav a").evaluate_all("(links) => links.map((a) => a.getAttribute('href'))")
    assert menu == sections
    own = {href for href in hrefs if not href.startswith(("#feature=", "#pair="))}
    assert [href for href in own if desktop.locator(f"[id='{href[1:]}']").count() != 1] == []
    ids = desktop.locator("[id]").evaluate_all("(found) => found.map((element) => element.id)")
    assert len(ids) == len(set(ids))


def test_a_link_of_the_menu_scrolls_to_its_section(desktop):
    link = desktop.locator("nav a").last
    link.click()
    section = desktop.locator(f"[id='{link.get_attribute('href')[1:]}']")
    expect(section).to_be_in_viewport()


def test_downloads_have_the_numbers_drawn(desktop):
    for figure in desktop.locator("figure:has(div.figure)").all():
        with desktop.expect_download() as download:
            figure.locator("button.download").click()
        assert download.value.suggested_filename == f"{figure.get_attribute('id')}.csv"
        rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"), newline="")))
        table = json.loads(figure.locator("script").text_content())["data"]
        assert rows[0] == table["columns"]
        assert [[as_told(cell) for cell in row] for row in rows[1:]] == [
            [as_told(cell) for cell in row] for row in table["data"]
        ]


def as_told(cell: object) -> float | str:
    """A cell as a number where it is one: 1e-05 and 0.00001 are the same."""
    if cell is None or isinstance(cell, bool):
        return "" if cell is None else str(cell).lower()
    try:
        return float(str(cell))
    except ValueError:
        return str(cell)


def test_a_download_to_the_byte(chromium, tmp_path):
    data = pd.DataFrame({"arm": ['a "b", c', "two\nlines"], "kl_nats": [0.1 + 0.2, None]})
    plot = styled(go.Figure(go.Scatter(x=[1, 2], y=[1, 2])), height=300)
    figure = Figure(name="f", title="T", plot=plot, caption="C", data=data)
    path = tmp_path / "page.html"
    path.write_text(render("t", "a", [Section(id="s", title="S", lead="L", blocks=[figure])]), encoding="utf-8")
    with watched(chromium, path.as_uri()) as page:
        with page.expect_download() as download:
            page.get_by_role("button", name="Download the data").click()
        told = Path(download.value.path()).read_bytes()
    assert told == b'arm,kl_nats\r\n"a ""b"", c",0.30000000000000004\r\n"two\nlines",\r\n'


def test_on_a_phone_nothing_is_wider_than_the_screen(chromium, report):
    with watched(chromium, report.as_uri(), size=PHONE) as page:
        figures = drawn(page)
        assert no_sideways_scroll(page)
        assert [box["width"] for box in (figure.bounding_box() for figure in figures) if box["width"] > PHONE[0]] == []
        page.locator("nav summary").click()
        page.locator("nav a").last.click()
        assert page.locator("nav details").get_attribute("open") is None, "the menu stays over what it led to"


def test_the_keyboard_goes_through_the_page_in_order(desktop, report):
    desktop.goto(f"{report.as_uri()}?again")  # loaded anew: the focus is nowhere
    desktop.keyboard.press("Tab")
    expect(desktop.locator(".skip")).to_be_focused()
    expect(desktop.locator(".skip")).to_be_in_viewport()
    desktop.keyboard.press("Enter")
    expect(desktop.locator("main")).to_be_focused()
    assert desktop.locator("[tabindex]:not([tabindex='0']):not([tabindex='-1'])").count() == 0
    for _ in range(TABS):
        before = desktop.evaluate_handle("document.activeElement")
        desktop.keyboard.press("Tab")
        follows, visible = desktop.evaluate(
            """(before) => {
                const now = document.activeElement, box = now.getBoundingClientRect();
                return [(before.compareDocumentPosition(now) & Node.DOCUMENT_POSITION_FOLLOWING) > 0, box.width * box.height > 0];
            }""",
            before,
        )
        assert follows
        assert visible


def test_the_explorer_answers_in_the_report(desktop):
    desktop.evaluate("location.hash = '#pair=0,5'")
    expect(desktop.locator("#ex-title")).to_have_text("Pair 0 \u00d7 5")
    expect(desktop.locator("#ex-title")).to_be_in_viewport()


def test_the_page_is_small_enough_to_be_sent(report):
    assert report.stat().st_size <= MEGABYTES * 10**6
