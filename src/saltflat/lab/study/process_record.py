"""One run over its epochs, out of its record: what was followed at every epoch, and what was measured at those kept.

Accuracies are in percent, losses in nats, gaps in points and nats, alpha in lengths of the normalised direction. What
is null in the record, since it was not finite, is nan here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saltflat.lab.report.curves import Array
from saltflat.lab.report.rows import flattened
from saltflat.lab.study.table import number

AREA, AVERAGE, NORM = "landscape area", "average case", "weight norm"
FLATNESS = (AREA, AVERAGE)


@dataclass(frozen=True)
class Side:
    """Training or test images of one epoch."""

    n: int
    accuracy: float
    loss: float


@dataclass(frozen=True)
class Measured:
    """A measure of one epoch, with its standard error over draws; nan where there is none."""

    value: float = math.nan
    standard_error: float = math.nan
    unit: str = ""
    settings: str = ""
    note: str = ""


@dataclass(frozen=True, eq=False)
class Moment:
    """An epoch that was kept, and all that was measured there."""

    epoch: int
    role: str
    best: bool
    learning_rate: float
    train: Side
    test: Side
    curves: Array  # (D, A), robust loss along D directions
    measures: Mapping[str, Measured]

    @property
    def gap_loss(self) -> float:
        return self.test.loss - self.train.loss

    @property
    def gap_accuracy(self) -> float:
        return self.train.accuracy - self.test.accuracy

    def measured(self, name: str) -> Measured:
        return self.measures.get(name, Measured())


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What training itself wrote down after every epoch: arrays (E,)."""

    epochs: Array
    learning_rate: Array
    train_accuracy: Array
    test_accuracy: Array
    train_loss: Array
    test_loss: Array
    n: tuple[int, int]  # training and test images


@dataclass(frozen=True, eq=False)
class Process:
    """The run; moments by epoch. `drops`: the last epochs before those drops of the learning rate that it came to."""

    run: str
    recipe: str
    seed: int
    planned: int
    drops: tuple[int, ...]
    alphas: Array  # (A,)
    moments: tuple[Moment, ...]
    trajectory: Trajectory
    settings: Mapping[str, str]
    evaluation: Mapping[str, str]

    @property
    def last(self) -> Moment:
        return self.moments[-1]

    @property
    def best(self) -> Moment | None:
        """The epoch chosen on validation, if its weights were kept."""
        return next((moment for moment in self.moments if moment.best), None)

    @property
    def start(self) -> Moment:
        """The last measured epoch before the first drop of the rate; the first of all where there is none."""
        before = [moment for moment in self.moments if self.drops and moment.epoch <= self.drops[0]]
        return before[-1] if before else self.moments[0]

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, nan if it is not on record."""
        at = np.flatnonzero(self.trajectory.epochs == epoch)
        return float(self.trajectory.learning_rate[at[0]]) if len(at) else math.nan


def read(report: Mapping[str, Any]) -> Process:
    """The record of `saltflat study process` as arrays; an error of value or lookup if it is none."""
    trajectory = _trajectory(report["trajectory"])
    rates = dict(zip(trajectory.epochs.tolist(), trajectory.learning_rate.tolist(), strict=True))
    alphas = np.array(report["alphas"], dtype=float)
    moments = [_moment(point, rates.get(point["epoch"], math.nan), len(alphas)) for point in report["points"]]
    if not moments:
        raise ValueError("points: expected at least one epoch, got none")
    reached = max([moment.epoch for moment in moments] + [int(epoch) for epoch in trajectory.epochs])
    return Process(
        run=str(report["run"]),
        recipe=str(report["recipe"]),
        seed=int(report["seed"]),
        planned=int(report["epochs"]),
        drops=tuple(drop for drop in report["drops"] if drop < reached),
        alphas=alphas,
        moments=tuple(sorted(moments, key=lambda moment: moment.epoch)),
        trajectory=trajectory,
        settings=flattened(report["settings"]),
        evaluation=flattened(report["evaluation"]),
    )


def _trajectory(lines: Sequence[Mapping[str, Any]]) -> Trajectory:
    def column(split: str, name: str) -> Array:
        return np.array([number((line.get(split) or {}).get(name)) for line in lines], dtype=float)

    end = lines[-1] if lines else {}
    train, test = (int((end.get(split) or {}).get("n") or 0) for split in ("train", "test"))
    return Trajectory(
        epochs=np.array([line["epoch"] for line in lines], dtype=float),
        learning_rate=np.array([number(line.get("learning_rate")) for line in lines], dtype=float),
        train_accuracy=100 * column("train", "robust_accuracy"),
        test_accuracy=100 * column("test", "robust_accuracy"),
        train_loss=column("train", "robust_loss"),
        test_loss=column("test", "robust_loss"),
        n=(train, test),
    )


def _moment(point: Mapping[str, Any], learning_rate: float, points: int) -> Moment:
    curves = np.array([[number(value) for value in curve] for curve in point["curves"]], dtype=float)
    if curves.size and curves.shape[1:] != (points,):
        raise ValueError(f"curves: expected {points} values each, got {curves.shape[1:]}")
    return Moment(
        epoch=int(point["epoch"]),
        role=str(point["role"]),
        best="best" in str(point["role"]),
        learning_rate=learning_rate,
        train=_side(point["train"]),
        test=_side(point["test"]),
        curves=curves.reshape(-1, points),
        measures={row["name"]: _measured(row) for row in point["measures"]},
    )


def _side(found: Mapping[str, Any]) -> Side:
    return Side(int(found["n"]), 100 * number(found["robust_accuracy"]), number(found["robust_loss"]))


def _measured(row: Mapping[str, Any]) -> Measured:
    texts = (str(row.get(key) or "") for key in ("unit", "settings", "note"))
    return Measured(number(row.get("value")), number(row.get("standard_error")), *texts)
