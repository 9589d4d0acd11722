"""Inputs drawn at random: on the CPU in float64, then moved, so that a seed means the
same numbers on every device.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from .rows import DataSet, normalise, placed

__all__ = ["sphere", "gaussian", "linear_teacher"]


def sphere(
    n: int,
    d: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Float[Tensor, "n d"]:
    r"""n points drawn uniformly from the unit sphere in :math:`\mathbb R^d`, shape (n,
    d).

    Raises
    ------
    ValueError
        If ``n`` or ``d`` is below 1.

    Examples
    --------
    >>> import ngdcore as ngd
    >>> x = ngd.data.sphere(5, 3, seed=0)
    >>> bool(((x.norm(dim=1) - 1).abs() < 1e-12).all())
    True
    """
    return placed(normalise(_normal(n, d, seed), "unit"), dtype, device)


def gaussian(
    n: int,
    d: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Float[Tensor, "n d"]:
    r"""n rows of d independent standard normal numbers.

    Raises
    ------
    ValueError
        If ``n`` or ``d`` is below 1.

    Examples
    --------
    >>> import ngdcore as ngd
    >>> ngd.data.gaussian(5, 3, seed=0).shape
    torch.Size([5, 3])
    """
    return placed(_normal(n, d, seed), dtype, device)


def linear_teacher(
    W: Float[Tensor, "n_out n_in"],
    n_train: int = 10_000,
    n_test: int = 1_000,
    decay: float = 5.0,
    noise: float = 1e-3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> DataSet:
    r"""Rows of a linear regression whose inputs have a spectrum: :math:`x \sim N(0,
    \Sigma)` and :math:`y = W x + s\,\varepsilon`.

    :math:`\Sigma = U\,\mathrm{diag}(e^{-d\,i/n})\,U^\top`, i = 1 to n, with random
    orthogonal :math:`U`; the condition number is :math:`e^{d(1 - 1/n)}`.

    Parameters
    ----------
    W : Tensor, (n_out, n_in)
        The teacher's map.
    n_train, n_test : int
        Rows of ``x`` and of ``x_test``.
    decay : float
        :math:`d`.
    noise : float
        :math:`s`, the standard deviation of independent normal noise on each target.
    seed : int
        Of the generator that draws U, inputs and noise, in this order.

    Returns
    -------
    DataSet
        Without labels (empty tensors).

    Raises
    ------
    ValueError
        For a map that is no matrix, a number of rows below 1, or negative noise.

    Notes
    -----
    Bernacchia, Lengyel & Hennequin (2018), section 5: decay 5, noise variance 1e-6.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> data = ngd.data.linear_teacher(torch.eye(3), n_train=50, noise=0.0)
    >>> data.x.shape, bool((data.x == data.y).all())
    (torch.Size([50, 3]), True)
    """
    if W.ndim != 2 or n_train < 1 or n_test < 1 or not noise >= 0:
        raise ValueError(
            f"W of shape {tuple(W.shape)} must be a matrix, n_train={n_train} and"
            f" n_test={n_test} at least 1, noise={noise} not negative"
        )
    W = W.detach().to("cpu", torch.float64)
    generator, n = torch.Generator().manual_seed(seed), W.shape[1]
    turn = torch.linalg.qr(_draw(n, n, generator))[0]
    order = torch.arange(1, n + 1, dtype=torch.float64, device="cpu")
    half = turn * torch.exp(-decay / 2 * order / n)
    x = _draw(n_train + n_test, n, generator) @ half.T
    y = x @ W.T + noise * _draw(len(x), len(W), generator)
    x, y = (placed(v, dtype, device) for v in (x, y))
    none = torch.empty(0, dtype=torch.int64, device=x.device)
    parts = x[:n_train], y[:n_train], x[n_train:], y[n_train:]
    return DataSet(*parts, none, none, "drawn from a linear teacher")


def _normal(n: int, d: int, seed: int) -> Float[Tensor, "n d"]:
    """Standard normal numbers on the CPU, in float64, from a generator of their own."""
    if n < 1 or d < 1:
        raise ValueError(f"n={n} and d={d} must be at least 1")
    return _draw(n, d, torch.Generator().manual_seed(seed))


def _draw(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    return torch.randn(n, d, generator=generator, dtype=torch.float64, device="cpu")
