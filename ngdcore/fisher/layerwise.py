r"""Fishers that couple whole layers: exact, layer-wise, block-diagonal,
block-tridiagonal.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..factors import Factors
from ..room import check_room
from ..solve import (
    Inverse,
    RankDeficient,
    inverse_block_tridiagonal,
    inverse_general,
    inverse_spd,
    worst,
)
from .base import OutputSide, check_factors, check_jitter, check_rank

__all__ = ["Exact", "LayerWise", "BlockDiagonal", "BlockTridiagonal"]

ZERO = 1e-10  # an eigenvalue or share of sigma below this, of the largest, is rounding


class Exact(OutputSide):
    r"""The exact Fisher, :math:`F = \frac1N J^\top J`: Gauss-Newton with the
    Moore-Penrose inverse.

    Direction :math:`J^\top (K + N\rho I)^{-1} g`; on training rows
    :math:`Q = K (K + N\rho I)^{-1}`, the identity without damping.

    Parameters
    ----------
    rank : {"raise", "pinv"}
        What to do with a numerically rank-deficient Gram: raise (naming duplicate or
        antipodal inputs if they explain it) or take the pseudo-inverse, eigenvalues
        below ``NC * eps * max`` counting as zero.
    jitter : float
        Added to the Gram's diagonal, relative to tr(K)/(NC). 0 unless asked; the step
        returns the absolute amount.

    Raises
    ------
    ValueError
        For an unknown ``rank`` or a negative ``jitter``.

    Notes
    -----
    Zhang, Martens & Grosse (2019), eq. 3; Karakida & Osawa (2020), eq. 13.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> fac = ngd.kernels.analytic(torch.eye(3, dtype=torch.float64), depth=3)
    >>> ngd.fisher.Exact().alpha(fac)
    1.0
    """

    def __init__(self, rank: str = "raise", jitter: float = 0.0):
        self.rank, self.jitter = check_rank(rank), check_jitter(jitter)

    def _isotropic(self, layers):
        return 1.0

    def _inverse(self, factors, damping):
        """From residuals (NC, k) to output weights that all layers share."""
        remedy = "use fewer samples, or fisher.MatrixFree()"
        check_room("a factorised Gram", 2 * factors.nbytes, factors.device, remedy)
        K = factors.gram()
        K.diagonal().add_(factors.columns * damping)
        return inverse_spd(K, self._guard(factors))

    def __repr__(self) -> str:
        return f"Exact(rank={self.rank!r}, jitter={self.jitter:g})"


class LayerWise(OutputSide):
    r"""The layer-wise class: layers coupled by one symmetric L x L matrix
    :math:`\Sigma`.

    With :math:`S = \mathrm{blockdiag}(J_1, \dots, J_L)`,
    :math:`F = \frac1N S^\top (\Sigma \otimes I) S`: block (l, l') of the exact Fisher
    times :math:`\Sigma_{ll'}`. On training rows, without damping,
    :math:`Q = (\mathbf 1^\top \Sigma^+ \mathbf 1)\,I`, whatever the width, as soon as
    :math:`\mathbf 1` lies in the range of :math:`\Sigma`.

    Parameters
    ----------
    sigma : Tensor or nested sequence, (L, L)
        Symmetric, one row a trained layer. It may be indefinite, or singular: the
        matrix of ones is `Exact`.
    rank, jitter :
        As for `Exact`, for every layer's Gram.

    Raises
    ------
    ValueError
        If ``sigma`` is not symmetric or does not match the number of trained layers; in
        an undamped solve, if the vector of ones is not in its range.
    RankDeficient
        In a solve, when a layer's Gram matrix is singular, or damping sits on a pole
        (see `poles`).

    Notes
    -----
    Karakida & Osawa (2020), Theorem 4.1, eqs. 15-16. Output weights solve
    :math:`\sum_{l'} \Sigma_{ll'} K_{l'} v_{l'} + N\rho\,v_l = g`. Undamped, with
    :math:`\Sigma x = \mathbf 1` and null vectors :math:`\nu_k` of :math:`\Sigma`:
    :math:`v_l = K_l^{-1}(x_l g + \sum_k \nu_{kl} z_k)`, the :math:`z_k` making the step
    as short as can be: the Moore-Penrose solution. Layers with
    :math:`x_l = \nu_{kl} = 0` do not move.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> fac = ngd.kernels.analytic(torch.eye(3, dtype=torch.float64), depth=2)
    >>> F = ngd.fisher.LayerWise([[1.0, 0.5], [0.5, 1.0]])
    >>> round(F.alpha(fac), 8)
    1.33333333
    """

    def __init__(
        self, sigma: Tensor | Sequence, rank: str = "raise", jitter: float = 0.0
    ):
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        if sigma.ndim != 2 or sigma.shape[0] != sigma.shape[1]:
            raise ValueError(
                "sigma must be a symmetric L x L matrix, one row a trained layer, not"
                f" of shape {tuple(sigma.shape)}"
            )
        if not torch.isfinite(sigma).all():
            raise ValueError("sigma holds NaN or infinity")
        if not torch.allclose(sigma, sigma.T):
            raise ValueError(
                "sigma is not symmetric: its largest |sigma - sigma.T| is"
                f" {float((sigma - sigma.T).abs().max()):.2g}; take (sigma + sigma.T)/2"
            )
        self.sigma = sigma
        self.rank, self.jitter = check_rank(rank), check_jitter(jitter)

    def _sigma(self, layers: int) -> Float[Tensor, "L L"]:
        """Sigma (L, L), checked against the number of trained layers."""
        if len(self.sigma) != layers:
            size = len(self.sigma)
            raise ValueError(
                f"sigma is {size} x {size}, but the network trains {layers} layers"
            )
        return self.sigma

    def _isotropic(self, layers):
        return float(_shares(self._sigma(layers))[0].sum())

    def poles(self, factors: Factors) -> Tensor:
        r"""The dampings at which :math:`F + \rho I` is singular, ascending: none if
        :math:`\Sigma` is semi-definite.

        They are the negative eigenvalues of F, found as those of
        :math:`-\frac1N C^\top (\Sigma \otimes I) C` with
        :math:`C C^\top = \mathrm{blockdiag}(K_l)`; by Sylvester's law there are NC for
        every negative one of sigma.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> fac = ngd.kernels.analytic(torch.eye(2, dtype=torch.float64), depth=3)
        >>> ngd.fisher.BlockTridiagonal().poles(fac)
        tensor([0.1550, 0.2489], dtype=torch.float64)
        """
        roots = []
        for K in check_factors(factors).layers():
            values, vectors = torch.linalg.eigh(K)
            roots.append(vectors * values.clamp_min(0).sqrt())
        sigma, n = self._sigma(factors.depth).to(roots[0]), len(roots[0])
        rows = [
            torch.cat([s * (root.T @ other) for s, other in zip(row, roots)], 1)
            for row, root in zip(sigma, roots)
        ]
        negative = int((torch.linalg.eigvalsh(sigma) < -ZERO).sum())
        poles = -torch.linalg.eigvalsh(torch.cat(rows))[: n * negative]
        return poles.flip(0) / factors.columns

    def _inverse(self, factors, damping):
        """From residuals (NC, k) to weights a layer, by the cheapest of three ways."""
        sigma, dtype = self._sigma(factors.depth).to(factors.device), factors.dtype
        if damping and torch.equal(sigma, sigma.diag().diag()):
            return self._decoupled(factors, (1 / sigma.diag()).to(dtype), damping)
        if damping:
            return self._coupled(factors, sigma, damping)
        shares, null = (part.to(dtype) for part in _shares(sigma))
        if null.shape[1]:
            return self._shortest(factors, shares, null)
        return self._decoupled(factors, shares, 0.0)

    def _decoupled(self, factors, shares: Float[Tensor, " L"], damping) -> Inverse:
        """One system a layer that moves, K_l + N rho share; v_l = its inverse on
        share r, (NC, k).
        """
        inverses, moving = {}, shares.nonzero().flatten().tolist()
        for l, K in zip(moving, factors.layers(moving)):
            K.diagonal().add_(factors.columns * damping * shares[l])
            inverses[l] = inverse_spd(K, self._guard(factors, f"layer {l}'s "))

        def apply(rhs):
            return [
                inverses[l](share * rhs) if l in inverses else None
                for l, share in enumerate(shares)
            ]

        return Inverse(apply, worst(inverses.values()))

    def _shortest(
        self, factors, shares: Float[Tensor, " L"], null: Float[Tensor, "L kernel"]
    ) -> Inverse:
        """The Moore-Penrose weights of a singular sigma: the null vectors' part makes
        the step shortest.
        """
        moving = [l for l in range(len(shares)) if shares[l] or null[l].any()]
        solved = [
            inverse_spd(K, self._guard(factors, f"layer {l}'s "))
            for l, K in zip(moving, factors.layers(moving))
        ]
        eye = torch.eye(factors.columns * factors.c).to(shares)
        inverses = {l: inverse(eye) for l, inverse in zip(moving, solved)}
        M = sum(
            torch.kron(torch.outer(null[l], null[l]), K.contiguous())
            for l, K in inverses.items()
        )
        guard = replace(self._guard(factors, "the null vectors' "), jitter=0.0)
        shortest = inverse_spd(M, guard)

        def apply(rhs):
            own = {l: K @ (shares[l] * rhs) for l, K in inverses.items()}
            b = -sum(torch.kron(null[l][:, None], v) for l, v in own.items())
            z = shortest(b).reshape(-1, *rhs.shape)
            return [
                own[l] + inverses[l] @ torch.einsum("k,knr->nr", null[l], z)
                if l in own
                else None
                for l in range(len(shares))
            ]

        return Inverse(apply, worst(solved))

    def _coupled(self, factors, sigma: Float[Tensor, "L L"], damping) -> Inverse:
        r"""Damped and coupled: Cholesky of the symmetric form, blockdiag(K_l) +
        N rho Sigma^-1 x I, for a positive definite sigma, LU otherwise.
        """
        grams = factors.layers()
        shift, size = factors.columns * damping, len(grams[0])
        if torch.linalg.eigvalsh(sigma)[0] > ZERO:
            inverse = torch.linalg.inv(sigma).to(factors.dtype).contiguous()
            M = torch.block_diag(*grams)
            M += shift * torch.kron(inverse, torch.eye(size).to(inverse))
            solved = inverse_spd(M, self._guard(factors, "the damped layer-wise "))

            def apply(rhs):
                b = torch.cat([share * rhs for share in inverse.sum(1)])
                return solved(b).split(size)

            return Inverse(apply, solved.info)
        M = [torch.cat([s * K for s, K in zip(row, grams)], 1) for row in sigma]
        M = torch.cat(M)
        M.diagonal().add_(shift)
        return self._away_from_poles(factors, damping, inverse_general(M))

    def _away_from_poles(self, factors, damping, inverse: Inverse) -> Inverse:
        """The inverse of all layers' system, (L NC, k), as one from a residual to each
        layer's weights; refused where damping sits on a pole.
        """
        size, condition = factors.columns * factors.c, inverse.info.condition
        n, eps = size * factors.depth, torch.finfo(factors.dtype).eps
        # condition is an estimate from above, up to n times too large
        limit = n / eps if factors.dtype == torch.float32 else 1 / (n * eps)
        if not condition < limit:
            raise RankDeficient(
                f"damping={damping:g} makes F + damping I singular to {factors.dtype}"
                f" (condition {condition:.1e}); its poles: "
                f"{self._describe_poles(factors, damping)}. Move damping by a few"
                " percent or out of the poles' band, or take 0, solved apart."
            )

        def apply(rhs):
            return inverse(rhs.repeat(factors.depth, 1)).split(size)

        return Inverse(apply, inverse.info)

    def _describe_poles(self, factors, damping) -> str:
        """The band of the poles and the nearest one, in words."""
        poles = self.poles(factors)
        if not len(poles):
            return "none but 0"
        near = float(poles[(poles - damping).abs().argmin()])
        low, high = float(poles[0]), float(poles[-1])
        return f"nearest at {near:.6g}, from {low:.3g} to {high:.3g}"

    def __repr__(self) -> str:
        if type(self) is LayerWise:
            return f"LayerWise({self.sigma.tolist()})"
        return f"{type(self).__name__}()"


def _shares(
    sigma: Float[Tensor, "L L"],
) -> tuple[Float[Tensor, " L"], Float[Tensor, "L kernel"]]:
    """x with sigma x = 1, shortest, and an orthonormal basis of sigma's null space, one
    vector a column.
    """
    values, vectors = torch.linalg.eigh(sigma)
    small = values.abs() <= ZERO * values.abs().max()
    kept, null = vectors[:, ~small], vectors[:, small]
    x = kept @ (kept.sum(0) / values[~small])
    if not torch.allclose(sigma @ x, torch.ones_like(x), atol=1e-6):
        raise ValueError(
            "sigma is singular and the vector of ones is not in its range: there is no"
            " undamped step"
        )
    return tuple(torch.where(part.abs() < ZERO, 0.0, part) for part in (x, null))


class BlockDiagonal(LayerWise):
    r"""The exact Fisher's diagonal blocks, one a layer: :math:`\Sigma = I`,
    :math:`\alpha = L`.

    Direction of layer l: :math:`J_l^\top (K_l + N\rho I)^{-1} g`; the best learning
    rate is 1/L.

    Parameters
    ----------
    rank, jitter :
        As for `Exact`, for every layer's Gram.

    Raises
    ------
    RankDeficient
        In a solve, when some layer's Gram matrix is singular. The last layer's needs at
        least N inputs.

    Notes
    -----
    Karakida & Osawa (2020), eq. 18.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> x = torch.eye(3, dtype=torch.float64)
    >>> sig = ngd.signals(ngd.models.MLP([3, 8, 1], seed=0), x)
    >>> d = ngd.fisher.BlockDiagonal().direction(sig, sig.outputs)
    >>> torch.allclose(sig.jvp(d), 2 * sig.outputs)
    True
    """

    def __init__(self, rank: str = "raise", jitter: float = 0.0):
        self.rank, self.jitter = check_rank(rank), check_jitter(jitter)

    def _sigma(self, layers: int) -> Tensor:
        return torch.eye(layers, dtype=torch.float64)


class BlockTridiagonal(LayerWise):
    r"""The exact Fisher's three central block diagonals: :math:`\Sigma = T_L`,
    :math:`\alpha = \lceil L/3 \rceil`.

    :math:`T_L`, with ones on its three central diagonals, is indefinite for
    :math:`L \ge 3` and singular for :math:`L = 3s + 2`, but :math:`T_L x = \mathbf 1`
    always has a solution. Without damping only layers with :math:`x_l \ne 0` move: the
    middle one for L = 3, the first and last for L = 4, the pairs (1, 2), (4, 5), ...
    for L = 3s + 2. With damping in the band of `poles` the step need not descend.

    Parameters
    ----------
    rank, jitter :
        As for `Exact`, for every layer's Gram.

    Raises
    ------
    RankDeficient
        In a solve, when the Gram of a layer that moves is singular, or damping sits on
        a pole, which is named.

    Notes
    -----
    Karakida & Osawa (2020), eq. 19 and Lemma 4.3. Damped systems are solved blockwise,
    by an orthogonal elimination that needs no pivots (leading blocks of :math:`T_L` are
    singular): of order :math:`L (NC)^3`.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> fac = ngd.kernels.analytic(torch.eye(3, dtype=torch.float64), depth=7)
    >>> round(ngd.fisher.BlockTridiagonal().alpha(fac), 8)
    3.0
    """

    def __init__(self, rank: str = "raise", jitter: float = 0.0):
        self.rank, self.jitter = check_rank(rank), check_jitter(jitter)

    def _sigma(self, layers: int) -> Tensor:
        return torch.ones(layers, layers, dtype=torch.float64).tril(1).triu(-1)

    def _coupled(self, factors, sigma, damping):
        grams = factors.layers()
        inverse = inverse_block_tridiagonal(grams, factors.columns * damping)
        return self._away_from_poles(factors, damping, inverse)
