"""Accumulated micro-batches are the batch; a loss scale of a power of two is no scale; an overflow costs one step."""

import copy
from functools import partial

import pytest
import torch
from networks import batch, convolutional, equal_states, state
from torch import nn

from examples.amp_accumulate import accumulated_step, attacked, train
from saltflat import AT, Layerwise, perturbed

BALL = Layerwise(0.05)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def scaler(scale=None, **options):
    return torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0, **options)


def stepped(model, parts, scale=None, steps=3, n=8, dtype=None):
    """The weights after some steps, with the optimiser's momentum and all."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    optimizer, scaling = sgd(model), scaler(scale)
    like = next(model.parameters())
    for _ in range(steps):
        x, y = torch.rand(n, 3, 6, 6, dtype=like.dtype, generator=generator), torch.arange(n) % 3
        accumulated_step(model, x, y, parts, BALL, optimizer, scaling, dtype)
    return state(model)


def plain(model, steps=3, n=8):
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    optimizer = sgd(model)
    for _ in range(steps):
        x, y = torch.rand(n, 3, 6, 6, dtype=torch.float64, generator=generator), torch.arange(n) % 3
        optimizer.zero_grad()
        loss = partial(AT().outer, model, x, x, y)
        with perturbed(model, loss, BALL):
            loss().backward()
        optimizer.step()
    return state(model)


@pytest.mark.parametrize(("parts", "n"), [(1, 8), (2, 8), (4, 8), (3, 8), (2, 5)], ids=str)
@pytest.mark.parametrize("norm", ["none", "running statistics"])
def test_accumulation_equals_the_whole_batch(parts, n, norm):
    """To 1e-12 in float64, whether the micro-batches are equal or not (8 in three: 3, 3, 2)."""
    model = convolutional(batch_norm=norm != "none")
    model.train(norm == "none")
    expected = plain(model, n=n)
    assert not equal_states(expected, state(model))
    for name, tensor in stepped(model, parts, n=n).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-12)


def test_one_v_for_all_is_another_step_than_a_v_for_each():
    """So the test above has something to tell apart."""
    model = convolutional(batch_norm=False)
    apart, (x, y) = copy.deepcopy(model), batch()
    optimizer = sgd(apart)
    accumulated_step(model, x, y, 2, BALL, sgd(model), scaler(), None)
    for rows in torch.arange(8).chunk(2):
        loss = partial(AT().outer, apart, x[rows], x[rows], y[rows])
        with perturbed(apart, loss, BALL):
            (loss() / 2).backward()
    optimizer.step()
    assert (model[0].weight - apart[0].weight).abs().max() > 1e-6


@pytest.mark.parametrize("exponent", [-20, 1, 16, 40])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_scale_of_a_power_of_two_changes_no_bit(exponent, dtype):
    model = convolutional().float()
    assert equal_states(stepped(model, 2, 2.0**exponent, dtype=dtype), stepped(model, 2, None, dtype=dtype))


def test_without_a_scale_fp16_loses_gradients_that_the_scale_keeps():
    """Of a network whose gradients are below fp16's smallest number, 6e-8, an unscaled ascent sees nothing."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.Linear(4, 3, bias=False))
    nn.init.normal_(model[2].weight, std=1e-7)
    found = {}
    for scale in (None, 2.0**14):
        trial, scaling = copy.deepcopy(model), scaler(scale)
        seen, (x, y) = [], batch()
        trial[1].register_forward_pre_hook(lambda layer, _, seen=seen: seen.append(layer.weight.detach().clone()))
        accumulated_step(trial, x.float(), y, 2, BALL, sgd(trial), scaling, torch.float16)
        at_w, inside = seen[0], seen[-1]
        found[scale] = ((inside - at_w).norm() / at_w.norm()).item()
    assert found[None] == 0
    assert found[2.0**14] == pytest.approx(0.05, rel=1e-5)


def test_in_fp16_the_attack_moves_what_it_moves_in_bf16():
    """Of a network that is sure of itself: p - y is 6e-9. Scaled, 65536 in all, it is seen; a batch's sum, scaled,
    would overflow for images that are wrong.
    """
    model, (x, _) = convolutional(batch_norm=False).float(), batch()
    with torch.no_grad():
        model[6].bias[0] = 19.0
    for y in (torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.int64)):
        for dtype in (torch.bfloat16, torch.float16):
            x_adv = attacked(model, x.float(), y, scaler(2.0**16), dtype)
            assert saturated(x_adv, x) > 0.5


def saturated(x_adv, x):
    """The share of pixels that an attack has moved to the edge of its ball or of the box: a start alone moves none."""
    away = (x_adv - x).abs() > 0.15 - 1e-6
    return (away | (x_adv == 0) | (x_adv == 1)).float().mean()


def test_an_overflow_leaves_w_alone_and_training_goes_on():
    """In fp16 a scale of 2**24 is above the largest number; it is halved until a step is taken."""
    model, (x, y) = convolutional().float(), batch()
    optimizer, scaling = sgd(model), scaler(2.0**24)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    skipped = 0
    for _ in range(30):
        before = scaling.get_scale() if scaling._scale is not None else 2.0**24
        accumulated_step(model, x.float(), y, 2, BALL, optimizer, scaling, torch.float16)
        if scaling.get_scale() == before:
            break
        skipped += 1
        assert scaling.get_scale() == before / 2
        assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    assert 0 < skipped < 30
    assert not any(torch.equal(weights[name], p) for name, p in model.named_parameters() if p.ndim > 1)
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_example_trains():
    trained = train(epochs=1)
    assert not equal_states(state(trained), state(train(epochs=0)))
    assert all(tensor.isfinite().all() for tensor in state(trained).values())
    assert all(parameter.dtype == torch.float32 for parameter in trained.parameters())
