"""The package and the first chapters on a device that is not the CPU: tensors that
refuse to meet those of the CPU and to become NumPy arrays (tests/standin.py).
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import standin
import torch

import ngdcore as ngd

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = ["01_quickstart", "02_function_space"]
FISHERS = {
    "exact": ngd.fisher.Exact(),
    "matrix-free": ngd.fisher.MatrixFree(1e-12),
    "layer-wise": ngd.fisher.LayerWise([[2, 0.5, 0], [0.5, 2, 0], [0, 0, 1]]),
    "block-diagonal": ngd.fisher.BlockDiagonal(),
    "block-tridiagonal": ngd.fisher.BlockTridiagonal(),
    "k-fac": ngd.fisher.KFAC(),
    "sampled k-fac": ngd.fisher.SampledKFAC(samples=2),
    "k-fac, tri-diagonal": ngd.fisher.TridiagonalKFAC(),
    "unit-wise": ngd.fisher.UnitWise(),
    "quasi-diagonal": ngd.fisher.QuasiDiagonal(),
    "diagonal": ngd.fisher.Diagonal(),
}
# A chapter's code cells, one after the other, on the device.
RUN = """
import sys
import jupytext, matplotlib, standin
matplotlib.use("Agg")
space = {"__name__": "__main__"}
with standin.second_device() as device:
    for cell in jupytext.read(sys.argv[1], fmt="md:myst").cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, sys.argv[1], "exec"), space)
assert space["cfg"].device.type == standin.NAME
assert space["net"][0].weight.device == device
"""


@pytest.fixture
def device():
    with standin.second_device() as device:
        yield device


def pair(device, c=2):
    """A small network, inputs and labels, on the CPU and on the device."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(6, c, generator=generator, dtype=torch.float64)
    make = partial(
        ngd.models.MLP, [4, 9, 7, c], activation="tanh", bias_var=0.1, seed=0
    )
    return [(make(device=d), x.to(d), y.to(d)) for d in ("cpu", device)]


def same(here, there):
    """Tensors, or nested lists of them: alike, and the second on the device."""
    if isinstance(here, torch.Tensor):
        assert there.device.type == standin.NAME
        np.testing.assert_allclose(
            there.detach().cpu(), here.detach(), rtol=1e-9, atol=1e-12
        )
    else:
        assert len(here) == len(there)
        for a, b in zip(here, there):
            same(a, b)


def test_it_refuses_what_cuda_refuses(device):
    x, y = torch.ones(3, 3, device=device), torch.ones(3, 3)
    for forbidden in (
        lambda: x + y,
        lambda: x @ y,
        lambda: y.add_(x),
        lambda: torch.cat([x, y]),
        lambda: torch.where(y > 0, x, x),
        lambda: torch.linalg.solve(x, y),
        lambda: y[torch.tensor([0], device=device)],
        lambda: torch.randn(3, device=device, generator=torch.Generator()),
        lambda: torch.nn.Linear(3, 3)(x),
        x.numpy,
        lambda: np.asarray(x),
        lambda: np.ones(3) * x,
    ):
        with pytest.raises((RuntimeError, TypeError)):
            forbidden()


def test_it_allows_what_cuda_allows(device):
    x, y = torch.arange(4.0, device=device).view(2, 2), torch.ones(2, 2)
    assert (x + torch.tensor(1.0)).device == device == x[torch.tensor([0])].device
    assert float(x.sum()) == 6 and x.cpu().tolist() == x.tolist() == [[0, 1], [2, 3]]
    x.T[0].add_(1)  # a view
    y.copy_(x)
    assert y.tolist() == [[1, 1], [3, 3]] and y.device.type == "cpu"
    net = torch.nn.Linear(2, 2)
    weight = net.weight
    assert net.to(device).weight is weight and weight.device == device
    net(x).sum().backward()
    assert weight.grad.tolist() == [[4, 4], [4, 4]]


@pytest.mark.parametrize("name", FISHERS)
def test_a_fisher(device, name):
    """Coefficient and direction are made where the network is."""
    fisher, results = FISHERS[name], []
    damping = {} if name in ("exact", "layer-wise") else {"damping": 0.1}
    for net, x, y in pair(device):
        sig = ngd.signals(net, x)
        update = fisher.direction(sig, sig.outputs - y, **damping)
        fac = ngd.kernels.empirical(sig)
        results.append([fac.gram(), fisher.coefficient(fac, **damping), update])
    same(*results)


def test_a_deep_linear_fisher(device):
    results = []
    for where in ("cpu", device):
        net = ngd.models.DeepLinear([3, 3, 3], seed=0, device=where)
        x = ngd.data.gaussian(20, 3, seed=0, device=where)
        sig = ngd.signals(net, x)
        fisher = ngd.fisher.DeepLinearExact()
        results.append(fisher.direction(sig, sig.outputs - x.flip(1)))
    same(*results)


def test_signals(device):
    results = []
    for net, x, y in pair(device):
        sig, lazy = ngd.signals(net, x), ngd.signals(net, x, lazy=True)
        half = torch.full((6, 1, 2), 0.5, dtype=x.dtype, device=x.device)
        results.append(
            [
                sig.H,
                sig.D,
                sig.vjp(y),
                sig.jvp(sig.vjp(y)),
                lazy.pull(half),
                sig.weighted(half).D,
                ngd.kernels.empirical(sig).cross(x[:2] + 1).gram(),
                ngd.dense.jacobian(net, x),
            ]
        )
    same(*results)


@pytest.mark.parametrize("name", ["exact", "k-fac", "unit-wise"])
def test_training(device, name):
    results = []
    for net, x, y in pair(device):
        opt = ngd.optim.NaturalGradient(net, FISHERS[name], lr=0.3, damping=0.1)
        states = list(ngd.optim.run(opt, x, y, steps=2))
        results.append([s.outputs for s in states])
        assert all(isinstance(s.loss, float) for s in states)
    same(*results)


def test_softmax_and_minibatches(device):
    loss = torch.nn.functional.cross_entropy
    drawn = ngd.fisher.SampledKFAC(model="softmax", samples=2)
    for fisher, metric in ((ngd.fisher.Exact(), "softmax"), (drawn, None)):
        results = []
        for net, x, y in pair(device, c=3):
            damping = ngd.optim.Adaptive(0.1)
            opt = ngd.optim.NaturalGradient(
                net, fisher, lr=0.3, damping=damping, metric=metric
            )
            batches = dict(steps=2, batch_size=3, seed=0, loss=loss)
            list(ngd.optim.run(opt, x, y.argmax(1), **batches))
            results.append(net(x))
        same(*results)


def test_infinite_kernels_and_dynamics(device):
    results = []
    for _, x, y in pair(device):
        x = torch.nn.functional.normalize(x)
        fac = ngd.kernels.analytic(x, depth=2, bias_var=0.1)
        tanh = ngd.kernels.analytic(x, depth=2, activation="tanh")
        Q = ngd.fisher.Exact().coefficient(fac)
        K = fac.gram() / 6
        path = ngd.dynamics.trajectory(K, 0 * y[:, :1], y[:, :1], 0.1, 3)
        results.append([fac.gram(), tanh.gram(), Q, path])
    same(*results)


@pytest.mark.parametrize("stem", CHAPTERS)
def test_a_chapter(stem, tmp_path):
    """At the least scale that reaches every line; in a process of its own, since a
    chapter sets torch's default dtype.
    """
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "NGD_SCALE": "smoke",
        "NGD_DEVICE": standin.NAME,
        "OMP_NUM_THREADS": "1",
    }
    path = ROOT / "notebooks" / f"{stem}.md"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
