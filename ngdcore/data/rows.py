"""From images and labels of all classes to the rows, norms and targets asked for."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["DataSet"]

CLASSES = range(10)


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


class Source(NamedTuple):
    """One place that rows may come from; ``read`` gives images, when called, and
    labels (N,), so that labels alone can tell whether it suffices.
    """

    name: str
    read: Callable[[], tuple[Callable[[], np.ndarray], np.ndarray]]


class Request(NamedTuple):
    """What a caller asks of a data set; for its meaning see `ngdcore.data.mnist`."""

    classes: Sequence[int]
    n_train: int
    n_test: int
    norm: str | None
    standardize: bool
    seed: int | None
    dtype: torch.dtype
    device: torch.device | str | None


def data_set(train: list[Source], test: list[Source], ask: Request) -> DataSet:
    """The rows asked for, from the first source of each split that holds them."""
    _check(ask)
    raw, labels, used = zip(
        _choose(train, "train", ask.n_train, ask),
        _choose(test, "test", ask.n_test, ask),
        strict=True,
    )
    x, x_test = (torch.from_numpy(r.reshape(len(r), -1)).double() / 255 for r in raw)
    if ask.standardize:
        mean, sd = x.mean(), x.std(correction=0)
        x, x_test = (x - mean) / sd, (x_test - mean) / sd
    x, x_test = (
        placed(normalise(v, ask.norm), ask.dtype, ask.device) for v in (x, x_test)
    )
    labels = [torch.from_numpy(v.astype(np.int64)) for v in labels]
    y, y_test = (
        placed(_targets(v, ask.classes), ask.dtype, ask.device) for v in labels
    )
    labels = [placed(v, v.dtype, ask.device) for v in labels]
    return DataSet(x, y, x_test, y_test, *labels, " and ".join(sorted(set(used))))


def _check(ask: Request) -> None:
    """Raise ValueError, by the name of the argument, for what no data set can give."""
    classes = ask.classes
    if (
        not isinstance(classes, Collection)
        or len(classes) < 2
        or len(set(classes)) < len(classes)
        or not set(classes) <= set(CLASSES)
    ):
        raise ValueError(
            f"classes={classes} must be two or more different classes from 0 to 9"
        )
    if ask.norm not in ("unit", "sqrt_d", None):
        raise ValueError(f"norm={ask.norm!r} is unknown; use 'unit', 'sqrt_d' or None")
    for name in ("n_train", "n_test"):
        value = getattr(ask, name)
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value!r} must be an int of at least 1")
    if not isinstance(ask.seed, Integral | None):
        raise ValueError(f"seed={ask.seed!r} must be an int, or None for file order")


def _choose(
    sources: list[Source], split: str, n: int, ask: Request
) -> tuple[np.ndarray, np.ndarray, str]:
    """Images (n, ...) and labels (n,) of these classes, and the source's name."""
    for source in sources:
        images, labels = source.read()
        hits = np.flatnonzero(np.isin(labels, tuple(ask.classes)))
        if len(hits) >= n:
            break
    else:
        raise ValueError(
            f"n_{split}={n} rows asked for, but the {split} rows hold {len(hits)} with"
            f" classes {ask.classes}"
        )
    if ask.seed is not None:
        generator = torch.Generator().manual_seed(int(ask.seed))
        order = torch.randperm(len(hits), generator=generator, device="cpu")
        hits = hits[np.sort(order[:n].numpy())]
    return images()[hits[:n]], labels[hits[:n]], source.name


def placed(x: Tensor, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """A tensor made on the CPU, moved; None is the default device of torch."""
    if x.is_floating_point() and not dtype.is_floating_point:
        raise ValueError(
            f"dtype={dtype} cannot hold the data; use torch.float64 or float32"
        )
    where = torch.get_default_device() if device is None else device
    return x.to(dtype=dtype, device=where)


def normalise(
    x: Float[Tensor, "N d"], norm: str | None, remedy: str = "use norm=None"
) -> Float[Tensor, "N d"]:
    """Rows of norm 1, of norm sqrt(d), or as they are."""
    if norm is None:
        return x
    length = x.norm(dim=1, keepdim=True)
    if (length == 0).any():
        raise ValueError(
            f"row {int(length.argmin())} is zero and cannot be normalised; {remedy}"
        )
    return x / length * (1.0 if norm == "unit" else math.sqrt(x.shape[1]))


def _targets(labels: Int[Tensor, " N"], classes: Sequence[int]) -> Float[Tensor, "N C"]:
    """+1 and -1 for two classes, in one column; one-hot rows for more."""
    if len(classes) == 2:
        return torch.where(labels == classes[0], 1.0, -1.0).double()[:, None]
    return (labels[:, None] == torch.tensor(classes, device="cpu")).double()
