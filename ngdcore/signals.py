r"""Signals of a network: one forward sweep, and output weights swept back.

For N inputs and C outputs every trained layer has its inputs :math:`H_l` (N x M_in) and
the gradients of the outputs at its pre-activations :math:`D_l` (NC x M_out,
sample-major). Neither the Jacobian nor anything of its size is formed.

The network is any module: its own forward is run, hooks note what goes in and out of
each trained linear layer, and autograd pulls output weights back. Row (n, c) of the
Jacobian is :math:`D_l[nc] \otimes H_l[n]` only where every trained weight is used in
one plain call of its layer and samples do not see one another. Guards look for what is
known to break this, at every sweep; the belt (`_verify`) compares what the signals say
with autograd's own gradient, and raises where they differ."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .models import Linear

__all__ = ["Signals", "signals"]

CHUNK = 2**21  # numbers a layer swept back at once: memory is reused, not faulted in
PROBE = 16  # rows that are run through the net once more, on their own
LOOSE = 1e-2  # another batch size rounds otherwise, and a jump may fall elsewhere
SAMPLE = 2**14  # entries of a parameter that are remembered, against edits via .data
PASSING = {
    module.forward
    for module in (nn.Linear, Linear, nn.Sequential, nn.Identity, nn.Flatten)
}  # where nothing else is in a net, output-gradients are the same for every sample
CONSTANTS = (bool, int, float, complex, str)  # settings of modules that are compared
FREEZE = "freeze the layer: requires_grad_(False)"


@dataclass(frozen=True, repr=False)
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
        The network the signals were taken from, without a wrapper such as
        ``DataParallel``.
    layers : list of nn.Linear
        Its trained layers, in the order of ``net.modules()``.
    n, c : int
        Samples N and outputs C. Weighted signals have as many outputs as R has rows.
    linear : bool
        Whether every sample has the same output-gradients, because the net consists of
        linear layers alone; then `first` is enough.

    Notes
    -----
    Row :math:`(n, c)` of layer l's Jacobian is :math:`D_l[nc] \otimes H_l[n]`. `jvp`
    and `vjp` use it without ever forming it.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net = ngd.models.MLP([3, 4, 2], seed=0)
    >>> sig = ngd.signals(net, torch.eye(3, dtype=torch.float64))
    >>> sig
    Signals(N=3, C=2, layers=2, torch.float64)
    >>> [tuple(D.shape) for D in sig.D]
    [(6, 4), (6, 2)]
    """

    net: nn.Module
    outputs: Float[Tensor, "N C"]
    H: list[Float[Tensor, "N _M_in"]]
    layers: list[nn.Linear]
    c: int
    linear: bool = False
    trained: list[list[nn.Parameter]] = field(default_factory=list)
    marks: tuple | None = field(default=None)
    row: Tensor | None = field(default=None)
    sweep: Callable[[Tensor], list[Tensor]] | None = field(default=None)

    def __repr__(self) -> str:
        lazy = "" if "D" in vars(self) else ", lazy"
        return (
            f"Signals(N={self.n}, C={self.c}, layers={len(self.H)}, "
            f"{self.outputs.dtype}{lazy})"
        )

    def __getstate__(self) -> dict:
        """What pickle and deepcopy take: a graph cannot travel, so D is formed."""
        _ = self.D
        fresh = _same(self.marks, _marks(_survey(self.net)))
        return vars(self) | {"sweep": None, "marks": self.marks if fresh else None}

    def __setstate__(self, state: dict) -> None:
        """A copy's weights lie elsewhere: new marks, unless they were stale."""
        vars(self).update(state)
        if self.marks is not None:
            vars(self)["marks"] = _marks(_survey(self.net), self.marks[2])

    @property
    def n(self) -> int:
        """Number of samples N."""
        return self.outputs.shape[0]

    @property
    def params(self) -> list[nn.Parameter]:
        """The trained parameters, in the order of `vjp`: layer by layer, the weight
        before the bias.
        """
        return [param for params in self.trained for param in params]

    @cached_property
    def D(self) -> list[Float[Tensor, "NC _M_out"]]:
        eye = torch.eye(self.c, dtype=self.outputs.dtype, device=self.outputs.device)
        pulled = self.pull(eye.expand(self.n, -1, -1))
        object.__setattr__(self, "sweep", None)  # its graph is not needed any more
        return [E.reshape(self.n * self.c, -1) for E in pulled]

    @cached_property
    def first(self) -> "Signals":
        """Signals of the first row alone: for a ``linear`` net they hold every sample's
        output-gradients, in 1/N of the room.
        """
        if self.row is None:
            raise ValueError(
                "only a net of linear layers has the same output-gradients everywhere; "
                "use D, whose rows are per sample"
            )
        self.check()
        return signals(self.net, self.row)

    def pull(self, cotangents: Tensor) -> list[Tensor]:
        r"""Sweep output weights back to every trained layer's pre-activations, without
        forming D (and from D where it is there already).

        Parameters
        ----------
        cotangents : Tensor, (N, k, C)
            k sets of output weights; one sample, (1, k, C), serves all where the net
            is ``linear``.

        Returns
        -------
        list of Tensor, (N, k, M_out) each
            :math:`\sum_c v_{nkc} D_l[nc]`.

        Raises
        ------
        ValueError
            For another shape, or when the network's weights have changed since these
            signals were taken and D was not formed before.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> net = ngd.models.MLP([3, 4, 2], seed=0)
        >>> sig = ngd.signals(net, torch.eye(3, dtype=torch.float64), lazy=True)
        >>> [E.shape for E in sig.pull(torch.ones(3, 1, 2, dtype=torch.float64))]
        [torch.Size([3, 1, 4]), torch.Size([3, 1, 2])]
        """
        shape = tuple(cotangents.shape)
        if self.linear and shape[:1] == (1,) and self.n > 1:
            return self.first.pull(cotangents)
        if cotangents.ndim != 3 or (shape[0], shape[2]) != (self.n, self.c):
            raise ValueError(
                f"cotangents must be (N, k, C) = ({self.n}, k, {self.c}), not {shape}"
            )
        _check_values("cotangents", cotangents, self.outputs)
        if "D" in vars(self):
            return [cotangents @ D.view(self.n, self.c, -1) for D in self.D]
        self.check()
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
            In the order of `params`.

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

    def pulled(self, v: Tensor | list[Tensor]) -> list[Float[Tensor, "N _M_out"]]:
        r"""Output-space weights pulled back to every layer's units,
        :math:`\sum_c D_{nc} v_{nc}`, (N, M_out) each.

        ``v`` as for `vjp`, whose result is these times the layers' inputs.
        """
        weights = [v] * len(self.H) if isinstance(v, Tensor) else list(v)
        if len(weights) != len(self.H):
            raise ValueError(
                f"v must be one tensor or one a trained layer ({len(self.H)}), not "
                f"{len(weights)}"
            )
        for w in weights:
            check_residual("v", w, self)
        if isinstance(v, Tensor) and "D" not in vars(self):
            # one sweep of v is cheaper than all of D
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
        its outputs' change. ``outputs`` stay the network's; ``c`` becomes k.

        Parameters
        ----------
        R : Tensor, (N, k, C) with k <= C

        Raises
        ------
        ValueError
            For another shape.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> net = ngd.models.MLP([3, 4, 2], seed=0)
        >>> sig = ngd.signals(net, torch.eye(3, dtype=torch.float64))
        >>> twice = sig.weighted(2 * torch.eye(2, dtype=torch.float64).expand(3, 2, 2))
        >>> K = ngd.kernels.empirical(sig).gram()
        >>> torch.allclose(ngd.kernels.empirical(twice).gram(), 4 * K)
        True
        """
        shape = tuple(R.shape)
        fits = R.ndim == 3 and (shape[0], shape[2]) == (self.n, self.c)
        if not fits or not 1 <= shape[1] <= self.c:
            raise ValueError(
                f"R must be (N, k, C) = ({self.n}, k, {self.c}) with k <= C, "
                f"not {shape}"
            )
        _check_values("R", R, self.outputs)
        through = partial(_through, self, R)
        return replace(self, c=shape[1], linear=False, row=None, sweep=through)

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
        _check_buffers(out, self.params)
        for params, given in zip(self.trained, layers):
            left, right = given if isinstance(given, tuple) else (None, given)
            for param, columns in _split(params, right):
                slot = next(slots, None)
                target = torch.empty_like(param) if slot is None else slot
                place = target.view(-1, columns.shape[1])
                if left is None:
                    place.copy_(columns)
                else:
                    torch.mm(left.T, columns, out=place)
                result.append(target)
        return result

    def jvp(self, direction: list[Tensor]) -> Float[Tensor, "N C"]:
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
        shapes = [tuple(param.shape) for param in self.params]
        if [tuple(d.shape) for d in direction] != shapes:
            raise ValueError(
                f"direction must have the trained parameters' shapes {shapes}"
            )
        for d in direction:
            _check_like("direction", d, self.outputs)
        total, parts = self.outputs.new_zeros(self.n, self.c), iter(direction)
        for params, H, D in zip(self.trained, self.H, self.D):
            change = sum(
                columns @ next(parts).reshape(-1, columns.shape[1]).T
                for _, columns in _split(params, H)
            )
            total += torch.einsum("ncm,nm->nc", D.view(self.n, self.c, -1), change)
        return total

    def at(self, x: Tensor) -> "Signals":
        """Signals of the same network at other inputs; raises if its weights have moved
        since these were taken.
        """
        self.check()
        return signals(self.net, x)

    def check(self) -> None:
        """Raise a ValueError when the network's weights, buffers or settings have
        changed since these signals were taken, also by edits through ``.data`` (which
        show in a parameter's sum, or in the up to 16384 entries that are compared).
        """
        _check_mode()
        if not _same(self.marks, _marks(_survey(self.net))):
            raise ValueError(
                "the network's weights changed since these signals were taken; "
                "call signals(net, x) again"
            )

    def matches(self, other: "Signals") -> None:
        """Raise a ValueError when other signals are not of the same network with the
        same weights, or are weighted to another number of outputs.
        """
        if list(map(id, self.params)) != list(map(id, other.params)):
            raise ValueError(
                "these signals belong to two networks (or two sets of trained "
                "parameters); take both from one net"
            )
        if not _same(self.marks, other.marks):
            raise ValueError(
                "the network's weights changed between these signals; "
                "take both with the same weights"
            )
        if self.c != other.c:
            raise ValueError(
                f"one of these signals has {self.c} outputs a sample, the other "
                f"{other.c}; weight both in the same way"
            )


def signals(net: nn.Module, x: Tensor, lazy: bool = False) -> Signals:
    r"""One forward and one backward sweep: the inputs and output-gradients of every
    trained layer.

    Parameters
    ----------
    net : nn.Module
        Any module whose trained parameters are exactly the weights and biases of
        ``nn.Linear`` (or `ngdcore.models.Linear`) layers, each called once, on (N, M)
        inputs, with samples independent of one another. What lies between (activations,
        skip connections, frozen parts) is the module's own. Nets out of
        ``torch.compile`` and ``DataParallel`` are unwrapped.
    x : Tensor, (N, ...)
        Inputs, one row a sample, in the network's dtype and on its device.
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
        For a net whose signals would not give its Jacobian: tied weights, a layer
        called twice or never, trained parameters outside linear layers, linear layers
        that are parametrised, hooked or have a forward of their own, more than two
        dimensions at a layer, samples that see one another (BatchNorm in training
        mode), a random forward.
    ValueError
        For inputs of a wrong shape, dtype or device, inputs or outputs that are not
        finite, a net that trains nothing, inference mode or autocast.

    Notes
    -----
    The first sweep of a net (and the first after its modules, their modes or its
    trained set changed, and sweeps 2, 4, 8, ... of it) takes a little more. One
    backward pass, or two, checks that output-gradients are each sample's own and linear
    in what is pulled back. A few rows are run on their own: the weights' gradient for
    random output weights, formed as from H and D, is compared with autograd's own; and
    half of these rows must not notice that the other half is overwritten.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net = ngd.models.MLP([3, 4, 2], seed=0)
    >>> sig = ngd.signals(net, torch.eye(3, dtype=torch.float64))
    >>> sig.outputs.shape, [h.shape[1] for h in sig.H], [d.shape[0] for d in sig.D]
    (torch.Size([3, 2]), [3, 4], [6, 6])
    """
    parts = _survey(unwrap(net))
    layers = _trained_layers(parts)
    x = _check_inputs(parts, x)
    x = x.clone() if lazy else x  # the sweep to come may read it
    before = _settings(parts)
    outputs, inputs, edges = run = _forward(parts, layers, x)
    linear = all(_keeps_gradients(module) for _, module in parts.modules)
    sig = Signals(
        parts.net,
        outputs.detach().clone(),
        [_columns(layer, h) for layer, h in zip(layers, inputs)],
        list(layers),
        outputs.shape[1],
        linear,
        [_trained(layer) for layer in layers],
        _marks(parts, before),
        x[:1].clone() if linear else None,
        partial(_pull, outputs, edges, layers),
    )
    if not lazy:
        _ = sig.D
    _verify(sig, parts, layers, x, run)
    return sig


# ------------------------------------------------------------- one sweep each way


def _forward(parts, names, x, copy=False) -> tuple[Tensor, list, list]:
    """The net's own forward: outputs (N, C) with their graph and, a trained layer, its
    input (N, M_in) and the edge of its pre-activations in the graph.

    An edge stays what it is when an activation overwrites the tensor in place. An input
    that is overwritten after its layer was called shows in its version; then a second
    run gives layers copies of their inputs.
    """
    taken, written, drawn = {}, _versions(parts, x), _random_state(x)
    with _noted(names, taken, x, copy), _eager(parts), torch.enable_grad():
        outputs = parts.net(x)
    for layer, name in names.items():
        if layer not in taken:
            raise TypeError(
                f"{name} is trained and never called in net's forward; {FREEZE}"
            )
    if not torch.equal(drawn, _random_state(x)):
        raise TypeError(
            "net's forward is random: it draws from torch's generator; call net.eval()"
        )
    for name, version in _versions(parts, x).items():
        if version != written[name]:
            raise TypeError(
                f"net's forward writes to {name}, so that two runs differ; put net "
                "into eval mode, or write to a copy there"
            )
    if not copy and any(h._version != version for h, version, _ in taken.values()):
        return _forward(parts, names, x, copy=True)
    _check_outputs(parts, outputs, x)
    inputs, _, edges = zip(*(taken[layer] for layer in names))
    inputs = [h.detach() for h in inputs]
    _check_finite("the input of", names, inputs, "what comes before")
    return outputs, inputs, list(edges)


@contextmanager
def _noted(names, taken, x, copy):
    """Hooks that note what goes into and comes out of the trained layers, in ``taken``;
    they are gone afterwards, whatever happens.
    """

    def before(layer, args, kwargs):
        (h,) = (*args, *kwargs.values())
        if layer in taken:
            raise TypeError(
                f"{names[layer]} is called twice in one forward; its two Jacobians "
                "would have to be added: use two layers"
            )
        _check_layer_input(names[layer], layer, h, x)
        return ((h.clone(),), {}) if copy else None

    def after(layer, args, kwargs, u):
        (h,) = (*args, *kwargs.values())
        if not u.requires_grad or u.dtype != layer.weight.dtype:
            raise TypeError(
                f"{names[layer]} runs under no_grad or autocast inside net's forward; "
                f"take it out of there, or {FREEZE}"
            )
        taken[layer] = h, h._version, get_gradient_edge(u)

    hooks = []
    for layer in names:
        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pull(
    outputs: Float[Tensor, "N C"],
    edges: list[GradientEdge],
    names: dict[nn.Linear, str],
    cotangents: Float[Tensor, "N k C"],
) -> list[Tensor]:
    """Output weights swept back to every layer's pre-activations, (N, k, M_out) each:
    one batched backward pass for as many of the k sets as CHUNK numbers a layer hold.
    """
    n, k, _ = cotangents.shape
    if k == 1:
        grads = _gradients(outputs, edges, names, cotangents[:, 0])
        return [E[:, None] for E in grads]
    widths = [layer.weight.shape[0] for layer in names]
    step = max(1, CHUNK // (n * max(widths)))
    pulled = [cotangents.new_empty(n, k, width) for width in widths]
    for start in range(0, k, step):
        part = slice(start, start + step)
        sets = cotangents[:, part].transpose(0, 1)
        for E, chunk in zip(pulled, _gradients(outputs, edges, names, sets)):
            E[:, part] = chunk.transpose(0, 1)
    return pulled


def _gradients(outputs, edges, names, v) -> tuple[Tensor, ...]:
    """Autograd's pull-back of v, (N, C) or k of them (k, N, C), to every edge; raises
    where the outputs do not depend on a layer.
    """
    grad = partial(torch.autograd.grad, retain_graph=True, allow_unused=True)
    if v.ndim == 3:
        grads = grad(outputs, edges, v, is_grads_batched=True)
    else:  # of a scalar: torch takes a second to import what looks at given gradients
        with torch.enable_grad():
            grads = grad((outputs * v).sum(), edges)
    for name, grad in zip(names.values(), grads):
        if grad is None:
            raise TypeError(
                f"net's outputs do not depend on {name} (unused or detached); {FREEZE}"
            )
    _check_finite(
        "the gradient of net's outputs at", names, grads, "its pre-activation"
    )
    return grads


def _through(sig: Signals, R: Tensor, cotangents: Tensor) -> list[Tensor]:
    """The sweep of weighted signals: (N, k', k) weights through R (N, k, C)."""
    return sig.pull(cotangents @ R)


def _columns(layer, h: Float[Tensor, "N M"]) -> Float[Tensor, "N M_in"]:
    """Inputs of a trained layer: scaled activations for a trained weight, one column
    for a trained bias; never memory of the caller's or the net's, which may be used
    again.
    """
    scale, shift = _scales(layer)
    parts = []
    if layer.weight.requires_grad:
        parts.append(h if scale == 1.0 else scale * h)
    if layer.bias is not None and layer.bias.requires_grad:
        parts.append(h.new_full((h.shape[0], 1), shift))
    H = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return H.clone() if H is h else H


def _keeps_gradients(module) -> bool:
    """Whether a module is one of those that make up linear nets."""
    kind, hooks = type(module), module._forward_hooks or module._forward_pre_hooks
    plain = kind.forward in PASSING and kind.__call__ is nn.Module.__call__
    return plain and "forward" not in vars(module) and not hooks


def _scales(layer) -> tuple[float, float]:
    """The constants in front of weight and bias."""
    if isinstance(layer, Linear):
        return layer.weight_scale, layer.bias_scale
    return 1.0, 1.0


def _trained(layer) -> list[nn.Parameter]:
    """Those of a layer's weight and bias that are trained now."""
    both = [layer.weight, layer.bias]
    return [param for param in both if param is not None and param.requires_grad]


def _split(params, H) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Pairs (trained parameter of a layer, its columns of H)."""
    widths = [param.shape[1] if param.ndim == 2 else 1 for param in params]
    return zip(params, H.split(widths, 1))


# --------------------------------------------------------------------- the guards


class _Parts(NamedTuple):
    """A net taken apart once: modules, parameters and buffers with dotted names."""

    net: nn.Module
    modules: list[tuple[str, nn.Module]]
    params: list[tuple[str, nn.Parameter]]
    buffers: list[tuple[str, Tensor]]


def trained_layers(net: nn.Module) -> dict[nn.Linear, str]:
    """The trained layers of a net, with their dotted names; raises what `signals` would
    raise for its structure.
    """
    return _trained_layers(_survey(unwrap(net)))


def _survey(net) -> _Parts:
    """All parts of a net; a tied parameter is listed under each of its names."""
    modules = [(name or "net", module) for name, module in net.named_modules()]
    params, buffers = (
        [
            (f"{name}.{key}", tensor)
            for name, module in modules
            for key, tensor in getattr(module, kind).items()
            if tensor is not None
        ]
        for kind in ("_parameters", "_buffers")
    )
    return _Parts(net, modules, params, buffers)


def unwrap(net) -> nn.Module:
    """The module inside torch.compile's or a data-parallel wrapper."""
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"net must be an nn.Module, not {type(net).__name__}; call signals(net, x)"
        )
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if type(net).__name__ == "OptimizedModule":
            net = net._orig_mod
        elif isinstance(net, parallel):
            net = net.module
        else:
            return net


@contextmanager
def _eager(parts):
    """Compiled parts run as they are written, since compiled ones call no hooks."""
    compiled = any(
        type(module).__name__ == "OptimizedModule"
        or module._compiled_call_impl is not None
        for _, module in parts.modules
    )
    if not compiled:
        yield
        return
    if not hasattr(torch.compiler, "set_stance"):
        raise TypeError("net is compiled in parts; hand over the net as it was before")
    with torch.compiler.set_stance("force_eager"):
        yield


def _trained_layers(parts) -> dict[nn.Linear, str]:
    """The plain linear layers that are trained, with their dotted names; raises for
    every other trained parameter and for modules known to break the structure.
    """
    layers = {}
    for name, module in parts.modules:
        _check_module(name, module)
        for key, param in module._parameters.items():
            if isinstance(param, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"{name}.{key} has no shape yet; run a forward pass first: net(x)"
                )
            if param is not None and param.requires_grad:
                _check_plain(name, key, module)
                layers[module] = name
    if not layers:
        raise ValueError(
            "net trains nothing: no nn.Linear in it has a parameter with "
            "requires_grad=True"
        )
    _check_memory(parts)
    return layers


def _check_module(name, module) -> None:
    """Raise for modules that are random, see other samples, or change gradients."""
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"{name} is scripted; hand over the nn.Module it was made from")
    norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    if norm and (module.training or module.running_mean is None):
        raise TypeError(
            f"{name} ({kind}) normalises over the batch, so that samples see one "
            "another; put net into eval mode, with running statistics"
        )
    drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    if module.training and (drops or isinstance(module, nn.RReLU)):
        raise TypeError(f"{name} ({kind}) is random in training mode; call net.eval()")
    if module._backward_hooks or module._backward_pre_hooks:
        raise TypeError(
            f"{name} has a backward hook, which may change gradients; remove it"
        )


def _check_plain(name, key, module) -> None:
    """Raise unless this trained parameter is the weight or bias of a linear layer with
    the plain forward.
    """
    kind = type(module)
    if not isinstance(module, nn.Linear) or key not in ("weight", "bias"):
        raise TypeError(
            f"{name}.{key} is trained, and not the weight or bias of an nn.Linear "
            f"(it belongs to {kind.__name__}); freeze it: requires_grad_(False)"
        )
    why = ""
    if hasattr(module, "parametrizations"):
        why = "is parametrised; torch.nn.utils.parametrize.remove_parametrizations it"
    elif module._forward_hooks or module._forward_pre_hooks:
        why = "has forward hooks (old weight_norm is one); remove them"
    elif (
        kind.forward not in (nn.Linear.forward, Linear.forward)
        or kind.__call__ is not nn.Module.__call__
        or "forward" in vars(module)
    ):
        why = f"({kind.__name__}) has a forward of its own; use a plain nn.Linear"
    elif set(module._parameters) != {"weight", "bias"}:
        why = f"({kind.__name__}) has other parameters too; use a plain nn.Linear"
    elif module.weight.ndim != 2 or (
        module.bias is not None and module.bias.shape != module.weight.shape[:1]
    ):
        why = "has a weight that is no matrix, or a bias that is broadcast; reshape it"
    if why:
        raise TypeError(
            f"{name} {why}, or freeze it: signals know W h + b alone, and would be "
            "wrong here"
        )


def _check_memory(parts) -> None:
    """Raise when a trained parameter shares memory with another parameter or buffer."""
    tensors, last = [*parts.params, *parts.buffers], None
    spans = [
        (str(tensor.device), *_span(n, tensor), n, tensor)
        for n, tensor in tensors
        if tensor.numel()
    ]
    for span in sorted(spans, key=lambda span: span[:3]):
        device, low, high, name, tensor = span
        reached = last is not None and device == last[0] and low < last[2]
        if reached and (tensor.requires_grad or last[4].requires_grad):
            raise TypeError(
                f"{last[3]} and {name} are tied (they share memory), so that their "
                "Jacobians would have to be added; untie them: clone one"
            )
        if not reached or high > last[2]:
            last = span


def _span(name, tensor) -> tuple[int, int]:
    """The addresses where a tensor begins and ends."""
    if tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(f"{name} is on the meta device or sparse; materialise it")
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())
    )
    if tensor.requires_grad and last + 1 < tensor.numel():
        raise TypeError(
            f"{name} is expanded: its entries are tied (they share memory); untie "
            "them: clone it"
        )
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _check_inputs(parts, x) -> Tensor:
    """x, detached, after a look at the mode, at all dtypes and at x itself."""
    _check_mode(
        any(tensor.is_inference() for _, tensor in (*parts.params, *parts.buffers))
    )
    trained = [(name, param) for name, param in parts.params if param.requires_grad]
    name, like = trained[0]
    if torch.is_autocast_enabled(like.device.type):
        raise ValueError("signals need one dtype throughout: leave torch.autocast")
    for other, param in trained:
        if (param.dtype, param.device) != (
            like.dtype,
            like.device,
        ) or param.is_complex():
            raise ValueError(
                f"{other} is {param.dtype} on {param.device}, {name} {like.dtype} on "
                f"{like.device}; signals need one real dtype and device: net.to(...)"
            )
    if not isinstance(x, Tensor) or x.ndim < 2:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor of shape (N, d), not {shape}")
    _check_values("x", x, like)
    return (x.clone() if x.is_inference() else x).detach()


def _check_mode(made_there=False) -> None:
    """Raise in inference mode, or when the net was made there."""
    if made_there or torch.is_inference_mode_enabled():
        raise ValueError(
            "signals need autograd: leave inference_mode (no_grad is fine), and make "
            "net outside of it"
        )


def check_matrix(name, x, columns, like) -> None:
    """Raise unless x is a finite (N, columns) matrix of the dtype and device of
    ``like``; None leaves a thing open.
    """
    shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
    if len(shape) != 2 or isinstance(shape, str) or shape[1] != (columns or shape[1]):
        raise ValueError(
            f"{name} must be a tensor of shape (N, {columns or 'd'}), not {shape}"
        )
    _check_values(name, x, like)


def _check_values(name, x, like) -> None:
    """Raise unless x, (N, ...), has rows, is dense, matches ``like`` and is finite."""
    if x.layout != torch.strided or x.is_meta:
        raise ValueError(f"{name} is sparse or on the meta device; use to_dense()")
    if not x.numel():
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} is empty; it needs at least one row "
            "and one column"
        )
    if like is not None:
        _check_like(name, x, like)
    if not _finite(x):
        rows = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten().tolist()
        raise ValueError(
            f"{name} holds NaN or infinity in {len(rows)} row(s), the first of them "
            f"{rows[:5]}; remove those rows first"
        )


def _check_like(name, x, like) -> None:
    """Raise unless x has the dtype and device of ``like``, the network's."""
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"{name} is {x.dtype} on {x.device}, the network {like.dtype} on "
            f"{like.device}; use {name}.to(...)"
        )


def _check_buffers(out, params) -> None:
    """Raise unless ``out`` is None or shaped like the parameters."""
    shapes = [tuple(param.shape) for param in params]
    if out and [tuple(slot.shape) for slot in out] != shapes:
        raise ValueError(
            f"out must have the trained parameters' shapes {shapes}, or be left out"
        )


def check_residual(name, g, sig) -> None:
    """Raise unless g is (N, C) or (NC,), of the signals' dtype and device."""
    like, size = sig.outputs, sig.n * sig.c
    if (
        not isinstance(g, Tensor)
        or (g.dtype, g.device) != (like.dtype, like.device)
        or g.numel() != size
        or not (g.ndim == 1 or g.shape[:2] == (sig.n, sig.c))
    ):
        given = type(g).__name__
        if isinstance(g, Tensor):
            given = f"{tuple(g.shape)}, {g.dtype} on {g.device}"
        raise ValueError(
            f"{name} must be of shape (N, C) = {(sig.n, sig.c)} or ({size},), "
            f"{like.dtype} on {like.device}, not {given}"
        )


def _check_finite(what, names, tensors, where) -> None:
    """Raise where a layer's tensor holds NaN or infinity: one look at them all."""
    sums = torch.stack([tensor.sum() for tensor in tensors])
    if torch.isfinite(sums).all():
        return
    for name, tensor in zip(names.values(), tensors):
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{what} {name} holds NaN or infinity ({where} overflows, or meets a "
                "root, a norm or a logarithm of 0): keep net's forward away from there"
            )


def _finite(x) -> bool:
    """Whether x holds no NaN and no infinity: a finite sum says so at a tenth of the
    price, and only one that overflows asks for a look at every entry.
    """
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def _check_layer_input(name, layer, h, x) -> None:
    """Raise unless a trained layer gets (N, M_in), one row a sample."""
    columns = layer.weight.shape[1]
    if h is x and (x.ndim != 2 or x.shape[1] != columns):
        raise ValueError(
            f"x must be a tensor of shape (N, {columns}), not {tuple(x.shape)}"
        )
    if h.is_inference():
        raise TypeError(
            f"what comes to {name} was computed in inference_mode, inside net's "
            "forward; use no_grad there"
        )
    if h.ndim != 2 or h.shape[0] != x.shape[0]:
        raise TypeError(
            f"{name} gets inputs of shape {tuple(h.shape)} for {x.shape[0]} samples; "
            "signals need one row a sample, (N, M): sequences and convolutions are not "
            f"done here. Flatten, or {FREEZE}"
        )


def _check_outputs(parts, outputs, x) -> None:
    """Raise unless the outputs are a finite (N, C) tensor of the network's dtype."""
    shape = type(outputs).__name__
    if isinstance(outputs, Tensor):
        shape = tuple(outputs.shape)
    fits = isinstance(shape, tuple) and len(shape) == 2 and shape[0] == x.shape[0]
    if not fits or not shape[1] or outputs.dtype != x.dtype:
        raise TypeError(
            f"net(x) must be a tensor of shape (N, C) = ({x.shape[0]}, C >= 1) and of "
            f"{x.dtype}, not {shape}; wrap net so that it returns that"
        )
    if not outputs.requires_grad:
        raise TypeError(
            "net(x) carries no gradient: its forward detaches, or runs under no_grad"
        )
    if not _finite(outputs.detach()):
        bad = [name for name, param in parts.params if not _finite(param.detach())]
        why = f"{bad[0]} does (was it drawn?)" if bad else "weights or x are too large"
        raise ValueError(f"net(x) holds NaN or infinity: {why}")


# -------------------------------------------------- what has changed since, if any


def _versions(parts, x) -> dict[str, int]:
    """Version counters of what a forward pass may not write to."""
    versions = {
        name: tensor._version for name, tensor in (*parts.params, *parts.buffers)
    }
    return versions | {"its input x": x._version}


def _random_state(x) -> Tensor:
    """The state of torch's global generator that a forward pass on x would use."""
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


def _marks(parts, steady=None) -> tuple:
    """Addresses and versions of all parameters and buffers, their sums and some of
    their entries: version counters do not see edits through ``.data``; and settings of
    modules, but for those that were others in ``steady``: forwards may count.
    """
    tensors = [
        tensor.detach()
        for _, tensor in (*parts.params, *parts.buffers)
        if tensor.numel()
    ]
    entries = [
        torch.cat([flat[:: -(-len(flat) // SAMPLE)], flat.sum()[None].to(flat)])
        for flat in (tensor.reshape(-1) for tensor in tensors)
    ]
    where = [(tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors]
    settings = _settings(parts)
    if steady is not None:
        settings = {k: v for k, v in settings.items() if _equal(steady.get(k), v)}
    return where, entries, settings


def _settings(parts) -> dict:
    """Modules' own constants, such as a slope, by module and name; not their mode."""
    return {
        (name, key): value
        for name, module in parts.modules
        for key, value in vars(module).items()
        if type(value) in CONSTANTS and key != "training"
    }


def _equal(a, b) -> bool:
    return a is b or a == b  # NaN is itself


def _same(marks, others) -> bool:
    """Whether two marks are of the same weights; NaN equals NaN."""
    return (
        None not in (marks, others)
        and marks[0] == others[0]
        and all(
            torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())
            for a, b in zip(marks[1], others[1])
        )
        and all(_equal(others[2].get(k, v), v) for k, v in marks[2].items())
    )


# --------------------------------------------------------------------- the belt

_verified = WeakKeyDictionary()  # net: what its last verified sweeps looked like


def _facts(sig, parts) -> tuple:
    """What a verdict holds for: the modules, their modes, settings, hooks and forwards,
    and which tensors are trained.
    """
    modules = tuple(
        (
            id(module),
            module.training,
            id(type(module).forward),
            id(vars(module).get("forward")),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
        )
        for _, module in parts.modules
    )
    tensors = tuple(
        (
            id(tensor),
            tensor.requires_grad,
            -1 if tensor.requires_grad else tensor._version,
        )
        for _, tensor in (*parts.params, *parts.buffers)
    )
    like = sig.outputs
    return modules, _settings(parts), tensors, sig.c, like.dtype, like.device


def _verify(sig, parts, names, x, whole) -> None:
    """Compare what the signals say, where these facts are new or were seen 1, 3, 7, ...
    times before: the whole batch's output-gradients with those of its samples weighted
    apart; and of a few rows, run again, the weights' gradient with autograd's, and
    inputs and outputs with those of the whole batch and in other company. Raises where
    they differ. A layer whose gradient is zero is not verified by that.
    """
    seen, alone = _verified.setdefault(sig.net, {}), sig.n == 1
    facts, (known, sweeps) = _facts(sig, parts), seen.get(alone, (None, 0))
    sweeps = sweeps + 1 if facts == known else 1
    if sweeps & (sweeps - 1) == 0:
        seen.pop(alone, None)
        generator = torch.Generator().manual_seed(sig.n)
        _compare_mixtures(sig, names, whole, generator)
        rows = torch.randperm(sig.n, generator=generator)[:PROBE].to(x.device)
        run = outputs, few, _ = _forward_alone(parts, names, x[rows])
        sound = _compare_gradients(sig, names, run, generator)
        found = [t[rows] for t in (*whole[1], sig.outputs)]
        few = [*few, outputs.detach()]
        _compare(names, few, found, LOOSE)
        half = (len(rows) + 1) // 2
        for kept in slice(0, half), slice(half, len(rows)):
            _compare_company(parts, names, x[rows], kept, few)
        sweeps = sweeps if sound else 0
    seen[alone] = facts, sweeps


def _compare_mixtures(sig, names, run, generator) -> None:
    """Raise unless output-gradients are each sample's own, and linear in what is pulled
    back: weights in front of samples, powers of two from tiny to huge, must come out
    unchanged; and unless D is made of them.
    """
    outputs, _, edges = run
    a = _powers(outputs, torch.rand(sig.n, 1, generator=generator))
    z = torch.randn(sig.c, generator=generator, dtype=torch.float64).to(outputs)
    formed = sig.pull(z.expand(sig.n, 1, sig.c))
    own = [E[:, 0] for E in formed]
    if sig.c > 1 and "D" in vars(sig):
        own = _gradients(outputs, edges, names, z.expand(sig.n, sig.c))
    mixed = _gradients(outputs, edges, names, a * z)
    for l, (name, E, M) in enumerate(zip(names.values(), own, mixed)):
        scale = sig.D[l].norm() if "D" in vars(sig) else 0.0
        if not _close(M / a, E) or not _close(formed[l][:, 0], E, scale):
            raise _mixing(name)
        if sig.linear and not _close(E, E[:1].expand_as(E)):
            raise TypeError(
                f"{name} has other output-gradients at other samples, though net "
                "consists of linear layers: a global hook? remove it"
            )


def _powers(like, share) -> Tensor:
    """Powers of two, from tiny (share 0) to huge (1), which round nothing."""
    span = 20 if torch.finfo(like.dtype).max > 1e30 else 3
    return (2.0 ** (2 * span * share.double() - span).round()).to(like)


def _mixing(name) -> TypeError:
    """The error for output-gradients that are not each sample's own."""
    return TypeError(
        f"samples see one another after {name} (its output-gradients mix them), or "
        "net's forward changes gradients (clips, rounds or scales them); use no "
        "statistics over the batch, no gradient hooks and one dtype"
    )


def _compare_company(parts, names, few, kept: slice, found) -> None:
    """Raise when the kept half of these rows gives other layer inputs or outputs than
    it was ``found`` to, as soon as the other half is overwritten. Rows keep their
    places and the batch its size, hence its rounding.
    """
    places = torch.arange(len(few), device=few.device)
    inside = places.clamp(kept.start, kept.stop - 1)
    other = few[torch.where(places == inside, places, kept.start)]
    with torch.random.fork_rng([few.device] if few.is_cuda else []):
        outputs, again, _ = _forward(parts, names, other)
    again = [*again, outputs.detach()]
    _compare(names, [t[kept] for t in again], [t[kept] for t in found])


def _compare(names, again, found, tolerance=None) -> None:
    """Raise when layer inputs or outputs of the same rows are not the same."""
    what = [*(f"inputs of {name}" for name in names.values()), "outputs of net"]
    for name, a, b in zip(what, again, found):
        if not _close(a, b, tolerance=tolerance):
            raise TypeError(
                f"the {name} change with other rows of the batch, or from run to run: "
                "samples see one another, or the forward is random, keeps state or "
                "writes through .data; put net into eval mode, normalise each sample "
                "by itself"
            )


def _compare_gradients(sig, names, run, generator) -> bool:
    """Raise when output-gradients at the rows of a run are not linear in what is pulled
    back, or the gradient of sum a_n z_c f_nc, formed from them and the layers' inputs,
    is not autograd's; returns whether every layer has a gradient there.
    """
    outputs, inputs, edges = run
    sizes = len(outputs), sig.c
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    a, z = (draw(size).to(sig.outputs) for size in sizes)
    pulled = _gradients(outputs, edges, names, z.expand(sizes))
    for share in (0.0, 1.0):
        size = _powers(outputs, torch.tensor(share))
        scaled = _gradients(outputs, edges, names, (size * z).expand(sizes))
        for name, E, S in zip(names.values(), pulled, scaled):
            if not _close(S / size, E):
                raise _mixing(name)
    with torch.enable_grad():
        target = (outputs * a[:, None] * z).sum()
    grad = partial(torch.autograd.grad, retain_graph=True, allow_unused=True)
    own = iter(grad(target, sig.params))
    for (layer, name), h, E in zip(names.items(), inputs, pulled):
        E = a[:, None] * E
        for param, columns in _split(_trained(layer), _columns(layer, h)):
            side = torch.randn(columns.shape[1], generator=generator).to(columns)
            if not _heard(next(own), E, columns @ side, side):
                part = "weight" if param is layer.weight else "bias"
                raise TypeError(
                    f"{name}.{part} has another gradient than the layer's inputs and "
                    "output-gradients give: it is used elsewhere too, or changed "
                    f"inside; use it in one plain call of {name} alone, or {FREEZE}"
                )
    return all(E.any() for E in pulled)


def _forward_alone(parts, names, few) -> tuple[Tensor, list, list]:
    """`_forward` of a few rows, which must not need the others."""
    try:  # layers get copies: were their inputs overwritten, the next run would differ
        return _forward(parts, names, few, copy=True)
    except (RuntimeError, IndexError) as error:
        raise TypeError(
            f"net fails on {len(few)} rows of x on their own; samples must be "
            "independent of one another"
        ) from error


def _heard(grad: Tensor | None, E, projected, side) -> bool:
    """Whether a parameter's gradient times ``side`` is E^T (columns side)."""
    mine = E.T @ projected
    heard = torch.zeros_like(mine) if grad is None else grad.view(-1, len(side)) @ side
    return _close(mine, heard, E.norm() * projected.norm())


def _close(
    a: Tensor, b: Tensor, scale: float | Tensor = 0.0, tolerance: float | None = None
) -> bool:
    """Whether a and b differ by (little more than) rounding of b, or of ``scale``."""
    if tolerance is None:  # 4e-10 in float64, 7e-5 in float32
        tolerance = torch.finfo(a.dtype).eps ** 0.6
    return bool((a - b).norm() <= tolerance * max(scale, b.norm()))
