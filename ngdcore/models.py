r"""Networks whose layers carry their parameterisation.

`MLP`, `TwoLayerReLU` and `DeepLinear` are ordinary `torch.nn.Sequential` modules made
of `Linear` and elementwise activations. `ngdcore.signals` takes these and many other
modules; nothing else in the package knows them by name."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = [
    "MLP",
    "TwoLayerReLU",
    "DeepLinear",
    "before_and_after",
    "Linear",
    "Erf",
    "ShiftedReLU",
    "Elementwise",
    "ACTIVATIONS",
]


class Erf(nn.Module):
    r"""The Gauss error function, :math:`\phi(u) = \mathrm{erf}(u)`, elementwise.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> ngd.models.Erf()(torch.zeros(2))
    tensor([0., 0.])
    """

    def forward(self, u: Tensor) -> Tensor:
        return torch.erf(u)


class ShiftedReLU(nn.Module):
    r"""A ReLU with a threshold, :math:`\phi(u) = \max(u - s, 0)`, elementwise.

    At pre-activation variance q a unit is active with probability
    :math:`\frac12(1 - \mathrm{erf}(s/\sqrt{2q}))`.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> ngd.models.ShiftedReLU(1.0)(torch.tensor([0.5, 3.0]))
    tensor([0., 2.])
    """

    def __init__(self, shift: float = 0.0):
        super().__init__()
        self.shift = float(shift)

    def forward(self, u: Tensor) -> Tensor:
        return torch.relu(u - self.shift)

    def extra_repr(self) -> str:
        return f"shift={self.shift:g}"


class Elementwise(nn.Module):
    r"""A function of one tensor as a module, :math:`\phi(u)`, elementwise.

    Parameters
    ----------
    function : callable
        Such as ``torch.sin``. One that has a name in its module pickles with the net.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> ngd.models.Elementwise(torch.abs)
    Elementwise(abs)
    """

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, u: Tensor) -> Tensor:
        return self.function(u)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "abs": partial(Elementwise, torch.abs),
    "tanh": nn.Tanh,
    "erf": Erf,
    "identity": nn.Identity,
}


class Linear(nn.Linear):
    r"""A linear layer with explicit scales, :math:`u = s_w\, h W^\top + s_b\, b`.

    ``nn.Linear`` with two constants in front. The NTK parameterisation keeps the
    weights standard normal and puts :math:`s_w = \sigma_w/\sqrt{M_{in}}`,
    :math:`s_b = \sigma_b`; the standard one has both equal to 1. Weights hold NaN until
    they are drawn: the network that owns the layer does it from its own generator, and
    who makes a layer by hand fills them (``nn.init``).

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    weight_scale, bias_scale : float
        :math:`s_w` and :math:`s_b`.

    Examples
    --------
    >>> layer = Linear(3, 2, bias=False, weight_scale=0.5)
    >>> layer.weight.shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        weight_scale=1.0,
        bias_scale=1.0,
        dtype=None,
        device=None,
    ):
        super().__init__(
            in_features, out_features, bias=bias, dtype=dtype, device=device
        )
        self.weight_scale, self.bias_scale = float(weight_scale), float(bias_scale)

    def reset_parameters(self) -> None:
        """Fill with NaN: drawing here would consume torch's global generator, and what
        is never drawn shows.
        """
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)

    def forward(self, h: Tensor) -> Tensor:
        u = self.weight_scale * (h @ self.weight.T)
        return u if self.bias is None else u + self.bias_scale * self.bias

    def extra_repr(self) -> str:
        scales = f"{self.weight_scale:.4g}, bias_scale={self.bias_scale:.4g}"
        return f"{super().extra_repr()}, weight_scale={scales}"


class MLP(nn.Sequential):
    r"""A fully connected network of any depth, widths, activation and number of
    outputs.

    :math:`u_l = s_w\,h_{l-1} W_l^\top + s_b\,b_l`, :math:`h_l = \phi(u_l)` for
    :math:`l < L`, output :math:`f = u_L` with :math:`C` = ``widths[-1]`` columns. With
    :math:`\sigma_w^2` = ``weight_var`` and :math:`\sigma_b^2` = ``bias_var``:

    * ``"ntk"``: :math:`W, b \sim N(0, 1)`, :math:`s_w = \sigma_w/\sqrt{M_{l-1}}`,
      :math:`s_b = \sigma_b`;
    * ``"standard"``: :math:`W \sim N(0, \sigma_w^2/M_{l-1})`,
      :math:`b \sim N(0, \sigma_b^2)`, scales 1.

    Both give the same function at the start and different gradients.

    Parameters
    ----------
    widths : sequence of int
        Input size, hidden widths, number of outputs: ``[784, 4096, 4096, 1]`` has three
        weight matrices.
    activation : str, nn.Module, class or callable
        Used after every hidden layer: a name ("relu", "leaky_relu", "abs", "tanh",
        "erf", "identity"), an elementwise module such as
        ``ShiftedReLU(0.5)`` (the same one everywhere), a class of such (``nn.GELU``),
        or a function (``torch.sin``).
    weight_var, bias_var : float
        :math:`\sigma_w^2 > 0` and :math:`\sigma_b^2 \ge 0`.
    parameterization : {"ntk", "standard"}
    bias : bool, optional
        Whether layers have biases; by default they do exactly when ``bias_var > 0``.
    seed : int
        Seed of the generator that draws every weight, on the CPU in float64: the same
        seed gives the same network (up to rounding) in every dtype and on every device.
    dtype : torch.dtype
        float64 unless asked.
    device : torch.device or str

    Raises
    ------
    ValueError
        For fewer than two widths, a width below 1, an unknown activation or
        parameterisation, a negative variance.

    Notes
    -----
    Karakida & Osawa (2020), eqs. 1-2, for the NTK parameterisation.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net = ngd.models.MLP([5, 8, 2], activation="tanh", seed=0)
    >>> net(torch.ones(3, 5, dtype=torch.float64)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: str | nn.Module | Callable = "relu",
        weight_var: float = 2.0,
        bias_var: float = 0.0,
        parameterization: str = "ntk",
        bias: bool | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ):
        widths, make = _check_widths(widths), activation_maker(activation)
        _check_law(parameterization, weight_var, bias_var)
        super().__init__()
        generator, ntk = _generator(seed), parameterization == "ntk"
        bias = bias_var > 0 if bias is None else bias
        for fan_in, fan_out in zip(widths, widths[1:]):
            spread, shift = math.sqrt(weight_var / fan_in), math.sqrt(bias_var)
            scales = dict(weight_scale=spread, bias_scale=shift) if ntk else {}
            layer = Linear(
                fan_in, fan_out, bias=bias, dtype=dtype, device=device, **scales
            )
            _draw(layer, generator, *((1.0, 1.0) if ntk else (spread, shift)))
            self.extend([layer] if len(self) == 0 else [make(), layer])


def _check_law(parameterization, weight_var, bias_var) -> None:
    """Raise for a parameterisation or variances that do not exist."""
    if parameterization not in ("ntk", "standard"):
        raise ValueError(
            f"parameterization={parameterization!r} is unknown; use 'ntk' or 'standard'"
        )
    if not (weight_var > 0 and bias_var >= 0):
        raise ValueError(
            f"weight_var={weight_var} must be positive and bias_var={bias_var} "
            "not negative"
        )


class TwoLayerReLU(nn.Sequential):
    r"""The two-layer ReLU network of Zhang et al.: only the first layer is trained.

    :math:`f(x) = \frac1{\sqrt m}\sum_{r=1}^m a_r\,\mathrm{relu}(w_r^\top x)`, with
    :math:`w_r \sim N(0, \nu^2 I_d)` trained and :math:`a_r = \pm 1` (fair coin) frozen.

    Parameters
    ----------
    d, width : int
        Input size and number of hidden units :math:`m`.
    nu : float
        Standard deviation of the first layer's weights.
    seed : int
        Seed of the generator that draws :math:`w`, then :math:`a`.
    dtype, device :
        As for `MLP`.

    Raises
    ------
    ValueError
        For a size below 1 or ``nu`` not positive.

    Notes
    -----
    Zhang, Martens & Grosse (2019), eq. 8. The output weights are stored as :math:`a_r`
    behind a scale :math:`1/\sqrt m`, with ``requires_grad=False``: `signals` skips
    frozen layers.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net = ngd.models.TwoLayerReLU(d=4, width=16, seed=0)
    >>> [p.shape for p in net.parameters() if p.requires_grad]
    [torch.Size([16, 4])]
    """

    def __init__(
        self,
        d: int,
        width: int,
        nu: float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ):
        d, width = _check_widths([d, width])
        if not nu > 0:
            raise ValueError(
                f"nu={nu} must be positive: it is the standard deviation of the first "
                "layer's weights"
            )
        generator = _generator(seed)
        kind = dict(bias=False, dtype=dtype, device=device)
        first = Linear(d, width, **kind)
        _fill(first.weight, nu * _normal((width, d), generator))
        last = Linear(width, 1, weight_scale=1 / math.sqrt(width), **kind)
        coins = torch.randint(0, 2, (1, width), generator=generator)
        _fill(last.weight, 2.0 * coins - 1.0)
        last.weight.requires_grad_(False)
        super().__init__(first, nn.ReLU(), last)


class DeepLinear(nn.Sequential):
    r"""A deep linear network, :math:`f(x) = W_L \cdots W_1 x`, without biases.

    Parameters
    ----------
    widths : sequence of int
        :math:`n_0, \dots, n_L`; ``[20] * 17`` has 16 weight matrices.
    init : {"orthogonal", "gaussian", "glorot", "uniform"}
        ``"orthogonal"``: (semi-)orthogonal matrices, Haar distributed; ``"gaussian"``:
        entries :math:`N(0, 1/n_{l-1})`; ``"glorot"``: :math:`N(0, 2/(n_{l-1} + n_l))`;
        ``"uniform"``: uniform on :math:`\pm 1/\sqrt{n_{l-1}}`, as ``torch.nn.Linear``
        starts.
    gain : float
        Factor in front of every matrix.
    seed, dtype, device :
        As for `MLP`.

    Raises
    ------
    ValueError
        For bad widths or an unknown ``init``.

    Notes
    -----
    Bernacchia, Lengyel & Hennequin (2018), section 2.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net = ngd.models.DeepLinear([3] * 5, seed=0)
    >>> total = net.map()
    >>> torch.allclose(total @ total.T, torch.eye(3, dtype=torch.float64))
    True
    >>> torch.allclose(net.after(1) @ net[1].weight @ net.before(1), total)
    True
    """

    def __init__(
        self,
        widths: Sequence[int],
        init: str = "orthogonal",
        gain: float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ):
        widths = _check_widths(widths)
        if init not in LAWS:
            raise ValueError(f"init={init!r} is unknown; use one of {sorted(LAWS)}")
        super().__init__()
        generator = _generator(seed)
        for fan_in, fan_out in zip(widths, widths[1:]):
            layer = Linear(fan_in, fan_out, bias=False, dtype=dtype, device=device)
            _fill(layer.weight, gain * LAWS[init](fan_in, fan_out, generator))
            self.append(layer)

    def before(self, i: int) -> Float[Tensor, "n_in n_0"]:
        r"""What comes before layer i (from 0), :math:`W_{i-1} \cdots W_0`: its shape is
        (inputs of layer i) x (inputs of the net), the identity for the first layer.
        Detached, as are `after` and `map`.
        """
        return self._product(0, self._index(i))

    def after(self, i: int) -> Float[Tensor, "n_L n_out"]:
        r"""What comes after layer i, :math:`W_{L-1} \cdots W_{i+1}`: (outputs of the
        net) x (outputs of layer i), the identity for the last layer.
        """
        return self._product(self._index(i) + 1, len(self))

    def map(self) -> Float[Tensor, "n_L n_0"]:
        r"""The linear map that the net computes, :math:`W_{L-1} \cdots W_0`."""
        return self._product(0, len(self))

    def _product(self, start: int, stop: int) -> Tensor:
        """Weights of layers start to stop - 1 multiplied, from the net's input side."""
        weights = [layer.weight.detach() for layer in self]
        size = weights[start].shape[1] if start < len(self) else weights[-1].shape[0]
        total = torch.eye(size, dtype=weights[0].dtype, device=weights[0].device)
        for W in weights[start:stop]:
            total = W @ total
        return total

    def _index(self, i: int) -> int:
        """The layer's number from 0; raises for one that does not exist."""
        if not -len(self) <= i < len(self):
            raise ValueError(
                f"layer {i} does not exist; this net has {len(self)}, counted from 0"
            )
        return i % len(self)


def _orthogonal(fan_in: int, fan_out: int, generator) -> Tensor:
    return nn.init.orthogonal_(
        torch.empty(fan_out, fan_in, dtype=torch.float64), generator=generator
    )


def _gaussian(fan_in: int, fan_out: int, generator) -> Tensor:
    return _normal((fan_out, fan_in), generator) / math.sqrt(fan_in)


def _glorot(fan_in: int, fan_out: int, generator) -> Tensor:
    return math.sqrt(2 / (fan_in + fan_out)) * _normal((fan_out, fan_in), generator)


def _uniform(fan_in: int, fan_out: int, generator) -> Tensor:
    unit = torch.rand((fan_out, fan_in), generator=generator, dtype=torch.float64)
    return (2 * unit - 1) / math.sqrt(fan_in)


LAWS = {
    "orthogonal": _orthogonal,
    "gaussian": _gaussian,
    "glorot": _glorot,
    "uniform": _uniform,
}


def before_and_after(
    weights: Sequence[Tensor | np.ndarray],
) -> tuple[list[Tensor | np.ndarray], list[Tensor | np.ndarray]]:
    r"""What a deep linear network does before and after each of its layers,
    :math:`A_i = W_{i-1} \cdots W_1` and :math:`B_i = W_L \cdots W_{i+1}`: the map is
    :math:`W = B_i W_i A_i` for every i.

    Parameters
    ----------
    weights : sequence of Tensor or of numpy.ndarray
        :math:`W_1, \dots, W_L`, of shapes :math:`(n_i, n_{i-1})`: tensors that need no
        network around them, as along a flow, and that derivatives may pass through. For
        those of a network see `DeepLinear.before` and `DeepLinear.after`.

    Returns
    -------
    A : list
        :math:`A_i` of shape :math:`(n_{i-1}, n_0)`; :math:`A_1 = I`.
    B : list
        :math:`B_i` of shape :math:`(n_L, n_i)`; :math:`B_L = I`.

    Raises
    ------
    ValueError
        For no weights, or shapes that do not follow one another.

    Notes
    -----
    Bernacchia, Lengyel & Hennequin (2018), eqs. 14-16; 2L - 2 products of matrices. The
    loss has the negative gradient :math:`G_i = B_i^\top R \Sigma A_i^\top`, and the map
    moves by :math:`\dot W = \sum_i B_i \dot W_i A_i`.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> W = [torch.ones(3, 2), torch.ones(4, 3), torch.ones(1, 4)]
    >>> A, B = ngd.models.before_and_after(W)
    >>> [tuple(a.shape) for a in A], [tuple(b.shape) for b in B]
    ([(2, 2), (3, 2), (4, 2)], [(1, 3), (1, 4), (1, 1)])
    >>> [(b @ w @ a).tolist() for a, b, w in zip(A, B, W)]
    [[[12.0, 12.0]], [[12.0, 12.0]], [[12.0, 12.0]]]
    """
    shapes = [tuple(w.shape) for w in weights]
    if not shapes or any(b[1:] != a[:1] for a, b in zip(shapes, shapes[1:])):
        raise ValueError(
            f"weights of shapes {shapes} do not follow one another; give W_1, ..., W_L,"
            " of shapes (n_i, n_(i-1))"
        )
    A, B = [_identity(weights[0], 1)], [_identity(weights[-1], 0)]
    for w in weights[:-1]:
        A.append(w @ A[-1])
    for w in weights[:0:-1]:
        B.insert(0, B[0] @ w)
    return A, B


def _identity(w: Tensor | np.ndarray, side: int) -> Tensor | np.ndarray:
    """The identity on one side of a matrix, of its kind."""
    if isinstance(w, np.ndarray):
        return np.eye(w.shape[side], dtype=w.dtype)
    return torch.eye(w.shape[side], dtype=w.dtype, device=w.device)


def activation_maker(activation) -> Callable[[], nn.Module]:
    """What makes an activation module, from a name, a module, a class or a function."""
    if isinstance(activation, nn.Module):
        return lambda: activation
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        return activation
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    if callable(activation):
        return lambda: Elementwise(activation)
    raise ValueError(
        f"activation={activation!r} is unknown; use one of {sorted(ACTIVATIONS)}, a "
        "module, a class of one (nn.GELU) or a function (torch.sin)"
    )


def _check_widths(widths) -> list[int]:
    """Two or more whole numbers from 1 on, as ints."""
    widths = list(widths)
    if len(widths) < 2 or any(not isinstance(w, Integral) or w < 1 for w in widths):
        raise ValueError(
            f"widths={widths} must hold at least two whole numbers of 1 or more "
            "(input, ..., output)"
        )
    return [int(w) for w in widths]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _normal(shape, generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _draw(layer, generator, spread: float, shift: float) -> None:
    """Normal weights and biases with these standard deviations."""
    _fill(layer.weight, _normal(layer.weight.shape, generator).mul_(spread))
    if layer.bias is not None:
        _fill(layer.bias, _normal(layer.bias.shape, generator) * shift)


def _fill(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)
