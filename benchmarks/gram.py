"""How fast the factored engine is, measured against what the machine's matrix product can do at best.

    python benchmarks/gram.py            the workloads below, and torch.func's dense Jacobian where it fits
    python benchmarks/gram.py --check    exit 1 unless the float32 Gram of 784-4096-4096-1 is within 1/0.7 of the rate

A workload's floor is its count of floating-point operations, symmetry not used, over the best GEMM rate found on the
shapes it multiplies (same dtype and threads, the two interleaved, minima over the repeats).
"""

import argparse
import sys
import time

import torch
from torch.func import functional_call, jacrev

import ngdcore as ngd

LIMIT = 1 / 0.7


def shapes(widths, n, c):
    """(rows, inner, columns) of every product a Gram needs, symmetry not used."""
    forward = [(n, a, b) for a, b in zip(widths, widths[1:])]
    backward = [(n * c, b, a) for a, b in list(zip(widths, widths[1:]))[1:]]
    grams = [(n, a, n) for a in widths[:-1]] + [(n * c, b, n * c) for b in widths[1:]]
    return forward + backward + grams


def flops(products):
    return sum(2 * a * b * c for a, b, c in products)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(widths, n, repeats, dtype):
    """Best seconds of the Gram, best GEMM rate, interleaved."""
    c = widths[-1]
    net, x = ngd.models.MLP(widths, dtype=dtype), ngd.data.gaussian(n, widths[0], dtype=dtype)
    products = shapes(widths, n, c)
    large = sorted(set(products), key=lambda s: -s[0] * s[1] * s[2])[:3]
    operands = [(torch.randn(a, b, dtype=dtype), torch.randn(b, d, dtype=dtype)) for a, b, d in large]
    gram, rates = [], []
    for _ in range(repeats):
        gram.append(seconds(lambda: ngd.kernels.empirical(ngd.signals(net, x)).gram()))
        rates += [flops([shape]) / seconds(lambda a=a, b=b: a @ b) for shape, (a, b) in zip(large, operands)]
    return min(gram), max(rates), flops(products)


def dense(widths, n):
    """The same Gram through torch.func.jacrev."""
    net, x = ngd.models.MLP(widths, dtype=torch.float32), ngd.data.gaussian(n, widths[0], dtype=torch.float32)
    params = {k: p.detach() for k, p in net.named_parameters()}

    def gram():
        J = jacrev(lambda p: functional_call(net, p, (x,)).flatten(), chunk_size=50)(params)
        return sum(j.flatten(1) @ j.flatten(1).T for j in J.values())

    return seconds(gram)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    cases = [([784, 4096, 4096, 1], 500)]
    if not options.check:
        cases += [([784, 1024, 1024, 1], 500), ([784, 1024, 1024, 10], 200)]
    worst = 0.0
    for widths, n in cases:
        best, rate, count = measure(widths, n, options.repeats, torch.float32)
        ratio = best * rate / count
        worst = max(worst, ratio)
        name = "-".join(map(str, widths))
        cost = f"{best:.3f} s for {count / 1e9:.1f} GFLOP"
        print(f"Gram {name}, N={n}: {cost}; GEMM {rate / 1e9:.0f} GFLOP/s; ratio {ratio:.2f}")
    if not options.check:
        print(f"torch.func.jacrev, 784-1024-1024-1, N=100: {dense([784, 1024, 1024, 1], 100):.2f} s")
    return int(options.check and worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
