"""Data sets: real images that ship with the package or are fetched, synthetic inputs,
and the Forster transform.
"""

from .cifar import cifar10
from .files import DataError
from .forster import forster
from .images import fashion_mnist, mnist
from .rows import DataSet
from .synthetic import gaussian, linear_teacher, sphere

__all__ = [
    "mnist",
    "fashion_mnist",
    "cifar10",
    "sphere",
    "gaussian",
    "linear_teacher",
    "forster",
    "DataSet",
    "DataError",
]
