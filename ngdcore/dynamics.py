r"""Closed-form trajectories of linearised training: outputs under :math:`f_{t+1} = f_t
- \eta Q (f_t - y)`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["trajectory", "gd_lr"]


def trajectory(
    Q: Tensor,
    f0: Tensor,
    y: Tensor,
    lr: float,
    steps: int | Sequence[int],
    Q_test: Tensor | None = None,
    f0_test: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Outputs of the linearised model after t steps, for many t at once.

    :math:`f_t = y + (I - \eta Q)^t (f_0 - y)`; at test rows
    :math:`f'_t = f'_0 - Q'\,\eta\sum_{s<t} (I - \eta Q)^s\,(f_0 - y)`. One
    eigendecomposition serves all t when Q is symmetric; otherwise the recursion is run.

    Parameters
    ----------
    Q : Tensor, (NC, NC)
        Coefficient matrix with its 1/N: ``F.coefficient(fac)``, or ``K / N`` for
        gradient descent.
    f0, y : Tensor, (N, C)
        Outputs at the start, and targets.
    lr : float
        Learning rate :math:`\eta` of the mean loss.
    steps : int or sequence of int
        All of ``0..steps``, or just these t (ascending).
    Q_test : Tensor, (N'C, NC), optional
        Coefficient matrix of test rows.
    f0_test : Tensor, (N', C), optional
        Test outputs at the start; zero if left out.

    Returns
    -------
    Tensor, (T, N, C), or a pair with the test outputs (T, N', C) when ``Q_test`` is
    given.

    Raises
    ------
    ValueError
        For shapes that do not fit, or negative or descending steps.

    Notes
    -----
    Karakida & Osawa (2020), eq. 10; Zhang, Martens & Grosse (2019), appendix F.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> y = torch.ones(2, 1, dtype=torch.float64)
    >>> ngd.dynamics.trajectory(torch.eye(2, dtype=torch.float64), 0 * y, y, lr=0.5, steps=2)[:, 0, 0].tolist()
    [0.0, 0.5, 0.75]
    """
    if f0.shape != y.shape or f0.ndim != 2 or Q.shape != (y.numel(), y.numel()):
        raise ValueError(
            f"f0 and y must be (N, C) and Q (NC, NC), not {tuple(f0.shape)}, {tuple(y.shape)}, {tuple(Q.shape)}"
        )
    times = (
        torch.arange(max(steps, -1) + 1)
        if isinstance(steps, int)
        else torch.as_tensor(list(steps))
    )
    if len(times) == 0 or times[0] < 0 or (times.diff() < 0).any():
        raise ValueError(
            "steps must be a number of steps, or ascending step counts from 0 on"
        )
    r0 = (f0 - y).reshape(-1)
    if torch.allclose(Q, Q.T, rtol=1e-9, atol=1e-12 * float(Q.abs().max())):
        residuals, sums = _by_spectrum(Q, r0, lr, times)
    else:
        residuals, sums = _by_recursion(Q, r0, lr, times)
    outputs = y + residuals.view(-1, *y.shape)
    if Q_test is None:
        return outputs
    if Q_test.ndim != 2 or Q_test.shape[1] != len(r0) or Q_test.shape[0] % y.shape[1]:
        raise ValueError(
            f"Q_test must be (N'C, NC) = (., {len(r0)}), not {tuple(Q_test.shape)}"
        )
    start = (
        torch.zeros(len(Q_test), dtype=Q.dtype, device=Q.device)
        if f0_test is None
        else f0_test.reshape(-1)
    )
    return outputs, (start - lr * sums @ Q_test.T).view(len(times), -1, y.shape[1])


def _by_spectrum(Q, r0, lr, times):
    values, vectors = torch.linalg.eigh((Q + Q.T) / 2)
    modes, t = vectors.T @ r0, times.to(values)[:, None]
    factor = 1 - lr * values
    decay = factor.abs() ** t * torch.where((t % 2 == 1) & (factor < 0), -1.0, 1.0)
    zero = (lr * values).abs() < 1e-14
    summed = torch.where(zero, t, (1 - decay) / torch.where(zero, 1.0, lr * values))
    return (decay * modes) @ vectors.T, (summed * modes) @ vectors.T


def _by_recursion(Q, r0, lr, times):
    residual, total, wanted = r0.clone(), torch.zeros_like(r0), {}
    for t in range(int(times[-1]) + 1):
        wanted[t] = (residual.clone(), total.clone())
        total += residual
        residual = residual - lr * (Q @ residual)
    chosen = [wanted[int(t)] for t in times]
    return torch.stack([c[0] for c in chosen]), torch.stack([c[1] for c in chosen])


def gd_lr(gram: Tensor, n: int) -> float:
    r"""Gradient descent's best constant step on the mean loss:
    :math:`2/(\lambda_{\min} + \lambda_{\max})` of K/N.

    It minimises the slowest mode's factor, which is then :math:`(\kappa-1)/(\kappa+1)`;
    stable up to :math:`2/\lambda_{\max}`.

    Parameters
    ----------
    gram : Tensor, (NC, NC)
        K, without 1/N.
    n : int
        Number of samples N.

    Raises
    ------
    ValueError
        If ``gram`` is not square or has no positive eigenvalue.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> ngd.dynamics.gd_lr(torch.diag(torch.tensor([1.0, 3.0])), n=2)
    1.0
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be square, not {tuple(gram.shape)}")
    values = torch.linalg.eigvalsh(gram)
    if not values[-1] > 0:
        raise ValueError(
            "gram has no positive eigenvalue: no output depends on a trained parameter"
        )
    return float(2 * n / (values[0].clamp_min(0) + values[-1]))
