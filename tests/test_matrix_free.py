"""Systems too large to factorise: what was reached is said, and is true; memory is
asked for before it is taken."""

import pytest
import torch

import ngdcore as ngd
from ngdcore import iterative, room
from ngdcore.dense import relative

MatrixFree = ngd.fisher.MatrixFree


def problem(n=300, c=1, seed=0):
    """Images sorted by class, a network, its signals, and random residuals."""
    d = ngd.data.mnist(n_train=n)
    order = d.y.argmax(1).argsort(stable=True) if d.y.ndim > 1 else d.y.argsort()
    net = ngd.models.MLP([784, 64, 64, c], seed=seed)
    sig = ngd.signals(net, d.x[order.flatten()])
    return sig, ngd.data.gaussian(n, c, seed=1)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("c", [1, 3])
def test_the_residual_reported_is_the_true_one(c, stored, damping):
    """Formed here from the dense Gram in float64; float32 products do not limit it."""
    sig, g = problem(100, c)
    K = ngd.kernels.empirical(sig).gram()
    inverse = MatrixFree(1e-10, landmarks=20, stored=stored)._inverse(
        ngd.kernels.empirical(sig), damping
    )
    v = inverse(g.reshape(-1, 1))
    left = K @ v + 100 * damping * v - g.reshape(-1, 1)
    assert float(left.norm() / g.norm()) < 1e-10
    assert inverse.info.residual == pytest.approx(
        float(left.norm() / g.norm()), rel=1e-2
    )


def test_direction_is_that_of_the_exact_fisher():
    sig, g = problem()
    exact = ngd.fisher.Exact().direction(sig, g, 1e-4)
    d, info = MatrixFree(1e-11, landmarks=50).solve(sig, g, 1e-4)
    assert max(relative(a, b) for a, b in zip(d, exact)) < 1e-8
    assert 0 < info.products < 200


def test_landmarks_save_products():
    sig, g = problem(600)
    taken = [MatrixFree(landmarks=r).solve(sig, g)[1].products for r in (0, 100, 600)]
    assert taken[2] < taken[1] / 4 < taken[0] / 8, taken


def test_it_steps():
    d = ngd.data.mnist(classes=(4, 9), n_train=100)
    net = ngd.models.TwoLayerReLU(d=784, width=2048, seed=0)
    opt = ngd.optim.NaturalGradient(net, MatrixFree(landmarks=20), lr=1.0)
    losses = [s.loss for s in ngd.optim.run(opt, d.x, d.y, steps=3)]
    assert losses[-1] < 1e-3 * losses[0], losses


def test_a_singular_system_is_not_solved_in_silence():
    sig, g = problem(60)
    net = ngd.models.MLP([784, 32, 1], seed=0)
    x = ngd.data.mnist(n_train=30).x
    sig = ngd.signals(net, torch.cat([x, x]))
    for stored in (True, False):
        with pytest.raises(ngd.fisher.NotConverged, match=r"\|K v - g\|/\|g\| is"):
            MatrixFree(stored=stored, products=300).direction(sig, g)
        MatrixFree(stored=stored).direction(sig, g, 1e-2)
    with pytest.raises(ngd.fisher.NotConverged, match="not done after 5 products"):
        MatrixFree(landmarks=0, products=5).direction(*problem(60))


def test_no_residual_is_known_in_float32():
    net = ngd.models.MLP([4, 8, 1], dtype=torch.float32)
    sig = ngd.signals(net, torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"net\.double\(\)"):
        MatrixFree().direction(sig, sig.outputs)
    for wrong in (dict(tol=0), dict(tol=1), dict(landmarks=2.7), dict(products=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MatrixFree(**wrong)


def test_zero_residuals_and_zero_columns():
    sig, g = problem(40)
    still, info = MatrixFree().solve(sig, 0 * g)
    assert not any(d.any() for d in still)
    assert (info.residual, info.products) == (0, 0)
    rhs = torch.cat([g, 0 * g], 1)
    v = MatrixFree(landmarks=8)._inverse(ngd.kernels.empirical(sig), 0.0)(rhs)
    assert v[:, 0].any() and not v[:, 1].any()


def test_infinite_networks_too():
    fac = ngd.kernels.analytic(ngd.data.sphere(50, 8), 3)
    Q = MatrixFree(1e-12, landmarks=10).coefficient(fac, 0.01)
    assert relative(Q, ngd.fisher.Exact().coefficient(fac, 0.01)) < 1e-9


def test_conjugate_gradients_against_a_solve():
    A = ngd.data.gaussian(30, 30)
    A, b = A @ A.T + torch.eye(30), ngd.data.gaussian(30, 2, seed=1)
    x, used = iterative.conjugate_gradients(lambda v: A @ v, lambda v: v, b, 1e-13, 500)
    assert relative(x, torch.linalg.solve(A, b)) < 1e-11
    assert used < 500


def test_memory_is_asked_for_first(monkeypatch):
    """What does not fit is refused with its size and the remedy, nothing is taken."""
    sig, g = problem(40)
    fac = ngd.kernels.empirical(sig)
    assert fac.nbytes == 8 * 40**2
    monkeypatch.setattr(room, "UNASKED", 0)
    monkeypatch.setattr(room, "_available", lambda: 1.5 * fac.nbytes)
    assert fac.gram().shape == (40, 40)
    with pytest.raises(MemoryError, match=r"factorised Gram needs .*MatrixFree"):
        ngd.fisher.Exact().direction(sig, g)
    MatrixFree(landmarks=8).direction(sig, g)
    monkeypatch.setattr(room, "_available", lambda: 0.4 * fac.nbytes)
    with pytest.raises(MemoryError, match=r"blocks\(\)"):
        fac.gram()
    with pytest.raises(MemoryError, match="float32"):
        fac.narrow_gram(torch.float32)
    MatrixFree(landmarks=0).direction(sig, g)  # products without K


def test_room_is_said_by_the_system():
    assert 2**20 < room.room() < 2**50
