import math

import pytest
import torch
from networks import convolutional
from torch import nn

from saltflat import L1, L2, Linf
from saltflat.evaluation import find
from saltflat.evaluation.fab import TargetedFAB, to_hyperplane
from saltflat.objectives import margin
from saltflat.random import PerExample

KINDS = [Linf, L2, L1]
BOXES = [(0.0, 1.0), None]
ORDER = {Linf: math.inf, L2: 2, L1: 1}


def norm(ball, v):
    return torch.linalg.vector_norm(v, ord=ORDER[type(ball)], dim=-1)


# An oracle that knows nothing of sorting: the least norm is where the most that <w, d> can be in ball and box equals c.


def most(ball, size, p, w):
    """(d, <w, d>) for a d of the norm `size` (in L2, of the multiplier `size`) that maximises <w, d> in the box."""
    low, high = (-math.inf, math.inf) if ball.box is None else (ball.box[0] - p, ball.box[1] - p)
    if isinstance(ball, L1):  # the largest |w_i| first, each as far as it can go
        order = w.abs().argsort(descending=True)
        room = torch.full_like(p, 1e12) if ball.box is None else torch.where(w > 0, high, -low)[order]
        t = (size - (room.cumsum(0) - room)).clamp(min=0).minimum(room)
        d = torch.zeros_like(p).scatter(0, order, t) * w.sign()
    else:
        d = w.sign() * size if isinstance(ball, Linf) else w * size
        d = d if ball.box is None else d.clamp(low, high)
    return d, (w * d).sum().item()


def nearest(ball, p, w, c):
    """d for one row, by bisection; None if no point of the hyperplane is in the box."""
    w, c = (w, c) if c >= 0 else (-w, -c)
    ends = 0.0, 1e9
    if most(ball, ends[1], p, w)[1] < c:
        return None
    for _ in range(100):
        middle = sum(ends) / 2
        ends = (middle, ends[1]) if most(ball, middle, p, w)[1] < c else (ends[0], middle)
    return most(ball, ends[1], p, w)[0]


def hyperplanes(ball, n, size):
    """Points, some on faces of the box; normals, some with zeros; offsets up to beyond the box, of both signs."""
    p, w = torch.rand(n, size, dtype=torch.float64), torch.randn(n, size, dtype=torch.float64)
    p = torch.where(torch.rand_like(p) < 0.2, p.round(), p)
    w = torch.where(torch.rand_like(w) < 0.2, 0.0, w * 10 ** torch.randint(-3, 3, (n, 1)))
    w[:, 0] = torch.where((w == 0).all(1), 1.0, w[:, 0])
    reach = torch.where(w > 0, w * (1 - p), -w * p).sum(1, keepdim=True)
    c = reach * torch.linspace(0, 1.3, n, dtype=torch.float64)[:, None]
    back = torch.where(torch.rand(n, 1) < 0.5, -1.0, 1.0)  # -w and -c are the same hyperplane
    return p, w * back, c * back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("size", [1, 2, 30])
def test_no_point_of_hyperplane_and_box_is_nearer(kind, box, size):
    ball = kind(1.0, box)
    p, w, c = hyperplanes(ball, 40, size)
    d = to_hyperplane(ball, p, w, c)
    reached = 0
    for i in range(40):
        expected = nearest(ball, p[i], w[i], c[i].item())
        if expected is None:  # the corner
            low, high = -p[i], 1 - p[i]
            expected = torch.where(w[i] * c[i] > 0, high, low) * (w[i] != 0)
            assert torch.allclose(d[i], expected, atol=1e-12)
            continue
        reached += 1
        assert (w[i] * d[i]).sum().item() == pytest.approx(c[i].item(), rel=1e-11, abs=1e-11 * w[i].abs().sum().item())
        assert norm(ball, d[i]).item() == pytest.approx(norm(ball, expected).item(), rel=1e-9, abs=1e-11)
        if kind is L2:  # where the nearest point is unique
            assert torch.allclose(d[i], expected, rtol=1e-9, atol=1e-11)
    assert (d[w == 0] == 0).all()
    assert box is None or ((p + d >= -1e-15) & (p + d <= 1 + 1e-15)).all()
    assert reached == (40 if box is None else reached) > 25
    assert box is None or reached < 35


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", BOXES)
def test_hyperplanes_of_several_points_and_in_single_precision(kind, box):
    ball = kind(1.0, box)
    p, w, c = hyperplanes(ball, 30, 500)
    points, offsets = torch.stack([p, 1 - p]), torch.stack([c, -c / 2])
    d = to_hyperplane(ball, points, w, offsets)
    assert torch.equal(d[0], to_hyperplane(ball, p, w, c))
    assert torch.equal(d[1], to_hyperplane(ball, 1 - p, w, -c / 2))
    single = to_hyperplane(ball, points.float(), w.float(), offsets.float())
    assert torch.allclose(norm(ball, single.double()), norm(ball, d), rtol=1e-4, atol=1e-5)
    assert torch.allclose((single * w).sum(2), (d * w).sum(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", BOXES)
def test_a_zero_normal_moves_nothing(kind, box):
    for c in (0.0, 1.0, -1.0):
        d = to_hyperplane(kind(1.0, box), torch.rand(2, 5), torch.zeros(2, 5), torch.full((2, 1), c))
        assert torch.equal(d, torch.zeros(2, 5))


def linear(a, bias=0.0):
    """Two classes; z_1 - z_0 is <a, x> - bias."""

    def logits(x):
        z = x.flatten(1) @ a
        return torch.stack([torch.full_like(z, bias), z], 1)

    return logits


def graded(kind, box, n=64, shape=(12,)):
    """Examples of a linear model, which half of them need more than the ball for; how far each is from the boundary,
    in radii.
    """
    x = torch.rand(n, *shape, dtype=torch.float64)
    a = torch.randn(x[0].numel(), dtype=torch.float64)
    z = x.flatten(1) @ a
    bias = z.median().item() + 0.01
    unit = kind(1.0, box)
    away = [nearest(unit, point, a, bias - f) for point, f in zip(x.flatten(1), z.tolist(), strict=True)]
    least = torch.stack([norm(unit, d) if d is not None else torch.tensor(math.inf).double() for d in away])
    radius = least.median().item() * 1.003
    return kind(radius, box), linear(a, bias), x, (z > bias).long(), least / radius


def outcome(attack, model, x, y, size):
    parts = [find(attack, model, x[ids], y[ids]) for ids in torch.arange(len(x)).split(size)]
    return [
        torch.cat(field) for field in zip(*((f.x_adv, f.fooled, f.iteration, f.margin) for f in parts), strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("box", "shape"), [((0.0, 1.0), (12,)), (None, (12,)), ((0.0, 1.0), (2, 3, 3))])
def test_on_linear_models_it_comes_within_a_percent_of_the_closed_form_in_any_batch(kind, box, shape):
    ball, model, x, y, radii = graded(kind, box, shape=shape)
    attack = TargetedFAB(ball, 1, steps=20)
    together = outcome(attack, model, x, y, 64)
    clear = (radii < 0.99) | (radii > 1)
    assert torch.equal(together[1][clear], radii[clear] < 1)
    assert 25 < together[1].sum() < 40
    assert torch.equal(model(together[0]).argmax(1) != y, together[1])
    for size in (1, 3):
        apart = outcome(attack, model, x, y, size)
        assert torch.equal(apart[1], together[1])
        assert torch.equal(apart[2], together[2])
        assert torch.allclose(apart[0], together[0], atol=1e-9)
        assert torch.allclose(apart[3], together[3], atol=1e-9)


def network(classes=5, size=6):
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * size * size, classes)).double()


def labelled(model, n, size=6):
    x = torch.rand(n, 3, size, size, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        return x, model(x).argmax(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", BOXES)
def test_order_does_not_matter_to_the_bit(kind, box):
    model = network()
    x, y = labelled(model, 16)
    ball = middling(kind, model, x, y, box)
    order = torch.randperm(16)
    one = find(TargetedFAB(ball, 1, 30), model, x, y)
    other = find(TargetedFAB(ball, 1, 30), model, x[order], y[order])
    assert 4 < one.fooled.sum() < 12
    assert torch.equal(one.fooled[order], other.fooled)
    assert torch.equal(one.iteration[order], other.iteration)
    moved = (one.x_adv[order] - other.x_adv).abs().flatten(1).amax(1)
    assert moved.max() < 1e-12  # convolutions round by where in the batch a row stands
    ball, model, x, y, _ = graded(kind, box, 16)
    model = row_by_row(model)
    one, other = find(TargetedFAB(ball, 1), model, x, y), find(TargetedFAB(ball, 1), model, x[order], y[order])
    assert torch.equal(one.x_adv[order], other.x_adv)


def middling(kind, model, x, y, box=(0.0, 1.0)):
    """The ball in which half of the examples are fooled."""
    ball = kind(1.0, box)
    least = torch.full((len(x),), math.inf, dtype=x.dtype)
    for trial in TargetedFAB(ball, 1, 20)(model, x, y):
        size = norm(ball, (trial.x_adv - x).flatten(1))
        least = torch.where(margin(trial.logits, y) > 0, least.minimum(size), least)
    return kind(least.median().item() * 1.01, box)


def row_by_row(model):
    return lambda x: torch.cat([model(row[None]) for row in x])


def walk(ball, model, x, y, steps, alpha_max=0.1, eta=1.05, beta=0.9):
    """FAB towards the likeliest wrong class for one example, word for word, with projections by bisection."""
    target = model(x[None])[0].detach().index_fill(0, y, -math.inf).argmax()
    x_adv, points = x.clone(), []
    for _ in range(steps):
        leaf = x_adv.clone().requires_grad_()
        z = model(leaf[None])[0]
        f = z[target] - z[y]
        (g,) = torch.autograd.grad(f, leaf)
        points.append(x_adv)
        u = x + beta * (x_adv - x) if z.argmax() != y else x_adv
        d = []
        for p in (u, x):
            missing = -(f + (g * (p - x_adv)).sum()).item()
            step = nearest(ball, p.flatten(), g.flatten(), missing)
            if step is None:
                corner = torch.where(g.flatten() * missing > 0, ball.box[1], ball.box[0])
                step = corner - p.flatten()
            d.append(step.view(x.shape))
        near, far = (norm(ball, step.flatten()).item() for step in d)
        alpha = min(near / (near + far), alpha_max) if near + far > 0 else 0
        x_adv = (1 - alpha) * (u + eta * d[0]) + alpha * (x + eta * d[1])
        x_adv = x_adv if ball.box is None else x_adv.clamp(*ball.box)
    return torch.stack([*points, x_adv])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", BOXES)
def test_it_walks_as_the_algorithm_says(kind, box):
    model, ball = network(size=4), kind(1e-9, box)
    x, y = labelled(model, 4, 4)
    x[:2] = x[:2].round()  # no room on one side
    with torch.no_grad():
        y = model(x).argmax(1)
    trials = list(TargetedFAB(ball, 1, steps=8)(model, x, y))
    assert len(trials) == 9
    went = torch.stack([trial.x_adv for trial in trials], 1)
    wrong = torch.stack([trial.logits.argmax(1) != y for trial in trials], 1)
    assert wrong[:, 1:].any()
    for i in range(4):
        assert torch.allclose(went[i], walk(ball, model, x[i], y[i], 8), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_outside_is_not_found_and_said_to_lie_there(kind):
    model = network()
    x, y = labelled(model, 12)
    ball = kind({Linf: 0.05, L2: 0.3, L1: 1.0}[kind])
    outside = 0
    for trial in TargetedFAB(ball, 1, 20)(model, x, y):
        size = norm(ball, (trial.x_adv - x).flatten(1))
        assert torch.equal(trial.inside, size <= ball.radius * (1 + 1e-6))
        assert torch.equal(trial.x_adv, trial.x_adv.clamp(0, 1))
        outside += ((trial.logits.argmax(1) != y) & ~trial.inside).sum()
    assert outside > 0
    nearer = kind(ball.radius * 1e-3)
    found = find(TargetedFAB(nearer, 1, 20), model, x, y)
    assert not found.fooled.any()
    assert torch.equal(found.x_adv, x)
    assert (found.margin < 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_lies_in_the_ball_and_the_box(kind):
    model = network().float()
    x, y = labelled(model, 40)
    ball = middling(kind, model, x, y)
    found = find(TargetedFAB(ball, 1, 30), model, x, y)
    assert 10 < found.fooled.sum() < 30
    assert norm(ball, (found.x_adv.double() - x.double()).flatten(1)).max() <= ball.radius * (1 + 2e-6)
    assert torch.equal(found.x_adv, found.x_adv.clamp(0, 1))
    with torch.no_grad():
        assert torch.equal(model(found.x_adv).argmax(1) != y, found.fooled)


@pytest.mark.parametrize("restarts", [0, 2])
def test_a_step_is_one_forward_and_one_gradient(restarts):
    model = network()
    x, y = labelled(model, 3)
    passes = []
    logits = lambda x: passes.append((x.requires_grad, len(x))) or model(x)
    find(TargetedFAB(Linf(1e-6), 2, steps=7, restarts=restarts), logits, x, y, exact=model)
    assert passes == [(False, 3)] + ([(True, 3)] * 7 + [(False, 3)]) * (restarts + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_inputs_are_left_alone(kind):
    model = convolutional().eval()
    x, y = labelled(model, 4)
    before = x.clone()
    find(TargetedFAB(kind(0.1), 1, 10), model, x, y)
    assert torch.equal(x, before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_few_classes(classes, kind):
    model = network(classes)
    x, y = labelled(model, 8)
    for rank in range(1, 5):
        trials = list(TargetedFAB(kind(5.0), rank, 3)(model, x, y))
        assert len(trials) == (4 if rank < classes else 0)
    assert find(TargetedFAB(kind(20.0), 1, 30), model, x, y).fooled.any()
    assert not find(TargetedFAB(kind(20.0), classes, 30), model, x, y).fooled.any()


@pytest.mark.parametrize("ball", [Linf(0.5), L2(0.5), L1(0.5), Linf(0.5, None), L2(0.5, None), L1(0.5, None)])
def test_without_a_gradient_a_row_stays_where_it_is(ball):
    steps = lambda x: torch.stack([torch.ones(len(x)), (10 * x.sum(1)).round() * 0], 1) + 0 * x.sum(1, keepdim=True)
    flat, y = torch.rand(3, 4), torch.zeros(3, dtype=torch.long)
    for trial in TargetedFAB(ball, 1, 5)(steps, flat, y):
        assert torch.equal(trial.x_adv, flat)
    broken = lambda x: steps(x) + torch.where(x > 2, x, math.nan).sum(1, keepdim=True) * x.sum(1, keepdim=True)
    for trial in TargetedFAB(ball, 1, 5)(broken, flat, y):
        assert torch.equal(trial.x_adv, flat)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_scale_of_the_logits_is_too_small_or_large(kind, box, scale):
    ball, model, x, y, _ = graded(kind, box)
    x = x.float()
    single = lambda x: model(x.double()).float()
    one = find(TargetedFAB(ball, 1, 20), single, x, y)
    other = find(TargetedFAB(ball, 1, 20), lambda x: single(x) * scale, x, y)
    assert (one.fooled == other.fooled).double().mean() > 0.98


def test_logits_in_half_precision():
    ball, model, x, y, radii = graded(Linf, (0.0, 1.0))
    found = find(TargetedFAB(ball, 1), lambda x: model(x).bfloat16(), x, y, exact=model, slack=0.02)
    sure = (radii < 0.9) | (radii > 1)
    assert torch.equal(found.fooled[sure], radii[sure] < 1)


@pytest.mark.parametrize("kind", KINDS)
def test_restarts_begin_at_half_the_radius_and_belong_to_examples(kind):
    model, ball, ids = network(), kind(1e-3, None), torch.arange(6)
    x, y = labelled(model, 6)
    attack = TargetedFAB(ball, 1, steps=2, restarts=2)
    trials = list(attack(model, x, y, generator=PerExample(0, ids)))
    assert torch.equal(trials[0].x_adv, x)
    for first in (3, 6):
        size = norm(ball, (trials[first].x_adv - x).flatten(1))
        assert torch.allclose(size, torch.full_like(size, ball.radius / 2))
    assert not torch.equal(trials[3].x_adv, trials[6].x_adv)
    alone = list(attack(model, x[4:], y[4:], generator=PerExample(0, ids[4:])))
    assert torch.allclose(alone[6].x_adv, trials[6].x_adv[4:])


def test_rows_that_left_take_their_draws_with_them():
    model, ball, ids = network(), Linf(1e-3), torch.arange(6)
    x, y = labelled(model, 6)
    search = TargetedFAB(ball, 1, steps=1, restarts=1)(model, x, y, generator=PerExample(0, ids))
    next(search)
    search.send(torch.tensor([1, 2, 4]))
    begun = search.send(torch.tensor([0, 2]))
    whole = list(TargetedFAB(ball, 1, steps=1, restarts=1)(model, x, y, generator=PerExample(0, ids)))
    assert torch.equal(begun.x_adv, whole[2].x_adv[[1, 4]])


def test_without_restarts_nothing_is_drawn():
    model = network()
    x, y = labelled(model, 3)
    generator = torch.Generator().manual_seed(0)
    before, everywhere = generator.get_state(), torch.get_rng_state()
    find(TargetedFAB(L2(1e-3), 1, 3), model, x, y, generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), everywhere)


@pytest.mark.parametrize(("name", "ball"), [("Linf", Linf(0.03)), ("L2", L2(0.3)), ("L1", L1(1.3))])
def test_verdicts_agree_with_pyautoattack(name, ball):
    fab = pytest.importorskip("pyautoattack.fab_pt")
    model = network(5, 10).float()
    x, y = labelled(model, 100, 10)
    ours = torch.zeros(100, dtype=torch.bool)
    for rank in range(1, 5):
        ours |= find(TargetedFAB(ball, rank, 30), model, x, y).fooled
    theirs = fab.FABAttack_PT(
        model, norm=name, n_iter=30, eps=ball.radius, targeted=True, device="cpu", n_target_classes=4
    ).perturb(x, y)
    with torch.no_grad():
        theirs = model(theirs).argmax(1) != y
    assert 0.15 < theirs.double().mean() < 0.85
    assert (ours == theirs).double().mean() >= 0.97
    assert ours.sum() >= theirs.sum() - 1


@pytest.mark.parametrize(
    "settings",
    [{"rank": 0}, {"steps": -1}, {"alpha_max": 1.5}, {"eta": 0.5}, {"beta": -0.1}, {"beta": 1.1}, {"restarts": -1}],
)
def test_wrong_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        TargetedFAB(Linf(0.1), **{"rank": 1} | settings)


def test_a_ball_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="ball"):
        TargetedFAB(None, 1)


def test_no_steps_leave_x_itself():
    model = network()
    x, y = labelled(model, 3)
    (trial,) = TargetedFAB(Linf(0.1), 1, 0)(model, x, y)
    assert torch.equal(trial.x_adv, x)
    assert torch.equal(margin(trial.logits, y) < 0, torch.ones(3, dtype=torch.bool))
