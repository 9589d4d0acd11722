r"""What all Fishers share, and the one law.

A Fisher :math:`F` turns an output residual :math:`g` into a weight direction
:math:`d = \frac1N F^+ J^\top g`, and a pair of factors into the coefficient matrix
:math:`Q = \frac1N J F^+ J^\top`. The one law holds for all of them: pushing the
direction forward gives :math:`J d = Q g`. With damping, :math:`F + \rho I` stands for
:math:`F`."""

import torch
from torch import Tensor

from ..factors import Factors, empirical
from ..signals import Signals
from ..solve import Info

__all__ = ["Fisher"]


class Fisher:
    """What all Fishers share. Subclasses say how output weights are found (`_weights`)."""

    def coefficient(self, factors: Factors, damping: float = 0.0) -> Tensor:
        r"""The coefficient matrix :math:`Q = \frac1N J(x') (F + \rho I)^+ J(x)^\top`.

        Parameters
        ----------
        factors : Factors
            Square factors for the training rows, or ``fac.cross(x_test)`` for test
            rows.
        damping : float
            :math:`\rho \ge 0`, added to F (hence :math:`N\rho` to Gram matrices).

        Returns
        -------
        Tensor, (rows C, N C)
            To first order a step of size eta moves the outputs at x' by
            ``-eta * Q @ (f - y)``. 1/N is inside; for the exact Fisher on training rows
            Q is the identity.

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
        identity = torch.eye(
            train.columns * train.c, dtype=train.dtype, device=train.device
        )
        weights, _ = self._weights(train, identity, check_damping(damping))
        if isinstance(weights, Tensor):
            return factors.gram() @ weights
        return sum(factors.layer(l) @ w for l, w in enumerate(weights) if w is not None)

    def alpha(self, factors: Factors, tol: float = 1e-8) -> float:
        r"""The isotropic constant :math:`\alpha = \mathrm{tr}\,Q/\mathrm{rank}\,Q`, if
        :math:`Q^2 = \alpha Q`.

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
            raise ValueError(
                "factors must be square (training rows); alpha is not defined on test rows"
            )
        Q = self.coefficient(factors)
        alpha = float(Q.trace() / torch.linalg.matrix_rank(Q))
        square = Q @ Q
        defect = float(
            torch.linalg.norm(square - alpha * Q) / torch.linalg.norm(square)
        )
        if not defect <= tol:
            raise ValueError(
                f"Q is not isotropic: |QQ - alpha Q| / |QQ| = {defect:.2e} > tol = {tol:g}; look at its spectrum"
            )
        return alpha

    def direction(
        self,
        sig: Signals,
        g: Tensor,
        damping: float = 0.0,
        out: list[Tensor] | None = None,
    ) -> list[Tensor]:
        r"""The natural gradient :math:`\frac1N (F + \rho I)^+ J^\top g`, one tensor a
        trained parameter.

        Parameters
        ----------
        sig : Signals
            Signals of the training rows.
        g : Tensor, (N, C) or (NC,)
            Output residual, :math:`g = N\,\partial L/\partial f`: ``f - y`` for the
            default loss :math:`\frac1{2N}\sum|f - y|^2`.
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
        self,
        sig: Signals,
        g: Tensor,
        damping: float = 0.0,
        out: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], Info]:
        """`direction`, and the `Info` of its solve."""
        g = check_residual(sig, g)
        weights, info = self._weights(
            empirical(sig), g[:, None], check_damping(damping)
        )
        if not isinstance(weights, Tensor):
            weights = [torch.zeros_like(g) if w is None else w for w in weights]
        return sig.vjp(weights, out), info

    def best_alpha(self, factors: Factors) -> float:
        """:math:`1/` the best learning rate; classes that know it in closed form
        override this.
        """
        return self.alpha(factors)

    def full_step(self, sig: Signals) -> float:
        r"""The learning rate of one full step, :math:`1/\alpha`, where Q is isotropic and
        :math:`\alpha` is known without forming it; 1 elsewhere.
        """
        return 1.0

    def optimal_lr(self, sig: Signals, damping: float = 0.0) -> float:
        r"""The best constant learning rate of the linearised problem,
        :math:`2/(\lambda_{\min} + \lambda_{\max})` of Q.
        """
        if damping == 0 or getattr(self, "samples", 0):
            return 1 / self.best_alpha(empirical(sig))
        n = min(sig.n * sig.c, 24)
        start = torch.Generator().manual_seed(0)
        q = torch.randn(sig.n * sig.c, generator=start, dtype=torch.float64)
        basis = [q.to(sig.outputs) / q.norm().to(sig.outputs)]
        small = torch.zeros(n, n, dtype=sig.outputs.dtype)
        for k in range(n):
            q = sig.jvp(self.direction(sig, basis[k], damping)).flatten()
            for j, b in enumerate(basis):
                small[j, k] = b @ q
            for b in basis * 2:
                q = q - (b @ q) * b
            if k == n - 1 or not q.norm() > 1e-10 * abs(small[k, k]):
                small = small[: k + 1, : k + 1]
                break
            basis.append(q / q.norm())
        values = torch.linalg.eigvalsh(small, UPLO="U")
        return 2 / float(values[0] + values[-1])

    def _weights(self, factors: Factors, rhs: Tensor, damping: float):
        r"""Output weights v with
        :math:`\frac1N (F + \rho)^+ J^\top r = \sum_l J_l^\top v_l` for every column r
        of rhs.

        One tensor if all layers share it, else one a layer (None: the layer does not
        move); and an `Info`."""
        raise NotImplementedError


class FromSignals(Fisher):
    """Fishers that need more than factors: Q column by column, each a direction pushed
    forward.
    """

    def coefficient(self, factors: Factors, damping: float = 0.0) -> Tensor:
        train, rows, damping = (
            factors.train.signals,
            factors.signals,
            check_damping(damping),
        )
        if train is None:
            raise TypeError(
                f"{self!r} needs signals: use empirical factors of a finite network, not analytic ones"
            )
        apply, columns = self._inverse(train, damping), []
        for e in torch.eye(train.n * train.c).to(train.outputs):
            columns.append(rows.jvp(rows.pack(apply(train.pulled(e)))).flatten())
        return torch.stack(columns, 1)

    def solve(self, sig, g, damping=0.0, out=None):
        pulled = sig.pulled(check_residual(sig, g))
        return sig.pack(self._inverse(sig, check_damping(damping))(pulled), out), Info(
            float("nan"), 0.0
        )

    def best_alpha(self, factors: Factors) -> float:
        """The middle of Q's spectrum: the best constant learning rate is 2/(smallest +
        largest eigenvalue).
        """
        values = torch.linalg.eigvals(self.coefficient(factors)).real
        return float(values.min() + values.max()) / 2

    def _inverse(self, sig: Signals, damping: float):
        """A function from residuals pulled to every layer's units, (N, M_out) each, to
        `Signals.pack`'s layers.
        """
        raise NotImplementedError


def check_solver(rank, jitter):
    if rank not in ("raise", "pinv"):
        raise ValueError(f"rank={rank!r} is unknown; use 'raise' or 'pinv'")
    if not jitter >= 0:
        raise ValueError(
            f"jitter={jitter} must be 0 or positive (relative to the mean diagonal of the Gram)"
        )
    return rank, float(jitter)


def check_residual(sig, g) -> Tensor:
    if (
        g.numel() != sig.n * sig.c
        or g.dtype != sig.outputs.dtype
        or g.device != sig.outputs.device
    ):
        raise ValueError(
            f"g must hold N*C = {sig.n * sig.c} numbers of {sig.outputs.dtype} on {sig.outputs.device}"
        )
    if not torch.isfinite(g).all():
        raise ValueError(
            "g holds NaN or infinity: the run has diverged or the loss is not defined there"
        )
    return g.reshape(-1)


def check_damping(damping) -> float:
    if not (damping >= 0 and damping < float("inf")):
        raise ValueError(
            f"damping={damping} must be 0 or positive; it is added to the Fisher matrix"
        )
    return float(damping)
