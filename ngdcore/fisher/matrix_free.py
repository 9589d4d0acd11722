r"""The exact Fisher of more samples than a factorisation has room for."""

import torch

from ..factors import Factors
from ..iterative import Refined, nystroem
from ..room import room
from .base import OutputSide, check_count

__all__ = ["MatrixFree"]


class MatrixFree(OutputSide):
    r"""The exact Fisher, its system solved by iteration: `Exact` without the
    factorisation, for as many samples as K can be multiplied with.

    :math:`(K + N\rho I)\,v = g` is solved by conjugate gradients behind a Nyström
    preconditioner of some rows of K. Products are with K in float32 where there is room
    to store it, 4 (NC)^2 bytes, and matrix-free, a pull and a push, where there is not.
    Around them, in float64 and matrix-free, the residual is formed anew, and the solve
    goes on until it is below ``tol``: that is what a step's `Info` reports, with the
    number of products.

    Parameters
    ----------
    tol : float
        The largest :math:`|(K + N\rho)\,v - g|/|g|` to be returned.
    landmarks : int
        Rows of K in the preconditioner, from samples spread evenly over the data, in
        runs of 16. It holds as many vectors of length NC, in the products' dtype.
    stored : bool, optional
        Whether K is stored in float32. By default, if it takes less than 0.8 of the
        memory that is free.
    products : int
        The most products with K in one solve.

    Raises
    ------
    ValueError
        For parameters out of range, and for factors in float32, whose residual cannot
        be known: use ``net.double()`` and ``x.double()``.
    NotConverged
        When the products are spent, or make no progress, before ``tol`` is reached.

    Notes
    -----
    Conjugate gradients: Hestenes & Stiefel (1952); the preconditioner: Frangella, Tropp
    & Udell (2023); float32 within float64: iterative refinement, Carson & Higham
    (2018). The condition number is not estimated.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> x, net = ngd.data.sphere(40, 5), ngd.models.MLP([5, 64, 1], seed=0)
    >>> sig = ngd.signals(net, x)
    >>> d, info = ngd.fisher.MatrixFree(tol=1e-10).solve(sig, sig.outputs)
    >>> info.residual < 1e-10, torch.allclose(sig.jvp(d), sig.outputs)
    (True, True)
    """

    def __init__(
        self,
        tol: float = 1e-8,
        landmarks: int = 1000,
        stored: bool | None = None,
        products: int = 2000,
    ):
        if not 0 < tol < 1:
            raise ValueError(f"tol={tol} must lie between 0 and 1")
        self.tol, self.stored = float(tol), stored
        self.landmarks = check_count("landmarks", landmarks, 0)
        self.products = check_count("products", products, 1)

    def _isotropic(self, layers):
        return 1.0

    def _inverse(self, factors, damping):
        """From residuals (NC, k) to output weights that all layers share."""
        if factors.dtype != torch.float64:
            raise ValueError(
                f"{factors.dtype} hides a solve's residual: convert net and inputs to"
                " float64, net.double() and x.double(); K itself is stored in float32"
            )
        shift = factors.columns * damping
        stored, n = self.stored, factors.columns * factors.c
        if stored is None:
            stored = 4 * n**2 < 0.8 * room(factors.device)
        dtype = torch.float32 if stored else torch.float64
        rows, landmarks = factors.some_rows(self.landmarks)
        precondition = nystroem(rows, landmarks, shift, dtype)
        del rows

        def exact(v):
            return factors._times(v) + shift * v

        cheap = _stored(factors, shift) if stored else exact
        return Refined(exact, cheap, precondition, dtype, self.tol, self.products)

    def __repr__(self) -> str:
        stored = "" if self.stored is None else f", stored={self.stored}"
        return (
            f"MatrixFree(tol={self.tol:g}, landmarks={self.landmarks}{stored},"
            f" products={self.products})"
        )


def _stored(factors: Factors, shift: float):
    """Products with K + shift, K (NC, NC) in float32."""
    K = factors.narrow_gram(torch.float32)
    return lambda v: (K @ v).add_(v, alpha=shift)
