"""One training loop for all optimizers, as a generator of states."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor, nn

from .losses import check_broadcast, check_targets, half_mse
from .natural_gradient import NaturalGradient, Step

__all__ = ["run"]


def run(
    opt: torch.optim.Optimizer,
    x: Tensor | Iterable,
    y: Tensor | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] = half_mse,
    net: nn.Module | None = None,
    progress: bool = False,
    test: Callable[[], float] | None = None,
    every: int = 1,
    start: Step | None = None,
    outputs: bool = True,
) -> Iterator[Step]:
    """Train, and yield the state before every step and after the last: ``steps + 1``
    states in all.

    Parameters
    ----------
    opt : NaturalGradient or any torch.optim optimizer
    x : Tensor or DataLoader
        Training rows; or, with no ``y``, a ``torch.utils.data.DataLoader`` (or another
        iterable of pairs that can be iterated again), passed through as often as needed
        and moved to the network's device.
    y : Tensor
        Targets.
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
        Show a tqdm bar, with the loss.
    test : callable, optional
        Called without arguments, outside the clock, before every ``every``-th step and
        after the last; what it returns for the network as it then is becomes the
        state's ``test``.
    every : int
    start : Step, optional
        The last state of a run to be continued with the same data, batch size and seed:
        steps, seconds, examples and the place among the minibatches go on from there,
        so that 3 and 4 steps are the 7 steps of one run. (A DataLoader starts a new
        epoch.)
    outputs : bool
        False drops each state's outputs: a list of states then costs no memory.

    Yields
    ------
    Step
        Leaving the loop early stops the training there. A state is yielded once its
        step has been taken: inside the loop the network is one step ahead of
        ``state.outputs``.

    Raises
    ------
    TypeError
        Without ``steps``.
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
    net = _net_of(opt, net)
    _check_run(net, x, y, steps, batch_size, every)
    start = start or Step(float("nan"), None)
    done = start.step + (start.rows > 0)
    batches = (
        _loaded(x, net) if y is None else _batches(x, y, batch_size, seed, skip=done)
    )
    states = _states(opt, net, batches, steps, loss, test, every, start)
    if not outputs:
        states = (replace(state, outputs=None) for state in states)
    return _with_bar(states, steps) if progress else states


def _net_of(opt, net) -> nn.Module:
    """The network that opt trains; raises where ``net`` is none or another."""
    if isinstance(opt, NaturalGradient):
        if net is not None and net is not opt.net:
            raise ValueError("net is not the one that opt trains; leave it out")
        return opt.net
    if net is None:
        raise ValueError(
            "net is needed with a torch.optim optimizer: run(opt, x, y, steps, net=net)"
        )
    held = {id(p) for group in opt.param_groups for p in group["params"]}
    if not any(id(p) in held for p in net.parameters()):
        raise ValueError(
            "opt holds none of net's parameters: it trains another network"
        )
    return net


def _check_run(net, x, y, steps, batch_size, every) -> None:
    """A run's numbers fit its data; y is None where x is a loader."""
    if not isinstance(steps, Integral):
        raise TypeError(
            f"steps={steps}: a whole number is needed, run(opt, x, y, steps) or (opt,"
            " loader, steps=...)"
        )
    if y is None and isinstance(x, Tensor):
        raise TypeError("y is needed where x is a tensor: run(opt, x, y, steps)")
    if y is None and batch_size is not None:
        raise ValueError("batch_size is the loader's own: leave it out")
    size = None if y is None else (len(x), len(y), batch_size or len(x))
    if steps < 0 or every < 1 or (size and not 1 <= size[2] <= size[0] == size[1]):
        raise ValueError(
            f"steps={steps}, every={every}, batch_size={batch_size} and"
            f" (inputs, targets, rows a step) = {size} do not fit"
        )


def _states(opt, net, batches, steps, loss, test, every, start) -> Iterator[Step]:
    """The states of a run, counted on from ``start``."""
    natural, done = isinstance(opt, NaturalGradient), start.step + (start.rows > 0)
    seconds, examples = start.seconds + start.elapsed, start.examples + start.rows
    for k in range(steps + 1):
        x, y = next(batches)
        due = test and ((done + k) % every == 0 or k == steps)
        tested = float(test()) if due else float("nan")
        begin = time.perf_counter()
        if k == steps:
            state = _look(net, x, y, loss)
        elif natural:
            state = opt.step(x, y, loss)
        else:
            state = _first_order(opt, net, x, y, loss, known=k > 0)
        elapsed = time.perf_counter() - begin
        yield replace(
            state,
            step=done + k,
            seconds=seconds,
            examples=examples,
            test=tested,
            elapsed=elapsed,
        )
        seconds, examples = seconds + elapsed, examples + state.rows


@torch.no_grad()
def _look(net, x, y, loss) -> Step:
    """The state where no step is taken."""
    outputs = net(x)
    check_targets(loss, outputs, y)
    return Step(float(loss(outputs, y)), outputs)


def _first_order(opt, net, x, y, loss, known) -> Step:
    """A step of a torch.optim optimizer, by a closure, which LBFGS calls repeatedly;
    targets are looked at unless the loss is known."""
    seen = []

    def closure():
        opt.zero_grad(set_to_none=True)
        outputs = net(x)
        (check_targets if known or seen else check_broadcast)(loss, outputs, y)
        value = loss(outputs, y)
        value.backward()
        seen.append((value.detach(), outputs.detach()))
        return value

    opt.step(closure)
    value, outputs = seen[0]
    lr = float(opt.param_groups[0].get("lr", float("nan")))
    return Step(float(value), outputs, rows=len(x), lr=lr)


def _batches(x, y, batch_size, seed, skip) -> Iterator[tuple[Tensor, Tensor]]:
    """Minibatches, reshuffled every epoch, from the one after ``skip`` others."""
    while batch_size is None:
        yield x, y
    generator, a_pass = torch.Generator().manual_seed(seed), len(x) // batch_size
    for _ in range(skip // a_pass):
        torch.randperm(len(x), generator=generator)
    first = skip % a_pass
    while True:
        order = torch.randperm(len(x), generator=generator)
        for i in range(first, a_pass):
            rows = order[i * batch_size : (i + 1) * batch_size]
            yield x[rows.to(x.device)], y[rows.to(y.device)]
        first = 0


def _loaded(loader, net) -> Iterator[tuple[Tensor, Tensor]]:
    """A loader's pairs, pass after pass, on the network's device."""
    device = next(net.parameters()).device
    while True:
        empty = True
        for pair in loader:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
                raise ValueError(
                    "without y, x must be a DataLoader whose batches are pairs (x, y):"
                    " run(opt, loader, steps=...) or run(opt, x, y, steps)"
                )
            empty = False
            yield pair[0].to(device), pair[1].to(device)
        if empty:
            raise ValueError("the loader is empty (or was an iterator, now used up)")


def _with_bar(states: Iterator[Step], steps: int) -> Iterator[Step]:
    """The same states, behind a bar that shows the loss."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "progress=True needs tqdm: pip install 'ngdcore[notebooks]'"
        ) from error
    with tqdm(total=steps + 1) as bar:
        for state in states:
            bar.set_postfix(loss=f"{state.loss:.3g}", refresh=False)
            bar.update()
            yield state
