"""Sweeps: the same numbers in the same order, whoever computes them and whoever dies.

What goes to workers is defined inside the tests, as a notebook's functions are: they
travel by value."""

import os
import re
import signal

import joblib
import pytest
import threadpoolctl
import torch
from conftest import ROOT

import ngdcore as ngd

GRID = dict(fisher=[ngd.fisher.Exact(), ngd.fisher.KFAC()], width=[16, 33], seed=[0, 1])
PROCESSES = dict(backend="loky", n_jobs=2)


def study(log, killed=None):
    """Of a point: the largest change of an output in a natural-gradient step, and the
    spectrum of a kernel. It notes in ``log`` that it ran; the process of the point
    (33, 0) is killed until ``killed`` is there.
    """

    def at(fisher, width, seed):
        if killed and (width, seed) == (33, 0) and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        net, x = (
            ngd.models.MLP([9, width, 1], seed=seed),
            ngd.data.sphere(12, 9, seed=1),
        )
        opt = ngd.optim.NaturalGradient(net, fisher, lr=0.5, damping=1e-6)
        first, last = ngd.optim.run(opt, x, x[:, :1], 1)
        gram = ngd.kernels.empirical(ngd.signals(net, x)).gram()
        with log.open("a") as file:
            file.write(f"{type(fisher).__name__} {width} {seed}\n")
        return torch.linalg.eigvalsh(gram), last.outputs - first.outputs

    return at


def flat(results):
    if isinstance(results, list):
        return torch.cat([flat(result) for result in results])
    return torch.cat([part.ravel() for part in results])


def test_the_order_is_the_grid_s():
    grid = dict(a=[3, 1], b=iter("xy"), c=range(3))
    found = ngd.sweep(lambda c, a, b: (a, b, c), grid)
    assert found == [[[(a, b, c) for c in range(3)] for b in "xy"] for a in (3, 1)]
    assert ngd.sweep(abs_of, dict(x=[-1, 2])) == [1, 2]


def abs_of(x):
    return abs(x)


def test_points_share_nothing():
    """What a function does to a value of the grid does not reach the next point."""

    def emptied(x, k):
        return k, x.pop()

    assert ngd.sweep(emptied, dict(x=[[7]], k=[0, 1])) == [[(0, 7), (1, 7)]]


def test_threads_and_processes_give_the_same_digits(tmp_path):
    """Also when a worker is killed midway: its points run again, what had come back
    does not.
    """
    serial = flat(ngd.sweep(study(tmp_path / "serial"), GRID))
    with joblib.parallel_config(backend="threading", n_jobs=2):
        by_threads = flat(ngd.sweep(study(tmp_path / "threads"), GRID))
    assert torch.equal(by_threads, serial)
    log, killed = tmp_path / "processes", tmp_path / "killed"
    with joblib.parallel_config(**PROCESSES):
        by_processes = flat(ngd.sweep(study(log, killed), GRID))
    assert killed.exists() and torch.equal(by_processes, serial)
    ran = log.read_text().splitlines()
    assert len(set(ran)) == 8 and len(ran) <= 8 + 1, "one may have been on its way back"


def test_a_point_that_always_kills_is_named(tmp_path):
    def at(x):
        if x == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / str(x)).touch()

    with joblib.parallel_config(**PROCESSES):
        with pytest.raises(RuntimeError, match="died at x=3 of the sweep") as caught:
            ngd.sweep(at, dict(x=range(12)), tries=1)
    assert "SIGKILL" in str(caught.value.__cause__)
    others = {path.name for path in tmp_path.iterdir()}
    assert others >= {"0", "1", "2", "8", "9", "10", "11"}, "it runs after the others"


@pytest.mark.parametrize("workers", [{}, PROCESSES], ids=["here", "processes"])
def test_a_point_that_fails_is_named(workers):
    def at(width, seed):
        return 1 / (width - 20 + seed)

    with joblib.parallel_config(**workers):
        with pytest.raises(ZeroDivisionError) as caught:
            ngd.sweep(at, dict(width=[10, 20], seed=[0, 1]))
    assert caught.value.__notes__ == ["at width=20, seed=0 of the sweep"]


def test_workers_are_set_as_the_caller_is(monkeypatch):
    """Threads of torch and of NumPy's BLAS, default dtype, gradient mode; and the
    caller is left as it was.
    """

    def seen(x):
        pools = threadpoolctl.threadpool_info()
        blas = {p["num_threads"] for p in pools if p["user_api"] == "blas"}
        torch_ = torch.get_num_threads(), torch.ones(1).dtype, torch.is_grad_enabled()
        return blas, *torch_

    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")  # of new processes
    before = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    try:
        with torch.no_grad():
            here = ngd.sweep(seen, dict(x=[0]))
            with joblib.parallel_config(**PROCESSES):
                there = ngd.sweep(seen, dict(x=[0]))
                two = ngd.sweep(seen, dict(x=[0]), threads=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before[0])
        torch.set_default_dtype(before[1])
    assert here == there == [({1}, 1, torch.float64, False)]
    assert two == [({2}, 2, torch.float64, False)]


def test_a_grid_without_points_is_refused():
    with pytest.raises(ValueError, match="no values of seed"):
        ngd.sweep(abs_of, dict(x=[1], seed=[]))
    with pytest.raises(ValueError, match="any argument"):
        ngd.sweep(abs_of, {})


def test_what_joblib_remembers_is_not_run_again(tmp_path):
    """The page on running says so, of a function in a file."""
    memory, grid = joblib.Memory(tmp_path, verbose=0), dict(x=[-1, 2])
    remembered = memory.cache(abs_of)
    assert ngd.sweep(remembered, grid) == [1, 2]
    assert remembered.check_call_in_cache(x=-1) and ngd.sweep(remembered, grid) == [
        1,
        2,
    ]


def test_the_page_on_running_runs():
    page = (ROOT / "book" / "running.md").read_text(encoding="utf8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (code,) = (block for block in blocks if "ngd.sweep" in block)
    found = {"__name__": "__main__"}
    exec(code, found)
    assert len(found["here"][1][0][0]) == 3
