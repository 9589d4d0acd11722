r"""Kronecker-factored Fishers: a block a layer, or neighbouring layers coupled."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..factors import culprits, empirical
from ..signals import Signals
from ..solve import (
    Guard,
    Info,
    Inverse,
    Ridge,
    cholesky,
    inverse_covariance,
    inverse_spd,
    ridge,
    solve_cholesky,
    worst,
)
from .base import (
    WeightSide,
    check_count,
    check_damping,
    check_factors,
    check_rank,
    check_residual,
    pack,
    pulled,
)

__all__ = ["KFAC", "SampledKFAC", "TridiagonalKFAC"]


@dataclass(frozen=True)
class _Backward:
    """A layer's backward factor: its inverse on units, or on the rows of D (rows,
    M_out), which then leads back to units.
    """

    inverse: Inverse
    D: Tensor | None = None


class _Kronecker(WeightSide):
    """A step with :math:`F_l = B_l \\otimes H_l^\\top H_l/N`, whatever the backward
    factor B_l.
    """

    def solve(self, sig, g, damping=0.0, out=None, generator=None):
        g = check_residual(sig, g)
        inverse = self._with_slope(sig, check_damping(damping), generator)
        layers, slope = inverse(g)
        return pack(sig, layers, out), replace(inverse.info, slope=slope)

    def _inverse(self, sig, damping, generator=None):
        inverse = self._with_slope(sig, damping, generator)
        return Inverse(lambda g: inverse(g)[0], inverse.info)

    def _with_slope(self, sig: Signals, damping: float, generator) -> Inverse:
        """From a residual (..., N, C) to the layers, and the loss's slope along them
        where all factors are those of units.
        """
        n, shift = sig.n, sig.n * damping**0.5
        guards = [self._guard(empirical(sig), l) for l in range(len(sig.H))]
        forward = [ridge(H, shift, guard) for H, guard in zip(sig.H, guards)]
        backward = self._backward(sig, shift, guards, generator)

        def apply(g):
            layers, slopes = [], []
            for e, H, left, right in zip(pulled(sig, n * g), sig.H, backward, forward):
                layer, slope = _two_ridges(n * g, e, H, left, right)
                layers.append(layer)
                slopes.append(slope)
            return layers, None if None in slopes else sum(slopes) / n**2

        return Inverse(apply, worst([*forward, *(left.inverse for left in backward)]))

    def _backward(self, sig, shift, guards, generator) -> list[_Backward]:
        """Every layer's backward factor with ``shift`` on its diagonal, times N."""
        raise NotImplementedError

    def _guard(self, factors, l: int) -> Guard:
        name = f"layer {l}'s factor: its "
        return Guard(self.rank, name=name, why=lambda: culprits(factors))


def _two_ridges(
    g: Float[Tensor, "*k N C"],
    e: Float[Tensor, "*k N units"],
    H: Float[Tensor, "N inputs"],
    left: _Backward,
    right: Ridge,
):
    """A layer's step, and its product with the gradient where that comes for free.

    In the middle stands the residual, on rows of D or on units to the left, on samples
    or on inputs to the right: each side where its factor is smaller."""
    middle = e.mT if left.D is None else _on_rows(g, left.D)
    if not right.few:
        middle = middle @ H
    step = right(left.inverse(middle).mT)  # (..., samples or inputs, rows or units)
    if left.D is not None:
        step = step @ left.D
    if right.few:
        return (step, H), None
    return step.mT, None if left.D is not None else float((step.mT * middle).sum())


def _on_rows(
    g: Float[Tensor, "*k N C"], D: Float[Tensor, "rows units"]
) -> Float[Tensor, "*k rows N"]:
    """The matrix G with g's entries on the rows of their sample: D^T G pulls g back."""
    n, c = g.shape[-2:]
    if len(D) == c:  # root N times one sample's gradients, which serve all
        return g.mT / n**0.5
    return (g[..., None] * torch.eye(n).to(g)[:, None]).flatten(-3, -2)


class KFAC(_Kronecker):
    r"""Kronecker-factored blocks: layer l has
    :math:`F_l = D_l^\top D_l/N \otimes H_l^\top H_l/N`.

    With :math:`s = \sqrt\lambda` and the shifted factors
    :math:`\bar B = D^\top D/N + s`, :math:`\bar A = H^\top H/N + s`, the direction of
    layer l is the matrix (M_out x M_in) :math:`\bar B^+ (D^\top G H/N) \bar A^+`, where
    G (NC x N) has g on the rows of its sample. On training rows Q is N times the sum
    over layers of :math:`B(B + Ns)^+ \circ (A(A + Ns)^+ \otimes 11^\top)`.

    These are two ridge regressions,
    :math:`E^\top = (D^\top D + Ns)^+ D^\top G` and
    :math:`W^\top = N (H^\top H + Ns)^+ H^\top E`, each solved on the smaller side of D
    or H: N x N (or NC x NC) when samples are fewer than units, M x M otherwise. Both
    sides give the same step, by the push-through identity. The last layer's D, if it is
    the identity of every sample, is never multiplied out.

    Parameters
    ----------
    rank : {"pinv", "raise"}
        Where a factor is singular even on its smaller side (without damping): its
        pseudo-inverse, or an error.

    Raises
    ------
    RankDeficient
        In a solve, with ``rank="raise"``, when a factor is singular.

    See Also
    --------
    SampledKFAC : a backward factor from a few draws, for training.

    Notes
    -----
    Martens & Grosse (2015); Zhang, Martens & Grosse (2019), eq. 12; Karakida & Osawa
    (2020), eqs. 20-21. ``damping`` is :math:`\lambda`: its root is added to each
    factor, with no further correction. Both factors carry 1/N, so the best learning
    rate is of order 1/N: :math:`1/\alpha` with :math:`\alpha = N(L-1) + 1` where every
    :math:`H_l` has rank N and every :math:`D_l`, l < L, rank NC; the two-layer chapters
    print the rate times N.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> x = torch.eye(3, dtype=torch.float64)
    >>> sig = ngd.signals(ngd.models.MLP([3, 8, 1], seed=0), x)
    >>> round(ngd.fisher.KFAC().alpha(ngd.kernels.empirical(sig)), 6)
    4.0
    >>> deep = ngd.signals(ngd.models.DeepLinear([3] * 5, seed=0), x)
    >>> d = ngd.fisher.KFAC().direction(deep, deep.outputs)
    >>> torch.allclose(deep.jvp(d), 4 * deep.outputs)  # square layers: L times exact
    True
    """

    def __init__(self, rank: str = "pinv", **moved):
        if moved:
            raise TypeError(
                f"KFAC takes no {', '.join(moved)}: its backward factor is exact; use"
                " SampledKFAC(samples=...) for one from draws"
            )
        self.rank = check_rank(rank)

    def full_step(self, sig: Signals) -> float:
        """One over the layers, each counted N times where it has more units on both
        sides than rows.
        """
        wide = [
            sig.n <= H.shape[1] and sig.n * sig.c <= layer.out_features
            for H, layer in zip(sig.H, sig.layers)
        ]
        return 1 / sum(sig.n if few else 1 for few in wide)

    def _coefficient(self, factors, damping, generator):
        """N times the sum over layers of B B^+ o (A A^+ x 11^T): (rows C, NC)."""
        train, n, c, Q = factors.train, factors.columns, factors.c, 0.0

        def smoothed(own, rows, l):
            """rows (own + N s)^+: (rows, N), or (rows C, NC)."""
            own.diagonal().add_(n * damping**0.5)
            return inverse_spd(own, self._guard(train, l))(rows.T).T

        square, sides = train.sides(), factors.sides()
        for l, (own_A, own_B, A, B) in enumerate(zip(*square, *sides)):
            A, B = smoothed(own_A, A, l), smoothed(own_B, B, l)
            Q = Q + n * A.repeat_interleave(c, 0).repeat_interleave(c, 1) * B
        return Q

    def _backward(self, sig, shift, guards, generator):
        """Each layer's D, (NC, M_out), by its smaller side."""
        # one sample's gradients serve a linear net; times root N they are all of them
        shared = sig.first if sig.linear else sig
        factors = []
        for l, (D, guard) in enumerate(zip(shared.D, guards)):
            if l == len(shared.D) - 1 and _is_identity(shared, D):
                size, info = sig.n + shift, Info(1.0, 0.0)
                factors.append(_Backward(Inverse(lambda v: v / size, info)))
                continue
            D = D * sig.n**0.5 if sig.linear else D
            solved = ridge(D, shift, guard)
            factors.append(_Backward(solved, D if solved.few else None))
        return factors

    def __repr__(self) -> str:
        return f"KFAC(rank={self.rank!r})"


def _is_identity(sig: Signals, D: Float[Tensor, "NC units"]) -> bool:
    """Whether D is the identity of every sample: that of a layer which is the output
    (and no residual, gate or weighting behind it).
    """
    if D.shape[1] != sig.c:
        return False
    eye = torch.eye(sig.c, dtype=D.dtype, device=D.device)
    return torch.equal(D[: sig.c], eye) and bool(
        torch.equal(D.view(sig.n, sig.c, -1), eye.expand(sig.n, -1, -1))
    )


MODELS = ("gaussian", "softmax")


class SampledKFAC(_Kronecker):
    r"""K-FAC with a backward factor from draws: :math:`S^\top S/NK` in place of
    :math:`D^\top D/N`.

    S (NK x M_out) are K residuals a sample, drawn from the outputs that the model
    believes in, and pulled back: K backward passes, whatever the number of outputs. D
    is not formed.

    Parameters
    ----------
    samples : int
        K.
    variance : float
        :math:`s^2`, the variance of the outputs that a Gaussian model assumes. It
        scales loss and Fisher alike; with damping it decides how :math:`\lambda` is
        shared: the backward factor is shifted by :math:`s^2\sqrt\lambda`.
    model : {"gaussian", "softmax"}
        Whose residuals: standard normal, for squared errors; or probabilities minus a
        drawn label's unit vector, for cross-entropy of the softmax of the outputs.
    rank : {"pinv", "raise"}
        As for `KFAC`.
    seed : int
        Of the generator that a call makes for itself if it is not given one: a call
        without ``generator`` is a pure function. `NaturalGradient` keeps a generator
        made from it, so that every step draws anew. Draws are made on the CPU in
        float64 and then moved: the same numbers on every device.

    Raises
    ------
    ValueError
        For values that make no sense.
    TypeError
        In ``coefficient``, on analytic factors: there is no output to draw from.
    RankDeficient
        In a solve, with ``rank="raise"``, when a factor is singular.

    Notes
    -----
    Martens & Grosse (2015), section 5; Bernacchia, Lengyel & Hennequin (2018),
    footnote 1. `optimal_lr` is that of the draw; ``best_alpha`` is L, the constant of a
    deep linear net of square layers, exact in the limit of many samples.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> x = ngd.data.gaussian(50, 3)
    >>> sig = ngd.signals(ngd.models.DeepLinear([3] * 5, seed=0), x, lazy=True)
    >>> d = ngd.fisher.SampledKFAC(samples=1000).direction(sig, sig.outputs)
    >>> gap = sig.jvp(d) - 4 * sig.outputs
    >>> bool(gap.norm() < 0.05 * sig.outputs.norm())
    True
    """

    def __init__(
        self,
        samples: int = 1,
        variance: float = 1.0,
        model: str = "gaussian",
        rank: str = "pinv",
        seed: int = 0,
    ):
        check_count("samples", samples, 1)
        check_count("seed", seed, 0)
        if not 0 < variance < float("inf"):
            raise ValueError(f"variance={variance} must be positive")
        if model not in MODELS:
            raise ValueError(f"model={model!r} is unknown; use one of {MODELS}")
        if model == "softmax" and variance != 1.0:
            raise ValueError(
                f"variance={variance}: a softmax model has none; leave it at 1"
            )
        self.samples, self.variance = samples, float(variance)
        self.model, self.rank, self.seed = model, check_rank(rank), seed

    def best_alpha(self, factors) -> float:
        """L, the number of trained layers: see Notes."""
        return float(check_factors(factors).depth)

    def full_step(self, sig: Signals) -> float:
        """1/L."""
        return 1 / len(sig.H)

    def _backward(self, sig, shift, guards, generator):
        """Each layer's draws pulled back, (NK, M_out), by its units."""
        drawn = self._draw(sig, generator) / self.samples**0.5
        return [
            _Backward(inverse_covariance(S.flatten(0, 1), self.variance * shift, guard))
            for S, guard in zip(sig.pull(drawn), guards)
        ]

    def _draw(self, sig: Signals, generator) -> Float[Tensor, "N K C"]:
        """Residuals of outputs drawn from the model, on the signals' device."""
        if generator is None:
            generator = torch.Generator().manual_seed(self.seed)
        if self.model == "gaussian":
            shape = sig.n, self.samples, sig.c
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            return drawn.to(sig.outputs)
        if sig.c != sig.outputs.shape[1]:
            raise ValueError(
                'model="softmax" draws labels of the outputs themselves: give it plain'
                ' signals, or weighted ones to model="gaussian"'
            )
        p = sig.outputs.detach().cpu().double().softmax(1)
        labels = torch.multinomial(p, self.samples, True, generator=generator)
        hot = torch.nn.functional.one_hot(labels, sig.c)
        return (p[:, None] - hot).to(sig.outputs)

    def __repr__(self) -> str:
        return (
            f"SampledKFAC(samples={self.samples}, variance={self.variance:g},"
            f" model={self.model!r}, rank={self.rank!r}, seed={self.seed})"
        )


class TridiagonalKFAC(WeightSide):
    r"""K-FAC whose *inverse* is block tri-diagonal: neighbouring layers coupled, and
    still positive definite.

    Of all matrices that agree with the Kronecker-factored Fisher on its three central
    block diagonals (blocks :math:`D_l^\top D_{l'}/N \otimes H_l^\top H_{l'}/N`,
    :math:`\sqrt\lambda` added to the factors of l = l'), the one whose inverse has no
    others. With :math:`\Psi_l = F_{l,l+1} F_{l+1,l+1}^{-1}`, itself a Kronecker
    product,

    .. math:: F^{-1} = (I - \Psi)^\top\,
        \mathrm{diag}(F_{ll} - \Psi_l F_{l+1,l+1} \Psi_l^\top)^{-1}\,(I - \Psi),

    a product of positive factors. Setting the far blocks of F itself to zero instead
    would make it indefinite.

    Raises
    ------
    TypeError
        On analytic factors: correlations between layers are not among them.
    ValueError
        Without damping: the conditional blocks are singular then.

    Notes
    -----
    Martens & Grosse (2015), section 4.3 and appendix B. ``damping`` is :math:`\lambda`
    as for `KFAC`. Works on the units' side: factors are M x M, with one symmetric
    eigenproblem a factor.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> x = torch.eye(3, dtype=torch.float64)
    >>> sig = ngd.signals(ngd.models.MLP([3, 8, 8, 1], seed=0), x)
    >>> fac = ngd.kernels.empirical(sig)
    >>> Q = ngd.fisher.TridiagonalKFAC().coefficient(fac, damping=0.01)
    >>> bool(torch.linalg.eigvalsh(Q)[0] > 0)
    True
    """

    def _inverse(self, sig, damping, generator=None):
        """From residuals (..., N, C) to a matrix a layer, coupled to the next."""
        if not damping:
            raise ValueError(
                "damping=0: this Fisher needs a positive damping, its conditional"
                " blocks are singular"
            )
        (backward, (B, condition_B)), (forward, (A, condition_A)) = (
            self._side(parts, sig.n, damping**0.5, side)
            for parts, side in ((sig.D, "backward"), (sig.H, "forward"))
        )

        def apply(g):
            steps = [r.mT @ H / sig.n for r, H in zip(pulled(sig, g), sig.H)]
            result = []
            for l, (b, a) in enumerate(zip(backward, forward)):
                rest = steps[l] - b.Psi @ steps[l + 1] @ a.Psi.T
                size = 1 - b.spectrum[:, None] * a.spectrum
                result.append(b.K @ ((b.K.T @ rest @ a.K) / size) @ a.K.T)
            result.append(solve_cholesky(A, solve_cholesky(B, steps[-1]).mT).mT)
            coupled = [
                b.Psi.T @ W @ a.Psi for W, b, a in zip(result, backward, forward)
            ]
            return result[:1] + [W - V for W, V in zip(result[1:], coupled)]

        return Inverse(apply, Info(max(condition_A, condition_B), 0.0))

    @staticmethod
    def _side(parts: list[Tensor], n: int, root: float, side: str):
        """One side's factors: a `_Link` for each pair of neighbours; and the last one's
        Cholesky factor, with the worst condition number of all.
        """
        roots, conditions, links = [], [], []
        for l, X in enumerate(parts):
            F = X.T @ X / n
            F.diagonal().add_(root)
            guard = Guard(name=f"layer {l}'s {side} factor: its ")
            factor, condition = cholesky(F, guard)
            if factor is None:
                raise guard.singular(F, condition)
            roots.append(factor)
            conditions.append(condition)
        for X, after, own, following in zip(parts, parts[1:], roots, roots[1:]):
            Psi = solve_cholesky(following, after.T @ X / n).T
            half = torch.linalg.solve_triangular(own, Psi @ following, upper=False)
            spectrum, vectors = torch.linalg.eigh(half @ half.T)
            K = torch.linalg.solve_triangular(own.T, vectors, upper=True)
            links.append(_Link(Psi, K, spectrum))
        return links, (roots[-1], max(conditions))


@dataclass(frozen=True)
class _Link:
    """One side of a pair of neighbouring layers: K K^T inverts the factor, and
    K^T (Psi F_next Psi^T) K is the diagonal of the spectrum, below 1.
    """

    Psi: Tensor
    K: Tensor
    spectrum: Tensor
