"""Arguments that mean nothing to a neighbour are refused, each in one line."""

import math

import pytest
import torch
from against_oracles import identical, weights
from family import ATTACK, bits, sgd
from networks import batch, convolutional
from torch import nn

from saltflat import (
    AT,
    Box,
    Global,
    Layerwise,
    Natural,
    double_perturbation_step,
)
from saltflat.neighbours.adaptive_random_wp import (
    adaptive_random_wp,
)
from saltflat.neighbours.free import free_step
from saltflat.neighbours.kaggle import along_momentum, fast_awp, kaggle_awp
from saltflat.neighbours.random_wp import Gaussian, drawn, random_wp, two_batch_step
from saltflat.neighbours.robust_wp import accumulated, robust_wp
from saltflat.neighbours.sharpness_aware import asam, sam
from saltflat.objectives import ce


def test_what_a_climb_does_not_have_is_refused_in_one_line():
    model, x, y = nn.Linear(3, 2), torch.rand(4, 3), torch.arange(4) % 2
    loss, each = (lambda: ce(model(x), y).mean()), (lambda: ce(model(x), y))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    start, before = {"weight": torch.ones(2, 3)}, bits(weights(model))
    frozen = nn.Linear(3, 2).requires_grad_(False)
    nothing, never = nn.Linear(3, 2), (lambda name, p: False)
    one = {"objective": AT(), "attack": None, "optimizer": optimizer}
    for make, words in (
        (lambda: robust_wp(model, each, c=math.nan), "c: expected a number, got nan"),
        (lambda: robust_wp(model, each, -1.0), "radius: expected a finite number >= 0, got -1.0"),
        (lambda: robust_wp(model, each, steps=0), "steps: expected an integer >= 1, got 0"),
        (lambda: robust_wp(model, loss), r"losses: expected one per example, \(N,\), got shape \(\)"),
        (lambda: robust_wp(model, lambda: model(x)), r"losses: expected one per example, \(N,\), got shape \(4, 2\)"),
        (lambda: robust_wp(model, each, where=never), "where: chose none of the model's 2 parameters"),
        (lambda: robust_wp(model, lambda: ce(nothing(x), y)), "loss: reaches none of the 1 weights"),
        (lambda: accumulated(model, loss, Global(0.1), step_size=0.1), "step_size: gradients are added as they are"),
        (lambda: accumulated(model, loss, Global(0.1), start=start), "start: the sum of gradients begins at 0"),
        (lambda: random_wp(model, -0.1, None), "radius: expected a finite number >= 0, got -0.1"),
        (lambda: random_wp(model, math.nan, None), "radius: expected a finite number >= 0, got nan"),
        (lambda: random_wp(model, 0.1, None, where=never), "where: chose none"),
        (lambda: random_wp(frozen, 0.1, None), "where: chose none of the model's 2 parameters"),
        (lambda: drawn(model, None, Gaussian(0.1), steps=2), "steps: a draw has none, expected 1, got 2"),
        (lambda: drawn(model, None, Gaussian(0.1), step_size=0.1), "step_size: a draw has none, expected None"),
        (
            lambda: drawn(model, None, Gaussian(0.1), start=start),
            r"start: a draw begins at w \(no alternations\), expected none",
        ),
        (lambda: adaptive_random_wp(model, 0.1, None, memory={}, eta=-1.0), "eta: expected a .*number >= 0, got -1.0"),
        (lambda: adaptive_random_wp(model, 0.1, None, memory={}, eta=math.nan), "eta: expected a .*number >= 0"),
        (lambda: adaptive_random_wp(model, 0.1, None, memory={}, beta=1.1), r"beta: expected a number in \[0, 1\]"),
        (lambda: adaptive_random_wp(model, 0.1, None, memory={}, where=never), "where: chose none"),
        (lambda: sam(model, loss, -1.0), "radius: expected a finite number >= 0, got -1.0"),
        (lambda: sam(frozen, loss), "where: chose none of the model's 2 parameters"),
        (lambda: sam(model, lambda: nothing(x).sum()), "loss: reaches none of the 2 weights"),
        (lambda: asam(model, loss, offset=-1.0), "offset: expected a finite number >= 0, got -1.0"),
        (lambda: kaggle_awp(model, loss, eps=-1.0), "radius: expected a finite number >= 0, got -1.0"),
        (lambda: kaggle_awp(model, {}), "loss: reaches none of the 1 weights"),
        (lambda: fast_awp(model, optimizer, where=never), "where: chose none"),
        (lambda: fast_awp(frozen, optimizer), "where: chose none"),
    ):
        with pytest.raises(ValueError, match=words) as caught, make():
            pass
        assert "\n" not in str(caught.value)
    for call, words in (
        (lambda: two_batch_step(model, x, y, ball=None, share=1.5, **one), r"share: expected a number in \[0, 1\]"),
        (lambda: double_perturbation_step(model, x, y, ball=None, share=-0.1, **one), r"share: expected a number in"),
        (
            lambda: double_perturbation_step(model, x, y, ball=Layerwise(0.1), share=0.5, step_inside=True, **one),
            "share: expected 1 with step_inside",
        ),
        (
            lambda: free_step(model, x, y, ball=None, memory={}, replays=0, **one | {"attack": ATTACK}),
            "replays: expected an integer >= 1, got 0",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert identical(bits(weights(model)), before)


def test_one_step_along_the_momentum_before_the_first_step_of_the_optimiser_as_after_it():
    model, x = nn.Linear(3, 2), torch.rand(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        with (
            pytest.raises(ValueError, match="steps"),
            along_momentum(model, None, Box(0.1), optimizer=optimizer, steps=2),
        ):
            pass
        model(x).sum().backward()
        optimizer.step()


def test_free_at_refuses_a_loss_that_never_looks_at_the_attack():
    model, (x, y) = convolutional(), batch()
    with pytest.raises(ValueError, match=r"^(objective|loss|attack): "):
        free_step(
            model, x, y, objective=Natural(), attack=ATTACK, ball=None, optimizer=sgd(model), memory={}, replays=1
        )


@pytest.mark.parametrize("how", ["two batches", "no adversary"])
def test_a_model_without_anything_to_train_is_refused_in_one_line(how):
    model, (x, y) = convolutional().requires_grad_(False), batch()
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    call = two_batch_step if how == "two batches" else double_perturbation_step
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call(model, x, y, objective=AT(), attack=None, ball=None, optimizer=optimizer)
    assert "\n" not in str(caught.value)
