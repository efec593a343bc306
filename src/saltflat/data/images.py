"""A labelled set of images, held in memory as uint8, and splits of it that keep the proportions of the classes.

A quarter of the memory of floats, and exact: value / 255 is taken batch by batch (`to_float`). A split of size s gives
class c, with n_c of the N examples, floor(s n_c / N) places; the places that are left go to the largest remainders
(Hamilton's method), so that every class is within one example of its share and the sizes are exact.
"""

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their classes; checked when made.

    images: (N, C, H, W), uint8, 0 ... 255. labels: (N,), int64, 0 ... num_classes - 1. name: for tables and figures.

    Raises ValueError, in one line that names what is wrong and what is allowed.

    >>> black = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    >>> letters = Images(black, torch.tensor([0, 1, 1]), num_classes=2, name="letters")
    >>> len(letters), len(letters.subset(torch.tensor([2])))
    (3, 1)
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    num_classes: int
    name: str

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8:
            raise ValueError(f"{self.name}: images must be uint8, got {self.images.dtype}")
        if len(shape) != 4:
            raise ValueError(f"{self.name}: images must have shape (N, C, H, W), got {shape}")
        if self.images.numel() == 0:
            raise ValueError(f"{self.name}: needs at least one image with at least one pixel, got shape {shape}")
        if self.labels.dtype != torch.int64:
            raise ValueError(f"{self.name}: labels must be int64, got {self.labels.dtype}")
        if self.labels.shape != (shape[0],):
            raise ValueError(f"{self.name}: needs one label per image, {(shape[0],)}, got {tuple(self.labels.shape)}")
        if self.labels.device != self.images.device:
            raise ValueError(
                f"{self.name}: images and labels must share a device, got {self.images.device} and {self.labels.device}"
            )
        low, high = (int(value) for value in self.labels.aminmax())
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"{self.name}: labels must lie in 0 ... {self.num_classes - 1}, got {low} ... {high}")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "Images":
        """The examples at `indices` (k,), int64, in that order, copied; name and number of classes stay.

        Raises ValueError for indices that are not such a vector, that are empty, or that lie outside 0 ... N - 1.
        """
        if indices.dtype != torch.int64 or indices.ndim != 1 or len(indices) == 0:
            raise ValueError(
                f"indices must be a non-empty int64 vector, got {indices.dtype} of shape {tuple(indices.shape)}"
            )
        low, high = (int(value) for value in indices.aminmax())
        if low < 0 or high >= len(self):
            raise ValueError(f"indices must lie in 0 ... {len(self) - 1}, got {low} ... {high}")
        indices = indices.to(self.images.device)
        return Images(self.images[indices], self.labels[indices], self.num_classes, self.name)


@dataclass(frozen=True, eq=False)
class Splits:
    """What every reader returns: a training set, and a test set that nothing is chosen on.

    >>> from saltflat.data import digits
    >>> digits().test
    Images(num_classes=10, name='digits test')
    """

    train: Images
    test: Images


def check_fits(size: int, source: str) -> None:
    """ValueError, in one line, if so many bytes are more than this machine has memory: a small file can claim any size.

    >>> check_fits(2**60, "bomb.npz")
    Traceback (most recent call last):
    ValueError: bomb.npz: claims 1,073,741,824 GiB, more than this machine has memory
    """
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise ValueError(f"{source}: claims {size // 2**30:,} GiB, more than this machine has memory")


def to_float(images_uint8: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """value / 255: uint8 of any shape -> `dtype` in [0, 1], on the same device.

    Raises ValueError for images that are not uint8 (they may be divided already) and for a `dtype` that is not
    floating.

    >>> to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    if images_uint8.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {images_uint8.dtype}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating, got {dtype}")
    return images_uint8.to(dtype) / 255


def stratified_split(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the rest (N - size,) and of `size` held-out examples (size,): int64, sorted, on the CPU.

    labels: (N,), integers. Every class has its share of the held-out set, rounded up or down. Equal arguments give
    equal splits; torch's global generator is neither used nor moved. A split of size N leaves no rest.

    Raises ValueError for labels that are no vector and for a size outside 1 ... N.

    >>> rest, held_out = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1]), size=3, seed=0)
    >>> len(rest), len(held_out), int((held_out < 4).sum())
    (3, 3, 2)
    """
    if labels.ndim != 1:
        raise ValueError(f"labels must be a vector (N,), got shape {tuple(labels.shape)}")
    if not 1 <= size <= len(labels):
        raise ValueError(f"size must lie in 1 ... {len(labels)} (the number of examples), got {size}")
    _, classes, counts = torch.unique(labels.cpu(), return_inverse=True, return_counts=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[classes[order].argsort(stable=True)]  # class by class, shuffled within each class
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(labels)) - first[classes[order]]
    held_out = rank < _places(counts, size)[classes[order]]
    return order[~held_out].sort().values, order[held_out].sort().values


def stratified_subset(labels: Tensor, size: int, seed: int) -> Tensor:
    """The held-out half of `stratified_split`: sorted indices (size,) of examples in the proportions of the whole.

    >>> stratified_subset(torch.tensor([0, 1, 0, 1]), size=2, seed=0).shape
    torch.Size([2])
    """
    return stratified_split(labels, size, seed)[1]


def _places(counts: Tensor, size: int) -> Tensor:
    """How many of `size` places each class gets, (classes,), in integers: no share is lost to rounding."""
    total = int(counts.sum())
    places = counts * size // total
    largest_remainders = (counts * size % total).argsort(descending=True, stable=True)
    places[largest_remainders[: size - int(places.sum())]] += 1
    return places
