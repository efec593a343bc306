import math

import pytest
import torch
from closed_forms import LeftAsFound, Logistic, P, Quadratic, joined
from memory import Memory
from networks import batch, convolutional
from torch import nn

from saltflat import PGD, Global, Layerwise, Linf
from saltflat.balls import Box, Ellipsoid
from saltflat.landscape import afresh, continued, total
from saltflat.landscape.average_case import average_case
from saltflat.landscape.noise import within
from saltflat.landscape.worst_case import keskar_sharpness, worst_case
from saltflat.weights import displaced

LONG = {"steps": 300, "step_size": 100.0, "restarts": 3}  # steps far beyond the ball make it a power iteration


def highest(matrix):
    return torch.linalg.eigvalsh(matrix)[-1].item()


def test_a_block_diagonal_quadratic_s_maximum_has_a_largest_eigenvalue_in_every_layer():
    model = Quadratic().block_diagonal()
    exact = sum(
        0.3**2 * w.norm().item() ** 2 * highest(model.hessian[i:j, i:j]) / 2
        for w, i, j in ((model.a, 0, 6), (model.b, 6, 14))
    )
    found = worst_case(model, model.losses, Layerwise(0.3), **LONG)
    assert found.value == pytest.approx(exact, rel=1e-6)
    assert found.value <= exact * (1 + 1e-12)
    assert found.by_start[0] == 0  # at a minimum, the gradient is 0
    assert max(found.by_start) == found.value


def test_a_linear_loss_is_at_its_maximum_after_one_step():
    model = Quadratic(slope=1.0)
    model.parts.zero_()
    a, b = model.slope[:6], model.slope[6:]
    c = model.centre.abs()
    for ball, exact in (
        (Layerwise(0.3), 0.3 * (model.a.norm() * a.norm() + model.b.norm() * b.norm())),
        (Global(0.3), 0.3 * model.slope.norm()),
        (Ellipsoid(0.3), 0.3 * (c * model.slope).norm()),
        (Box(0.3), 0.3 * (c * model.slope).abs().sum()),
        (Box(0.3, offset=1.0), 0.3 * ((c + 1) * model.slope).abs().sum()),
    ):
        found = worst_case(model, model.losses, ball, steps=1, restarts=0)
        assert found.value == pytest.approx(exact.item(), rel=1e-12)
        assert found.by_start == (found.value,)
        assert (joined(found.displacement) @ model.slope).item() == pytest.approx(exact.item(), rel=1e-12)


def test_adaptive_sharpness_of_a_quadratic_is_the_largest_eigenvalue_of_h_scaled_by_w():
    model = Quadratic()
    c = model.centre.abs()
    found = worst_case(model, model.losses, Ellipsoid(0.3), **LONG)
    assert found.value == pytest.approx(0.3**2 * highest(c[:, None] * model.hessian * c) / 2, rel=1e-6)


def test_adaptive_sharpness_does_not_change_with_the_scale_of_the_weights():
    """L(w) -> L(w / s) at s w, elementwise: rescaling that leaves the function as it is."""
    model, scaled = Quadratic(), Quadratic()
    s = torch.rand(P, dtype=torch.float64) + 0.5
    with torch.no_grad():
        scaled.a.mul_(s[:6].view(3, 2))
        scaled.b.mul_(s[6:].view(2, 4))
    scaled.centre = scaled.flat().detach().clone()
    scaled.parts = scaled.parts / s / s[:, None]
    for ball in (Ellipsoid(0.2), Box(0.2)):
        one, other = (worst_case(m, m.losses, ball, steps=10) for m in (model, scaled))
        assert one.by_start == pytest.approx(other.by_start, rel=1e-9, abs=1e-12)


def test_keskar_s_sharpness_of_a_diagonal_quadratic_is_its_closed_form():
    model = Quadratic(height=0.7).diagonal()
    found = worst_case(model, model.losses, Box(1e-3, offset=1.0), step_size=1.0)
    rise = 1e-3**2 * (model.hessian.diagonal() * (model.centre.abs() + 1).square()).sum().item() / 2
    assert keskar_sharpness(found) == pytest.approx(100 * rise / 1.7, rel=1e-6)
    assert found.loss == pytest.approx(0.7, rel=1e-12)


@pytest.mark.parametrize("ball", [Layerwise, Global, Ellipsoid, Box])
def test_the_worst_is_worse_than_the_average_and_grows_with_the_ball(ball):
    model = Logistic()
    rises = []
    for radius in (0.01, 0.05, 0.2, 0.5):
        found = worst_case(model, model.losses(), ball(radius))
        average = average_case(model, model.losses(), within(ball(radius)))
        assert found.value > average.value + 3 * average.standard_error
        with displaced(model, found.displacement):
            assert total(model.losses()) - found.loss == pytest.approx(found.value, abs=1e-12)
        rises.append(found.value)
    assert rises == sorted(set(rises))


def robust_maximum(model, radius):
    """Of rho in `Global(radius)`, by gradient ascent on its closed form from many points at once. rho is convex, so
    that its maximum is on the sphere.
    """
    w = model.weight.detach()[0]
    best = 0.0
    for _ in range(20):
        v = nn.functional.normalize(torch.randn_like(w), dim=0)
        for _ in range(40):
            v.requires_grad_()
            (g,) = torch.autograd.grad(model.rho(w + radius * v), v)
            v = nn.functional.normalize(g, dim=0)  # of a convex function: never downhill
        best = max(best, (model.rho(w + radius * v) - model.rho(w)).item())
    return best


def test_alternating_and_joint_ascent_both_find_the_maximum_of_the_robust_loss():
    model = Logistic()
    exact = robust_maximum(model, 0.7)
    alternating = worst_case(model, model.losses(), Global(0.7), steps=40, restarts=4)
    joint = worst_case(
        model,
        model.losses(),
        Global(0.7),
        steps=40,
        restarts=4,
        climbed=lambda: continued(model, model.x, model.y, model.attack, batch_size=16),
    )
    assert alternating.value == pytest.approx(exact, rel=1e-6)
    assert joint.value == pytest.approx(exact, rel=1e-6)
    assert max(alternating.value, joint.value) <= exact * (1 + 1e-9)
    for found in (alternating, joint):
        assert found.loss == pytest.approx(model.rho(model.weight[0]).item(), abs=1e-9)
        v = found.displacement["weight"][0]
        assert v.norm() <= 0.7 * (1 + 1e-12)
        assert (model.rho(model.weight[0] + v) - found.loss).item() == pytest.approx(found.value, abs=1e-9)


def test_joint_ascent_is_judged_by_the_loss_itself_and_never_falls_below_zero():
    """Whatever misleads the climb: here, it descends."""
    model = Quadratic(slope=1.0)
    calls = []

    def climbed():
        calls.append(1)
        return [lambda loss=loss: 100 - loss() for loss in model.losses]

    found = worst_case(model, model.losses, Global(0.01), restarts=1, climbed=climbed)
    assert found.value == 0
    assert not joined(found.displacement).any()
    assert found.by_start[0] < 0
    assert len(calls) == 2


@pytest.mark.parametrize("apart", [False, True], ids=["the loss is climbed", "another is climbed"])
def test_what_is_computed_is_what_it_is_said_to_cost(apart):
    """(restarts + 1) steps gradients of what is climbed, and restarts + 2 evaluations of the loss; nothing else."""
    model, calls = Quadratic(slope=1.0), []

    def told(name):
        def loss():
            calls.append((name, torch.is_grad_enabled()))
            return sum(part() for part in model.losses)

        return loss

    climbed = (lambda: [told("climbed")]) if apart else None
    worst_case(model, [told("loss")], Global(0.1), steps=4, restarts=2, climbed=climbed)
    assert calls.count(("climbed" if apart else "loss", True)) == 3 * 4
    assert calls.count(("loss", False)) == 2 + 2
    assert len(calls) == 3 * 4 + 2 + 2


@pytest.mark.parametrize("restarts", [0, 1, 4])
def test_memory_does_not_grow_with_steps_or_restarts(restarts):
    """What is held while a loss is computed: a backup, and five displacements."""
    model, held = nn.Linear(50_000, 1, bias=False), []
    toward = torch.randn(1, 50_000)

    def loss():
        held.append(memory.held())
        return (model.weight * toward).sum()

    with Memory(50_000) as memory:
        worst_case(model, [loss], Layerwise(0.1), steps=6, restarts=restarts)
    assert max(held) <= 6


def test_a_joint_climb_attacks_no_further_than_it_climbs():
    model, (x, y) = convolutional(), batch()
    attack, calls = PGD(Linf(0.1), 0.05, 2), []
    model.register_forward_hook(lambda *_: calls.append(1))
    joint = continued(model, x, y, attack)
    worst_case(model, [lambda: model[0].weight.sum()], Layerwise(0.1), steps=3, restarts=0, climbed=lambda: joint)
    assert len(calls) == 3 * 2  # one for the attack's step, and one for the gradient in w


def test_one_batch_at_a_time_sums_to_more_than_all_together():
    model = Quadratic()
    alone = [worst_case(model, [loss], Global(0.3), **LONG).value for loss in model.losses]
    assert alone == pytest.approx([0.3**2 * highest(part) / 2 for part in model.parts], rel=1e-6)
    assert sum(alone) > worst_case(model, model.losses, Global(0.3), **LONG).value


def test_the_highest_iterate_counts_and_not_the_last():
    """A loss that is a ridge: long steps from 0 land beyond it."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    loss = lambda: -(model.weight - 0.3).square().sum()
    found = worst_case(model, [loss], Global(1.0), steps=3, step_size=0.5, restarts=0)
    # 0 -> 0.5 -> 0 -> 0.5: both lie lower than the ridge; 0.5 is the higher
    assert found.value == pytest.approx(0.09 - 0.04)
    even = worst_case(model, [loss], Global(1.0), steps=2, step_size=0.5, restarts=0)
    assert even.value == pytest.approx(0.09 - 0.04)
    assert even.displacement["weight"].item() == pytest.approx(0.5)


def test_everything_is_left_as_found_and_equal_seeds_give_equal_bits():
    model, (x, y) = convolutional(), batch()
    model[0].eval()
    attack = PGD(Linf(0.1), 0.05, 2)
    losses = afresh(model, x, y, attack, batch_size=4, mode="train")
    climbs = (None, lambda: continued(model, x, y, attack, batch_size=4, mode="train"))
    for climbed in climbs:
        search = {"steps": 3, "restarts": 2, "climbed": climbed}
        with LeftAsFound(model):
            one, other = (worst_case(model, losses, Layerwise(0.1), **search) for _ in range(2))
            assert one == other
            assert torch.equal(joined(one.displacement), joined(other.displacement))
            third = worst_case(model, losses, Layerwise(0.1), seed=1, **search)
        assert third.by_start[0] == one.by_start[0]
        assert set(third.by_start[1:]).isdisjoint(one.by_start[1:])
        assert one.displacement.keys() == {name for name, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_on_the_way_is_not_passed_over(bad):
    model = Quadratic(slope=1.0)
    calls = []

    def loss():
        calls.append(1)
        return model.flat().sum() * 0 + (bad if len(calls) == 4 else 0)

    found = worst_case(model, [*model.losses, loss], Global(0.1), steps=5, restarts=2)
    assert found.value == pytest.approx(bad, nan_ok=True)
    assert found.by_start[0] == pytest.approx(bad, nan_ok=True)
    assert all(math.isfinite(rise) for rise in found.by_start[1:])
    nowhere = worst_case(model, [lambda: model.flat().sum() * math.nan], Global(0.1), steps=2)
    assert math.isnan(nowhere.value)


def test_refuses_no_steps_and_restarts_below_none():
    model = Quadratic()
    with pytest.raises(ValueError, match="steps: expected an integer >= 1, got 0"):
        worst_case(model, model.losses, Global(0.1), steps=0)
    with pytest.raises(ValueError, match="restarts: expected an integer >= 0, got -1"):
        worst_case(model, model.losses, Global(0.1), restarts=-1)
    with pytest.raises(ValueError, match="where: chose none"):
        worst_case(model, model.losses, Global(0.1), where=lambda *_: False)
