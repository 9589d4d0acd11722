"""What a step of each approximation costs at the size where practice begins, and what
it buys: 1000 digits, 784-1024-1024-10, one thread.

    python benchmarks/approximations.py          goes on where it stopped; the result is
                                                 benchmarks/approximations.json
    python benchmarks/approximations.py --smoke  every line at a tiny size, nothing kept

*Costs*: operations as torch executes them, CPU seconds of this process and the highest
memory of one step on all 1000 digits, squared error, float64. *Training*: the softmax
model on batches of 100, float32. Every method has eight trial points in a box of the
same size around its customary values, three decades of the rate and two of a second
parameter, placed by one rule (`points`); the best by validation accuracy, averaged over
the run, is run from five other seeds, and only these runs see test digits. All methods
may spend the operations of the same number of exact steps. *Ten classes*: networks of
two layers trained by undamped K-FAC on 300 digits, beside its prediction. The chapters
"Which approximation when?" and "Different minima, different predictions" show what the
file holds."""

import argparse
import ctypes
import gc
import json
import os
import platform
import time
from datetime import date
from pathlib import Path

import torch
from peers import machine
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import ngdcore as ngd

RESULTS = Path(__file__).resolve().parent / "approximations.json"
FULL = {
    "widths": [784, 1024, 1024, 10],
    "n": 1000,
    "n_test": 2000,
    "batch": 100,
    "exact_steps": 40,
    "trials": 8,
    "trial_seed": 100,
    "seeds": [0, 1, 2, 3, 4],
    "looks": 10,
    "ten": {
        "n": 300,
        "n_test": 1000,
        "n_own": 200,
        "widths": [1024, 2048, 4096, 6144],
        "seeds": [0],
        "steps": 6,
    },
}
SMOKE = FULL | {
    "widths": [784, 32, 32, 10],
    "n": 40,
    "n_test": 20,
    "batch": 10,
    "exact_steps": 2,
    "trials": 2,
    "seeds": [0, 1],
    "looks": 2,
    "ten": {
        "n": 5,
        "n_test": 20,
        "n_own": 10,
        "widths": [40, 80],
        "seeds": [0],
        "steps": 2,
    },
}
F = ngd.fisher
cross_entropy = torch.nn.functional.cross_entropy
# One step: the Fisher and whether it is damped. The undamped tri-diagonal one moves the
# middle layer alone.
STEPS = {
    "exact": (F.Exact(), True),
    "block-diagonal": (F.BlockDiagonal(), True),
    "block tri-diagonal": (F.BlockTridiagonal(), False),
    "K-FAC": (F.KFAC(), True),
    "K-FAC, one draw": (F.SampledKFAC(), True),
    "K-FAC, tri-diagonal inverse": (F.TridiagonalKFAC(), True),
    "unit-wise": (F.UnitWise(), True),
    "diagonal": (F.Diagonal(), True),
    "quasi-diagonal": (F.QuasiDiagonal(), True),
}
# What is trained: customary rate (in full steps for natural gradients), and customary
# value of the second parameter: damping over the Fisher's mean eigenvalue at the start,
# 1 - momentum, 1 - beta_1.
TRAINED = {
    "exact": (0.1, 0.1),
    "K-FAC, one draw": (0.1, 0.1),
    "SGD with momentum": (0.03, 0.1),
    "Adam": (0.001, 0.1),
}
DECADES = 3, 2
FAILED = ValueError, ArithmeticError, torch.linalg.LinAlgError


# --- Operations, seconds, memory ------------------------------------------------------

aten = torch.ops.aten
PRICE = {
    **flop_registry,  # matrix products
    aten.linalg_solve_triangular: lambda a, b, **_: a.numel() * b.shape[-1],
    aten.linalg_cholesky_ex: lambda a, **_: a.numel() * a.shape[-1] // 3,
    aten._linalg_eigh: lambda a, *_, **__: 9 * a.numel() * a.shape[-1],
}


class Count(TorchDispatchMode):
    """Operations of everything that torch executes."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRICE:
            price = PRICE[func.overloadpacket]
            self.total += price(*args, **(kwargs or {}), out_val=out)
        return out


def counted(call):
    with Count() as count:
        call()
    return count.total


def resident(key):
    """A number of /proc/self/status, in MB; where there is none, nothing."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(v.split()[1]) / 1024 for v in lines if v.startswith(key))


def highest(call):
    """MB that a call takes beyond what is there before it, at its highest; None where
    the system does not tell.
    """
    gc.collect()  # signals hold each other: they would count as there before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    except (AttributeError, OSError):
        call()
        return None
    before = resident("VmRSS")
    call()
    return round(resident("VmHWM") - before)


def spent(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def cost(call):
    """One step: operations and MB of a first one, and its CPU seconds, or the least of
    three more where that is quick.
    """
    found, start = {}, time.process_time()
    found["mb"] = highest(lambda: found.update(ops=counted(call)))
    seconds = time.process_time() - start
    if seconds < 5:
        seconds = min(spent(call) for _ in range(3))
    return found | {"seconds": round(seconds, 4)}


def step_of(fisher, damped, net, x, y):
    """A natural gradient of all rows, formed and dropped."""
    damping = 0.01 * mean_eigenvalue(net, x) if damped else 0.0

    def step():
        lazy = isinstance(fisher, F.SampledKFAC)
        sig = ngd.signals(net, x, lazy=lazy)
        fisher.direction(sig, sig.outputs - y, damping)

    return step


def gradient_of(net, x, y, opt=None):
    """A gradient by automatic differentiation, and what an optimizer does with it."""

    def step():
        net.zero_grad()
        ngd.optim.half_mse(net(x), y).backward()
        if opt:
            opt.step()

    return step


def mean_eigenvalue(net, x, softmax=False):
    """Of the Fisher, over the NC (or N(C - 1)) of them that need not be zero."""
    sig = ngd.signals(net, x)
    n, c = sig.outputs.shape
    p, total = sig.outputs.softmax(1), 0.0
    metric = torch.eye(c).to(p).expand(n, -1, -1)
    if softmax:
        metric = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    for H, D in zip(sig.H, sig.D):
        D = D.view(n, c, -1)
        seen = (D @ D.mT * metric).sum((1, 2))
        total += float((seen * H.square().sum(1)).sum())
    return total / n / (n * (c - softmax))


def costs(results, setup, say):
    """Every method's step that is not known yet."""
    data = ngd.data.mnist(n_train=setup["n"], n_test=1, norm="sqrt_d", standardize=True)
    net = ngd.models.MLP(setup["widths"], "relu", 2.0, 0.1, seed=0)
    x, y = data.x, data.y
    for _ in range(4):  # the first sweeps of a net are also checked
        ngd.signals(net, x, lazy=True)
    sgd = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    adam = torch.optim.Adam(net.parameters(), lr=0.0)
    steps = {
        "gradient descent": gradient_of(net, x, y),
        "SGD with momentum": gradient_of(net, x, y, sgd),
        "Adam": gradient_of(net, x, y, adam),
    } | {name: step_of(*how, net, x, y) for name, how in STEPS.items()}
    for name, step in steps.items():
        if name not in results["costs"]:
            results["costs"][name] = found = cost(step)
            if name == "unit-wise":
                found["active"] = active_counts(net, x)
            say(name, {k: v for k, v in found.items() if k != "active"})


def active_counts(net, x):
    """At how many samples each unit is active, layer by layer: the sum of the squares,
    and that of the cubes.
    """
    sig = ngd.signals(net, x)
    n, c = sig.outputs.shape
    alive = [(D.view(n, c, -1) != 0).any(1).sum(0).double() for D in sig.D]
    return [[float(a.pow(k).sum()) for k in (2, 3)] for a in alive]


# --- Training -------------------------------------------------------------------------


def points(name, count=8):
    """Trial points, (rate, second parameter): evenly spaced in the logarithm of the
    one, in bit-reversed order in that of the other (Hammersley), in a box around the
    customary values. The same points of the box for all methods.
    """
    bits = (count - 1).bit_length()
    for k in range(count):
        turned = int(format(k, f"0{bits}b")[::-1], 2)
        place = (k + 0.5) / count - 0.5, (turned + 0.5) / count - 0.5
        yield [
            value * 10 ** (decades * at)
            for value, decades, at in zip(TRAINED[name], DECADES, place)
        ]


def optimizer(name, net, rate, second, scale, seed=0):
    """The method at a point; scale is the Fisher's mean eigenvalue."""
    if name == "SGD with momentum":
        return torch.optim.SGD(net.parameters(), rate, momentum=1 - second)
    if name == "Adam":
        return torch.optim.Adam(net.parameters(), rate, betas=(1 - second, 0.999))
    damping = second * scale
    if name == "exact":
        how = {"metric": "softmax", "damping": damping}
        return ngd.optim.NaturalGradient(net, F.Exact(), rate, **how)
    layers = sum(isinstance(m, torch.nn.Linear) for m in net)
    fisher = F.SampledKFAC(model="softmax", seed=seed)
    return ngd.optim.NaturalGradient(net, fisher, rate / layers, damping)


def one_step(opt, net, x, y):
    if isinstance(opt, ngd.optim.NaturalGradient):
        return opt.step(x, y, loss=cross_entropy)
    opt.zero_grad()
    cross_entropy(net(x), y).backward()
    return opt.step()


def network(setup, seed):
    how = {"parameterization": "standard", "bias": True, "dtype": torch.float32}
    return ngd.models.MLP(setup["widths"], "relu", 2.0, seed=seed, **how)


def batches(x, y, size, seed):
    """Batches without replacement, reshuffled every pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(size):
            yield x[rows], y[rows]


def train(opt, net, rows, shown, setup, steps, seed):
    """[step, CPU seconds, accuracy on the rows shown] at evenly spaced steps; a run
    that fails stays at accuracy 0.
    """
    x, y = shown
    looks = [round(i * steps / setup["looks"]) for i in range(setup["looks"] + 1)]
    curve, seconds = [], 0.0
    feed = batches(*rows, setup["batch"], seed)
    for k in range(steps + 1):
        if k in looks:
            with torch.no_grad():
                right = (net(x).argmax(1) == y).double().mean()
            curve.append([k, round(seconds, 4), round(float(right), 5)])
        if k < steps:
            start = time.process_time()
            try:
                one_step(opt, net, *next(feed))
            except FAILED:
                return curve + [[j, seconds, 0.0] for j in looks if j > k]
            seconds += time.process_time() - start
    return curve


def digits(setup):
    """Training, validation and test rows, with labels."""
    n = setup["n"]
    data = ngd.data.mnist(
        n_train=2 * n,
        n_test=setup["n_test"],
        norm="sqrt_d",
        standardize=True,
        dtype=torch.float32,
    )
    labels = data.y.argmax(1)
    test = data.x_test, data.labels_test
    return (data.x[:n], labels[:n]), (data.x[n:], labels[n:]), test


def budget(results, setup, rows):
    """Operations of one step of every method on a batch, and steps a run."""
    batch = [part[: setup["batch"]] for part in rows]
    net = network(setup, setup["trial_seed"])
    scale = mean_eigenvalue(net, batch[0], softmax=True)
    for name in TRAINED:
        net = network(setup, setup["trial_seed"])
        opt = optimizer(name, net, 1e-9, 0.1, scale)
        for _ in range(4):
            one_step(opt, net, *batch)
        ops = counted(lambda opt=opt, net=net: one_step(opt, net, *batch))
        results["steps"][name] = {"ops": ops}
    most = setup["exact_steps"] * results["steps"]["exact"]["ops"]
    for found in results["steps"].values():
        found["steps"] = most // found["ops"]
    results["scale"] = scale


def trials(results, setup, rows, validation, say):
    for name in TRAINED:
        done = results["trials"].setdefault(name, [])
        for at in list(points(name, setup["trials"]))[len(done) :]:
            seed = setup["trial_seed"]
            net = network(setup, seed)
            opt = optimizer(name, net, *at, results["scale"], seed)
            steps = results["steps"][name]["steps"]
            curve = train(opt, net, rows, validation, setup, steps, seed)
            score = sum(a for *_, a in curve[1:]) / (len(curve) - 1)
            done.append({"at": at, "score": score, "curve": curve})
            say(name, at, round(score, 4), curve[-1])


def final(results, setup, rows, test, say):
    """The best trial point of every method, from the other seeds."""
    for name, tried in results["trials"].items():
        best = max(tried, key=lambda trial: trial["score"])["at"]
        done = results["runs"].setdefault(name, [])
        for seed in setup["seeds"][len(done) :]:
            net = network(setup, seed)
            opt = optimizer(name, net, *best, results["scale"], seed)
            steps = results["steps"][name]["steps"]
            done.append(train(opt, net, rows, test, setup, steps, seed))
            say(name, seed, done[-1][-1])


# --- K-FAC on ten classes, beside its prediction --------------------------------------


def foreseen(data):
    """Weights of the training targets in K-FAC's prediction, two layers of infinite
    width: (N_test, N), the same for all classes.
    """
    n = len(data.x)
    factors = ngd.kernels.analytic(data.x, depth=2)
    both = factors.cross(torch.cat([data.x, data.x_test]))
    Q = F.KFAC().coefficient(both)
    return torch.linalg.solve(Q[:n].T, Q[n:].T).T


def own_regression(net, x, x_test, targets):
    """The same for the network as it is, in its own factors: changes of the test
    outputs, for each of several targets (N, C).
    """
    factors = ngd.kernels.empirical(ngd.signals(net, x))
    Q = F.KFAC().coefficient(factors)
    towards = F.KFAC().coefficient(factors.cross(x_test))
    rhs = torch.stack([t.flatten() for t in targets], 1)
    found = towards @ torch.linalg.solve(Q, rhs)
    return [column.view(len(x_test), -1) for column in found.T]


def off(a, b, size):
    return round(float((a - b).norm() / size.norm()), 5)


def trained(net, data, steps):
    """What is left of the residual, step by step, under undamped K-FAC; and the test
    outputs.
    """
    n, c = data.y.shape
    width = net[0].out_features
    rate = 1 / (n * min(1, width / (n * c)) + 1)
    opt = ngd.optim.NaturalGradient(net, F.KFAC(), rate)
    left = []
    for _ in range(steps):
        left.append(float((opt.step(data.x, data.y).outputs - data.y).norm()))
    with torch.no_grad():
        left.append(float((net(data.x) - data.y).norm()))
        return [round(v / left[0], 6) for v in left], net(data.x_test)


def ten_classes(data, W, width, seed, steps, n_own):
    """A network trained by K-FAC: what is left of the residual, and by how much it, and
    the regression in its own factors, miss the prediction; and the accuracies.
    """
    net = ngd.models.MLP([784, width, data.y.shape[1]], seed=seed)
    with torch.no_grad():
        start, at_test = net(data.x), net(data.x_test)
    r = data.y - start
    own, own_y = own_regression(net, data.x, data.x_test[:n_own], [r, data.y])
    inf, inf_y = W @ r, (W @ data.y)[:n_own]
    left, end = trained(net, data, steps)
    moved, labels = end - at_test, data.labels_test

    def right(f):
        return float((f.argmax(1) == labels[: len(f)]).double().mean())

    accuracy = {"trained": end, "own": at_test[:n_own] + own}
    accuracy["predicted"] = at_test + inf
    return {
        "width": width,
        "seed": seed,
        "left": left,
        "trained": off(moved, inf, inf),
        "along": round(float((moved * inf).sum() / inf.square().sum()), 5),
        "own": off(own, inf[:n_own], inf[:n_own]),
        "own, of the targets": off(own_y, inf_y, inf_y),
        "trained against own": off(moved[:n_own], own, own),
        "accuracy": {name: right(f) for name, f in accuracy.items()},
    }


def ten(results, setup, say):
    ask = setup["ten"]
    sizes = {"n_train": ask["n"], "n_test": ask["n_test"]}
    data = ngd.data.mnist(**sizes, standardize=True)
    done = results.setdefault("ten", [])
    cases = [(width, seed) for width in ask["widths"] for seed in ask["seeds"]]
    W = foreseen(data)
    for width, seed in cases[len(done) :]:
        done.append(ten_classes(data, W, width, seed, ask["steps"], ask["n_own"]))
        say(done[-1])


# --- All of it ------------------------------------------------------------------------


def empty(setup):
    return {
        "machine": machine(),
        "threads": 1,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "setup": setup,
        "seconds": 0.0,
        "costs": {},
        "steps": {},
        "trials": {},
        "runs": {},
    }


def known(setup):
    """What an earlier run has found with this setup, or nothing yet."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found if found.get("setup") == setup else empty(setup)


def keep(results):
    """An interrupted write leaves no half a file behind."""
    draft = RESULTS.with_suffix(".part")
    draft.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")
    os.replace(draft, RESULTS)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    setup = SMOKE if smoke else FULL
    results = empty(setup) if smoke else known(setup)
    before, start = results["seconds"], time.process_time()

    def say(*words):
        """Something is found: tell it, and keep it."""
        results["seconds"] = round(before + time.process_time() - start, 1)
        print(f"{results['seconds']:8.1f} s ", *words, flush=True)
        if not smoke:
            keep(results)

    rows, validation, test = digits(setup)
    if not results["steps"]:
        budget(results, setup, rows)
        say(results["steps"])
    costs(results, setup, say)
    trials(results, setup, rows, validation, say)
    final(results, setup, rows, test, say)
    ten(results, setup, say)


if __name__ == "__main__":
    main()
