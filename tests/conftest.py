"""What a whole test run does once: build the wheel, run every chapter from it, build the book from those runs."""
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from companion import cache_path
from hypothesis import settings
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient

# The same cases every time, however busy the machine.
settings.register_profile("ngd", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("ngd")

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = [p.stem for p in sorted((ROOT / "notebooks").glob("*.md"))]


def environment(**extra):
    """The caller's, without what would let a test see another copy of the package, other data or another scale."""
    hidden = {"PYTHONPATH", "NGD_DATA_DIR", "NGD_SCALE", "NGD_BOOK"}
    return {k: v for k, v in os.environ.items() if k not in hidden} | extra


def jupyter_book(source, *options, **extra):
    """Build a book; returns exit status and log."""
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(source), *map(str, options)]
    done = subprocess.run(command, env=environment(NO_COLOR="1", **extra), text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """A folder with the package as pip installs it from the wheel, and nothing else."""
    made, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", made, ROOT], check=True,
                   stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, *made.glob("*.whl")],
                   check=True)
    return site


@pytest.fixture(scope="session")
def cache():
    """Where the book looks for what has run already."""
    assert "NGD_SCALE" not in os.environ or os.environ["NGD_SCALE"] == "quick", "the tests hold at the quick scale"
    path = cache_path(ROOT)
    path.mkdir(parents=True, exist_ok=True)
    return get_cache(path)


def children():
    """CPU seconds of all processes that this one has started and seen end."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="session")
def run_chapter(wheel, cache, tmp_path_factory):
    """chapter -> (executed notebook, CPU seconds). Each runs once, as on Colab: its .ipynb, the wheel, an empty folder.

    CPU seconds of the kernel are no less than what a reader with two idle cores waits; a busy machine adds none.
    """
    done = {}

    def run(stem):
        if stem not in done:
            nb = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
            nb.cells.append(nbformat.v4.new_code_cell("import ngdcore; print(ngdcore.__file__)"))
            # The cache's key is code cells with their metadata, and the kernel's name: keep all as they are written.
            kernelspec = nb.metadata.kernelspec
            folder, start, before = tmp_path_factory.mktemp(stem), time.perf_counter(), children()
            client = NotebookClient(nb, timeout=600, record_timing=False, resources={"metadata": {"path": str(folder)}})
            client.execute(env=environment(PYTHONPATH=str(wheel), NGD_BOOK="1"))     # the book's figures
            seconds, cpu = time.perf_counter() - start, children() - before
            assert str(wheel) in nb.cells.pop().outputs[0]["text"], "not the wheel's copy"
            nb.metadata.kernelspec = kernelspec
            nb.cells = [cell for cell in nb.cells if "install" not in cell.metadata.get("tags", [])]
            cache.cache_notebook_bundle(CacheBundleIn(nb, str(ROOT / "notebooks" / f"{stem}.md"),
                                                      data={"execution_seconds": seconds}),
                                        check_validity=False, overwrite=True)
            print(f"\n{stem}: {seconds:.1f} s, {cpu:.1f} s CPU")
            done[stem] = nb, cpu
        return done[stem]
    return run


@pytest.fixture(scope="session")
def built(run_chapter, tmp_path_factory):
    """(folder of the built pages, log), from the runs above."""
    for stem in CHAPTERS:
        run_chapter(stem)
    out = tmp_path_factory.mktemp("book")
    status, log = jupyter_book(ROOT, "-W", "--keep-going", "-n", "--all", "--path-output", out)
    assert status == 0, log[-6000:]
    return out / "_build" / "html", log


@pytest.fixture(scope="session")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("NGD_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        message = "no Chromium: install one (Debian: apt-get install chromium) or set NGD_CHROMIUM to its path"
        if os.environ.get("CI") or os.environ.get("NGD_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    return path
