import math

import pytest
import torch
from matrices import dense_cross_entropy, dense_hessian
from torch import nn

from saltflat.landscape.estimate import Estimate
from saltflat.landscape.hessian import hessian
from saltflat.landscape.trace import layer_traces
from saltflat.landscape.weight_curvature import weight_curvature
from saltflat.objectives import ce


def layers_of(dense, model):
    """Exact traces of the diagonal blocks of weights."""
    weights = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1}
    diagonals = dense.diag().split(list(weights.values()))
    return {name: Estimate(d.sum().item(), 0.0, 1) for name, d in zip(weights, diagonals, strict=True)}


def test_rescaling_the_layers_of_a_relu_network_changes_nothing():
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    found, traces = [], []
    for a in (1.0, 0.1, 10.0):
        with torch.no_grad():  # from what it was before, so that factors do not pile up
            scaled = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
            scaled.load_state_dict(model.state_dict())
            scaled[0].weight.mul_(a)
            scaled[0].bias.mul_(a)
            scaled[2].weight.div_(a)
        dense = dense_cross_entropy(scaled, x, y)
        found.append(weight_curvature(scaled, layers_of(dense, scaled)).index.value)
        traces.append(dense.trace().item())
    assert found[1] == pytest.approx(found[0], rel=1e-10)
    assert found[2] == pytest.approx(found[0], rel=1e-10)
    assert max(traces) > 10 * min(traces)


def test_a_two_layer_linear_network_s_index_is_its_closed_form():
    """L = mean ‖W2 W1 x - t‖^2 / 2, S = mean x x^T:  tr H_1 = ‖W2‖_F^2 tr S,  tr H_2 = C tr W1 S W1^T."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    x, t = torch.randn(10, 4, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    w1, w2, s = model[0].weight.detach(), model[1].weight.detach(), x.T @ x / 10
    dense = dense_hessian(model, lambda network: (network(x) - t).square().sum(1).mean() / 2)
    first, second = w2.square().sum() * s.trace(), 2 * (w1 @ s @ w1.T).trace()
    found = weight_curvature(model, layers_of(dense, model))
    expected = w1.norm() * first.sqrt() + w2.norm() * second.sqrt()
    assert found.index.value == pytest.approx(expected.item(), rel=1e-12)
    assert found.index.standard_error == 0
    assert found.negative == ()


def test_the_index_is_the_least_of_noise_s_cost_and_divergence():
    """Per layer and over sigma^2: sigma^2 t / 2 + ‖W‖^2 / (2 sigma^2 beta), times sqrt beta."""
    model = nn.Linear(3, 2, bias=False).double()
    squared, t, beta = model.weight.square().sum().item(), 0.7, 5.0
    costs = [s * t / 2 + squared / (2 * s * beta) for s in torch.logspace(-3, 3, 100001, dtype=torch.float64).tolist()]
    found = weight_curvature(model, {"weight": Estimate(t, 0.0, 1)})
    assert found.index.value == pytest.approx(math.sqrt(beta) * min(costs), rel=1e-7)


def test_negative_traces_count_as_zero_and_are_told():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    traces = {"0.weight": Estimate(4.0, 0.0, 9), "1.weight": Estimate(-1.0, 0.0, 7)}
    found = weight_curvature(model, traces)
    assert found.index.value == pytest.approx(2 * model[0].weight.norm().item())
    assert found.negative == ("1.weight",)
    assert found.index.draws == 7


def test_small_errors_propagate_to_first_order():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    traces = {"0.weight": Estimate(4.0, 1e-4, 9), "1.weight": Estimate(9.0, 3e-4, 9)}
    expected = model[0].weight.norm() * 1e-4 / (2 * 2) + model[1].weight.norm() * 3e-4 / (2 * 3)
    assert weight_curvature(model, traces).index.standard_error == pytest.approx(expected.item(), rel=1e-6)


def test_errors_stay_finite_around_zero_and_unknown_where_the_trace_s_is():
    model = nn.Linear(2, 2).double()
    for value in (0.0, -0.5, 0.5):
        error = weight_curvature(model, {"weight": Estimate(value, 1.0, 9)}).index.standard_error
        assert 0 < error < model.weight.norm().item()
    assert weight_curvature(model, {"weight": Estimate(-5.0, 1.0, 9)}).index.standard_error == 0
    assert math.isnan(weight_curvature(model, {"weight": Estimate(1.0, math.nan, 1)}).index.standard_error)
    assert math.isnan(weight_curvature(model, {"weight": Estimate(math.nan, 0.0, 1)}).index.value)


def test_estimated_traces_give_the_index_within_its_error():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    exact = weight_curvature(model, layers_of(dense_cross_entropy(model, x, y), model)).index.value
    operator = hessian(model, lambda: ce(model(x), y).mean())
    found = [weight_curvature(model, layer_traces(operator, 50, seed)).index for seed in range(20)]
    z = torch.tensor([(index.value - exact) / index.standard_error for index in found])
    assert z.abs().max() < 3
    assert 0.3 < z.square().mean().sqrt() < 1.5  # the error is an upper bound, but not an idle one


def test_bad_arguments_are_told():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="traces: expected names of the model's 2 weights, got 'strange'"):
        weight_curvature(model, {"strange": Estimate(1.0, 0.0, 1)})
    with pytest.raises(ValueError, match="traces: expected at least one"):
        weight_curvature(model, {})
