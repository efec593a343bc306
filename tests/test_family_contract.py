"""One contract over AWP and every neighbour: what comes back, what a step costs, what a batch that is not finite leaves
behind, and that a training which was interrupted ends with equal bits.
"""

import copy
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from family import (
    ATTACK,
    COSTS,
    DRAWN,
    MEMBERS,
    OBJECTIVES,
    REPLAYS,
    Poisoned,
    ball,
    bits,
    configured,
    everything,
    sgd,
    taking,
)
from networks import batch, convolutional, equal_states, state
from torch import nn

from saltflat import PGD, Layerwise, Linf, double_perturbation_step, perturbed
from saltflat.data import digits, mixup, smoothed, stratified_subset
from saltflat.lab import adversaries, config, trainings
from saltflat.models import small_resnet
from saltflat.neighbours.adaptive_random_wp import adaptive_random_wp
from saltflat.neighbours.kaggle import fast_awp, kaggle_awp
from saltflat.neighbours.random_wp import random_wp
from saltflat.neighbours.robust_wp import robust_wp
from saltflat.neighbours.sharpness_aware import asam, sam
from saltflat.neighbours.weighted import all_but_last
from saltflat.objectives import AT, ce
from saltflat.random import seeded
from saltflat.schedules import constant
from saltflat.train import Epoch, Plan, Stepped, fit

FREE = ("free-at", "free-at-awp")
PAIRS = [
    (name, objective) for name in MEMBERS for objective in OBJECTIVES if (name in FREE, objective) != (True, "natural")
]


def test_the_members_are_all_that_a_config_can_name():
    assert {member.awp.method for member in MEMBERS.values()} == set(get_args(config.Adversary))
    assert COSTS.keys() - {"at"} == MEMBERS.keys()


class Odd(nn.Module):
    """A tied weight, a frozen layer, one that the loss does not reach, an embedding, and a norm layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.stem = nn.Embedding(6, 4), nn.Linear(108, 4)
        self.frozen, self.norm = nn.Linear(4, 4).requires_grad_(False), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        h = self.stem(x.flatten(1)) + self.embed(torch.tensor([1, 2])).mean(0)
        return self.head(self.norm(self.frozen(h.tanh())))


def poisoned(backward=False):
    """A network, and batches: `False` finite, `True` poison."""
    torch.manual_seed(0)
    model = Poisoned(convolutional(), backward).train()

    def batches(bad, seed=0):
        x = torch.rand(8, 3, 6, 6, dtype=torch.float64, generator=seeded(seed))
        x[:, :, 0, 0] = 0.25
        x[0, :, 0, 0] = 0.75 if bad else 0.25
        return x, torch.arange(8) % 3

    return model, batches


# A step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_a_step_changes_the_weights_under_every_objective(name, objective, dtype):
    """And nothing becomes infinite; a few small steps on one batch lower the loss there."""
    model, (x, y) = convolutional(batch_norm=False).to(dtype).train(), batch()
    x, memory, losses = x.to(dtype), {}, []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5 if name == "fast-awp" else 0.0)
    take = taking(name, model, optimizer, memory, objective=objective)
    before = bits(model.state_dict())
    for i in range(3):
        step = take(x, y)
        losses.append(step.loss.item())
        assert step.loss.isfinite()
        assert step.perturbed_loss.isfinite()
        assert step.dropped == 0
        assert all(p.isfinite().all() and p.dtype == dtype for p in model.parameters())
        if i == 0:
            after = bits(model.state_dict())
            assert all(not torch.equal(after[key], before[key]) for key in before)
    assert all(tensor.isfinite().all() for tensor in memory.values())
    if name not in (*DRAWN, "asam"):  # which do not look for the nearby loss, or look far away
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", MEMBERS)
def test_the_weights_of_the_step_are_perturbed_unless_there_is_no_adversary(name):
    """The loss that is descended is that of other weights: gamma 0 ends elsewhere."""
    ends = []
    for gamma in (MEMBERS[name].awp.gamma, 0.0):
        torch.manual_seed(0)
        model, (x, y) = convolutional().train(), batch()
        optimizer = sgd(model)
        take = taking(name, model, optimizer, {}, gamma=gamma)
        take(x, y), take(x, y)  # fast AWP's first step has no momentum
        ends.append(bits(everything(model, optimizer)))
    assert equal_states(*ends) == (name == "free-at")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MEMBERS)
def test_tied_frozen_and_unreached_tensors(name, dtype):
    model, (x, y) = Odd().to(dtype).train(), batch()
    before, memory = state(model), {}
    take = taking(name, model, sgd(model), memory)
    for _ in range(3):
        assert take(x.to(dtype), y).dropped == 0
    after = state(model)
    assert model.head.weight is model.embed.weight
    still = {"frozen.weight", "frozen.bias", "unused.weight", "unused.bias"}
    for key in before:
        assert after[key].isfinite().all()
        assert torch.equal(after[key], before[key]) == (key in still), key
    assert not any("frozen" in key or "unused" in key or "head" in key for key in memory)


@pytest.mark.parametrize("name", MEMBERS)
def test_equal_generators_give_equal_steps(name):
    ends = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model, (x, y) = convolutional().train(), batch()
        optimizer, memory = sgd(model), {}
        take = taking(name, model, optimizer, memory, seed=seed)
        torch.manual_seed(seed + len(ends))  # torch's global generator does not matter
        for _ in range(2):
            take(x, y)
        ends.append(bits(everything(model, optimizer) | memory))
    assert equal_states(ends[0], ends[1])
    assert equal_states(ends[0], ends[2]) == (name not in DRAWN)  # the attack starts at x


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("attack_mode", ["eval", "train"])
def test_modes_come_back(name, attack_mode):
    model, (x, y) = convolutional().train(), batch()
    model[4].eval()
    taking(name, model, sgd(model), {}, attack_mode=attack_mode)(x, y)
    assert [module.training for module in model] == [True, True, True, True, False, True, True]


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_objective_that_raises_leaves_the_weights_of_the_last_optimiser_step_to_the_bit(name, call):
    """In whichever of its calls: at w, during the climb, at w + v."""
    model, (x, y) = convolutional().train(), batch()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = -0.0
    optimizer, memory, calls, steps = sgd(model), {}, [], []
    kept = bits(dict(model.named_parameters()))
    taking(name, model, optimizer, memory)(x, y)  # so that there is momentum
    kept = bits(dict(model.named_parameters()))
    optimizer.register_step_post_hook(lambda *_: steps.append(bits(dict(model.named_parameters()))))

    class Raising(AT):
        def outer(self, *arguments):
            return self.each(*arguments).mean()

        def each(self, *arguments):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return super().each(*arguments)

    step = adversaries.step(configured(name), memory)
    more = {"optimizer": optimizer, "generator": torch.Generator(), "attack": ATTACK, "ball": ball(name)}
    try:
        step(model, x, y, objective=Raising(), **more)
    except KeyboardInterrupt:
        assert equal_states(bits(dict(model.named_parameters())), ([kept, *steps])[-1])
        assert all(module.training for module in model)
    else:
        assert len(calls) < call


# A block


def blocks():
    """{name: (model, loss per example) -> the context manager that a user would write}."""
    momentum = {}

    def fast(model, each):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        kept = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p, (grad, _) in zip(model.parameters(), kept, strict=True):
            p.grad = grad
        momentum["of"] = optimizer
        return fast_awp(model, optimizer, step_size=0.1, eps=0.1)

    def mean(each):
        return lambda: each().mean()

    draws = lambda: torch.Generator().manual_seed(1)
    return {
        "awp": lambda model, each: perturbed(model, mean(each), Layerwise(0.1)),
        "wt-awp": lambda model, each: perturbed(model, mean(each), Layerwise(0.1), where=all_but_last(model)),
        "robust-wp": lambda model, each: robust_wp(model, each, 0.1, c=5.0, steps=3),
        "random-wp": lambda model, each: random_wp(model, 0.1, draws()),
        "arwp": lambda model, each: adaptive_random_wp(model, 0.1, draws(), memory={}),
        "sam": lambda model, each: sam(model, mean(each), 0.5),
        "asam": lambda model, each: asam(model, mean(each), 0.5),
        "kaggle-awp": lambda model, each: kaggle_awp(model, mean(each), eps=0.1),
        "fast-awp": fast,
    }


def test_every_climb_is_looked_at():
    assert blocks().keys() == MEMBERS.keys() - {"m-rwp", *FREE}  # a two-batch step, and another loop


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", blocks())
def test_weights_come_back_to_the_bit_and_the_rest_is_not_touched(name, dtype):
    """On every way out; gradients that had been accumulated stay, tensors and contents."""
    model = convolutional().train().to(dtype, memory_format=torch.channels_last)
    x, y = batch()
    x = x.to(dtype)
    each = lambda: ce(model(x), y)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = -0.0
    each().mean().backward()
    model[4].eval()
    before, modes = bits(model.state_dict()), [module.training for module in model.modules()]
    grads = {key: (p.grad, p.grad.clone()) for key, p in model.named_parameters()}
    pointers = [p.data_ptr() for p in model.parameters()]
    for leave in range(20):
        try:
            with blocks()[name](model, each) as ascent:
                inside = bits(model.state_dict())
                assert any(not torch.equal(inside[key], before[key]) for key in before)
                assert all(torch.equal(inside[key], before[key]) for key, _ in model.named_buffers())
                assert [module.training for module in model.modules()] == modes
                assert all(v.isfinite().all() for v in ascent.displacement.values())
                if leave % 2:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert equal_states(bits(model.state_dict()), before)
    for key, p in model.named_parameters():
        assert p.grad is grads[key][0]
        assert torch.equal(p.grad, grads[key][1])
    assert [module.training for module in model.modules()] == modes
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize("name", sorted(blocks().keys() - {"random-wp", "arwp", "fast-awp"}))
def test_a_loss_that_raises_in_the_climb_leaves_no_trace(name):
    model, (x, y) = convolutional().train(), batch()
    before = bits(model.state_dict())

    def each():
        losses = ce(model(x), y)
        if not equal_states(bits(dict(model.named_parameters())), {k: before[k] for k, _ in model.named_parameters()}):
            raise KeyboardInterrupt  # RobustWP's second step
        if name != "robust-wp":
            raise KeyboardInterrupt
        return losses

    with pytest.raises(KeyboardInterrupt), blocks()[name](model, each):
        pass
    assert equal_states(bits(model.state_dict()), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", blocks())
def test_a_step_inside_the_block_is_refused(name):
    model, (x, y) = convolutional().train(), batch()
    before = bits(dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match="changed inside"):
        with blocks()[name](model, lambda: ce(model(x), y)):
            ce(model(x), y).mean().backward()
            sgd(model).step()
    perturbable = [key for key, p in model.named_parameters() if p.ndim > 1 and (name, key) != ("wt-awp", "6.weight")]
    after = bits(dict(model.named_parameters()))
    assert all(torch.equal(after[key], before[key]) for key in perturbable)


@pytest.mark.parametrize("name", blocks())
def test_float64_blocks_hold_what_the_climb_says(name):
    """w inside the block is the w before it plus the displacement, and the loss is one of displaced weights."""
    model, (x, y) = convolutional().eval(), batch()
    w = {key: p.detach().clone() for key, p in model.named_parameters()}
    with blocks()[name](model, lambda: ce(model(x), y)) as ascent:
        v, inside = ascent.displacement, {key: p.detach().clone() for key, p in model.named_parameters()}
    for key in w:
        torch.testing.assert_close(inside[key], w[key] + v.get(key, 0.0), rtol=1e-14, atol=1e-15)


# A batch that is not finite


@pytest.mark.parametrize("attack_mode", ["eval", "train"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_batch_that_is_not_finite_is_an_optimiser_step_with_a_gradient_of_zero(name, backward, attack_mode):
    """Momentum and weight decay alone; buffers to the bit; and the next batch trains as usual."""
    model, batches = poisoned(backward)
    optimizer, memory = sgd(model), {}
    take = taking(name, model, optimizer, memory, attack_mode=attack_mode)
    take(*batches(False))
    twin, buffers = copy.deepcopy(model), bits(dict(model.named_buffers()))
    theirs = sgd(twin)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step = take(*batches(True))
    assert (step.dropped > 0) if name in FREE else (step.dropped == 1)
    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(REPLAYS if name in FREE else 1):
        theirs.step()
    assert equal_states(bits(everything(model, optimizer)), bits(everything(twin, theirs)))
    assert equal_states(bits(dict(model.named_buffers())), buffers)
    assert all(not p.grad.any() for p in model.parameters())
    assert all(tensor.isfinite().all() for tensor in memory.values())
    after = bits(dict(model.named_parameters()))
    step = take(*batches(False, seed=1))
    assert step.dropped == 0
    assert step.loss.isfinite()
    assert all(tensor.isfinite().all() for tensor in [*model.state_dict().values(), *memory.values()])
    assert not any(torch.equal(after[key], part) for key, part in bits(dict(model.named_parameters())).items())
    assert not equal_states(bits(dict(model.named_buffers())), buffers)


@pytest.mark.parametrize("name", MEMBERS)
def test_images_that_are_not_finite_themselves_leave_nothing_behind(name):
    model, (x, y) = convolutional().train(), batch()
    optimizer, memory = sgd(model), {}
    take, bad = taking(name, model, optimizer, memory), x.clone()
    take(x, y)
    bad[0, 0, 2, 2] = torch.nan
    assert take(bad, y).dropped > 0
    assert take(x, y).dropped == 0
    assert all(tensor.isfinite().all() for tensor in [*everything(model, optimizer).values(), *memory.values()])


@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in (*FREE, "m-rwp", "wt-awp")])
def test_a_batch_is_dropped_with_the_step_inside_as_well(name):
    model, batches = poisoned()
    optimizer, memory = sgd(model), {}
    take = taking(name, model, optimizer, memory, step_inside=True)
    take(*batches(False))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    momentum = [s["momentum_buffer"].clone() for s in optimizer.state_dict()["state"].values()]
    assert take(*batches(True)).dropped == 1
    for (key, p), m in zip(model.named_parameters(), momentum, strict=True):
        # the decay acts on w + v, which draws and fast AWP have moved by up to 10 %; the rest is momentum's
        torch.testing.assert_close(p.detach(), before[key] - 0.05 * 0.9 * m, rtol=2e-4, atol=2e-4)
    assert all(tensor.isfinite().all() for tensor in [*model.state_dict().values(), *memory.values()])


# The costs


@pytest.mark.parametrize("name", COSTS)
def test_forwards_and_weight_gradients_are_those_of_the_table(name):
    """Counted at the convolutions, in batches; none of the attack's backwards computes a weight gradient."""
    model, (x, y) = convolutional().train(), batch()
    attack, convolution, rows, found = (
        PGD(Linf(8 / 255), 2 / 255, 10),
        model[3],
        [],
        {"forwards": 0.0, "gradients": 0.0},
    )

    def forward(module, inputs, output):
        rows.append(len(inputs[0]) / len(x))
        found["forwards"] += rows[-1]

    def gradient(g):
        found["gradients"] += rows[-1]

    optimizer, memory = sgd(model), {}
    if name == "at":
        take = taking("awp", model, optimizer, memory, attack=attack, gamma=0.0)
    else:
        take = taking(name, model, optimizer, memory, attack=attack)
    take(x, y)  # so that there is a momentum
    convolution.register_forward_hook(forward)
    convolution.weight.register_hook(gradient)
    take(x, y)
    assert (found["forwards"], found["gradients"]) == COSTS[name]


# What a config says, whatever the loop


@pytest.mark.parametrize("c", [1e-6, 1e6])
@pytest.mark.parametrize("loop", ["awp", "free-at"])
def test_robust_wp_looks_at_its_c_whatever_the_loop(loop, c):
    """Below a c of nearly 0 there is nobody: training without a weight adversary. Above all losses: with one."""
    ends = []
    for gamma in (0.1, 0.0):
        torch.manual_seed(0)
        model, (x, y) = convolutional().train(), batch()
        awp = replace(MEMBERS["robust-wp"].awp, gamma=gamma, c=c, steps=1)
        settings = replace(MEMBERS[loop], awp=awp)
        assert gamma == 0 or config.checked(settings) == settings  # a person who types that gets a line instead
        adversaries.step(settings, {})(
            model, x, y, objective=AT(), attack=ATTACK, ball=adversaries.ball(settings)(0.5), optimizer=sgd(model),
            generator=torch.Generator(),
        )  # fmt: skip
        ends.append(bits(model.state_dict()))
    assert equal_states(*ends) == (c < 1)


@pytest.mark.parametrize("name", ["awp", "sam", "asam"])
def test_a_step_size_counts_in_free_at_too_or_is_refused(name):
    """A step of half of gamma does not lead where one of gamma does."""
    ends = []
    for share in (0.0, 0.5):  # of gamma; 0 takes gamma itself
        torch.manual_seed(0)
        model, (x, y) = convolutional().train(), batch()
        awp = replace(MEMBERS[name].awp, gamma=0.1, step_size=0.1 * share)
        settings = replace(MEMBERS["free-at"], awp=awp)
        try:
            config.checked(settings)
        except config.BadInput:
            return
        adversaries.step(settings, {})(
            model, x, y, objective=AT(), attack=ATTACK, ball=adversaries.ball(settings)(0.5), optimizer=sgd(model),
            generator=torch.Generator(),
        )  # fmt: skip
        ends.append(bits(model.state_dict()))
    assert not equal_states(*ends)


def test_the_ball_grows_and_begins_when_the_config_says():
    settings = configured("arwp", warmup=6)
    course = adversaries.ball(settings)
    assert course(0.0999) is None  # 6 of 60 epochs
    assert course(0.5).radius == pytest.approx(0.001 * (1 + 10 * 0.5), rel=1e-12)
    assert course(1.0).radius == pytest.approx(0.011, rel=1e-12)
    assert ball("sam").radius == 0.05
    assert ball("free-at") is None


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_goes_through_its_warm_up_as_plain_training(name):
    """Before its beginning there is no ball: the step is that of the same config with gamma 0."""
    ends = []
    for gamma in (MEMBERS[name].awp.gamma, 0.0):
        torch.manual_seed(0)
        model, (x, y) = convolutional().train(), batch()
        settings, optimizer = configured(name, gamma=gamma, warmup=6), sgd(model)
        adversaries.step(settings, {})(
            model, x, y, objective=AT(), attack=ATTACK, ball=adversaries.ball(settings)(0.0), optimizer=optimizer,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        ends.append(bits(everything(model, optimizer)))
    assert equal_states(*ends)


# Whole trainings

PGD_2 = PGD(Linf(0.15), 0.1, 2)


@pytest.fixture(scope="module")
def data():
    read = digits()
    few = lambda images, n, seed=0: images.subset(stratified_subset(images.labels, n, seed))
    return few(read.train, 90), {"test": few(read.test, 20)}, few(read.test, 60, 1)


def network(seed=0):
    torch.manual_seed(seed)
    return small_resnet(in_channels=1, widths=(4, 4, 4), stem_stride=1)


def plan(name, **changes):
    settings, memory = MEMBERS[name], {}
    objective = AT()
    return replace(
        Plan(
            epochs=3, batch_size=40, learning_rate=constant(0.05), seed=3, measure=PGD_2, objective=lambda t: objective,
            attack=lambda t: PGD_2, ball=adversaries.ball(settings), step=adversaries.step(settings, memory),
            memory=memory,
        ),
        **changes,
    )  # fmt: skip


def mixed(x, y, generator):
    return mixup(x, smoothed(y, 10, 0.1), 1.0, generator)


def metrics(event):
    return {key: value for key, value in event.metrics.items() if "seconds" not in key}


TRAININGS = {
    **{name: (name, {}) for name in ("arwp", "free-at", "free-at-awp", "fast-awp", "m-rwp")},
    "swa": ("awp", {"swa_from": 0.5}),
    "swa from the first epoch": ("awp", {"swa_from": 0.3}),
    "mix": ("awp", {"mix": mixed}),
    "extra": ("awp", {"extra_share": 0.3}),
    "all": ("arwp", {"swa_from": 0.3, "mix": mixed, "extra_share": 0.5}),
}


@pytest.mark.parametrize(("name", "changes"), TRAININGS.values(), ids=TRAININGS)
@pytest.mark.parametrize("stopped", [1, 2])
def test_going_on_ends_with_equal_bits(data, tmp_path, name, changes, stopped):
    """The memory, SWA's average, the order of the extra examples, and what mixing draws."""
    train, measured, more = data
    extra = more if "extra_share" in changes else None
    model = nn.Sequential(network(), nn.Dropout(0.2))
    start, whole = copy.deepcopy(model), []
    torch.manual_seed(1)
    for event in fit(model, train, measured, plan(name, **changes), sgd(model), extra=extra):
        if isinstance(event, Epoch):
            whole.append(event)
            if event.epoch == stopped:
                torch.save(event.state, tmp_path / "state.pt")
    state_of = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.manual_seed(99)
    for event in fit(start, train, measured, plan(name, **changes), sgd(start), extra=extra, state=state_of):
        if isinstance(event, Epoch):
            assert metrics(event) == metrics(whole[event.epoch - 1])
    assert equal_states(bits(start.state_dict()), bits(model.state_dict()))
    assert equal_states(bits(event.model.state_dict()), bits(whole[-1].model.state_dict()))
    assert equal_states(bits(event.state["ranks"][0]["memory"]), bits(whole[-1].state["ranks"][0]["memory"]))
    assert bool(event.state["ranks"][0]["memory"]) == (name in ("arwp", *FREE))


@pytest.mark.parametrize("name", MEMBERS)
def test_a_last_batch_of_one_image_is_trained_on_or_refused_before_training_begins(tmp_path, name):
    """Never in the middle of an epoch."""
    settings = replace(
        MEMBERS[name],
        data=config.Data(examples=21, validation_examples=20),
        model=config.Model("mlp", width=8),  # without BatchNorm, which needs two
        optimizer=config.Optimizer(epochs=1, batch_size=20),
        evaluation=config.Evaluation(steps=1, examples=20),
    )
    try:
        trainings.train(config.checked(settings), tmp_path / "run")
    except config.BadInput:
        assert not (tmp_path / "run").exists()


def test_a_memory_is_emptied_when_a_training_begins(data):
    same = plan("free-at-awp", epochs=1)
    ends = []
    for _ in range(2):
        model = network()
        list(fit(model, data[0], {}, same, sgd(model)))
        ends.append(bits(model.state_dict()))
    assert equal_states(*ends)


def test_extra_examples_are_drawn_anew_in_every_step_and_fill_their_share(data):
    """20 images, 30 % of them extra ones: 14 of the training set, none twice in an epoch, and 6 with replacement."""
    train, _, more = data
    seen, settings = [], plan("awp", batch_size=20, extra_share=0.3)

    def step(model, x, y, **given):
        seen.append((x, y))
        return settings.step(model, x, y, **given)

    model = network()
    list(fit(model, train, {}, replace(settings, step=step), sgd(model), extra=more))

    def rows(images, labels):
        return [(*x.flatten().tolist(), y) for x, y in zip(images.float() / 255, labels.tolist(), strict=True)]

    own, others = set(rows(train.images, train.labels)), set(rows(more.images, more.labels))
    assert len(seen) == 3 * 5
    drawn = []
    for epoch in range(3):
        parts = seen[5 * epoch : 5 * epoch + 5]
        batches = [rows(255 * x, y) for x, y in parts]
        taken = [row for batch in batches for row in batch if row in own]
        assert len(set(taken)) == len(taken) == 5 * 14
        drawn += [tuple(row for row in batch if row not in own) for batch in batches]
    assert all(len(part) == 6 and set(part) <= others for part in drawn)
    assert len(set(drawn)) == 15
    mixed = [[row in own for row in rows(255 * x, y)] for x, y in seen]
    assert all(sorted(batch, reverse=True) != batch for batch in mixed)  # both halves have some of each


def test_swa_is_the_mean_of_the_weights_at_the_ends_of_epochs_with_statistics_of_its_own(data):
    train, measured, _ = data
    model, ends = network(), []
    for event in fit(model, train, measured, plan("awp", swa_from=0.5), sgd(model)):
        if isinstance(event, Epoch):
            ends.append({key: p.detach().double() for key, p in model.named_parameters()})
            assert (event.model is model) == (event.epoch == 1)
    for key, p in event.model.named_parameters():
        torch.testing.assert_close(p.detach().double(), (ends[1][key] + ends[2][key]) / 2, rtol=1e-5, atol=1e-7)
    twin, images = copy.deepcopy(event.model), train.images.float() / 255
    norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    twin.train()
    with torch.no_grad():
        for part in images.tensor_split(3):  # of 90, as many as there are batches of 40
            twin(part)
    for one, other in zip(event.model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(event.model.buffers(), model.buffers(), strict=True))


def bright(backward=False):
    """A small network with BatchNorm for the digits, for which a batch with a bright corner is poison."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)]
    return Poisoned(nn.Sequential(*layers), backward)


def with_bright_corners(images, number):
    """That many images, as far apart as can be in the order of the first epoch: in batches of their own."""
    pixels = images.images.clone()
    pixels[:, :, 0, 0] = 0
    order = torch.randperm(len(images), generator=seeded(3, 1, 0))
    pixels[order[torch.arange(number) * 18], :, 0, 0] = 255
    return replace(images, images=pixels)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_training_goes_on_without_the_batch_that_was_not_finite(data, name):
    """Five batches; of one, the numbers are NaN. It is counted once, and the losses are those of the other four."""
    train, measured, _ = data
    model, memory_plan, found = bright(), plan(name, epochs=1, batch_size=18), []
    for event in fit(model, with_bright_corners(train, 1), measured, memory_plan, sgd(model)):
        if isinstance(event, Stepped):
            found.append((event.loss.item(), event.perturbed_loss.item()))
    assert event.metrics["dropped"] == 1
    good = [losses for losses in found if all(map(math.isfinite, losses))]
    assert len(good) == 4
    assert event.metrics["loss"] == pytest.approx(sum(loss for loss, _ in good) / 4, rel=1e-6)
    assert event.metrics["perturbed_loss"] == pytest.approx(sum(loss for _, loss in good) / 4, rel=1e-6)
    assert all(tensor.isfinite().all() for tensor in [*model.state_dict().values(), *memory_plan.memory.values()])


@pytest.mark.parametrize("name", MEMBERS)
def test_a_training_ends_with_one_line_if_more_than_half_of_an_epoch_was_not_finite(data, name):
    train, measured, _ = data
    for number, refused in ((2, False), (3, True)):
        model = bright()
        events = fit(
            model, with_bright_corners(train, number), measured, plan(name, epochs=1, batch_size=18), sgd(model)
        )
        if refused:
            with pytest.raises(FloatingPointError, match="epoch 1: the gradient of 3 of 5 batches was not finite"):
                list(events)
        else:
            assert list(events)[-1].metrics["dropped"] == 2
        assert all(p.isfinite().all() for p in model.parameters())


def test_the_clean_forward_of_a_batch_that_was_dropped_leaves_the_statistics_finite(data):
    train, measured, _ = data
    model = bright()
    official = plan("awp", epochs=1, batch_size=18, clean_forward=True)
    done = list(fit(model, with_bright_corners(train, 1), measured, official, sgd(model)))
    assert done[-1].metrics["dropped"] == 1
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_a_step_of_a_model_with_an_empty_parameter_is_not_dropped():
    """A tensor without numbers has no largest gradient."""

    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.nothing = convolutional(), nn.Parameter(torch.zeros(0, dtype=torch.float64))

        def forward(self, x):
            return self.inner(x) + self.nothing.sum()

    model, (x, y) = Empty(), batch()
    step = double_perturbation_step(
        model, x, y, objective=AT(), attack=ATTACK, ball=Layerwise(0.01), optimizer=sgd(model)
    )
    assert step.dropped == 0
