"""Plates of robust accuracy by attack: a row for every attack, a dot and its interval for every group of runs.

Dot: mean over n seeds; bar: the 95 % interval of that mean by Student's t. Where one run stands alone, its accuracy,
and the interval on its record, which is due to the finite number of images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.lines import Line2D

from saltflat.lab.report.drawing import (
    GRID,
    INK,
    MUTED,
    SMALL,
    TEXT,
    WIDTH,
    colour,
    drawing,
    fitted,
    legend,
    panel,
    shortened,
    svg,
)
from saltflat.lab.report.evaluated import Attack, BySeed, Place, accuracies, attacks_of, evaluated, under
from saltflat.lab.report.notation import counted, decimal
from saltflat.lab.report.plates import Plate
from saltflat.lab.report.statistics import Group

MARKERS = ("o", "s", "^", "D", "v", "P")  # as the dashes of curves, for those who cannot tell the colours apart
LINE, NAME, BETWEEN = 15, 20, 9  # pixels: a mark's row, an attack's name above its marks, the room below them


@dataclass(frozen=True)
class Mark:
    """A group's accuracy under one attack, in percent; the interval is nan where there is none."""

    group: str
    series: int
    n: int
    value: float
    low: float
    high: float


Rows = dict[str, list[Mark]]  # by the attack's name


def attacks_plate(groups: Sequence[Group]) -> Plate | None:
    """One panel per checkpoint and set of images, all on the same axis; None if no attack was made."""
    attacks = [attack for attack in attacks_of(groups) if attack[0] != "clean"]
    found = {id(group): evaluated(group) for group in groups}
    places = sorted(dict.fromkeys(place for each in found.values() for place in each), key=_order)
    panels: dict[Place, Rows] = {}
    for place in places:
        rows = {
            name: [_mark(group, attack, found[id(group)][place]) for group in groups if place in found[id(group)]]
            for name, attack in zip(_names(attacks), attacks, strict=True)
        }
        kept = {name: [mark for mark in marks if mark is not None] for name, marks in rows.items()}
        if kept := {name: marks for name, marks in kept.items() if marks}:
            panels[place] = kept
    if not panels:
        return None
    axis = _axis([mark for rows in panels.values() for marks in rows.values() for mark in marks])
    drawn = (
        robust_accuracies(place, rows, axis=axis, identity=f"attacks-{index}", description=_description(place, rows))
        for index, (place, rows) in enumerate(panels.items())
    )
    marks = [mark for rows in panels.values() for own in rows.values() for mark in own]
    sizes = {mark.group: sorted({one.n for one in marks if one.group == mark.group}) for mark in marks}
    seeds = "; ".join(
        f"{name}: {' or '.join([*map(str, n[:-1]), counted(n[-1], 'seed')])}" for name, n in sizes.items()
    )
    return Plate(
        tuple(map(Markup, drawn)),
        "Robust accuracy under each attack of the final evaluation, on one axis, which need not begin at 0. Mark: mean "
        "over seeds, written beside it; bar: its 95 % interval by Student's t. Where one run stands alone: its "
        f"accuracy, and the 95 % interval that the finite number of images leaves ({seeds}).",
        "Robust accuracy by attack",
    )


def robust_accuracies(place: Place, rows: Rows, *, axis: tuple[float, float], identity: str, description: str) -> str:
    """One panel; the attacks in their order, from top to bottom, and within each the groups in theirs."""
    checkpoint, split, n, unusual = place
    inks = {mark.series: mark.group for marks in rows.values() for mark in marks}
    entries = sorted(inks.items())
    tall = sum(NAME + LINE * len(marks) + BETWEEN for marks in rows.values())
    with drawing(identity):
        figure, axes = panel(
            f"{shortened(checkpoint, 30)} weights",
            f"robust accuracy in % · n = {n} {split} images" + (f" · {unusual}" if unusual else ""),
            right=46,
            legend_rows=len(entries),
            height=56 + tall + 46,
        )
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color=GRID, linewidth=1.0)
        axes.set_xlim(*axis)
        axes.set_ylim(tall, 0)
        axes.set_yticks([])
        axes.set_xlabel("robust accuracy, in %")
        top = 0.0
        for name, marks in rows.items():
            axes.annotate(
                fitted([name], WIDTH - 100),
                (0, top + NAME - 8),
                xycoords=("axes fraction", "data"),
                color=INK,
                fontsize=TEXT,
                verticalalignment="center",
            )
            for index, mark in enumerate(marks):
                y, ink = top + NAME + LINE * (index + 0.5), colour(mark.series)
                if math.isfinite(mark.low):
                    axes.plot([mark.low, mark.high], [y, y], color=ink, linewidth=2.2, alpha=0.55, zorder=3)
                shape = MARKERS[mark.series % len(MARKERS)]
                axes.plot([mark.value], [y], shape, color=ink, markersize=6, zorder=4, clip_on=False)
                axes.annotate(
                    decimal(mark.value, 1),
                    (1, y),
                    xycoords=("axes fraction", "data"),
                    xytext=(8, 0),
                    textcoords="offset points",
                    verticalalignment="center",
                    annotation_clip=False,
                    color=ink,
                    fontsize=SMALL,
                )
            top += NAME + LINE * len(marks) + BETWEEN
            if top < tall:
                axes.axhline(top - BETWEEN / 2 + 2, color=MUTED, linewidth=0.4, zorder=1)
        handles = [
            Line2D([], [], color=colour(series), marker=MARKERS[series % len(MARKERS)], linewidth=2.2, markersize=6)
            for series, _ in entries
        ]
        legend(axes, handles, [shortened(name, 46) for _, name in entries])
        return svg(figure, identity, description)


def _order(place: Place) -> tuple[int, str, str, int, str]:
    """Best, last, then others by name."""
    checkpoint, split, n, unusual = place
    return {"best": 0, "last": 1}.get(checkpoint, 2), checkpoint, split, -n, unusual


def _names(attacks: Sequence[Attack]) -> list[str]:
    """Names that tell attacks apart: with the description where one name stands for several."""
    names = [name for name, _ in attacks]
    return [f"{name}: {words}" if words and names.count(name) > 1 else name for name, words in attacks]


def _mark(group: Group, attack: Attack, by_seed: BySeed) -> Mark | None:
    spread = accuracies(attack, by_seed)
    if not spread.n:
        return None
    low, high = spread.interval
    if spread.n == 1:
        found = next(one for seed, one in under(attack, by_seed).items() if seed in spread.by_seed).interval
        low, high = (100 * end for end in found) if found else (math.nan, math.nan)
    low, high = np.clip([low, high], 0.0, 100.0).tolist()  # nan stays
    return Mark(group.name, group.series, spread.n, spread.mean, low, high)


def _axis(marks: Sequence[Mark]) -> tuple[float, float]:
    """From the lowest end of all intervals to the highest, with some air."""
    ends = [end for mark in marks for end in (mark.value, mark.low, mark.high) if math.isfinite(end)]
    air = max(1.0, 0.05 * (max(ends) - min(ends)))
    return max(-1.0, min(ends) - air), min(101.0, max(ends) + air)


def _description(place: Place, rows: Rows) -> str:
    def words(mark: Mark) -> str:
        ends = f" ({decimal(mark.low, 1)} to {decimal(mark.high, 1)})" if math.isfinite(mark.low) else ""
        return f"{mark.group} {decimal(mark.value, 1)}{ends}"

    checkpoint, split, n, unusual = place
    how = f", {unusual}" if unusual else ""
    listed = "; ".join(f"{name}: {', '.join(map(words, marks))}" for name, marks in rows.items())
    return f"Robust accuracy by attack in percent, {checkpoint} weights, {n} {split} images{how}. {listed}."
