r"""Natural gradient as a `torch.optim.Optimizer`, adaptive damping, and one training
generator for all optimizers.
"""

from .adaptive import Adaptive
from .losses import half_mse
from .natural_gradient import NaturalGradient, Step
from .training import run

__all__ = ["NaturalGradient", "Adaptive", "Step", "run", "half_mse"]
