"""Adversarial logit pairing against its oracle, and what it is where one of its terms is gone."""

import pytest
import torch
from networks import batch, convolutional
from oracles.neighbours import alp
from torch import nn

from saltflat import AT, PGD, Linf
from saltflat.neighbours.logit_pairing import ALP
from saltflat.objectives import ce


class Logits(nn.Module):
    def forward(self, z):
        return z


def logits(n=7, classes=4, scale=2.0):
    return scale * torch.randn(n, classes, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.0, 0.5, 30.0])
@pytest.mark.parametrize("scale", [0.1, 2.0, 10.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_values_and_gradients_are_the_oracle_s(beta, scale, classes):
    """The gradient flows through the clean logits, too."""
    z, attacked = (logits(7, classes, scale).requires_grad_() for _ in range(2))
    y = torch.arange(7) % classes
    each, expected = ALP(beta).each(Logits(), z, attacked, y), alp(z, attacked, y, beta)
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ALP(beta).outer(Logits(), z, attacked, y), expected.mean(), rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(ALP(beta).outer(Logits(), z, attacked, y), (z, attacked))
    for found, theirs in zip(ours, torch.autograd.grad(expected.mean(), (z, attacked)), strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-11, atol=1e-13)


def test_the_weights_gradient_of_a_network_is_the_oracle_s():
    model, (x, y) = convolutional().eval(), batch()
    x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(ALP(0.7).outer(model, x, x_adv, y), parameters)
    theirs = torch.autograd.grad(alp(model(x), model(x_adv), y, 0.7).mean(), parameters)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_on_equal_images_it_is_cross_entropy_whatever_beta():
    z, y = logits(), torch.arange(7) % 4
    torch.testing.assert_close(ALP(9.0).each(Logits(), z, z, y), ce(z, y), rtol=1e-14, atol=0)


def test_a_shift_of_all_logits_changes_the_pairing_alone():
    z, attacked, y = logits(), logits(), torch.arange(7) % 4
    rise = ALP(0.5).each(Logits(), z, z + 3, y) - ALP(0.5).each(Logits(), z, z, y)
    torch.testing.assert_close(rise, torch.full((7,), 0.5 * 9.0, dtype=torch.float64), rtol=1e-12, atol=0)
    doubled = ALP(1.0).each(Logits(), z, attacked, y) - ALP(0.5).each(Logits(), z, attacked, y)
    torch.testing.assert_close(doubled, 0.5 * (z - attacked).square().mean(1), rtol=1e-11, atol=1e-12)


def test_its_attack_is_adversarial_training_s():
    model, (x, y) = convolutional().eval(), batch()
    attack = PGD(Linf(0.1), 0.05, 3)
    found = [
        attack(objective.inner(model, x, y), x, generator=torch.Generator().manual_seed(0))
        for objective in (ALP(), AT())
    ]
    assert torch.equal(*found)


def test_half_precision_is_raised_before_logits_are_subtracted():
    z, attacked = (logits().bfloat16() for _ in range(2))
    y = torch.arange(7) % 4
    value = ALP(0.5).each(Logits(), z, attacked, y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, alp(z.double(), attacked.double(), y, 0.5).float(), rtol=1e-5, atol=1e-5)
