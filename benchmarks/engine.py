"""How fast the factored engine is, measured against what the machine's matrix product
can do at best.

    python benchmarks/engine.py            the workloads below, and torch.func's dense
    Jacobian where it fits python benchmarks/engine.py --check    exit 1 unless the Gram
    (N = 500) and the K-FAC step (N = 1000) of
                                           784-4096-4096-1, both in float32, are within
                                           1/0.7 of that rate, and one natural-gradient
                                           update of the deep autoencoder costs at most
                                           4.5 gradients

A workload's floor is its count of floating-point operations, symmetry not used, over
the best GEMM rate found on the shapes it multiplies (same dtype and threads, the two
interleaved, minima over the repeats)."""

import argparse
import sys
import time

import torch
from torch.func import functional_call, jacrev

import ngdcore as ngd

LIMIT = 1 / 0.7
UPDATE_LIMIT = 4.5
AUTOENCODER = [784, 400, 200, 100, 50, 100, 200, 400, 784]


def shapes(widths, n, c):
    """(rows, inner, columns) of every product a Gram needs, symmetry not used."""
    forward = [(n, a, b) for a, b in zip(widths, widths[1:])]
    backward = [(n * c, b, a) for a, b in list(zip(widths, widths[1:]))[1:]]
    grams = [(n, a, n) for a in widths[:-1]] + [(n * c, b, n * c) for b in widths[1:]]
    return forward + backward + grams


def step_shapes(widths, n, c):
    """The same for a K-FAC step from the sample side: Gram work, factor solves, and the
    products back to weights.
    """
    back = [p for a, b in zip(widths, widths[1:]) for p in ((n, n * c, b), (b, n, a))]
    # Two triangular solves with n columns a factor; the last D is tiny.
    solves = [(n, n, n)] * (2 * len(widths) - 3)
    return shapes(widths, n, c) + back + solves


def flops(products):
    return sum(2 * a * b * c for a, b, c in products)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gram(net, x):
    return lambda: ngd.kernels.empirical(ngd.signals(net, x)).gram()


def kfac_step(net, x):
    buffers, g = [None], torch.ones(len(x), net[-1].out_features, dtype=x.dtype)

    def step():
        buffers[0], _ = ngd.fisher.KFAC().solve(
            ngd.signals(net, x), g, 1e-6, buffers[0]
        )

    return step


def measure(workload, products, widths, n, repeats, dtype=torch.float32):
    """Best seconds of the workload, best GEMM rate, interleaved."""
    run = workload(
        ngd.models.MLP(widths, dtype=dtype),
        ngd.data.gaussian(n, widths[0], dtype=dtype),
    )
    large = sorted(set(products), key=lambda s: -s[0] * s[1] * s[2])[:3]
    operands = [
        (torch.randn(a, b, dtype=dtype), torch.randn(b, d, dtype=dtype))
        for a, b, d in large
    ]
    times, rates = [], []
    for _ in range(repeats):
        times.append(seconds(run))
        rates += [
            flops([shape]) / seconds(lambda a=a, b=b: a @ b)
            for shape, (a, b) in zip(large, operands)
        ]
    return min(times), max(rates), flops(products)


def dense(widths, n):
    """The same Gram through torch.func.jacrev."""
    net, x = (
        ngd.models.MLP(widths, dtype=torch.float32),
        ngd.data.gaussian(n, widths[0], dtype=torch.float32),
    )
    params = {k: p.detach() for k, p in net.named_parameters()}

    def gram():
        J = jacrev(lambda p: functional_call(net, p, (x,)).flatten(), chunk_size=50)(
            params
        )
        return sum(j.flatten(1) @ j.flatten(1).T for j in J.values())

    return seconds(gram)


def autoencoder(n, repeats):
    """Best seconds, on one thread, of a batch's gradient and of a whole update: sampled
    K-FAC, adaptive damping.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    net = ngd.models.MLP(
        AUTOENCODER,
        "tanh",
        1.0,
        parameterization="standard",
        bias=True,
        dtype=torch.float32,
    )
    x = torch.rand(n, AUTOENCODER[0], generator=torch.Generator().manual_seed(0))
    opt = ngd.optim.NaturalGradient(
        net, ngd.fisher.SampledKFAC(variance=100.0), 1 / 8, ngd.optim.Adaptive(1e-4)
    )

    def gradient():
        opt.zero_grad()
        ngd.optim.half_mse(net(x), x).backward()

    times = [
        (seconds(gradient), seconds(lambda: opt.step(x, x))) for _ in range(repeats)
    ]
    torch.set_num_threads(threads)
    return [min(column) for column in zip(*times)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    wide = [784, 4096, 4096, 1]
    cases = [
        ("Gram", gram, shapes, wide, 500),
        ("K-FAC step", kfac_step, step_shapes, wide, 1000),
    ]
    if not options.check:
        cases += [
            ("Gram", gram, shapes, [784, 1024, 1024, 1], 500),
            ("Gram", gram, shapes, [784, 1024, 1024, 10], 200),
        ]
    worst = max(ratio(*case, options.repeats) for case in cases)
    gradient, update = autoencoder(1000, options.repeats)
    print(
        f"Autoencoder, N=1000: gradient {gradient:.3f} s, update {update:.3f} s;"
        f" ratio {update / gradient:.2f}"
    )
    if not options.check:
        jacobian = dense([784, 1024, 1024, 1], 100)
        print(f"torch.func.jacrev, 784-1024-1024-1, N=100: {jacobian:.2f} s")
    return int(options.check and (worst > LIMIT or update > UPDATE_LIMIT * gradient))


def ratio(name, workload, count, widths, n, repeats):
    """Seconds of a workload over those of its products at the best GEMM rate."""
    products = count(widths, n, widths[-1])
    best, rate, total = measure(workload, products, widths, n, repeats)
    print(
        f"{name} {'-'.join(map(str, widths))}, N={n}: {best:.3f} s for"
        f" {total / 1e9:.1f} GFLOP; GEMM {rate / 1e9:.0f} GFLOP/s;"
        f" ratio {best * rate / total:.2f}"
    )
    return best * rate / total


if __name__ == "__main__":
    sys.exit(main())
