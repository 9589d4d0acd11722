"""Run chapters several at a time, and keep the runs where the book looks for what has
run already.

    python book/_ext/chapters.py          every chapter of _toc.yml that has no run yet
    python book/_ext/chapters.py 13 27    of these chapters alone

`make book` does this before `jupyter-book build .`, which would run the same chapters
one after the other."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jupytext
import nbformat
from companion import THREADS, cache_path
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parents[2]
WORKERS = max(2, min(4, os.cpu_count() or 1))  # kernels of one thread each
# Machines, and hours on one machine, differ by a factor of three: what a chapter costs
# is told in seconds of a quiet machine, on which this piece of work takes YARD of them.
YARDSTICK = """import time, torch
torch.set_num_threads(1)
def yardstick():
    start, a, x = time.process_time(), torch.ones(500, 500).double(), torch.ones(100)
    for _ in range(20):
        a @ a
    for _ in range(8000):
        torch.relu(x)
    for _ in range(800_000):
        x
    return time.process_time() - start
yardstick()
yard_before = yardstick()"""
YARD = 0.1
PROBE = """import ngdcore
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
used = [getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN)]
used = sum(u.ru_utime + u.ru_stime for u in used)
print(used, (yard_before + yardstick()) / 2, ngdcore.__file__)"""


class Run(NamedTuple):
    nb: nbformat.NotebookNode  # executed
    seconds: float  # that passed
    cpu: float  # CPU seconds of the kernel, as on a quiet machine
    package: str  # the copy of ngdcore that it imported


def read(path):
    """The notebook of a chapter, as the book reads it."""
    nb = jupytext.read(path, fmt="md:myst")
    nb.metadata.pop("jupytext", None)
    return nb


def execute(nb, env, **options):
    """Run a notebook in an empty folder, in a kernel of its own that has this
    environment.
    """
    nb.cells.insert(0, nbformat.v4.new_code_cell(YARDSTICK))
    nb.cells.append(nbformat.v4.new_code_cell(PROBE))
    # A run is found again by its code cells with their metadata, and by the kernel's
    # name: all stay as written.
    kernelspec, start = nb.metadata.kernelspec, time.perf_counter()
    with TemporaryDirectory() as folder:
        options |= {
            "resources": {"metadata": {"path": folder}},
            "extra_arguments": ["--log-level=ERROR"],
        }
        NotebookClient(nb, timeout=600, record_timing=False, **options).execute(
            env=env | THREADS
        )
    seconds, nb.metadata.kernelspec = time.perf_counter() - start, kernelspec
    del nb.cells[0]
    cpu, yard, package = "".join(out["text"] for out in nb.cells.pop().outputs).split()
    return Run(nb, seconds, float(cpu) * YARD / float(yard), package)


def keep(cache, nb, path, seconds):
    bundle = CacheBundleIn(nb, str(path), data={"execution_seconds": seconds})
    cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def known(cache, nb):
    try:
        return cache.match_cache_notebook(nb)
    except KeyError:
        return None


def named(pages, names):
    """Those of the pages whose file name is, or begins with, one of the names; all of
    them where none is named.
    """
    chosen = [page for page in pages if page.stem.startswith(tuple(names) or "")]
    for name in names:
        if not any(page.stem.startswith(name) for page in chosen):
            known = ", ".join(page.stem for page in pages)
            raise SystemExit(f"no chapter begins with {name!r}; there are {known}")
    return chosen


def main(names=()):
    """Returns how many chapters failed; their tracebacks are printed."""
    path = cache_path(ROOT, os.environ.get("NGD_DATA_DIR"))
    path.mkdir(parents=True, exist_ok=True)
    cache = get_cache(path)
    pages = [ROOT / f"{name}.md" for name in parse_toc_yaml(ROOT / "_toc.yml")]
    pages = named([page for page in pages if page.parent.name == "notebooks"], names)
    chapters = {page: read(page) for page in pages}
    todo = {page: nb for page, nb in chapters.items() if not known(cache, nb)}
    say(f"{len(todo)} of {len(chapters)} chapters to run, {WORKERS} at a time")
    env, failed = os.environ | {"NGD_BOOK": "1", "PYTHONPATH": str(ROOT)}, 0
    with ThreadPoolExecutor(WORKERS) as pool:
        pages = {pool.submit(execute, nb, env): page for page, nb in todo.items()}
        try:
            for count, future in enumerate(as_completed(pages), 1):
                failed += not kept(cache, pages[future], future, f"{count}/{len(todo)}")
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def kept(cache, page, future, count):
    """Whether a chapter ran; its run is kept, or its traceback printed."""
    if error := future.exception():
        say(f"[{count}] {page.stem} failed: {error}", sys.stderr)
        return False
    run = future.result()
    keep(cache, run.nb, page, run.seconds)
    say(f"[{count}] {page.stem}: {run.seconds:.1f} s")
    return True


def say(text, file=None):
    print(text, file=file, flush=True)


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
