"""Every chapter: its .ipynb is what its .md says, reads as plain Markdown, and runs
from the wheel within its time.
"""

import re

import jupytext
import nbformat
import pytest
import sync
from conftest import CHAPTERS, ROOT

SECONDS = 60


def ipynb(stem):
    return nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)


def code(nb):
    return [cell.source for cell in nb.cells if cell.cell_type == "code"]


def test_pairs_are_in_step(capsys):
    assert not sync.main(check=True), capsys.readouterr().out


@pytest.mark.parametrize("stem", CHAPTERS)
def test_code_is_the_same_behind_the_installing_cell(stem):
    first, *rest = code(ipynb(stem))
    assert first == sync.INSTALL
    assert rest == code(jupytext.read(ROOT / "notebooks" / f"{stem}.md", fmt="md:myst"))


@pytest.mark.parametrize("stem", CHAPTERS)
def test_text_is_plain_markdown(stem):
    text = "\n\n".join(
        cell.source for cell in ipynb(stem).cells if cell.cell_type == "markdown"
    )
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.S | re.M)
    macros = [rf"\{name}(?![A-Za-z])".replace("\\", "\\\\", 1) for name in sync.MACROS]
    for pattern in [
        r"\{[\w:]+\}`",
        r"^[`:]{3,}\{",
        r"^\([\w-]+\)=",
        r"\\operatorname",
        *macros,
    ]:
        assert not re.search(pattern, text, re.M), pattern
    assert text.count("$$") % 2 == 0


@pytest.mark.parametrize("stem", CHAPTERS)
def test_tracked_without_outputs(stem):
    assert not any(
        cell.get("outputs") or cell.get("execution_count") for cell in ipynb(stem).cells
    )


@pytest.mark.parametrize("stem", CHAPTERS)
def test_runs_from_the_wheel_in_an_empty_folder(stem, run_chapter):
    nb, seconds = run_chapter(stem)
    noise = [
        out.text
        for cell in nb.cells
        if cell.cell_type == "code"
        for out in cell.outputs
        if out.get("name") == "stderr"
    ]
    assert not noise
    assert seconds < SECONDS


def test_lint_sees_what_myst_misreads(tmp_path):
    page = tmp_path / "page.md"
    wrong = "Then\n$$\na\n$$\n\nso $$b$$ inline\n\n\\begin{align}\nc\n\\end{align}\n"
    page.write_text(wrong + "\n```\nx\n$$\n```\n\n$$\nd\n$$\n")
    assert [re.search(r":(\d+):", fault)[1] for fault in sync.faults(page)] == [
        "2",
        "6",
        "8",
    ]
