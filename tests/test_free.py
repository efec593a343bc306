"""Free adversarial training against an oracle that was written from its formula alone, and against a naive loop."""

import copy

import pytest
import torch
from against_oracles import close, weights
from family import ATTACK, everything, sgd
from networks import batch, convolutional
from oracles import neighbours as oracles
from torch import nn

from saltflat import (
    AT,
    PGD,
    TRADES,
    Layerwise,
    Linf,
)
from saltflat.inputs import zero
from saltflat.neighbours.free import NAME, free_step
from saltflat.weights import default


def free_losses(model, y):
    def loss(w, x):
        return oracles.mean_of(oracles.cross_entropies(model, x, y))(w)

    return loss


@pytest.mark.parametrize("step_size", [0.1, 0.03])
@pytest.mark.parametrize("replays", [1, 4])
def test_free_at_is_the_oracle_s_over_batches_of_other_sizes(step_size, replays):
    """The last batch is smaller; the one after it takes up the other rows' displacements where they were left."""
    model = convolutional(batch_norm=False)
    optimizer, memory = torch.optim.SGD(model.parameters(), lr=0.1), {}
    attack = PGD(Linf(step_size), step_size, 9)
    w, delta = weights(model), torch.zeros(8, 3, 6, 6, dtype=torch.float64)
    for n in (8, 8, 5, 8):
        x, y = batch(n)
        step = free_step(
            model, x, y, objective=AT(), attack=attack, ball=None, optimizer=optimizer, memory=memory, replays=replays
        )
        w, d = oracles.free_at(free_losses(model, y), w, x, delta[:n], eps=step_size, lr=0.1, replays=replays)
        delta = torch.cat([d, delta[n:]])
        close(weights(model), w)
        torch.testing.assert_close(memory[NAME], delta, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(step.x_adv, x + d, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", [AT(), TRADES(6.0)], ids=repr)
def test_free_at_with_awp_is_a_naive_loop(objective):
    """Smaller steps than the ball's radius, BatchNorm in train mode, momentum and weight decay."""
    model = convolutional().train()
    other = copy.deepcopy(model)
    d = 0.1 * torch.rand(6, 3, 6, 6, dtype=torch.float64) - 0.05  # at 0, TRADES' divergence has no gradient
    optimizers, memory = (sgd(model), sgd(other)), {NAME: d}
    for _ in range(2):
        x, y = batch(6)
        step = free_step(
            model, x, y, objective=objective, attack=PGD(Linf(0.1), 0.04, 1), ball=Layerwise(0.05), replays=3,
            optimizer=optimizers[0], memory=memory,
        )  # fmt: skip
        d = (x + d.clamp(-0.1, 0.1)).clamp(0, 1) - x
        for _ in range(3):
            x_adv, w = (x + d).detach(), weights(other, default)
            buffers = {name: b.clone() for name, b in other.named_buffers()}
            g = torch.autograd.grad(objective.outer(other, x, x_adv, y), [other.get_parameter(n) for n in w])
            with torch.no_grad():
                for name, b in other.named_buffers():
                    b.copy_(buffers[name])
                for name, part in zip(w, g, strict=True):
                    other.get_parameter(name).add_(0.05 * w[name].norm() * part / part.norm())
            x_adv.requires_grad_()
            other.zero_grad()
            value = objective.outer(other, x, x_adv, y)
            value.backward()
            with torch.no_grad():
                for name, part in w.items():
                    other.get_parameter(name).copy_(part)
            optimizers[1].step()
            d = (x + (x_adv.detach() - x + 0.04 * x_adv.grad.sign()).clamp(-0.1, 0.1)).clamp(0, 1) - x
        close(everything(model, optimizers[0]), everything(other, optimizers[1]), atol=1e-13)
        torch.testing.assert_close(memory[NAME], d, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(step.perturbed_loss, value.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("ball", "passes"), [(None, 4), (Layerwise(0.05), 8)])
def test_one_backward_gives_the_gradients_for_weights_and_inputs(ball, passes):
    model, (x, y) = convolutional().train(), batch()
    counts = {"forwards": 0, "backwards": 0, "weights": 0}

    def count(what):
        counts[what] += 1

    model[3].register_forward_hook(lambda *_: count("forwards"))
    model[3].register_full_backward_hook(lambda *_: count("backwards"))
    model[3].weight.register_hook(lambda g: count("weights"))
    free_step(model, x, y, objective=AT(), attack=ATTACK, ball=ball, optimizer=sgd(model), memory={}, replays=4)
    assert set(counts.values()) == {passes}


def test_free_at_s_memory_grows_with_the_batch_and_begins_anew_with_another_shape():
    model, memory = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).double(), {}
    attack = PGD(Linf(0.1), 0.1, 1, start=zero)
    for n in (3, 6):
        x, y = batch(n)
        if n == 3:
            model(x)
        free_step(model, x, y, objective=AT(), attack=attack, ball=None, optimizer=sgd(model), memory=memory, replays=1)
        assert memory[NAME].shape == x.shape
        assert memory[NAME].abs().amax() <= 0.1 + 1e-12
    other = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    x, y = torch.rand(2, 4, dtype=torch.float64), torch.tensor([0, 1])
    free_step(other, x, y, objective=AT(), attack=attack, ball=None, optimizer=sgd(other), memory=memory, replays=1)
    assert memory[NAME].shape == x.shape
