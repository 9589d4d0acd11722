"""Factors and Gram matrices, of finite networks and of infinitely wide ones: `factors`
and `infinite` as one name.
"""

from .factors import Factors, empirical
from .infinite import analytic, arc_cosine_gram

__all__ = ["Factors", "empirical", "analytic", "arc_cosine_gram"]
