"""Training and test images of one's own: an npz file with `x_train`, `y_train`, `x_test` and `y_test`.

x    uint8, (N, C, H, W) or (N, H, W, C) with C = 1 or 3, or (N, H, W), which is grey
y    (N,), integers in 0 ... 99,999

The axis of the channels is the one of length 1 or 3. Putting it first changes the order of an image's bytes, not their
place among those of the other images; so it is done within the array that was read, a few images at a time, and a set
of millions is never in memory twice.
"""

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib.format import read_array, read_array_header_1_0, read_array_header_2_0, read_magic
from numpy.typing import NDArray
from torch import Tensor

from saltflat.data.images import Images, Splits, check_fits

AT_A_TIME = 64  # images whose channels are moved together: few enough for a cache
MOST_CLASSES = 100_000  # more than any set of images has; a label beyond is an index, or bytes of something else


def image_arrays(path: str | os.PathLike[str]) -> Splits:
    """Images (N, C, H, W) and labels of both splits, in the order of the file. No code in it is ever run.

    The number of classes is one more than the largest label of both splits.

    Raises FileNotFoundError for a missing file, and ValueError, in one line, for one that is cut or altered, that lacks
    an array, or in which an array is anything else than the above, and for splits of different shapes of images.

    >>> import tempfile
    >>> grey = {"x_train": np.zeros((4, 8, 8), np.uint8), "x_test": np.zeros((2, 8, 8), np.uint8)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/mine.npz", y_train=[0, 1, 0, 1], y_test=[1, 2], **grey)
    ...     image_arrays(f"{folder}/mine.npz").train.images.shape
    torch.Size([4, 1, 8, 8])
    """
    names = ("x_train", "y_train", "x_test", "y_test")
    x_train, y_train, x_test, y_test = whole_arrays(path, [(name,) for name in names])
    train, test = channels_first(x_train, f"{path}: x_train"), channels_first(x_test, f"{path}: x_test")
    if train.shape[1:] != test.shape[1:]:
        shapes = f"{tuple(train.shape[1:])} and {tuple(test.shape[1:])}"
        raise ValueError(f"{path}: expected x_train and x_test to have images of one shape (C, H, W), got {shapes}")
    train_labels = class_labels(y_train, len(train), f"{path}: y_train")
    test_labels = class_labels(y_test, len(test), f"{path}: y_test")
    classes = 1 + int(torch.cat([train_labels, test_labels]).max())
    name = Path(path).stem
    return Splits(
        Images(train, train_labels, classes, f"{name} train"), Images(test, test_labels, classes, f"{name} test")
    )


def whole_arrays(path: str | os.PathLike[str], wanted: Sequence[Sequence[str]]) -> list[NDArray[Any]]:
    """Arrays of an npz file, each under one of the names that it may have, in memory once.

    Raises FileNotFoundError for a missing file, and ValueError, in one line, for one that cannot be read whole, and for
    an array that is under none of its names, or under two.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: not found; expected an npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            return [_array(archive, names) for names in wanted]
    except Exception as error:  # a damaged archive can fail in any of its parts
        words = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: expected a whole npz file of numbers: {words}") from None


def _array(archive: zipfile.ZipFile, names: Sequence[str]) -> NDArray[Any]:
    members = [f"{name}.npy" for name in names if f"{name}.npy" in archive.namelist()]
    if not members:
        raise ValueError(f"there is no array {' or '.join(map(repr, names))} in it")
    if len(members) > 1:
        raise ValueError(f"expected one array {' or '.join(names)} in it, found {len(members)}")
    with archive.open(members[0]) as member:
        claimed, held = _claimed(member), archive.getinfo(members[0]).file_size
    if claimed > held:
        raise ValueError(f"{members[0]} claims {claimed:,} bytes and holds {held:,} at most")
    check_fits(claimed, members[0])
    with archive.open(members[0]) as member:
        array: NDArray[Any] = read_array(member, allow_pickle=False)
        if member.read(1):  # at the end, and only there, zip compares its checksum
            raise ValueError(f"{members[0]} goes on behind its array")
    return array


def _claimed(member: IO[bytes]) -> int:
    """Bytes of the array that an npy file announces."""
    header = read_array_header_1_0 if read_magic(member) == (1, 0) else read_array_header_2_0
    shape, _, dtype = header(member)
    return math.prod(shape) * dtype.itemsize


def channels_first(pixels: NDArray[Any], source: str) -> Tensor:
    """uint8 of one of the three shapes -> (N, C, H, W), in the memory of `pixels`, which is written over.

    `source` names the array in messages. Raises ValueError, in one line, for other numbers or shapes, for no images,
    and where both axes could be that of the channels.

    >>> channels_first(np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3), "x").tolist()
    [[[[0, 3], [6, 9]], [[1, 4], [7, 10]], [[2, 5], [8, 11]]]]
    """
    if pixels.dtype != np.uint8:
        raise ValueError(f"{source}: expected uint8, 0 ... 255, got {pixels.dtype}")
    if pixels.ndim not in (3, 4) or pixels.size == 0:
        raise ValueError(
            f"{source}: expected images (N, C, H, W), (N, H, W, C) or (N, H, W), at least one, got {pixels.shape}"
        )
    pixels = np.require(pixels, requirements=["C", "W"])
    if pixels.ndim == 3:
        return torch.from_numpy(pixels[:, None])
    number, *shape = pixels.shape
    first, last = shape[0] in (1, 3), shape[2] in (1, 3)
    if first == last:
        raise ValueError(f"{source}: expected 1 or 3 channels, on either axis 1 or axis 3, got {pixels.shape}")
    if first:
        return torch.from_numpy(pixels)
    of_images = pixels.reshape(number, -1)
    for start in range(0, number, AT_A_TIME):
        some = pixels[start : start + AT_A_TIME]
        of_images[start : start + AT_A_TIME] = np.moveaxis(some, 3, 1).reshape(len(some), -1)
    return torch.from_numpy(of_images.reshape(number, shape[2], shape[0], shape[1]))


def class_labels(y: NDArray[Any], number: int, source: str) -> Tensor:
    """(number,) whole numbers 0 ... 99,999 as int64; ValueError, in one line, for anything else, as for soft labels.

    >>> class_labels(np.array([3, 1], np.uint8), 2, "y")
    tensor([3, 1])
    """
    if y.ndim == 2 and len(y) == number and np.issubdtype(y.dtype, np.floating):
        raise ValueError(f"{source}: expected one class an image, got soft labels {y.shape}, which are not read")
    if not np.issubdtype(y.dtype, np.integer) or y.shape != (number,):
        raise ValueError(f"{source}: expected whole numbers of shape ({number},), got {y.dtype} of shape {y.shape}")
    return in_range(y, source)


def in_range(y: NDArray[Any], source: str) -> Tensor:
    """Whole numbers 0 ... MOST_CLASSES - 1 of any width as int64; ValueError, in one line, for others."""
    if y.min() < 0:
        raise ValueError(f"{source}: expected classes >= 0, got {y.min()}")
    if y.max() >= MOST_CLASSES:  # and int64 holds every number below
        raise ValueError(f"{source}: expected classes below {MOST_CLASSES}, got {y.max()}")
    return torch.from_numpy(y.astype(np.int64))
