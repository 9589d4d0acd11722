"""What a page owes its reader, measured at 1280 x 800: the picture first, little code,
something to take along, and an end in sight.

tests/page_exceptions.yml names the chapters that do not yet keep a rule; it only
shrinks."""

from statistics import median

import pages
import pytest
import yaml
from conftest import CHAPTERS, ROOT

PICTURE, LINES, COLUMNS, SHARE = 960, 15, 76, 0.2
DEEP = pages.deep_dives(ROOT)
EXCEPTIONS = yaml.safe_load((ROOT / "tests" / "page_exceptions.yml").read_text())

ALWAYS = {
    "a picture early": lambda f: f["picture"] is not None and f["picture"] <= PICTURE,
    "no code before the picture": lambda f: not f["before"],
    "no code that scrolls sideways": lambda f: not f["sideways"],
    "Next": lambda f: "Next" in f["headings"],
}
EXCEPTED = {
    "short cells": lambda f: max(f["cells"], default=0) <= LINES,
    "narrow code": lambda f: f["columns"] <= COLUMNS,
    "little code": lambda f: f["share"] <= SHARE,
    "a cell to change": lambda f: len(f["cells"]) > 0,
    "Remember": lambda f: "Remember" in f["headings"],
    "twenty minutes": lambda f: f["minutes"] <= pages.LIMIT,
}


@pytest.fixture(scope="module")
def chapters(visits):
    return {stem: visits[f"notebooks/{stem}.html", "desk"] for stem in CHAPTERS}


def broken(chapters, rule):
    return [stem for stem, facts in chapters.items() if not rule(facts)]


@pytest.mark.parametrize("name", ALWAYS)
def test_every_chapter_has(chapters, name):
    assert broken(chapters, ALWAYS[name]) == []


@pytest.mark.parametrize("name", EXCEPTED)
def test_a_chapter_has_or_is_excepted(chapters, name):
    """An exception that is no longer needed is taken off the list."""
    found = set(broken(chapters, EXCEPTED[name]))
    if name == "twenty minutes":
        found -= {page.removeprefix("notebooks/") for page in DEEP}
    allowed = set(EXCEPTIONS.get(name) or [])
    assert found - allowed == set(), "new"
    assert allowed - found == set(), "no longer needed"


def test_every_exception_is_to_a_rule():
    assert set(EXCEPTIONS) == set(EXCEPTED)


def test_half_the_chapters_show_little_code(chapters):
    assert median(facts["share"] for facts in chapters.values()) <= SHARE


def test_long_pages_are_marked(chapters):
    for stem, facts in chapters.items():
        long = facts["minutes"] > pages.LIMIT or f"notebooks/{stem}" in DEEP
        assert facts["deep"] == long, stem


@pytest.mark.parametrize("page", ["13_tridiagonal_puzzle"])
def test_a_slider_answers_to_keys(page, address, chromium):
    """The browser's own slider moves the drawn one, and the curves with it."""
    from browsing import FLAGS
    from playwright.sync_api import sync_playwright

    drawn = """() => JSON.stringify([...document.querySelectorAll(
        ".js-plotly-plot .scatterlayer path")].map(el => el.getAttribute("d")))"""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        tab.goto(f"{address}notebooks/{page}.html", wait_until="load")
        slider = tab.wait_for_selector(".ngd-keys input", state="attached")
        before, said = tab.evaluate(drawn), slider.get_attribute("aria-valuetext")
        slider.focus()
        for _ in range(6):
            tab.keyboard.press("ArrowLeft")
        tab.wait_for_timeout(600)
        assert slider.get_attribute("aria-valuetext") != said
        assert tab.evaluate(drawn) != before
        handle = "() => document.querySelector('.js-plotly-plot')._fullLayout"
        active = tab.evaluate(f"{handle}.sliders[0].active")
        assert active == int(slider.input_value())
        browser.close()
