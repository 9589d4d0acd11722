"""Infinitely wide networks: the duals of activations, and the recursion over layers."""

from .duals import Dual, Hermite, Rectified, Shifted, dual_of
from .recursion import analytic, arc_cosine_gram

__all__ = [
    "Dual",
    "Hermite",
    "Rectified",
    "Shifted",
    "analytic",
    "arc_cosine_gram",
    "dual_of",
]
