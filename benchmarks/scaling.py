"""How seconds and memory of the engine grow with samples, width, depth and outputs, and
how its errors grow with the condition number.

    python benchmarks/scaling.py     some twenty minutes; goes on where it was stopped

Every point is a process of its own with one thread. Seconds are its CPU seconds, the
fastest of several calls; "MB more" is by how much the first call's peak is above what
the process held before (Linux counts it), after a call on eight samples. An exponent
is the slope of the logarithm of the seconds over the three largest points of a row; the
operation count, symmetry not used, has its slope over the same points.

Writes benchmarks/scaling.json and, from it, book/assets/scaling.svg: the page "How
fast, how exact" shows both.
"""

import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from libraries import GEMM
from peers import machine

import ngdcore as ngd

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "scaling.json"
PICTURE = ROOT / "book" / "assets" / "scaling.svg"
BASE = {"N": 500, "M": 1024, "L": 3, "C": 1}
SIZES = {
    "gram": {
        "N": [300, 1000, 3000, 10_000, 20_000],
        "M": [256, 1024, 4096, 8192, 16_384],
        "L": [2, 4, 8, 16],
        "C": [1, 3, 10, 30, 100],
    },
    "step": {"N": [300, 1000, 3000, 10_000], "M": [256, 1024, 4096, 8192]},
    "kfac": {"N": [300, 1000, 3000, 6000], "M": [256, 1024, 4096, 8192]},
    "analytic": {"N": [1000, 3000, 10_000, 20_000]},
}
OUTPUTS = {"N": 100}  # with many outputs NC counts: a hundred samples are enough
REPEATS, PATIENCE = 5, 20.0  # calls of a point, and the seconds after which no more
DISTANCES = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]


def point(axis, size):
    """The sizes of one point: the base, with one of them turned."""
    return BASE | (OUTPUTS if axis == "C" else {}) | {axis: size}


def layers(p):
    return [784, *[p["M"]] * (p["L"] - 1), p["C"]]


def ridge(n, rows, side, columns):
    """One factor of K-FAC on its smaller side: Gram matrix, Cholesky factor, and the
    products with a gradient (side x columns), or with the samples.
    """
    small, large = sorted((rows, side))
    solved = 2 * small * small * (columns if side <= rows else n)
    return 2 * small * small * large + small**3 / 3 + solved


def operations(task, p):
    """Multiplications and additions, symmetry not used."""
    n, c, widths = p["N"], p["C"], layers(p)
    if task == "analytic":  # the products of the inputs; elementwise work has N^2 too
        return 2 * n * n * 784
    pairs = list(zip(widths, widths[1:]))
    sweeps = sum(2 * n * a * b for a, b in pairs)
    sweeps += sum(2 * n * c * a * b for a, b in pairs[1:])
    back = sum(2 * n * (c * b + a * b) for a, b in pairs)
    if task == "kfac":
        return (
            sweeps
            + back
            + sum(ridge(n, n, a, b) + ridge(n, n * c, b, a) for a, b in pairs)
        )
    grams = sum(2 * n * n * a for a in widths[:-1])
    grams += sum(2 * (n * c) ** 2 * b for b in widths[1:])
    return sweeps + grams + (back + (n * c) ** 3 / 3 if task == "step" else 0)


def workload(task, p):
    """What is timed, on float32 Gaussian rows of norm one."""
    x = ngd.data.sphere(p["N"], 784, seed=0, dtype=torch.float32)
    if task == "analytic":
        return lambda: ngd.kernels.analytic(x, p["L"]).gram()
    net = ngd.models.MLP(layers(p), seed=0, dtype=torch.float32)
    if task == "gram":
        return lambda: ngd.kernels.empirical(ngd.signals(net, x)).gram()
    fisher = {"step": ngd.fisher.Exact(), "kfac": ngd.fisher.KFAC()}[task]
    g = torch.ones(p["N"], p["C"])
    return lambda: fisher.solve(ngd.signals(net, x), g, 1e-3, None)


def cpu(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def peak(forget=False):
    """The most MB that the process has held, or has held since it last forgot."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(task, p):
    """Seconds and MB of one point; the best rate of a matrix product beside it."""
    torch.set_num_threads(1)
    workload(task, p | {"N": 8})()
    call = workload(task, p)
    before, spent = peak(forget=True), [cpu(call)]
    extra, square = peak() - before, torch.rand(GEMM, GEMM)
    rates = []
    while len(spent) < REPEATS and sum(spent) < PATIENCE:
        rates.append(2 * GEMM**3 / cpu(lambda: square @ square))
        spent.append(cpu(call))
    rates = rates or [2 * GEMM**3 / cpu(lambda: square @ square) for _ in range(3)]
    return {"seconds": min(spent), "extra_mb": extra, "rate": max(rates)}


def errors(distance):
    """A Gram matrix of which half the rows lie at a distance from the other half: its
    condition number, and what an undamped exact step makes of it in both precisions.
    """
    x = ngd.data.sphere(150, 784, seed=0)
    y = torch.nn.functional.normalize(x + distance * ngd.data.sphere(150, 784, seed=1))
    x = torch.cat([x, y])
    g = ngd.data.gaussian(len(x), 1, seed=2)
    steps = {}
    for dtype in (torch.float64, torch.float32):
        net = ngd.models.MLP([784, 1024, 1024, 1], seed=0).to(dtype)
        kernel = ngd.kernels.empirical(ngd.signals(net, x.to(dtype))).gram()
        factor, info = torch.linalg.cholesky_ex(kernel)
        solved = torch.cholesky_solve(g.to(dtype), factor).double()
        steps[dtype] = kernel.double(), None if info else solved
    kernel, solved = steps[torch.float64]
    eigenvalues = torch.linalg.eigvalsh(kernel)
    single = steps[torch.float32][1]

    def relative(a, b):
        return float((a - b).norm() / b.norm())

    return {
        "distance": distance,
        "condition": float(eigenvalues[-1] / eigenvalues[0]),
        "double_residual": relative(kernel @ solved, g),
        "single_residual": None if single is None else relative(kernel @ single, g),
        "single_error": None if single is None else relative(single, solved),
    }


def run():
    """Every point that has not been measured, smallest first; kept one by one."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"points": {}}
    kept["where"] = {
        "machine": machine(), "threads": 1, "dtype": "float32",
        "date": date.today().isoformat(), "torch": torch.__version__,
    }  # fmt: skip
    for task, axes in SIZES.items():
        for axis, sizes in axes.items():
            for size in sizes:
                name = f"{task} {axis} {size}"
                if name in kept["points"]:
                    continue
                command = [sys.executable, __file__, task, axis, str(size)]
                out = subprocess.run(command, capture_output=True, text=True)
                if out.returncode:
                    print(name, "failed:", out.stderr.strip().splitlines()[-1:])
                    continue
                found = json.loads(out.stdout)
                kept["points"][name] = found | {
                    "operations": operations(task, point(axis, size))
                }
                print(name, f"{found['seconds']:.3g} s", flush=True)
                KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    kept["precision"] = [errors(d) for d in DISTANCES]
    kept["exponents"] = exponents(kept["points"])
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    draw(kept)


def series(points, task, axis):
    """(sizes, seconds, operations, MB) of one row."""
    some = [(s, points.get(f"{task} {axis} {s}")) for s in SIZES[task][axis]]
    some = [(s, p) for s, p in some if p]
    keys = ("seconds", "operations", "extra_mb")
    sizes = np.array([s for s, _ in some], dtype=float)
    return sizes, *(np.array([p[key] for _, p in some]) for key in keys)


def slope(sizes, values):
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def exponents(points):
    """Slopes over the three largest sizes of each row: measured, counted."""
    found = []
    for task, axes in SIZES.items():
        for axis in axes:
            row = series(points, task, axis)
            sizes, seconds, counted, extra = (a[-3:] for a in row)
            found.append({
                "task": task, "axis": axis, "from": sizes[0], "to": sizes[-1],
                "seconds": slope(sizes, seconds),
                "operations": slope(sizes, counted),
                "largest_s": seconds[-1], "largest_mb": extra[-1],
                "gflops": counted[-1] / seconds[-1] / 1e9,
            })  # fmt: skip
    return found


def draw(kept):
    """Seconds against each size, the counts at the rate of the largest point."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    import matplotlib.pyplot as plt

    names = {"N": "samples", "M": "width", "L": "layers", "C": "outputs"}
    tasks = {"gram": "Gram matrix", "step": "exact step", "kfac": "K-FAC step"}
    tasks["analytic"] = "infinite width"
    fig, axs = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
    for ax, (axis, name) in zip(axs.flat, names.items()):
        for i, (task, label) in enumerate(tasks.items()):
            if axis not in SIZES[task]:
                continue
            sizes, seconds, counted, _ = series(kept["points"], task, axis)
            ax.loglog(sizes, seconds, "osD^"[i], color=f"C{i}", label=label)
            scaled = counted * seconds[-1] / counted[-1]
            ax.loglog(sizes, scaled, "-", color=f"C{i}", lw=1)
        ax.set(xlabel=name, ylabel="seconds" if axis in "NL" else None)
        ax.grid(alpha=0.3)
    axs[0, 0].legend(fontsize=8)
    fig.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) == 4:
        task, axis, size = sys.argv[1:]
        print(json.dumps(measure(task, point(axis, int(size)))))
    else:
        run()
