"""Folders of image files, one folder a class: `train/<class>/*` and `test/<class>/*` (or `val/`); and Tiny ImageNet.

The classes are the names of the folders in `train/`, sorted: class 0 is the first of them. Files are sorted by their
names, too, within each class. Source of Tiny ImageNet: the course CS231n, Stanford University,
http://cs231n.stanford.edu/tiny-imagenet-200.zip.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saltflat.data.encoded import decoded
from saltflat.data.images import Images, Splits
from saltflat.data.stored import Stored, alone, stored_files


def folder(path: str | os.PathLike[str]) -> Splits:
    """Images (N, C, H, W), all of one size, from `train/<class>/` and `test/<class>/`.

    Where there is no `test/`, the test set is `val/`; not every class has to occur in it. Every file in a folder of a
    class has to be an image of a format that Pillow reads (PNG, JPEG, ...); what is hidden, by a dot that begins its
    name, is passed over, and links are followed. Images become RGB (C = 3; transparency is dropped), or stay grey
    (C = 1) when all of them, of both splits, are stored as 8-bit grey; they stand upright as their EXIF orientation
    says, before their sizes are compared. Needs the extra `data` (pillow).

    Raises FileNotFoundError for a missing folder, and ValueError, in one line, for a missing split or extra, for no
    classes, a class without files, a class of the test set that is none of the training set, and for a file that cannot
    be read or decoded, or differs in size from the first training image (it is named).

    >>> folder("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: no/such/folder: not found; expected a folder with train/ and test/ (or val/)
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: not found; expected a folder with train/ and test/ (or val/)")
    train, test = root / "train", root / ("test" if (root / "test").is_dir() else "val")
    for split, expected in ((train, "train/"), (test, "test/ or val/")):
        if not split.is_dir():
            raise ValueError(f"{root}: expected {expected} in it, with a folder for each class")
    classes = _classes(train)
    tested = _tested(test, classes)
    return _splits(
        root,
        classes,
        [_File(file, classes[each]) for each in classes for file in _files(train / each)],
        [_File(file, classes[each]) for each in tested for file in _files(test / each)],
    )


def stored_folder(path: str | os.PathLike[str], *, split: str = "train", like: Images | Stored | None = None) -> Stored:
    """Images on disk, from `<split>/<class>/`, as `folder` reads them into memory: the same rows in the same order.

    Args:
        path: a folder with `train/`, whose folders are the classes of every split.
        split: "train", "test" or "val"; without `test/`, the test set is `val/`.
        like: a set whose shape of images and number of classes this one has to have, as a test set those of the
            training set.

    Images are grey (C = 1) when all of this split, or those of `like`, are; to learn that of a grey set, the headers of
    all images are read. Each row is read by itself. Needs the extra `data` (pillow).

    Raises what `folder` does, for images other than the first when they are read.

    >>> stored_folder("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: no/such/folder: not found; expected a folder with train/
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: not found; expected a folder with {split}/")
    place = root / ("val" if split == "test" and not (root / "test").is_dir() else split)
    if not place.is_dir():
        raise ValueError(f"{root}: expected {split}/ in it, with a folder for each class")
    classes = _classes(root / "train")
    found = classes if split == "train" else _tested(place, classes)
    names = [np.array([os.fsencode(file.relative_to(root)) for file in _files(place / each)]) for each in found]
    labels = torch.tensor([classes[each] for each in found]).repeat_interleave(torch.tensor([len(n) for n in names]))
    return stored_files(
        _Files(root, np.concatenate(names), labels),
        labels,
        num_classes=len(classes),
        name=f"{root.resolve().name} {split}",
        blocks=alone(len(labels)),
        like=like,
    )


def tiny_imagenet(path: str | os.PathLike[str]) -> Splits:
    """100,000 training and 10,000 test images (N, 3, 64, 64) of 200 classes, from the folder tiny-imagenet-200.

    The training images are `train/<wnid>/images/*`; the test images are those of `val/images/`, with the classes and in
    the order of `val/val_annotations.txt`, since the published test set has no labels. Classes are the wnids, sorted.
    Needs the extra `data` (pillow). Errors are those of `folder`, and ValueError, in one line, for annotations that
    cannot be read, name another class, or name other files than there are.

    >>> tiny_imagenet("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: no/such/folder: not found; expected the folder tiny-imagenet-200, with train/ and val/
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: not found; expected the folder tiny-imagenet-200, with train/ and val/")
    train, val = root / "train", root / "val"
    classes = _classes(train)
    return _splits(
        root,
        classes,
        [_File(file, classes[each]) for each in classes for file in _files(train / each / "images")],
        _annotated(val / "val_annotations.txt", val / "images", classes),
    )


class _File(NamedTuple):
    """One image file, and its class."""

    path: Path
    label: int

    def __str__(self) -> str:
        return str(self.path)

    @property
    def data(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True, eq=False)
class _Files:
    """The files of some rows. names: (N,), relative to the root, in one array: workers would copy Python's strings, one
    by one, as they count references.
    """

    root: Path
    names: NDArray[np.bytes_]
    labels: Tensor

    def __call__(self, rows: Sequence[int]) -> list[_File]:
        return [_File(self.root / os.fsdecode(self.names[row]), int(self.labels[row])) for row in rows]


def _visible(place: Path) -> list[Path]:
    found = [each for each in place.iterdir() if not each.name.startswith(".")] if place.is_dir() else []
    return sorted(found, key=lambda each: each.name)


def _classes(split: Path) -> dict[str, int]:
    names = [each.name for each in _visible(split) if each.is_dir()]
    if not names:
        raise ValueError(f"{split}: expected a folder for each class in it, found none")
    return {name: number for number, name in enumerate(names)}


def _tested(test: Path, classes: Mapping[str, int]) -> Sequence[str]:
    """Names of those classes that the test set has. Published test sets may have no labels, and `val/` beside them."""
    try:
        names = list(_classes(test))
        for each in names:
            if each not in classes:
                train = test.parent / "train"
                raise ValueError(f"{test / each}: expected one of the classes in {train}, which has none of that name")
    except ValueError as error:
        if test.name == "test" and (test.parent / "val").is_dir():
            remedy = f"without labels it is of no use: move {test} away to have val/ as the test set"
            raise ValueError(f"{error}; {remedy}") from None
        raise
    return names


def _files(place: Path) -> list[Path]:
    files = _visible(place)
    if not files:
        raise ValueError(f"{place}: expected images in it, found none")
    return files


def _annotated(annotations: Path, place: Path, classes: Mapping[str, int]) -> list[_File]:
    """The files in the order of the lines; each is a name, a class, and the corners of a box, between tabs."""
    try:
        lines = annotations.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{annotations}: cannot be read: {error}") from None
    files = []
    for number, line in enumerate(lines, start=1):
        name, _, rest = line.partition("\t")
        label = classes.get(rest.partition("\t")[0])
        if label is None:
            raise ValueError(f"{annotations}, line {number}: expected a file, a tab and a class, got {line!r}")
        files.append(_File(place / name, label))
    named, there = Counter(file.path for file in files), Counter(_files(place))
    if unlike := (named - there) + (there - named):
        raise ValueError(f"{annotations}: expected each file in {place} once, and no other; see {min(unlike).name}")
    return files


def _splits(root: Path, classes: Mapping[str, int], train: Sequence[_File], test: Sequence[_File]) -> Splits:
    train_images, test_images = decoded(train, test)
    train_labels, test_labels = (torch.tensor([file.label for file in files]) for files in (train, test))
    name = root.resolve().name
    return Splits(
        Images(train_images, train_labels, len(classes), f"{name} train"),
        Images(test_images, test_labels, len(classes), f"{name} test"),
    )
