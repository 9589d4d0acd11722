"""Every ledger row can fail: break its formula on purpose, run the chapter, and see the row go red.

tests/breaks/<chapter>.yml lists, for each row, a text that stands once in the chapter's code, its replacement, and why
that is an error one could make. All breaks of a chapter are applied at once.
"""

import jupytext
import pytest
import yaml
from conftest import CHAPTERS, ROOT, environment
from nbclient import NotebookClient

from ngdcore.experiment import harvest

FILES = sorted((ROOT / "tests" / "breaks").glob("*.yml"))


def row_name(row):
    return row["id"] + (f"/{row['part']}" if row["part"] else "")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_broken_formulas_go_red(path, run_chapter):
    breaks = yaml.safe_load(path.read_text())
    nb = jupytext.read(ROOT / "notebooks" / f"{path.stem}.md", fmt="md:myst")
    cells = [cell for cell in nb.cells if cell.cell_type == "code"]
    for item in breaks:
        homes = [cell for cell in cells if item["find"] in cell.source]
        assert len(homes) == 1 and homes[0].source.count(item["find"]) == 1, (
            f"{item['row']}: {item['find']!r} is not unique"
        )
        homes[0].source = homes[0].source.replace(item["find"], item["replace"])
    client = NotebookClient(nb, timeout=600, allow_errors=True, kernel_name="python3")
    client.execute(env=environment(PYTHONPATH=str(ROOT)))
    outcome = {row_name(row): row["holds"] for row in harvest(nb)[0]}
    assert {item["row"]: outcome.get(item["row"]) for item in breaks} == {item["row"]: False for item in breaks}
    whole, _ = run_chapter(path.stem)
    recorded = {row_name(row) for row in harvest(whole)[0]}
    assert recorded == {item["row"] for item in breaks}, "every recorded row has a break, and only those"


def test_every_chapter_with_rows_has_breaks(run_chapter):
    assert [stem for stem in CHAPTERS if harvest(run_chapter(stem)[0])[0]] == [path.stem for path in FILES]
