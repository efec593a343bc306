import gc

import pytest
import torch
from networks import equal_states, state
from torch import nn

from saltflat import PGD, Layerwise, Linf
from saltflat.data import Images
from saltflat.evaluation import outcomes
from saltflat.landscape import adversarial_direction, afresh, along, over, random_direction, total
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


def test_a_plane_of_a_quadratic_is_its_closed_form():
    model = nn.Linear(4, 1, bias=False).double()
    root = torch.randn(4, 4, dtype=torch.float64)
    hessian = root @ root.T
    d, e = (random_direction(model, seed) for seed in (0, 1))
    w, before = model.weight.detach()[0].clone(), state(model)
    points = [(alpha, beta) for alpha in ALPHAS for beta in (-2.0, 0.0, 0.25)]

    def loss():
        return (model.weight[0] @ hessian @ model.weight[0] / 2).item()

    for (alpha, beta), found in over(model, [d, e], points, loss):
        v = w + alpha * d["weight"][0] + beta * e["weight"][0]
        assert found == pytest.approx((v @ hessian @ v / 2).item(), rel=1e-12)
        assert equal_states(state(model), before)


def test_a_point_has_a_number_for_each_direction():
    model = nn.Linear(4, 1)
    with pytest.raises(ValueError, match="points"):
        list(over(model, [random_direction(model, 0)], [(0.0, 1.0)], lambda: None))


def test_directions_may_name_different_weights():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    d, e = {"0.weight": torch.ones(2, 2)}, {"1.weight": torch.ones(2, 2)}
    before = state(model)
    ((_, inside),) = over(model, [d, e], [(1.0, 2.0)], lambda: state(model))
    assert torch.equal(inside["0.weight"], before["0.weight"] + 1)
    assert torch.equal(inside["1.weight"], before["1.weight"] + 2)


@pytest.mark.parametrize("directions", [1, 2])
def test_one_backup_of_the_weights_and_one_copy_a_direction_are_held(directions):
    model = nn.Sequential(*(nn.Linear(37, 37, bias=False) for _ in range(8)))
    drawn = [random_direction(model, seed) for seed in range(directions)]
    size = (37, 37)

    def held():
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
        return len({tensor.data_ptr() for tensor in tensors if tensor.shape == size})

    ((_, inside),) = over(model, drawn, [(0.5,) * directions], held)
    assert inside == 8 * (1 + 1 + directions)
    assert held() == 8 * (1 + directions)


@pytest.mark.parametrize("ball", [None, Layerwise(1.0)])
def test_the_adversarial_direction_is_the_gradient_with_the_weights_norms(ball):
    model, x = nn.Linear(5, 3, bias=False).double(), torch.rand(4, 5, dtype=torch.float64)
    before = state(model)
    losses = [lambda: model(x[:1]).square().sum(), lambda: model(x[1:]).square().sum()]
    d = adversarial_direction(model, losses, ball=ball)["weight"]
    g, w = 2 * (model.weight @ x.T) @ x, model.weight.detach()
    rows = (g, w) if ball is None else (g.reshape(1, -1), w.reshape(1, -1))
    unit, norm = rows[0] / rows[0].norm(dim=1, keepdim=True), rows[1].norm(dim=1, keepdim=True)
    torch.testing.assert_close(d, (unit * norm).reshape(3, 5).detach())
    assert equal_states(state(model), before)
    assert model.weight.grad is None


def test_no_direction_of_its_norm_rises_faster_than_the_adversarial():
    model, x, y = nn.Linear(6, 3, bias=False).double(), torch.rand(20, 6, dtype=torch.float64), torch.arange(20) % 3
    losses = afresh(model, x, y, PGD(Linf(0.1), 0.05, 4))
    slopes = []
    for d in (adversarial_direction(model, losses), *(random_direction(model, seed) for seed in range(20))):
        (_, low), (_, high) = along(model, d, [-1e-4, 1e-4], lambda: total(losses))
        slopes.append(high - low)
    assert slopes[0] > max(slopes[1:])


def test_the_curve_passes_through_the_evaluation():
    model = small_resnet(in_channels=1, widths=(4, 8, 16), stem_stride=1)
    images = Images(torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8), torch.arange(20) % 10, 10, "noise")
    attack = PGD(Linf(0.1), 0.05, 3)
    ((_, found),) = along(model, random_direction(model, 0), [0.0], lambda: outcomes(model, images, attack, seed=4))
    assert torch.equal(found.loss, outcomes(model, images, attack, seed=4).loss)
