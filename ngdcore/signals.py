r"""Signals of a network: one forward sweep, and output weights swept back.

For N inputs and C outputs every trained layer has its inputs :math:`H_l` (N x M_in) and
the gradients of the outputs at its pre-activations :math:`D_l` (NC x M_out,
sample-major). Neither the Jacobian nor anything of its size is formed."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from .models import ELEMENTWISE

__all__ = ["Signals", "signals"]


@dataclass(frozen=True)
class Signals:
    r"""What one forward and one backward sweep leave at every trained layer; made by
    `signals`.

    Attributes
    ----------
    outputs : Tensor, (N, C)
        The network's outputs.
    H : list of Tensor, (N, M_in) each
        Inputs of each trained layer, with the parameterisation's factor; a trained bias
        is one more column.
    D : list of Tensor, (NC, M_out) each
        Gradient of every output at each trained layer's pre-activations, rows
        sample-major. Swept by `signals`, or when first asked for with
        ``signals(net, x, lazy=True)``.
    net : nn.Module
        The network the signals were taken from.

    Notes
    -----
    Row :math:`(n, c)` of layer l's Jacobian is :math:`D_l[nc] \otimes H_l[n]`. `jvp`
    and `vjp` use it without ever forming it.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> sig = ngd.signals(ngd.models.MLP([3, 4, 2], seed=0), torch.eye(3, dtype=torch.float64))
    >>> sig.n, sig.c, [tuple(D.shape) for D in sig.D]
    (3, 2, [(6, 4), (6, 2)])
    """

    net: nn.Module
    outputs: Tensor
    H: list[Tensor]
    layers: list[nn.Linear] = field(repr=False)
    versions: tuple[int, ...] = field(repr=False)
    sweep: Callable[[Tensor], list[Tensor]] = field(repr=False)
    linear: bool = False
    rows: int | None = None

    @property
    def n(self) -> int:
        """Number of samples N."""
        return self.outputs.shape[0]

    @property
    def c(self) -> int:
        """Number of rows of D a sample: outputs C, or the k rows of a weight R."""
        return self.rows or self.outputs.shape[1]

    @property
    def params(self) -> list[Tensor]:
        """The trained parameters, in the order of `vjp`'s result."""
        pairs = zip(self.layers, self.H)
        return [p for layer, H in pairs for p, _ in _trained(layer, H)]

    @cached_property
    def D(self) -> list[Tensor]:
        eye = torch.eye(self.c, dtype=self.outputs.dtype, device=self.outputs.device)
        return [
            E.reshape(self.n * self.c, -1)
            for E in self.pull(eye.expand(self.n, -1, -1))
        ]

    def pull(self, cotangents: Tensor) -> list[Tensor]:
        r"""Sweep output weights back to every trained layer's pre-activations, without
        forming D.

        Parameters
        ----------
        cotangents : Tensor, (N, k, C)
            k sets of output weights; one sample, (1, k, C), serves all where the net
            has no activations (``linear``).

        Returns
        -------
        list of Tensor, (N, k, M_out) each
            :math:`\sum_c v_{nkc} D_l[nc]`.

        Raises
        ------
        ValueError
            For another shape, or when the network's weights have changed since these
            signals were taken.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> sig = ngd.signals(ngd.models.MLP([3, 4, 2], seed=0), torch.eye(3, dtype=torch.float64), lazy=True)
        >>> [E.shape for E in sig.pull(torch.ones(3, 1, 2, dtype=torch.float64))]
        [torch.Size([3, 1, 4]), torch.Size([3, 1, 2])]
        """
        if (
            cotangents.ndim != 3
            or cotangents.shape[2] != self.c
            or len(cotangents) not in (self.n, 1 if self.linear else self.n)
        ):
            raise ValueError(
                f"cotangents must be (N, k, C) = ({self.n}, k, {self.c}), not {tuple(cotangents.shape)}"
            )
        self._check_versions()
        with torch.no_grad():
            return self.sweep(cotangents)

    def vjp(
        self, v: Tensor | list[Tensor], out: list[Tensor] | None = None
    ) -> list[Tensor]:
        r"""The pull-back :math:`\sum_l J_l^\top v_l`, one tensor a trained parameter:
        one matrix product a layer.

        Parameters
        ----------
        v : Tensor of shape (N, C) or (NC,), or one such tensor a trained layer
            Output-space weights; a single tensor serves every layer (then this is
            :math:`J^\top v`).
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
        return self.pack(list(zip(self.pulled(v), self.H)), out)

    def pulled(self, v: Tensor | list[Tensor]) -> list[Tensor]:
        r"""Output-space weights pulled back to every layer's units,
        :math:`\sum_c D_{nc} v_{nc}`, (N, M_out) each.

        ``v`` as for `vjp`, whose result is these times the layers' inputs.
        """
        weights = [v] * len(self.H) if isinstance(v, Tensor) else list(v)
        if len(weights) != len(self.H) or any(
            w.numel() != self.n * self.c for w in weights
        ):
            raise ValueError(
                f"v must hold N*C = {self.n * self.c} entries, one tensor or one a layer ({len(self.H)})"
            )
        if (
            isinstance(v, Tensor) and "D" not in self.__dict__
        ):  # one sweep of v is cheaper than all of D
            return [E[:, 0] for E in self.pull(v.reshape(self.n, 1, self.c))]
        return [
            torch.einsum(
                "ncm,nc->nm", D.view(self.n, self.c, -1), w.reshape(self.n, self.c)
            )
            for D, w in zip(self.D, weights)
        ]

    def weighted(self, R: Tensor) -> "Signals":
        r"""Signals of the outputs seen through R: :math:`D \leftarrow R D`, sample by
        sample.

        With :math:`R^\top R = \Lambda` the Fisher of the weighted signals is
        :math:`\frac1N J^\top \Lambda J`, as for cross-entropy with
        :math:`\Lambda = \mathrm{diag}(p) - p p^\top`; the residual to go with it is
        :math:`(R^\top)^+ g`. Directions are those of the network; `jvp` becomes R times
        its outputs' change.

        Parameters
        ----------
        R : Tensor, (N, k, C)

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> sig = ngd.signals(ngd.models.MLP([3, 4, 2], seed=0), torch.eye(3, dtype=torch.float64))
        >>> twice = sig.weighted(2 * torch.eye(2, dtype=torch.float64).expand(3, 2, 2))
        >>> torch.allclose(ngd.kernels.empirical(twice).gram(), 4 * ngd.kernels.empirical(sig).gram())
        True
        """
        if R.ndim != 3 or (len(R), R.shape[2]) != (self.n, self.c):
            raise ValueError(
                f"R must be (N, k, C) = ({self.n}, k, {self.c}), not {tuple(R.shape)}"
            )
        return replace(
            self, sweep=lambda v: self.sweep(v @ R), linear=False, rows=R.shape[1]
        )

    def pack(self, layers: list, out: list[Tensor] | None = None) -> list[Tensor]:
        r"""One tensor a trained parameter from one matrix a trained layer, with its
        biases as the last column.

        Parameters
        ----------
        layers : list
            For each trained layer a matrix (M_out, M_in), or a pair :math:`(E, H)` that
            stands for :math:`E^\top H`: (N, M_out) and (N, M_in). The product is
            written straight into place.
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
                place.copy_(columns) if left is None else torch.mm(
                    left.T, columns, out=place
                )
                result.append(target)
        return result

    def jvp(self, direction: list[Tensor]) -> Tensor:
        r"""The push-forward :math:`J\,d`: first-order change of the outputs, shape (N,
        C).

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
        params = [
            p for layer, H in zip(self.layers, self.H) for p, _ in _trained(layer, H)
        ]
        if [tuple(d.shape) for d in direction] != [tuple(p.shape) for p in params]:
            raise ValueError(
                f"direction must have the trained parameters' shapes {[tuple(p.shape) for p in params]}"
            )
        total, parts = self.outputs.new_zeros(self.n, self.c), iter(direction)
        for layer, H, D in zip(self.layers, self.H, self.D):
            change = sum(
                columns @ next(parts).reshape(-1, columns.shape[1]).T
                for _, columns in _trained(layer, H)
            )
            total += torch.einsum("ncm,nm->nc", D.view(self.n, self.c, -1), change)
        return total

    def at(self, x: Tensor) -> "Signals":
        """Signals of the same network at other inputs; raises if its weights have moved
        since these were taken.
        """
        self._check_versions()
        return signals(self.net, x)

    def _check_versions(self) -> None:
        if self.versions != _versions(self.net):
            raise ValueError(
                "the network's weights changed since these signals were taken; call signals(net, x) again"
            )


def signals(net: nn.Module, x: Tensor, lazy: bool = False) -> Signals:
    r"""One forward and one backward sweep: the inputs and output-gradients of every
    trained layer.

    Parameters
    ----------
    net : nn.Sequential
        Any (nested) ``Sequential`` of ``nn.Linear`` (or `ngdcore.models.Linear`) and
        elementwise activations. Layers whose parameters do not require gradients are
        passed through, not trained.
    x : Tensor, (N, d)
        Inputs, in the network's dtype and on its device.
    lazy : bool
        Leave the backward sweep of all C outputs until ``D`` is asked for, which must
        be before the weights change.

    Returns
    -------
    Signals
        N·(sum of M_in + C · sum of M_out) numbers; nothing of size N x P.

    Raises
    ------
    TypeError
        For a module that is neither linear nor elementwise.
    ValueError
        For inputs of a wrong shape, dtype or device, inputs that are not finite, or a
        net that trains nothing.

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
        raise ValueError(
            "net trains nothing: no nn.Linear in it has a parameter with requires_grad=True"
        )
    check_matrix("x", x, linear[0].in_features, linear[0].weight)
    with torch.no_grad():
        outputs, inputs, slopes = _forward(modules, x)
        H = [_columns(m, inputs[m]) for m in trained]
    sig = Signals(
        net,
        outputs,
        H,
        trained,
        _versions(net),
        partial(_backward, modules, trained, slopes),
        not slopes,
    )
    if not lazy:
        _ = sig.D
    return sig


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


def _backward(modules, trained, slopes, grad):
    """Pull output weights, (N, k, C), back to each trained layer's pre-activations: (N,
    k, M) each.
    """
    pulled = {}
    for position in reversed(range(len(modules))):
        m = modules[position]
        if not isinstance(m, nn.Linear):
            grad = grad * slopes[position][:, None, :]
            continue
        pulled[m] = grad
        if m is trained[0]:
            break
        scale = getattr(m, "weight_scale", 1.0)
        grad = (
            grad.flatten(0, 1) @ (m.weight if scale == 1.0 else scale * m.weight)
        ).view(*grad.shape[:2], -1)
    return [pulled[m] for m in trained]


def _columns(layer, h):
    """Inputs of a trained layer: scaled activations for a trained weight, one column
    for a trained bias.
    """
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
            raise TypeError(
                f"net holds {type(m).__name__}; signals know nn.Linear and elementwise activations only"
            )
    linear = [m for m in modules if isinstance(m, nn.Linear)]
    if len(set(map(id, linear))) < len(linear):
        raise TypeError(
            "net uses the same nn.Linear twice; its two Jacobians would have to be added, which is not done here"
        )
    return modules


def _versions(net) -> tuple[int, ...]:
    return tuple(p._version for p in net.parameters())


def check_matrix(name, x, columns, like) -> None:
    if (
        not isinstance(x, Tensor)
        or x.ndim != 2
        or x.shape[0] < 1
        or (columns is not None and x.shape[1] != columns)
    ):
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{name} must be a tensor of shape (N, {columns or 'd'}), not {shape}"
        )
    if like is not None and (x.dtype != like.dtype or x.device != like.device):
        raise ValueError(
            f"{name} is {x.dtype} on {x.device}, the network {like.dtype} on {like.device}; use {name}.to(...)"
        )
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} holds NaN or infinity; remove those rows first")
