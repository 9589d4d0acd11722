"""ngdcore: exact and approximate natural gradients, seen in function space.

``signals`` take one forward and one backward sweep; ``kernels`` turn them (or a recursion for infinite width) into
factors; a ``fisher`` turns factors into a coefficient matrix Q, and signals into a natural gradient.
"""

from . import data, dynamics, experiment, fisher, kernels, models, optim, plotting
from .models import signals

__version__ = "0.1.0"
__all__ = ["models", "data", "experiment", "kernels", "fisher", "optim", "dynamics", "plotting", "signals"]
