r"""Metrics of the outputs: roots R with :math:`R^\top R = \Lambda`, one a sample, that
signals and residual are seen through."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..signals import Signals


def weigh(
    metric: str | Callable | None, sig: Signals, g: Float[Tensor, "N C"]
) -> tuple[Signals, Tensor]:
    r"""Signals and residual (N, k) in a metric: :math:`R D`, :math:`(R^\top)^+ g`."""
    if metric is None:
        return sig, g
    if metric == "softmax":
        R, scale = softmax_root(sig.outputs)
        return sig.weighted(R), torch.einsum("nkc,nc->nk", R / scale, g / scale[:, 0])
    R = metric(sig.outputs)
    n, c = sig.outputs.shape
    if not isinstance(R, Tensor) or R.ndim != 3 or (R.shape[0], R.shape[2]) != (n, c):
        raise ValueError(
            f"metric(outputs) must be a tensor (N, k, C) = ({n}, k, {c}),"
            f" not {tuple(R.shape) if isinstance(R, Tensor) else type(R).__name__}"
        )
    if not torch.isfinite(R).all():
        raise ValueError("metric(outputs) holds NaN or infinity")
    R = R.detach()
    return sig.weighted(R), (torch.linalg.pinv(R).mT @ g[:, :, None])[:, :, 0]


def softmax_root(
    outputs: Float[Tensor, "N C"],
) -> tuple[Float[Tensor, "N k C"], Float[Tensor, "N 1 C"]]:
    r"""A root R of :math:`\mathrm{diag}(p) - p p^\top` with k = C - 1 rows a sample,
    and :math:`\sqrt p`; p are the softmax probabilities.

    :math:`R = B^\top \mathrm{diag}(\sqrt p)`, the columns of B an orthonormal basis of
    what is orthogonal to :math:`\sqrt p`: a Householder reflection without the column
    of the largest probability, for which no digit is lost to cancellation."""
    n, c = outputs.shape
    if c == 1:
        raise ValueError(
            "metric='softmax' of one output is zero (p = 1): use two outputs, or a"
            " callable metric such as the root of p(1 - p) of a sigmoid"
        )
    logs = outputs.log_softmax(1)
    q, top = (logs / 2).exp(), logs.argmax(1, keepdim=True)
    if not (q > 0).all():
        raise ValueError(
            f"metric='softmax': a probability of the softmax underflows in {q.dtype}"
            f" (log p = {float(logs.min()):.0f}): the outputs have saturated"
        )
    eye = torch.eye(c, dtype=q.dtype, device=q.device)
    w, others = q + eye[top[:, 0]], torch.arange(c - 1, device=q.device)
    columns = others + (others >= top)
    rest = q.gather(1, columns) / (1 + q.gather(1, top))
    B = eye[columns] - rest[:, :, None] * w[:, None, :]
    return B * q[:, None, :], q[:, None, :]
