"""CIFAR-10 and CIFAR-100 from the published archives, as they were downloaded or unpacked; nothing is written to disk.

A binary record is label bytes, then 3072 pixel bytes: the red, the green and the blue plane of a 32x32 image, row by
row. The Python archives hold the same planes in pickles, which are read by a reader that runs no code
(`saltflat.data.pickles`). Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009),
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import os
import tarfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saltflat.data import pickles
from saltflat.data.images import Images, Splits

PIXELS = 3 * 32 * 32  # bytes of one image
LARGEST = 2**30  # bytes of an archive, unpacked: the published ones have a fifth, and a small file can unpack to any


@dataclass(frozen=True)
class _Layout:
    """Where a data set keeps what. In binary archives, file names end in .bin and the last label byte is the class."""

    name: str
    num_classes: int
    train: tuple[str, ...]
    test: str
    label_bytes: int
    label_key: str
    accepted: str

    @property
    def pickled(self) -> tuple[str, ...]:
        return (*self.train, self.test)

    @property
    def binary(self) -> tuple[str, ...]:
        return tuple(f"{file}.bin" for file in self.pickled)


_CIFAR10 = _Layout(
    name="cifar10",
    num_classes=10,
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    label_bytes=1,
    label_key="labels",
    accepted=(
        "cifar-10-binary.tar.gz, cifar-10-python.tar.gz, or the folder that one of them unpacks to "
        "(cifar-10-batches-bin, cifar-10-batches-py)"
    ),
)
_CIFAR100 = _Layout(
    name="cifar100",
    num_classes=100,
    train=("train",),
    test="test",
    label_bytes=2,  # the coarse label comes first
    label_key="fine_labels",
    accepted=(
        "cifar-100-binary.tar.gz, cifar-100-python.tar.gz, or the folder that one of them unpacks to "
        "(cifar-100-binary, cifar-100-python)"
    ),
)


def cifar10(path: str | os.PathLike[str]) -> Splits:
    """50,000 training and 10,000 test images (N, 3, 32, 32) of ten classes.

    path: cifar-10-binary.tar.gz or cifar-10-python.tar.gz, or the folder that one of them unpacks to
    (cifar-10-batches-bin, cifar-10-batches-py). What is inside decides how it is read, not the name. Training images
    keep the order of the files.

    Raises FileNotFoundError for a missing path, and ValueError, in one line, for what is no such archive, for a missing
    or cut file in it, and for a pickle that names more than arrays of numbers.

    >>> cifar10("no/such/archive.tar.gz")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileNotFoundError: no/such/archive.tar.gz: not found; cifar10 reads cifar-10-binary.tar.gz, ...
    """
    return _read(Path(path), _CIFAR10)


def cifar100(path: str | os.PathLike[str]) -> Splits:
    """50,000 training and 10,000 test images (N, 3, 32, 32) with the 100 fine labels.

    path: cifar-100-binary.tar.gz or cifar-100-python.tar.gz, or the folder that one of them unpacks to
    (cifar-100-binary, cifar-100-python). Errors are those of `cifar10`.

    >>> cifar100("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileNotFoundError: no/such/folder: not found; cifar100 reads cifar-100-binary.tar.gz, ...
    """
    return _read(Path(path), _CIFAR100)


def _read(path: Path, layout: _Layout) -> Splits:
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; {layout.name} reads {layout.accepted}")
    wanted = {*layout.binary, *layout.pickled}
    found = _folder(path, wanted) if path.is_dir() else _archive(path, wanted, layout.accepted)
    binary = not found.keys().isdisjoint(layout.binary)
    files = layout.binary if binary else layout.pickled
    if found.keys().isdisjoint(files):
        raise ValueError(
            f"{path}: holds neither {layout.binary[0]} nor {layout.pickled[0]}; expected {layout.accepted}"
        )
    for file in files:
        if file not in found:
            raise ValueError(f"{path}: {file} is missing; expected {', '.join(files)}")
    parse = _binary if binary else _pickled
    parts = [parse(found[file], layout, f"{path}: {file}") for file in files]
    return Splits(_joined(parts[:-1], layout, "train"), _joined(parts[-1:], layout, "test"))


def _folder(path: Path, wanted: Collection[str]) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in wanted if (path / name).is_file()}


def _archive(path: Path, wanted: Collection[str], accepted: str) -> dict[str, bytes]:
    """The wanted members of a tar file, by the last part of their names, in one pass over the file."""
    found = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if member.offset_data + member.size > LARGEST:
                    raise ValueError(f"{member.name!r} ends beyond {LARGEST:,} bytes")
                name = PurePosixPath(member.name).name
                file = archive.extractfile(member) if member.isfile() and name in wanted else None
                if file is not None:
                    found[name] = file.read()
            while archive.fileobj is not None and archive.fileobj.read(2**20):
                # gzip compares its checksum only at the very end, which lies behind the last member
                if archive.fileobj.tell() > LARGEST:
                    raise ValueError(f"goes on beyond {LARGEST:,} bytes")
    except Exception as error:  # a damaged archive can fail in any of its parts
        raise ValueError(f"{path}: not a tar archive that can be read to its end; expected {accepted}") from error
    return found


def _binary(data: bytes, layout: _Layout, source: str) -> tuple[Tensor, Tensor]:
    record = layout.label_bytes + PIXELS
    if len(data) == 0 or len(data) % record != 0:
        raise ValueError(f"{source} has {len(data)} bytes; expected a whole number of records of {record} bytes")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return _tensors(records[:, layout.label_bytes :], records[:, layout.label_bytes - 1], layout, source)


def _pickled(data: bytes, layout: _Layout, source: str) -> tuple[Tensor, Tensor]:
    content = pickles.load(data, source)
    entries = content if isinstance(content, dict) else {}
    pixels, labels = (entries.get(key.encode(), entries.get(key)) for key in ("data", layout.label_key))
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (PIXELS,)):
        raise ValueError(f"{source} needs an array 'data' of uint8 and shape (N, {PIXELS})")
    if not (isinstance(labels, list) and all(type(label) is int for label in labels)):
        raise ValueError(f"{source} needs a list {layout.label_key!r} of whole numbers")
    if not len(pixels) == len(labels) > 0:
        raise ValueError(
            f"{source} has {len(pixels)} images and {len(labels)} labels; expected equally many, at least one"
        )
    return _tensors(pixels, np.array(labels), layout, source)


def _tensors(pixels: NDArray[Any], labels: NDArray[Any], layout: _Layout, source: str) -> tuple[Tensor, Tensor]:
    """(N, 3072) and (N,) -> (N, 3, 32, 32) uint8 and (N,) int64, in memory of their own."""
    if labels.min() < 0 or labels.max() >= layout.num_classes:
        raise ValueError(
            f"{source} has labels {labels.min()} ... {labels.max()}; {layout.name} has 0 ... {layout.num_classes - 1}"
        )
    return torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), torch.from_numpy(labels.astype(np.int64))


def _joined(parts: list[tuple[Tensor, Tensor]], layout: _Layout, split: str) -> Images:
    images, labels = zip(*parts, strict=True)
    return Images(torch.cat(images), torch.cat(labels), layout.num_classes, f"{layout.name} {split}")
