"""MNIST and Fashion-MNIST, as IDX files."""

import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .files import SHIPPED, Fault, check, faulty, obtain, shipped, unzipped
from .rows import DataSet, Request, Source, data_set

__all__ = ["mnist", "fashion_mnist"]

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/",
    "https://storage.googleapis.com/cvdf-datasets/",
)


def mnist(
    classes: tuple[int, ...] = tuple(range(10)),
    n_train: int = 500,
    n_test: int = 1000,
    norm: str | None = "unit",
    standardize: bool = False,
    seed: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> DataSet:
    r"""MNIST digits of the given classes, as rows of length 784.

    Parameters
    ----------
    classes : tuple of int
        Digits to keep. Two classes: targets +1 for the first, -1 for the second;
        otherwise one-hot.
    n_train, n_test : int
        Rows from the training and the test split.
    norm : {"unit", "sqrt_d", None}
        Rows of Euclidean norm 1, of norm :math:`\sqrt{784}`, or pixels in [0, 1] as
        they are.
    standardize : bool
        First subtract the scalar mean of the chosen training rows and divide by their
        scalar standard deviation (the same two numbers for the test rows).
    seed : int, optional
        ``None`` takes the first rows in file order, classes merged; an int takes a
        random subset.
    dtype, device :
        Of the tensors returned; float64, and torch's default device, unless asked.

    Returns
    -------
    DataSet

    Raises
    ------
    ValueError
        For unknown classes or norm, or more rows than there are.
    DataError
        When a file is truncated, altered or missing everywhere, with where it was
        looked for and what each mirror answered.
    ImportError
        When a file must be fetched and what fetches it is not installed.

    Notes
    -----
    The first 10,240 training and 5,000 test images ship with the package; a request
    that they can fill is filled from them (also a random one, so that a seed means the
    same rows everywhere). Larger requests look for the full files in the folder that
    ``NGD_DATA_DIR`` names (in ``mnist``, at its top, or in ``MNIST/raw``, zipped or
    not), then in the cache, then on two mirrors, which needs the extra ``[notebooks]``.
    SHA-256 of the uncompressed bytes is checked always. LeCun, Cortes & Burges, *The
    MNIST database*.

    Examples
    --------
    >>> import ngdcore as ngd
    >>> d = ngd.data.mnist(classes=(4, 9), n_train=50, n_test=20)
    >>> d.x.shape, d.y.shape, d.source
    (torch.Size([50, 784]), torch.Size([50, 1]), 'MNIST, first rows that ship')
    """
    ask = Request(classes, n_train, n_test, norm, standardize, seed, dtype, device)
    return data_set(*_MNIST, ask)


def fashion_mnist(
    classes: tuple[int, ...] = tuple(range(10)),
    n_train: int = 500,
    n_test: int = 1000,
    norm: str | None = "unit",
    standardize: bool = False,
    seed: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> DataSet:
    r"""Fashion-MNIST images of the given classes, as rows of length 784; arguments and
    errors as for `mnist`.

    Both kinds of rows come from the data set's test file, which ships whole: training
    rows from its first 8,000 images, test rows from its last 2,000.

    Notes
    -----
    Classes 0 to 9: T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker,
    bag, ankle boot. Xiao, Rasul & Vollgraf (2017), *Fashion-MNIST*.

    Examples
    --------
    >>> import ngdcore as ngd
    >>> d = ngd.data.fashion_mnist(classes=(5, 7), n_train=50, n_test=20)
    >>> d.x.shape, d.source
    (torch.Size([50, 784]), 'Fashion-MNIST, test file')
    """
    ask = Request(classes, n_train, n_test, norm, standardize, seed, dtype, device)
    return data_set(*_FASHION, ask)


def _idx(name: str) -> np.ndarray:
    """One IDX file, from the first source that has it; an altered file is an error,
    never passed over.
    """
    if name in SHIPPED:
        path = shipped(name)
        try:
            return _read(path, name)
        except Fault as fault:
            raise faulty(path, fault) from fault
    return obtain(_spellings(name), lambda path: _read(path, name), MIRRORS)


def _spellings(name: str) -> list[str]:
    """What a file may be called below a folder of data: ours first, then unzipped, with
    a dot as the authors have it, in no folder, and where torchvision puts it.
    """
    home, file = name.split("/")
    dotted = file.replace("-idx", ".idx")
    return [
        f"{folder}{spelled}{ending}"
        for folder in (f"{home}/", "", f"{home.upper()}/raw/")
        for spelled in (file, dotted)
        for ending in (".gz", "")
    ]


def _read(path: Path, name: str) -> np.ndarray:
    raw = unzipped(path)
    check(raw, name)
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _pair(
    file: str, rows: slice = slice(None)
) -> tuple[Callable[[], np.ndarray], np.ndarray]:
    """How to read the images of a pair of IDX files, and the labels."""
    labels = _idx(f"{file}-labels-idx1-ubyte")[rows]
    return lambda: _idx(f"{file}-images-idx3-ubyte")[rows], labels


# Of training and of test rows: the smallest source first.
_MNIST = [
    [
        Source("MNIST, first rows that ship", partial(_pair, f"mnist/{head}")),
        Source("MNIST, all rows", partial(_pair, f"mnist/{whole}")),
    ]
    for head, whole in (("train-first10240", "train"), ("t10k-first5000", "t10k"))
]
_FASHION = [
    [Source("Fashion-MNIST, test file", partial(_pair, "fashion-mnist/t10k", rows))]
    for rows in (slice(0, 8000), slice(8000, None))
]
