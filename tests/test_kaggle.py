"""Kaggle's two forms of AWP against an oracle that was written from its formula alone."""

import pytest
import torch
from against_oracles import close, identical, weights
from family import bits
from networks import batch, convolutional
from oracles import neighbours as oracles
from torch import nn

from saltflat import (
    gradient,
)
from saltflat.neighbours.kaggle import fast_awp, kaggle_awp
from saltflat.objectives import ce
from saltflat.weights import default


@pytest.mark.parametrize(("step_size", "eps"), [(1.0, 1e-4), (1e-3, 1e-3), (1e-3, 1.0)])
def test_kaggle_awp_is_the_oracle_s(setting, step_size, eps):
    """In the third setting, the box binds nowhere near everywhere."""
    model, x, y, losses = setting
    with torch.no_grad():
        model[3].weight[0] = 0.0
    w = weights(model, default)
    expected = oracles.kaggle_awp(oracles.mean_of(losses), w, step_size, eps)
    loss = lambda: ce(model(x), y).mean()
    for given in (loss, gradient(model, loss)):
        with kaggle_awp(model, given, step_size=step_size, eps=eps) as ascent:
            inside = weights(model, default)
            close(ascent.displacement, expected)
        close(inside, oracles.moved(w, expected))
    assert not expected["3.weight"][0].any()


def test_with_the_published_sizes_nearly_all_numbers_lie_on_the_box():
    model, (x, y) = convolutional().train(), batch()
    w = weights(model, default)
    with kaggle_awp(model, lambda: ce(model(x), y).mean()) as ascent:
        v = ascent.displacement
    on = torch.cat([((v[name].abs() / (1e-4 * part.abs()) - 1).abs() < 1e-8).flatten() for name, part in w.items()])
    assert on.double().mean() > 0.98
    assert sum(0 < v[name].norm() <= 1e-4 * part.norm() * (1 + 1e-9) for name, part in w.items()) == len(w)


MOMENTUM = {
    "Adam": (lambda p: torch.optim.Adam(p, lr=1e-2), "exp_avg"),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=1e-2), "exp_avg"),
    "NAdam": (lambda p: torch.optim.NAdam(p, lr=1e-2), "exp_avg"),
    "SGD": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), "momentum_buffer"),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9), "momentum_buffer"),
}


@pytest.mark.parametrize(("make", "key"), MOMENTUM.values(), ids=MOMENTUM)
@pytest.mark.parametrize("eps", [1e-3, 0.05])
def test_fast_awp_is_the_clamped_layer_step_along_the_optimiser_s_average(make, key, eps):
    model, (x, y) = convolutional().train(), batch()
    optimizer, names = make(model.parameters()), {id(p): name for name, p in model.named_parameters()}
    with fast_awp(model, optimizer, step_size=0.02, eps=eps) as ascent:  # nothing has been averaged yet
        assert all(not v.any() for v in ascent.displacement.values())
        assert ascent.skipped == 3
        ce(model(x), y).mean().backward()
    optimizer.step()
    for _ in range(2):
        w = weights(model, default)
        averages = {names[id(p)]: state[key].clone() for p, state in optimizer.state.items()}
        expected = oracles.momentum_awp({name: averages[name] for name in w}, w, 0.02)
        expected = {n: v.minimum(eps * w[n].abs()).maximum(-eps * w[n].abs()) for n, v in expected.items()}
        optimizer.zero_grad()
        with fast_awp(model, optimizer, step_size=0.02, eps=eps) as ascent:
            close(ascent.displacement, expected)
            assert ascent.value is None
            ce(model(x), y).mean().backward()
        assert identical(bits(weights(model, default)), bits(w))
        assert identical({names[id(p)]: state[key] for p, state in optimizer.state.items()}, averages)
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1e-2),
        lambda p: torch.optim.RMSprop(p, lr=1e-2),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
    ],
    ids=["SGD", "RMSprop", "Adagrad"],
)
def test_an_optimiser_that_keeps_no_average_is_refused_once_it_has_stepped(make):
    """Else v would be 0 for ever, and nobody would know."""
    model, x = nn.Linear(3, 2), torch.rand(4, 3)
    optimizer = make(model.parameters())
    with pytest.raises(ValueError, match="optimizer: expected one with momentum"):
        for _ in range(2):
            with fast_awp(model, optimizer):
                model(x).sum().backward()
            optimizer.step()
