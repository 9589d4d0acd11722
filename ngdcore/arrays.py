"""From tensors, wherever they live, to NumPy."""

import numpy as np
import torch

__all__ = ["numbers"]


def numbers(value) -> np.ndarray:
    """A number, an array, a tensor of any device, or lists of these in any depth, as
    one float64 array.

    Examples
    --------
    >>> import torch
    >>> numbers([[torch.tensor(1.0), 2], [3, 4]]).tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    return np.asarray(_on_the_host(value), dtype=float)


def _on_the_host(value):
    """The same numbers, lists and arrays, without tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, (list, tuple)):
        return [_on_the_host(entry) for entry in value]
    return value
