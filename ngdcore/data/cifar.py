"""CIFAR-10, from strips of images or from the authors' archive."""

import re
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..extras import load
from .files import DataError, Fault, check, faulty, homes, obtain
from .rows import CLASSES, DataSet, Request, Source, data_set

__all__ = ["cifar10"]

ARCHIVE = "cifar-10-binary.tar.gz"
HOME = ("https://www.cs.toronto.edu/~kriz/",)
# Of training and of test rows: what it is called, its strip, rows of each class.
SOURCES = (
    (
        ("CIFAR-10, first 500 of each class", "cifar10/train5000", 500),
        ("CIFAR-10, all rows", "cifar10/train", None),
    ),
    (
        ("CIFAR-10, first 200 of each class", "cifar10/test2000", 200),
        ("CIFAR-10, all rows", "cifar10/test", None),
    ),
)


def cifar10(
    classes: tuple[int, ...] = tuple(range(10)),
    n_train: int = 500,
    n_test: int = 1000,
    norm: str | None = "unit",
    standardize: bool = False,
    seed: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    download: bool = True,
) -> DataSet:
    r"""CIFAR-10 images of the given classes, as rows of length 3072; arguments and
    errors as for `mnist`.

    ``row.reshape(32, 32, 3)`` is the image, its colours in the last axis.

    Parameters
    ----------
    download : bool
        Whether to fetch the archive (170 MB) where nothing is at hand; otherwise that
        is a `DataError`.

    Notes
    -----
    Does not ship. Looked for in the folder that ``NGD_DATA_DIR`` names, then in the
    cache: the strips ``cifar10/train5000.png`` and ``cifar10/test2000.png`` (images
    below one another) with their ``cifar10/*_labels.npz``, which hold the first 500
    training and 200 test images of each class in the order of the original; then the
    authors' binary archive, ``cifar-10-binary.tar.gz``, which may be downloaded. A
    request that these first images can fill is filled from them, whichever file they
    are in, so that it means the same rows everywhere; larger ones take the whole
    archive. Both are checked by SHA-256. Classes 0 to 9: airplane, automobile, bird,
    cat, deer, dog, frog, horse, ship, truck. Krizhevsky (2009), *Learning multiple
    layers of features from tiny images*.

    Examples
    --------
    >>> import ngdcore as ngd
    >>> d = ngd.data.cifar10(n_train=1000, n_test=2000, norm="sqrt_d")  # doctest: +SKIP
    """
    ask = Request(classes, n_train, n_test, norm, standardize, seed, dtype, device)
    train, test = (
        [Source(name, partial(_read, *rows, download)) for name, *rows in sources]
        for sources in SOURCES
    )
    return data_set(train, test, ask)


def _read(
    file: str, each: int | None, download: bool
) -> tuple[Callable[[], np.ndarray], np.ndarray]:
    """Images (N, 32, 32, 3), when called, and labels (N,): from a strip where one lies,
    else from the archive; the first ``each`` of each class, checked, or all.
    """
    strip = next((h / file for h in homes() if (h / f"{file}.png").is_file()), None)
    if each and strip:
        images, labels = _read_strip(strip)
    else:
        batches = "test_batch" if "test" in file else r"data_batch_\d"
        images, labels = obtain(
            [ARCHIVE, f"cifar10/{ARCHIVE}"],
            partial(_read_archive, batches=batches),
            HOME if download else (),
            also=[f"{file}.png"] if each else [],
        )
    if each:
        heads = [np.flatnonzero(labels == c)[:each] for c in CLASSES]
        rows = np.sort(np.concatenate(heads))
        images, labels = images[rows], labels[rows]
        try:
            check(images.tobytes() + labels.tobytes(), file)
        except Fault as fault:
            raise faulty(f"{strip}.png or its _labels.npz", fault) from fault
    return lambda: images, labels


def _read_strip(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3), below one another in a PNG, and their labels (N,)."""
    pillow = load("PIL.Image", "reading strips of images")
    try:
        labels = np.load(f"{path}_labels.npz", allow_pickle=False)["y"]
        with pillow.open(f"{path}.png") as strip:
            images = np.asarray(strip.convert("RGB"))
        return images.reshape(len(labels), 32, 32, 3), labels
    except Exception as error:  # of three libraries, in many ways
        raise DataError(
            f"{path}.png or its _labels.npz is truncated or missing ({error});"
            " fetch both again"
        ) from error


def _read_archive(path: Path, batches: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) and labels (N,) of the archived files that match."""
    check(path.read_bytes(), ARCHIVE)
    with tarfile.open(path) as tar:
        names = sorted(name for name in tar.getnames() if re.search(batches, name))
        raw = b"".join(tar.extractfile(name).read() for name in names)
    rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]
