r"""Natural gradient as a `torch.optim.Optimizer`, adaptive damping, and one training
generator for all optimizers.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .factors import empirical
from .fisher import Fisher, RankDeficient
from .signals import signals

__all__ = ["NaturalGradient", "Adaptive", "Step", "run", "half_mse"]


def half_mse(outputs: Tensor, y: Tensor) -> Tensor:
    r"""The default loss, :math:`\frac1{2N}\sum_{n,c}(f_{nc} - y_{nc})^2`: summed over
    outputs, averaged over samples.

    ``torch.nn.MSELoss()`` averages over outputs too and has no 1/2: it is 2/C times
    this.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> float(ngd.optim.half_mse(torch.ones(4, 3), torch.zeros(4, 3)))
    1.5
    """
    return (outputs - y).square().sum() / (2 * len(y))


@dataclass(frozen=True)
class Step:
    """The state at which a step was taken.

    Attributes
    ----------
    loss : float
        Loss before the step.
    outputs : Tensor, (N, C)
        Outputs before the step, on the rows of the step's batch.
    condition : float
        Estimated condition number of the solved Gram (nan for first-order optimizers).
    jitter : float
        What was added to its diagonal, in absolute terms.
    step : int
        Number of steps taken before.
    seconds : float
        Seconds spent in steps before (not in the caller's loop body, nor in ``test``).
    examples : int
        Training examples seen before.
    damping : float
        Damping of the step (0 for first-order optimizers).
    rho : float
        Actual over predicted decrease of the batch's loss (nan unless damping adapts).
    accepted : bool
        False if the step was undone.
    test : float
        What ``test`` returned for the network at this state (nan where it was not
        called).
    """

    loss: float
    outputs: Tensor
    condition: float = float("nan")
    jitter: float = 0.0
    step: int = 0
    seconds: float = 0.0
    examples: int = 0
    damping: float = 0.0
    rho: float = float("nan")
    accepted: bool = True
    test: float = float("nan")


@dataclass(frozen=True)
class Adaptive:
    r"""Damping that follows actual over predicted decrease:
    ``NaturalGradient(..., damping=Adaptive())``.

    After a step of learning rate :math:`\eta` along d, :math:`\rho` is the change of
    the batch's loss over the change that a quadratic with its minimum at the full step
    predicts, :math:`-(1 - \alpha/2)\,\eta\,\langle d, \nabla L\rangle`. Then
    :math:`\lambda \leftarrow \tfrac32\lambda` if :math:`\rho < .25`,
    :math:`\tfrac23\lambda` if :math:`\rho > .75`.

    Parameters
    ----------
    start : float
        First damping.
    alpha : float
        The fraction of the full step that the learning rate stands for:
        :math:`\eta = \alpha/L` for `KFAC` from the unit side, :math:`\eta = \alpha` for
        the exact Fisher.
    lower : float
        Smallest damping; 0 for none. As damping, it is in units of loss and data.
    factor : float
        What damping is multiplied with or divided by; 1 keeps it constant.
    low, high : float
        The thresholds.
    reject : bool
        Undo a step that does not decrease the batch's loss, or whose system is
        singular, and let damping grow.

    Raises
    ------
    ValueError
        For values that make no sense.

    Notes
    -----
    Bernacchia, Lengyel & Hennequin (2018), eqs. 20-21 and footnote 1, with
    :math:`\alpha` counted once; clip and rejection are not in print.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net, x = ngd.models.DeepLinear([3, 3, 3], seed=0), ngd.data.gaussian(9, 3)
    >>> adaptive = ngd.optim.Adaptive(start=1.0, lower=0.5)
    >>> opt = ngd.optim.NaturalGradient(net, ngd.fisher.KFAC(samples=1), lr=1 / 2, damping=adaptive)
    >>> [round(opt.step(x, x.flip(1)).damping, 3) for _ in range(4)]
    [1.0, 0.667, 0.5, 0.5]
    """

    start: float = 1.0
    alpha: float = 1.0
    lower: float = 1e-10
    factor: float = 1.5
    low: float = 0.25
    high: float = 0.75
    reject: bool = True

    def __post_init__(self):
        if not (
            0 <= self.lower <= self.start < float("inf")
            and 0 < self.alpha < 2
            and self.factor >= 1
        ):
            raise ValueError(
                f"{self}: needs 0 <= lower <= start, 0 < alpha < 2 and factor >= 1"
            )

    def after(self, damping: float, rho: float) -> float:
        """The next damping."""
        if not rho >= self.low:  # NaN too: a step that failed
            return damping * self.factor
        return max(damping / self.factor, self.lower) if rho > self.high else damping


class NaturalGradient(torch.optim.Optimizer):
    r"""Natural gradient descent,
    :math:`\theta \leftarrow \theta - \eta\,\frac1N (F + \rho I)^+ J^\top g`.

    Parameters
    ----------
    net : nn.Module
        Anything `ngdcore.models.signals` accepts; its trained parameters are updated in
        place.
    fisher : Fisher
        The metric, for example ``ngd.fisher.Exact()``.
    lr : float or "optimal"
        :math:`\eta`; ``"optimal"`` is :math:`1/\alpha`, found at the first step: one
        step then solves the linearised problem.
    damping : float or Adaptive
        :math:`\rho \ge 0`, added to F; an `Adaptive` changes
        ``param_groups[0]["damping"]`` after every step.

    Raises
    ------
    ValueError
        For a bad learning rate or damping, or a network that trains nothing.

    Notes
    -----
    A step is one sweep for the signals, one Gram, one Cholesky factorisation, two
    triangular solves and one matrix product a layer; the update's buffers are kept
    between steps. ``param_groups[0]["lr"]`` is what torch's schedulers expect. Loss and
    metric are separate: any loss can be minimised in the metric of ``fisher``.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> x, y = torch.eye(3, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    >>> net = ngd.models.TwoLayerReLU(3, 4096, seed=0)
    >>> opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact(), lr="optimal")
    >>> start = opt.step(x, y).loss
    >>> opt.step(x, y).loss < 0.05 * start
    True
    """

    def __init__(
        self,
        net: nn.Module,
        fisher: Fisher,
        lr: float | str = "optimal",
        damping: float | Adaptive = 0.0,
    ):
        self.adaptive = damping if isinstance(damping, Adaptive) else None
        damping = self.adaptive.start if self.adaptive else damping
        if isinstance(lr, str):
            if lr != "optimal":
                raise ValueError(f"lr={lr!r} must be a positive number or 'optimal'")
        elif not 0 < lr < float("inf"):
            raise ValueError(f"lr={lr} must be positive")
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping={damping} must be 0 or positive")
        params = [p for p in net.parameters() if p.requires_grad]
        if not params:
            raise ValueError("net trains nothing: no parameter has requires_grad=True")
        super().__init__(params, dict(lr=lr, damping=damping))
        self.net, self.fisher = net, fisher
        self._update: list[Tensor] | None = None

    @torch.no_grad()
    def step(
        self, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor] = half_mse
    ) -> Step:
        """Take one step on the batch (x, y) and return the `Step` before it.

        Parameters
        ----------
        x : Tensor, (N, d)
        y : Tensor
            Targets as ``loss`` wants them; (N, C) for the default.
        loss : callable
            ``loss(outputs, y)`` is a scalar; its residual is
            :math:`g = N\\,\\partial L/\\partial f`.

        Raises
        ------
        ValueError
            For targets of another shape than the outputs (default loss), or a residual
            that is not finite.
        """
        sig = signals(self.net, x, lazy=True)
        value, g = _residual(loss, sig.outputs, y)
        group = self.param_groups[0]
        if group["lr"] == "optimal":
            group["lr"] = 1 / self.fisher.best_alpha(empirical(sig))
        state = Step(value, sig.outputs, damping=group["damping"])
        try:
            self._update, info = self.fisher.solve(
                sig, g, group["damping"], self._update
            )
        except RankDeficient:
            if not (self.adaptive and self.adaptive.reject):
                raise
            group["damping"] = self.adaptive.after(state.damping, float("nan"))
            return replace(state, accepted=False)
        state = replace(state, condition=info.condition, jitter=info.jitter)
        if self.adaptive:
            slope = (
                info.slope
                or sum(float((d * e).sum()) for d, e in zip(self._update, sig.vjp(g)))
                / sig.n
            )
            return self._adapt(slope, x, y, loss, group, state)
        torch._foreach_add_(group["params"], self._update, alpha=-group["lr"])
        return state

    def _adapt(self, slope, x, y, loss, group, state) -> Step:
        """The step, undone if it was bad; and the next damping."""
        rule, lr = self.adaptive, group["lr"]
        before = [p.clone() for p in group["params"]] if rule.reject else None
        torch._foreach_add_(group["params"], self._update, alpha=-lr)
        after = float(loss(self.net(x), y))
        rho = (state.loss - after) / ((1 - rule.alpha / 2) * lr * slope)
        accepted = after < state.loss or not rule.reject
        if not accepted:
            torch._foreach_copy_(group["params"], before)
        group["damping"] = rule.after(state.damping, rho)
        return replace(state, rho=rho, accepted=accepted)


def run(
    opt: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    steps: int,
    batch_size: int | None = None,
    seed: int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] = half_mse,
    net: nn.Module | None = None,
    progress: bool = False,
    test: Callable[[], float] | None = None,
    every: int = 1,
) -> Iterator[Step]:
    """Train, and yield the state before every step and after the last: ``steps + 1``
    states in all.

    Parameters
    ----------
    opt : NaturalGradient or any torch.optim optimizer
    x, y : Tensor
        Training rows.
    steps : int
    batch_size : int, optional
        Rows a step, drawn without replacement and reshuffled every epoch (a shorter
        rest is dropped); full batch by default. Loss and outputs are those of the
        batch.
    seed : int
        Seed of the shuffling.
    loss : callable
        ``loss(outputs, y)``, the mean loss over the batch.
    net : nn.Module
        The network; needed for a torch.optim optimizer, known to `NaturalGradient`.
    progress : bool
        Show a tqdm bar.
    test : callable, optional
        Called without arguments, outside the clock, before every ``every``-th step and
        after the last; what it returns for the network as it then is becomes the
        state's ``test``.
    every : int

    Yields
    ------
    Step
        Leaving the loop early stops the training there. A state is yielded once its
        step has been taken: inside the loop the network is one step ahead of
        ``state.outputs``.

    Raises
    ------
    ValueError
        For an impossible batch size or number of steps, or a missing ``net``.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> x, y = torch.eye(3, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    >>> net = ngd.models.TwoLayerReLU(3, 256, seed=0)
    >>> sgd = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=1.0)
    >>> losses = [s.loss for s in ngd.optim.run(sgd, x, y, steps=10, net=net)]
    >>> len(losses), losses[-1] < losses[0]
    (11, True)
    """
    natural = isinstance(opt, NaturalGradient)
    net = opt.net if natural else net
    if net is None:
        raise ValueError(
            "net is needed with a torch.optim optimizer: run(opt, x, y, steps, net=net)"
        )
    if (
        steps < 0
        or every < 1
        or len(x) != len(y)
        or not 1 <= (batch_size or len(x)) <= len(x)
    ):
        raise ValueError(
            f"steps={steps}, every={every}, batch_size={batch_size} and {len(x)} inputs, {len(y)} targets do not fit"
        )
    batches, seconds = _batches(len(x), batch_size, seed), 0.0
    for k in tqdm(range(steps + 1), disable=not progress, leave=False):
        rows = next(batches)
        bx, by = (
            (x, y) if rows is None else (x[rows.to(x.device)], y[rows.to(y.device)])
        )
        tested = (
            float(test()) if test and (k % every == 0 or k == steps) else float("nan")
        )
        start = time.perf_counter()
        if k == steps:
            with torch.no_grad():
                outputs = net(bx)
            state = Step(_residual(loss, outputs, by)[0], outputs)
        else:
            state = (
                opt.step(bx, by, loss)
                if natural
                else _first_order(opt, net, bx, by, loss)
            )
        elapsed = time.perf_counter() - start
        yield replace(state, step=k, seconds=seconds, examples=k * len(bx), test=tested)
        seconds += elapsed


def _first_order(opt, net, x, y, loss) -> Step:
    opt.zero_grad(set_to_none=True)
    outputs = net(x)
    _check_targets(loss, outputs, y)
    value = loss(outputs, y)
    value.backward()
    opt.step()
    return Step(float(value.detach()), outputs.detach())


def _batches(n, batch_size, seed):
    if batch_size is None:
        while True:
            yield None
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator)
        for i in range(0, n - batch_size + 1, batch_size):
            yield order[i : i + batch_size]


def _residual(loss, outputs, y) -> tuple[float, Tensor]:
    """Loss and N dL/df."""
    _check_targets(loss, outputs, y)
    with torch.enable_grad():
        f = outputs.detach().requires_grad_()
        value = loss(f, y)
        (gradient,) = torch.autograd.grad(value, f)
    return float(value.detach()), len(outputs) * gradient


def _check_targets(loss, outputs, y) -> None:
    if loss is half_mse and y.shape != outputs.shape:
        raise ValueError(
            f"y must have the outputs' shape {tuple(outputs.shape)}, not {tuple(y.shape)} (broadcasting would hide it)"
        )
