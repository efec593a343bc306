"""Projected gradient ascent on the input, written out step by step.

Independent because nothing is shared with the library and nothing is clever: one gradient of a plain sum per step,
one clamp per constraint, and for the L2 ball a python loop over the examples.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Value = Callable[[Tensor], Tensor]
"""Takes a batch of inputs, gives one value per example, shape (N,), to be made large."""

Box = tuple[float, float] | None
"""The least and the greatest value an input may hold, or None where there are no such bounds."""


def _input_gradient(value: Value, x_adv: Tensor) -> Tensor:
    """∇ Σ_i value_i at `x_adv`, and of nothing but the input: no parameter gets a .grad from it."""
    leaf = x_adv.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        total = value(leaf).sum()
    (gradient,) = torch.autograd.grad(total, [leaf])
    return gradient.detach()


def _into_box(x: Tensor, delta: Tensor, box: Box) -> Tensor:
    """δ with lo − x ≤ δ ≤ hi − x in every coordinate."""
    if box is None:
        return delta
    low, high = box
    return torch.minimum(torch.maximum(delta, low - x), high - x)


def naive_linf_pgd(
    value: Value, x: Tensor, delta: Tensor, *, eps: float, step_size: float, steps: int, box: Box = (0.0, 1.0)
) -> Tensor:
    """δ ← clamp_box(clamp_[−ε, ε](δ + α·sign ∇value(x + δ))), `steps` times; returns x + δ.

    `delta` is the start displacement and is used as it is: not drawn, not projected before the first step.
    Independent: it keeps δ and clamps δ, once for the ball and once more, apart, for the box.
    """
    x = x.detach()
    delta = delta.detach().clone()
    for _ in range(steps):
        gradient = _input_gradient(value, x + delta)
        delta = delta + step_size * torch.sign(gradient)
        delta = torch.clamp(delta, -eps, eps)
        delta = _into_box(x, delta, box)
    return (x + delta).detach()


def naive_l2_pgd(
    value: Value, x: Tensor, delta: Tensor, *, eps: float, step_size: float, steps: int, box: Box = (0.0, 1.0)
) -> Tensor:
    """δ_i ← clamp_box(Π_{‖·‖₂ ≤ ε}(δ_i + α·g_i/‖g_i‖₂)) with g = ∇value(x + δ), `steps` times; returns x + δ.

    An example whose gradient is zero does not move, and `delta` is used as it is until the first projection.
    Independent: example by example in a python loop, each norm as the root of a plain sum of squares.
    """
    x = x.detach()
    delta = delta.detach().clone()
    for _ in range(steps):
        gradient = _input_gradient(value, x + delta)
        for i in range(len(x)):
            moved = delta[i].clone()
            slope = float((gradient[i] ** 2).sum().sqrt())
            if slope > 0:
                moved = moved + step_size * gradient[i] / slope
            length = float((moved**2).sum().sqrt())
            if length > eps:
                moved = moved * (eps / length)
            delta[i] = _into_box(x[i], moved, box)
    return (x + delta).detach()
