"""A displacement u that the box cuts, stretched until it is as long as an L2 ball allows.

    v = s u, clamped to the box, with the s for which ‖v‖_2 = radius
    ‖v‖^2 = sum_i u_i^2 min(s^2, (room_i / u_i)^2)

What `L2.project` takes from the numbers that have no room goes to those that have some. On linear models the steepest
u, stretched, is the optimum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saltflat.balls import L2, Linf


def stretch(ball: L2, displacement: Tensor, centre: Tensor) -> Tensor:
    """The formula above, for every example, in float64; everything clamped, where even that is shorter.

    >>> stretch(L2(0.5), torch.tensor([[0.1, 0.1, 0.0]]), torch.tensor([[0.7, 0.3, 0.5]]))
    tensor([[0.3000, 0.4000, 0.0000]])
    """
    x = centre.double()
    u = L2(1.0, None).steepest(displacement.double(), x).reshape(len(x), math.prod(x.shape[1:]))
    room = Linf(ball.radius, ball.box).project(u.sign().mul(ball.radius).reshape(x.shape), x).abs().reshape(u.shape)
    size = u.abs().clamp(min=torch.finfo(u.dtype).tiny)
    s = level(u.square(), (room / size).square(), torch.full_like(u[:, :1], ball.radius**2)).sqrt()
    return room.minimum(size * s).mul(u.sign()).to(displacement.dtype).reshape(displacement.shape)


def level(u: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """h (..., 1) with sum_i u_i min(h, b_i) = c, for u, b (..., D) and c (..., 1), all >= 0; inf if c is more than all
    of them give.

    Newton's method: the sum is concave and linear in pieces, so that h only grows, and is exact when it stops. It takes
    a handful of passes, where sorting b would take ten times as long.

    >>> level(torch.tensor([[1.0, 2.0]]), torch.tensor([[9.0, 1.0]]), torch.tensor([[5.0]]))
    tensor([[3.]])
    """
    given, h = torch.where(u > 0, u * b, 0), torch.zeros_like(c.expand(*b.shape[:-1], 1))
    while True:
        rest = (u * (b > h)).sum(-1, keepdim=True)
        missing = c - (given * (b <= h)).sum(-1, keepdim=True)
        higher = (missing / rest).fmax(h)  # inf, where nobody has room left; 0 / 0 is no number, and ignored
        if not (higher > h).any():
            return h
        h = higher
