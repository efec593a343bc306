import copy
import itertools

import pytest
import torch
from networks import batch, convolutional, equal_states, state
from oracles.proxy_awp import at_loss, proxy_step, trades_loss
from torch import nn

from saltflat import AT, PGD, TRADES, Layerwise, Linf, Natural, double_perturbation_step

ATTACK = PGD(Linf(8 / 255), 2 / 255, 4)


def attacked(model, objective, x, y, start):
    """With a generator of its own: TRADES' divergence has no gradient at x itself."""
    generator = torch.Generator().manual_seed(7)
    return ATTACK(objective.inner(model, x, y), x, start=start, generator=generator)


class Recording:
    """An objective that notes the weights at which its outer loss is asked for."""

    def __init__(self, objective):
        self.objective, self.seen = objective, []

    def inner(self, model, x, y):
        return self.objective.inner(model, x, y)

    def outer(self, model, x, x_adv, y):
        self.seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return self.objective.outer(model, x, x_adv, y)


def optimizer_of(model, weight_decay):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=weight_decay)


@pytest.mark.parametrize(
    ("objective", "loss"), [(AT(), at_loss), (TRADES(6.0), trades_loss(6.0))], ids=["AT", "TRADES"]
)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("alternations", [1, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
@pytest.mark.parametrize("inside", [False, True])
def test_agrees_with_the_proxy_model(objective, loss, steps, alternations, weight_decay, inside):
    """v, w + v, the gradients there, and the weights after each of three steps, to 1e-10."""
    ours = convolutional().train()
    theirs = copy.deepcopy(ours)
    optimizers = optimizer_of(ours, weight_decay), optimizer_of(theirs, weight_decay)
    x, y = batch()
    same = {"rtol": 1e-10, "atol": 1e-10}
    for _ in range(3):
        recording, before = Recording(objective), {name: p.detach().clone() for name, p in ours.named_parameters()}
        step = double_perturbation_step(
            ours, x, y, objective=recording, attack=ATTACK, ball=Layerwise(5e-3), optimizer=optimizers[0],
            steps=steps, alternations=alternations, step_inside=inside, generator=torch.Generator().manual_seed(7),
        )  # fmt: skip
        expected = proxy_step(
            theirs, optimizers[1], x, y, loss=loss, gamma=5e-3, steps=steps, alternations=alternations, inside=inside,
            attack_at=lambda proxy, start: attacked(proxy, objective, x, y, start),
        )  # fmt: skip
        at = recording.seen[-1]  # the last outer loss is the one at w + v
        for name, v in expected["v"].items():
            torch.testing.assert_close(at[name] - before[name], v, **same)
            torch.testing.assert_close(at[name], expected["perturbed"][name], **same)
        for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            torch.testing.assert_close(one.grad, expected["gradient"][name], **same)
            torch.testing.assert_close(one, other, **same)
        torch.testing.assert_close(step.x_adv, expected["x_adv"], **same)
        assert step.loss.item() == pytest.approx(expected["loss"], rel=1e-10)
        assert step.perturbed_loss.item() == pytest.approx(expected["perturbed_loss"], rel=1e-10)
        for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            if isinstance(objective, AT):
                torch.testing.assert_close(one, other, **same)
            other.copy_(one)  # TRADES' two forwards run in another order there, which running statistics see


@pytest.mark.parametrize(
    ("objective", "ball", "forwards"),
    [
        (AT(), Layerwise(5e-3), 12),
        (AT(), None, 11),
        (TRADES(), Layerwise(5e-3), 15),
        (TRADES(), None, 13),
        (Natural(), None, 11),
    ],
    ids=["AT-AWP", "AT", "TRADES-AWP", "TRADES", "Natural"],
)
def test_forwards_are_counted_at_the_convolutions(objective, ball, forwards):
    model, (x, y) = convolutional().train(), batch()
    counts = {name: 0 for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}

    def count(name):
        counts[name] += 1

    for name in counts:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: count(name))
    gradients = []
    model[0].weight.register_hook(gradients.append)
    attack = PGD(Linf(8 / 255), 2 / 255, 10)
    double_perturbation_step(
        model, x, y, objective=objective, attack=attack, ball=ball, optimizer=optimizer_of(model, 0)
    )
    assert set(counts.values()) == {forwards}
    assert len(gradients) == (1 if ball is None else 2)  # none of them in the attack


@pytest.mark.parametrize("attack_mode", ["eval", "train"])
def test_attack_mode_decides_who_feeds_the_running_statistics(attack_mode):
    model, (x, y) = convolutional().train(), batch()
    model[4].eval()  # a mode of its own comes back
    double_perturbation_step(
        model, x, y, objective=AT(), attack=ATTACK, ball=Layerwise(5e-3), optimizer=optimizer_of(model, 0),
        attack_mode=attack_mode,
    )  # fmt: skip
    assert model[1].num_batches_tracked == (1 if attack_mode == "eval" else 1 + ATTACK.steps)
    assert [module.training for module in model] == [True, True, True, True, False, True, True]


def test_weights_only_leaves_x_alone_whatever_x_is():
    class Dictionary(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x["features"])

    model, x = Dictionary(), {"features": torch.rand(4, 3)}
    step = double_perturbation_step(
        model,
        x,
        torch.arange(4) % 2,
        objective=Natural(),
        attack=None,
        ball=Layerwise(0.1),
        optimizer=optimizer_of(model, 0),
    )
    assert step.x_adv is x
    assert step.perturbed_loss > step.loss


@pytest.mark.parametrize("ball", [None, Layerwise(0.0)])
def test_no_ball_and_radius_zero_are_plain_adversarial_training(ball):
    model, (x, y) = convolutional().train(), batch()
    other = copy.deepcopy(model)
    optimizer = optimizer_of(other, 5e-4)
    generator = torch.Generator().manual_seed(7)
    double_perturbation_step(
        model, x, y, objective=AT(), attack=ATTACK, ball=ball, optimizer=optimizer_of(model, 5e-4), generator=generator
    )
    other.eval()
    x_adv = attacked(other, AT(), x, y, None)
    other.train()
    AT().outer(other, x, x_adv, y).backward()
    optimizer.step()
    assert equal_states(state(model), state(other))


def test_equal_seeds_give_equal_steps():
    finished = []
    for _ in range(2):
        torch.manual_seed(3)
        model, (x, y) = convolutional().float().train(), batch()
        generator = torch.Generator().manual_seed(4)
        optimizer = optimizer_of(model, 5e-4)
        for _ in range(3):
            double_perturbation_step(
                model, x.float(), y, objective=AT(), attack=PGD(Linf(0.1), 0.05, 3), ball=Layerwise(0.01),
                optimizer=optimizer, generator=generator,
            )  # fmt: skip
        finished.append(state(model))
    assert equal_states(*finished)


def test_a_user_s_own_objective_needs_two_functions_only():
    class Squared:
        def inner(self, model, x, y):
            return lambda x_adv: model(x_adv).square().sum(1)

        def outer(self, model, x, x_adv, y):
            return model(x_adv).square().mean()

    model, (x, y) = convolutional().train(), batch()
    step = double_perturbation_step(
        model, x, y, objective=Squared(), attack=ATTACK, ball=Layerwise(0.01), optimizer=optimizer_of(model, 0)
    )
    assert step.perturbed_loss > step.loss


def test_refuses_what_has_no_meaning():
    model, (x, y) = convolutional(), batch()
    arguments = {"objective": AT(), "attack": ATTACK, "optimizer": optimizer_of(model, 0)}
    with pytest.raises(ValueError, match="mode: expected 'eval' or 'train', got 'evil'"):
        double_perturbation_step(model, x, y, ball=None, attack_mode="evil", **arguments)
    for ball, alternations in itertools.product([Layerwise(0.1), None], [0, 2]):
        if ball is not None and alternations == 2:
            continue
        with pytest.raises(ValueError, match="alternations"):
            double_perturbation_step(model, x, y, ball=ball, alternations=alternations, **arguments)
