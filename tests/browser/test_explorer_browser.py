"""The explorer in a real browser: what it shows is what the rows and firings of an invented SAE say."""

import re
from collections.abc import Callable, Iterator

import pytest
from browser import DESKTOP, PHONE, no_sideways_scroll, watched
from invented_explorer import (
    CANONICAL,
    D_SAE,
    DOWN,
    FIRINGS,
    PAIRS,
    PATHS,
    POSITIONS,
    SHARES,
    UP,
    content,
    packed,
    row_of,
    window,
)
from playwright.sync_api import Page, expect

from sae_nfm.report.blocks import Embedded, Section
from sae_nfm.report.chapters.explorer import get_plotlyjs
from sae_nfm.report.page import render

pytest_plugins = ["browser"]
TITLE = "An invented SAE"
HIDDEN = [".ex-controls", ".ex-list"]


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    """A page with nothing but the explorer; plotly, which draws nothing here, is taken out to save time."""
    block = Embedded(id="explorer", data=packed(content()), fallback="needs JavaScript")
    path = tmp_path_factory.mktemp("explorer") / "page.html"
    html = render(TITLE, "", [Section(id="features", title="Features", lead="", blocks=[block])])
    path.write_text(html.replace(get_plotlyjs(), ""), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def tab(chromium, url) -> Iterator[Page]:
    with watched(chromium, url) as page:
        expect(heading(page)).to_have_text("Feature 0")  # of the strongest pair
        yield page


@pytest.fixture
def at(tab, url) -> Callable[[str], Page]:
    """Goes to an address within the page."""

    def go(hash: str = "") -> Page:
        tab.goto(url + hash)
        tab.fill("#ex-query", "")
        return tab

    return go


def readable(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "⇥").replace("\x01", "\\x01")


def texts(page: Page, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()


def heading(page: Page):
    return page.locator("#ex-title")


def chosen(page: Page) -> str:
    return page.locator("[role=option][aria-selected=true] b").text_content() or ""


def contexts(page: Page, title: str) -> list[tuple[str, list[str], str]]:
    """Of each context under a heading: its text, its marked tokens, the bold one."""
    items = page.locator(".ex-part", has=page.get_by_role("heading", name=title, exact=True)).locator(".ex-contexts li")
    return [
        (
            item.locator(".ex-text").text_content().strip("…"),
            item.locator("mark").all_text_contents(),
            item.locator("mark.ex-peak").text_content(),
        )
        for item in items.all()
    ]


def expected_contexts(feature: int) -> list[tuple[str, list[str], str]]:
    fired = FIRINGS[feature]
    return [
        (
            "".join(readable(POSITIONS[p]) for p in window(at)),
            [readable(POSITIONS[p]) for p in window(at) if p in fired],
            readable(POSITIONS[at]),
        )
        for at in sorted(fired, key=fired.__getitem__, reverse=True)
    ]


@pytest.mark.parametrize("feature", sorted(FIRINGS))
def test_a_features_contexts_are_where_it_fires(at, feature):
    page = at(f"#feature={feature}")
    expect(heading(page)).to_have_text(f"Feature {feature}")
    found = contexts(page, "Where it is strongest")
    assert found == expected_contexts(feature)
    assert page.locator(".ex-text b, .ex-text script").count() == 0, "a token became markup"


def test_a_features_figures_are_those_of_the_data(at):
    page = at("#feature=0")
    expect(page.locator(".ex-facts dd").first).to_have_text("0.900\u00a0%9 of 1,000 tokens")
    # 14.6 / 9 and the sum of the shares of 0 x 5 and 0 x 6
    assert texts(page, ".ex-facts dd")[1:] == ["1.62where it fires", "4.00", "65.0\u00a0%in 2 listed pairs"]
    counts = [int(count) for count in texts(page, ".ex-drawing table td.ex-number")]
    assert len(counts) == 20
    assert (counts[-1], counts[10], sum(counts)) == (1, 1, 9)  # 4.0 at the end, 2.0 at the lower edge of the 11th bin
    assert page.locator("mark[title='activation 3.0']").all_text_contents() == [" not", " not"]  # in two windows
    shares = [
        f"{path} {100 * share:#.3g}\u00a0%".replace("0.00", "0") for path, share in (*PATHS.items(), *CANONICAL.items())
    ]
    assert texts(page, ".ex-shares li") == shares
    assert "depend on the gauge" in page.locator(".ex-card").text_content()
    assert texts(page, ".ex-logits tr") == [" good+0.500", " bad+0.125", " never\u22120.750", "↵\u22120.250"]
    assert texts(page, ".ex-partners tbody tr") == [
        "0 \u00d7 5feature 5  good 60.0\u00a0%1.502",
        "0 \u00d7 6feature 6  12 5.00\u00a0%0.2001",
    ]


def test_activations_of_a_bin_are_told_on_hover(at):
    page = at("#feature=5")
    page.locator(".ex-column").last.hover()
    expect(page.locator(".ex-readout")).to_have_text("Activation 4.75 to 5.00: 1 token")


def test_a_pairs_card(at):
    page = at("#pair=5,0")  # in either order
    expect(heading(page)).to_have_text("Pair 0 \u00d7 5")
    assert texts(page, ".ex-facts dd") == [
        "0.200\u00a0%2 of 1,000 tokens",
        "60.0\u00a0%rank 1 of 3 listed",
        "1.50of what it writes, where both are read",
        "2.00",
    ]
    places = sorted(PAIRS[0, 5], key=PAIRS[0, 5].__getitem__, reverse=True)
    words = [("".join(POSITIONS[p] for p in window(at)), [POSITIONS[at]], POSITIONS[at]) for at in places]
    assert contexts(page, "Where it writes most") == words
    assert texts(page, ".ex-value") == ["2.00", "1.00"]
    assert len(texts(page, ".ex-logits tr")) == len(UP + DOWN)
    assert "Removing the pair flips gates: sae-nfm attribute" in page.locator(".ex-card").text_content()
    page.locator(".ex-ends a").last.click()
    expect(heading(page)).to_have_text("Feature 5")
    page.locator(".ex-partners a", has_text="0 \u00d7 5").click()
    expect(heading(page)).to_have_text("Pair 0 \u00d7 5")
    page.get_by_role("button", name="next").click()
    expect(heading(page)).to_have_text("Pair 1 \u00d7 2")
    assert "strongest pairs only" in page.locator(".ex-card").text_content()


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ("feature 5", ["Feature 5"]),
        ("3", ["Feature 3"]),
        ("12", ["Feature 6", "Pair 0 \u00d7 6"]),  # no such number here, but a token
        ("5 x 0", ["Pair 0 \u00d7 5"]),
        ("1,2", ["Pair 1 \u00d7 2"]),
        ("NOT", ["Feature 0", "Pair 0 \u00d7 5"]),
        ("good", ["Feature 5", "Feature 2", "Pair 0 \u00d7 5"]),
        ("fil", ["Feature 1"]),  # the beginning of film and films
        ("\u21b5", ["Feature 2", "Pair 1 \u00d7 2"]),
    ],
)
def test_search(at, query, options):
    page = at()
    page.fill("#ex-query", query)
    expect(page.locator("[role=option]").first).to_be_visible()
    assert texts(page, "[role=option] b") == options
    page.keyboard.press("Enter")
    expect(heading(page)).to_have_text(options[0])


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("99", f"There is no feature 99: this SAE has features 0 to {D_SAE - 1}."),
        ("0 x 1", "Pair 0 \u00d7 1 is not among the 3 pairs listed, of 40 that fired."),
        ("0,99", f"There is no feature 99: this SAE has features 0 to {D_SAE - 1}."),
        ("zebra", "No token of the contexts is or begins with \u201czebra\u201d, or nothing fires at it."),
    ],
)
def test_what_is_not_there_is_said(at, query, sentence):
    page = at()
    page.fill("#ex-query", query)
    expect(page.locator("#ex-status")).to_have_text(sentence)
    assert page.locator("#ex-results").is_hidden()


def test_a_page_that_is_opened_at_a_feature_scrolls_to_it(chromium, url):
    with watched(chromium, url + "#feature=1", size=PHONE) as page:
        expect(page).to_have_title(f"Feature 1 \u00b7 {TITLE}")
        assert page.evaluate("scrollY") > 0
        assert abs(page.evaluate("document.getElementById('explorer').getBoundingClientRect().top")) < 100


def test_links_and_the_back_button(at):
    page = at("#feature=1")
    expect(page).to_have_title(f"Feature 1 \u00b7 {TITLE}")
    page.get_by_role("link", name="feature 2", exact=True).first.click()
    expect(heading(page)).to_be_focused()
    expect(page).to_have_title(f"Feature 2 \u00b7 {TITLE}")
    page.get_by_role("button", name="previous").click()
    page.get_by_role("button", name="next").click()
    page.get_by_role("button", name="next").click()
    expect(heading(page)).to_have_text("Feature 3")
    assert page.locator(".ex-card p").text_content() == (
        "It never fires on the 1,000 tokens looked at: a dead feature, one of 2 among 8 features."
    )
    page.go_back()
    expect(heading(page)).to_have_text("Feature 2")
    page.evaluate("location.hash = '#feature=8'")
    expect(page.locator(".ex-card p")).to_have_text("There is no feature 8: this SAE has features 0 to 7.")
    page.evaluate("location.hash = '#pair=1'")
    expect(page.locator(".ex-card p")).to_contain_text("such as #pair=12,45, not by \u201c1\u201d")
    page.evaluate("location.hash = '#pair=3,4'")
    expect(page.locator(".ex-card p")).to_contain_text("Pair 3 \u00d7 4 is not among")
    page.get_by_role("button", name="random").click()
    expect(heading(page)).to_have_text(re.compile(r"^Feature [012456]$"))  # never a dead one
    page.evaluate("location.hash = '#features'")  # the section's own anchor
    expect(page).to_have_title(TITLE)


def test_keyboard_alone(at):
    page = at("#features")
    page.locator("h1").click()  # the focus is nowhere
    page.keyboard.press("/")
    expect(page.locator("#ex-query")).to_be_focused()
    page.keyboard.type("not")
    expect(page.locator("#ex-query")).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("ArrowUp")
    assert chosen(page) == "Pair 0 \u00d7 5"  # round to the last
    page.keyboard.press("ArrowDown")
    assert chosen(page) == "Feature 0"
    page.keyboard.press("ArrowDown")
    active = page.locator("#ex-query").get_attribute("aria-activedescendant")
    assert page.locator(f"#{active}").get_attribute("data-hash") == "#pair=0,5"
    page.keyboard.press("Enter")
    expect(heading(page)).to_have_text("Pair 0 \u00d7 5")
    expect(heading(page)).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(heading(page)).to_have_text("Feature 0")
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    assert page.locator("#ex-results").is_hidden()
    page.keyboard.press("Escape")
    expect(page.locator("#ex-query")).to_have_value("")
    page.keyboard.type("1/2")  # a slash inside the field is a letter
    expect(page.locator("#ex-query")).to_have_value("1/2")


def test_the_list_is_sorted_by_what_is_chosen(at):
    page = at()

    def listed() -> list[str]:
        return texts(page, ".ex-listed tbody a")

    def ranked(figure) -> list[str]:
        return [f"feature {i}" for i in sorted(FIRINGS, key=lambda i: (-figure(i), i))]

    assert listed() == ranked(lambda i: len(FIRINGS[i]))
    page.locator("#ex-sort").select_option(label="largest activation")
    assert listed() == ranked(lambda i: max(FIRINGS[i].values()))
    page.locator(".ex-listed th button", has_text="interaction energy").click()
    assert listed() == ranked(lambda i: sum(share for pair, share in SHARES.items() if i in pair))
    page.locator(".ex-listed th button", has_text="interaction energy").click()
    assert page.locator(".ex-listed th[aria-sort]").get_attribute("aria-sort") == "ascending"
    assert listed()[0] == "feature 4"  # the one without a pair
    page.get_by_role("button", name="Pairs (3)").click()
    assert listed() == [f"{i} \u00d7 {j}" for i, j in PAIRS]


@pytest.mark.parametrize("hash", ["#feature=0", "#pair=0,5", "#feature=3"])
def test_on_a_phone_nothing_is_wider_than_the_screen(at, hash):
    page = at(hash)
    page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    assert no_sideways_scroll(page)
    page.set_viewport_size({"width": DESKTOP[0], "height": DESKTOP[1]})
    assert no_sideways_scroll(page)


def test_print_has_the_card_and_no_controls(at):
    page = at("#feature=0")
    expect(heading(page)).to_be_visible()
    assert all(page.locator(selector).is_visible() for selector in HIDDEN)
    page.emulate_media(media="print")
    assert not any(page.locator(selector).is_visible() for selector in HIDDEN)
    assert heading(page).is_visible()
    page.emulate_media(media="screen")


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("delete window.DecompressionStream", "too old for the explorer"),
        ("window.atob = () => 'no gzip'", "cannot read its data"),
    ],
)
def test_without_data_there_is_a_sentence(chromium, url, script, sentence):
    with watched(chromium, url + "#feature=0", script=script) as page:
        expect(page.locator("#explorer")).to_contain_text(sentence)


def test_nothing_is_global_but_one_object(at):
    page = at()
    names = page.evaluate("""() => {
        const frame = document.body.appendChild(document.createElement("iframe"));
        const own = Object.getOwnPropertyNames(window).filter((name) => !(name in frame.contentWindow));
        frame.remove();
        return own;
    }""")
    assert [name for name in names if not name.isdigit()] == ["SaeExplorer"]


def test_a_context_is_cut_where_its_sequence_is():
    """The oracle itself: windows of three tokens before and two after, inside one row."""
    assert list(window(1)) == [0, 1, 2, 3]
    assert window(14).stop == row_of(14).stop == 15
