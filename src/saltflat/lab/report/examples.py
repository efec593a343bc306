"""Galleries of adversarial examples: as they are, as an attack changed them, and the difference, magnified.

    difference shown = 1/2 + k (x' − x)

around middle grey, with the largest k among 1, 2, 5, 10, ... that keeps every difference of a gallery between black and
white.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saltflat.lab.report.fooled import Example, Examples
from saltflat.lab.report.png import data_address
from saltflat.lab.report.statistics import Group

FEW, MANY = 4, 8  # examples shown of a group where there are more than two groups, and where there are not
LARGEST = 1000  # k


@dataclass(frozen=True)
class Picture:
    """An image as an address that stands in the page, with words for those who cannot see it."""

    address: str
    under: str
    words: str
    width: int
    height: int


@dataclass(frozen=True)
class Card:
    """One example: its pictures side by side, and what became of it."""

    pictures: tuple[Picture, ...]
    words: str


@dataclass(frozen=True)
class Gallery:
    """Examples of one run."""

    name: str
    series: int
    cards: tuple[Card, ...]
    caption: str


def galleries(groups: Sequence[Group]) -> list[Gallery]:
    """For each group, examples of its first finished run that has any: of its last weights, if they were attacked."""
    most = MANY if len(groups) <= 2 else FEW
    shown = []
    for group in groups:
        run = next((run for run in group.finished if run.examples), None)
        if run is not None:
            kept = next((one for one in run.examples if one.checkpoint == "last"), run.examples[0])
            shown.append(_gallery(f"{group.name}, seed {run.seed}", group.series, kept, most))
    return shown


def _gallery(name: str, series: int, kept: Examples, most: int) -> Gallery:
    chosen = kept.examples[:most]
    factor = magnification(max(float(np.abs(one.attacked - one.clean).max()) for one in chosen))
    return Gallery(
        name,
        series,
        tuple(_card(one, factor) for one in chosen),
        f"The first {len(chosen)} of {kept.n} {kept.split} images that an attack fooled; weights: {kept.checkpoint}; "
        f"threat: {kept.threat}. Difference: attacked minus clean, times {factor:g}; middle grey is none.",
    )


def magnification(largest: float) -> float:
    """The largest of 1, 2, 5, 10, ... by which a difference can be multiplied without leaving −1/2 ... 1/2.

    >>> magnification(8 / 255), magnification(0.15), magnification(0.9), magnification(0.0)
    (10.0, 2.0, 1.0, 1000.0)
    """
    if largest * LARGEST <= 0.5:
        return float(LARGEST)
    room = max(1.0, 0.5 / largest * (1 + 1e-6))
    power = 10.0 ** math.floor(math.log10(room))
    return max(digit * power for digit in (1.0, 2.0, 5.0) if digit * power <= room)


def _card(one: Example, factor: float) -> Card:
    difference = 0.5 + factor * (one.attacked - one.clean)
    shown = (("clean", one.clean), ("attacked", one.attacked), (f"difference × {factor:g}", difference))
    height, width = one.clean.shape[:2]
    pictures = (
        Picture(data_address(eight_bits(image)), under, f"image {one.example}, {under}", width, height)
        for under, image in shown
    )
    words = f"image {one.example}: class {one.label}, taken for {one.predicted} under {one.attack}"
    return Card(tuple(pictures), words)


def eight_bits(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """An image in [0, 1], (H, W, C), as (H, W) grey or (H, W, 3), 0 ... 255."""
    rounded = np.rint(255 * np.clip(image.astype(np.float64), 0, 1)).astype(np.uint8)
    return rounded[..., 0] if image.shape[2] == 1 else rounded
