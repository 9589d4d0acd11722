"""The ledger of the built book: every claim is settled, every row could have failed.

tests/rivals_exceptions.yml names the rows that have no near rival, or room to spare and
no sharp row beside them; it only shrinks."""

import json
import re
from collections import Counter

import jsonschema
import pytest
import yaml
from conftest import ROOT

from ngdcore.ledger import is_finding, registry

LOOSE = 1.3  # room of a bound, as a ratio
EXCEPTIONS = yaml.safe_load((ROOT / "tests" / "rivals_exceptions.yml").read_text())


@pytest.fixture(scope="module")
def book(built):
    return json.loads((built[0] / "claims.json").read_text())


@pytest.fixture(scope="module")
def claims(book):
    return {claim["id"]: claim for claim in book["claims"]}


@pytest.fixture(scope="module")
def rows(claims):
    """{ID/part: row}"""
    return {
        i + (f"/{row['part']}" if row["part"] else ""): row
        for i, claim in claims.items()
        for row in claim["rows"]
    }


def test_the_file_follows_its_schema_and_is_small(built, book):
    schema = json.loads((built[0] / "claims.schema.json").read_text())
    jsonschema.validate(book, schema)
    assert (built[0] / "claims.json").stat().st_size < 1e6


def test_every_id_is_listed(claims):
    assert list(claims) == list(registry())


def test_every_statement_and_every_finding_is_settled(claims):
    assert not {
        i: c.get("verdict", c.get("standing"))
        for i, c in claims.items()
        if c.get("verdict", c.get("standing"))
        in ("open", "not reproduced", "not shown")
    }


def test_no_row_is_blind(rows):
    assert not {name: row["blind"] for name, row in rows.items() if row["blind"]}


def test_at_most_three_rows_an_id(claims):
    assert not [i for i, c in claims.items() if len(c["rows"]) > 3]


def no_near_rival(row):
    return row["rel"] == "==" and not row["near"]


def loose(row):
    room = row["slack"] is None or row["slack"] > LOOSE
    return row["rel"] != "==" and room and not row["sharp"]


@pytest.mark.parametrize("name, fault", [("near", no_near_rival), ("sharp", loose)])
def test_a_row_can_tell_or_is_excepted(rows, name, fault):
    """An exception that is no longer needed is taken off the list."""
    found = {place for place, row in rows.items() if fault(row)}
    allowed = set(EXCEPTIONS[name] or [])
    assert found - allowed == set(), "new"
    assert allowed - found == set(), "no longer needed"


def test_a_sharp_row_is_there_and_sharp(rows):
    def sharp(row):
        return row["rel"] == "==" or (row["slack"] or LOOSE) <= LOOSE

    named = {row["sharp"] for row in rows.values() if row["sharp"]}
    assert not [name for name in named if name not in rows or not sharp(rows[name])]


def test_findings_are_on_the_errata_page(claims, built):
    page = (built[0] / "book" / "errata.html").read_text()
    assert not [i for i in claims if is_finding(registry()[i]) and i not in page]


def test_the_landing_page_counts_right(claims, built):
    """Statements by verdict, findings by nature, as a hand counts them."""
    page = (built[0] / "book" / "intro.html").read_text()
    lines = re.findall(r'<p class="tally">(.*?)</p>', page, re.S)
    said = [re.sub(r"<[^>]+>", "", line) for line in lines]
    for line, key in zip(said, ("verdict", "nature"), strict=True):
        counts = Counter(c[key] for c in claims.values() if key in c)
        assert line.startswith(f"{sum(counts.values())} ")
        named = re.split(r" \(of these", line.partition(":")[2])[0]
        found = re.findall(r"(\d+) ([^,.]+)", named)
        assert {word.strip(): int(count) for count, word in found} == counts
