"""Auto-PGD: projected ascent with momentum, whose step size halves when progress stalls.

    u       = P(x'_k + s(eta_k, grad f(x'_k)))
    x'_k+1  = P(x'_k + a (u - x'_k) + (1 - a) (x'_k - x'_k-1)),    a = 0.75 (1 at the first step)

with s the ball's steepest step and eta_0 = 2 eps. At checkpoints, 22 %, 41 %, 57 %, ... of the steps, after a period of
T steps, a row's eta is halved and its search goes back to its best point so far, if

    1. f rose in at most 75 % of the T steps, or
    2. at the last checkpoint eta was not halved, and the best f has not risen since.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", ICML 2020, arXiv 2003.01690, algorithm 1; budgets of AutoAttack's standard version.

Deviation: in L2, P scales and then clamps to the box, as published, which leaves the surface of the ball where the box
cuts it. A last trial is the best point, stretched to the surface; on linear models it is the optimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from saltflat.balls import L1, InputBall
from saltflat.evaluation.ratios import targeted_dlr
from saltflat.evaluation.search import Logits, Search, Trial, column, keep, stretched, value_and_gradient
from saltflat.objectives import ce
from saltflat.random import Generator

Loss = Callable[[Tensor, Tensor], Tensor]
TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class APGD:
    """Maximise loss(logits, y) in `ball`, an L-inf or an L2 ball.

    Args:
        ball: `Linf` or `L2`; for `L1` see `SparseAPGD`.
        loss: (logits, y) -> (N,): `ce` (APGD-CE) or `dlr` (APGD-DLR).
        steps: gradient evaluations after the first; in an L2 ball with a box, a forward more.

    It starts on the surface of the ball, unless `start` (x' itself) is given, and draws once.
    """

    ball: InputBall
    loss: Loss = ce
    steps: int = 100

    def __post_init__(self) -> None:
        _check(self.ball, self.steps)

    def __call__(
        self, logits: Logits, x: Tensor, y: Tensor, *, start: Tensor | None = None, generator: Generator = None
    ) -> Search:
        return _ascent(self.ball, self.loss, self.steps, logits, x, (y,), start, generator)


@dataclass(frozen=True)
class TargetedAPGD:
    """APGD towards the class that is the `rank`-th likeliest wrong one at x: APGD-T is ranks 1 to 9, one by one.

    With fewer than rank + 1 classes there is no such class, and nothing is tried.
    """

    ball: InputBall
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
    if isinstance(ball, L1):
        raise ValueError("ball: one-pixel steps make APGD in L1 a sham; use saltflat.evaluation.SparseAPGD")
    if steps < 0:
        raise ValueError(f"steps: expected an integer >= 0, got {steps!r}")


def wrong_class(logits: Logits, x: Tensor, y: Tensor, rank: int) -> Tensor | None:
    """(N,) the rank-th likeliest class other than y at x, or None if there are not so many; one forward."""
    with torch.no_grad():
        z = logits(x)
    if z.shape[1] <= rank:
        return None
    return z.float().scatter(1, y[:, None], torch.inf).argsort(stable=True, dim=1, descending=True)[:, rank]


class _State(NamedTuple):
    """A row per example in the search; `rises` counts the steps since the last checkpoint at which f rose."""

    x: Tensor
    x_adv: Tensor
    before: Tensor
    gradient: Tensor
    f: Tensor
    best: Tensor
    best_gradient: Tensor
    best_f: Tensor
    best_f_at_check: Tensor
    eta: Tensor
    halved: Tensor
    rises: Tensor


def _ascent(
    ball: InputBall,
    loss: Callable[..., Tensor],
    steps: int,
    logits: Logits,
    x: Tensor,
    labels: tuple[Tensor, ...],
    start: Tensor | None,
    generator: Generator,
) -> Search:
    x_adv = x + ball.sample(x, generator, surface=True) if start is None else start.detach()
    z, f, gradient = value_and_gradient(logits, loss, x_adv, labels)
    kept = yield Trial(x_adv, z)
    eta = x.new_full((len(x),), 2 * ball.radius)  # of x's precision, so that points keep it whatever the loss has
    # AutoAttack official: at the first checkpoint, the first step is compared with f = 0 and not with f(x'_0)
    s = _State(x, x_adv, x_adv, gradient, torch.zeros_like(f), x_adv, gradient, f, f, eta, torch.ones_like(f), 0 * f)
    s, labels = keep(s, kept), keep(labels, kept)
    period, checked = max(int(0.22 * steps), 1), 0
    for k in range(steps):
        x_adv = _step(ball, s, 0.75 if k > 0 else 1.0)
        z, f, gradient = value_and_gradient(logits, loss, x_adv, labels)
        kept = yield Trial(x_adv, z)
        better = f > s.best_f
        s = s._replace(
            x_adv=x_adv,
            before=s.x_adv,
            gradient=gradient,
            f=f,
            best=torch.where(column(better, x), x_adv, s.best),
            best_gradient=torch.where(column(better, x), gradient, s.best_gradient),
            best_f=torch.where(better, f, s.best_f),
            rises=s.rises + (f > s.f),
        )
        s, labels = keep(s, kept), keep(labels, kept)
        if k + 1 - checked == period:
            s = _checkpoint(s, period)
            checked, period = k + 1, max(period - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    yield from stretched(ball, logits, s.x, s.best)


def _step(ball: InputBall, s: _State, a: float) -> Tensor:
    # eta differs by row, so the unit ball's step is scaled
    direction = replace(ball, radius=1.0).steepest(s.gradient, s.x) * column(s.eta, s.x)
    u = s.x + ball.project(s.x_adv + direction - s.x, s.x)
    return s.x + ball.project(s.x_adv + (u - s.x_adv) * a + (s.x_adv - s.before) * (1 - a) - s.x, s.x)


def _checkpoint(s: _State, period: int) -> _State:
    oscillates = s.rises <= 0.75 * period
    stalls = (s.halved == 0) & (s.best_f_at_check >= s.best_f)
    halve = oscillates | stalls
    back = column(halve, s.x)
    return s._replace(
        x_adv=torch.where(back, s.best, s.x_adv),
        gradient=torch.where(back, s.best_gradient, s.gradient),
        eta=torch.where(halve, s.eta / 2, s.eta),
        halved=halve.to(s.halved.dtype),
        best_f_at_check=s.best_f,
        rises=torch.zeros_like(s.rises),
    )
