"""Factors and Gram matrices, of finite networks and of infinitely wide ones: `factors`
and `infinite` as one name.
"""

from .factors import Factors, empirical, operator
from .infinite import Dual, analytic, arc_cosine_gram

__all__ = ["Dual", "Factors", "analytic", "arc_cosine_gram", "empirical", "operator"]
