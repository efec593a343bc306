"""Inputs of one's own, of any shape: an npz file with `x` and `y`.

x    (N, ...), uint8 (0 ... 255, meaning x / 255) or floating, in [0, 1]
y    (N,), integers in 0 ... 99,999
"""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saltflat.data.image_arrays import in_range, whole_arrays


def arrays(path: str | PathLike[str]) -> tuple[Tensor, Tensor]:
    """x as it is in the file (half precision becomes fp32), and y as int64; no code in the file is ever run.

    Raises ValueError, in one line, for a file that is not there, that is cut or altered, that lacks one of the two, or
    holds anything else than the above.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/mine.npz", x=np.zeros((4, 2), np.float32), y=np.array([0, 1, 0, 1]))
    ...     arrays(f"{folder}/mine.npz")[1]
    tensor([0, 1, 0, 1])
    """
    x, y = npz(path, ("x", "y"))
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{path}: x: expected uint8 or floating numbers, got {x.dtype}")
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"{path}: x: expected shape (N, ...) with at least one number, got {x.shape}")
    if not np.issubdtype(y.dtype, np.integer) or y.shape != (len(x),):
        raise ValueError(f"{path}: y: expected integers of shape ({len(x)},), got {y.dtype} of shape {y.shape}")
    if x.dtype != np.uint8 and not (x.min() >= 0 and x.max() <= 1):  # nor is NaN
        raise ValueError(f"{path}: x: expected numbers in [0, 1], got {x.min():g} to {x.max():g}; divide by 255?")
    labels = in_range(y, f"{path}: y")
    x = x.astype(x.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(x if x.dtype in (np.uint8, np.float32, np.float64) else x.astype(np.float32)), labels


def npz(path: str | PathLike[str], names: Sequence[str]) -> list[NDArray[Any]]:
    """Some arrays of an npz file; no code in it is ever run. ValueError, in one line, if it is not there, is cut or
    altered, or lacks one of them.
    """
    try:
        return whole_arrays(path, [(name,) for name in names])
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a whole npz file of numbers: there is no such file") from None
