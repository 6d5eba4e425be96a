"""A real browser for the tests of pages: Chromium through playwright, offline; errors and requests of a page are failures.

One browser serves all tests of a process. An open playwright occupies the thread's event loop: what needs one of its own
(notebooks) takes another thread.
"""

import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
INSIDE = ("file:", "data:", "blob:", "about:")
DESKTOP, PHONE = (1280, 900), (390, 844)
PATIENCE = 60_000
"""Milliseconds to wait for what a test expects, on a machine with other things to do."""
expect.set_options(timeout=PATIENCE)


def chromium_path() -> str:
    """The browser; the test is skipped where there is none."""
    given = os.environ.get("SAE_NFM_CHROMIUM")
    found = given or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium, or set SAE_NFM_CHROMIUM")
    return found


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    path = chromium_path()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, headless=True, args=list(QUIET), chromium_sandbox=os.geteuid() != 0, timeout=PATIENCE
        )
        yield browser
        browser.close()


@contextmanager
def watched(
    browser: Browser, url: str, *, size: tuple[int, int] = DESKTOP, script: str | None = None
) -> Generator[Page]:
    """A tab at an address; what went wrong in it by the end is a failure.

    Args:
        browser: the fixture.
        url: of a file.
        size: width and height of the window.
        script: runs before those of the page.
    """
    wrong: list[str] = []
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, offline=True, reduced_motion="reduce", accept_downloads=True
    )
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.on("console", lambda said: wrong.append(f"console: {said.text}") if said.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda made: None if made.url.startswith(INSIDE) else wrong.append(f"request: {made.url}"))
    if script is not None:
        page.add_init_script(script)
    page.goto(url)
    yield page
    context.close()
    assert wrong == []


def no_sideways_scroll(page: Page) -> bool:
    """Whether the page is no wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
