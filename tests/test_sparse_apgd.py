from dataclasses import dataclass

import pytest
import torch
from networks import batch, convolutional
from torch import nn

from saltflat import L1, L2, Linf, PerExample
from saltflat.evaluation.ratios import dlr, targeted_dlr
from saltflat.evaluation.search import find
from saltflat.evaluation.sparse_apgd import SparseAPGD, TargetedSparseAPGD
from saltflat.objectives import ce, margin


def linear(a, bias):
    """Two classes; the margin of class 0 is <a, x> - bias."""

    def logits(x):
        z = x.flatten(1) @ a
        return torch.stack([torch.full_like(z, bias), z], 1)

    return logits


def gain(ball, x, a):
    """max <a, v> in ball and box: a knapsack, whose items are filled in the order of |a|."""
    gains = []
    for row in x.flatten(1):
        left, total = ball.radius, 0.0
        for i in a.abs().argsort(descending=True).tolist():
            room = left if ball.box is None else (ball.box[1] - row[i] if a[i] > 0 else row[i] - ball.box[0]).item()
            taken = min(left, room)
            left, total = left - taken, total + taken * a[i].abs().item()
        gains.append(total)
    return torch.tensor(gains, dtype=torch.float64)


def mlp(inputs, classes, hidden=20, dtype=torch.float64):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes)).to(dtype)


def labelled(model, *shape, dtype=torch.float64):
    x = torch.rand(*shape, dtype=dtype)
    with torch.no_grad():
        return x, model(x).argmax(1)


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("loss", [ce, dlr])
@pytest.mark.parametrize(
    ("shape", "radius", "box"),
    [((2,), 0.6, (0.0, 1.0)), ((12,), 6.0, (0.0, 1.0)), ((3, 8, 8), 1.5, (0.0, 1.0)), ((3, 4, 4), 2.0, None)],
)
def test_it_reaches_the_optimum_of_a_linear_model(shape, radius, box, loss, size):
    x = torch.rand(size, *shape, dtype=torch.float64)
    a, ball = torch.randn(x[0].numel(), dtype=torch.float64), L1(radius, box)
    clean, best = x.flatten(1) @ a, gain(ball, x, a)
    bias = (clean + best).max().item() + 1
    found = find(SparseAPGD(ball, loss, 50), linear(a, bias), x, torch.zeros(size, dtype=torch.long))
    assert not found.fooled.any()
    assert torch.allclose(found.margin + bias - clean, best, rtol=1e-2)
    assert (found.margin + bias - clean <= best * (1 + 1e-9)).all()


def test_the_steps_alone_come_near_that_optimum_among_many_numbers():
    x, a, ball = torch.rand(32, 3, 16, 16, dtype=torch.float64), torch.randn(768, dtype=torch.float64), L1(6.0)
    y, clean = torch.zeros(32, dtype=torch.long), x.flatten(1) @ a
    trials = list(SparseAPGD(ball, dlr)(linear(a, 1000.0), x, y))[63:-1]
    reached = torch.stack([margin(trial.logits, y) for trial in trials]).amax(0) + 1000.0 - clean
    assert (reached / gain(ball, x, a)).mean() > 0.98


@pytest.mark.parametrize(
    ("steps", "stages"), [(0, [0]), (1, [1]), (2, [2]), (3, [1] * 3), (10, [3, 3, 4]), (50, [15, 15, 20])]
)
def test_three_balls_one_after_the_other(steps, stages):
    model = mlp(48, 3)
    x, y = labelled(model, 5, 3, 4, 4)
    trials = list(SparseAPGD(L1(1.0), steps=steps)(model, x, y))
    assert len(trials) == sum(stages) + len(stages) + 1
    at = 0
    for times, budget in zip((3, 2, 1) if len(stages) == 3 else (1,), stages, strict=True):
        for trial in trials[at : at + budget + 1 + (times == 1)]:
            size = (trial.x_adv - x).flatten(1).abs().sum(1)
            assert (size <= times * (1 + 1e-9)).all()
            assert 0 <= trial.x_adv.min() <= trial.x_adv.max() <= 1
            assert trial.inside is None if times == 1 else torch.equal(trial.inside, size <= 1.0)
        at += budget + 1


def test_what_lies_in_the_larger_balls_only_is_not_believed():
    """The model is wrong everywhere, but in the ball."""
    x, y = torch.full((6, 12), 0.5, dtype=torch.float64), torch.zeros(6, dtype=torch.long)

    def logits(x_adv):
        z = 10 * ((x_adv - x[:1]).abs().sum(1) - 0.6 * (1 + 1e-5))
        return torch.stack([torch.zeros_like(z), z], 1)

    trials = list(SparseAPGD(L1(0.6))(logits, x, y))
    assert margin(trials[10].logits, y).min() > 0
    asked = []
    found = find(SparseAPGD(L1(0.6)), logits, x, y, exact=lambda x_adv: asked.append(x_adv) or logits(x_adv))
    assert not asked
    assert not found.fooled.any()
    assert found.margin.max() < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("attack", [SparseAPGD(L1(1.5)), TargetedSparseAPGD(L1(1.5), 1)], ids=["ce", "targeted"])
def test_what_is_found_lies_in_ball_and_box_and_is_wrong(attack, dtype):
    model = mlp(108, 5, dtype=dtype)
    x, y = labelled(model, 40, 3, 6, 6, dtype=dtype)
    kept = x.clone()
    found = find(attack, model, x, y)
    assert found.fooled.sum() > 5
    assert (found.x_adv.double() - x.double()).abs().flatten(1).sum(1).max() <= 1.5 * (1 + 1e-6)
    assert 0 <= found.x_adv.min() <= found.x_adv.max() <= 1
    assert torch.equal(model(found.x_adv).argmax(1) != y, found.fooled)
    assert torch.equal(found.x_adv[~found.fooled], x[~found.fooled])
    assert torch.equal(x, kept)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("attack", [SparseAPGD(L1(0.8), dlr, 30), TargetedSparseAPGD(L1(0.8), 2, steps=30)])
def test_outcomes_do_not_depend_on_batch_or_order(attack):
    model = mlp(48, 5)
    x, y = labelled(model, 64, 3, 4, 4)
    ids = torch.arange(64)

    def outcome(parts):
        found = [find(attack, model, x[part], y[part], generator=PerExample(3, part)) for part in parts]
        back = torch.cat(parts).argsort()
        return [
            torch.cat([getattr(f, name) for f in found])[back] for name in ("fooled", "iteration", "margin", "x_adv")
        ]

    fooled, iteration, value, x_adv = outcome([ids])
    assert 5 < fooled.sum() < 60
    assert len(iteration.unique()) > 2
    for parts in (ids.split(1), ids.split(3), [torch.randperm(64)]):
        other = outcome(list(parts))
        assert torch.equal(other[0], fooled)
        assert torch.equal(other[1], iteration)
        assert torch.allclose(other[2], value, atol=1e-7)
        assert torch.allclose(other[3], x_adv, atol=1e-7)


@pytest.mark.parametrize("loss", [ce, dlr, targeted_dlr])
@pytest.mark.parametrize("seed", range(3))
def test_from_one_start_it_goes_where_pyautoattack_goes(loss, seed, monkeypatch):
    """All logits of three stages. Two things that pyautoattack does in fp32 are given to it in float64: the projection
    (which is tested by itself), and the count of numbers that are not 0, of which it cannot tell 2/3 from a bit less.
    """
    theirs = pytest.importorskip("pyautoattack.autopgd_base")
    monkeypatch.setattr(theirs, "L1_projection", lambda x, v, radius: L1(float(radius)).project(v, x) - v)
    monkeypatch.setattr(theirs, "L0_norm", lambda v: (v.abs() > 1e-9).flatten(1).sum(1).double() * (1 - 1e-9))
    torch.manual_seed(seed)
    network, seen = mlp(108, 5), []
    x, y = labelled(network, 7, 3, 6, 6)

    def model(x_adv):
        seen.append(network(x_adv))
        return seen[-1]

    if loss is targeted_dlr:
        attack, ours = theirs.APGDAttack_targeted(model, norm="L1", eps=1.5), TargetedSparseAPGD(L1(1.5), 2)
        attack.y_target = network(x).sort(1)[1][:, -3]
    else:
        attack, ours = theirs.APGDAttack(model, norm="L1", eps=1.5, loss=loss.__name__), SparseAPGD(L1(1.5), loss)
    attack.init_hyperparam(x)
    torch.manual_seed(5)
    attack.decr_eps_pgd(x, y, [4.5, 3.0, 1.5], [30, 30, 40])
    torch.manual_seed(5)
    trials = list(ours(network, x, y, start=x + torch.randn_like(x)))
    expected = torch.stack(seen).detach()
    assert len(expected) == 103
    assert torch.allclose(torch.stack([trial.logits for trial in trials[:-1]]), expected, rtol=0, atol=1e-6)


def test_verdicts_agree_with_pyautoattack():
    theirs = pytest.importorskip("pyautoattack.autopgd_base")
    model = mlp(192, 5, 40, torch.float32)
    x, y = labelled(model, 256, 3, 8, 8, dtype=torch.float32)
    found = find(SparseAPGD(L1(1.5)), model, x, y, generator=PerExample(0, torch.arange(256)))
    x_adv = theirs.APGDAttack(model, norm="L1", eps=1.5, use_largereps=True).perturb(x, y)
    with torch.no_grad():
        fooled = model(x_adv).argmax(1) != y
    assert 0.2 < fooled.double().mean() < 0.8
    assert (found.fooled == fooled).double().mean() >= 0.97


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("shape", [(40,), (2, 4, 5)])
@pytest.mark.parametrize("loss", [ce, dlr])
def test_few_classes_and_any_shape(classes, shape, loss):
    model = mlp(40, classes)
    x, y = labelled(model, 20, *shape)
    for attack in (SparseAPGD(L1(2.0), loss, 40), TargetedSparseAPGD(L1(2.0), 1, targeted_dlr, 40)):
        found = find(attack, model, x, y)
        assert found.fooled.any()
        assert found.x_adv.shape == x.shape


def test_without_a_class_of_that_rank_nothing_is_tried():
    model, (x, y) = convolutional().eval(), batch()
    assert not list(TargetedSparseAPGD(L1(2.0), 3)(model, x, y))
    assert len(list(TargetedSparseAPGD(L1(2.0), 2, steps=10)(model, x, y))) == 14


def test_half_precision_logits():
    model = mlp(48, 4, dtype=torch.float32)
    x, y = labelled(model, 64, 3, 4, 4, dtype=torch.float32)
    half = model.to(torch.bfloat16)
    rough = lambda x_adv: half(x_adv.to(torch.bfloat16))
    exact = mlp(48, 4, dtype=torch.float32)
    exact.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    with torch.no_grad():
        y = exact(x).argmax(1)
    for attack in (SparseAPGD(L1(1.0)), SparseAPGD(L1(1.0), dlr), TargetedSparseAPGD(L1(1.0), 1)):
        found = find(attack, rough, x, y, exact=exact, slack=0.02)
        assert found.x_adv.dtype is torch.float32
        with torch.no_grad():
            assert torch.equal(exact(found.x_adv).argmax(1) != y, found.fooled)
        full = find(attack, exact, x, y)
        assert abs(found.fooled.double().mean() - full.fooled.double().mean()) < 0.1


@dataclass(frozen=True)
class Poison:
    """A loss whose gradient is NaN for rows of class 0."""

    def __call__(self, logits, y):
        return margin(logits, y) * torch.where(y == 0, torch.nan, 1.0)


def test_rows_with_gradients_that_are_none_stay_in_the_ball():
    model = mlp(12, 3)
    x, y = torch.rand(6, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    for trial in list(SparseAPGD(L1(0.5), Poison(), 20)(model, x, y)):
        assert trial.x_adv.isfinite().all()
    assert (trial.x_adv[[0, 3]] - x[[0, 3]]).abs().sum() == 0
    assert (trial.x_adv[1] != x[1]).any()


def test_a_step_changes_so_many_numbers_as_the_best_point_asks_for():
    """From x itself k is 1: the first step goes to one number, of the largest gradient, by the whole radius."""
    x, y = torch.full((4, 30), 0.5, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    a = torch.randn(30, dtype=torch.float64)
    ball, j = L1(0.1), a.abs().argmax()
    trials = list(SparseAPGD(ball, dlr, 10)(linear(a, 100.0), x, y, start=x))
    expected = torch.zeros_like(x)
    expected[:, j] = 0.3 * a[j].sign()
    assert torch.equal(trials[0].x_adv, x)
    assert torch.allclose(trials[1].x_adv - x, expected)


def test_radius_zero_is_x_itself():
    model = mlp(12, 3)
    x, y = labelled(model, 3, 12)
    assert all(torch.equal(trial.x_adv, x) for trial in SparseAPGD(L1(0.0), steps=10)(model, x, y))


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: SparseAPGD(Linf(0.1)), "ball: .* expected it or saltflat.evaluation.APGD, got Linf"),
        (lambda: TargetedSparseAPGD(L2(0.1), rank=1), "ball: .* got L2"),
        (lambda: SparseAPGD(L1(1.0), steps=-5), "steps: expected an integer >= 0, got -5"),
        (lambda: TargetedSparseAPGD(L1(1.0), rank=0), "rank: expected an integer >= 1, got 0"),
    ],
)
def test_what_would_be_a_sham_is_refused(made, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        made()
