r"""Fishers that stay within a unit: unit-wise, quasi-diagonal, diagonal."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..solve import (
    Guard,
    Inverse,
    check_precision,
    factorised,
    inverse_spd,
    inverse_stack,
)
from .base import WeightSide, check_rank, pulled

__all__ = ["UnitWise", "Diagonal", "QuasiDiagonal"]


BATCH = 2**18  # numbers in a stack of Gram matrices: what stays in the cache


def _activity(sig, D: Float[Tensor, "NC units"]) -> Float[Tensor, "units N"]:
    """Squared output-gradients of every unit at every sample, summed over outputs."""
    return D.square().view(sig.n, sig.c, -1).sum(1).T


class UnitWise(WeightSide):
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
    >>> x = torch.eye(3, dtype=torch.float64)
    >>> sig = ngd.signals(ngd.models.MLP([3, 8, 1], "tanh", seed=0), x)
    >>> round(ngd.fisher.UnitWise().alpha(ngd.kernels.empirical(sig)), 6)
    9.0
    """

    def __init__(self, rank: str = "pinv"):
        self.rank = check_rank(rank)

    def _inverse(self, sig, damping, generator=None):
        """From residuals (..., N, C) to pairs (E, H), unit by unit."""
        activities = [_activity(sig, D) for D in sig.D]
        numbers = sum(int((s > 0).sum(1).square().sum()) for s in activities)
        solvers = [
            self._units(H @ H.T, s, sig.n * damping, numbers, l)
            for l, (H, s) in enumerate(zip(sig.H, activities))
        ]

        def apply(g):
            return [
                (solve(r), H) for solve, r, H in zip(solvers, pulled(sig, g), sig.H)
            ]

        return Inverse(apply)

    def _units(
        self,
        A: Float[Tensor, "N N"],
        activity: Float[Tensor, "units N"],
        shift: float,
        numbers: int,
        l: int,
    ):
        r"""A function from layer l's pulled residuals r (..., N, units) to weights
        :math:`t (t A t + N\rho)^+ t\, r/s` of the same shape, t = sqrt(s); or with
        t = 1 and one factor for all units where none is ever inactive.
        """
        check_precision(A)
        guard = Guard(self.rank, name=f"layer {l}'s ")
        alike = (
            not shift
            and bool((activity > 0).all())
            and torch.linalg.matrix_rank(A, hermitian=True) == len(A)
        )
        if alike:
            solve = inverse_spd(A, guard)
            return lambda r: solve(r / activity.T)
        roots, batches = activity.sqrt(), _batches(activity)
        inverse_roots = torch.where(activity > 0, 1 / roots, 0.0).T

        def factors():
            for units, active in batches:
                t, samples, M = _active(A, roots[units], active)
                M.diagonal(0, 1, 2).add_(shift)
                yield units, samples, t, inverse_stack(M, guard)

        again = factorised(factors, numbers)
        return lambda r: _through_units(inverse_roots * r, again())

    def __repr__(self) -> str:
        return f"UnitWise(rank={self.rank!r})"


def _batches(activity: Float[Tensor, "units N"]):
    """Units in batches of alike activity: which they are, and at how many samples the
    most active one is active.
    """
    counts, order = (activity > 0).sum(1).sort(descending=True, stable=True)
    counts, batches, start = counts.tolist(), [], 0
    while start < len(counts):
        active = max(1, counts[start])
        stop = start + max(1, BATCH // active**2)
        batches.append((order[start:stop], active))
        start = stop
    return batches


def _active(A: Float[Tensor, "N N"], roots: Float[Tensor, "batch N"], active: int):
    """A batch of units at as many samples as the most active one needs: roots t there
    (batch, active), which samples, and t A t; beyond a unit's own samples t is 0.
    """
    t, samples = roots.topk(active, dim=1, sorted=False)
    M = A.index_select(0, samples.flatten()).view(*t.shape, len(A))
    M = M.gather(2, samples[:, None, :].expand(-1, active, -1))
    return t, samples, M.mul_(t[:, :, None]).mul_(t[:, None, :])


def _through_units(
    r: Float[Tensor, "*k N units"], solves
) -> Float[Tensor, "*k N units"]:
    """Residuals through each batch of units: which they are, the samples (batch,
    active) at which they are solved, the roots t there, the solve.
    """
    columns = r.reshape(-1, *r.shape[-2:]).permute(2, 1, 0).contiguous()
    out = torch.zeros_like(columns)
    for units, samples, t, solve in solves:
        rows = units[:, None], samples
        out[rows] = t[:, :, None] * solve(columns[rows])
    return out.permute(2, 1, 0).reshape(r.shape)


class Diagonal(WeightSide):
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
    >>> x = torch.eye(3, dtype=torch.float64)
    >>> sig = ngd.signals(ngd.models.MLP([3, 8, 1], seed=0), x)
    >>> [d.shape for d in ngd.fisher.Diagonal().direction(sig, sig.outputs)]
    [torch.Size([8, 3]), torch.Size([1, 8])]
    """

    def _inverse(self, sig, damping, generator=None):
        """From residuals (..., N, C) to gradients over second moments."""
        moments = [
            _activity(sig, D) @ H.square() + sig.n * damping
            for H, D in zip(sig.H, sig.D)
        ]

        def apply(g):
            return [
                _over(r.mT @ H, F) for r, H, F in zip(pulled(sig, g), sig.H, moments)
            ]

        return Inverse(apply)


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
    >>> x = torch.eye(3, dtype=torch.float64)
    >>> sig = ngd.signals(ngd.models.MLP([3, 8, 1], bias_var=0.1, seed=0), x)
    >>> [d.shape for d in ngd.fisher.QuasiDiagonal().direction(sig, sig.outputs)]
    [torch.Size([8, 3]), torch.Size([8]), torch.Size([1, 8]), torch.Size([1])]
    """

    def _inverse(self, sig, damping, generator=None):
        """From residuals (..., N, C) to weights behind the bias, and the bias."""
        if any(
            layer.bias is None or H.shape[1] != layer.in_features + 1
            for layer, H in zip(sig.layers, sig.H)
        ):
            raise ValueError(
                "net must train weights and biases in every trained layer for the"
                " quasi-diagonal Fisher"
            )
        moments = [
            self._moments(H, _activity(sig, D), sig.n * damping)
            for H, D in zip(sig.H, sig.D)
        ]

        def apply(g):
            layers = []
            for r, H, (slope, rest, corner) in zip(pulled(sig, g), sig.H, moments):
                G = r.mT @ H
                weights, bias = G[..., :-1], G[..., -1:]
                moved = _over(weights - slope * bias, rest)
                bias = _over(bias, corner) - (slope * moved).sum(-1, True)
                layers.append(torch.cat([moved, bias], -1))
            return layers

        return Inverse(apply)

    @staticmethod
    def _moments(
        H: Float[Tensor, "N inputs"], s: Float[Tensor, "units N"], shift: float
    ):
        """Each weight's slope on its bias and what is left of its square, (units,
        weights); and the bias's square, (units, 1).
        """
        weights, bias = H[:, :-1], H[:, -1:]
        squares, cross = s @ weights.square(), s @ (bias * weights)
        corner = s @ bias.square() + shift
        slope = _over(cross, corner)
        rest = squares - slope * cross
        # below this, what is left of a weight that its bias explains is rounding
        rest = torch.where(rest > 1e-12 * squares, rest, 0.0) + shift
        return slope, rest, corner


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: the pseudo-inverse of a diagonal."""
    return torch.where(b > 0, a / b, 0.0)
