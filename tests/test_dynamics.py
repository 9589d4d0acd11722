"""Closed-form trajectories, predictions of ensembles and flows."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import ngdcore as ngd
from ngdcore.dense import relative


@pytest.mark.parametrize("symmetric", [True, False])
def test_trajectory_is_the_recursion(symmetric):
    n, c = 5, 2
    M = ngd.data.gaussian(n * c, n * c, seed=1)
    Q = M @ M.T / 10 if symmetric else torch.eye(n * c, dtype=M.dtype) + 0.2 * M
    Q_test, f0, y, f0_test = (
        ngd.data.gaussian(*s, seed=k)
        for k, s in enumerate(((3 * c, n * c), (n, c), (n, c), (3, c)))
    )
    f, h, expected, expected_test = f0.flatten(), f0_test.flatten(), [], []
    for _ in range(8):
        expected.append(f)
        expected_test.append(h)
        f, h = f - 0.3 * Q @ (f - y.flatten()), h - 0.3 * Q_test @ (f - y.flatten())
    out, out_test = ngd.dynamics.trajectory(Q, f0, y, 0.3, 7, Q_test, f0_test)
    assert torch.allclose(out.flatten(1), torch.stack(expected), atol=1e-11)
    assert torch.allclose(out_test.flatten(1), torch.stack(expected_test), atol=1e-11)
    for steps in ([0, 3, 7], np.array([0, 3, 7]), torch.tensor([0, 3, 7]), [0.0, 3, 7]):
        some = ngd.dynamics.trajectory(Q, f0, y, 0.3, steps)
        assert torch.allclose(some, out[[0, 3, 7]])
    assert torch.equal(ngd.dynamics.trajectory(Q, f0, y, 0.3, np.int64(7)), out)


@pytest.mark.parametrize("lr", [0.3, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_trajectory_has_a_limit(lr, symmetric):
    """Infinity is a long time; test rows end at kernel regression."""
    M = ngd.data.gaussian(6, 6, seed=1)
    Q = torch.eye(6, dtype=M.dtype) + (M @ M.T / 6 if symmetric else 0.2 * M)
    Q_test, y, f0 = (ngd.data.gaussian(*s, seed=2) for s in ((3, 6), (6, 1), (6, 1)))
    (late, end), (late_test, end_test) = ngd.dynamics.trajectory(
        Q, f0, y, lr, [400, math.inf], Q_test
    )
    assert torch.allclose(late, end, atol=1e-12) and torch.allclose(end, y, atol=1e-14)
    assert torch.allclose(late_test, end_test, atol=1e-11)
    assert torch.allclose(end_test, Q_test @ torch.linalg.solve(Q, y - f0), atol=1e-11)


@pytest.mark.parametrize("symmetric", [True, False])
def test_trajectory_without_a_rate_is_the_flow(symmetric):
    M = ngd.data.gaussian(6, 6, seed=1)
    Q = M @ M.T / 6 if symmetric else torch.eye(6, dtype=M.dtype) + 0.2 * M
    Q_test, y, f0 = (ngd.data.gaussian(*s, seed=2) for s in ((3, 6), (6, 1), (6, 1)))
    times = [0.0, 0.3, 1.7]
    out, test = ngd.dynamics.trajectory(Q, f0, y, None, times, Q_test)
    ends = ngd.dynamics.flow(
        lambda w: [-Q @ (w[0] - y), -Q_test @ (w[0] - y)], [f0, 0 * f0[:3]], times
    )
    assert torch.allclose(out, ends[0], atol=1e-8)
    assert torch.allclose(test, ends[1], atol=1e-8)
    small = ngd.dynamics.trajectory(Q, f0, y, 1e-6, [1_700_000]) if symmetric else out
    assert torch.allclose(small[-1], out[-1], atol=1e-4)
    assert torch.equal(ngd.dynamics.trajectory(Q, f0, y, None, 1.7), out[-1:])


def test_modes_at_zero_stay():
    """Null modes of the Gram: outputs there never move, and tests see no infinity."""
    V = torch.linalg.qr(ngd.data.gaussian(4, 4))[0]
    Q = V @ torch.tensor([0.0, 1e-17, 0.5, 1.0], dtype=torch.float64).diag() @ V.T
    y, f0 = ngd.data.gaussian(4, 1), torch.zeros(4, 1, dtype=torch.float64)
    for lr in (1.0, None):
        out, test = ngd.dynamics.trajectory(Q, f0, y, lr, [math.inf], Q, f0)
        still = V[:, :2] @ (V[:, :2].T @ y)
        assert torch.allclose(out[0], y - still, atol=1e-12)
        assert torch.allclose(test, out, atol=1e-9)


def test_trajectory_with_null_and_overshooting_modes():
    values = torch.tensor([0.0, 1e-17, 0.5, 1.0, 1.5, 1.9], dtype=torch.float64)
    V = torch.linalg.qr(ngd.data.gaussian(6, 6))[0]
    Q, y, f0 = (
        V @ values.diag() @ V.T,
        ngd.data.gaussian(6, 1),
        torch.zeros(6, 1, dtype=torch.float64),
    )
    out, test = ngd.dynamics.trajectory(
        Q, f0, y, 1.0, [0, 1, 2, 51], Q_test=Q, f0_test=f0
    )
    assert torch.allclose(out, test, atol=1e-9)


def test_gd_rate_is_the_best_constant_one():
    M = ngd.data.gaussian(6, 6)
    K, y = M @ M.T, ngd.data.gaussian(6, 1, seed=1)
    best = ngd.dynamics.gd_lr(K, 6)
    values = torch.linalg.eigvalsh(K / 6)
    worst = lambda lr: float((1 - lr * values).abs().max())  # noqa: E731
    assert worst(best) < min(worst(0.99 * best), worst(1.01 * best))
    kappa = float(values[-1] / values[0])
    assert worst(best) == pytest.approx((kappa - 1) / (kappa + 1))
    assert torch.isfinite(ngd.dynamics.trajectory(K / 6, 0 * y, y, best, 10)).all()


def test_linearised_training_is_the_wide_limit():
    """Real steps of natural gradient and gradient descent follow the closed form,
    closer as width grows.
    """
    gaps = []
    for width in (100, 1600):
        net = ngd.models.TwoLayerReLU(8, width, seed=0)
        x, y = ngd.data.sphere(6, 8), ngd.data.gaussian(6, 1, seed=1)
        sig = ngd.signals(net, x)
        K = ngd.kernels.empirical(sig).gram()
        lr = ngd.dynamics.gd_lr(K, 6)
        predicted = ngd.dynamics.trajectory(K / 6, sig.outputs, y, lr, 20)
        sgd = torch.optim.SGD([net[0].weight], lr=lr)
        real = torch.stack([s.outputs for s in ngd.optim.run(sgd, x, y, 20, net=net)])
        gaps.append(float((real - predicted).norm(dim=(1, 2)).max()))
    assert gaps[1] < 0.6 * gaps[0]


# --------------------------------------------------------------------- the ensemble


def _covariance(Q, Q_test, prior, n, t):
    """Mean map G (N', N) and variance (N') by the matrix exponential; prior (N + N',
    N + N')."""
    eye = torch.eye(n, dtype=Q.dtype)
    G = Q_test @ torch.linalg.solve(Q, eye - torch.linalg.matrix_exp(-Q * t))
    lift = torch.cat([-G, torch.eye(len(G), dtype=Q.dtype)], 1)
    return G, (lift @ prior @ lift.T).diagonal()


@pytest.mark.parametrize("fisher", [None, ngd.fisher.BlockDiagonal()])
@pytest.mark.parametrize("c", [1, 3])
def test_predict_is_the_dense_gaussian_process(fisher, c):
    x, other = ngd.data.gaussian(7, 4), ngd.data.gaussian(5, 4, seed=1)
    y, times = ngd.data.gaussian(7, c, seed=2), [0.0, 0.7, 5.0, math.inf]
    fac, both = (
        ngd.kernels.analytic(z, 3, "erf", 1.6, 0.1, outputs=c)
        for z in (x, torch.cat([x, other]))
    )
    one = ngd.kernels.analytic(x, 3, "erf", 1.6, 0.1)
    cross = one.cross(other)
    if fisher is None:
        Q, Q_test, extra = one.gram() / 7, cross.gram() / 7, {}
    else:
        Q, Q_test = fisher.coefficient(one, 0.01), fisher.coefficient(cross, 0.01)
        extra = dict(fisher=fisher, damping=0.01)
    made = ngd.dynamics.predict(fac.cross(other), y, times, **extra)
    assert made.mean.shape == (4, 5, c) and made.variance.shape == (4, 5)
    for k, t in enumerate(times):
        G, variance = _covariance(Q, Q_test, both.nngp(), 7, min(t, 1e6))
        assert relative(made.mean[k], G @ y) < 1e-8 or not G.any()
        assert torch.allclose(made.variance[k], variance, atol=1e-9)
    single = ngd.dynamics.predict(fac.cross(other), y, **extra)
    assert torch.equal(single.mean, made.mean[-1])
    assert torch.equal(single.variance, made.variance[-1])
    fitted = ngd.dynamics.predict(fac, y, **extra)
    assert torch.allclose(fitted.mean, y) and fitted.variance.max() < 1e-9


@pytest.mark.parametrize("t", [3.0, 30.0])
def test_predict_is_what_wide_nets_become(t):
    """Means and variances of 400 two-layer networks trained by small steps."""
    x = ngd.data.gaussian(4, 3, seed=1)
    x_test, y = ngd.data.gaussian(2, 3, seed=2), ngd.data.gaussian(4, 1, seed=3)
    nets, width, steps = 400, 200, 100
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(nets, 3, width, generator=draw, dtype=torch.float64)
    v = torch.randn(nets, width, 1, generator=draw, dtype=torch.float64)
    for _ in range(steps):  # gradient descent by hand, NTK parameterisation
        u = x @ W * (1.5 / 3) ** 0.5
        h, gain = u.erf(), (1.5 / width) ** 0.5
        g = (gain * h @ v - y) / 4
        slope = 2 / math.pi**0.5 * torch.exp(-(u**2))
        back = x.T @ (g @ v.mT * gain * slope) * (1.5 / 3) ** 0.5
        v, W = v - t / steps * gain * h.mT @ g, W - t / steps * back
    outputs = (gain * (x_test @ W * (1.5 / 3) ** 0.5).erf() @ v)[..., 0]
    fac = ngd.kernels.analytic(x, 2, "erf", 1.5).cross(x_test)
    mean, variance = ngd.dynamics.predict(fac, y, t)
    spread = 5 / nets**0.5
    assert (
        (outputs.mean(0) - mean[:, 0]).abs() < spread * variance.sqrt() + 0.02
    ).all()
    ratio = outputs.var(0) / variance
    assert ((ratio - 1).abs() < spread * 2**0.5 + 0.05).all()
    start = ngd.dynamics.predict(fac, y, 0.0)
    assert (start.variance > 1.2 * variance).all()  # training tells: the test can fail


def test_natural_gradient_flow_has_one_clock():
    x, y = ngd.data.gaussian(5, 4), ngd.data.gaussian(5, 2)
    fac = ngd.kernels.analytic(x, 3, outputs=2).cross(ngd.data.gaussian(3, 4, seed=1))
    early, late = ngd.dynamics.predict(fac, y, [0.5, math.inf], ngd.fisher.Exact())[0]
    assert torch.allclose(early, (1 - math.exp(-0.5)) * late)
    assert torch.allclose(late, ngd.dynamics.predict(fac, y).mean)


# --------------------------------------------------------------------------- flows


def test_flow_is_the_solver():
    """The chapters' own calls of solve_ivp, bit for bit; lists keep their shapes."""
    A = ngd.data.gaussian(3, 3) - 2 * torch.eye(3, dtype=torch.float64)
    w0, times = ngd.data.gaussian(3, 2, seed=1), [0.0, 0.4, 2.0]

    def velocity(_, theta):
        return (A @ torch.from_numpy(theta).reshape(3, 2)).reshape(-1).numpy()

    by_hand = solve_ivp(
        velocity,
        (0, 2.0),
        w0.reshape(-1).numpy(),
        "DOP853",
        times,
        rtol=1e-9,
        atol=1e-12,
    ).y.T
    path = ngd.dynamics.flow(lambda w: A @ w, w0, times, rtol=1e-9, atol=1e-12)
    assert np.array_equal(path.reshape(3, -1).numpy(), by_hand)
    assert relative(path[-1], torch.linalg.matrix_exp(2 * A) @ w0) < 1e-8
    parts = ngd.dynamics.flow(
        lambda w: [A.float() @ w[0], -w[1]],
        [w0.float(), torch.ones(())],
        times,
        "RK45",
        rtol=1e-4,
        atol=1e-4,
    )
    assert [p.shape for p in parts] == [(3, 3, 2), (3,)]
    assert [p.dtype for p in parts] == [torch.float32] * 2


def test_flow_refuses():
    one = torch.ones(1, dtype=torch.float64)
    for times in ([], [-1.0], [1.0, 0.5], [math.inf], [math.nan]):
        with pytest.raises(ValueError, match="ascend"):
            ngd.dynamics.flow(lambda w: -w, one, times)
    with pytest.raises(ValueError, match="shaped like"):
        ngd.dynamics.flow(lambda w: torch.ones(2), one, [1.0])
    with pytest.raises(ArithmeticError, match="stopped before t=2"):
        ngd.dynamics.flow(lambda w: w**2, one, [2.0])  # infinite at t = 1


def test_dynamics_refuse():
    Q, y = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    trajectory, inf = ngd.dynamics.trajectory, math.inf
    skew = Q + torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    for make, error, says in (
        (lambda: trajectory(Q, y, y[:1], 1.0, 1), ValueError, "f0 and y"),
        (lambda: trajectory(Q, y, y, 1.0, -2), ValueError, "steps"),
        (lambda: trajectory(Q, y, y, 1.0, [3, 1]), ValueError, "steps"),
        (lambda: trajectory(Q, y, y, 1.0, []), ValueError, "steps"),
        (lambda: trajectory(Q, y, y, 1.0, [0.5]), ValueError, "lr=None"),
        (lambda: trajectory(Q, y, y, 1.0, 0.5), ValueError, "whole"),
        (lambda: trajectory(Q, y, y, 1.0, [math.nan]), ValueError, "steps"),
        (lambda: trajectory(Q, y, y, None, [-0.5]), ValueError, "steps"),
        (lambda: trajectory(Q, y, y, 2.0, inf), ValueError, "no limit"),
        (lambda: trajectory(-Q, y, y, None, inf), ValueError, "no limit"),
        (lambda: trajectory(skew, y, y, 2.5, [inf]), ValueError, "no limit"),
        (lambda: trajectory(Q, y, y, 1.0, 1, Q[:, :1]), ValueError, "Q_test"),
        (lambda: trajectory(Q, y, y, 1.0, 1, Q, y[:1]), ValueError, "f0_test"),
        (lambda: trajectory(Q * math.nan, y, y, 1.0, 1), ValueError, "Q holds NaN"),
        (lambda: trajectory(Q, y.float(), y, 1.0, 1), ValueError, "f0 is"),
        (lambda: trajectory(Q, y, y, -1.0, 1), ValueError, "lr=-1"),
        (lambda: trajectory(Q, y, y, math.nan, 1), ValueError, "lr=nan"),
    ):
        with pytest.raises(error, match=says):
            make()


def test_predictions_and_rates_refuse():
    Q, y = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    skew = Q + torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    fac = ngd.kernels.analytic(Q, 2)
    finite = ngd.kernels.empirical(ngd.signals(ngd.models.MLP([2, 3, 1]), Q))
    for make, error, says in (
        (lambda: ngd.dynamics.predict(fac, y * math.nan), ValueError, "y holds NaN"),
        (lambda: ngd.dynamics.predict(fac, y.tolist()), ValueError, "tensor"),
        (lambda: ngd.dynamics.gd_lr(skew, 2), ValueError, "symmetric"),
        (lambda: ngd.dynamics.gd_lr(Q, 0), ValueError, "n=0"),
        (lambda: ngd.dynamics.gd_lr(Q * math.nan, 2), ValueError, "NaN"),
        (lambda: ngd.dynamics.gd_lr(Q[:1], 1), ValueError, "square"),
        (lambda: ngd.dynamics.gd_lr(0 * Q, 1), ValueError, "positive"),
        (lambda: ngd.dynamics.predict(fac, y[:1]), ValueError, "N = 2"),
        (lambda: ngd.dynamics.predict(fac, y, [1.0, 0.0]), ValueError, "ascending"),
        (lambda: ngd.dynamics.predict(finite, y), TypeError, "analytic"),
        (lambda: ngd.dynamics.predict(Q, y), TypeError, "analytic"),
    ):
        with pytest.raises(error, match=says):
            make()
