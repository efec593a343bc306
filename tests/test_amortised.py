"""The amortised ascent against an oracle that was written from its formula alone, against AWP where the two are one,
and counted, convolution by convolution.
"""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from against_oracles import close, generator, grads, identical, weights
from family import Poisoned, bits, everything, sgd
from memory import Memory
from networks import batch, convolutional, equal_states
from oracles import neighbours as oracles
from torch import distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

from saltflat import AT, L2, MART, PGD, TRADES, Global, Layerwise, Linf, double_perturbation_step, gradient
from saltflat.inputs import gaussian, uniform, zero
from saltflat.neighbours.amortised import alignment, amortised_step, overall
from saltflat.objectives import ce, kl
from saltflat.step import itself
from saltflat.weights import default, trained

OBJECTIVES = [AT(), TRADES(6.0), MART(5.0)]
ATTACK = PGD(Linf(0.1), 0.04, 4, gaussian(0.01))
BALL = Layerwise(0.05)


def stepped(model, x, y, *, step=amortised_step, **given):
    settings = {"objective": AT(), "attack": ATTACK, "ball": BALL, "optimizer": sgd(model), "generator": generator()}
    return step(model, x, y, **settings | given)


def inner(model, objective, x, y):
    """(w, x') -> the sum of the inner loss, from probabilities; the clean ones are constants."""
    if not isinstance(objective, TRADES):
        return lambda w, at: oracles.cross_entropies(model, at, y)(w).sum()

    def probabilities(w, at):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return torch.func.functional_call(model, {**buffers, **w}, (at,)).softmax(1)

    p = probabilities({}, x).detach()
    return lambda w, at: (p * (p.log() - probabilities(w, at).log())).sum()


class Watched(AT):
    """What the weights and their .grad are when the descent's loss is asked for."""

    def outer(self, model, x, x_adv, y):
        object.__setattr__(self, "inside", weights(model))
        object.__setattr__(self, "grads", [p.grad for p in model.parameters()])
        return super().outer(model, x, x_adv, y)


# The formula


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("attack_mode", ["eval", "train"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_a_step_is_the_oracle_s(objective, attack_mode, steps):
    """x_adv, v, the gradient at w + v, and w - lr g."""
    model, (x, y) = convolutional().train(), batch()
    w, attack = weights(model), replace(ATTACK, steps=steps)
    attacked, moved = copy.deepcopy(model).train(attack_mode == "train"), copy.deepcopy(model)
    step = stepped(
        model, x, y, objective=objective, attack=attack, attack_mode=attack_mode,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )  # fmt: skip
    start = attack.start(attack.ball, x, generator())
    x_adv, v = oracles.amortised_awp(
        inner(attacked, objective, x, y), weights(attacked, default), x, start, eps=0.1, step_size=0.04, steps=steps,
        gamma=0.05,
    )  # fmt: skip
    torch.testing.assert_close(step.x_adv, x_adv, rtol=1e-12, atol=1e-15)
    with torch.no_grad():
        for name, part in v.items():
            moved.get_parameter(name).add_(part)
    value = objective.outer(moved, x, x_adv, y)
    value.backward()
    close(grads(model), grads(moved), atol=1e-13)
    close(weights(model), {name: w[name] - 0.1 * g for name, g in grads(moved).items()}, atol=1e-14)
    torch.testing.assert_close(step.perturbed_loss, value.detach(), rtol=1e-12, atol=0)
    assert torch.equal(step.loss, step.perturbed_loss)  # that at w is nowhere asked for
    assert (step.skipped, step.dropped) == (0, 0)


@pytest.mark.parametrize("frozen", [False, True], ids=["batch statistics", "a frozen norm"])
@pytest.mark.parametrize("attack_mode", ["eval", "train"])
def test_in_joint_mode_outer_the_last_step_and_v_are_those_of_the_mode_that_the_model_is_trained_in(
    attack_mode, frozen
):
    model, (x, y) = convolutional().train(), batch()
    if frozen:
        model[1].eval()
    attacked, trained_in, exact = (copy.deepcopy(model) for _ in range(3))
    attacked.train(attack_mode == "train")
    modes, watched = [module.training for module in model.modules()], Watched()
    step = stepped(model, x, y, objective=watched, attack_mode=attack_mode, joint_mode="outer")
    before = replace(ATTACK, steps=ATTACK.steps - 1)(AT().inner(attacked, x, y), x, generator=generator())
    trained_in[1].load_state_dict(attacked[1].state_dict())  # a frozen norm sees what the attack in train mode fed
    leaf = before.clone().requires_grad_()
    g_x, *g_w = torch.autograd.grad(AT().inner(trained_in, x, y)(leaf).sum(), [leaf, *weights_in_order(trained_in)])
    x_adv = x + ATTACK.ahead(g_x, before - x, x)
    close({"x": step.x_adv}, {"x": x_adv}, atol=1e-15)
    for (name, p), g in zip(chosen(trained_in), g_w, strict=True):
        v = watched.inside[name] - p.detach()
        close({name: v}, {name: 0.05 * p.detach().norm() * g / g.norm()}, atol=1e-13)
    assert [module.training for module in model.modules()] == modes
    stepped(exact, x, y, step=double_perturbation_step, attack_mode=attack_mode)
    if attack_mode == "eval":  # the descent's forward is the one that running statistics see, in both
        assert model[1].num_batches_tracked == exact[1].num_batches_tracked == 1 - frozen


@pytest.mark.parametrize("attack_on", [itself, lambda model: copy.deepcopy(model)], ids=["itself", "another"])
def test_in_joint_mode_outer_trades_s_clean_logits_are_of_that_mode_too(attack_on):
    model, (x, y) = convolutional().train(), batch()
    twin, objective, attack = copy.deepcopy(model), TRADES(6.0), replace(ATTACK, steps=1)
    found = alignment(
        model, x, y, objective=objective, attack=attack, joint_mode="outer", attack_on=attack_on, generator=generator()
    )
    start = x + ATTACK.start(ATTACK.ball, x, generator())
    leaf = start.clone().requires_grad_()
    g_x, *g_w = torch.autograd.grad(objective.inner(twin, x, y)(leaf).sum(), [leaf, *weights_in_order(twin)])
    h = gradient(model, lambda: objective.outer(model, x, x + attack.ahead(g_x, start - x, x), y))
    for (name, _), g in zip(chosen(twin), g_w, strict=True):
        expected = (g * h[name]).sum() / (g.norm() * h[name].norm())
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def chosen(model):
    return [(name, p) for name, p in model.named_parameters() if default(name, p)]


def weights_in_order(model):
    return [p for _, p in chosen(model)]


def test_an_unknown_joint_mode_is_refused():
    with pytest.raises(ValueError, match="joint_mode: expected 'attack' or 'outer', got 'eval'"):
        stepped(convolutional(), *batch(), joint_mode="eval")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.5), L2(0.5, box=None)], ids=repr)
@pytest.mark.parametrize("start", [zero, uniform, gaussian(0.01)], ids=["zero", "uniform", "gaussian"])
@pytest.mark.parametrize("steps", [1, 4])
def test_x_adv_is_the_attack_s_own_to_the_bit_and_so_are_its_draws(steps, start, ball, dtype):
    model, (x, y) = convolutional().to(dtype).eval(), batch()
    attack, draws, others, x = PGD(ball, 0.04, steps, start), generator(), generator(), x.to(dtype)
    expected = attack(AT().inner(model, x, y), x, generator=others)
    assert torch.equal(stepped(model, x, y, attack=attack, generator=draws).x_adv, expected)
    assert torch.equal(draws.get_state(), others.get_state())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_the_direction_is_that_of_the_inner_loss_one_iterate_before(objective):
    """TRADES' is the KL term's without cross-entropy, MART's that of cross-entropy; neither is the outer loss's."""
    model, (x, y) = convolutional().eval(), batch()
    before = replace(ATTACK, steps=3)(objective.inner(model, x, y), x, generator=generator())
    x_adv = ATTACK(objective.inner(model, x, y), x, generator=generator())
    clean = model(x).detach()
    terms = {TRADES(6.0): lambda: kl(clean, model(before)).mean()}
    term = terms.get(objective, lambda: ce(model(before), y).mean())
    g, h = gradient(model, term), gradient(model, lambda: objective.outer(model, x, x_adv, y))
    found = alignment(model, x, y, objective=objective, attack=ATTACK, generator=generator())
    assert found.keys() == g.keys() == h.keys()
    for name, cosine in found.items():
        expected = (g[name] * h[name]).sum() / (g[name].norm() * h[name].norm())
        torch.testing.assert_close(cosine, expected, rtol=1e-10, atol=1e-12)
        assert cosine < 1 - 1e-6


# Where it is AWP itself


def linear(classes=2):
    return nn.Sequential(nn.Flatten(), nn.Linear(108, classes)).double()


@pytest.mark.parametrize("where", [None, trained], ids=["default", "trained"])
@pytest.mark.parametrize("ball", [Layerwise(0.1), Global(0.1)], ids=repr)
@pytest.mark.parametrize("step_inside", [False, True])
@pytest.mark.parametrize("steps", [2, 5])
def test_a_linear_model_s_step_is_awp_s_as_soon_as_x_stands_in_its_corner(steps, step_inside, ball, where):
    """Of two classes, sign grad f is the same everywhere, so that one step of eps reaches x_adv, where the inner and
    the outer loss of AT have one gradient. Several steps, with momentum and weight decay.
    """
    ends = []
    for step in (amortised_step, double_perturbation_step):
        torch.manual_seed(0)
        model, attack = linear(), PGD(Linf(0.1), 0.1, steps, zero)
        optimizer = sgd(model)
        for _ in range(3):
            x, y = batch()
            found = stepped(
                model, x, y % 2, step=step, attack=attack, ball=ball, optimizer=optimizer, where=where,
                step_inside=step_inside,
            )  # fmt: skip
        ends.append(everything(model, optimizer) | {"x_adv": found.x_adv, "loss": found.perturbed_loss})
    close(*ends, atol=1e-13)


def test_there_the_cosine_is_one_and_before_it_is_not():
    model, (x, y) = linear(), batch()
    corner, on_its_way = PGD(Linf(0.1), 0.1, 3, zero), PGD(Linf(0.1), 0.02, 3, zero)
    there = alignment(model, x, y % 2, objective=AT(), attack=corner)
    assert there["1.weight"].item() == pytest.approx(1, abs=1e-12)
    assert alignment(model, x, y % 2, objective=AT(), attack=on_its_way)["1.weight"] < 1 - 1e-6


@pytest.mark.parametrize("ball", [None, Layerwise(0.0)])
def test_without_a_ball_it_is_plain_adversarial_training_to_the_bit(ball):
    ends = []
    for step, given in ((amortised_step, ball), (double_perturbation_step, None)):
        torch.manual_seed(0)
        model, (x, y) = convolutional().train(), batch()
        optimizer = sgd(model)
        for attack in (ATTACK, None, lambda f, x, **given: x + 0.01):  # whatever the attack is
            found = stepped(model, x, y, step=step, ball=given, optimizer=optimizer, attack=attack, attack_mode="train")
        ends.append(bits(everything(model, optimizer) | {"loss": found.loss}))
    assert equal_states(*ends)


# Costs


class Convolutions(TorchDispatchMode):
    """A block in which the convolutions are counted: `forwards`, and backwards for `inputs` and for `weights`."""

    def __init__(self):
        super().__init__()
        self.forwards = self.inputs = self.weights = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.convolution.default:
            self.forwards += 1
        if operation is torch.ops.aten.convolution_backward.default:
            to_input, to_weight, _ = args[-1]
            self.inputs, self.weights = self.inputs + to_input, self.weights + to_weight
        return operation(*args, **(kwargs or {}))


def counted(model, x, y, **given):
    """Forwards, input gradients of the first layer, weight gradients of a step of a network of two convolutions."""
    with Convolutions() as found:
        stepped(model, x, y, attack=replace(ATTACK, steps=10), **given)
    # every backward that reaches a weight of the second layer has passed the second's input; the first's only attacks'
    return found.forwards / 2, found.inputs, found.weights / 2


@pytest.mark.parametrize("attack_mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("objective", "plain", "amortised", "exact"),
    [
        (AT(), (11, 1), (11, 2), (12, 2)),
        (TRADES(6.0), (13, 2), (13, 3), (15, 4)),  # the clean logits of the attack, and two batches in each outer loss
        (MART(5.0), (12, 2), (12, 3), (14, 4)),
    ],
    ids=["AT", "TRADES", "MART"],
)
def test_no_forward_and_one_weight_gradient_more_than_without_awp(objective, plain, amortised, exact, attack_mode):
    model, (x, y) = convolutional().train(), batch()
    given = {"objective": objective, "attack_mode": attack_mode}
    for settings, expected in (
        ({"ball": None}, plain),
        ({}, amortised),
        ({"step": double_perturbation_step}, exact),
    ):
        forwards, _, gradients = counted(model, x, y, **given | settings)
        assert (forwards, gradients) == expected
    before, after = counted(model, x, y, **given | {"ball": None}), counted(model, x, y, **given)
    assert after[1] == before[1]  # input gradients


def test_no_more_memory_than_awp_needs():
    """In units of the large weight: while the descent's graph is alive, only the copy to be given back."""
    peaks = {}
    for step in (amortised_step, double_perturbation_step):
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 300), nn.ReLU(), nn.Linear(300, 3)).double()
        x, y = batch(2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        held = []

        class Weighed(AT):
            def outer(self, *arguments, held=held):
                held.append(memory.held())
                return super().outer(*arguments)

        with Memory(108 * 300) as memory:
            stepped(model, x, y, step=step, objective=Weighed(), optimizer=optimizer)
        peaks[step] = held[-1], memory.peak
    assert peaks[amortised_step][0] == peaks[double_perturbation_step][0] == 1
    assert peaks[amortised_step][1] <= peaks[double_perturbation_step][1]


# Another network to climb on


@pytest.mark.parametrize(("objective", "forwards"), [(AT(), (3, 2)), (TRADES(6.0), (4, 4))], ids=["AT", "TRADES"])
def test_the_first_steps_climb_on_what_they_are_given_and_the_last_on_the_model(objective, forwards):
    """An equal copy leads to equal bits. TRADES asks both for clean logits."""
    modes, asked, ends = [], [], []

    def copied(model):
        modes.append(model.training)
        twin = copy.deepcopy(model)
        return lambda x: (asked.append(len(x)), twin(x))[1]

    for given in ({}, {"attack_on": copied}):
        torch.manual_seed(0)
        model, (x, y) = convolutional().train(), batch()
        optimizer = sgd(model)
        with Convolutions() as counted:
            stepped(model, x, y, objective=objective, optimizer=optimizer, **given)
        ends.append(bits(everything(model, optimizer)))
    assert equal_states(*ends)
    assert modes == [False]
    assert (len(asked), counted.forwards / 2 - len(asked)) == forwards


def test_one_attack_step_does_not_ask_the_other_network():
    model, (x, y) = convolutional().eval(), batch()
    attack = replace(ATTACK, steps=1)

    def broken(model):
        def ask(x):
            raise AssertionError

        return ask

    expected = stepped(copy.deepcopy(model), x, y, attack=attack)
    assert torch.equal(stepped(model, x, y, attack=attack, attack_on=broken).x_adv, expected.x_adv)


# What is left behind


@pytest.mark.parametrize(("attack_mode", "forwards"), [("eval", 1), ("train", 5)])
def test_buffers_see_the_descent_and_the_attack_in_train_mode_and_modes_come_back(attack_mode, forwards):
    model, (x, y) = convolutional().train(), batch()
    model[4].eval()
    stepped(model, x, y, attack_mode=attack_mode)
    assert model[1].num_batches_tracked == forwards
    assert [module.training for module in model] == [True, True, True, True, False, True, True]


def test_the_joint_gradient_leaves_no_grad_and_v_has_the_ball_s_size():
    model, (x, y) = convolutional().train(), batch()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    w, objective = weights(model), Watched()
    stepped(model, x, y, objective=objective)
    assert objective.grads == [None] * len(w)
    for name, part in w.items():
        v = objective.inside[name] - part
        assert v.norm().item() == pytest.approx(0.05 * part.norm().item() if part.ndim > 1 else 0, rel=1e-12, abs=0)


@pytest.mark.parametrize("attack_mode", ["eval", "train"])
def test_measuring_the_alignment_leaves_everything_as_it_was(attack_mode):
    model, (x, y) = convolutional().train(), batch()
    model[4].eval()
    ce(model(x), y).mean().backward()
    before, modes = bits(model.state_dict()), [module.training for module in model.modules()]
    kept = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    with torch.no_grad():
        found = alignment(model, x, y, objective=AT(), attack=ATTACK, attack_mode=attack_mode)
    assert found.keys() == weights(model, default).keys()
    assert equal_states(bits(model.state_dict()), before)
    assert [module.training for module in model.modules()] == modes
    for name, p in model.named_parameters():
        assert p.grad is kept[name][0]
        assert torch.equal(p.grad, kept[name][1])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_overall_is_the_cosine_between_the_two_displacements(objective):
    """AWP's v and the amortised one, as the oracles have them; BatchNorm in eval mode for one and in train for the
    other.
    """
    model, (x, y) = convolutional().train(), batch()
    attacked, w = copy.deepcopy(model).eval(), weights(model, default)
    start = ATTACK.start(ATTACK.ball, x, generator())
    x_adv, v = oracles.amortised_awp(
        inner(attacked, objective, x, y), w, x, start, eps=0.1, step_size=0.04, steps=4, gamma=0.05
    )
    exact = gradient(model, lambda: objective.outer(model, x, x_adv, y))
    u = oracles.momentum_awp(exact, w, 0.05)
    cosines = alignment(model, x, y, objective=objective, attack=ATTACK, generator=generator())
    product = sum((u[name] * v[name]).sum() for name in w)
    expected = product / (oracles.global_norm(u) * oracles.global_norm(v))
    torch.testing.assert_close(overall(model, cosines), expected, rtol=1e-10, atol=1e-12)


def test_cosines_are_those_of_the_chosen_weights_that_both_losses_reach_on_whatever_network_is_climbed():
    class Longer(AT):
        """Its inner loss reaches a layer that its outer loss does not."""

        def inner(self, model, x, y):
            return lambda x_adv: ce(model(x_adv), y) + (model.extra.weight.sum() if hasattr(model, "extra") else 0)

    model, (x, y) = convolutional().eval(), batch()
    names = {name for name, p in model.named_parameters()}
    model.extra = nn.Linear(2, 2).double()
    model.forward = lambda x: nn.Sequential.forward(model[:7], x)
    given = {"objective": Longer(), "attack": ATTACK, "where": trained}
    found = alignment(model, x, y, **given, generator=generator())
    assert found.keys() == names
    assert all(-1 - 1e-12 <= cosine <= 1 + 1e-12 for cosine in found.values())
    asked = []

    def wrapped(model):
        return lambda x: (asked.append(len(x)), model(x))[1]

    again = alignment(model, x, y, **given, attack_on=wrapped, generator=generator())
    assert len(asked) == 3
    assert identical(found, again)


@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_cosines_do_not_depend_on_the_size_of_the_gradients(scale):
    """In fp32, where the squares of these are 0 or infinite."""

    class Scaled(AT):
        def inner(self, model, x, y):
            return lambda x_adv: scale * ce(model(x_adv), y)

        def outer(self, *arguments):
            return scale * super().outer(*arguments)

    model, (x, y) = convolutional().float().eval(), batch()
    one, other = (
        alignment(model, x.float(), y, objective=objective, attack=ATTACK, generator=generator())
        for objective in (AT(), Scaled())
    )
    for name, cosine in one.items():
        torch.testing.assert_close(other[name], cosine, rtol=0, atol=1e-4)


# Gradients that are not what they should be


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_whose_gradient_is_not_finite_stays_where_it_is_and_is_counted(bad):
    model, (x, y) = convolutional().train(), batch()
    w = weights(model)

    class Spoilt(Watched):
        def inner(self, model, x, y):
            spoil = torch.zeros_like(model[3].weight).copy_(model[3].weight)
            spoil.register_hook(lambda g: torch.full_like(g, bad))
            return lambda x_adv: ce(model(x_adv), y) + 0 * spoil.sum()

    objective = Spoilt()
    step = stepped(model, x, y, objective=objective)
    assert (step.skipped, step.dropped) == (1, 0)
    moved = {name for name in w if not torch.equal(objective.inside[name], w[name])}
    assert moved == {"0.weight", "6.weight"}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_batch_that_is_not_finite_is_dropped(backward):
    """Momentum and weight decay go on; buffers forget it."""
    model, (x, y) = Poisoned(convolutional(), backward).train(), batch()
    optimizer, x = sgd(model), x.clamp(0, 0.25)
    stepped(model, x, y, optimizer=optimizer)
    twin, bad = copy.deepcopy(model), x.clone()
    theirs, bad[0, :, 0, 0] = sgd(twin), 0.75
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert stepped(model, bad, y, optimizer=optimizer, attack_mode="train").dropped == 1
    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    theirs.step()
    assert equal_states(bits(everything(model, optimizer)), bits(everything(twin, theirs)))


class Branching(nn.Module):
    """A frozen layer, one that the loss does not reach, and an embedding that may give sparse gradients."""

    def __init__(self, sparse):
        super().__init__()
        self.embed, self.stem = nn.Embedding(6, 4, sparse=sparse), nn.Linear(108, 4)
        self.frozen, self.unused, self.head = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.frozen(self.stem(x.flatten(1)) + self.embed(torch.tensor([1, 2])).mean(0)).tanh())


def test_frozen_and_unreached_weights_stay_and_sparse_gradients_are_gradients():
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model, (x, y), objective = Branching(sparse).double(), batch(), Watched()
        w = weights(model, lambda name, parameter: True)
        step = stepped(
            model, x, y, objective=objective, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            where=lambda name, parameter: parameter.ndim > 1,  # the frozen one, too
        )  # fmt: skip
        assert (step.skipped, step.dropped) == (0, 0)
        moved = {name for name, part in objective.inside.items() if not torch.equal(part, w[name])}
        assert moved == {"embed.weight", "stem.weight", "head.weight"}
        ends.append(weights(model))
    close(*ends)


# What is refused


def test_an_attack_without_a_last_step_is_refused():
    model, (x, y) = convolutional(), batch()
    for attack in (None, lambda f, x, **given: x):
        with pytest.raises(ValueError, match=r"^attack: expected PGD, whose last step is taken here, got "):
            stepped(model, x, y, attack=attack)
        with pytest.raises(ValueError, match=r"^attack: expected PGD"):
            alignment(model, x, y, objective=AT(), attack=attack)


def test_what_the_ascent_cannot_have_is_no_argument():
    for name, value in (("steps", 2), ("alternations", 2), ("share", 0.5), ("climb", None), ("climbed", None)):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            stepped(convolutional(), *batch(), **{name: value})


def test_inner_losses_that_do_not_look_at_the_inputs_or_at_the_weights_are_refused():
    model, (x, y) = convolutional().eval(), batch()

    class Blind(AT):
        def inner(self, model, x, y):
            return lambda x_adv: ce(model(x), y)

    class Weightless(AT):
        def inner(self, model, x, y):
            return lambda x_adv: x_adv.flatten(1).sum(1)

    before = bits(model.state_dict())
    with pytest.raises(ValueError, match=r"^objective: expected an inner loss that looks at x'"):
        stepped(model, x, y, objective=Blind(), attack=replace(ATTACK, steps=1))
    with pytest.raises(ValueError, match=r"^loss: reaches none of the 3 weights that are perturbed$"):
        stepped(model, x, y, objective=Weightless())
    assert equal_states(bits(model.state_dict()), before)


def test_batches_that_the_attack_refuses_are_refused():
    model, (x, y) = convolutional().eval(), batch()
    for attack in (ATTACK, replace(ATTACK, steps=1)):
        with pytest.raises(ValueError, match="x: expected numbers in the ball's box"):
            stepped(model, 255 * x, y, attack=attack)
        with pytest.raises(ValueError, match="x: expected floating point numbers"):
            stepped(model, x.long(), y, attack=attack)


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_models_whose_gradients_lie_on_several_ranks_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_module

    x, y = torch.rand(4, 6), torch.arange(4) % 3
    mesh = init_device_mesh("cpu", (1,))
    models = {
        "DistributedDataParallel": nn.parallel.DistributedDataParallel(nn.Linear(6, 3)),
        "FSDPLinear": fully_shard(nn.Linear(6, 3), mesh=mesh),
        "DTensor": distribute_module(nn.Linear(6, 3), mesh),
    }
    for name, model in models.items():
        for whole in (model, nn.Sequential(model)):
            with pytest.raises(ValueError, match=rf"^model: expected gradients .*, got {name}$"):
                stepped(whole, x, y)
            with pytest.raises(ValueError, match=rf"^model: expected gradients .*, got {name}$"):
                alignment(whole, x, y, objective=AT(), attack=ATTACK)


@pytest.mark.slow
def test_nothing_distributed_is_imported_to_look():
    script = """
import sys, torch
from saltflat import AT, PGD, Linf
from saltflat.neighbours.amortised import alignment
model = torch.nn.Linear(4, 2)
alignment(model, torch.rand(8, 4), torch.arange(8) % 2, objective=AT(), attack=PGD(Linf(0.1), 0.1, 2))
sys.exit("torch.distributed.tensor" in sys.modules or "torch.distributed.fsdp" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
