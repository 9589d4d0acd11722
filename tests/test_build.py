"""When the book runs chapters again, and that a failing one fails it; on a small book
of one chapter.
"""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, environment, jupyter_book

CHAPTER = """---
file_format: mystnb
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A chapter

```{{code-cell}} python3
import os
from IPython.display import display
row = dict(id="Z-T1", part=None, measured={measured}, predicted=1.0, printed=None,
           rel="==", rtol=1e-6, atol=0.0, holds=True, printed_holds=None,
           derived=False, slack=None, note=None, settings={{}}, seeds=[0],
           scale=os.environ.get("NGD_SCALE", "quick"), dtype="float64", device="cpu")
display({{"text/plain": "a row"}}, raw=True, metadata={{"ngd": row}})
```
"""
TABLES = (
    "claims} Z-T1 Z-X1",
    "tally}",
    "build-report}",
    "scoreboard}",
    "findings}",
    "kept-runs}",
)
PROSE = "# Results\n\n## Rows\n\n" + "\n".join(
    f"```{{{table}\n```\n" for table in TABLES
)


@pytest.fixture
def small(tmp_path):
    for folder in ("ngdcore", "book/_ext", "book/assets/css", "book/certificates"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("claims.yml", "claims.schema.json", "assets/ledger.js"):
        shutil.copy(ROOT / "book" / name, tmp_path / "book" / name)
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    config["bibtex_bibfiles"] = ["references.bib"]
    (tmp_path / "references.bib").touch()
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "_toc.yml").write_text(
        "format: jb-book\nroot: results\nchapters: [file: chapter]\n"
    )
    (tmp_path / "results.md").write_text(PROSE)
    (tmp_path / "chapter.md").write_text(CHAPTER.format(measured="1.0"))
    return tmp_path


def row(book):
    claims = json.loads((book / "_build/html/claims.json").read_text())["claims"]
    return next(c for c in claims if c["id"] == "Z-T1")


def measured(book):
    return row(book)["rows"][0]["measured"]


def test_a_failing_cell_fails_the_build_twice_running(small):
    (small / "chapter.md").write_text(CHAPTER.format(measured="1 / 0"))
    for _ in range(2):
        status, log = jupyter_book(small)
        assert status != 0 and "ZeroDivisionError" in log


def test_what_runs_again_and_what_the_ledger_keeps(small):
    def build(**extra):
        status, log = jupyter_book(small, **extra)
        assert status == 0, log
        return "Executing notebook" in log

    def page():
        return (small / "_build/html/results.html").read_text()

    assert build() and row(small)["verdict"] == "reproduced"
    first = page()
    assert 'class="verdict verdict-reproduced"' in first
    assert 'href="chapter.html#claim-Z-T1"' in first, "to the row, not the page"

    assert not build() and page() == first, "an unchanged book"

    (small / "results.md").write_text(PROSE + "\nOne more sentence.\n")
    assert not build() and measured(small) == 1.0, "a chapter not read again"

    for folder in ("html", ".doctrees", "jupyter_execute"):
        shutil.rmtree(small / "_build" / folder)
    assert not build() and measured(small) == 1.0, "a chapter from the cache"

    (small / "chapter.md").write_text(CHAPTER.format(measured="1.5"))
    assert build() and measured(small) == 1.5 and "1.5" in page(), (
        "a page that was not itself changed"
    )

    with open(small / "ngdcore/__init__.py", "a") as file:
        file.write("\n# changed\n")
    assert build(), "a change in the package"
    assert build(NGD_SCALE="paper") and row(small)["rows"][0]["scale"] == "paper", (
        "another scale"
    )
    assert not build(), "back to the first"


def test_chapters_run_beforehand_are_found_by_the_build(small):
    """What `make book` does first: runs what has no run yet, shows what failed, and
    keeps the rest.
    """
    (small / "notebooks").mkdir()
    (small / "_toc.yml").write_text(
        "format: jb-book\nroot: results\nchapters:\n"
        "- file: notebooks/good\n- file: notebooks/bad\n"
    )
    good, bad = CHAPTER.format(measured="1.0"), CHAPTER.format(measured="1 / 0")
    (small / "notebooks/good.md").write_text(good)
    (small / "notebooks/bad.md").write_text(bad)

    status, log = beforehand(small)
    assert status != 0
    assert "2 of 2 chapters to run" in log and "ZeroDivisionError" in log
    (small / "notebooks/bad.md").write_text(
        good + "\n```{code-cell} python3\n1 + 1\n```\n"
    )
    status, log = beforehand(small)
    assert status == 0 and "1 of 2 chapters to run" in log and "good" not in log
    assert "0 of 2 chapters to run" in beforehand(small)[1]
    status, log = jupyter_book(small)
    assert status == 0 and "Executing notebook" not in log
    assert log.count("Using cached notebook") == 2


def beforehand(small):
    """Exit status and output of running the chapters of a book."""
    command = [sys.executable, str(small / "book/_ext/chapters.py")]
    done = subprocess.run(command, env=environment(), text=True, capture_output=True)
    return done.returncode, done.stdout + done.stderr
