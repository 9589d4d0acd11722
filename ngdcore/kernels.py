r"""Factors and Gram matrices: everything a natural gradient needs, without a Jacobian; and how Grams are solved.

From a network's signals, inputs :math:`H_l` (N x M_in) and output-gradients :math:`D_l` (NC x M_out, sample-major) of
each trained layer, come the *factors* :math:`A_l = H_l H_l^\top` and :math:`B_l = D_l D_l^\top`; the layer's Gram
matrix is :math:`K_l = (A_l \otimes 1_C 1_C^\top) \circ B_l`, and :math:`J J^\top = K = \sum_l K_l`. Infinitely wide
networks have no signals but the same factors, by recursion.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from scipy.special import roots_hermitenorm
from torch import Tensor

from .models import ACTIVATIONS, Signals, check_matrix

__all__ = ["Factors", "empirical", "analytic", "arc_cosine_gram"]

TILE = 256  # rows of NC a tile: small enough for the cache, large enough for GEMM at full speed
WARN_FLOAT32 = 1e6
NODES, TERMS = 1024, 800  # of the quadrature, of the Hermite series


# ---------------------------------------------------------------------------------------------- factors


class Factors:
    r"""The factors :math:`A_l, B_l` of every trained layer, tile by tile; made by `empirical` or `analytic`.

    Rows may be other inputs than columns (`cross`); then ``train`` holds the square factors of the columns.
    Nothing is stored beyond what the maker holds: Gram matrices are assembled in tiles on and above the diagonal,
    the Hadamard product fused into them, and mirrored.

    Attributes
    ----------
    rows, columns : int
        Numbers of samples.
    c : int
        Outputs C; Gram matrices are (rows C) x (columns C), sample-major.
    depth : int
        Trained layers.
    """

    signals: Signals | None = None

    def __init__(self, rows: int, columns: int, c: int, depth: int, like: Tensor, train: "Factors | None" = None):
        self.rows, self.columns, self.c, self.depth = rows, columns, c, depth
        self.dtype, self.device = like.dtype, like.device
        self._train = train  # None for square factors: a reference to itself would keep the network alive until a sweep

    @property
    def train(self) -> "Factors":
        return self if self._train is None else self._train

    def _tiles(self, rows: slice, columns: slice, layers: range) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError

    def gram(self) -> Tensor:
        r"""The Gram matrix :math:`K = J J^\top = \sum_l K_l` (no 1/N), shape (rows C, columns C).

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> sig = ngd.signals(ngd.models.MLP([3, 4, 2], seed=0), torch.eye(3, dtype=torch.float64))
        >>> ngd.kernels.empirical(sig).gram().shape
        torch.Size([6, 6])
        """
        return self._assemble(range(self.depth), lambda out, A, B: out.addcmul_(B, A))

    def layer(self, l: int) -> Tensor:
        r"""The Gram matrix of trained layer ``l`` alone, :math:`K_l = (A_l \otimes 11^\top) \circ B_l`; l from 0."""
        return self._assemble(self._one(l), lambda out, A, B: out.addcmul_(B, A))

    def A(self, l: int) -> Tensor:
        r"""The forward factor :math:`A_l = H_l H_l^\top`, shape (rows, columns)."""
        return self._assemble(self._one(l), lambda out, A, B: out.copy_(A), c=1)

    def B(self, l: int) -> Tensor:
        r"""The backward factor :math:`B_l = D_l D_l^\top`, shape (rows C, columns C)."""
        return self._assemble(self._one(l), lambda out, A, B: out.copy_(B))

    def cross(self, x: "Tensor | Signals") -> "Factors":
        """Factors with rows at other inputs ``x`` (or their signals) and columns at these."""
        raise NotImplementedError

    def _one(self, l: int) -> range:
        if not -self.depth <= l < self.depth:
            raise ValueError(
                f"layer {l} does not exist; these factors have {self.depth} trained layers, counted from 0"
            )
        return range(l % self.depth, l % self.depth + 1)

    def _assemble(self, layers: range, write: Callable, c: int | None = None) -> Tensor:
        square, c, step = self.train is self, c or self.c, max(1, TILE // self.c)
        out = torch.zeros(self.rows * c, self.columns * c, dtype=self.dtype, device=self.device)
        grid = out.view(self.rows, c, self.columns, c)
        for i in range(0, self.rows, step):
            for j in range(i if square else 0, self.columns, step):
                r, s = slice(i, min(i + step, self.rows)), slice(j, min(j + step, self.columns))
                for A, B in self._tiles(r, s, layers):
                    write(grid[r, :, s, :], A[:, None, :, None], B.view(len(A), self.c, A.shape[1], self.c))
                if square:  # exactly symmetric: what lies below the diagonal is a copy
                    tile = out[_span(r, c), _span(s, c)]
                    if i == j:
                        tile.copy_(tile.triu() + tile.triu(1).T)
                    else:
                        out[_span(s, c), _span(r, c)] = tile.T
        return out


def _span(samples: slice, c: int) -> slice:
    """The rows of NC that belong to these samples."""
    return slice(samples.start * c, samples.stop * c)


class _Empirical(Factors):
    """Factors of a finite network, from its signals."""

    def __init__(self, sig: Signals, columns: Signals | None = None, train: Factors | None = None):
        super().__init__(sig.n, (columns or sig).n, sig.c, len(sig.H), sig.outputs, train)
        self.signals, self._columns = sig, columns or sig
        self._space = torch.empty(2 * (max(TILE, sig.c)) ** 2, dtype=self.dtype, device=self.device)

    def _tiles(self, rows, columns, layers):
        n, m, c = rows.stop - rows.start, columns.stop - columns.start, self.c
        half = len(self._space) // 2
        A, B = self._space[: n * m].view(n, m), self._space[half : half + n * m * c * c].view(n * c, m * c)
        left, right = self.signals, self._columns
        for l in layers:
            torch.mm(left.H[l][rows], right.H[l][columns].T, out=A)
            torch.mm(left.D[l][_span(rows, c)], right.D[l][_span(columns, c)].T, out=B)
            yield A, B

    def cross(self, x):
        sig = x if isinstance(x, Signals) else self.signals.at(x)
        return _Empirical(sig, self.signals, self)


def empirical(sig: Signals) -> Factors:
    r"""Factors of a finite network: :math:`A_l = H_l H_l^\top`, :math:`B_l = D_l D_l^\top` from its signals.

    Parameters
    ----------
    sig : Signals
        From `signals`.

    Returns
    -------
    Factors
        ``gram()`` equals the dense :math:`J J^\top` (no 1/N) to rounding.

    Raises
    ------
    TypeError
        If ``sig`` is not a `Signals`.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> sig = ngd.signals(ngd.models.TwoLayerReLU(3, 8, seed=0), torch.eye(3, dtype=torch.float64))
    >>> ngd.kernels.empirical(sig).gram().diagonal().min() > 0
    tensor(True)
    """
    if not isinstance(sig, Signals):
        raise TypeError(f"sig must come from ngdcore.signals(net, x), not {type(sig).__name__}")
    return _Empirical(sig)


# ------------------------------------------------------------------------------------------ infinite width


def _relu_dual(si, sj, t):
    angle = torch.atan2((t * (2 - t)).clamp_min(0).sqrt(), 1 - t)
    rise = 2 * (angle / 2).sin().square()  # 1 - cos, without cancellation
    return rise - (angle.sin() - angle * (1 - rise)) / math.pi, (math.pi - angle) / (2 * math.pi)


def _erf_dual(vi, vj, t):
    si, sj = 1 + 2 * vi, 1 + 2 * vj
    covariance = (vi * vj).sqrt() * (1 - t)
    mean = 2 / math.pi * torch.asin(2 * covariance / (si * sj).sqrt())
    return 1 - mean / (_erf_power(vi) * _erf_power(vj)).sqrt(), 4 / math.pi / (si * sj - 4 * covariance**2).sqrt()


def _erf_power(v):
    return 2 / math.pi * torch.asin(2 * v / (1 + 2 * v))


# activation: (E phi(u)^2 as a function of E u^2; and, from E u^2 of both and t = 1 - correlation of u, u',
#              1 - correlation of phi(u), phi(u') and E phi'(u) phi'(u'))
DUALS = {
    "relu": (lambda v: v / 2, _relu_dual),
    "erf": (_erf_power, _erf_dual),
    "identity": (lambda v: v, lambda vi, vj, t: (t, torch.ones_like(t))),
}


def _hermite_dual(phi):
    r"""The same for any smooth phi, by Gauss-Hermite quadrature along one dimension.

    With the Hermite coefficients :math:`a_k(v) = E\,\phi(\sqrt v z)\,h_k(z)`, at correlation r (Mehler)
    :math:`E\,\phi\phi' = \sum_k r^k a_k a_k'`, and its derivative in r gives :math:`E\,\phi'\phi'` (Price).
    """
    z, w = (torch.from_numpy(a) for a in roots_hermitenorm(NODES))
    w = w / w.sum()
    h = [w.sqrt(), z * w.sqrt()]  # h_k times the root of the weight: neither overflows nor loses the product
    for k in range(1, TERMS):
        h.append((z * h[k] - k**0.5 * h[k - 1]) / (k + 1) ** 0.5)
    basis = torch.stack(h, 1) * w.sqrt()[:, None]

    def coefficients(v):
        values = phi(v.double().cpu().reshape(-1, 1).sqrt() * z)
        a, power = values @ basis, values.square() @ w
        large = (torch.arange(TERMS + 1) * a.square() > 1e-14 * power[:, None]).any(0).nonzero()
        if not torch.isfinite(a).all() or len(large) == 0 or large[-1] > TERMS - 8:
            raise ValueError(
                "activation is not smooth enough for quadrature at these variances: its Hermite coefficients have not"
                " decayed; a kink needs a closed form ('relu'), steep smooth functions smaller inputs or weight_var"
            )
        return a[:, : int(large[-1]) + 1].to(v), power.to(v).view_as(v)

    def dual(vi, vj, t):
        (a, pi), (b, pj) = coefficients(vi), coefficients(vj)
        scale, root = (pi * pj).sqrt(), (vi * vj).sqrt()
        terms = max(a.shape[1], b.shape[1])
        a, b = (
            torch.nn.functional.pad(c / p.reshape(-1, 1).sqrt(), (0, terms - c.shape[1])) for c, p in ((a, pi), (b, pj))
        )
        apart, slope, power = torch.zeros_like(t), torch.zeros_like(t), torch.ones_like(t)  # 1 - r^k, its sum, r^k
        spread = torch.zeros_like(t)
        for k in range(terms):
            product = a[:, k, None] * b[None, :, k]
            spread += (a[:, k, None] - b[None, :, k]).square() / 2 + product * apart
            if k:
                slope += k * product * power
                power = power * (1 - t)
            apart = apart + power * t
        return spread, scale * slope / root

    return lambda v: coefficients(v)[1], dual


class _Analytic(Factors):
    """Factors of an infinitely wide network, by recursion over t = 1 - correlation (exact near coinciding inputs)."""

    def __init__(self, x, depth, activation, weight_var, bias_var, outputs, columns=None, train=None):
        super().__init__(len(x), len(x if columns is None else columns), outputs, depth, x, train)
        self._settings = (depth, activation, weight_var, bias_var, outputs)
        self._x, self._y = x, x if columns is None else columns
        self._rows, self._cols = _unit_rows(self._x), _unit_rows(self._y)

    def _tiles(self, rows, columns, layers):
        depth, activation, weight_var, bias_var, c = self._settings
        power, dual = activation
        (u, vi), (w, vj) = self._rows, self._cols
        d = self._x.shape[1]
        t, vi, vj = _one_minus_cosine(u[rows], w[columns]), vi[rows, None] / d, vj[None, columns] / d
        A, slopes = [], []
        for l in range(depth):
            t, vi, vj = _affine(t, vi, vj, weight_var, bias_var)  # now of the pre-activations of layer l
            A.append((vi * vj).sqrt() * (1 - t))
            if l < depth - 1:
                t, slope = dual(vi, vj, t)
                slopes.append(weight_var * slope)
                vi, vj = power(vi), power(vj)
        B = [torch.ones_like(t)]
        for slope in reversed(slopes):
            B.insert(0, B[0] * slope)
        eye = torch.eye(c, dtype=self.dtype, device=self.device)
        for l in layers:
            yield A[l], B[l] if c == 1 else torch.kron(B[l], eye)

    def cross(self, x):
        if isinstance(x, Signals):
            raise TypeError("x must be a tensor of inputs: analytic factors have no signals")
        check_matrix("x", x, self._x.shape[1], self._x)
        return _Analytic(x, *self._settings, columns=self._x, train=self)


def _affine(t, vi, vj, weight_var, bias_var):
    """Pre-activations from activations: variances a v + b, and 1 - correlation without cancellation."""
    geometric, ui, uj = (vi * vj).sqrt(), weight_var * vi + bias_var, weight_var * vj + bias_var
    total = (ui * uj).sqrt()
    spread = weight_var * bias_var * (vi.sqrt() - vj.sqrt()) ** 2 / (total + weight_var * geometric + bias_var)
    return (spread + weight_var * geometric * t) / total, ui, uj


def _unit_rows(x):
    norms = x.square().sum(1)
    if (norms == 0).any():
        raise ValueError(f"x has a row of zeros (row {int(norms.argmin())}); its angle to the others is not defined")
    return x / norms.sqrt()[:, None], norms


def _one_minus_cosine(u, w):
    """1 - cos of all pairs of unit rows; pairs that (nearly) coincide or oppose are formed from differences."""
    t = 1 - u @ w.T
    for sign, close in ((-1, t < 1e-4), (1, t > 2 - 1e-4)):
        i, j = close.nonzero(as_tuple=True)
        if len(i):
            half = (u[i] + sign * w[j]).square().sum(1) / 2
            t[i, j] = half if sign < 0 else 2 - half
    return t


def analytic(
    x: Tensor,
    depth: int,
    activation: str | Callable[[Tensor], Tensor] = "relu",
    weight_var: float = 2.0,
    bias_var: float = 0.0,
    outputs: int = 1,
) -> Factors:
    r"""Factors of an infinitely wide network in the NTK parameterisation, by recursion.

    With :math:`\Sigma_1 = \sigma_w^2 x x^\top/d + \sigma_b^2` and
    :math:`\Sigma_{l+1} = \sigma_w^2\,E[\phi(u)\phi(u')] + \sigma_b^2` for :math:`(u,u') \sim N(0, \Sigma_l)`:
    :math:`A_l = \Sigma_l`, :math:`B_L = 1`, :math:`B_l = B_{l+1} \circ \sigma_w^2 E[\phi'(u)\phi'(u')]`, each times
    :math:`I_C` for C outputs. The neural tangent kernel is ``gram()`` (no 1/N).

    Parameters
    ----------
    x : Tensor, (N, d)
        Inputs; their dtype and device are kept.
    depth : int
        Weight layers L (a net with two hidden layers has 3).
    activation : {"relu", "erf", "identity", "tanh"} or callable
        The first three in closed form, tanh and any other smooth elementwise function by Gauss-Hermite quadrature.
    weight_var, bias_var : float
        :math:`\sigma_w^2`, :math:`\sigma_b^2`.
    outputs : int
        C.

    Returns
    -------
    Factors
        Factor ``l`` (from 0) belongs to weight layer ``l + 1``. Analytic factors carry no signals.

    Raises
    ------
    ValueError
        For an activation that is unknown or too rough for quadrature, ``depth < 1``, bad inputs or variances, a row of
        zeros.

    Notes
    -----
    Cho & Saul (2009) for ReLU, Williams (1997) for erf; Karakida & Osawa (2020), section E. Correlations are
    carried as :math:`1 - \cos`, formed from differences where inputs nearly coincide: the usual arccos loses half
    of the digits there.

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
    phi = ACTIVATIONS[activation]() if activation in ACTIVATIONS else activation
    if not callable(phi):
        raise ValueError(
            f"activation={activation!r} is unknown; use one of {sorted(ACTIVATIONS)} or an elementwise function"
        )
    if depth < 1 or outputs < 1:
        raise ValueError(f"depth={depth} and outputs={outputs} must be at least 1")
    if not (weight_var > 0 and bias_var >= 0):
        raise ValueError(f"weight_var={weight_var} must be positive and bias_var={bias_var} not negative")
    dual = DUALS[activation] if activation in DUALS else _hermite_dual(phi)
    return _Analytic(x, depth, dual, float(weight_var), float(bias_var), outputs)


def arc_cosine_gram(x: Tensor, other: Tensor | None = None) -> Tensor:
    r"""The limiting Gram matrix of `TwoLayerReLU`, :math:`G^\infty_{ij} = x_i^\top x_j\,(\pi - \theta_{ij})/2\pi`.

    :math:`\theta_{ij}` is the angle between :math:`x_i` and :math:`x_j`; for unit rows the diagonal is 1/2. It does
    not depend on :math:`\nu`, and carries no 1/N.

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
        For bad inputs or a row of zeros.

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
    # layer 1 of the two-layer net in NTK scaling is (2 x.x'/d) * 2 (pi - angle)/(2 pi), undone here
    return factors.layer(0) * (x.shape[1] / 4)


# ---------------------------------------------------------------------------------------------- solves


class RankDeficient(ArithmeticError):
    """A Gram matrix (or damped system) has no inverse to working precision; the message says why and what to do."""


@dataclass(frozen=True)
class Info:
    """What a solve reports: the estimated condition number of the (worst) solved matrix, the jitter added to it, and,
    where it comes for free, the loss's slope along the direction."""

    condition: float
    jitter: float
    slope: float | None = None


def solve_spd(K, rhs, rank, jitter, factors, name="the "):
    """Solve K v = rhs for a symmetric positive (semi-)definite K, or a stack: Cholesky and two triangular solves."""
    shift = jitter * K.diagonal(0, -2, -1).mean(-1, keepdim=True)
    K.diagonal(0, -2, -1).add_(shift)
    shift = float(shift.max())
    factor, failed = torch.linalg.cholesky_ex(K)
    condition = float("inf") if failed.any() else _condition(K, factor)
    eps = torch.finfo(K.dtype).eps
    single = eps > 1e-10
    if not condition < (1 / eps if single else 1 / (K.shape[-1] * eps)):
        if K.ndim > 2:
            found = [solve_spd(k, r, rank, 0.0, factors, name) for k, r in zip(K, rhs)]
            return torch.stack([v for v, _ in found]), Info(max(i.condition for _, i in found), shift)
        if rank == "pinv":
            return solve_pinv(K, rhs, shift)
        raise RankDeficient(
            f"{name}Gram matrix ({len(K)} x {len(K)}) is singular to {K.dtype}"
            f" (estimated condition number {condition:.1e}){_culprits(factors)}."
            + (" Use float64," if single else " Use")
            + " rank='pinv' for the pseudo-inverse, or damping."
        )
    if single and condition > WARN_FLOAT32:
        warnings.warn(
            f"{name}Gram matrix has condition number {condition:.1e}: a float32 solve keeps few digits; use float64",
            RuntimeWarning,
            stacklevel=5,
        )
    half = torch.linalg.solve_triangular(factor, rhs, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True), Info(condition, shift)


def solve_pinv(K, rhs, shift):
    values, vectors = torch.linalg.eigh(K)
    keep = values > len(K) * torch.finfo(K.dtype).eps * values[-1]
    if not keep.any():
        raise RankDeficient("the Gram matrix is zero: no output depends on a trained parameter")
    values, vectors = values[keep], vectors[:, keep]
    return vectors @ ((vectors.T @ rhs) / values[:, None]), Info(float(values[-1] / values[0]), shift)


def solve_batch(M, rhs, rank, name):
    """Solve a batch of symmetric positive semi-definite systems; empty rows and columns get 0, singular ones `rank`."""
    n, eps, diagonal = M.shape[-1], torch.finfo(M.dtype).eps, M.diagonal(dim1=1, dim2=2)
    diagonal.add_((diagonal == 0).to(M))  # an empty row decouples; its right-hand side is 0
    factor, failed = torch.linalg.cholesky_ex(M)
    if not failed.any() and (factor.diagonal(dim1=1, dim2=2).square() > n * eps * diagonal).all():
        half = torch.linalg.solve_triangular(factor, rhs, upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True)
    if rank == "raise":
        raise RankDeficient(f"{name}units have linearly dependent active inputs; use rank='pinv' or damping")
    return torch.linalg.pinv(M, hermitian=True, rtol=n * eps) @ rhs


def probe(n, like):
    """A random unit column, always the same: the norm of its solution shows the size of an inverse."""
    v = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    return v / v.norm()


def _condition(K, factor, sweeps: int = 6) -> float:
    """Estimate (from below) of K's (largest) condition number: a few power and inverse iterations on its factor."""
    top = low = probe(K.shape[-1], K)
    for _ in range(sweeps):
        top = K @ top
        largest = top.norm(dim=-2, keepdim=True)
        top = top / largest
        half = torch.linalg.solve_triangular(factor, low, upper=False)
        low = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        inverse = low.norm(dim=-2, keepdim=True)
        low = low / inverse
    condition = float((largest * inverse).max())
    return condition if condition == condition else float("inf")


def _culprits(factors: Factors) -> str:
    """Duplicate or antipodal inputs, if there are any: the usual reason of a singular Gram."""
    if factors.train is not factors:
        return ""
    A = factors.signals.H[0] @ factors.signals.H[0].T if factors.signals else factors.A(0)  # tiles would sweep D
    scale = A.diagonal().clamp_min(torch.finfo(A.dtype).tiny).rsqrt()
    cosine = (A * scale[:, None] * scale).triu(1)
    found = []
    for kind, hit in (("duplicate", cosine > 1 - 1e-6), ("antipodal", cosine < -1 + 1e-6)):
        pairs = hit.nonzero()
        if len(pairs):
            found.append(f"{len(pairs)} pair(s) of {kind} inputs, the first in rows {pairs[0].tolist()}")
    return "; there are " + " and ".join(found) if found else ""
