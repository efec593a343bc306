"""Surfaces: what was measured over planes in weight space, as arrays, and the levels at which they are cut.

    g(alpha, beta) = value at w + alpha d + beta e,

d and e the normalised directions, alpha and beta in their lengths; nan where a value is missing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saltflat.lab.report.curves import Array
from saltflat.lab.report.notation import decimal


@dataclass(frozen=True, eq=False)
class Surface:
    """The robust loss of one run, in nats, with the run's place in the page's colours."""

    name: str
    alphas: Array  # (A,), ascending, with 0
    betas: Array  # (B,), ascending, with 0
    values: Array  # (A, B)
    series: int = 0

    @property
    def at_w(self) -> float:
        """g(0, 0)."""
        return float(self.values[nearest_zero(self.alphas), nearest_zero(self.betas)])

    @property
    def centred(self) -> Array:
        """g(alpha, beta) − g(0, 0)."""
        return self.values - self.at_w

    @property
    def origin(self) -> str:
        """g(0, 0) in words."""
        return f"g(0, 0) = {decimal(self.at_w, 3)}"


def nearest_zero(steps: Array) -> int:
    """Index of 0; ValueError where it was not measured."""
    index = int(np.argmin(np.abs(steps)))
    if abs(steps[index]) > 1e-9:
        raise ValueError("0 is not among the steps")
    return index


def extent(surfaces: Sequence[Array]) -> tuple[float, float]:
    """The least and the greatest finite value of all, (0, 0) if there is none."""
    finite = np.concatenate([values[np.isfinite(values)] for values in surfaces])
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def levels_between(low: float, high: float, most: int = 9) -> Array:
    """The greatest 1, 2 and 5 times powers of ten, at most so many, with either sign, strictly between two values.

    A loss rises by orders of magnitude from w to the corners of a plane: even steps would leave its middle blank.

    >>> levels_between(-0.3, 2.5, most=4).tolist()
    [-0.2, 0.2, 0.5, 1.0, 2.0]
    >>> levels_between(0.0, 0.0).tolist()
    []
    """
    largest = max(-low, high)
    if largest <= 0:
        return np.empty(0)
    top = math.floor(math.log10(largest))
    steps = [float(f"{digit}e{power}") for power in range(top - most, top + 1) for digit in (1, 2, 5)]
    sizes = [step for step in steps if step < largest][-most:]
    return np.array([level for level in (*(-size for size in reversed(sizes)), *sizes) if low < level < high])


def level_in_words(level: float) -> str:
    """
    >>> level_in_words(-0.05)
    '−0.05'
    """
    return f"{level:g}".replace("-", "−")
