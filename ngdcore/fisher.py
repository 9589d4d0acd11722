r"""Approximate Fisher matrices, one small class each, seen from the output space.

A Fisher :math:`F` turns an output residual :math:`g` into a weight direction :math:`d = \frac1N F^+ J^\top g`, and a
pair of factors into the coefficient matrix :math:`Q = \frac1N J F^+ J^\top`. The one law holds for all of them:
pushing the direction forward gives :math:`J d = Q g`. With damping, :math:`F + \rho I` stands for :math:`F`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels import Factors, Info, RankDeficient, empirical, solve_indefinite, solve_spd
from .models import Signals

__all__ = ["Fisher", "Exact", "LayerWise", "BlockDiagonal", "KFAC", "Info", "RankDeficient"]


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
        weights, _ = self._weights(train, identity, _check_damping(damping))
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
        weights, info = self._weights(empirical(sig), _check_residual(sig, g)[:, None], _check_damping(damping))
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
        self.rank, self.jitter = _check_solver(rank, jitter)

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
    :math:`Q = (\mathbf 1^\top \Sigma^{-1} \mathbf 1)\,I`, whatever the width.

    Parameters
    ----------
    sigma : Tensor or nested sequence, (L, L)
        Symmetric and nonsingular, one row a trained layer. The matrix of ones, singular, is `Exact`.
    rank, jitter :
        As for `Exact`, for every layer's Gram.

    Raises
    ------
    ValueError
        If ``sigma`` is not symmetric, is singular, or does not match the number of trained layers.
    RankDeficient
        In a solve, when a layer's Gram matrix is singular, or damping sits on a pole of an indefinite ``sigma``.

    Notes
    -----
    Karakida & Osawa (2020), Theorem 4.1, eqs. 15-16. Output weights solve
    :math:`\sum_{l'} \Sigma_{ll'} K_{l'} v_{l'} + N\rho\,v_l = g`; without damping or coupling, one solve a layer.

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
        if torch.linalg.matrix_rank(sigma) < len(sigma):
            raise ValueError("sigma is singular: no layer-wise step exists; use Exact() for the matrix of ones")
        self.sigma = sigma
        self.rank, self.jitter = _check_solver(rank, jitter)

    def _sigma(self, layers: int) -> Tensor:
        if len(self.sigma) != layers:
            raise ValueError(f"sigma is {len(self.sigma)} x {len(self.sigma)}, but the network trains {layers} layers")
        return self.sigma

    def best_alpha(self, factors: Factors) -> float:
        return float(torch.linalg.inv(self._sigma(factors.depth)).sum())

    def _weights(self, factors, rhs, damping):
        sigma = self._sigma(factors.depth)
        inverse = torch.linalg.inv(sigma).contiguous().to(rhs)
        if damping == 0 or torch.equal(sigma, sigma.diag().diag()):
            return self._decoupled(factors, rhs, damping, inverse)
        return self._coupled(factors, rhs, damping, inverse)

    def _decoupled(self, factors, rhs, damping, inverse):
        weights, infos = [], []
        for l, share in enumerate(inverse.sum(1)):
            K = factors.layer(l)
            K.diagonal().add_(factors.columns * damping * inverse[l, l])
            w, info = solve_spd(K, share * rhs, self.rank, self.jitter, factors, f"layer {l}'s ")
            weights.append(w)
            infos.append(info)
        return weights, Info(max(i.condition for i in infos), max(i.jitter for i in infos))

    def _coupled(self, factors, rhs, damping, inverse):
        # the symmetric form of the coupled system: (blockdiag(K_l) + N rho Sigma^-1 x I) v = Sigma^-1 1 x g
        grams = [factors.layer(l) for l in range(factors.depth)]
        M = torch.block_diag(*grams) + factors.columns * damping * torch.kron(inverse, torch.eye(len(rhs)).to(rhs))
        b = torch.cat([share * rhs for share in inverse.sum(1)])
        if torch.linalg.eigvalsh(self.sigma)[0] > 0:
            v, info = solve_spd(M, b, self.rank, self.jitter, factors, "the damped layer-wise ")
        else:
            v, info = solve_indefinite(M, b, damping)
        return list(v.split(len(rhs))), info

    def __repr__(self) -> str:
        return f"{type(self).__name__}()" if type(self) is not LayerWise else f"LayerWise({self.sigma.tolist()})"


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
        self.rank, self.jitter = _check_solver(rank, jitter)

    def _sigma(self, layers: int) -> Tensor:
        return torch.eye(layers, dtype=torch.float64)


class KFAC(Fisher):
    r"""Kronecker-factored blocks: layer l has :math:`F_l = D_l^\top D_l/N \otimes H_l^\top H_l/N`.

    With :math:`s = \sqrt\lambda` and the shifted factors :math:`\bar B = D^\top D/N + s`,
    :math:`\bar A = H^\top H/N + s`, the direction of layer l is the matrix (M_out x M_in)
    :math:`\bar B^+ (D^\top G H/N) \bar A^+`, where G (NC x N) has g on the rows of its sample. On training rows Q is N
    times the sum over layers of :math:`B(B + Ns)^+ \circ (A(A + Ns)^+ \otimes 11^\top)`.

    Each factor is inverted on its cheaper side: N x N (or NC x NC) when samples are fewer than units, M x M otherwise.
    Both sides give the same step, by the push-through identity.

    Parameters
    ----------
    rank : {"pinv", "raise"}
        Where a factor is singular even on its smaller side (without damping): its pseudo-inverse, or an error.

    Raises
    ------
    RankDeficient
        In a solve, with ``rank="raise"``, when a factor is singular.

    Notes
    -----
    Martens & Grosse (2015); Zhang, Martens & Grosse (2019), eq. 12; Karakida & Osawa (2020), eqs. 20-21. ``damping`` is
    :math:`\lambda`: its root is added to each factor, with no further correction. Both factors carry 1/N, so the best
    learning rate is of order 1/N: :math:`1/\alpha` with :math:`\alpha = N(L-1) + 1` where every :math:`H_l` has rank N
    and every :math:`D_l`, l < L, rank NC; the two-layer chapters print the rate times N.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> sig = ngd.signals(ngd.models.MLP([3, 8, 1], seed=0), torch.eye(3, dtype=torch.float64))
    >>> round(ngd.fisher.KFAC().alpha(ngd.kernels.empirical(sig)), 6)
    4.0
    """

    def __init__(self, rank: str = "pinv"):
        self.rank, _ = _check_solver(rank, 0.0)

    def coefficient(self, factors: Factors, damping: float = 0.0) -> Tensor:
        train, shift = factors.train, factors.train.columns * _check_damping(damping) ** 0.5
        Q = 0.0
        for l in range(train.depth):
            A, B = (
                self._invert(square, shift, part.T, train, l)[0].T
                for square, part in ((train.A(l), factors.A(l)), (train.B(l), factors.B(l)))
            )
            Q = Q + train.columns * A.repeat_interleave(train.c, 0).repeat_interleave(train.c, 1) * B
        return Q

    def solve(self, sig, g, damping=0.0, out=None):
        g, root, factors = _check_residual(sig, g), _check_damping(damping) ** 0.5, empirical(sig)
        layers, conditions = zip(*(self._layer(sig, l, g, root, factors) for l in range(len(sig.H))))
        return sig.pack(list(layers), out), Info(max(conditions), 0.0)

    def _layer(self, sig, l, g, root, factors):
        """The layer's direction, as a matrix or as a pair to be multiplied; and the worse condition number."""
        H, D, n = sig.H[l], sig.D[l], sig.n
        G = torch.zeros(n * sig.c, n, dtype=g.dtype, device=g.device)
        rows = torch.arange(n * sig.c, device=g.device)
        G[rows, rows // sig.c] = g
        few_a, few_b = n <= H.shape[1], n * sig.c <= D.shape[1]
        A, B = factors.A(l) if few_a else H.T @ H / n, factors.B(l) if few_b else D.T @ D / n
        a, b = (n * root if few else root for few in (few_a, few_b))
        conditions = []

        def solved(M, shift, rhs):
            x, condition = self._invert(M, shift, rhs, factors, l)
            conditions.append(condition)
            return x

        if few_b:
            G = solved(B, b, G)
        if few_a:
            G = solved(A, a, G.T).T
        E = G.T @ D
        if few_a and few_b:
            return (n * E, H), max(conditions)
        if few_a:
            return (solved(B, b, E.T).T, H), max(conditions)
        if few_b:
            return (E, solved(A, a, H.T).T), max(conditions)
        return solved(A, a, solved(B, b, E.T @ H / n).T).T, max(conditions)

    def _invert(self, M, shift, rhs, factors, l):
        M = M.clone()
        M.diagonal().add_(shift)
        x, info = solve_spd(M, rhs, self.rank, 0.0, factors, f"layer {l}'s factor: its ")
        return x, info.condition

    def __repr__(self) -> str:
        return f"KFAC(rank={self.rank!r})"


def _check_solver(rank, jitter):
    if rank not in ("raise", "pinv"):
        raise ValueError(f"rank={rank!r} is unknown; use 'raise' or 'pinv'")
    if not jitter >= 0:
        raise ValueError(f"jitter={jitter} must be 0 or positive (relative to the mean diagonal of the Gram)")
    return rank, float(jitter)


def _check_residual(sig, g) -> Tensor:
    if g.numel() != sig.n * sig.c or g.dtype != sig.outputs.dtype or g.device != sig.outputs.device:
        raise ValueError(f"g must hold N*C = {sig.n * sig.c} numbers of {sig.outputs.dtype} on {sig.outputs.device}")
    if not torch.isfinite(g).all():
        raise ValueError("g holds NaN or infinity: the run has diverged or the loss is not defined there")
    return g.reshape(-1)


def _check_damping(damping) -> float:
    if not (damping >= 0 and damping < float("inf")):
        raise ValueError(f"damping={damping} must be 0 or positive; it is added to the Fisher matrix")
    return float(damping)
