import math
from itertools import pairwise

import pytest
import torch
from closed_forms import LeftAsFound, Logistic, P, Quadratic
from networks import batch, convolutional

from saltflat import PGD, Global, Layerwise, Linf
from saltflat.balls import Box, Ellipsoid
from saltflat.landscape import afresh, frozen
from saltflat.landscape.average_case import average_case
from saltflat.landscape.noise import adaptive_gaussian, drawn, gaussian, on_surface, within
from saltflat.random import seeded


def blocks(model, dimensions):
    """sum_l ‖w_l‖^2 tr H_ll / (2 (P_l + extra))."""
    ends = ((model.a, 0, 6), (model.b, 6, 14))
    diagonal = model.hessian.diagonal()
    return sum(w.norm() ** 2 * diagonal[i:j].sum() / (2 * dimensions(j - i)) for w, i, j in ends).item()


CLOSED_FORMS = {
    "Gaussian": (gaussian(0.3), lambda m: 0.3**2 * m.hessian.trace() / 2),
    "sphere": (on_surface(Global(0.3)), lambda m: 0.3**2 * m.hessian.trace() / (2 * P)),
    "ball": (within(Global(0.3)), lambda m: 0.3**2 * m.hessian.trace() / (2 * (P + 2))),
    "layers' spheres": (on_surface(Layerwise(0.3)), lambda m: 0.3**2 * blocks(m, lambda p: p)),
    "layers' balls": (within(Layerwise(0.3)), lambda m: 0.3**2 * blocks(m, lambda p: p + 2)),
    "adaptive Gaussian": (
        adaptive_gaussian(0.3),
        lambda m: 0.3**2 * (m.hessian.diagonal() * m.centre.square()).sum() / 2,
    ),
    "ellipsoid": (
        within(Ellipsoid(0.3)),
        lambda m: 0.3**2 * (m.hessian.diagonal() * m.centre.square()).sum() / (2 * (P + 2)),
    ),
    "box": (
        within(Box(0.3, offset=1.0)),
        lambda m: 0.3**2 * (m.hessian.diagonal() * (m.centre.abs() + 1).square()).sum() / 6,
    ),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_quadratic_s_average_is_its_closed_form_within_the_standard_error(name):
    """With a slope, whose average is 0; errors in units of the standard error are spread as normal numbers are."""
    draw, closed_form = CLOSED_FORMS[name]
    model = Quadratic(slope=0.2, height=3.0)
    exact = float(closed_form(model))
    found = [average_case(model, model.losses, draw, draws=100, seed=seed) for seed in range(20)]
    z = torch.tensor([(one.value - exact) / one.standard_error for one in found])
    assert (z.abs() < 3).all()
    assert 0.4 < z.square().mean() < 2  # of 20 normal numbers: 0.6 % lie below, 0.5 % above
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert abs(one.value - other.value) < 3 * math.hypot(one.standard_error, other.standard_error)


def test_two_seeds_of_an_attacked_network_differ_by_less_than_three_combined_errors():
    model, (x, y) = convolutional().eval(), batch(24)
    losses = afresh(model, x, y, PGD(Linf(0.1), 0.05, 3), batch_size=8)
    found = [average_case(model, losses, within(Layerwise(0.5)), draws=10, seed=seed) for seed in range(8)]
    for one, other in pairwise(found):
        assert one.value != other.value
        assert abs(one.value - other.value) < 3 * math.hypot(one.standard_error, other.standard_error)


def test_batches_draw_for_themselves_and_their_variances_add_up():
    model = Quadratic()
    found = average_case(model, model.losses, gaussian(0.3), draws=50, seed=4)
    alone = []
    for b, loss in enumerate(model.losses):
        generator = seeded(4, b)
        rises = []
        for _ in range(50):
            v = drawn(model, gaussian(0.3), generator)
            v = torch.cat([v["a"].flatten(), v["b"].flatten()])
            rises.append(v @ model.parts[b] @ v / 2)
        alone.append(torch.stack(rises))
        assert loss() == 0
    assert found.value == pytest.approx(sum(rise.mean() for rise in alone).item(), rel=1e-12)
    assert found.standard_error == pytest.approx(math.sqrt(sum(rise.var().item() / 50 for rise in alone)), rel=1e-12)
    assert found.draws == 50


def test_under_attack_it_is_the_average_of_the_robust_loss_and_kept_examples_hide_most_of_it():
    model = Logistic()
    w, rises = model.weight.detach()[0].clone(), []
    found = average_case(model, model.losses(40), gaussian(2.0), draws=5, seed=1)
    generator = seeded(1, 0)
    for _ in range(5):
        v = drawn(model, gaussian(2.0), generator)["weight"][0]
        rises.append((model.rho(w + v) - model.rho(w)).item())
    assert found.value == pytest.approx(sum(rises) / 5, abs=1e-9)
    kept = frozen(model, model.x, model.y, model.attack)
    assert average_case(model, kept, gaussian(2.0), draws=5, seed=1).value < found.value - 0.1


def test_everything_is_left_as_found_and_equal_seeds_give_equal_bits():
    model, (x, y) = convolutional(), batch()
    model[0].eval()
    losses = afresh(model, x, y, PGD(Linf(0.1), 0.05, 2), batch_size=4, mode="train")
    with LeftAsFound(model):
        one = average_case(model, losses, within(Layerwise(0.5)), draws=2)
        assert one == average_case(model, losses, within(Layerwise(0.5)), draws=2)
    assert one != average_case(model, losses, within(Layerwise(0.5)), draws=2, seed=1)

    def fails():
        if (model[0].weight != before).any():
            raise OSError
        return model[0].weight.sum()

    before = model[0].weight.detach().clone()
    with LeftAsFound(model), pytest.raises(OSError):
        average_case(model, [fails], gaussian(0.1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [0, 3])
def test_a_single_loss_that_is_not_finite_makes_the_estimate_nan(bad, call):
    model, calls = Quadratic(), []

    def loss():
        calls.append(1)
        return torch.tensor(bad if len(calls) - 1 == call else 1.0)

    found = average_case(model, [*model.losses, loss], gaussian(0.1), draws=5)
    assert math.isnan(found.value)
    assert math.isnan(found.standard_error)
    assert len(calls) == 6


def test_one_draw_says_nothing_of_its_error_and_none_is_refused():
    model = Quadratic()
    found = average_case(model, model.losses, gaussian(0.1), draws=1)
    assert found.value > 0
    assert math.isnan(found.standard_error)
    with pytest.raises(ValueError, match="draws: expected an integer >= 1, got 0"):
        average_case(model, model.losses, gaussian(0.1), draws=0)


def test_noise_stays_in_the_tensors_that_are_chosen():
    model = Quadratic()
    exact = 0.3**2 * model.hessian.diagonal()[6:].sum().item() / 2
    found = average_case(model, model.losses, gaussian(0.3), draws=400, where=lambda name, _: name == "b")
    assert abs(found.value - exact) < 3 * found.standard_error < 0.3 * exact
