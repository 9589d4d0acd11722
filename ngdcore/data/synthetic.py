"""Inputs drawn at random: on the CPU in float64, then moved, so that a seed means the
same numbers on every device.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from .rows import normalise, placed

__all__ = ["sphere", "gaussian"]


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


def _normal(n: int, d: int, seed: int) -> Float[Tensor, "n d"]:
    """Standard normal numbers on the CPU, in float64, from a generator of their own."""
    if n < 1 or d < 1:
        raise ValueError(f"n={n} and d={d} must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64, device="cpu")
