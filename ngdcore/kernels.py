r"""Signals and factors: everything a natural gradient needs, without a Jacobian.

For a batch of N inputs and a network with C outputs, a trained layer l sees its inputs :math:`H_l` (N x M_in)
and the gradients of the outputs at its pre-activations, :math:`D_l` (NC x M_out, sample-major). With the *factors*
:math:`A_l = H_l H_l^\top` and :math:`B_l = D_l D_l^\top` the layer's Gram matrix is
:math:`K_l = (A_l \otimes 1_C 1_C^\top) \circ B_l`, and :math:`J J^\top = K = \sum_l K_l`. Infinitely wide networks
have no signals but the same factors, by recursion.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import models

__all__ = ["Signals", "signals", "Factors", "empirical", "analytic", "arc_cosine_gram"]

TILE = 256  # rows of NC a tile: small enough for the cache, large enough for GEMM at full speed

ELEMENTWISE = (
    nn.ReLU, nn.Tanh, nn.Identity, models.Erf, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU,
    nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.Hardtanh, nn.ReLU6, nn.LogSigmoid, nn.Mish, nn.Hardswish,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- signals


@dataclass(frozen=True)
class Signals:
    r"""What one forward and one backward sweep leave at every trained layer; made by `signals`.

    Attributes
    ----------
    outputs : Tensor, (N, C)
        The network's outputs.
    H : list of Tensor, (N, M_in) each
        Inputs of each trained layer, with the parameterisation's factor; a trained bias is one more column.
    D : list of Tensor, (NC, M_out) each
        Gradient of every output at each trained layer's pre-activations, rows sample-major.
    net : nn.Module
        The network the signals were taken from.

    Notes
    -----
    Row :math:`(n, c)` of layer l's Jacobian is :math:`D_l[nc] \otimes H_l[n]`. `jvp` and `vjp` use it without ever
    forming it.
    """

    net: nn.Module
    outputs: Tensor
    H: list[Tensor]
    D: list[Tensor]
    layers: list[nn.Linear] = field(repr=False)
    versions: tuple[int, ...] = field(repr=False)

    @property
    def n(self) -> int:
        """Number of samples N."""
        return self.outputs.shape[0]

    @property
    def c(self) -> int:
        """Number of outputs C."""
        return self.outputs.shape[1]

    def vjp(self, v: Tensor | list[Tensor], out: list[Tensor] | None = None) -> list[Tensor]:
        r"""The pull-back :math:`\sum_l J_l^\top v_l`, one tensor a trained parameter: one matrix product a layer.

        Parameters
        ----------
        v : Tensor of shape (N, C) or (NC,), or one such tensor a trained layer
            Output-space weights; a single tensor serves every layer (then this is :math:`J^\top v`).
        out : list of Tensor, optional
            Buffers to write to, shaped like the result.

        Returns
        -------
        list of Tensor
            In the order of the network's trained parameters.

        Raises
        ------
        ValueError
            If a weight vector does not have NC entries.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> net = ngd.models.MLP([3, 4, 1], seed=0)
        >>> sig = ngd.signals(net, torch.eye(3, dtype=torch.float64))
        >>> [g.shape for g in sig.vjp(torch.ones(3, 1, dtype=torch.float64))]
        [torch.Size([4, 3]), torch.Size([1, 4])]
        """
        weights = [v] * len(self.H) if isinstance(v, Tensor) else list(v)
        if len(weights) != len(self.H) or any(w.numel() != self.n * self.c for w in weights):
            raise ValueError(f"v must hold N*C = {self.n * self.c} entries, one tensor or one a layer ({len(self.H)})")
        pulled = [
            torch.einsum("ncm,nc->nm", D.view(self.n, self.c, -1), w.reshape(self.n, self.c))
            for D, w in zip(self.D, weights)
        ]
        return self.pack(list(zip(pulled, self.H)), out)

    def pack(self, layers: list, out: list[Tensor] | None = None) -> list[Tensor]:
        r"""One tensor a trained parameter from one matrix a trained layer, with its biases as the last column.

        Parameters
        ----------
        layers : list
            For each trained layer a matrix (M_out, M_in), or a pair :math:`(E, H)` that stands for
            :math:`E^\top H`: (N, M_out) and (N, M_in). The product is written straight into place.
        out : list of Tensor, optional
            Buffers to write to, shaped like the result.
        """
        result, slots = [], iter(out or [])
        for layer, given in zip(self.layers, layers):
            left, right = given if isinstance(given, tuple) else (None, given)
            for param, columns in _trained(layer, right):
                slot = next(slots, None)
                target = torch.empty_like(param) if slot is None else slot
                place = target.view(-1, columns.shape[1])
                place.copy_(columns) if left is None else torch.mm(left.T, columns, out=place)
                result.append(target)
        return result

    def jvp(self, direction: list[Tensor]) -> Tensor:
        r"""The push-forward :math:`J\,d`: first-order change of the outputs, shape (N, C).

        Parameters
        ----------
        direction : list of Tensor
            One tensor a trained parameter, as `vjp` and ``Fisher.direction`` return.

        Raises
        ------
        ValueError
            If the shapes are not those of the trained parameters.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> net = ngd.models.MLP([3, 4, 2], seed=0)
        >>> sig = ngd.signals(net, torch.eye(3, dtype=torch.float64))
        >>> d = sig.vjp(torch.ones(3, 2, dtype=torch.float64))
        >>> K = ngd.kernels.empirical(sig).gram()
        >>> torch.allclose(sig.jvp(d).flatten(), K.sum(1))
        True
        """
        params = [p for layer, H in zip(self.layers, self.H) for p, _ in _trained(layer, H)]
        if [tuple(d.shape) for d in direction] != [tuple(p.shape) for p in params]:
            raise ValueError(f"direction must have the trained parameters' shapes {[tuple(p.shape) for p in params]}")
        total, parts = torch.zeros_like(self.outputs), iter(direction)
        for layer, H, D in zip(self.layers, self.H, self.D):
            change = sum(columns @ next(parts).reshape(-1, columns.shape[1]).T for _, columns in _trained(layer, H))
            total += torch.einsum("ncm,nm->nc", D.view(self.n, self.c, -1), change)
        return total

    def at(self, x: Tensor) -> "Signals":
        """Signals of the same network at other inputs; raises if its weights have moved since these were taken."""
        if self.versions != _versions(self.net):
            raise ValueError("the network's weights changed since these signals were taken; call signals(net, x) again")
        return signals(self.net, x)


def signals(net: nn.Module, x: Tensor) -> Signals:
    r"""One forward and one backward sweep: the inputs and output-gradients of every trained layer.

    Parameters
    ----------
    net : nn.Sequential
        Any (nested) ``Sequential`` of ``nn.Linear`` (or `ngdcore.models.Linear`) and elementwise activations. Layers
        whose parameters do not require gradients are passed through, not trained.
    x : Tensor, (N, d)
        Inputs, in the network's dtype and on its device.

    Returns
    -------
    Signals
        N·(sum of M_in + C · sum of M_out) numbers; nothing of size N x P.

    Raises
    ------
    TypeError
        For a module that is neither linear nor elementwise.
    ValueError
        For inputs of a wrong shape, dtype or device, inputs that are not finite, or a net that trains nothing.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> sig = ngd.signals(ngd.models.MLP([3, 4, 2], seed=0), torch.eye(3, dtype=torch.float64))
    >>> sig.outputs.shape, [h.shape[1] for h in sig.H], [d.shape[0] for d in sig.D]
    (torch.Size([3, 2]), [3, 4], [6, 6])
    """
    modules = _flatten(net)
    linear = [m for m in modules if isinstance(m, nn.Linear)]
    trained = [m for m in linear if any(p.requires_grad for p in m.parameters())]
    if not trained:
        raise ValueError("net trains nothing: no nn.Linear in it has a parameter with requires_grad=True")
    _check_matrix("x", x, linear[0].in_features, linear[0].weight)
    with torch.no_grad():
        outputs, inputs, slopes = _forward(modules, x)
        D = _backward(modules, trained[0], slopes, outputs)
        H = [_columns(m, inputs[m]) for m in trained]
    return Signals(net, outputs, H, [D[m] for m in trained], trained, _versions(net))


def _forward(modules, x):
    """Outputs, every linear layer's input, every activation's slope."""
    h, inputs, slopes = x, {}, {}
    for position, m in enumerate(modules):
        if isinstance(m, nn.Linear):
            inputs[m] = h
            h = m(h)
        else:
            with torch.enable_grad():
                u = h.detach().requires_grad_()
                h = m(u)
                (slopes[position],) = torch.autograd.grad(h.sum(), u)
            h = h.detach()
    return h, inputs, slopes


def _backward(modules, first, slopes, outputs):
    """Gradients of all C outputs at each linear layer's pre-activations, down to the first trained one."""
    n, c = outputs.shape
    grad, D = torch.eye(c, dtype=outputs.dtype, device=outputs.device).expand(n, c, c), {}
    for position in reversed(range(len(modules))):
        m = modules[position]
        if not isinstance(m, nn.Linear):
            grad = grad * slopes[position][:, None, :]
            continue
        D[m] = grad.reshape(n * c, -1)
        if m is first:
            break
        scale = getattr(m, "weight_scale", 1.0)
        grad = (D[m] @ (m.weight if scale == 1.0 else scale * m.weight)).view(n, c, -1)
    return D


def _columns(layer, h):
    """Inputs of a trained layer: scaled activations for a trained weight, one column for a trained bias."""
    scale, parts = getattr(layer, "weight_scale", 1.0), []
    if layer.weight.requires_grad:
        parts.append(h if scale == 1.0 else scale * h)
    if layer.bias is not None and layer.bias.requires_grad:
        parts.append(h.new_full((h.shape[0], 1), getattr(layer, "bias_scale", 1.0)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _trained(layer, H):
    """Pairs (trained parameter, its columns of H)."""
    split = layer.in_features if layer.weight.requires_grad else 0
    if split:
        yield layer.weight, H[:, :split]
    if H.shape[1] > split:
        yield layer.bias, H[:, split:]


def _flatten(net) -> list[nn.Module]:
    if not isinstance(net, nn.Sequential):
        raise TypeError(
            f"net must be an nn.Sequential of nn.Linear and elementwise activations, not {type(net).__name__}"
        )
    modules = []
    for m in net:
        if isinstance(m, nn.Sequential):
            modules += _flatten(m)
        elif isinstance(m, (nn.Linear, *ELEMENTWISE)):
            modules.append(m)
        else:
            raise TypeError(f"net holds {type(m).__name__}; signals know nn.Linear and elementwise activations only")
    linear = [m for m in modules if isinstance(m, nn.Linear)]
    if len(set(map(id, linear))) < len(linear):
        raise TypeError(
            "net uses the same nn.Linear twice; its two Jacobians would have to be added, which is not done here"
        )
    return modules


def _versions(net) -> tuple[int, ...]:
    return tuple(p._version for p in net.parameters())


def _check_matrix(name, x, columns, like) -> None:
    if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[0] < 1 or (columns is not None and x.shape[1] != columns):
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor of shape (N, {columns or 'd'}), not {shape}")
    if like is not None and (x.dtype != like.dtype or x.device != like.device):
        raise ValueError(
            f"{name} is {x.dtype} on {x.device}, the network {like.dtype} on {like.device}; use {name}.to(...)"
        )
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} holds NaN or infinity; remove those rows first")


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


class _Analytic(Factors):
    """Factors of an infinitely wide network, by recursion over t = 1 - correlation (exact near coinciding inputs)."""

    def __init__(self, x, depth, activation, weight_var, bias_var, outputs, columns=None, train=None):
        super().__init__(len(x), len(x if columns is None else columns), outputs, depth, x, train)
        self._settings = (depth, activation, weight_var, bias_var, outputs)
        self._x, self._y = x, x if columns is None else columns
        self._rows, self._cols = _unit_rows(self._x), _unit_rows(self._y)

    def _tiles(self, rows, columns, layers):
        depth, activation, weight_var, bias_var, c = self._settings
        power, dual = DUALS[activation]
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
        _check_matrix("x", x, self._x.shape[1], self._x)
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
    activation: str = "relu",
    weight_var: float = 2.0,
    bias_var: float = 0.0,
    outputs: int = 1,
) -> Factors:
    r"""Factors of an infinitely wide network in the NTK parameterisation, in closed form.

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
    activation : {"relu", "erf", "identity"}
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
        For an activation without closed form, ``depth < 1``, bad inputs or variances, a row of zeros.

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
    _check_matrix("x", x, None, None)
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating dtype, not {x.dtype}")
    if activation not in DUALS:
        raise ValueError(f"activation={activation!r} has no closed form here; use one of {sorted(DUALS)}")
    if depth < 1 or outputs < 1:
        raise ValueError(f"depth={depth} and outputs={outputs} must be at least 1")
    if not (weight_var > 0 and bias_var >= 0):
        raise ValueError(f"weight_var={weight_var} must be positive and bias_var={bias_var} not negative")
    return _Analytic(x, depth, activation, float(weight_var), float(bias_var), outputs)


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
    _check_matrix("x", x, None, None)
    factors = analytic(x, 2, "relu")
    if other is not None:
        factors = analytic(other, 2, "relu").cross(x)
    # layer 1 of the two-layer net in NTK scaling is (2 x.x'/d) * 2 (pi - angle)/(2 pi), undone here
    return factors.layer(0) * (x.shape[1] / 4)
