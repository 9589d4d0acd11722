"""The one law and the coefficient matrices against dense Fishers; solves that must
refuse.
"""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call, jvp

import ngdcore as ngd
from ngdcore import dense
from ngdcore.dense import (
    coefficient,
    jacobian,
    kfac,
    layer_signals,
    layer_wise_fisher,
    relative,
)

SIGMA = torch.tensor(
    [[1.0, 0.4, 0.0], [0.4, 1.0, -0.3], [0.0, -0.3, 1.0]], dtype=torch.float64
)
INDEFINITE = torch.tensor(
    [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64
)
PAIR = torch.tensor(
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64
)
FISHERS = {
    "exact": (ngd.fisher.Exact(), torch.ones(3, 3)),
    "layer-wise": (ngd.fisher.LayerWise(SIGMA), SIGMA),
    "indefinite": (ngd.fisher.LayerWise(INDEFINITE), INDEFINITE),
    "block-diagonal": (ngd.fisher.BlockDiagonal(), torch.eye(3)),
    "weighted blocks": (
        ngd.fisher.LayerWise([[2.0, 0, 0], [0, 0.5, 0], [0, 0, 3.0]]),
        torch.tensor([2.0, 0.5, 3.0]).diag(),
    ),
    "singular": (ngd.fisher.LayerWise(PAIR), PAIR),
    "block-tridiagonal": (ngd.fisher.BlockTridiagonal(), INDEFINITE),
}


def push_forward(net, x, direction):
    """J d by forward mode, without ngdcore."""
    trained = {
        name: p.detach() for name, p in net.named_parameters() if p.requires_grad
    }
    return jvp(
        lambda p: functional_call(net, p, (x,)),
        (trained,),
        (dict(zip(trained, direction)),),
    )[1].flatten()


@pytest.mark.parametrize("name", FISHERS)
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize(
    ("activation", "bias_var", "parameterization"),
    [
        ("relu", 0.0, "ntk"),
        ("tanh", 0.3, "ntk"),
        ("erf", 0.3, "standard"),
        ("identity", 0.2, "ntk"),
    ],
)
def test_one_law(name, damping, c, activation, bias_var, parameterization):
    F, sigma = FISHERS[name]
    n = 4
    net = ngd.models.MLP(
        [8, 24, 16, c], activation, 1.5, bias_var, parameterization, seed=2
    )
    x, other = ngd.data.gaussian(n, 8, seed=1), ngd.data.gaussian(3, 8, seed=2)
    blocks = jacobian(net, x)
    J, J_other = torch.cat(blocks, 1), torch.cat(jacobian(net, other), 1)
    fisher = layer_wise_fisher(blocks, sigma, n)
    sig = ngd.signals(net, x)
    fac = ngd.kernels.empirical(sig)
    g = torch.randn(
        n * c, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    Q = F.coefficient(fac, damping)
    scale = float(Q.norm() * g.norm())
    assert relative(Q, coefficient(J, fisher, J, n, damping)) < 1e-9
    assert (
        relative(
            F.coefficient(fac.cross(other), damping),
            coefficient(J_other, fisher, J, n, damping),
        )
        < 1e-9
    )
    assert (
        float((push_forward(net, x, F.direction(sig, g, damping)) - Q @ g).norm())
        < 1e-10 * scale
    )


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize(
    "widths",
    [
        (9, 20, 19),
        (3, 20, 19),
        (9, 4, 19),
        (5, 4, 3),
    ],  # samples fewer than units, more in the first, a middle, all
)
@pytest.mark.parametrize(("activation", "bias_var"), [("relu", 0.0), ("tanh", 0.3)])
def test_one_law_kfac(widths, c, damping, activation, bias_var):
    n = 6
    net = ngd.models.MLP([*widths, c], activation, 1.5, bias_var, seed=3)
    x, other = (
        ngd.data.gaussian(n, widths[0], seed=1),
        ngd.data.gaussian(3, widths[0], seed=2),
    )
    sig, F = ngd.signals(net, x), ngd.fisher.KFAC()
    fac = ngd.kernels.empirical(sig)
    g = torch.randn(
        n * c, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    Q = F.coefficient(fac, damping)
    assert relative(Q, kfac(net, x, x, damping)) < 1e-8
    assert (
        relative(F.coefficient(fac.cross(other), damping), kfac(net, x, other, damping))
        < 1e-8
    )
    pushed = push_forward(net, x, F.direction(sig, g, damping))
    assert float((pushed - Q @ g).norm()) < 1e-9 * float(Q.norm() * g.norm())


def test_kfac_is_isotropic_where_it_should_be():
    """alpha = N(L-1)+1 when every H has rank N and every D but the last rank NC;
    leverage scores if inputs are few.
    """
    for c in (1, 2):
        net, x = (
            ngd.models.MLP([20, 60, 60, c], "tanh", seed=0),
            ngd.data.gaussian(10, 20),
        )
        Q = ngd.fisher.KFAC().coefficient(ngd.kernels.empirical(ngd.signals(net, x)))
        if c == 1:
            assert relative(Q, 21 * torch.eye(10, dtype=torch.float64)) < 1e-8
        blocks = Q.view(10, c, 10, c)
        assert float(blocks[0, :, 1].abs().max()) < 1e-6
    net, x = ngd.models.TwoLayerReLU(6, 3000), ngd.data.sphere(30, 6)
    Q = ngd.fisher.KFAC().coefficient(ngd.kernels.empirical(ngd.signals(net, x))) / 30
    leverage = torch.linalg.qr(x)[0].square().sum(1)
    assert relative(Q, leverage.diag()) < 1e-9


def test_kfac_refuses_singular_factors_when_asked():
    sig = ngd.signals(
        ngd.models.MLP([20, 60, 1], "tanh"), ngd.data.sphere(8, 20)[[0, 1, 2, 3, 3]]
    )
    with pytest.raises(ngd.fisher.RankDeficient, match="layer 0's factor.*duplicate"):
        ngd.fisher.KFAC(rank="raise").direction(sig, sig.outputs)
    assert all(
        torch.isfinite(d).all() for d in ngd.fisher.KFAC().direction(sig, sig.outputs)
    )
    with pytest.raises(ValueError, match="g must"):
        ngd.fisher.KFAC().direction(sig, torch.ones(3))


def test_coefficients_on_training_rows():
    fac = ngd.kernels.analytic(ngd.data.sphere(12, 20), depth=4, outputs=2)
    eye = torch.eye(24, dtype=torch.float64)
    sigma = torch.eye(4, dtype=torch.float64) + 0.2
    assert relative(ngd.fisher.Exact().coefficient(fac), eye) < 1e-10
    assert relative(ngd.fisher.BlockDiagonal().coefficient(fac), 4 * eye) < 1e-10
    F = ngd.fisher.LayerWise(sigma)
    assert (
        relative(F.coefficient(fac), float(torch.linalg.inv(sigma).sum()) * eye) < 1e-10
    )
    assert F.best_alpha(fac) == pytest.approx(F.alpha(fac), abs=1e-9)
    assert ngd.fisher.BlockDiagonal().best_alpha(fac) == pytest.approx(4)


@given(
    st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6), st.floats(1e-6, 1e3)
)
def test_push_through(n, d, seed, damping):
    """(F + rho)^-1 J^T g / N in weight space is J^T (K + N rho)^-1 g."""
    net, x = (
        ngd.models.MLP([d, 4, 1], "tanh", seed=seed),
        ngd.data.gaussian(n, d, seed=seed),
    )
    J = torch.cat(jacobian(net, x), 1)
    g = ngd.data.gaussian(n, 1, seed=seed + 1)
    slow = torch.linalg.solve(
        J.T @ J / n + damping * torch.eye(J.shape[1], dtype=J.dtype), J.T @ g / n
    ).flatten()
    fast = ngd.fisher.Exact().direction(ngd.signals(net, x), g, damping)
    assert torch.allclose(
        torch.cat([d.flatten() for d in fast]),
        slow,
        atol=1e-8 * float(1 + slow.abs().max() / damping**0.5),
    )


@given(st.integers(2, 7), st.integers(0, 10**6))
def test_coefficient_commutes_with_permutations(n, seed):
    x = ngd.data.sphere(n, 9, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    F = ngd.fisher.BlockDiagonal()
    Q, P = (F.coefficient(ngd.kernels.analytic(z, 3), 0.01) for z in (x, x[order]))
    assert torch.allclose(P, Q[order][:, order], atol=1e-9)


def test_duplicates_and_antipodes_are_named():
    x = ngd.data.sphere(12, 3)
    for rows, says in (
        (
            torch.cat([x, x[2:3]]),
            r"1 pair\(s\) of duplicate inputs, the first in rows \[2, 12\]",
        ),
        (
            torch.cat([x, -x[:5]]),
            r"5 pair\(s\) of antipodal inputs, the first in rows \[0, 12\]",
        ),
    ):
        net = ngd.models.TwoLayerReLU(3, 4000)
        sig = ngd.signals(net, rows)
        ngd.kernels.empirical(sig).gram()  # computing it is fine
        with pytest.raises(ngd.fisher.RankDeficient, match=says):
            ngd.fisher.Exact().direction(sig, sig.outputs)
        d = ngd.fisher.Exact(rank="pinv").direction(sig, sig.outputs)
        J = jacobian(net, rows)[0]
        assert (
            relative(
                d[0].flatten(), torch.linalg.pinv(J, rtol=1e-7) @ sig.outputs.flatten()
            )
            < 1e-6
        )


def test_narrow_last_layer_is_refused_by_block_diagonal():
    sig = ngd.signals(ngd.models.MLP([9, 40, 4, 1]), ngd.data.gaussian(8, 9))
    ngd.fisher.Exact().direction(sig, sig.outputs)
    with pytest.raises(ngd.fisher.RankDeficient, match="layer 2's"):
        ngd.fisher.BlockDiagonal().direction(sig, sig.outputs)


def test_pole_of_an_indefinite_sigma_is_named():
    """N rho on an eigenvalue of -Sigma blockdiag(K): the damped system is singular
    there.
    """
    fac = ngd.kernels.analytic(ngd.data.sphere(4, 6), depth=3)
    blocks = torch.block_diag(*(fac.layer(l) for l in range(3)))
    values = torch.linalg.eigvals(
        torch.kron(INDEFINITE, torch.eye(4, dtype=torch.float64)) @ blocks
    ).real
    pole = float(-values[values < -1e-6][0]) / 4
    for F in (ngd.fisher.LayerWise(INDEFINITE), ngd.fisher.BlockTridiagonal()):
        assert float((F.poles(fac) / pole - 1).abs().min()) < 1e-9
        with pytest.raises(ngd.fisher.RankDeficient, match=f"nearest at {pole:.6g}"):
            F.coefficient(fac, damping=pole)
        assert torch.isfinite(F.coefficient(fac, damping=1.5 * pole)).all()


def tridiagonal(depth):
    return torch.ones(depth, depth, dtype=torch.float64).tril(1).triu(-1)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("depth", range(1, 13))
def test_block_tridiagonal_at_every_depth(depth, c):
    """alpha = ceil(L/3), undamped, singular depths L = 3s+2 included; damped systems
    against the dense one.
    """
    n, F = 4, ngd.fisher.BlockTridiagonal()
    net, x = (
        ngd.models.MLP([12, *[24] * (depth - 1), c], "tanh", 1.5, 0.1, seed=2),
        ngd.data.gaussian(n, 12, seed=1),
    )
    sig = ngd.signals(net, x)
    fac, g = (
        ngd.kernels.empirical(sig),
        torch.randn(n * c, generator=torch.Generator().manual_seed(3)).double(),
    )
    alpha = -(-depth // 3)
    assert float((F.coefficient(fac) - alpha * torch.eye(n * c)).abs().max()) < 1e-10
    assert F.best_alpha(fac) == pytest.approx(alpha, abs=1e-12)
    moved = [
        float(d.abs().max()) > 0 for d in F.direction(sig, g)[::2]
    ]  # weights; biases lie between
    pattern = {
        0: [False, True, False],
        1: [True, False, False],
        2: [True, True, False],
    }[depth % 3]
    assert moved == (pattern * depth)[:depth]
    blocks, other = jacobian(net, x), ngd.data.gaussian(3, 12, seed=2)
    S, J_other = torch.block_diag(*blocks), torch.cat(jacobian(net, other), 1)
    T = torch.kron(tridiagonal(depth), torch.eye(n * c, dtype=torch.float64))
    ones = torch.eye(n * c, dtype=torch.float64).repeat(depth, 1)
    for damping in (1e-6, 0.3):
        v = torch.linalg.solve(
            T @ (S @ S.T) + n * damping * torch.eye(len(T), dtype=T.dtype), ones
        )
        assert (
            relative(F.coefficient(fac, damping), torch.cat(blocks, 1) @ S.T @ v) < 1e-8
        )
        assert (
            relative(F.coefficient(fac.cross(other), damping), J_other @ S.T @ v) < 1e-8
        )
    if depth < 6 and c == 1:
        values = (
            torch.linalg.eigvalsh(layer_wise_fisher(blocks, tridiagonal(depth), n))
            .neg()
            .flip(0)
        )
        expected = values[values > 1e-9]
        assert (
            relative(F.poles(fac), expected) < 1e-8
            if len(expected)
            else len(F.poles(fac)) == 0
        )


def test_pole_bands_of_digits():
    """Zeros and ones of MNIST, first 100 rows, standardised, unit rows: where damping
    must not lie, L = 3, 5, 8.
    """
    x = ngd.data.mnist(
        classes=(0, 1), n_train=100, n_test=1, norm="unit", standardize=True
    ).x
    for depth, low, high in (
        (3, 5.12e-7, 3.56e-4),
        (5, 2.39e-6, 7.00e-4),
        (8, 1.85e-6, 9.93e-4),
    ):
        poles = ngd.fisher.BlockTridiagonal().poles(ngd.kernels.analytic(x, depth))
        assert (float(poles[0]), float(poles[-1])) == pytest.approx(
            (low, high), rel=0.005
        )


def test_all_ones_is_the_exact_fisher_and_a_bad_singular_sigma_is_refused():
    fac = ngd.kernels.analytic(ngd.data.sphere(5, 9), depth=3)
    other = ngd.data.sphere(3, 9, seed=1)
    ones, exact = ngd.fisher.LayerWise(torch.ones(3, 3)), ngd.fisher.Exact()
    for damping in (0.0, 0.1):
        assert (
            relative(
                ones.coefficient(fac.cross(other), damping),
                exact.coefficient(fac.cross(other), damping),
            )
            < 1e-9
        )
    bad = ngd.fisher.LayerWise([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    with pytest.raises(ValueError, match="ones is not in its range"):
        bad.coefficient(fac)
    assert torch.isfinite(bad.coefficient(fac, 0.1)).all()


def test_single_precision_is_refused_where_nothing_is_left_of_it():
    """L = 3s+2 at a damping that float32 cannot see beside the Gram: refused; float64
    solves it.
    """
    x = ngd.data.sphere(20, 30)
    for dtype in (torch.float32, torch.float64):
        sig = ngd.signals(ngd.models.MLP([30, *[200] * 4, 1], dtype=dtype), x.to(dtype))
        F = ngd.fisher.BlockTridiagonal()
        F.direction(sig, sig.outputs, damping=1e-4)
        if dtype is torch.float32:
            with pytest.raises(
                ngd.fisher.RankDeficient, match="float32.*poles.*take 0"
            ):
                F.direction(sig, sig.outputs, damping=1e-12)
        else:
            F.direction(sig, sig.outputs, damping=1e-12)


SMALL = {
    "unit-wise": (ngd.fisher.UnitWise(), dense.unit_wise),
    "diagonal": (ngd.fisher.Diagonal(), dense.diagonal),
    "quasi-diagonal": (ngd.fisher.QuasiDiagonal(), dense.quasi_diagonal),
    "tri-diagonal K-FAC": (ngd.fisher.TridiagonalKFAC(), dense.tridiagonal_kfac),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("widths", [(9, 12, 10), (3, 12, 10), (7, 5, 4)])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_one_law_within_layers(name, widths, c, damping, activation):
    """Units active or not, more inputs than samples or fewer: the law, and the dense
    matrix on rows old and new.
    """
    F, reference = SMALL[name]
    if name == "tri-diagonal K-FAC" and not damping:
        return  # defined with damping only
    n = 5
    net = ngd.models.MLP([*widths, c], activation, 1.5, 0.3, seed=3)
    x, other = (
        ngd.data.gaussian(n, widths[0], seed=1),
        ngd.data.gaussian(3, widths[0], seed=2),
    )
    sig = ngd.signals(net, x)
    fac = ngd.kernels.empirical(sig)
    g = torch.randn(
        n * c, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    Q = F.coefficient(fac, damping)
    assert relative(Q, reference(net, x, x, damping)) < 1e-9
    assert (
        relative(
            F.coefficient(fac.cross(other), damping), reference(net, x, other, damping)
        )
        < 1e-9
    )
    pushed = push_forward(net, x, F.direction(sig, g, damping))
    assert float((pushed - Q @ g).norm()) < 1e-10 * float(Q.norm() * g.norm())


def test_unit_wise_counts_active_units():
    """C = 1 and inputs of full rank: Q is the diagonal of active counts, at finite
    width; tanh is isotropic.
    """
    for activation, n in (("tanh", 10), ("relu", 10)):
        net, x = (
            ngd.models.MLP([20, 40, 40, 1], activation, seed=0),
            ngd.data.gaussian(n, 20),
        )
        sig = ngd.signals(net, x)
        fac = ngd.kernels.empirical(sig)
        count = sum((D != 0).sum(1) for D in sig.D).double()
        assert relative(ngd.fisher.UnitWise().coefficient(fac), count.diag()) < 1e-9
        assert ngd.fisher.UnitWise().best_alpha(fac) == pytest.approx(
            float(count.min() + count.max()) / 2, rel=1e-9
        )
    fac = ngd.kernels.empirical(ngd.signals(ngd.models.MLP([20, 40, 40, 1], "tanh"), x))
    assert ngd.fisher.UnitWise().alpha(fac) == pytest.approx(81, rel=1e-9)


def test_fishers_within_layers_refuse():
    fac = ngd.kernels.analytic(ngd.data.sphere(5, 9), depth=3)
    for F in (f for f, _ in SMALL.values()):
        with pytest.raises(TypeError, match="needs signals"):
            F.coefficient(fac, 0.1)
    sig = ngd.signals(ngd.models.MLP([3, 12, 1], "tanh"), ngd.data.sphere(5, 3))
    with pytest.raises(ngd.fisher.RankDeficient, match="layer 0's units"):
        ngd.fisher.UnitWise(rank="raise").direction(sig, sig.outputs)
    with pytest.raises(ValueError, match="weights and biases"):
        ngd.fisher.QuasiDiagonal().direction(sig, sig.outputs)
    with pytest.raises(ValueError, match="damping=0"):
        ngd.fisher.TridiagonalKFAC().direction(sig, sig.outputs)
    for F in (f for f, _ in SMALL.values()):
        with pytest.raises(ValueError, match="g must"):
            F.direction(sig, torch.ones(3), 0.1)


@pytest.mark.parametrize(
    "name", ["exact", "block-diagonal", "block-tridiagonal", "kfac", "unit-wise"]
)
def test_weighted_signals_give_the_cross_entropy_fisher(name):
    """R jvp(direction) = Q g with R^T R = Lambda + eps; for the exact Fisher, (1/N) J^T
    (Lambda + eps) J, densely.
    """
    n, c, eps = 4, 3, 0.05
    F = {"kfac": ngd.fisher.KFAC(), "unit-wise": ngd.fisher.UnitWise()}.get(
        name
    ) or FISHERS[name][0]
    net, x = (
        ngd.models.MLP([12, 20, 20, c], "tanh", 1.5, 0.2, seed=1),
        ngd.data.gaussian(n, 12),
    )
    sig = ngd.signals(net, x)
    p = torch.softmax(sig.outputs, 1)
    lam = (
        torch.diag_embed(p)
        - p[:, :, None] * p[:, None, :]
        + eps * torch.eye(c, dtype=torch.float64)
    )
    R = torch.linalg.cholesky(lam).mT
    g = p - torch.eye(c, dtype=torch.float64)[[0, 1, 2, 0]]
    seen = torch.linalg.solve(R.mT, g[:, :, None])
    weighted = sig.weighted(R)
    d = F.direction(weighted, seen)
    Q = F.coefficient(ngd.kernels.empirical(weighted))
    pushed = (R @ push_forward(net, x, d).view(n, c, 1)).flatten()
    assert float((pushed - Q @ seen.flatten()).norm()) < 1e-10 * float(
        Q.norm() * seen.norm()
    )
    if name == "exact":
        J = torch.cat(dense.jacobian(net, x), 1)
        fisher = J.T @ torch.block_diag(*lam) @ J / n
        expected = (
            torch.linalg.pinv(fisher, hermitian=True, rtol=1e-11)
            @ J.T
            @ g.flatten()
            / n
        )
        assert relative(torch.cat([part.flatten() for part in d]), expected) < 1e-8
    with pytest.raises(ValueError, match="R must"):
        sig.weighted(R[:, :, :2])


def near_duplicates(distance, dtype):
    x = ngd.data.sphere(20, 30)
    x = torch.cat([x, x + distance * ngd.data.sphere(20, 30, seed=1)]).to(dtype)
    return ngd.signals(ngd.models.TwoLayerReLU(30, 2000, dtype=dtype), x)


def test_float32_is_opt_in_and_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for distance, dtype in ((0.5, torch.float32), (1e-3, torch.float64)):
            sig = near_duplicates(distance, dtype)
            ngd.fisher.Exact().direction(sig, sig.outputs)
    sig = near_duplicates(2e-3, torch.float32)
    K = ngd.kernels.empirical(near_duplicates(2e-3, torch.float64)).gram()
    assert 1e6 < torch.linalg.cond(K) < 8e6
    with pytest.warns(RuntimeWarning, match="float64"):
        ngd.fisher.Exact().direction(sig, sig.outputs)
    sig = near_duplicates(1e-5, torch.float32)
    with pytest.raises(ngd.fisher.RankDeficient, match="Use float64"):
        ngd.fisher.Exact().direction(sig, sig.outputs)


def test_condition_is_estimated():
    for distance in (0.5, 0.05, 1e-3):
        sig = near_duplicates(distance, torch.float64)
        _, info = ngd.fisher.Exact().solve(sig, sig.outputs)
        truth = float(torch.linalg.cond(ngd.kernels.empirical(sig).gram()))
        assert 0.3 * truth < info.condition < 1.01 * truth


def test_jitter_is_relative_and_reported():
    sig = ngd.signals(ngd.models.MLP([5, 30, 2]), ngd.data.gaussian(6, 5))
    K = ngd.kernels.empirical(sig).gram()
    g = sig.outputs
    d, info = ngd.fisher.Exact(jitter=1e-3).solve(sig, g)
    assert info.jitter == pytest.approx(1e-3 * float(K.trace()) / 12)
    expected = K @ torch.linalg.solve(
        K + info.jitter * torch.eye(12, dtype=K.dtype), g.flatten()
    )
    assert relative(sig.jvp(d).flatten(), expected) < 1e-10
    assert ngd.fisher.Exact().solve(sig, g)[1].jitter == 0.0


def test_alpha_refuses_what_is_not_isotropic():
    fac = ngd.kernels.analytic(ngd.data.sphere(5, 4), depth=3)

    class GradientDescent(ngd.fisher.Fisher):
        def coefficient(self, factors, damping=0.0):
            return factors.gram() / factors.columns

    with pytest.raises(ValueError, match="not isotropic"):
        GradientDescent().alpha(fac)
    with pytest.raises(ValueError, match="square"):
        ngd.fisher.Exact().alpha(fac.cross(ngd.data.sphere(2, 4)))


def test_constructors_and_solves_refuse():
    for make, says in (
        (lambda: ngd.fisher.Exact(rank="maybe"), "rank='maybe'"),
        (lambda: ngd.fisher.Exact(jitter=-1), "jitter"),
        (lambda: ngd.fisher.BlockDiagonal(rank="x"), "rank"),
        (lambda: ngd.fisher.LayerWise([[1.0, 2.0]]), "symmetric"),
        (lambda: ngd.fisher.LayerWise([[1.0, 2.0], [0.0, 1.0]]), "symmetric"),
    ):
        with pytest.raises(ValueError, match=says):
            make()
    sig = ngd.signals(ngd.models.MLP([5, 30, 2]), ngd.data.gaussian(6, 5))
    F = ngd.fisher.Exact()
    for bad, says in (
        (torch.ones(5), "g must"),
        (sig.outputs.float(), "float64"),
        (sig.outputs * float("inf"), "NaN"),
    ):
        with pytest.raises(ValueError, match=says):
            F.direction(sig, bad)
    for damping in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping"):
            F.direction(sig, sig.outputs, damping=damping)
    with pytest.raises(ValueError, match="trains 2 layers"):
        ngd.fisher.LayerWise(SIGMA).direction(sig, sig.outputs)
    constant = ngd.signals(
        ngd.models.MLP([5, 3, 1], "relu"),
        -1e-300 * torch.ones(1, 5, dtype=torch.float64),
    )
    with pytest.raises(ngd.fisher.RankDeficient):
        ngd.fisher.Exact(rank="pinv").direction(
            constant, torch.ones(1, 1, dtype=torch.float64)
        )


# ------------------------------------------------------------------------------------------------ deep linear nets

DEEP = [
    [4, 4, 4, 4],
    [3, 5, 6, 4],
    [6, 4, 3, 2],
    [2, 3, 5, 6],
    [5, 4, 2, 3, 4],
    [6, 3, 3],
    [5, 3],
]


@pytest.mark.parametrize("widths", DEEP)
def test_deep_linear_exact_is_exact(widths):
    """Any widths: the law, and Q of the exact Fisher, which block-wise pseudo-inverses
    miss in narrow nets.
    """
    net = ngd.models.DeepLinear(widths, init="gaussian", seed=1)
    x, other = (
        ngd.data.gaussian(12, widths[0], seed=2),
        ngd.data.gaussian(3, widths[0], seed=3),
    )
    J, J_other = torch.cat(jacobian(net, x), 1), torch.cat(jacobian(net, other), 1)
    sig, F = ngd.signals(net, x), ngd.fisher.DeepLinearExact()
    fac, g = ngd.kernels.empirical(sig), ngd.data.gaussian(12, widths[-1], seed=5)
    Q = F.coefficient(fac)
    assert relative(Q, coefficient(J, J.T @ J / 12, J, 12)) < 1e-10
    assert (
        relative(
            F.coefficient(fac.cross(other)), coefficient(J_other, J.T @ J / 12, J, 12)
        )
        < 1e-10
    )
    pushed = push_forward(net, x, F.direction(sig, g))
    assert float((pushed - Q @ g.flatten()).norm()) < 1e-10 * float(Q.norm() * g.norm())
    blocks = ngd.fisher.KFAC().direction(sig, g)
    gap = relative(push_forward(net, x, blocks) / (len(widths) - 1), pushed)
    wide = min(widths[1:-1], default=9) >= max(widths[0], widths[-1])
    assert gap < 1e-9 if wide else gap > 0.05
    assert F.alpha(fac) == pytest.approx(1.0) and F.best_alpha(fac) == 1.0


def test_deep_linear_exact_refuses():
    F, x = ngd.fisher.DeepLinearExact(), ngd.data.gaussian(9, 4)
    for net in (
        ngd.models.MLP([4, 5, 2], "tanh"),
        ngd.models.MLP([4, 5, 2], "identity", bias_var=1.0),
        ngd.models.TwoLayerReLU(4, 3),
    ):
        sig = ngd.signals(net, x)
        with pytest.raises(TypeError, match="linear layers only"):
            F.direction(sig, sig.outputs)
    with pytest.raises(TypeError, match="needs signals"):
        F.coefficient(ngd.kernels.analytic(x, 2))
    net = ngd.models.DeepLinear([4, 3, 4])
    with pytest.raises(ValueError, match="no damped form"):
        F.direction(ngd.signals(net, x), net(x).detach(), damping=0.1)
    with torch.no_grad():
        net[0].weight[0] = net[0].weight[1]
    with pytest.raises(ngd.fisher.RankDeficient, match="saddle"):
        F.direction(ngd.signals(net, x), net(x).detach())


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize(
    ("n", "widths"), [(12, [4, 4, 4, 4]), (5, [6, 7, 9, 2]), (3, [2, 8, 3])]
)
def test_linear_nets_share_one_samples_gradients(n, widths, damping):
    """K-FAC on every mix of sides equals the dense one, with stacks of equal layers."""
    net = ngd.models.DeepLinear(widths, init="gaussian", seed=4)
    x, g = (
        ngd.data.gaussian(n, widths[0], seed=1),
        ngd.data.gaussian(n, widths[-1], seed=2),
    )
    d = ngd.fisher.KFAC().direction(ngd.signals(net, x, lazy=True), g, damping)
    assert (
        relative(push_forward(net, x, d), kfac(net, x, x, damping) @ g.flatten()) < 1e-8
    )


# ------------------------------------------------------------------------------------------------ sampled K-FAC


@pytest.mark.parametrize("damping", [0.01, 1.0])
@pytest.mark.parametrize("n", [4, 30])
@pytest.mark.parametrize("bias_var", [0.0, 0.2])
def test_one_law_sampled_kfac(n, bias_var, damping):
    """Both D: the samples' in the metric, the Jacobian's around it; layers of equal
    shape among others.
    """
    K, s2 = 2, 0.3
    net = ngd.models.MLP([6, 8, 8, 8, 3], "tanh", 1.5, bias_var, seed=3)
    x, other = ngd.data.gaussian(n, 6, seed=1), ngd.data.gaussian(3, 6, seed=2)
    sig = ngd.signals(net, x, lazy=True)
    g = ngd.data.gaussian(n, 3, seed=4).flatten()
    fresh = lambda: ngd.fisher.SampledKFAC(samples=K, variance=s2, seed=7)  # noqa: E731
    d, (H, D), (H_other, D_other) = (
        fresh().direction(sig, g, damping),
        layer_signals(net, x),
        layer_signals(net, other),
    )
    assert "D" not in vars(sig)  # never formed
    noise = torch.randn(
        n, K, 3, generator=torch.Generator().manual_seed(7), dtype=x.dtype
    )
    Q, Q_other, eye = 0.0, 0.0, torch.eye
    for l in range(4):
        S = torch.einsum("nkc,ncm->nkm", noise, D[l].view(n, 3, -1)).flatten(0, 1)
        B = S.T @ S / (n * K) / s2 + damping**0.5 * eye(
            S.shape[1], dtype=x.dtype
        )  # of the score, loss |f-y|^2/2s2
        A = H[l].T @ H[l] / n + damping**0.5 * eye(H[l].shape[1], dtype=x.dtype)
        J, J_other = (
            torch.einsum("kp,kq->kpq", dl, h.repeat_interleave(3, 0)).flatten(1)
            for dl, h in ((D[l], H[l]), (D_other[l], H_other[l]))
        )
        inverse = torch.linalg.inv(torch.kron(B, A)) / s2
        Q, Q_other = Q + J @ inverse @ J.T / n, Q_other + J_other @ inverse @ J.T / n
    fac = ngd.kernels.empirical(sig)
    assert relative(fresh().coefficient(fac, damping), Q) < 1e-9
    assert relative(fresh().coefficient(fac.cross(other), damping), Q_other) < 1e-9
    assert float((push_forward(net, x, d) - Q @ g).norm()) < 1e-10 * float(
        Q.norm() * g.norm()
    )


def test_many_samples_become_exact():
    net, x = ngd.models.MLP([4, 5, 3], "tanh", seed=3), ngd.data.gaussian(20, 4)
    exact, gaps = kfac(net, x, x, 0.1), []
    for K in (100, 10_000):
        gaps.append(
            relative(
                ngd.fisher.SampledKFAC(samples=K).coefficient(
                    ngd.kernels.empirical(ngd.signals(net, x)), 0.1
                ),
                exact,
            )
        )
    assert gaps[1] < 0.02 and gaps[1] < 0.3 * gaps[0]  # 1/sqrt(K): a tenth


def test_sampled_kfac_refuses():
    for bad in (dict(samples=-1), dict(variance=0.0), dict(variance=float("inf"))):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ngd.fisher.SampledKFAC(**bad)
    with pytest.raises(TypeError, match="analytic"):
        ngd.fisher.SampledKFAC(samples=1).coefficient(
            ngd.kernels.analytic(ngd.data.sphere(4, 5), 2)
        )
    assert (
        ngd.fisher.SampledKFAC(samples=1).best_alpha(
            ngd.kernels.analytic(ngd.data.sphere(4, 5), 3)
        )
        == 3.0
    )


def test_a_bad_layer_in_a_stack_is_found():
    net, x = ngd.models.MLP([4, 4, 4, 4, 2], "tanh", seed=3), ngd.data.gaussian(9, 4)
    with torch.no_grad():
        net[2].weight[1] = net[2].weight[0]  # layer 2's inputs are dependent
    sig = ngd.signals(net, x)
    with pytest.raises(ngd.fisher.RankDeficient, match="layer 2's"):
        ngd.fisher.KFAC(rank="raise").direction(sig, sig.outputs)
    d = ngd.fisher.KFAC().direction(sig, sig.outputs)
    assert (
        relative(push_forward(net, x, d), kfac(net, x, x) @ sig.outputs.flatten())
        < 1e-6
    )


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU here; runs where torch.cuda.is_available()",
)
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("name", [*FISHERS, *SMALL, "kfac", "deep-linear"])
def test_cuda_follows_the_cpu(name, damping):
    """Directions and coefficients, train and test rows, from signals on the GPU and on
    the CPU.
    """
    F = {"kfac": ngd.fisher.KFAC(), "deep-linear": ngd.fisher.DeepLinearExact()}.get(
        name
    ) or {**FISHERS, **SMALL}[name][0]
    if (name == "tri-diagonal K-FAC" and not damping) or (
        name == "deep-linear" and damping
    ):
        return
    outcomes = []
    for device in ("cpu", "cuda"):
        net = ngd.models.MLP([9, 12, 10, 2], "tanh", 1.5, 0.3, seed=3, device=device)
        if name == "deep-linear":
            net = ngd.models.DeepLinear([9, 7, 8, 2], seed=3, device=device)
        x, other = (
            ngd.data.gaussian(5, 9, seed=1).to(device),
            ngd.data.gaussian(3, 9, seed=2).to(device),
        )
        sig = ngd.signals(net, x)
        fac = ngd.kernels.empirical(sig)
        d = F.direction(sig, sig.outputs, damping)
        parts = [
            *d,
            F.coefficient(fac, damping),
            F.coefficient(fac.cross(other), damping),
        ]
        assert all(part.device.type == device for part in parts)
        outcomes.append(torch.cat([part.detach().cpu().flatten() for part in parts]))
    assert relative(outcomes[1], outcomes[0]) < 1e-8


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU here; runs where torch.cuda.is_available()",
)
def test_cuda_analytic_and_sampled():
    for activation in ("relu", "erf", "tanh"):
        on_cpu, on_gpu = (
            ngd.kernels.analytic(
                ngd.data.sphere(300, 9).to(device), 3, activation, outputs=1
            )
            for device in ("cpu", "cuda")
        )
        assert relative(on_gpu.gram().cpu(), on_cpu.gram()) < 1e-11
        assert ngd.fisher.BlockTridiagonal().poles(on_gpu).device.type == "cuda"
    net = ngd.models.MLP([9, 12, 10, 2], "tanh", device="cuda")
    sig = ngd.signals(net, ngd.data.gaussian(50, 9).cuda(), lazy=True)
    d = ngd.fisher.SampledKFAC(samples=2).direction(sig, sig.outputs, 0.01)
    assert all(torch.isfinite(part).all() and part.is_cuda for part in d)
