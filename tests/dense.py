"""Dense references: Jacobians by torch.func.jacrev, Fisher matrices by Kronecker products. No call into ngdcore."""

import torch
from torch.func import functional_call, jacrev


def jacobian(net, x) -> list[torch.Tensor]:
    """One (NC, P_l) block a trained linear layer, weight before bias, rows sample-major."""
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    J = jacrev(lambda p: functional_call(net, p, (x,)).flatten())(trained)
    layers = {}
    for name in trained:
        layers.setdefault(name.rsplit(".", 1)[0], []).append(J[name].reshape(len(J[name]), -1))
    return [torch.cat(parts, 1).detach() for parts in layers.values()]


def layer_wise_fisher(blocks, sigma, n) -> torch.Tensor:
    """(1/N) S^T (Sigma x I) S with S = blockdiag(J_1, ..., J_L)."""
    S = torch.block_diag(*blocks)
    eye = torch.eye(len(blocks[0]), dtype=S.dtype)
    return S.T @ torch.kron(sigma.to(S), eye) @ S / n


def layer_signals(net, x):
    """Inputs (biases as a last column) and output-gradients of every layer of an MLP, by autograd."""
    h, pre, H = x, [], []
    for module in net:
        if hasattr(module, "weight_scale"):
            columns = [module.weight_scale * h]
            if module.bias is not None:
                columns.append(torch.full((len(h), 1), module.bias_scale, dtype=h.dtype))
            H.append(torch.cat(columns, 1).detach())
            h = module(h)
            pre.append(h)
        else:
            h = module(h)
    rows = [torch.autograd.grad(f, pre, retain_graph=True) for f in h.flatten()]
    c = h.shape[1]
    D = [torch.stack([row[l][k // c] for k, row in enumerate(rows)]) for l in range(len(pre))]
    return H, D


def kfac(net, x, other, damping=0.0):
    """(1/N) J' F^+ J^T with F_l = D^T D/N x H^T H/N, each factor plus the root of the damping: Kronecker products."""
    (H, D), (H_other, D_other) = layer_signals(net, x), layer_signals(net, other)
    n, c, total = len(x), len(D[0]) // len(x), 0.0
    for l in range(len(H)):
        J, J_other = (
            torch.einsum("kp,kq->kpq", d, h.repeat_interleave(c, 0)).flatten(1)
            for d, h in ((D[l], H[l]), (D_other[l], H_other[l]))
        )
        root = damping**0.5
        B, A = (m.T @ m / n + root * torch.eye(m.shape[1], dtype=m.dtype) for m in (D[l], H[l]))
        total = (
            total + J_other @ torch.kron(torch.linalg.pinv(B, rtol=1e-12), torch.linalg.pinv(A, rtol=1e-12)) @ J.T / n
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
