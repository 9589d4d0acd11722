"""The shape of the code: imports go downward, functions fit a screen, lines a page."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

LINES, COLUMNS, UNSAID = 30, 88, 5
SOURCES = [
    Path(name)
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    if (ROOT / name).is_file()
]
BLANK = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def code_lines(text):
    """Numbers of the lines that hold code, or a string that is no docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {
        line
        for token in tokens
        if token.type not in BLANK
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            code -= set(range(node.lineno, node.end_lineno + 1))
    return code


def functions(text):
    """(function, its lines of code, first to last) of every function, also of inner
    ones.
    """
    code = code_lines(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            span = range(node.lineno, node.end_lineno + 1)
            yield node, len(code.intersection(span))


def faults(path):
    """What is too long, or too long without a word, in one file."""
    text = (ROOT / path).read_text(encoding="utf8")
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > COLUMNS:
            yield f"{path}:{number}: {len(line)} columns"
    for node, length in functions(text):
        place = f"{path}:{node.lineno}: {node.name}"
        if length > LINES:
            yield f"{place} has {length} lines of code"
        private = node.name.startswith("_") and not node.name.startswith("__")
        ours = path.parts[0] == "ngdcore"
        if ours and private and length > UNSAID and not ast.get_docstring(node):
            yield f"{place} says nothing of what goes in and comes out"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_fits_a_screen(path):
    assert not list(faults(path))


def test_the_rule_sees_what_it_forbids(monkeypatch, tmp_path):
    lines = [f"    x = {k}" for k in range(LINES)]
    (tmp_path / "ngdcore").mkdir()
    (tmp_path / "ngdcore" / "room.py").write_text(
        "\n".join(
            ["def _long():", "    # why", "", *lines]
            + ["def told():", '    """Said.', "", "    More.", '    """', *lines[1:]]
            + [f'wide = "{"x" * COLUMNS}"', ""]
        )
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    found = [text.split(": ", 1)[1] for text in faults(Path("ngdcore/room.py"))]
    assert found == [
        "97 columns",
        "_long has 31 lines of code",
        "_long says nothing of what goes in and comes out",
    ]


def test_imports_go_downward():
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
