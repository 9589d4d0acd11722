"""Sweeps: one function at every point of a grid, here or on workers, with the same
numbers.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from copy import deepcopy

import torch

from .extras import load

__all__ = ["sweep"]


def sweep(
    function: Callable,
    grid: Mapping[str, Iterable],
    *,
    threads: int = 1,
    tries: int = 2,
) -> list:
    r"""``function`` at every point of a grid: width :math:`\times` depth
    :math:`\times` seed :math:`\times` Fisher, say.

    The points go through joblib: one after the other unless
    ``joblib.parallel_config(...)`` names workers, which may be threads, processes or
    those of a Dask cluster. What comes out is the same: every point has ``threads``
    threads, the caller's default dtype and gradient mode, and copies of the grid's
    values, wherever it runs; the order of the results is that of the grid. Seeds are
    arguments: a function that draws from a global generator, or leaves something behind
    for its next call, depends on who runs it.

    A worker process that dies (killed, out of memory) takes no other point's result
    with it. What it may have been at runs again at the end, one point at a time.

    Public as ``ngd.sweep``.

    Parameters
    ----------
    function : callable
        Called by keyword, ``function(width=64, seed=0)``. For processes it has to be
        what cloudpickle can send, notebook functions and their globals included.
    grid : mapping
        ``{argument: its values}``; the last one changes fastest.
    threads : int
        Of torch and BLAS, at each point. More cores are for more workers.
    tries : int
        How often a point that kills its worker runs alone.

    Returns
    -------
    list
        Lists in lists, an axis of the grid each: ``result[i][j]`` is the value at the
        first argument's value ``i`` and the second one's ``j``.

    Raises
    ------
    ValueError
        For a grid without points.
    RuntimeError
        When a point has killed its worker ``tries`` times by itself; it names the
        point. What ``function`` itself raises is raised, with the point as a note.

    Examples
    --------
    >>> def squares(width, seed):
    ...     return width**2 + seed
    >>> sweep(squares, dict(width=[10, 20], seed=[0, 1, 2]))
    [[100, 101, 102], [400, 401, 402]]
    >>> import joblib
    >>> with joblib.parallel_config(backend="threading", n_jobs=2):
    ...     sweep(squares, dict(width=[10, 20], seed=[0, 1, 2]))
    [[100, 101, 102], [400, 401, 402]]
    """
    axes = {name: list(values) for name, values in grid.items()}
    if not axes or not all(axes.values()):
        empty = ", ".join(name for name, values in axes.items() if not values)
        raise ValueError(f"grid has no points: no values of {empty or 'any argument'}")
    points = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    delayed = load("joblib", "a sweep").delayed(_at)
    limits = load("threadpoolctl", "a sweep").threadpool_limits
    as_here = threads, torch.get_default_dtype(), torch.is_grad_enabled()
    before = torch.get_num_threads()
    tasks = [delayed(k, function, point, *as_here) for k, point in enumerate(points)]
    try:
        with limits(threads):
            found = _all(tasks, points, tries)
    finally:
        torch.set_num_threads(before)
    return _nested([found[k] for k in range(len(points))], [*map(len, axes.values())])


def _at(index: int, function: Callable, point: dict, threads: int, dtype, grad: bool):
    """``(index, function(**point))``, with torch as the sweep's caller has it."""
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    load("threadpoolctl", "a sweep").threadpool_limits(threads)
    try:
        with torch.set_grad_enabled(grad):
            return index, function(**deepcopy(point))
    except Exception as error:
        error.add_note(f"at {_named(point)} of the sweep")
        raise


def _all(tasks: list, points: list[dict], tries: int) -> dict:
    """``{index: result}`` of all tasks, whichever workers die."""
    found, sent = {}, set()
    # After a death, go on with what no worker had; who killed it is not known.
    while rest := [task for k, task in enumerate(tasks) if k not in sent]:
        with suppress(BrokenProcessPool):
            _gather(rest, found, sent)
    # What some worker had, and did not bring back, runs alone: now it would be known.
    for k in sorted(sent - found.keys()):
        died = None
        for _ in range(tries):
            try:
                _gather([tasks[k]], found, sent)
            except BrokenProcessPool as error:
                died = error
            if k in found:
                break
        else:
            raise RuntimeError(
                f"the worker died at {_named(points[k])} of the sweep, {tries} times"
                " with nothing beside it: is there memory enough?"
            ) from died
    return found


def _gather(tasks: list, found: dict, sent: set) -> None:
    """Run tasks; their results go into ``found``, the indices of those that were given
    to a worker into ``sent``.
    """

    def sending():
        for task in tasks:
            sent.add(task[1][0])
            yield task

    # One point at a time, so that a death costs few; and large arrays as copies: else
    # they would reach other processes as files that cannot be written to.
    parallel = load("joblib", "a sweep").Parallel(
        return_as="generator_unordered", batch_size=1, max_nbytes=None
    )
    found.update(parallel(sending()))


def _named(point: dict) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in point.items())


def _nested(flat: list, lengths: list[int]) -> list:
    """A flat list as lists in lists of these lengths, the last one innermost."""
    for length in reversed(lengths[1:]):
        flat = [flat[k : k + length] for k in range(0, len(flat), length)]
    return flat
