"""The page of a report: one file, escaped, without a script or anything that would be fetched."""

import re
from html.parser import HTMLParser

import pytest
import vl_convert

from llamafleet.cli import charts
from llamafleet.tuning.tried import Range
from tasks.lib import page
from tests import reporting

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Elements(HTMLParser):
    """Every element with its attributes, texts outside of styles, and whether each was closed in order."""

    def __init__(self, text):
        super().__init__()
        self.found, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.texts.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.found if tag == name]


@pytest.fixture(scope="module")
def pages():
    """By name, the text and the elements of a page."""
    made = {name: page.html(reporting.report(getattr(reporting, name)())) for name in ("fleet", "hostile")}
    return {name: (text, Elements(text)) for name, text in made.items()}


@pytest.mark.parametrize("name", ["fleet", "hostile"])
def test_nothing_is_fetched_and_nothing_runs(pages, name):
    text, elements = pages[name]
    tags = {tag for tag, _ in elements.found}
    assert not tags & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "image",
        "use",
        "foreignobject",
    }
    for tag, attributes in elements.found:
        for key, value in attributes.items():
            assert not key.startswith("on") and key not in ("src", "srcset", "xlink:href", "action"), (tag, key)
            assert key != "href" or value.startswith("#"), (tag, value)
            assert "url(" not in (value or "") or key in ("aria-label",), (tag, key, value)
    [style] = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert "url(" not in style and "@import" not in style and "http" not in style
    [policy] = [one["content"] for one in elements.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_texts_from_outside_are_texts(pages):
    text, elements = pages["hostile"]
    assert "<script>alert" not in text and "<img" not in text and "\u202e" not in text and "\x1b" not in text
    shown = "".join(elements.texts)
    assert shown.count("<script>alert('x')</script>\"'&amp;\\u202egpj\\x1b[31m</style>") > 10
    labels = [one["aria-label"] for one in elements.all("div") if one.get("role") == "img"]
    assert any("<script>alert('x')" in label for label in labels)


def test_every_anchor_is_there_once_and_every_link_finds_one(pages):
    _, elements = pages["fleet"]
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    links = [one["href"][1:] for one in elements.all("a")]
    assert len(ids) == len(set(ids)) and links and set(links) <= set(ids)
    named = [attributes["aria-labelledby"] for _, attributes in elements.found if "aria-labelledby" in attributes]
    assert named and set(named) <= set(ids)


def test_each_chart_is_drawn_in_the_page_s_colours_with_a_name_and_its_numbers(pages):
    text, elements = pages["fleet"]
    charts = [one for one in elements.all("div") if one.get("role") == "img"]
    assert len(charts) == len(elements.all("svg")) == len(elements.all("figure")) > 15
    assert all(len(one["aria-label"]) > 20 for one in charts)
    assert all(set(one) == {"class", "aria-hidden", "viewbox"} for one in elements.all("svg"))
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    colours = set(re.findall(r'(?:fill|stroke)="([^"]*)"', drawn))
    assert colours - {"none", "transparent"} and all(
        one.startswith("var(--") for one in colours - {"none", "transparent"}
    )
    [root] = re.findall(r":root \{(.*?)\}", text, re.S)[:1]
    assert {one[4:-1] for one in colours if one.startswith("var")} <= set(re.findall(r"--[\w-]+", root))


def test_charts_are_without_what_draws_nothing(pages):
    """A chart of Vega's own is twice as large."""
    text, _ = pages["fleet"]
    charts = re.findall(r"<svg.*?</svg>", text, re.S)
    assert not re.search(r'(?:transform|d|x2|y2)="[^"]*\.\d{2,}', text)
    assert sum(map(len, charts)) / len(charts) < 6000


def test_a_text_of_a_chart_is_left_as_it_is():
    told = 'a 1.23456 role="img" opacity="1" & <g role="x"> 2.5'
    chart = charts.bars([charts.Bar(told, Range(1.0, 1.0, 1.0))], "x", one=True)
    assert told in "".join(Elements(page.drawn(chart)).texts)


@pytest.mark.parametrize(
    "label",
    ["\U0001f600" * 60, "x" + "\U0001f600" * 60, "\ud800" * 60, "a\x00b\x1b[1m\u202e", "x" * 60_000, "\\", "\u0301" * 90,
     "日本語" * 40, "\u05d0" * 90, "]]><!-- &#0; ${1} {{x}}", "", "\n\t"],
)  # fmt: skip
def test_whatever_a_label_is_its_chart_is_drawn(label):
    """Long ones are cut by Vega, at any of its UTF-16 units."""
    bars = [charts.Bar(label, Range(1.0, 0.9, 1.1)), charts.Bar("the plan", Range(2.0, 1.9, 2.1))]
    assert "the plan" in "".join(Elements(page.drawn(charts.bars(bars, "x", one=True))).texts)


def test_a_chart_that_cannot_be_drawn_is_a_sentence(monkeypatch):
    def fails(*arguments, **more):
        raise ValueError("Vega-Lite to SVG conversion failed")

    monkeypatch.setattr(vl_convert, "vegalite_to_svg", fails)
    elements = Elements(page.html(reporting.report({"cpu1": reporting.cpu_box()})))
    assert (
        elements.all("svg") == [] and "".join(elements.texts).count(page.NOT_DRAWN) == len(elements.all("figure")) > 3
    )


def test_few_hosts_are_unfolded_and_many_are_not(pages, monkeypatch):
    monkeypatch.setattr(vl_convert, "vegalite_to_svg", lambda *_, **__: "<svg></svg>")
    _, elements = pages["fleet"]
    assert all("open" in one for one in elements.all("details") if one.get("class") == "card")
    shown = Elements(page.html(reporting.report(dict(list(reporting.many(page.MOST_OPEN + 1).items())[:9]))))
    assert len([one for one in shown.all("details") if one.get("class") == "card"]) == page.MOST_OPEN + 1
    assert not any("open" in one for one in shown.all("details") if one.get("class") == "card")


def test_an_inventory_without_hosts_has_a_page():
    assert "No host." in "".join(Elements(page.html(reporting.report({}))).texts)


def test_without_what_draws_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr(page, "DRAWS", "not_there_at_all")
    with pytest.raises(page.CannotDrawError, match=r'not installed: pip install "llamafleet\[report\]"'):
        page.html(reporting.report({}))
