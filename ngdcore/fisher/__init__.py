r"""Fisher matrices, exact and approximate, seen from the output space: one family a
file.

A Fisher :math:`F` turns an output residual :math:`g` into a weight direction
:math:`d = \frac1N F^+ J^\top g`, and a pair of factors into the coefficient matrix
:math:`Q = \frac1N J F^+ J^\top`. The one law holds for all of them: pushing the
direction forward gives :math:`J d = Q g`. With damping, :math:`F + \rho I` stands for
:math:`F`."""

from ..iterative import NotConverged
from ..solve import Info, RankDeficient
from .base import Fisher, OutputSide, WeightSide
from .deep_linear import DeepLinearExact
from .kfac import KFAC, SampledKFAC, TridiagonalKFAC
from .layerwise import BlockDiagonal, BlockTridiagonal, Exact, LayerWise
from .matrix_free import MatrixFree
from .unitwise import Diagonal, QuasiDiagonal, UnitWise

__all__ = [
    "Fisher",
    "OutputSide",
    "WeightSide",
    "Exact",
    "MatrixFree",
    "LayerWise",
    "BlockDiagonal",
    "BlockTridiagonal",
    "KFAC",
    "SampledKFAC",
    "TridiagonalKFAC",
    "UnitWise",
    "QuasiDiagonal",
    "Diagonal",
    "DeepLinearExact",
    "Info",
    "RankDeficient",
    "NotConverged",
]
