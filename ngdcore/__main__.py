"""``python -m ngdcore record [--scale paper] [chapter ...]``: run chapters at a scale
and keep their results.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

from .extras import load
from .ledger import harvest
from .opening import SCALES


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and record the named chapters (all of them by default)."""
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
    for name in options.chapters or known:
        path = record_chapter(root, name, options.scale)
        print(f"{name} at scale {options.scale}: {path}")


def record_chapter(root: Path, name: str, scale: str) -> Path:
    """Execute one chapter and write its rows and saved values, with provenance; returns
    the file written.
    """
    jupytext, nbclient = (
        load(module, "recording a chapter", "book")
        for module in ("jupytext", "nbclient")
    )
    notebook = jupytext.read(root / "notebooks" / f"{name}.md", fmt="md:myst")
    environment = {**os.environ, "NGD_SCALE": scale, "PYTHONPATH": str(root)}
    start = time.perf_counter()
    nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3").execute(
        env=environment
    )
    rows, saved = harvest(notebook)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = {
        "chapter": name,
        "scale": scale,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
        "saved": saved,
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seeds": sorted({s for row in rows for s in row["seeds"]}),
    }
    path = root / "data" / "recorded" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # An interrupted write leaves no half a record behind.
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    draft.replace(path)
    return path


if __name__ == "__main__":
    main()
