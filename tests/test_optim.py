"""Networks, the optimizer, the training generator and closed-form trajectories."""

import copy
import io
import itertools
import math
import pickle
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

import ngdcore as ngd
from ngdcore.dense import jacobian, relative
from ngdcore.fisher import SampledKFAC


def problem(n=6, d=5, c=2, width=40, **kwargs):
    net = ngd.models.MLP([d, width, width, c], "tanh", 1.5, 0.1, seed=1, **kwargs)
    return net, ngd.data.gaussian(n, d, seed=2), ngd.data.gaussian(n, c, seed=3)


def weights(net):
    return torch.cat(
        [p.detach().flatten() for p in net.parameters() if p.requires_grad]
    )


# ------------------------------------------------------------------------------- models


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


# ----------------------------------------------------------------------------- one step


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


# ---------------------------------------------------------------------------------- run


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
    F, make, run = ngd.fisher.Exact(), ngd.optim.NaturalGradient, ngd.optim.run
    sgd = torch.optim.SGD(net.parameters())
    for call, says in (
        (lambda: make(net, F, lr="best"), "optimal"),
        (lambda: make(net, F, lr=0.0), "lr"),
        (lambda: make(net, F, damping=-1.0), "damping"),
        (lambda: make(nn.Sequential(), F), "trains nothing"),
        (lambda: make(net, F).step(x, y[:, 0]), "shape"),
        (lambda: make(net, F).step(x, y * float("nan")), "NaN"),
        (lambda: next(run(sgd, x, y, 1)), "net is needed"),
        (lambda: next(run(make(net, F), x, y, 1, batch_size=7)), "fit"),
        (lambda: next(run(make(net, F), x, y, -1)), "fit"),
        (lambda: next(run(make(net, F), x, y[:2], 1)), "fit"),
    ):
        before = weights(net).clone()
        with pytest.raises(ValueError, match=says):
            call()
        assert torch.equal(weights(net), before), (
            "a refused step must leave the weights alone"
        )


# ----------------------------------------------------------------------------- dynamics


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


# --------------------------------------------------------------------- adaptive damping


def deep_problem(n=40, spread=1e-2):
    net, x = ngd.models.DeepLinear([4, 4, 4], seed=0), ngd.data.gaussian(n, 4)
    return net, x, net(x).detach() + spread * ngd.data.gaussian(n, 4, seed=1)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("F", [ngd.fisher.KFAC(), SampledKFAC(seed=1)])
def test_rho_is_one_where_the_quadratic_is_exact(alpha, F):
    """Small residuals, no damping, all of the loss reachable: alpha counts once."""
    net, x, _ = deep_problem()
    M = torch.eye(4, dtype=x.dtype) + 1e-4 * ngd.data.gaussian(4, 4, seed=2)
    y = net(x).detach() @ M
    rule = ngd.optim.Adaptive(start=0.0, lower=0.0, alpha=alpha)
    state = ngd.optim.NaturalGradient(net, F, alpha / 2, rule).step(x, y)
    if not hasattr(F, "seed"):
        assert state.rho == pytest.approx(1.0, abs=1e-3)
    assert state.accepted and state.damping == 0.0


def test_rho_equals_dense_rho():
    """Actual over predicted decrease, by hand, on K-FAC from both sides and with the
    exact Fisher.
    """
    for F, n in (
        (SampledKFAC(samples=2, seed=5), 40),
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
        dict(start=2.0, upper=1.0),
    ):
        with pytest.raises(ValueError, match="needs"):
            ngd.optim.Adaptive(**bad)


def test_bad_steps_are_undone_exactly():
    net, x, y = problem(n=40)
    before = weights(net)
    opt = ngd.optim.NaturalGradient(net, SampledKFAC(), 1e3, ngd.optim.Adaptive(1.0))
    state = opt.step(x, y)
    assert not state.accepted and state.rho < 0 and torch.equal(weights(net), before)
    assert opt.param_groups[0]["damping"] == 1.5
    opt = ngd.optim.NaturalGradient(
        net, SampledKFAC(), 1e3, ngd.optim.Adaptive(1.0, reject=False)
    )
    assert opt.step(x, y).accepted and not torch.equal(weights(net), before)
    flat = x[:, :1].expand(-1, 5)  # singular inputs, no damping: nothing to invert
    for reject in (True, False):
        rule = ngd.optim.Adaptive(0.0, lower=0.0, reject=reject)
        opt = ngd.optim.NaturalGradient(net, ngd.fisher.KFAC("raise"), 0.3, rule)
        if reject:
            assert not opt.step(flat, y).accepted
        else:
            with pytest.raises(ngd.fisher.RankDeficient):
                opt.step(flat, y)


def test_run_reports_examples_and_tests():
    net, x, y = problem(n=12)
    held, calls = lambda: float(ngd.optim.half_mse(net(x).detach(), y)), []
    opt = ngd.optim.NaturalGradient(net, SampledKFAC(), 1 / 3, ngd.optim.Adaptive(0.1))
    states = list(
        ngd.optim.run(
            opt, x, y, 5, batch_size=4, test=lambda: calls.append(1) or held(), every=2
        )
    )
    assert [s.examples for s in states] == [0, 4, 8, 12, 16, 20] and len(calls) == 4
    untested = [math.isnan(s.test) for s in states]
    assert untested == [False, True, False, True, False, False]
    assert states[-1].test == pytest.approx(held())
    assert {s.lr for s in states[:-1]} == {1 / 3} and states[2].rows == 4


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


# -------------------------------------------------------------------- the learning rate


@pytest.mark.parametrize("F", [ngd.fisher.BlockDiagonal(), ngd.fisher.Exact()])
def test_optimal_rate_sees_the_damping(F):
    """By hand: 2 / (smallest + largest eigenvalue) of the damped Q; then it stays."""
    net, x, y = problem()
    fac = ngd.kernels.empirical(ngd.signals(net, x))
    values = torch.linalg.eigvals(F.coefficient(fac, damping=0.1)).real
    opt = ngd.optim.NaturalGradient(net, F, lr="optimal", damping=0.1)
    rates = [opt.step(x, y).lr for _ in range(2)]
    assert rates[0] == pytest.approx(2 / float(values.min() + values.max()), rel=1e-6)
    assert rates[1] == rates[0] == opt.param_groups[0]["lr"]
    assert isinstance(opt.param_groups[0]["lr"], float)


def test_the_default_rate_is_one():
    net, x, y = problem()
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.BlockDiagonal())
    assert opt.param_groups[0]["lr"] == opt.step(x, y).lr == 1.0


@pytest.mark.parametrize("error", [ValueError, TypeError, ngd.fisher.RankDeficient])
def test_an_optimal_rate_that_cannot_be_found_says_what_to_do(error):
    class Stubborn(ngd.fisher.Exact):
        def optimal_lr(self, sig, damping=0.0):
            raise error("Q is odd")

    net, x, y = problem()
    before = weights(net)
    opt = ngd.optim.NaturalGradient(net, Stubborn(), lr="optimal")
    with pytest.raises(error, match="lr='optimal'.*Q is odd.*pass a number"):
        opt.step(x, y)
    assert torch.equal(weights(net), before)


SCHEDULES = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda k: 0.5**k),
    "step": lambda o: schedules.StepLR(o, 1, 0.5),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.5),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 10),
    "cycle": lambda o: schedules.OneCycleLR(o, 0.3, 10, cycle_momentum=False),
    "warm": lambda o: schedules.LinearLR(o, 0.1, total_iters=3),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_follow_the_optimal_rate(name):
    """Attached before the first step, a schedule is one of multiples of the rate."""
    rates = []
    for lr in ("optimal", 1.0):
        net, x, y = problem()
        opt = ngd.optim.NaturalGradient(net, ngd.fisher.BlockDiagonal(), lr=lr)
        schedule, found = SCHEDULES[name](opt), []
        for _ in range(5):
            found.append(opt.step(x, y).lr)
            schedule.step()
        rates.append(torch.tensor(found))
    assert torch.allclose(rates[0], rates[1] / 3, rtol=1e-6)
    assert len(set(rates[1].tolist())) > 3


def test_plateau_and_later_schedulers_follow_too():
    net, x, y = problem()
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.BlockDiagonal(), lr="optimal")
    plateau = schedules.ReduceLROnPlateau(opt, factor=0.5, patience=0)
    opt.step(x, y)
    plateau.step(1.0)
    plateau.step(1.0)
    assert opt.step(x, y).lr == pytest.approx(1 / 6, rel=1e-6)
    late = schedules.LambdaLR(opt, lambda k: 0.1**k)
    opt.step(x, y)
    late.step()
    assert opt.step(x, y).lr == pytest.approx(1 / 60, rel=1e-6)


def test_a_bad_rate_or_damping_set_later_is_refused():
    net, x, y = problem()
    before = weights(net)
    for key, value in (("lr", math.nan), ("lr", -1.0), ("damping", -1.0)):
        opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact())
        opt.param_groups[0][key] = value
        with pytest.raises(ValueError, match=key):
            opt.step(x, y)
    assert torch.equal(weights(net), before)


# ---------------------------------------------------------- what is trained, and groups


def freeze(net):
    net[2].weight.requires_grad_(False)


def swap(net):
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(True)


def replace_parameter(net):
    net[4].weight = nn.Parameter(net[4].weight.detach().clone())


def replace_layer(net):
    net[2] = copy.deepcopy(net[2])


@pytest.mark.parametrize("change", [freeze, swap, replace_parameter, replace_layer])
def test_a_changed_trained_set_is_refused(change):
    net, x, y = problem()
    net[2].bias.requires_grad_(False)
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), lr=0.5)
    opt.step(x, y)
    change(net)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"trained parameters changed.*make a new"):
        opt.step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), lr=0.5).step(x, y)


def test_the_message_names_what_changed():
    net, x, y = problem()
    net[0].weight.requires_grad_(False)
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact())
    net[0].weight.requires_grad_(True)
    net[4].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"new: 0\.weight; no longer .*: 4\.bias"):
        opt.step(x, y)
    with pytest.raises(ValueError, match="make a new"):
        opt.add_param_group({"params": [net[0].weight]})


def test_rates_and_decay_by_layer():
    """Each group's update is its rate times the one direction, after AdamW's decay."""
    net, x, y = problem()
    d = ngd.fisher.Exact().direction(ngd.signals(net, x), net(x).detach() - y, 0.1)
    params = list(net.parameters())
    expected = [
        (1 - 0.2 * 0.3) * p.detach() - 0.2 * e
        if k < 2
        else (1 - 0.5 * 0.01) * p.detach() - 0.5 * e
        for k, (p, e) in enumerate(zip(params, d))
    ]
    groups = [
        dict(params=[*net[4].parameters(), *net[2].parameters()]),
        dict(params=net[0].parameters(), lr=0.2, weight_decay=0.3),
    ]
    opt = ngd.optim.NaturalGradient(
        net, ngd.fisher.Exact(), 0.5, 0.1, weight_decay=0.01, groups=groups
    )
    opt.step(x, y)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(params, expected))


def test_decay_is_that_of_adamw():
    net, x, _ = problem()
    y, twin = net(x).detach(), copy.deepcopy(net)
    adam = torch.optim.AdamW(twin.parameters(), lr=0.5, weight_decay=0.1)
    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    adam.step()
    for damping in (0.0, ngd.optim.Adaptive()):
        here = copy.deepcopy(net)
        opt = ngd.optim.NaturalGradient(
            here, ngd.fisher.Exact(), 0.5, damping, weight_decay=0.1
        )
        assert opt.step(x, y).accepted
        assert torch.allclose(weights(here), weights(twin), atol=1e-12)


@pytest.mark.parametrize("F", [ngd.fisher.Exact(), ngd.fisher.KFAC()])
def test_adaptive_damping_with_rates_by_layer(F):
    """rho by hand: each group's part of the slope with its own fraction."""
    net, x, y = problem(n=60)
    f, J = net(x).detach(), torch.cat(jacobian(net, x), 1)
    groups = [
        dict(params=net[0].parameters(), lr=0.1),
        dict(params=[*net[2].parameters(), *net[4].parameters()], lr=0.3),
    ]
    start, n = [p.detach().clone() for p in net.parameters()], len(x)
    full = F.full_step(ngd.signals(net, x))
    rule = ngd.optim.Adaptive(0.1)
    opt = ngd.optim.NaturalGradient(net, F, damping=rule, groups=groups)
    state = opt.step(x, y)
    moved = [(p.detach() - q).flatten() for p, q in zip(net.parameters(), start)]
    gradient = (J.T @ (f - y).flatten() / n).split([len(m) for m in moved])
    slopes = [float(m @ e) for m, e in zip(moved, gradient)]
    first, rest = 1 - min(0.1 / full, 1) / 2, 1 - min(0.3 / full, 1) / 2
    predicted = first * sum(slopes[:2]) + rest * sum(slopes[2:])
    change = float(ngd.optim.half_mse(net(x).detach(), y)) - state.loss
    assert state.accepted and state.rho == pytest.approx(change / predicted, rel=1e-8)
    assert len({group["damping"] for group in opt.param_groups}) == 1


def test_groups_refuse():
    net, _, _ = problem()
    other, _, _ = problem()
    F, w = ngd.fisher.Exact(), list(net.parameters())
    for groups, says in (
        ([dict(params=w[:-1])], "4.bias 0 times"),
        ([dict(params=w), dict(params=w[:1])], "0.weight 2 times"),
        ([dict(params=w), dict(params=other.parameters())], "another network"),
        ([dict(params=w, damping=0.1)], "one number"),
        ([dict(lr=0.1)], "params"),
        ([dict(params=w, lr=-1.0)], "lr"),
    ):
        with pytest.raises(ValueError, match=says):
            ngd.optim.NaturalGradient(net, F, groups=groups)
    opt = ngd.optim.NaturalGradient(net, F, groups=[dict(params=[p]) for p in w])
    opt.param_groups[1]["damping"] = 0.5
    with pytest.raises(ValueError, match="share one damping"):
        opt.step(*problem()[1:])


# --------------------------------------------------------- copies, pickles, checkpoints

MAKERS = {
    "exact": lambda net: ngd.optim.NaturalGradient(
        net, ngd.fisher.Exact(), 0.3, ngd.optim.Adaptive(0.01)
    ),
    "optimal": lambda net: ngd.optim.NaturalGradient(
        net, ngd.fisher.BlockDiagonal(), "optimal", 0.1, weight_decay=0.01
    ),
    "kfac": lambda net: ngd.optim.NaturalGradient(
        net, ngd.fisher.KFAC(), 0.1, ngd.optim.Adaptive(0.01)
    ),
    "sampled": lambda net: ngd.optim.NaturalGradient(
        net, SampledKFAC(samples=2, seed=3), 1 / 3, ngd.optim.Adaptive(0.01)
    ),
    "groups": lambda net: ngd.optim.NaturalGradient(
        net,
        SampledKFAC(seed=3),
        damping=ngd.optim.Adaptive(0.01),
        groups=[
            dict(params=[p], lr=0.1 + 0.1 * (p.ndim > 1)) for p in net.parameters()
        ],
    ),
}


def checkpoint(opt, name):
    """A new optimizer and network from files of the old ones' states."""
    files = io.BytesIO(), io.BytesIO()
    for thing, file in zip((opt.net, opt), files):
        torch.save(thing.state_dict(), file)
        file.seek(0)
    net, _, _ = problem(n=12)
    new = MAKERS[name](net)
    net.load_state_dict(torch.load(files[0], weights_only=True))
    new.load_state_dict(torch.load(files[1], weights_only=True))
    return new


COPIES = {
    "deepcopy": lambda opt, name: copy.deepcopy(opt),
    "deepcopy of both": lambda opt, name: copy.deepcopy((opt.net, opt))[1],
    "pickle": lambda opt, name: pickle.loads(pickle.dumps(opt)),
    "state_dict": checkpoint,
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("way", COPIES)
def test_copies_continue_bit_for_bit(name, way):
    net, x, y = problem(n=12)
    opt = MAKERS[name](net)
    for _ in range(3):
        opt.step(x, y)
    twin = COPIES[way](opt, name)
    assert twin.net is not opt.net and repr(twin) == repr(opt)
    assert not {id(p) for p in twin.net.parameters()} & {
        id(p) for p in net.parameters()
    }
    pairs = [(opt.step(x, y), twin.step(x, y)) for _ in range(4)]
    for a, b in pairs:
        assert (a.loss, a.damping, a.lr, a.step, a.examples) == (
            b.loss,
            b.damping,
            b.lr,
            b.step,
            b.examples,
        )
        assert a.rho == b.rho or (math.isnan(a.rho) and math.isnan(b.rho))
    assert torch.equal(weights(net), weights(twin.net))
    assert pairs[-1][0].step == 6 and pairs[-1][0].examples == 72
    with torch.no_grad():
        next(net.parameters()).zero_()
    assert not torch.equal(weights(net), weights(twin.net)), "nothing is shared"


def test_a_copy_keeps_its_scheduler():
    net, x, y = problem()
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), "optimal")
    schedule = schedules.ExponentialLR(opt, 0.5)
    for _ in range(2):
        opt.step(x, y)
        schedule.step()
    twin, late = copy.deepcopy((opt, schedule))
    assert late.optimizer is twin
    found = []
    for o, s in ((opt, schedule), (twin, late)):
        for _ in range(2):
            found.append((o.step(x, y).loss, o.param_groups[0]["lr"]))
            s.step()
    assert found[:2] == found[2:] and found[1][1] == 0.125


def test_the_generator_is_the_optimizers():
    """One Fisher in two runs: equal losses. A failed step draws nothing."""
    F, losses = SampledKFAC(samples=1, seed=5), []
    for fail in (False, True):
        net, x, y = problem(n=12)
        opt = ngd.optim.NaturalGradient(net, F, 1 / 3, 0.01)
        found = []
        for _ in range(3):
            found.append(opt.step(x, y).loss)
            if fail:
                drawn = opt._generator.get_state()
                with pytest.raises(ValueError, match="damping"):
                    opt.param_groups[0]["damping"] = math.nan
                    opt.step(x, y)
                opt.param_groups[0]["damping"] = 0.01
                assert torch.equal(opt._generator.get_state(), drawn)
        losses.append(found)
    assert losses[0] == losses[1] and len(set(losses[0])) == 3


def frozen(state_dict):
    """A state dict as plain lists, to be compared."""
    extra = state_dict["natural_gradient"]
    return state_dict["param_groups"], {
        k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in extra.items()
    }


@pytest.mark.parametrize(
    ("here", "there", "says"),
    [
        ("fixed", "sgd", "lacks.*damping"),
        ("fixed", "exact", "Adaptive"),
        ("exact", "fixed", "Adaptive"),
        ("exact", "sampled", "Fisher that draws"),
        ("sampled", "exact", "Fisher that draws"),
        ("sampled", "groups", "number of parameter groups"),
    ],
)
def test_a_foreign_state_dict_is_refused_whole(here, there, says):
    net, x, y = problem(n=12)
    makers = MAKERS | {
        "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
        "fixed": lambda net: ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), 0.3),
    }
    opt, other = makers[here](net), makers[there](net)
    before = frozen(opt.state_dict())
    if there != "sgd":
        other.step(x, y)
    with pytest.raises(ValueError, match=says):
        opt.load_state_dict(other.state_dict())
    assert frozen(opt.state_dict()) == before


# --------------------------------------------------------------------- how it is called


def test_wrong_calls_say_how():
    net, x, y = problem()
    F, make = ngd.fisher.Exact(), ngd.optim.NaturalGradient
    opt = make(net, F)
    conv = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Flatten(), nn.Linear(3, 1))
    tied = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    tied[2].weight = tied[0].weight
    normed = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 1))
    for call, error, says in (
        (lambda: opt.step(lambda: 0.0), TypeError, r"closure: opt\.step\(x, y, loss"),
        (lambda: opt.step(), TypeError, r"opt\.step\(x, y, loss=loss\)"),
        (lambda: opt.step(x, y, "mse"), TypeError, r"opt\.step\(x, y, loss=loss\)"),
        (lambda: make(net, ngd.fisher.KFAC), TypeError, "instance.*class KFAC"),
        (lambda: make(net, "exact"), TypeError, "instance of a Fisher"),
        (lambda: make(net.parameters(), F), TypeError, "network itself.*generator"),
        (lambda: make(list(net.parameters()), F), TypeError, "network itself.*list"),
        (lambda: make(conv, F), TypeError, "0.weight is trained, and not"),
        (lambda: make(tied, F), TypeError, "0.weight.*2.weight|2.weight.*0.weight"),
        (lambda: make(normed, F), TypeError, "1.weight is trained.*freeze"),
        (lambda: make(net, F, metric="kl"), ValueError, "metric='kl'.*'softmax'"),
        (lambda: make(net, F, weight_decay=-1.0), ValueError, "weight_decay"),
        (lambda: make(net, F, damping="auto"), ValueError, "damping=auto"),
        (lambda: make(net, F, lr=None), ValueError, "lr=None"),
    ):
        before = weights(net)
        with pytest.raises(error, match=says):
            call()
        assert torch.equal(weights(net), before)


def test_repr_fits_a_line():
    net, x, y = problem()
    opt = ngd.optim.NaturalGradient(
        net, ngd.fisher.Exact(), "optimal", ngd.optim.Adaptive(0.5), "softmax"
    )
    for part in ("MLP", "Exact", "lr='optimal'", "damping=0.5 (adaptive)", "softmax"):
        assert part in repr(opt)
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.KFAC(), 0.25, 0.1)
    assert "lr=0.25, damping=0.1)" in repr(opt) and "\n" not in repr(opt)
    assert len(repr(opt)) <= 88


# ------------------------------------------------------------------- losses and metrics


def test_losses_that_are_none_of_the_outputs_alone_are_refused():
    net, x, y = problem(c=1)
    flat, mse = y[:, 0], nn.MSELoss()

    def penalty(f, t):
        return mse(f, t) + sum(p.square().sum() for p in net.parameters())

    for loss, target, says in (
        (penalty, y, "weight_decay"),
        (lambda f, t: mse(net(x), t) + 0 * f.sum(), y, "weight_decay"),
        (nn.MSELoss(reduction="none"), y, "reduction='mean'"),
        (nn.MSELoss(reduction="sum"), y, "reduction='sum'"),
        (lambda f, t: (f - t).square(), y, "one number"),
        (lambda f, t: 1.0, y, "one number"),
        (lambda f, t: t.clone().requires_grad_().sum(), y, "does not depend"),
        (mse, flat, "shape"),
        (nn.functional.mse_loss, flat, "shape"),
        (nn.HuberLoss(), flat, "shape"),
        (lambda f, t: (f - t).square().mean(), flat, "mixes rows"),
        (lambda f, t: (f - t).square().mean(), (flat > 0).long(), "mixes rows"),
        (lambda f, t: (f - t).square().mean(), y[:, None], "mixes rows"),
        (lambda f, t: (f - t).square().sum(), y, "sums over the batch"),
        (lambda f, t: (f - t.mul_(2)).square().mean(), y.clone(), "writes to y"),
        (lambda f, t: (f.detach() - t).square().mean(), y, "does not depend"),
        (ngd.optim.half_mse, y.to(torch.complex128), "real number"),
        (lambda f, t: (f - t).square().mean(), y[:1], "1 rows and the outputs 6"),
    ):
        before = weights(net)
        opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact())
        with pytest.raises(ValueError, match=says):
            opt.step(x, target, loss)
        assert torch.equal(weights(net), before)


def test_labels_that_are_subtracted_from_as_many_outputs_are_refused():
    net, x, _ = problem(n=6, c=6)
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), 0.1)
    with pytest.raises(ValueError, match="mixes rows"):
        opt.step(x, torch.arange(6), lambda f, t: (f - t).square().mean())
    with pytest.raises(TypeError, match="as_tensor"):
        opt.step(x, [0.0] * 6)


def test_a_run_knows_which_net_is_trained():
    (net, x, y), (other, _, _) = problem(c=1), problem(c=1)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    natural = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), damping=0.1)
    mean = lambda f, t: (f - t).square().mean()  # noqa: E731
    for call, error, says in (
        (lambda: ngd.optim.run(sgd, x, y, 2, net=other), ValueError, "another network"),
        (lambda: ngd.optim.run(natural, x, y, 2, net=other), ValueError, "leave it"),
        (lambda: ngd.optim.run(natural, x, y, 2.5), TypeError, "whole number"),
        (
            lambda: list(ngd.optim.run(sgd, x, y[:, 0], 2, net=net, loss=mean)),
            ValueError,
            "mixes rows",
        ),
    ):
        with pytest.raises(error, match=says):
            call()


def test_the_state_of_other_groups_or_another_net_is_refused():
    def made(order, width=4):
        net = ngd.models.MLP([5, width, 1])
        params = [[net[0].weight], [net[2].weight]][::order]
        groups = [{"params": p, "lr": 0.1 * (i + 1)} for i, p in enumerate(params)]
        return ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), groups=groups)

    state = made(1).state_dict()
    made(1).load_state_dict(state)
    for other in (made(-1), made(1, width=6)):
        with pytest.raises(ValueError, match="same network and groups"):
            other.load_state_dict(state)


@pytest.mark.parametrize("decay", [math.nan, -1.0])
def test_a_bad_weight_decay_set_later_is_refused(decay):
    net, x, y = problem(c=1)
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), damping=0.1)
    opt.param_groups[0]["weight_decay"] = decay
    with pytest.raises(ValueError, match="weight_decay"):
        opt.step(x, y)


def test_targets_of_other_shapes_that_are_right():
    """Class indices, class probabilities, one-output losses that index alike."""
    net, x, y = problem(n=6, c=3)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    one, _, _ = problem(c=1)
    bits = (labels > 0).double()
    cross, binary = nn.CrossEntropyLoss, nn.functional.binary_cross_entropy_with_logits
    for model, target, loss in (
        (net, labels, cross(weight=torch.tensor([1.0, 2.0, 3.0]).double())),
        (net, y.softmax(1), cross(label_smoothing=0.1)),
        (one, bits[:, None], nn.BCEWithLogitsLoss()),
        (one, bits, lambda f, t: binary(f[:, 0], t)),
        (one, bits, lambda f, t: ((f[:, 0] - t) ** 2).mean()),
    ):
        opt = ngd.optim.NaturalGradient(model, ngd.fisher.Exact(), 0.1)
        first = opt.step(x, target, loss).loss
        assert opt.step(x, target, loss).loss < first


def weighted_step(net, x, g, weight):
    """The dense natural gradient pinv(J' Lambda J / N) J' g / N."""
    J = torch.cat(jacobian(net, x), 1)
    F = J.T @ torch.block_diag(*weight) @ J / len(x)
    return (
        torch.linalg.pinv(F, hermitian=True, rtol=1e-11) @ (J.T @ g.flatten()) / len(x)
    )


@pytest.mark.parametrize("c", [2, 3, 5])
def test_softmax_metric_is_the_fisher_of_cross_entropy(c):
    net, x, _ = problem(c=c)
    labels = torch.arange(6) % c
    p, before = net(x).detach().softmax(1), weights(net)
    weight = [q.diag() - q[:, None] * q for q in p]
    expected = weighted_step(net, x, p - nn.functional.one_hot(labels, c), weight)
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), 0.7, metric="softmax")
    opt.step(x, labels, loss=nn.CrossEntropyLoss())
    assert relative(before - weights(net), 0.7 * expected) < 1e-8


def test_a_callable_metric():
    """The Fisher of a sigmoid; and a metric of fewer rows, whose residual is fitted."""
    net, x, y = problem(c=1)
    bits, before = (y > 0).double(), weights(net)
    p = net(x).detach().sigmoid()
    expected = weighted_step(net, x, p - bits, (p * (1 - p))[:, :, None])
    root = lambda f: (f.sigmoid() * (1 - f.sigmoid())).sqrt()[:, :, None]  # noqa: E731
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), 0.5, metric=root)
    opt.step(x, bits, loss=nn.BCEWithLogitsLoss())
    assert relative(before - weights(net), 0.5 * expected) < 1e-8
    net, x, y = problem(c=3)
    R = ngd.data.gaussian(6, 6, seed=8).reshape(6, 2, 3) * 0.5
    f, before = net(x).detach(), weights(net)
    fitted = (R.mT @ torch.linalg.pinv(R.mT) @ (f - y)[:, :, None])[:, :, 0]
    expected = weighted_step(net, x, fitted, R.mT @ R)
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), 1.0, metric=lambda _: R)
    opt.step(x, y)
    assert relative(before - weights(net), expected) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_softmax_root_keeps_its_digits_when_outputs_saturate(dtype):
    """Against 60-digit arithmetic done in logarithms: R'R = diag(p) - pp' and
    R' (R')^+ g = g, entry by entry, at probabilities of 1e-44.
    """
    from ngdcore.optim.metric import softmax_root

    f = torch.tensor(
        [[50.0, -50.0, 0.0, 1.0], [-50.0, -50.0, -50.0, 50.0], [0.0, 0.1, -0.1, 0.0]]
    ).to(dtype)
    R, scale = softmax_root(f)
    assert R.shape == (3, 3, 4)
    p = f.double().softmax(1)
    rest = torch.stack([p.sum(1) - p[:, k] for k in range(4)], 1)
    for k in range(4):  # 1 - p without cancellation
        others = [j for j in range(4) if j != k]
        rest[:, k] = p[:, others].sum(1)
    exact = -p[:, :, None] * p[:, None, :]
    exact.diagonal(dim1=1, dim2=2).copy_(p * rest)
    eps = torch.finfo(dtype).eps
    R, scale = R.double(), scale.double()
    # relative to the entries' natural size; p itself carries eps * |f|
    spread = exact.diagonal(dim1=1, dim2=2).sqrt()
    size = spread[:, :, None] * spread[:, None, :]
    assert float(((R.mT @ R - exact) / size).abs().max()) < 300 * eps
    g = p - torch.eye(4, dtype=torch.float64)[[0, 3, 2]]
    v = torch.einsum("nkc,nc->nk", R / scale, g / scale[:, 0])
    back = torch.einsum("nkc,nk->nc", R, v)
    assert float(((back - g) / scale[:, 0]).abs().max()) < 300 * eps * float(
        (g / scale[:, 0]).abs().max()
    )


def test_metrics_refuse():
    net, x, y = problem(c=1)
    two, _, _ = problem(c=2)
    F = ngd.fisher.Exact()
    far = 1e5 * torch.tensor([1.0, -1.0]).double()
    with torch.no_grad():
        two[4].bias.copy_(far)
    for model, metric, says in (
        (net, "softmax", "one output"),
        (two, "softmax", "underflows"),
        (net, lambda f: f, r"\(N, k, C\) = \(6, k, 1\), not \(6, 1\)"),
        (net, lambda f: 1.0, "not float"),
        (net, lambda f: f[:, :, None] * math.nan, "NaN"),
    ):
        opt = ngd.optim.NaturalGradient(model, F, metric=metric)
        with pytest.raises(ValueError, match=says):
            opt.step(x, model(x).detach() + 1.0)
    with torch.no_grad():
        two[4].bias.copy_(far / 100)
    opt = ngd.optim.NaturalGradient(two, F, metric="softmax")
    with pytest.raises(ngd.fisher.RankDeficient, match="surer the model.*damping"):
        opt.step(x, two(x).detach() + 1.0)


def test_adaptive_damping_in_the_softmax_metric():
    """rho follows the loss in its own metric: it is near 1 for a short step."""
    net, x, _ = problem(c=3)
    labels = torch.arange(6) % 3
    rule = ngd.optim.Adaptive(0.0, lower=0.0)
    opt = ngd.optim.NaturalGradient(
        net, ngd.fisher.Exact(), 0.01, rule, metric="softmax"
    )
    state = opt.step(x, labels, nn.CrossEntropyLoss())
    assert state.accepted and state.rho == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("F", [ngd.fisher.Exact(), ngd.fisher.KFAC()])
def test_rho_counts_what_a_metric_drops(F):
    """The prediction is the slope of the loss, also where R' misses part of g."""
    net, x, y = problem(n=60, c=3)
    R = 0.5 * ngd.data.gaussian(60, 6, seed=8).reshape(60, 2, 3)
    f, before = net(x).detach(), weights(net)
    J = torch.cat(jacobian(net, x), 1)
    opt = ngd.optim.NaturalGradient(
        net, F, 0.05, ngd.optim.Adaptive(0.1, alpha=0.5), metric=lambda _: R
    )
    state = opt.step(x, y)
    slope = float((weights(net) - before) @ (J.T @ (f - y).flatten())) / len(x)
    change = float(ngd.optim.half_mse(net(x).detach(), y)) - state.loss
    assert state.accepted and state.rho == pytest.approx(change / (0.75 * slope), 1e-8)


# -------------------------------------------------------- adaptive damping, at its ends


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("lr", [0.1, 1.0])
def test_rho_follows_the_rate(lr, decay):
    """Near the solution the quadratic is exact: rho is 1 at all rates of a schedule."""
    net, x, y = problem(width=400)
    y = net(x).detach() + 1e-3 * y
    opt = ngd.optim.NaturalGradient(
        net, ngd.fisher.Exact(), lr, ngd.optim.Adaptive(0.0, lower=0.0)
    )
    schedule, rhos = schedules.ExponentialLR(opt, decay), []
    for _ in range(4):
        rhos.append(opt.step(x, y).rho)
        schedule.step()
        if lr == decay == 1.0:
            break
    assert rhos == pytest.approx([1.0] * len(rhos), abs=0.02)


@pytest.mark.parametrize(
    ("F", "rate"),
    [
        (ngd.fisher.Exact(), 1.0),
        (ngd.fisher.BlockDiagonal(), 1 / 3),
        (SampledKFAC(), 1 / 3),
        (ngd.fisher.KFAC(), 1 / 13),
    ],
)
def test_the_full_step(F, rate):
    """1/alpha: 1, 1/L, and 1/(N (L - 1) + 1) for K-FAC on few samples (N = 6)."""
    net, x, _ = problem(c=1)
    assert F.full_step(ngd.signals(net, x)) == pytest.approx(rate)


def test_adaptive_damping_survives_convergence():
    for F in (
        ngd.fisher.Exact(),
        ngd.fisher.BlockDiagonal(),
        ngd.fisher.KFAC(),
        SampledKFAC(),
        ngd.fisher.UnitWise(),
    ):
        net, x, _ = problem(n=8)
        opt = ngd.optim.NaturalGradient(net, F, 0.3, ngd.optim.Adaptive(0.1))
        state = opt.step(x, net(x).detach())
        assert state.loss == 0.0 and state.accepted and math.isnan(state.rho)
        assert opt.param_groups[0]["damping"] == 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adaptive_damping_stays_put_at_rounding_level(dtype):
    net, x, y = problem(dtype=dtype)
    x, y = x.to(dtype), 0.1 * y.to(dtype)
    opt = ngd.optim.NaturalGradient(
        net, ngd.fisher.Exact(), 1.0, ngd.optim.Adaptive(1e-3)
    )
    states = [opt.step(x, y) for _ in range(300)]
    level = 1e-10 if dtype == torch.float32 else 1e-26
    assert states[-1].loss < level and states[-1].damping < 1e-2
    assert all(s.accepted for s in states[-50:])


def test_damping_has_a_ceiling_and_leaves_zero():
    rule = ngd.optim.Adaptive(start=1.0, upper=4.0)
    assert [rule.after(d, -1.0) for d in (1.0, 3.0, 4.0)] == [1.5, 4.0, 4.0]
    assert 0 < ngd.optim.Adaptive(0.0, lower=0.0).after(0.0, math.nan) < 1e-9
    net, x, y = problem(n=12)
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), 1e4, rule)
    damping = [opt.step(x, y).damping for _ in range(8)]
    assert max(damping) <= 4.0


def test_an_interrupted_step_leaves_no_trace():
    """In the second evaluation of the loss the weights have moved already."""
    net, x, y = problem(n=12)
    for reject in (True, False):
        opt = ngd.optim.NaturalGradient(
            net, SampledKFAC(), 1 / 3, ngd.optim.Adaptive(0.1, reject=reject)
        )
        before, drawn, calls = weights(net), opt._generator.get_state(), []

        def loss(f, target):
            calls.append(weights(net))
            if not torch.equal(calls[-1], before):
                raise KeyboardInterrupt
            return ngd.optim.half_mse(f, target)

        with pytest.raises(KeyboardInterrupt):
            opt.step(x, y, loss)
        assert not torch.equal(calls[-1], before) and torch.equal(weights(net), before)
        assert torch.equal(opt._generator.get_state(), drawn)
        assert opt.param_groups[0]["damping"] == 0.1 and opt.step(x, y).step == 0


@pytest.mark.parametrize("error", [ngd.fisher.RankDeficient, torch.linalg.LinAlgError])
def test_a_singular_system_is_a_rejected_step(error):
    class Singular(ngd.fisher.Exact):
        def solve(self, *args, **kwargs):
            raise error("singular")

    net, x, y = problem()
    before = weights(net)
    opt = ngd.optim.NaturalGradient(net, Singular(), 1.0, ngd.optim.Adaptive(0.1))
    state = opt.step(x, y)
    assert not state.accepted and torch.equal(weights(net), before)
    assert opt.param_groups[0]["damping"] == pytest.approx(0.15)
    with pytest.raises(error):
        ngd.optim.NaturalGradient(net, Singular(), 1.0, 0.1).step(x, y)


# ----------------------------------------------------------------------- run, continued


@pytest.mark.parametrize("cut", [1, 3, 4])
@pytest.mark.parametrize("early", [False, True])
def test_a_run_can_be_continued(cut, early):
    """cut + the rest equals one run of 7 steps, minibatches included; also when the
    first part was left by a break, with its step taken.
    """
    found = []
    for parts in ([7], [cut, 7 - cut]):
        net, x, y = problem(n=13)
        opt, states, start = MAKERS["sampled"](net), [], None
        for k, steps in enumerate(parts):
            ask = 7 if early and len(parts) == 2 and k == 0 else steps
            run = ngd.optim.run(opt, x, y, ask, 4, 5, start=start)
            part = list(itertools.islice(run, steps + 1 - (ask > steps)))
            start, last = part[-1], k == len(parts) - 1
            states += part if last or start.rows else part[:-1]
        found.append([(s.step, s.examples, s.loss, s.damping) for s in states])
        seconds = [s.seconds for s in states]
        assert seconds == sorted(seconds) and seconds[-1] > 0
        found[-1].append(weights(net).tolist())
    assert found[0] == found[1]
    assert [step for step, *_ in found[0][:-1]] == list(range(8))


def test_run_takes_a_loader():
    net, x, y = problem(n=12)
    twin = copy.deepcopy(net)
    rows = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(rows, batch_size=5)
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), 0.1)
    states = list(ngd.optim.run(opt, loader, steps=4))
    assert [s.rows for s in states] == [5, 5, 2, 5, 0]
    assert [s.examples for s in states] == [0, 5, 10, 12, 17]
    by_hand = ngd.optim.NaturalGradient(twin, ngd.fisher.Exact(), 0.1)
    for rows in ((0, 5), (5, 10), (10, 12), (0, 5)):
        by_hand.step(x[slice(*rows)], y[slice(*rows)])
    assert torch.allclose(weights(net), weights(twin), atol=1e-12)
    for bad, error, says in (
        (dict(x=x, steps=1), TypeError, "y is needed"),
        (dict(x=loader), TypeError, "whole number is needed"),
        (dict(x=loader, steps=1, batch_size=3), ValueError, "batch_size"),
        (dict(x=[x], steps=1), ValueError, "pairs"),
        (dict(x=[], steps=1), ValueError, "empty"),
    ):
        with pytest.raises(error, match=says):
            next(ngd.optim.run(opt, **bad))


def test_run_can_drop_outputs():
    net, x, y = problem()
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), 0.5)
    assert {s.outputs for s in ngd.optim.run(opt, x, y, 3, outputs=False)} == {None}


def test_run_takes_lbfgs():
    net, x, y = problem()
    opt = torch.optim.LBFGS(net.parameters(), max_iter=5)
    states = list(ngd.optim.run(opt, x, y, 5, net=net))
    assert states[0].loss == pytest.approx(
        float(ngd.optim.half_mse(states[0].outputs, y))
    )
    assert states[-1].loss < 1e-3 * states[0].loss


def test_the_bar_shows_the_loss(monkeypatch):
    shown = []

    class Bar:
        def __init__(self, total):
            shown.append(total)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            shown.append("closed")

        def set_postfix(self, refresh, **kwargs):
            shown.append(kwargs)

        def update(self):
            pass

    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=Bar))
    net, x, y = problem()
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), 0.5)
    states = list(ngd.optim.run(opt, x, y, 2, progress=True))
    assert shown == [3, *({"loss": f"{s.loss:.3g}"} for s in states), "closed"]
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"ngdcore\[notebooks\]"):
        next(ngd.optim.run(opt, x, y, 2, progress=True))


@pytest.mark.parametrize("way", ["step", "run"])
def test_single_precision_warns_once_and_at_the_callers_line(way):
    net, x, y = problem(n=12, c=1, dtype=torch.float32)
    x = x.float()
    x[1] = x[0] + 2e-3  # two samples hardly differ
    opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), 0.1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3) if way == "step" else ngd.optim.run(opt, x, y.float(), 3):
            if way == "step":
                opt.step(x, y.float())
    assert [w.category for w in seen] == [RuntimeWarning]
    assert seen[0].filename == __file__ and "float64" in str(seen[0].message)
