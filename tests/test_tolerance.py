import math
from functools import partial

import pytest
import torch
from closed_forms import LeftAsFound, P, Quadratic, joined
from hypothesis import given, settings
from hypothesis import strategies as st
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
    assert (z.abs() < 3).all()
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


@given(bracket=st.floats(0.3, 0.99), halvings=st.integers(0, 3), doublings=st.integers(0, 3))
@settings(deadline=None, max_examples=30)
def test_the_last_bracket_is_crossed_by_its_chord(bracket, halvings, doublings):
    """Of q sigma^2, whatever the bracket: doubled from `first`, or from 0 where `first` is too much, and halved."""
    model, unit = Quadratic(), on_surface(Global(1.0))
    risk = lambda: total(model.losses)
    find = partial(tolerated_noise, model, risk, unit, draws=3)
    exact = find(halvings=50).value
    q, high = 0.1 / exact**2, exact / bracket
    first = high / 2**doublings
    low = 0.0 if doublings == 0 else high / 2
    if low > exact:  # it was exceeded one doubling earlier
        low, high = (0.0 if doublings == 1 else high / 4), high / 2
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if middle <= exact else (low, middle)
    sigma = low + (0.1 - q * low**2) / (q * (high**2 - low**2)) * (high - low)
    assert find(first=first, halvings=halvings).value == pytest.approx(sigma, rel=1e-9)


def test_models_that_differ_a_little_are_not_tied():
    """Few halvings leave brackets far wider than the models are apart; sigma goes with 1 / sqrt(curvature)."""
    sigmas = []
    for n in range(8):
        model = Quadratic()
        model.parts *= 1 + n / 1000
        sigmas.append(tolerated_noise(model, lambda m=model: total(m.losses), gaussian(1.0), draws=2, halvings=3).value)
    assert sigmas == sorted(set(sigmas), reverse=True)


@pytest.mark.parametrize("first", [1e-6, 1e-3, 0.3, 10.0])
def test_where_the_search_begins_does_not_matter(first):
    model = Quadratic()
    sigmas = [
        tolerated_noise(model, lambda: total(model.losses), on_surface(Global(1.0)), first=first, halvings=n).value
        for n in (16, 40)
    ]
    exact = tolerated_noise(model, lambda: total(model.losses), on_surface(Global(1.0)), halvings=40).value
    assert sigmas[1] == pytest.approx(exact, rel=1e-9)
    width = max(2 * exact, first) / 2**16
    assert exact - width**2 / exact <= sigmas[0] <= exact  # chords of a parabola err by width^2 / (8 exact) at most


def test_an_error_rate_is_a_staircase_whose_sigma_still_has_an_error():
    """Signs of w that flip: with w = (1, ..., 1), the rate is the chance that a normal number is below -1 / sigma."""
    model = nn.Linear(400, 1, bias=False)
    nn.init.ones_(model.weight)
    rate = lambda: (model.weight < 0).double().mean().item()
    found = tolerated_noise(model, rate, gaussian(1.0), threshold=0.1, draws=20)
    exact = 1 / 1.2815515594600038  # the normal distribution's 90th percentile
    assert abs(found.value - exact) < 4 * found.standard_error < 0.1 * exact


def test_a_staircase_s_sigma_stays_in_the_bracket_of_its_step():
    model = Quadratic()
    for step in (0.11, 0.5, 1e9):
        stairs = lambda step=step: step * ((model.flat() - model.centre).norm() > 0.5).item()
        found = tolerated_noise(model, stairs, on_surface(Global(1.0)), first=0.3, halvings=2)
        assert found.value == pytest.approx(0.45 + 0.1 / step * 0.075)  # of [0.45, 0.525]


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
    found = tolerated_noise(model, cliff, gaussian(1.0), draws=2, first=0.5, halvings=4)
    assert found.value == pytest.approx(0.1 * 0.5 / 2**4)  # of the chord from 0 to the least that was tried
    assert math.isnan(found.standard_error)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_risk_that_is_not_finite_is_not_tolerated(bad):
    model = Quadratic()
    far = lambda: bad if (model.flat() - model.centre).norm() > 0.5 else 0.0
    for halvings in (1, 30):
        found = tolerated_noise(model, far, on_surface(Global(1.0)), first=0.3, halvings=halvings)
        assert found.value == pytest.approx({1: 0.45, 30: 0.5}[halvings], rel=1e-6)  # the largest that was tolerated
        assert math.isnan(found.standard_error)
    everywhere = lambda: 0.0 if torch.equal(model.flat(), model.centre) else bad
    found = tolerated_noise(model, everywhere, gaussian(1.0))
    assert found.value == 0
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
