"""The L1 penalty: its value and its gradient, and that nothing else changes."""

import pytest
import torch
from networks import batch, convolutional

from saltflat import AT, TRADES, Layerwise, double_perturbation_step
from saltflat.neighbours.l1 import L1


def test_the_loss_is_the_objective_s_plus_the_penalty_and_so_is_its_gradient():
    model, (x, y) = convolutional().eval(), batch()
    for objective in (AT(), TRADES(6.0)):
        plain, penalised = objective.outer(model, x, x, y), L1(objective, 0.25).outer(model, x, x, y)
        weights = [p for p in model.parameters() if p.ndim > 1]
        expected = 0.25 * sum(p.detach().abs().sum() for p in weights)
        torch.testing.assert_close(penalised - plain, expected, rtol=1e-12, atol=1e-12)
        parameters = list(model.parameters())
        with_it, without = (torch.autograd.grad(loss, parameters) for loss in (penalised, plain))
        for parameter, one, other in zip(parameters, with_it, without, strict=True):
            added = 0.25 * parameter.sign() if parameter.ndim > 1 else torch.zeros_like(parameter)
            torch.testing.assert_close(one - other, added.detach(), rtol=1e-10, atol=1e-12)


def test_the_attack_and_single_examples_do_not_know_of_it():
    model, (x, y) = convolutional().eval(), batch()
    assert torch.equal(L1(AT(), 9.0).inner(model, x, y)(x), AT().inner(model, x, y)(x))
    assert torch.equal(L1(AT(), 9.0).each(model, x, x, y), AT().each(model, x, x, y))


def test_the_weight_adversary_climbs_it_too():
    """With a penalty that drowns the loss, w + v is w + gamma ‖w‖ sign(w) / ‖sign(w)‖ for each weight."""
    model, (x, y) = convolutional().eval(), batch()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim > 1}
    seen = {}

    class Looking:
        inner = staticmethod(AT().inner)

        def outer(self, model, x, x_adv, y):
            seen.update({name: p.detach().clone() for name, p in model.named_parameters() if p.ndim > 1})
            return AT().outer(model, x, x_adv, y)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    double_perturbation_step(
        model, x, y, objective=L1(Looking(), 1e9), attack=None, ball=Layerwise(0.1), optimizer=optimizer
    )
    for name, w in before.items():
        expected = w + 0.1 * w.norm() * w.sign() / w.sign().norm()
        torch.testing.assert_close(seen[name], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weight", [-1, float("inf"), float("nan")])
def test_other_weights_are_refused(weight):
    with pytest.raises(ValueError, match=f"weight: expected a finite number, at least 0, got {weight}"):
        L1(AT(), weight)
