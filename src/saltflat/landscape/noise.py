"""Random displacements of the weights: what a flatness measure draws v from.

    within(ball)            v uniform in a weight ball
    on_surface(ball)        v uniform on its surface, as the ball samples it
    gaussian(sigma)         v ~ N(0, sigma^2 I)
    adaptive_gaussian(rho)  v ~ N(0, rho^2 diag(w^2)): relative to the size of each weight, so that rescaling a weight
                            rescales its noise

Each is a function (w, generator) -> v of {name: tensor}. In P dimensions, a ball of radius r has E‖v‖^2 = r^2 P / (P +
2), its sphere r^2, and a Gaussian sigma^2 P.

Sources: Stutz, Hein, Schiele, arXiv 2104.04448 (layer-wise balls; their text has the ball, their published code the
sphere); Andriushchenko et al., arXiv 2302.07011 (both Gaussians).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saltflat.balls import WeightBall, Weights
from saltflat.random import normal
from saltflat.weights import Where, chosen_weights, default

Draw = Callable[[Weights, torch.Generator], dict[str, Tensor]]


def within(ball: WeightBall) -> Draw:
    """v uniform in the ball around w.

    >>> from saltflat import Layerwise
    >>> v = within(Layerwise(0.5))({"l": torch.ones(9)}, torch.Generator())
    >>> bool(v["l"].norm() <= 0.5 * 3)
    True
    """
    return lambda centre, generator: ball.sample(centre, generator)


def on_surface(ball: WeightBall) -> Draw:
    """v uniform on the surface of the ball around w.

    >>> from saltflat import Layerwise
    >>> v = on_surface(Layerwise(0.5))({"l": torch.ones(9)}, torch.Generator())
    >>> v["l"].norm().item()
    1.5
    """
    return lambda centre, generator: ball.sample(centre, generator, surface=True)


def gaussian(sigma: float) -> Draw:
    """v_i ~ N(0, sigma^2), sigma in units of the weights.

    >>> gaussian(0.0)({"l": torch.ones(2)}, torch.Generator())
    {'l': tensor([0., 0.])}
    """
    _check("sigma", sigma)
    return lambda centre, generator: {name: sigma * normal(w, generator) for name, w in centre.items()}


def adaptive_gaussian(rho: float) -> Draw:
    """v_i ~ N(0, rho^2 w_i^2), rho without unit. A weight that is 0 gets no noise.

    >>> adaptive_gaussian(0.1)({"l": torch.tensor([0.0, 2.0])}, torch.Generator())["l"][0]
    tensor(0.)
    """
    _check("rho", rho)
    return lambda centre, generator: {name: rho * w.abs() * normal(w, generator) for name, w in centre.items()}


def drawn(model: nn.Module, draw: Draw, generator: torch.Generator, where: Where = default) -> dict[str, Tensor]:
    """One v around the model's weights, drawn on the CPU so that every device gets the same; advances the generator.

    >>> v = drawn(nn.Linear(3, 2), gaussian(0.1), torch.Generator())
    >>> {name: tuple(tensor.shape) for name, tensor in v.items()}
    {'weight': (2, 3)}
    """
    centre = {name: p.detach() for name, p in chosen_weights(model, where).items()}
    v = draw({name: w.cpu() for name, w in centre.items()}, generator)
    return {name: tensor.to(centre[name].device) for name, tensor in v.items()}


def _check(name: str, scale: float) -> None:
    if not 0 <= scale < float("inf"):
        raise ValueError(f"{name}: expected a finite number >= 0, got {scale!r}")
