r"""Every linear solve, with its guard: what is singular to working precision is
refused, or treated as asked.
"""

import warnings
from dataclasses import dataclass

import torch

__all__ = ["Info", "RankDeficient"]

WARN_FLOAT32 = 1e6


class RankDeficient(ArithmeticError):
    """A Gram matrix (or damped system) has no inverse to working precision; the message
    says why and what to do.
    """


@dataclass(frozen=True)
class Info:
    """What a solve reports: the estimated condition number of the (worst) solved
    matrix, the jitter added to it, and, where it comes for free, the loss's slope along
    the direction."""

    condition: float
    jitter: float
    slope: float | None = None


def solve_spd(K, rhs, rank, jitter, why, name="the "):
    """Solve K v = rhs for a symmetric positive (semi-)definite K, or a stack: Cholesky
    and two triangular solves.
    """
    shift = jitter * K.diagonal(0, -2, -1).mean(-1, keepdim=True)
    K.diagonal(0, -2, -1).add_(shift)
    shift = float(shift.max())
    factor, failed = torch.linalg.cholesky_ex(K)
    condition = float("inf") if failed.any() else _condition(K, factor)
    eps = torch.finfo(K.dtype).eps
    single = eps > 1e-10
    if not condition < (1 / eps if single else 1 / (K.shape[-1] * eps)):
        if K.ndim > 2:
            found = [solve_spd(k, r, rank, 0.0, why, name) for k, r in zip(K, rhs)]
            return torch.stack([v for v, _ in found]), Info(
                max(i.condition for _, i in found), shift
            )
        if rank == "pinv":
            return solve_pinv(K, rhs, shift)
        raise RankDeficient(
            f"{name}Gram matrix ({len(K)} x {len(K)}) is singular to {K.dtype}"
            f" (estimated condition number {condition:.1e}){why()}."
            + (" Use float64," if single else " Use")
            + " rank='pinv' for the pseudo-inverse, or damping."
        )
    if single and condition > WARN_FLOAT32:
        warnings.warn(
            f"{name}Gram matrix has condition number {condition:.1e}: a float32 solve keeps few digits; use float64",
            RuntimeWarning,
            stacklevel=5,
        )
    half = torch.linalg.solve_triangular(factor, rhs, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True), Info(
        condition, shift
    )


def solve_pinv(K, rhs, shift):
    values, vectors = torch.linalg.eigh(K)
    keep = values > len(K) * torch.finfo(K.dtype).eps * values[-1]
    if not keep.any():
        raise RankDeficient(
            "the Gram matrix is zero: no output depends on a trained parameter"
        )
    values, vectors = values[keep], vectors[:, keep]
    return vectors @ ((vectors.T @ rhs) / values[:, None]), Info(
        float(values[-1] / values[0]), shift
    )


def solve_batch(M, rhs, rank, name):
    """Solve a batch of symmetric positive semi-definite systems; empty rows and columns
    get 0, singular ones `rank`.
    """
    n, eps, diagonal = M.shape[-1], torch.finfo(M.dtype).eps, M.diagonal(dim1=1, dim2=2)
    diagonal.add_(
        (diagonal == 0).to(M)
    )  # an empty row decouples; its right-hand side is 0
    factor, failed = torch.linalg.cholesky_ex(M)
    if (
        not failed.any()
        and (factor.diagonal(dim1=1, dim2=2).square() > n * eps * diagonal).all()
    ):
        half = torch.linalg.solve_triangular(factor, rhs, upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True)
    if rank == "raise":
        raise RankDeficient(
            f"{name}units have linearly dependent active inputs; use rank='pinv' or damping"
        )
    return torch.linalg.pinv(M, hermitian=True, rtol=n * eps) @ rhs


def probe(n, like):
    """A random unit column, always the same: the norm of its solution shows the size of
    an inverse.
    """
    v = torch.randn(
        n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(like)
    return v / v.norm()


def _condition(K, factor, sweeps: int = 6) -> float:
    """Estimate (from below) of K's (largest) condition number: a few power and inverse
    iterations on its factor.
    """
    top = low = probe(K.shape[-1], K)
    for _ in range(sweeps):
        top = K @ top
        largest = top.norm(dim=-2, keepdim=True)
        top = top / largest
        half = torch.linalg.solve_triangular(factor, low, upper=False)
        low = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        inverse = low.norm(dim=-2, keepdim=True)
        low = low / inverse
    condition = float((largest * inverse).max())
    return condition if condition == condition else float("inf")


def solve_general(M, rhs):
    """Solve M v = rhs by LU; and an estimate of M's condition number, infinite if M is
    singular.
    """
    trial = probe(len(M), M)
    v, failed = torch.linalg.solve_ex(M, torch.cat([rhs, trial], 1))
    condition = (
        float("inf") if failed else float(M.norm() * v[:, -1].norm() * len(M) ** 0.5)
    )
    return v[:, :-1], condition if condition == condition else float("inf")


def solve_block_tridiagonal(grams, shift, rhs):
    r"""Solve :math:`\sum_{|l'-l| \le 1} K_{l'} v_{l'} + s\,v_l = r` for all l, the v
    stacked; and a condition estimate.

    Block by block, the block below the diagonal is eliminated by a QR factorisation of
    the two, which is stable without pivots between blocks; then back-substitution. Time
    of order :math:`L n^3`, no matrix larger than 2n x 3n."""
    n, depth = len(rhs), len(grams)
    eye, zero, trial = (
        torch.eye(n).to(rhs),
        torch.zeros(n, n).to(rhs),
        probe(n * depth, rhs).split(n),
    )
    grams = [*grams, zero, zero]
    D, U, b, rows = grams[0] + shift * eye, grams[1], torch.cat([rhs, trial[0]], 1), []
    for l in range(depth):
        Q, R = torch.linalg.qr(
            torch.cat([D, grams[l]]) if l < depth - 1 else D, mode="complete"
        )
        top = torch.cat([U, zero, b], 1)
        if l < depth - 1:
            below = torch.cat(
                [grams[l + 1] + shift * eye, grams[l + 2], rhs, trial[l + 1]], 1
            )
            D, U, b = (Q[:, n:].T @ torch.cat([top, below])).split(
                [n, n, b.shape[1]], 1
            )
            top = torch.cat([top, below])
        rows.append((R[:n], *(Q[:, :n].T @ top).split([n, n, rhs.shape[1] + 1], 1)))
    v = [torch.zeros_like(b), torch.zeros_like(b)]
    for R, U, W, b in reversed(rows):
        v.insert(
            0, torch.linalg.solve_triangular(R, b - U @ v[0] - W @ v[1], upper=True)
        )
    v = torch.cat(v[:depth])
    size = (
        sum(
            K.norm() ** 2 * (3 if 0 < l < depth - 1 else 2)
            for l, K in enumerate(grams[:depth])
        )
        ** 0.5
    )
    condition = float((size + shift) * v[:, -1].norm() * len(v) ** 0.5)
    return v[:, :-1], condition if condition == condition else float("inf")


def pinv_of_rank(M, rank):
    """The pseudo-inverse of a matrix that must have this rank."""
    U, values, V = torch.linalg.svd(M, full_matrices=False)
    if not values[rank - 1] > max(M.shape) * torch.finfo(M.dtype).eps * values[0]:
        raise RankDeficient(
            f"a product of weights (or the inputs) has rank below {rank}: the net is at a saddle"
        )
    return V[:rank].T / values[:rank] @ U[:, :rank].T
