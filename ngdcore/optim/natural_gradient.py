"""The natural gradient as a `torch.optim.Optimizer`."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..fisher import Fisher, Info, RankDeficient
from ..signals import Signals, signals, unwrap
from .adaptive import Adaptive
from .groups import check_parts, number, param_groups
from .losses import half_mse, residual
from .metric import weigh

__all__ = ["NaturalGradient", "Step"]

SINGULAR = (RankDeficient, torch.linalg.LinAlgError)
GROUP = ("lr", "damping", "weight_decay")  # what every param group holds
ROUNDING = 16  # a loss is known to so many eps of its and its outputs' size
EXTRA = "natural_gradient"  # the key of what state_dict adds to torch's


@dataclass(frozen=True)
class Step:
    """The state at which a step was taken.

    Attributes
    ----------
    loss : float
        Loss before the step.
    outputs : Tensor, (N, C)
        Outputs before the step, on the rows of the step's batch (None where `run` was
        asked to drop them).
    condition : float
        Estimated condition number of the solved Gram (nan for first-order optimizers).
    jitter : float
        What was added to its diagonal, in absolute terms.
    step : int
        Number of steps taken before.
    seconds : float
        Seconds spent in steps before (not in the caller's loop body, nor in ``test``);
        counted by `run`.
    examples : int
        Training examples seen before.
    damping : float
        Damping of the step (0 for first-order optimizers).
    rho : float
        Actual over predicted decrease of the batch's loss (nan unless damping adapts,
        and where both are at rounding level).
    accepted : bool
        False if the step was undone.
    test : float
        What ``test`` returned for the network at this state (nan where it was not
        called).
    lr : float
        Learning rate of the step (of the first param group).
    rows : int
        Rows the step was taken on; 0 for the state after `run`'s last step.
    elapsed : float
        Seconds of the step itself; measured by `run`.
    """

    loss: float
    outputs: Tensor | None
    condition: float = math.nan
    jitter: float = 0.0
    step: int = 0
    seconds: float = 0.0
    examples: int = 0
    damping: float = 0.0
    rho: float = math.nan
    accepted: bool = True
    test: float = math.nan
    lr: float = math.nan
    rows: int = 0
    elapsed: float = 0.0


class NaturalGradient(torch.optim.Optimizer):
    r"""Natural gradient descent,
    :math:`\theta \leftarrow \theta - \eta\,\frac1N (F + \rho I)^+ J^\top g`.

    Any loss can be minimised: :math:`g = N\,\partial L/\partial f`. But the metric is
    that of squared error unless ``metric`` says otherwise: with
    ``nn.CrossEntropyLoss()`` and the default, a step is Gauss-Newton in the outputs,
    :math:`F = J^\top J/N`, which is *not* the Fisher of a softmax model; for that, ask
    for ``metric="softmax"``.

    Parameters
    ----------
    net : nn.Module
        Anything `ngdcore.signals` accepts; its trained parameters are updated in place.
    fisher : Fisher
        The approximation of the Fisher matrix, for example ``ngd.fisher.Exact()``.
    lr : float or "optimal"
        :math:`\eta`. ``"optimal"`` is found once, at the first step and with its
        damping (``fisher.optimal_lr``): the best constant rate of the linearised
        problem, :math:`1/\alpha` where Q is isotropic. From then on it stands in
        ``param_groups[0]["lr"]``. With a scheduler attached before the first step, the
        scheduler's numbers (and the ``lr`` of groups) are multiples of it.
    damping : float or Adaptive
        :math:`\rho \ge 0`, added to F; an `Adaptive` changes
        ``param_groups[0]["damping"]`` after every step.
    metric : None, "softmax" or callable
        None: Gauss-Newton, :math:`\Lambda = I`. ``"softmax"``: the Fisher of
        cross-entropy, :math:`\Lambda = \mathrm{diag}(p) - p p^\top` with p the softmax
        of the outputs. A callable takes the outputs (N, C) to R (N, k, C) with
        :math:`\Lambda = R^\top R`. The step is that of the signals :math:`R D` and the
        residual :math:`(R^\top)^+ g` (a part of g outside the range of :math:`R^\top`
        is dropped).
    weight_decay : float
        Decoupled, as in ``torch.optim.AdamW``: weights are multiplied by
        :math:`1 - \eta w`. It is no part of the loss, nor of `Adaptive`'s prediction.
    groups : iterable of dict, optional
        torch's param groups, ``{"params": [...], "lr": ..., "weight_decay": ...}``:
        learning rates by layer. Together they hold every trained parameter once.

    Raises
    ------
    TypeError
        For something else in the place of a network or a Fisher, or a trained
        parameter outside ``nn.Linear``.
    ValueError
        For a bad learning rate, damping, metric or group, or a network that trains
        nothing.

    Notes
    -----
    A step is one sweep for the signals, one Gram, one Cholesky factorisation, two
    triangular solves and one matrix product a layer; the update's buffers are kept
    between steps. Gradients in ``p.grad`` are neither read nor written.

    torch's schedulers, hooks, ``copy.deepcopy``, ``pickle`` and ``state_dict`` work as
    for any torch optimizer. ``state_dict`` holds rates, damping, counters and the
    generator of Fishers that draw (the optimizer's own, from ``fisher.seed``): with the
    network's it resumes a run bit for bit.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> x, y = torch.eye(3, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    >>> net = ngd.models.TwoLayerReLU(3, 4096, seed=0)
    >>> opt = ngd.optim.NaturalGradient(net, ngd.fisher.Exact())
    >>> opt
    NaturalGradient(TwoLayerReLU, Exact(rank='raise', jitter=0), lr=1, damping=0)
    >>> start = opt.step(x, y).loss
    >>> opt.step(x, y).loss < 0.05 * start
    True
    """

    def __init__(
        self,
        net: nn.Module,
        fisher: Fisher,
        lr: float | str = 1.0,
        damping: float | Adaptive = 0.0,
        metric: str | Callable[[Tensor], Tensor] | None = None,
        weight_decay: float = 0.0,
        groups: Iterable[dict[str, Any]] | None = None,
    ):
        check_parts(net, fisher, metric)
        optimal = isinstance(lr, str)
        if optimal and lr != "optimal":
            raise ValueError(f"lr={lr!r} must be a positive number or 'optimal'")
        adaptive = damping if isinstance(damping, Adaptive) else None
        defaults = dict(
            lr=1.0 if optimal else number("lr", lr, positive=True),
            damping=number("damping", adaptive.start if adaptive else damping),
            weight_decay=number("weight_decay", weight_decay),
        )
        super().__init__(param_groups(net, groups), defaults)
        self.net, self.fisher, self.metric = net, fisher, metric
        self.adaptive = adaptive
        # what group["lr"] is a multiple of: 1, or the optimal rate (None: unknown yet)
        self._unit: float | None = None if optimal else 1.0
        self._optimal: float | None = None
        self._steps = self._examples = 0
        seed = getattr(fisher, "seed", None)
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._update: list[Tensor] | None = None
        self._known: Callable | None = None  # the loss that was looked at

    def __repr__(self) -> str:
        group = self.param_groups[0]
        lr = "'optimal'" if self._unit is None else f"{group['lr'] * self._unit:.4g}"
        parts = [type(self.net).__name__, repr(self.fisher), f"lr={lr}"]
        parts.append(f"damping={group['damping']:.4g}" + " (adaptive)" * self._adapts)
        if self.metric is not None:
            parts.append(f"metric={self._metric_name}")
        if group["weight_decay"]:
            parts.append(f"weight_decay={group['weight_decay']:.4g}")
        return f"NaturalGradient({', '.join(parts)})"

    @property
    def _metric_name(self) -> str:
        return getattr(self.metric, "__name__", str(self.metric))

    @property
    def _adapts(self) -> bool:
        return self.adaptive is not None

    @property
    def _draws(self) -> bool:
        return self._generator is not None

    # ------------------------------------------------------------------------ a step

    def step(
        self,
        x: Tensor = None,
        y: Tensor = None,
        loss: Callable[[Tensor, Tensor], Tensor] = half_mse,
    ) -> Step:
        r"""Take one step on the batch (x, y) and return the `Step` before it.

        A step that fails or is interrupted leaves the weights, the damping and the
        generator as they were.

        Parameters
        ----------
        x : Tensor, (N, d)
        y : Tensor
            Targets as ``loss`` wants them; (N, C) for the default.
        loss : callable
            ``loss(outputs, y)`` is a scalar, the mean over the batch of what depends on
            each sample's outputs; its residual is :math:`g = N\,\partial L/\partial f`.

        Raises
        ------
        TypeError
            For a closure: the batch is given instead.
        ValueError
            When the trained parameters are no longer those of the optimizer, for
            targets that the loss would broadcast, a loss that is no mean over the batch
            or depends on the weights otherwise, or a residual that is not finite.
        RankDeficient
            When a matrix to be inverted is singular to working precision (with an
            `Adaptive` that rejects, such a step is undone instead).

        Examples
        --------
        >>> import torch, ngdcore as ngd
        >>> net, x = ngd.models.MLP([3, 16, 3], seed=0), ngd.data.gaussian(4, 3)
        >>> F = ngd.fisher.Exact()
        >>> opt = ngd.optim.NaturalGradient(net, F, lr=0.3, metric="softmax")
        >>> labels, loss = torch.tensor([0, 1, 2, 0]), torch.nn.CrossEntropyLoss()
        >>> opt.step(x, labels, loss=loss).loss > opt.step(x, labels, loss=loss).loss
        True
        """
        if y is None or not callable(loss):
            given = "a closure" if callable(x) and y is None else "other arguments"
            raise TypeError(
                f"step takes the batch, not {given}: opt.step(x, y, loss=loss) with"
                " inputs x, targets y and loss(outputs, y)"
            )
        drawn = self._generator.get_state() if self._draws else None
        try:
            with torch.no_grad():
                return self._step(x, y, loss)
        except BaseException:
            if drawn is not None:
                self._generator.set_state(drawn)
            raise

    def _step(self, x, y, loss) -> Step:
        """Residual, metric, solve; then the update, tried first if damping adapts."""
        sig = signals(self.net, x, lazy=True)
        slots = self._slots(sig)
        value, g = residual(loss, sig.outputs, y, sig.params, loss is self._known)
        self._known = loss
        seen, r = weigh(self.metric, sig, g)
        counted = dict(step=self._steps, examples=self._examples, rows=sig.n)
        state = Step(value, sig.outputs, damping=self._damping(), **counted)
        try:
            rates = self._rates(seen, state.damping)
            state = replace(state, lr=rates[0])
            info = self._solve(seen, r, state.damping)
        except SINGULAR:
            if not (self.adaptive and self.adaptive.reject):
                raise
            state = replace(state, accepted=False)
            self._set_damping(self.adaptive.after(state.damping, math.nan))
        else:
            state = replace(state, condition=info.condition, jitter=info.jitter)
            if self.adaptive:
                predicted = self._predicted(sig, g, info.slope, slots, rates)
                state = self._adapt(state, predicted, g, slots, rates, x, y, loss)
            else:
                self._move(slots, rates)
        self._steps, self._examples = state.step + 1, state.examples + sig.n
        return state

    def _slots(self, sig: Signals) -> list[list[int]]:
        """For each param group the places of its parameters among the signals'; the two
        sets must be the same.
        """
        place = {id(p): k for k, p in enumerate(sig.params)}
        slots = [
            [place.pop(id(p), None) for p in group["params"]]
            for group in self.param_groups
        ]
        if not place and all(None not in slot for slot in slots):
            return slots
        now = {id(p) for p in sig.params}
        gone = [p for p in self._params if id(p) not in now]
        names = {id(p): name for name, p in self.net.named_parameters()}
        new, gone = (
            ", ".join(names.get(id(p), "one that is replaced") for p in ps) or "none"
            for ps in ([sig.params[k] for k in place.values()], gone)
        )
        raise ValueError(
            "the trained parameters changed since this optimizer was made (new:"
            f" {new}; no longer trained: {gone}); make a new NaturalGradient(net, ...)"
        )

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _damping(self) -> float:
        """The one damping of all groups."""
        found = [group["damping"] for group in self.param_groups]
        if any(d != found[0] for d in found):
            raise ValueError(f"damping={found}: all param groups share one damping")
        return number("damping", found[0])

    def _set_damping(self, damping: float) -> None:
        for group in self.param_groups:
            group["damping"] = damping

    def _rates(self, seen: Signals, damping: float) -> list[float]:
        """Each group's learning rate; finds the optimal one at the first step."""
        if self._unit is None:
            try:
                found = self.fisher.optimal_lr(seen, damping)
                self._optimal = number("lr", found, positive=True)
            except (ValueError, TypeError, ArithmeticError) as error:
                raise type(error)(
                    f"lr='optimal' cannot be found: {error}; pass a number as lr"
                ) from error
            scheduled = any("initial_lr" in group for group in self.param_groups)
            self._unit = self._optimal if scheduled else 1.0
            if not scheduled:
                for group in self.param_groups:
                    group["lr"] *= self._optimal
        for group in self.param_groups:
            number("weight_decay", group["weight_decay"])
        return [number("lr", group["lr"]) * self._unit for group in self.param_groups]

    def _solve(self, seen: Signals, r: Tensor, damping: float) -> Info:
        """The update from the residual (N, k), over the last one's buffers where they
        still fit.
        """
        wanted, kept = (
            [(t.shape, t.dtype, t.device) for t in tensors]
            for tensors in (seen.params, self._update or [])
        )
        out = self._update if kept == wanted else None
        draws = dict(generator=self._generator) if self._draws else {}
        try:
            self._update, info = self.fisher.solve(seen, r, damping, out, **draws)
            if self.metric is not None and not all(
                bool(torch.isfinite(d).all()) for d in self._update
            ):
                raise RankDeficient("the step overflows: the weighted Gram is tiny")
        except RankDeficient as error:
            if self.metric is None:
                raise
            raise RankDeficient(
                f"{error} (metric={self._metric_name} weighs outputs the less the surer"
                " the model is: damping helps.)"
            ) from error
        return info

    def _move(self, slots: list[list[int]], rates: list[float], decay=True) -> None:
        """Subtract the update, and let the weights decay."""
        for group, slot, lr in zip(self.param_groups, slots, rates):
            if decay and group["weight_decay"]:
                torch._foreach_mul_(group["params"], 1 - lr * group["weight_decay"])
            update = [self._update[k] for k in slot]
            torch._foreach_add_(group["params"], update, alpha=-lr)

    # -------------------------------------------------------------- adaptive damping

    def _predicted(self, sig, g, slope, slots, rates) -> float:
        """The decrease of the loss that the quadratic model predicts.

        ``slope`` along the whole update is given where the solve knows it."""
        full = self._optimal or self.fisher.full_step(sig)
        if slope is None or self.metric is not None or len(rates) > 1:
            along = zip(self._update, sig.vjp(g))
            parts = torch.stack([(d * e).sum() for d, e in along]).tolist()
            slopes = [sum(parts[k] for k in slot) / sig.n for slot in slots]
        else:
            slopes = [slope]
        rule = self.adaptive
        return sum(rule.predicted(lr, s, full) for lr, s in zip(rates, slopes))

    def _adapt(self, state, predicted, g, slots, rates, x, y, loss) -> Step:
        """The step, undone if it was bad; and the next damping."""
        params, rule, eps = self._params, self.adaptive, torch.finfo(g.dtype).eps
        before = [p.clone() for p in params]
        size = abs(state.loss) + float((g * state.outputs).abs().sum()) / len(g)
        try:
            self._move(slots, rates, decay=False)
            change = state.loss - float(loss(self.net(x), y))
        except BaseException:
            torch._foreach_copy_(params, before)
            raise
        if max(abs(predicted), abs(change)) <= ROUNDING * eps * size:
            rho, accepted = math.nan, True  # rounding decides the change: no verdict
        else:
            rho = change / predicted if predicted > 0 else math.nan
            accepted = change > 0 or not rule.reject
            self._set_damping(rule.after(state.damping, rho))
        if not accepted:
            torch._foreach_copy_(params, before)
        else:
            self._decay(before, rates)
        return replace(state, rho=rho, accepted=accepted)

    def _decay(self, before: list[Tensor], rates: list[float]) -> None:
        """Weight decay of a step already taken, from the weights before it."""
        start = 0
        for group, lr in zip(self.param_groups, rates):
            stop = start + len(group["params"])
            if shrink := lr * group["weight_decay"]:
                old = before[start:stop]
                torch._foreach_add_(group["params"], old, alpha=-shrink)
            start = stop

    # ------------------------------------------------------- what torch optimizers do

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the groups are those given at construction, which hold every trained
        parameter of the network.
        """
        if "net" in self.__dict__:
            raise ValueError(
                "the trained parameters are those of the network; make a new"
                " NaturalGradient(net, fisher, groups=[...])"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, and under ``"natural_gradient"`` the optimal rate, the
        counters and the generator; ``torch.load(..., weights_only=True)`` reads it.
        """
        generator = self._generator.get_state() if self._draws else None
        return super().state_dict() | {
            EXTRA: dict(
                unit=self._unit,
                optimal=self._optimal,
                steps=self._steps,
                examples=self._examples,
                adaptive=self._adapts,
                generator=generator,
                params=self._described(),
            )
        }

    def _described(self) -> list[list[str]]:
        """The parameters of every group, by name and shape."""
        names = {id(p): name for name, p in unwrap(self.net).named_parameters()}
        names = {key: name.replace("_orig_mod.", "") for key, name in names.items()}
        return [
            [f"{names.get(id(p), '?')} {tuple(p.shape)}" for p in group["params"]]
            for group in self.param_groups
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimizer that was built alike; a dict of another
        kind is refused before anything is changed.
        """
        extra, groups = state_dict.get(EXTRA), state_dict.get("param_groups", ())
        missing = [] if extra else [EXTRA]
        missing += [k for k in GROUP if any(k not in group for group in groups)]
        if missing:
            raise ValueError(
                f"state_dict is not that of a NaturalGradient: it lacks {missing}"
            )
        for what, saved, here in (
            ("damping=Adaptive(...)", extra["adaptive"], self._adapts),
            ("a Fisher that draws", extra["generator"] is not None, self._draws),
        ):
            if saved != here:
                raise ValueError(
                    f"state_dict was saved with{'' if saved else 'out'} {what}, this"
                    f" optimizer was made with{'' if here else 'out'}: build both alike"
                )
        here = self._described()
        saved = extra.get("params", here)
        if saved != here and len(saved) == len(here):  # torch counts groups
            raise ValueError(
                f"state_dict was saved with param groups {extra['params']}, this"
                f" optimizer has {here}: use the same network and groups"
            )
        super().load_state_dict(state_dict)
        self._unit, self._optimal = extra["unit"], extra["optimal"]
        self._steps, self._examples = extra["steps"], extra["examples"]
        if self._draws:
            self._generator.set_state(extra["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        kept = ("net", "fisher", "metric", "adaptive", "_unit", "_optimal", "_steps")
        state = super().__getstate__() | {k: self.__dict__[k] for k in kept}
        generator = self._generator.get_state() if self._draws else None
        return state | dict(
            _examples=self._examples, _generator=generator, _update=None, _known=None
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(self._generator, Tensor):
            state = self._generator
            self._generator = torch.Generator()
            self._generator.set_state(state)
