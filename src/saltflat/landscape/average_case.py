"""Average-case flatness: how much the loss rises under random noise in the weights.

    E_v[ rho(w + v) ] - rho(w)

rho is any loss in shares; for the robust one (`robust.afresh`) it is attacked again under every v, since examples kept
from w would hide most of the rise. Every batch draws v of its own, so that the estimate averages over (batches x draws)
of them. On a quadratic with Hessian H and P weights it is

    sigma^2 tr H / 2  for N(0, sigma^2 I),    r^2 tr H / (2 P)  on a sphere,    r^2 tr H / (2 (P + 2))  in a ball

(`noise` has the draws). With `within(Layerwise(xi))` it is the measure of Stutz, Hein, Schiele, arXiv 2104.04448 (xi =
0.5, ten draws a batch); with `adaptive_gaussian(rho)` the adaptive average-case sharpness S_avg of Andriushchenko et
al., arXiv 2302.07011.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from saltflat.balls import Weights
from saltflat.landscape.estimate import Estimate
from saltflat.landscape.noise import Draw, drawn
from saltflat.landscape.robust import Losses
from saltflat.random import seeded
from saltflat.weights import Closure, Where, buffers_kept, default, displaced


def average_case(
    model: nn.Module, losses: Losses, draw: Draw, *, draws: int = 10, seed: int = 0, where: Where = default
) -> Estimate:
    """E_v[rho(w + v)] - rho(w), and the standard error of its draws; in the unit of the loss.

    Args:
        model: its weights and buffers are given back to the bit.
        losses: closures whose sum is rho, such as `robust.afresh(model, x, y, attack)`; each is called draws + 1 times,
            without a graph.
        draw: what v is drawn from: `within(ball)`, `on_surface(ball)`, `gaussian(sigma)`, `adaptive_gaussian(rho)`, or
            a function (w, generator) -> v.
        draws: for each batch.
        seed: of all draws; batch b draws from (seed, b).
        where: which tensors get noise.

    Returns: an `Estimate`, whose `draws` are those of each batch. The data are held fixed: with s_b^2 the variance of
    the rises of batch b, its standard error is sqrt(sum_b s_b^2 / draws), NaN for one draw. Where a single loss is not
    finite, value and standard error are NaN: an average without it would look flatter than the model is.

    Memory: one backup of the weights, and one draw.

    >>> from saltflat.landscape.noise import gaussian
    >>> model = nn.Linear(50, 1, bias=False)
    >>> found = average_case(model, [lambda: model.weight.square().sum()], gaussian(0.1), draws=100)
    >>> abs(found.value - 0.01 * 50) < 4 * found.standard_error
    True
    """
    if draws < 1:
        raise ValueError(f"draws: expected an integer >= 1, got {draws!r}")

    def rises(loss: Closure, generator: torch.Generator) -> list[float]:
        at_w = _value(model, loss, {})
        return [_value(model, loss, drawn(model, draw, generator, where)) - at_w for _ in range(draws)]

    found = [rises(loss, seeded(seed, batch)) for batch, loss in enumerate(losses)]
    rise = torch.tensor(found, dtype=torch.float64)  # (batches, draws)
    if not rise.isfinite().all():
        return Estimate(math.nan, math.nan, draws)
    error = rise.var(1).sum().div(draws).sqrt().item() if draws > 1 else math.nan
    return Estimate(rise.mean(1).sum().item(), error, draws)


def _value(model: nn.Module, loss: Closure, displacement: Weights) -> float:
    """The loss at w + v."""
    with displaced(model, displacement), buffers_kept(model), torch.no_grad():
        return loss().double().item()
