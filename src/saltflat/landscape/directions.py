"""Directions in weight space.

Random, filter-normalised: d_lj ~ N(0, I) for every filter j of every layer l, then d_lj <- d_lj ‖w_lj‖ / ‖d_lj‖, so
that alpha is a displacement relative to the size of each filter (Li et al., arXiv 1712.09913). That is a uniform draw
from the surface of `Filterwise(1)`; layer by layer it is one from `Layerwise(1)`. Both have the norm of w in every
layer.

Adversarial: the steepest ascent of the loss at w in such a ball, d_lj = ‖w_lj‖ g_lj / ‖g_lj‖ with g the gradient of the
loss; gamma d for `Layerwise(1)` is the weight perturbation of AWP (Wu, Xia, Wang, arXiv 2004.05884).

Biases and norm layers get no component.
"""

from __future__ import annotations

from torch import Tensor, nn

from saltflat.balls import Filterwise, WeightBall
from saltflat.landscape.robust import Losses
from saltflat.random import seeded
from saltflat.weights import Where, chosen_weights, default, gradient


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
    centre = {name: p.detach() for name, p in chosen_weights(model, where).items()}
    drawn = (ball or Filterwise(1.0)).sample({name: w.cpu() for name, w in centre.items()}, seeded(seed), surface=True)
    return {name: d.to(centre[name].device) for name, d in drawn.items()}


def adversarial_direction(
    model: nn.Module, losses: Losses, *, ball: WeightBall | None = None, where: Where = default
) -> dict[str, Tensor]:
    """The direction {name: d} of steepest ascent at w.

    Args:
        model: its weights are the centre; they, its `.grad` and its buffers are left as found.
        losses: closures whose sum is the loss, such as `robust.afresh(model, x, y, attack)`.
        ball: what normalises it; default `Filterwise(1.0)`. Where the gradient is zero or not finite, d is 0.
        where: which tensors have a component.

    >>> import torch
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> adversarial_direction(model, [lambda: model(torch.tensor([[3.0, 4.0]])).sum()])["weight"]
    tensor([[0.8485, 1.1314]])
    """
    centre = {name: p.detach() for name, p in chosen_weights(model, where).items()}
    return (ball or Filterwise(1.0)).steepest(gradient(model, losses, where=where), centre)
