"""Directions in weight space.

A filter-normalised direction: d_lj ~ N(0, I) for every filter j of every layer l, then d_lj <- d_lj ‖w_lj‖ / ‖d_lj‖,
so that alpha is a displacement relative to the size of each filter (Li et al., arXiv 1712.09913). That is a uniform
draw from the surface of `Filterwise(1)`. Biases and norm layers get no component.
"""

from __future__ import annotations

from torch import Tensor, nn

from saltflat.balls import Filterwise, WeightBall
from saltflat.random import seeded
from saltflat.weights import Where, default


def random_direction(
    model: nn.Module, seed: int, *, ball: WeightBall | None = None, where: Where = default
) -> dict[str, Tensor]:
    """A random direction {name: d}, drawn on the CPU so that every device gets the same.

    Args:
        model: its weights are the centre, and give the norms; equal seeds give models of one architecture the same
            draw before normalisation.
        seed: of the draw.
        ball: what normalises it; default `Filterwise(1.0)`.
        where: which tensors have a component.

    >>> model = nn.Linear(3, 2)
    >>> d = random_direction(model, seed=0)["weight"]
    >>> bool(d.norm(dim=1).allclose(model.weight.norm(dim=1)))
    True
    """
    centre = {name: p.detach() for name, p in model.named_parameters() if where(name, p)}
    drawn = (ball or Filterwise(1.0)).sample({name: w.cpu() for name, w in centre.items()}, seeded(seed), surface=True)
    return {name: d.to(centre[name].device) for name, d in drawn.items()}
