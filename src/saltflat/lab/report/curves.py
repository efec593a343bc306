"""Curves as arrays, and their means: accuracies over epochs, and what was measured along directions in weight space.

Accuracies are in percent, losses in nats, alpha in lengths of the (normalised) direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saltflat.lab.report.notation import decimal

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SeedCurves:
    """One run's accuracies at its epochs; `averaged`: the group's mean takes it in (a finished run)."""

    epochs: Array  # (E,)
    train_robust: Array  # (E,)
    test_robust: Array  # (E,)
    test_clean: Array  # (E,)
    best_epoch: int | None
    averaged: bool = True


@dataclass(frozen=True, eq=False)
class GroupCurves:
    """The runs of one group, with a line that says what was measured, and the group's place in the page's colours."""

    name: str
    note: str
    seeds: tuple[SeedCurves, ...]
    series: int


@dataclass(frozen=True)
class Ordinate:
    """What a figure shows along a direction: its title and words, and how its value at w is written."""

    title: str
    words: str
    at_w: str
    unit: str = ""
    places: int = 3
    centred: bool = False


CENTRED = Ordinate("Centred", "robust loss, g(α) − g(0) in nats", "g(0) =", centred=True)
RAW = Ordinate("As measured", "robust loss, g(α) in nats", "g(0) =")
ACCURACY = Ordinate("Robust accuracy", "in %", "at w:", unit=" %", places=1)
CLEAN = Ordinate("Clean loss", "in nats, without an attack", "at w:")
OBJECTIVE = Ordinate("Objective", "in nats", "at w:")


@dataclass(frozen=True, eq=False)
class GroupLandscape:
    """One array of values (directions, alphas) per seed."""

    name: str
    alphas: Array  # (A,)
    values: tuple[Array, ...]  # seeds × (D, A)
    series: int = 0

    def curves(self, ordinate: Ordinate) -> Array:
        """All curves of all seeds, g(alpha), or g(alpha) − g(0) where the ordinate is centred."""
        curves = np.concatenate(self.values)
        return curves - centre(self.alphas, curves) if ordinate.centred else curves

    def origin(self, ordinate: Ordinate) -> str:
        """The value at w in words: the mean over seeds, with the sample standard deviation where there are several."""
        values = np.array([centre(self.alphas, curves).mean() for curves in self.values])
        spread = f" ± {decimal(float(values.std(ddof=1)), ordinate.places)}" if len(values) > 1 else ""
        return f"{ordinate.at_w} {decimal(float(values.mean()), ordinate.places)}{spread}{ordinate.unit}"


def mean_curves(seeds: Sequence[SeedCurves]) -> tuple[Array, tuple[Array, Array, Array]]:
    """Epochs that every averaged seed has, and the means there of train robust, test robust and test clean accuracy."""
    averaged = [seed for seed in seeds if seed.averaged]
    if not averaged:
        return np.empty(0), (np.empty(0), np.empty(0), np.empty(0))
    epochs = averaged[0].epochs
    for seed in averaged[1:]:
        epochs = np.intersect1d(epochs, seed.epochs)
    common = [
        np.array([seed.train_robust, seed.test_robust, seed.test_clean])[:, np.isin(seed.epochs, epochs)]
        for seed in averaged
    ]
    train, test, clean = np.mean(common, axis=0)
    return epochs, (train, test, clean)


def centre(alphas: Array, losses: Array) -> Array:
    """g(0) of every curve, (D, 1); ValueError where alpha = 0 was not measured."""
    index = int(np.argmin(np.abs(alphas)))
    if abs(alphas[index]) > 1e-9:
        raise ValueError("alpha = 0 is not among the alphas")
    return losses[:, index : index + 1]


def mean_and_deviation(curves: Array) -> tuple[Array, Array]:
    """Over curves (C, A): the mean and the sample standard deviation (A,), nan wherever a curve is not finite."""
    finite = np.where(np.isfinite(curves), curves, np.nan)
    return finite.mean(axis=0), finite.std(axis=0, ddof=1) if len(finite) > 1 else np.zeros(finite.shape[1])
