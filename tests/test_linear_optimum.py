"""One contract for all attacks and balls: on linear models they find what is known to be there, and no more.

    max over ball and box of max_{k != y} z_k - z_y  =  max_{k != y} (z_k - z_y)(x) + max_v <w_k - w_y, v>

The maximum over v is computed from its dual problem, which has one unknown, the price of a unit of the norm.
"""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch

from saltflat import L1, L2, PGD, Linf, PerExample
from saltflat.evaluation import (
    APGD,
    SPSA,
    Restarted,
    SparseAPGD,
    Square,
    TargetedAPGD,
    TargetedFAB,
    TargetedSparseAPGD,
    find,
)
from saltflat.evaluation.ratios import dlr
from saltflat.objectives import margin

D, ROWS = 12, 64


def gain(ball, x, w):
    """max <w, v> in ball and box, for all rows x (N, D) and w (K, D): (N, K)."""
    room = torch.full((len(x), *w.shape), 1e6, dtype=x.dtype)
    if ball.box is not None:
        room = torch.where(w > 0, ball.box[1] - x[:, None], x[:, None] - ball.box[0])
    m = w.abs().expand_as(room)
    if isinstance(ball, Linf):
        return (m * room.clamp(max=ball.radius)).sum(2)
    if isinstance(ball, L1):  # min over t >= 0 of t radius + sum room (m - t)+, at one of its kinks
        t = torch.cat([torch.zeros_like(m[..., :1]), m], 2)
        return (t * ball.radius + (room[:, :, None] * (m[:, :, None] - t[..., None]).clamp(min=0)).sum(3)).amin(2)
    low, high = (
        torch.zeros_like(m[..., :1]),
        torch.full_like(m[..., :1], 1e6),
    )  # v = min(m s, room), as long as ball has
    for _ in range(60):
        s = (low + high) / 2
        fits = torch.minimum(m * s, room).square().sum(2, keepdim=True) <= ball.radius**2
        low, high = torch.where(fits, s, low), torch.where(fits, high, s)
    return (m * torch.minimum(m * low, room)).sum(2)


@dataclass(frozen=True)
class Linear:
    """z = W x + b, and classes are 0."""

    w: torch.Tensor
    b: torch.Tensor

    def __call__(self, x):
        return x.flatten(1) @ self.w.T + self.b

    def clean(self, x):
        z = self(x)
        return z[:, 1:] - z[:, :1]

    def optimum(self, ball, x):
        return (self.clean(x) + gain(ball, x, self.w[1:] - self.w[0])).amax(1)


def two():
    return Linear(torch.randn(2, D, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))


def near():
    """Five classes, of which one wrong one is likelier than the others everywhere in the ball."""
    b = torch.tensor([0.0, 0.0, -12.0, -13.0, -14.0], dtype=torch.float64)
    return Linear(torch.randn(5, D, dtype=torch.float64), b)


def many():
    """Five classes, any of which may be the nearest."""
    return Linear(torch.randn(5, D, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))


def inputs(box):
    """In (0, 1), or one number in four at the box's sides."""
    x = torch.rand(ROWS, D, dtype=torch.float64)
    return x if box is None else torch.where(torch.rand_like(x) < 0.25, x.round(), x)


@cache
def placed(build, ball):
    """A model, and inputs so far towards class 0 or away from it that the ball reaches the boundary and no more."""
    model, x = build(), inputs(ball.box)
    u = model.w[0] - model.w[1:].mean(0)
    low, high = torch.full((ROWS, 1), -8.0, dtype=x.dtype), torch.full((ROWS, 1), 8.0, dtype=x.dtype)
    at = lambda t: x + t * u if ball.box is None else (x + t * u).clamp(*ball.box)
    for _ in range(60):
        t = (low + high) / 2
        beyond = model.optimum(ball, at(t))[:, None] > 0
        low, high = torch.where(beyond, t, low), torch.where(beyond, high, t)
    x = at(high)
    kept = model.optimum(ball, x).abs() < 1e-9  # others would have to leave the box
    assert kept.sum() > ROWS / 2
    return model, x[kept]


def outcome(attacks, model, x):
    """Who is fooled by one of the attacks, and the largest margin that they saw; each is given those that are left."""
    y, fooled = torch.zeros(len(x), dtype=torch.long), torch.zeros(len(x), dtype=torch.bool)
    largest = torch.full((len(x),), -torch.inf, dtype=x.dtype)
    for attack in attacks:
        ids = (~fooled).nonzero()[:, 0]
        found = find(attack, model, x[ids], y[ids], generator=PerExample(5, ids))
        fooled[ids], largest[ids] = found.fooled, largest[ids].maximum(found.margin)
    return fooled, largest


def towards_each(attack, *settings):
    return lambda ball: [attack(ball, rank, *settings) for rank in range(1, 5)]


ATTACKS = {
    "pgd": lambda ball: [Restarted(PGD(ball, ball.radius / 10, 40), restarts=2)],
    "cw": lambda ball: [Restarted(PGD(ball, ball.radius / 10, 40), margin, 2)],
    "apgd-ce": lambda ball: [APGD(ball)],
    "apgd-dlr": lambda ball: [APGD(ball, dlr)],
    "apgd-t": towards_each(TargetedAPGD),
    "fab-t": towards_each(TargetedFAB, 30),
    "sparse-ce": lambda ball: [SparseAPGD(ball)],
    "sparse-dlr": lambda ball: [SparseAPGD(ball, dlr)],
    "sparse-t": towards_each(TargetedSparseAPGD),
    "square": lambda ball: [Square(ball, 1000)],
    "spsa": lambda ball: [SPSA(ball, 50, 100)],
}
TARGETED = {"apgd-t", "fab-t", "sparse-t"}
BALLS = [kind(radius, box) for kind, radius in ((Linf, 0.08), (L2, 0.3), (L1, 0.6)) for box in (None, (0.0, 1.0))]
SIZES = [1, 3, 64]  # of a batch


def searched(ball):
    """The attacks that take this ball."""
    if isinstance(ball, L1):
        return ["fab-t", "sparse-ce", "sparse-dlr", "sparse-t", "square"]
    return ["pgd", "cw", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "spsa"]


def cases(wanted=lambda name: True, models=()):
    """All attacks and balls, and each of the models, if any."""
    return [
        pytest.param(name, ball, *model, id="-".join([name, kind, *(build.__name__ for build in model)]))
        for ball in BALLS
        for kind in [type(ball).__name__ + (" and box" if ball.box else "")]
        for name in searched(ball)
        for model in ([(build,) for build in models] or [()])
        if wanted(name)
    ]


def promised(name, ball):
    """The part of the optimal gain that an attack reaches, and how much larger than needed a ball must be.

    Square's bumps in L2 and L1 are no single numbers; Adam moves all numbers about equally far.
    """
    kind = type(ball)
    if name == "square":
        return {Linf: (0.99, 1.01), L2: (0.7, 1.5), L1: (0.6, 1.5)}[kind]
    if name == "spsa":
        return {Linf: (0.97, 1.03), L2: (0.85, 1.2)}[kind]
    return 0.99, 1.01


@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_no_member_gains_more_than_the_optimum_and_the_best_of_many_nearly_as_much(kind, box):
    ball, n = kind(0.3, box), 100_000
    x, w = torch.tensor([[0.9, 0.5], [0.0, 1.0], [0.5, 0.5]]).double(), torch.randn(4, 2, dtype=torch.float64)
    best = gain(ball, x, w)
    for row, most in zip(x, best, strict=True):
        gained = ball.sample(row.expand(n, 2), torch.Generator().manual_seed(0), surface=True) @ w.T
        assert (gained.amax(0) <= most + 1e-12).all()
        assert (gained.amax(0) >= 0.99 * most).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "ball"), cases(lambda name: name != "fab-t"))
def test_the_optimal_gain_is_reached_and_not_exceeded(name, ball, size):
    """Where even that is not enough to be fooled. FAB does not climb, it looks for the boundary."""
    model, x = two(), inputs(ball.box)[:size]
    model.b[0] = model.optimum(ball, x).max() + 1
    fooled, largest = outcome(ATTACKS[name](ball), model, x)
    part = (largest - model.clean(x)[:, 0]) / gain(ball, x, model.w[1:] - model.w[0])[:, 0]
    assert not fooled.any()
    assert promised(name, ball)[0] < part.min() <= part.max() < 1 + 1e-9


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("name", "ball", "model"),
    [*cases(models=(two, near)), *cases(lambda name: name in TARGETED, (many,))],  # elsewhere there are local maxima
)
def test_a_ball_that_reaches_beyond_the_boundary_is_enough(name, ball, model, size):
    model, x = placed(model, ball)
    x = x[:size]
    larger = replace(ball, radius=ball.radius * promised(name, ball)[1])
    fooled, largest = outcome(ATTACKS[name](larger), model, x)
    assert fooled.all()
    assert (largest <= model.optimum(larger, x) + 1e-9).all()


@pytest.mark.parametrize(("name", "ball", "model"), cases(models=(many,)))
def test_a_ball_that_ends_before_the_boundary_is_not(name, ball, model):
    model, x = placed(model, ball)
    smaller = replace(ball, radius=ball.radius * 0.99)
    fooled, largest = outcome(ATTACKS[name](smaller), model, x)
    assert not fooled.any()
    assert (largest <= model.optimum(smaller, x) + 1e-9).all()
