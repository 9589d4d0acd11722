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


def residual(
    loss: Callable, outputs: Float[Tensor, "N C"], y: Tensor, params: list[Tensor]
) -> tuple[float, Float[Tensor, "N C"]]:
    """The loss and N dL/df; an error where the loss is not a mean over the batch of
    something that depends on the outputs alone.
    """
    check_targets(loss, outputs, y)
    with torch.enable_grad():
        f = outputs.detach().requires_grad_()
        value = loss(f, y)
        _check_value(loss, value, params)
        (gradient,) = torch.autograd.grad(value, f, allow_unused=True)
    if gradient is None:
        raise ValueError("loss(outputs, y) does not depend on the outputs")
    if isinstance(y, Tensor) and y.is_floating_point() and 0 < y.ndim < f.ndim:
        _check_rows(loss, f, y, gradient)
    return float(value.detach()), len(outputs) * gradient


def check_targets(loss: Callable, outputs: Float[Tensor, "N C"], y: Tensor) -> None:
    """y has the outputs' shape where the loss compares entry by entry, else N rows."""
    if not isinstance(y, Tensor):
        return
    entrywise = isinstance(loss, ENTRYWISE) or loss in ENTRYWISE_FUNCTIONS
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
    if reduction == "sum":
        raise ValueError(
            "loss sums over the batch (reduction='sum'), which makes the step N times"
            " too long: use reduction='mean'"
        )
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


def _check_rows(loss, f, y, gradient) -> None:
    """With y of fewer dimensions than the outputs (N, C): the first row's loss alone
    has N times that row's share of the gradient, unless rows were broadcast.
    """
    first = f[:1].detach().requires_grad_()
    with torch.enable_grad():
        (alone,) = torch.autograd.grad(loss(first, y[:1]), first)
    share = len(f) * gradient[:1]
    if not (alone - share).norm() <= 1e-3 * (alone.norm() + share.norm()):
        raise ValueError(
            f"y has shape {tuple(y.shape)}, the outputs {tuple(f.shape)}, and the loss"
            " mixes rows (broadcasting?): give y the outputs' number of dimensions"
        )
