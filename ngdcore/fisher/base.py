r"""What all Fishers share, the one law, and the two kinds.

A Fisher :math:`F` turns an output residual :math:`g` into a weight direction
:math:`d = \frac1N F^+ J^\top g`, and a pair of factors into the coefficient matrix
:math:`Q = \frac1N J F^+ J^\top`. The one law holds for all of them: pushing the
direction forward gives :math:`J d = Q g`. With damping, :math:`F + \rho I` stands for
:math:`F`.

An `OutputSide` Fisher finds output weights from Gram matrices, so it knows networks of
infinite width too; a `WeightSide` Fisher needs a network's signals. Each kind has one
method to write, `_inverse`: it factorises once, and returns what is then applied to as
many residuals as there are."""

from numbers import Integral, Real

import torch
from jaxtyping import Float
from torch import Tensor

from ..factors import Factors, culprits, empirical
from ..signals import Signals
from ..signals import check_residual as fits
from ..solve import Guard, Info, Inverse, RankDeficient, edges_of_spectrum

__all__ = ["Fisher", "OutputSide", "WeightSide"]

CHUNK = 2**22  # numbers in one tensor while Q is formed column by column


class Fisher:
    """What all Fishers share; write a new one from `OutputSide` or `WeightSide`."""

    def coefficient(
        self,
        factors: Factors,
        damping: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""The coefficient matrix :math:`Q = \frac1N J(x') (F + \rho I)^+ J(x)^\top`.

        Parameters
        ----------
        factors : Factors
            Square factors for the training rows, or ``fac.cross(x_test)`` for test
            rows.
        damping : float
            :math:`\rho \ge 0`, added to F (hence :math:`N\rho` to Gram matrices).
        generator : torch.Generator, optional
            For Fishers that draw: where the draws come from; a fresh one from their
            ``seed`` if not given. Others ignore it.

        Returns
        -------
        Tensor, (rows C, N C)
            To first order a step of size eta moves the outputs at x' by
            ``-eta * Q @ (f - y)``. 1/N is inside; for the exact Fisher on training rows
            Q is the identity.

        Raises
        ------
        TypeError
            For anything but factors.
        RankDeficient
            When a Gram matrix to be inverted is singular to working precision.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> eye = torch.eye(3, dtype=torch.float64)
        >>> fac = ngd.kernels.analytic(eye, depth=3)
        >>> Q = ngd.fisher.BlockDiagonal().coefficient(fac)
        >>> torch.allclose(Q, 3 * eye)
        True
        """
        single, damping = check_factors(factors).scalar, check_damping(damping)
        if single is None:
            return self._coefficient(factors, damping, generator)
        Q = self._coefficient(single, damping, generator)
        return torch.kron(Q, torch.eye(factors.c, dtype=Q.dtype, device=Q.device))

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
        Q = self._square(factors)
        alpha = float(Q.trace() / torch.linalg.matrix_rank(Q))
        square = Q @ Q
        defect = torch.linalg.norm(square - alpha * Q) / torch.linalg.norm(square)
        if not defect <= tol:
            raise ValueError(
                f"Q is not isotropic: |QQ - alpha Q| / |QQ| = {float(defect):.2e} >"
                f" tol = {tol:g}; look at its spectrum"
            )
        return alpha

    def best_alpha(self, factors: Factors) -> float:
        r""":math:`1/` the best constant learning rate without damping: the middle of
        Q's non-zero spectrum, which is :math:`\alpha` where Q is isotropic.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> fac = ngd.kernels.analytic(torch.eye(3, dtype=torch.float64), depth=4)
        >>> ngd.fisher.BlockDiagonal().best_alpha(fac)
        4.0
        """
        known = self._isotropic(check_factors(factors).depth)
        if known is not None:
            return known
        Q = self._square(factors)
        values = torch.linalg.eigvalsh((Q + Q.mT) / 2)
        tiny = len(Q) * torch.finfo(Q.dtype).eps * values.abs().max()
        values = values[values.abs() > tiny]
        return float(values.min() + values.max()) / 2

    def optimal_lr(
        self,
        sig: Signals,
        damping: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> float:
        r"""The best constant learning rate of the linearised problem,
        :math:`2/(\lambda_{\min} + \lambda_{\max})` of Q's non-zero spectrum.

        Where Q is isotropic that is :math:`1/\alpha`. Known in closed form for some
        Fishers without damping; otherwise estimated by at most 24 products with Q, each
        a direction pushed forward, its system factorised once.

        Parameters
        ----------
        sig : Signals
            Signals of the training rows.
        damping : float
            :math:`\rho \ge 0`: that of the steps to come.
        generator : torch.Generator, optional
            As for `coefficient`.

        Raises
        ------
        ValueError
            When Q has a negative eigenvalue: some residual grows at any rate.
        RankDeficient
            When a matrix to be inverted is singular.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> x = torch.eye(3, dtype=torch.float64)
        >>> sig = ngd.signals(ngd.models.MLP([3, 8, 1], seed=0), x)
        >>> ngd.fisher.BlockDiagonal().optimal_lr(sig)
        0.5
        """
        damping, known = check_damping(damping), self._isotropic(len(sig.H))
        if known is not None and not damping:
            return 1 / known
        step, _ = self._step(sig, damping, generator)

        def product(v: Float[Tensor, " NC"]) -> Float[Tensor, " NC"]:
            return sig.jvp(step(v.view(sig.n, sig.c), None)).flatten()

        low, high = edges_of_spectrum(product, sig.outputs.new_empty(sig.n * sig.c))
        if not low > -1e-6 * high:
            raise ValueError(
                f"lr: no constant learning rate is best, Q of {self!r} with damping="
                f"{damping:g} has eigenvalues from {low:.2e} to {high:.2e}; pass a"
                " number for lr, or change damping"
            )
        return 2 / (max(low, 0.0) + high)

    def full_step(self, sig: Signals) -> float:
        r"""The learning rate of one full step: :math:`1/\alpha` where :math:`\alpha` of
        the undamped Q is known without forming it, 1 elsewhere.
        """
        return 1 / (self._isotropic(len(sig.H)) or 1.0)

    def direction(
        self,
        sig: Signals,
        g: Tensor,
        damping: float = 0.0,
        out: list[Tensor] | None = None,
        generator: torch.Generator | None = None,
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
        generator : torch.Generator, optional
            As for `coefficient`.

        Returns
        -------
        list of Tensor
            To be subtracted, times the learning rate.

        Raises
        ------
        ValueError
            For a residual of the wrong shape, or one that is not finite.
        RankDeficient
            When a Gram matrix to be inverted is singular to working precision.

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> x = torch.eye(3, dtype=torch.float64)
        >>> sig = ngd.signals(ngd.models.MLP([3, 8, 1], seed=0), x)
        >>> d = ngd.fisher.Exact().direction(sig, sig.outputs)
        >>> torch.allclose(sig.jvp(d), sig.outputs)
        True
        """
        return self.solve(sig, g, damping, out, generator)[0]

    def solve(
        self,
        sig: Signals,
        g: Tensor,
        damping: float = 0.0,
        out: list[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[list[Tensor], Info]:
        """`direction`, and the `Info` of its solve."""
        g = check_residual(sig, g)
        step, inverse = self._step(sig, check_damping(damping), generator)
        moved = step(g, out)
        return moved, inverse.info  # an iterative solve has it only now

    def _coefficient(self, factors: Factors, damping: float, generator) -> Tensor:
        """Q of checked arguments, (rows C, NC)."""
        raise NotImplementedError

    def _step(self, sig: Signals, damping: float, generator):
        """A function from residuals (N, C), and buffers or None, to directions; and the
        `Inverse` behind it.
        """
        raise NotImplementedError

    def _isotropic(self, layers: int) -> float | None:
        """Alpha of the undamped Q of a net with so many trained layers, where it is
        known in advance.
        """
        return None

    def _square(self, factors: Factors) -> Tensor:
        """Q (NC, NC) of square factors; raises for others."""
        if check_factors(factors).train is not factors:
            raise ValueError(
                "factors must be square (training rows); alpha is not defined on test"
                " rows"
            )
        return self.coefficient(factors)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class OutputSide(Fisher):
    r"""Fishers whose direction is :math:`\sum_l J_l^\top v_l` with output weights
    :math:`v_l` from Gram matrices alone: they know networks of infinite width.

    A subclass writes ``_inverse(factors, damping)``. It factorises, and returns an
    `Inverse` from residuals (NC, k) to a list with each layer's weights (NC, k), such
    that :math:`\frac1N (F + \rho)^+ J^\top r = \sum_l J_l^\top v_l`; None for a layer
    that does not move, and one tensor in place of the list where all layers share it.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> issubclass(ngd.fisher.Exact, ngd.fisher.OutputSide)
    True
    """

    def _coefficient(self, factors, damping, generator):
        """Gram matrices times output weights of the identity: (rows C, NC)."""
        train = factors.train
        nc = train.columns * train.c
        eye = torch.eye(nc, dtype=train.dtype, device=train.device)
        weights = self._inverse(train, damping)(eye)
        if isinstance(weights, Tensor):
            return factors.gram() @ weights
        moving = {l: w for l, w in enumerate(weights) if w is not None}
        grams = factors.layers(list(moving))
        return sum(K @ w for K, w in zip(grams, moving.values()))

    def _step(self, sig, damping, generator):
        """Output weights found once and pulled back: see `Fisher._step`."""
        inverse = self._inverse(empirical(sig), damping)

        def step(g, out):
            weights = inverse(g.reshape(-1, 1))
            shared = isinstance(weights, Tensor)
            parts = [weights] if shared else [w for w in weights if w is not None]
            if not all(bool(torch.isfinite(w).all()) for w in parts):
                raise RankDeficient("the step overflows: the (weighted) Gram is tiny")
            if shared:
                return sig.vjp(weights[:, 0], out)
            still = torch.zeros_like(g)
            return sig.vjp([still if w is None else w[:, 0] for w in weights], out)

        return step, inverse

    def _inverse(self, factors: Factors, damping: float) -> Inverse:
        raise NotImplementedError

    def _guard(self, factors: Factors, name: str = "the ") -> Guard:
        """The guard of a Gram matrix of this name, by this Fisher's policies."""
        return Guard(self.rank, self.jitter, name, lambda: culprits(factors))


class WeightSide(Fisher):
    r"""Fishers that need a network's signals: Q is formed from directions pushed
    forward, many columns at once.

    A subclass writes ``_inverse(sig, damping, generator)``. It factorises, and returns
    an `Inverse` from residuals (..., N, C) to one entry a layer: a matrix
    (..., M_out, M_in), a pair :math:`(E, H)` that stands for :math:`E^\top H` with E
    (..., N, M_out), or None for a layer that does not move. The dots are any number of
    leading dimensions, so write ``X.mT`` for ``X.T``; `pulled` takes residuals back to
    every layer's units.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> issubclass(ngd.fisher.Diagonal, ngd.fisher.WeightSide)
    True
    """

    def _coefficient(self, factors, damping, generator):
        """Directions of the identity's columns pushed forward: (rows C, NC)."""
        train, rows = factors.train.signals, factors.signals
        if train is None:
            raise TypeError(
                f"{self!r} needs signals: use empirical factors of a finite network,"
                " not analytic ones"
            )
        inverse = self._inverse(train, damping, generator)
        n, c = train.n, train.c
        eye = torch.eye(n * c).to(train.outputs).view(-1, n, c)
        largest = max(D.shape[1] * max(H.shape) for D, H in zip(train.D, train.H))
        columns = [
            push_forward(rows, inverse(g)).flatten(1)
            for g in eye.split(max(1, CHUNK // largest))
        ]
        return torch.cat(columns).T

    def _step(self, sig, damping, generator):
        inverse = self._inverse(sig, damping, generator)
        return lambda g, out: pack(sig, inverse(g), out), inverse

    def _inverse(self, sig: Signals, damping: float, generator=None) -> Inverse:
        raise NotImplementedError


def pulled(sig: Signals, g: Float[Tensor, "*k N C"]) -> list[Float[Tensor, "*k N _"]]:
    """Residuals pulled back to every layer's units."""
    if sig.linear:
        return [g @ D for D in sig.first.D]
    if g.ndim == 2:
        return sig.pulled(g)
    return [
        torch.einsum("ncm,...nc->...nm", D.view(sig.n, sig.c, -1), g) for D in sig.D
    ]


def pack(sig: Signals, layers: list, out: list[Tensor] | None) -> list[Tensor]:
    """One tensor a trained parameter from one entry a layer."""
    still = [
        H.new_zeros(layer.out_features, H.shape[1]) if entry is None else entry
        for entry, layer, H in zip(layers, sig.layers, sig.H)
    ]
    return sig.pack(still, out)


def push_forward(sig: Signals, layers: list) -> Float[Tensor, "k N C"]:
    """First-order change of the outputs at sig's rows, one for each of k directions."""
    total = 0.0
    for H, D, entry in zip(sig.H, sig.D, layers):
        if entry is None:
            continue
        if isinstance(entry, tuple):
            E, other = entry
            change = (H @ other.T) @ E
        else:
            change = H @ entry.mT
        D = D.view(sig.n, -1, D.shape[1])
        total = total + torch.einsum("ncm,knm->knc", D, change)
    return total


def check_factors(factors) -> Factors:
    if not isinstance(factors, Factors):
        raise TypeError(
            "factors must come from ngd.kernels.empirical(sig) or ngd.kernels.analytic"
            f"(x, depth), not {type(factors).__name__}"
        )
    return factors


def check_count(name: str, value, least: int) -> int:
    """A whole number of at least ``least``."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or more")
    return int(value)


def check_rank(rank: str) -> str:
    if rank not in ("raise", "pinv"):
        raise ValueError(f"rank={rank!r} is unknown; use 'raise' or 'pinv'")
    return rank


def check_jitter(jitter: float) -> float:
    if not 0 <= jitter < float("inf"):
        raise ValueError(
            f"jitter={jitter} must be 0 or positive (relative to the mean diagonal of"
            " the Gram)"
        )
    return float(jitter)


def check_residual(sig: Signals, g: Tensor) -> Tensor:
    """g as (N, C), refused if it is of another size, dtype or device, or not finite."""
    if not isinstance(sig, Signals):
        raise TypeError(
            "sig must come from ngdcore.signals(net, x), not " + type(sig).__name__
        )
    fits("g", g, sig)
    if not torch.isfinite(g).all():
        raise ValueError(
            "g holds NaN or infinity: the run has diverged or the loss is not defined"
            " there"
        )
    return g.reshape(sig.n, sig.c)


def check_damping(damping) -> float:
    number = isinstance(damping, Tensor) or isinstance(damping, Real)
    if not (number and damping >= 0 and damping < float("inf")):
        raise ValueError(
            f"damping={damping} must be 0 or positive; it is added to the Fisher matrix"
        )
    return float(damping)
