"""Auto-PGD in the L1 ball: projected ascent by steps of a few numbers, as many as the best point so far asks for.

    v_t+1 = P(v_t + eta s / ‖s‖_1),   s_i = sign g_i where |g_i| is one of the k largest, else 0,   g = grad f(x + v_t)

P is the exact projection into the ball and the box. At checkpoints, every 4 % of the steps, with v* a row's best point,

    k = 2/3 ‖v*‖_0, rounded up;
    if ‖v*‖_0 fell by more than 5 % since the last checkpoint: eta = radius, and the search goes on from v*;
    else eta falls by a factor of 1.5, but not below radius / 10.

The search begins in larger balls: 30 % of the steps in that of 3 radii, 30 % in that of 2, the rest in the ball itself,
each from the best point of the one before, projected. Meanwhile only what lies in the ball itself can be found.

Source: Croce and Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021, arXiv
2103.01208; constants and budgets of AutoAttack's standard version.

Deviation: a last trial is the corner of ball and box to which the gradient at v* points. It is the optimum of linear
models, which the steps above miss by some per cent, or by far where few numbers matter: k never falls from 2 to 1, and
the k largest may have no room left in the box. It fools some more examples of networks, too.
Deviation: with fewer than 5 steps AutoAttack leaves none for the ball itself; here that has at least one.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Generator as Coroutine
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from saltflat.balls import L1, InputBall, Linf
from saltflat.evaluation.apgd import Loss, TargetedLoss, wrong_class
from saltflat.evaluation.ratios import targeted_dlr
from saltflat.evaluation.search import Logits, Search, Trial, column, keep, value_and_gradient
from saltflat.objectives import ce
from saltflat.random import Generator


@dataclass(frozen=True)
class SparseAPGD:
    """Maximise loss(logits, y) in an L1 ball.

    Args:
        ball: `L1`; for others see `APGD`.
        loss: (logits, y) -> (N,): `ce` (APGD-CE) or `dlr` (APGD-DLR).
        steps: gradient evaluations after the first in each of the three balls.

    It starts on the surface of the largest ball, unless `start` (x' itself, which is projected into that ball) is
    given, and draws once.

    >>> from saltflat.evaluation import find
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = model.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
    >>> x, y = torch.tensor([[0.6, 0.5], [0.9, 0.1]]), torch.tensor([0, 0])
    >>> find(SparseAPGD(L1(0.2)), model, x, y).fooled
    tensor([ True, False])
    """

    ball: L1
    loss: Loss = ce
    steps: int = 100

    def __post_init__(self) -> None:
        _check(self.ball, self.steps)

    def __call__(
        self, logits: Logits, x: Tensor, y: Tensor, *, start: Tensor | None = None, generator: Generator = None
    ) -> Search:
        return _ascent(self.ball, self.loss, self.steps, logits, x, (y,), start, generator)


@dataclass(frozen=True)
class TargetedSparseAPGD:
    """`SparseAPGD` towards the class that is the `rank`-th likeliest wrong one at x: APGD-T is ranks 1 to 9, one by
    one.

    With fewer than rank + 1 classes there is no such class, and nothing is tried.
    """

    ball: L1
    rank: int
    loss: TargetedLoss = targeted_dlr
    steps: int = 100

    def __post_init__(self) -> None:
        _check(self.ball, self.steps)
        if self.rank < 1:
            raise ValueError(f"rank: expected an integer >= 1, got {self.rank!r}")

    def __call__(
        self, logits: Logits, x: Tensor, y: Tensor, *, start: Tensor | None = None, generator: Generator = None
    ) -> Search:
        target = wrong_class(logits, x, y, self.rank)
        if target is not None:
            yield from _ascent(self.ball, self.loss, self.steps, logits, x, (y, target), start, generator)


def _check(ball: InputBall, steps: int) -> None:
    if not isinstance(ball, L1):
        raise ValueError(f"ball: steps of few pixels are for L1, expected it or saltflat.evaluation.APGD, got {ball!r}")
    if steps < 0:
        raise ValueError(f"steps: expected an integer >= 0, got {steps!r}")


def _ascent(
    ball: L1,
    loss: Callable[..., Tensor],
    steps: int,
    logits: Logits,
    x: Tensor,
    labels: tuple[Tensor, ...],
    start: Tensor | None,
    generator: Generator,
) -> Search:
    early = max(min(-(-3 * steps // 10), (steps - 1) // 2), 0)
    stages = [(replace(ball, radius=times * ball.radius), early) for times in (3, 2) if early > 0]
    stages.append((ball, steps - 2 * early))
    largest = stages[0][0]
    v = largest.sample(x, generator, surface=True) if start is None else start.detach() - x
    for within, budget in stages:
        s, labels = yield from _stage(ball, within, loss, budget, logits, x, within.project(v, x), labels)
        x, v = s.x, s.best
    x_adv = x + _best_corner(ball, s.best_gradient, x)
    with torch.no_grad():
        z = logits(x_adv)
    yield Trial(x_adv, z)


class _State(NamedTuple):
    """A row per example in the search: `few` is k, `support` is ‖v*‖_0 at the last checkpoint."""

    x: Tensor
    v: Tensor
    gradient: Tensor
    best: Tensor
    best_gradient: Tensor
    best_f: Tensor
    support: Tensor
    few: Tensor
    eta: Tensor


def _stage(
    ball: L1,
    within: L1,
    loss: Callable[..., Tensor],
    steps: int,
    logits: Logits,
    x: Tensor,
    v: Tensor,
    labels: tuple[Tensor, ...],
) -> Coroutine[Trial, Tensor | None, tuple[_State, tuple[Tensor, ...]]]:
    """Climb in the ball `within`, from v; what is found must be in `ball`. Returns the rows that are left, and their
    labels.
    """
    z, f, gradient = value_and_gradient(logits, loss, x + v, labels)
    kept = yield Trial(x + v, z, _inside(ball, within, v))
    support = _support(v, within.radius)
    eta = v.new_full((len(v),), within.radius)
    s = _State(x, v, gradient, v, gradient, f, support, _few(support), eta)
    s, labels = keep(s, kept), keep(labels, kept)
    period = max(steps // 25, 1)
    for t in range(1, steps + 1):
        v = within.project(s.v + _step(s), s.x)
        z, f, gradient = value_and_gradient(logits, loss, s.x + v, labels)
        kept = yield Trial(s.x + v, z, _inside(ball, within, v))
        better = f > s.best_f
        s = s._replace(
            v=v,
            gradient=gradient,
            best=torch.where(column(better, v), v, s.best),
            best_gradient=torch.where(column(better, v), gradient, s.best_gradient),
            best_f=torch.where(better, f, s.best_f),
        )
        s, labels = keep(s, kept), keep(labels, kept)
        if t % period == 0:
            s = _checkpoint(s, within.radius)
    return s, labels


def _inside(ball: L1, within: L1, v: Tensor) -> Tensor | None:
    return None if within == ball else v.flatten(1).abs().sum(1) <= ball.radius


def _step(s: _State) -> Tensor:
    g = s.gradient.reshape(len(s.v), -1)
    g = torch.where(g.isfinite().all(1, keepdim=True), g, 0)
    # AutoAttack official: whatever ties with the k-th largest is changed, too
    least = g.abs().sort(1, descending=True).values.gather(1, s.few[:, None] - 1)
    signs = torch.where(g.abs() >= least, g.sign(), 0)
    step = signs * (s.eta[:, None] / signs.abs().sum(1, keepdim=True).clamp(min=1))
    return step.reshape(s.v.shape)


def _checkpoint(s: _State, radius: float) -> _State:
    support = _support(s.best, radius)
    sparser = 20 * support < 19 * s.support
    back = column(sparser, s.v)
    return s._replace(
        v=torch.where(back, s.best, s.v),
        gradient=torch.where(back, s.best_gradient, s.gradient),
        eta=torch.where(sparser, radius, (s.eta / 1.5).clamp(min=radius / 10)),
        support=support,
        few=_few(support),
    )


def _support(v: Tensor, radius: float) -> Tensor:
    # not what rounding left of a number that the projection brings to 0
    return (v.flatten(1).abs() > 1e-7 * radius).sum(1)


def _few(support: Tensor) -> Tensor:
    return ((2 * support + 2) // 3).clamp(min=1)


def _best_corner(ball: L1, gradient: Tensor, x: Tensor) -> Tensor:
    """argmax <g, v> in ball and box: the largest |g_i| take all the room that the box leaves them, until the radius is
    spent.
    """
    cube = Linf(ball.radius, ball.box)
    edges = cube.project(cube.steepest(gradient, x), x).flatten(1)
    order = gradient.flatten(1).abs().argsort(dim=1, descending=True, stable=True)
    room = edges.gather(1, order).abs()
    used = (ball.radius - (room.cumsum(1) - room)).clamp(min=0).minimum(room)
    return torch.zeros_like(edges).scatter(1, order, used).copysign(edges).reshape(x.shape)
