r"""Closed-form training of linearised models, :math:`f_{t+1} = f_t - \eta Q (f_t - y)`
and its flow; the trained ensemble of infinitely wide networks; flows by an ODE solver.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .factors import Factors

__all__ = ["trajectory", "predict", "Prediction", "flow", "gd_lr"]


def trajectory(
    Q: Tensor,
    f0: Tensor,
    y: Tensor,
    lr: float | None,
    steps: int | float | Sequence[float],
    Q_test: Tensor | None = None,
    f0_test: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Outputs of the linearised model after t steps, for many t at once.

    :math:`f_t = y + (I - \eta Q)^t (f_0 - y)`; at test rows
    :math:`f'_t = f'_0 - Q'\,\eta\sum_{s<t} (I - \eta Q)^s\,(f_0 - y)`. One
    eigendecomposition serves all t when Q is symmetric; otherwise the recursion is run.
    Without a learning rate it is the gradient flow,
    :math:`f_t = y + e^{-Qt}(f_0 - y)`.

    Parameters
    ----------
    Q : Tensor, (NC, NC)
        Coefficient matrix with its 1/N: ``F.coefficient(fac)``, or ``K / N`` for
        gradient descent.
    f0, y : Tensor, (N, C)
        Outputs at the start, and targets.
    lr : float or None
        Learning rate :math:`\eta` of the mean loss; None for the flow, whose time is
        learning rate times steps.
    steps : int or sequence of int
        All of ``0..steps``, or just these t (ascending); ``math.inf`` is the limit. For
        the flow: one time or several, any numbers.
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
        For shapes that do not fit; fractional, negative or descending steps; a limit
        that does not exist because the learning rate is too large.

    Notes
    -----
    Karakida & Osawa (2020), eq. 10; Zhang, Martens & Grosse (2019), appendix F.

    Examples
    --------
    >>> import math, torch, ngdcore as ngd
    >>> Q, y = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    >>> ngd.dynamics.trajectory(Q, 0 * y, y, lr=0.5, steps=2)[:, 0, 0].tolist()
    [0.0, 0.5, 0.75]
    >>> ngd.dynamics.trajectory(Q, 0 * y, y, 0.5, [1, math.inf])[:, 0, 0].tolist()
    [0.5, 1.0]
    """
    _check_shapes(Q, f0, y, Q_test, f0_test)
    _check_numbers(lr, Q=Q, f0=f0, y=y, Q_test=Q_test, f0_test=f0_test)
    times, r0 = _times(steps, lr), (f0 - y).reshape(-1)
    if torch.allclose(Q, Q.T, rtol=1e-9, atol=1e-12 * float(Q.abs().max())):
        values, vectors = torch.linalg.eigh((Q + Q.T) / 2)
        decay, summed = _modes(values, lr, times)
        modes = vectors.T @ r0
        residuals, sums = (decay * modes) @ vectors.T, (summed * modes) @ vectors.T
    else:
        residuals, sums = _unsymmetric(Q, r0, lr, times)
    outputs = y + residuals.view(-1, *y.shape)
    if Q_test is None:
        return outputs
    start = Q.new_zeros(len(Q_test)) if f0_test is None else f0_test.reshape(-1)
    return outputs, (start - sums @ Q_test.T).view(len(times), -1, y.shape[1])


def _check_numbers(lr, **tensors) -> None:
    """Raise unless the tensors that are given are finite and of one dtype and device,
    and lr is None or positive.
    """
    like = tensors["Q"]
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if (tensor.dtype, tensor.device) != (like.dtype, like.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, Q {like.dtype} on"
                f" {like.device}; use {name}.to(Q)"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinity")
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr={lr} must be positive and finite, or None for the flow")


def _check_shapes(Q, f0, y, Q_test, f0_test) -> None:
    """Raise unless Q is (NC, NC), f0 and y (N, C), and Q_test, if given, (N'C, NC) and
    f0_test (N', C).
    """
    if f0.shape != y.shape or f0.ndim != 2 or Q.shape != (y.numel(), y.numel()):
        raise ValueError(
            "f0 and y must be (N, C) and Q (NC, NC), not"
            f" {tuple(f0.shape)}, {tuple(y.shape)}, {tuple(Q.shape)}"
        )
    if Q_test is None:
        return
    if Q_test.ndim != 2 or Q_test.shape[1] != len(Q) or len(Q_test) % y.shape[1]:
        raise ValueError(
            f"Q_test must be (N'C, NC) = (., {len(Q)}), not {tuple(Q_test.shape)}"
        )
    shape = len(Q_test) // y.shape[1], y.shape[1]
    if f0_test is not None and tuple(f0_test.shape) != shape:
        raise ValueError(
            f"f0_test must be (N', C) = {shape}, not {tuple(f0_test.shape)}"
        )


def _times(steps, lr) -> list[float]:
    """The t asked for, checked: whole numbers for a learning rate; infinity allowed."""
    if lr is not None and isinstance(steps, Integral):
        return [float(t) for t in range(max(int(steps), -1) + 1)] or _refuse(steps)
    single = isinstance(steps, Real)
    times = [float(t) for t in ([steps] if single else steps)]
    whole = lr is None or all(t == math.inf or t.is_integer() for t in times)
    ascending = all(a <= b for a, b in zip([0.0, *times], times))  # NaN fails too
    return times if times and whole and ascending else _refuse(steps)


def _refuse(steps):
    """The error that says what steps may be."""
    raise ValueError(
        f"steps={steps} must be a whole number of steps, or ascending whole step counts"
        " from 0 on, math.inf for the limit; for times in between take the gradient"
        " flow, lr=None"
    )


def _modes(values: Tensor, lr: float | None, times: list[float]):
    r"""For eigenvalues q of Q the factors :math:`(1 - \eta q)^t` (:math:`e^{-qt}`) and
    the sums :math:`\eta\sum_{s<t} (1 - \eta q)^s` (:math:`(1 - e^{-qt})/q`); (T, n).

    Modes at rounding level have not moved in any finite time worth the name: at
    infinity they stay, with sum 0, which makes the pseudo-inverse."""
    rate = values if lr is None else lr * values
    zero = rate.abs() < 1e-14
    null = rate.abs() <= len(rate) * torch.finfo(rate.dtype).eps * rate.abs().max()
    factor, unit = 1 - rate, 1.0 if lr is None else lr
    decays, sums = [], []
    for t in times:
        if t == math.inf:
            if not ((rate > 0) & ((rate < 2) | (lr is None)) | null).all():
                raise ValueError(
                    f"steps=inf: there is no limit at lr={lr}, Q has eigenvalues from"
                    f" {float(values[0]):.3g} to {float(values[-1]):.3g}"
                )
            decay, summed = null.to(rate), torch.where(null, 0.0, unit / rate)
        else:
            if lr is None:
                decay, done = (-rate * t).exp(), -torch.expm1(-rate * t)
            else:
                sign = torch.where((t % 2 == 1) & (factor < 0), -1.0, 1.0)
                decay = factor.abs() ** t * sign
                done = 1 - decay
            summed = unit * torch.where(zero, t, done / torch.where(zero, 1.0, rate))
        decays.append(decay)
        sums.append(summed)
    return torch.stack(decays), torch.stack(sums)


def _unsymmetric(Q, r0, lr, times):
    """Residuals and their sums, (T, NC) each, for any Q: the recursion, or the
    exponential of the flow, which carries its own sum in one more row."""
    finite = [t for t in times if t < math.inf]
    residuals, sums = [], []
    if lr is None:
        block = torch.cat([torch.cat([-Q, r0[:, None]], 1), Q.new_zeros(1, len(Q) + 1)])
        for t in finite:
            sums.append(torch.linalg.matrix_exp(block * t)[:-1, -1])
            residuals.append(r0 - Q @ sums[-1])
    else:
        residual, total, wanted = r0.clone(), torch.zeros_like(r0), set(finite)
        found = {}
        for t in range(int(max(finite, default=-1)) + 1):
            if t in wanted:
                found[t] = (residual, total)
            total = total + lr * residual
            residual = residual - lr * (Q @ residual)
        residuals, sums = ([found[t][i] for t in finite] for i in (0, 1))
    if len(finite) < len(times):
        values = torch.linalg.eigvals(Q)
        stable = values.real > 0 if lr is None else (1 - lr * values).abs() < 1
        if not stable.all():
            raise ValueError(
                f"steps=inf: there is no limit at lr={lr}, or Q is singular"
            )
        residuals += [torch.zeros_like(r0)] * (len(times) - len(finite))
        sums += [torch.linalg.solve(Q, r0)] * (len(times) - len(finite))
    return torch.stack(residuals), torch.stack(sums)


class Prediction(NamedTuple):
    """Mean and variance of trained networks' outputs, made by `predict`; with several
    times both have one more dimension in front.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> fac = ngd.kernels.analytic(torch.eye(2, dtype=torch.float64), depth=2)
    >>> made = ngd.dynamics.predict(fac, torch.ones(2, 3, dtype=torch.float64), [0, 1])
    >>> made.mean.shape, made.variance.shape
    (torch.Size([2, 2, 3]), torch.Size([2, 2]))
    """

    mean: Float[Tensor, "*T N C"]
    variance: Float[Tensor, "*T N"]


def predict(
    factors: Factors,
    y: Tensor,
    times: float | Sequence[float] = math.inf,
    fisher=None,
    damping: float = 0.0,
) -> Prediction:
    r"""Outputs of the ensemble of infinitely wide networks after gradient flow on the
    targets: a Gaussian process at every time.

    Networks start from the Gaussian process :math:`\mathcal K` (`Factors.nngp`) and
    move under :math:`\dot f = -Q(f - y)`. With
    :math:`G_t = Q'\,Q^{+}(I - e^{-Qt})`, at the rows of ``factors``,

    .. math:: \mathrm{mean} = G_t\,y, \qquad \mathrm{cov} = \mathcal K_{x'x'}
        + G_t\,\mathcal K\,G_t^\top - G_t\,\mathcal K_{xx'} - \mathcal K_{x'x}G_t^\top .

    Q is :math:`K/N` for gradient descent, whose time is learning rate times steps of
    the mean loss, or a Fisher's coefficient. Outputs are independent and have the same
    variance; one (N, N) problem serves all.

    Parameters
    ----------
    factors : Factors
        ``fac.cross(x_test)`` of analytic factors ``fac``; or ``fac`` itself, for the
        training rows.
    y : Tensor, (N, C)
        Targets of the training rows.
    times : float or sequence of float
        0 is the start, ``math.inf`` (default) the end of training.
    fisher : Fisher, optional
        Natural gradient flow with this Fisher; gradient flow by default.
    damping : float
        Of the Fisher.

    Returns
    -------
    Prediction
        ``mean`` (N', C) and ``variance`` (N') for one time, (T, N', C) and (T, N') for
        a sequence.

    Raises
    ------
    TypeError
        For empirical factors: a finite network is not an ensemble; see `trajectory`.
    ValueError
        For targets that do not fit, or negative or descending times.

    Notes
    -----
    Lee et al. (2019), eqs. 14-16 (there with the sum loss: our time is N of theirs); as
    ``predict.gradient_descent_mse_ensemble`` of neural-tangents. Bayesian regression
    with the NTK's prior mean differs: the ensemble's variance is not a posterior's.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> x = ngd.data.gaussian(6, 3, seed=0)
    >>> fac, y = ngd.kernels.analytic(x, depth=3), torch.ones(6, 1, dtype=torch.float64)
    >>> mean, variance = ngd.dynamics.predict(fac, y)
    >>> torch.allclose(mean, y), bool(variance.abs().max() < 1e-9)
    (True, True)
    """
    _check_ensemble(factors, y)
    rows = factors.scalar or factors
    train, ts = rows.train, _times(times, None)
    Q, Q_rows = _coefficients(rows, fisher, damping)
    values, vectors = torch.linalg.eigh((Q + Q.T) / 2)
    turned, targets = Q_rows @ vectors, vectors.T @ y.to(Q)
    across = rows.nngp() @ vectors
    start = vectors.T @ train.nngp() @ vectors
    prior = rows.variance()
    means, variances = [], []
    for summed in _modes(values, None, ts)[1]:
        G = turned * summed
        means.append(G @ targets)
        variances.append(prior + ((G @ start - 2 * across) * G).sum(1))
    mean, variance = torch.stack(means), torch.stack(variances).clamp_min(0)
    single = isinstance(times, Real)
    return Prediction(mean[0], variance[0]) if single else Prediction(mean, variance)


def _check_ensemble(factors, y) -> None:
    """Raise unless factors are analytic and y (N, C) fits them."""
    if not isinstance(factors, Factors) or factors.train.signals is not None:
        raise TypeError(
            "factors must be analytic, of infinitely wide networks; for one finite"
            " network see dynamics.trajectory"
        )
    if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != factors.columns:
        given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"y must be a tensor (N, C) with N = {factors.columns}, not {given}"
        )
    if not torch.isfinite(y).all():
        raise ValueError("y holds NaN or infinity")


def _coefficients(rows, fisher, damping):
    """Q (N, N) of the training rows, and of these rows (N', N)."""
    train = rows.train
    if fisher is None:
        return train.gram() / train.columns, rows.gram() / train.columns
    return tuple(fisher.coefficient(f, damping) for f in (train, rows))


def flow(
    velocity: Callable,
    start: Tensor | Sequence[Tensor],
    times: Sequence[float],
    method: str = "DOP853",
    rtol: float = 1e-10,
    atol: float = 1e-10,
) -> Tensor | list[Tensor]:
    r"""Integrate :math:`\dot w = \mathrm{velocity}(w)` from ``start`` at time 0.

    Parameters
    ----------
    velocity : callable
        Takes weights shaped like ``start``, a tensor or a list of tensors, and returns
        their time derivatives alike.
    start : Tensor or sequence of Tensor
        Weights at time 0. The solver works in float64 on the CPU; velocity sees the
        dtype and device of ``start``.
    times : sequence of float
        Where the solution is wanted, ascending from 0 on.
    method, rtol, atol :
        Of `scipy.integrate.solve_ivp`; a velocity in float32 needs larger tolerances.

    Returns
    -------
    Tensor (T, ...), or a list of them
        The weights at the times.

    Raises
    ------
    ValueError
        For times that do not ascend from 0 on, or a velocity of another shape.
    ArithmeticError
        When the solver stops before the last time, as at a singularity.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> w = ngd.dynamics.flow(lambda w: -w, torch.ones(1, dtype=torch.float64), [0, 1])
    >>> [round(v, 9) for v in w.flatten().tolist()]
    [1.0, 0.367879441]
    """
    from scipy.integrate import solve_ivp

    single = isinstance(start, Tensor)
    parts = [start] if single else list(start)
    ts = np.asarray([float(t) for t in times])
    ascend = (np.diff(ts, prepend=0.0) >= 0).all()  # not so for NaN
    if len(ts) == 0 or not ascend or ts[-1] == math.inf:
        raise ValueError(f"times={times} must be finite and ascend from 0 on")

    def slope(_, theta):
        weights = _unflatten(theta, parts)
        change = [velocity(weights[0])] if single else list(velocity(weights))
        if [c.shape for c in change] != [p.shape for p in parts]:
            raise ValueError("velocity must return tensors shaped like its weights")
        return _flatten(change)

    begin = _flatten(parts)
    done = solve_ivp(slope, (0, ts[-1]), begin, method, ts, rtol=rtol, atol=atol)
    if not done.success:
        raise ArithmeticError(f"the flow stopped before t={ts[-1]:g}: {done.message}")
    paths = [_unflatten(theta, parts) for theta in done.y.T]
    made = [torch.stack(path) for path in zip(*paths)]
    return made[0] if single else made


def _flatten(parts: Sequence[Tensor]) -> np.ndarray:
    """Tensors as one float64 vector of NumPy's."""
    return torch.cat([p.detach().reshape(-1).double().cpu() for p in parts]).numpy()


def _unflatten(theta: np.ndarray, parts: Sequence[Tensor]) -> list[Tensor]:
    """A copy of the vector, as tensors like parts."""
    pieces = torch.from_numpy(np.array(theta)).split([p.numel() for p in parts])
    return [v.reshape(p.shape).to(p) for v, p in zip(pieces, parts)]


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
        If ``gram`` is not square, symmetric and finite, or has no positive eigenvalue.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> ngd.dynamics.gd_lr(torch.diag(torch.tensor([1.0, 3.0])), n=2)
    1.0
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be square, not {tuple(gram.shape)}")
    if not (isinstance(n, Integral) and n >= 1):
        raise ValueError(f"n={n} must be a whole number of samples, at least 1")
    if not torch.isfinite(gram).all():
        raise ValueError("gram holds NaN or infinity")
    if not torch.allclose(
        gram, gram.mT, rtol=1e-5, atol=1e-6 * float(gram.abs().max())
    ):
        raise ValueError("gram is not symmetric: is it a Gram matrix, K = J J^T?")
    values = torch.linalg.eigvalsh(gram)
    if not values[-1] > 0:
        raise ValueError(
            "gram has no positive eigenvalue: no output depends on a trained parameter"
        )
    return float(2 * n / (values[0].clamp_min(0) + values[-1]))
