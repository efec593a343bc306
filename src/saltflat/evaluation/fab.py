"""FAB: along linearisations of the network towards the boundary that is nearest to x, in the norm of the ball.

    H_k     = {p in the box : f(x'_k) + <grad f(x'_k), p - x'_k> = 0},    f = z_t - z_y
    u_k     = x + beta (x'_k - x) if x'_k is misclassified, else x'_k
    x'_k+1  = clamp((1 - a) (u_k + eta d(u_k)) + a (x + eta d(x))),    d(p) = (nearest point of H_k to p) - p
    a       = min(‖d(u_k)‖ / (‖d(u_k)‖ + ‖d(x)‖), alpha_max)

Where the box has no point of the hyperplane, d leads to the corner of the box that is nearest to it. FAB walks outside
of the ball as well, and an example is fooled by what it finds inside.

Towards a hyperplane with the normal g, numbers move by t_i >= 0 in the direction of g_i, as far as the box has room
r_i, until sum_i |g_i| t_i is what is missing, c:

    L-inf    t_i = min(l, r_i)              all equally far,
    L2       t_i = min(l |g_i|, r_i)        or in proportion to |g_i|; l by Newton's method
    L1       t_i = r_i, then the rest       one after the other, the largest |g_i| first

Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML 2020,
arXiv 1907.02044, algorithm 1, towards one class at a time; constants of AutoAttack's standard version (FAB-T).

Deviation: after a misclassified x'_k, the paper and AutoAttack linearise at u_k, which takes a second forward a step.
Here the linearisation is that of x'_k, which lies nearer to the boundary.
Deviation: AutoAttack goes on until it spent its steps and compares the least distance with eps. Here a row is done as
soon as it is fooled in the ball.
Deviation: where the gradient is zero, AutoAttack moves by alpha_max towards x; here the row stays at u_k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from saltflat.balls import L1, L2, InputBall, Linf
from saltflat.evaluation.apgd import wrong_class
from saltflat.evaluation.search import Logits, Search, Trial, column, keep, rows_of, value_and_gradient
from saltflat.evaluation.stretch import level
from saltflat.objectives import margin
from saltflat.random import Generator

WITHIN = 1 + 1e-6  # of the radius: what `feasible` puts right by rounding


@dataclass(frozen=True)
class TargetedFAB:
    """The boundary to the class that is the `rank`-th likeliest wrong one at x: FAB-T is ranks 1 to 9, one by one.

    Args:
        ball: `Linf`, `L2` or `L1`.
        rank: from 1. With fewer than rank + 1 classes there is no such class, and nothing is tried.
        steps: linearisations of a search; each costs one forward and one input gradient. A search costs one forward
            more, the choice of the class another.
        alpha_max: how much of a step may be that from x, in [0, 1].
        eta: how far beyond the hyperplane a step goes, >= 1.
        beta: how much of x' - x is left after x' was misclassified, in [0, 1].
        restarts: further searches, which start at random at half the radius from x. AutoAttack's standard version,
            which calls it one restart, has none: it starts at x.

    Half precision moves the boundary a little; as x' goes back and forth over it, the true one is crossed as well.
    It draws once a restart.

    >>> from saltflat.evaluation import find
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = model.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
    >>> x, y = torch.tensor([[0.6, 0.5], [0.9, 0.1]]), torch.tensor([0, 0])
    >>> find(TargetedFAB(Linf(0.1), rank=1), model, x, y).fooled
    tensor([ True, False])
    """

    ball: InputBall
    rank: int
    steps: int = 100
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    restarts: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("rank", 1, math.inf),
            ("steps", 0, math.inf),
            ("alpha_max", 0, 1),
            ("eta", 1, math.inf),
            ("beta", 0, 1),
            ("restarts", 0, math.inf),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}: expected a number in [{least}, {most}], got {getattr(self, name)!r}")
        if not isinstance(self.ball, Linf | L2 | L1):
            raise ValueError(f"ball: expected Linf, L2 or L1, got {self.ball!r}")

    def __call__(self, logits: Logits, x: Tensor, y: Tensor, *, generator: Generator = None) -> Search:
        target = wrong_class(logits, x, y, self.rank)
        if target is None:
            return
        half = replace(self.ball, radius=self.ball.radius / 2)
        for search in range(self.restarts + 1):
            x_adv = x if search == 0 else x + half.sample(x, generator, surface=True)
            for _ in range(self.steps):
                z, f, gradient = value_and_gradient(logits, _lead, x_adv, (y, target))
                kept = yield Trial(x_adv, z, self._inside(x_adv, x))
                s = keep(_State(x, y, target, x_adv, f, gradient, margin(z, y) >= 0), kept)
                x, y, target, x_adv = s.x, s.y, s.target, self._step(s)
                generator = generator if kept is None else rows_of(generator, kept)
            with torch.no_grad():
                z = logits(x_adv)
            kept = yield Trial(x_adv, z, self._inside(x_adv, x))
            x, y, target = keep((x, y, target), kept)
            generator = generator if kept is None else rows_of(generator, kept)

    def _inside(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return _norm_of(self.ball).length((x_adv - x).flatten(1)) <= WITHIN * self.ball.radius

    def _step(self, s: _State) -> Tensor:
        u = torch.where(column(s.wrong, s.x), s.x + self.beta * (s.x_adv - s.x), s.x_adv)
        gradient, f = _scaled(s.gradient.flatten(1), s.f)
        points = torch.stack([u, s.x]).flatten(2).to(gradient.dtype)
        missing = f[:, None] + ((points - s.x_adv.flatten(1)) * gradient).sum(2, keepdim=True)
        d = to_hyperplane(self.ball, points, gradient, -missing)
        near, far = _norm_of(self.ball).length(d)
        share = near / (near + far + torch.finfo(near.dtype).tiny)
        alpha = torch.where(share < self.alpha_max, share, self.alpha_max)[:, None]  # NaN, where lengths overflow
        near_u, near_x = points + self.eta * d
        x_adv = torch.lerp(near_u, near_x, alpha).to(s.x.dtype).view(s.x.shape)
        return x_adv if self.ball.box is None else x_adv.clamp(*self.ball.box)


class _State(NamedTuple):
    """A row per example in the search; `wrong` says which are misclassified at x_adv, or tied: on the boundary itself,
    d(x') would be 0.
    """

    x: Tensor
    y: Tensor
    target: Tensor
    x_adv: Tensor
    f: Tensor
    gradient: Tensor
    wrong: Tensor


def _lead(z: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y; half precision is raised to fp32 before."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return (z.gather(1, target[:, None]) - z.gather(1, y[:, None]))[:, 0]


def _scaled(gradient: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Both divided by the largest |g_i|, which moves no hyperplane; both 0 where that says nothing."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    largest = gradient.abs().amax(1).to(dtype)
    f = f.to(dtype) / largest
    usable = (largest > 0) & (largest < math.inf) & f.isfinite()
    return torch.where(usable[:, None], gradient / largest[:, None], 0), torch.where(usable, f, 0)


def to_hyperplane(ball: InputBall, p: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """d of the least norm (the ball's) with <w, d> = c and p + d in the box; where there is none, the d that comes
    nearest to it, into a corner of the box.

    Args:
        ball: its norm and its box; not its radius.
        p: (..., D) points in the box.
        w, c: (..., D) and (..., 1) hyperplanes, of shapes that broadcast to that of p.

    Returns: d as p; 0 in numbers of which w is 0.

    >>> to_hyperplane(Linf(1.0), torch.tensor([[0.5, 0.9]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5]]))
    tensor([[0.3000, 0.1000]])
    """
    norm, m = _norm_of(ball), w.abs()
    direction = torch.where(c < 0, -w, w)
    if ball.box is None:
        t = norm.free(m, c.abs())
    else:
        low, high = ball.box
        t = norm.boxed(m, torch.where(direction > 0, high - p, p - low).clamp(min=0), c.abs())
    return torch.where(direction == 0, 0, t).copysign(direction)


class _Norm(NamedTuple):
    """How far t (..., D) each number goes for sum_i m_i t_i = c, with and without ends (`room`) to it; what it is where
    m is 0 does not matter.
    """

    order: float
    free: Callable[[Tensor, Tensor], Tensor]
    boxed: Callable[[Tensor, Tensor, Tensor], Tensor]

    def length(self, d: Tensor) -> Tensor:
        if self.order == math.inf:  # torch's own takes three times as long
            return d.abs().amax(-1)
        norm: Tensor = torch.linalg.vector_norm(d, ord=self.order, dim=-1)
        return norm


def _norm_of(ball: InputBall) -> _Norm:
    if isinstance(ball, Linf):
        return _Norm(math.inf, _evenly, _evenly_boxed)
    return _Norm(2, _steeply, _steeply_boxed) if isinstance(ball, L2) else _Norm(1, _sparsely, _sparsely_boxed)


def _evenly(m: Tensor, c: Tensor) -> Tensor:
    return (c / m.sum(-1, keepdim=True)).expand(*c.shape[:-1], m.shape[-1])


def _evenly_boxed(m: Tensor, room: Tensor, c: Tensor) -> Tensor:
    return room.fmin(level(m, room, c))


def _steeply(m: Tensor, c: Tensor) -> Tensor:
    return c / m.square().sum(-1, keepdim=True) * m


def _steeply_boxed(m: Tensor, room: Tensor, c: Tensor) -> Tensor:
    return room.fmin(level(m.square(), room / m.clamp(min=torch.finfo(m.dtype).tiny), c) * m)


def _sparsely(m: Tensor, c: Tensor) -> Tensor:
    largest, at = m.max(-1, keepdim=True)
    t = c / largest
    return t.new_zeros(*t.shape[:-1], m.shape[-1]).scatter(-1, at.expand_as(t), t)


def _sparsely_boxed(m: Tensor, room: Tensor, c: Tensor) -> Tensor:
    m, order = m.sort(-1, descending=True)
    order = order.expand_as(room)
    room = room.gather(-1, order)
    t = room.fmin(((c - _sum_before(m * room)) / m).clamp(min=0))
    return torch.empty_like(t).scatter(-1, order, t)


def _sum_before(values: Tensor) -> Tensor:
    """Of each number, the sum of those in front of it."""
    return torch.nn.functional.pad(values.cumsum(-1)[..., :-1], (1, 0))
