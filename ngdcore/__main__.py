"""``python -m ngdcore record [--scale paper] [--again] [chapter ...]``: run chapters at
a scale and keep their results. What is kept for this code and these data is not run
again.
"""

import argparse
import hashlib
import json
import os
import platform
import time
from datetime import date
from pathlib import Path

import torch

from .extras import load
from .ledger import harvest, slug
from .opening import SCALES


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
    names = options.chapters or known
    todo = names if options.again else due(root, names, options.scale)
    print(f"{len(todo)} of {len(names)} to run at scale {options.scale}", flush=True)
    for name in todo:
        path = record_chapter(root, name, options.scale)
        print(f"{name} at scale {options.scale}: {path}", flush=True)


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
    return parser


def due(root: Path, names: list[str], scale: str) -> list[str]:
    """Those chapters whose kept run, if there is one, is of another scale, code or
    data, or of a CPU where a GPU is at hand; those that took longest come first.
    """
    jupytext = load("jupytext", "recording a chapter", "book")
    todo = []
    for name in names:
        notebook = jupytext.read(root / "notebooks" / f"{name}.md", fmt="md:myst")
        kept = _kept(root, name)
        now, then = hashes(root, notebook), kept.get("hashes", {"code": None})
        same = kept.get("scale") == scale and then.items() <= now.items()
        if not same or (torch.cuda.is_available() and kept["device"] != _device()):
            todo.append((-kept.get("seconds", 0.0), name))
    return [name for _, name in sorted(todo)]


def _kept(root: Path, name: str) -> dict:
    path = root / "data" / "recorded" / f"{slug(name)}.json"
    return json.loads(path.read_text(encoding="utf8")) if path.exists() else {}


def record_chapter(root: Path, name: str, scale: str) -> Path:
    """Execute one chapter and write its rows and saved values, with provenance; returns
    the file written. It is named without the chapter's number.
    """
    jupytext, nbclient = (
        load(module, "recording a chapter", "book")
        for module in ("jupytext", "nbclient")
    )
    notebook = jupytext.read(root / "notebooks" / f"{name}.md", fmt="md:myst")
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
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
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
