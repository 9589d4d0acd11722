r"""Every linear solve, with its guard: what is singular to working precision is
refused, or treated as asked.

A matrix is factorised once, by one of the functions here, to an `Inverse`, and applied
to as many right-hand sides as there are."""

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Info", "RankDeficient"]

WARN_SINGLE = 1e6  # a step in float32 keeps two or three digits there
SMALL = 50  # a matrix whose eigenvalues cost less than an estimate of the extreme ones
KEPT = 2**25  # numbers: what a solve may hold on to for the next right-hand side


class RankDeficient(ArithmeticError):
    """A Gram matrix (or damped system) has no inverse to working precision; the message
    says why and what to do.
    """


@dataclass(frozen=True)
class Info:
    """What a solve reports: the estimated condition number of the (worst) solved
    matrix, the jitter added to it, where it comes for free the loss's slope along the
    direction, and of an iterative solve the relative residual it reached and the
    products with the matrix it took."""

    condition: float
    jitter: float
    slope: float | None = None
    residual: float | None = None
    products: int | None = None


UNKNOWN = Info(float("nan"), 0.0)


@dataclass(frozen=True)
class Guard:
    """What to do with a matrix that is singular to working precision, and what to call
    it: ``name`` begins the message, ``why`` says what may be the cause.
    """

    rank: str = "raise"
    jitter: float = 0.0
    name: str = "the "
    why: Callable[[], str] = str

    def singular(self, K: Tensor, condition: float) -> RankDeficient:
        """The error for K, (n, n)."""
        n, use = len(K), "Use float64," if K.dtype == torch.float32 else "Use"
        return RankDeficient(
            f"{self.name}Gram matrix ({n} x {n}) is singular to {K.dtype} (estimated"
            f" condition number {condition:.1e}){self.why()}. {use} rank='pinv' for"
            " the pseudo-inverse, or damping."
        )


@dataclass(frozen=True)
class Inverse:
    """A factorised system: call it with right-hand sides; and the `Info` of its
    factorisation.
    """

    apply: Callable
    info: Info = UNKNOWN

    def __call__(self, rhs):
        return self.apply(rhs)


def worst(inverses) -> Info:
    """The largest condition number and jitter of several `Inverse`."""
    infos = [inverse.info for inverse in inverses]
    return Info(max(i.condition for i in infos), max(i.jitter for i in infos))


def _limit(dtype: torch.dtype, n: int) -> float:
    """The condition number from which an n x n matrix counts as singular."""
    eps = torch.finfo(dtype).eps
    return 1 / eps if dtype == torch.float32 else 1 / (n * eps)


def check_precision(K: Tensor) -> None:
    """Refuse to solve in half precision."""
    if K.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{K.dtype} keeps too few digits to solve a linear system: convert net and"
            " inputs to float64 (or float32), net.double() and x.double()"
        )


# ------------------------------------------------------------- symmetric and positive


def cholesky(
    K: Float[Tensor, "n n"], guard: Guard
) -> tuple[Float[Tensor, "n n"] | None, float]:
    """The lower factor of K, None if K is singular to working precision; and K's
    estimated condition number.
    """
    check_precision(K)
    factor, failed = torch.linalg.cholesky_ex(K)
    condition = float("inf") if failed else _condition(K, factor)
    if not condition < _limit(K.dtype, len(K)):
        return None, condition
    if K.dtype == torch.float32 and condition > WARN_SINGLE:
        warnings.warn(
            f"{guard.name}Gram matrix has a condition number above {WARN_SINGLE:.0e}:"
            " a float32 solve keeps few digits; use float64",
            RuntimeWarning,
            stacklevel=_callers_level(),
        )
    return factor, condition


def inverse_spd(K: Float[Tensor, "n n"], guard: Guard) -> Inverse:
    """The inverse of a symmetric positive (semi-)definite K, which is overwritten where
    there is jitter: by Cholesky, or as the guard says.
    """
    shift = guard.jitter and guard.jitter * float(K.diagonal().mean())
    if shift:
        K.diagonal().add_(shift)
    factor, condition = cholesky(K, guard)
    if factor is not None:
        return Inverse(lambda rhs: solve_cholesky(factor, rhs), Info(condition, shift))
    if guard.rank == "raise":
        raise guard.singular(K, condition)
    values, vectors = _spectrum(K)
    return Inverse(
        lambda rhs: vectors @ ((vectors.T @ rhs) / values[:, None]),
        Info(float(values[-1] / values[0]), shift),
    )


def solve_spd(K, rhs, rank="raise", jitter=0.0, why=str, name="the "):
    """Solve K v = rhs once, (n, n) and (n, k): v and its `Info`."""
    inverse = inverse_spd(K, Guard(rank, jitter, name, why))
    return inverse(rhs), inverse.info


def solve_cholesky(
    factor: Float[Tensor, "*b n n"], rhs: Float[Tensor, "*c n k"]
) -> Float[Tensor, "*c n k"]:
    half = torch.linalg.solve_triangular(factor, rhs, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _spectrum(K: Float[Tensor, "n n"]):
    """The eigenvalues of K that are not rounding errors, ascending, and their vectors,
    (n, r).
    """
    values, vectors = torch.linalg.eigh(K)
    keep = values > len(K) * torch.finfo(K.dtype).eps * values[-1]
    if not keep.any():
        raise RankDeficient(
            "the Gram matrix is zero: no output depends on a trained parameter"
        )
    return values[keep], vectors[:, keep]


# --------------------------------------------------------------------- ridge systems


@dataclass(frozen=True)
class Ridge(Inverse):
    r"""One of the two forms of :math:`(X^\top X + s)^+ X^\top = X^\top (X X^\top +
    s)^+`, factorised where it is smaller: over X's rows (``few``) or its columns.
    """

    few: bool = False


def ridge(X: Float[Tensor, "rows units"], shift: float, guard: Guard) -> Ridge:
    """Factorise X X^T + shift if rows are few, X^T X + shift otherwise."""
    few = len(X) <= X.shape[1]
    M = X @ X.T if few else X.T @ X
    M.diagonal().add_(shift)
    inverse = inverse_spd(M, guard)
    return Ridge(inverse.apply, inverse.info, few)


def inverse_covariance(
    X: Float[Tensor, "rows units"], shift: float, guard: Guard
) -> Inverse:
    r"""The inverse of :math:`X^\top X + s` on any right-hand side (..., units, k);
    where rows are few, from the eigenvectors of :math:`X X^\top`.
    """
    units = X.shape[1]
    if len(X) >= units:
        M = X.T @ X
        M.diagonal().add_(shift)
        return inverse_spd(M, guard)
    check_precision(X)
    values, vectors = _spectrum(X @ X.T)
    largest = float(values[-1])
    condition = largest / shift + 1 if shift else float("inf")
    regular = condition < _limit(X.dtype, units)
    if not regular and guard.rank == "raise":
        raise guard.singular(X.new_empty(units, 0), condition)
    basis = X.T @ (vectors / values.sqrt())  # (units, r), orthonormal
    inside = 1 / (values + shift) if not regular else values / (values + shift)

    def apply(rhs):
        part = basis @ (inside[:, None] * (basis.T @ rhs))
        return (rhs - part) / shift if regular else part

    least = shift if regular else float(values[0]) + shift
    return Inverse(apply, Info((largest + shift) / least, 0.0))


# ------------------------------------------------------------------ stacks of systems


def inverse_stack(M: Float[Tensor, "b n n"], guard: Guard) -> Callable:
    """A solver of b symmetric positive semi-definite systems at once; empty rows and
    columns get 0, singular systems what the guard says.
    """
    check_precision(M)
    n, eps, diagonal = M.shape[-1], torch.finfo(M.dtype).eps, M.diagonal(0, 1, 2)
    diagonal.add_((diagonal == 0).to(M))  # an empty row decouples; its right side is 0
    factor, failed = torch.linalg.cholesky_ex(M)
    pivots = factor.diagonal(0, 1, 2).square()
    if not failed.any() and (pivots > n * eps * diagonal).all():
        return lambda rhs: solve_cholesky(factor, rhs)
    if guard.rank == "raise":
        raise RankDeficient(
            f"{guard.name}units have linearly dependent active inputs; use rank='pinv'"
            " or damping"
        )
    inverse = torch.linalg.pinv(M, hermitian=True, rtol=n * eps)
    return lambda rhs: inverse @ rhs


def factorised(make: Callable[[], Iterator], numbers: int) -> Callable[[], Iterator]:
    """Go through the factors that ``make`` yields as often as wanted: a first time
    without keeping them, and kept from the second on if their ``numbers`` are few.
    """
    passes, kept = 0, []

    def again():
        nonlocal passes
        passes += 1
        if passes > 1 and numbers <= KEPT and not kept:
            kept.extend(make())
        return iter(kept) if kept else make()

    return again


# ------------------------------------------------------- indefinite and block systems


def probe(n: int, like: Tensor) -> Float[Tensor, "n 1"]:
    """A random unit column, always the same: the norm of its solution shows the size of
    an inverse.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(n, 1, generator=generator, dtype=torch.float64).to(like)
    return v / v.norm()


def _condition(K: Float[Tensor, "n n"], factor, sweeps: int = 6) -> float:
    """K's condition number; beyond small sizes an estimate from below, by a few power
    and inverse iterations on its factor.
    """
    if len(K) <= SMALL:
        values = torch.linalg.eigvalsh(K)
        return float(values[-1] / values[0]) if values[0] > 0 else float("inf")
    top = low = probe(len(K), K)
    for _ in range(sweeps):
        top = K @ top
        largest = top.norm()
        top = top / largest
        low = solve_cholesky(factor, low)
        inverse = low.norm()
        low = low / inverse
    return _number(largest * inverse)


def _number(condition) -> float:
    """A float, infinite for what is not a number."""
    condition = float(condition)
    return float("inf") if condition != condition else condition


def inverse_general(M: Float[Tensor, "n n"]) -> Inverse:
    """The inverse of M by LU; its condition number is estimated from above, up to n
    times too large, infinite if M is singular.
    """
    check_precision(M)
    LU, pivots, failed = torch.linalg.lu_factor_ex(M)

    def apply(rhs):
        return torch.linalg.lu_solve(LU, pivots, rhs)

    size = float("inf") if failed else apply(probe(len(M), M)).norm()
    return Inverse(apply, Info(_number(M.norm() * size * len(M) ** 0.5), 0.0))


def inverse_block_tridiagonal(
    grams: list[Float[Tensor, "n n"]], shift: float
) -> Inverse:
    r"""Solves :math:`\sum_{|l'-l| \le 1} K_{l'} v_{l'} + s\,v_l = r_l`, r and v
    stacked, (L n, k).

    Block by block, the block below the diagonal is eliminated by a QR factorisation of
    the two, which is stable without pivots between blocks; then back-substitution. Time
    of order :math:`L n^3`, no matrix larger than 2n x 3n."""
    check_precision(grams[0])
    n, depth, zero = len(grams[0]), len(grams), torch.zeros_like(grams[0])
    padded, eye, rows = [*grams, zero, zero], torch.eye(n).to(zero), []
    D, U = padded[0] + shift * eye, padded[1]
    for l in range(depth):
        last = l == depth - 1
        column = D if last else torch.cat([D, padded[l]])
        Q, R = torch.linalg.qr(column, mode="complete")
        right = torch.cat([U, zero], 1)
        if not last:
            below = torch.cat([padded[l + 1] + shift * eye, padded[l + 2]], 1)
            right = torch.cat([right, below])
        right = Q.T @ right
        rows.append((Q, R[:n], *right[:n].split(n, 1)))
        D, U = (zero, zero) if last else right[n:].split(n, 1)

    def apply(rhs):
        return _substitute_back(rows, rhs)

    ends = [2 if l in (0, depth - 1) else 3 for l in range(depth)]
    size = sum(k * K.norm() ** 2 for k, K in zip(ends, grams)) ** 0.5 + shift
    inverse = apply(probe(n * depth, zero)).norm()
    return Inverse(apply, Info(_number(size * inverse * (n * depth) ** 0.5), 0.0))


def _substitute_back(rows, rhs: Float[Tensor, "Ln k"]) -> Float[Tensor, "Ln k"]:
    """The rotations of ``rows``, (Q, R, U, W) a block, on rhs; then R v_l + U v_{l+1}
    + W v_{l+2} = b_l from the last block up.
    """
    parts = rhs.split(len(rhs) // len(rows))
    b, n, right = parts[0], len(parts[0]), []
    for (Q, *_), below in zip(rows, [*parts[1:], parts[0][:0]]):
        rotated = Q.T @ torch.cat([b, below])
        right.append(rotated[:n])
        b = rotated[n:]
    v = [torch.zeros_like(parts[0])] * 2
    for (_, R, U, W), b in zip(reversed(rows), reversed(right)):
        v.insert(
            0, torch.linalg.solve_triangular(R, b - U @ v[0] - W @ v[1], upper=True)
        )
    return torch.cat(v[:-2])


def pinv_of_rank(
    M: Float[Tensor, "rows columns"], rank: int
) -> Float[Tensor, "columns rows"]:
    """The pseudo-inverse of a matrix that must have this rank."""
    check_precision(M)
    U, values, V = torch.linalg.svd(M, full_matrices=False)
    if not values[rank - 1] > max(M.shape) * torch.finfo(M.dtype).eps * values[0]:
        raise RankDeficient(
            f"a product of weights (or the inputs) has rank below {rank}: the net is at"
            " a saddle"
        )
    return V[:rank].T / values[:rank] @ U[:, :rank].T


# --------------------------------------------------------------------------- spectra


def edges_of_spectrum(
    product: Callable, like: Float[Tensor, " n"], products: int = 24
) -> tuple[float, float]:
    """Least non-zero and greatest eigenvalue of a symmetric operator v -> product(v) on
    vectors (n,), from a few products: Lanczos, every vector kept orthogonal to all.

    The greatest is an upper estimate (its residual is added), exact where n is at most
    ``products`` or the spectrum has few values."""
    start = product(probe(len(like), like)[:, 0])  # what it never reaches is left out
    size, basis, diagonal, off = start.norm(), [], [], []
    for _ in range(min(len(like), products)):
        if not size > 1e-10 * max([1e-300, *map(abs, diagonal), *off]):
            break
        off.append(float(size))
        basis.append(start / size)
        start = product(basis[-1])
        diagonal.append(float(basis[-1] @ start))
        V = torch.stack(basis)
        for _ in range(2):  # once leaves rounding errors of the first pass
            start = start - V.T @ (V @ start)
        size = start.norm()
    if not basis:
        raise RankDeficient("no output depends on a trained parameter")
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    beside = torch.tensor(off[1:], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(T + beside.diag(1) + beside.diag(-1))
    return float(values[0]), float(values[-1] + size.cpu() * vectors[-1, -1].abs())


def _callers_level() -> int:
    """The ``stacklevel`` at which the calling function's warning points to the first
    line outside this package and torch, whose wrappers stand between.
    """
    frame, level = sys._getframe(1), 1
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] not in (
            "ngdcore",
            "torch",
        ):
            break
        frame, level = frame.f_back, level + 1
    return level
