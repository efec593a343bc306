"""What the study of the paper's claims found, run by run, and the numbers that its tables and figures are made of.

    OUT/results/ARM-seedN.json    written by `claims`; all that is here is a function of these

With accuracies in percent, gaps and drops in points, losses in nats:

    robust(c)   robust accuracy on test of checkpoint c, best (on validation) or last, under the gap's PGD
    drop        robust(best) - robust(last)
    gap         robust accuracy on training images - that on test images, of the last checkpoint, by one attack
    rise        mean over alpha of g(alpha) - g(0), of the last checkpoint's landscape: mean over directions
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saltflat.lab.config import BadInput
from saltflat.lab.record import unsealed
from saltflat.lab.report.curves import Array, centre
from saltflat.lab.report.statistics import Spread, finite, paired

Quantity = Callable[["Result"], float | None]


@dataclass(frozen=True, eq=False)
class Result:
    """One run. note: why it has no numbers."""

    arm: str
    question: str
    against: str
    seed: int
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    environment: Mapping[str, Any]
    note: str = ""
    epochs: Sequence[Mapping[str, Any]] = ()
    best: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)
    flatness: Mapping[str, Any] = field(default_factory=dict)
    landscape: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Group:
    """An arm: its runs in the order of their seeds."""

    arm: str
    question: str
    against: str
    runs: Sequence[Result]

    def spread(self, quantity: Quantity) -> Spread:
        """A quantity of every run that has it."""
        return finite({run.seed: quantity(run) for run in self.runs})


@dataclass(frozen=True)
class Pair:
    """An arm and what it is held against, over the seeds that both have."""

    arm: Group
    against: Group

    def difference(self, quantity: Quantity) -> Spread:
        """arm - against, seed by seed."""
        return paired(self.against.spread(quantity), self.arm.spread(quantity))

    @property
    def adds_awp(self) -> bool:
        """Whether AWP is all that the arm has more."""
        arm, against = (dict(group.runs[0].config) for group in (self.arm, self.against))
        (ours, theirs), names = (of.pop("awp") for of in (arm, against)), ("recipe", "seed")
        same = all(arm.get(name) == against.get(name) for name in {*arm, *against}.difference(names))
        return bool(same and theirs["gamma"] == 0 and ours["gamma"] > 0 and ours["method"] == "awp")


def read_results(folder: Path) -> list[Result]:
    """All of a folder, by name; BadInput for a file that is none."""
    return [_read(path) for path in sorted(folder.glob("*.json"))]


def _read(path: Path) -> Result:
    try:
        return Result(**unsealed(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"results: {str(path)!r} is no result of this study ({error})") from None


def grouped(results: Sequence[Result], order: Sequence[str]) -> list[Group]:
    """By arm, those that `order` names first and in its order."""
    arms = dict.fromkeys([*order, *(result.arm for result in results)])
    members = {arm: sorted((r for r in results if r.arm == arm), key=lambda result: result.seed) for arm in arms}
    return [Group(arm, runs[0].question, runs[0].against, runs) for arm, runs in members.items() if runs]


def pairs(groups: Sequence[Group]) -> list[Pair]:
    """Every arm with what it is held against, where both have runs."""
    by_name = {group.arm: group for group in groups}
    return [Pair(group, by_name[group.against]) for group in groups if group.against in by_name]


# Quantities


def robust(checkpoint: str) -> Quantity:
    """Robust accuracy on test, %."""
    return lambda of: _percent(getattr(of, checkpoint), "gap", "test", "robust_accuracy")


def clean(checkpoint: str) -> Quantity:
    """Accuracy on test without attack, %."""
    return lambda of: _percent(getattr(of, checkpoint), "gap", "test", "clean_accuracy")


def attacked(checkpoint: str) -> Quantity:
    """What the last, strongest, of the plan's attacks leaves, %, on its own number of test images."""
    return lambda of: _percent(rows[-1], "accuracy") if (rows := _rows(getattr(of, checkpoint))) else None


def robust_train(of: Result) -> float | None:
    """Robust accuracy on training images of the last checkpoint, %."""
    return _percent(of.last, "gap", "train", "robust_accuracy")


def gap(of: Result) -> float | None:
    """Points, at the last checkpoint."""
    return _percent(of.last, "gap", "gap", "accuracy")


def drop(of: Result) -> float | None:
    """Points of robust test accuracy lost from the best checkpoint to the last."""
    best, last = robust("best")(of), robust("last")(of)
    return None if best is None or last is None else best - last


def flatness(of: Result) -> float | None:
    """The first measure of flatness, average case by the presets, in its unit."""
    rows = of.flatness.get("measures") or [{"value": None}]
    return _number(rows[0]["value"])


def rise(of: Result) -> float | None:
    """Mean rise of the robust loss over the landscape, nats; None where it is not finite."""
    if not of.landscape:
        return None
    curves = losses(of)
    return _number(float((curves - centre(np.array(of.landscape["alphas"]), curves)).mean()))


def losses(of: Result) -> Array:
    """g(alpha) of every direction, (directions, alphas), nan where it is not finite."""
    rows = [[_number(loss) for loss in curve["robust_loss"]] for curve in of.landscape["curves"]]
    return np.array([[math.nan if loss is None else loss for loss in row] for row in rows], dtype=np.float64)


def _rows(checkpoint: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return checkpoint["attacks"]["rows"] if checkpoint else ()


def _percent(tree: Mapping[str, Any], *names: str) -> float | None:
    for name in names:
        if name not in tree:
            return None
        tree = tree[name]
    value = _number(tree)
    return None if value is None else 100 * value


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
