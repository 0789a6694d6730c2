"""The page in a real browser, on a phone and on a desk, light and dark: nothing is said, fetched, cut off or without a
name, and everything can be read and reached by keyboard.

Needs Debian's package chromium, which `make test` installs.
"""

import pytest

from tasks.lib import page
from tests import chromium, reporting

WIDTHS = (400, 1280)
# What reaches beyond the window, and is not within something that scrolls by itself or that nobody sees.
BEYOND = """
[...document.querySelectorAll("body *")].filter(one => {
  const box = one.getBoundingClientRect();
  return box.width > 1 && box.right > innerWidth + 0.5 && !one.closest(".scroll, .unseen, .skip, svg");
}).map(one => one.outerHTML.slice(0, 120))
"""
# Texts whose contrast with what lies behind them is below that of WCAG 2, AA.
FAINT = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(one => one / 255).map(one => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = rgb(getComputedStyle(one).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const one = node.parentElement;
    if (!node.data.trim() || ["STYLE", "SCRIPT"].includes(one.tagName)) continue;
    const style = getComputedStyle(one), back = light(behind(one));
    const front = light(rgb(one.closest("svg") ? style.fill : style.color));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)}: ${node.data.trim().slice(0, 60)}`);
  }
  return faint;
})()
"""
# What has the focus: its tag and the beginning of its text; whether it is seen, and whether that is shown.
FOCUS = """
(() => {
  const one = document.activeElement, style = getComputedStyle(one), box = one.getBoundingClientRect();
  return one === document.body ? null : {
    tag: one.tagName.toLowerCase(), text: (one.getAttribute("aria-label") || one.textContent).trim().slice(0, 60),
    shown: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
    seen: box.width > 0 && box.right > 0 && box.bottom > 0 && box.top < innerHeight,
    after: window.before ? !!(window.before.compareDocumentPosition(one) & 4) : true, kept: (window.before = one) && true,
  };
})()
"""
NEED_NAMES = {"image", "link", "table", "region", "heading", "article", "DisclosureTriangle", "figure"}


@pytest.fixture(scope="module")
def tab():
    with chromium.browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """By name, the file of a page."""
    folder = tmp_path_factory.mktemp("reports")
    made = {name: folder / f"{name}.html" for name in ("fleet", "hostile")}
    for name, file in made.items():
        file.write_text(page.html(reporting.report(getattr(reporting, name)())), encoding="utf-8")
    return made


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["fleet", "hostile"])
def test_a_page_shows_all_of_itself_and_says_nothing(tab, files, name, width, dark):
    tab.open(files[name], width=width, dark=dark)
    assert tab.value("innerWidth") == width and tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value(BEYOND) == []
    assert tab.value(FAINT) == []
    # Unfolded, it is no wider.
    tab.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.value("document.documentElement.scrollWidth") <= width and tab.value(BEYOND) == []
    assert tab.value(FAINT) == []
    assert tab.said == [] and tab.fetched == [files[name].as_uri()]


def test_dark_is_dark_with_its_charts(tab, files):
    looks = []
    for dark in (False, True):
        tab.open(files["fleet"], width=400, dark=dark)
        looks.append(tab.value(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('svg text')).fill,"
            " getComputedStyle(document.querySelector('svg path[fill^=var]')).fill]"
        ))  # fmt: skip
    assert all(light != dark for light, dark in zip(*looks, strict=True)), looks


def test_charts_are_as_wide_as_a_phone_lets_them_be_and_can_be_read(tab, files):
    tab.open(files["fleet"], width=400)
    sizes = tab.value(
        "[...document.querySelectorAll('svg')].map(one => [one.getBoundingClientRect().width, "
        "Math.min(...[...one.querySelectorAll('text')].map(text => text.getBoundingClientRect().height))])"
    )
    assert len(sizes) > 15 and all(300 <= width <= 400 and height >= 10 for width, height in sizes)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_keyboard_reaches_everything_in_order_and_shows_where_it_is(tab, files, width):
    tab.open(files["fleet"], width=width)
    reached = []
    while len(reached) < 500:
        tab.press("Tab", 9)
        one = tab.value(FOCUS)
        if one is None:
            break
        reached.append(one)
    assert (reached[0]["tag"], reached[0]["text"]) == ("a", "Skip to the hosts")
    assert [one for one in reached if not (one["shown"] and one["seen"] and one["after"] and one["text"])] == []
    for kind, selector in (("summary", "summary"), ("a", "a")):
        unfolded = (
            "one => !one.parentElement.closest('details:not([open])') || one.matches('details:not([open]) > summary')"
        )
        there = tab.value(f"[...document.querySelectorAll('{selector}')].filter({unfolded}).length")
        assert len([one for one in reached if one["tag"] == kind]) == there > 3


def test_enter_folds_a_host_and_unfolds_its_numbers(tab, files):
    tab.open(files["fleet"], width=1280)
    for selector, before in (("details.more:not([open])", False), ("details.card", True)):
        tab.value(f"window.one = document.querySelector('{selector}'); window.one.querySelector('summary').focus()")
        assert tab.value("window.one.open") is before
        tab.press("Enter", 13)
        assert tab.value("window.one.open") is not before


def test_a_link_of_the_overview_leads_to_its_instance(tab, files):
    tab.open(files["fleet"], width=1280)
    tab.value("document.querySelectorAll('details').forEach(one => one.open = false)")
    tab.value("[...document.querySelectorAll('.overview a')].find(one => one.textContent === 'cpu1').focus()")
    tab.press("Enter", 13)
    assert tab.value("location.hash") == "#host-2-1"
    assert tab.value("document.querySelector('#host-2').open && document.querySelector(':target').id") == "host-2-1"
    top = tab.value("document.querySelector('#host-2-1').getBoundingClientRect().top")
    assert 0 <= top < 800


def test_a_screen_reader_has_a_name_for_everything(tab, files):
    tab.open(files["fleet"], width=400)
    tab.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    nodes = tab.accessible()
    assert [node for node in nodes if node[0] in NEED_NAMES and not node[1].strip()] == []
    images = [name for role, name in nodes if role == "image"]
    assert len(images) == tab.value("document.querySelectorAll('svg').length")
    assert any(name.startswith("Memory of chat on gpu1: GPU0: ") for name in images)
    assert any(
        name.startswith("Speed beside llama-server as it ships of chat on gpu1: ubatch 1024: 1.3") for name in images
    )
    # Of a chart nothing else is read out: its numbers are in the table.
    assert not [name for role, name in nodes if role == "StaticText" and name == "share of the device's memory"]
    headings = [name for role, name in nodes if role == "heading"]
    assert headings[:4] == ["llamafleet: fleet.py", "The fleet", "Tuning", "The hosts"] and "gpu1" in headings
    # On a phone the overview is no grid to the eye, and still a table to the ear.
    tables = [name for role, name in nodes if role == "table"]
    assert "The fleet" in tables and "host" in [name for role, name in nodes if role == "columnheader"]
    assert ("rowheader", "gpu1") in nodes
    assert len(set(images)) == len(images)
