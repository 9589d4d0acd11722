"""Packages that come with an extra: imported when they are used, and named with the
extra when they are missing.
"""

from importlib import import_module
from types import ModuleType

__all__ = ["load"]


def load(module: str, purpose: str, extra: str = "notebooks") -> ModuleType:
    """Import ``module``, which ``purpose`` needs and ``extra`` installs.

    Raises
    ------
    ImportError
        Where it, or something that it needs itself, is not installed; the message says
        how to install it.

    Examples
    --------
    >>> load("gzip", "reading data").__name__
    'gzip'
    >>> load("no_such_package", "dreaming")
    Traceback (most recent call last):
    ImportError: dreaming needs no_such_package: pip install 'ngdcore[notebooks]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{purpose} needs {error.name}: pip install 'ngdcore[{extra}]'",
            name=error.name,
        ) from error
