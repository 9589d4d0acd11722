"""The shapes that signatures state are those that are passed: the package imported
through beartype's hook, in a process of its own, and used as a reader would.
"""

import subprocess
import sys

from conftest import ROOT, environment
from jaxtyping import install_import_hook

CHECKER = "beartype.beartype"


def test_stated_shapes_are_the_shapes():
    command = [sys.executable, __file__]
    env = environment(PYTHONPATH=":".join(filter(None, sys.path)))
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "a wrong shape is refused\n"


def exercise(ngd, torch):
    """Signals, factors, every Fisher, steps and closed forms, on one and on three
    outputs.
    """
    x, x_test = ngd.data.sphere(6, 5), ngd.data.sphere(4, 5, seed=1)
    for c in (1, 3):
        net = ngd.models.MLP([5, 9, 8, c], activation="tanh", bias=True)
        y, sig = ngd.data.gaussian(6, c, seed=2), ngd.signals(net, x)
        g = sig.outputs - y
        finite = ngd.kernels.empirical(sig)
        finite.gram(), finite.cross(ngd.signals(net, x_test))
        sig.jvp(sig.vjp(g)), sig.pull(torch.eye(c, dtype=x.dtype).expand(6, c, c))
        for fisher in fishers(ngd):
            fisher.coefficient(finite, 1e-2), fisher.solve(sig, g, 1e-2)
            fisher.direction(sig, g, 1e-2)
        training(ngd, net, x, y)
        gram, lr = finite.gram(), ngd.dynamics.gd_lr(finite.gram(), len(x))
        ngd.dynamics.trajectory(gram / len(x), sig.outputs, y, lr, [0, 1, 5])
        infinite = ngd.kernels.analytic(x, depth=3, outputs=c)
        infinite.gram(), infinite.cross(x_test)
        ngd.fisher.Exact().coefficient(infinite)
        ngd.fisher.BlockDiagonal().coefficient(infinite, 1e-2)
    ngd.kernels.arc_cosine_gram(x), ngd.data.forster(x.float())
    deep = ngd.models.DeepLinear([5, 5, 5])
    ngd.fisher.DeepLinearExact().direction(
        ngd.signals(deep, x), ngd.data.gaussian(6, 5)
    )


def fishers(ngd):
    family = ngd.fisher
    names = "Exact BlockDiagonal BlockTridiagonal KFAC TridiagonalKFAC SampledKFAC"
    names += " UnitWise QuasiDiagonal Diagonal"
    made = [getattr(family, name)() for name in names.split() if hasattr(family, name)]
    return [*made, family.LayerWise([[2.0, 0.5, 0], [0.5, 2, 0.5], [0, 0.5, 2]])]


def training(ngd, net, x, y):
    """A few steps of the optimizer, plain and adaptive, whole and in batches."""
    for damping in (1e-2, ngd.optim.Adaptive()):
        opt = ngd.optim.NaturalGradient(net, ngd.fisher.KFAC(), 0.1, damping)
        list(ngd.optim.run(opt, x, y, 3, batch_size=4))
        opt.step(x, y)


def main():
    with install_import_hook("ngdcore", CHECKER):
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
