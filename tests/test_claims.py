"""The ledger of the built book against what is required of it."""

import json

import pytest
import yaml
from conftest import ROOT


@pytest.fixture(scope="module")
def claims(built):
    return {c["id"]: c for c in json.loads((built[0] / "claims.json").read_text())}


def required():
    lines = (ROOT / "tests" / "claims_required.txt").read_text().splitlines()
    return dict(
        line.split("#")[0].split(maxsplit=1)
        for line in lines
        if line.split("#")[0].strip()
    )


def test_every_id_is_listed(claims):
    registry = yaml.safe_load((ROOT / "book" / "claims.yml").read_text())
    assert list(claims) == [c["id"] for paper in registry.values() for c in paper]


def test_verdicts_are_those_required(claims):
    expected = {i: verdict.strip() for i, verdict in required().items()}
    assert {i: claims[i]["verdict"] for i in expected} == expected


def test_nothing_is_left_open_or_refuted_without_being_required(claims):
    assert not [
        i for i, c in claims.items() if c["verdict"] != "open" and i not in required()
    ]


def test_at_most_three_rows_an_id(claims):
    assert not [i for i, c in claims.items() if len(c["rows"]) > 3]


def test_a_loose_inequality_stands_beside_a_row_that_can_fail(claims):
    def can_fail(row):
        return row["rel"] == "==" or (row["slack"] is not None and row["slack"] <= 10)

    assert not [
        i
        for i, c in claims.items()
        if c["rows"]
        and not any(map(can_fail, c["rows"]))
        and not all(row["derived"] for row in c["rows"])
    ]


def test_corrections_are_on_the_errata_page(claims, built):
    page = (built[0] / "book" / "errata.html").read_text()
    assert not [
        i
        for i, c in claims.items()
        if "-X" in i and c["verdict"] != "open" and i not in page
    ]
