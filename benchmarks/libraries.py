"""How each library computes what the benchmark asks for, in its own words: one process
a library, which `peers.py` starts.

    python benchmarks/libraries.py LIBRARY FOLDER once WORKLOAD    first call, memory
    python benchmarks/libraries.py LIBRARY FOLDER serve            blocks, on demand

Everybody gets the same images, weights and residuals from FOLDER, in the same dtype,
and one thread. Seconds are CPU seconds of the process, which on one thread are those of
a quiet machine; what else the machine does shows in the rate of the matrix product."""

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

THIN, MIDDLE, WIDE = [784, 1024, 1024], [784, 2048, 2048], [784, 4096, 4096]
DAMPING = 1e-2  # added to both factors of K-FAC
WORKLOADS = {
    "gram-1024": dict(kind="gram", widths=[*THIN, 1], n=500),
    "gram-1024-double": dict(kind="gram", widths=[*THIN, 1], n=500, dtype="float64"),
    "gram-4096": dict(kind="gram", widths=[*WIDE, 1], n=500),
    "gram-10-outputs": dict(kind="gram", widths=[*THIN, 10], n=200),
    "step-1024": dict(kind="step", widths=[*THIN, 1], n=500),
    "step-1024-double": dict(kind="step", widths=[*THIN, 1], n=500, dtype="float64"),
    "kfac-2048": dict(kind="kfac", widths=[*MIDDLE, 1], n=1000),
    "kfac-2048-double": dict(kind="kfac", widths=[*MIDDLE, 1], n=1000, dtype="float64"),
    "analytic-2000": dict(kind="analytic", n=2000),
    "analytic-2000-double": dict(kind="analytic", n=2000, dtype="float64"),
}
GEMM = 1000  # rows of the matrix product that stands for the machine


def given(folder, name, n=None):
    """(inputs, weights, residuals) of a workload as NumPy arrays of its dtype."""
    work = WORKLOADS[name]
    dtype = work.get("dtype", "float32")
    widths, n = work.get("widths", [784, 1]), n or work["n"]
    draw = np.random.default_rng(0)
    x = np.load(Path(folder) / "images.npy")[:n].astype(dtype)
    weights = [
        (draw.standard_normal((b, a)) * (2 / a) ** 0.5).astype(dtype)
        for a, b in zip(widths, widths[1:])
    ]
    return x, weights, draw.standard_normal((n, widths[-1])).astype(dtype)


# --- On torch -------------------------------------------------------------------------


def net_of(weights):
    """The network as torch has it."""
    import torch
    from torch import nn

    layers = []
    for W in weights:
        layers += [nn.Linear(*W.shape[::-1], bias=False, dtype=torch.tensor(W).dtype)]
        layers[-1].weight.data = torch.tensor(W)
        layers += [nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def on_torch(x, weights, g):
    """Network, inputs, residuals; one thread."""
    import torch

    torch.set_num_threads(1)
    return net_of(weights), torch.tensor(x), torch.tensor(g)


def step_by(gram, net, x, g):
    """J^T K^-1 g by somebody's K (N, N) and one backward pass."""
    import torch

    c = torch.cholesky_solve(g, torch.linalg.cholesky(gram().reshape(len(x), -1)))
    return torch.autograd.grad((net(x) * c).sum(), list(net.parameters()))


def ngdcore(kind, net, x, g):
    import ngdcore as ngd

    if kind == "gram":
        return lambda: ngd.kernels.empirical(ngd.signals(net, x)).gram()
    if kind == "analytic":
        return lambda: ngd.kernels.analytic(x, 3).gram()
    fisher, damping = ngd.fisher.Exact(), 0.0
    if kind == "kfac":
        fisher, damping = ngd.fisher.KFAC(), DAMPING**2
    buffers = [None]

    def step():
        sig = ngd.signals(net, x, lazy=True)
        buffers[0], _ = fisher.solve(sig, g, damping, buffers[0])
        return buffers[0]

    return step


def nngeometry(kind, net, x, g):
    from nngeometry.gram import GramMatrix
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatKFAC
    from nngeometry.object.vector import PVector
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(x, g), batch_size=len(x))

    def gram():
        return GramMatrix(net, loader).data.permute(1, 0, 3, 2)

    def kfac():
        F = FIM(net, loader, PMatKFAC, variant="regression")
        net.zero_grad()
        (net(x) * g).sum().div(len(x)).backward()
        slope = PVector.from_model_grad(net)
        step = F.solvePVec(slope, regul=DAMPING**2, use_pi=False).to_dict()
        return [step[layer][0] for layer in step]

    step = {"step": lambda: step_by(gram, net, x, g)}
    return (step | {"gram": gram, "kfac": kfac}).get(kind)


def asdl(kind, net, x, g):
    from asdl.kernel import empirical_class_wise_hadamard_ntk

    if g.shape[1] > 1:
        return "one output at a time, without the blocks between outputs"

    def gram():
        return empirical_class_wise_hadamard_ntk(net, x)

    step = {"step": lambda: step_by(gram, net, x, g)}
    return (step | {"gram": gram}).get(kind)


def torch_func(kind, net, x, g):
    """The recipe of torch.func's tutorial on tangent kernels: Jacobians contracted."""
    import torch
    from torch.func import functional_call, jacrev, vmap

    params = {k: p.detach() for k, p in net.named_parameters()}

    def jacobian():
        def one(p, row):
            return functional_call(net, p, (row[None],))[0]

        return vmap(jacrev(one), (None, 0))(params, x)

    def gram(J=None):
        J = [j.flatten(2) for j in (J or jacobian()).values()]
        return sum(torch.einsum("naf,mbf->namb", j, j) for j in J)

    def step():
        J = jacobian()
        K = gram(J).reshape(len(x), len(x))
        c = torch.cholesky_solve(g, torch.linalg.cholesky(K))[:, 0]
        return [torch.tensordot(c, j[:, 0], 1) for j in J.values()]

    return {"gram": gram, "step": step}.get(kind)


def kflr_step(p):
    """A layer's damped step from the factors and the gradient that BackPACK left."""
    import torch

    def solve(M, b):
        return torch.cholesky_solve(b, torch.linalg.cholesky(M))

    B, A = p.kflr[0] / 2, p.kflr[1]  # MSELoss is twice ours
    B, A = (M + DAMPING * torch.eye(len(M), dtype=M.dtype) for M in (B, A))
    return solve(A, solve(B, p.grad).T).T


def backpack(kind, net, x, g):
    import torch
    from backpack import backpack as extended
    from backpack import extend
    from backpack.extensions import KFLR, BatchGrad

    if g.shape[1] > 1:
        return "one backward pass an output, each with its Jacobian"
    net, loss = extend(net), extend(torch.nn.MSELoss())

    def jacobian():
        with extended(BatchGrad()):
            net(x).sum().backward()
        return [p.grad_batch.flatten(1) for p in net.parameters()]

    def step():
        J = jacobian()
        K = sum(j @ j.T for j in J)
        c = torch.cholesky_solve(g, torch.linalg.cholesky(K))[:, 0]
        return [(c @ j).view_as(p) for j, p in zip(J, net.parameters())]

    def kfac():
        out = net(x)
        with extended(KFLR()):
            loss(out, out.detach() - g / 2).backward()  # the gradient of g f / N
        return [kflr_step(p) for p in net.parameters()]

    grams = {"gram": lambda: sum(j @ j.T for j in jacobian())}
    return (grams | {"step": step, "kfac": kfac}).get(kind)


def curvlinops(kind, net, x, g):
    import torch
    from curvlinops import (
        CGInverseLinearOperator,
        GGNLinearOperator,
        KFACInverseLinearOperator,
        KFACLinearOperator,
    )

    loss, params = torch.nn.MSELoss(), list(net.parameters())
    data, options = [(x, g)], {"check_deterministic": False}

    def slope():
        return torch.autograd.grad((net(x) * g).sum() / len(x), params)

    def step():
        """Conjugate gradients on the Gauss-Newton matrix, 100 of them."""
        F = GGNLinearOperator(net, loss, params, data, **options)
        inverse = CGInverseLinearOperator(F, max_iter=100, max_tridiag_iter=0)
        return [2 * v for v in inverse @ list(slope())]

    def kfac():
        F = KFACLinearOperator(net, loss, params, data, fisher_type="type-2", **options)
        inverse = KFACInverseLinearOperator(F, damping=(DAMPING, 2 * DAMPING))
        return [2 * v for v in inverse @ list(slope())]

    return {"step": step, "kfac": kfac}.get(kind)


# --- On jax ---------------------------------------------------------------------------


def neural_tangents(kind, x, weights, g):
    import types

    import jax

    jax.config.update("jax_enable_x64", x.dtype == np.float64)
    sys.modules["neural_tangents.experimental"] = types.ModuleType("experimental")
    import jax.numpy as jnp
    import neural_tangents as nt

    x, g = jnp.asarray(x), jnp.asarray(g)
    weights = [jnp.asarray(W.T) for W in weights]
    if kind == "analytic":
        kernel = analytic_nt(nt, x.shape[1])
        return lambda: kernel(x).block_until_ready()

    def f(weights, x):
        for W in weights[:-1]:
            x = jnp.maximum(x @ W, 0)  # a primitive, whose structure it knows
        return x @ weights[-1]

    way = nt.NtkImplementation.STRUCTURED_DERIVATIVES
    ntk = nt.empirical_ntk_fn(f, trace_axes=(), vmap_axes=0, implementation=way)
    gram = jax.jit(lambda w, x, g: ntk(x, None, w))

    @jax.jit
    def step(w, x, g):
        K = ntk(x, None, w).reshape(len(x), len(x))
        c = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(K), g)
        return [W.T for W in jax.vjp(lambda w: f(w, x), w)[1](c)[0]]

    found = {"gram": gram, "step": step}.get(kind)
    return found and (lambda: jax.block_until_ready(found(weights, x, g)))


def analytic_nt(nt, d):
    """The kernel of `ngd.kernels.analytic(x, 3)`, jitted."""
    import jax
    from neural_tangents import stax

    dense = dict(W_std=2**0.5, b_std=None, parameterization="ntk")
    layers = [stax.Dense(1024, **dense), stax.Relu()] * 2 + [stax.Dense(1, **dense)]
    kernel_fn = stax.serial(*layers)[2]
    return jax.jit(lambda x: kernel_fn(x, None, "ntk"))


# --- Timing ---------------------------------------------------------------------------

LIBRARIES = {
    "ngdcore": ngdcore,
    "nngeometry": nngeometry,
    "ASDL": asdl,
    "torch.func": torch_func,
    "BackPACK": backpack,
    "curvlinops": curvlinops,
    "neural-tangents": neural_tangents,
}
FORM_J = {"torch.func", "BackPACK"}
ROOM = 6e9  # bytes that a Jacobian may take


def made(library, folder, name, n=None):
    """A call without arguments, or why there is none."""
    work = WORKLOADS[name]
    x, weights, g = given(folder, name, n)
    size = sum(W.size for W in weights) * g.size * x.itemsize
    if work["kind"] in ("gram", "step") and library in FORM_J and size > ROOM:
        return f"its Jacobian takes {size / 1e9:.0f} GB"
    if library == "neural-tangents":
        return neural_tangents(work["kind"], x, weights, g) or "not offered"
    if library == "ngdcore" or work["kind"] != "analytic":
        found = LIBRARIES[library](work["kind"], *on_torch(x, weights, g))
        return found or "not offered"
    return "not offered"


def seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def rate(a=[]):
    """Operations a second of this process's matrix product, in float32."""
    if not a:
        a.append(np.ones((GEMM, GEMM), np.float32))
    return 2 * GEMM**3 / seconds(lambda: a[0] @ a[0])


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def as_arrays(result):
    parts = result if isinstance(result, (list, tuple)) else [result]
    return [np.asarray(getattr(p, "detach", lambda p=p: p)()) for p in parts]


def once(library, folder, name):
    """The first call: its seconds, the MB it added to the peak; its result is kept."""
    small = made(library, folder, name, 8)
    if isinstance(small, str):
        return {"why": small}
    small()
    call = made(library, folder, name)
    if isinstance(call, str):
        return {"why": call}
    before, kept = peak(), []
    first = seconds(lambda: kept.append(call()))
    extra, parts = peak() - before, as_arrays(kept[0])
    np.savez(Path(folder) / f"{name}.{library}.npz", *parts)
    mine = sum(part.nbytes for part in parts) / 2**20
    return {"first": first, "extra_mb": extra, "result_mb": mine}


def serve(library, folder):
    """Reads "workload repeats" from standard input; answers with the fastest repeat and
    the best rate of the matrix product in that block."""
    call, at = None, None
    for line in sys.stdin:
        name, repeats = line.split()
        if name != at:
            call, at = None, name  # let go of the last one first
            call = made(library, folder, name)
            seconds(call)
        times, rates = [], [rate()]
        for _ in range(int(repeats)):
            times.append(seconds(call))
            rates.append(rate())
        say({"seconds": min(times), "rate": max(rates)})


def say(answer):
    print("answer " + json.dumps(answer), flush=True)


def main(library, folder, what, *rest):
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    return (
        serve(library, folder) if what == "serve" else say(once(library, folder, *rest))
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
