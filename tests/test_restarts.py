"""PGD as a search: against `saltflat.inputs.PGD` to the bit, and what restarts add."""

import pytest
import torch
from networks import batch, convolutional, equal_states, state
from torch import nn

from saltflat import FGSM, L1, L2, PGD, Linf, PerExample
from saltflat.evaluation import Restarted, find
from saltflat.evaluation.stretch import stretch
from saltflat.inputs import gaussian, uniform, zero
from saltflat.objectives import ce, margin

STARTS = pytest.mark.parametrize("start", [zero, uniform, gaussian(1e-3)], ids=["zero", "uniform", "gaussian"])
BALLS = pytest.mark.parametrize("ball", [Linf(0.05), L2(0.4), Linf(0.05, None), L2(0.4, None)])


def draws(kind, n):
    return PerExample(3, torch.arange(n)) if kind == "per example" else torch.Generator().manual_seed(3)


def iterates(pgd, f, x, generator):
    """x'_0 ... of `PGD` itself: all points at which f is asked, and what comes back."""
    seen = []
    last = pgd(lambda x_adv: seen.append(x_adv.detach().clone()) or f(x_adv), x, generator=generator)
    return [*seen, last]


def looks(ball, x, x_adv):
    """The iterates of an ascent, and a last look where a box cuts an L2 ball."""
    return [*x_adv, x + stretch(ball, x_adv[-1] - x, x)] if ball == L2(0.4) else x_adv


@STARTS
@BALLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loss", [ce, margin])
@pytest.mark.parametrize("kind", ["per example", "torch"])
def test_one_restart_looks_at_the_iterates_of_pgd_to_the_bit(start, ball, dtype, loss, kind):
    model, (x, y) = convolutional().eval().to(dtype), batch()
    x, pgd = x.to(dtype), PGD(ball, 0.02, 6, start)
    expected = looks(ball, x, iterates(pgd, lambda x_adv: loss(model(x_adv), y), x, draws(kind, 8)))
    trials = list(Restarted(pgd, loss)(model, x, y, generator=draws(kind, 8)))
    assert len(trials) == len(expected) == 7 + (ball == L2(0.4))
    for trial, x_adv in zip(trials, expected, strict=True):
        assert torch.equal(trial.x_adv, x_adv)
        assert torch.equal(trial.logits, model(x_adv))
        assert trial.inside is None


def test_fgsm_is_a_search_of_two_looks():
    model, (x, y) = convolutional().eval(), batch()
    attack = FGSM(Linf(0.05))
    first, second = Restarted(attack)(model, x, y)
    assert torch.equal(first.x_adv, x)
    assert torch.equal(second.x_adv, attack(lambda x_adv: ce(model(x_adv), y), x))


@pytest.mark.parametrize("kind", ["per example", "torch"])
@pytest.mark.parametrize("ball", [Linf(0.05), L2(0.4)])
def test_each_restart_is_pgd_from_a_draw_of_its_own(ball, kind):
    """With one generator for all, the draws follow each other as they do for attacks one after the other."""
    model, (x, y) = convolutional().eval(), batch()
    pgd, f = PGD(ball, 0.02, 3), lambda x_adv: ce(model(x_adv), y)
    trials = list(Restarted(pgd, restarts=3)(model, x, y, generator=draws(kind, 8)))
    generator = draws(kind, 8)
    expected = [x_adv for _ in range(3) for x_adv in looks(ball, x, iterates(pgd, f, x, generator))]
    assert all(torch.equal(trial.x_adv, x_adv) for trial, x_adv in zip(trials, expected, strict=True))
    starts = torch.stack([trial.x_adv for trial in trials[:: len(trials) // 3]])
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (starts[one] != starts[other]).flatten(1).any(1).all()


@pytest.mark.parametrize("left", range(7))
def test_rows_that_left_take_their_draws_with_them(left):
    """After whichever look: here of two ascents of four looks."""
    model, (x, y) = convolutional().eval(), batch()
    attack, ids = Restarted(PGD(L2(0.4), 0.1, 2), restarts=2), torch.tensor([1, 2, 5])
    whole = list(attack(model, x, y, generator=draws("per example", 8)))
    search = attack(model, x, y, generator=draws("per example", 8))
    for _ in range(left + 1):
        next(search)
    part = [search.send(ids), *search]
    assert len(part) == 7 - left
    for trial, same in zip(part, whole[left + 1 :], strict=True):
        assert torch.allclose(trial.x_adv, same.x_adv[ids], atol=1e-12)


def wall(height):
    """Two numbers; class 1 where x lies beyond 0.1 on the first, but a value that pulls past it: fooled on the way."""

    def logits(x):
        wrong = (x[:, 0] > 0.1) & (x[:, 0] < height)
        pull = 10 * (x[:, 0] - x[:, 0].detach())
        return torch.stack([torch.zeros_like(pull), torch.where(wrong, 1.0, -1.0) + pull], 1)

    return logits


@pytest.mark.parametrize(("height", "iteration"), [(0.15, 3), (0.25, 3), (0.11, -1)])
def test_an_example_is_fooled_at_whatever_iterate_fools_it(height, iteration):
    """x'_k is 0.05 k - 0.02, and the end of the ball, 0.4, is right; PGD itself returns that."""
    x, y = torch.full((2, 2), -0.02, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    pgd = PGD(Linf(0.42, None), 0.05, 12, zero)
    found = find(Restarted(pgd), wall(height), x, y)
    assert found.fooled.tolist() == [iteration >= 0] * 2
    assert found.iteration.tolist() == [iteration] * 2
    last = pgd(lambda x_adv: ce(wall(height)(x_adv), y), x)
    assert (wall(height)(last).argmax(1) == y).all()


def test_the_point_before_the_first_step_is_looked_at():
    model, (x, _) = convolutional().eval(), batch()
    found = find(Restarted(PGD(Linf(1e-9), 1e-9, 1, zero)), model, x, (model(x).argmax(1) + 1) % 3)
    assert found.fooled.all()
    assert (found.iteration == 0).all()
    assert torch.equal(found.x_adv, x)


def ridges(x):
    """Wrong between 0.3 and 0.4 of the first number, where a slope leads to from above 0.2 only."""
    value = torch.where(x[:, 0] > 0.2, -(x[:, 0] - 0.35).abs(), -x[:, 0].abs() - 1) + 0.05
    return torch.stack([torch.zeros_like(value), value], 1)


def test_more_restarts_find_more():
    """A start is drawn from [-0.4, 0.4], and one in four leads to where the answer is wrong."""
    x, y = torch.zeros(400, 1, dtype=torch.float64), torch.zeros(400, dtype=torch.long)
    pgd = PGD(Linf(0.4, None), 0.02, 12)
    found = [
        find(Restarted(pgd, restarts=n), ridges, x, y, generator=PerExample(0, torch.arange(400))) for n in (1, 2, 6)
    ]
    for n, result in zip((1, 2, 6), found, strict=True):
        assert result.fooled.double().mean().item() == pytest.approx(1 - 0.75**n, abs=0.07)
        assert result.iteration.max() < 13 * n
    assert (found[1].fooled | ~found[0].fooled).all()
    assert torch.equal(found[1].iteration[found[0].fooled], found[0].iteration[found[0].fooled])
    assert found[2].iteration.max() > 5 * 13


def test_steps_follow_the_loss_that_is_given():
    """Cross-entropy climbs where the wrong classes together do, the margin where the likeliest does."""
    a = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.9], [0.0, 0.9]], dtype=torch.float64)
    x, y = torch.full((1, 2), 0.5, dtype=torch.float64), torch.tensor([0])
    logits = lambda x: (x - 0.5) @ a.T - torch.tensor([0.0, 1.0, 1.05, 1.05])
    pgd = PGD(L2(0.1), 0.1, 1, zero)
    steps = [list(Restarted(pgd, loss)(logits, x, y))[-1].x_adv[0] - 0.5 for loss in (margin, ce)]
    assert torch.allclose(steps[0], torch.tensor([0.1, 0.0]).double(), atol=1e-9)
    assert steps[1][1] > steps[1][0] > 0


@pytest.mark.parametrize(("ball", "forwards"), [(Linf(1e-9), 1), (L2(1e-9), 2), (L2(1e-9, None), 1)])
@pytest.mark.parametrize(("restarts", "steps"), [(1, 4), (3, 2)])
def test_an_ascent_is_a_gradient_a_step_and_one_forward_more(restarts, steps, ball, forwards):
    """And one for the last look where a box cuts an L2 ball."""
    model, x = convolutional().eval(), batch()[0]
    passes = []
    logits = lambda x: passes.append((x.requires_grad, len(x))) or model(x)
    find(Restarted(PGD(ball, 1e-9, steps), restarts=restarts), logits, x, model(x).argmax(1), exact=model)
    assert passes == ([(True, 8)] * steps + [(False, 8)] * forwards) * restarts


@BALLS
def test_weights_and_inputs_are_left_alone(ball):
    model, (x, y) = convolutional().eval(), batch()
    before, kept, computed = state(model), x.clone(), []
    for parameter in model.parameters():
        parameter.register_hook(computed.append)
    for trial in Restarted(PGD(ball, 0.1, 3), restarts=2)(model, x, y):
        assert not trial.x_adv.requires_grad
        assert not trial.logits.requires_grad
    assert not computed
    assert equal_states(state(model), before)
    assert torch.equal(x, kept)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_a_gradient_a_row_stays_where_it_started():
    flat = lambda x: torch.stack([0 * x.sum(1) + 1, 0 * x.sum(1)], 1)
    x, y = torch.rand(3, 4), torch.zeros(3, dtype=torch.long)
    trials = list(Restarted(PGD(L2(0.1), 0.05, 3))(flat, x, y))[:4]  # all but what is stretched
    assert all(torch.allclose(trial.x_adv, trials[0].x_adv) for trial in trials)


def test_it_works_under_no_grad():
    model, (x, y) = nn.Linear(4, 3), (torch.rand(2, 4), torch.tensor([0, 1]))
    with torch.no_grad():
        first, last = Restarted(FGSM(Linf(0.1)))(model, x, y)
    assert (last.x_adv != first.x_adv).any()


def test_it_searches_the_ball_of_its_pgd():
    assert Restarted(PGD(L2(0.4), 0.1, 3)).ball == L2(0.4)


@pytest.mark.parametrize("restarts", [0, -1])
def test_no_restarts_are_refused(restarts):
    with pytest.raises(ValueError, match=f"restarts: expected an integer >= 1, got {restarts}"):
        Restarted(FGSM(Linf(0.1)), restarts=restarts)


def test_the_l1_ball_is_refused():
    with pytest.raises(ValueError, match=r"^ball: .*SparseAPGD"):
        Restarted(PGD(L1(12.0), 1.0, 10))


@pytest.mark.parametrize("std", [0.1, 0.5])
def test_a_start_outside_of_the_ball_hides_nothing_of_what_is_found_inside(std):
    """What it claimed out there is refused, and is no measure of what is claimed within."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.ReLU(), nn.Linear(16, 3)), torch.rand(200, 3, 6, 6)
    with torch.no_grad():
        y = model(x).argmax(1)
    pgd = PGD(Linf(0.02), 0.005, 20, gaussian(std))
    last = pgd(lambda x_adv: ce(model(x_adv), y), x, generator=draws("per example", 200))
    found = find(Restarted(pgd), model, x, y, generator=draws("per example", 200))
    fooled = model(last).argmax(1) != y
    assert fooled.sum() > 50
    assert found.fooled[fooled].all()
