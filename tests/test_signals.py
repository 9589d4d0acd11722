"""Signals of any module against autograd's dense Jacobian, and of nothing that only
looks like one.
"""

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import ngdcore as ngd
from ngdcore.dense import jacobian, relative

torch.set_num_threads(1)


def made(build):
    """A module in float64, its weights drawn from a seed of its own."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return build().double()


def frozen(module):
    return module.requires_grad_(False)


class Net(nn.Module):
    """Layers by name, and a forward given as a function of the net and x."""

    def __init__(self, forward, **layers):
        super().__init__()
        self._run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self._run(self, x)


def net(forward, a=(5, 6), b=(6, 6), c=(6, 3), **more):
    return Net(forward, a=nn.Linear(*a), b=nn.Linear(*b), c=nn.Linear(*c), **more)


# ------------------------------------------------------------------------- allowed


def residual(m, x):
    h = torch.relu(m.a(x))
    return m.c(F.layer_norm(h + F.gelu(m.b(h)), (6,)))


def in_place(m, x):
    h = m.a(x).relu_()
    h = F.relu(m.b(h), inplace=True)
    return m.c(h)


def overwritten(m, x):
    """h is overwritten after the layer that read it."""
    h = m.a(x)
    h += torch.tanh(m.b(h))
    return m.c(torch.tanh(h))


def dense_net(m, x):
    h = torch.cat([x, torch.tanh(m.a(x))], 1)
    return m.c(torch.cat([h, F.silu(m.b(h))], 1))


def frozen_middle(m, x):
    return m.c(m.prelu(m.norm(m.b(torch.tanh(m.a(x))))))


def sequential(*modules):
    return nn.Sequential(nn.Linear(5, 6), *modules, nn.Linear(6, 3))


def only(layer, weight):
    """A layer of which only the weight, or only the bias, is trained."""
    (layer.bias if weight else layer.weight).requires_grad_(False)
    return layer


ALLOWED = {
    "plain": lambda: sequential(nn.ReLU()),
    "one output": lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)),
    "bare": lambda: nn.Linear(5, 3),
    "bare, no bias": lambda: nn.Linear(5, 1, bias=False),
    "ngd MLP": lambda: ngd.models.MLP([5, 6, 7, 3], "tanh", 1.7, 0.3),
    "residual": lambda: net(residual),
    "residual, one output": lambda: net(residual, c=(6, 1)),
    "in place": lambda: net(in_place),
    "ReLU(inplace)": lambda: sequential(nn.ReLU(inplace=True)),
    "SiLU(inplace)": lambda: sequential(nn.SiLU(inplace=True)),
    "overwritten": lambda: net(overwritten),
    "concatenated": lambda: net(dense_net, b=(11, 4), c=(15, 3)),
    "gated": lambda: net(lambda m, x: m.c(torch.sigmoid(m.a(x)) * m.b(x)), b=(5, 6)),
    "two heads": lambda: net(
        lambda m, x: torch.cat([m.b(m.a(x)), m.c(m.a.weight.new_ones(len(x), 6))], 1)
    ),
    "Dropout in eval mode": lambda: sequential(nn.ReLU(), nn.Dropout(0.5)).eval(),
    "Dropout of nothing": lambda: sequential(nn.ReLU(), nn.Dropout(0.0)),
    "BatchNorm in eval mode": lambda: sequential(frozen(nn.BatchNorm1d(6))).eval(),
    "GroupNorm": lambda: sequential(nn.GroupNorm(2, 6, affine=False), nn.Tanh()),
    "softmax in between": lambda: sequential(nn.Softmax(1)),
    "frozen middle": lambda: net(
        frozen_middle,
        b=(6, 6),
        prelu=frozen(nn.PReLU()),
        norm=frozen(nn.LayerNorm(6)),
    ),
    "frozen first": lambda: nn.Sequential(
        frozen(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)
    ),
    "frozen last": lambda: nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), frozen(nn.Linear(6, 2))
    ),
    "half frozen": lambda: nn.Sequential(
        only(nn.Linear(5, 6), weight=False),
        nn.GELU(),
        only(nn.Linear(6, 4), weight=True),
        nn.Softplus(),
        nn.Linear(4, 3),
    ),
    "shared activation": lambda: (lambda phi: sequential(phi, nn.Linear(6, 6), phi))(
        nn.Tanh()
    ),
    "frozen convolution, flattened": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        frozen(nn.Conv1d(1, 2, 3)),
        nn.Flatten(),
        nn.Linear(6, 3),
    ),
    "nested": lambda: nn.Sequential(
        net(residual, c=(6, 6)), nn.Tanh(), nn.Linear(6, 3)
    ),
    "registered out of order": lambda: Net(
        lambda m, x: m.a(torch.tanh(m.b(x))), a=nn.Linear(6, 3), b=nn.Linear(5, 6)
    ),
    "container with a hook": lambda: hooked_container(sequential(nn.Tanh())),
    "Sequential with a skip": lambda: Skip(nn.Linear(5, 5), nn.Tanh()),
}


def hooked_container(module):
    module.register_forward_hook(lambda m, args, out: torch.sin(out))
    return module


class Skip(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def x_for(module, n=7, seed=1):
    return ngd.data.gaussian(n, 5, seed=seed)


def kernel_error(module, x):
    """|K - J J^T| / |J J^T| with J by torch.func.jacrev; infinite where that fails."""
    K = ngd.kernels.empirical(ngd.signals(module, x)).gram()
    try:
        J = torch.cat(jacobian(module, x), 1)
    except RuntimeError:
        return float("inf")
    return relative(K, J @ J.T)


@pytest.mark.parametrize("name", [name for name in ALLOWED if name != "overwritten"])
def test_any_module(name):
    """Kernel, blocks of it, vjp, jvp and weighted signals, to 1e-10."""
    module = made(ALLOWED[name])
    x, v = x_for(module), torch.linspace(-1, 1, 7, dtype=torch.float64)
    sig, J = ngd.signals(module, x), torch.cat(jacobian(module, x), 1)
    c = sig.c
    v = torch.outer(v, torch.arange(1.0, c + 1)).flatten().double()
    assert relative(sig.outputs, module(x).detach()) < 1e-14
    K = ngd.kernels.empirical(sig).gram()
    assert relative(K, J @ J.T) < 1e-10
    d = sig.vjp(v)
    assert relative(torch.cat([p.flatten() for p in d]), J.T @ v) < 1e-10
    assert relative(sig.jvp(d).flatten(), J @ (J.T @ v)) < 1e-10
    trained = [p for p in module.parameters() if p.requires_grad]
    assert list(map(id, sig.params)) == list(map(id, trained))
    R = torch.randn(7, max(1, c - 1), c, generator=torch.Generator().manual_seed(2))
    R, lazy = R.double(), ngd.signals(module, x, lazy=True)
    RJ = torch.block_diag(*R) @ J
    for weighted in (sig.weighted(R), lazy.weighted(R)):
        assert weighted.c == max(1, c - 1) and weighted.outputs.shape == (7, c)
        assert relative(ngd.kernels.empirical(weighted).gram(), RJ @ RJ.T) < 1e-10
        assert relative(weighted.jvp(d).flatten(), RJ @ (J.T @ v)) < 1e-10
    assert relative(torch.cat([p.flatten() for p in lazy.vjp(v)]), J.T @ v) < 1e-10
    other = x_for(module, 4, seed=3)
    J_other = torch.cat(jacobian(module, other), 1)
    cross = ngd.kernels.empirical(sig).cross(other).gram()
    assert relative(cross, J_other @ J.T) < 1e-10


def test_an_input_overwritten_after_its_layer():
    module, twin = made(ALLOWED["overwritten"]), made(lambda: net(overwritten))
    twin._run = lambda m, x: (lambda h: m.c(torch.tanh(h + torch.tanh(m.b(h)))))(m.a(x))
    J = torch.cat(jacobian(twin, x_for(twin)), 1)
    K = ngd.kernels.empirical(ngd.signals(module, x_for(module))).gram()
    assert relative(K, J @ J.T) < 1e-10


def test_checkpoints():
    module, x = (
        made(lambda: net(lambda m, x: m.c(torch.tanh(m.b(m.a(x)))))),
        x_for(None),
    )
    K = ngd.kernels.empirical(ngd.signals(module, x)).gram()
    module._run = lambda m, x: m.c(
        checkpoint(lambda u: torch.tanh(m.b(u)), m.a(x), use_reentrant=False)
    )
    again = ngd.kernels.empirical(ngd.signals(module, x)).gram()
    assert relative(again, K) < 1e-13


def test_images_and_wrappers():
    images = ngd.data.gaussian(6, 12).view(6, 1, 3, 4)
    flat = made(
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)
        )
    )
    assert kernel_error(flat, images) < 1e-10
    K = ngd.kernels.empirical(ngd.signals(flat, images)).gram()
    part = copy.deepcopy(flat)
    part[1] = torch.compile(part[1])
    whole = copy.deepcopy(flat)
    whole.compile()
    for wrapped in (
        torch.compile(flat),
        nn.DataParallel(flat),
        nn.DataParallel(torch.compile(flat)),
        torch.optim.swa_utils.AveragedModel(flat),
        part,
        whole,
    ):
        sig = ngd.signals(wrapped, images)
        assert relative(ngd.kernels.empirical(sig).gram(), K) < 1e-12


def test_many_outputs_in_chunks(monkeypatch):
    module, x = ngd.models.MLP([5, 6, 40], "tanh"), ngd.data.gaussian(3, 5)
    whole = ngd.signals(module, x).D
    room = sys.modules["ngdcore.signals"]  # the name in the package is the function
    monkeypatch.setattr(room, "CHUNK", 3 * 40 * 7)
    for D, parts in zip(whole, ngd.signals(module, x).D):
        assert relative(parts, D) < 1e-13


def test_linear_nets_have_one_set_of_output_gradients():
    x = ngd.data.gaussian(6, 5)
    deep = ngd.models.DeepLinear([5, 4, 3], seed=1)
    sig = ngd.signals(deep, x, lazy=True)
    assert sig.linear and sig.first.n == 1
    for D, one in zip(sig.D, sig.first.D):
        assert relative(one.repeat(6, 1), D) < 1e-14
    assert ngd.signals(nn.Sequential(nn.Flatten(), deep), x).linear
    for other in (sequential(nn.ReLU()), hooked_container(sequential()), net(residual)):
        late = ngd.signals(other.double(), x)
        assert not late.linear
        with pytest.raises(ValueError, match="linear layers"):
            late.first
    with torch.no_grad():
        deep[0].weight += 1
    with pytest.raises(ValueError, match="changed"):
        ngd.signals(deep, x).first and ngd.signals(deep, x) and sig.at(x)


def test_float32_and_no_grad():
    module = made(lambda: net(residual))
    K64 = ngd.kernels.empirical(ngd.signals(module, x_for(module))).gram()
    with torch.no_grad():
        x = x_for(module).float()
        sig = ngd.signals(module.float(), x, lazy=True)
        K32 = ngd.kernels.empirical(sig).gram()
    assert K32.dtype == torch.float32 and not K32.requires_grad
    assert relative(K32.double(), K64) < 1e-5
    half = ngd.signals(module.bfloat16(), x.bfloat16())
    assert half.D[0].dtype == torch.bfloat16


# ----------------------------------------------------------------------- pretenders


def tied_weight():
    module = sequential(nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    module[4].weight = module[2].weight
    return module


def tied_by_memory():
    """Two parameters, one memory; double() would part them."""
    module = tied_weight().double()
    module[4].weight = nn.Parameter(module[2].weight.data)
    return module


def overlapping():
    module = sequential(nn.Tanh(), nn.Linear(6, 6), nn.Tanh()).double()
    both = torch.randn(60, dtype=torch.float64)
    module[0].weight = nn.Parameter(both[:30].view(6, 5))
    module[2].weight = nn.Parameter(both[24:].view(6, 6))
    return module


def tied_bias():
    module = sequential(nn.Tanh(), nn.Linear(6, 6))
    module[2].bias = module[0].bias
    return module


def patched(layer=None):
    module = sequential(nn.Tanh())
    layer = module[0]
    layer.forward = lambda h: torch.sin(h) @ layer.weight.T
    return module


class Scaled(nn.Linear):
    def forward(self, h):
        return super().forward(2 * h)


class Adapted(nn.Linear):
    """Low-rank parameters beside the weight, as loralib has them."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.left = nn.Parameter(torch.randn(self.out_features, 1))
        self.right = nn.Parameter(torch.randn(1, self.in_features))
        self.weight.requires_grad_(False)

    def forward(self, h):
        return super().forward(h) + h @ self.right.T @ self.left.T


def with_hook(register, hook):
    module = sequential(nn.Tanh())
    getattr(module[0], register)(hook)
    return module


def bias_alone(layer):
    frozen(layer.parametrizations)
    return layer


def uses_weight_again(m, x):
    return m.c(torch.tanh(m.b(torch.tanh(m.a(x))) + F.linear(x, m.a.weight)))


def penalised(m, x):
    h = torch.tanh(m.a(x))
    return m.c(h) + m.b.weight.square().sum() + m.b(h)[:, :3]


def batch_attention(m, x):
    h = m.a(x)
    return m.c(torch.softmax(h @ h.T, 1) @ m.b(h))


def folded(m, x):
    """Two samples in one row, and as many rows as samples again."""
    h = torch.tanh(m.a(x))
    return m.c(torch.tanh(m.b(h.T.reshape(len(x), 6))))


def first_only(m, x):
    h = m.b(torch.tanh(m.a(x)))
    return m.c(torch.cat([h[:1] + h[1:2], h[1:]]))


def secretly(h):
    """The values of h, with a gradient that carries the batch's mean."""
    return h + (h.mean(0) - h.mean(0).detach())


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, h):
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h - self.mean


class Remembering(nn.Module):
    """State that is no buffer."""

    last = 0.0

    def forward(self, h):
        self.last = self.last + 1.0
        return h * self.last


def called_twice(m, x):
    return m.c(m.b(torch.tanh(m.b(m.a(x)))))


def other_weights(m, x):
    weights = {"weight": m.b.weight * 2, "bias": m.b.bias}
    return m.c(torch.func.functional_call(m.b, weights, (m.a(x),)))


def detached(m, x):
    return m.c(m.b(m.a(x).detach()))


def without_grad(m, x):
    with torch.no_grad():
        h = m.a(x)
    return m.c(m.b(h))


def reentrant(m, x):
    return m.c(checkpoint(m.b, m.a(x), use_reentrant=True))


def decaying(m, x):
    with torch.no_grad():
        m.a.weight.mul_(0.999)
    return m.c(m.b(m.a(x)))


def rarely(m, x):
    h = m.a(x)
    return m.c(m.b(h) * 0 + h if torch.rand(()) < 0.001 else m.b(h))


def clipped(m, x):
    h = m.b(torch.tanh(m.a(x)))
    h.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    return m.c(h)


def inferring(m, x):
    with torch.inference_mode():
        h = torch.tanh(x)
    return m.c(m.b(m.a(h)))


def rows_sorted(m, x):
    order = x[:, 0].argsort()
    return m.c(torch.tanh(m.b(torch.tanh(m.a(x))[order]))[order.argsort()])


def experts(m, x):
    h, first = torch.tanh(m.a(x)), x[:, 0] > 0
    out = torch.zeros_like(h).index_put((first,), m.b(h[first]))
    return m.c(out)


class Bent(torch.autograd.Function):
    """Does nothing forward; bends gradients of some sizes backward."""

    @staticmethod
    def forward(ctx, h, bend):
        ctx.bend = bend
        return h.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.bend(grad), None


def bent(bend):
    return lambda: net(lambda m, x: m.c(Bent.apply(m.b(torch.tanh(m.a(x))), bend)))


def large_batches(m, x):
    h = torch.tanh(m.a(x))
    return m.c(m.b(h - 1e-3 * h.mean(0) if len(x) > 64 else h))


def forty_rows_on(m, x):
    h = torch.tanh(m.a(x))
    return m.c(m.b(h + 1e-3 * torch.cat([h[40:], torch.zeros_like(h[:40])])))


def largest(m, x):
    h = torch.tanh(m.a(x))
    return m.c(m.b(h / h.detach().abs().max()))


def three_best(m, x):
    best = x[:, :1] >= x[:, 0].topk(3).values[-1]
    return m.c(torch.tanh(m.b(m.a(x))) * best)


def through_data(m, x):
    h = torch.tanh(m.a(x))
    u = m.b(h)
    h.data.mul_(1.001)  # what b has read, and its gradient will read
    return m.c(u)


def a_root_of_zero(m, x):
    return m.c(torch.sqrt(m.b(torch.tanh(m.a(x))) * 0))


def expanded(key):
    module = sequential(nn.Tanh()).double()
    param = getattr(module[0], key)
    setattr(module[0], key, nn.Parameter(param[:1].detach().expand(param.shape)))
    return module


class Remembered(nn.Module):
    mean = None

    def forward(self, h):
        self.mean = h.mean(0) if self.mean is None else self.mean
        return h - self.mean


PRETENDERS = {
    "tied weight": (tied_weight, "tied"),
    "tied by memory": (tied_by_memory, "tied"),
    "overlapping memory": (overlapping, "tied"),
    "tied bias": (tied_bias, "tied"),
    "called twice": (lambda: net(called_twice), "twice"),
    "never called": (lambda: net(lambda m, x: m.c(m.a(x))), "never called"),
    "outside of a layer": (
        lambda: net(
            lambda m, x: m.c(m.a(x)) * m.gain,
            b=(1, 1),
            gain=nn.Parameter(torch.ones(3)),
        ),
        "net.gain",
    ),
    "LayerNorm with weights": (lambda: sequential(nn.LayerNorm(6)), "LayerNorm"),
    "PReLU": (lambda: sequential(nn.PReLU()), "PReLU"),
    "convolution": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(6, 3)
        ),
        "Conv1d",
    ),
    "bilinear": (
        lambda: Net(lambda m, x: m.a(x, x), a=nn.Bilinear(5, 5, 3)),
        "Bilinear",
    ),
    "weight_norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 3))),
        "weight_norm|parametri|ParametrizationList",
    ),
    "bias beside a parametrised weight": (
        lambda: bias_alone(parametrizations.spectral_norm(nn.Linear(5, 3))),
        "parametrised",
    ),
    "weight_norm of old": (lambda: nn.Sequential(weight_norm(nn.Linear(5, 3))), ""),
    "spectral_norm of old": (lambda: nn.Sequential(spectral_norm(nn.Linear(5, 3))), ""),
    "pruned": (
        lambda: nn.Sequential(
            prune.random_unstructured(nn.Linear(5, 3), "weight", amount=0.5)
        ),
        "hook",
    ),
    "subclass": (lambda: nn.Sequential(Scaled(5, 3)), "forward of its own"),
    "instance's own forward": (patched, "forward of its own"),
    "low-rank adapter": (lambda: nn.Sequential(Adapted(5, 3)), "0"),
    "forward hook": (
        lambda: with_hook("register_forward_hook", lambda m, a, out: 2 * out),
        "hook",
    ),
    "forward pre-hook": (
        lambda: with_hook("register_forward_pre_hook", lambda m, args: (2 * args[0],)),
        "hook",
    ),
    "backward hook": (
        lambda: with_hook(
            "register_full_backward_hook", lambda m, gi, go: (2 * gi[0],)
        ),
        "hook",
    ),
    "weight used again": (lambda: net(uses_weight_again), "a.weight"),
    "penalty in the outputs": (lambda: net(penalised), "b.weight"),
    "other weights": (lambda: net(other_weights), "b.weight"),
    "sequences": (
        lambda: Net(lambda m, x: m.a(x[:, :, None]).sum(1), a=nn.Linear(1, 3)),
        "row a sample",
    ),
    "sequences, flattened": (
        lambda: Net(
            lambda m, x: m.a(x.reshape(-1, 1)).view(len(x), 5, 3).sum(1),
            a=nn.Linear(1, 3),
        ),
        "row a sample",
    ),
    "BatchNorm": (lambda: sequential(nn.BatchNorm1d(6, affine=False)), "BatchNorm1d"),
    "BatchNorm without statistics": (
        lambda: sequential(
            nn.BatchNorm1d(6, affine=False, track_running_stats=False)
        ).eval(),
        "BatchNorm1d",
    ),
    "mean over the batch": (
        lambda: net(
            lambda m, x: m.c((lambda h: m.b(h - h.mean(0)))(torch.tanh(m.a(x))))
        ),
        "batch",
    ),
    "mean over the batch, detached": (
        lambda: net(lambda m, x: m.c((lambda h: m.b(h - h.detach().mean(0)))(m.a(x)))),
        "batch",
    ),
    "softmax over the batch": (
        lambda: net(lambda m, x: m.c(torch.softmax(m.b(m.a(x)), 0))),
        "batch",
    ),
    "attention over the batch": (lambda: net(batch_attention), "batch"),
    "cumulative sum": (lambda: net(lambda m, x: m.c(m.b(m.a(x)).cumsum(0))), "batch"),
    "rows shifted": (lambda: net(lambda m, x: m.c(m.b(m.a(x).roll(1, 0)))), "batch"),
    "rows folded": (lambda: net(folded), "batch"),
    "two rows only": (lambda: net(first_only), "batch|see one another|on their own"),
    "batch in the gradient alone": (
        lambda: net(lambda m, x: m.c(secretly(m.b(m.a(x))))),
        "see one another",
    ),
    "outputs of the batch": (
        lambda: net(lambda m, x: (lambda f: f - f.mean(0))(m.c(m.b(m.a(x))))),
        "batch",
    ),
    "Dropout": (lambda: sequential(nn.ReLU(), nn.Dropout(0.5)), "Dropout"),
    "dropout, a function": (
        lambda: net(lambda m, x: m.c(F.dropout(m.b(m.a(x)), 0.5))),
        "random",
    ),
    "noise": (lambda: net(lambda m, x: m.c(m.b(m.a(x)) * torch.rand(6))), "random"),
    "RReLU": (lambda: sequential(nn.RReLU()), "RReLU"),
    "a buffer that is written": (lambda: sequential(Counting()), "mean"),
    "a weight that is written": (lambda: net(decaying), "a.weight"),
    "drops a layer, rarely": (lambda: net(rarely), "random"),
    "gradients clipped": (lambda: net(clipped), "gradients"),
    "inference mode inside": (lambda: net(inferring), "inference_mode"),
    "rows sorted and put back": (lambda: net(rows_sorted), "see one another"),
    "experts": (lambda: net(experts), "row a sample"),
    "shallow copy of a layer": (
        lambda: (lambda layer: nn.Sequential(layer, nn.Tanh(), copy.copy(layer)))(
            nn.Linear(5, 5)
        ),
        "tied",
    ),
    "transposed weight": (
        lambda: Net(lambda m, x: F.linear(m.a(x), m.a.weight.T), a=nn.Linear(5, 6)),
        "a.weight",
    ),
    "statistics of the first batch": (
        lambda: sequential(Remembered()),
        "batch|another gradient",
    ),
    "mapped over rows": (
        lambda: Net(lambda m, x: torch.vmap(m.a)(x), a=nn.Linear(5, 3)),
        "row a sample|shape",
    ),
    "gradients clipped, if large": (bent(lambda g: g.clamp(-50, 50)), "clips"),
    "gradients cut, if small": (
        bent(lambda g: torch.where(g.abs() < 1e-4, 0.0, g)),
        "clips",
    ),
    "clipped by norm": (bent(lambda g: g / g.norm().clamp_min(100)), "clips"),
    "large batches": (lambda: net(large_batches), "see one another"),
    "forty rows on": (lambda: net(forty_rows_on), "see one another"),
    "over the largest, detached": (lambda: net(largest), "see one another"),
    "the three best rows": (lambda: net(three_best), "see one another"),
    "an input written through .data": (lambda: net(through_data), "data"),
    "infinite gradients": (lambda: net(a_root_of_zero), "root"),
    "infinite inputs": (
        lambda: net(lambda m, x: m.c(torch.tanh(m.b(torch.exp(1e5 * m.a(x)))))),
        "overflow|NaN",
    ),
    "tied by expansion, weight": (lambda: expanded("weight"), "expanded"),
    "tied by expansion, bias": (lambda: expanded("bias"), "expanded"),
    "no outputs": (lambda: net(lambda m, x: m.c(m.b(m.a(x)))[:, :0]), "C >= 1"),
    "outputs turned round": (
        lambda: net(lambda m, x: m.c(m.b(m.a(x))).flip(0)),
        "batch",
    ),
    "state": (lambda: sequential(Remembering()), "state"),
    "input overwritten": (
        lambda: net(lambda m, x: m.c(m.b(m.a(x.mul_(2))))),
        "its input x",
    ),
    "detached": (lambda: net(detached), "do not depend on a"),
    "no_grad inside": (lambda: net(without_grad), "no_grad"),
    "all detached": (lambda: net(lambda m, x: m.c(m.b(m.a(x))).detach()), "gradient"),
    "reentrant checkpoint": (lambda: net(reentrant), ""),
    "one-dimensional outputs": (
        lambda: net(lambda m, x: m.c(m.b(m.a(x)))[:, 0]),
        "N, C",
    ),
    "a pair": (lambda: net(lambda m, x: (m.c(m.b(m.a(x))), 0)), "tuple"),
    "a dictionary": (lambda: net(lambda m, x: {"f": m.c(m.b(m.a(x)))}), "dict"),
    "one row of outputs": (lambda: net(lambda m, x: m.c(m.b(m.a(x)))[:1]), "N, C"),
    "mixed dtypes": (lambda: mixed(), "torch.float32"),
    "bias that is broadcast": (lambda: broadcast(), "broadcast"),
    "transformer": (
        lambda: Net(
            lambda m, x: m.c(m.t(m.a(x)[:, None])[:, 0]),
            a=nn.Linear(5, 6),
            t=nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0),
            c=nn.Linear(6, 3),
        ),
        "in_proj_weight",
    ),
    "recurrent": (
        lambda: Net(lambda m, x: m.r(x[:, None])[0][:, 0], r=nn.RNN(5, 3)),
        "weight_ih",
    ),
    "not initialised": (lambda: nn.Sequential(nn.LazyLinear(3)), "forward pass"),
    "scripted": (
        lambda: torch.jit.trace(nn.Linear(5, 3), torch.ones(2, 5)),
        "scripted",
    ),
    "trains nothing": (lambda: frozen(nn.Linear(5, 3)), "trains nothing"),
    "undrawn layer": (lambda: ngd.models.Linear(5, 3), "holds NaN"),
    "complex": (
        lambda: net(lambda m, x: m.c(m.b(m.a(x))).to(torch.complex128)),
        "N, C",
    ),
}


def mixed():
    module = net(lambda m, x: m.c(m.b(m.a(x).float()).double())).double()
    module.b.float()
    return Keep(module)


class Keep(nn.Sequential):
    """Keeps its dtypes."""

    def double(self):
        return self


def broadcast():
    module = nn.Linear(5, 3)
    module.bias = nn.Parameter(torch.ones(1))
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PRETENDERS)
def test_a_pretender_is_named(name):
    """Each raises, every time; none gives a kernel that is off by more than 1e-6."""
    build, says = PRETENDERS[name]
    module = made(build) if not name.startswith("tied by") else build()
    x = x_for(module, 100 if name in ("large batches", "forty rows on") else 7)
    for lazy in (False, True, False):
        with pytest.raises((TypeError, ValueError), match=says):
            ngd.signals(module, x, lazy)
    try:
        assert kernel_error(module, x) < 1e-6
    except (TypeError, ValueError):
        pass


def late_coupling(m, x):
    h = torch.tanh(m.a(x))
    return m.c(torch.tanh(m.b(h)) + (h - h.mean(0) if m.flag else h))


def test_a_verdict_holds_for_what_was_looked_at():
    """One row, another mode, another forward, another trained set: all looked at
    again.
    """
    module = made(lambda: net(lambda m, x: m.c(m.b(m.a(x) - m.a(x[:1]) * 0))))
    module._run = lambda m, x: m.c((lambda h: m.b(h - h.mean(0)))(torch.tanh(m.a(x))))
    x = x_for(module)
    ngd.signals(module, x[:1])  # one sample sees no other one
    with pytest.raises(TypeError, match="batch"):
        ngd.signals(module, x)

    module = made(lambda: net(late_coupling, flag=False))
    ngd.signals(module, x)
    module.flag = True
    seen = [True]
    for _ in range(3):  # no fact has changed, but sweeps 2, 4, 8, ... look again
        try:
            ngd.signals(module, x)
            seen.append(True)
        except TypeError:
            seen.append(False)
    assert not all(seen)


def test_a_verdict_holds_for_the_mode_and_the_trained_set():
    module = made(
        lambda: Net(
            lambda m, x: m.c((lambda h: h - h.mean(0) if m.training else h)(m.a(x))),
            a=nn.Linear(5, 6),
            c=nn.Linear(6, 3),
        )
    ).eval()
    x = x_for(module)
    for _ in range(3):
        assert kernel_error(module, x) < 1e-10
    with pytest.raises(TypeError, match="batch"):
        ngd.signals(module.train(), x)

    module = made(lambda: net(uses_weight_again))
    frozen(module.a)
    for _ in range(3):
        assert kernel_error(module, x) < 1e-10
    with pytest.raises(TypeError, match="a.weight"):
        ngd.signals(module.requires_grad_(True), x)


def test_a_zero_gradient_proves_nothing():
    """The last layer starts at zero: what lies before it is looked at when it moves."""
    module = made(
        lambda: net(lambda m, x: m.c(secretly(torch.tanh(m.b(m.a(x))))), c=(6, 1))
    )
    nn.init.zeros_(module.c.weight)
    x = x_for(module)
    for _ in range(5):
        assert kernel_error(module, x) < 1e-10
    nn.init.ones_(module.c.weight)
    with pytest.raises(TypeError, match="see one another"):
        ngd.signals(module, x)


# ------------------------------------------------------------------ stale signals


def edit_data(module):
    module.a.weight.data.clamp_(-0.2, 0.2)


def edit_in_place(module):
    with torch.no_grad():
        module.a.weight += 1e-9


def edit_frozen(module):
    module.b.weight.data.mul_(2)


def replace(module):
    module.a.weight = nn.Parameter(module.a.weight.detach() + 1)


def load(module):
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()})


def swap(module):
    module.a.weight.data = module.a.weight.data + 1


def edit_setting(module):
    module.slope.negative_slope = 0.5


@pytest.mark.parametrize(
    "edit", [edit_data, edit_in_place, edit_frozen, edit_setting, replace, load, swap]
)
def test_stale_signals(edit):
    module = made(lambda: net(residual, slope=nn.LeakyReLU(0.1)))
    frozen(module.b)
    x = x_for(module)
    lazy, eager = ngd.signals(module, x, lazy=True), ngd.signals(module, x)
    weighted = lazy.weighted(torch.ones(7, 1, 3, dtype=x.dtype))
    fac, v = ngd.kernels.empirical(eager), torch.ones(7, 3, dtype=x.dtype)
    before = fac.gram()
    edit(module)
    for use in (
        lambda: lazy.D,
        lambda: lazy.vjp(v),
        lambda: lazy.pull(v[:, None]),
        lambda: weighted.D,
        lambda: eager.at(x),
        eager.check,
        lambda: fac.cross(x),
        lambda: fac.cross(ngd.signals(module, x)),
    ):
        with pytest.raises(ValueError, match="changed|two networks"):
            use()
    assert torch.equal(fac.gram(), before)  # what is formed is a snapshot


def test_signals_of_another_net():
    x = x_for(None)
    module, other = made(lambda: net(residual)), made(lambda: net(residual))
    fac = ngd.kernels.empirical(ngd.signals(module, x))
    with pytest.raises(ValueError, match="two networks"):
        fac.cross(ngd.signals(other, x))
    weighted = ngd.signals(module, x).weighted(torch.ones(7, 1, 3, dtype=x.dtype))
    with pytest.raises(ValueError, match="outputs a sample"):
        fac.cross(weighted)


def test_one_entry_of_a_large_weight_through_data():
    module = ngd.models.MLP([5, 20000, 1])
    sig = ngd.signals(module, x_for(None))
    module[0].weight.data[7, 3] += 1
    with pytest.raises(ValueError, match="changed"):
        sig.at(x_for(None))


def counting(m, x):
    m.calls += 1
    return m.c(m.b(m.a(x)))


def test_settings_that_a_forward_changes_are_no_alarm():
    """A module that counts its calls is the same net after them, in either mode."""
    module, x = made(lambda: net(counting, calls=0)), x_for(None)
    sig = ngd.signals(module, x, lazy=True)
    twin = pickle.loads(pickle.dumps(sig))
    module.eval()
    assert sig.at(x).n == twin.at(x).n == 7


@pytest.mark.parametrize("frozen_first", [False, True])
@pytest.mark.parametrize("key", ["weight", "bias"])
def test_what_is_trained_is_that_of_the_signals(key, frozen_first):
    """Whatever is frozen, or freed, afterwards."""
    module, x = made(lambda: sequential(nn.Tanh())), x_for(None)
    param, v = getattr(module[0], key), torch.ones(21, dtype=torch.float64)
    param.requires_grad_(not frozen_first)
    sig = ngd.signals(module, x)
    before = sig.vjp(v)
    change = sig.jvp(before)
    param.requires_grad_(frozen_first)
    assert all(torch.equal(a, b) for a, b in zip(sig.vjp(v), before, strict=True))
    assert torch.equal(sig.jvp(before), change)


def test_rows_of_other_trained_layers():
    """Of equal sizes, so that nothing but their names could tell."""
    module = made(lambda: nn.Sequential(*[nn.Linear(5, 5) for _ in range(2)]))
    x = x_for(None)
    frozen(module[1])
    fac = ngd.kernels.empirical(ngd.signals(module, x))
    frozen(module[0]), module[1].requires_grad_(True)
    with pytest.raises(ValueError, match="two sets of trained"):
        fac.cross(x)


def test_the_callers_memory_is_his_own():
    """x may be used again, and a bias-free layer's H is not x itself, nor what the net
    keeps; lazy signals still know x.
    """
    module, x = nn.Linear(5, 2, bias=False).double(), x_for(None)
    sig, kept = ngd.signals(module, x), x.clone()
    x.zero_()
    assert torch.equal(sig.H[0], kept)

    store = [torch.zeros(1, 6, dtype=torch.float64)]
    layers = dict(a=frozen(nn.Linear(5, 6)), c=nn.Linear(6, 3, bias=False))
    module = made(lambda: Net(lambda m, x: m.c(store[0].copy_(m.a(x))), **layers))
    sig = ngd.signals(module, kept[:1])
    before = sig.H[0].clone()
    ngd.signals(module, kept[1:2])
    assert torch.equal(sig.H[0], before)

    gated, memory = made(lambda: net(lambda m, x: m.c(m.b(m.a(x))) * x[:, :3])), kept
    D = ngd.signals(gated, memory).D
    lazy = ngd.signals(gated, memory, lazy=True)
    memory.numpy()[:] = 0
    assert all(torch.equal(a, b) for a, b in zip(lazy.D, D))


# --------------------------------------------------------------- what is left behind


def hooks_of(module):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()
    )


@pytest.mark.parametrize("lazy", [False, True])
def test_nothing_is_left_behind(lazy):
    module = made(lambda: net(residual, drop=nn.Dropout(0.5)))
    module.drop.eval()
    x = x_for(module).requires_grad_()
    flags, state = [m.training for m in module.modules()], torch.get_rng_state()
    sig = ngd.signals(module, x, lazy)
    _ = sig.D
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in module.parameters()) and x.grad is None
    assert [m.training for m in module.modules()] == flags and not hooks_of(module)
    assert not any(t.requires_grad for t in (sig.outputs, *sig.H, *sig.D))
    assert torch.is_grad_enabled()


def test_nothing_is_left_behind_by_errors():
    def fails(m, x):
        m.c(m.b(m.a(x)))
        raise ZeroDivisionError

    module, x = made(lambda: net(fails)), x_for(None)
    with pytest.raises(ZeroDivisionError):
        ngd.signals(module, x)
    assert not hooks_of(module)
    module = made(lambda: net(lambda m, x: m.c(m.b(m.a(x)) * torch.rand(6))))
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        module(x)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        with pytest.raises(TypeError, match="random"):
            ngd.signals(module, x)
        assert torch.equal(torch.get_rng_state(), state)  # its own draws, none of ours
    assert not hooks_of(module)


def test_the_graph_and_the_net_are_let_go():
    module, x = made(lambda: net(residual)), x_for(None)
    sig, lazy = ngd.signals(module, x), ngd.signals(module, x, lazy=True)
    assert sig.sweep is None and lazy.sweep is not None
    _ = lazy.D
    assert lazy.sweep is None
    v = torch.ones(7, 2, 3, dtype=x.dtype)
    fresh = ngd.signals(module, x, lazy=True)
    for a, b in zip(fresh.pull(v), sig.pull(v)):
        assert relative(a, b) < 1e-13
    gone = weakref.ref(module)
    del module, sig, lazy, fresh
    gc.collect()
    assert gone() is None


def test_pickle_copy_and_repr():
    module, x = ngd.models.MLP([5, 6, 3], torch.sin), x_for(None)
    lazy = ngd.signals(module, x, lazy=True)
    assert repr(lazy) == "Signals(N=7, C=3, layers=2, torch.float64, lazy)"
    for twin in (pickle.loads(pickle.dumps(lazy)), copy.deepcopy(lazy)):
        assert repr(twin) == "Signals(N=7, C=3, layers=2, torch.float64)"
        assert all(torch.equal(a, b) for a, b in zip(twin.D, lazy.D))
        assert relative(twin.at(x).D[0], lazy.D[0]) < 1e-14
    module[0].weight.data.mul_(2)
    with pytest.raises(ValueError, match="changed"):
        copy.deepcopy(lazy).at(x)
    module = ngd.models.MLP([5, 6, 3])
    late = ngd.signals(module, x, lazy=True)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        late.D


def test_small_outputs_are_no_alarm():
    """A net minus itself at the start, in float32, at sweeps that look closely; and
    deep nets, whose rounding grows.
    """
    start = ngd.models.MLP([5, 300, 300, 3], dtype=torch.float32)
    module, x = copy.deepcopy(start), x_for(None).float()
    centred = Net(lambda m, x: m.now(x) - m.start(x), now=module, start=frozen(start))
    for _ in range(8):
        ngd.signals(centred, x)
        with torch.no_grad():
            module[0].weight[0] += 1e-6
    for phi in ("relu", "tanh", "erf", nn.GELU()):
        for weight_var in (0.5, 2.0, 10.0):
            deep = ngd.models.MLP(
                [5] + [100] * 30 + [2], phi, weight_var, dtype=torch.float32
            )
            for n in (1, 2, 7, 100):
                ngd.signals(deep, x_for(None, n).float())


# ------------------------------------------------------------------------ bad input


def test_signals_refuse():
    module, x = ngd.models.MLP([3, 4, 1]), ngd.data.gaussian(4, 3)
    broken = x.clone()
    broken[2, 1] = float("inf")
    for bad, says in (
        (x[:, :2], r"shape \(N, 3\), not \(4, 2\)"),
        (x[0], "shape"),
        (x[:, None], "shape"),
        (x[:0], "at least one row"),
        (x.float(), "float32"),
        (x.long(), "int64"),
        (broken, r"\[2\]; remove"),
        (x.to_sparse(), "to_dense"),
        (x.to("meta"), "meta"),
        ([1.0], "x must be"),
    ):
        with pytest.raises(ValueError, match=says):
            ngd.signals(module, bad)
    with pytest.raises(TypeError, match="nn.Module"):
        ngd.signals(x, module)
    with pytest.raises(ValueError, match="meta"):
        ngd.signals(nn.Linear(3, 1, device="meta"), x)


def test_signals_refuse_modes_without_autograd():
    module, x = ngd.models.MLP([3, 4, 1]), ngd.data.gaussian(4, 3)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        ngd.signals(module, x)
    with torch.inference_mode():
        inside, made_inside = nn.Linear(3, 1).double(), x.clone()
    with pytest.raises(ValueError, match="inference_mode"):
        ngd.signals(inside, x)
    assert (
        relative(ngd.signals(module, made_inside).D[0], ngd.signals(module, x).D[0])
        == 0
    )
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast"):
        ngd.signals(module, x)


def test_signals_refuse_misuse():
    module, x = ngd.models.MLP([3, 4, 2]), ngd.data.gaussian(2, 3)
    sig, one = ngd.signals(module, x), torch.ones(2, 2, 2, dtype=x.dtype)
    with pytest.raises(ValueError, match="trained parameters"):
        sig.jvp([torch.ones(3)])
    for bad in (one[:1], one[:, :, :1], one.repeat(1, 2, 1), one[0]):
        with pytest.raises(ValueError, match="R must"):
            sig.weighted(bad)


def test_signals_refuse_weights_of_other_shapes():
    module, x = ngd.models.MLP([3, 4, 2]), ngd.data.gaussian(2, 3)
    wide = ngd.signals(module, ngd.data.gaussian(3, 3))
    for bad, says in (
        (torch.ones(3), "shape"),
        (torch.ones(2, 3, dtype=x.dtype), "shape"),  # (C, N)
        ([torch.ones(2, 3, dtype=x.dtype)] * 2, "shape"),
        (torch.ones(3, 2), "float32"),
        ([torch.ones(3, 2, dtype=x.dtype)], "one a trained layer"),
    ):
        with pytest.raises(ValueError, match=says):
            wide.vjp(bad)
    v = torch.ones(3, 2, dtype=x.dtype)
    assert wide.vjp(v * torch.nan)[0].isnan().all(), "as linear maps do"
    d = wide.vjp(v)
    for out in (d[:1], [d[0].flatten()[:, None], *d[1:]]):
        with pytest.raises(ValueError, match="out must"):
            wide.vjp(v, out)
    with pytest.raises(ValueError, match="float32"):
        wide.jvp([part.float() for part in d])
    with pytest.raises(ValueError, match="NaN"):
        wide.weighted(torch.full((3, 1, 2), torch.nan, dtype=x.dtype))
    narrow = ngd.kernels.empirical(wide.weighted(torch.ones(3, 1, 2, dtype=x.dtype)))
    with pytest.raises(ValueError, match="outputs a sample"):
        narrow.cross(x)


# --------------------------------------------------------------------------- models


def test_activations_as_module_name_class_or_function():
    x = ngd.data.gaussian(3, 4)
    nets = [
        ngd.models.MLP([4, 5, 2], phi)
        for phi in ("tanh", nn.Tanh(), nn.Tanh, torch.tanh, lambda u: torch.tanh(u))
    ]
    for module in nets:
        assert torch.equal(module(x), nets[0](x))
        assert kernel_error(module, x) < 1e-12
    for bad in ("gelu", 3, nn.Linear(1, 1).weight):
        with pytest.raises(ValueError, match="'tanh'.*nn.GELU"):
            ngd.models.MLP([4, 5, 2], bad)


def test_maps_of_a_deep_linear_net():
    deep, x = (
        ngd.models.DeepLinear([4, 3, 5, 2], init="gaussian"),
        torch.eye(4).double(),
    )
    assert relative(deep.map() @ x, deep(x).T) < 1e-14
    for i, shape in enumerate([(3, 4), (5, 3), (2, 5)]):
        before, after = deep.before(i), deep.after(i)
        assert before.shape == (shape[1], 4) and after.shape == (2, shape[0])
        assert relative(after @ deep[i].weight @ before, deep.map()) < 1e-14
    assert torch.equal(deep.after(-1), torch.eye(2).double())
    with pytest.raises(ValueError, match="does not exist"):
        deep.before(3)


def test_a_layer_by_hand_draws_nothing_and_shows_it():
    state = torch.get_rng_state()
    layer = ngd.models.Linear(3, 2)
    assert layer.weight.isnan().all() and layer.bias.isnan().all()
    assert torch.equal(torch.get_rng_state(), state)
