r"""Approximate Fisher matrices, one small class each, seen from the output space.

A Fisher :math:`F` turns an output residual :math:`g` into a weight direction :math:`d = \frac1N F^+ J^\top g`, and a
pair of factors into the coefficient matrix :math:`Q = \frac1N J F^+ J^\top`. The one law holds for all of them:
pushing the direction forward gives :math:`J d = Q g`. With damping, :math:`F + \rho I` stands for :math:`F`.

Here are the Kronecker-factored ones and those that stay within a unit; `Exact` and the layer-wise class come from
`ngdcore.layerwise`.
"""

import torch
from torch import Tensor

from .kernels import Factors, Info, RankDeficient, empirical, solve_batch, solve_spd
from .layerwise import (
    BlockDiagonal,
    BlockTridiagonal,
    Exact,
    Fisher,
    LayerWise,
    check_damping,
    check_residual,
    check_solver,
)  # fmt: skip
from .models import Signals

__all__ = [
    "Fisher", "Exact", "LayerWise", "BlockDiagonal", "BlockTridiagonal", "KFAC", "TridiagonalKFAC",
    "UnitWise", "QuasiDiagonal", "Diagonal", "DeepLinearExact", "Info", "RankDeficient",
]  # fmt: skip


class KFAC(Fisher):
    r"""Kronecker-factored blocks: layer l has :math:`F_l = D_l^\top D_l/N \otimes H_l^\top H_l/N`.

    With :math:`s = \sqrt\lambda` and the shifted factors :math:`\bar B = D^\top D/N + s`,
    :math:`\bar A = H^\top H/N + s`, the direction of layer l is the matrix (M_out x M_in)
    :math:`\bar B^+ (D^\top G H/N) \bar A^+`, where G (NC x N) has g on the rows of its sample. On training rows Q is N
    times the sum over layers of :math:`B(B + Ns)^+ \circ (A(A + Ns)^+ \otimes 11^\top)`.

    Each factor is inverted on its cheaper side: N x N (or NC x NC) when samples are fewer than units, M x M otherwise.
    Both sides give the same step, by the push-through identity. Layers of equal shape are solved as one stack.

    Parameters
    ----------
    rank : {"pinv", "raise"}
        Where a factor is singular even on its smaller side (without damping): its pseudo-inverse, or an error.
    samples : int
        0: the exact backward factor, from all C output-gradients (one sample's if the net has no activations). K > 0:
        K backward passes a sample, of residuals drawn from the model's Gaussian outputs; D is never formed, and the
        metric's :math:`S^\top S/NK` stands for :math:`D^\top D/N`. Then ``lr="optimal"`` is 1/L.
    variance : float
        :math:`s^2`, the variance of the outputs the model assumes. It scales loss and Fisher alike; with damping it
        decides how :math:`\lambda` is shared: the backward factor is shifted by :math:`s^2\sqrt\lambda`.
    seed : int
        Of the generator of the samples; every solve or coefficient draws anew.

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
    >>> deep = ngd.signals(ngd.models.DeepLinear([3] * 5, seed=0), torch.eye(3, dtype=torch.float64))
    >>> d = ngd.fisher.KFAC().direction(deep, deep.outputs)
    >>> torch.allclose(deep.jvp(d), 4 * deep.outputs)  # square layers: L times the natural gradient
    True
    """

    def __init__(self, rank: str = "pinv", samples: int = 0, variance: float = 1.0, seed: int = 0):
        self.rank, _ = check_solver(rank, 0.0)
        if samples < 0 or not 0 < variance < float("inf"):
            raise ValueError(f"samples={samples} must be 0 (exact) or more, and variance={variance} positive")
        self.samples, self.variance, self.generator = samples, float(variance), torch.Generator().manual_seed(seed)

    def best_alpha(self, factors: Factors) -> float:
        return float(factors.depth) if self.samples else self.alpha(factors)

    def coefficient(self, factors: Factors, damping: float = 0.0) -> Tensor:
        train, a = factors.train, check_damping(damping) ** 0.5
        n, b, Q = train.columns, self.variance * a, 0.0
        if self.samples:
            if train.signals is None:
                raise TypeError("samples are drawn from a network's outputs: analytic factors have none")
            S = self._backward(train.signals, torch.zeros_like(train.signals.outputs))[1]
        for l in range(train.depth):
            A = self._invert(train.A(l), n * a, factors.A(l).T, train, [l])[0].T
            if self.samples:  # the Jacobian's D in the samples' metric
                D = self._invert(S[l].T @ S[l] / n, b, factors.signals.D[l].T, train, [l])[0]
                B = (train.signals.D[l] @ D).T / n
            else:
                B = self._invert(train.B(l), n * b, factors.B(l).T, train, [l])[0].T
            Q = Q + n * A.repeat_interleave(train.c, 0).repeat_interleave(train.c, 1) * B
        return Q

    def solve(self, sig, g, damping=0.0, out=None):
        g, root, factors = check_residual(sig, g).view(sig.n, sig.c), check_damping(damping) ** 0.5, empirical(sig)
        E, S, r = self._backward(sig, g)
        stacks, layers, conditions, slope = {}, {}, [], 0.0
        for l, (H, s) in enumerate(zip(sig.H, S)):
            few_a, few_b = sig.n <= H.shape[1], not self.samples and len(s) <= s.shape[1]
            stacks.setdefault((few_a, few_b, l if few_a or few_b else (H.shape, s.shape)), []).append(l)
        for (few_a, few_b, _), ls in stacks.items():

            def solved(M, shift, rhs, ls=ls):
                x, condition = self._invert(M, shift, rhs, factors, ls)
                conditions.append(condition)
                return x

            if few_a or few_b:
                slope = float("nan")
                layers[ls[0]] = self._few(ls[0], few_a, few_b, g, sig, E, S, r, root, factors, solved)
            else:
                one = len(ls) == 1  # a stack of one is a view, no copy
                H, e, s = (p[ls[0]][None] if one else torch.stack([p[l] for l in ls]) for p in (sig.H, E, S))
                G = e.mT @ H / sig.n
                half = solved(s.mT @ s / r, self.variance * root, G)
                step = solved(H.mT @ H / sig.n, root, half.mT).mT
                layers |= zip(ls, step)
                slope += float((step * G).sum())
        info = Info(max(conditions), 0.0, slope if slope == slope else None)
        return sig.pack([layers[l] for l in range(len(layers))], out), info

    def _backward(self, sig, g):
        """For each layer the residual pulled back, and S such that S^T S / r is the metric's backward factor; and r."""
        if self.samples:
            v = torch.randn(sig.n, self.samples, sig.c, generator=self.generator, dtype=g.dtype).to(g.device)
            pulled = sig.pull(torch.cat([g[:, None], v / self.samples**0.5], 1))
            return [e[:, 0] for e in pulled], [e[:, 1:].flatten(0, 1) for e in pulled], sig.n
        if sig.linear:  # every sample has the same output-gradients
            S = [s[0] for s in sig.pull(torch.eye(sig.c, dtype=g.dtype, device=g.device)[None])]
            return [g @ s for s in S], S, 1
        return sig.pulled(g), sig.D, sig.n

    def _few(self, l, few_a, few_b, g, sig, E, S, r, root, factors, solved):
        """A layer with fewer samples than units on some side, as a pair to be multiplied."""
        H, e, s, n, b = sig.H[l], E[l], S[l], sig.n, self.variance * root
        if few_b:
            G = g.T.clone()
            if r > 1:
                G, rows = torch.zeros(len(s), n, dtype=g.dtype, device=g.device), torch.arange(len(s), device=g.device)
                G[rows, rows // sig.c] = g.flatten()
            e = solved(factors.B(l) if r > 1 else s @ s.T, r * b, G).T
        if few_a:
            e = solved(H @ H.T if r == 1 or self.samples else factors.A(l), n * root, e)  # factors sweep D
        if few_b:
            e = r * (e @ s)
            return (e, H) if few_a else (e / n, solved(H.T @ H / n, root, H.T).T)
        return solved(s.T @ s / r, b, e.T).T, H

    def _invert(self, M, shift, rhs, factors, ls):
        M.diagonal(0, -2, -1).add_(shift)
        name = f"layer {ls[0]}'s factor: its " if len(ls) == 1 else f"one of the layers {ls}: its factor's "
        x, info = solve_spd(M, rhs, self.rank, 0.0, factors, name)
        return x, info.condition

    def __repr__(self) -> str:
        return f"KFAC(rank={self.rank!r}, samples={self.samples}, variance={self.variance:g})"


class _FromSignals(Fisher):
    """Fishers that need more than factors: Q column by column, each a direction pushed forward."""

    def coefficient(self, factors: Factors, damping: float = 0.0) -> Tensor:
        train, rows, damping = factors.train.signals, factors.signals, check_damping(damping)
        if train is None:
            raise TypeError(f"{self!r} needs signals: use empirical factors of a finite network, not analytic ones")
        apply, columns = self._inverse(train, damping), []
        for e in torch.eye(train.n * train.c).to(train.outputs):
            columns.append(rows.jvp(rows.pack(apply(train.pulled(e)))).flatten())
        return torch.stack(columns, 1)

    def solve(self, sig, g, damping=0.0, out=None):
        pulled = sig.pulled(check_residual(sig, g))
        return sig.pack(self._inverse(sig, check_damping(damping))(pulled), out), Info(float("nan"), 0.0)

    def best_alpha(self, factors: Factors) -> float:
        """The middle of Q's spectrum: the best constant learning rate is 2/(smallest + largest eigenvalue)."""
        values = torch.linalg.eigvals(self.coefficient(factors)).real
        return float(values.min() + values.max()) / 2

    def _inverse(self, sig: Signals, damping: float):
        """A function from residuals pulled to every layer's units, (N, M_out) each, to `Signals.pack`'s layers."""
        raise NotImplementedError


def _activity(sig, D):
    """Squared output-gradients of every unit at every sample, summed over outputs: (M_out, N)."""
    return D.square().view(sig.n, sig.c, -1).sum(1).T


class TridiagonalKFAC(_FromSignals):
    r"""K-FAC whose *inverse* is block tri-diagonal: neighbouring layers coupled, and still positive definite.

    Of all matrices that agree with the Kronecker-factored Fisher on its three central block diagonals (blocks
    :math:`D_l^\top D_{l'}/N \otimes H_l^\top H_{l'}/N`, :math:`\sqrt\lambda` added to the factors of l = l'), the one
    whose inverse has no others. With :math:`\Psi_l = F_{l,l+1} F_{l+1,l+1}^{-1}`, itself a Kronecker product,

    .. math:: F^{-1} = (I - \Psi)^\top\,
        \mathrm{diag}(F_{ll} - \Psi_l F_{l+1,l+1} \Psi_l^\top)^{-1}\,(I - \Psi),

    a product of positive factors. Setting the far blocks of F itself to zero instead would make it indefinite.

    Raises
    ------
    TypeError
        On analytic factors: correlations between layers are not among them.
    ValueError
        Without damping: the conditional blocks are singular then.

    Notes
    -----
    Martens & Grosse (2015), section 4.3 and appendix B. ``damping`` is :math:`\lambda` as for `KFAC`. Works on the
    units' side: factors are M x M, with one symmetric eigenproblem a factor.

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
            raise ValueError("damping=0: this Fisher needs a positive damping, its conditional blocks are singular")
        sides = [self._side(parts, sig.n, damping**0.5) for parts in (sig.D, sig.H)]

        def apply(pulled):
            steps = [r.T @ H / sig.n for r, H in zip(pulled, sig.H)]
            (_, B), (_, A) = sides
            last = torch.cholesky_solve(torch.cholesky_solve(steps[-1], B).T, A).T
            inner = []
            for l, ((PB, KB, b), (PA, KA, a)) in enumerate(zip(*(links for links, _ in sides))):
                rest = steps[l] - PB @ steps[l + 1] @ PA.T
                inner.append((KB @ ((KB.T @ rest @ KA) / (1 - b[:, None] * a)) @ KA.T, PB, PA))
            result = [W for W, _, _ in inner] + [last]
            for l, (W, PB, PA) in enumerate(inner):
                result[l + 1] = result[l + 1] - PB.T @ W @ PA
            return result

        return apply

    @staticmethod
    def _side(parts, n, root):
        """For one side's factors: (Psi, K, spectrum) of each pair of neighbours, and the last one's Cholesky factor.

        K K^T inverts the factor, and K^T (Psi F_next Psi^T) K is the diagonal of the spectrum, below 1.
        """
        factors = [X.T @ X / n + root * torch.eye(X.shape[1]).to(X) for X in parts]
        roots, links = [torch.linalg.cholesky(F) for F in factors], []
        for l in range(len(parts) - 1):
            across = parts[l + 1].T @ parts[l] / n
            Psi = torch.cholesky_solve(across, roots[l + 1]).T
            half = torch.linalg.solve_triangular(roots[l], Psi @ roots[l + 1], upper=False)
            spectrum, vectors = torch.linalg.eigh(half @ half.T)
            links.append((Psi, torch.linalg.solve_triangular(roots[l].T, vectors, upper=True), spectrum))
        return links, roots[-1]

    def __repr__(self) -> str:
        return "TridiagonalKFAC()"


class UnitWise(_FromSignals):
    r"""One block a unit: its incoming weights and bias together, decoupled from all other units.

    With :math:`s_{in} = \sum_c D_{nc,i}^2`, unit i's block is :math:`H^\top \mathrm{diag}(s_{i\cdot}) H/N`. For C = 1
    and :math:`H_l` of rank N, Q is diagonal, and entry n counts the units with a nonzero gradient at sample n.

    Parameters
    ----------
    rank : {"pinv", "raise"}
        Where a unit's active inputs are linearly dependent and there is no damping (more samples than inputs): its
        pseudo-inverse, or an error.

    Raises
    ------
    TypeError
        On analytic factors: a unit's gradients have no infinite-width counterpart.
    RankDeficient
        With ``rank="raise"``, when a unit's block on its active samples is singular.

    Notes
    -----
    Karakida & Osawa (2020), Theorem 5.1, eqs. 23-24. Units are solved in batches, each on the samples at which it is
    active: of order N^3 a unit, or once for a whole layer without damping when all its units are active everywhere.
    Undamped steps divide by gradients that may be tiny, and leave the linear regime; a damping of order 1/width keeps
    them in it.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> sig = ngd.signals(ngd.models.MLP([3, 8, 1], "tanh", seed=0), torch.eye(3, dtype=torch.float64))
    >>> round(ngd.fisher.UnitWise().alpha(ngd.kernels.empirical(sig)), 6)
    9.0
    """

    def __init__(self, rank: str = "pinv"):
        self.rank, _ = check_solver(rank, 0.0)

    def _inverse(self, sig, damping):
        grams, activities = [H @ H.T for H in sig.H], [_activity(sig, D) for D in sig.D]

        def apply(pulled):
            weights = [
                torch.cat(list(self._units(A, s, r.T, sig.n * damping, f"layer {l}'s ")))
                for l, (A, s, r) in enumerate(zip(grams, activities, pulled))
            ]
            return [(w.T, H) for w, H in zip(weights, sig.H)]

        return apply

    def _units(self, A, activity, pulled, shift, name):
        r"""Weights :math:`t (t A t + N\rho)^+ t\, r/s` of a layer's units, t = sqrt(s), or 1 with one factor."""
        alike = not shift and bool((activity > 0).all()) and torch.linalg.matrix_rank(A, hermitian=True) == len(A)
        step = len(activity) if alike else max(1, 2**18 // A.numel())  # a batch of matrices stays in the cache
        for s, r in zip(activity.split(step), pulled.split(step)):
            t = torch.ones_like(s) if alike else s.sqrt()
            b = torch.where(s > 0, t * r / s, 0.0)
            M = A.clone()[None] if alike else A * t[:, :, None] * t[:, None, :]
            M.diagonal(dim1=1, dim2=2).add_(shift)
            v = solve_batch(M, b.T[None] if alike else b[:, :, None], self.rank, name)
            yield t * (v[0].T if alike else v[:, :, 0])

    def __repr__(self) -> str:
        return f"UnitWise(rank={self.rank!r})"


class Diagonal(_FromSignals):
    r"""The exact Fisher's diagonal, :math:`F_{pp} = \frac1N \sum_{nc} J_{nc,p}^2`: one number a weight.

    A layer's diagonal is :math:`s H^{\circ 2}/N` with s as for `UnitWise`; weights with :math:`F_{pp} = 0` do not move
    without damping. Not isotropic at any width.

    Raises
    ------
    TypeError
        On analytic factors.

    Notes
    -----
    Karakida & Osawa (2020), section 5 and Figure 3.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> sig = ngd.signals(ngd.models.MLP([3, 8, 1], seed=0), torch.eye(3, dtype=torch.float64))
    >>> [d.shape for d in ngd.fisher.Diagonal().direction(sig, sig.outputs)]
    [torch.Size([8, 3]), torch.Size([1, 8])]
    """

    def _inverse(self, sig, damping):
        moments = [_activity(sig, D) @ H.square() + sig.n * damping for H, D in zip(sig.H, sig.D)]
        return lambda pulled: [_over(r.T @ H, F) for r, H, F in zip(pulled, sig.H, moments)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class QuasiDiagonal(Diagonal):
    r"""The diagonal, and in every unit the coupling of each weight to the bias.

    In unit i keep :math:`F_{00}, F_{jj}, F_{0j}` (0 the bias). The step is
    :math:`\Delta_j = (g_j - g_0 F_{0j}/F_{00})/(F_{jj} - F_{0j}^2/F_{00})`,
    :math:`\Delta_0 = (g_0 - \sum_j F_{0j} \Delta_j)/F_{00}`; damping is added to the diagonal first. Weights whose
    input is constant over a unit's active samples are no more than its bias: without damping they do not move.

    Raises
    ------
    TypeError
        On analytic factors.
    ValueError
        If a trained layer does not train weights and biases both: the approximation is not defined there.

    Notes
    -----
    Ollivier (2015); Karakida & Osawa (2020), section 5 and Figure 3.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> sig = ngd.signals(ngd.models.MLP([3, 8, 1], bias_var=0.1, seed=0), torch.eye(3, dtype=torch.float64))
    >>> [d.shape for d in ngd.fisher.QuasiDiagonal().direction(sig, sig.outputs)]
    [torch.Size([8, 3]), torch.Size([8]), torch.Size([1, 8]), torch.Size([1])]
    """

    def _inverse(self, sig, damping):
        if any(layer.bias is None or H.shape[1] != layer.in_features + 1 for layer, H in zip(sig.layers, sig.H)):
            raise ValueError("net must train weights and biases in every trained layer for the quasi-diagonal Fisher")
        parts = []
        for H, D in zip(sig.H, sig.D):
            s, bias = _activity(sig, D), H[:, -1:]
            F, cross, corner = s @ H[:, :-1].square(), s @ (bias * H[:, :-1]), s @ bias.square() + sig.n * damping
            slope = _over(cross, corner)
            rest = F - slope * cross
            parts.append((slope, torch.where(rest > 1e-12 * F, rest, 0.0) + sig.n * damping, corner))

        def apply(pulled):
            layers = []
            for r, H, (slope, rest, corner) in zip(pulled, sig.H, parts):
                g = r.T @ H
                weights = _over(g[:, :-1] - slope * g[:, -1:], rest)
                layers.append(torch.cat([weights, _over(g[:, -1:], corner) - (slope * weights).sum(1, True)], 1))
            return layers

        return apply


def _over(a, b):
    """a / b, and 0 where b is 0: the pseudo-inverse of a diagonal."""
    return torch.where(b > 0, a / b, 0.0)


class DeepLinearExact(Fisher):
    r"""The exact natural gradient of a deep linear net of any widths, by moving its first and last layer only.

    The map :math:`W = W_L \cdots W_1` can move along :math:`B X + Y A` with :math:`B = W_L \cdots W_2` and
    :math:`A = W_{L-1} \cdots W_1`, which span the other layers' moves. With :math:`X` the inputs (N x n_0),
    :math:`H = X A^\top`, and :math:`P_H = H H^+`, :math:`P_B = B B^+`,

    .. math:: dW_1^\top = X^+ (g - \tfrac12 P_H g) B^{+\top}, \qquad dW_L^\top = H^+ (g - \tfrac12 g P_B),

    and together they push the residual to its projection on the range of the Jacobian, as every exact natural gradient
    does: contracting, expanding and bottleneck nets included, where block-wise pseudo-inverses do not.

    Raises
    ------
    TypeError
        In a solve, for a network with activations, biases or frozen layers.
    ValueError
        For damping: the step is exact or nothing.
    RankDeficient
        When A or B has lost rank: the net is at (or very near) a saddle.

    Notes
    -----
    Bernacchia, Lengyel & Hennequin (2018), eq. 10, repaired for narrow layers. On training rows Q is the orthogonal
    projection on the range of J; with fewer samples than inputs, test rows depend on the generalized inverse chosen.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> x = ngd.data.gaussian(9, 6)
    >>> sig = ngd.signals(ngd.models.DeepLinear([6, 4, 3, 2], seed=0), x)
    >>> d = ngd.fisher.DeepLinearExact().direction(sig, sig.outputs)
    >>> torch.allclose(sig.jvp(d), sig.outputs)
    True
    """

    def best_alpha(self, factors: Factors) -> float:
        return 1.0

    def coefficient(self, factors: Factors, damping: float = 0.0) -> Tensor:
        (_, X), (H, H_inverse), (B, B_inverse) = self._parts(factors.train.signals, damping)
        first, last, PB = factors.signals.H[0] @ X, factors.signals.H[-1] @ H_inverse, B @ B_inverse
        first = first - first @ H @ H_inverse / 2
        return torch.kron(first, PB) + torch.kron(last, torch.eye(len(B), dtype=B.dtype, device=B.device) - PB / 2)

    def solve(self, sig, g, damping=0.0, out=None):
        g = check_residual(sig, g).view(sig.n, sig.c)
        (_, X), (H, H_inverse), (B, B_inverse) = self._parts(sig, check_damping(damping))
        last = H_inverse @ g
        layers = [torch.zeros_like(layer.weight) for layer in sig.layers]
        layers[0] += (X @ (g - H @ last / 2) @ B_inverse.T).T
        layers[-1] += (last - last @ B_inverse.T @ B.T / 2).T
        return sig.pack(layers, out), Info(float("nan"), 0.0)

    def _parts(self, sig, damping):
        """Inputs of the first layer, of the last, and the map behind the first, each with its pseudo-inverse."""
        biased = sig is None or any(H.shape[1] != layer.in_features for H, layer in zip(sig.H, sig.layers))
        if biased or not sig.linear or not all(p.requires_grad for p in sig.net.parameters()):
            raise TypeError("DeepLinearExact needs a net of linear layers only, all trained, without biases")
        if damping:
            raise ValueError(f"damping={damping}: this step has no damped form; use KFAC, or a smaller learning rate")
        widths = [sig.layers[0].in_features] + [layer.out_features for layer in sig.layers]
        B = sig.pull(torch.eye(sig.c, dtype=sig.outputs.dtype, device=sig.outputs.device)[None])[0][0]
        ranks = min(sig.n, widths[0]), min(sig.n, *widths[:-1]), min(widths[1:])
        return [(M, _pinv(M, rank)) for M, rank in zip((sig.H[0], sig.H[-1], B), ranks)]


def _pinv(M, rank):
    """The pseudo-inverse of a matrix that must have this rank."""
    U, values, V = torch.linalg.svd(M, full_matrices=False)
    if not values[rank - 1] > max(M.shape) * torch.finfo(M.dtype).eps * values[0]:
        raise RankDeficient(f"a product of weights (or the inputs) has rank below {rank}: the net is at a saddle")
    return V[:rank].T / values[:rank] @ U[:, :rank].T
