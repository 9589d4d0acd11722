r"""The slow, obvious twins: Jacobians, layer signals and Fisher matrices as dense
matrices, for nets so small that one may form them.

Nothing here knows the rest of the package: Jacobians come from ``torch.func.jacrev``,
signals from autograd at hooked layers, Fishers from Kronecker products, inverses from
``torch.linalg.pinv``. Every twin takes a net whose trained parameters are weights and
biases of ``nn.Linear`` layers, training rows ``x`` (N rows), and returns
:math:`Q = \frac1N J(x') (F + \rho I)^+ J(x)^\top`, (rows C, N C), sample-major.
``rows`` are the inputs :math:`x'`, the training rows if not given; ``R`` (N, k, C)
weights the training rows' outputs (N C becomes N k)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev

__all__ = [
    "jacobian",
    "layer_signals",
    "weight_jacobians",
    "layer_wise_fisher",
    "coefficient",
    "exact",
    "layer_wise",
    "kfac",
    "tridiagonal_kfac",
    "unit_wise",
    "diagonal",
    "quasi_diagonal",
    "relative",
]

CUT = 1e-11  # eigenvalues below this, of the largest, are zeros


# ------------------------------------------------------------- Jacobians and signals


def jacobian(
    net: nn.Module, x: Tensor, R: Tensor | None = None
) -> list[Float[Tensor, "NC _P"]]:
    """One block (NC, P_l) a trained layer, its weight's columns before its bias's.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net, x = ngd.models.MLP([3, 4, 2], seed=0), ngd.data.gaussian(5, 3)
    >>> [tuple(J.shape) for J in ngd.dense.jacobian(net, x)]
    [(10, 12), (10, 8)]
    """
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    J = jacrev(lambda p: functional_call(net, p, (x,)).flatten())(trained)
    layers = {}
    for name in trained:
        block = J[name].reshape(len(J[name]), -1).detach()
        layers.setdefault(name.rpartition(".")[0], []).append(block)
    return [_weighted(torch.cat(parts, 1), R) for parts in layers.values()]


def layer_signals(
    net: nn.Module, x: Tensor, R: Tensor | None = None
) -> tuple[list[Float[Tensor, "N _inputs"]], list[Float[Tensor, "NC _units"]]]:
    """Inputs of every trained layer (a trained bias is a last column), and the
    gradients of all outputs at its units.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net, x = ngd.models.MLP([3, 4, 2], seed=0), ngd.data.gaussian(5, 3)
    >>> H, D = ngd.dense.layer_signals(net, x)
    >>> [tuple(h.shape) for h in H], [tuple(d.shape) for d in D]
    ([(5, 3), (5, 4)], [(10, 4), (10, 2)])
    """
    layers = [
        m
        for m in net.modules()
        if isinstance(m, nn.Linear) and any(p.requires_grad for p in m.parameters())
    ]
    inputs, units = {}, {}

    def hook(layer, args, out):
        inputs[layer] = args[0].detach().clone()
        units[layer] = out.clone()  # an in-place activation would overwrite it
        return units[layer]

    handles = [layer.register_forward_hook(hook) for layer in layers]
    with torch.enable_grad():
        f = net(x)
    for handle in handles:
        handle.remove()
    at = [units[layer] for layer in layers]
    gradients = [torch.autograd.grad(y, at, retain_graph=True) for y in f.flatten()]
    c = f.shape[1]
    D = [
        torch.stack([rows[l][k // c] for k, rows in enumerate(gradients)])
        for l in range(len(layers))
    ]
    H = [_columns(layer, inputs[layer]) for layer in layers]
    return H, [_weighted(d, R) for d in D]


def _columns(
    layer: nn.Linear, h: Float[Tensor, "N units"]
) -> Float[Tensor, "N inputs"]:
    """The layer's inputs with its scales, and ones for its bias: what is trained."""
    parts = []
    if layer.weight.requires_grad:
        parts.append(getattr(layer, "weight_scale", 1.0) * h)
    if layer.bias is not None and layer.bias.requires_grad:
        parts.append(h.new_full((len(h), 1), getattr(layer, "bias_scale", 1.0)))
    return torch.cat(parts, 1)


def _weighted(M: Float[Tensor, "NC p"], R: Tensor | None) -> Float[Tensor, "Nk p"]:
    """R (N, k, C) times each sample's rows."""
    if R is None:
        return M
    return (R @ M.view(len(R), -1, M.shape[1])).flatten(0, 1)


def weight_jacobians(
    net: nn.Module, x: Tensor, R: Tensor | None = None
) -> list[Float[Tensor, "NC _units _inputs"]]:
    """One block (NC, M_out, M_in) a trained layer, from its signals: the bias is the
    last input.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net, x = ngd.models.MLP([3, 4, 2], seed=0), ngd.data.gaussian(5, 3)
    >>> J = ngd.dense.weight_jacobians(net, x)
    >>> torch.allclose(J[0].flatten(1), ngd.dense.jacobian(net, x)[0])
    True
    """
    H, D = layer_signals(net, x, R)
    return [
        torch.einsum("kp,kq->kpq", d, h.repeat_interleave(len(d) // len(h), 0))
        for d, h in zip(D, H)
    ]


def _pairs(net, x, rows, R):
    """Each layer's `weight_jacobians` at rows and at the training rows."""
    J = weight_jacobians(net, x, R)
    return zip(J if rows is None else weight_jacobians(net, rows), J)


# ------------------------------------------------------------------- whole matrices


def layer_wise_fisher(
    blocks: list[Float[Tensor, "NC _P"]], sigma: Tensor, n: int
) -> Float[Tensor, "P P"]:
    r"""The layer-wise :math:`F = \frac1N S^\top (\Sigma \otimes I) S` with
    :math:`S = \mathrm{blockdiag}(J_1, \dots, J_L)`.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net, x = ngd.models.MLP([3, 4, 2], seed=0), ngd.data.gaussian(5, 3)
    >>> J = ngd.dense.jacobian(net, x)
    >>> ngd.dense.layer_wise_fisher(J, torch.eye(2), 5).shape
    torch.Size([20, 20])
    """
    S = torch.block_diag(*blocks)
    eye = torch.eye(len(blocks[0]), dtype=S.dtype, device=S.device)
    return S.T @ torch.kron(sigma.to(S), eye) @ S / n


def coefficient(
    J_rows: Float[Tensor, "RC p"],
    F: Float[Tensor, "p p"],
    J: Float[Tensor, "NC p"],
    n: int,
    damping: float = 0.0,
) -> Float[Tensor, "RC NC"]:
    r"""The coefficient matrix of any Fisher,
    :math:`\frac1N J' (F + \rho I)^+ J^\top`.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net, x = ngd.models.MLP([3, 9, 1], seed=0), ngd.data.gaussian(5, 3)
    >>> J = torch.cat(ngd.dense.jacobian(net, x), 1)
    >>> Q = ngd.dense.coefficient(J, J.T @ J / 5, J, 5)
    >>> torch.allclose(Q, torch.eye(5, dtype=Q.dtype))
    True
    """
    if damping:
        eye = torch.eye(len(F), dtype=F.dtype, device=F.device)
        return J_rows @ torch.linalg.solve(F + damping * eye, J.T) / n
    return J_rows @ torch.linalg.pinv(F, hermitian=True, rtol=CUT) @ J.T / n


def layer_wise(net, x, rows=None, damping=0.0, R=None, sigma=None):
    """Q of the layer-wise Fisher with the L x L matrix sigma.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net, x = ngd.models.MLP([3, 9, 1], seed=0), ngd.data.gaussian(5, 3)
    >>> Q = ngd.dense.layer_wise(net, x, sigma=torch.eye(2))
    >>> torch.allclose(Q, 2 * torch.eye(5, dtype=Q.dtype))
    True
    """
    blocks = jacobian(net, x, R)
    others = blocks if rows is None else jacobian(net, rows)
    F = layer_wise_fisher(blocks, sigma, len(x))
    J_rows, J = torch.cat(others, 1), torch.cat(blocks, 1)
    return coefficient(J_rows, F, J, len(x), damping)


def exact(net, x, rows=None, damping=0.0, R=None):
    """Q of the exact Fisher, (1/N) J^T J.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net, x = ngd.models.MLP([3, 9, 1], seed=0), ngd.data.gaussian(5, 3)
    >>> Q = ngd.dense.exact(net, x)
    >>> torch.allclose(Q, torch.eye(5, dtype=Q.dtype))
    True
    """
    layers = len(jacobian(net, x[:1]))
    return layer_wise(net, x, rows, damping, R, torch.ones(layers, layers))


# ------------------------------------------------------------- Kronecker-factored


def kfac(net, x, rows=None, damping=0.0, R=None, draws=None, variance=1.0):
    r"""Q of the blocks :math:`D^\top D/N \otimes H^\top H/N`, the root of damping on
    each factor.

    With ``draws`` (N, K, C) the backward factor is that of S = ``draws`` D, the
    residuals pulled back: :math:`S^\top S/NK`, over ``variance`` as the score is; and
    the whole block, like the loss, is over ``variance`` once.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net, x = ngd.models.MLP([3, 9, 1], seed=0), ngd.data.gaussian(3, 3)
    >>> Q = ngd.dense.kfac(net, x)
    >>> torch.allclose(Q, 4 * torch.eye(3, dtype=Q.dtype))  # N (L - 1) + 1
    True
    """
    H, D = layer_signals(net, x, R)
    S = [_weighted(d, draws) for d in D]
    count = len(x) if draws is None else len(x) * draws.shape[1]
    total = 0.0
    for h, s, (J_rows, J) in zip(H, S, _pairs(net, x, rows, R)):
        A = _factor(h, len(x), damping**0.5)
        B = _factor(s / variance**0.5, count, damping**0.5)
        inverse = torch.kron(_pinv(B), _pinv(A)) / variance
        total = total + J_rows.flatten(1) @ inverse @ J.flatten(1).T / len(x)
    return total


def _factor(M: Float[Tensor, "k m"], count: int, shift: float) -> Float[Tensor, "m m"]:
    return M.T @ M / count + shift * torch.eye(
        M.shape[1], dtype=M.dtype, device=M.device
    )


def _pinv(M: Float[Tensor, "m m"]) -> Float[Tensor, "m m"]:
    return torch.linalg.pinv(M, hermitian=True, rtol=1e-12)


def tridiagonal_kfac(net, x, rows=None, damping=1.0, R=None):
    """Q of K-FAC with a block-tridiagonal inverse: the chain's precision is the
    inverses of neighbouring pairs minus those of what two pairs share.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net, x = ngd.models.MLP([3, 5, 4, 1], seed=0), ngd.data.gaussian(4, 3)
    >>> Q = ngd.dense.tridiagonal_kfac(net, x, damping=0.1)
    >>> bool(torch.linalg.eigvalsh(Q)[0] > 0)
    True
    """
    (H, D), n, root = layer_signals(net, x, R), len(x), damping**0.5
    sizes = [h.shape[1] * d.shape[1] for h, d in zip(H, D)]
    ends = [sum(sizes[: l + 1]) for l in range(len(H))]

    def block(l, k):
        if l == k:
            return torch.kron(_factor(D[l], n, root), _factor(H[l], n, root))
        return torch.kron(D[l].T @ D[k] / n, H[l].T @ H[k] / n)

    precision = torch.zeros(ends[-1], ends[-1], dtype=x.dtype, device=x.device)
    for l in range(max(1, len(H) - 1)):
        low, pair = ends[l] - sizes[l], [l, l + 1][: len(H)]
        both = torch.cat([torch.cat([block(a, b) for b in pair], 1) for a in pair])
        precision[low:, low:][: len(both), : len(both)] += torch.linalg.inv(both)
        if l:
            shared = torch.linalg.inv(block(l, l))
            precision[low : ends[l], low : ends[l]] -= shared
    J_rows, J = (
        torch.cat([b.flatten(1) for b in parts], 1)
        for parts in zip(*_pairs(net, x, rows, R))
    )
    return J_rows @ precision @ J.T / n


# ------------------------------------------------------------------ within the units


def unit_wise(net, x, rows=None, damping=0.0, R=None):
    """Q of one block a unit, F_i = J_i^T J_i / N with J_i the unit's columns.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net, x = ngd.models.MLP([3, 8, 1], "tanh", seed=0), ngd.data.gaussian(3, 3)
    >>> Q = ngd.dense.unit_wise(net, x)
    >>> torch.allclose(Q, 9 * torch.eye(3, dtype=Q.dtype))
    True
    """
    total, n = 0.0, len(x)
    for J_rows, J in _pairs(net, x, rows, R):
        for unit in range(J.shape[1]):
            own = J[:, unit]
            F = own.T @ own / n
            total = total + coefficient(J_rows[:, unit], F, own, n, damping)
    return total


def diagonal(net, x, rows=None, damping=0.0, R=None):
    """Q of the diagonal alone: the sum over weights of J'_p J_p^T / N (F_pp + rho).

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net, x = ngd.models.MLP([3, 8, 1], seed=0), ngd.data.gaussian(3, 3)
    >>> ngd.dense.diagonal(net, x).shape
    torch.Size([3, 3])
    """
    total, n = 0.0, len(x)
    for J_rows, J in _pairs(net, x, rows, R):
        J_rows, J = J_rows.flatten(1), J.flatten(1)
        F = J.square().sum(0) / n + damping
        total = total + (J_rows * torch.where(F > 0, 1 / F, 0.0)) @ J.T / n
    return total


def quasi_diagonal(net, x, rows=None, damping=0.0, R=None):
    """Q of the quasi-diagonal: every weight's column freed of its unit's bias, by
    Gram-Schmidt; damping as sqrt(N rho) more rows of J, one a weight.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> net = ngd.models.MLP([3, 8, 1], bias_var=0.1, seed=0)
    >>> ngd.dense.quasi_diagonal(net, ngd.data.gaussian(3, 3)).shape
    torch.Size([3, 3])
    """
    total, shift = 0.0, len(x) * damping
    for J_rows, J in _pairs(net, x, rows, R):
        for unit in range(J.shape[1]):
            weights, bias = J[:, unit, :-1], J[:, unit, -1]
            corner = bias @ bias + shift
            if not corner > 0:  # the unit is dead
                continue
            slope = weights.T @ bias / corner
            free = weights - torch.outer(bias, slope)
            others = J_rows[:, unit, :-1] - torch.outer(J_rows[:, unit, -1], slope)
            squares = weights.square().sum(0)
            left = squares - slope * (weights.T @ bias) + shift
            scale = torch.where(left > 1e-12 * squares, 1 / left, 0.0)
            total = total + torch.outer(J_rows[:, unit, -1], bias) / corner
            total = total + (others * scale) @ free.T
    return total


def relative(a: Tensor, b: Tensor) -> float:
    """:math:`|a - b|/|b|` in the Frobenius norm.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> ngd.dense.relative(torch.tensor([1.5]), torch.tensor([1.0]))
    0.5
    """
    return float((a - b).norm() / b.norm())
