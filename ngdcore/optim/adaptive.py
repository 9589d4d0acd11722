"""Damping that follows how well the quadratic model predicts the loss."""

import math
from dataclasses import dataclass

__all__ = ["Adaptive"]


@dataclass(frozen=True)
class Adaptive:
    r"""Damping that follows actual over predicted decrease:
    ``NaturalGradient(..., damping=Adaptive())``.

    After a step of learning rate :math:`\eta` along d, :math:`\rho` is the change of
    the batch's loss over the change that a quadratic with its minimum at the full step
    predicts, :math:`-(1 - \alpha/2)\,\eta\,\langle d, \nabla L\rangle`. Then
    :math:`\lambda \leftarrow \tfrac32\lambda` if :math:`\rho < .25`,
    :math:`\tfrac23\lambda` if :math:`\rho > .75`. Where both changes are at the
    rounding level of the loss, :math:`\rho` is nan, the step is accepted, and the
    damping stays.

    Parameters
    ----------
    start : float
        First damping.
    alpha : float, optional
        The fraction of the full step that the learning rate stands for. By default it
        follows the learning rate of every step: :math:`\eta` over the Fisher's
        ``full_step`` (1 for the exact Fisher, 1/L for sampled K-FAC) or over the
        resolved rate of ``lr="optimal"``, and at most 1. A number fixes it.
    lower : float
        Smallest damping; 0 for none. As damping, it is in units of loss and data.
    factor : float
        What damping is multiplied with or divided by; 1 keeps it constant.
    low, high : float
        The thresholds.
    reject : bool
        Undo a step that does not decrease the batch's loss, or whose system is
        singular, and let damping grow.
    upper : float
        Largest damping.

    Raises
    ------
    ValueError
        For values that make no sense.

    Notes
    -----
    Bernacchia, Lengyel & Hennequin (2018), eqs. 20-21 and footnote 1, with
    :math:`\alpha` counted once; clips and rejection are not in print.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net, x = ngd.models.DeepLinear([3, 3, 3], seed=0), ngd.data.gaussian(9, 3)
    >>> rule = ngd.optim.Adaptive(start=1.0, lower=0.5)
    >>> opt = ngd.optim.NaturalGradient(net, ngd.fisher.KFAC(), lr=1 / 2, damping=rule)
    >>> [round(opt.step(x, x.flip(1)).damping, 3) for _ in range(4)]
    [1.0, 0.667, 0.5, 0.5]
    """

    start: float = 1.0
    alpha: float | None = None
    lower: float = 1e-10
    factor: float = 1.5
    low: float = 0.25
    high: float = 0.75
    reject: bool = True
    upper: float = 1e10

    def __post_init__(self):
        if not (
            0 <= self.lower <= self.start <= self.upper < math.inf
            and (self.alpha is None or 0 < self.alpha < 2)
            and 1 <= self.factor < math.inf
        ):
            raise ValueError(
                f"{self}: needs 0 <= lower <= start <= upper, 0 < alpha < 2 and"
                " factor >= 1"
            )

    def after(self, damping: float, rho: float) -> float:
        """The next damping; nan stands for a step that failed.

        Damping that grows from 0 starts at 1e-10.
        """
        if not rho >= self.low:
            return min((damping or 1e-10) * self.factor, self.upper)
        return max(damping / self.factor, self.lower) if rho > self.high else damping

    def predicted(self, lr: float, slope: float, full: float) -> float:
        """The decrease of the loss that the quadratic model gives a step of rate lr
        along a direction of this slope, with its minimum at the rate ``full``.
        """
        alpha = min(lr / full, 1.0) if self.alpha is None else self.alpha
        return (1 - alpha / 2) * lr * slope
