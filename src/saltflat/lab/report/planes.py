"""Plates of weight loss landscapes over planes: contours, and the data of the surface that a reader can turn.

Every run is shown by itself, on the levels and the scale of all those that were measured in the same way: each has
directions of its own, so that a mean of surfaces would be none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from saltflat.lab.report.captions import ends, footnotes, gaps_in_words, settings_in_words
from saltflat.lab.report.curves import Array
from saltflat.lab.report.drawing import shortened
from saltflat.lab.report.figures import contour
from saltflat.lab.report.landscapes import Gap, Plane
from saltflat.lab.report.notation import decimal
from saltflat.lab.report.plates import Plate
from saltflat.lab.report.probes import in_script
from saltflat.lab.report.statistics import Group
from saltflat.lab.report.surfaces import Surface, extent, levels_between, nearest_zero

Shown = tuple[str, int, Plane]  # a run's name, its group's place in the page's colours, its plane


@dataclass(frozen=True)
class Quantity:
    """What a surface can show."""

    name: str
    unit: str
    places: int
    of_plane: Callable[[Plane], Array]


QUANTITIES = (
    Quantity("robust loss", "nats", 3, lambda plane: plane.robust_loss),
    Quantity("robust accuracy", "%", 1, lambda plane: 100 * plane.robust_accuracy),
    Quantity("clean loss", "nats", 3, lambda plane: plane.clean_loss),
)


@dataclass(frozen=True)
class PlanePlate:
    """Contours under one caption, and the same planes as an island of JSON for the page's script."""

    plate: Plate
    identity: str
    island: Markup


def plane_plates(groups: Sequence[Group]) -> list[PlanePlate]:
    """One plate per question, with one contour per run; of two answers of a run to one question the first counts."""
    asked: dict[tuple[object, ...], dict[tuple[Group, int], Plane]] = {}
    for group in groups:
        for run in group.finished:
            for plane in run.planes:
                asked.setdefault(_question(plane), {}).setdefault((group, run.seed), plane)
    plates = []
    for index, answers in enumerate(asked.values()):
        shown = [(_name(group, seed), group.series, plane) for (group, seed), plane in answers.items()]
        plates.append(_plate(shown, f"plane-{index}"))
    return plates


def _question(plane: Plane) -> tuple[object, ...]:
    grid = (tuple(plane.alphas), tuple(plane.betas))
    return plane.checkpoint, plane.split, plane.n, *grid, tuple(sorted(plane.settings.items()))


def _name(group: Group, seed: int) -> str:
    return f"{shortened(group.name, 34)}, seed {seed}"


def _plate(shown: Sequence[Shown], identity: str) -> PlanePlate:
    first = shown[0][2]
    facts = footnotes(first, _grid(first))
    surfaces = [Surface(name, p.alphas, p.betas, p.robust_loss, series) for name, series, p in shown]
    levels = levels_between(*extent([surface.centred for surface in surfaces]))
    panels = [
        contour(
            surface,
            levels,
            footnotes=facts,
            identity=f"{identity}-{index}",
            description=_description(surface),
        )
        for index, surface in enumerate(surfaces)
    ]
    plate = Plate(tuple(map(Markup, panels)), _caption(shown), _title(first))
    return PlanePlate(plate, identity, island(shown))


def _grid(plane: Plane) -> str:
    size = f"{len(plane.alphas)} × {len(plane.betas)} points"
    if np.array_equal(plane.alphas, plane.betas):
        return f"{size} at α and β {ends(plane.alphas)}"
    return f"{size} at α {ends(plane.alphas)} and β {ends(plane.betas)}"


def _title(plane: Plane) -> str:
    directions = shortened(plane.settings.get("direction", "not on record"), 80)
    return f"Weights: {plane.checkpoint}, plane of two directions: {directions}"


def _description(surface: Surface) -> str:
    values = surface.centred
    corners = ", ".join(decimal(float(values[i, j])) for i in (0, -1) for j in (0, -1))
    return (
        f"Contours of the robust loss of {surface.name} over a plane in weight space: {surface.origin} nats; "
        f"at the corners it is higher by {corners}."
    )


def _caption(shown: Sequence[Shown]) -> str:
    plane = shown[0][2]
    sentences = (
        f"Robust loss at w + α d + β e on n = {plane.n} {plane.split} images, {_grid(plane)}. Contours: "
        "g(α, β) − g(0, 0) in nats, at levels of 1, 2 and 5 times powers of ten, the same in all panels.",
        gaps_in_words([(name, gap) for name, _, one in shown for gap in _gaps(one)]),
        f"{settings_in_words(plane.settings)}.",
    )
    return " ".join(sentence for sentence in sentences if sentence)


def _gaps(plane: Plane) -> list[Gap]:
    """The gaps on record, and those losses that are missing without a word."""
    said = {(gap.alpha, gap.beta) for gap in plane.gaps}
    missing = [(float(plane.alphas[i]), float(plane.betas[j])) for i, j in np.argwhere(np.isnan(plane.robust_loss))]
    return [*plane.gaps, *(Gap(*place, "not on record") for place in missing if place not in said)]


def island(shown: Sequence[Shown]) -> Markup:
    """The planes as JSON that can stand in a script element: no `<`, no nan; accuracies in percent, gaps null."""
    first = shown[0][2]
    quantities = [one for one in QUANTITIES if any(np.isfinite(one.of_plane(plane)).any() for _, _, plane in shown)]
    content: dict[str, Any] = {
        "alphas": first.alphas.tolist(),
        "betas": first.betas.tolist(),
        "origin": [nearest_zero(first.alphas), nearest_zero(first.betas)],
        "facts": footnotes(first, _grid(first)),
        "quantities": [
            {
                "name": one.name,
                "unit": one.unit,
                "places": one.places,
                "range": extent([one.of_plane(plane) for _, _, plane in shown]),
            }
            for one in quantities
        ],
        "runs": [
            {"name": name, "series": series % 6 + 1, "values": [_rows(one.of_plane(plane)) for one in quantities]}
            for name, series, plane in shown
        ],
    }
    return in_script(content)


def _rows(values: Array) -> list[list[float | None]]:
    return [[value if np.isfinite(value) else None for value in row] for row in values.tolist()]
