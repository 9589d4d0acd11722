"""The scoreboard by scale and device: what it says of runs here, at paper scale and on
a GPU, from the kept data and from a small book."""

import json

import jsonschema
import pytest
import tables
from companion import hardware, kept_runs, ledger
from conftest import ROOT
from test_record import write

from ngdcore.__main__ import hashes
from ngdcore.ledger import is_finding, record, registry, verdict

GPU = "NVIDIA H100 80GB HBM3"


def row(name, *args, device="cpu", scale="quick", **more):
    return record(name, *args, **more) | {"device": device, "scale": scale}


@pytest.fixture(scope="module")
def kept():
    """The ledger of a build that ran nothing."""
    return ledger(ROOT, {})


def recorded(scale="paper"):
    files = sorted((ROOT / "data" / "recorded").glob("*.json"))
    runs = (json.loads(path.read_text(encoding="utf8")) for path in files)
    return [run for run in runs if run["scale"] == scale]


def test_kept_runs_say_what_their_rows_say(kept):
    """Counted from the files: verdict, devices, and who has none."""
    rows = {}
    for run in recorded():
        for found in run["rows"]:
            rows.setdefault(found["id"], []).append((found, run["device"]))
    assert rows
    for name, claim in kept.items():
        large = claim["paper_scale"]
        assert (large is not None) == (name in rows)
        if large and not is_finding(registry()[name]):
            assert large["verdict"] == verdict(
                registry()[name], [r for r, _ in rows[name]]
            )
        if large:
            devices = {device for _, device in rows[name]}
            assert set(large["devices"]) == devices
            assert (claim["on_gpu"] is not None) == any("CPU" not in d for d in devices)


def test_what_nobody_ran_is_not_yet(kept):
    assert {c["verdict"] for c in kept.values() if "verdict" in c} == {"open"}
    for claim in kept.values():
        for key in ("paper_scale", "on_gpu"):
            if claim[key] is None and "verdict" in claim:
                assert tables.standing_of(claim, key) == "not yet"


def test_claims_json_of_kept_runs_follows_the_schema(kept):
    schema = json.loads((ROOT / "book" / "claims.schema.json").read_text("utf8"))
    head = dict(schema=1, version="0", commit=None, date="2026-11-28", device="a CPU")
    claims = json.loads(json.dumps([*kept.values()]))
    jsonschema.validate(head | {"scale": "quick", "claims": claims}, schema)


@pytest.fixture
def book(tmp_path):
    """A book of two chapters: one has settings at paper scale, one has not."""
    for folder in ("notebooks", "data/mnist", "data/recorded", "ngdcore"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ngdcore" / "__init__.py").write_text("")
    write(tmp_path, "01_sized", "ngd.chapter(dict(n=1), paper=dict(n=2))")
    write(tmp_path, "02_single", "ngd.chapter(dict(n=1))")
    return tmp_path


def keep(book, name, rows, device=GPU, scale="paper", page=None):
    """A kept run of a chapter, made with the code of now."""
    import jupytext

    notebook = jupytext.read(book / "notebooks" / f"{page or name}.md", fmt="md:myst")
    run = dict(chapter=name.partition("_")[2], scale=scale, device=device, rows=rows)
    run |= dict(versions={}, seconds=1.0, hashes=hashes(book, notebook))
    path = book / "data" / "recorded" / f"{run['chapter']}.json"
    path.write_text(json.dumps(run))


def test_a_verdict_each_for_here_paper_scale_and_gpu(book):
    """The same function judges them, from rows that need not agree."""
    here = {"notebooks/01_sized": [row("Z-T1", 1, 1)]}
    claim = ledger(book, here)["Z-T1"]
    assert claim["verdict"] == "reproduced" and not claim["one_scale"]
    assert claim["paper_scale"] is claim["on_gpu"] is None

    keep(book, "01_sized", [row("Z-T1", 1, 2, scale="paper")])
    claim = ledger(book, here)["Z-T1"]
    assert claim["verdict"] == "reproduced"
    assert claim["paper_scale"]["verdict"] == "not reproduced"
    assert claim["on_gpu"] == {
        "verdict": "not reproduced",
        "devices": [GPU],
        "state": "yes",
        "scales": ["paper"],
    }

    keep(book, "01_sized", [row("Z-T1", 1, 1, scale="paper")], "x86_64 CPU, 2 threads")
    claim = ledger(book, here)["Z-T1"]
    assert claim["paper_scale"]["verdict"] == "reproduced" and not claim["on_gpu"]


def test_a_run_of_earlier_code_is_stale(book):
    keep(book, "01_sized", [row("Z-T1", 1, 1, scale="paper")])
    write(book, "01_sized", "ngd.chapter(dict(n=1), paper=dict(n=3))")
    claim = ledger(book, {})["Z-T1"]
    for key in ("paper_scale", "on_gpu"):
        assert claim[key]["state"] == "stale: code changed"
        cell = tables.kept(claim, key)
        assert "verdict-stale" in cell and "stale: code changed" in cell and GPU in cell
    (book / "ngdcore" / "__init__.py").write_text("changed = True")
    assert kept_runs(book)[0]["state"] == "stale: code and package changed"


def test_a_chapter_of_one_scale_is_there_as_here(book):
    """A run at the quick scale on a GPU counts there, and says its scale."""
    here = {"notebooks/02_single": [row("Z-T1", 1, 1)]}
    claim = ledger(book, here)["Z-T1"]
    assert claim["one_scale"] and claim["paper_scale"] is None
    assert tables.standing_of(claim, "paper_scale") == "as here"
    assert tables.standing_of(claim, "on_gpu") == "not yet"
    keep(book, "02_single", [row("Z-T1", 1, 1)], scale="quick")
    claim = ledger(book, here)["Z-T1"]
    assert claim["paper_scale"] is None and claim["on_gpu"]["scales"] == ["quick"]
    assert "quick scale" in tables.kept(claim, "on_gpu")
    both = here | {"notebooks/01_sized": [row("Z-T1", 1, 1)]}
    assert not ledger(book, both)["Z-T1"]["one_scale"]


def test_a_build_on_a_gpu_fills_its_column(book):
    here = {"notebooks/01_sized": [row("Z-T1", 1, 1, device="cuda:0")]}
    assert ledger(book, here)["Z-T1"]["on_gpu"]["scales"] == ["quick"]
    assert (
        ledger(book, {"notebooks/01_sized": [row("Z-T1", 1, 1)]})["Z-T1"]["on_gpu"]
        is None
    ), "what ran on the CPU"
    assert hardware("cpu").endswith("CPU")


def test_the_table_says_it_in_columns(kept):
    report = dict(scale="quick", device="x86_64 CPU")
    view = tables.View(
        kept, report, [], {}, {}, "book/scoreboard", lambda doc: None, lambda doc: doc
    )
    html = tables.scoreboard(view, [])
    for head in ("Here", "At paper scale", "On a GPU"):
        assert f"<th>{head}</th>" in html
    statements = tables.statements(view)
    assert html.count('id="claim-') == len(statements)
    large = [c for c in statements if c["paper_scale"]]
    assert f"At paper scale: {len(large)} of {len(statements)} statements" in html
    attributes = tables.attributes(view, large[0], [])
    assert f'data-large="{large[0]["paper_scale"]["verdict"]}' in attributes
