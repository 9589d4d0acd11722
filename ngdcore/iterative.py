r"""Symmetric positive definite systems too large to be factorised: conjugate gradients
behind a Nyström preconditioner, refined until the residual itself, formed anew, is
small."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .solve import Info, RankDeficient

__all__ = ["NotConverged"]

Product = Callable[[Tensor], Tensor]
STEP = 1e-3  # what one round of conjugate gradients in float32 is asked for
GAIN = 0.5  # a round that leaves more than this of the residual has stalled


class NotConverged(RankDeficient):
    """An iterative solve ended before its residual was below the tolerance; the message
    says what was reached, and what to do.
    """


class Refined:
    r"""The inverse of a symmetric positive definite A, by rounds of preconditioned
    conjugate gradients on a cheap copy of A, each on the residual :math:`b - A x`
    formed with A itself.

    Call it with right-hand sides (n, k). After a call ``info`` tells how many products
    were taken, and the largest :math:`|A x - b|/|b|` of the columns. ``cheap`` may be
    in another dtype, that of ``like``.
    """

    def __init__(
        self,
        exact: Product,
        cheap: Product,
        precondition: Product,
        like: torch.dtype,
        tol: float,
        products: int,
    ):
        self.exact, self.cheap, self.precondition = exact, cheap, precondition
        self.like, self.tol, self.products = like, tol, products
        self.info = Info(float("nan"), 0.0)

    def __call__(self, rhs: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        size = torch.linalg.vector_norm(rhs, dim=0)
        size = torch.where(size == 0, 1.0, size)
        x, r, left, used = torch.zeros_like(rhs), rhs / size, self.products, 0
        reached = _norm(r)
        while reached > self.tol:
            goal = max(self.tol / reached / 2, STEP if self.like != rhs.dtype else 0.0)
            d, taken = conjugate_gradients(
                self.cheap, self.precondition, r.to(self.like), goal, left - used
            )
            x, used, before = x + d.to(rhs), used + taken, reached
            r = rhs / size - self.exact(x)
            reached = _norm(r)
            spent, stalled = used >= self.products, not reached < GAIN * before
            if reached > self.tol and (spent or stalled):
                raise self._unfinished(min(before, reached), used, spent)
        self.info = Info(float("nan"), 0.0, residual=reached, products=used)
        return x * size

    def _unfinished(self, reached: float, used: int, spent: bool) -> NotConverged:
        """The error, with what was reached."""
        told, remedy = "no further progress", "a larger tol"
        if spent:
            told, remedy = "not done", "more products or landmarks"
        return NotConverged(
            f"{told} after {used} products with K: the residual |K v - g|/|g| is"
            f" {reached:.1e}, and tol={self.tol:g} was asked for; use damping, or"
            f" {remedy}"
        )


def _norm(r: Float[Tensor, "n k"]) -> float:
    """The largest norm of a column."""
    return float(torch.linalg.vector_norm(r, dim=0).max())


def conjugate_gradients(
    product: Product,
    precondition: Product,
    rhs: Float[Tensor, "n k"],
    reduction: float,
    products: int,
) -> tuple[Float[Tensor, "n k"], int]:
    """A x = rhs, column by column but with joint products, until every residual is
    ``reduction`` times its start by the recursion, or the products are spent, or
    rounding has made A look indefinite; x, and how many products were taken.
    """
    x, r = torch.zeros_like(rhs), rhs.clone()
    goal = reduction * torch.linalg.vector_norm(rhs, dim=0)
    p = z = precondition(r)
    rz, used = (r * z).sum(0), 0
    while used < products:
        q, used = product(p), used + 1
        curvature = (p * q).sum(0)
        if not (curvature[rz > 0] > 0).all():
            break
        a = torch.where(rz > 0, rz / curvature, 0.0)
        x, r = x + a * p, r - a * q
        if (torch.linalg.vector_norm(r, dim=0) <= goal).all():
            break
        z = precondition(r)
        before, rz = rz, (r * z).sum(0)
        p = z + torch.where(before > 0, rz / before, 0.0) * p
    return x, used


def nystroem(
    rows: Float[Tensor, "r n"],
    landmarks: Float[Tensor, " r"],
    shift: float,
    dtype: torch.dtype,
) -> Product:
    r"""A preconditioner of :math:`K + s` from some of K's rows, in this dtype.

    With the eigenpairs :math:`U, \Lambda` of :math:`K_{\cdot r} K_{rr}^+ K_{r\cdot}`
    and the least of them, :math:`\lambda_r`: :math:`v \mapsto v - U\,\frac{\Lambda -
    \lambda_r}{\Lambda + s}\,U^\top v` (Frangella, Tropp & Udell 2023, eq. 1.3, times
    :math:`\lambda_r + s` on its complement).
    """
    if not len(rows):
        return lambda v: v
    K = rows[:, landmarks]
    values, vectors = torch.linalg.eigh((K + K.mT) / 2)
    keep = values > len(K) * torch.finfo(K.dtype).eps * values[-1]
    half = (vectors[:, keep] / values[keep].sqrt()).mT @ rows  # (kept, n)
    values, vectors = torch.linalg.eigh(half @ half.mT)
    U = ((vectors / values.sqrt()).mT @ half).to(dtype)
    inside = ((values - values[0]) / (values + shift)).to(dtype)
    return lambda v: v - U.mT @ (inside[:, None] * (U @ v))
