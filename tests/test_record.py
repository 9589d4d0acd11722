"""Kept runs: what is kept for this code and these data is not run again."""

import json

import pytest
from conftest import ROOT

from ngdcore import __main__ as command
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


SIZED = "chapter = dict\nchapter(quick={}, paper={})"


def write(book, name, code):
    (book / "notebooks" / f"{name}.md").write_text(CHAPTER.format(code=code))


def left(book, scale="smoke"):
    return list(due(book, ["01_short", "02_long"], scale))


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


def test_the_command_runs_what_has_that_scale_and_says_what_has_not(
    book, monkeypatch, capsys
):
    """And goes on where it was stopped: what is done is kept."""
    monkeypatch.setattr(command, "__file__", str(book / "ngdcore" / "__main__.py"))

    def says(*arguments):
        command.main(["record", *arguments])
        return capsys.readouterr().out

    write(book, "02_long", SIZED)
    kept = book / "data" / "recorded"
    said = says("01_short")
    assert "no settings for scale paper" in said and "): 01_short" in said
    assert "0 of 0 to run" in said and not kept.exists()

    listed = "python -m ngdcore record --scale paper 02_long  # no record"
    said = says("--list")
    assert "1 of 1 to run at scale paper" in said and listed in said
    assert not kept.exists(), "it only lists"
    assert str(kept / "long.json") in says() and "0 of 1 to run" in says()
    assert "# again" in says("--again", "--list")
    write(book, "02_long", SIZED + "\n1 + 2")
    assert "02_long  # code changed" in says("--list")


def test_an_interrupted_recording_goes_on(book, monkeypatch):
    for name in ("01_short", "02_long"):
        write(book, name, SIZED)
    monkeypatch.setattr(command, "__file__", str(book / "ngdcore" / "__main__.py"))
    ran, record = [], record_chapter

    def stopped(root, name, scale):
        if ran:
            raise KeyboardInterrupt
        ran.append(name)
        return record(root, name, scale)

    monkeypatch.setattr(command, "record_chapter", stopped)
    with pytest.raises(KeyboardInterrupt):
        command.main(["record"])
    assert ran == ["01_short"] and left(book, "paper") == ["02_long"]


def test_a_chapter_that_fails_stops_no_other(book, monkeypatch, capsys):
    write(book, "01_short", SIZED + "\n1 / 0")
    write(book, "02_long", SIZED)
    monkeypatch.setattr(command, "__file__", str(book / "ngdcore" / "__main__.py"))
    with pytest.raises(SystemExit) as status:
        command.main(["record"])
    said = capsys.readouterr()
    assert status.value.code == 1 and "ZeroDivisionError" in said.out
    assert "nothing kept: 01_short" in said.err
    assert left(book, "paper") == ["01_short"]


def test_what_is_kept_here_can_be_judged():
    """Every kept run answers whether it is due; nobody has to run one for that."""
    names = [path.stem for path in sorted((ROOT / "notebooks").glob("*.md"))]
    assert set(due(ROOT, names, "paper")) <= set(names)
