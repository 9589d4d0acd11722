"""The shapes that signatures state are those that are passed: the package imported
through beartype's hook, in a process of its own, and used as a reader would.
"""

import subprocess
import sys

from beartype import BeartypeConf, beartype
from conftest import ROOT, environment
from jaxtyping import install_import_hook

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def test_stated_shapes_are_the_shapes():
    command = [sys.executable, __file__]
    env = environment(PYTHONPATH=":".join(filter(None, sys.path)))
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "a wrong shape is refused\n"


def exercise(ngd, torch):
    """What the package offers, on one output and on three."""
    x, x_test = ngd.data.sphere(6, 5), ngd.data.sphere(4, 5, seed=1)
    for c in (1, 3):
        net = ngd.models.MLP([5, 9, 8, c], activation="tanh", bias=True)
        y, sig = ngd.data.gaussian(6, c, seed=2), ngd.signals(net, x)
        sig.jvp(sig.vjp(sig.outputs - y))
        sig.pull(torch.eye(c, dtype=x.dtype).expand(6, c, c))
        finite, infinite = ngd.kernels.empirical(sig), infinities(ngd, x, c)
        for fac in (finite, *infinite):
            fac.gram(), fac.layers(), fac.sides(), fac.trace()
            (
                fac.cross(x_test).gram(),
                list(fac.blocks(2)),
                ngd.kernels.operator(fac) @ y.flatten(),
            )
        solves(ngd, sig, finite, sig.outputs - y)
        if c > 1:
            R = ngd.data.gaussian(6 * 2, c).reshape(6, 2, c)
            weighted = sig.weighted(R)
            solves(ngd, weighted, ngd.kernels.empirical(weighted), x[:, :2])
        training(ngd, net, x, y)
        gram, lr = finite.gram(), ngd.dynamics.gd_lr(finite.gram(), len(x))
        ngd.dynamics.trajectory(gram / len(x), sig.outputs, y, lr, [0, 1, 5])
        infinite[0].nngp(), ngd.dynamics.predict(infinite[0], y, [0.5, 1])
        ngd.fisher.Exact().coefficient(infinite[0])
        ngd.fisher.BlockDiagonal().coefficient(infinite[0], 1e-2)
    ngd.kernels.arc_cosine_gram(x), ngd.data.forster(x.float())
    deep = ngd.signals(ngd.models.DeepLinear([5, 5, 5]), x)
    ngd.fisher.DeepLinearExact().direction(deep, ngd.data.gaussian(6, 5))


def infinities(ngd, x, c):
    """An infinitely wide network for every kind of dual."""
    kinds = ("relu", "erf", "tanh", ngd.models.ShiftedReLU(0.5))
    return [ngd.kernels.analytic(x, 3, kind, outputs=c) for kind in kinds]


def solves(ngd, sig, fac, g):
    """Every Fisher on these signals, their factors and residual."""
    family = ngd.fisher
    names = "Exact BlockDiagonal BlockTridiagonal KFAC TridiagonalKFAC SampledKFAC"
    names += " UnitWise QuasiDiagonal Diagonal"
    fishers = [getattr(family, name)() for name in names.split()]
    sigma = [[2.0, 0.5, 0], [0.5, 2, 0.5], [0, 0.5, 2]]
    for fisher in [*fishers, family.LayerWise(sigma)]:
        fisher.coefficient(fac, 1e-2), fisher.solve(sig, g, 1e-2)
        fisher.direction(sig, g, 1e-2)
    family.Exact().optimal_lr(sig, 1e-2), family.KFAC().optimal_lr(sig, 1e-2)


def training(ngd, net, x, y):
    """A few steps, plain and adaptive, with a metric, whole and in batches."""
    for damping in (1e-2, ngd.optim.Adaptive()):
        opt = ngd.optim.NaturalGradient(net, ngd.fisher.KFAC(), 0.1, damping)
        list(ngd.optim.run(opt, x, y, 3, batch_size=4))
        opt.step(x, y)
    if y.shape[1] > 1:
        options = dict(lr="optimal", damping=1e-1, metric="softmax")
        opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), **options)
        opt.step(x, y.softmax(1))


def main():
    with install_import_hook("ngdcore", "test_shapes.checker"):
        import ngdcore as ngd
        from ngdcore.data import rows
    import torch

    exercise(ngd, torch)
    try:
        rows.normalise(torch.ones(3), "unit")
    except Exception as error:
        assert "normalise" in str(error), error
        print("a wrong shape is refused")


if __name__ == "__main__":
    main()
