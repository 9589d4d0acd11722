"""Scales and the ledger: rows, verdicts, what travels with a notebook."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ngdcore as ngd
from ngdcore import ledger, opening

ROOT = Path(__file__).resolve().parent.parent


def test_scale(monkeypatch):
    monkeypatch.delenv("NGD_SCALE", raising=False)
    assert opening.scale() == "quick"
    assert vars(opening.settings(dict(n=5, m=2), paper=dict(n=60))) == {"n": 5, "m": 2}
    monkeypatch.setenv("NGD_SCALE", "paper")
    assert vars(opening.settings(dict(n=5, m=2), paper=dict(n=60))) == {"n": 60, "m": 2}
    monkeypatch.setenv("NGD_SCALE", "huge")
    with pytest.raises(ValueError, match="NGD_SCALE='huge'"):
        opening.settings({})


@pytest.mark.parametrize(
    ("measured", "predicted", "rel", "tolerance", "holds"),
    [
        (1.0, 1.0, "==", {}, True),
        (1.1, 1.0, "==", dict(rtol=0.05), False),
        (1.1, 1.0, "==", dict(atol=0.11), True),
        ([1.0, 2.0], [1.0, 2.1], "==", dict(rtol=0.01), False),
        ([1.0, 2.0], 2.0, "<=", {}, True),
        ([1.0, 2.1], 2.0, "<=", {}, False),
        (3.0, 2.0, ">=", {}, True),
        (1.9, 2.0, ">=", {}, False),
        (1.9, 2.0, ">=", dict(rtol=0.06), True),
        (float("nan"), 1.0, "<=", {}, False),
        (float("inf"), 1.0, ">=", {}, False),
        (1.0, float("inf"), "<=", {}, False),
        (torch.tensor(1.0), np.array(1.0), "==", {}, True),
        ([torch.tensor(1.0)], [1.0], "==", {}, True),
        ([[torch.ones(2)], [np.ones(2)]], [[[1, 1]], [[1, 2]]], "==", {}, False),
    ],
)
def test_rows_hold_or_fail(measured, predicted, rel, tolerance, holds):
    assert (
        ledger.record("Z-T1", measured, predicted, rel, **tolerance)["holds"] is holds
    )


def test_a_row_says_where_its_tensors_were():
    """Also from lists of lists: `numbers` brings them to the host, and a tensor that
    may not become an array by itself stands for one that lives elsewhere.
    """
    trained = torch.ones(2, dtype=torch.float32, requires_grad=True)
    row = ledger.record("Z-T1", [[trained], [trained]], 1.0)
    assert row["holds"] and row["dtype"] == "float32" and row["device"] == "cpu"
    assert ledger.record("Z-T1", [1.0], 1.0)["dtype"] == "float64"


def test_verdicts():
    claims = ledger.registry()
    row = lambda i, *a, **k: ledger.record(i, *a, **k)  # noqa: E731
    good, bad = row("Z-T1", 1, 1), row("Z-T1", 1, 2)
    derived = row("Z-L4", 1, 1, derived=True)
    of = ledger.verdict
    assert of(claims["Z-T1"], []) == "open"
    assert of(claims["Z-T1"], [good]) == "reproduced"
    assert of(claims["Z-T1"], [good, bad]) == "not reproduced"
    assert of(claims["Z-L4"], [derived]) == "derived"
    assert of(claims["Z-T1"], [row("Z-T1", 1, 1, derived=True)]) == "reproduced", (
        "a theorem needs numbers"
    )
    nan = row("Z-T1", [1, 1], [1, 1], printed=[1, float("nan")])
    before = claims["Z-T1"] | {"rejudged": False}
    assert of(before, [nan]) == "not yet re-judged"
    assert of(claims["Z-T1"] | {"rejudged": True}, [nan]) == "false as printed"


def test_a_rival_that_holds_turns_its_row_red():
    near, wide = {"half the rate": 0.9}, {"nearly": 0.81}
    row = ledger.record("Z-T1", 0.81, 0.8, rtol=0.02, unlike=near)
    assert row["holds"] and row["near"] and not row["blind"]
    blind = ledger.record("Z-T1", 0.81, 0.8, rtol=0.02, unlike=near | wide)
    assert blind["holds"] and blind["blind"] == ["nearly"]
    assert ledger.verdict(ledger.registry()["Z-T1"], [row, blind]) == "not reproduced"
    assert "CANNOT TELL" in ledger.outcome(blind).upper()
    with pytest.raises(ValueError, match="one to three"):
        ledger.record("Z-T1", 1, 1, unlike=dict.fromkeys("abcd", 2))


def test_natures():
    """What is printed and holds makes an error impossible, a sharpening possible."""
    claims = {i: c | {"rejudged": True} for i, c in ledger.registry().items()}
    fails = ledger.record("Z-X7", 1, 1, printed=2)
    holds = ledger.record("Z-X7", 1, 1, printed=1)
    bound = ledger.record("Z-X7", 1, 1, printed=2, printed_rel="<=")
    wrong = ledger.record("Z-X7", 1, 2, printed=3)

    def of(nature, *rows):
        return ledger.finding(claims["Z-X7"] | {"nature": nature}, list(rows))

    assert of("error") == "open"
    assert of("error", fails) == "shown"
    assert of("error", fails, holds) == of("error", wrong) == "not shown"
    assert of("error", ledger.record("Z-X7", 1, 1)) == "not shown"
    assert of("sharpened", bound) == "shown"
    assert of("sharpened", fails) == of("sharpened", holds) == "not shown"
    assert of("extended", holds) == "shown" and of("extended", fails) == "not shown"


def test_what_is_not_finite_is_named():
    row = ledger.record("Z-T1", [1.0, float("nan")], float("inf"))
    assert (
        row["measured"] == [1.0, "NaN"]
        and row["predicted"] == "Infinity"
        and not row["holds"]
    )
    assert "FAILS" in ledger._row_text(row)


def test_slack_and_tolerance_are_shown():
    assert ledger.record("Z-T1", [1.0, 4.0], 40.0, "<=")["slack"] == 10
    assert ledger.record("Z-T1", 6.0, 2.0, ">=")["slack"] == 3
    assert ledger.record("Z-T1", 6.0, 6.0)["slack"] is None


def test_record_refuses():
    with pytest.raises(KeyError, match="did you mean"):
        ledger.record("Z-T11", 1, 1)
    with pytest.raises(ValueError, match="rel"):
        ledger.record("Z-T1", 1, 1, rel="~")
    with pytest.raises(ValueError):
        ledger.record("Z-T1", [1, 2, 3], [1, 2])


def notebook(*cells):
    import nbformat

    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    from nbclient import NotebookClient

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    NotebookClient(nb, kernel_name="python3").execute(env=environment)
    return nb


def test_rows_travel_with_the_notebook():
    nb = notebook(
        "import torch, ngdcore as ngd\n"
        "cfg = ngd.opening.settings(dict(n=5, seeds=[0, 1]))",
        "ngd.ledger.record('Z-T1/rate', measured=torch.ones(2), predicted=1.0)\n"
        "ngd.ledger.glue('x', 0.5)",
        "ngd.ledger.save(curve=[1.0, 0.5])",
    )
    rows, saved = ledger.harvest(json.loads(json.dumps(nb)))
    (row,) = rows
    assert (
        row["id"] == "Z-T1"
        and row["part"] == "rate"
        and row["holds"]
        and row["measured"] == [1, 1]
    )
    assert (
        row["settings"] == {"n": 5, "seeds": [0, 1]}
        and row["seeds"] == [0, 1]
        and row["dtype"] == "float32"
    )
    assert saved == {"curve": [1.0, 0.5]}
    glued = (
        nb.cells[1].outputs[1]
        if "scrapbook" in nb.cells[1].outputs[1].metadata
        else nb.cells[1].outputs[0]
    )
    assert glued.metadata["scrapbook"]["name"] == "x"


def test_recording_writes_whole_files(tmp_path):
    """The command executes a chapter at a scale and keeps rows, saved values and
    provenance.
    """
    from ngdcore import __main__ as command

    (tmp_path / "notebooks").mkdir()
    (tmp_path / "ngdcore").symlink_to(ROOT / "ngdcore")
    (tmp_path / "book").symlink_to(ROOT / "book")
    (tmp_path / "notebooks" / "99_small.md").write_text(
        "---\njupytext:\n  text_representation: {extension: .md, format_name: myst}\n"
        "kernelspec: {display_name: Python 3, language: python, name: python3}\n"
        "---\n\n# Small\n\n"
        "```{code-cell} ipython3\nimport ngdcore as ngd\n"
        "cfg = ngd.opening.settings(dict(n=1, seed=3), paper=dict(n=2))\n"
        "ngd.ledger.record('Z-T1', cfg.n, 2)\nngd.ledger.save(a=1.5)\n```\n"
    )
    path = command.record_chapter(tmp_path, "99_small", "paper")
    result = json.loads(path.read_text())
    assert (
        result["scale"] == "paper"
        and result["rows"][0]["holds"]
        and result["saved"] == {"a": 1.5}
    )
    assert (
        result["seeds"] == [3]
        and result["seconds"] > 0
        and result["device"]
        and result["versions"]["torch"]
    )
    assert [p.name for p in path.parent.iterdir()] == ["small.json"]


def test_command_refuses_unknown_chapters():
    done = subprocess.run(
        [sys.executable, "-m", "ngdcore", "record", "no_such"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and "no such chapter: no_such" in done.stderr


def test_nothing_happens_at_import():
    """No warning, no thread pool change, no file, no network, no generator touched."""
    code = (
        "import torch, warnings; warnings.simplefilter('error');"
        "from torch.random import get_rng_state as drawn; s = drawn();"
        "n = torch.get_num_threads(); d = torch.get_default_dtype();"
        "import ngdcore; assert torch.equal(s, drawn());"
        "assert n == torch.get_num_threads() and d == torch.get_default_dtype()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_figures_draw():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ngd.plotting.style()
    _, (a, b) = plt.subplots(1, 2)
    ngd.plotting.theory(a, [1, 2], torch.tensor([1.0, 2.0]), "ngd", "theory")
    ngd.plotting.runs(a, [1, 2], [1, 2], "gd", "run")
    trained = torch.ones(2, requires_grad=True)
    ngd.plotting.band(a, [1, 2], [trained, 2 * trained], "k-fac", "spread")
    ngd.plotting.heatmap(b, torch.eye(3), "Q")
    assert {t.get_text() for t in a.legend().get_texts()} == {"theory", "run", "spread"}
    plt.close("all")
