"""Inputs of one's own, of any shape: an npz file with `x` and `y`.

x    (N, ...), uint8 (0 ... 255, meaning x / 255) or floating, in [0, 1]
y    (N,), integers >= 0
"""

import zipfile
import zlib
from collections.abc import Sequence
from os import PathLike

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor


def arrays(path: str | PathLike[str]) -> tuple[Tensor, Tensor]:
    """x as it is in the file (half precision becomes fp32), and y as int64; no code in the file is ever run.

    Raises ValueError, in one line, for a file that cannot be read whole, lacks one of the two, or holds anything else
    than the above.

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
    if y.min() < 0:
        raise ValueError(f"{path}: y: expected classes >= 0, got {y.min()}")
    inputs = torch.from_numpy(x if x.dtype in (np.uint8, np.float32, np.float64) else x.astype(np.float32))
    return inputs, torch.from_numpy(y.astype(np.int64))


def npz(path: str | PathLike[str], names: Sequence[str]) -> list[NDArray[np.generic]]:
    """Some arrays of an npz file; no code in it is ever run. ValueError, in one line, if it cannot be read whole, or
    lacks one of them.
    """
    try:
        with open(path, "rb") as file:  # numpy leaves it open if it is no archive
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, NpzFile):
                raise ValueError("this is one array alone")
            if missing := [name for name in names if name not in archive.files]:
                raise ValueError(f"there is no array {missing[0]!r} in it")
            return [archive[name] for name in names]
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole npz file of numbers: {error}") from None
