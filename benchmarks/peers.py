"""ngdcore beside its peers: the same quantities, the same machine, one thread.

    make bench                          installs the peers apart, measures all, writes
                                        benchmarks/peers.json
    python benchmarks/peers.py gram-1024    these workloads alone; the rest is kept

Each library runs in a process of its own (`libraries.py` has its way of doing it). They
take turns, a block of repeats each; a block counts if the machine's matrix product,
timed within it, reached 80 % of the best rate seen, and of those that count the fastest
repeat stands. Errors are against dense float64: a Jacobian that is written out layer by
layer, and nothing of anybody's library. What the book shows is read from the file."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch
from libraries import DAMPING, LIBRARIES, WORKLOADS, given, net_of
from torch.func import functional_call, grad, vmap

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "peers.json"
BLOCKS, REPEATS, ENOUGH = 3, 5, 0.8
LONG, ONCE = 1.0, 4.0  # seconds beyond which a block is one repeat, or there is none
SHOWN = {  # whose version is told, by the environment it lives in
    "torch": "torch nngeometry asdfghjkl backpack-for-pytorch curvlinops-for-pytorch",
    "jax": "jax jaxlib neural-tangents",
}
CHECKED = 1.2e9  # bytes of the Jacobian that the errors of a Gram are found with


# --- The environments -----------------------------------------------------------------


def install(folder):
    """The environments of torch's and of jax' side, made where they are missing."""
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    torch_ = next(line for line in lock if line.startswith("torch=="))
    for name in SHOWN:
        home, needed = folder / name, ROOT / f"benchmarks/peers-{name}.txt"
        if (home / ".installed").exists():
            continue
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        pip = [home / "bin" / "pip", "install", "-q"]
        if name == "torch":
            subprocess.run([*pip, torch_], check=True)
            # Their own dependencies include data sets and images, which nobody needs.
            pip += ["--no-deps"]
        subprocess.run([*pip, "-r", needed], check=True)
        (home / ".installed").touch()


def python_of(folder, library):
    side = "jax" if library == "neural-tangents" else "torch"
    return folder / side / "bin" / "python"


def environment():
    one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    eigen = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    return os.environ | one | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": eigen}


def versions(folder):
    """{distribution: version} of what was measured."""
    found = {"python": platform.python_version()}
    for side, names in SHOWN.items():
        paths = [str(p) for p in (folder / side).glob("lib/python*/site-packages")]
        have = {d.name: d.version for d in distributions(path=paths)}
        found |= {name: have[name] for name in names.split() if name in have}
    return found


# --- The other processes --------------------------------------------------------------


def command(folder, library, work, *rest):
    return [python_of(folder, library), ROOT / "benchmarks/libraries.py"] + [
        library,
        work,
        *rest,
    ]


def answer(lines):
    """The answer among whatever a library prints; None where the process ended."""
    for line in lines:
        if line.startswith("answer "):
            return json.loads(line.removeprefix("answer "))
    return None


def once(folder, library, work, name):
    """First call, in a process of its own."""
    done = subprocess.run(
        command(folder, library, work, "once", name),
        text=True,
        capture_output=True,
        env=environment(),
    )
    said = answer(done.stdout.splitlines())
    last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    return said or {"why": f"failed: {last[:120]}"}


class Side:
    """A library that waits to be asked."""

    def __init__(self, folder, library, work):
        self.process = subprocess.Popen(
            command(folder, library, work, "serve"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
        )

    def block(self, name, repeats):
        self.process.stdin.write(f"{name} {repeats}\n")
        self.process.stdin.flush()
        return answer(self.process.stdout)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(folder, work, name):
    """{library: what is known of it} for one workload."""
    found = {lib: once(folder, lib, work, name) for lib in LIBRARIES}
    first = {lib: f["first"] for lib, f in found.items() if "first" in f}
    run = {lib: Side(folder, lib, work) for lib, s in first.items() if s < ONCE}
    blocks = {lib: [] for lib in run}
    for _ in range(BLOCKS):
        for lib, side in run.items():
            repeats = 1 if first[lib] > LONG else REPEATS
            blocks[lib].append(side.block(name, repeats))
    for side in run.values():
        side.close()
    best = max(b["rate"] for some in blocks.values() for b in some)
    for lib, slow in first.items():
        some = blocks.get(lib, [])
        quiet = [b["seconds"] for b in some if b["rate"] > ENOUGH * best]
        fastest = min(quiet or [b["seconds"] for b in some] or [slow])
        found[lib] |= {"seconds": fastest, "blocks": len(quiet)}
        found[lib]["error"] = error(name, work, lib)
    return {"libraries": found, "gemm": best}


# --- Dense float64 --------------------------------------------------------------------


def jacobians(net, x):
    """(N C, parameters of a layer), a layer at a time."""
    params = {k: p.detach() for k, p in net.named_parameters()}
    outputs = functional_call(net, params, (x,)).shape[1]

    def output(one, rest, key, row, c):
        return functional_call(net, rest | {key: one}, (row[None],))[0, c]

    for key in params:
        rest = {k: p for k, p in params.items() if k != key}
        J = torch.empty(len(x), outputs, params[key].numel(), dtype=x.dtype)
        for i in range(0, len(x), 50):
            for c in range(outputs):
                slope = vmap(grad(output), (None, None, None, 0, None))
                part = slope(params[key], rest, key, x[i : i + 50], c)
                J[i : i + 50, c] = part.flatten(1)
        yield J.flatten(0, 1)


def double(work, name, n=None):
    """The workload's network, inputs and residuals in float64."""
    x, weights, g = given(work, name, n)
    weights = [W.astype(float) for W in weights]
    return net_of(weights), torch.tensor(x).double(), torch.tensor(g).double()


def dense_gram(work, name):
    """J J^T of as many first samples as a Jacobian has room for."""
    weights, g = given(work, name)[1:]
    largest = max(W.size for W in weights)
    n = max(4, min(len(g), int(CHECKED / (8 * largest * g.shape[1]))))
    net, x, _ = double(work, name, n)
    return [sum(J @ J.T for J in jacobians(net, x)).numpy()]


def dense_step(work, name):
    """J^T (J J^T)^-1 g."""
    net, x, g = double(work, name)
    K = sum(J @ J.T for J in jacobians(net, x))
    c = torch.linalg.solve(K, g.flatten())
    made = zip(jacobians(net, x), net.parameters())
    return [(c @ J).view_as(p).numpy() for J, p in made]


def dense_kfac(work, name):
    """(B + s)^-1 (gradient) (A + s)^-1, layer by layer."""
    net, x, g = double(work, name)
    steps, n, h = [], len(x), x
    pre = []
    for layer in net:
        if hasattr(layer, "weight"):
            pre.append((h, z := layer(h)))
            h = z
        else:
            h = layer(h)
    for p, (h, z) in zip(net.parameters(), pre):
        D = torch.autograd.grad(h_out(net, pre), z, retain_graph=True)[0]
        A, B = h.T @ h / n, D.T @ D / n
        A, B = (M + DAMPING * torch.eye(len(M)).double() for M in (A, B))
        slope = (D * g).T @ h / n
        left = torch.linalg.solve(B, slope)
        steps.append(torch.linalg.solve(A, left.T).T.detach().numpy())
    return steps


def h_out(net, pre):
    """The sum of the outputs, of which a sample's is its own."""
    return pre[-1][1].sum()


def dense_analytic(work, name):
    """Arc-cosine recursion on angles formed in 30 digits where inputs come close."""
    x = torch.tensor(given(work, name)[0]).double()
    x = x[:400]
    unit = x / x.norm(dim=1, keepdim=True)
    # half-angle form: exact near coinciding inputs
    far, near = torch.cdist(unit, -unit), torch.cdist(unit, unit)
    near = (unit[:, None] - unit).norm(dim=2)
    far = (unit[:, None] + unit).norm(dim=2)
    theta = 2 * torch.atan2(near, far)
    scale = 2 * x.norm(dim=1)[:, None] * x.norm(dim=1) / x.shape[1]
    A = scale * theta.cos()
    K = A
    for _ in range(2):
        slope = (torch.pi - theta) / torch.pi
        cosine = (theta.sin() + (torch.pi - theta) * theta.cos()) / torch.pi
        K = scale * cosine + slope * K
        theta = cosine.clamp(-1, 1).acos().fill_diagonal_(0)
    return [K.numpy()]


DENSE = {
    "gram": dense_gram,
    "step": dense_step,
    "kfac": dense_kfac,
    "analytic": dense_analytic,
}


def reference(work, name):
    """The dense result, made once."""
    path = Path(work) / f"{name}.dense.npz"
    if not path.exists():
        np.savez(path, *DENSE[WORKLOADS[name]["kind"]](work, name))
    kept = np.load(path)
    return [kept[key] for key in kept.files]


def error(name, work, library):
    """Frobenius, relative: of a Gram's leading block, of all layers of a step."""
    kept = np.load(Path(work) / f"{name}.{library}.npz")
    mine = [kept[key].astype(float) for key in kept.files]
    dense = reference(work, name)
    if WORKLOADS[name]["kind"] == "gram":
        n, c = WORKLOADS[name]["n"], WORKLOADS[name]["widths"][-1]
        size = len(dense[0])
        mine = [square(mine[0], n, c)[:size, :size]]
    if WORKLOADS[name]["kind"] == "analytic":
        mine = [mine[0][: len(dense[0]), : len(dense[0])]]
    off = sum(np.sum((a - b) ** 2) for a, b in zip(mine, dense, strict=True))
    return float((off / sum(np.sum(b**2) for b in dense)) ** 0.5)


def square(gram, n, c):
    """(N C, N C), rows by sample and then by output, whatever order it came in."""
    if gram.ndim == 4 and gram.shape == (n, n, c, c):
        gram = gram.transpose(0, 2, 1, 3)
    return gram.reshape(n * c, n * c)


# --- All of it ------------------------------------------------------------------------


def machine():
    """The processor, by its own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [n.split(":")[1].strip() for n in lines if n.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def images(work):
    sys.path.insert(0, str(ROOT))
    import ngdcore as ngd

    x = ngd.data.mnist(n_train=2000, n_test=1, norm="sqrt_d").x
    np.save(Path(work) / "images.npy", x.numpy())


def keep(results):
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")


def tell(name, found):
    base = found["libraries"]["ngdcore"]["seconds"]
    for library, f in found["libraries"].items():
        words = f.get("why") or (
            f"{f['seconds']:9.4f} s ({f['seconds'] / base:7.2f}), error"
            f" {f['error']:.1e}, {f['extra_mb']:6.0f} MB more, {f['blocks']} blocks"
        )
        print(f"{name:22} {library:16} {words}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", choices=[*WORKLOADS, []])
    parser.add_argument("--folder", type=Path, default=ROOT / "_build" / "bench")
    options = parser.parse_args()
    folder = options.folder
    install(folder)
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"workloads": {}}
    results = {
        "machine": machine(),
        "threads": 1,
        "date": date.today().isoformat(),
        "versions": versions(folder),
        "workloads": old["workloads"],
    }
    with tempfile.TemporaryDirectory() as work:
        images(work)
        for name in options.workloads or WORKLOADS:
            found = measure(folder, work, name)
            results["workloads"][name] = WORKLOADS[name] | found
            keep(results)
            tell(name, found)


if __name__ == "__main__":
    main()
