"""SVHN, the cropped digits (format 2), from the published .mat files; only the four kinds of bytes in them are read.

A MATLAB 5 file is 128 bytes of header, then elements. An element is its type and its size (two uint32), its bytes, and
zeros up to a multiple of 8; when they are at most four, type and size share one uint32 and the bytes follow at once. A
compressed element holds another one. A matrix is four elements: flags, dimensions, name, and values in the order of
Fortran. Here these are X (32, 32, 3, N), uint8: row, column, colour, image; and y (N, 1): 1 ... 10, and 10 is the digit
0. In the order of C that is (N, 3, 32, 32) with the columns before the rows, which are put right within the memory that
was decompressed to, a few images at a time. Sources: Y. Netzer et al., "Reading Digits in Natural Images with
Unsupervised Feature Learning" (2011), http://ufldl.stanford.edu/housenumbers; "MAT-File Format" in the documentation of
MATLAB.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saltflat.data.image_arrays import AT_A_TIME
from saltflat.data.images import Images, Splits, check_fits

PIECE = 2**18  # bytes decompressed at once
HEADER = 128  # bytes; the last four are version and byte order
ORDERS = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
MATRIX, COMPRESSED = 14, 15
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


def svhn(path: str | os.PathLike[str]) -> Splits:
    """73,257 training and 26,032 test images (N, 3, 32, 32) of the digits 0 ... 9.

    path: a folder with train_32x32.mat and test_32x32.mat, as they were downloaded. Images keep their order.

    Raises FileNotFoundError for a missing folder, and ValueError, in one line, for a missing file, one that is cut or
    altered, and one with other shapes or labels. Files as published are compressed, with a checksum; in files that were
    written without compression, altered pixels cannot be told.

    >>> svhn("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: no/such/folder: not found; svhn reads a folder with train_32x32.mat and test_32x32.mat
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: not found; svhn reads a folder with train_32x32.mat and test_32x32.mat")
    return Splits(_read(folder, "train"), _read(folder, "test"))


def svhn_extra(path: str | os.PathLike[str]) -> Images:
    """The 531,131 easier images of extra_32x32.mat, in the same folder: more training data.

    They are 1.6 GB, and in memory once: while they are decompressed, up to an eighth more is asked for. The file is
    mapped besides (1.3 GB that the system may take back at any time). Errors are those of `svhn`.

    >>> svhn_extra("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: no/such/folder: not found; svhn_extra reads a folder with extra_32x32.mat
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: not found; svhn_extra reads a folder with extra_32x32.mat")
    return _read(folder, "extra")


def _read(folder: Path, split: str) -> Images:
    file = folder / f"{split}_32x32.mat"
    if not file.is_file():
        raise ValueError(f"{folder}: {file.name} is missing")
    try:
        variables = _variables(np.memmap(file, np.uint8, "r").data)
    except (OSError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{file}: expected a whole MATLAB 5 file with the arrays X and y: {error}") from None
    x, y = variables["X"], variables["y"]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
        raise ValueError(f"{file}: X: expected uint8 of shape (32, 32, 3, N), got {x.dtype} of shape {x.shape}")
    if y.shape != (x.shape[3], 1) or y.size == 0:
        raise ValueError(f"{file}: y: expected one label an image, {(x.shape[3], 1)}, at least one, got {y.shape}")
    if not np.isin(y, np.arange(1, 11)).all():
        raise ValueError(f"{file}: y: expected labels 1 ... 10, got {y.min()} ... {y.max()}")
    labels = torch.from_numpy(y[:, 0].astype(np.int64) % 10)
    return Images(torch.from_numpy(_rows_first(x.T)), labels, 10, f"svhn {split}")


def _rows_first(columns_first: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The last two axes of (N, 3, 32, 32) exchanged, in the same memory if that may be written to."""
    images = np.require(columns_first, requirements=["C", "W"])
    for start in range(0, len(images), AT_A_TIME):
        some = images[start : start + AT_A_TIME]
        some[:] = some.swapaxes(2, 3).copy()
    return images


def _variables(data: memoryview) -> dict[str, NDArray[Any]]:
    """X and y of a file's bytes."""
    order = ORDERS.get(data[HEADER - 4 : HEADER].tobytes())
    if order is None:
        raise ValueError("its header is another")
    found = {}
    for kind, content in _elements(data[HEADER:], order):
        if kind == COMPRESSED:
            ((kind, content),) = _elements(memoryview(_decompressed(content, order)), order)
        if kind != MATRIX:
            raise ValueError(f"it holds an element of type {kind}")
        flags, dimensions, name, values = islice(_elements(content, order), 4)
        if (key := name[1].tobytes().decode("latin1")) in ("X", "y"):
            found[key] = _numbers(flags[1], dimensions[1], *values, order)
    if missing := {"X", "y"} - found.keys():
        raise ValueError(f"there is no array {min(missing)} in it")
    return found


def _decompressed(content: memoryview, order: str) -> bytearray:
    stream, data = zlib.decompressobj(), bytearray()
    for start in range(0, len(content), PIECE):
        data += stream.decompress(content[start : start + PIECE])
        if len(data) > (most := _whole(data, order)):
            raise ValueError("a compressed element holds more than it says")
        check_fits(most, "a compressed element")
        if stream.eof:  # its checksum was right
            return data
    raise ValueError("it ends within a compressed element")


def _whole(data: bytearray, order: str) -> int:
    """Bytes of an element, by its first eight; those are the least."""
    kind, size = struct.unpack_from(f"{order}II", data) if len(data) >= 8 else (1 << 16, 0)
    return 8 if kind >> 16 else 8 + size + -size % 8


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """The type and the bytes of one element after another."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        small = kind >> 16 != 0
        kind, size, start = (kind & 0xFFFF, kind >> 16, at + 4) if small else (kind, size, at + 8)
        at = at + 8 if small else start + size + (0 if kind == COMPRESSED else -size % 8)
        if start + size > min(at, len(data)):
            raise ValueError("it ends within an element")
        yield kind, data[start : start + size]


def _numbers(flags: memoryview, dimensions: memoryview, kind: int, values: memoryview, order: str) -> NDArray[Any]:
    (bits,) = struct.unpack_from(f"{order}I", flags)
    if not 6 <= bits & 0xFF <= 15 or bits & 0x0800 or kind not in NUMBERS:  # the class, the flag of complex numbers
        raise ValueError("it holds other things than real numbers")
    shape = np.frombuffer(dimensions, f"{order}i4")
    return np.frombuffer(values, order + NUMBERS[kind]).reshape(shape, order="F")
