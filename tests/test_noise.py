import math

import pytest
import torch
from torch import nn

from saltflat import Layerwise
from saltflat.balls import Ellipsoid
from saltflat.landscape.noise import adaptive_gaussian, drawn, gaussian, on_surface, within
from saltflat.random import seeded

W = {"a": torch.tensor([[1.0, -2.0, 0.0]], dtype=torch.float64), "b": torch.tensor([[0.5], [4.0]]).double()}


def sample(draw, n=2000):
    generator = seeded(0)
    found = [draw(W, generator) for _ in range(n)]
    return {name: torch.stack([v[name] for v in found]) for name in W}


@pytest.mark.parametrize(
    ("draw", "scale"),
    [(gaussian(0.3), lambda w: torch.full_like(w, 0.3)), (adaptive_gaussian(0.3), lambda w: 0.3 * w.abs())],
)
def test_gaussian_noise_has_the_standard_deviation_that_it_says(draw, scale):
    for name, v in sample(draw).items():
        expected = scale(W[name])
        assert torch.equal(v[:, expected == 0], torch.zeros_like(v[:, expected == 0]))
        z = v[:, expected > 0] / expected[expected > 0]
        assert (z.mean(0).abs() < 4 / math.sqrt(len(z))).all()
        assert ((z.square().mean(0) - 1).abs() < 4 * math.sqrt(2 / len(z))).all()
        assert ((z.pow(4).mean(0) - 3).abs() < 4 * math.sqrt(96 / len(z))).all()


def test_members_of_a_ball_fill_it_and_those_of_its_surface_have_its_radius():
    for name, radius in ((name, 0.2 * w.norm()) for name, w in W.items()):
        inside = sample(within(Layerwise(0.2)))[name].flatten(1)
        p = inside.shape[1]
        assert inside.square().sum(1).mean() == pytest.approx(float(radius**2 * p / (p + 2)), rel=0.05)
        on = sample(on_surface(Layerwise(0.2)), 20)[name].flatten(1)
        torch.testing.assert_close(on.norm(dim=1), radius.expand(20))


def test_what_is_drawn_belongs_to_the_seed_and_to_the_chosen_tensors():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).half()
    for draw in (gaussian(0.1), adaptive_gaussian(0.1), within(Layerwise(0.1)), on_surface(Ellipsoid(0.1))):
        one, other = (drawn(model, draw, seeded(3)) for _ in range(2))
        assert list(one) == ["0.weight", "1.weight"]
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert all(v.shape == model.get_parameter(name).shape and v.dtype == torch.half for name, v in one.items())
        generator = seeded(3)
        first, second = (drawn(model, draw, generator) for _ in range(2))
        assert torch.equal(first["0.weight"], one["0.weight"])
        assert not torch.equal(second["0.weight"], one["0.weight"])
    biases = drawn(model, gaussian(0.1), seeded(0), where=lambda name, _: name.endswith("bias"))
    assert list(biases) == ["0.bias", "1.bias"]


def test_refuses_what_is_no_scale_and_a_choice_of_nothing():
    for bad in (-1e-9, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma: expected a finite number >= 0"):
            gaussian(bad)
        with pytest.raises(ValueError, match="rho: expected a finite number >= 0"):
            adaptive_gaussian(bad)
    with pytest.raises(ValueError, match="where: chose none of the model's 2 parameters"):
        drawn(nn.Linear(1, 1), gaussian(0.1), seeded(0), where=lambda *_: False)
