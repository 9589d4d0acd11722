"""ngdcore: exact and approximate natural gradients, seen in function space.

``signals`` take one forward and one backward sweep; ``kernels`` turn them (or a
recursion for infinite width) into factors; a ``fisher`` turns factors into a
coefficient matrix Q, and signals into a natural gradient."""

from . import (
    chapter,
    data,
    dense,
    dynamics,
    fisher,
    kernels,
    ledger,
    models,
    optim,
    plotting,
)
from .signals import signals

__version__ = "0.1.0"
__all__ = [
    "models",
    "data",
    "dense",
    "signals",
    "kernels",
    "fisher",
    "optim",
    "dynamics",
    "plotting",
    "chapter",
    "ledger",
]
