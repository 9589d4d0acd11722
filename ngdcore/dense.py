"""Dense references: Jacobians by torch.func.jacrev, Fisher matrices by Kronecker
products. No call into ngdcore.
"""

import torch
from torch.func import functional_call, jacrev


def jacobian(net, x) -> list[torch.Tensor]:
    """One (NC, P_l) block a trained linear layer, weight before bias, rows
    sample-major.
    """
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    J = jacrev(lambda p: functional_call(net, p, (x,)).flatten())(trained)
    layers = {}
    for name in trained:
        layers.setdefault(name.rpartition(".")[0], []).append(
            J[name].reshape(len(J[name]), -1)
        )
    return [torch.cat(parts, 1).detach() for parts in layers.values()]


def layer_wise_fisher(blocks, sigma, n) -> torch.Tensor:
    """(1/N) S^T (Sigma x I) S with S = blockdiag(J_1, ..., J_L)."""
    S = torch.block_diag(*blocks)
    eye = torch.eye(len(blocks[0]), dtype=S.dtype)
    return S.T @ torch.kron(sigma.to(S), eye) @ S / n


def layer_signals(net, x):
    """Inputs (biases as a last column) and output-gradients of every layer of an MLP,
    by autograd.
    """
    h, pre, H = x, [], []
    for module in net:
        if hasattr(module, "weight_scale"):
            columns = [module.weight_scale * h]
            if module.bias is not None:
                columns.append(
                    torch.full((len(h), 1), module.bias_scale, dtype=h.dtype)
                )
            H.append(torch.cat(columns, 1).detach())
            h = module(h)
            pre.append(h)
        else:
            h = module(h)
    rows = [torch.autograd.grad(f, pre, retain_graph=True) for f in h.flatten()]
    c = h.shape[1]
    D = [
        torch.stack([row[l][k // c] for k, row in enumerate(rows)])
        for l in range(len(pre))
    ]
    return H, D


def kfac(net, x, other, damping=0.0):
    """(1/N) J' F^+ J^T with F_l = D^T D/N x H^T H/N, each factor plus the root of the
    damping: Kronecker products.
    """
    (H, D), (H_other, D_other) = layer_signals(net, x), layer_signals(net, other)
    n, c, total = len(x), len(D[0]) // len(x), 0.0
    for l in range(len(H)):
        J, J_other = (
            torch.einsum("kp,kq->kpq", d, h.repeat_interleave(c, 0)).flatten(1)
            for d, h in ((D[l], H[l]), (D_other[l], H_other[l]))
        )
        root = damping**0.5
        B, A = (
            m.T @ m / n + root * torch.eye(m.shape[1], dtype=m.dtype)
            for m in (D[l], H[l])
        )
        total = (
            total
            + J_other
            @ torch.kron(
                torch.linalg.pinv(B, rtol=1e-12), torch.linalg.pinv(A, rtol=1e-12)
            )
            @ J.T
            / n
        )
    return total


def coefficient(J_rows, F, J, n, damping=0.0) -> torch.Tensor:
    """(1/N) J' (F + rho)^+ J^T."""
    if damping:
        inverse = torch.linalg.inv(F + damping * torch.eye(len(F), dtype=F.dtype))
    else:
        inverse = torch.linalg.pinv(F, hermitian=True, rtol=1e-11)
    return J_rows @ inverse @ J.T / n


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


def weight_jacobians(net, x):
    """Per layer (NC, M_out, M_in) with the bias as the last input."""
    H, D = layer_signals(net, x)
    c = len(D[0]) // len(x)
    return [
        torch.einsum("kp,kq->kpq", d, h.repeat_interleave(c, 0)) for d, h in zip(D, H)
    ]


def unit_wise(net, x, other, damping=0.0):
    """(1/N) sum over units of J' (F_i + rho)^+ J^T, F_i = J_i^T J_i / N with J_i the
    unit's columns.
    """
    total, n = 0.0, len(x)
    for J, J_other in zip(weight_jacobians(net, x), weight_jacobians(net, other)):
        for i in range(J.shape[1]):
            total = total + coefficient(
                J_other[:, i], J[:, i].T @ J[:, i] / n, J[:, i], n, damping
            )
    return total


def diagonal(net, x, other, damping=0.0):
    """(1/N) sum over weights of J'_p J_p^T / (F_pp + rho)."""
    total, n = 0.0, len(x)
    for J, J_other in zip(weight_jacobians(net, x), weight_jacobians(net, other)):
        J, J_other = J.flatten(1), J_other.flatten(1)
        F = J.square().sum(0) / n + damping
        total = total + J_other @ torch.where(F > 0, 1 / F, 0.0).diag() @ J.T / n
    return total


def quasi_diagonal(net, x, other, damping=0.0):
    """Gram-Schmidt of every weight's column against its bias; damping as sqrt(N rho)
    more rows of J, one a weight.
    """
    total, n = 0.0, len(x)
    for J, J_other in zip(weight_jacobians(net, x), weight_jacobians(net, other)):
        for i in range(J.shape[1]):
            bias, bias_other = J[:, i, -1], J_other[:, i, -1]
            corner = bias @ bias + n * damping
            total = (
                total + torch.outer(bias_other, bias) / corner if corner > 0 else total
            )
            for j in range(J.shape[2] - 1):
                slope = (J[:, i, j] @ bias) / corner if corner > 0 else 0.0
                column, column_other = (
                    J[:, i, j] - slope * bias,
                    J_other[:, i, j] - slope * bias_other,
                )
                size = (
                    J[:, i, j] @ J[:, i, j] - slope * (J[:, i, j] @ bias) + n * damping
                )
                if size > 1e-12 * (J[:, i, j] @ J[:, i, j]):
                    total = total + torch.outer(column_other, column) / size
    return total


def tridiagonal_kfac(net, x, other, damping):
    """The chain's precision: inverses of neighbouring pairs minus those of what pairs
    share; no conditional blocks.
    """
    (H, D), n = layer_signals(net, x), len(x)
    root, depth = damping**0.5, len(H)

    def block(l, k):
        A, B = H[l].T @ H[k] / n, D[l].T @ D[k] / n
        if l == k:
            A, B = (
                A + root * torch.eye(len(A), dtype=A.dtype),
                B + root * torch.eye(len(B), dtype=B.dtype),
            )
        return torch.kron(B, A)

    sizes = [H[l].shape[1] * D[l].shape[1] for l in range(depth)]
    ends = [sum(sizes[: l + 1]) for l in range(depth)]
    P = torch.zeros(ends[-1], ends[-1], dtype=x.dtype)
    for l in range(depth - 1):
        low, high = ends[l] - sizes[l], ends[l + 1]
        pair = torch.cat(
            [
                torch.cat([block(l, l), block(l, l + 1)], 1),
                torch.cat([block(l + 1, l), block(l + 1, l + 1)], 1),
            ]
        )
        P[low:high, low:high] += torch.linalg.inv(pair)
        if l:
            P[low : ends[l], low : ends[l]] -= torch.linalg.inv(block(l, l))
    J, J_other = (
        torch.cat([b.flatten(1) for b in weight_jacobians(net, z)], 1)
        for z in (x, other)
    )
    return J_other @ P @ J.T / n
