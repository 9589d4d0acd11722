r"""Kronecker-factored Fishers: a block a layer, and with neighbouring layers coupled."""

import torch
from torch import Tensor

from ..factors import Factors, culprits, empirical
from ..solve import Info, solve_spd
from .base import Fisher, FromSignals, check_damping, check_residual, check_solver

__all__ = ["KFAC", "TridiagonalKFAC"]


class KFAC(Fisher):
    r"""Kronecker-factored blocks: layer l has
    :math:`F_l = D_l^\top D_l/N \otimes H_l^\top H_l/N`.

    With :math:`s = \sqrt\lambda` and the shifted factors
    :math:`\bar B = D^\top D/N + s`, :math:`\bar A = H^\top H/N + s`, the direction of
    layer l is the matrix (M_out x M_in) :math:`\bar B^+ (D^\top G H/N) \bar A^+`, where
    G (NC x N) has g on the rows of its sample. On training rows Q is N times the sum
    over layers of :math:`B(B + Ns)^+ \circ (A(A + Ns)^+ \otimes 11^\top)`.

    Each factor is inverted on its cheaper side: N x N (or NC x NC) when samples are
    fewer than units, M x M otherwise. Both sides give the same step, by the
    push-through identity. Layers of equal shape are solved as one stack.

    Parameters
    ----------
    rank : {"pinv", "raise"}
        Where a factor is singular even on its smaller side (without damping): its
        pseudo-inverse, or an error.
    samples : int
        0: the exact backward factor, from all C output-gradients (one sample's if the
        net has no activations). K > 0: K backward passes a sample, of residuals drawn
        from the model's Gaussian outputs; D is never formed, and the metric's
        :math:`S^\top S/NK` stands for :math:`D^\top D/N`. Then ``lr="optimal"`` is 1/L.
    variance : float
        :math:`s^2`, the variance of the outputs the model assumes. It scales loss and
        Fisher alike; with damping it decides how :math:`\lambda` is shared: the
        backward factor is shifted by :math:`s^2\sqrt\lambda`.
    seed : int
        Of the generator of the samples; every solve or coefficient draws anew.

    Raises
    ------
    RankDeficient
        In a solve, with ``rank="raise"``, when a factor is singular.

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
    >>> sig = ngd.signals(ngd.models.MLP([3, 8, 1], seed=0), torch.eye(3, dtype=torch.float64))
    >>> round(ngd.fisher.KFAC().alpha(ngd.kernels.empirical(sig)), 6)
    4.0
    >>> deep = ngd.signals(ngd.models.DeepLinear([3] * 5, seed=0), torch.eye(3, dtype=torch.float64))
    >>> d = ngd.fisher.KFAC().direction(deep, deep.outputs)
    >>> torch.allclose(deep.jvp(d), 4 * deep.outputs)  # square layers: L times the natural gradient
    True
    """

    def __init__(
        self, rank: str = "pinv", samples: int = 0, variance: float = 1.0, seed: int = 0
    ):
        self.rank, _ = check_solver(rank, 0.0)
        if samples < 0 or not 0 < variance < float("inf"):
            raise ValueError(
                f"samples={samples} must be 0 (exact) or more, and variance={variance} positive"
            )
        self.samples, self.variance, self.generator = (
            samples,
            float(variance),
            torch.Generator().manual_seed(seed),
        )

    def best_alpha(self, factors: Factors) -> float:
        return float(factors.depth) if self.samples else self.alpha(factors)

    def full_step(self, sig) -> float:
        if self.samples:
            return 1 / len(sig.H)
        wide = [
            sig.n <= H.shape[1] and sig.n * sig.c <= layer.out_features
            for H, layer in zip(sig.H, sig.layers)
        ]
        return 1 / sum(sig.n if few else 1 for few in wide)

    def coefficient(self, factors: Factors, damping: float = 0.0) -> Tensor:
        train, a = factors.train, check_damping(damping) ** 0.5
        n, b, Q = train.columns, self.variance * a, 0.0
        if self.samples:
            if train.signals is None:
                raise TypeError(
                    "samples are drawn from a network's outputs: analytic factors have none"
                )
            S = self._backward(train.signals, torch.zeros_like(train.signals.outputs))[
                1
            ]
        for l in range(train.depth):
            A = self._invert(train.A(l), n * a, factors.A(l).T, train, [l])[0].T
            if self.samples:  # the Jacobian's D in the samples' metric
                D = self._invert(
                    S[l].T @ S[l] / n, b, factors.signals.D[l].T, train, [l]
                )[0]
                B = (train.signals.D[l] @ D).T / n
            else:
                B = self._invert(train.B(l), n * b, factors.B(l).T, train, [l])[0].T
            Q = (
                Q
                + n * A.repeat_interleave(train.c, 0).repeat_interleave(train.c, 1) * B
            )
        return Q

    def solve(self, sig, g, damping=0.0, out=None):
        g, root, factors = (
            check_residual(sig, g).view(sig.n, sig.c),
            check_damping(damping) ** 0.5,
            empirical(sig),
        )
        E, S, r = self._backward(sig, g)
        stacks, layers, conditions, slope = {}, {}, [], 0.0
        for l, (H, s) in enumerate(zip(sig.H, S)):
            few_a, few_b = (
                sig.n <= H.shape[1],
                not self.samples and len(s) <= s.shape[1],
            )
            stacks.setdefault(
                (few_a, few_b, l if few_a or few_b else (H.shape, s.shape)), []
            ).append(l)
        for (few_a, few_b, _), ls in stacks.items():

            def solved(M, shift, rhs, ls=ls):
                x, condition = self._invert(M, shift, rhs, factors, ls)
                conditions.append(condition)
                return x

            if few_a or few_b:
                slope = float("nan")
                layers[ls[0]] = self._few(
                    ls[0], few_a, few_b, g, sig, E, S, r, root, factors, solved
                )
            else:
                one = len(ls) == 1  # a stack of one is a view, no copy
                H, e, s = (
                    p[ls[0]][None] if one else torch.stack([p[l] for l in ls])
                    for p in (sig.H, E, S)
                )
                G = e.mT @ H / sig.n
                half = solved(s.mT @ s / r, self.variance * root, G)
                step = solved(H.mT @ H / sig.n, root, half.mT).mT
                layers |= zip(ls, step)
                slope += float((step * G).sum())
        info = Info(max(conditions), 0.0, slope if slope == slope else None)
        return sig.pack([layers[l] for l in range(len(layers))], out), info

    def _backward(self, sig, g):
        """For each layer the residual pulled back, and S such that S^T S / r is the
        metric's backward factor; and r.
        """
        if self.samples:
            v = torch.randn(
                sig.n, self.samples, sig.c, generator=self.generator, dtype=g.dtype
            ).to(g.device)
            pulled = sig.pull(torch.cat([g[:, None], v / self.samples**0.5], 1))
            return (
                [e[:, 0] for e in pulled],
                [e[:, 1:].flatten(0, 1) for e in pulled],
                sig.n,
            )
        if sig.linear:  # every sample has the same output-gradients
            S = [
                s[0]
                for s in sig.pull(
                    torch.eye(sig.c, dtype=g.dtype, device=g.device)[None]
                )
            ]
            return [g @ s for s in S], S, 1
        return sig.pulled(g), sig.D, sig.n

    def _few(self, l, few_a, few_b, g, sig, E, S, r, root, factors, solved):
        """A layer with fewer samples than units on some side, as a pair to be
        multiplied.
        """
        H, e, s, n, b = sig.H[l], E[l], S[l], sig.n, self.variance * root
        if few_b:
            G = g.T.clone()
            if r > 1:
                G, rows = (
                    torch.zeros(len(s), n, dtype=g.dtype, device=g.device),
                    torch.arange(len(s), device=g.device),
                )
                G[rows, rows // sig.c] = g.flatten()
            e = solved(factors.B(l) if r > 1 else s @ s.T, r * b, G).T
        if few_a:
            e = solved(
                H @ H.T if r == 1 or self.samples else factors.A(l), n * root, e
            )  # factors sweep D
        if few_b:
            e = r * (e @ s)
            return (e, H) if few_a else (e / n, solved(H.T @ H / n, root, H.T).T)
        return solved(s.T @ s / r, b, e.T).T, H

    def _invert(self, M, shift, rhs, factors, ls):
        M.diagonal(0, -2, -1).add_(shift)
        name = (
            f"layer {ls[0]}'s factor: its "
            if len(ls) == 1
            else f"one of the layers {ls}: its factor's "
        )
        x, info = solve_spd(M, rhs, self.rank, 0.0, lambda: culprits(factors), name)
        return x, info.condition

    def __repr__(self) -> str:
        return f"KFAC(rank={self.rank!r}, samples={self.samples}, variance={self.variance:g})"


class TridiagonalKFAC(FromSignals):
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
    >>> sig = ngd.signals(ngd.models.MLP([3, 8, 8, 1], seed=0), torch.eye(3, dtype=torch.float64))
    >>> Q = ngd.fisher.TridiagonalKFAC().coefficient(ngd.kernels.empirical(sig), damping=0.01)
    >>> bool(torch.linalg.eigvalsh(Q)[0] > 0)
    True
    """

    def _inverse(self, sig, damping):
        if not damping:
            raise ValueError(
                "damping=0: this Fisher needs a positive damping, its conditional blocks are singular"
            )
        sides = [self._side(parts, sig.n, damping**0.5) for parts in (sig.D, sig.H)]

        def apply(pulled):
            steps = [r.T @ H / sig.n for r, H in zip(pulled, sig.H)]
            (_, B), (_, A) = sides
            last = torch.cholesky_solve(torch.cholesky_solve(steps[-1], B).T, A).T
            inner = []
            for l, ((PB, KB, b), (PA, KA, a)) in enumerate(
                zip(*(links for links, _ in sides))
            ):
                rest = steps[l] - PB @ steps[l + 1] @ PA.T
                inner.append(
                    (KB @ ((KB.T @ rest @ KA) / (1 - b[:, None] * a)) @ KA.T, PB, PA)
                )
            result = [W for W, _, _ in inner] + [last]
            for l, (W, PB, PA) in enumerate(inner):
                result[l + 1] = result[l + 1] - PB.T @ W @ PA
            return result

        return apply

    @staticmethod
    def _side(parts, n, root):
        """For one side's factors: (Psi, K, spectrum) of each pair of neighbours, and
        the last one's Cholesky factor.

        K K^T inverts the factor, and K^T (Psi F_next Psi^T) K is the diagonal of the
        spectrum, below 1."""
        factors = [X.T @ X / n + root * torch.eye(X.shape[1]).to(X) for X in parts]
        roots, links = [torch.linalg.cholesky(F) for F in factors], []
        for l in range(len(parts) - 1):
            across = parts[l + 1].T @ parts[l] / n
            Psi = torch.cholesky_solve(across, roots[l + 1]).T
            half = torch.linalg.solve_triangular(
                roots[l], Psi @ roots[l + 1], upper=False
            )
            spectrum, vectors = torch.linalg.eigh(half @ half.T)
            links.append(
                (
                    Psi,
                    torch.linalg.solve_triangular(roots[l].T, vectors, upper=True),
                    spectrum,
                )
            )
        return links, roots[-1]

    def __repr__(self) -> str:
        return "TridiagonalKFAC()"
