"""Data sets: real images that ship with the package, and synthetic inputs."""

import gzip
import hashlib
import math
import os
import re
import struct
import tarfile
import warnings
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imread
from torch import Tensor

__all__ = [
    "mnist",
    "fashion_mnist",
    "cifar10",
    "sphere",
    "gaussian",
    "forster",
    "DataSet",
    "DataError",
]


class DataError(RuntimeError):
    """A data file is missing, truncated or altered, and no other source has it; the
    message names file and remedy.
    """


@dataclass(frozen=True)
class DataSet:
    """Inputs and targets, with where they came from.

    Attributes
    ----------
    x, x_test : Tensor, (N, d)
    y, y_test : Tensor, (N, C)
        Two classes: one column, +1 for the first class named and -1 for the second.
        Otherwise one-hot rows.
    labels, labels_test : Tensor, (N,)
        The original class labels.
    source : str
        Which files the rows came from.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    labels: Tensor = field(repr=False)
    labels_test: Tensor = field(repr=False)
    source: str


_CIFAR = "cifar-10-binary.tar.gz"
_SHA256 = {  # of the uncompressed bytes; of images and labels one after the other; of an archive as it is
    "mnist/train-first10240-images-idx3-ubyte": "0bddcb4db9473979ba722ea7679e2935e7decc129a6be9181eaf0c0fe5babbb7",
    "mnist/train-first10240-labels-idx1-ubyte": "4673cc729421426f5d7da3f845f324bf4547c8100ea8b14576ff78449fe223ca",
    "mnist/t10k-first5000-images-idx3-ubyte": "118ae22e5d4e94bb7f7335211629ca4da103e2b74481bd772edf32b2aff5970f",
    "mnist/t10k-first5000-labels-idx1-ubyte": "24f8aa7197fa0ee1ceb43e0809492febb35d3bdb1d1c31379ca14bd851f82ba7",
    "mnist/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "mnist/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "mnist/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "mnist/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "fashion-mnist/t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "fashion-mnist/t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "cifar10/train5000": "002a1dd991bc6394a8ee4eeafc261090244ac2d20a5a7e07459fa373c619531c",
    "cifar10/test2000": "06baf16b384385cd0f50366c98204489db54dd3a0cd51a5611155f675b2a8eb4",
    _CIFAR: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
}
# data set, split: where rows come from, smallest source first (how to call it, file,
# rows of the file)
_SOURCES = {
    ("mnist", "train"): [
        ("MNIST, first rows that ship", "mnist/train-first10240", slice(None)),
        ("MNIST, all rows", "mnist/train", slice(None)),
    ],
    ("mnist", "test"): [
        ("MNIST, first rows that ship", "mnist/t10k-first5000", slice(None)),
        ("MNIST, all rows", "mnist/t10k", slice(None)),
    ],
    ("fashion-mnist", "train"): [
        ("Fashion-MNIST, test file", "fashion-mnist/t10k", slice(0, 8000))
    ],
    ("fashion-mnist", "test"): [
        ("Fashion-MNIST, test file", "fashion-mnist/t10k", slice(8000, None))
    ],
    ("cifar10", "train"): [
        ("CIFAR-10, first 500 of each class", "cifar10/train5000", slice(None)),
        ("CIFAR-10, all rows", "cifar10/train", slice(None)),
    ],
    ("cifar10", "test"): [
        ("CIFAR-10, first 200 of each class", "cifar10/test2000", slice(None)),
        ("CIFAR-10, all rows", "cifar10/test", slice(None)),
    ],
}
_SHIPPED = [name for name in _SHA256 if "first" in name or name.startswith("fashion")]
_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/",
    "https://storage.googleapis.com/cvdf-datasets/",
)
_CIFAR_HOME = ("https://www.cs.toronto.edu/~kriz/",)


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
        Of the tensors returned; float64 unless asked.

    Returns
    -------
    DataSet

    Raises
    ------
    ValueError
        For unknown classes or norm, or more rows than there are.
    DataError
        When a file is truncated, altered or missing everywhere.

    Notes
    -----
    The first 10,240 training and 5,000 test images ship with the package; a request
    that they can fill is filled from them (also a random one, so that a seed means the
    same rows everywhere). Larger requests look for the full files in the folder
    ``mnist`` of ``NGD_DATA_DIR``, then in the cache, then on two mirrors. SHA-256 of
    the uncompressed bytes is checked always. LeCun, Cortes & Burges, *The MNIST
    database*.

    Examples
    --------
    >>> import ngdcore as ngd
    >>> d = ngd.data.mnist(classes=(4, 9), n_train=50, n_test=20)
    >>> d.x.shape, d.y.shape, d.source
    (torch.Size([50, 784]), torch.Size([50, 1]), 'MNIST, first rows that ship')
    """
    return _images(
        "mnist", classes, n_train, n_test, norm, standardize, seed, dtype, device
    )


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
    return _images(
        "fashion-mnist",
        classes,
        n_train,
        n_test,
        norm,
        standardize,
        seed,
        dtype,
        device,
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
    return _images(
        "cifar10",
        classes,
        n_train,
        n_test,
        norm,
        standardize,
        seed,
        dtype,
        device,
        download,
    )


def _images(
    data_set,
    classes,
    n_train,
    n_test,
    norm,
    standardize,
    seed,
    dtype,
    device,
    download=True,
) -> DataSet:
    classes = tuple(classes)
    if (
        len(classes) < 2
        or len(set(classes)) < len(classes)
        or not set(classes) <= set(range(10))
    ):
        raise ValueError(
            f"classes={classes} must be two or more different classes from 0 to 9"
        )
    if norm not in ("unit", "sqrt_d", None):
        raise ValueError(f"norm={norm!r} is unknown; use 'unit', 'sqrt_d' or None")
    splits = (("train", n_train), ("test", n_test))
    pixels, labels, used = zip(
        *(_rows(data_set, split, classes, n, seed, download) for split, n in splits)
    )
    x, x_test = (
        torch.from_numpy(p.reshape(len(p), -1)).to(torch.float64) / 255 for p in pixels
    )
    if standardize:
        mean, sd = x.mean(), x.std(correction=0)
        x, x_test = (x - mean) / sd, (x_test - mean) / sd
    x, x_test = (
        _normalise(v, norm).to(dtype=dtype, device=device) for v in (x, x_test)
    )
    labels = [torch.from_numpy(v.astype(np.int64)).to(device) for v in labels]
    y, y_test = (_targets(v, classes).to(dtype=dtype) for v in labels)
    return DataSet(x, y, x_test, y_test, *labels, " and ".join(sorted(set(used))))


def _rows(data_set, split, classes, n, seed, download):
    """Images and labels of n rows with these classes, from the smallest source that
    holds them.
    """
    if n < 1:
        raise ValueError(f"n_train and n_test must be at least 1, not {n}")
    for used, file, rows in _SOURCES[data_set, split]:
        images, labels = _cifar(file, download) if data_set == "cifar10" else _idx(file)
        labels = labels[rows]
        hits = np.flatnonzero(np.isin(labels, classes))
        if len(hits) >= n:
            break
    else:
        raise ValueError(
            f"{n} rows asked for, but the {split} rows hold {len(hits)} with classes {classes}"
        )
    if seed is not None:
        order = torch.randperm(len(hits), generator=torch.Generator().manual_seed(seed))
        hits = hits[np.sort(order[:n].numpy())]
    return images()[rows][hits[:n]], labels[hits[:n]], used


def _idx(file):
    """How to read the images of a pair of IDX files, and the labels."""
    return (lambda: _load(f"{file}-images-idx3-ubyte")), _load(
        f"{file}-labels-idx1-ubyte"
    )


def _cifar(file, download):
    """The same of CIFAR-10: from a strip and its labels where they lie, else from the
    archive.
    """
    strip = next(
        (home / file for home in _homes() if (home / f"{file}.png").is_file()), None
    )
    archive = next(
        (home / _CIFAR for home in _homes() if (home / _CIFAR).is_file()), None
    )
    if strip:
        images, labels = _read_strip(strip)
    elif archive or download:
        images, labels = _read_archive(
            archive or _download(_CIFAR, _CIFAR_HOME, _read_archive), file
        )
    else:
        raise DataError(
            f"neither {file}.png nor {_CIFAR} is at hand; put one into a folder that NGD_DATA_DIR names"
        )
    if file in _SHA256:
        rows = np.sort(
            np.concatenate(
                [np.flatnonzero(labels == c)[: int(file[-4:]) // 10] for c in range(10)]
            )
        )
        images, labels = images[rows], labels[rows]
        _check(strip or archive or _CIFAR, images.tobytes() + labels.tobytes(), file)
    return (lambda: images), labels


def _read_strip(path):
    try:
        labels = np.load(f"{path}_labels.npz", allow_pickle=False)["y"]
        return np.rint(255 * imread(f"{path}.png")[..., :3]).astype(np.uint8).reshape(
            len(labels), 32, 32, 3
        ), labels
    except Exception as error:  # of three libraries, in many ways
        raise DataError(
            f"{path}.png or its _labels.npz is truncated or missing ({error}); fetch both again"
        ) from error


def _read_archive(path, file="test"):
    _check(path, path.read_bytes(), _CIFAR)
    with tarfile.open(path) as tar:
        names = sorted(
            n
            for n in tar.getnames()
            if re.search("test_batch" if "test" in file else r"data_batch_\d", n)
        )
        rows = np.frombuffer(
            b"".join(tar.extractfile(n).read() for n in names), np.uint8
        ).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]


def _load(name: str) -> np.ndarray:
    """One IDX file, from the first source that has it; an altered file is an error,
    never passed over.
    """
    for path in _places(name):
        if path.is_file():
            return _read(path, name)
    if name in _SHIPPED:
        raise DataError(
            f"{name}.gz ships with ngdcore but is missing from this installation; install ngdcore again"
        )
    return _read(
        _download(f"{name}.gz", _MIRRORS, lambda path: _read(path, name)), name
    )


def _places(name):
    if name in _SHIPPED:
        homes = [
            resources.files("ngdcore") / "_data",
            Path(__file__).parent.parent / "data",
        ]
    else:
        homes = _homes()
    return [home / f"{name}.gz" for home in homes]


def _homes():
    folder = os.environ.get("NGD_DATA_DIR")
    return [*([Path(folder)] if folder else []), _cache()]


def _check(path, raw, name) -> None:
    if hashlib.sha256(raw).hexdigest() != _SHA256[name]:
        raise DataError(
            f"{path} has been altered (SHA-256 of its bytes differs); delete it and fetch it again"
        )


def _read(path, name) -> np.ndarray:
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise DataError(
            f"{path} is truncated or no gzip file ({error}); delete it and fetch it again"
        ) from error
    _check(path, raw, name)
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _pooch():
    with (
        warnings.catch_warnings()
    ):  # in a notebook without widgets, about its progress bar
        warnings.simplefilter("ignore")
        import pooch
    return pooch


def _cache() -> Path:
    return Path(_pooch().os_cache("ngdcore"))


def _download(file, mirrors, read) -> Path:
    """Fetch a file into the cache; what `read` refuses is deleted again."""
    pooch = _pooch()
    pooch.get_logger().setLevel("WARNING")
    target, failures = _cache() / file, []
    for mirror in mirrors:
        try:
            pooch.retrieve(
                f"{mirror}{file}",
                known_hash=None,
                fname=target.name,
                path=target.parent,
            )
            read(target)
            return target
        except DataError as error:
            target.unlink()
            failures.append(f"{mirror}: {error}")
        except Exception as error:  # whatever the network or the server does, the next mirror may have the file
            failures.append(f"{mirror}: {type(error).__name__}")
    raise DataError(
        f"{file} is needed and was found nowhere; put it into a folder that NGD_DATA_DIR names, or into {_cache()}."
        f" Mirrors tried: {'; '.join(failures)}"
    )


def _normalise(x, norm):
    if norm is None:
        return x
    length = x.norm(dim=1, keepdim=True)
    if (length == 0).any():
        raise ValueError(
            f"row {int(length.argmin())} is zero and cannot be normalised; use norm=None"
        )
    return x / length * (1.0 if norm == "unit" else math.sqrt(x.shape[1]))


def _targets(labels, classes):
    if len(classes) == 2:
        return torch.where(labels == classes[0], 1.0, -1.0).double()[:, None]
    return (labels[:, None] == torch.tensor(classes, device=labels.device)).double()


def sphere(
    n: int,
    d: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""n points drawn uniformly from the unit sphere in :math:`\mathbb R^d`, shape (n,
    d).

    Raises
    ------
    ValueError
        If ``n`` or ``d`` is below 1.

    Examples
    --------
    >>> import ngdcore as ngd
    >>> x = ngd.data.sphere(5, 3, seed=0)
    >>> bool(((x.norm(dim=1) - 1).abs() < 1e-12).all())
    True
    """
    return _normalise(gaussian(n, d, seed), "unit").to(dtype=dtype, device=device)


def gaussian(
    n: int,
    d: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""n rows of d independent standard normal numbers.

    Raises
    ------
    ValueError
        If ``n`` or ``d`` is below 1.

    Examples
    --------
    >>> import ngdcore as ngd
    >>> ngd.data.gaussian(5, 3, seed=0).shape
    torch.Size([5, 3])
    """
    if n < 1 or d < 1:
        raise ValueError(f"n={n} and d={d} must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(
        dtype=dtype, device=device
    )


def forster(
    x: Tensor, tol: float = 1e-10, max_iter: int = 1000
) -> tuple[Tensor, Tensor]:
    r"""The Forster transform: unit rows in the directions of :math:`x_i^\top A` with
    :math:`Z^\top Z = \frac nd I`.

    Repeats :math:`T = (\frac dn Z^\top Z)^{-1/2}`,
    :math:`Z \leftarrow \mathrm{rownorm}(ZT)`, :math:`A \leftarrow AT/\|AT\|_F`: Tyler's
    fixed-point iteration, :math:`AA^\top \propto \Sigma^{-1}`. It converges linearly,
    in one step for n = d, slowest when n is just above d.

    Parameters
    ----------
    x : Tensor, (n, d)
        Rows, none zero; n >= d, and no k-dimensional subspace may hold kn/d rows or
        more.
    tol : float
        Largest :math:`\|Z^\top Z - \frac nd I\|_F/\|\frac nd I\|_F`.
    max_iter : int

    Returns
    -------
    z : Tensor, (n, d)
        Unit rows.
    a : Tensor, (d, d)
        Invertible, of Frobenius norm 1: ``z`` is row-normalised ``x @ a``.

    Raises
    ------
    ValueError
        When n < d, a row is zero, or x has lower rank than d: no transform exists.
    RuntimeError
        When it has not converged after ``max_iter`` steps, with the subspace that holds
        too many rows if one shows.

    Notes
    -----
    Zhang, Martens & Grosse (2019), Theorem 7 and Algorithm 1, which normalises by
    :math:`A_{11}` instead; Forster (2002), Tyler (1987). Every row then has leverage
    d/n.

    Examples
    --------
    >>> import torch, ngdcore as ngd
    >>> z, a = ngd.data.forster(ngd.data.gaussian(20, 4) * torch.tensor([1.0, 10.0, 1.0, 0.1]))
    >>> torch.allclose(z.T @ z, 5 * torch.eye(4, dtype=torch.float64))
    True
    """
    n, d = x.shape
    if n < d:
        raise ValueError(
            f"x has {n} rows in {d} dimensions: Z^T Z = (n/d) I has rank {d}, so n >= d is needed"
        )
    z = _normalise(x, "unit")
    if torch.linalg.matrix_rank(z) < d:
        raise ValueError(
            f"x has rank {int(torch.linalg.matrix_rank(z))} < d = {d}: project it onto its range first"
        )
    a = torch.eye(d, dtype=x.dtype, device=x.device) / math.sqrt(d)
    for _ in range(max_iter + 1):
        values, vectors = torch.linalg.eigh(z.T @ z * (d / n))
        if (values - 1).norm() <= tol * math.sqrt(d):
            return z, a
        if (
            torch.linalg.cond(a) > 1e13
        ):  # beyond, rounding errors grow into rows of their own
            break
        t = vectors / values.sqrt() @ vectors.T
        z, a = _normalise(z @ t, "unit"), a @ t
        a = a / a.norm()
    raise RuntimeError(
        f"no Forster transform found within {max_iter} steps; {_crowded(z, vectors)}"
    )


def _crowded(z, vectors):
    """The subspace that collects more than its share of rows, among the principal ones
    of what did not converge.
    """
    n, d = z.shape
    for k in range(1, d):
        inside = int((z @ vectors[:, d - k :]).norm(dim=1).gt(1 - 1e-3).sum())
        if inside * d >= k * n:
            return f"{inside} of {n} rows lie (nearly) in a subspace of dimension {k}, and fewer than {k * n / d:g} may"
    return "raise max_iter: convergence is slow when n is just above d"
