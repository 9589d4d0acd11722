"""The package as it arrives: with nothing but what its wheel declares, with the extra
that Colab's install cell asks for, and as quick to import as that allows.
"""

import json
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import sync
from conftest import ROOT, environment
from nbclient import NotebookClient
from packaging.requirements import Requirement

COLAB = ("ipykernel",)  # runs notebooks; what else Colab has must not be relied on


def closure(requirements):
    """Installed distributions that these requirements ask for, directly or not."""
    found, asked, todo = {}, set(), [Requirement(str(r)) for r in requirements]
    while todo:
        need = todo.pop()
        key = (need.name.lower(), frozenset(need.extras))
        if key in asked or not wanted(need, ()):
            continue
        asked.add(key)
        home = found[need.name.lower()] = metadata.distribution(need.name)
        below = map(Requirement, home.requires or ())
        todo += [r for r in below if wanted(r, need.extras)]
    return found


def wanted(need, extras):
    """Whether a requirement applies here, under one of these extras or under none."""
    return need.marker is None or any(
        need.marker.evaluate({"extra": extra}) for extra in ("", *extras)
    )


def unpacked(site):
    (info,) = site.glob("ngdcore-*.dist-info")
    return info


def requires(site, extra=None):
    """What the wheel asks for, by itself or with an extra."""
    lines = map(Requirement, metadata.PathDistribution(unpacked(site)).requires)
    found = [need for need in lines if wanted(need, [extra] if extra else ())]
    for need in found:
        need.marker = None  # it is wanted, whoever asks
    return found


def bare(folder, site, requirements):
    """The Python of a fresh environment that holds the wheel, these requirements and
    theirs, and nothing else; they are linked from where they are installed.
    """
    venv.create(folder, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    entries = set(site.iterdir())
    for home in closure(requirements).values():
        tops = {file.parts[0] for file in home.files or ()} - {"..", "__pycache__"}
        entries |= {Path(home.locate_file(top)) for top in tops}
    for entry in entries:
        (packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def says(python, code):
    """What a line of code prints there."""
    done = subprocess.run(
        [python, "-I", "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def core(wheel, tmp_path_factory):
    return bare(tmp_path_factory.mktemp("core"), wheel, requires(wheel))


def test_the_core_needs_four_packages(wheel):
    names = {r.name for r in requires(wheel)}
    assert names == {"torch", "numpy", "scipy", "jaxtyping"}


def test_the_core_works_alone(core):
    out = says(
        core,
        "import importlib.util as u, ngdcore as ngd, torch\n"
        "assert not any(map(u.find_spec, ['matplotlib', 'yaml', 'pooch', 'tqdm']))\n"
        "d = ngd.data.mnist(classes=(4, 9), n_train=20, n_test=10)\n"
        "net = ngd.models.MLP([784, 64, 1])\n"
        "opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), damping=1e-3)\n"
        "for _ in ngd.optim.run(opt, d.x, d.y, 3): pass\n"
        "ngd.kernels.analytic(d.x, depth=2).gram()\n"
        "ngd.data.forster(ngd.data.gaussian(9, 3)); ngd.opening.settings({'n': 1})\n"
        "assert {'plotting', 'ledger'} < set(dir(ngd))\nprint(ngd.__file__)",
    )
    assert str(core.parent.parent) in out


def test_what_is_missing_names_its_extra(core):
    """Each use of a package that comes with an extra, in one process."""
    uses = {
        "ngd.plotting": ("matplotlib", "notebooks"),
        "from ngdcore import plotting": ("matplotlib", "notebooks"),
        "ngd.ledger.record('Z-T1', 1, 1)": ("yaml", "notebooks"),
        "ngd.data.mnist(n_train=20000)": ("pooch", "notebooks"),
        "ngd.data.cifar10()": ("pooch", "notebooks"),
        "next(ngd.optim.run(opt, x, x, 3, progress=True))": ("tqdm", "notebooks"),
        "ngd.sweep(abs, {'x': [1]})": ("joblib", "notebooks"),
        "__main__.record_chapter(None, 'x', 'quick')": ("jupytext", "book"),
    }
    code = (
        "import ngdcore as ngd, torch\nfrom ngdcore import __main__\n"
        "net, x = ngd.models.MLP([1, 1]), torch.ones(2, 1).double()\n"
        "opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), damping=1.0)\n"
    )
    for use in uses:
        code += f"try: {use}\nexcept ImportError as error: print(error)\n"
    said = says(core, code).splitlines()
    for line, (package, extra) in zip(said, uses.values(), strict=True):
        assert f"needs {package}: pip install 'ngdcore[{extra}]'" in line, said


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    extra = re.search(r"ngdcore\[(\w+)\]", sync.INSTALL)[1]
    needed = [*requires(wheel, extra), *COLAB]
    return bare(tmp_path_factory.mktemp("fresh"), wheel, needed)


def test_a_made_notebook_runs_on_what_its_first_cell_installs(
    fresh, tmp_path, monkeypatch
):
    """As on Colab: the .ipynb, in an empty folder."""
    spec = {
        "argv": [str(fresh), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "fresh",
        "language": "python",
    }
    kernel = tmp_path / "kernels" / "fresh"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    path = ROOT / "notebooks" / "01_quickstart.ipynb"
    nb = nbformat.read(path, as_version=4)
    nb.cells.append(nbformat.v4.new_code_cell("ngd.__file__"))
    (tmp_path / "work").mkdir()
    resources = {"metadata": {"path": str(tmp_path / "work")}}
    NotebookClient(nb, kernel_name="fresh", timeout=600, resources=resources).execute(
        env=environment(OMP_NUM_THREADS="1")
    )
    assert str(fresh.parent.parent) in nb.cells[-1].outputs[0]["data"]["text/plain"]


def test_the_fresh_environment_holds_no_more_than_declared(fresh):
    """Otherwise the test above could not fail."""
    code = "import importlib.util as u; print([n for n in {} if u.find_spec(n)])"
    tests_only = ["pytest", "hypothesis", "sphinx", "jupytext", "ruff", "beartype"]
    assert says(fresh, code.format(tests_only)) == "[]\n"
    assert says(fresh, code.format(["pooch", "tqdm"])) == "['pooch', 'tqdm']\n"


def test_importing_costs_what_torch_and_scipy_cost():
    """CPU seconds of fresh processes, in turn; the least of each, since nothing makes
    an import faster than it is.
    """
    timed = "import time; t = time.process_time(); import {}; "
    timed += "print(time.process_time() - t)"
    names = ("torch, scipy.special", "ngdcore")
    seconds = {name: [] for name in names}
    for _ in range(4):
        for name in names:
            command = [sys.executable, "-c", timed.format(name)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
            seconds[name].append(float(done.stdout))
    least, ours = (min(seconds[name]) for name in names)
    print(f"\nimport {names[0]}: {least:.2f} s, import ngdcore: {ours:.2f} s")
    assert ours <= 1.2 * least


def test_importing_loads_no_extra():
    """Beyond what torch itself loads where it finds it."""
    extras = ["matplotlib", "seaborn", "pandas", "plotly", "pooch", "tqdm", "yaml"]
    extras += ["joblib", "threadpoolctl"]
    code = (
        "import torch, sys; before = set(sys.modules); import ngdcore\n"
        f"print(set({[*extras, 'scipy.integrate']}) & (set(sys.modules) - before))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
