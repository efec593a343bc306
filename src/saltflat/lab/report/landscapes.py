"""Weight loss landscapes on record: along lines, w + alpha d, and over planes, w + alpha d + beta e.

Losses are in nats, accuracies are fractions, alpha and beta are in lengths of the (normalised) directions. A value that
could not be measured is null in the record and nan here, and the record says why under `gaps`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from saltflat.lab.report.curves import Array, centre
from saltflat.lab.report.rows import flattened
from saltflat.lab.report.surfaces import nearest_zero


@dataclass(frozen=True)
class Gap:
    """Where a value is missing, and why; `beta` is nan along a line."""

    alpha: float
    beta: float
    why: str


@dataclass(frozen=True, eq=False)
class Line:
    """Losses and accuracies at w + alpha d, for several directions d: arrays (D, A), a row per direction."""

    checkpoint: str
    split: str
    n: int
    settings: Mapping[str, str]
    gaps: tuple[Gap, ...]
    alphas: Array  # (A,), ascending
    robust_loss: Array
    robust_accuracy: Array
    clean_loss: Array
    objective: Array


@dataclass(frozen=True, eq=False)
class Plane:
    """Losses and accuracies at w + alpha d + beta e: arrays (A, B)."""

    checkpoint: str
    split: str
    n: int
    settings: Mapping[str, str]
    gaps: tuple[Gap, ...]
    alphas: Array  # (A,), ascending
    betas: Array  # (B,), ascending
    robust_loss: Array
    robust_accuracy: Array
    clean_loss: Array


def read_landscape(text: bytes) -> Line | Plane:
    """The landscape in a record; an error of value, lookup or type if it is none."""
    record = json.loads(text)
    place = (str(record["checkpoint"]), str(record["split"]), int(record["n"]))
    settings, gaps = flattened(record.get("settings") or {}), tuple(map(_gap, record.get("gaps") or ()))
    kind = record.get("kind") or "line"
    if kind == "line":
        return Line(*place, settings, gaps, *_curves(record))
    if kind == "plane":
        return Plane(*place, settings, gaps, *_grids(record))
    raise ValueError(f"a landscape is a line or a plane, got {kind!r}")


def _gap(entry: Mapping[str, Any]) -> Gap:
    beta = entry.get("beta")
    return Gap(float(entry["alpha"]), np.nan if beta is None else float(beta), str(entry.get("why") or "not on record"))


def _curves(record: Mapping[str, Any]) -> tuple[Array, Array, Array, Array, Array]:
    alphas = _steps(record["alphas"])
    curves = record["curves"]
    missing = [None] * len(alphas)

    def rows(key: str) -> Array:
        return _finite([curve.get(key) or missing for curve in curves], (len(curves), len(alphas)))

    loss = _finite([curve["robust_loss"] for curve in curves], (len(curves), len(alphas)))
    centre(alphas, loss)  # refuses a landscape without alpha = 0
    order = np.argsort(alphas)
    accuracy, clean, objective = (rows(key)[:, order] for key in ("robust_accuracy", "clean_loss", "objective"))
    return alphas[order], loss[:, order], accuracy, clean, objective


def _grids(record: Mapping[str, Any]) -> tuple[Array, Array, Array, Array, Array]:
    alphas, betas = _steps(record["alphas"]), _steps(record["betas"])
    by_alpha, by_beta = np.argsort(alphas), np.argsort(betas)
    for steps in (alphas, betas):
        nearest_zero(steps)
        if len(np.unique(steps)) != len(steps):
            raise ValueError("a step stands twice")

    def grid(values: object) -> Array:
        return _finite(values, (len(alphas), len(betas)))[np.ix_(by_alpha, by_beta)]

    missing = [[None] * len(betas)] * len(alphas)
    accuracy, clean = (grid(record.get(key) or missing) for key in ("robust_accuracy", "clean_loss"))
    return alphas[by_alpha], betas[by_beta], grid(record["robust_loss"]), accuracy, clean


def _steps(values: object) -> Array:
    steps = np.array(values, dtype=float)
    if steps.ndim != 1 or len(steps) < 2 or not np.isfinite(steps).all():
        raise ValueError("steps are at least two finite numbers")
    return steps


def _finite(values: object, shape: tuple[int, int]) -> Array:
    array = np.array(values, dtype=float)
    if array.shape != shape:
        raise ValueError(f"values and steps do not fit: {array.shape} and {shape}")
    return np.where(np.isfinite(array), array, np.nan)
