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


def coefficient(J_rows, F, J, n, damping=0.0) -> torch.Tensor:
    """(1/N) J' (F + rho)^+ J^T."""
    if damping:
        inverse = torch.linalg.inv(F + damping * torch.eye(len(F), dtype=F.dtype))
    else:
        inverse = torch.linalg.pinv(F, hermitian=True, rtol=1e-11)
    return J_rows @ inverse @ J.T / n


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())
