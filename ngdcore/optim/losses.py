"""The default loss, and a loss' residual in output space with its checks."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["half_mse"]


def half_mse(outputs: Tensor, y: Tensor) -> Tensor:
    r"""The default loss, :math:`\frac1{2N}\sum_{n,c}(f_{nc} - y_{nc})^2`: summed over
    outputs, averaged over samples.

    ``torch.nn.MSELoss()`` averages over outputs too and has no 1/2: it is 2/C times
    this.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> float(ngd.optim.half_mse(torch.ones(4, 3), torch.zeros(4, 3)))
    1.5
    """
    return (outputs - y).square().sum() / (2 * len(y))


# losses that compare entry by entry: any other shape of y would be broadcast
ENTRYWISE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
ENTRYWISE_FUNCTIONS = (
    half_mse,
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
)

SUMS = (
    "loss sums over the batch (reduction='sum'?), which makes the step N times too"
    " long: take the mean, reduction='mean'"
)


def residual(
    loss: Callable,
    outputs: Float[Tensor, "N C"],
    y: Tensor,
    params: list[Tensor],
    known: bool = False,
) -> tuple[float, Float[Tensor, "N C"]]:
    """The loss and N dL/df; an error where the loss is not a mean over the batch of
    something that depends on the outputs alone. A loss that is ``known`` is not asked
    again whether it is a sum.
    """
    check_targets(loss, outputs, y)
    written = getattr(y, "_version", None)
    with torch.enable_grad():
        f = outputs.detach().requires_grad_()
        value = loss(f, y)
        _check_value(loss, value, params)
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, f, allow_unused=True)
    if gradient is None:
        raise ValueError("loss(outputs, y) does not depend on the outputs")
    if getattr(y, "_version", None) != written:
        raise ValueError("loss(outputs, y) writes to y: let it work on a copy")
    own = isinstance(loss, nn.modules.loss._Loss) or loss in ENTRYWISE_FUNCTIONS
    if not (known or own):  # torch's own tell their reduction
        _check_sum(loss, f, y, gradient)
    if not known and isinstance(y, Tensor) and 0 < y.ndim != f.ndim:
        _check_rows(loss, f, y, gradient)
    return float(value.detach()), len(outputs) * gradient


def check_broadcast(loss: Callable, outputs: Float[Tensor, "N C"], y: Tensor) -> None:
    """Raise where y has other dimensions than the outputs, and the loss mixes rows."""
    check_targets(loss, outputs, y)
    if isinstance(y, Tensor) and 0 < y.ndim != outputs.ndim:
        with torch.enable_grad():
            f = outputs.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(f, y), f)
        _check_rows(loss, f, y, gradient)


def _entrywise(y: Tensor, f: Tensor) -> bool:
    """Whether targets y are to be compared with outputs f entry by entry, and not
    labels that choose one of them."""
    return y.is_floating_point() or y.ndim > 1 or f.shape[1] == 1


def check_targets(loss: Callable, outputs: Float[Tensor, "N C"], y: Tensor) -> None:
    """y has the outputs' shape where the loss compares entry by entry, else N rows."""
    entrywise = isinstance(loss, ENTRYWISE) or loss in ENTRYWISE_FUNCTIONS
    if not isinstance(y, Tensor):
        if entrywise:
            raise TypeError(
                f"y must be a tensor, not {type(y).__name__}: torch.as_tensor(y)"
            )
        return
    if entrywise and y.shape != outputs.shape:
        raise ValueError(
            f"y must have the outputs' shape {tuple(outputs.shape)},"
            f" not {tuple(y.shape)} (broadcasting would hide it)"
        )
    if y.ndim and len(y) != len(outputs):
        raise ValueError(
            f"y has {len(y)} rows and the outputs {len(outputs)}: one target a sample"
        )


def _check_value(loss: Callable, value: Tensor, params: list[Tensor]) -> None:
    """A loss is one number, a mean over samples, and no function of the weights."""
    reduction = getattr(loss, "reduction", "mean")
    if reduction == "none" or not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value)
        raise ValueError(
            f"loss(outputs, y) must be one number, not {shape}: take the mean over the"
            " batch (reduction='mean')"
        )
    if value.is_complex():
        raise ValueError(
            f"loss(outputs, y) must be a real number, not {value.dtype}: is y complex?"
        )
    if reduction == "sum":
        raise ValueError(SUMS)
    trained = {id(p) for p in params}
    if any(id(leaf) in trained for leaf in _leaves(value)):
        raise ValueError(
            "loss depends on the network's weights beyond its outputs (a penalty?); a"
            " natural gradient differentiates in the outputs only: use weight_decay="
        )


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """The leaf tensors in which a value's autograd graph ends."""
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [parent for parent, _ in node.next_functions]


def _check_sum(loss, f, y, gradient) -> None:
    """The first and the last row's loss alone do not both have these rows' shares of
    the gradient, as in a sum; in a mean they have N times as much.
    """
    pairs = _pairs(loss, f, y, gradient)
    if len(pairs) == 2 and all(_close(alone, own) for alone, own in pairs):
        raise ValueError(SUMS)


def _check_rows(loss, f, y, gradient) -> None:
    """With y of other dimensions than the outputs (N, C): the first and the last row's
    loss alone have N times these rows' shares of the gradient, unless rows were
    broadcast.

    Labels may weigh rows, as in a weighted cross-entropy: there directions count."""
    for alone, own in _pairs(loss, f, y, gradient):
        share = len(f) * own
        if not _entrywise(y, f):
            share = share / share.norm() * alone.norm()
        if not _close(alone, share):
            raise ValueError(
                f"y has shape {tuple(y.shape)}, the outputs {tuple(f.shape)}, and the"
                " loss mixes rows (broadcasting?): give y the outputs' number of"
                " dimensions"
            )


def _pairs(loss, f, y, gradient) -> list[tuple[Tensor, Tensor]]:
    """Of the first and the last row the gradient of their loss alone, and their part of
    the batch's, where both are known and not zero.
    """
    n, pairs = len(f), []
    for row in (slice(0, 1), slice(n - 1, n)) if n > 1 else ():
        alone = _alone(loss, f[row], y, row)
        if alone is not None and alone.any() and gradient[row].any():
            pairs.append((alone, gradient[row]))
    return pairs


def _alone(loss, rows: Tensor, y, row: slice) -> Tensor | None:
    """The gradient of these rows' loss alone; None where it isn't to be had, as of a
    loss that needs more rows."""
    rows = rows.detach().requires_grad_()
    try:
        with torch.enable_grad():
            value = loss(rows, y[row] if getattr(y, "ndim", 1) else y)
            (alone,) = torch.autograd.grad(value, rows, allow_unused=True)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError):
        return None
    return alone if alone is not None and alone.isfinite().all() else None


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-3 * (a.norm() + b.norm()))
