"""Figures of the study of the paper's claims, as SVG: what AWP changes, pair by pair, and what its size does.

Differences are in percentage points, paired over seeds; a bar is Student's 95 % interval of the mean, a small mark the
difference of one seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from saltflat.lab.report.drawing import INK, MUTED, SMALL, colour, drawing, panel, svg
from saltflat.lab.report.forests import frame, label
from saltflat.lab.report.notation import decimal
from saltflat.lab.report.statistics import Spread


@dataclass(frozen=True, eq=False)
class Strip:
    """A quantity: its title, what it is in small print, and a difference for every row."""

    title: str
    under: str
    differences: Sequence[Spread]


def forest(
    rows: Sequence[str], strips: Sequence[Strip], *, title: str, note: str, identity: str, description: str
) -> str:
    """A row for every pair, a column for every quantity with its own axis, and every mean in numbers above its dot."""
    with drawing(identity):
        figure, columns = frame(title, note, len(rows), [(strip.title, strip.under) for strip in strips])
        for place, (axes, strip) in enumerate(zip(columns, strips, strict=True)):
            reach = 1.1 * max([1e-9, *(_reach(spread) for spread in strip.differences)])
            axes.set_xlim(-reach, reach)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, symmetric=True))
            axes.xaxis.set_major_formatter(FuncFormatter(_tick))
            for row, difference in enumerate(strip.differences):
                _estimate(axes, row, difference, colour(place))
        for row, name in enumerate(rows):
            label(figure, row, name)
        return svg(figure, identity, description)


def _reach(of: Spread) -> float:
    """How far from 0 a row's marks and interval go; that of two seeds, twelve times their distance, is cut."""
    values = [abs(value) for value in of.by_seed.values()]
    ends = [abs(end) for end in of.interval] if of.n > 2 else []
    return max([0.0, *values, *ends])


def _estimate(axes: Axes, row: int, of: Spread, ink: str) -> None:
    values = np.array(list(of.by_seed.values()))
    if not len(values):
        return
    axes.plot(values, np.full(len(values), row + 0.24), "|", color=ink, markersize=6, markeredgewidth=1.2, zorder=3)
    if of.n > 1:
        axes.plot(of.interval, [row, row], color=ink, linewidth=2.4, solid_capstyle="butt", zorder=3)
    axes.plot([of.mean], [row], "o", color=ink, markersize=6.5, zorder=4)
    axes.annotate(
        _points(of.mean), (of.mean, row), (0, 6), "data", "offset points", ha="center", fontsize=SMALL, color=INK
    )


def _tick(value: float, _: int | None = None) -> str:
    """
    >>> _tick(-2.5), _tick(0.0), _tick(10.0)
    ('−2.5', '0', '+10')
    """
    return f"{value:+g}".replace("-", "−") if value else "0"


def _points(value: float) -> str:
    """
    >>> _points(-2.04), _points(0.04), _points(3.0)
    ('−2.0', '0.0', '+3.0')
    """
    return f"{'+' if round(value, 1) > 0 else ''}{decimal(value, 1)}"


def dose(
    sizes: Sequence[float],
    values: Sequence[Spread],
    without: Spread,
    *,
    title: str,
    note: str,
    series: int,
    identity: str,
    description: str,
) -> str:
    """A quantity against the size gamma, on a logarithmic axis, with intervals; a line and a band: without AWP."""
    with drawing(identity):
        figure, axes = panel(title, note, right=14, series=series)
        ink = colour(series)
        if without.n > 1:
            axes.axhspan(*without.interval, color=MUTED, alpha=0.13, linewidth=0, zorder=1)
        axes.axhline(without.mean, color=MUTED, linewidth=1.4, linestyle=(0, (5, 2)), zorder=2)
        means = [value.mean for value in values]
        axes.plot(sizes, means, color=ink, linewidth=1.6, zorder=3)
        for size, value in zip(sizes, values, strict=True):
            if value.n > 1:
                axes.plot([size, size], value.interval, color=ink, linewidth=2.2, zorder=3)
            axes.plot([size], [value.mean], "o", color=ink, markersize=6.5, zorder=4)
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("gamma, relative to each layer's norm, logarithmic axis")
        return svg(figure, identity, description)
