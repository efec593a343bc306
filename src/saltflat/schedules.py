"""Schedules: pure functions of progress t in [0, 1], for the learning rate, gamma, beta and eps alike.

    constant(a)(t)                = a
    piecewise(a, {s: c, ...})(t)  = a * (product of all c whose s <= t)
    cosine(a, b)(t)               = b + (a - b) (1 + cos(pi t)) / 2
    cyclic(a, peak)(t)            = linear from 0 to a at t = peak, and back to 0
    warm_up(f, s)(t)              = f(t) min(1, t / s)                       linear
    from_progress(s, f)(t)        = 0 before s, f(t) from s on               the late start of AWP

Sources: Rice, Wong, Kolter, arXiv 2002.11569 (the learning rates of the field); awp-warmup of Wu, Xia, Wang's scripts
(`from_progress`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

Schedule = Callable[[float], float]


def constant(value: float) -> Schedule:
    """The same value always.

    >>> constant(0.1)(0.7)
    0.1
    """
    return lambda t: value


def piecewise(value: float, factors: Mapping[float, float]) -> Schedule:
    """`value`, multiplied by each of the factors, {progress: factor}, from its progress on. ValueError for one that
    does not begin in (0, 1).

    >>> [round(piecewise(0.1, {0.5: 0.1, 0.75: 0.1})(t), 6) for t in (0.49, 0.5, 0.75)]
    [0.1, 0.01, 0.001]
    """
    for t in factors:
        _check_progress(t)
    return lambda t: value * math.prod(factor for start, factor in factors.items() if start <= t)


def cosine(value: float, final: float = 0.0) -> Schedule:
    """Half a cosine from `value` to `final` (Loshchilov and Hutter, arXiv 1608.03983).

    >>> cosine(1.0)(0.5)
    0.5
    """
    return lambda t: final + (value - final) * (1 + math.cos(math.pi * t)) / 2


def cyclic(value: float, peak: float = 0.4) -> Schedule:
    """One triangle: linear from 0 to `value` at progress `peak`, linear to 0 at the end (Smith, arXiv 1506.01186; one
    cycle). ValueError for a peak outside of (0, 1).

    >>> [cyclic(1.0, 0.4)(t) for t in (0.0, 0.2, 0.4, 1.0)]
    [0.0, 0.5, 1.0, 0.0]
    """
    _check_progress(peak)
    return lambda t: value * (t / peak if t < peak else (1 - t) / (1 - peak))


def warm_up(schedule: Schedule, until: float) -> Schedule:
    """Linear from 0 to the schedule's own values at progress `until`. ValueError for one outside of (0, 1).

    >>> warm_up(constant(1.0), 0.1)(0.05)
    0.5
    """
    _check_progress(until)
    return lambda t: schedule(t) * min(1.0, t / until)


def from_progress(start: float, schedule: Schedule) -> Schedule:
    """0 before progress `start`, the schedule from there on. ValueError for a start outside of [0, 1].

    >>> [from_progress(0.05, constant(5e-3))(t) for t in (0.0, 0.04, 0.05)]
    [0.0, 0.0, 0.005]
    """
    if not 0 <= start <= 1:
        raise ValueError(f"start: expected progress in [0, 1], got {start!r}")
    return lambda t: 0.0 if t < start else schedule(t)


def _check_progress(t: float) -> None:
    if not 0 < t < 1:
        raise ValueError(f"progress: expected a number in (0, 1), got {t!r}")
