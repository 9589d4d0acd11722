"""What a whole test run does once: build the wheel, run every chapter from it, build
the book from those runs.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chapters
import nbformat
import pytest
from browsing import address, visits  # noqa: F401 (fixtures)
from companion import cache_path
from hypothesis import settings
from jupyter_cache import get_cache

# The same cases every time, however busy the machine.
settings.register_profile("ngd", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("ngd")

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = [p.stem for p in sorted((ROOT / "notebooks").glob("*.md"))]


def environment(**extra):
    """The caller's, without what would let a test see another copy of the package,
    other data or another scale.
    """
    hidden = {"PYTHONPATH", "NGD_DATA_DIR", "NGD_SCALE", "NGD_BOOK"}
    return {k: v for k, v in os.environ.items() if k not in hidden} | extra


def jupyter_book(source, *options, **extra):
    """Build a book; returns exit status and log."""
    command = [
        str(Path(sys.executable).with_name("jupyter-book")),
        "build",
        str(source),
        *map(str, options),
    ]
    done = subprocess.run(
        command,
        env=environment(NO_COLOR="1", **extra),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """A folder with the package as pip installs it from the wheel, and nothing else."""
    made, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    python = [sys.executable, "-m"]
    build = [*python, "build", "--wheel", "--no-isolation", "--outdir", made, ROOT]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    install = [*python, "pip", "install", "-q", "--no-deps", "--target", site]
    subprocess.run([*install, *made.glob("*.whl")], check=True)
    return site


@pytest.fixture(scope="session")
def cache():
    """Where the book looks for what has run already."""
    assert "NGD_SCALE" not in os.environ or os.environ["NGD_SCALE"] == "quick", (
        "the tests hold at the quick scale"
    )
    path = cache_path(ROOT)
    path.mkdir(parents=True, exist_ok=True)
    return get_cache(path)


def needed(items):
    """The chapters that the chosen tests will ask for, in order."""
    asked = [item for item in items if "run_chapter" in item.fixturenames]
    named = [
        getattr(item, "callspec", None) and item.callspec.params.get("stem")
        for item in asked
    ]
    return [stem for stem in CHAPTERS if None in named or stem in named]


def from_wheel(stem, env):
    nb = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    run = chapters.execute(nb, env)
    nb.cells = [
        cell for cell in nb.cells if "install" not in cell.metadata.get("tags", [])
    ]
    print(f"\n{stem}: {run.seconds:.1f} s, {run.cpu:.1f} s CPU")
    return run


@pytest.fixture(scope="session")
def pool():
    """Kernels run in here, a few at a time. They have one thread each: more would only
    get in each other's way.
    """
    with ThreadPoolExecutor(chapters.WORKERS) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def run_chapter(request, pool, wheel, cache):
    """chapter -> (executed notebook, CPU seconds). Each runs once, as on Colab: its
    .ipynb, the wheel, an empty folder.

    CPU seconds of the kernel, told in those of a quiet machine, are no less than what a
    reader with an idle core waits; a busy or slow machine adds none."""
    env = environment(PYTHONPATH=str(wheel), NGD_BOOK="1")  # the book's figures
    runs = {
        stem: pool.submit(from_wheel, stem, env)
        for stem in needed(request.session.items)
    }
    kept = set()

    def run(stem):
        done = runs[stem].result()
        assert str(wheel) in done.package, "not the wheel's copy"
        if stem not in kept:
            chapters.keep(
                cache, done.nb, ROOT / "notebooks" / f"{stem}.md", done.seconds
            )
            kept.add(stem)
        return done.nb, done.cpu

    return run


@pytest.fixture(scope="session")
def built(run_chapter, tmp_path_factory):
    """(folder of the built pages, log), from the runs above."""
    for stem in CHAPTERS:
        run_chapter(stem)
    out = tmp_path_factory.mktemp("book")
    status, log = jupyter_book(
        ROOT, "-W", "--keep-going", "-n", "--all", "--path-output", out
    )
    assert status == 0, log[-6000:]
    return out / "_build" / "html", log


@pytest.fixture(scope="session")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("NGD_CHROMIUM") or next(
        filter(None, map(shutil.which, names)), None
    )
    if path is None:
        message = (
            "no Chromium: install one (Debian: apt-get install chromium) or set"
            " NGD_CHROMIUM to its path"
        )
        if os.environ.get("CI") or os.environ.get("NGD_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    return path
