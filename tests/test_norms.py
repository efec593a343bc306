import math

import pytest
import torch
from networks import convolutional
from torch import nn

from saltflat.landscape.norms import distance, log_norms, weight_norm


def every(name, parameter):
    return True


def test_the_norms_are_those_of_all_chosen_numbers_in_a_row():
    model = convolutional()
    weights = [p for p in model.parameters() if p.ndim > 1]
    assert weight_norm(model) == pytest.approx(torch.cat([w.flatten() for w in weights]).norm().item(), rel=1e-12)
    assert log_norms(model) == pytest.approx(math.log(math.prod(w.norm().item() for w in weights)), rel=1e-12)
    vector = nn.utils.parameters_to_vector(model.parameters())
    assert weight_norm(model, where=every) == pytest.approx(vector.norm().item(), rel=1e-12)


def test_the_product_of_norms_does_not_change_when_one_layer_is_multiplied_and_the_next_divided():
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)).double()
    before, x = log_norms(model), torch.randn(3, 4, dtype=torch.float64)
    y, norm = model(x), weight_norm(model)
    with torch.no_grad():
        model[0].weight.mul_(8)
        model[2].weight.div_(8)
    torch.testing.assert_close(model(x), y)
    assert log_norms(model) == pytest.approx(before, rel=1e-12)
    assert weight_norm(model) > norm


def test_the_distance_is_that_from_the_initial_weights():
    model = convolutional()
    initial = {name: w.float() for name, w in model.state_dict().items()}
    model.load_state_dict(initial)
    assert distance(model, initial) == 0
    step = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(step[name])
    assert distance(model, initial, where=every) == pytest.approx(
        torch.cat([v.flatten() for v in step.values()]).norm().item(), rel=1e-12
    )
    assert distance(model, initial) < distance(model, initial, where=every)


def test_norms_of_half_precision_weights_do_not_overflow():
    model = nn.Linear(400, 400, bias=False).half()
    nn.init.constant_(model.weight, 6e4)
    assert weight_norm(model) == pytest.approx(400 * model.weight[0, 0].item(), rel=1e-12)


def test_a_layer_of_zeros_has_no_logarithm():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[1].weight)
    assert log_norms(model) == -math.inf


def test_refuses_initial_weights_that_lack_one_and_a_choice_of_nothing():
    model = nn.Linear(2, 2)
    with pytest.raises(KeyError, match="weight"):
        distance(model, {"bias": model.bias})
    for measure in (weight_norm, log_norms, lambda model, where: distance(model, {}, where=where)):
        with pytest.raises(ValueError, match="where: chose none of the model's 2 parameters"):
            measure(model, where=lambda *_: False)
