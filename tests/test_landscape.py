import pytest
import torch
from networks import equal_states, state
from torch import nn

from saltflat import PGD, Layerwise, Linf
from saltflat.data import Images, to_float
from saltflat.evaluation import outcomes
from saltflat.inputs import zero
from saltflat.landscape import along, random_direction
from saltflat.models import small_resnet

ALPHAS = [-1.0, -0.3, 0.0, 0.5, 1.0]


def test_directions_are_filter_normalised_and_leave_out_norm_layers():
    model = small_resnet(in_channels=1, widths=(4, 8, 16))
    direction = random_direction(model, seed=1)
    assert direction.keys() == {name for name, p in model.named_parameters() if p.ndim > 1}
    for name, d in direction.items():
        w = model.get_parameter(name)
        torch.testing.assert_close(d.flatten(1).norm(dim=1), w.detach().flatten(1).norm(dim=1))
    again, other = random_direction(model, seed=1), random_direction(model, seed=2)
    assert all(torch.equal(again[name], d) for name, d in direction.items())
    assert not any(torch.equal(other[name], d) for name, d in direction.items())


def test_models_of_one_architecture_get_one_draw():
    one, other = (small_resnet(in_channels=1, widths=(4, 8, 16)) for _ in range(2))
    first, second = random_direction(one, 0), random_direction(other, 0)
    for name, d in first.items():
        cosines = torch.cosine_similarity(d.flatten(1), second[name].flatten(1))
        assert torch.allclose(cosines, torch.ones_like(cosines), atol=1e-5)


def test_a_layerwise_direction_has_the_norm_of_its_layer():
    model = nn.Linear(5, 3)
    d = random_direction(model, 0, ball=Layerwise(1.0))["weight"]
    assert d.norm().item() == pytest.approx(model.weight.norm().item(), rel=1e-5)


def test_a_quadratic_s_landscape_is_its_closed_form():
    """L(w) = w^T H w / 2: g(alpha) - g(0) = alpha w^T H d + alpha^2 d^T H d / 2."""
    model = nn.Linear(4, 1, bias=False).double()
    root = torch.randn(4, 4, dtype=torch.float64)
    hessian = root @ root.T

    def loss():
        w = model.weight[0]
        return (w @ hessian @ w / 2).item()

    w, direction = model.weight.detach()[0].clone(), random_direction(model, 0)
    d, before = direction["weight"][0], state(model)
    for alpha, value in along(model, direction, ALPHAS, loss):
        expected = loss() + (alpha * (w @ hessian @ d) + alpha**2 * (d @ hessian @ d) / 2).item()
        assert value == pytest.approx(expected, rel=1e-12)
        assert equal_states(state(model), before)  # w is back at every point


class Logistic(nn.Module):
    """Two classes with logits (0, <w, x>)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 12, dtype=torch.float64))

    def forward(self, x):
        z = x.flatten(1) @ self.weight[0]
        return torch.stack([torch.zeros_like(z), z], 1)


def test_the_robust_landscape_of_a_linear_model_is_its_closed_form():
    """rho(w) = mean softplus(-(y <w, x> - eps ‖w‖_1)): only an attack made afresh at every alpha attains it."""
    model = Logistic()
    pixels = torch.randint(0, 256, (40, 3, 2, 2), dtype=torch.uint8)
    images = Images(pixels, torch.arange(40) % 2, 2, "linear")
    attack = PGD(Linf(0.1, box=None), 0.025, 8, zero)
    direction = random_direction(model, 0)
    x, sign = to_float(pixels, torch.float64).flatten(1), (2 * images.labels - 1).double()

    def rho(w):
        return nn.functional.softplus(-(sign * (x @ w) - 0.1 * w.abs().sum())).mean().item()

    w = model.weight.detach()[0].clone()
    for alpha, found in along(model, direction, ALPHAS, lambda: outcomes(model, images, attack)):
        assert found.mean_loss == pytest.approx(rho(w + alpha * direction["weight"][0]), abs=1e-9)


def test_the_curve_passes_through_the_evaluation():
    model = small_resnet(in_channels=1, widths=(4, 8, 16), stem_stride=1)
    images = Images(torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8), torch.arange(20) % 10, 10, "noise")
    attack = PGD(Linf(0.1), 0.05, 3)
    ((_, found),) = along(model, random_direction(model, 0), [0.0], lambda: outcomes(model, images, attack, seed=4))
    assert torch.equal(found.loss, outcomes(model, images, attack, seed=4).loss)
