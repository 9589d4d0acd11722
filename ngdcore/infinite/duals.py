r"""Duals: what the recursion of an infinitely wide network asks of an activation.

For Gaussian :math:`u, u'` with standard deviations s, s' and correlation
:math:`1 - t`, a dual gives :math:`E\,\phi(u)^2`, the correlation of :math:`\phi(u)` and
:math:`\phi(u')`, and :math:`E\,\phi'(u)\phi'(u')`. Correlations travel as one minus
themselves: near coinciding inputs the usual arccos loses half of the digits."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..models import Elementwise, Erf, ShiftedReLU, activation_maker

__all__ = ["Dual", "Rectified", "ErfDual", "Shifted", "Hermite", "dual_of"]


class Dual(ABC):
    r"""An activation :math:`\phi` as the recursion sees it; subclass it for a closed
    form of your own.

    Two methods are enough. An instance is given as ``activation=``; it pickles if it
    is a class at the top of a module.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> class Sine(ngd.kernels.Dual):
    ...     def rms(self, s):
    ...         return ((1 - torch.exp(-2 * s**2)) / 2).sqrt()
    ...     def pair(self, left, right, t):
    ...         s, r = left, right.mT
    ...         c, damp = s * r * (1 - t), torch.exp(-(s**2 + r**2) / 2)
    ...         corr = damp * c.sinh() / self.rms(s) / self.rms(r)
    ...         return 1 - corr, damp * c.cosh()
    >>> x = torch.eye(3, dtype=torch.float64)
    >>> closed, series = (
    ...     ngd.kernels.analytic(x, 3, phi).gram() for phi in (Sine(), torch.sin))
    >>> torch.allclose(closed, series)
    True
    """

    @abstractmethod
    def rms(self, s: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        r""":math:`\sqrt{E\,\phi(sz)^2}`, z standard normal; s = 0 (a row of zeros)
        included."""

    @abstractmethod
    def pair(
        self,
        left: Float[Tensor, "*rows n k"],
        right: Float[Tensor, "*rows m k"],
        t: Float[Tensor, "*rows n m"],
    ) -> tuple[Tensor, Tensor]:
        r"""One minus the correlation of :math:`\phi(u), \phi(u')`, and
        :math:`E\,\phi'(u)\phi'(u')`, for all pairs of rows; t is one minus the
        correlation of :math:`u, u'`. ``left``, ``right`` are what `prepare` gave."""

    def prepare(self, s: Float[Tensor, " N"]) -> Float[Tensor, "N k"]:
        """What `pair` needs of every row, computed once: by default s itself, k = 1."""
        return s[:, None]

    def slope(self, s: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        r""":math:`E\,\phi'(sz)^2`: `pair` of every row with itself."""
        rows = self.prepare(s)[:, None]
        return self.pair(rows, rows, rows.new_zeros(len(s), 1, 1))[1].flatten()

    def rows(self, s: Float[Tensor, " N"]) -> tuple[Tensor, Tensor, Tensor]:
        """rms (N), what `prepare` gives (N, k), slope (N): where they share work."""
        return self.rms(s), self.prepare(s), self.slope(s)

    def __repr__(self) -> str:
        settings = ", ".join(f"{v:g}" for v in vars(self).values())
        return f"{type(self).__name__}({settings})"


class Rectified(Dual):
    r""":math:`\phi(u) = u` for u > 0 and :math:`a u` otherwise: ReLU (a = 0), leaky
    ReLU, absolute value (a = -1), identity (a = 1).

    With angle :math:`\theta` and :math:`m = (1 - a)/2`:
    :math:`E\,\phi'\phi' = (1 + a^2)/2 - 2 m^2 \theta/\pi`.

    Notes
    -----
    Cho & Saul (2009). Half the sum and half the difference of the two slopes make an
    odd and an even part, :math:`\frac{1+a}2 u + \frac{1-a}2 |u|`, which do not meet.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> x = torch.eye(3, dtype=torch.float64)
    >>> fac = ngd.kernels.analytic(x, 2, torch.nn.LeakyReLU(0.2))
    >>> fac
    <analytic factors: 3 x 3, C=1, depth=2, Rectified(0.2), 2, 0>
    """

    def __init__(self, negative_slope: float = 0.0):
        self.negative_slope = float(negative_slope)

    @property
    def _power(self) -> float:
        return (1 + self.negative_slope**2) / 2

    def rms(self, s):
        return s * math.sqrt(self._power)

    def prepare(self, s):
        return (s == 0).to(s)[:, None]

    def pair(self, left, right, t):
        even = ((1 - self.negative_slope) / 2) ** 2 * 2 / math.pi
        if even == 0:
            return t, torch.ones_like(t)
        rise, angle = _even_part(t)
        rise = torch.add(t, rise, alpha=-even / self._power)
        if self.negative_slope < 0:  # opposite rows (nearly) meet: formed as equal ones
            odd = ((1 + self.negative_slope) / 2) ** 2
            mirror = (
                _even_part(2 - t)[0].mul_(-even).add_((self._power - odd) * (2 - t))
            )
            rise = torch.where(t > 1, (mirror + odd * t) / self._power, rise)
        slope = self._power - even * angle
        return rise, self._at_zero(left, right, slope)

    def _at_zero(self, left, right, slope):
        """The slopes (n, m), with the derivative at 0 that torch uses for rows that
        are 0 for sure."""
        if not left.any() and not right.any():
            return slope
        mean = (1 + self.negative_slope) / 2
        kink = 0.0 if self.negative_slope == -1 else self.negative_slope
        row, column = (torch.where(z == 1, kink, mean) for z in (left, right.mT))
        return torch.where((left + right.mT) > 0, row * column, slope)


def _even_part(t: Tensor) -> tuple[Tensor, Tensor]:
    """sin - angle cos, and the angle, whose cosine is 1 - t; shapes of t."""
    cosine = 1 - t
    sine = (2 - t).mul_(t).clamp_min_(0).sqrt_()
    angle = torch.atan2(sine, cosine)
    return sine.sub_(cosine.mul_(angle)), angle


class ErfDual(Dual):
    r""":math:`\phi = \mathrm{erf}`.

    Notes
    -----
    Williams (1997): :math:`E\,\phi\phi' = \frac2\pi \arcsin\rho` with
    :math:`\rho = 2 c s s'/\sqrt{(1 + 2s^2)(1 + 2s'^2)}`. The arcsine is taken from
    :math:`1 - \rho^2`, which does not cancel where both are large.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> ngd.kernels.analytic(torch.eye(3, dtype=torch.float64), 2, torch.erf)
    <analytic factors: 3 x 3, C=1, depth=2, ErfDual(), 2, 0>
    """

    def rms(self, s):
        kappa, rest, _ = self.prepare(s).unbind(1)
        even = _asin_ratio(kappa**2, (rest * (2 - rest)).sqrt())
        return kappa * (2 / math.pi * even).sqrt()

    def prepare(self, s):
        """(N, 3): kappa = sqrt(2) s/g, 1 - kappa^2 = 1/g^2, 1/g; g^2 = 1 + 2 s^2."""
        inverse = 1 / torch.hypot(torch.ones_like(s), math.sqrt(2) * s)
        return torch.stack([math.sqrt(2) * s * inverse, inverse**2, inverse], 1)

    def pair(self, left, right, t):
        right = right.mT
        k, e, i = (left[..., j : j + 1] for j in range(3))
        k_, e_, i_ = (right[..., j : j + 1, :] for j in range(3))
        cosine = 1 - t
        root = (t * (2 - t)).clamp_min(0) + cosine**2 * (e + e_ - e * e_)
        root = root.sqrt()
        own, own_ = (_asin_ratio(1 - v, (v * (2 - v)).sqrt()) for v in (e, e_))
        mean = _asin_ratio(k * k_ * cosine, root)
        corr = cosine * mean / (own * own_).sqrt()
        return 1 - corr, 4 / math.pi * i * i_ / root


def _asin_ratio(sine: Tensor, cosine: Tensor) -> Tensor:
    """asin(sine)/sine, 1 at 0."""
    small = sine.abs() < 1e-8
    return torch.where(small, 1.0, torch.atan2(sine, cosine) / sine)


NODES, REACH = 64, 34.0  # of the quadrature over the logarithm of the angle
FAR = 30.0  # thresholds this many standard deviations away are never reached


class Shifted(Dual):
    r""":math:`\phi(u) = \max(u - b, 0)`, b not 0, by quadrature to rounding.

    With thresholds :math:`h = b/s, k = b/s'` and angle :math:`\theta`, Plackett's
    formula gives the probability that both are active,

    .. math:: E\,\phi'\phi' = \bar\Phi(\max(h, k)) - \frac1{2\pi}\int_0^\theta
        e^{-(h^2 + k^2 - 2hk\cos\alpha)/2\sin^2\alpha}\,d\alpha,

    and the same integral with weight :math:`\cos\alpha - \cos\theta` what the
    correlation of :math:`\phi(u), \phi(u')` lacks to that at :math:`\theta = 0`.
    Obtuse angles are mirrored, :math:`(h, k, \theta) \to (h, -k, \pi - \theta)`.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> x = torch.eye(3, dtype=torch.float64)
    >>> ngd.kernels.analytic(x, 2, ngd.models.ShiftedReLU(0.5))
    <analytic factors: 3 x 3, C=1, depth=2, Shifted(0.5), 2, 0>
    """

    def __init__(self, shift: float):
        self.shift = float(shift)

    def rms(self, s):
        h = self.prepare(s)[:, 0]
        near = s * _moments(h)[2].sqrt()
        far = torch.hypot(s, torch.full_like(s, self.shift))
        near = torch.where(h < -FAR, far, near)
        return torch.where(h >= FAR, 0.0, near)

    def prepare(self, s):
        return (self.shift / s.clamp_min(1e-300)).clamp(-1e100, FAR)[:, None]

    def pair(self, left, right, t):
        left, right, angle = left.double(), right.double(), t.double().clamp(0, 2)
        h, k = left.expand(t.shape), right.mT.expand(t.shape)
        obtuse = angle > 1
        apart = torch.where(obtuse, 2 - angle, angle)
        both, lack = _orthant(h, torch.where(obtuse, -k, k), apart)
        rise, slope = _acute(h, k, apart, both, lack)
        straight = (h < -FAR) & (k < -FAR)  # no threshold is met: u - b on both sides
        if straight.any():
            rise = torch.where(straight, _affine(h, k, angle), rise)
        if obtuse.any():
            mirrored = _obtuse(h, k, apart, both, lack)
            rise = torch.where(obtuse & ~straight, mirrored[0], rise)
            slope = torch.where(obtuse, mirrored[1], slope)
        return rise.to(t), slope.to(t)


def _moments(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E 1, E (z - h), E (z - h)^2 over z > h, of a standard normal z; shapes of h."""
    tail, density = _tail(h), _density(h)
    return tail, density - h * tail, (1 + h**2) * tail - h * density


def _tail(h: Tensor) -> Tensor:
    """P(z > h), to full relative accuracy (torch.special.ndtr keeps 10 digits)."""
    return torch.special.erfc(h / math.sqrt(2)) / 2


def _density(h: Tensor) -> Tensor:
    return torch.exp(-(h**2) / 2) / math.sqrt(2 * math.pi)


def _orthant(h: Tensor, k: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    r"""The two integrals of `Shifted` over :math:`2\pi`, for t = 1 - cos theta <= 1.

    Nodes are spread over :math:`\log\tan(\alpha/2)`, from theta down to where the
    integrand has vanished: with thresholds apart by delta that is at delta / 17."""
    apart = (h - k) ** 2
    tan = (t / (2 - t)).sqrt().clamp_min(1e-140)  # of theta / 2
    reach = (tan * math.sqrt(8 * 38) / apart.sqrt().clamp_min(1e-300)).log()
    reach = reach.clamp(1e-3, REACH)
    both, lack, product = torch.zeros_like(t), torch.zeros_like(t), h * k / 2
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    for y, w in zip((nodes + 1) / 2, weights / 2):
        q = (tan * (-(y**2) * reach).exp()) ** 2
        one = 1 + q
        energy = one * (apart * one / (8 * q) + product)
        part = (-energy).exp() * q.sqrt() * (2 * w * 2 * y) * reach / one
        both += part
        lack += part * (tan**2 - q) / one
    return both / (2 * math.pi), lack / math.pi / (1 + tan**2)


def _acute(h, k, t, both, lack):
    """`Shifted.pair` for angles up to pi/2, all (n, m)."""
    low, high = torch.minimum(h, k), torch.maximum(h, k)
    (_, _, r_low), (tail, mean, r_high) = _moments(low), _moments(high)
    r_low, r_high, delta = r_low.sqrt(), r_high.sqrt(), high - low
    y, w = (torch.from_numpy(v).to(t) for v in np.polynomial.legendre.leggauss(24))
    near = sum(
        float(b) * (a * delta) ** 2 * _density(low + a * delta) * delta
        for a, b in zip((y + 1) / 2, w / 2)
    )
    far = r_low**2 - r_high**2 - 2 * delta * mean
    # |phi_h - phi_k|^2, <phi_h - phi_k, phi_k>, and the difference of the norms
    gap = torch.where(delta < 1, near + delta**2 * tail, far)
    across = delta * mean
    change = (2 * across + gap) / (r_low + r_high)
    spread = gap - 2 * across * change / r_high + change**2
    missing = (t * tail - lack) / (r_low * r_high)
    return spread / (2 * r_low**2) + missing, tail - both


def _affine(h, k, t):
    """One minus the correlation of z - h and z' - k, both far below 0, (n, m)."""
    size, size_k = (
        torch.hypot(h, torch.ones_like(h)),
        torch.hypot(k, torch.ones_like(k)),
    )
    p, q, b, c = 1 / size, 1 / size_k, -h / size, -k / size_k
    return p * q * t + (p * c - q * b).square() / (1 + p * q + b * c)


def _obtuse(h, k, t, both, lack):
    """`Shifted.pair` beyond pi/2, by E (z-h)+ (z'-k) = E (z-h)+ ((z'-k)+ - (k-z')+);
    t, both, lack are those of the mirror image."""
    (tail, mean, power), (_, _, power_k) = _moments(h), _moments(k)
    high = torch.maximum(h, -k)
    tail_high = _tail(high)
    aligned = (1 - h * k) * tail_high + _density(high) * (high - h + k)
    moment = (t - 1) * tail - k * mean + aligned - (t * tail_high - lack)
    return 1 - moment / (power * power_k).sqrt(), tail - tail_high + both


TERMS = (
    128,
    256,
    512,
    1024,
    3072,
)  # of the Hermite series, more where it has not decayed
FINE = 2**15  # points of the grid that looks for what the series' nodes miss


class Hermite(Dual):
    r"""Any smooth elementwise :math:`\phi`, by its Hermite series.

    With :math:`a_k(s) = E\,\phi(sz)\,h_k(z)`, by the trapezoidal rule,
    :math:`E\,\phi\phi' = \sum_k c^k a_k a_k'` (Mehler), and its derivative in the
    correlation c gives :math:`E\,\phi'\phi'` (Price).

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> ngd.kernels.analytic(torch.eye(3, dtype=torch.float64), 2, torch.tanh)
    <analytic factors: 3 x 3, C=1, depth=2, Hermite(tanh), 2, 0>
    """

    def __init__(self, phi: Callable[[Tensor], Tensor]):
        if isinstance(phi, nn.Module):
            phi = copy.deepcopy(phi).double().cpu()
        self.phi = phi

    def __repr__(self) -> str:
        name = getattr(self.phi, "__name__", type(self.phi).__name__)
        return f"Hermite({name})"

    def rms(self, s):
        return self.rows(s)[0]

    def prepare(self, s):
        return self.rows(s)[1]

    def slope(self, s):
        return self.rows(s)[2]

    def rows(self, s):
        """One series for all three; `prepare` is (N, 1 + terms): rms/s, and the
        coefficients of phi/rms."""
        if len(s) > 1 and s.max() - s.min() <= 1e-14 * s.max():
            return tuple(
                v.expand(len(s), *v.shape[1:]) for v in self.rows(s.max()[None])
            )
        rms, a = self._series(s)
        rows = torch.cat([(rms / _positive(s))[:, None], a], 1)
        orders = torch.arange(a.shape[1]).to(a)
        zero = self._phi(torch.zeros(1, 1, dtype=torch.float64)).abs()[0].to(s)
        return torch.where(s == 0, zero, rms), rows, rows[:, 0] ** 2 * (a**2 @ orders)

    def pair(self, left, right, t):
        cosine, terms = 1 - t, min(left.shape[1], right.shape[1])
        a, b = left[:, 1:terms], right[:, 1:terms]
        top = a.abs().amax(0) * b.abs().amax(0)
        first = int(top[0::2].max() <= 1e-30)  # odd functions have odd terms only
        step = 2 if first or not (top[1::2] > 1e-30).any() else 1
        y = cosine**2 if step == 2 else cosine
        value, rise = torch.zeros_like(t), torch.zeros_like(t)
        last = self._needed(top, cosine) - 1
        a, b = (side[:, : last + 1].T.contiguous() for side in (a, b))
        for k in range(last - (last - first) % step, first - 1, -step):  # Horner
            torch.addcmul(value, rise, y, out=rise)
            value.mul_(y).addr_(a[k], b[k])
        if step == 2:  # value and rise are of the series in the square
            rise = 2 * cosine * rise
            if first:
                value, rise = value * cosine, value + cosine * rise
        return 1 - value, left[:, :1] * right[:, :1].T * rise

    def _needed(self, top, cosine):
        """How many terms, at most `top` (K) each, count at these correlations."""
        size = float(cosine.abs().max().clamp(max=1))
        orders = torch.arange(len(top)).to(top)
        parts = (orders + 1) * top * size ** (orders - 1).clamp_min(0)
        tail = parts.double().flip(0).cumsum(0).flip(0)
        return int((tail > torch.finfo(top.dtype).eps / 8 * tail[0]).sum())

    def _series(self, s):
        """rms (N) and the coefficients of phi/rms (N, K), as many as it takes."""
        positive = _positive(s).double().cpu()
        widest = positive.max()[None]  # tells how many terms, at the cost of one row
        for terms in TERMS:
            if self._decayed(*self._coefficients(widest, terms)) is None:
                continue
            size, a, ends = self._coefficients(positive, terms)
            last = self._decayed(size, a, ends)
            if last is not None:
                norm = _norm(a)
                self._check_power(widest, (size * norm[:, 0])[positive.argmax()])
                return (size * norm[:, 0]).to(s), (a[:, : last + 1] / norm).to(s)
        raise ValueError(
            "activation is not smooth enough for a series at these variances (pre-"
            f"activations up to {float(s.max()):.3g} in standard deviation): it has not"
            f" decayed after {terms} Hermite terms. A kink needs a closed form (ReLU,"
            " LeakyReLU, abs, ShiftedReLU, or a kernels.Dual of your own); a steep"
            " smooth function smaller inputs or weight_var"
        )

    def _check_power(self, s, rms):
        """Raise where a far finer grid sees another E phi^2 (s and rms of one row): a
        feature that falls between the series' nodes would be missed."""
        z = torch.linspace(-12, 12, FINE, dtype=torch.float64)
        power = (self._phi(s[:, None] * z) ** 2 * _density(z)).sum() * 24 / (FINE - 1)
        if not (power.sqrt() - rms).abs() <= 1e-8 * rms:
            raise ValueError(
                "activation has features too narrow for a series (pre-activations up to"
                f" {float(s[0]):.3g} in standard deviation): write a kernels.Dual of"
                " your own, or use a smoother function"
            )

    def _decayed(self, size, a, ends):
        """The last of these coefficients (N, terms + 1) that counts for any row; None
        where there may be more beyond them.

        k a_k < 1e-10 serves pairs of unequal rows too; at the last resort it is what
        rows of equal size need."""
        terms = a.shape[1] - 1
        orders = torch.arange(terms + 1)
        allowed = 1e-10 if terms < TERMS[-1] else 3e-8 * orders**0.5
        parts = (orders * (a / _norm(a)).abs()).amax(0)
        counts = (parts > allowed).nonzero()
        last = int(counts[-1]) if len(counts) else 0
        return last if last <= terms - 8 and not ends.any() else None

    def _coefficients(self, s, terms):
        """Scale (N) and coefficients (N, terms + 1) of phi at standard deviations s
        (N); and whether it has not vanished at the ends of the line, (N, 2)."""
        z, basis, root = _hermite_basis(terms)
        u = s[:, None] * z
        plus, minus = self._phi(u), self._phi(-u)
        size = torch.maximum(plus.abs().amax(1), minus.abs().amax(1))
        scale = root / torch.where(size > 0, size, 1.0)[:, None]
        ends = (torch.stack([plus, minus])[..., -1] * scale[:, -1]).abs() > 1e-12
        a = torch.zeros(len(s), terms + 1, dtype=torch.float64)
        for parity, part in enumerate((plus + minus, plus - minus)):
            if part.any():  # tanh has no even part
                a[:, parity::2] = (part * scale) @ basis[parity::2].T
        return size, a, ends

    def _phi(self, u):
        """phi of a float64 (N, k), checked."""
        with torch.no_grad():
            values = self.phi(u)
            if not isinstance(values, Tensor) or values.shape != u.shape:
                raise ValueError("activation must return a tensor of its input's shape")
            one = self.phi(u[:1, :1])
        if not torch.isfinite(values).all():
            raise ValueError(
                "activation returns NaN or infinity: it is not smooth enough, or grows"
                " too fast, for these variances"
            )
        if not torch.allclose(one.to(values), values[:1, :1], rtol=1e-9, atol=0):
            raise ValueError("activation must act on every element by itself")
        return values.double()


def _norm(a: Tensor) -> Tensor:
    """Norms of the rows (N, 1), 1 where a row is zero."""
    norm = torch.linalg.vector_norm(a, dim=1, keepdim=True)
    return torch.where(norm > 0, norm, 1.0)


def _positive(s: Tensor) -> Tensor:
    """A row of zeros is the limit of small ones."""
    return s.clamp_min(1e-100)


def _hermite_basis(terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes z >= 0 (n), normalised Hermite functions times the step (terms + 1, n), and
    the root of the weight (n): for E phi h_k, multiply with phi's part of k's parity,
    twice, and sum.

    The step resolves the product of the two fastest functions."""
    step = math.pi / (2.2 * math.sqrt(terms))
    z = np.arange(math.ceil(14 / step) + 1) * step
    root = np.exp(-(z**2) / 4) / (2 * math.pi) ** 0.25
    h = np.empty((terms + 1, len(z)))
    h[0], h[1] = root, z * root
    for k in range(1, terms):
        h[k + 1] = (z * h[k] - k**0.5 * h[k - 1]) / (k + 1) ** 0.5
    h *= step
    h[:, 0] /= 2  # z = 0 is met once, the others with either sign
    return torch.from_numpy(z), torch.from_numpy(h), torch.from_numpy(root)


def _same(phi, *functions) -> bool:
    return any(phi is f for f in functions)


def dual_of(activation) -> Dual:
    """The dual of an activation given as a `Dual`, module, class of modules, function
    or name.

    Raises
    ------
    ValueError
        For an unknown name, or something that is not callable.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> from ngdcore.infinite import dual_of
    >>> dual_of("relu"), dual_of(torch.nn.LeakyReLU(0.2)), dual_of(torch.abs)
    (Rectified(0), Rectified(0.2), Rectified(-1))
    """
    if isinstance(activation, Dual):
        return activation
    phi = activation_maker(activation)()
    phi = phi.function if type(phi) is Elementwise else phi
    return _closed_form(phi) or Hermite(phi)


def _closed_form(phi) -> Dual | None:
    """The closed form of a module or function that has one."""
    F, kind = nn.functional, type(phi)
    if kind is nn.ReLU or _same(phi, torch.relu, F.relu, Tensor.relu):
        return Rectified(0.0)
    if kind is nn.LeakyReLU or _same(phi, F.leaky_relu):
        return Rectified(getattr(phi, "negative_slope", 0.01))
    if kind is nn.PReLU and phi.weight.numel() == 1:
        return Rectified(float(phi.weight))
    if _same(phi, torch.abs, torch.absolute, Tensor.abs, abs):
        return Rectified(-1.0)
    if kind is nn.Identity:
        return Rectified(1.0)
    if kind is Erf or _same(phi, torch.erf, torch.special.erf, Tensor.erf):
        return ErfDual()
    if kind is ShiftedReLU:
        return Shifted(phi.shift) if phi.shift else Rectified(0.0)
    return None
