"""Break formulas on purpose, one at a time, and see who notices: `make mutate`.

    python tests/mutate.py              all mutants that have no verdict yet
    python tests/mutate.py 13 ngdcore   those of a chapter, and of the package

tests/mutants/<chapter>.yml lists, for a chapter, `{mutant, after, code, row, why}`: the
code runs as a cell of its own behind the cell that carries the tag `after` (`prelude`:
before the first cell), and rebinds a name. The chapter's own ledger judges: the mutant
is killed where a row goes red or a cell stops. tests/mutants/ngdcore.yml lists
`{mutant, code, why}` for the package; the numerics of `make check` judge these.

A verdict is kept in _build/mutants.json under a hash of what it depends on, so that an
interrupted run goes on where it stopped; the score stands in tests/mutants/score.json,
which the reproducibility page shows. Survivors there need an `explained` in the list.
"""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "book" / "_ext"), str(ROOT)]

import chapters  # noqa: E402
from companion import fingerprint  # noqa: E402

from ngdcore.ledger import harvest  # noqa: E402

LISTS = ROOT / "tests" / "mutants"
KEPT = ROOT / "_build" / "mutants.json"
SCORE = LISTS / "score.json"


def mutants(stem):
    return yaml.safe_load((LISTS / f"{stem}.yml").read_text(encoding="utf8"))


def mutated(nb, mutant):
    """The notebook with the mutant's cell in its place."""
    place = mutant["after"]
    tags = [cell.metadata.get("tags", []) for cell in nb.cells]
    homes = [i for i, these in enumerate(tags) if place in these]
    if place != "prelude" and len(homes) != 1:
        raise ValueError(f"{mutant['mutant']}: {len(homes)} cells carry {place!r}")
    at = 0 if place == "prelude" else homes[0] + 1
    nb.cells.insert(at, nbformat.v4.new_code_cell(mutant["code"]))
    return nb


def red(row):
    return not row["holds"] or bool(row.get("blind"))


def name(row):
    return row["id"] + (f"/{row['part']}" if row["part"] else "")


def judged_by_chapter(stem, mutant):
    """Which rows went red, or which error stopped a cell; nothing for a survivor."""
    nb = mutated(chapters.read(ROOT / "notebooks" / f"{stem}.md"), mutant)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    nb = chapters.execute(nb, env, allow_errors=True).nb
    failed = [name(row) for row in harvest(nb)[0] if red(row)]
    stopped = [
        output["ename"]
        for cell in nb.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "error"
    ]
    return failed + stopped


def judged_by_tests(mutant):
    """The first test of `make check` that failed; nothing for a survivor."""
    numerics = subprocess.run(
        ["make", "-s", "--no-print-directory", "numerics"], cwd=ROOT,
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    env = os.environ | {"NGD_MUTANT": mutant["code"], "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "mutating", *numerics]
    done = subprocess.run(
        command, cwd=ROOT, env=env | chapters.THREADS, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return failed or (["pytest stopped"] if done.returncode else [])


def key(stem, mutant):
    """Changes with whatever the verdict on a mutant depends on."""
    source = ROOT / "notebooks" / f"{stem}.md"
    judges = (
        [source] if source.is_file() else sorted((ROOT / "tests").glob("test_*.py"))
    )
    parts = [fingerprint(ROOT), json.dumps(mutant, sort_keys=True)]
    parts += [path.read_text(encoding="utf8") for path in judges]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def judge(stem, mutant):
    if stem == "ngdcore":
        return judged_by_tests(mutant)
    return judged_by_chapter(stem, mutant)


def main(names=()):
    """Returns how many survived without an explanation."""
    stems = [path.stem for path in sorted(LISTS.glob("*.yml"))]
    stems = [stem for stem in stems if stem.startswith(tuple(names) or "")]
    todo = [(stem, mutant) for stem in stems for mutant in mutants(stem)]
    KEPT.parent.mkdir(exist_ok=True)
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}

    def verdict(item):
        k = key(*item)
        if k not in kept:
            kept[k] = judge(*item)
            KEPT.write_text(json.dumps(kept))
            by = ", ".join(kept[k][:3]) or "nobody: it survives"
            print(f"{item[0]}: {item[1]['mutant']}: noticed by {by}", flush=True)
        return kept[k]

    with ThreadPoolExecutor(chapters.WORKERS) as pool:
        outcome = list(pool.map(verdict, todo))
    return report(todo, outcome, keep=not names)


def report(todo, outcome, keep):
    """Prints the score; keeps it for the reproducibility page after a whole run."""
    survivors = [
        {"where": stem, **mutant}
        for (stem, mutant), noticed in zip(todo, outcome, strict=True)
        if not noticed
    ]
    score = {
        stem: [
            sum(bool(o) for (s, _), o in zip(todo, outcome, strict=True) if s == stem),
            sum(s == stem for s, _ in todo),
        ]
        for stem in dict.fromkeys(stem for stem, _ in todo)
    }
    if keep:
        text = json.dumps({"score": score, "survivors": survivors}, indent=1)
        SCORE.write_text(text + "\n", encoding="utf8")
    print(f"{len(todo) - len(survivors)} of {len(todo)} mutants noticed")
    for item in survivors:
        reason = item.get("explained", "NOT EXPLAINED")
        print(f"survives: {item['where']}: {item['mutant']}: {reason}")
    return sum("explained" not in item for item in survivors)


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
