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

from ..models import ACTIVATIONS, Erf, ShiftedReLU

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
    >>> closed, series = (ngd.kernels.analytic(x, 3, phi) for phi in (Sine(), torch.sin))
    >>> torch.allclose(closed.gram(), series.gram())
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
        cosine = 1 - t
        sine = (2 - t).mul_(t).clamp_min_(0).sqrt_()
        angle = torch.atan2(sine, cosine)
        slope = self._at_zero(left, right, self._power - even * angle)
        rise = sine.sub_(angle.mul_(cosine))
        return torch.add(t, rise, alpha=-even / self._power), slope

    def _at_zero(self, left, right, slope):
        """The slopes (n, m), with the derivative at 0 that torch uses for rows that
        are 0 for sure."""
        if not left.any() and not right.any():
            return slope
        mean = (1 + self.negative_slope) / 2
        kink = 0.0 if self.negative_slope == -1 else self.negative_slope
        row, column = (torch.where(z == 1, kink, mean) for z in (left, right.mT))
        return torch.where((left + right.mT) > 0, row * column, slope)


class ErfDual(Dual):
    r""":math:`\phi = \mathrm{erf}`.

    Notes
    -----
    Williams (1997): :math:`E\,\phi\phi' = \frac2\pi \arcsin\rho` with
    :math:`\rho = 2 c s s'/\sqrt{(1 + 2s^2)(1 + 2s'^2)}`. The arcsine is taken from
    :math:`1 - \rho^2`, which does not cancel where both are large.
    """

    def rms(self, s):
        kappa, rest, _ = self.prepare(s).unbind(1)
        even = _asin_ratio(kappa**2, (rest * (2 - rest)).sqrt())
        return kappa * (2 / math.pi * even).sqrt()

    def prepare(self, s):
        """(N, 3): kappa = sqrt(2) s/g, 1 - kappa^2 = 1/g^2, and 1/g, g^2 = 1 + 2 s^2."""
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
        if obtuse.any():
            mirrored = _obtuse(h, k, apart, both, lack)
            rise = torch.where(obtuse, mirrored[0], rise)
            slope = torch.where(obtuse, mirrored[1], slope)
        return rise.to(t), slope.to(t)


def _moments(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E 1, E (z - h), E (z - h)^2 over z > h, of a standard normal z; shapes of h."""
    tail, density = torch.special.ndtr(-h), _density(h)
    return tail, density - h * tail, (1 + h**2) * tail - h * density


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


def _obtuse(h, k, t, both, lack):
    """`Shifted.pair` beyond pi/2, by E (z-h)+ (z'-k) = E (z-h)+ ((z'-k)+ - (k-z')+);
    t, both, lack are those of the mirror image."""
    (tail, mean, power), (_, _, power_k) = _moments(h), _moments(k)
    high = torch.maximum(h, -k)
    tail_high = torch.special.ndtr(-high)
    aligned = (1 - h * k) * tail_high + _density(high) * (high - h + k)
    moment = (t - 1) * tail - k * mean + aligned - (t * tail_high - lack)
    return 1 - moment / (power * power_k).sqrt(), tail - tail_high + both


TERMS = (128, 384, 1024, 3072)  # of the Hermite series, more where it has not decayed


class Hermite(Dual):
    r"""Any smooth elementwise :math:`\phi`, by its Hermite series.

    With :math:`a_k(s) = E\,\phi(sz)\,h_k(z)`, by the trapezoidal rule,
    :math:`E\,\phi\phi' = \sum_k c^k a_k a_k'` (Mehler), and its derivative in the
    correlation c gives :math:`E\,\phi'\phi'` (Price).
    """

    def __init__(self, phi: Callable[[Tensor], Tensor]):
        if isinstance(phi, nn.Module):
            phi = copy.deepcopy(phi).double().cpu()
        self.phi = phi

    def __repr__(self) -> str:
        name = getattr(self.phi, "__name__", str(self.phi))
        return f"Hermite({name})"

    def rms(self, s):
        rms = self._series(s)[0]
        zero = self._phi(torch.zeros(1, 1, dtype=torch.float64)).abs()[0].to(s)
        return torch.where(s == 0, zero, rms)

    def prepare(self, s):
        """(N, 1 + terms): rms/s, and the coefficients of phi/rms."""
        rms, a = self._series(s)
        return torch.cat([(rms / _positive(s))[:, None], a], 1)

    def slope(self, s):
        rows = self.prepare(s)
        orders = torch.arange(rows.shape[1] - 1).to(rows)
        return rows[:, 0] ** 2 * (rows[:, 1:] ** 2 @ orders)

    def pair(self, left, right, t):
        cosine, terms = 1 - t, min(left.shape[1], right.shape[1]) - 1
        a, b = left[:, 1 : terms + 1], right[:, 1 : terms + 1]
        top = a.abs().amax(0) * b.abs().amax(0)
        first = int(top[0::2].max() <= 1e-30)  # odd functions have odd terms only
        step = 2 if first or top[1::2].max() <= 1e-30 else 1
        y = cosine**2 if step == 2 else cosine
        value, rise = torch.zeros_like(t), torch.zeros_like(t)
        for k in reversed(range(first, self._needed(top, cosine), step)):
            torch.addcmul(value, rise, y, out=rise)
            value.mul_(y).addr_(a[:, k], b[:, k])
        if step == 2:  # value and rise are of the series in the square
            rise = 2 * cosine * rise
            if first:
                value, rise = value * cosine, value + cosine * rise
        return 1 - value, left[:, :1] * right[:, :1].T * rise

    def _needed(self, top, cosine):
        """How many of the terms, at most `top` (K) each, count at these correlations."""
        size = float(cosine.abs().max().clamp(max=1))
        orders = torch.arange(len(top)).to(top)
        parts = (orders + 1) * top * size ** (orders - 1).clamp_min(0)
        tail = parts.double().flip(0).cumsum(0).flip(0)
        return int((tail > torch.finfo(top.dtype).eps / 8 * tail[0]).sum())

    def _series(self, s):
        """rms (N) and the coefficients of phi/rms (N, K), as many as it takes; one row
        stands for all where s differs by rounding only."""
        if len(s) > 1 and s.max() - s.min() <= 1e-14 * s.max():
            rms, a = self._series(s.max()[None])
            return rms.expand(len(s)), a.expand(len(s), -1)
        positive = _positive(s).double().cpu()
        for terms in TERMS:
            size, a, ends = self._coefficients(positive, terms)
            orders = torch.arange(terms + 1)
            power = a.square().sum(1)
            norm = torch.where(power > 0, power, 1.0).sqrt()[:, None]
            parts = orders * (a / norm).abs()
            small = parts.amax(0) < (1e-12 if terms < TERMS[-1] else 3e-8 * orders**0.5)
            last = int((~small).nonzero()[-1]) if not small.all() else 0
            if last <= terms - 8 and not ends.any():
                kept = a[:, : last + 1] / norm
                return (size * power.sqrt()).to(s), kept.to(s)
        raise ValueError(
            "activation is not smooth enough for a series at these variances (pre-"
            f"activations up to {float(s.max()):.3g} in standard deviation): it has not"
            f" decayed after {terms} Hermite terms. A kink needs a closed form (ReLU,"
            " LeakyReLU, abs, ShiftedReLU, or a kernels.Dual of your own); a steep"
            " smooth function smaller inputs or weight_var"
        )

    def _coefficients(self, s, terms):
        """Scale (N) and coefficients (N, terms + 1) of phi at standard deviations s
        (N); and what is left of it at the ends of the line, (N, 2)."""
        z, basis, root = _hermite_basis(terms)
        values = self._phi(s[:, None] * z)
        size = values.abs().amax(1)
        values = values / torch.where(size > 0, size, 1.0)[:, None] * root
        return size, values @ basis, values[:, [0, -1]].abs() > 1e-12

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


def _positive(s: Tensor) -> Tensor:
    """A row of zeros is the limit of small ones."""
    return s.clamp_min(1e-100)


def _hermite_basis(terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes (n), normalised Hermite functions (n, terms + 1), and the root of the
    weight times the step (n): for E phi h_k, multiply and sum.

    The step resolves the product of the two fastest functions."""
    step = math.pi / (2.2 * math.sqrt(terms))
    half = math.ceil(14 / step)
    z = torch.arange(-half, half + 1, dtype=torch.float64) * step
    root = torch.exp(-(z**2) / 4) / (2 * math.pi) ** 0.25
    h = torch.empty(terms + 1, len(z), dtype=torch.float64)
    h[0], h[1] = root, z * root
    for k in range(1, terms):
        h[k + 1] = (z * h[k] - k**0.5 * h[k - 1]) / (k + 1) ** 0.5
    return z, h.T * step, root


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
    names = ACTIVATIONS | {"leaky_relu": nn.LeakyReLU, "abs": torch.abs}
    phi = (
        names.get(activation, activation) if isinstance(activation, str) else activation
    )
    if isinstance(phi, type) and issubclass(phi, nn.Module):
        phi = phi()
    if isinstance(phi, Dual):
        return phi
    if not callable(phi):
        raise ValueError(
            f"activation={activation!r} is unknown; use one of {sorted(names)}, an"
            " elementwise module or function, or a kernels.Dual"
        )
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
