r"""Fishers that couple whole layers, seen from the output space; `ngdcore.fisher` has these and all others.

A Fisher :math:`F` turns an output residual :math:`g` into a weight direction :math:`d = \frac1N F^+ J^\top g`, and a
pair of factors into the coefficient matrix :math:`Q = \frac1N J F^+ J^\top`. The one law holds for all of them:
pushing the direction forward gives :math:`J d = Q g`. With damping, :math:`F + \rho I` stands for :math:`F`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels import Factors, Info, RankDeficient, empirical, probe, solve_spd
from .models import Signals

__all__ = ["Fisher", "Exact", "LayerWise", "BlockDiagonal", "BlockTridiagonal"]


class Fisher:
    """What all Fishers share. Subclasses say how output weights are found (`_weights`)."""

    def coefficient(self, factors: Factors, damping: float = 0.0) -> Tensor:
        r"""The coefficient matrix :math:`Q = \frac1N J(x') (F + \rho I)^+ J(x)^\top`.

        Parameters
        ----------
        factors : Factors
            Square factors for the training rows, or ``fac.cross(x_test)`` for test rows.
        damping : float
            :math:`\rho \ge 0`, added to F (hence :math:`N\rho` to Gram matrices).

        Returns
        -------
        Tensor, (rows C, N C)
            To first order a step of size eta moves the outputs at x' by ``-eta * Q @ (f - y)``. 1/N is inside; for
            the exact Fisher on training rows Q is the identity.

        Raises
        ------
        RankDeficient
            When a Gram matrix to be inverted is singular to working precision.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> fac = ngd.kernels.analytic(torch.eye(3, dtype=torch.float64), depth=3)
        >>> torch.allclose(ngd.fisher.BlockDiagonal().coefficient(fac), 3 * torch.eye(3, dtype=torch.float64))
        True
        """
        train = factors.train
        identity = torch.eye(train.columns * train.c, dtype=train.dtype, device=train.device)
        weights, _ = self._weights(train, identity, check_damping(damping))
        if isinstance(weights, Tensor):
            return factors.gram() @ weights
        return sum(factors.layer(l) @ w for l, w in enumerate(weights) if w is not None)

    def alpha(self, factors: Factors, tol: float = 1e-8) -> float:
        r"""The isotropic constant :math:`\alpha = \mathrm{tr}\,Q/\mathrm{rank}\,Q`, if :math:`Q^2 = \alpha Q`.

        Parameters
        ----------
        factors : Factors
            Square factors.
        tol : float
            Largest :math:`\|Q^2 - \alpha Q\|_F/\|Q^2\|_F` that counts as isotropic.

        Raises
        ------
        ValueError
            When Q is not isotropic within ``tol``, or the factors are not square.

        Notes
        -----
        Karakida & Osawa (2020), eq. 12; the best learning rate is :math:`1/\alpha`.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> fac = ngd.kernels.analytic(torch.eye(3, dtype=torch.float64), depth=4)
        >>> round(ngd.fisher.BlockDiagonal().alpha(fac), 8)
        4.0
        """
        if factors.train is not factors:
            raise ValueError("factors must be square (training rows); alpha is not defined on test rows")
        Q = self.coefficient(factors)
        alpha = float(Q.trace() / torch.linalg.matrix_rank(Q))
        square = Q @ Q
        defect = float(torch.linalg.norm(square - alpha * Q) / torch.linalg.norm(square))
        if not defect <= tol:
            raise ValueError(
                f"Q is not isotropic: |QQ - alpha Q| / |QQ| = {defect:.2e} > tol = {tol:g}; look at its spectrum"
            )
        return alpha

    def direction(self, sig: Signals, g: Tensor, damping: float = 0.0, out: list[Tensor] | None = None) -> list[Tensor]:
        r"""The natural gradient :math:`\frac1N (F + \rho I)^+ J^\top g`, one tensor a trained parameter.

        Parameters
        ----------
        sig : Signals
            Signals of the training rows.
        g : Tensor, (N, C) or (NC,)
            Output residual, :math:`g = N\,\partial L/\partial f`: ``f - y`` for the default loss
            :math:`\frac1{2N}\sum|f - y|^2`.
        damping : float
            :math:`\rho \ge 0`.
        out : list of Tensor, optional
            Buffers to write to.

        Returns
        -------
        list of Tensor
            To be subtracted, times the learning rate.

        Raises
        ------
        ValueError
            For a residual of the wrong size, or one that is not finite.
        RankDeficient
            When a Gram matrix to be inverted is singular to working precision.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> sig = ngd.signals(ngd.models.MLP([3, 8, 1], seed=0), torch.eye(3, dtype=torch.float64))
        >>> d = ngd.fisher.Exact().direction(sig, sig.outputs)
        >>> torch.allclose(sig.jvp(d), sig.outputs)
        True
        """
        return self.solve(sig, g, damping, out)[0]

    def solve(
        self, sig: Signals, g: Tensor, damping: float = 0.0, out: list[Tensor] | None = None
    ) -> tuple[list[Tensor], Info]:
        """`direction`, and the `Info` of its solve."""
        g = check_residual(sig, g)
        weights, info = self._weights(empirical(sig), g[:, None], check_damping(damping))
        if not isinstance(weights, Tensor):
            weights = [torch.zeros_like(g) if w is None else w for w in weights]
        return sig.vjp(weights, out), info

    def best_alpha(self, factors: Factors) -> float:
        """:math:`1/` the best learning rate; classes that know it in closed form override this."""
        return self.alpha(factors)

    def _weights(self, factors: Factors, rhs: Tensor, damping: float):
        r"""Output weights v with :math:`\frac1N (F + \rho)^+ J^\top r = \sum_l J_l^\top v_l` for every column r of rhs.

        One tensor if all layers share it, else one a layer (None: the layer does not move); and an `Info`.
        """
        raise NotImplementedError


class Exact(Fisher):
    r"""The exact Fisher, :math:`F = \frac1N J^\top J`: Gauss-Newton with the Moore-Penrose inverse.

    Direction :math:`J^\top (K + N\rho I)^{-1} g`; on training rows :math:`Q = K (K + N\rho I)^{-1}`, the identity
    without damping.

    Parameters
    ----------
    rank : {"raise", "pinv"}
        What to do with a numerically rank-deficient Gram: raise (naming duplicate or antipodal inputs if they explain
        it) or take the pseudo-inverse, eigenvalues below ``NC * eps * max`` counting as zero.
    jitter : float
        Added to the Gram's diagonal, relative to tr(K)/(NC). 0 unless asked; the step returns the absolute amount.

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
        return solve_spd(K, rhs, self.rank, self.jitter, factors)

    def __repr__(self) -> str:
        return f"Exact(rank={self.rank!r}, jitter={self.jitter:g})"


class LayerWise(Fisher):
    r"""The layer-wise class: layers coupled by one symmetric L x L matrix :math:`\Sigma`.

    With :math:`S = \mathrm{blockdiag}(J_1, \dots, J_L)`, :math:`F = \frac1N S^\top (\Sigma \otimes I) S`: block (l, l')
    of the exact Fisher times :math:`\Sigma_{ll'}`. On training rows, without damping,
    :math:`Q = (\mathbf 1^\top \Sigma^+ \mathbf 1)\,I`, whatever the width, as soon as :math:`\mathbf 1` lies in the
    range of :math:`\Sigma`.

    Parameters
    ----------
    sigma : Tensor or nested sequence, (L, L)
        Symmetric, one row a trained layer. It may be indefinite, or singular: the matrix of ones is `Exact`.
    rank, jitter :
        As for `Exact`, for every layer's Gram.

    Raises
    ------
    ValueError
        If ``sigma`` is not symmetric or does not match the number of trained layers; in an undamped solve, if the
        vector of ones is not in its range.
    RankDeficient
        In a solve, when a layer's Gram matrix is singular, or damping sits on a pole (see `poles`).

    Notes
    -----
    Karakida & Osawa (2020), Theorem 4.1, eqs. 15-16. Output weights solve
    :math:`\sum_{l'} \Sigma_{ll'} K_{l'} v_{l'} + N\rho\,v_l = g`. Undamped, with :math:`\Sigma x = \mathbf 1` and null
    vectors :math:`\nu_k` of :math:`\Sigma`: :math:`v_l = K_l^{-1}(x_l g + \sum_k \nu_{kl} z_k)`, the :math:`z_k` making
    the step as short as can be: the Moore-Penrose solution. Layers with :math:`x_l = \nu_{kl} = 0` do not move.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> fac = ngd.kernels.analytic(torch.eye(3, dtype=torch.float64), depth=2)
    >>> F = ngd.fisher.LayerWise([[1.0, 0.5], [0.5, 1.0]])
    >>> round(F.alpha(fac), 8)
    1.33333333
    """

    def __init__(self, sigma: Tensor | Sequence, rank: str = "raise", jitter: float = 0.0):
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        if sigma.ndim != 2 or sigma.shape[0] != sigma.shape[1] or not torch.allclose(sigma, sigma.T):
            raise ValueError(
                f"sigma must be a symmetric L x L matrix, one row a trained layer, not of shape {tuple(sigma.shape)}"
            )
        self.sigma = sigma
        self.rank, self.jitter = check_solver(rank, jitter)

    def _sigma(self, layers: int) -> Tensor:
        if len(self.sigma) != layers:
            raise ValueError(f"sigma is {len(self.sigma)} x {len(self.sigma)}, but the network trains {layers} layers")
        return self.sigma

    def best_alpha(self, factors: Factors) -> float:
        return float(_shares(self._sigma(factors.depth))[0].sum())

    def poles(self, factors: Factors) -> Tensor:
        r"""The dampings at which :math:`F + \rho I` is singular, ascending: none if :math:`\Sigma` is semi-definite.

        They are the negative eigenvalues of F, found as those of :math:`-\frac1N C^\top (\Sigma \otimes I) C` with
        :math:`C C^\top = \mathrm{blockdiag}(K_l)`; by Sylvester's law there are NC for every negative one of sigma.

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
        rows = [torch.cat([s * (root.T @ other) for s, other in zip(row, roots)], 1) for row, root in zip(sigma, roots)]
        poles = -torch.linalg.eigvalsh(torch.cat(rows))[: n * int((torch.linalg.eigvalsh(sigma) < -1e-10).sum())]
        return poles.flip(0) / factors.columns

    def _weights(self, factors, rhs, damping):
        sigma = self._sigma(factors.depth).to(rhs)
        if damping and torch.equal(sigma, sigma.diag().diag()):
            return self._decoupled(factors, rhs, damping, 1 / sigma.diag(), 1 / sigma.diag())
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
                w, info = solve_spd(K, share * rhs, self.rank, self.jitter, factors, f"layer {l}'s ")
                infos.append(info)
            weights.append(w)
        return weights, Info(max(i.condition for i in infos), max(i.jitter for i in infos))

    def _shortest(self, factors, rhs, x, null):
        """The Moore-Penrose weights of a singular sigma: the null vectors' part makes the step shortest."""
        moving = [l for l in range(len(x)) if x[l] or null[l].any()]
        eye, inverses, infos = torch.eye(len(rhs)).to(rhs), {}, []
        for l in moving:
            name = f"layer {l}'s "
            inverse, info = solve_spd(factors.layer(l), eye, self.rank, self.jitter, factors, name)
            inverses[l] = inverse.contiguous()
            infos.append(info)
        M = sum(torch.kron(torch.outer(null[l], null[l]), inverses[l]) for l in moving)
        b = -sum(torch.kron(null[l][:, None], inverses[l] @ (x[l] * rhs)) for l in moving)
        z = solve_spd(M, b, self.rank, 0.0, factors, "the null vectors' ")[0].reshape(null.shape[1], *rhs.shape)
        weights = [None] * len(x)
        for l in moving:
            weights[l] = inverses[l] @ (x[l] * rhs + torch.einsum("k,knr->nr", null[l], z))
        return weights, Info(max(i.condition for i in infos), max(i.jitter for i in infos))

    def _coupled(self, factors, rhs, damping, sigma):
        """Damped and coupled: Cholesky of the symmetric form for a positive definite sigma, LU otherwise."""
        grams, shift = [factors.layer(l) for l in range(factors.depth)], factors.columns * damping
        eye = torch.eye(len(rhs)).to(rhs)
        if torch.linalg.eigvalsh(sigma)[0] > 1e-10:  # (blockdiag(K_l) + N rho Sigma^-1 x I) v = Sigma^-1 1 x g
            inverse = torch.linalg.inv(sigma).contiguous()
            M = torch.block_diag(*grams) + shift * torch.kron(inverse, eye)
            b = torch.cat([share * rhs for share in inverse.sum(1)])
            v, info = solve_spd(M, b, self.rank, self.jitter, factors, "the damped layer-wise ")
            return list(v.split(len(rhs))), info
        M = torch.cat([torch.cat([s * K for s, K in zip(row, grams)], 1) for row in sigma])
        M.diagonal().add_(shift)
        return self._away_from_poles(factors, damping, *solve_general(M, rhs.repeat(len(grams), 1)))

    def _away_from_poles(self, factors, damping, v, condition):
        eps = torch.finfo(v.dtype).eps  # condition is an estimate from above, up to len(v) times too large
        if not condition < (len(v) / eps if eps > 1e-10 else 1 / (len(v) * eps)):
            poles = self.poles(factors)
            near = f"nearest at {float(poles[(poles - damping).abs().argmin()]):.6g}, " if len(poles) else ""
            band = f"from {float(poles[0]):.3g} to {float(poles[-1]):.3g}" if len(poles) else "none but 0"
            raise RankDeficient(
                f"damping={damping:g} makes F + damping I singular to {v.dtype} (condition {condition:.1e}); its poles:"
                f" {near}{band}. Move damping by a few percent or out of the poles' band, or take 0, solved apart."
            )
        return list(v.split(len(v) // factors.depth)), Info(condition, 0.0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()" if type(self) is not LayerWise else f"LayerWise({self.sigma.tolist()})"


def _shares(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x with sigma x = 1, shortest, and an orthonormal basis of sigma's null space, one vector a column."""
    values, vectors = torch.linalg.eigh(sigma)
    small = values.abs() <= 1e-10 * values.abs().max()
    kept, null = vectors[:, ~small], vectors[:, small]
    x = kept @ (kept.sum(0) / values[~small])
    if not torch.allclose(sigma @ x, torch.ones_like(x), atol=1e-6):
        raise ValueError("sigma is singular and the vector of ones is not in its range: there is no undamped step")
    return torch.where(x.abs() < 1e-10, 0.0, x), torch.where(null.abs() < 1e-10, 0.0, null)


class BlockDiagonal(LayerWise):
    r"""The exact Fisher's diagonal blocks, one a layer: :math:`\Sigma = I`, :math:`\alpha = L`.

    Direction of layer l: :math:`J_l^\top (K_l + N\rho I)^{-1} g`; the best learning rate is 1/L.

    Parameters
    ----------
    rank, jitter :
        As for `Exact`, for every layer's Gram.

    Raises
    ------
    RankDeficient
        In a solve, when some layer's Gram matrix is singular. The last layer's needs at least N inputs.

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
    r"""The exact Fisher's three central block diagonals: :math:`\Sigma = T_L`, :math:`\alpha = \lceil L/3 \rceil`.

    :math:`T_L`, with ones on its three central diagonals, is indefinite for :math:`L \ge 3` and singular for
    :math:`L = 3s + 2`, but :math:`T_L x = \mathbf 1` always has a solution. Without damping only layers with
    :math:`x_l \ne 0` move: the middle one for L = 3, the first and last for L = 4, the pairs (1, 2), (4, 5), ... for
    L = 3s + 2. With damping in the band of `poles` the step need not descend.

    Parameters
    ----------
    rank, jitter :
        As for `Exact`, for every layer's Gram.

    Raises
    ------
    RankDeficient
        In a solve, when the Gram of a layer that moves is singular, or damping sits on a pole, which is named.

    Notes
    -----
    Karakida & Osawa (2020), eq. 19 and Lemma 4.3. Damped systems are solved blockwise, by an orthogonal elimination
    that needs no pivots (leading blocks of :math:`T_L` are singular): of order :math:`L (NC)^3`.

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
        grams, shift = [factors.layer(l) for l in range(factors.depth)], factors.columns * damping
        v, condition = solve_block_tridiagonal(grams, shift, rhs)
        return self._away_from_poles(factors, damping, v, condition)


def solve_general(M, rhs):
    """Solve M v = rhs by LU; and an estimate of M's condition number, infinite if M is singular."""
    trial = probe(len(M), M)
    v, failed = torch.linalg.solve_ex(M, torch.cat([rhs, trial], 1))
    condition = float("inf") if failed else float(M.norm() * v[:, -1].norm() * len(M) ** 0.5)
    return v[:, :-1], condition if condition == condition else float("inf")


def solve_block_tridiagonal(grams, shift, rhs):
    r"""Solve :math:`\sum_{|l'-l| \le 1} K_{l'} v_{l'} + s\,v_l = r` for all l, the v stacked; and a condition estimate.

    Block by block, the block below the diagonal is eliminated by a QR factorisation of the two, which is stable
    without pivots between blocks; then back-substitution. Time of order :math:`L n^3`, no matrix larger than 2n x 3n.
    """
    n, depth = len(rhs), len(grams)
    eye, zero, trial = torch.eye(n).to(rhs), torch.zeros(n, n).to(rhs), probe(n * depth, rhs).split(n)
    grams = [*grams, zero, zero]
    D, U, b, rows = grams[0] + shift * eye, grams[1], torch.cat([rhs, trial[0]], 1), []
    for l in range(depth):
        Q, R = torch.linalg.qr(torch.cat([D, grams[l]]) if l < depth - 1 else D, mode="complete")
        top = torch.cat([U, zero, b], 1)
        if l < depth - 1:
            below = torch.cat([grams[l + 1] + shift * eye, grams[l + 2], rhs, trial[l + 1]], 1)
            D, U, b = (Q[:, n:].T @ torch.cat([top, below])).split([n, n, b.shape[1]], 1)
            top = torch.cat([top, below])
        rows.append((R[:n], *(Q[:, :n].T @ top).split([n, n, rhs.shape[1] + 1], 1)))
    v = [torch.zeros_like(b), torch.zeros_like(b)]
    for R, U, W, b in reversed(rows):
        v.insert(0, torch.linalg.solve_triangular(R, b - U @ v[0] - W @ v[1], upper=True))
    v = torch.cat(v[:depth])
    size = sum(K.norm() ** 2 * (3 if 0 < l < depth - 1 else 2) for l, K in enumerate(grams[:depth])) ** 0.5
    condition = float((size + shift) * v[:, -1].norm() * len(v) ** 0.5)
    return v[:, :-1], condition if condition == condition else float("inf")


def check_solver(rank, jitter):
    if rank not in ("raise", "pinv"):
        raise ValueError(f"rank={rank!r} is unknown; use 'raise' or 'pinv'")
    if not jitter >= 0:
        raise ValueError(f"jitter={jitter} must be 0 or positive (relative to the mean diagonal of the Gram)")
    return rank, float(jitter)


def check_residual(sig, g) -> Tensor:
    if g.numel() != sig.n * sig.c or g.dtype != sig.outputs.dtype or g.device != sig.outputs.device:
        raise ValueError(f"g must hold N*C = {sig.n * sig.c} numbers of {sig.outputs.dtype} on {sig.outputs.device}")
    if not torch.isfinite(g).all():
        raise ValueError("g holds NaN or infinity: the run has diverged or the loss is not defined there")
    return g.reshape(-1)


def check_damping(damping) -> float:
    if not (damping >= 0 and damping < float("inf")):
        raise ValueError(f"damping={damping} must be 0 or positive; it is added to the Fisher matrix")
    return float(damping)
