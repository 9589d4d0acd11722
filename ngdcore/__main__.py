"""``python -m ngdcore record [--scale paper] [--again] [--list] [chapter ...]``: run
chapters at a scale and keep their results. What is kept for this code and these data is
not run again; what has no settings of its own at that scale is not run either.
"""

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import time
from datetime import date
from pathlib import Path

import torch

from .extras import load
from .ledger import harvest, slug
from .opening import SCALES, device


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and record the named chapters (all of them by default)."""
    parser = _parser()
    options = parser.parse_args(argv)
    root = Path(__file__).parent.parent
    if not (root / "notebooks").is_dir():
        parser.error(
            "no notebooks/ beside the package: recording needs a checkout of the book,"
            " not an installed wheel"
        )
    known = sorted(path.stem for path in (root / "notebooks").glob("*.md"))
    if unknown := sorted(set(options.chapters) - set(known)):
        parser.error(
            f"no such chapter: {', '.join(unknown)}; there are {', '.join(known)}"
        )
    if failed := _recorded(root, options.chapters or known, options):
        parser.exit(1, f"failed, and nothing kept: {', '.join(failed)}\n")


def _recorded(root: Path, names: list[str], options: argparse.Namespace) -> list[str]:
    """Record what of these chapters is due, and say so; returns those that failed."""
    scale = options.scale
    sized = [name for name in names if has_scale(_read(root, name), scale)]
    if without := [name for name in names if name not in sized]:
        print(
            f"not run, having no settings for scale {scale}, where they would give what"
            f" scale quick gives (to keep that: --scale quick): {', '.join(without)}"
        )
    again = options.again
    todo = dict.fromkeys(sized, "again") if again else due(root, sized, scale)
    print(f"{len(todo)} of {len(sized)} to run at scale {scale}", flush=True)
    failed = []
    for name, why in todo.items():
        print(f"python -m ngdcore record --scale {scale} {name}  # {why}", flush=True)
        if not options.list and not _tried(root, name, scale):
            failed.append(name)
    return failed


def _parser() -> argparse.ArgumentParser:
    """What the command line may say."""
    parser = argparse.ArgumentParser(prog="python -m ngdcore", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "record", help="execute chapters, keep what they give in data/recorded/"
    )
    command.add_argument("--scale", choices=SCALES, default="paper")
    command.add_argument(
        "chapters",
        nargs="*",
        help="names in notebooks/, such as 04_theorem_3 (default: all)",
    )
    command.add_argument(
        "--again", action="store_true", help="run also what is kept and up to date"
    )
    command.add_argument(
        "--list", action="store_true", help="say what would run, and why; run nothing"
    )
    return parser


def _tried(root: Path, name: str, scale: str) -> bool:
    """Record a chapter and say where; if it fails say why, and let the others run."""
    errors = load("nbclient.exceptions", "recording a chapter", "book")
    try:
        print(record_chapter(root, name, scale), flush=True)
    except (errors.CellControlSignal, errors.DeadKernelError) as error:
        print(error, flush=True)
        return False
    return True


def due(root: Path, names: list[str], scale: str) -> dict[str, str]:
    """Those chapters whose kept run, if there is one, is of another scale, code or
    data, or of a CPU where a GPU is at hand, each with that reason; those that took
    longest come first.
    """
    kept = {name: _kept(root, name) for name in names}
    longest = sorted(names, key=lambda name: (-kept[name].get("seconds", 0.0), name))
    reasons = {name: _reason(root, name, kept[name], scale) for name in longest}
    return {name: why for name, why in reasons.items() if why}


def _reason(root: Path, name: str, kept: dict, scale: str) -> str:
    """Why a chapter whose kept run this is should run again; empty if it should not."""
    if not kept:
        return "no record"
    if kept["scale"] != scale:
        return f"the record is of scale {kept['scale']}"
    if "hashes" not in kept:
        return "the record does not say what it was made with"
    if changed := changes(kept["hashes"], hashes(root, _read(root, name))):
        return changed
    other = device().type != "cpu" and kept["device"] != _device()
    return f"the record is of {kept['device']}" if other else ""


def changes(then: dict[str, str], now: dict[str, str]) -> str:
    """What of a kept run's `hashes` is no longer so, in words.

    Examples
    --------
    >>> changes({"code": "1", "package": "1"}, {"code": "2", "package": "2"})
    'code and package changed'
    >>> changes({"code": "1"}, {"code": "1", "data": "2"})
    ''
    """
    changed = [name for name, hash_ in then.items() if now[name] != hash_]
    return f"{' and '.join(changed)} changed" if changed else ""


def has_scale(notebook: dict, scale: str) -> bool:
    """Whether a chapter has settings of its own at a scale: whether one of its cells
    gives them to ``ngd.chapter`` or ``ngd.opening.settings``. A chapter without runs
    there as at the quick scale, which every chapter has.

    Examples
    --------
    >>> opening = "ngd.chapter(quick=dict(n=1), paper=dict(n=2))"
    >>> cell = {"cell_type": "code", "source": opening}
    >>> has_scale({"cells": [cell]}, "paper"), has_scale({"cells": [cell]}, "smoke")
    (True, False)
    """
    if scale == "quick":
        return True
    cells = [c["source"] for c in notebook["cells"] if c["cell_type"] == "code"]
    python = (re.sub(r"(?m)^[%!].*", "", cell) for cell in cells if scale in cell)
    calls = (
        node
        for cell in python
        for node in ast.walk(ast.parse(cell))
        if isinstance(node, ast.Call)
    )
    opened = (c for c in calls if ast.unparse(c.func).endswith(("chapter", "settings")))
    return any(word.arg == scale for call in opened for word in call.keywords)


def _read(root: Path, name: str) -> dict:
    """A chapter as a notebook."""
    jupytext = load("jupytext", "recording a chapter", "book")
    return jupytext.read(root / "notebooks" / f"{name}.md", fmt="md:myst")


def _kept(root: Path, name: str) -> dict:
    path = root / "data" / "recorded" / f"{slug(name)}.json"
    return json.loads(path.read_text(encoding="utf8")) if path.exists() else {}


def record_chapter(root: Path, name: str, scale: str) -> Path:
    """Execute one chapter and write its rows and saved values, with provenance; returns
    the file written. It is named without the chapter's number.
    """
    notebook = _read(root, name)
    nbclient = load("nbclient", "recording a chapter", "book")
    made_with = hashes(root, notebook)
    environment = {**os.environ, "NGD_SCALE": scale, "PYTHONPATH": str(root)}
    start = time.perf_counter()
    nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3").execute(
        env=environment
    )
    rows, saved = harvest(notebook)
    result = {
        "chapter": slug(name),
        "scale": scale,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
        "saved": saved,
        "device": _device(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seeds": sorted({s for row in rows for s in row["seeds"]}),
        "date": date.today().isoformat(),
        "hashes": made_with,
    }
    return _written(root / "data" / "recorded" / f"{slug(name)}.json", result)


def hashes(root: Path, notebook: dict) -> dict[str, str]:
    """Of what a kept run was made with: the chapter's code cells, the package and the
    data that ship. While these are the same the run is what the chapter would give now.

    Examples
    --------
    >>> cell = {"cell_type": "code", "source": "1 + 1"}
    >>> one, two = ({"cells": [cell] * k} for k in (1, 2))
    >>> root = Path(__file__).parent.parent
    >>> hashes(root, one) == hashes(root, one), hashes(root, one) == hashes(root, two)
    (True, False)
    """
    cells = [c["source"] for c in notebook["cells"] if c["cell_type"] == "code"]
    files = [p.read_bytes() for p in sorted((root / "ngdcore").rglob("*.py"))]
    parts = {"code": [c.encode() for c in cells], "package": files}
    sets = sorted((root / "data").glob("*/*.gz"))
    parts["data"] = [path.read_bytes() for path in sets]
    return {name: _digest(part) for name, part in parts.items()}


def _digest(parts: list[bytes]) -> str:
    each = b"".join(hashlib.sha256(part).digest() for part in parts)
    return hashlib.sha256(each).hexdigest()[:16]


def _device() -> str:
    """The device that chapters run on, by its own name."""
    if device().type == "cuda":
        return torch.cuda.get_device_name(device())
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _written(path: Path, result: dict) -> Path:
    """The path, once it holds the result of a run as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # An interrupted write leaves no half a record behind.
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    draft.replace(path)
    return path


if __name__ == "__main__":
    main()
