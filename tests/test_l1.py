"""The L1 ball's projection into ball and box at once: against bisection, its optimality conditions and closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saltflat import L1, PerExample


def rooms(u, x, box):
    """How far each number may move to u's side."""
    if box is None:
        return torch.full_like(u, math.inf)
    return torch.where(u > 0, box[1] - x, x - box[0])


def bisected(u, x, radius, box):
    """min(max(|u| - t, 0), room) by bisection on t, with u's signs."""
    room = rooms(u, x, box)
    shrunk = lambda t: u.sign() * (u.abs() - t).clamp(min=0).minimum(room)
    low, high = torch.zeros(len(u), 1, dtype=u.dtype), u.abs().amax(1, keepdim=True)
    fits = shrunk(low).abs().sum(1, keepdim=True) <= radius
    for _ in range(100):
        middle = (low + high) / 2
        inside = shrunk(middle).abs().sum(1, keepdim=True) <= radius
        low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
    return torch.where(fits, shrunk(torch.zeros_like(low)), shrunk(high))


@st.composite
def problems(draw):
    """u of any size, x in the box with numbers on its sides, equal numbers now and then."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    u = torch.randn(shape, dtype=torch.float64, generator=generator) * 10.0 ** draw(st.integers(-3, 3))
    x = torch.rand(shape, dtype=torch.float64, generator=generator)
    if draw(st.booleans()):
        u, x = u.mul(4).round().div(4), x.mul(4).round().div(4)
    return u, x, draw(st.floats(1e-3, 30.0)), draw(st.sampled_from([None, (0.0, 1.0), (-1.0, 2.0)]))


@given(problems())
def test_it_is_what_bisection_finds(problem):
    u, x, radius, box = problem
    v = L1(radius, box).project(u, x)
    assert torch.allclose(v, bisected(u, x, radius, box), rtol=0, atol=1e-12 * (1 + u.abs().max().item()))


@given(problems())
def test_it_satisfies_the_conditions_of_optimality(problem):
    """|u| - |v| is one t >= 0 where v lies between its limits, at most t where v = 0, at least t where v meets the box;
    and t = 0 unless the sum is the radius. With a convex problem, that is enough.
    """
    u, x, radius, box = problem
    v, room = L1(radius, box).project(u, x), rooms(u, x, box)
    slack = 1e-12 * (1 + u.abs().max().item())
    assert ((v == 0) | (v.sign() == u.sign())).all()
    assert (v.abs() <= room).all()
    assert (v.abs().sum(1) <= radius * (1 + 1e-12)).all()
    for lost, size, limit in zip(u.abs() - v.abs(), v.abs(), room, strict=True):
        free = (size > slack) & (size < limit - slack)
        off, full = (size == 0) & (limit > 0), (size >= limit - slack) & (size > 0)
        tight = size.sum() > radius * (1 - 1e-9) - slack  # |u| - t loses the digits that |u| has before the radius'
        least = max(lost[off].max().item() if off.any() else 0.0, 0.0)
        most = lost[full].min().item() if full.any() else math.inf
        t = lost[free].mean().item() if free.any() else (min(least, most) if tight else 0.0)
        assert t >= -slack
        assert tight or t <= slack
        assert least <= t + 4 * slack
        assert most >= t - 4 * slack
        assert not free.any() or (lost[free] - t).abs().max() <= 4 * slack


@given(problems(), st.integers(0, 1000))
def test_no_member_is_nearer(problem, seed):
    u, x, radius, box = problem
    ball, x = L1(radius, box), x.clamp(0, 1)
    distance = (ball.project(u, x) - u).square().sum(1)
    generator = torch.Generator().manual_seed(seed)
    for surface in (False, True):
        other = ball.sample(x, generator, surface)
        assert (distance <= (other - u).square().sum(1) * (1 + 1e-9)).all()


@pytest.mark.parametrize("radius", [0.5, 3.0])
def test_without_a_box_it_is_the_simplex_projection(radius):
    """Duchi et al., ICML 2008: t is the largest of (sum of the p largest - radius) / p over all p."""
    u = torch.randn(6, 30, dtype=torch.float64)
    for row, v in zip(u, L1(radius, None).project(u, torch.zeros_like(u)), strict=True):
        largest = row.abs().sort(descending=True).values.tolist()
        t = max((sum(largest[:p]) - radius) / p for p in range(1, 31))
        assert torch.allclose(v, row.sign() * (row.abs() - t).clamp(min=0), atol=1e-14)


def test_by_hand_with_one_number_at_the_box():
    """0.9 may only go to 1; 0.6 is left for the others, which lose 0.2 each."""
    v = L1(0.7).project(torch.tensor([[5.0, 0.5, -0.5]], dtype=torch.float64), torch.tensor([[0.9, 0.5, 0.5]]).double())
    assert torch.allclose(v, torch.tensor([[0.1, 0.3, -0.3]]).double(), atol=1e-7)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_membership_and_idempotence_for_images(scale, dtype):
    x = torch.rand(8, 3, 32, 32, dtype=dtype)
    x[0], x[1] = 0, 1
    ball, tolerance = L1(12.0), 1e-6 if dtype is torch.float32 else 1e-12
    once = ball.project(scale * torch.randn_like(x), x)
    assert once.dtype is dtype
    assert once.double().abs().flatten(1).sum(1).max() <= 12 * (1 + tolerance)
    assert 0 <= (x + once).min() <= (x + once).max() <= 1
    assert torch.allclose(ball.project(once, x), once, rtol=0, atol=tolerance)


def test_rows_do_not_see_each_other():
    u, x = torch.randn(5, 4, 3, dtype=torch.float64), torch.rand(5, 4, 3, dtype=torch.float64)
    u[0] *= 1e6
    whole = L1(0.8).project(u, x)
    for i in range(5):
        assert torch.allclose(L1(0.8).project(u[i : i + 1], x[i : i + 1])[0], whole[i], rtol=0, atol=1e-15)


def test_steepest_takes_the_first_of_equals():
    g = torch.tensor([[1.0, -2.0, 2.0], [0.0, 0.0, 0.0], [3.0, torch.nan, 1.0]])
    assert torch.equal(L1(0.5).steepest(g, g), torch.tensor([[0.0, -0.5, 0.0], [0.0] * 3, [0.0] * 3]))


@pytest.mark.parametrize("surface", [False, True])
@pytest.mark.parametrize("per_example", [False, True])
def test_samples_have_the_moments_of_the_uniform_distribution(surface, per_example):
    """A coordinate's size is Beta(1, d) of the radius in the ball, Beta(1, d - 1) on its faces; signs are fair."""
    n, d, x = 20000, 4, torch.zeros(20000, 4, dtype=torch.float64)
    generator = PerExample(0, torch.arange(n)) if per_example else torch.Generator().manual_seed(0)
    v = L1(2.0, None).sample(x, generator, surface) / 2
    b = d - 1 if surface else d
    mean, variance = 1 / (1 + b), b / ((1 + b) ** 2 * (2 + b))
    assert torch.allclose(v.abs().mean(0), torch.tensor(mean).double(), atol=5 * math.sqrt(variance / n))
    assert torch.allclose(v.abs().var(0), torch.tensor(variance).double(), rtol=0.1)
    assert ((v > 0).double().mean(0) - 0.5).abs().max() < 2.5 / math.sqrt(n)
    assert (v[:, 0] * v[:, 1]).mean().abs() < 5 / math.sqrt(n) * v.abs().max()


def test_a_single_number_is_sampled_too():
    for surface in (False, True):
        v = L1(0.5, None).sample(torch.zeros(100, 1), torch.Generator().manual_seed(0), surface)
        assert v.isfinite().all()
        assert v.abs().max() <= 0.5
