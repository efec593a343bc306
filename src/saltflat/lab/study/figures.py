"""Figures of the study, as SVG: a forest of taus, and scatters of one quantity against the gap.

Forest: a row per measure, a column per target; filled marks are tau-b, hollow ones the partial tau given training
robust loss, with their 95 % intervals. Scatter: a mark per model, in colour and shape of its method, hollow if
undertrained. Units: gaps in loss in nats, gaps in accuracy in points, accuracies in percent; measures as they say.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from saltflat.lab.report.drawing import INK, MUTED, SMALL, WIDTH, colour, drawing, line, panel, shortened, svg
from saltflat.lab.report.forests import frame, label
from saltflat.lab.study.association import Array
from saltflat.lab.study.findings import Association, Estimate, Finding
from saltflat.lab.study.table import GAP_ACCURACY, GAP_LOSS, NEGATIVE

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DECADES = 50.0  # a quantity that spreads by more than this factor is drawn on a logarithmic axis
COLUMNS = (
    (GAP_LOSS, "gap in robust loss", "test − train", 0),
    (GAP_ACCURACY, "gap in robust accuracy", "train − test", 2),
    (NEGATIVE, "test robust accuracy", "negative control", 5),
)


@dataclass(frozen=True, eq=False)
class Points:
    """One mark per model; `x` with standard errors that are nan where unknown."""

    x: Array  # (n,)
    y: Array  # (n,)
    errors: Array  # (n,)
    series: NDArray[np.intp]  # (n,), the place of each model's method
    hollow: NDArray[np.bool_]  # (n,)


def forest(rows: Sequence[Finding], controls: Sequence[Finding], *, note: str, identity: str, description: str) -> str:
    """tau-b of every measure with every target; the controls stand below a line, as measures would."""
    everyone = [*rows, *controls]
    heads = [(title, under) for _, title, under, _ in COLUMNS]
    with drawing(identity):
        figure, columns = frame("Kendall's τ of measure and target", note, len(everyone), heads)
        for axes, (target, _, _, series) in zip(columns, COLUMNS, strict=True):
            axes.set_xlim(-1.05, 1.05)
            axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["−1", "−0.5", "0", "0.5", "1"])
            axes.set_xlabel("τ-b, 95 % interval", color=MUTED, fontsize=SMALL)
            for row, finding in enumerate(everyone):
                _estimates(axes, row, finding.with_target(target), colour(series), partial=row < len(rows))
            if controls:
                axes.axhline(len(rows) - 0.5, color=MUTED, linewidth=0.8, zorder=1)
        for row, finding in enumerate(everyone):
            label(figure, row, finding.measure.name, _row_note(finding, control=row >= len(rows)))
        _forest_key(figure)
        return svg(figure, identity, description)


def _row_note(finding: Finding, *, control: bool) -> str:
    n = f"n = {finding.models}, runs: {finding.runs}"
    return f"control · {n}" if control else f"expected {'+' if finding.measure.sign > 0 else '−'} · {n}"


def _estimates(axes: Axes, row: int, association: Association, ink: str, *, partial: bool) -> None:
    _bar(axes, association.tau, row - 0.1 if partial else row, ink, hollow=False)
    if partial:
        _bar(axes, association.given_train_loss, row + 0.22, ink, hollow=True)


def _bar(axes: Axes, estimate: Estimate, y: float, ink: str, *, hollow: bool) -> None:
    if not math.isfinite(estimate.value):
        return
    inside = 0.035 if hollow else 0.0  # the interval's line does not run through a hollow mark
    for start, end in ((estimate.low, estimate.value - inside), (estimate.value + inside, estimate.high)):
        if start < end:
            axes.plot(
                [start, end], [y, y], color=ink, linewidth=1.1 if hollow else 2.2, zorder=3, solid_capstyle="butt"
            )
    face, size = ("none", 6.0) if hollow else (ink, 6.5)
    axes.plot(
        [estimate.value], [y], "o", markersize=size, color=ink, markerfacecolor=face, markeredgewidth=1.3, zorder=4
    )


def _forest_key(figure: Figure) -> None:
    marks = [
        Line2D([], [], color=MUTED, marker="o", markersize=6.5, linewidth=2.2),
        Line2D([], [], color=MUTED, marker="o", markersize=6.0, linewidth=1.1, markerfacecolor="none"),
    ]
    _key(figure, marks, ["τ-b", "partial τ given training robust loss"], down=46, rows=1, most=60)


def scatter(
    points: Points,
    methods: Sequence[str],
    *,
    title: str,
    notes: tuple[str, str],
    quantity: str,
    identity: str,
    description: str,
) -> str:
    """One quantity against the gap in loss; `notes` are printed below the title: n and tau, and how it was measured."""
    present = sorted(set(points.series.tolist()))
    entries = [(methods[index], _mark(index, hollow=False)) for index in present]
    if points.hollow.any():
        hollow = Line2D([], [], color=MUTED, marker="o", markerfacecolor="none", linestyle="none", markersize=6)
        entries.append(("hollow: undertrained", hollow))
    rows, lines = math.ceil(len(entries) / 2), wrapped(notes[1])
    with drawing(identity):
        figure, axes = panel(title, notes[0], right=14, legend_rows=rows + len(lines))
        for place, words in enumerate(lines):
            line(figure, words, 53 + 15 * place, size=SMALL, ink=MUTED)
        marks, names = [mark for _, mark in entries], [name for name, _ in entries]
        _key(figure, marks, names, down=46 + 15 * len(lines), rows=rows, most=28)
        _marks(axes, points)
        logarithmic = _x_axis(axes, points)
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        axes.set_xlabel(shortened(quantity, 64) + (", logarithmic axis" if logarithmic else ""))
        return svg(figure, identity, description)


def _mark(series: int, *, hollow: bool) -> Line2D:
    return Line2D([], [], linestyle="none", markersize=6, **_style(series, hollow=hollow))


def _style(series: int, *, hollow: bool) -> dict[str, Any]:
    ink = colour(series)
    return {
        "color": ink,
        "marker": MARKERS[series % len(MARKERS)],
        "markerfacecolor": "none" if hollow else ink,
        "markeredgewidth": 1.1,
    }


def _marks(axes: Axes, points: Points) -> None:
    for series in sorted(set(points.series.tolist())):
        for hollow in (False, True):
            own = (points.series == series) & (points.hollow == hollow)
            x, y, error = points.x[own], points.y[own], points.errors[own]
            known = np.isfinite(error)
            if known.any():
                ends = (x - error)[known], (x + error)[known]
                axes.hlines(y[known], *ends, color=colour(series), linewidth=0.9, alpha=0.55, zorder=2)
            if own.any():
                axes.plot(x, y, markersize=5.5, alpha=0.85, linestyle="none", zorder=3, **_style(series, hollow=hollow))


def _x_axis(axes: Axes, points: Points) -> bool:
    """A logarithmic axis where the values are positive and spread by much; whether it is."""
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    if not len(points.x) or points.x.min() <= 0 or points.x.max() / points.x.min() < DECADES:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        return False
    low, high = float(points.x.min()), float(points.x.max())
    axes.set_xscale("log", nonpositive="clip")
    axes.set_xlim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 500 else (1.0, 2.0, 5.0), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))  # matplotlib's own are formulas
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    return True


def _tick(value: float, _: int | None = None) -> str:
    """
    >>> _tick(-0.25), _tick(1e-06)
    ('−0.25', '1e−06')
    """
    return f"{value + 0.0:g}".replace("-", "−")


def wrapped(text: str, width: int = 72, most: int = 2) -> list[str]:
    """Text as a few lines that fit into a panel.

    >>> wrapped("one two three", width=7), wrapped("one two three", width=7, most=1)
    (['one two', 'three'], ['one two …'])
    """
    lines = textwrap.wrap(shortened(text, 1000), width)
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1]} …"]


def _key(figure: Figure, marks: list[Line2D], texts: Sequence[str], *, down: float, rows: int, most: int) -> None:
    """A legend in columns of half a panel's width, its upper edge so many pixels below the figure's."""
    width, height = figure.get_size_inches() * 72
    for index, (mark, text) in enumerate(zip(marks, texts, strict=True)):
        left, middle = 8 + (WIDTH - 16) / 2 * (index // rows), down + 9 + 18 * (index % rows)
        mark.set_transform(figure.transFigure)
        mark.set_data([(left + across) / width for across in (1, 9, 17)], [1 - middle / height] * 3)
        mark.set_markevery([1])
        figure.add_artist(mark)
        place = (left + 25) / width, 1 - (middle + 4) / height
        figure.text(*place, shortened(text, most), fontsize=SMALL, color=INK)
