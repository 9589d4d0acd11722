r"""The exact natural gradient of deep linear networks, in closed form."""

from ..solve import Inverse, pinv_of_rank
from .base import WeightSide

__all__ = ["DeepLinearExact"]


class DeepLinearExact(WeightSide):
    r"""The exact natural gradient of a deep linear net of any widths, by moving its
    first and last layer only.

    The map :math:`W = W_L \cdots W_1` can move along :math:`B X + Y A` with
    :math:`B = W_L \cdots W_2` and :math:`A = W_{L-1} \cdots W_1`, which span the other
    layers' moves. With :math:`X` the inputs (N x n_0), :math:`H = X A^\top`, and
    :math:`P_H = H H^+`, :math:`P_B = B B^+`,

    .. math:: dW_1^\top = X^+ (g - \tfrac12 P_H g) B^{+\top},
        \qquad dW_L^\top = H^+ (g - \tfrac12 g P_B),

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

    def _isotropic(self, layers):
        return 1.0

    def _inverse(self, sig, damping, generator=None):
        """From residuals (..., N, C) to the first and the last layer's moves."""
        _check(sig, damping)
        widths = [
            sig.layers[0].in_features,
            *(layer.out_features for layer in sig.layers),
        ]
        X, H = sig.H[0], sig.H[-1]
        B = sig.first.D[0]  # (C, M_1), the map behind the first layer
        X_inverse = pinv_of_rank(X, min(sig.n, widths[0]))
        H_inverse = pinv_of_rank(H, min(sig.n, *widths[:-1]))
        B_inverse = pinv_of_rank(B, min(widths[1:]))

        def apply(g):
            last = H_inverse @ g  # (..., M_in, C)
            first = (X_inverse @ (g - H @ last / 2) @ B_inverse.T).mT
            last = (last - last @ B_inverse.T @ B.T / 2).mT
            if len(sig.H) == 1:  # its first layer is its last
                return [first + last]
            return [first, *[None] * (len(sig.H) - 2), last]

        return Inverse(apply)


def _check(sig, damping) -> None:
    """Raise unless all of a linear net is trained, without biases or damping."""
    biased = any(H.shape[1] != layer.in_features for H, layer in zip(sig.H, sig.layers))
    frozen = not all(p.requires_grad for p in sig.net.parameters())
    if biased or frozen or not sig.linear:
        raise TypeError(
            "DeepLinearExact needs a net of linear layers only, all trained, without"
            " biases"
        )
    if damping:
        raise ValueError(
            f"damping={damping}: this step has no damped form; use KFAC, or a smaller"
            " learning rate"
        )
