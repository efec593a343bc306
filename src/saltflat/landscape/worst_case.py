"""Worst-case flatness: how much the loss can rise in a ball around the weights.

    max_{v in B(w)}  rho(w + v)  -  rho(w)

by projected steepest ascent from v = 0 and from random points of the ball; the highest iterate counts, so that what is
returned is a rise that was seen: a lower bound of the maximum, and never below 0. rho is any loss in shares; under
attack, it can be climbed

    alternating   x' is attacked again in full before every step in w: losses = `robust.afresh(...)`
    jointly       x' goes one step further with every step in w: climbed = `lambda: robust.continued(...)`, and where
                  that ends is judged by the losses, attacked in full

By the ball and the batches it is

    Layerwise(xi), one batch at a time                Stutz, Hein, Schiele, arXiv 2104.04448 (joint; xi = 7.5e-4)
    Ellipsoid(rho) or Box(rho), one batch at a time   adaptive sharpness S_max in L2 or L-inf of Andriushchenko et al.,
                                                      arXiv 2302.07011
    Box(1e-3, offset=1), all weights and all data     `keskar_sharpness`: Keskar et al., arXiv 1609.04836, metric 2.1

One batch at a time (m-sharpness) is a sum, since losses are shares of rho:

    sum(worst_case(model, [loss], ball).value for loss in losses)

Deviation: one optimiser for all, steepest ascent with a constant step, where the papers have one each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from saltflat.balls import WeightBall, Weights
from saltflat.landscape.noise import drawn, within
from saltflat.landscape.robust import Losses
from saltflat.random import seeded
from saltflat.weights import Where, buffers_kept, chosen_weights, default, displaced, perturbed

Point = tuple[float, Weights]  # rho(w + v), and v


@dataclass(frozen=True)
class Worst:
    """Attributes:
    value: the largest rise of the loss that was seen, >= 0, in the loss's unit.
    loss: rho(w), which it rises from.
    by_start: the largest rise from each start, that from v = 0 first: how much they differ says how far the search is
        to be trusted.
    displacement: {name: v} that has the rise, a member of the ball up to the rounding of w + v.
    """

    value: float
    loss: float
    by_start: tuple[float, ...]
    displacement: Weights = field(repr=False, compare=False)


def worst_case(
    model: nn.Module,
    losses: Losses,
    ball: WeightBall,
    *,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 2,
    seed: int = 0,
    where: Where = default,
    climbed: Callable[[], Losses] | None = None,
) -> Worst:
    """The largest rise of rho in a weight ball that an ascent finds.

    Args:
        model: its weights, buffers and `.grad` are left as found.
        losses: closures whose sum is rho, such as `robust.afresh(model, x, y, attack)`.
        ball: any weight ball: `Layerwise`, `Global`, `Ellipsoid`, `Box`, `Filterwise`.
        steps: gradients from each start.
        step_size: in the unit of the ball's radius, which is the default: losses are nearly convex in the weights'
            worst directions, where long steps, projected, are a power iteration, and the highest iterate is kept.
        restarts: climbs from uniform points of the ball, besides the one from v = 0. At a minimum of rho the gradient
            is 0, and only these get away.
        seed: of those points; the r-th is drawn from (seed, r).
        where: which tensors are displaced.
        climbed: () -> the losses to climb in place of `losses`, called once for each start. Then the end of each climb
            is judged by `losses`, not what lies on its way.

    Returns: a `Worst`. A loss that was infinite on the way gives inf, one that was NaN gives NaN.

    Costs (restarts + 1) steps gradients, of `losses` or of what `climbed` gives in their place, and restarts + 2
    evaluations of `losses`: at w, and where each climb ends. Memory, beside what the losses take: a backup of the
    weights and five displacements, and what a step in the ball needs.

    Raises: what `perturbed` raises; ValueError for restarts < 0.

    >>> from saltflat import Global
    >>> model = nn.Linear(2, 1, bias=False)
    >>> losses = [lambda: model(torch.tensor([[3.0, 4.0]])).sum()]
    >>> round(worst_case(model, losses, Global(0.1)).value, 4)
    0.5
    """
    if steps < 1:
        raise ValueError(f"steps: expected an integer >= 1, got {steps!r}")
    if restarts < 0:
        raise ValueError(f"restarts: expected an integer >= 0, got {restarts!r}")
    size = ball.radius if step_size is None else step_size
    at_w, by_start = _value(model, losses, {}), []

    def highest(start: Weights) -> Point:
        passed, end = _ascent(model, losses if climbed is None else climbed(), ball, start, steps, size, where)
        last = _value(model, losses, end), end
        return max(passed, last, key=_rank) if climbed is None else last

    best: Point = at_w, _nothing(model, where)
    for start in _starts(model, ball, restarts, seed, where):
        found = highest(start)
        by_start.append(found[0] - at_w)
        best = max(best, found, key=_rank)
    return Worst(best[0] - at_w, at_w, tuple(by_start), best[1])


def keskar_sharpness(worst: Worst) -> float:
    """100 (max_v rho(w + v) - rho(w)) / (1 + rho(w)), in per cent.

    Args:
        worst: from `worst_case(model, losses, Box(epsilon, offset=1.0), where=every)`, with epsilon = 1e-3 in the
            paper and `every` a predicate that takes all trained weights.

    >>> keskar_sharpness(Worst(value=0.3, loss=0.5, by_start=(0.3,), displacement={}))
    20.0
    """
    return 100 * worst.value / (1 + worst.loss)


def _ascent(
    model: nn.Module, losses: Losses, ball: WeightBall, v: Weights, steps: int, size: float, where: Where
) -> tuple[Point, Weights]:
    """The highest of the points that gradients were taken at, from v on, where the loss comes with them; and where the
    last of them leads.
    """
    passed: Point = -math.inf, v
    for _ in range(steps):
        with perturbed(model, losses, ball, step_size=size, start=v, where=where) as ascent:
            ahead = ascent.displacement
        assert ascent.value is not None
        passed = max(passed, (ascent.value.item(), v), key=_rank)
        v = ahead
    return passed, v


def _value(model: nn.Module, losses: Losses, displacement: Weights) -> float:
    """rho(w + v), added up as `perturbed` does."""
    with displaced(model, displacement), buffers_kept(model), torch.no_grad():
        return torch.stack([loss() for loss in losses]).sum().item()


def _nothing(model: nn.Module, where: Where) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) for name, p in chosen_weights(model, where).items()}


def _starts(model: nn.Module, ball: WeightBall, restarts: int, seed: int, where: Where) -> Iterator[dict[str, Tensor]]:
    yield _nothing(model, where)
    for r in range(1, restarts + 1):
        yield drawn(model, within(ball), seeded(seed, r), where)


def _rank(point: Point) -> tuple[bool, float]:
    """By the loss, and what is no number above all: a maximum over it is none."""
    return math.isnan(point[0]), point[0]
