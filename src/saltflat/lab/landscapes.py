"""The measurement behind `saltflat landscape`: attacks made afresh along directions in weight space, or over a plane.

landscapes/NAME.npz, NAME.part  every example's outcome at all points, or at those that are done
landscapes/NAME.json            their means, gaps and settings, written last
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saltflat import parallel
from saltflat.balls import Filterwise, Layerwise, WeightBall, Weights
from saltflat.evaluation import answers, attacked, collect
from saltflat.evaluation.suite import prepared
from saltflat.inputs import PGD
from saltflat.lab import once, record
from saltflat.lab.config import BadInput
from saltflat.lab.points import Arrays, Group, measured
from saltflat.lab.precision import exact
from saltflat.lab.subjects import Subject, identity, place, up_to
from saltflat.landscape import adversarial_direction, random_direction
from saltflat.landscape.robust import afresh, frozen, total
from saltflat.lean import leaner
from saltflat.objectives import AT, Objective
from saltflat.weights import Closure

Direction = Literal["random", "adversarial"]
Normalisation = Literal["filter", "layer"]
BALLS: dict[str, WeightBall] = {"filter": Filterwise(1.0), "layer": Layerwise(1.0)}
WORDS = {
    "random": "random",
    "adversarial": "adversarial, steepest ascent of the robust loss at w",
    "filter": "filter by filter, no biases and norm layers",
    "layer": "layer by layer, no biases and norm layers",
}


@dataclass(frozen=True)
class How:
    """How a landscape is measured; everything in it is on record.

    own_loss: the objective that the run was trained with is measured beside cross-entropy. frozen: attacks are made
    once, at w, and kept.
    """

    split: str = "test"
    examples: int = 512
    steps: int = 10
    batch_size: int = 256
    seed: int = 0
    direction: Direction = "random"
    normalisation: Normalisation = "filter"
    own_loss: bool = False
    frozen: bool = False


@dataclass(frozen=True, eq=False)
class Shown:
    """What the network is shown, and by whom it is attacked."""

    of: Subject
    x: Tensor
    y: Tensor
    attack: PGD
    how: How

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """x, y, and which examples they are."""
        size = self.how.batch_size
        everything = (self.x, self.y, torch.arange(len(self.x)))
        return zip(*(torch.split(tensor, size) for tensor in everything), strict=True)

    @property
    def own(self) -> Objective | None:
        """The objective that is measured beside cross-entropy, which is AT's."""
        return self.of.objective if self.how.own_loss and self.of.objective != AT() else None


@exact()
def line(of: Subject, alphas: Sequence[float], directions: int, how: How) -> dict[str, Any]:
    """g(alpha) = rho(w + alpha d) along so many directions; what was asked before, of the same weights, is read."""
    shown = _shown(of, how)
    asked = _asked(shown, {"kind": "line", "alphas": list(alphas)})
    path = place(of, "landscapes", how.split, {**asked, "directions": directions})
    if there := once.already(path, ("kind", "alphas", "curves", "gaps")):
        return there
    seeds = range(how.seed, how.seed + directions)
    points = [(seed, (alpha,)) for seed in seeds for alpha in alphas]
    groups = [Group(partial(_directions, shown, how.direction, seed), [(alpha,) for alpha in alphas]) for seed in seeds]
    arrays = _measured(shown, groups, path)
    means = _means(arrays, (directions, len(alphas)))
    curves = [
        {"direction_seed": seed, **{name: _plain(values[row]) for name, values in means.items()}}
        for row, seed in enumerate(seeds)
    ]
    gaps = [
        {"direction_seed": seed, "alpha": point[0], "why": why}
        for (seed, point), why in _gaps(points, means["robust_loss"].ravel())
    ]
    return _written(path, {**asked, "curves": curves, "gaps": gaps})


@exact()
def plane(of: Subject, alphas: Sequence[float], betas: Sequence[float], how: How) -> dict[str, Any]:
    """rho(w + alpha d + beta e), with d as `how` says and e random; what was asked before is read."""
    shown = _shown(of, how)
    asked = _asked(shown, {"kind": "plane", "alphas": list(alphas), "betas": list(betas)})
    asked["settings"]["direction"] = f"{WORDS[how.direction]} (α), and {WORDS['random']} (β)"
    path = place(of, "landscapes", how.split, asked)
    if there := once.already(path, ("kind", "alphas", "betas", "robust_loss")):
        return there
    points = [(how.seed, (alpha, beta)) for alpha in alphas for beta in betas]
    directions = [_direction(shown, how.direction, how.seed), _direction(shown, "random", how.seed + 1)]
    arrays = _measured(shown, [Group(lambda: directions, [place for _, place in points], len(betas))], path)
    means = _means(arrays, (len(alphas), len(betas)))
    gaps = [
        {"alpha": point[0], "beta": point[1], "why": why}
        for (_, point), why in _gaps(points, means["robust_loss"].ravel())
    ]
    surfaces = {name: [_plain(row) for row in values] for name, values in means.items()}
    return _written(path, {**asked, "cosine": _cosine(*directions), **surfaces, "gaps": gaps})


def check_alike(subjects: Sequence[Subject]) -> None:
    """BadInput unless all have one architecture: a direction of one is none of another."""
    first, *others = [(of, {name: tuple(p.shape) for name, p in of.model.named_parameters()}) for of in subjects]
    for of, shapes in others:
        if shapes != first[1]:
            name = next(name for name in [*shapes, *first[1]] if shapes.get(name) != first[1].get(name))
            raise BadInput(
                f"runs: expected one architecture on one axis, got {name} of shape {first[1].get(name, 'none')} in "
                f"{first[0].folder} and {shapes.get(name, 'none')} in {of.folder}"
            )


def symmetric(reach: float, points: int) -> list[float]:
    """-reach ... 0 ... reach."""
    half = points // 2
    return [reach * i / half for i in range(-half, half + 1)]


def in_words(found: Mapping[str, Any]) -> str:
    """A landscape in one line: the loss at w, and how far it rises to the ends."""
    if found["kind"] == "plane":
        surface, i, j = _array(found["robust_loss"]), found["alphas"].index(0.0), found["betas"].index(0.0)
        corners = surface[[0, 0, -1, -1], [0, -1, 0, -1]] - surface[i, j]
        return f"{surface[i, j]:.3f} nats at w, rises by {corners.min():.3f} to {corners.max():.3f} at the corners"
    alphas, curves = found["alphas"], _array([curve["robust_loss"] for curve in found["curves"]])
    mean, g0 = curves.mean(0), curves.mean(0)[alphas.index(0.0)]
    return (
        f"g(0) = {g0:.3f} nats, rises by {mean[0] - g0:.3f} at alpha = {alphas[0]:g} and by {mean[-1] - g0:.3f} at "
        f"{alphas[-1]:g}; directions: {len(curves)}" + (f"; gaps: {len(found['gaps'])}" if found["gaps"] else "")
    )


def _shown(of: Subject, how: How) -> Shown:
    x, y, _ = up_to(of, how.split, how.examples)
    x = prepared(x, of.model)
    shown = Shown(of, x, y.to(x.device), of.threat.pgd(how.steps), how)
    parallel.first(lambda: _check_steady(shown))
    return shown


def _check_steady(shown: Shown) -> None:
    """A landscape of a network that answers differently each time would be noise."""
    x, y, _ = next(shown.batches())
    first, second = (answers(shown.of.model, x, y).mean_loss for _ in range(2))
    if abs(first - second) > 1e-4 * abs(first):
        raise BadInput(
            f"model: expected equal losses on equal images in eval mode, got {first:.6g} and {second:.6g}: it draws at "
            "random"
        )


def _asked(shown: Shown, grid: Mapping[str, Any]) -> dict[str, Any]:
    of, how = shown.of, shown.how
    made = "made once at w and kept, which underestimates elsewhere" if how.frozen else "made afresh at each point"
    return {
        **identity(of, shown.x, shown.y),
        "split": how.split,
        "n": len(shown.x),
        **grid,
        "settings": {
            "direction": WORDS[how.direction],
            "normalisation": WORDS[how.normalisation],
            "attack": f"{of.threat.pgd_in_words(how.steps)}, {made}, starts per example",
            "loss": "cross-entropy" if shown.own is None else f"cross-entropy, and {shown.own}",
            "batch_norm": "eval mode",
            "seed": how.seed,
            "batch_size": how.batch_size,
        },
    }


def _measured(shown: Shown, groups: Sequence[Group], path: Path) -> Arrays:
    label = f"landscape of {shown.of.folder.absolute().name}"
    measure, to = _measure(shown), path.with_suffix(".npz")
    with once.alone(path.with_suffix(".lock")):
        return measured(shown.of.model, groups, measure, examples=len(shown.x), path=to, label=label)


def _direction(shown: Shown, kind: Direction, seed: int) -> dict[str, Tensor]:
    how, model = shown.how, shown.of.model
    if kind == "random":
        return random_direction(model, seed, ball=BALLS[how.normalisation])

    def steepest() -> dict[str, Tensor]:
        settings: dict[str, Any] = {"attack_on": leaner(), "batch_size": how.batch_size, "seed": seed}
        losses = afresh(model, shown.x, shown.y, shown.attack, **settings)
        found = adversarial_direction(model, losses, ball=BALLS[how.normalisation])
        return {name: d.cpu() for name, d in found.items()}

    return {name: d.to(shown.x.device) for name, d in parallel.first(steepest).items()}


def _directions(shown: Shown, kind: Direction, seed: int) -> list[Weights]:
    return [_direction(shown, kind, seed)]


def _cosine(d: Weights, e: Weights) -> float:
    one, other = (torch.cat([part.flatten() for part in direction.values()]).double() for direction in (d, e))
    return torch.nn.functional.cosine_similarity(one, other, dim=0).item()


def _measure(shown: Shown) -> Callable[[], Arrays]:
    """() -> the outcomes of all examples with the weights as they stand."""
    model, how, attack_on = shown.of.model, shown.how, leaner()

    def attack(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return attacked(model, x, y, shown.attack, attack_on=attack_on, seed=how.seed, ids=rows)

    made = parallel.shared_out(list(shown.batches()), lambda batch: attack(*batch).cpu()) if how.frozen else []
    kept = [x_adv.to(shown.x.device) for x_adv in made]
    losses = _own_losses(shown)

    def measure() -> Arrays:
        robust, clean = [], []
        for number, (x, y, rows) in enumerate(shown.batches()):
            robust.append(answers(model, kept[number] if how.frozen else attack(x, y, rows), y))
            clean.append(answers(model, x, y))
        under_attack = collect(robust)
        found = {
            "robust_loss": under_attack.loss.numpy(),
            "robust_accuracy": under_attack.correct.numpy(),
            "clean_loss": collect(clean).loss.numpy(),
        }
        return found | ({"objective": np.array([total(losses)])} if losses else {})

    return measure


def _own_losses(shown: Shown) -> list[Closure]:
    if shown.own is None:
        return []
    shares, how = frozen if shown.how.frozen else afresh, shown.how
    model, x, y, own = shown.of.model, shown.x, shown.y, shown.own
    return shares(model, x, y, shown.attack, objective=own, batch_size=how.batch_size, seed=how.seed)


def _written(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    def write() -> None:
        record.write_json(path, found)
        path.with_suffix(".part").unlink(missing_ok=True)

    parallel.first(write)
    return found


def _means(arrays: Arrays, shape: tuple[int, int]) -> dict[str, NDArray[np.float64]]:
    """Over examples; what is not finite is NaN."""
    means = {name: values.mean(1, dtype=np.float64) for name, values in arrays.items() if name != "done"}
    return {name: np.where(np.isfinite(mean), mean, np.nan).reshape(shape) for name, mean in means.items()}


def _gaps(
    points: Sequence[tuple[int, tuple[float, ...]]], means: NDArray[np.float64]
) -> list[tuple[tuple[int, tuple[float, ...]], str]]:
    why = "the robust loss is not finite: the weights are too far from w for the network's arithmetic"
    return [(point, why) for point, mean in zip(points, means, strict=True) if math.isnan(mean)]


def _plain(values: NDArray[np.float64]) -> list[float | None]:
    """JSON has no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def _array(rows: Sequence[Sequence[float | None]]) -> NDArray[np.float64]:
    return np.array(rows, dtype=np.float64)  # None becomes NaN
