"""Points of a landscape, on disk as they come: whoever is killed goes on from the last second.

NAME.part   arrays of all points, with which of them are done; NAME.npz when all are

Those of a coarse grid come first, so that there is something to read early. Processes that torchrun started take a
point each at a time, and the first of them writes: what is found is what one finds, to the bit, and any number of them
goes on from what any other number left.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from saltflat import parallel
from saltflat.balls import Weights
from saltflat.lab import record
from saltflat.lab.config import BadInput
from saltflat.lab.console import progress, say
from saltflat.landscape.slices import Point, over

Arrays = dict[str, NDArray[Any]]
COARSE = 5  # every so many points is measured first
OFTEN = 1.0  # seconds between two writes of what is done


@dataclass(frozen=True, eq=False)
class Group:
    """Places along the same directions, which are made when the first of them is measured.

    width: how many in a row differ in the last coordinate alone; the coarse grid is coarse in both.
    """

    directions: Callable[[], Sequence[Weights]]
    places: Sequence[Point]
    width: int = 1


def measured(
    model: nn.Module,
    groups: Sequence[Group],
    measure: Callable[[], Arrays],
    *,
    examples: int,
    path: Path,
    label: str,
) -> Arrays:
    """measure() with the weights at every place of every group, one after the other: arrays (points, N) by name, and
    `done` (points,).

    Args:
        measure: () -> {name: (N,)}, "robust_loss" among them.
        examples: N of the robust loss, by which another measurement's file is told.
        path: of the arrays when all are there; what is done meanwhile lies beside it.
        label: of the progress bar.
    """
    part, last, points = path.with_suffix(".part"), time.monotonic(), sum(len(group.places) for group in groups)
    arrays: Arrays = parallel.first(lambda: _read(part, points, examples) if part.is_file() else {})
    done = arrays.setdefault("done", np.zeros(points, bool))
    if done.any():
        say(f"goes on after {done.sum()} of {points} points: {part}")

    def keep_now_and_then() -> None:
        nonlocal last
        if time.monotonic() - last > OFTEN:
            _write(part, arrays)
            last = time.monotonic()

    with progress() as bar:
        task, first = bar.add_task(label, total=points, completed=done.sum()), 0
        try:
            for group in groups:
                coarse, fine = _ordered(group, done[first : first + len(group.places)])
                left = coarse + fine
                directions = group.directions() if left else []
                for some in (left[i : i + parallel.ranks()] for i in range(0, len(left), parallel.ranks())):
                    at = [group.places[place] for place in some]
                    all_found = parallel.shared_out(at, partial(_at, model, directions, measure))
                    for place, found in zip(some, all_found, strict=True):
                        if done.any() and arrays.keys() - {"done"} != found.keys():
                            raise BadInput(f"landscapes: {part} is of another measurement; delete it to begin anew")
                        for name, values in found.items():
                            of_all = arrays.setdefault(name, np.zeros((points, len(values)), values.dtype))
                            of_all[first + place] = values
                        done[first + place] = True
                        bar.advance(task)
                        if fine and coarse and place == coarse[-1]:
                            say(_preview(label, arrays))
                    parallel.first(keep_now_and_then)
                first += len(group.places)
        except BaseException:  # Ctrl-C among them: nothing that is done is lost
            if parallel.rank() == 0:
                _write(part, arrays)
            raise
    parallel.first(lambda: _write(path, arrays))
    return arrays


def _at(model: nn.Module, directions: Sequence[Weights], measure: Callable[[], Arrays], point: Point) -> Arrays:
    ((_, found),) = over(model, directions, [point], measure)
    return found


def _ordered(group: Group, done: NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """What is left to be measured: places of a coarse grid, and then the others."""
    coarse: list[int] = []
    fine: list[int] = []
    for place in np.flatnonzero(~done).tolist():
        row, column = divmod(place, group.width)
        (fine if row % COARSE or column % COARSE else coarse).append(place)
    return coarse, fine


def _preview(label: str, arrays: Arrays) -> str:
    done = arrays["done"]
    means = arrays["robust_loss"][done].mean(1, dtype=np.float64)
    finite = means[np.isfinite(means)]
    found = f"robust loss from {finite.min():.3f} to {finite.max():.3f} nats" if finite.size else "no finite loss"
    return f"{label}: {done.sum()} of {len(done)} points, {found}"


def _read(part: Path, points: int, examples: int) -> Arrays:
    try:
        with open(part, "rb") as file, np.load(file, allow_pickle=False) as read:
            arrays = {name: read[name] for name in read.files}
        done = arrays["done"]
        if done.shape != (points,) or done.dtype != bool or arrays["robust_loss"].shape != (points, examples):
            raise ValueError("its shapes are of another measurement")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(f"landscapes: cannot go on from {part} ({error}); delete it to begin anew") from None
    return arrays


def _write(path: Path, arrays: Arrays) -> None:
    if not arrays["done"].any():
        return
    with record.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
