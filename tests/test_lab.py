"""A chapter that is opened in Jupyter and saved again: what was not changed stays."""

import difflib

import jupytext
import pytest
from conftest import CHAPTERS, ROOT
from unchanged import keep


def saved(nb):
    return jupytext.writes(nb, fmt="md:myst")


@pytest.mark.parametrize("stem", CHAPTERS)
def test_untouched_not_a_byte_and_a_new_line_is_one_line(stem):
    text = (ROOT / "notebooks" / f"{stem}.md").read_text(encoding="utf8")
    nb = jupytext.reads(text, fmt="md:myst")
    assert keep(text, saved(nb)) == text
    [first, *_] = [cell for cell in nb.cells if cell.cell_type == "code"]
    first.source += "\nanswer = 42"
    lines = difflib.ndiff(text.splitlines(), keep(text, saved(nb)).splitlines())
    assert [line for line in lines if line[0] in "+-"] == ["+ answer = 42"]


def test_cells_come_and_go():
    nb = jupytext.reads("# A\n\n```{code-cell}\na = 1\n```\n\nText\n", fmt="md:myst")
    text = saved(nb)
    nb.cells.insert(1, jupytext.reads("New", fmt="md:myst").cells[0])
    assert keep(text, saved(nb)) == saved(nb)
    del nb.cells[1]
    assert keep(saved(nb), text) == text
