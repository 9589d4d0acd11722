"""Factors of finite networks against dense Jacobians; blocks, diagonals, operators."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh, minres
from torch import nn

import ngdcore as ngd
from ngdcore.dense import jacobian, relative

NETS = [
    (widths, activation, bias_var, "ntk" if (bias_var > 0) == (l % 2) else "standard")
    for l, widths in enumerate(([6, 9, 1], [6, 9, 8, 3], [6, 9, 8, 7, 9, 3]))
    for activation in ("relu", "tanh", "erf", "identity")
    for bias_var in (0.0, 0.3)
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
        assert torch.equal(fac.layers()[l], fac.layer(l))
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


def test_any_sequential():
    """Plain torch layers, nested, with frozen parts, activations of every slope."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 6),
        nn.GELU(),
        nn.Sequential(nn.Linear(6, 7, bias=False), nn.Softplus()),
        nn.Linear(7, 4),
        nn.SiLU(),
        nn.Linear(4, 2),
    ).double()
    net[0].weight.requires_grad_(False)  # only its bias is trained
    net[3].bias.requires_grad_(False)  # only its weight is
    for p in net[5].parameters():
        p.requires_grad_(False)
    x = ngd.data.gaussian(6, 5)
    sig = ngd.signals(net, x)
    J = torch.cat(jacobian(net, x), 1)
    assert relative(ngd.kernels.empirical(sig).gram(), J @ J.T) < 1e-12
    flat = torch.cat(
        [d.flatten() for d in sig.vjp(torch.ones(12, dtype=torch.float64))]
    )
    assert relative(flat, J.sum(0)) < 1e-12


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


def _factors(c=3, n=9):
    net = ngd.models.MLP([6, 9, 8, c], "tanh", 1.7, 0.3, seed=1)
    fac = ngd.kernels.empirical(ngd.signals(net, ngd.data.gaussian(n, 6, seed=2)))
    return fac, ngd.kernels.analytic(ngd.data.gaussian(n, 6), 3, outputs=c)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("c", [1, 3])
def test_blocks_diagonal_and_trace(kind, c):
    fac = _factors(c)[kind]
    K, other = fac.gram(), fac.cross(ngd.data.gaussian(5, 6, seed=8))
    assert relative(fac.diagonal(), K.diagonal()) < 1e-14
    assert fac.trace() == pytest.approx(float(K.trace()))
    for rows in (1, 4, 9, np.int64(1024)):
        parts, blocks = zip(*fac.blocks(rows))
        assert relative(torch.cat(blocks), K) < 1e-13
        assert parts[0].start == 0 and parts[-1].stop == len(K)
        for part, block in fac.blocks(rows, upper=True):
            assert relative(block, K[part, part.start :]) < 1e-13
    assert relative(torch.cat([b for _, b in other.blocks(2)]), other.gram()) < 1e-13
    for refuse in (other.diagonal, other.trace, lambda: next(other.blocks(2, True))):
        with pytest.raises(ValueError, match="square"):
            refuse()
    with pytest.raises(ValueError, match="rows=0"):
        next(fac.blocks(0))


@pytest.mark.parametrize("kind", [0, 1])
def test_operator_serves_scipy(kind):
    """Eigenvalues, a solve, and products either way, without the Gram."""
    fac = _factors()[kind]
    K, op = fac.gram(), ngd.kernels.operator(fac)
    assert op.shape == tuple(K.shape) and op.dtype == np.float64
    top = eigsh(op, k=3, return_eigenvectors=False)
    assert np.allclose(np.sort(top), torch.linalg.eigvalsh(K)[-3:].numpy())
    shifted = K + 3 * torch.eye(27, dtype=K.dtype)
    v = minres(op, np.ones(27), shift=-3.0, rtol=1e-12)[0]
    assert np.allclose(shifted.numpy() @ v, np.ones(27), atol=1e-8)
    cross = fac.cross(ngd.data.gaussian(4, 6, seed=8))
    op, C = ngd.kernels.operator(cross), cross.gram().numpy()
    V, W = ngd.data.gaussian(27, 2).numpy(), ngd.data.gaussian(12, 2).numpy()
    assert np.allclose(op @ V, C @ V) and np.allclose(op.T @ W, C.T @ W)
    assert np.allclose(op @ V[:, 0], C @ V[:, 0])
    assert np.allclose(op.rmatvec(W[:, 0]), C.T @ W[:, 0])


def test_operator_takes_signals_and_nothing_else():
    fac = _factors()[0]
    v = np.ones(27)
    assert np.allclose(ngd.kernels.operator(fac.signals) @ v, fac.gram().numpy() @ v)
    with pytest.raises(TypeError, match="factors or signals, not Tensor"):
        ngd.kernels.operator(fac.gram())


def test_forward_factor_costs_no_sweep():
    net = ngd.models.MLP([6, 9, 3], seed=1)
    sig = ngd.signals(net, ngd.data.gaussian(5, 6), lazy=True)
    fac = ngd.kernels.empirical(sig)
    assert relative(fac.A(-1), sig.H[-1] @ sig.H[-1].T) < 1e-14
    assert "D" not in vars(sig)
    A, B = fac.sides()
    assert all(torch.equal(A[l], fac.A(l)) for l in range(2))
    assert all(torch.equal(B[l], fac.B(l)) for l in range(2))


def test_factors_fit_a_line_and_refuse():
    finite, infinite = _factors()
    for fac in (finite, infinite, finite.cross(ngd.data.gaussian(2, 6))):
        assert len(repr(fac)) < 88 and "\n" not in repr(fac)
        for l in (3, -4, 0.0):
            with pytest.raises(ValueError, match="does not exist"):
                fac.layer(l)
        with pytest.raises(ValueError, match="does not exist"):
            fac.layers([0, 5])
    for name in ("nngp", "variance"):
        with pytest.raises(TypeError, match="infinitely wide"):
            getattr(finite, name)()
    with pytest.raises(TypeError, match="signals"):
        ngd.kernels.empirical(ngd.data.gaussian(2, 6))


def test_cross_refuses_signals_of_another_net():
    fac, x = _factors()[0], ngd.data.gaussian(2, 6)
    other = ngd.models.MLP([6, 9, 8, 3], "tanh", 1.7, 0.3, seed=2)
    with pytest.raises(ValueError, match="net"):
        fac.cross(ngd.signals(other, x))
    with torch.no_grad():
        fac.signals.net[0].weight += 1
    with pytest.raises(ValueError, match="changed"):
        fac.cross(x)


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
