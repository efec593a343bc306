"""The frame that attacks run in: what it puts into ball and box, whom it believes, and what it writes down."""

import inspect
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import batch, convolutional
from torch import nn

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
    Trial,
    find,
)
from saltflat.evaluation.ratios import dlr
from saltflat.evaluation.search import feasible, keep
from saltflat.inputs import gaussian
from saltflat.lean.network import lean
from saltflat.objectives import margin

BOXES = [None, (0.0, 1.0), (-1.0, 2.0)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def size(ball, v):
    """Of each row, in float64 and the ball's norm."""
    order = {Linf: math.inf, L2: 2, L1: 1}[type(ball)]
    return torch.linalg.vector_norm(v.double().flatten(1), ord=order, dim=1)


# Points: into the ball and the box of their dtype


@st.composite
def proposals(draw):
    """A ball, x in its box with numbers on the box's sides, and x' that may be anywhere; in each precision."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, box = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(BOXES))
    ball = draw(st.sampled_from([Linf, L2, L1]))(10.0 ** draw(st.floats(-4, 2)), box)
    shape = draw(st.sampled_from([(1, 1), (4, 30), (3, 2, 4, 4)]))
    u = torch.rand(shape, dtype=torch.float64, generator=generator)
    u = torch.where(torch.rand(shape, generator=generator) < 0.2, u.round(), u)
    low, high = box or (0.0, 1.0)
    x = (low + (high - low) * u).to(dtype)
    away = torch.randn(shape, dtype=torch.float64, generator=generator) * 10.0 ** draw(st.floats(-5, 4))
    return ball, x, (x.double() + away).to(dtype), generator


def members(ball, point, x):
    """Whether each row lies in ball and box, as `feasible` promises."""
    low, high = ball.box or (-math.inf, math.inf)
    boxed = ((point >= low) & (point <= high)).flatten(1).all(1)
    if isinstance(ball, Linf):
        least, most = ((x.double() + sign * ball.radius).to(x.dtype) for sign in (-1, 1))
        return boxed & ((least <= point) & (point <= most)).flatten(1).all(1)
    return boxed & (size(ball, point.double() - x.double()) <= ball.radius * (1 + 1e-6))


@settings(deadline=None)
@given(proposals())
def test_whatever_is_proposed_ends_in_ball_and_box(proposal):
    ball, x, x_adv, _ = proposal
    point = feasible(ball, x_adv, x)
    assert point.dtype is x.dtype
    assert point.shape == x.shape
    assert members(ball, point, x).all()


@settings(deadline=None)
@given(proposals())
def test_members_stay_where_they_are(proposal):
    ball, x, x_adv, _ = proposal
    low, high = ball.box or (-math.inf, math.inf)
    x_adv = x_adv.clamp(low, high)
    inside = size(ball, x_adv.double() - x.double()) <= ball.radius * (1 - 1e-12)
    same, expected = feasible(ball, x_adv, x)[inside], x_adv[inside]
    if x.dtype is torch.float64:  # whose differences are rounded
        assert torch.allclose(same, expected, rtol=0, atol=1e-15 * (1 + x_adv.abs().max().item()))
    else:
        assert torch.equal(same, expected)


@settings(deadline=None)
@given(proposals())
def test_what_is_outside_of_an_linf_ball_goes_to_the_nearest_member(proposal):
    ball, x, x_adv, _ = proposal
    ball = Linf(ball.radius, ball.box)
    low, high = ball.box or (-math.inf, math.inf)
    nearest = (x.double() + (x_adv.double() - x.double()).clamp(-ball.radius, ball.radius)).clamp(low, high)
    finfo = torch.finfo(x.dtype)
    tolerance = {"rtol": finfo.eps, "atol": max(1e-13, finfo.smallest_normal * finfo.eps)}
    assert torch.allclose(feasible(ball, x_adv, x), nearest.to(x.dtype), **tolerance)


@settings(deadline=None)
@given(proposals())
def test_what_is_no_number_is_not_moved(proposal):
    ball, x, x_adv, generator = proposal
    kinds = torch.tensor([math.nan, math.inf, -math.inf, 0.0])[torch.randint(0, 4, x.shape, generator=generator)]
    broken = torch.where(kinds == 0, x_adv, kinds.to(x.dtype))
    point = feasible(ball, broken, x)
    assert members(ball, point, x).all()
    assert torch.equal(point[kinds != 0], x[kinds != 0])


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_the_box_holds_exactly_where_x_plus_the_way_to_its_side_is_rounded(kind):
    """One in four of these x is such that x + (-1 - x) < -1."""
    x = 1 + torch.rand(1, 1000, dtype=torch.float64)
    assert (x + (-1 - x)).min() < -1
    assert feasible(kind(1e4, (-1.0, 2.0)), x - 5, x).min() == -1


@pytest.mark.parametrize("kind", [L2, L1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rounding_costs_next_to_nothing_of_the_radius(kind, dtype):
    """Many numbers that were rounded up would leave the ball; each goes back by one place at most."""
    x, ball = torch.rand(4, 3, 32, 32).to(dtype), kind(2.0 if kind is L2 else 60.0, None)
    reached = size(ball, feasible(ball, x + torch.randn_like(x), x).double() - x.double())
    place = torch.finfo(dtype).eps * (3072**0.5 if kind is L2 else 3072)
    assert (reached >= ball.radius - place).all()


# Verdicts: an attack that says whatever a script says, and a loop that reads the script example by example


@dataclass(frozen=True)
class Scripted:
    """Proposes points (T, N, D) with margins (T, N) that it claims to have seen, of which `inside` (T, N) count."""

    ball: object
    points: torch.Tensor
    claims: torch.Tensor
    inside: torch.Tensor | None = None

    def __call__(self, logits, x, y, *, generator=None):
        rows = torch.arange(len(x))
        for t, points in enumerate(self.points):
            inside = None if self.inside is None else self.inside[t, rows]
            kept = yield Trial(points[rows], said(self.claims[t, rows], y), inside)
            (rows, y) = keep((rows, y), kept)


def said(claims, y):
    """Logits of three classes with these margins: 0 for y, the margin for the next class, less for the third."""
    z = torch.zeros(len(y), 3, dtype=claims.dtype)
    z.scatter_(1, (y[:, None] + 1) % 3, claims[:, None])
    return z.scatter_(1, (y[:, None] + 2) % 3, claims[:, None] - 1)


def judge():
    """A network that decides."""
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def read(script, i, exact, x, y, slack):
    """What must become of example i: (x_adv, fooled, iteration, margin)."""
    refused = largest = -math.inf
    for t in range(len(script.points)):
        claim = script.claims[t, i].item()
        if script.inside is not None and not script.inside[t, i]:
            continue
        if claim < -slack * max(abs(claim), abs(claim - 1)):
            largest = max(largest, claim)
        elif math.isnan(claim) or claim > refused:
            point = feasible(script.ball, script.points[t, i : i + 1], x[i : i + 1])
            z = exact(point)[0]
            value = margin(z[None], y[i : i + 1]).item()
            if z.argmax() != y[i]:
                return point[0], True, t, value
            outside = not torch.allclose(point, script.points[t, i : i + 1], rtol=0, atol=1e-6)  # it says nothing then
            largest, refused = max(largest, value), refused if math.isnan(claim) or outside else claim
    return x[i], False, -1, largest


@st.composite
def scripts(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    torch.manual_seed(draw(st.integers(0, 3)))
    n, steps, exact = draw(st.integers(1, 12)), draw(st.integers(0, 8)), judge()
    x = torch.rand(n, 4, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        z = exact(x)
    y = torch.where(torch.rand(n, generator=generator) < 0.8, z.argmax(1), z.argmin(1))
    ball = draw(st.sampled_from([Linf, L2, L1]))(draw(st.floats(0.05, 1.0)), draw(st.sampled_from([None, (0.0, 1.0)])))
    points = x + 0.5 * torch.randn(steps, n, 4, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        true = torch.stack([margin(exact(feasible(ball, p, x)), y) for p in points]) if steps else torch.zeros(0, n)
    claims = true + draw(st.sampled_from([0.0, 0.3])) * torch.randn(true.shape, dtype=true.dtype, generator=generator)
    claims[torch.rand(true.shape, generator=generator) < draw(st.sampled_from([0.0, 0.1]))] = math.nan
    inside = torch.rand(true.shape, generator=generator) < 0.7 if draw(st.booleans()) else None
    return Scripted(ball, points, claims, inside), exact, x, y, draw(st.sampled_from([0.0, 0.1, 0.5]))


@settings(deadline=None)
@given(scripts())
def test_it_decides_as_a_loop_over_examples_does(case):
    script, exact, x, y, slack = case
    kept = x.clone()
    found = find(script, exact, x, y, slack=slack)
    with torch.no_grad():
        expected = [read(script, i, exact, x, y, slack) for i in range(len(x))]
    x_adv, fooled, iteration, value = zip(*expected, strict=True)
    assert torch.equal(found.fooled, torch.tensor(fooled))
    assert torch.equal(found.iteration, torch.tensor(iteration))
    assert torch.allclose(found.x_adv, torch.stack(x_adv), atol=1e-12)
    assert torch.allclose(found.margin, torch.tensor(value, dtype=x.dtype), atol=1e-12)
    assert torch.equal(x, kept)


@settings(deadline=None)
@given(scripts())
def test_what_is_found_is_a_member_that_is_wrong_and_the_rest_is_x(case):
    script, exact, x, y, slack = case
    found = find(script, exact, x, y, slack=slack)
    assert members(script.ball, found.x_adv, x).all()
    assert torch.equal(found.x_adv[~found.fooled], x[~found.fooled])
    assert (exact(found.x_adv).argmax(1) != y)[found.fooled].all()
    assert torch.equal(found.iteration >= 0, found.fooled)
    assert (found.margin[found.fooled] >= 0).all()
    assert (found.margin[~found.fooled] <= 0).all()


def liar(n, steps, ball=None):
    """Says that everything is fooled, ever more so."""
    points = torch.rand(steps, n, 4, dtype=torch.float64)
    claims = torch.arange(1.0, steps + 1).double()[:, None].expand(steps, n)
    return Scripted(ball or Linf(0.3), points, claims)


def constant(answer):
    """A network of three classes that always gives this one."""
    return lambda x: torch.eye(3, dtype=torch.float64)[torch.full((len(x),), answer)]


def test_an_attack_that_lies_is_not_believed():
    x, y = torch.rand(5, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.long)
    found = find(liar(5, 4), constant(0), x, y)
    assert not found.fooled.any()
    assert torch.equal(found.x_adv, x)
    assert (found.margin == -1).all()  # what was seen in full precision
    found = find(liar(5, 4), constant(0), x, y, exact=constant(2))
    assert found.fooled.all()
    assert (found.iteration == 0).all()


@pytest.mark.parametrize(
    ("claims", "asked"),
    [([0.5, 0.4, 0.5, -0.1, 0.6, 0.55, 0.7], [0, 4, 6]), ([0.5, math.nan, 0.4, math.nan, 0.6, 0.5], [0, 1, 3, 4])],
)
def test_who_looked_fooled_in_vain_is_asked_about_again_when_it_looks_more_so(claims, asked):
    x, y, seen = torch.full((1, 4), 0.5).double(), torch.zeros(1, dtype=torch.long), []
    points = x + torch.arange(len(claims)).double().view(-1, 1, 1) / 100
    script = Scripted(Linf(0.3), points, torch.tensor(claims).double()[:, None])
    find(script, constant(0), x, y, exact=lambda point: seen.append(100 * (point - x).mean()) or constant(0)(point))
    assert [round(at.item()) for at in seen] == asked


def test_a_tie_is_looked_at_and_argmax_decides():
    x = torch.rand(2, 4, dtype=torch.float64)
    script = Scripted(Linf(0.3), torch.stack([x]), torch.zeros(1, 2).double())
    tie = lambda x: torch.zeros(len(x), 3, dtype=torch.float64)
    assert find(script, tie, x, torch.tensor([0, 1])).fooled.tolist() == [False, True]


@pytest.mark.parametrize(("slack", "asked"), [(0.0, 1), (0.09, 1), (0.11, 2), (1.0, 3)])
def test_slack_is_relative_to_the_largest_logit(slack, asked):
    """Margins 0.5, -0.2 and -0.8 where the largest |z| is 2."""
    x, y = torch.rand(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    z = torch.tensor([[1.5, 2.0, 0.0], [2.0, 1.8, 0.0], [2.0, 1.2, 0.0]]).double()

    @dataclass(frozen=True)
    class Once:
        ball: object = Linf(0.1)

        def __call__(self, logits, x, y, *, generator=None):
            yield Trial(x, z)

    seen = []
    found = find(Once(), constant(0), x, y, exact=lambda x: seen.append(len(x)) or constant(1)(x), slack=slack)
    assert seen == [asked]
    assert found.fooled.sum() == asked


def test_claims_of_half_precision_that_full_precision_refuses_do_not_count():
    """bf16 cannot tell the margins of this network from 0, so all of them may be wrong."""
    model = nn.Linear(6, 3).double()
    with torch.no_grad():
        model.weight.mul_(1e-3)
        model.bias.copy_(torch.tensor([1.0004, 1.0, 0.5]))
    x = torch.rand(64, 6, dtype=torch.float64)
    y, half = model(x).argmax(1), lambda x: model(x).bfloat16()
    attack = Restarted(PGD(Linf(0.2), 0.05, 20), margin)
    found = find(attack, half, x, y, exact=model)
    full = find(attack, model, x, y)
    assert (margin(half(x), y) == 0).all()  # claimed at once
    assert torch.equal(found.fooled, model(found.x_adv).argmax(1) != y)
    assert full.fooled.any()
    assert not full.fooled.all()
    assert (found.fooled <= full.fooled).all()
    assert (found.margin[~found.fooled] < 0).all()


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_logits_that_overflowed_are_looked_at_and_leave_no_trace(lost):
    """Half precision has no large numbers; what it says then is nothing."""
    x, y = torch.rand(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    claims = torch.tensor([[-0.5] * 4, [lost] * 4, [-0.6] * 4]).double()
    script = Scripted(Linf(0.3), torch.rand(3, 4, 4, dtype=torch.float64), claims)
    right = find(script, constant(0), x, y)
    assert not right.fooled.any()
    assert (right.margin == -0.5).all()
    wrong = find(script, constant(0), x, y, exact=constant(1))
    assert wrong.fooled.all()
    assert (wrong.iteration == 1).all()


def test_who_is_fooled_leaves_the_search_and_nobody_computes_for_it_again():
    x, y = torch.rand(6, 4, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    claims = torch.full((5, 6), -1.0).double()
    for t, i in ((1, 4), (1, 0), (2, 5), (3, 1), (3, 2), (3, 3)):
        claims[t, i] = 1.0
    sent = []

    @dataclass(frozen=True)
    class Watched(Scripted):
        def __call__(self, *args, **more):
            search, kept = super().__call__(*args, **more), None
            while True:
                kept = yield search.send(kept)
                sent.append(None if kept is None else kept.tolist())

    points = torch.rand(5, 6, 4, dtype=torch.float64)
    found = find(Watched(Linf(0.3), points, claims), constant(1), x, y)
    assert found.iteration.tolist() == [1, 3, 3, 3, 1, 2]
    assert sent == [None, [1, 2, 3, 5], [0, 1, 2]]  # and with the last of them, the search ends


@pytest.mark.parametrize(("n", "steps", "answer"), [(3, 4, 1), (3, 4, 0), (3, 0, 1), (0, 4, 1)])
def test_a_search_is_closed_when_it_is_over(n, steps, answer):
    searches = []

    @dataclass(frozen=True)
    class Held(Scripted):
        def __call__(self, *args, **more):
            searches.append(super().__call__(*args, **more))
            return searches[0]

    script = Held(Linf(0.3), torch.rand(steps, n, 4, dtype=torch.float64), torch.ones(steps, n).double())
    find(script, constant(answer), torch.rand(n, 4, dtype=torch.float64), torch.zeros(n, dtype=torch.long))
    assert [inspect.getgeneratorstate(search) for search in searches] == ["GEN_CLOSED"]


def test_the_verdict_is_asked_for_without_a_graph_and_by_logits_unless_told():
    x, y = torch.rand(2, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    modes = []
    find(liar(2, 1), lambda x: modes.append(torch.is_grad_enabled()) or constant(0)(x), x, y)
    assert modes == [False]
    found = find(APGD(Linf(0.1), steps=3), nn.Linear(4, 3).double(), x.requires_grad_(), y)
    assert not found.x_adv.requires_grad
    assert not found.margin.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_what_is_found(dtype):
    x, y = torch.rand(3, 4).to(dtype), torch.zeros(3, dtype=torch.long)
    found = find(APGD(Linf(0.1), steps=2), nn.Linear(4, 3).to(dtype), x, y)
    assert (found.x_adv.dtype, found.fooled.dtype, found.iteration.dtype) == (dtype, torch.bool, torch.int64)
    assert found.margin.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_a_trial_may_be_written_over_by_the_next_one():
    x, y = torch.full((2, 4), 0.5).double(), torch.zeros(2, dtype=torch.long)

    @dataclass(frozen=True)
    class InPlace:
        ball: object = Linf(0.3)

        def __call__(self, logits, x, y, *, generator=None):
            points = x + 0.1
            kept = yield Trial(points, torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, -1.0]]).double())
            points.fill_(9.0)
            yield Trial(points[kept], torch.tensor([[0.0, -1.0, -1.0]]).double())

    found = find(InPlace(), constant(1), x, y)
    assert torch.equal(found.x_adv, torch.tensor([[0.6], [0.5]], dtype=x.dtype).expand(2, 4))


# All attacks


ATTACKS = {
    "apgd-ce linf": APGD(Linf(0.1), steps=12),
    "apgd-dlr l2": APGD(L2(0.3), dlr, 12),
    "apgd-t linf": TargetedAPGD(Linf(0.1), 1, steps=12),
    "apgd-t l2": TargetedAPGD(L2(0.3), 2, steps=12),
    "fab linf": TargetedFAB(Linf(0.1), 1, 6, restarts=1),
    "fab l2": TargetedFAB(L2(0.3), 1, 6, restarts=1),
    "fab l1": TargetedFAB(L1(0.5), 2, 6, restarts=1),
    "sparse l1": SparseAPGD(L1(0.5), steps=12),
    "sparse-t l1": TargetedSparseAPGD(L1(0.5), 1, steps=12),
    "square linf": Square(Linf(0.1), 25),
    "square l2": Square(L2(0.3), 25),
    "square l1": Square(L1(0.5), 25),
    "spsa linf": SPSA(Linf(0.1), 4, 20, chunk=10**6),
    "spsa l2": SPSA(L2(0.3), 4, 20, chunk=10**6),
    "pgd linf": Restarted(PGD(Linf(0.1), 0.03, 4), restarts=3),
    "cw l2": Restarted(PGD(L2(0.3), 0.1, 4, gaussian(0.01)), margin, 3),
}
SHAPE = (2, 3, 3)


def rowwise(x):
    """A network that computes each row apart, so that nothing in it depends on the others to the bit."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(4, 18, dtype=torch.float64, generator=generator)
    return torch.stack([(w @ (3 * row.flatten()).sin()) for row in x])


def drawn(attack, x, y, ids, **more):
    return find(attack, rowwise, x, y, generator=PerExample(3, ids), **more)


@pytest.fixture(scope="module")
def examples():
    """Those that are nearest to being wrong, but not all of them."""
    x = torch.rand(640, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = rowwise(x).argmax(1)
    near = margin(rowwise(x), y).argsort(descending=True)[:448:7]
    return x[near], y[near]


@pytest.mark.parametrize("name", ATTACKS)
def test_outcomes_belong_to_examples(name, examples):
    """In batches of 1, 3 and 64 and in any order: equal draws, so equal everything. To the bit in L-inf; in L2 and L1,
    draws are made of logarithms and powers, which a processor rounds by where in a tensor a number stands.
    """
    (x, y), attack, ids = examples, ATTACKS[name], torch.arange(64)
    apart = 0.0 if isinstance(attack.ball, Linf) else 1e-9
    whole = drawn(attack, x, y, ids)
    assert 3 < whole.fooled.sum() < 60
    assert len(whole.iteration.unique()) > 2  # rows leave at different times
    order = torch.randperm(64)
    for parts in ([order], ids[::3].split(1), ids.split(3)):
        for part in parts:
            found = drawn(attack, x[part], y[part], part)
            assert torch.equal(found.fooled, whole.fooled[part])
            assert torch.equal(found.iteration, whole.iteration[part])
            assert torch.allclose(found.x_adv, whole.x_adv[part], rtol=0, atol=apart)
            assert torch.allclose(found.margin, whole.margin[part], rtol=0, atol=apart)


@pytest.mark.parametrize("name", ATTACKS)
def test_other_ids_and_other_seeds_draw_otherwise(name, examples):
    """But for what draws nothing before its first trial."""
    (x, y), attack, ids = examples, ATTACKS[name], torch.arange(64)
    looks = lambda seed, ids: list(attack(rowwise, x[:4], y[:4], generator=PerExample(seed, ids[:4])))
    one, other, moved = looks(3, ids), looks(4, ids), looks(3, ids + 7)
    for run in (other, moved):
        assert not torch.equal(run[-1].x_adv, one[-1].x_adv)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_attack_finds_members_that_are_wrong(name, dtype):
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 30), nn.Tanh(), nn.Linear(30, 4)).to(dtype)
    x = torch.rand(40, *SHAPE).to(dtype)
    x = torch.where(torch.rand(x.shape) < 0.2, x.round(), x)
    with torch.no_grad():
        model[-1].bias.sub_(model(x).mean(0))
        y, kept = model(x).argmax(1), x.clone()
    found = find(ATTACKS[name], model, x, y, generator=PerExample(0, torch.arange(40)))
    assert found.fooled.any()
    assert found.x_adv.dtype is dtype
    assert members(ATTACKS[name].ball, found.x_adv, x).all()
    assert torch.equal(found.x_adv[~found.fooled], x[~found.fooled])
    with torch.no_grad():
        assert torch.equal(model(found.x_adv).argmax(1) != y, found.fooled)
    assert (found.margin[~found.fooled] <= 0).all()
    assert torch.equal(x, kept)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ATTACKS)
def test_channels_last_and_views_are_inputs_like_others(name):
    model, (x, _) = convolutional().eval(), batch()
    y = model(x).argmax(1)
    wide = torch.zeros(8, 3, 6, 12, dtype=x.dtype)
    wide[..., ::2] = x
    run = lambda x: find(ATTACKS[name], model, x, y, generator=PerExample(0, torch.arange(8)))
    expected = run(x)
    for same in (x.to(memory_format=torch.channels_last), wide[..., ::2]):
        found = run(same)
        assert torch.equal(found.fooled, expected.fooled)
        assert torch.equal(found.iteration, expected.iteration)
        assert torch.allclose(found.x_adv, expected.x_adv, atol=1e-7)


@pytest.mark.parametrize("name", ATTACKS)
def test_no_examples_are_an_answer(name):
    found = find(ATTACKS[name], rowwise, torch.zeros(0, *SHAPE), torch.zeros(0, dtype=torch.long))
    assert found.x_adv.shape == (0, *SHAPE)
    assert found.fooled.shape == found.iteration.shape == found.margin.shape == (0,)


def test_kept_rows_of_tuples_and_of_named_tuples():
    trial = Trial(torch.arange(3.0), torch.arange(3.0) + 10, torch.tensor([True, False, True]))
    part = keep(trial, torch.tensor([2, 0]))
    assert isinstance(part, Trial)
    assert part.x_adv.tolist() == [2.0, 0.0]
    assert part.inside.tolist() == [True, True]
    assert [t.tolist() for t in keep((torch.arange(3),), torch.tensor([1]))] == [[1]]
    assert keep(trial, None) is trial


@pytest.mark.parametrize("cut", [lambda x: x.detach(), lambda x: x.round()])
@pytest.mark.parametrize("attack", [APGD(Linf(0.2), steps=5), TargetedFAB(Linf(0.2), 1, 5)])
def test_a_network_without_a_gradient_is_attacked_all_the_same(cut, attack):
    """It stands still, and `checks.zero_gradients` says so; a traceback would tell nobody anything."""
    x, y = torch.full((4, 3), 0.9), torch.zeros(4, dtype=torch.long)
    weight = torch.tensor([[2.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    found = find(attack, lambda x: cut(x) @ weight.T, x, y, generator=PerExample(0, torch.arange(4)))
    assert not found.fooled.any()


@pytest.mark.parametrize("attack", [APGD(Linf(0.1), steps=10), Restarted(PGD(Linf(0.1), 0.03, 10))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sure_networks_hide_no_gradient_behind_half_precision(attack, dtype):
    """Cross-entropy's gradient at probabilities of 1e-9 is nothing in fp16, and its sign is that of the margin."""
    model, a = nn.Linear(12, 2), torch.tensor([25.0, -25.0]).repeat(6)
    with torch.no_grad():
        model.weight.copy_(torch.stack([0 * a, a]))  # the margin is <a, x> - 28, and the ball gives 30
        model.bias.copy_(torch.tensor([28.0, 0.0]))
    x, y = 0.5 + 0.1 * (torch.rand(40, 12) - 0.5), torch.zeros(40, dtype=torch.long)
    draws = lambda: PerExample(0, torch.arange(40))
    single = find(attack, model, x, y, generator=draws())
    half = find(attack, lean(model, dtype), x, y, exact=model, slack=0.02, generator=draws())
    assert 10 < single.fooled.sum() < 40
    assert (half.fooled == single.fooled).double().mean() >= 0.97


@pytest.mark.parametrize("ball", [Linf(8 / 255), L2(0.5), L1(2.0)])
def test_inputs_outside_of_the_box_are_refused(ball):
    attack = SparseAPGD(ball) if isinstance(ball, L1) else APGD(ball)
    with pytest.raises(ValueError, match=r"^x: expected numbers in the ball's box \(0.0, 1.0\), got 0 to 200$"):
        find(attack, lambda x: x, torch.tensor([[0.0, 200.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"^x: expected floating point numbers, got torch.uint8$"):
        find(attack, lambda x: x, torch.tensor([[0, 1]], dtype=torch.uint8), torch.tensor([0]))
