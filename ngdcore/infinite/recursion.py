r"""Factors of infinitely wide networks, by recursion over layers."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..factors import Factors
from ..signals import Signals, check_matrix
from .duals import Dual, dual_of

__all__ = ["analytic", "arc_cosine_gram"]


@dataclass(frozen=True)
class _Net:
    """An infinitely wide network; repr as `analytic` is called."""

    depth: int
    activation: Dual
    weight_var: float
    bias_var: float


@dataclass(frozen=True)
class _Rows:
    """What the recursion needs of every input by itself, in float64; lists by layer.

    Standard deviations, not variances: they square to the whole range of the dtype."""

    unit: Float[Tensor, "N d"]  # in the inputs' dtype; zeros stay zeros
    zero: Tensor  # (N,) bool
    std: list[Tensor]  # (N,) of the pre-activations
    shares: list[tuple[Tensor, Tensor]]  # (N,): weights' and bias' shares of std
    prepared: list[Tensor]  # (N, k), for the dual
    alive: list[Tensor]  # (N,) bool: where the activations are not all zero
    slope: list[Tensor]  # (N,): weight_var E phi'(u)^2

    def diagonals(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Diagonals of A_l, of B_l, and of K, (N,) each."""
        A, K = [s**2 for s in self.std], self.std[0] ** 2
        for a, slope in zip(A[1:], self.slope):
            K = a + slope * K
        B = [torch.ones_like(K)]
        for slope in reversed(self.slope):
            B.insert(0, B[0] * slope)
        return A, B, K


def _march(x: Tensor, net: _Net) -> _Rows:
    """The per-input part of the recursion, for the rows of x (N, d)."""
    size = x.abs().amax(1)
    zero = size == 0
    scaled = x / torch.where(zero, 1.0, size)[:, None]
    norm = torch.linalg.vector_norm(scaled, dim=1, dtype=torch.float64)
    norm = torch.where(zero, 1.0, norm)
    s = size.double() * norm / math.sqrt(x.shape[1])
    unit = scaled / norm.to(x)[:, None]
    weight, bias = math.sqrt(net.weight_var), math.sqrt(net.bias_var)
    rows = _Rows(unit, zero, [], [], [], [], [])
    for l in range(net.depth):
        std = torch.hypot(weight * s, torch.full_like(s, bias))
        safe = torch.where(std == 0, 1.0, std)
        rows.std.append(std)
        rows.shares.append((weight * s / safe, bias / safe))
        if l < net.depth - 1:
            s, prepared, slope = net.activation.rows(std)
            rows.prepared.append(prepared)
            rows.alive.append(s > 0)
            rows.slope.append(net.weight_var * slope)
    return rows


class _Analytic(Factors):
    """Factors of an infinitely wide network, by recursion over t = 1 - correlation
    (exact near coinciding inputs).
    """

    def __init__(self, net: _Net, rows: _Rows, columns: _Rows, c: int, train=None):
        n, m = len(rows.unit), len(columns.unit)
        super().__init__(n, m, c, net.depth, rows.unit, train)
        self._net, self._rows, self._columns = net, rows, columns

    def __repr__(self) -> str:
        net, size = self._net, f"{self.rows} x {self.columns}"
        return (
            f"<analytic factors: {size}, C={self.c}, depth={net.depth},"
            f" {net.activation}, {net.weight_var:g}, {net.bias_var:g}>"
        )

    @property
    def scalar(self):
        if self.c == 1:
            return None
        train = None if self._train is None else self._train.scalar
        return _Analytic(self._net, self._rows, self._columns, 1, train)

    def cross(self, x):
        if isinstance(x, Signals):
            raise TypeError(
                "x must be a tensor of inputs: analytic factors have no signals"
            )
        check_matrix("x", x, self._columns.unit.shape[1], self._columns.unit)
        rows = _march(x, self._net)
        return _Analytic(self._net, rows, self._columns, self.c, self.train)

    def diagonal(self):
        self._must_be_square("diagonal()")
        self._check(lambda rows: [rows.diagonals()[2]])
        K = self._rows.diagonals()[2].to(self.dtype)
        return K.repeat_interleave(self.c)

    def variance(self):
        self._check(lambda rows: [rows.std[-1] ** 2])
        return (self._rows.std[-1] ** 2).to(self.dtype)

    def _assemble(self, write, count=1, c=None, rows=None, columns=None):
        """One output's matrices, times the identity of C where there are more."""
        made = super()._assemble(write, count, 1, rows, columns)
        if c == 1 or self.c == 1:
            return made
        eye = torch.eye(self.c, dtype=self.dtype, device=self.device)
        return [torch.kron(out, eye) for out in made]

    def gram(self):
        self._check(lambda rows: [rows.diagonals()[2]])
        return super().gram()

    def blocks(self, rows=1024, upper=False):
        self._check(lambda rows: [rows.diagonals()[2]])
        return super().blocks(rows, upper)

    def layers(self, only=None):
        chosen = self._chosen(only)

        def products(rows):
            A, B, _ = rows.diagonals()
            return [A[l] * B[l] for l in chosen]

        self._check(products)
        return super().layers(only)

    def _gram_tile(self, rows, columns, out):
        """K to out[0], (n, 1, m, 1), layer by layer: K <- A_l + slope * K."""
        K, before = None, None
        for A, slope in self._sweep(rows, columns, self.depth):
            K = A if K is None else torch.addcmul(A, before, K)
            before = slope
        out[0][:, 0, :, 0] = K

    def _layer_tiles(self, rows, columns, layers, out):
        """A_l * B_l to out, (n, 1, m, 1) each."""
        A, slopes = zip(*self._sweep(rows, columns, self.depth))
        wanted = dict(zip(layers, out))
        for l, B in _backwards(slopes, min(layers)):
            if l in wanted:
                wanted[l][:, 0, :, 0] = A[l] * B

    def _all_A(self, layers):
        """A_l, (rows, columns) each; the recursion goes no further than the last."""
        self._check(lambda rows: [rows.diagonals()[0][l] for l in layers])

        def write(r, s, out):
            A = [A for A, _ in self._sweep(r, s, max(layers) + 1)]
            for l, place in zip(layers, out):
                place[:, 0, :, 0] = A[l]

        return self._assemble(write, len(layers), c=1)

    def _all_B(self, layers):
        """B_l, (rows C, columns C) each."""
        self._check(lambda rows: [rows.diagonals()[1][l] for l in layers])

        def write(r, s, out):
            slopes = [S for _, S in self._sweep(r, s, self.depth)]
            wanted = dict(zip(layers, out))
            for l, B in _backwards(slopes, min(layers)):
                if l in wanted:
                    wanted[l][:, 0, :, 0] = B

        return self._assemble(write, len(layers))

    def _sweep(
        self, rows: slice, columns: slice, depth: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Layer by layer A_l (n, m), and weight_var E phi' phi' between it and the
        next (None for the last)."""
        left, right, net = self._rows, self._columns, self._net
        t = _one_minus_cosine(left, right, rows, columns)
        for l in range(depth):
            if net.bias_var:
                p, b = (v[rows, None].to(t) for v in left.shares[l])
                q, c = (v[columns].to(t) for v in right.shares[l])
                t = p * q * t + (p * c - q * b).square() / (1 + p * q + b * c)
            u, v = left.std[l][rows, None].to(t), right.std[l][columns].to(t)
            A, slope = (1 - t).mul_(u).mul_(v), None
            if l < net.depth - 1:
                sides = left.prepared[l][rows], right.prepared[l][columns]
                new, slope = net.activation.pair(*(side.to(t) for side in sides), t)
                slope = slope * net.weight_var
                alive, live = left.alive[l][rows, None], right.alive[l][columns]
                dead = not (alive.all() and live.all())
                t = torch.where(alive & live, new, t) if dead else new
            yield A, slope

    def _check(self, diagonals: Callable[[_Rows], list[Tensor]]) -> None:
        """Raise where a diagonal of these rows or columns leaves the dtype's range."""
        info = torch.finfo(self.dtype)
        for rows in {id(r): r for r in (self._rows, self._columns)}.values():
            for values in diagonals(rows):
                low = (values < info.tiny) & ~rows.zero
                bad = ~(values <= info.max) | low
                if bad.any():
                    net, worst = self._net, float(values[bad][0])
                    remedy = "float64, or " if self.dtype != torch.float64 else ""
                    raise ValueError(
                        f"the kernel leaves the range of {self.dtype} ({worst:.1e} on"
                        f" its diagonal) at depth={net.depth},"
                        f" weight_var={net.weight_var:g}, bias_var={net.bias_var:g},"
                        f" {net.activation}: use {remedy}other variances or scaled x"
                    )


def _backwards(slopes, first: int) -> Iterator[tuple[int, "Tensor | float"]]:
    """l and B_l (n, m), from the last layer, where it is 1, down to `first`."""
    B = 1.0
    for l in reversed(range(first, len(slopes))):
        B = B if slopes[l] is None else slopes[l] * B
        yield l, B


def _one_minus_cosine(left: _Rows, right: _Rows, rows: slice, columns: slice) -> Tensor:
    """1 - cos of all pairs, (n, m), 1 for a row of zeros with another; pairs that
    (nearly) coincide or oppose are formed from differences.
    """
    u, w = left.unit[rows], right.unit[columns]
    t = (u @ w.T).neg_().add_(1)
    low, high = torch.aminmax(t)
    for sign, far in ((-1, low < 1e-4), (1, high > 2 - 1e-4)):
        if not far:
            continue
        close = t < 1e-4 if sign < 0 else t > 2 - 1e-4
        i, j = close.nonzero(as_tuple=True)
        half = (u[i] + sign * w[j]).square().sum(1) / 2
        t[i, j] = half if sign < 0 else 2 - half
    zero, none = left.zero[rows, None], right.zero[columns]
    return t.masked_fill_(zero & none, 0.0) if zero.any() and none.any() else t


def analytic(
    x: Tensor,
    depth: int,
    activation: "str | nn.Module | Callable[[Tensor], Tensor] | Dual" = "relu",
    weight_var: float = 2.0,
    bias_var: float = 0.0,
    outputs: int = 1,
) -> Factors:
    r"""Factors of an infinitely wide network in the NTK parameterisation, by recursion.

    With :math:`\Sigma_1 = \sigma_w^2 x x^\top/d + \sigma_b^2` and
    :math:`\Sigma_{l+1} = \sigma_w^2\,E[\phi(u)\phi(u')] + \sigma_b^2` for
    :math:`(u,u') \sim N(0, \Sigma_l)`: :math:`A_l = \Sigma_l`, :math:`B_L = 1`,
    :math:`B_l = B_{l+1} \circ \sigma_w^2 E[\phi'(u)\phi'(u')]`, each times :math:`I_C`
    for C outputs. The neural tangent kernel is ``gram()`` (no 1/N), the Gaussian
    process of the outputs at the start ``nngp()``.

    Parameters
    ----------
    x : Tensor, (N, d)
        Inputs; their dtype and device are kept. A row of zeros is the limit of small
        ones.
    depth : int
        Weight layers L (a net with two hidden layers has 3).
    activation : str, nn.Module, class of modules, function, or kernels.Dual
        As `MLP` takes them. Closed forms: ``"relu"``, ``"leaky_relu"``, ``"abs"``,
        ``"erf"``, ``"identity"``, as names, modules (``nn.LeakyReLU(0.2)``) or
        functions (``torch.abs``). `ShiftedReLU` by quadrature; ``"tanh"`` and any other
        smooth elementwise function by a Hermite series, to some 12 digits.
    weight_var, bias_var : float
        :math:`\sigma_w^2`, :math:`\sigma_b^2`.
    outputs : int
        C. Nothing larger than (N, N) is worked on: ``scalar`` are the factors of one
        output.

    Returns
    -------
    Factors
        Factor ``l`` (from 0) belongs to weight layer ``l + 1``. Analytic factors carry
        no signals.

    Raises
    ------
    ValueError
        For an activation that is unknown or too rough for a series, a depth that is no
        whole number of at least 1, bad inputs or variances; and, when a matrix is asked
        for, where its diagonal leaves the range of the dtype.

    Notes
    -----
    Cho & Saul (2009) for ReLU, Williams (1997) for erf; Karakida & Osawa (2020),
    section E. Correlations are carried as :math:`1 - \cos`, formed from differences
    where inputs nearly coincide: the usual arccos loses half of the digits there.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> fac = ngd.kernels.analytic(torch.eye(3, dtype=torch.float64), depth=2)
    >>> torch.allclose(fac.gram().diagonal(), torch.tensor(4 / 3, dtype=torch.float64))
    True
    """
    check_matrix("x", x, None, None)
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating dtype, not {x.dtype}")
    for name, value in (("depth", depth), ("outputs", outputs)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value} must be a whole number, at least 1")
    if not (0 < weight_var < math.inf and 0 <= bias_var < math.inf):
        raise ValueError(
            f"weight_var={weight_var} must be positive and bias_var={bias_var} not"
            " negative"
        )
    net = _Net(int(depth), dual_of(activation), float(weight_var), float(bias_var))
    rows = _march(x.detach(), net)
    return _Analytic(net, rows, rows, int(outputs))


def arc_cosine_gram(x: Tensor, other: Tensor | None = None) -> Tensor:
    r"""The limiting Gram matrix of `TwoLayerReLU`,
    :math:`G^\infty_{ij} = x_i^\top x_j\,(\pi - \theta_{ij})/2\pi`.

    :math:`\theta_{ij}` is the angle between :math:`x_i` and :math:`x_j`; for unit rows
    the diagonal is 1/2. It does not depend on :math:`\nu`, and carries no 1/N.

    Parameters
    ----------
    x : Tensor, (N, d)
    other : Tensor, (N', d), optional
        Columns; by default ``x`` itself.

    Returns
    -------
    Tensor, (N, N) or (N, N')

    Raises
    ------
    ValueError
        For bad inputs.

    Notes
    -----
    Zhang, Martens & Grosse (2019), Definition 1, eq. 10; Cho & Saul (2009), order 0.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> ngd.kernels.arc_cosine_gram(torch.eye(2, dtype=torch.float64)).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    check_matrix("x", x, None, None)
    factors = analytic(x, 2, "relu")
    if other is not None:
        factors = analytic(other, 2, "relu").cross(x)
    # layer 1 of the two-layer net in NTK scaling is (2 x.x'/d) * 2 (pi - angle)/(2 pi),
    # undone here
    return factors.layer(0) * (x.shape[1] / 4)
