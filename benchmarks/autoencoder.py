"""Figure 1 D of Bernacchia et al. with equal tuning: an autoencoder of MNIST, the same
number of trials for every method, judged on images that are kept apart.

    python benchmarks/autoencoder.py                  all that is not in the log yet
    python benchmarks/autoencoder.py "SGD"            these methods alone
    python benchmarks/autoencoder.py --again "SGD"    from the beginning

Each method has a box of settings. The points that are tried are drawn from it before
any run, log-uniformly and by one seeded quasi-random rule, whatever comes out. A trial
is one run of 20,000 examples with a seed of its own, on 50,000 training images, judged
on the other 10,000. The setting with the least error is then run on 80,000 examples
with five other seeds, and the test images are looked at where these runs end.

All needs full MNIST (see NGD_DATA_DIR in the book) and less than an hour on one thread.
Every run is written to the log when it ends; what is there is not run again.

To add a method: a function (net, setting, steps, seed) that returns the update, itself
a function of a batch, and an entry in METHODS with the box of its settings."""

import argparse
import hashlib
import inspect
import itertools
import json
import math
import platform
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from peers import machine
from scipy.stats import qmc
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import ngdcore as ngd
from ngdcore.__main__ import hashes

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "data" / "recorded" / "autoencoder_tuned.json"
WIDTHS = [784, 400, 200, 100, 50, 100, 200, 400, 784]
LAYERS = len(WIDTHS) - 1
TRIAL_SEED, TRIAL_POINTS = 1000, 4  # a seed apart from those of the final runs


@dataclass(frozen=True)
class Size:
    """How much of everything; the defaults are what the book shows."""

    images: int = 60_000  # training images, of which the last are kept apart
    apart: int = 10_000
    tests: int = 10_000
    trials: int = 8
    trial: int = 20_000  # examples
    full: int = 80_000
    seeds: int = 5
    points: int = 16  # of a curve


# --- The methods ----------------------------------------------------------------------


def cosine(k, steps, warm=0.0):
    """The share of the rate at update k: up on a line, and down on half a cosine."""
    up = min(1.0, (k + 1) / (warm * steps + 1))
    return up * (1 + math.cos(math.pi * k / steps)) / 2


def first_order(net, optimizer, rates):
    """An update by one of torch's optimizers, whose rate is the next of ``rates``."""

    def update(batch):
        optimizer.param_groups[0]["lr"] = next(rates)
        optimizer.zero_grad()
        ngd.optim.half_mse(net(batch), batch).backward()
        optimizer.step()

    return update


def scheduled(setting, steps):
    """The rates of a run."""
    warm = setting.get("warm-up", 0.0)
    return (setting["rate"] * cosine(k, steps, warm) for k in range(steps))


def sgd(net, setting, steps, seed):
    """The paper's rival: one rate, and no more."""
    optimizer = torch.optim.SGD(net.parameters(), setting["rate"])
    return first_order(net, optimizer, itertools.repeat(setting["rate"]))


def nesterov(net, setting, steps, seed):
    momentum = 1 - setting["1 - momentum"]
    optimizer = torch.optim.SGD(
        net.parameters(), setting["rate"], momentum, nesterov=True
    )
    return first_order(net, optimizer, scheduled(setting, steps))


def adam(net, setting, steps, seed):
    optimizer = torch.optim.Adam(net.parameters(), setting["rate"], fused=True)
    return first_order(net, optimizer, scheduled(setting, steps))


def _natural(net, setting, seed, **rule):
    """The paper's update (20) with its damping (21), clipped from below, and a step
    that raises the batch's loss undone, as in the chapter.
    """
    lower = setting["clip"] / setting["variance"]
    fisher = ngd.fisher.SampledKFAC(variance=setting["variance"], seed=seed)
    rule = ngd.optim.Adaptive(start=50 * lower, lower=lower, **rule)
    return ngd.optim.NaturalGradient(net, fisher, setting["step"] / LAYERS, rule)


def natural(net, setting, steps, seed):
    optimizer = _natural(net, setting, seed, alpha=setting["step"])
    return lambda batch: optimizer.step(batch, batch)


class KFAC:
    """Martens & Grosse (2015) on torch alone: running averages of the factors of all
    layers (one draw a sample), inverses refreshed every few updates, damping shared by
    the factors' mean eigenvalues.
    """

    def __init__(self, net, setting, seed):
        self.net, self.layers = net, [m for m in net if hasattr(m, "weight")]
        self.damping, self.refresh = setting["damping"], setting["refresh"]
        self.keep = 1 - setting["1 - average"]
        self.generator = torch.Generator().manual_seed(seed)
        self.factors, self.inverses, self.k = None, None, 0

    def direction(self, x):
        """(inputs of all layers, gradient, minus the inverse times it), by layer."""
        H, before, out = self.sweep(x)
        self.loss = float(ngd.optim.half_mse(out, x))
        noise = torch.randn(out.shape, generator=self.generator).to(out)
        E, S = (pull(out, before, v) for v in ((out - x).detach(), noise))
        n, keep = len(x), min(self.keep, 1 - 1 / (self.k + 1))
        new = [(h.T @ h / n, s.T @ s / n) for h, s in zip(H, S)]
        self.factors = [
            tuple(keep * m + (1 - keep) * f for m, f in zip(*both))
            for both in zip(self.factors or new, new)
        ]
        if self.k % self.refresh == 0:
            self.inverses = [inverted(*f, self.damping**0.5) for f in self.factors]
        self.k += 1
        G = [e.T @ h / n for e, h in zip(E, H)]
        return H, G, [-b @ g @ a for g, (a, b) in zip(G, self.inverses)]

    @torch.enable_grad()
    def sweep(self, x):
        """(inputs with a one for the bias, pre-activations, outputs)."""
        inputs, before, h = [], [], x
        for module in self.net:
            if hasattr(module, "weight"):
                inputs.append(torch.cat([h.detach(), h.new_ones(len(h), 1)], 1))
                before.append(module(h))
                h = before[-1]
            else:
                h = module(h)
        return inputs, before, h

    def pushed(self, H, step):
        """The outputs' first-order change by a step of all layers (tanh between)."""
        change = 0.0
        for l, (h, d) in enumerate(zip(H, step)):
            slope = 1 - h[:, :-1].square()
            through = (slope * change) @ self.layers[l].weight.T if l else 0.0
            change = through + h @ d.T
        return change

    def add(self, step):
        for layer, d in zip(self.layers, step):
            layer.weight += d[:, :-1]
            layer.bias += d[:, -1]


def pull(out, before, v):
    """v of the outputs, swept back to all pre-activations."""
    with torch.enable_grad():
        return torch.autograd.grad((out * v).sum(), before, retain_graph=True)


def inverted(A, B, shift):
    """The inverses of both factors, their shifts in the ratio of their scales."""
    pi = (A.diagonal().mean() / B.diagonal().mean()).sqrt()
    shifts = pi * shift, shift / pi
    return [
        torch.cholesky_inverse(torch.linalg.cholesky(M + s * torch.eye(len(M)).to(M)))
        for M, s in zip((A, B), shifts)
    ]


def kfac(net, setting, steps, seed):
    """As its authors have it: rate and momentum of every update minimise the quadratic
    model of the batch's loss, and damping follows how well the model predicts it.
    """
    fisher, last = KFAC(net, setting, seed), []

    @torch.no_grad()
    def update(batch):
        H, G, d = fisher.direction(batch)
        along = [d, list(last)] if last else [d]
        shares, predicted = minimised(fisher, H, G, along)
        last[:] = [sum(s * p for s, p in zip(shares, parts)) for parts in zip(*along)]
        fisher.add(last)
        if fisher.k % fisher.refresh == 0:
            change = fisher.loss - float(ngd.optim.half_mse(net(batch), batch))
            rho, by = change / predicted, 0.95**fisher.refresh
            fisher.damping *= by if rho > 0.75 else 1 / by if not rho >= 0.25 else 1

    return update


def inner(p, q):
    return sum((a * b).sum() for a, b in zip(p, q))


def minimised(fisher, H, G, along):
    """What to take of each direction, and by how much the model then goes down."""
    pushed = [fisher.pushed(H, p) for p in along]
    model = [
        [(u * v).sum() / len(u) + fisher.damping * inner(p, q)]
        for u, p in zip(pushed, along)
        for v, q in zip(pushed, along)
    ]
    model = torch.tensor(model).double().view(len(along), -1)
    slope = torch.tensor([-inner(p, G) for p in along]).double()
    shares = torch.linalg.lstsq(model, slope[:, None], driver="gelsd").solution[:, 0]
    return shares.tolist(), float(shares @ slope) / 2


# --- Their boxes, written before any run ----------------------------------------------


class Method(NamedTuple):
    make: Callable  # (net, setting, steps, seed) -> update(batch)
    box: dict  # {knob: (least, greatest)}; "batch" is one, whole numbers stay whole


SMALL, LARGE = (8, 160), (100, 2000)  # batches: one factor for all
PAPER = {
    "batch": LARGE,
    "step": (0.25, 1.5),
    "variance": (1.0, 1e4),
    "clip": (2e-6, 2e-2),
}
AVERAGES = {
    "batch": LARGE,
    "damping": (1e-3, 10.0),
    "1 - average": (0.02, 0.2),
    "refresh": (1, 20),
}
METHODS = {
    "natural gradient": Method(natural, PAPER),
    "K-FAC": Method(kfac, AVERAGES),
    "SGD": Method(sgd, {"batch": SMALL, "rate": (2e-3, 0.2)}),
    "SGD, Nesterov and cosine": Method(
        nesterov,
        {"batch": SMALL, "rate": (2e-4, 2e-2), "1 - momentum": (0.01, 0.3)},
    ),
    "Adam, warm-up and cosine": Method(
        adam, {"batch": SMALL, "rate": (1e-4, 1e-2), "warm-up": (0.01, 0.3)}
    ),
}


# --- What is tried --------------------------------------------------------------------


def design(box, size):
    """The settings that are tried: the first points of a scrambled Halton sequence,
    log-uniform over the box; a batch is the nearest divisor of a trial's examples.
    """
    unit = qmc.Halton(len(box), scramble=True, seed=0).random(size.trials)
    return [
        {
            knob: placed(knob, low * (high / low) ** float(u), size)
            for u, (knob, (low, high)) in zip(point, box.items())
        }
        for point in unit
    ]


@cache
def divisors(n):
    return [b for b in range(1, n + 1) if n % b == 0]


def placed(knob, value, size):
    """A knob's value as it is used."""
    if knob == "batch":
        return min(divisors(size.trial), key=lambda b: abs(math.log(b / value)))
    return round(value) if knob == "refresh" else float(f"{value:.3g}")


# --- Operations -----------------------------------------------------------------------

aten = torch.ops.aten
PRICE = {
    **flop_registry,  # matrix products
    aten.linalg_solve_triangular: lambda a, b, **_: a.numel() * b.shape[-1],
    aten.linalg_cholesky_ex: lambda a, **_: a.numel() * a.shape[-1] // 3,
    aten.cholesky_inverse: lambda a, **_: 2 * a.numel() * a.shape[-1] // 3,
}


class Count(TorchDispatchMode):
    """Operations of products, solves and factorisations that torch executes."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (price := PRICE.get(func.overloadpacket)) is not None:
            self.total += price(*args, out_val=out)
        return out


@cache
def gradient_operations():
    """Operations of the gradient of one example."""
    net, batch = autoencoder(0), torch.zeros(8, WIDTHS[0])
    with Count() as counter:
        ngd.optim.half_mse(net(batch), batch).backward()
    return counter.total / len(batch)


# --- A run ----------------------------------------------------------------------------

DIVERGED = (ValueError, ArithmeticError, torch.linalg.LinAlgError)


def autoencoder(seed):
    """The chapter's network: tanh, linear outputs, orthogonal weights, zero biases."""
    net = ngd.models.MLP(
        WIDTHS,
        "tanh",
        parameterization="standard",
        bias=True,
        seed=seed,
        dtype=torch.float32,
    )
    starts = ngd.models.DeepLinear(WIDTHS, seed=seed)
    with torch.no_grad():
        for layer, start in zip((m for m in net if hasattr(m, "weight")), starts):
            layer.weight.copy_(start.weight)
    return net


def batches(n, size, seed):
    """Rows of the next batch; all images are seen before any is seen again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator)
        yield from (order[i : i + size] for i in range(0, n - n % size, size))


@torch.no_grad()
def error_of(net, images):
    """Mean square a pixel; 1 where a run has diverged."""
    error = float((net(images) - images).square().mean())
    return min(error, 1.0) if math.isfinite(error) else 1.0


def train(make, setting, examples, seed, images, apart, points):
    """(net, curve, operations an example, words where the run broke off). The curve is
    [examples, CPU seconds, error on the images kept apart], CPU seconds of updates
    alone. Operations are counted over one cycle of updates, after two.
    """
    net, size = autoencoder(seed), setting["batch"]
    steps, cycle = examples // size, setting.get("refresh", 1)
    update, rows = make(net, setting, steps, seed), batches(len(images), size, seed)
    counted = range(2, 2 + cycle) if steps >= 2 + cycle else range(steps)
    curve, seconds, counter, why = [[0, 0.0, error_of(net, apart)]], 0.0, Count(), None
    for k in range(steps):
        batch = images[next(rows)]
        with counter if k in counted else nullcontext():
            start = time.process_time()
            why = tried(update, batch)
            seconds += time.process_time() - start
        if why or (k + 1) * points // steps != k * points // steps:
            error = 1.0 if why else error_of(net, apart)
            curve.append([(k + 1) * size, round(seconds, 3), error])
            if not why and error > 2 * curve[0][2]:
                why = "twice the error of the start"
        if why:
            break
    return net, curve, counter.total / (len(counted) * size), why


def tried(update, batch):
    """None, or the words with which an update fails."""
    try:
        update(batch)
    except DIVERGED as error:
        return f"{type(error).__name__}: {error}"[:120]


def run_of(name, setting, examples, seed, images, apart, points):
    """(net, what the log says of a run)."""
    net, curve, operations, why = train(
        METHODS[name].make, setting, examples, seed, images, apart, points
    )
    seen, seconds, error = curve[-1]
    return net, {
        "method": name,
        "setting": setting,
        "seed": seed,
        "examples": examples,
        "seen": seen,
        "validation": error,
        "seconds": seconds,
        "gradients": operations / gradient_operations(),  # an example
        "why": why,
        "device": f"{machine()}, one thread",
        "curve": curve,
    }


def training_images(size):
    """(images to train on, images kept apart): pixels in [0, 1]."""
    x = ngd.data.mnist(n_train=size.images, n_test=1, norm=None, dtype=torch.float32).x
    return x[: -size.apart], x[-size.apart :]


def test_images(size):
    return ngd.data.mnist(
        n_train=1, n_test=size.tests, norm=None, dtype=torch.float32
    ).x_test


# --- The log --------------------------------------------------------------------------


class Log:
    """What has been run, in a file that holds it at any time."""

    def __init__(self, path, size):
        # once: the script may be edited while it runs
        self.path, self.now, self.size = path, made_with(), size
        self.codes = {name: code_of(name) for name in METHODS}
        self.kept, self.added = {"trials": [], "runs": []}, False
        if path.exists():
            self.kept = json.loads(path.read_text(encoding="utf8"))
            more = {key: getattr(size, key) for key in ("trials", "seeds")}
            if self.kept["size"] | more != asdict(size):
                raise SystemExit(f"{path} is of another size: {self.kept['size']}")

    def find(self, kind, name, setting, seed):
        """The run of this method's present code and setting, if there is one."""
        for run in self.kept[kind]:
            same = run["method"], run["setting"], run["seed"], run["code"]
            if same == (name, setting, seed, self.codes[name]):
                return run

    def add(self, kind, run):
        self.kept[kind].append(run | {"code": self.codes[run["method"]]})
        self.added = True
        self.write()
        print(told(kind, run), flush=True)

    def drop(self, names):
        """Forget the runs of some methods, and those of code that is no more."""

        def stays(run):
            same = run["code"] == self.codes.get(run["method"])
            return same and run["method"] not in names

        for kind in ("trials", "runs"):
            self.kept[kind] = list(filter(stays, self.kept[kind]))
        if not self.kept["trials"]:
            self.kept.pop("hashes", None)

    def hashes(self):
        """Package and data are those of the oldest run; the script's functions are
        those of now, or their runs are gone.
        """
        if "hashes" in self.kept:
            return self.kept["hashes"] | {"code": self.now["code"]}
        return self.now

    def write(self):
        lists = {kind: self.kept[kind] for kind in ("trials", "runs")}
        about = {
            "chapter": "autoencoder",
            "script": "benchmarks/autoencoder.py",
            "scale": "benchmark",
            "seconds": round(sum(r["seconds"] for rs in lists.values() for r in rs), 1),
            "device": f"{machine()}, one thread",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "date": date.today().isoformat(),
            "hashes": self.hashes(),
            "size": asdict(self.size),
            "boxes": {name: method.box for name, method in METHODS.items()},
            "rows": [],
        }
        if not self.added:  # where and when the last run was
            for key in {"device", "versions", "date"} & set(self.kept):
                about[key] = self.kept[key]
        draft = self.path.with_suffix(".part")
        draft.write_text(by_line(about | lists), encoding="utf8")
        draft.replace(self.path)


def by_line(kept):
    """JSON with a line for every run."""
    parts = []
    for key, value in kept.items():
        text = json.dumps(value)
        if key in ("trials", "runs") and value:
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def made_with():
    """Hashes of this script, the package and the data that ship."""
    source = Path(__file__).read_text(encoding="utf8")
    return hashes(ROOT, {"cells": [{"cell_type": "code", "source": source}]})


def code_of(name):
    """Sixteen digits that change with the function that makes a method's update."""
    source = inspect.getsource(METHODS[name].make)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def told(kind, run):
    setting = ", ".join(f"{k} {v:g}" for k, v in run["setting"].items())
    error = run.get("test", run["validation"])
    return (
        f"{kind:6} {run['method']:27} {error:.5f}  {run['seconds']:6.1f} s"
        f"  {run['gradients']:5.2f}  {setting}  {run['why'] or ''}"
    )


# --- All of it ------------------------------------------------------------------------


def tune(log, names):
    """The trials of all methods. No test image is loaded here."""
    size = log.size
    images, apart = training_images(size)
    points = {name: design(METHODS[name].box, size) for name in names}
    for k in range(size.trials):
        for name in names:
            setting = points[name][k]
            if log.find("trials", name, setting, TRIAL_SEED) is None:
                run = run_of(
                    name, setting, size.trial, TRIAL_SEED, images, apart, TRIAL_POINTS
                )[1]
                log.add("trials", run)


def chosen(log, name):
    """The setting with the least error on the images kept apart."""
    points = design(METHODS[name].box, log.size)
    trials = [log.find("trials", name, point, TRIAL_SEED) for point in points]
    return min(trials, key=lambda run: run["validation"])["setting"]


def finish(log, names):
    """The chosen settings at full length; the test images where each of them ends."""
    size = log.size
    images, apart = training_images(size)
    settings = {name: chosen(log, name) for name in names}
    for seed in range(size.seeds):
        for name, setting in settings.items():
            if log.find("runs", name, setting, seed) is None:
                net, run = run_of(
                    name, setting, size.full, seed, images, apart, size.points
                )
                run["test"] = error_of(net, test_images(size))
                log.add("runs", run)


def main(words=None, size=Size()):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", help="all of them by default")
    parser.add_argument("--again", action="store_true", help="whatever is in the log")
    parser.add_argument("--log", type=Path, default=LOG)
    options = parser.parse_args(words)
    if unknown := set(options.methods) - set(METHODS):
        parser.error(f"no such method: {', '.join(unknown)}; see METHODS")
    torch.set_num_threads(1)
    names, log = options.methods or list(METHODS), Log(options.log, size)
    log.drop(names if options.again else [])
    tune(log, names)
    finish(log, names)
    log.write()  # also where nothing was left to run: boxes and script may have changed


if __name__ == "__main__":
    main()
