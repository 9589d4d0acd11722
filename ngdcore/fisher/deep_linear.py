r"""The exact natural gradient of deep linear networks, in closed form."""

import torch
from torch import Tensor

from ..factors import Factors
from ..solve import Info, pinv_of_rank
from .base import Fisher, check_damping, check_residual

__all__ = ["DeepLinearExact"]


class DeepLinearExact(Fisher):
    r"""The exact natural gradient of a deep linear net of any widths, by moving its
    first and last layer only.

    The map :math:`W = W_L \cdots W_1` can move along :math:`B X + Y A` with
    :math:`B = W_L \cdots W_2` and :math:`A = W_{L-1} \cdots W_1`, which span the other
    layers' moves. With :math:`X` the inputs (N x n_0), :math:`H = X A^\top`, and
    :math:`P_H = H H^+`, :math:`P_B = B B^+`,

    .. math:: dW_1^\top = X^+ (g - \tfrac12 P_H g) B^{+\top}, \qquad dW_L^\top = H^+ (g - \tfrac12 g P_B),

    and together they push the residual to its projection on the range of the Jacobian,
    as every exact natural gradient does: contracting, expanding and bottleneck nets
    included, where block-wise pseudo-inverses do not.

    Raises
    ------
    TypeError
        In a solve, for a network with activations, biases or frozen layers.
    ValueError
        For damping: the step is exact or nothing.
    RankDeficient
        When A or B has lost rank: the net is at (or very near) a saddle.

    Notes
    -----
    Bernacchia, Lengyel & Hennequin (2018), eq. 10, repaired for narrow layers. On
    training rows Q is the orthogonal projection on the range of J; with fewer samples
    than inputs, test rows depend on the generalized inverse chosen.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> x = ngd.data.gaussian(9, 6)
    >>> sig = ngd.signals(ngd.models.DeepLinear([6, 4, 3, 2], seed=0), x)
    >>> d = ngd.fisher.DeepLinearExact().direction(sig, sig.outputs)
    >>> torch.allclose(sig.jvp(d), sig.outputs)
    True
    """

    def best_alpha(self, factors: Factors) -> float:
        return 1.0

    def coefficient(self, factors: Factors, damping: float = 0.0) -> Tensor:
        (_, X), (H, H_inverse), (B, B_inverse) = self._parts(
            factors.train.signals, damping
        )
        first, last, PB = (
            factors.signals.H[0] @ X,
            factors.signals.H[-1] @ H_inverse,
            B @ B_inverse,
        )
        first = first - first @ H @ H_inverse / 2
        return torch.kron(first, PB) + torch.kron(
            last, torch.eye(len(B), dtype=B.dtype, device=B.device) - PB / 2
        )

    def solve(self, sig, g, damping=0.0, out=None):
        g = check_residual(sig, g).view(sig.n, sig.c)
        (_, X), (H, H_inverse), (B, B_inverse) = self._parts(
            sig, check_damping(damping)
        )
        last = H_inverse @ g
        layers = [torch.zeros_like(layer.weight) for layer in sig.layers]
        layers[0] += (X @ (g - H @ last / 2) @ B_inverse.T).T
        layers[-1] += (last - last @ B_inverse.T @ B.T / 2).T
        return sig.pack(layers, out), Info(float("nan"), 0.0)

    def _parts(self, sig, damping):
        """Inputs of the first layer, of the last, and the map behind the first, each
        with its pseudo-inverse.
        """
        biased = sig is None or any(
            H.shape[1] != layer.in_features for H, layer in zip(sig.H, sig.layers)
        )
        if (
            biased
            or not sig.linear
            or not all(p.requires_grad for p in sig.net.parameters())
        ):
            raise TypeError(
                "DeepLinearExact needs a net of linear layers only, all trained, without biases"
            )
        if damping:
            raise ValueError(
                f"damping={damping}: this step has no damped form; use KFAC, or a smaller learning rate"
            )
        widths = [sig.layers[0].in_features] + [
            layer.out_features for layer in sig.layers
        ]
        B = sig.pull(
            torch.eye(sig.c, dtype=sig.outputs.dtype, device=sig.outputs.device)[None]
        )[0][0]
        ranks = min(sig.n, widths[0]), min(sig.n, *widths[:-1]), min(widths[1:])
        return [
            (M, pinv_of_rank(M, rank))
            for M, rank in zip((sig.H[0], sig.H[-1], B), ranks)
        ]
