"""Signals and factors against dense Jacobians, analytic kernels against wide nets and
50-digit arithmetic.
"""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ngdcore as ngd
from ngdcore.dense import jacobian, relative

NETS = [
    (widths, activation, bias_var, parameterization)
    for widths in (
        [6, 9, 1],
        [6, 9, 3],
        [6, 9, 8, 1],
        [6, 9, 8, 3],
        [6, 9, 8, 7, 9, 1],
        [6, 9, 8, 7, 9, 3],
    )
    for activation in ("relu", "tanh", "erf", "identity")
    for bias_var in (0.0, 0.3)
    for parameterization in ("ntk", "standard")
]


@pytest.mark.parametrize(("widths", "activation", "bias_var", "parameterization"), NETS)
def test_gram_equals_dense(widths, activation, bias_var, parameterization):
    net = ngd.models.MLP(widths, activation, 1.7, bias_var, parameterization, seed=1)
    x, other = ngd.data.gaussian(7, 6, seed=2), ngd.data.gaussian(4, 6, seed=3)
    sig = ngd.signals(net, x)
    fac, blocks, others = (
        ngd.kernels.empirical(sig),
        jacobian(net, x),
        jacobian(net, other),
    )
    J, J_other = torch.cat(blocks, 1), torch.cat(others, 1)
    assert relative(fac.gram(), J @ J.T) < 1e-12
    assert relative(fac.cross(other).gram(), J_other @ J.T) < 1e-12
    for l, block in enumerate(blocks):
        assert relative(fac.layer(l), block @ block.T) < 1e-12
        A, B = fac.A(l).repeat_interleave(net[-1].out_features, 0), fac.B(l)
        assert (
            relative(A.repeat_interleave(net[-1].out_features, 1) * B, block @ block.T)
            < 1e-12
        )
    g = torch.randn(
        J.shape[0], generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    flat = torch.cat([d.flatten() for d in sig.vjp(g)])
    assert relative(flat, J.T @ g) < 1e-12
    assert relative(sig.jvp(sig.vjp(g)).flatten(), J @ (J.T @ g)) < 1e-12


@pytest.mark.parametrize("n", [1, 255, 256, 300, 600])
@pytest.mark.parametrize("c", [1, 3])
def test_tiles_join_without_seams(n, c):
    """More rows than a tile: the same Gram as one product, exactly symmetric."""
    net, x = (
        ngd.models.MLP([4, 5, c], "tanh", 1.5, 0.1, seed=0),
        ngd.data.gaussian(n, 4, seed=n),
    )
    sig = ngd.signals(net, x)
    whole = sum(
        (H @ H.T).repeat_interleave(c, 0).repeat_interleave(c, 1) * (D @ D.T)
        for H, D in zip(sig.H, sig.D)
    )
    K = ngd.kernels.empirical(sig).gram()
    assert relative(K, whole) < 1e-13
    assert torch.equal(K, K.T)
    K = ngd.kernels.analytic(x, 3, outputs=c).gram()
    assert torch.equal(K, K.T)


def test_more_outputs_than_a_tile():
    net, x = ngd.models.MLP([3, 4, 300], seed=0), ngd.data.gaussian(2, 3)
    J = torch.cat(jacobian(net, x), 1)
    assert relative(ngd.kernels.empirical(ngd.signals(net, x)).gram(), J @ J.T) < 1e-12


def test_two_layer_relu_and_deep_linear():
    x = ngd.data.sphere(8, 5)
    for net in (
        ngd.models.TwoLayerReLU(5, 40, nu=0.7),
        ngd.models.DeepLinear([5, 6, 4, 3], init="gaussian"),
    ):
        J = torch.cat(jacobian(net, x), 1)
        assert (
            relative(ngd.kernels.empirical(ngd.signals(net, x)).gram(), J @ J.T) < 1e-12
        )


def test_float32_follows_float64():
    for widths in ([6, 30, 1], [6, 30, 20, 3]):
        nets = [
            ngd.models.MLP(widths, "tanh", dtype=t, seed=3)
            for t in (torch.float32, torch.float64)
        ]
        K32, K64 = (
            ngd.kernels.empirical(
                ngd.signals(n, ngd.data.gaussian(9, 6).to(n[0].weight.dtype))
            ).gram()
            for n in nets
        )
        assert K32.dtype == torch.float32
        assert relative(K32.double(), K64) < 1e-5


@pytest.mark.parametrize("activation", ["relu", "erf", "identity", "tanh"])
@pytest.mark.parametrize(("bias_var", "outputs"), [(0.0, 1), (0.2, 2)])
def test_analytic_is_the_wide_limit(activation, bias_var, outputs):
    """Deviation falls like width^-1/2: slope of the log of the mean over seeds, with
    its standard error.
    """
    x, widths = ngd.data.gaussian(5, 4, seed=1), (32, 128, 512)
    x = x / 2 if activation == "tanh" else x  # variances that the quadrature takes
    limit = ngd.kernels.analytic(x, 3, activation, 1.8, bias_var, outputs)
    errors = torch.zeros(12, len(widths), dtype=torch.float64)
    for seed in range(12):
        for k, m in enumerate(widths):
            net = ngd.models.MLP(
                [4, m, m, outputs], activation, 1.8, bias_var, seed=seed
            )
            errors[seed, k] = relative(
                ngd.kernels.empirical(ngd.signals(net, x)).gram(), limit.gram()
            )
    slopes = (errors[:, -1] / errors[:, 0]).log() / math.log(widths[-1] / widths[0])
    assert abs(slopes.mean() + 0.5) < 4 * slopes.std() / math.sqrt(12) + 0.02
    assert errors[:, -1].mean() < 0.15


def test_analytic_layers_one_by_one():
    """Each layer's factors against wide nets' means (5 standard errors), so that no two
    errors cancel in the sum.
    """
    x, seeds = ngd.data.gaussian(4, 3, seed=5), 16
    for activation in ("relu", "erf"):
        limit = ngd.kernels.analytic(x, 3, activation, 1.5, 0.1)
        nets = [
            ngd.models.MLP([3, 1000, 1000, 1], activation, 1.5, 0.1, seed=s)
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
    cov = lambda a, b: weight_var * sum(p * q for p, q in zip(a, b)) / len(a) + bias_var  # noqa: E731
    k = [cov(u, u), cov(u, w), cov(w, w)]
    weight_var, bias_var = mpmath.mpf(weight_var), mpmath.mpf(bias_var)
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


# ------------------------------------------------------------------------------------------ properties

sizes = st.tuples(
    st.integers(1, 12), st.integers(1, 6), st.integers(1, 8), st.integers(0, 10**6)
)


@given(sizes)
def test_grams_are_positive_and_obey_schur(case):
    n, d, m, seed = case
    x = ngd.data.gaussian(n, d, seed=seed)
    fac = ngd.kernels.empirical(
        ngd.signals(ngd.models.TwoLayerReLU(d, m, seed=seed), x)
    )
    K, A, B = fac.gram(), fac.A(0), fac.B(0)
    values = torch.linalg.eigvalsh(K)
    slack = 1e-12 * float(1 + K.trace())
    assert values[0] >= -slack
    assert values[-1] <= A.diagonal().max() * torch.linalg.eigvalsh(B)[-1] + slack
    assert values[0] >= A.diagonal().min() * torch.linalg.eigvalsh(B)[0] - slack


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


# --------------------------------------------------------------------------------------------- errors


def test_factors_refuse_misuse():
    net, x = ngd.models.MLP([3, 4, 2]), ngd.data.gaussian(2, 3)
    sig = ngd.signals(net, x)
    fac = ngd.kernels.empirical(sig)
    with pytest.raises(ValueError, match="does not exist"):
        fac.layer(2)
    with torch.no_grad():
        net[0].weight += 1
    with pytest.raises(ValueError, match="changed"):
        fac.cross(x)
    with pytest.raises(TypeError, match="signals"):
        ngd.kernels.empirical(x)


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


def test_tanh_by_quadrature():
    """Against a two-dimensional quadrature by another library, layer by layer."""
    from numpy.polynomial.hermite_e import hermegauss

    x = 1.2 * ngd.data.sphere(4, 5)
    fac = ngd.kernels.analytic(x, 3, "tanh", 1.8, 0.2)
    z, w = hermegauss(90)
    w = np.outer(w, w).ravel() / w.sum() ** 2
    u, v = (a.ravel() for a in np.meshgrid(z, z))
    cov, slopes, A = 1.8 * (x @ x.T).numpy() / 5 + 0.2, [], []
    for l in range(3):
        A.append(cov)
        mean, slope = np.zeros((4, 4)), np.zeros((4, 4))
        for i in range(4):
            for j in range(4):
                root = np.linalg.cholesky(
                    np.array(
                        [[cov[i, i], cov[i, j]], [cov[i, j], cov[j, j] * (1 + 1e-13)]]
                    )
                )
                s, t = root[0, 0] * u, root[1, 0] * u + root[1, 1] * v
                mean[i, j] = w @ (np.tanh(s) * np.tanh(t))
                slope[i, j] = w @ (1 / np.cosh(s) ** 2 / np.cosh(t) ** 2)
        slopes.append(1.8 * slope)
        cov = 1.8 * mean + 0.2
    B = [slopes[0] * slopes[1], slopes[1], np.ones((4, 4))]
    for l in range(3):
        assert relative(fac.layer(l), torch.from_numpy(A[l] * B[l])) < 1e-6


def test_quadrature_refuses_kinks_and_saturation():
    x = ngd.data.sphere(3, 4)
    for phi, scale in (
        (ngd.models.ShiftedReLU(0.5), 1.0),
        ("tanh", 100.0),
        (lambda u: u * float("nan"), 1.0),
    ):
        with pytest.raises(ValueError, match="not smooth enough"):
            ngd.kernels.analytic(scale * x, 3, phi).gram()


def test_analytic_refuses():
    x = ngd.data.gaussian(3, 2)
    for kwargs, says in (
        (dict(activation="step"), "unknown"),
        (dict(depth=0), "at least 1"),
        (dict(weight_var=0.0), "positive"),
        (dict(bias_var=-1.0), "negative"),
        (dict(outputs=0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            ngd.kernels.analytic(x, **{"depth": 2, **kwargs})
    with pytest.raises(ValueError, match="zeros"):
        ngd.kernels.analytic(torch.zeros(2, 2, dtype=torch.float64), 2).gram()
    with pytest.raises(ValueError, match="floating"):
        ngd.kernels.analytic(torch.ones(2, 2, dtype=torch.long), 2)
    fac = ngd.kernels.analytic(x, 2)
    with pytest.raises(ValueError, match="x must be"):
        fac.cross(x[:, :1])
    with pytest.raises(TypeError, match="no signals"):
        fac.cross(ngd.signals(ngd.models.MLP([2, 2, 1]), x))
