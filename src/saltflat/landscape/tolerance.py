"""How much noise the weights tolerate: the sigma of PAC-Bayesian flatness.

    sigma* = max{ sigma : E_v[ risk(w + sigma v) ] - risk(w) <= threshold }

v is noise of unit size: N(0, I), or |w| N(0, I), which is relative to the size of each weight. The risk is the error
rate, with a threshold of 0.1, or any loss. 1 / sigma*^2 is the measure of flatness that the bounds contain. On a
quadratic with Hessian H at its minimum, sigma*^2 = 2 threshold / tr H.

The same v are taken at every sigma (common random numbers): the mean over them is one curve, whose crossing bisection
brackets, and the chord of the last bracket [a, b] finds in there:

    sigma* ~ a + (b - a) (threshold - rise(a)) / (rise(b) - rise(a)),    rise(a) <= threshold < rise(b)

That the curve belongs to these v is the error that remains, and the delta method says how large: the standard error of
the mean rise at sigma*, divided by the slope of the curve there. The mean of the sigmas at which each v alone crosses
would be another quantity, and no more draws would bring it closer to sigma*.

Sources: Jiang et al., arXiv 1912.02178; Dziugaite et al., arXiv 2010.11924. Deviation: their magnitude-aware noise has
variance sigma^2 w^2 + epsilon^2; here epsilon is 0, so that all of it scales with sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from saltflat.landscape.estimate import Estimate, mean
from saltflat.landscape.noise import Draw, drawn
from saltflat.random import seeded
from saltflat.weights import Where, buffers_kept, default, displaced

Point = tuple[float, float]  # sigma, and the mean rise there

NEAR = 0.1  # the slope is taken between sigma (1 - NEAR) and sigma (1 + NEAR): error rates are staircases


def tolerated_noise(
    model: nn.Module,
    risk: Callable[[], float],
    draw: Draw,
    *,
    threshold: float = 0.1,
    draws: int = 10,
    seed: int = 0,
    first: float = 1e-3,
    largest: float = 10.0,
    halvings: int = 10,
    where: Where = default,
) -> Estimate:
    """The largest sigma at which noise raises the risk by no more than a threshold, on average.

    Args:
        model: its weights and buffers are given back to the bit.
        risk: () -> the risk of the model as it stands: an error rate, or `lambda: total(losses)`.
        draw: v at sigma = 1: `gaussian(1.0)`, or `adaptive_gaussian(1.0)`.
        threshold: in the unit of the risk.
        draws: how many v.
        seed: of all; the k-th v is drawn from (seed, k).
        first: the sigma to begin with. It is doubled until the threshold is exceeded, and the crossing then looked for
            below: the first one, if there are several farther apart than that.
        largest: the last sigma to try.
        halvings: of the bracket, which is [sigma / 2, sigma] if `first` was tolerated and [0, first] if not. The
            error of the search is less than 2^-halvings of that, and of second order in it where the curve is smooth.
        where: which tensors get noise. The sources perturb all weights.

    Returns: an `Estimate` of sigma*, in units of the draw. The value is interpolated linearly in the last bracket,
    between the mean rises at its two ends: it does not snap to the bisection's grid, where models that differ would be
    tied, and is as right as any other point of the bracket for a staircase. Where the rise at the upper end is not
    finite, it is the lower end, the largest sigma that was tolerated: 0 if nothing that was tried is. Infinity if
    `largest` is tolerated. The standard error is NaN with an infinity, a 0, or a single draw. Both are NaN if the risk
    at w is not finite. A risk of inf or NaN away from w exceeds any threshold.

    Costs draws x (doublings + halvings + 3) + 1 risks. Memory: one backup of the weights, and two displacements.

    >>> from saltflat.landscape.noise import gaussian
    >>> model = nn.Linear(50, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> found = tolerated_noise(model, lambda: model.weight.square().sum().item(), gaussian(1.0), threshold=0.5)
    >>> abs(found.value - 0.1) < 4 * found.standard_error
    True
    """
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold: expected a finite number > 0, got {threshold!r}")
    if draws < 1:
        raise ValueError(f"draws: expected an integer >= 1, got {draws!r}")
    if not 0 < first <= largest < math.inf:
        raise ValueError(f"first: expected 0 < first <= largest < inf, got {first!r} and {largest!r}")

    def rises(sigma: float) -> Tensor:
        """(draws,) of risk(w + sigma v) - risk(w)."""
        found = []
        for k in range(draws):
            v = drawn(model, draw, seeded(seed, k), where)
            with displaced(model, {name: sigma * d for name, d in v.items()}), buffers_kept(model):
                found.append(risk())
        return torch.tensor(found, dtype=torch.float64) - at_w

    def at(sigma: float) -> Point:
        return sigma, rises(sigma).mean().item()

    with buffers_kept(model):
        at_w = risk()
    if not math.isfinite(at_w):
        return Estimate(math.nan, math.nan, draws)
    low, high = (0.0, 0.0), at(first)
    while high[1] <= threshold:
        if high[0] == largest:
            return Estimate(math.inf, math.nan, draws)
        low, high = high, at(min(2 * high[0], largest))
    for _ in range(halvings):
        middle = at((low[0] + high[0]) / 2)
        low, high = (middle, high) if middle[1] <= threshold else (low, middle)
    sigma = _crossing(low, high, threshold)
    below, above = rises(sigma * (1 - NEAR)), rises(sigma * (1 + NEAR))
    slope = (above - below).mean() / (2 * NEAR * sigma)
    return Estimate(sigma, (mean((above + below) / 2).standard_error / slope.abs()).item(), draws)


def _crossing(low: Point, high: Point, rise: float) -> float:
    """The sigma at which the chord has this rise; that of `low` where there is no chord."""
    (a, at_a), (b, at_b) = low, high
    return a + (b - a) * (rise - at_a) / (at_b - at_a) if math.isfinite(at_b - at_a) else a
