r"""Fishers that couple whole layers: exact, layer-wise, block-diagonal,
block-tridiagonal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..factors import Factors, culprits
from ..solve import (
    Info,
    RankDeficient,
    solve_block_tridiagonal,
    solve_general,
    solve_spd,
)
from .base import Fisher, check_solver

__all__ = ["Exact", "LayerWise", "BlockDiagonal", "BlockTridiagonal"]


class Exact(Fisher):
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
        self.rank, self.jitter = check_solver(rank, jitter)

    def best_alpha(self, factors: Factors) -> float:
        return 1.0

    def _weights(self, factors, rhs, damping):
        K = factors.gram()
        K.diagonal().add_(factors.columns * damping)
        return solve_spd(K, rhs, self.rank, self.jitter, lambda: culprits(factors))

    def __repr__(self) -> str:
        return f"Exact(rank={self.rank!r}, jitter={self.jitter:g})"


class LayerWise(Fisher):
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
        if (
            sigma.ndim != 2
            or sigma.shape[0] != sigma.shape[1]
            or not torch.allclose(sigma, sigma.T)
        ):
            raise ValueError(
                f"sigma must be a symmetric L x L matrix, one row a trained layer, not of shape {tuple(sigma.shape)}"
            )
        self.sigma = sigma
        self.rank, self.jitter = check_solver(rank, jitter)

    def _sigma(self, layers: int) -> Tensor:
        if len(self.sigma) != layers:
            raise ValueError(
                f"sigma is {len(self.sigma)} x {len(self.sigma)}, but the network trains {layers} layers"
            )
        return self.sigma

    def best_alpha(self, factors: Factors) -> float:
        return float(_shares(self._sigma(factors.depth))[0].sum())

    def full_step(self, sig) -> float:
        return 1 / float(_shares(self._sigma(len(sig.H)))[0].sum())

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
        for l in range(factors.depth):
            values, vectors = torch.linalg.eigh(factors.layer(l))
            roots.append(vectors * values.clamp_min(0).sqrt())
        sigma, n = self._sigma(factors.depth).to(roots[0]), len(roots[0])
        rows = [
            torch.cat([s * (root.T @ other) for s, other in zip(row, roots)], 1)
            for row, root in zip(sigma, roots)
        ]
        poles = -torch.linalg.eigvalsh(torch.cat(rows))[
            : n * int((torch.linalg.eigvalsh(sigma) < -1e-10).sum())
        ]
        return poles.flip(0) / factors.columns

    def _weights(self, factors, rhs, damping):
        sigma = self._sigma(factors.depth).to(rhs)
        if damping and torch.equal(sigma, sigma.diag().diag()):
            return self._decoupled(
                factors, rhs, damping, 1 / sigma.diag(), 1 / sigma.diag()
            )
        if damping:
            return self._coupled(factors, rhs, damping, sigma)
        x, null = _shares(sigma)
        if null.shape[1]:
            return self._shortest(factors, rhs, x, null)
        return self._decoupled(factors, rhs, 0.0, x, x)

    def _decoupled(self, factors, rhs, damping, shares, shifts):
        """One solve a layer that moves."""
        weights, infos = [], []
        for l, (share, shift) in enumerate(zip(shares, shifts)):
            w = None
            if share:
                K = factors.layer(l)
                K.diagonal().add_(factors.columns * damping * shift)
                w, info = solve_spd(
                    K,
                    share * rhs,
                    self.rank,
                    self.jitter,
                    lambda: culprits(factors),
                    f"layer {l}'s ",
                )
                infos.append(info)
            weights.append(w)
        return weights, Info(
            max(i.condition for i in infos), max(i.jitter for i in infos)
        )

    def _shortest(self, factors, rhs, x, null):
        """The Moore-Penrose weights of a singular sigma: the null vectors' part makes
        the step shortest.
        """
        moving = [l for l in range(len(x)) if x[l] or null[l].any()]
        eye, inverses, infos = torch.eye(len(rhs)).to(rhs), {}, []
        for l in moving:
            name = f"layer {l}'s "
            inverse, info = solve_spd(
                factors.layer(l),
                eye,
                self.rank,
                self.jitter,
                lambda: culprits(factors),
                name,
            )
            inverses[l] = inverse.contiguous()
            infos.append(info)
        M = sum(torch.kron(torch.outer(null[l], null[l]), inverses[l]) for l in moving)
        b = -sum(
            torch.kron(null[l][:, None], inverses[l] @ (x[l] * rhs)) for l in moving
        )
        z = solve_spd(
            M, b, self.rank, 0.0, lambda: culprits(factors), "the null vectors' "
        )[0].reshape(null.shape[1], *rhs.shape)
        weights = [None] * len(x)
        for l in moving:
            weights[l] = inverses[l] @ (
                x[l] * rhs + torch.einsum("k,knr->nr", null[l], z)
            )
        return weights, Info(
            max(i.condition for i in infos), max(i.jitter for i in infos)
        )

    def _coupled(self, factors, rhs, damping, sigma):
        """Damped and coupled: Cholesky of the symmetric form for a positive definite
        sigma, LU otherwise.
        """
        grams, shift = (
            [factors.layer(l) for l in range(factors.depth)],
            factors.columns * damping,
        )
        eye = torch.eye(len(rhs)).to(rhs)
        if (
            torch.linalg.eigvalsh(sigma)[0] > 1e-10
        ):  # (blockdiag(K_l) + N rho Sigma^-1 x I) v = Sigma^-1 1 x g
            inverse = torch.linalg.inv(sigma).contiguous()
            M = torch.block_diag(*grams) + shift * torch.kron(inverse, eye)
            b = torch.cat([share * rhs for share in inverse.sum(1)])
            v, info = solve_spd(
                M,
                b,
                self.rank,
                self.jitter,
                lambda: culprits(factors),
                "the damped layer-wise ",
            )
            return list(v.split(len(rhs))), info
        M = torch.cat(
            [torch.cat([s * K for s, K in zip(row, grams)], 1) for row in sigma]
        )
        M.diagonal().add_(shift)
        return self._away_from_poles(
            factors, damping, *solve_general(M, rhs.repeat(len(grams), 1))
        )

    def _away_from_poles(self, factors, damping, v, condition):
        eps = torch.finfo(
            v.dtype
        ).eps  # condition is an estimate from above, up to len(v) times too large
        if not condition < (len(v) / eps if eps > 1e-10 else 1 / (len(v) * eps)):
            poles = self.poles(factors)
            near = (
                f"nearest at {float(poles[(poles - damping).abs().argmin()]):.6g}, "
                if len(poles)
                else ""
            )
            band = (
                f"from {float(poles[0]):.3g} to {float(poles[-1]):.3g}"
                if len(poles)
                else "none but 0"
            )
            raise RankDeficient(
                f"damping={damping:g} makes F + damping I singular to {v.dtype} (condition {condition:.1e}); its poles:"
                f" {near}{band}. Move damping by a few percent or out of the poles' band, or take 0, solved apart."
            )
        return list(v.split(len(v) // factors.depth)), Info(condition, 0.0)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}()"
            if type(self) is not LayerWise
            else f"LayerWise({self.sigma.tolist()})"
        )


def _shares(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x with sigma x = 1, shortest, and an orthonormal basis of sigma's null space, one
    vector a column.
    """
    values, vectors = torch.linalg.eigh(sigma)
    small = values.abs() <= 1e-10 * values.abs().max()
    kept, null = vectors[:, ~small], vectors[:, small]
    x = kept @ (kept.sum(0) / values[~small])
    if not torch.allclose(sigma @ x, torch.ones_like(x), atol=1e-6):
        raise ValueError(
            "sigma is singular and the vector of ones is not in its range: there is no undamped step"
        )
    return torch.where(x.abs() < 1e-10, 0.0, x), torch.where(
        null.abs() < 1e-10, 0.0, null
    )


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
    >>> sig = ngd.signals(ngd.models.MLP([3, 8, 1], seed=0), torch.eye(3, dtype=torch.float64))
    >>> d = ngd.fisher.BlockDiagonal().direction(sig, sig.outputs)
    >>> torch.allclose(sig.jvp(d), 2 * sig.outputs)
    True
    """

    def __init__(self, rank: str = "raise", jitter: float = 0.0):
        self.rank, self.jitter = check_solver(rank, jitter)

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
        self.rank, self.jitter = check_solver(rank, jitter)

    def _sigma(self, layers: int) -> Tensor:
        return torch.ones(layers, layers, dtype=torch.float64).tril(1).triu(-1)

    def _coupled(self, factors, rhs, damping, sigma):
        grams, shift = (
            [factors.layer(l) for l in range(factors.depth)],
            factors.columns * damping,
        )
        v, condition = solve_block_tridiagonal(grams, shift, rhs)
        return self._away_from_poles(factors, damping, v, condition)
