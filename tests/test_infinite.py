"""Infinitely wide networks against finite ones, 50-digit arithmetic and quadrature."""

import math
import pickle

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ngdcore as ngd
from ngdcore.dense import relative
from ngdcore.infinite import duals, recursion

SHIFTED = ngd.models.ShiftedReLU
LIMITS = [
    ("relu", 0.0, 1),
    ("relu", 0.2, 2),
    ("erf", 0.0, 2),
    ("identity", 0.2, 1),
    ("tanh", 0.2, 2),
    (nn.LeakyReLU(0.2), 0.0, 1),
    ("abs", 0.2, 1),
    (SHIFTED(0.5), 0.2, 1),
    (SHIFTED(-0.5), 0.0, 1),
    (nn.GELU, 0.0, 1),
]


@pytest.mark.parametrize(("activation", "bias_var", "outputs"), LIMITS)
def test_analytic_is_the_wide_limit(activation, bias_var, outputs):
    """Deviation falls like width^-1/2: slope of the log of the mean over seeds, with
    its standard error. A row of zeros is among the inputs.
    """
    x, widths = ngd.data.gaussian(5, 4, seed=1), (24, 96, 384)
    x[2] = 0
    limit = ngd.kernels.analytic(x, 3, activation, 1.8, bias_var, outputs)
    errors = torch.zeros(8, len(widths), dtype=torch.float64)
    for seed in range(8):
        for k, m in enumerate(widths):
            net = ngd.models.MLP(
                [4, m, m, outputs], activation, 1.8, bias_var, seed=seed
            )
            errors[seed, k] = relative(
                ngd.kernels.empirical(ngd.signals(net, x)).gram(), limit.gram()
            )
    slopes = (errors[:, -1] / errors[:, 0]).log() / math.log(widths[-1] / widths[0])
    assert abs(slopes.mean() + 0.5) < 4 * slopes.std() / math.sqrt(8) + 0.02
    assert errors[:, -1].mean() < 0.15


def test_analytic_layers_one_by_one():
    """Each layer's factors against wide nets' means (5 standard errors), so that no two
    errors cancel in the sum.
    """
    x, seeds = ngd.data.gaussian(4, 3, seed=5), 16
    for activation in ("relu", "erf"):
        limit = ngd.kernels.analytic(x, 3, activation, 1.5, 0.1)
        nets = [
            ngd.models.MLP([3, 600, 600, 1], activation, 1.5, 0.1, seed=s)
            for s in range(seeds)
        ]
        wide = [ngd.kernels.empirical(ngd.signals(net, x)) for net in nets]
        for l in range(3):
            for part in ("A", "B"):
                sample, exact = (
                    torch.stack([getattr(w, part)(l) for w in wide]),
                    getattr(limit, part)(l),
                )
                assert relative(sample.mean(0), exact) < 0.1
                assert (
                    (sample.mean(0) - exact).abs()
                    <= 5 * sample.std(0) / seeds**0.5 + 1e-12
                ).all()


def _exact_relu_ntk(x, i, j, depth, weight_var, bias_var):
    """The ReLU tangent kernel in 50-digit arithmetic, for one pair of rows."""
    mpmath.mp.dps = 50
    u, w = ([mpmath.mpf(float(v)) for v in x[k]] for k in (i, j))

    def cov(a, b):
        return weight_var * sum(p * q for p, q in zip(a, b)) / len(a) + bias_var

    weight_var, bias_var = mpmath.mpf(weight_var), mpmath.mpf(bias_var)
    k = [cov(u, u), cov(u, w), cov(w, w)]
    forward, slopes = [k[1]], []
    for _ in range(depth - 1):
        root = mpmath.sqrt(k[0] * k[2])
        cosine = min(max(k[1] / root, -1), 1)
        angle = mpmath.acos(cosine)
        slopes.append(weight_var * (mpmath.pi - angle) / (2 * mpmath.pi))
        mean = (
            root * (mpmath.sin(angle) + (mpmath.pi - angle) * cosine) / (2 * mpmath.pi)
        )
        k = [
            weight_var * k[0] / 2 + bias_var,
            weight_var * mean + bias_var,
            weight_var * k[2] / 2 + bias_var,
        ]
        forward.append(k[1])
    total, backward = mpmath.mpf(0), mpmath.mpf(1)
    for l in reversed(range(depth)):
        total += forward[l] * backward
        backward *= slopes[l - 1] if l else 1
    return float(total)


@pytest.mark.parametrize("bias_var", [0.0, 0.1])
def test_analytic_relu_near_coinciding_inputs(bias_var):
    """Error below 1e-9 also where arccos loses half of the digits: (nearly) equal,
    scaled and opposite rows.
    """
    x = ngd.data.sphere(6, 8, seed=0) * torch.tensor([1, 2, 1, 1, 0.5, 1.0])[:, None]
    x[1], x[3], x[5] = 2 * x[0], x[2] + 1e-9 * x[4], x[4] * -2 + 1e-7 * x[0]
    K = ngd.kernels.analytic(x, 3, "relu", 2.0, bias_var).gram()
    for i in range(6):
        for j in range(6):
            tolerance = (
                1e-9 if {i, j} == {4, 5} else 1e-12
            )  # nearly opposite: 1 + cos is kept to rounding only
            assert (
                abs(float(K[i, j]) - _exact_relu_ntk(x, i, j, 3, 2.0, bias_var))
                < tolerance
            )


def test_analytic_relu_at_scale():
    """N = 5000, depth 3: sampled entries, and all those of coinciding and nearly
    coinciding rows, to 1e-9.
    """
    x = ngd.data.sphere(4990, 50)
    x = torch.cat([x, x[:5], x[5:10] + 1e-8 * ngd.data.sphere(5, 50, seed=3)])
    K = ngd.kernels.analytic(x, 3).gram()
    picked = torch.randint(
        0, 5000, (30, 2), generator=torch.Generator().manual_seed(0)
    ).tolist()
    for i, j in (
        picked + [(k, 4990 + k) for k in range(10)] + [(k, k) for k in (0, 4999)]
    ):
        assert abs(float(K[i, j]) - _exact_relu_ntk(x, i, j, 3, 2.0, 0.0)) < 1e-12


def test_arc_cosine_gram():
    x, other = ngd.data.sphere(6, 4), ngd.data.gaussian(3, 4, seed=1)
    for rows, columns, G in (
        (x, x, ngd.kernels.arc_cosine_gram(x)),
        (other, x, ngd.kernels.arc_cosine_gram(other, x)),
    ):
        r, c = rows.numpy(), columns.numpy()
        dot = r @ c.T
        cosine = dot / np.linalg.norm(r, axis=1)[:, None] / np.linalg.norm(c, axis=1)
        assert np.allclose(
            G.numpy(),
            dot * (np.pi - np.arccos(np.clip(cosine, -1, 1))) / (2 * np.pi),
            atol=1e-8,
        )
    assert G.shape == (3, 6)
    assert torch.equal(
        ngd.kernels.arc_cosine_gram(x).diagonal(),
        torch.full((6,), 0.5, dtype=torch.float64),
    ) or torch.allclose(
        ngd.kernels.arc_cosine_gram(x).diagonal(),
        torch.full((6,), 0.5, dtype=torch.float64),
        atol=1e-15,
    )


sizes = st.tuples(
    st.integers(1, 12), st.integers(1, 6), st.integers(1, 8), st.integers(0, 10**6)
)


@settings(max_examples=20)
@given(sizes)
def test_permutation_and_rotation(case):
    n, d, m, seed = case
    x = ngd.data.gaussian(n, d, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(ngd.data.gaussian(d, d, seed=seed + 1))[0]
    for factors in (
        lambda z: ngd.kernels.analytic(z, 3, "relu", 2.0, 0.1),
        lambda z: ngd.kernels.analytic(z, 2, "erf"),
    ):
        K = factors(x).gram()
        assert torch.allclose(factors(x[order]).gram(), K[order][:, order], atol=1e-12)
        assert torch.allclose(factors(x @ rotation).gram(), K, atol=1e-11)
    net = ngd.models.MLP([d, m, 2], "tanh", seed=seed)
    K = ngd.kernels.empirical(ngd.signals(net, x)).gram().view(n, 2, n, 2)
    P = ngd.kernels.empirical(ngd.signals(net, x[order])).gram().view(n, 2, n, 2)
    assert torch.allclose(P, K[order][:, :, order], atol=1e-12)


def test_quadrature_agrees_with_closed_forms():
    """erf by its Hermite series against its closed form: coinciding, nearly coinciding
    and opposite rows included.
    """
    x = ngd.data.sphere(20, 8)
    x = torch.cat([x, x[:3] + 1e-7 * ngd.data.sphere(3, 8, seed=5), x[:2], -x[:1]])
    x = x * torch.linspace(0.5, 3.0, len(x), dtype=torch.float64)[:, None]
    for bias_var in (0.0, 0.3):
        closed, series = (
            ngd.kernels.analytic(x, 4, phi, 1.5, bias_var) for phi in ("erf", torch.erf)
        )
        for l in range(4):
            assert relative(series.layer(l), closed.layer(l)) < 1e-11
        other = ngd.data.gaussian(3, 8)
        assert relative(series.cross(other).gram(), closed.cross(other).gram()) < 1e-11


def _by_plane(phi, slope, s, r, c):
    """E phi phi' and E phi' phi' by the trapezoidal rule in the plane."""
    z = np.arange(-11, 11.01, 0.06)
    w = np.exp(-(z**2) / 2)
    w = np.outer(w, w) / w.sum() ** 2
    u, v = s * z[:, None], r * (c * z[:, None] + math.sqrt(1 - c * c) * z)
    return (w * phi(u) * phi(v)).sum(), (w * slope(u) * slope(v)).sum()


@pytest.mark.parametrize("weight_var", [1.8, 10.0])
def test_tanh_by_quadrature(weight_var):
    """Against a two-dimensional quadrature, layer by layer, at variances up to 10."""
    x = 1.2 * ngd.data.sphere(3, 5)
    x[2] = 1.7 * x[0] + 0.1 * x[1]
    fac = ngd.kernels.analytic(x, 3, "tanh", weight_var, 0.2)
    cov, slopes, A = weight_var * (x @ x.T).numpy() / 5 + 0.2, [], []
    for l in range(3):
        A.append(cov)
        s = np.sqrt(cov.diagonal())
        pairs = [
            _by_plane(np.tanh, lambda u: 1 / np.cosh(u) ** 2, s[i], s[j], c)
            for i in range(3)
            for j in range(3)
            for c in [min(1.0, cov[i, j] / s[i] / s[j])]
        ]
        mean, slope = (np.array(v).reshape(3, 3) for v in zip(*pairs))
        slopes.append(weight_var * slope)
        cov = weight_var * mean + 0.2
    B = [slopes[0] * slopes[1], slopes[1], np.ones((3, 3))]
    for l in range(3):
        assert relative(fac.layer(l), torch.from_numpy(A[l] * B[l])) < 1e-11


def test_hermite_series_of_every_parity():
    """Against closed forms: odd, even, neither, constant; unequal rows, all angles."""
    s = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    t = torch.tensor([0.0, 1e-9, 0.3, 1.0, 1.7, 2.0], dtype=torch.float64)
    damp = torch.exp(-(s[:, None] ** 2 + s**2) / 2)
    for phi, closed in (
        (torch.cos, lambda c: (damp * c.cosh(), damp * c.sinh())),
        (torch.sin, lambda c: (damp * c.sinh(), damp * c.cosh())),
        (lambda u: u + u**2, lambda c: (c + _square(s, c), 1 + 4 * c)),
        (torch.ones_like, lambda c: (torch.ones_like(c), torch.zeros_like(c))),
    ):
        dual = duals.dual_of(phi)
        rms, rows, own = dual.rows(s)
        for angle in t:
            c = s[:, None] * s * (1 - angle)
            mean, slope = closed(c)
            lack, rise = dual.pair(rows, rows, angle.expand(3, 3).contiguous())
            assert torch.allclose(rms[:, None] * rms * (1 - lack), mean, atol=1e-12)
            assert torch.allclose(rise, slope, rtol=1e-11, atol=1e-12)
        assert torch.allclose(own, closed(s[:, None] * s)[1].diagonal(), atol=1e-12)


def _square(s, c):
    return s[:, None] ** 2 * s**2 + 2 * c**2


def test_crosses_of_unequal_rows_keep_their_digits():
    """Few terms serve small rows, many large ones: a pair needs no fewer than both."""
    x, y = 0.2 * ngd.data.sphere(3, 4), 6 * ngd.data.sphere(2, 4, seed=1)
    for small, large in ((x, y), (y, x)):
        series, closed = (
            ngd.kernels.analytic(small, 3, phi, 1.5).cross(large).gram()
            for phi in (lambda u: torch.erf(u), "erf")
        )
        assert relative(series, closed) < 1e-12


@pytest.mark.parametrize("a", [0.0, 0.2, -1.0, 3.0])
def test_rectified_duals(a):
    """Against 40 digits, from equal to opposite rows."""
    mpmath.mp.dps = 40
    dual = duals.Rectified(a)
    one = dual.prepare(torch.ones(1, dtype=torch.float64))
    for t in (1e-18, 1e-9, 0.1, 1.0, 1.9, 2.0):
        c, m = 1 - mpmath.mpf(t), (1 - mpmath.mpf(a)) / 2
        angle, p = mpmath.acos(c), 1 - m
        even = 2 / mpmath.pi * (mpmath.sin(angle) + (mpmath.pi / 2 - angle) * c)
        lack = 1 - (p**2 * c + m**2 * even) / (p**2 + m**2)
        slope = p**2 + m**2 * (1 - 2 * angle / mpmath.pi)
        got = dual.pair(one, one, torch.full((1, 1), t, dtype=torch.float64))
        assert abs(float(got[0]) - lack) < 1e-15 * max(
            1e-9, min(1, 3 * mpmath.sqrt(lack))
        )
        assert abs(float(got[1]) - slope) < 1e-14


def _shifted(b, s, r, t):
    """One minus correlation and E phi' phi' of max(u - b, 0), by Plackett's integral
    in 25 digits."""
    mpmath.mp.dps = 25
    h, k, t = mpmath.mpf(b) / s, mpmath.mpf(b) / r, mpmath.mpf(t)
    angle, apart, high = mpmath.acos(1 - t), abs(h - k), max(h, k)

    def density(alpha):
        top = (h - k) ** 2 + 4 * h * k * mpmath.sin(alpha / 2) ** 2
        return mpmath.exp(-top / (2 * mpmath.sin(alpha) ** 2)) / (2 * mpmath.pi)

    def far(alpha):
        half = (angle + alpha) / 2, (angle - alpha) / 2
        return density(alpha) * 2 * mpmath.sin(half[0]) * mpmath.sin(half[1])

    cuts = [apart * f for f in (0.05, 0.15, 0.5, 2, 20, 1e3)] + [1, 2, 2.7]
    cuts = [0, *sorted(v for v in cuts if 0 < v < angle), angle]
    tail = mpmath.erfc(high / mpmath.sqrt(2)) / 2
    bell = lambda v: mpmath.exp(-(v**2) / 2) / mpmath.sqrt(2 * mpmath.pi)  # noqa: E731
    power = [
        (1 + v * v) * mpmath.erfc(v / mpmath.sqrt(2)) / 2 - v * bell(v) for v in (h, k)
    ]
    aligned = (1 + h * k) * tail + bell(high) * (high - h - k)
    mean = aligned - t * tail + mpmath.quad(far, cuts)
    return 1 - mean / mpmath.sqrt(power[0] * power[1]), tail - mpmath.quad(
        density, cuts
    )


@pytest.mark.parametrize("b", [0.5, -0.5, 2.0])
def test_shifted_dual(b):
    """Against 25 digits: (nearly) equal, opposite and unequal rows; the correlation's
    lack relative to its root, which is what the next angle sees."""
    dual = duals.Shifted(b)
    for s, r in ((1.0, 1.0), (1.0, 1.0 + 1e-9), (0.7, 1.3), (2.0, 0.5)):
        rows = [dual.prepare(torch.tensor([v], dtype=torch.float64)) for v in (s, r)]
        for t in (1e-16, 0.2, 1.0, 1.6):
            lack, slope = _shifted(b, s, r, t)
            got = dual.pair(*rows, torch.full((1, 1), t, dtype=torch.float64))
            assert abs(float(got[0]) - lack) < 1e-12 * max(1e-8, mpmath.sqrt(lack))
            assert abs(float(got[1]) - slope) < 1e-14


def test_activations_in_every_form():
    """Modules, classes, functions and names, as MLP takes them."""
    x = ngd.data.gaussian(4, 3)
    for forms in (
        ("relu", nn.ReLU(), nn.ReLU, torch.relu, nn.functional.relu, SHIFTED(0.0)),
        ("leaky_relu", nn.LeakyReLU(), nn.LeakyReLU(0.01), duals.Rectified(0.01)),
        ("abs", torch.abs, ngd.models.Elementwise(torch.abs), nn.LeakyReLU(-1.0)),
        ("identity", nn.Identity(), nn.LeakyReLU(1.0)),
        ("erf", ngd.models.Erf(), ngd.models.Erf, torch.erf, torch.special.erf),
        ("tanh", nn.Tanh(), nn.Tanh, torch.tanh),
    ):
        K = ngd.kernels.analytic(x, 3, forms[0], 1.5, 0.1).gram()
        for phi in forms[1:]:
            assert torch.equal(ngd.kernels.analytic(x, 3, phi, 1.5, 0.1).gram(), K)
            if not isinstance(phi, ngd.kernels.Dual):
                ngd.models.MLP([3, 2, 1], phi)


class Cosine(ngd.kernels.Dual):
    """A dual of a user's own."""

    def rms(self, s):
        return ((1 + torch.exp(-2 * s**2)) / 2).sqrt()

    def pair(self, left, right, t):
        s, r = left, right.mT
        damp, c = torch.exp(-(s**2 + r**2) / 2), s * r * (1 - t)
        corr = damp * c.cosh() / self.rms(s) / self.rms(r)
        return 1 - corr, damp * c.sinh()


def test_a_dual_of_ones_own_and_pickles():
    x = ngd.data.gaussian(6, 3)
    own, series = (
        ngd.kernels.analytic(x, 3, phi, 1.5, 0.1) for phi in (Cosine(), torch.cos)
    )
    assert relative(own.gram(), series.gram()) < 1e-12
    assert torch.allclose(own.diagonal(), own.gram().diagonal(), rtol=1e-13)
    for phi in (Cosine(), nn.Tanh(), "relu", "erf", SHIFTED(0.5), torch.sin):
        fac = ngd.kernels.analytic(x, 2, phi).cross(x[:2])
        assert torch.equal(pickle.loads(pickle.dumps(fac)).gram(), fac.gram())


def test_nngp_is_the_covariance_of_outputs():
    x = ngd.data.gaussian(3, 4)
    fac = ngd.kernels.analytic(x, 3, "relu", 1.8, 0.2, outputs=2)
    nets = [ngd.models.MLP([4, 80, 80, 2], weight_var=1.8, bias_var=0.2, seed=s)
            for s in range(400)]  # fmt: skip
    outputs = torch.cat([net(x).detach().T for net in nets])
    error = (outputs.T @ outputs / len(outputs) - fac.nngp()).abs()
    spread = fac.variance().sqrt()
    assert (error < 5 * math.sqrt(2 / 800) * spread[:, None] * spread).all()
    assert torch.allclose(fac.variance(), fac.nngp().diagonal())
    test = fac.cross(x[:2] + 1)
    assert test.nngp().shape == (2, 3) and test.variance().shape == (2,)


def test_layers_take_one_recursion(monkeypatch):
    """Every activation once a tile, for all layers and for the Fishers' coefficients;
    training rows are not prepared again for test rows."""
    calls, pair = [], duals.Rectified.pair
    monkeypatch.setattr(
        duals.Rectified, "pair", lambda *args: calls.append(1) or pair(*args)
    )
    fac = ngd.kernels.analytic(ngd.data.gaussian(6, 8), 10)
    for once in (fac.gram, fac.layers, lambda: fac.B(0), lambda: fac.A(9)):
        calls.clear()
        once()
        assert len(calls) == 9
    calls.clear()
    ngd.fisher.BlockDiagonal().coefficient(fac)
    assert len(calls) == 18  # train and rows
    assert relative(sum(fac.layers()), fac.gram()) < 1e-14
    assert torch.equal(fac.layers([-1, 3])[1], fac.layer(3))
    assert fac.cross(ngd.data.gaussian(2, 8))._columns is fac._rows


def test_outputs_are_one_problem(monkeypatch):
    """C outputs: nothing of size NC is formed but the result."""
    x, other = ngd.data.gaussian(6, 8), ngd.data.gaussian(3, 8, seed=1)
    one, many = (ngd.kernels.analytic(x, 3, outputs=c) for c in (1, 4))
    eye = torch.eye(4, dtype=x.dtype)
    assert relative(many.gram(), torch.kron(one.gram(), eye)) < 1e-15
    assert relative(many.B(0), torch.kron(one.B(0), eye)) < 1e-15
    assert torch.equal(many.A(0), one.A(0)) and one.scalar is None
    crossed = many.cross(other).gram(), torch.kron(one.cross(other).gram(), eye)
    assert relative(*crossed) < 1e-15
    gram, sizes = recursion._Analytic._assemble, []
    monkeypatch.setattr(
        recursion._Analytic,
        "_assemble",
        lambda self, *args, **kwargs: (
            sizes.append(self.c) or gram(self, *args, **kwargs)
        ),
    )
    for F in (ngd.fisher.Exact(), ngd.fisher.BlockTridiagonal(), ngd.fisher.KFAC()):
        Q = F.coefficient(many.cross(other), 0.1)
        single = F.coefficient(one.cross(other), 0.1)
        assert relative(Q, torch.kron(single, eye)) < 1e-12
    assert set(sizes) == {1}


def test_zero_rows():
    """The limit of small rows; exactly what a finite net has there; no NaN anywhere."""
    x = ngd.data.gaussian(4, 3)
    x[1] = 0
    near = x.clone()
    near[1] = 1e-13 * x[0]
    for phi in ("relu", "abs", "erf", "tanh", "identity", SHIFTED(-0.5), torch.cos):
        for bias_var in (0.0, 0.1):
            fac = ngd.kernels.analytic(x, 3, phi, 1.5, bias_var)
            limit = ngd.kernels.analytic(near, 3, phi, 1.5, bias_var).gram()
            assert torch.allclose(fac.gram(), limit, atol=1e-10), phi
            assert all(torch.isfinite(K).all() for K in fac.layers()), phi
            assert all(torch.isfinite(B).all() for B in fac.sides()[1]), phi
    fac = ngd.kernels.analytic(x, 2, nn.LeakyReLU(0.1))
    net = ngd.models.MLP([3, 9, 1], nn.LeakyReLU(0.1))
    D = ngd.signals(net, x).D[0][1] / (2 / 9) ** 0.5 / net[2].weight[0].detach()
    assert torch.allclose(D, torch.full_like(D, 0.1))  # torch's derivative at 0
    assert float(fac.B(0)[1, 1]) == pytest.approx(2 * 0.1**2)
    grid = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    K = ngd.kernels.analytic(grid, 3, bias_var=0.1).gram()
    expected = [0.7140, 0.5739, 0.6000, 0.5739, 0.7140]
    assert np.allclose(K[2], expected, atol=1e-4)
    assert torch.equal(ngd.kernels.analytic(grid, 3).cross(0 * grid).gram(), 0 * K)


def test_every_scale_that_fits():
    """No NaN where the result can be written: deep, large and small."""
    x = ngd.data.sphere(5, 4)
    for scale, depth, weight_var, dtype in (
        (1.0, 80, 1.0, torch.float32),
        (1e-18, 3, 2.0, torch.float32),
        (1e10, 3, 2.0, torch.float32),
        (1e-150, 3, 2.0, torch.float64),
        (1e150, 3, 2.0, torch.float64),
        (1.0, 50, 1e4, torch.float64),
        (1e-50, 90, 1e4, torch.float64),
    ):
        plain = ngd.kernels.analytic(x, depth, "relu", 2.0).gram()  # homogeneous
        factor = math.exp(2 * math.log(scale) + depth * math.log(weight_var / 2))
        K = ngd.kernels.analytic(
            (scale * x).to(dtype), depth, "relu", weight_var
        ).gram()
        tolerance = 1e-12 if dtype == torch.float64 else 3e-5
        assert relative(K.double() / factor, plain) < tolerance
    K = ngd.kernels.analytic(1e-160 * x, 3, "relu", 2.0, 0.1).gram()
    assert torch.allclose(K, K[0, 0].expand(5, 5))


def test_small_inputs_see_a_linear_net():
    x = ngd.data.sphere(5, 4)
    K = ngd.kernels.analytic(2 * x[:1].float(), 80, "relu", 1.0).gram()
    assert float(K) == pytest.approx(80 * 2 * 2**-80, rel=1e-4)
    plain = ngd.kernels.analytic(1e-9 * x, 3, "identity", 1.3).gram()
    for phi in ("erf", "tanh", torch.sin):
        K = ngd.kernels.analytic(1e-9 * x, 3, phi, 1.3).gram()
        gain = (4 / math.pi) ** 2 if phi == "erf" else 1.0
        assert relative(K, gain * plain) < 1e-12


@pytest.mark.parametrize(
    ("scale", "depth", "weight_var", "dtype"),
    [
        (1e-160, 3, 2.0, torch.float64),
        (1e160, 3, 2.0, torch.float64),
        (1.0, 200, 1e4, torch.float64),
        (1.0, 80, 0.05, torch.float32),
        (1e-25, 3, 2.0, torch.float32),
        (1e25, 3, 2.0, torch.float32),
    ],
)
def test_out_of_range_is_named(scale, depth, weight_var, dtype):
    x = (ngd.data.sphere(3, 4) * scale).to(dtype)
    fac = ngd.kernels.analytic(x, depth, "relu", weight_var)
    says = f"{dtype}.*depth={depth}, weight_var={weight_var:g}"
    for ask in (fac.gram, fac.diagonal, fac.layers, lambda: next(fac.blocks())):
        with pytest.raises(ValueError, match=says):
            ask()


def test_what_has_no_series_is_refused():
    x = ngd.data.sphere(3, 4)
    for phi, scale, says in (
        (nn.ELU(), 1.0, "not smooth enough.*Dual of your own"),
        ("tanh", 100.0, "not smooth enough.*smaller inputs"),
        (lambda u: u.tanh() + (-(1e6 * (u - 1) ** 2)).exp(), 1.0, "too narrow"),
        (lambda u: u * float("nan"), 1.0, "NaN or infinity"),
        (lambda u: torch.exp(9 * u), 1.0, "not smooth enough|grows"),
        (lambda u: u.softmax(1), 1.0, "element"),
        (lambda u: u.sum(), 1.0, "input's shape"),
    ):
        with pytest.raises(ValueError, match=says):
            ngd.kernels.analytic(scale * x, 3, phi).gram()


@pytest.mark.parametrize("size", [1e-150, 1e-60, 1e-8, 1e-4])
def test_a_threshold_far_below_is_not_met(size):
    """max(u + 2, 0) of small u is u + 2: the kernel of two layers in closed form."""
    x = size * ngd.data.gaussian(6, 4) * torch.arange(1.0, 7).double()[:, None]
    first = x @ x.T / 2
    fac = ngd.kernels.analytic(x, 2, ngd.models.ShiftedReLU(-2.0))
    assert relative(fac.gram(), 2 * (first + 4) + 2 * first) < 1e-12
    assert torch.linalg.eigvalsh(fac.gram())[0] > -1e-14 * fac.trace()


def test_analytic_refuses():
    x = ngd.data.gaussian(3, 2)
    for kwargs, says in (
        (dict(activation="step"), "unknown"),
        (dict(depth=0), "at least 1"),
        (dict(depth=2.5), "depth=2.5 must be a whole number"),
        (dict(weight_var=0.0), "positive"),
        (dict(weight_var=math.inf), "positive"),
        (dict(bias_var=-1.0), "negative"),
        (dict(outputs=0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            ngd.kernels.analytic(x, **{"depth": 2, **kwargs})
    with pytest.raises(ValueError, match="floating"):
        ngd.kernels.analytic(torch.ones(2, 2, dtype=torch.long), 2)
    fac = ngd.kernels.analytic(x, np.int64(2))
    with pytest.raises(ValueError, match="x must be"):
        fac.cross(x[:, :1])
    with pytest.raises(TypeError, match="no signals"):
        fac.cross(ngd.signals(ngd.models.MLP([2, 2, 1]), x))
