"""This checkout beside another commit of itself, on the same machine at the same time.

    python benchmarks/against.py 10bbc36             every workload below
    python benchmarks/against.py 10bbc36 gram-1024   those named

Each side runs in a process of its own. They take turns: a block of five repeats here, a
block of five there, four times. A block counts if the machine's matrix product, timed
within it, reached 80 % of the best rate seen; of those that count, the fastest repeat
stands. Numbers above 1 say that this checkout is faster.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
REPEATS, ENOUGH = 5, 0.8
F32, F64 = torch.float32, torch.float64


def _net(ngd, widths, n, dtype=F32, activation="relu"):
    """A network, inputs, and residuals of ones."""
    net = ngd.models.MLP(widths, activation, dtype=dtype)
    x = ngd.data.gaussian(n, widths[0], dtype=dtype)
    return net, x, torch.ones(n, widths[-1], dtype=dtype)


def _gram(widths, n):
    def make(ngd):
        net, x, _ = _net(ngd, widths, n)
        return lambda: ngd.kernels.empirical(ngd.signals(net, x)).gram()

    return make


def _step(fisher, widths, n, damping=0.0, dtype=F32, activation="relu"):
    """A Fisher's direction, signals included; its update's buffers are kept."""

    def make(ngd):
        net, x, g = _net(ngd, widths, n, dtype, activation)
        F, buffers = fisher(ngd), [None]

        def step():
            sig = ngd.signals(net, x, lazy=True)
            buffers[0], _ = F.solve(sig, g, damping, buffers[0])

        return step

    return make


def _analytic(n, activation="relu", depth=3, part="gram", dtype=F64):
    """The Gram of an infinitely wide network, or the Grams of all its layers."""

    def make(ngd):
        x = ngd.data.sphere(n, 50, dtype=dtype)

        def gram():
            factors = ngd.kernels.analytic(x, depth, activation)
            return getattr(ngd.fisher, part)().coefficient(factors)

        if part != "gram":
            return gram
        return lambda: ngd.kernels.analytic(x, depth, activation).gram()

    return make


def _sampled(ngd):
    """K-FAC with one sample, under the name that the checkout has for it."""
    fisher = ngd.fisher
    return getattr(fisher, "SampledKFAC", fisher.KFAC)(samples=1)


def _autoencoder(ngd):
    """One whole update of the deep autoencoder: sampled K-FAC, adaptive damping."""
    widths = [784, 400, 200, 100, 50, 100, 200, 400, 784]
    net = ngd.models.MLP(widths, "tanh", 1.0, 0.0, "standard", True, dtype=F32)
    x = torch.rand(1000, 784, generator=torch.Generator().manual_seed(0))
    fisher = getattr(ngd.fisher, "SampledKFAC", ngd.fisher.KFAC)
    fisher = fisher(samples=1, variance=100.0)
    opt = ngd.optim.NaturalGradient(net, fisher, 1 / 8, ngd.optim.Adaptive(1e-4))
    return lambda: opt.step(x, x)


THIN, WIDE, MANY = [784, 1024, 1024], [784, 4096, 4096], [64, 128, 1000]
WORKLOADS = {
    "gram-1024": _gram([*THIN, 1], 500),
    "gram-4096": _gram([*WIDE, 1], 500),
    "gram-10-outputs": _gram([*THIN, 10], 200),
    "exact-1024": _step(lambda ngd: ngd.fisher.Exact(), [*THIN, 1], 500, 1e-6),
    "kfac-4096": _step(lambda ngd: ngd.fisher.KFAC(), [*WIDE, 1], 1000, 1e-6),
    "analytic-2000": _analytic(2000, dtype=F32),
    "analytic-5000": _analytic(5000, dtype=F32),
    "analytic-layers": _analytic(400, "relu", 10, "BlockDiagonal"),
    "tanh-1000": _analytic(1000, "tanh"),
    "unit-wise": _step(lambda ngd: ngd.fisher.UnitWise(), [*THIN, 1], 100),
    "autoencoder": _autoencoder,
    "kfac-1000-outputs": _step(lambda ngd: ngd.fisher.KFAC(), MANY, 20, 1e-3, F64),
    "sampled-1000-outputs": _step(_sampled, MANY, 20, 1e-3, F64),
    "gram-20000": _gram([*THIN, 1], 20_000),
}


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def serve(root):
    """The one side: reads workloads from standard input, answers with a block each."""
    sys.path.insert(0, root)
    import ngdcore as ngd

    assert Path(ngd.__file__).is_relative_to(root), ngd.__file__
    made, (a, b) = {}, torch.randn(2, 1500, 1500)
    for line in sys.stdin:
        name, repeats = line.split()
        if name not in made:
            made[name] = WORKLOADS[name](ngd)
            _seconds(made[name])  # the first call is not part of a block
        rates = [2 * 1500**3 / _seconds(lambda: a @ b)]
        times = []
        for _ in range(int(repeats)):
            times.append(_seconds(made[name]))
            rates.append(2 * 1500**3 / _seconds(lambda: a @ b))
        print(min(times), max(rates), flush=True)


def _ask(side, name, repeats):
    """One block: its fastest repeat, and the best rate of the matrix product in it."""
    side.stdin.write(f"{name} {repeats}\n")
    side.stdin.flush()
    answer = side.stdout.readline().split()
    if not answer:
        raise RuntimeError(f"{name}: one side ended; see its message above")
    return float(answer[0]), float(answer[1])


def compare(sides, name, blocks):
    """Fastest seconds of both sides, from the blocks in which the machine was quiet."""
    found = {side: [] for side in sides}
    repeats, first = REPEATS, _ask(sides["there"], name, 1)[0]
    if first > 5:
        repeats, blocks = 1, 1
    for _ in range(blocks):
        for side, process in sides.items():
            found[side].append(_ask(process, name, repeats))
    best = max(rate for block in found.values() for _, rate in block)
    quiet = {
        side: [t for t, rate in block if rate > ENOUGH * best] or [float("nan")]
        for side, block in found.items()
    }
    return (
        min(quiet["here"]),
        min(quiet["there"]),
        best,
        [len(q) for q in quiet.values()],
    )


def start(root):
    """The process of one side."""
    return subprocess.Popen(
        [sys.executable, __file__, root, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )


def unpack(commit, folder):
    """The package of another commit, with its data, laid into a folder."""
    parts = "ngdcore data book".split()
    archive = subprocess.run(
        ["git", "-C", ROOT, "archive", commit, *parts],
        check=True,
        stdout=subprocess.PIPE,
    )
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="what to stand beside")
    parser.add_argument("workloads", nargs="*", choices=[*WORKLOADS, []])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.commit)
    with tempfile.TemporaryDirectory() as folder:
        unpack(options.commit, folder)
        sides = {"here": start(str(ROOT)), "there": start(folder)}
        for name in options.workloads or WORKLOADS:
            here, there, rate, counts = compare(sides, name, options.blocks)
            print(
                f"{name:22} here {here:.4f} s, there {there:.4f} s: {there / here:5.2f}"
                f"   (GEMM {rate / 1e9:.0f} GFLOP/s; {counts} quiet blocks)",
                flush=True,
            )
        for process in sides.values():
            process.stdin.close()
            process.wait()


if __name__ == "__main__":
    main()
