"""Networks, the optimizer, the training generator and closed-form trajectories."""

import math

import pytest
import torch
from torch import nn

import ngdcore as ngd
from ngdcore.dense import jacobian, relative


def problem(n=6, d=5, c=2, width=40, **kwargs):
    net = ngd.models.MLP([d, width, width, c], "tanh", 1.5, 0.1, seed=1, **kwargs)
    return net, ngd.data.gaussian(n, d, seed=2), ngd.data.gaussian(n, c, seed=3)


def weights(net):
    return torch.cat(
        [p.detach().flatten() for p in net.parameters() if p.requires_grad]
    )


# ------------------------------------------------------------------------------------------------ models


def test_parameterizations_are_one_function():
    x = ngd.data.gaussian(4, 5)
    for activation in ngd.models.ACTIVATIONS:
        a, b = (
            ngd.models.MLP([5, 7, 3], activation, 1.3, 0.2, p, seed=4)
            for p in ("ntk", "standard")
        )
        assert torch.allclose(a(x), b(x), atol=1e-12)
        assert (weights(a).std() / weights(b).std()) > 1.5


def test_seed_means_the_same_network_everywhere():
    make = {
        "MLP": lambda **k: ngd.models.MLP([5, 7, 3], bias_var=0.1, **k),
        "TwoLayerReLU": lambda **k: ngd.models.TwoLayerReLU(5, 9, **k),
        "DeepLinear": lambda **k: ngd.models.DeepLinear([5, 7, 3], **k),
    }
    for name, build in make.items():
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        a, b, other, single = (
            build(seed=3),
            build(seed=3),
            build(seed=4),
            build(seed=3, dtype=torch.float32),
        )
        assert torch.equal(torch.random.get_rng_state(), before), (
            f"{name} draws from the global generator"
        )
        assert torch.equal(weights(a), weights(b)) and not torch.equal(
            weights(a), weights(other)
        )
        assert torch.equal(weights(a).float(), weights(single))


def test_initial_moments():
    net = ngd.models.TwoLayerReLU(50, 4000, nu=0.3)
    assert net[0].weight.std().item() == pytest.approx(0.3, rel=0.01)
    assert (
        set(net[2].weight.flatten().tolist()) == {-1.0, 1.0}
        and not net[2].weight.requires_grad
    )
    x = ngd.data.sphere(3, 50)
    f = (net[2].weight @ (net[0].weight @ x.T).clamp_min(0) / math.sqrt(4000)).T
    assert torch.allclose(net(x), f)
    wide = ngd.models.DeepLinear([6, 9, 4])
    assert torch.allclose(
        wide[0].weight.T @ wide[0].weight, torch.eye(6, dtype=torch.float64), atol=1e-12
    )
    assert torch.allclose(
        wide[1].weight @ wide[1].weight.T, torch.eye(4, dtype=torch.float64), atol=1e-12
    )


def test_models_refuse():
    for make, says in (
        (lambda: ngd.models.MLP([3]), "widths"),
        (lambda: ngd.models.MLP([3, 0, 1]), "widths"),
        (lambda: ngd.models.MLP([3, 2.5]), "widths"),
        (lambda: ngd.models.MLP([3, 1], "swish"), "activation"),
        (lambda: ngd.models.MLP([3, 1], parameterization="mup"), "parameterization"),
        (lambda: ngd.models.MLP([3, 1], weight_var=0.0), "weight_var"),
        (lambda: ngd.models.MLP([3, 1], bias_var=-1.0), "bias_var"),
        (lambda: ngd.models.TwoLayerReLU(3, 0), "widths"),
        (lambda: ngd.models.TwoLayerReLU(3, 4, nu=0.0), "nu"),
        (lambda: ngd.models.DeepLinear([3]), "widths"),
        (lambda: ngd.models.DeepLinear([3, 3], init="zeros"), "init"),
    ):
        with pytest.raises(ValueError, match=says):
            make()


# ------------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_step_equals_dense_step(damping):
    net, x, y = problem()
    J, before = torch.cat(jacobian(net, x), 1), weights(net)
    f = net(x).detach()
    F, gradient = J.T @ J / 6, J.T @ (f - y).flatten() / 6
    inverse = (
        torch.linalg.inv(F + damping * torch.eye(len(F), dtype=F.dtype))
        if damping
        else torch.linalg.pinv(F, rtol=1e-11)
    )
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), lr=0.7, damping=damping)
    state = opt.step(x, y)
    assert relative(before - weights(net), 0.7 * inverse @ gradient) < 1e-8
    assert torch.equal(state.outputs, f)
    assert state.loss == pytest.approx(float((f - y).square().sum() / 12))


def test_buffers_are_reused_and_right():
    net, x, y = problem()
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), lr=0.5)
    opt.step(x, y)
    buffers = [b.data_ptr() for b in opt._update]
    expected = ngd.fisher.Exact().direction(ngd.signals(net, x), net(x).detach() - y)
    opt.step(x, y)
    assert [b.data_ptr() for b in opt._update] == buffers
    assert all(torch.allclose(a, b) for a, b in zip(opt._update, expected))


@pytest.mark.parametrize(
    ("fisher", "alpha"),
    [
        (ngd.fisher.Exact(), 1.0),
        (ngd.fisher.BlockDiagonal(), 3.0),
        (
            ngd.fisher.LayerWise([[1.0, 0.3, 0.0], [0.3, 1.0, 0.3], [0.0, 0.3, 1.0]]),
            2.1951220,
        ),
    ],
)
def test_optimal_rate_solves_the_linearised_problem_in_one_step(fisher, alpha):
    """alpha: sum of the inverse of Sigma, by hand; what is left after one step is
    curvature and falls with width.
    """
    left = []
    for width in (100, 1000):
        net, x, y = problem(width=width)
        opt = ngd.optim.NaturalGradient(net, fisher, lr="optimal")
        losses = [s.loss for s in ngd.optim.run(opt, x, y, steps=2)]
        left.append(losses[1] / losses[0])
        assert 1 / opt.param_groups[0]["lr"] == pytest.approx(alpha, rel=1e-6)
    assert left[1] < 0.2 * left[0] and left[1] < 1e-2


def test_losses_and_normalisation():
    """MSELoss(mean) is 2/C times the default; any loss' residual is N dL/df."""
    net, x, y = problem(c=3)
    before, steps = net.state_dict(), {}
    before = {k: v.clone() for k, v in before.items()}
    for name, loss in (("half", ngd.optim.half_mse), ("mse", nn.MSELoss())):
        net.load_state_dict(before)
        start = weights(net)
        ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), lr=1.0).step(x, y, loss=loss)
        steps[name] = weights(net) - start
    assert torch.allclose(steps["mse"], 2 / 3 * steps["half"], atol=1e-12)
    net.load_state_dict(before)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    f, J = net(x).detach(), torch.cat(jacobian(net, x), 1)
    g = f.softmax(1) - nn.functional.one_hot(labels, 3)
    start = weights(net)
    ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), lr=1.0).step(
        x, labels, loss=nn.CrossEntropyLoss()
    )
    assert (
        relative(start - weights(net), J.T @ torch.linalg.solve(J @ J.T, g.flatten()))
        < 1e-8
    )


def test_scheduler_moves_the_rate():
    net, x, y = problem()
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    opt.step(x, y)
    schedule.step()
    assert opt.param_groups[0]["lr"] == 0.5


# ------------------------------------------------------------------------------------------------ run


def test_run_yields_every_state_and_is_deterministic():
    runs = []
    for _ in range(2):
        net, x, y = problem()
        opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), lr=0.5)
        states = list(ngd.optim.run(opt, x, y, steps=4, batch_size=4, seed=7))
        runs.append([s.loss for s in states])
        assert [s.step for s in states] == [0, 1, 2, 3, 4]
        assert (
            all(a.seconds <= b.seconds for a, b in zip(states, states[1:]))
            and states[0].seconds == 0
        )
    assert runs[0] == runs[1]


def test_run_first_order_is_torch():
    net, x, y = problem()
    twin, _, _ = problem()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    states = list(ngd.optim.run(sgd, x, y, steps=3, net=net))
    for _ in range(3):
        grads = torch.autograd.grad(
            (twin(x) - y).square().sum() / 12, list(twin.parameters())
        )
        with torch.no_grad():
            for p, g in zip(twin.parameters(), grads):
                p -= 0.1 * g
    assert torch.allclose(weights(net), weights(twin), atol=1e-12)
    assert torch.allclose(states[-1].outputs, twin(x).detach())


def test_minibatches_cover_an_epoch():
    net, x, y = problem(n=9, c=1)
    y = torch.arange(9, dtype=torch.float64)[:, None]
    seen = []

    def loss(f, target):
        seen.append(target.flatten())
        return (f * 0).sum()

    opt = torch.optim.SGD(net.parameters(), lr=0.0)
    list(ngd.optim.run(opt, x, y, steps=2, batch_size=3, loss=loss, net=net))
    assert sorted(torch.cat(seen).tolist()) == list(range(9))


def test_optim_refuses():
    net, x, y = problem()
    F = ngd.fisher.Exact()
    for make, says in (
        (lambda: ngd.optim.NaturalGradient(net, F, lr="best"), "optimal"),
        (lambda: ngd.optim.NaturalGradient(net, F, lr=0.0), "lr"),
        (lambda: ngd.optim.NaturalGradient(net, F, damping=-1.0), "damping"),
        (lambda: ngd.optim.NaturalGradient(nn.Sequential(), F), "trains nothing"),
        (lambda: ngd.optim.NaturalGradient(net, F).step(x, y[:, 0]), "shape"),
        (lambda: ngd.optim.NaturalGradient(net, F).step(x, y * float("nan")), "NaN"),
        (
            lambda: next(ngd.optim.run(torch.optim.SGD(net.parameters()), x, y, 1)),
            "net is needed",
        ),
        (
            lambda: next(
                ngd.optim.run(ngd.optim.NaturalGradient(net, F), x, y, 1, batch_size=7)
            ),
            "fit",
        ),
        (
            lambda: next(ngd.optim.run(ngd.optim.NaturalGradient(net, F), x, y, -1)),
            "fit",
        ),
        (
            lambda: next(ngd.optim.run(ngd.optim.NaturalGradient(net, F), x, y[:2], 1)),
            "fit",
        ),
    ):
        before = weights(net).clone()
        with pytest.raises(ValueError, match=says):
            make()
        assert torch.equal(weights(net), before), (
            "a refused step must leave the weights alone"
        )


# ------------------------------------------------------------------------------------------- dynamics


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
    some = ngd.dynamics.trajectory(Q, f0, y, 0.3, [0, 3, 7])
    assert torch.allclose(some, out[[0, 3, 7]])


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


def test_dynamics_refuse():
    Q, y = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    for make, says in (
        (lambda: ngd.dynamics.trajectory(Q, y, y[:1], 1.0, 1), "f0 and y"),
        (lambda: ngd.dynamics.trajectory(Q, y, y, 1.0, -2), "steps"),
        (lambda: ngd.dynamics.trajectory(Q, y, y, 1.0, [3, 1]), "steps"),
        (lambda: ngd.dynamics.trajectory(Q, y, y, 1.0, 1, Q[:, :1]), "Q_test"),
        (lambda: ngd.dynamics.gd_lr(Q[:1], 1), "square"),
        (lambda: ngd.dynamics.gd_lr(0 * Q, 1), "positive"),
    ):
        with pytest.raises(ValueError, match=says):
            make()


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU here; runs where torch.cuda.is_available()",
)
def test_cuda_follows_the_cpu():
    net, x, y = problem()
    twin, _, _ = problem(device="cuda")
    losses = [
        [
            s.loss
            for s in ngd.optim.run(
                ngd.optim.NaturalGradient(n, ngd.fisher.Exact(), lr=0.5),
                x.to(d),
                y.to(d),
                3,
            )
        ]
        for n, d in ((net, "cpu"), (twin, "cuda"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)


# ------------------------------------------------------------------------------------------- adaptive damping


def deep_problem(n=40, spread=1e-2):
    net, x = ngd.models.DeepLinear([4, 4, 4], seed=0), ngd.data.gaussian(n, 4)
    return net, x, net(x).detach() + spread * ngd.data.gaussian(n, 4, seed=1)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("samples", [0, 1])
def test_rho_is_one_where_the_quadratic_is_exact(alpha, samples):
    """Small residuals, no damping, all of the loss reachable: alpha counts once."""
    net, x, _ = deep_problem()
    M = torch.eye(4, dtype=x.dtype) + 1e-4 * ngd.data.gaussian(4, 4, seed=2)
    y = net(x).detach() @ M
    rule = ngd.optim.Adaptive(start=0.0, lower=0.0, alpha=alpha)
    state = ngd.optim.NaturalGradient(
        net, ngd.fisher.KFAC(samples=samples, seed=1), alpha / 2, rule
    ).step(x, y)
    if samples == 0:
        assert state.rho == pytest.approx(1.0, abs=1e-3)
    assert state.accepted and state.damping == 0.0


def test_rho_equals_dense_rho():
    """Actual over predicted decrease, by hand, on K-FAC from both sides and with the
    exact Fisher.
    """
    for F, n in (
        (ngd.fisher.KFAC(samples=2, seed=5), 40),
        (ngd.fisher.KFAC(), 3),
        (ngd.fisher.Exact(), 3),
    ):
        net, x, y = problem(n=n)
        before, J, f = weights(net), torch.cat(jacobian(net, x), 1), net(x).detach()
        opt = ngd.optim.NaturalGradient(net, F, 0.2, ngd.optim.Adaptive(0.1, alpha=0.6))
        state = opt.step(x, y)
        gradient, step = J.T @ (f - y).flatten() / n, weights(net) - before
        change = float(
            ((net(x).detach() - y).square().sum() - (f - y).square().sum()) / (2 * n)
        )
        assert state.accepted and state.rho == pytest.approx(
            change / float(0.7 * step @ gradient), rel=1e-9
        )
        expected = 0.1 * (
            1.5 if state.rho < 0.25 else 1 / 1.5 if state.rho > 0.75 else 1.0
        )
        assert opt.param_groups[0]["damping"] == pytest.approx(expected)


def test_thresholds_and_clip():
    rule = ngd.optim.Adaptive(start=1.0, lower=0.8)
    found = [
        rule.after(1.2, rho) for rho in (-1.0, 0.2, 0.25, 0.5, 0.75, 0.8, float("nan"))
    ]
    assert found == pytest.approx([1.8, 1.8, 1.2, 1.2, 1.2, 0.8, 1.8])
    assert rule.after(1.0, 0.8) == 0.8
    assert ngd.optim.Adaptive(factor=1.0).after(1.0, 0.0) == 1.0
    for bad in (
        dict(start=-1.0),
        dict(start=1.0, lower=2.0),
        dict(alpha=2.0),
        dict(factor=0.5),
        dict(start=math.nan),
    ):
        with pytest.raises(ValueError, match="needs"):
            ngd.optim.Adaptive(**bad)


def test_bad_steps_are_undone_exactly():
    net, x, y = problem(n=40)
    before = weights(net)
    opt = ngd.optim.NaturalGradient(
        net, ngd.fisher.KFAC(samples=1), 1e3, ngd.optim.Adaptive(1.0)
    )
    state = opt.step(x, y)
    assert not state.accepted and state.rho < 0 and torch.equal(weights(net), before)
    assert opt.param_groups[0]["damping"] == 1.5
    opt = ngd.optim.NaturalGradient(
        net, ngd.fisher.KFAC(samples=1), 1e3, ngd.optim.Adaptive(1.0, reject=False)
    )
    assert opt.step(x, y).accepted and not torch.equal(weights(net), before)
    flat = x[:, :1].expand(-1, 5)  # singular inputs, no damping: nothing to invert
    for reject in (True, False):
        rule = ngd.optim.Adaptive(0.0, lower=0.0, reject=reject)
        opt = ngd.optim.NaturalGradient(
            net, ngd.fisher.KFAC("raise", samples=1), 0.3, rule
        )
        if reject:
            assert not opt.step(flat, y).accepted
        else:
            with pytest.raises(ngd.fisher.RankDeficient):
                opt.step(flat, y)


def test_run_reports_examples_and_tests():
    net, x, y = problem(n=12)
    held, calls = lambda: float(ngd.optim.half_mse(net(x).detach(), y)), []
    opt = ngd.optim.NaturalGradient(
        net, ngd.fisher.KFAC(samples=1), "optimal", ngd.optim.Adaptive(0.1)
    )
    states = list(
        ngd.optim.run(
            opt, x, y, 5, batch_size=4, test=lambda: calls.append(1) or held(), every=2
        )
    )
    assert [s.examples for s in states] == [0, 4, 8, 12, 16, 20] and len(calls) == 4
    assert [math.isnan(s.test) for s in states] == [
        False,
        True,
        False,
        True,
        False,
        False,
    ]
    assert states[-1].test == pytest.approx(held()) and opt.param_groups[0][
        "lr"
    ] == pytest.approx(1 / 3)


def test_lazy_signals_refuse_moved_weights():
    net, x, _ = problem()
    sig, eager = ngd.signals(net, x, lazy=True), ngd.signals(net, x)
    v = ngd.data.gaussian(6, 2, seed=9)
    assert all(
        torch.allclose(a, b) for a, b in zip(sig.vjp(v), eager.vjp(v))
    ) and "D" not in vars(sig)
    assert all(torch.equal(a, b) for a, b in zip(sig.D, eager.D))
    late = ngd.signals(net, x, lazy=True)
    for bad in (
        v,
        torch.zeros(1, 3, 2, dtype=x.dtype),
        torch.zeros(6, 1, 3, dtype=x.dtype),
    ):
        with pytest.raises(ValueError, match="cotangents"):
            late.pull(bad)
    with torch.no_grad():
        net[0].weight += 1
    with pytest.raises(ValueError, match="changed"):
        late.D
    assert eager.D is eager.D
