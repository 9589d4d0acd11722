r"""Factors of infinitely wide networks, by recursion."""

import math
from collections.abc import Callable

import torch
from scipy.special import roots_hermitenorm
from torch import Tensor

from .factors import Factors
from .models import ACTIVATIONS
from .signals import Signals, check_matrix

__all__ = ["analytic", "arc_cosine_gram"]

NODES, TERMS = 1024, 800  # of the quadrature, of the Hermite series


def _relu_dual(si, sj, t):
    angle = torch.atan2((t * (2 - t)).clamp_min(0).sqrt(), 1 - t)
    rise = 2 * (angle / 2).sin().square()  # 1 - cos, without cancellation
    return rise - (angle.sin() - angle * (1 - rise)) / math.pi, (math.pi - angle) / (
        2 * math.pi
    )


def _erf_dual(vi, vj, t):
    si, sj = 1 + 2 * vi, 1 + 2 * vj
    covariance = (vi * vj).sqrt() * (1 - t)
    mean = 2 / math.pi * torch.asin(2 * covariance / (si * sj).sqrt())
    return 1 - mean / (_erf_power(vi) * _erf_power(vj)).sqrt(), 4 / math.pi / (
        si * sj - 4 * covariance**2
    ).sqrt()


def _erf_power(v):
    return 2 / math.pi * torch.asin(2 * v / (1 + 2 * v))


# activation: (E phi(u)^2 as a function of E u^2; and, from E u^2 of both and t = 1 -
# correlation of u, u',              1 - correlation of phi(u), phi(u') and E phi'(u)
# phi'(u'))
DUALS = {
    "relu": (lambda v: v / 2, _relu_dual),
    "erf": (_erf_power, _erf_dual),
    "identity": (lambda v: v, lambda vi, vj, t: (t, torch.ones_like(t))),
}


def _hermite_dual(phi):
    r"""The same for any smooth phi, by Gauss-Hermite quadrature along one dimension.

    With the Hermite coefficients :math:`a_k(v) = E\,\phi(\sqrt v z)\,h_k(z)`, at
    correlation r (Mehler) :math:`E\,\phi\phi' = \sum_k r^k a_k a_k'`, and its
    derivative in r gives :math:`E\,\phi'\phi'` (Price)."""
    z, w = (torch.from_numpy(a) for a in roots_hermitenorm(NODES))
    w = w / w.sum()
    h = [
        w.sqrt(),
        z * w.sqrt(),
    ]  # h_k times the root of the weight: neither overflows nor loses the product
    for k in range(1, TERMS):
        h.append((z * h[k] - k**0.5 * h[k - 1]) / (k + 1) ** 0.5)
    basis = torch.stack(h, 1) * w.sqrt()[:, None]

    def coefficients(v):
        values = phi(v.double().cpu().reshape(-1, 1).sqrt() * z)
        a, power = values @ basis, values.square() @ w
        large = (
            (torch.arange(TERMS + 1) * a.square() > 1e-14 * power[:, None])
            .any(0)
            .nonzero()
        )
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
            torch.nn.functional.pad(
                c / p.reshape(-1, 1).sqrt(), (0, terms - c.shape[1])
            )
            for c, p in ((a, pi), (b, pj))
        )
        apart, slope, power = (
            torch.zeros_like(t),
            torch.zeros_like(t),
            torch.ones_like(t),
        )  # 1 - r^k, its sum, r^k
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
    """Factors of an infinitely wide network, by recursion over t = 1 - correlation
    (exact near coinciding inputs).
    """

    def __init__(
        self,
        x,
        depth,
        activation,
        weight_var,
        bias_var,
        outputs,
        columns=None,
        train=None,
    ):
        super().__init__(
            len(x), len(x if columns is None else columns), outputs, depth, x, train
        )
        self._settings = (depth, activation, weight_var, bias_var, outputs)
        self._x, self._y = x, x if columns is None else columns
        self._rows, self._cols = _unit_rows(self._x), _unit_rows(self._y)

    def _tiles(self, rows, columns, layers):
        depth, activation, weight_var, bias_var, c = self._settings
        power, dual = activation
        (u, vi), (w, vj) = self._rows, self._cols
        d = self._x.shape[1]
        t, vi, vj = (
            _one_minus_cosine(u[rows], w[columns]),
            vi[rows, None] / d,
            vj[None, columns] / d,
        )
        A, slopes = [], []
        for l in range(depth):
            t, vi, vj = _affine(
                t, vi, vj, weight_var, bias_var
            )  # now of the pre-activations of layer l
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
            raise TypeError(
                "x must be a tensor of inputs: analytic factors have no signals"
            )
        check_matrix("x", x, self._x.shape[1], self._x)
        return _Analytic(x, *self._settings, columns=self._x, train=self)


def _affine(t, vi, vj, weight_var, bias_var):
    """Pre-activations from activations: variances a v + b, and 1 - correlation without
    cancellation.
    """
    geometric, ui, uj = (
        (vi * vj).sqrt(),
        weight_var * vi + bias_var,
        weight_var * vj + bias_var,
    )
    total = (ui * uj).sqrt()
    spread = (
        weight_var
        * bias_var
        * (vi.sqrt() - vj.sqrt()) ** 2
        / (total + weight_var * geometric + bias_var)
    )
    return (spread + weight_var * geometric * t) / total, ui, uj


def _unit_rows(x):
    norms = x.square().sum(1)
    if (norms == 0).any():
        raise ValueError(
            f"x has a row of zeros (row {int(norms.argmin())}); its angle to the others is not defined"
        )
    return x / norms.sqrt()[:, None], norms


def _one_minus_cosine(u, w):
    """1 - cos of all pairs of unit rows; pairs that (nearly) coincide or oppose are
    formed from differences.
    """
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
    :math:`\Sigma_{l+1} = \sigma_w^2\,E[\phi(u)\phi(u')] + \sigma_b^2` for
    :math:`(u,u') \sim N(0, \Sigma_l)`: :math:`A_l = \Sigma_l`, :math:`B_L = 1`,
    :math:`B_l = B_{l+1} \circ \sigma_w^2 E[\phi'(u)\phi'(u')]`, each times :math:`I_C`
    for C outputs. The neural tangent kernel is ``gram()`` (no 1/N).

    Parameters
    ----------
    x : Tensor, (N, d)
        Inputs; their dtype and device are kept.
    depth : int
        Weight layers L (a net with two hidden layers has 3).
    activation : {"relu", "erf", "identity", "tanh"} or callable
        The first three in closed form, tanh and any other smooth elementwise function
        by Gauss-Hermite quadrature.
    weight_var, bias_var : float
        :math:`\sigma_w^2`, :math:`\sigma_b^2`.
    outputs : int
        C.

    Returns
    -------
    Factors
        Factor ``l`` (from 0) belongs to weight layer ``l + 1``. Analytic factors carry
        no signals.

    Raises
    ------
    ValueError
        For an activation that is unknown or too rough for quadrature, ``depth < 1``,
        bad inputs or variances, a row of zeros.

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
    phi = ACTIVATIONS[activation]() if activation in ACTIVATIONS else activation
    if not callable(phi):
        raise ValueError(
            f"activation={activation!r} is unknown; use one of {sorted(ACTIVATIONS)} or an elementwise function"
        )
    if depth < 1 or outputs < 1:
        raise ValueError(f"depth={depth} and outputs={outputs} must be at least 1")
    if not (weight_var > 0 and bias_var >= 0):
        raise ValueError(
            f"weight_var={weight_var} must be positive and bias_var={bias_var} not negative"
        )
    dual = DUALS[activation] if activation in DUALS else _hermite_dual(phi)
    return _Analytic(x, depth, dual, float(weight_var), float(bias_var), outputs)


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
    # layer 1 of the two-layer net in NTK scaling is (2 x.x'/d) * 2 (pi - angle)/(2 pi),
    # undone here
    return factors.layer(0) * (x.shape[1] / 4)
