r"""Fishers that stay within a unit: unit-wise, quasi-diagonal, diagonal."""

import torch

from ..solve import solve_batch
from .base import FromSignals, check_solver

__all__ = ["UnitWise", "Diagonal", "QuasiDiagonal"]


def _activity(sig, D):
    """Squared output-gradients of every unit at every sample, summed over outputs:
    (M_out, N).
    """
    return D.square().view(sig.n, sig.c, -1).sum(1).T


class UnitWise(FromSignals):
    r"""One block a unit: its incoming weights and bias together, decoupled from all
    other units.

    With :math:`s_{in} = \sum_c D_{nc,i}^2`, unit i's block is
    :math:`H^\top \mathrm{diag}(s_{i\cdot}) H/N`. For C = 1 and :math:`H_l` of rank N, Q
    is diagonal, and entry n counts the units with a nonzero gradient at sample n.

    Parameters
    ----------
    rank : {"pinv", "raise"}
        Where a unit's active inputs are linearly dependent and there is no damping
        (more samples than inputs): its pseudo-inverse, or an error.

    Raises
    ------
    TypeError
        On analytic factors: a unit's gradients have no infinite-width counterpart.
    RankDeficient
        With ``rank="raise"``, when a unit's block on its active samples is singular.

    Notes
    -----
    Karakida & Osawa (2020), Theorem 5.1, eqs. 23-24. Units are solved in batches, each
    on the samples at which it is active: of order N^3 a unit, or once for a whole layer
    without damping when all its units are active everywhere. Undamped steps divide by
    gradients that may be tiny, and leave the linear regime; a damping of order 1/width
    keeps them in it.

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
                torch.cat(
                    list(self._units(A, s, r.T, sig.n * damping, f"layer {l}'s "))
                )
                for l, (A, s, r) in enumerate(zip(grams, activities, pulled))
            ]
            return [(w.T, H) for w, H in zip(weights, sig.H)]

        return apply

    def _units(self, A, activity, pulled, shift, name):
        r"""Weights :math:`t (t A t + N\rho)^+ t\, r/s` of a layer's units, t = sqrt(s),
        or 1 with one factor.
        """
        alike = (
            not shift
            and bool((activity > 0).all())
            and torch.linalg.matrix_rank(A, hermitian=True) == len(A)
        )
        step = (
            len(activity) if alike else max(1, 2**18 // A.numel())
        )  # a batch of matrices stays in the cache
        for s, r in zip(activity.split(step), pulled.split(step)):
            t = torch.ones_like(s) if alike else s.sqrt()
            b = torch.where(s > 0, t * r / s, 0.0)
            M = A.clone()[None] if alike else A * t[:, :, None] * t[:, None, :]
            M.diagonal(dim1=1, dim2=2).add_(shift)
            v = solve_batch(M, b.T[None] if alike else b[:, :, None], self.rank, name)
            yield t * (v[0].T if alike else v[:, :, 0])

    def __repr__(self) -> str:
        return f"UnitWise(rank={self.rank!r})"


class Diagonal(FromSignals):
    r"""The exact Fisher's diagonal, :math:`F_{pp} = \frac1N \sum_{nc} J_{nc,p}^2`: one
    number a weight.

    A layer's diagonal is :math:`s H^{\circ 2}/N` with s as for `UnitWise`; weights with
    :math:`F_{pp} = 0` do not move without damping. Not isotropic at any width.

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
        moments = [
            _activity(sig, D) @ H.square() + sig.n * damping
            for H, D in zip(sig.H, sig.D)
        ]
        return lambda pulled: [
            _over(r.T @ H, F) for r, H, F in zip(pulled, sig.H, moments)
        ]

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class QuasiDiagonal(Diagonal):
    r"""The diagonal, and in every unit the coupling of each weight to the bias.

    In unit i keep :math:`F_{00}, F_{jj}, F_{0j}` (0 the bias). The step is
    :math:`\Delta_j = (g_j - g_0 F_{0j}/F_{00})/(F_{jj} - F_{0j}^2/F_{00})`,
    :math:`\Delta_0 = (g_0 - \sum_j F_{0j} \Delta_j)/F_{00}`; damping is added to the
    diagonal first. Weights whose input is constant over a unit's active samples are no
    more than its bias: without damping they do not move.

    Raises
    ------
    TypeError
        On analytic factors.
    ValueError
        If a trained layer does not train weights and biases both: the approximation is
        not defined there.

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
        if any(
            layer.bias is None or H.shape[1] != layer.in_features + 1
            for layer, H in zip(sig.layers, sig.H)
        ):
            raise ValueError(
                "net must train weights and biases in every trained layer for the quasi-diagonal Fisher"
            )
        parts = []
        for H, D in zip(sig.H, sig.D):
            s, bias = _activity(sig, D), H[:, -1:]
            F, cross, corner = (
                s @ H[:, :-1].square(),
                s @ (bias * H[:, :-1]),
                s @ bias.square() + sig.n * damping,
            )
            slope = _over(cross, corner)
            rest = F - slope * cross
            parts.append(
                (
                    slope,
                    torch.where(rest > 1e-12 * F, rest, 0.0) + sig.n * damping,
                    corner,
                )
            )

        def apply(pulled):
            layers = []
            for r, H, (slope, rest, corner) in zip(pulled, sig.H, parts):
                g = r.T @ H
                weights = _over(g[:, :-1] - slope * g[:, -1:], rest)
                layers.append(
                    torch.cat(
                        [
                            weights,
                            _over(g[:, -1:], corner) - (slope * weights).sum(1, True),
                        ],
                        1,
                    )
                )
            return layers

        return apply


def _over(a, b):
    """a / b, and 0 where b is 0: the pseudo-inverse of a diagonal."""
    return torch.where(b > 0, a / b, 0.0)
