import copy
import itertools
import math

import pytest
import torch
from launches import Launches
from networks import batch, convolutional, equal_states, state
from oracles.proxy_awp import at_loss, proxy_step, trades_loss
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from saltflat import AT, PGD, TRADES, Layerwise, Linf, Natural, double_perturbation_step
from saltflat.balls import bits
from saltflat.step import dropping, undoing

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


class Noting:
    """Gives a copy of the model to climb on, and notes what the model was like."""

    def __init__(self):
        self.asked, self.forwards = [], 0

    def __call__(self, model):
        self.asked.append((model.training, {name: p.detach().clone() for name, p in model.named_parameters()}))
        other = copy.deepcopy(model)
        other._forward_hooks.clear()  # those of the model

        def count(*_):
            self.forwards += 1

        other.register_forward_hook(count)
        return other


@pytest.mark.parametrize("attack_mode", ["eval", "train"])
@pytest.mark.parametrize("alternations", [1, 2])
def test_attacks_climb_on_what_is_made_of_the_model_as_it_stands(attack_mode, alternations):
    ours, (x, y) = convolutional().train(), batch()
    theirs, twin, recording, forwards = copy.deepcopy(ours), Noting(), Recording(AT()), []
    ours.register_forward_hook(lambda *_: forwards.append(1))
    steps = [
        double_perturbation_step(
            model, x, y, objective=objective, attack=ATTACK, ball=Layerwise(0.05), optimizer=optimizer_of(model, 0),
            attack_mode=attack_mode, alternations=alternations, generator=torch.Generator().manual_seed(7), **more,
        )
        for model, objective, more in ((ours, recording, {"attack_on": twin}), (theirs, AT(), {}))
    ]  # fmt: skip
    assert twin.forwards == alternations * ATTACK.steps
    assert len(forwards) == alternations + 1  # and none of the attack
    assert torch.equal(steps[0].x_adv, steps[1].x_adv)
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert [training for training, _ in twin.asked] == alternations * [attack_mode == "train"]
    for (_, weights), stood in zip(twin.asked, recording.seen, strict=False):  # w, and then w + v
        assert equal_states(weights, stood)
    assert alternations == 1 or not torch.equal(twin.asked[0][1]["0.weight"], twin.asked[1][1]["0.weight"])


class Several(nn.Module):
    """Gradients and buffers of several types, one of them sparse and one without numbers, and two that overlap."""

    def __init__(self):
        super().__init__()
        self.words, self.wide, self.narrow = nn.Embedding(6, 4, sparse=True), nn.Linear(4, 3).double(), nn.Linear(3, 2)
        self.narrow.bfloat16()
        self.turn, self.nothing = nn.Parameter(torch.randn(3, dtype=torch.complex128)), nn.Parameter(torch.zeros(0, 3))
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("whole", torch.tensor([1.0, -0.0, 3.0]))
        self.register_buffer("part", self.whole[1:])
        self.register_buffer("cache", torch.zeros(1))

    def forward(self, ids, poison):
        self.flag.logical_not_()
        self.whole.mul_(poison)
        self.cache = torch.cat([self.cache, self.cache])
        turned = (self.wide(self.norm(self.words(ids) * poison).double()) * self.turn).real
        return self.narrow(turned.bfloat16()).float().sum() + self.nothing.sum()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 0.0, 1.0])
def test_gradients_and_buffers_of_every_type_are_dropped_or_left_to_the_bit(poison):
    torch.manual_seed(0)
    model, ids = Several(), torch.tensor([1, 2, 2])
    before = state(model)
    drop = dropping(model, torch.optim.SGD(model.parameters()))
    model(ids, poison).backward()
    after, gradients = state(model), {name: p.grad.clone() for name, p in model.named_parameters()}
    bad = drop()
    assert bad == (not math.isfinite(poison))
    for name, parameter in model.named_parameters():
        found, was = parameter.grad.to_dense(), gradients[name].to_dense()
        assert not found.any() if bad else torch.equal(found, was), name
    expected = before if bad else after
    for name, buffer in model.named_buffers():
        expected_bits, found_bits = bits([after["cache"] if name == "cache" else expected[name], buffer])
        assert torch.equal(found_bits, expected_bits), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_a_buffer_that_becomes_one_of_another_type_is_put_back_in_that(dtype):
    model = nn.Linear(1, 1)
    model.register_buffer("sum", torch.tensor([3.0, -7.0]))
    undo = undoing(model)
    model.sum = torch.tensor([1, 2], dtype=dtype)
    undo(torch.tensor(False))
    assert torch.equal(model.sum, torch.tensor([1, 2], dtype=dtype))
    for _ in range(2):
        undo(torch.tensor(True))
        assert torch.equal(model.sum, torch.tensor([3, -7], dtype=dtype))
        model.sum.add_(1)


@pytest.mark.parametrize("poison", [1.0, torch.nan])
@pytest.mark.parametrize("inside", [False, True])
def test_what_torch_has_yet_to_conjugate_or_to_negate_takes_part_in_a_step(poison, inside):
    class Lazily(nn.Module):
        """A parameter, its gradient and buffers with torch's bits for that, which a forward also turns on or off."""

        def __init__(self):
            super().__init__()
            self.turn = nn.Parameter(torch.tensor([[1 + 2j, 3 - 4j]]).conj())
            self.register_buffer("conjugated", torch.tensor([1 + 2j, 3 - 4j]).conj())
            self.register_buffer("negated", torch.tensor([1 + 2j, 3 - 4j]).conj().imag)
            self.register_buffer("other", torch.tensor([1 + 2j, 3 - 4j]))

        def forward(self, x):
            self.other = (self.other * x.sum()).conj()
            self.conjugated.mul_(x.sum())
            self.negated.add_(x.sum())
            return (x * self.turn).abs().sum(1)

    def step(model):
        model.turn.grad = torch.zeros(1, 2, dtype=torch.complex64).conj()  # is cleared; `.backward()` makes another
        found = double_perturbation_step(
            model, torch.tensor([[2.0, 1.0]]) * poison, torch.zeros(1), attack=None, ball=Layerwise(0.1),
            objective=Plain(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), step_inside=inside,
        )  # fmt: skip
        return found.dropped

    class Plain:
        def outer(self, model, x, x_adv, y):
            return model(x_adv).mean()

    lazily, plainly = Lazily(), Lazily()
    plainly.turn = nn.Parameter(plainly.turn.detach().resolve_conj())
    for name in ("conjugated", "negated"):
        setattr(plainly, name, getattr(plainly, name).resolve_conj().resolve_neg())
    assert lazily.turn.is_conj()
    assert lazily.negated.is_neg()
    before = {name: tensor.clone() for name, tensor in lazily.state_dict().items()}
    assert step(lazily) == step(plainly) == (poison != 1)
    for (name, one), other in zip(lazily.state_dict().items(), plainly.state_dict().values(), strict=True):
        torch.testing.assert_close(one.resolve_conj().resolve_neg(), other.resolve_conj().resolve_neg())
        assert poison == 1 or torch.equal(one, before[name])
        assert poison != 1 or not torch.equal(one, before[name])


def test_dropping_launches_no_more_for_a_deeper_network():
    def launches(depth):
        with torch.device("meta"):
            model = nn.Sequential(*[nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)) for _ in range(depth)])
        optimizer = torch.optim.SGD(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        with Launches() as found:
            dropping(model, optimizer)()
        return found.counts

    few, many = launches(2), launches(20)
    assert many == few
    assert sum(few.values()) < 30


def test_a_step_without_any_gradient_drops_nothing():
    model = nn.Linear(2, 2)
    assert dropping(model, torch.optim.SGD(model.parameters()))() == 0


@pytest.fixture
def mesh():
    """Of this one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("poison", [1.0, torch.nan])
@pytest.mark.parametrize("inside", [False, True])
def test_sharded_weights_take_the_step_of_whole_ones(mesh, poison, inside):
    torch.manual_seed(0)
    whole = convolutional().train()
    sharded, (x, y), found = copy.deepcopy(whole), batch(), []
    fully_shard(sharded, mesh=mesh)
    for model in (whole, sharded):
        step = double_perturbation_step(
            model, x * poison, y, objective=AT(), attack=None, ball=Layerwise(0.05),
            optimizer=optimizer_of(model, 5e-4), step_inside=inside,
        )  # fmt: skip
        found.append((model.state_dict(), int(step.dropped), int(step.skipped), step.perturbed_loss.item()))
    assert found[0][1:3] == found[1][1:3] == ((0, 0) if poison == 1 else (1, 3))
    assert poison != 1 or found[0][3] == pytest.approx(found[1][3], rel=1e-12)
    for name, tensor in found[1][0].items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        torch.testing.assert_close(tensor, found[0][0][name], rtol=1e-12, atol=1e-15)
