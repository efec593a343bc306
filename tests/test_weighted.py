"""WT-AWP against an oracle that was written from its formula alone, its limits, and which layer is the last."""

import pytest
import torch
from against_oracles import close, generator, grads, identical, weights
from family import ATTACK, bits, everything, sgd
from networks import batch, convolutional
from oracles import neighbours as oracles
from torch import nn

from saltflat import (
    AT,
    PGD,
    TRADES,
    Layerwise,
    Linf,
    double_perturbation_step,
    perturbed,
)
from saltflat.neighbours.random_wp import drawn
from saltflat.neighbours.robust_wp import accumulated
from saltflat.neighbours.weighted import all_but_last
from saltflat.weights import default


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_wt_awp_s_gradient_is_the_oracle_s(setting, share):
    model, x, y, losses = setting
    w, truncated = weights(model), ["6.weight", *(name for name, p in model.named_parameters() if p.ndim < 2)]
    expected = oracles.weighted_awp(oracles.mean_of(losses), w, 0.1, share, truncated)
    double_perturbation_step(
        model, x, y, objective=AT(), attack=None, ball=Layerwise(0.1), optimizer=sgd(model), share=share,
        where=all_but_last(model),
    )  # fmt: skip
    close(grads(model), expected, atol=1e-14)


def test_wt_awp_with_a_share_of_one_and_every_layer_is_awp_to_the_bit():
    ends = []
    for more in ({}, {"share": 1.0, "where": default}):
        torch.manual_seed(0)
        model, (x, y) = convolutional().train(), batch()
        optimizer = sgd(model)
        for _ in range(3):
            double_perturbation_step(
                model, x, y, objective=TRADES(), attack=PGD(Linf(0.1), 0.05, 2), ball=Layerwise(0.01),
                optimizer=optimizer, generator=generator(), **more,
            )  # fmt: skip
        ends.append(bits(everything(model, optimizer)))
    torch.manual_seed(0)  # and a loop for AWP alone
    model, (x, y) = convolutional().train(), batch()
    optimizer = sgd(model)
    for _ in range(3):
        optimizer.zero_grad()
        model.eval()
        x_adv = PGD(Linf(0.1), 0.05, 2)(TRADES().inner(model, x, y), x, generator=generator())
        model.train()
        loss = lambda x_adv=x_adv: TRADES().outer(model, x, x_adv, y)
        with perturbed(model, loss, Layerwise(0.01)):
            loss().backward()
        optimizer.step()
    ends.append(bits(everything(model, optimizer)))
    assert identical(ends[0], ends[1])
    assert identical(ends[0], ends[2])


@pytest.mark.parametrize("climb", [perturbed, accumulated, drawn])
def test_a_share_of_zero_is_plain_training_to_the_bit(climb):
    ends = []
    for more in ({"ball": None}, {"ball": Layerwise(0.3), "climb": climb, "share": 0.0, "where": default}):
        torch.manual_seed(0)
        model, (x, y) = convolutional().train(), batch()
        optimizer = sgd(model)
        for _ in range(3):
            step = double_perturbation_step(model, x, y, objective=AT(), attack=ATTACK, optimizer=optimizer, **more)
        ends.append((bits(everything(model, optimizer)), step.loss))
    assert identical(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_the_last_layer_is_the_last_one_with_weights():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.linear = nn.Parameter(torch.ones(1, 2, 2)), nn.Linear(2, 2)

    def chosen(model):
        where = all_but_last(model)
        return [name for name, p in model.named_parameters() if where(name, p)]

    assert chosen(convolutional()) == ["0.weight", "3.weight"]
    assert chosen(nn.Sequential(nn.Linear(2, 2), Layer())) == ["0.weight"]  # attention is part of its layer
    assert chosen(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))) == ["0.weight"]
    assert chosen(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2, 2))) == ["0.weight"]
    with pytest.raises(ValueError, match="model: expected at least two layers with weights, got 1"):
        all_but_last(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_the_last_layer_stays_the_same_inside_a_wrapper():
    """DistributedDataParallel, or a normalisation, around a network that owns a tensor itself, as transformers do."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.first, self.last = nn.Parameter(torch.ones(1, 1, 2)), nn.Linear(2, 2), nn.Linear(2, 2)

    for model, last in ((convolutional(), "6.weight"), (Tokens(), "last.weight")):
        for depth in range(3):
            where, prefix = all_but_last(model), "0." * depth
            left = [name for name, p in model.named_parameters() if p.ndim > 1 and not where(name, p)]
            assert left == [prefix + last]
            model = nn.Sequential(model)
