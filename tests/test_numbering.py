"""Chapters, figures, statements and displays carry the same numbers in the book, in the
.ipynb and in a file's name.
"""

import re
from html import unescape

import nbformat
import pytest
import sync
import yaml
from conftest import CHAPTERS, ROOT

TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))
NUMBERED = [
    item["file"].split("/")[1]
    for part in TOC["parts"]
    if part.get("numbered")
    for item in part["chapters"]
]
STATEMENT = r"(?:Assumption|Corollary|Definition|Lemma|Proposition|Remark|Theorem)"


def test_a_file_begins_with_its_place_in_the_table_of_contents():
    places = {stem: place for place, stem in enumerate(NUMBERED, 1)}
    assert places == {stem: int(stem.split("_")[0]) for stem in CHAPTERS}


def of_page(html):
    """(title, figures, statements, displays) as a reader of the book sees them."""
    text = unescape(html)
    title = re.search(r'<h1><span class="section-number">(\d+) ', text)
    captions = re.findall(r'class="caption-number">(.*?) *</span>', text)
    return (
        title and title[1],
        [c for c in captions if c.startswith("Figure")],
        [c for c in captions if not c.startswith("Figure")],
        re.findall(r'class="eqno">\((.*?)\)', text),
    )


def of_ipynb(nb):
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    return (
        re.search(r"^# (\d+) ", text)[1],
        re.findall(r"^\*(Figure [\d.]+)\. ", text, re.M),
        re.findall(rf"^> \*\*({STATEMENT}(?: [\d.]+\d)?)[ .]", text, re.M),
        re.findall(r"\\tag\{(.*?)\}", text),
    )


@pytest.mark.parametrize("stem", CHAPTERS)
def test_book_and_ipynb_show_the_same_numbers(stem, built):
    html = (built[0] / "notebooks" / f"{stem}.html").read_text(encoding="utf8")
    nb = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    page, made = of_page(html), of_ipynb(nb)
    assert page == made
    number = sync.number_of(ROOT / "notebooks" / f"{stem}.md")
    assert page[0] == number
    assert all(
        label.split()[-1].startswith(f"{number}.") for label in [*page[1], *page[3]]
    )


def test_references_read_the_same_in_both(built):
    """Whatever a label reads as in a notebook stands as that in the book."""
    pages = "".join(
        p.read_text(encoding="utf8") for p in built[0].glob("notebooks/*.html")
    )
    shown = {
        anchor: re.sub("<.*?>", "", words).strip()
        for anchor, words in re.findall(
            r'href="[^"]*#(?:equation-)?([\w-]+)"[^>]*>(.*?)</a>', pages
        )
        if words != "#"  # the link of the thing to itself
    }
    numbered = {
        label: words
        for label, (path, words) in sync.labels().items()
        if re.search(r"\d+\.\d+\)?$", words) and label in shown
    }
    assert len(numbered) > 100
    assert {k: shown[k] for k in numbered} == numbered


def test_unnumbered_statements_count_for_nothing(tmp_path):
    text = "\n".join(
        f"```{{prf:{kind}}} T\n:label: {label}\n{more}A.\n```\n"
        for kind, label, more in [
            ("lemma", "a", ""),
            ("theorem", "b", ":nonumber:\n"),
            ("proof", "c", ""),
            ("theorem", "d", ""),
        ]
    )
    found = {o["label"]: "nonumber" in o for _, o in sync.statements(text)}
    assert found == {"a": False, "b": True, "c": False, "d": False}
    page = tmp_path / "07_page.md"
    page.write_text("# T\n\n```{prf:lemma} T\nA.\n```\n")
    assert list(sync.faults(page)) == ["07_page.md: a lemma without a label"]
