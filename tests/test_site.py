"""The built pages in a real browser: every page, at desk and phone width."""

import pytest
from conftest import CHAPTERS


def offenders(visits, key):
    return {place: facts[key] for place, facts in visits.items() if facts[key]}


@pytest.mark.parametrize(
    "fault",
    [
        "raw",
        "wrong",
        "untypeset",
        "errors",
        "outside",
        "out",
        "tabs",
        "axe",
        "axe_dark",
    ],
)
def test_no_page_has(visits, fault):
    """raw TeX, formulas that failed, formulas left alone, script errors, requests
    elsewhere, things that stick out, formulas that stop the tab key, findings of axe
    that are serious or critical.
    """
    assert offenders(visits, fault) == {}


def test_math_is_there_at_all(visits):
    assert not [
        stem
        for stem in CHAPTERS
        if not visits[f"notebooks/{stem}.html", "desk"]["math"]
    ]


def test_no_page_is_wider_than_the_screen(visits):
    assert not [
        place for place, facts in visits.items() if facts["page"][0] > facts["page"][1]
    ]


def test_every_image_loads_and_has_an_alternative(visits):
    assert not [
        (place, alt)
        for place, facts in visits.items()
        for alt, _, loaded in facts["images"]
        if not alt.strip() or not loaded
    ]


def figures(visits):
    return [
        (page, alt)
        for (page, width), facts in visits.items()
        if width == "desk"
        for alt, computed, _ in facts["images"]
        if computed
    ]


def test_figures_say_their_axes_and_what_is_seen(visits):
    def says(alt):
        return len(alt) >= 40 and any(
            word in alt.lower() for word in ("axis", "axes", "against", "versus")
        )

    assert not [figure for figure in figures(visits) if not says(figure[1])]


def test_no_two_figures_read_alike(visits):
    alts = [alt for _, alt in figures(visits)]
    assert not {alt for alt in alts if alts.count(alt) > 1}


def test_nothing_was_executed_again(built):
    assert "Executing notebook" not in built[1]
    assert built[1].count("Using cached notebook") == len(CHAPTERS)


def test_every_drawn_slider_has_one_for_keys(visits):
    for (page, _), facts in visits.items():
        assert len(facts["keys"]) >= sum(facts["hands"]), page
