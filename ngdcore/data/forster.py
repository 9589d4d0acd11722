"""The Forster transform: from rows in general position to an isotropic set of unit
rows.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .rows import normalise

__all__ = ["forster"]


def forster(
    x: Tensor, tol: float = 1e-10, max_iter: int = 1000
) -> tuple[Tensor, Tensor]:
    r"""The Forster transform: unit rows in the directions of :math:`x_i^\top A` with
    :math:`Z^\top Z = \frac nd I`.

    Repeats :math:`T = (\frac dn Z^\top Z)^{-1/2}`,
    :math:`Z \leftarrow \mathrm{rownorm}(ZT)`, :math:`A \leftarrow AT/\|AT\|_F`: Tyler's
    fixed-point iteration, :math:`AA^\top \propto \Sigma^{-1}`. It converges linearly,
    in one step for n = d, slowest when n is just above d.

    Parameters
    ----------
    x : Tensor, (n, d)
        Rows, none zero; n >= d, and no k-dimensional subspace may hold kn/d rows or
        more.
    tol : float
        Largest :math:`\|Z^\top Z - \frac nd I\|_F/\|\frac nd I\|_F`, before z is
        rounded to the dtype of x: the iteration itself is in float64.
    max_iter : int

    Returns
    -------
    z : Tensor, (n, d)
        Unit rows.
    a : Tensor, (d, d)
        Invertible, of Frobenius norm 1: ``z`` is row-normalised ``x @ a``.

    Raises
    ------
    ValueError
        When x is no matrix of finite numbers; when n < d, a row is zero, or x has
        lower rank than d: no transform exists.
    RuntimeError
        When it has not converged after ``max_iter`` steps, with the subspace that holds
        too many rows if one shows.

    Notes
    -----
    Zhang, Martens & Grosse (2019), Theorem 7 and Algorithm 1, which normalises by
    :math:`A_{11}` instead; Forster (2002), Tyler (1987). Every row then has leverage
    d/n.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> x = ngd.data.gaussian(20, 4) * torch.tensor([1.0, 10.0, 1.0, 0.1])
    >>> z, a = ngd.data.forster(x)
    >>> torch.allclose(z.T @ z, 5 * torch.eye(4, dtype=torch.float64))
    True
    """
    z = _directions(x)
    n, d = z.shape
    a = torch.eye(d, dtype=z.dtype, device=z.device) / math.sqrt(d)
    for _ in range(max_iter + 1):
        values, vectors = torch.linalg.eigh(z.T @ z * (d / n))
        if (values - 1).norm() <= tol * math.sqrt(d):
            return z.to(x.dtype), a.to(x.dtype)
        # Beyond, rounding errors grow into rows of their own.
        if torch.linalg.cond(a) > 1e13:
            break
        t = vectors / values.sqrt() @ vectors.T
        z, a = normalise(z @ t, "unit"), a @ t
        a = a / a.norm()
    raise RuntimeError(
        f"no Forster transform found within {max_iter} steps; {_crowded(z, vectors)}"
    )


def _directions(x: Tensor) -> Float[Tensor, "n d"]:
    """Unit rows in float64, of what may have a transform; what may not is refused."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be a float matrix (n, d), not {x.dtype} {tuple(x.shape)}"
        )
    if not x.isfinite().all():
        raise ValueError("x holds NaN or infinity; drop such rows")
    n, d = x.shape
    if n < d:
        raise ValueError(
            f"x has {n} rows in {d} dimensions: Z^T Z = (n/d) I has rank {d}, so"
            " n >= d is needed"
        )
    z = normalise(x.double(), "unit", "drop it: x must not hold zero rows")
    rank = int(torch.linalg.matrix_rank(z, rtol=n * torch.finfo(x.dtype).eps))
    if rank < d:
        raise ValueError(
            f"x has rank {rank} < d = {d}: project it onto its range first"
        )
    return z


def _crowded(z: Float[Tensor, "n d"], vectors: Float[Tensor, "d d"]) -> str:
    """The subspace that collects more than its share of rows, among the principal ones
    of what did not converge.
    """
    n, d = z.shape
    for k in range(1, d):
        inside = int((z @ vectors[:, d - k :]).norm(dim=1).gt(1 - 1e-3).sum())
        if inside * d >= k * n:
            return (
                f"{inside} of {n} rows lie (nearly) in a subspace of dimension {k},"
                f" and fewer than {k * n / d:g} may"
            )
    return "raise max_iter: convergence is slow when n is just above d"
