"""How far a measured curve g(alpha) = rho(w + alpha d) rises, in a number or two.

    area                ∫ [g(alpha) - g(0)] d alpha
    widths              |alpha| at which g(alpha) - g(0) first reaches a threshold, to the left and to the right of 0
    half_width          their mean
    curvature_at_zero   g''(0) = d^T H d

On g(alpha) = c alpha^2 / 2 in [-a, a] they are c a^3 / 3, sqrt(2 threshold / c) on both sides, and c. All are read
from the points that were measured, between which g is taken to be linear.

A point whose g is NaN was not measured: its neighbours are joined in its place. At either end, or at 0, nothing can
take its place, and what depends on it is NaN. A g of inf (a loss that overflows far out) was measured, and is beyond
every threshold; at 0, it is as good as NaN.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # where, and g there less g(0)


def area(alphas: ArrayLike, g: ArrayLike) -> float:
    """∫ [g(alpha) - g(0)] d alpha over the range of alphas, by trapezoids.

    Args:
        alphas: (n,), increasing, with 0 among them; in units of the direction.
        g: (n,), in nats or whatever was measured.

    Returns: in g's unit times alpha's. Where g'' = c, trapezoids of width h have c h^2 / 12 too much for every unit of
    alpha, so curves that are to be compared need the same alphas.

    Raises: ValueError for shapes that differ, and for alphas that do not increase or lack 0.

    >>> area([-2.0, 0.0, 2.0], [5.0, 1.0, 5.0])
    8.0
    """
    at, rise = _centred(alphas, g)
    known = ~np.isnan(rise)
    if not (known[0] and known[-1]):
        return math.nan
    at, rise = at[known], rise[known]
    return float((np.diff(at) * (rise[1:] + rise[:-1]) / 2).sum())


def widths(alphas: ArrayLike, g: ArrayLike, threshold: float) -> tuple[float, float]:
    """The distances from 0 at which g(alpha) - g(0) first reaches the threshold, to the left and to the right.

    Args:
        alphas, g: as in `area`, with points on both sides of 0.
        threshold: in g's unit, > 0.

    Returns: (left, right), in alpha's unit; infinity for a side that never reaches it. A g of inf is beyond it, and the
    width is then the last point before. A g of NaN was not measured and is passed over; a side whose end it is has a
    width of NaN, if the threshold is not reached before.

    Raises: ValueError as `area` does, for alphas on one side of 0 only, and for a threshold that is not positive.

    >>> widths([-2.0, -1.0, 0.0, 1.0, 2.0], [5.0, 1.0, 0.0, 4.0, 9.0], threshold=2.0)
    (1.25, 0.5)
    >>> widths([-1.0, 0.0, 1.0, 2.0], [1.0, 0.0, 1.0, math.inf], threshold=2.0)
    (inf, 1.0)
    """
    if not threshold > 0:
        raise ValueError(f"threshold: expected a number > 0, got {threshold!r}")
    left, right = _sides(*_centred(alphas, g))
    return _reach(*left, threshold), _reach(*right, threshold)


def half_width(alphas: ArrayLike, g: ArrayLike, threshold: float) -> float:
    """The mean of both `widths`, which take the same arguments: NaN if one of them is, or else infinity if one is.

    >>> half_width([-2.0, -1.0, 0.0, 1.0, 2.0], [5.0, 1.0, 0.0, 4.0, 9.0], threshold=2.0)
    0.875
    """
    left, right = widths(alphas, g, threshold)
    return (left + right) / 2


def curvature_at_zero(alphas: ArrayLike, g: ArrayLike) -> float:
    """g''(0) by the central difference of 0 and its neighbours, which need not be equally far: exact for quadratics.

    Args:
        alphas, g: as in `area`, with points on both sides of 0.

    Returns: in g's unit per alpha's squared.

    >>> curvature_at_zero([-1.0, 0.0, 2.0], [1.5, 0.0, 6.0])
    3.0
    """
    slopes, lengths = [], []
    for far, rise in _sides(*_centred(alphas, g)):
        known = np.flatnonzero(~np.isnan(rise))
        if len(known) < 2:
            return math.nan
        slopes.append(rise[known[1]] / far[known[1]])
        lengths.append(far[known[1]])
    return float(2 * sum(slopes) / sum(lengths))


def _centred(alphas: ArrayLike, g: ArrayLike) -> Curve:
    at, values = np.asarray(alphas, np.float64), np.asarray(g, np.float64)
    if at.ndim != 1 or at.shape != values.shape:
        raise ValueError(f"g: expected as many numbers as alphas, got shapes {values.shape} and {at.shape}")
    if not (np.diff(at) > 0).all() or 0 not in at:
        raise ValueError(f"alphas: expected increasing numbers with 0 among them, got {at.tolist()!r}")
    origin = values[at == 0]
    return at, values - np.where(np.isfinite(origin), origin, np.nan)


def _sides(at: NDArray[np.float64], rise: NDArray[np.float64]) -> tuple[Curve, Curve]:
    """Left and right of 0, outwards, by the distance from 0, which comes first in both."""
    if not at[0] < 0 < at[-1]:
        raise ValueError(f"alphas: expected numbers on both sides of 0, got {at.tolist()!r}")
    left, right = at <= 0, at >= 0
    return (-at[left][::-1], rise[left][::-1]), (at[right], rise[right])


def _reach(far: NDArray[np.float64], rise: NDArray[np.float64], threshold: float) -> float:
    known = ~np.isnan(rise)
    far, heights = far[known], rise[known]
    beyond = np.flatnonzero(heights >= threshold)
    if len(beyond) == 0:
        return math.inf if known[-1] else math.nan
    k = beyond[0]
    share = (threshold - heights[k - 1]) / (heights[k] - heights[k - 1])
    return float(far[k - 1] + share * (far[k] - far[k - 1]))
