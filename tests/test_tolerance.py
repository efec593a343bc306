import math

import pytest
import torch
from closed_forms import LeftAsFound, P, Quadratic, joined
from networks import batch, convolutional
from torch import nn

from saltflat import Global, Layerwise
from saltflat.landscape import afresh, total
from saltflat.landscape.noise import adaptive_gaussian, drawn, gaussian, on_surface, within
from saltflat.landscape.tolerance import tolerated_noise
from saltflat.random import seeded


@pytest.mark.parametrize(
    ("draw", "scale"),
    [
        (gaussian(1.0), lambda m: torch.ones(P)),
        (adaptive_gaussian(1.0), lambda m: m.centre.square()),
        (within(Global(1.0)), lambda m: torch.ones(P) / (P + 2)),
    ],
)
def test_a_quadratic_tolerates_the_square_root_of_twice_the_threshold_over_the_trace(draw, scale):
    """Within the standard error, which is as large as it says."""
    model = Quadratic(height=2.0)
    exact = math.sqrt(2 * 0.1 / (model.hessian.diagonal() * scale(model)).sum().item())
    found = [tolerated_noise(model, lambda: total(model.losses), draw, draws=30, seed=seed) for seed in range(20)]
    z = torch.tensor([(one.value - exact) / one.standard_error for one in found])
    assert (z.abs() > 3).sum() <= 1
    assert (z.abs() < 4).all()
    assert 0.4 < z.square().mean() < 2
    assert all(0 < one.standard_error < 0.2 * exact for one in found)


def test_it_is_the_crossing_of_the_mean_over_its_draws_and_its_error_the_delta_method_s():
    """On a quadratic at its minimum the mean over draws is sigma^2 q, q the mean of v^T H v / 2."""
    model = Quadratic()
    found = tolerated_noise(model, lambda: total(model.losses), gaussian(1.0), draws=8, seed=5, halvings=40)
    v = torch.stack([joined(drawn(model, gaussian(1.0), seeded(5, k))) for k in range(8)])
    q = (v @ model.hessian * v).sum(1) / 2
    sigma = math.sqrt(0.1 / q.mean().item())
    assert found.value == pytest.approx(sigma, rel=1e-9)
    error = sigma**2 * (1 + 0.1**2) * q.std().item() / math.sqrt(8) / (2 * sigma * q.mean().item())
    assert found.standard_error == pytest.approx(error, rel=1e-9)
    assert found.draws == 8


@pytest.mark.parametrize("first", [1e-6, 1e-3, 0.3, 10.0])
def test_where_the_search_begins_does_not_matter(first):
    model = Quadratic()
    sigmas = [
        tolerated_noise(model, lambda: total(model.losses), on_surface(Global(1.0)), first=first, halvings=n).value
        for n in (16, 40)
    ]
    exact = tolerated_noise(model, lambda: total(model.losses), on_surface(Global(1.0)), halvings=40).value
    assert sigmas[1] == pytest.approx(exact, rel=1e-9)
    assert exact - max(2 * exact, first) / 2**16 <= sigmas[0] <= exact


def test_an_error_rate_is_a_staircase_whose_sigma_still_has_an_error():
    """Signs of w that flip: with w = (1, ..., 1), the rate is the chance that a normal number is below -1 / sigma."""
    model = nn.Linear(400, 1, bias=False)
    nn.init.ones_(model.weight)
    rate = lambda: (model.weight < 0).double().mean().item()
    found = tolerated_noise(model, rate, gaussian(1.0), threshold=0.1, draws=20)
    exact = 1 / 1.2815515594600038  # the normal distribution's 90th percentile
    assert abs(found.value - exact) < 4 * found.standard_error < 0.1 * exact


def test_noise_that_never_matters_is_tolerated_without_end_and_noise_that_always_does_not_at_all():
    model, calls = Quadratic(), []

    def flat():
        calls.append(1)
        return 1.0

    found = tolerated_noise(model, flat, gaussian(1.0), draws=2, first=0.5, largest=3.0)
    assert found.value == math.inf
    assert math.isnan(found.standard_error)
    assert len(calls) == 1 + 2 * 4  # 0.5, 1, 2, 3
    w = model.flat().detach()
    cliff = lambda: float((model.flat() != w).any())
    found = tolerated_noise(model, cliff, gaussian(1.0), draws=2)
    assert found.value == 0
    assert math.isnan(found.standard_error)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_risk_that_is_not_finite_is_not_tolerated(bad):
    model = Quadratic()
    far = lambda: bad if (model.flat() - model.centre).norm() > 0.5 else 0.0
    found = tolerated_noise(model, far, on_surface(Global(1.0)), halvings=30)
    assert found.value == pytest.approx(0.5, rel=1e-6)
    assert math.isnan(found.standard_error)
    found = tolerated_noise(model, lambda: bad, gaussian(1.0))
    assert math.isnan(found.value)
    assert math.isnan(found.standard_error)


def test_everything_is_left_as_found_and_equal_seeds_give_equal_bits():
    model, (x, y) = convolutional(), batch()
    model[0].eval()
    losses = afresh(model, x, y, None, mode="train")
    risk = lambda: total(losses)
    with LeftAsFound(model):
        one, other = (tolerated_noise(model, risk, within(Layerwise(1.0)), draws=3, halvings=4) for _ in range(2))
        assert one == other
        assert one != tolerated_noise(model, risk, within(Layerwise(1.0)), draws=3, halvings=4, seed=1)


def test_refuses_thresholds_draws_and_brackets_that_are_none():
    model = Quadratic()
    for wrong in ({"threshold": 0.0}, {"threshold": math.nan}, {"draws": 0}, {"first": 0.0}, {"first": 2.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            tolerated_noise(model, lambda: 0.0, gaussian(1.0), largest=1.0, **wrong)
