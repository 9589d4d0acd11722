"""The one law for every Fisher, each against its dense twin; solves that must refuse.

A new Fisher is one row of ``TABLE``."""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jvp

import ngdcore as ngd
from ngdcore import dense
from ngdcore.dense import jacobian, kfac, relative

# ---------------------------------------------------------------------- the one table


class Residual(nn.Module):
    """Three trained layers around a skip connection, a norm and a function."""

    def __init__(self, outputs):
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 24)
        self.norm = nn.LayerNorm(24, elementwise_affine=False)
        self.last = nn.Linear(24, outputs)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(self.norm(h + nn.functional.gelu(self.second(h))))


def residual(c):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Residual(c).double()


def frozen(c):
    """Five layers, of which the second is frozen, and the fourth's bias."""
    net = ngd.models.MLP([8, 20, 18, 24, c], "tanh", 1.5, 0.3, seed=2)
    layers = [m for m in net.modules() if isinstance(m, nn.Linear)]
    layers[1].requires_grad_(False)
    layers[2].bias.requires_grad_(False)
    return net


def mlp(widths, *args):
    return lambda c: ngd.models.MLP([*widths, c], *args, seed=2)


# three trained layers each, on inputs of 8 numbers (narrow: 3)
NETS = {
    "relu": mlp([8, 24, 16], "relu", 1.5),
    "biases": mlp([8, 24, 16], "tanh", 1.5, 0.3),
    "standard": mlp([8, 24, 16], "erf", 1.5, 0.3, "standard"),
    "residual": residual,
    "frozen": frozen,
    "linear": lambda c: ngd.models.DeepLinear([8, 9, 10, c], "gaussian", seed=4),
    "narrow": mlp([3, 5, 4], "tanh", 1.5, 0.3),  # more samples than units
    "narrow relu": mlp([3, 7, 5], "relu", 1.5, 0.3),  # and units that are off
    "narrow linear": lambda c: ngd.models.DeepLinear([3, 5, 4, c], "gaussian", seed=4),
}
WIDE = [name for name in NETS if "narrow" not in name]
REGULAR = [*WIDE, "narrow"]  # where J has full rank
SIGMA = torch.tensor([[1.0, 0.4, 0.0], [0.4, 1.0, -0.3], [0.0, -0.3, 1.0]]).double()
INDEFINITE = torch.tensor([[1.0, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.float64)
PAIR = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.float64)


@dataclass
class Row:
    """A Fisher; its twin, called with (net, x, rows, damping, R); and where it is
    defined.
    """

    fisher: ngd.fisher.Fisher
    twin: object
    nets: list[str] = field(default_factory=lambda: list(NETS))
    dampings: tuple = (0.0, 0.05)


def layer_wise(sigma):
    return lambda *args: dense.layer_wise(*args, sigma=torch.as_tensor(sigma))


def sampled(net, x, rows, damping, R, samples=2, variance=0.3, seed=7):
    """The twin of K-FAC from draws: its draws are those of the seed."""
    c = net(x).shape[1] if R is None else R.shape[1]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(len(x), samples, c, generator=generator, dtype=torch.float64)
    return dense.kfac(net, x, rows, damping, R, draws=draws, variance=variance)


F = ngd.fisher
WEIGHTED = torch.tensor([2.0, 0.5, 3.0]).diag()
BIASED = ["biases", "standard", "residual", "narrow", "narrow relu"]
TABLE = {
    "exact": Row(F.Exact(), dense.exact, REGULAR),
    "matrix-free": Row(F.MatrixFree(1e-12, landmarks=4), dense.exact, REGULAR),
    "layer-wise": Row(F.LayerWise(SIGMA), layer_wise(SIGMA), WIDE),
    "indefinite": Row(F.LayerWise(INDEFINITE), layer_wise(INDEFINITE), WIDE),
    "block-diagonal": Row(F.BlockDiagonal(), layer_wise(torch.eye(3)), WIDE),
    "weighted blocks": Row(F.LayerWise(WEIGHTED), layer_wise(WEIGHTED), WIDE),
    "singular": Row(F.LayerWise(PAIR), layer_wise(PAIR), WIDE),
    "block-tridiagonal": Row(F.BlockTridiagonal(), layer_wise(INDEFINITE), WIDE),
    "K-FAC": Row(F.KFAC(), dense.kfac),
    "sampled K-FAC": Row(
        F.SampledKFAC(2, variance=0.3, seed=7), sampled, dampings=(0.01, 1.0)
    ),
    "tri-diagonal K-FAC": Row(
        F.TridiagonalKFAC(), dense.tridiagonal_kfac, dampings=(0.01, 1.0)
    ),
    # units of the standard net are saturated: undamped, no dense inverse has digits
    "unit-wise": Row(
        F.UnitWise(), dense.unit_wise, [n for n in NETS if n != "standard"]
    ),
    "diagonal": Row(F.Diagonal(), dense.diagonal),
    "quasi-diagonal": Row(F.QuasiDiagonal(), dense.quasi_diagonal, BIASED),
    "deep linear": Row(F.DeepLinearExact(), dense.exact, ["narrow linear"], (0.0,)),
}
CASES = [(name, net) for name, row in TABLE.items() for net in row.nets]


def push_forward(net, x, direction):
    """J d by forward mode, without ngdcore."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    params = {name: p.detach() for name, p in named}
    tangents = {name: d for (name, _), d in zip(named, direction)}
    run = lambda p: functional_call(net, p, (x,))  # noqa: E731
    return jvp(run, (params,), (tangents,))[1].flatten()


def inputs(name):
    """Training rows, and others; more rows than units in narrow nets."""
    n, d = (6, 3) if "narrow" in name else (4, 8)
    return ngd.data.gaussian(n, d, seed=1), ngd.data.gaussian(3, d, seed=2)


def defects(row, name, c, damping, k=None):
    """How far Q is from its twin's, on training rows and on others, and the law from
    holding, relative to |Q| |g|; with k, for signals weighted by an R (N, k, C).
    """
    net, (x, other) = NETS[name](c), inputs(name)
    R = None if k is None else 1 + ngd.data.gaussian(len(x) * k, c, seed=5)
    R = None if k is None else R.view(len(x), k, c)
    sig = ngd.signals(net, x) if k is None else ngd.signals(net, x).weighted(R)
    g = ngd.data.gaussian(len(x), k or c, seed=3)
    pushed = push_forward(net, x, row.fisher.direction(sig, g, damping))
    if k is not None:
        pushed = torch.einsum("nkc,nc->nk", R, pushed.view(len(x), c)).flatten()
    fac = ngd.kernels.empirical(sig)
    Q = row.fisher.coefficient(fac, damping)
    yield float((pushed - Q @ g.flatten()).norm() / Q.norm() / g.norm())
    yield relative(Q, row.twin(net, x, None, damping, R))
    if k is None:
        Q = row.fisher.coefficient(fac.cross(other), damping)
        yield relative(Q, row.twin(net, x, other, damping, R))


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize(("name", "net"), CASES)
def test_one_law(name, net, c):
    for damping in TABLE[name].dampings:
        assert max(defects(TABLE[name], net, c, damping)) < 1e-10, damping


def test_the_page_on_writing_a_fisher_runs():
    """Its blocks, one after the other; its Fisher keeps the law; its run descends."""
    page = Path(__file__).parent.parent / "book" / "write_a_fisher.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    names = {}
    exec("\n".join(blocks), names)
    row = Row(**names["row"])
    for net in row.nets:
        for damping in row.dampings:
            assert max(defects(row, net, 3, damping)) < 1e-10, (net, damping)
    assert max(defects(row, "biases", 3, 0.05, k=2)) < 1e-10
    losses = names["losses"]
    assert losses[-1] < 0.2 * losses[0], losses


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("name", [name for name in TABLE if name != "deep linear"])
def test_one_law_of_weighted_signals(name, k):
    """R jvp(direction) = Q g, for R square and of fewer rows than outputs."""
    for damping in TABLE[name].dampings:
        assert max(defects(TABLE[name], "biases", 3, damping, k)) < 1e-10, damping


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
    pole = float(-values[values < -1e-6].max()) / 4
    for F in (ngd.fisher.LayerWise(INDEFINITE), ngd.fisher.BlockTridiagonal()):
        assert float((F.poles(fac) / pole - 1).abs().min()) < 1e-9
        with pytest.raises(ngd.fisher.RankDeficient, match=f"nearest at {pole:.6g}"):
            F.coefficient(fac, damping=pole)
        assert torch.isfinite(F.coefficient(fac, damping=1.5 * pole)).all()


def tridiagonal(depth):
    return torch.ones(depth, depth, dtype=torch.float64).tril(1).triu(-1)


@pytest.mark.parametrize(("depth", "c"), [(l, 1 + 2 * (l % 2)) for l in range(1, 9)])
def test_block_tridiagonal_at_every_depth(depth, c):
    """alpha = ceil(L/3), undamped, singular depths L = 3s+2 included; damped systems
    against the dense one.
    """
    n, F = 4, ngd.fisher.BlockTridiagonal()
    net, x = deep_tanh(depth, c), ngd.data.gaussian(n, 12, seed=1)
    fac, other = ngd.kernels.empirical(ngd.signals(net, x)), ngd.data.gaussian(3, 12)
    alpha = -(-depth // 3)
    assert float((F.coefficient(fac) - alpha * torch.eye(n * c)).abs().max()) < 1e-10
    assert F.best_alpha(fac) == pytest.approx(alpha, abs=1e-12)
    blocks = jacobian(net, x)
    S, J_other = torch.block_diag(*blocks), torch.cat(jacobian(net, other), 1)
    T = torch.kron(tridiagonal(depth), torch.eye(n * c, dtype=torch.float64))
    ones = torch.eye(n * c, dtype=torch.float64).repeat(depth, 1)
    for damping in (1e-6, 0.3):
        M = T @ (S @ S.T) + n * damping * torch.eye(len(T), dtype=T.dtype)
        v = S.T @ torch.linalg.solve(M, ones)
        assert relative(F.coefficient(fac, damping), torch.cat(blocks, 1) @ v) < 1e-8
        assert relative(F.coefficient(fac.cross(other), damping), J_other @ v) < 1e-8


def deep_tanh(depth, c):
    return ngd.models.MLP([12, *[24] * (depth - 1), c], "tanh", 1.5, 0.1, seed=2)


@pytest.mark.parametrize("depth", range(1, 13))
def test_block_tridiagonal_moves_every_third_layer(depth):
    net, x = deep_tanh(depth, 1), ngd.data.gaussian(4, 12, seed=1)
    d = ngd.fisher.BlockTridiagonal().direction(
        ngd.signals(net, x), ngd.data.gaussian(4, 1, seed=3)
    )
    moved = [float(w.abs().max()) > 0 for w in d[::2]]  # weights; biases lie between
    pattern = ([False, True, False], [True, False, False], [True, True, False])
    assert moved == (pattern[depth % 3] * depth)[:depth]


@pytest.mark.parametrize("depth", [2, 4, 5])
def test_poles_are_the_negative_eigenvalues(depth):
    net, x = deep_tanh(depth, 1), ngd.data.gaussian(4, 12, seed=1)
    F = dense.layer_wise_fisher(jacobian(net, x), tridiagonal(depth), 4)
    values = torch.linalg.eigvalsh(F).neg().flip(0)
    expected = values[values > 1e-9]
    fac = ngd.kernels.empirical(ngd.signals(net, x))
    poles = ngd.fisher.BlockTridiagonal().poles(fac)
    assert len(poles) == len(expected)
    assert not len(expected) or relative(poles, expected) < 1e-8


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


def test_fishers_that_need_signals_refuse():
    fac = ngd.kernels.analytic(ngd.data.sphere(5, 9), depth=3)
    sided = [row.fisher for row in TABLE.values()]
    for fisher in [f for f in sided if isinstance(f, ngd.fisher.WeightSide)]:
        if not isinstance(fisher, ngd.fisher.KFAC):  # whose factors are known
            with pytest.raises(TypeError, match="needs signals"):
                fisher.coefficient(fac, 0.1)
    sig = ngd.signals(ngd.models.MLP([3, 12, 1], "tanh"), ngd.data.sphere(5, 3))
    with pytest.raises(ngd.fisher.RankDeficient, match="layer 0's units"):
        ngd.fisher.UnitWise(rank="raise").direction(sig, sig.outputs)
    with pytest.raises(ValueError, match="weights and biases"):
        ngd.fisher.QuasiDiagonal().direction(sig, sig.outputs)
    with pytest.raises(ValueError, match="damping=0"):
        ngd.fisher.TridiagonalKFAC().direction(sig, sig.outputs)


@pytest.mark.parametrize("name", TABLE)
def test_arguments_are_named(name):
    """Residuals of another shape, dtype or kind; what is not factors, what is no
    damping.
    """
    row = TABLE[name]
    fisher, damping = row.fisher, row.dampings[0]
    net, x = NETS[row.nets[-1]](3), inputs(row.nets[-1])[0]
    sig = ngd.signals(net, x)
    for g, says in (
        (torch.ones(3), "g must"),
        (sig.outputs.T.contiguous(), "g must"),
        (sig.outputs.float(), "float64"),
        (sig.outputs * float("inf"), "NaN"),
    ):
        with pytest.raises(ValueError, match=says):
            fisher.direction(sig, g, damping)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping"):
            fisher.direction(sig, sig.outputs, bad)
    with pytest.raises(TypeError, match="factors must come from.*not Tensor"):
        fisher.coefficient(torch.eye(3), damping)
    with pytest.raises(TypeError, match="sig must come from"):
        fisher.direction(ngd.kernels.empirical(sig), sig.outputs, damping)
    half = ngd.signals(
        NETS[row.nets[0]](3).bfloat16(), inputs(row.nets[0])[0].bfloat16()
    )
    if isinstance(fisher, (ngd.fisher.Diagonal, ngd.fisher.DeepLinearExact)):
        return  # nothing is solved there
    with pytest.raises(ValueError, match="bfloat16.*float64"):
        fisher.direction(half, half.outputs, damping)


def test_weighted_signals_give_the_fisher_of_cross_entropy():
    """With R'R = Lambda + eps the exact step is pinv(J' (Lambda + eps) J) J' g."""
    c = 3
    net, x = NETS["biases"](c), inputs("biases")[0]
    sig, eye = ngd.signals(net, x), torch.eye(c, dtype=torch.float64)
    p = torch.softmax(sig.outputs, 1)
    lam = torch.diag_embed(p) - p[:, :, None] * p[:, None, :] + 0.05 * eye
    R = torch.linalg.cholesky(lam).mT
    g = p - eye[[0, 1, 2, 0]]
    seen = torch.linalg.solve(R.mT, g[:, :, None])
    d = ngd.fisher.Exact().direction(sig.weighted(R), seen)
    J = torch.cat(jacobian(net, x), 1)
    inverse = torch.linalg.pinv(
        J.T @ torch.block_diag(*lam) @ J, hermitian=True, rtol=1e-11
    )
    expected = inverse @ J.T @ g.flatten()
    assert relative(torch.cat([part.flatten() for part in d]), expected) < 1e-8


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
        (lambda: ngd.fisher.LayerWise([[1.0, 2.0]]), r"of shape \(1, 2\)"),
        (lambda: ngd.fisher.LayerWise([[1.0, 2.0], [0.0, 1.0]]), "is not symmetric"),
    ):
        with pytest.raises(ValueError, match=says):
            make()
    sig = ngd.signals(ngd.models.MLP([5, 30, 2]), ngd.data.gaussian(6, 5))
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


# -------------------------------------------------------------------- deep linear nets

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
    assert relative(Q, dense.coefficient(J, J.T @ J / 12, J, 12)) < 1e-10
    assert (
        relative(
            F.coefficient(fac.cross(other)),
            dense.coefficient(J_other, J.T @ J / 12, J, 12),
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


# --------------------------------------------------------------------- sampled K-FAC


def test_draws_are_those_of_the_generator():
    """Without one a call is a pure function of the seed; with one it moves on."""
    net, x = NETS["biases"](3), inputs("biases")[0]
    sig = ngd.signals(net, x, lazy=True)
    fisher, other = ngd.fisher.SampledKFAC(seed=5), ngd.fisher.SampledKFAC(seed=6)
    first, again, third = (
        f.direction(sig, sig.outputs, 0.1)[0] for f in (fisher, fisher, other)
    )
    assert torch.equal(first, again) and not torch.equal(first, third)
    assert "D" not in vars(sig)  # never formed
    generator = torch.Generator().manual_seed(5)
    drawn = [
        fisher.direction(sig, sig.outputs, 0.1, generator=generator)[0]
        for _ in range(2)
    ]
    assert torch.equal(drawn[0], first) and not torch.equal(drawn[1], first)
    step = ngd.fisher.Exact().direction(sig, sig.outputs, generator=generator)
    assert len(step) == len(sig.params)  # those that draw nothing take it too


def test_draws_of_a_softmax_model_are_labels():
    """p - e_label, label by label; and their covariance is the softmax's Lambda."""
    net, x = NETS["biases"](3), inputs("biases")[0]
    sig, n = ngd.signals(net, x), len(x)
    fisher = ngd.fisher.SampledKFAC(20_000, model="softmax")
    p = sig.outputs.softmax(1)
    labels = torch.multinomial(
        p, 20_000, True, generator=torch.Generator().manual_seed(0)
    )
    draws = p[:, None] - torch.eye(3, dtype=p.dtype)[labels]
    d = fisher.direction(sig, sig.outputs, 0.1)
    Q = dense.kfac(net, x, damping=0.1, draws=draws)
    pushed = push_forward(net, x, d)
    assert relative(pushed, Q @ sig.outputs.flatten()) < 1e-9
    covariance = torch.einsum("nkc,nkd->ncd", draws, draws) / 20_000
    lam = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert relative(covariance, lam) < 0.05
    with pytest.raises(ValueError, match="softmax.*plain signals"):
        fisher.direction(sig.weighted(torch.ones(n, 2, 3).double()), p[:, :2])


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
    for bad in (
        dict(samples=0),
        dict(samples=2.5),
        dict(seed=1.5),
        dict(variance=0.0),
        dict(variance=float("inf")),
        dict(model="poisson"),
        dict(variance=2.0, model="softmax"),
        dict(rank="maybe"),
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ngd.fisher.SampledKFAC(**bad)
    with pytest.raises(TypeError, match=r"SampledKFAC\(samples="):
        ngd.fisher.KFAC(samples=1)
    deep = ngd.kernels.analytic(ngd.data.sphere(4, 5), 3)
    assert ngd.fisher.SampledKFAC().best_alpha(deep) == 3.0
    sig = ngd.signals(NETS["biases"](1), inputs("biases")[0])
    with pytest.raises(ngd.fisher.RankDeficient, match="layer 0's factor"):
        ngd.fisher.SampledKFAC(rank="raise").direction(sig, sig.outputs)


# ------------------------------------------------------------------ many outputs, rates


def test_an_identity_is_never_multiplied_out():
    """With 40 outputs the last layer's (NC x C) D is the identity of each sample; a
    gate or a weighting behind the layer is no identity, though as wide.
    """
    net, x = ngd.models.MLP([6, 5, 40], "tanh", 1.5, seed=1), ngd.data.gaussian(4, 6)
    sig = ngd.signals(net, x)
    g = ngd.data.gaussian(4, 40, seed=2)
    by_dense = kfac_step(net, x, g, 0.01)
    for parts in zip(ngd.fisher.KFAC().direction(sig, g, 0.01), by_dense):
        assert relative(*parts) < 1e-10
    with torch.no_grad():
        scale = torch.nn.Linear(40, 40, bias=False).double().requires_grad_(False)
        scale.weight.copy_(torch.eye(40) * torch.linspace(1, 2, 40))
    gated = nn.Sequential(*net, scale)
    sig, by_dense = ngd.signals(gated, x), kfac_step(gated, x, g, 0.01)
    for parts in zip(ngd.fisher.KFAC().direction(sig, g, 0.01), by_dense):
        assert relative(*parts) < 1e-10


def kfac_step(net, x, g, damping):
    """K-FAC's step, (M_out, M_in) a layer, from inverses of its two factors."""
    n, steps = len(x), []
    for h, d in zip(*dense.layer_signals(net, x)):
        B, A = (
            M.T @ M / n + damping**0.5 * torch.eye(M.shape[1], dtype=M.dtype)
            for M in (d, h)
        )
        c = len(d) // n
        gradient = (d * g.reshape(-1, 1)).T @ h.repeat_interleave(c, 0) / n
        steps.append(torch.linalg.solve(B, gradient) @ torch.linalg.inv(A))
    return steps


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize(
    "name", ["exact", "layer-wise", "K-FAC", "sampled K-FAC", "unit-wise", "diagonal"]
)
def test_optimal_rate_is_that_of_the_spectrum(name, damping):
    """2 / (least + greatest eigenvalue) of the dense Q, from products with Q."""
    row = TABLE[name]
    net, x = NETS["relu"](1), inputs("relu")[0]
    if name == "sampled K-FAC" and not damping:
        return
    sig = ngd.signals(net, x)
    values = torch.linalg.eigvalsh(row.twin(net, x, None, damping, None))
    best = 2 / float(values[0] + values[-1])
    assert row.fisher.optimal_lr(sig, damping) == pytest.approx(best, rel=1e-6)
    if not damping:
        alpha = row.fisher.best_alpha(ngd.kernels.empirical(sig))
        assert alpha == pytest.approx(1 / best, rel=1e-6)


def test_optimal_rate_of_many_outputs_is_safe():
    """More outputs than products: between the best rate and 2 / greatest eigenvalue."""
    sig = ngd.signals(ngd.models.MLP([9, 40, 10], "tanh"), ngd.data.gaussian(20, 9))
    for fisher, damping in (
        (ngd.fisher.Diagonal(), 1e-2),
        (ngd.fisher.UnitWise(), 1e-2),
        (ngd.fisher.Exact(), 1e-3),
    ):
        Q = fisher.coefficient(ngd.kernels.empirical(sig), damping)
        values = torch.linalg.eigvalsh(Q)
        rate = fisher.optimal_lr(sig, damping)
        assert rate < 2 / float(values[-1])
        assert rate == pytest.approx(2 / float(values[0] + values[-1]), rel=0.05)


def test_optimal_rate_says_when_there_is_none():
    fac = ngd.kernels.empirical(ngd.signals(NETS["biases"](1), inputs("biases")[0]))
    fisher = ngd.fisher.BlockTridiagonal()
    pole = float(fisher.poles(fac)[-1])
    assert fisher.optimal_lr(fac.signals, 2 * pole) > 0
    with pytest.raises(ValueError, match="lr: .*pass a number"):
        fisher.optimal_lr(fac.signals, 0.999 * pole)  # F + damping I is indefinite


def test_analytic_outputs_are_solved_once():
    """C outputs of an infinite net: one N x N problem, times the identity."""
    x, other = ngd.data.sphere(5, 9), ngd.data.sphere(2, 9, seed=1)
    one, three = (ngd.kernels.analytic(x, 3, outputs=c) for c in (1, 3))
    eye = torch.eye(3, dtype=torch.float64)
    for name in ("exact", "layer-wise", "block-tridiagonal", "K-FAC"):
        fisher = TABLE[name].fisher
        for damping in (0.0, 0.1):
            Q = fisher.coefficient(three.cross(other), damping)
            expected = fisher.coefficient(one.cross(other), damping)
            assert relative(Q, torch.kron(expected, eye)) < 1e-12
            dense_Q = type(fisher)._coefficient(
                fisher, three.cross(other), damping, None
            )
            assert relative(Q, dense_Q) < 1e-9


def test_tiny_damping_is_refused_not_broken():
    sig = ngd.signals(ngd.models.MLP([6, 8, 7, 2], "tanh"), ngd.data.gaussian(4, 6))
    with pytest.raises(ngd.fisher.RankDeficient, match="layer 0's .* factor"):
        ngd.fisher.TridiagonalKFAC().direction(sig, sig.outputs, 1e-36)


def test_a_bad_layer_is_found():
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
@pytest.mark.parametrize("damping", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("name", TABLE)
def test_cuda_follows_the_cpu(name, damping):
    """Directions and coefficients, train and test rows, from signals on the GPU and on
    the CPU.
    """
    F, dampings = TABLE[name].fisher, TABLE[name].dampings
    if damping not in dampings:
        return
    outcomes = []
    for device in ("cpu", "cuda"):
        net = ngd.models.MLP([9, 12, 10, 2], "tanh", 1.5, 0.3, seed=3, device=device)
        if name == "deep linear":
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
