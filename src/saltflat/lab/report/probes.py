"""Probes: what a reader who points at a figure, or goes along it with the arrow keys, is told of each place in it.

The words are made here, from the arrays that the figure was drawn from; the page's script only shows them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from markupsafe import Markup

from saltflat.lab.report.curves import GroupCurves, GroupLandscape, Ordinate, mean_and_deviation, mean_curves
from saltflat.lab.report.drawing import Frame, shortened
from saltflat.lab.report.notation import UNBROKEN, decimal


@dataclass(frozen=True)
class Reading:
    """One value at a stop: whose, in words, and how far from the figure's top it lies, in percent; None where there is
    no value. `series`: 1 to 6, its colour.
    """

    name: str
    series: int
    words: str
    top: float | None


@dataclass(frozen=True)
class Stop:
    """A place along a figure, in percent from its left, and the values there."""

    at: str
    left: float
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Probe:
    """All stops of one figure, from left to right, and the one at which a reader begins; `top` and `bottom` of its axes
    are in percent from the figure's top.
    """

    label: str
    top: float
    bottom: float
    stops: tuple[Stop, ...]
    start: int


def island(probes: Sequence[Probe | None]) -> Markup:
    """Probes as JSON that can stand in a script element, null for figures without one."""
    return in_script([probe and asdict(probe) for probe in probes])


def in_script(content: object) -> Markup:
    """JSON that can stand in a script element: no `<`, no nan.

    >>> str(in_script({"name": "</script>"}))
    '{"name":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026"))


def along_epochs(group: GroupCurves, frame: Frame) -> Probe | None:
    """Means over seeds at every epoch; None if the seeds have no epoch in common."""
    epochs, (train, test, clean) = mean_curves(group.seeds)
    series = group.series % 6 + 1
    stops = []
    for index, epoch in enumerate(epochs):
        curves = {"robust, test": test, "robust, training subset": train, "clean, test": clean}
        readings = [
            _reading(name, series, frame, epoch, values[index], decimal(values[index], 2) + f"{UNBROKEN}%")
            for name, values in curves.items()
        ]
        gap = decimal(train[index] - test[index], 2) + f"{UNBROKEN}points"
        left, _ = frame.place(epoch, frame.up[0])
        stops.append(Stop(f"epoch {epoch:.0f}", left, (*readings, Reading("gap", series, gap, None))))
    label = f"Learning curves of {shortened(group.name, 60)}: values at each epoch"
    return Probe(label, frame.top, frame.bottom, tuple(stops), len(stops) - 1) if stops else None


def along_direction(groups: Sequence[GroupLandscape], ordinate: Ordinate, frame: Frame) -> Probe:
    """Means over directions and seeds at every alpha, with the sample standard deviation where there are several."""
    alphas = groups[0].alphas
    means = [mean_and_deviation(group.curves(ordinate)) for group in groups]

    def reading(group: GroupLandscape, mean: float, deviation: float, alpha: float) -> Reading:
        several = sum(map(len, group.values)) > 1
        spread = f" ± {decimal(deviation, ordinate.places)}" if several else ""
        words = f"{decimal(mean, ordinate.places)}{spread}{ordinate.unit or f'{UNBROKEN}nats'}"
        shown = words if np.isfinite(mean) else "not measured"
        return _reading(group.name, group.series % 6 + 1, frame, alpha, mean, shown)

    def stop(index: int, alpha: float) -> Stop:
        at = f"α = {alpha:.3g}".replace("-", "−")
        readings = (
            reading(group, float(mean[index]), float(deviation[index]), alpha)
            for group, (mean, deviation) in zip(groups, means, strict=True)
        )
        return Stop(at, frame.place(alpha, frame.up[0])[0], tuple(readings))

    stops = tuple(stop(index, float(alpha)) for index, alpha in enumerate(alphas))
    label = f"{ordinate.title}, {ordinate.words}: values at each α"
    return Probe(label, frame.top, frame.bottom, stops, int(np.argmin(np.abs(alphas))))


def _reading(name: str, series: int, frame: Frame, x: float, value: float, words: str) -> Reading:
    top = frame.place(x, value)[1] if np.isfinite(value) else None
    return Reading(shortened(name, 60), series, words, top)
