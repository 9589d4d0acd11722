"""ngdcore: exact and approximate natural gradients, seen in function space.

``signals`` take one forward and one backward sweep; ``kernels`` turn them (or a
recursion for infinite width) into factors; a ``fisher`` turns factors into a
coefficient matrix Q, and signals into a natural gradient."""

from importlib import import_module

from . import data, dense, dynamics, fisher, kernels, models, optim
from .signals import signals
from .sweeps import sweep

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
    "sweep",
    "plotting",
    "opening",
    "chapter",
    "ledger",
]


def __getattr__(name: str):
    """Rooms that only chapters enter are imported when their name is first used."""
    if name in ("plotting", "opening", "ledger"):
        return import_module(f".{name}", __name__)
    if name == "chapter":
        return import_module(".opening", __name__).chapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
