"""Curves as arrays, and their means: accuracies over epochs, and losses along directions in weight space.

Accuracies are in percent, losses in nats, alpha in lengths of the (normalised) direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True, eq=False)
class GroupLandscape:
    """One array of losses (directions, alphas) per seed."""

    name: str
    alphas: Array  # (A,)
    losses: tuple[Array, ...]  # seeds × (D, A)
    series: int = 0

    @property
    def curves(self) -> Array:
        """All curves of all seeds, g(alpha)."""
        return np.concatenate(self.losses)

    @property
    def centred(self) -> Array:
        """All curves of all seeds, g(alpha) − g(0)."""
        return self.curves - centre(self.alphas, self.curves)

    @property
    def origin(self) -> str:
        """g(0) in words: the mean over seeds, with the sample standard deviation where there are several."""
        values = np.array([centre(self.alphas, losses).mean() for losses in self.losses])
        return f"g(0) = {values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


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
