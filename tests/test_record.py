"""Kept runs: what is kept for this code and these data is not run again."""

import json

import pytest
from conftest import ROOT

from ngdcore.__main__ import due, record_chapter

CHAPTER = """---
kernelspec: {{display_name: Python 3, language: python, name: python3}}
---

# A chapter

```{{code-cell}} ipython3
{code}
```
"""


@pytest.fixture
def book(tmp_path):
    for folder in ("notebooks", "data/mnist", "ngdcore"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ngdcore" / "__init__.py").write_text("")
    (tmp_path / "data" / "mnist" / "images.gz").write_bytes(b"1")
    for name in ("01_short", "02_long"):
        write(tmp_path, name, "1 + 1")
    return tmp_path


def write(book, name, code):
    (book / "notebooks" / f"{name}.md").write_text(CHAPTER.format(code=code))


def left(book, scale="smoke"):
    return due(book, ["01_short", "02_long"], scale)


def test_only_what_changed_is_recorded_again(book):
    assert left(book) == ["01_short", "02_long"]
    for name in left(book):
        path = record_chapter(book, name, "smoke")
    assert left(book) == [] and left(book, "paper") != [], (
        "another scale is another run"
    )
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"seconds": 1000.0}))

    write(book, "01_short", "1 + 2")
    assert left(book) == ["01_short"], "its code"
    (book / "data" / "mnist" / "images.gz").write_bytes(b"2")
    assert left(book) == ["02_long", "01_short"], "data; the longest first"
    (book / "data" / "mnist" / "images.gz").write_bytes(b"1")
    (book / "ngdcore" / "__init__.py").write_text("changed = True")
    assert left(book) == ["02_long", "01_short"], "the package"


def test_what_is_kept_here_can_be_judged():
    """Every kept run answers whether it is due; nobody has to run one for that."""
    names = [path.stem for path in sorted((ROOT / "notebooks").glob("*.md"))]
    assert set(due(ROOT, names, "paper")) <= set(names)
