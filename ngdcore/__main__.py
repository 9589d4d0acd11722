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

from . import chapter, ledger


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and record the named chapters (all of them by default)."""
    parser = argparse.ArgumentParser(prog="python -m ngdcore", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "record", help="execute chapters, keep what they give in data/recorded/"
    )
    command.add_argument("--scale", choices=chapter.SCALES, default="paper")
    command.add_argument(
        "chapters",
        nargs="*",
        help="names in notebooks/, such as 04_theorem_3 (default: all)",
    )
    options = parser.parse_args(argv)
    root = Path(__file__).parent.parent
    if not (root / "notebooks").is_dir():
        parser.error(
            "no notebooks/ beside the package: recording needs a checkout of the book, not an installed wheel"
        )
    known = sorted(path.stem for path in (root / "notebooks").glob("*.md"))
    unknown = set(options.chapters) - set(known)
    if unknown:
        parser.error(
            f"no such chapter: {', '.join(sorted(unknown))}; there are {', '.join(known)}"
        )
    for chapter in options.chapters or known:
        print(
            f"{chapter} at scale {options.scale}: {record_chapter(root, chapter, options.scale)}"
        )


def record_chapter(root: Path, chapter: str, scale: str) -> Path:
    """Execute one chapter and write its rows and saved values, with provenance; returns
    the file written.
    """
    import jupytext
    import nbclient

    notebook = jupytext.read(root / "notebooks" / f"{chapter}.md", fmt="md:myst")
    environment = {**os.environ, "NGD_SCALE": scale, "PYTHONPATH": str(root)}
    start = time.perf_counter()
    nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3").execute(
        env=environment
    )
    rows, saved = ledger.harvest(notebook)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = {
        "chapter": chapter, "scale": scale, "seconds": round(time.perf_counter() - start, 1),
        "rows": rows, "saved": saved,
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seeds": sorted({s for row in rows for s in row["seeds"]}),
    }  # fmt: skip
    path = root / "data" / "recorded" / f"{chapter}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(
        ".part"
    )  # an interrupted write leaves no half a record behind
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(path)
    return path


if __name__ == "__main__":
    main()
