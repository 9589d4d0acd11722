"""Every ledger row can fail: break its formula on purpose, run the chapter, and see the
row go red.

tests/breaks/<chapter>.yml lists, for each row, a text that stands once in the chapter's
code, its replacement, and why that is an error one could make. All breaks of a chapter
are applied at once."""

import pytest
from conftest import CHAPTERS, ROOT, breaks

from ngdcore.ledger import harvest

FILES = sorted((ROOT / "tests" / "breaks").glob("*.yml"))


def row_name(row):
    return row["id"] + (f"/{row['part']}" if row["part"] else "")


@pytest.mark.parametrize("stem", [path.stem for path in FILES])
def test_broken_formulas_go_red(stem, run_chapter, run_broken):
    named = {item["row"] for item in breaks(stem)}
    outcome = {row_name(row): row["holds"] for row in harvest(run_broken(stem))[0]}
    assert {row: outcome.get(row) for row in named} == {row: False for row in named}
    recorded = {row_name(row) for row in harvest(run_chapter(stem)[0])[0]}
    assert recorded == named, "every recorded row has a break, and only those"


def test_every_chapter_with_rows_has_breaks(run_chapter):
    assert [stem for stem in CHAPTERS if harvest(run_chapter(stem)[0])[0]] == [
        path.stem for path in FILES
    ]
