"""The frame of a forest: a row for everything that was estimated, a column for every quantity, 0 marked in each.

row r of `rows` lies at y = r of every column's axes, the first on top; distances are in pixels
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saltflat.lab.report.drawing import GRID, HEADING, INK, MUTED, SMALL, TEXT, line, shortened

WIDTH, LABELS, ROW = 960.0, 262.0, 36.0
TOP, BOTTOM, BETWEEN = 108.0, 46.0, 24.0


def frame(title: str, note: str, rows: int, columns: Sequence[tuple[str, str]]) -> tuple[Figure, list[Axes]]:
    """An empty forest. columns: a title, and in small print what it is."""
    height = TOP + ROW * rows + BOTTOM
    figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="none", dpi=72)
    line(figure, title, 18, size=HEADING, ink=INK, weight="bold")
    line(figure, note, 37, size=SMALL, ink=MUTED)
    width = (WIDTH - LABELS - 14) / len(columns)
    lefts = [LABELS + place * width + BETWEEN / 2 for place in range(len(columns))]
    boxes = [(left / WIDTH, BOTTOM / height, (width - BETWEEN) / WIDTH, ROW * rows / height) for left in lefts]
    return figure, [_column(figure, box, rows, *column) for box, column in zip(boxes, columns, strict=True)]


def _column(figure: Figure, box: tuple[float, float, float, float], rows: int, title: str, under: str) -> Axes:
    axes = figure.add_axes(box, facecolor="none")
    axes.set_ylim(rows - 0.5, -0.5)
    axes.grid(axis="x", color=GRID, linewidth=1.0)
    axes.set_axisbelow(True)
    axes.axvline(0.0, color=MUTED, linewidth=1.0, zorder=1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=SMALL, width=0.8, length=4)
    axes.set_yticks([])
    for text, up, size, ink in ((title, 22, TEXT, INK), (under, 7, SMALL, MUTED)):
        axes.annotate(
            text, (0.5, 1.0), (0, up), "axes fraction", "offset points", ha="center", fontsize=size, color=ink
        )  # fmt: skip
    return axes


def label(figure: Figure, row: int, name: str, under: str = "") -> None:
    """What a row is about, at its left, and a line of small print below."""
    middle = TOP + ROW * (row + 0.5)
    line(figure, shortened(name, 38), middle - 2 if under else middle + 4, size=TEXT, ink=INK)
    line(figure, under, middle + 11, size=SMALL - 1, ink=MUTED)
