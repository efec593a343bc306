import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from networks import equal_states, state
from torch import nn

from examples.plain_loop import train as plain_loop
from saltflat import AT, PGD, TRADES, Layerwise, Linf, double_perturbation_step
from saltflat.averaging import ema
from saltflat.data import crop_flip, digits, stratified_subset
from saltflat.evaluation import outcomes
from saltflat.models import mlp, small_resnet
from saltflat.schedules import constant, from_progress, piecewise
from saltflat.train import Epoch, Measuring, Plan, Stepped, fit, gap, measure

ATTACK = PGD(Linf(0.15), 0.0375, 3)
PLAN = Plan(
    epochs=3, batch_size=50, learning_rate=piecewise(0.1, {0.5: 0.1}), seed=3, measure=ATTACK,
    objective=lambda t: AT(), attack=lambda t: ATTACK, ball=lambda t: Layerwise(0.01),
)  # fmt: skip


def small(images, n=120):
    return images.subset(stratified_subset(images.labels, n, 0))


@pytest.fixture(scope="module")
def data():
    read = digits()
    return small(read.train), {
        "train": small(read.train, 40),
        "validation": small(read.test, 30),
        "test": small(read.test, 50),
    }


def network(seed=0):
    torch.manual_seed(seed)
    return small_resnet(in_channels=1, widths=(4, 8, 16), stem_stride=1)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)


def events(model, data, plan=PLAN, **more):
    return list(fit(model, *data, plan, sgd(model), **more))


def without_times(metrics):
    return {key: value for key, value in metrics.items() if "seconds" not in key}


def test_the_plain_loop_ends_with_equal_bits():
    torch.manual_seed(0)
    model = small_resnet(in_channels=1, widths=(8, 16, 32), stem_stride=1)
    attack = PGD(Linf(0.15), 0.0375, 10)
    plan = replace(PLAN, epochs=2, batch_size=100, learning_rate=constant(0.1), attack=lambda t: attack, seed=0)
    list(fit(model, digits().train, {}, plan, sgd(model)))
    assert equal_states(state(model), state(plain_loop(epochs=2, batch_size=100, seed=0)))


@pytest.mark.parametrize("average", [None, 0.9])
def test_equal_seeds_end_with_equal_bits(data, average):
    ends = []
    for _ in range(2):
        model = network()
        found = events(model, data, replace(PLAN, average=average))
        ends.append((state(model), [without_times(e.metrics) for e in found if isinstance(e, Epoch)]))
    assert equal_states(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert not equal_states(ends[0][0], state(network()))


@pytest.mark.parametrize("average", [None, 0.9])
def test_going_on_ends_with_equal_bits(data, average, tmp_path):
    plan = replace(PLAN, average=average, augment=lambda x, g: crop_flip(x, padding=1, flip=False, generator=g))
    model = nn.Sequential(network(), nn.Dropout(0.5))  # dropout draws from torch's global generator
    start, whole = copy.deepcopy(model), []
    torch.manual_seed(1)
    for event in fit(model, *data, plan, sgd(model)):
        if isinstance(event, Epoch):
            whole.append(event)
            if event.epoch == 1:
                torch.save(event.state, tmp_path / "state.pt")
    for event in fit(start, *data, plan, sgd(start), state=torch.load(tmp_path / "state.pt", weights_only=True)):
        if isinstance(event, Epoch):
            assert without_times(event.metrics) == without_times(whole[event.epoch - 1].metrics)
            assert event.best == whole[event.epoch - 1].best
    assert equal_states(state(start), state(model))
    assert equal_states(state(event.model), state(whole[-1].model))


def test_events_come_in_a_straight_line(data):
    found = events(network(), data)
    kinds = [type(event) for event, before in zip(found, [None, *found], strict=False) if event != before]
    assert kinds == ([Stepped] * 3 + [Measuring, Epoch]) * 3
    assert [event.step for event in found if isinstance(event, Stepped)] == list(range(1, 10))
    assert {event.steps for event in found if isinstance(event, Stepped)} == {9}


def test_measurements_are_those_of_w_in_eval_mode_on_images_as_they_are(data):
    model = network()
    for event in fit(model, *data, PLAN, sgd(model)):
        if isinstance(event, Epoch):
            for name, images in data[1].items():
                found = event.metrics[name]
                clean = outcomes(copy.deepcopy(model), images, None)
                assert found["n"] == len(images)
                assert found["clean_accuracy"] == clean.accuracy
                assert found["clean_loss"] == pytest.approx(clean.mean_loss, rel=1e-6)
                assert found["robust_accuracy"] <= clean.accuracy
                assert found["robust_loss"] > clean.mean_loss
            robust = {name: event.metrics[name]["robust_accuracy"] for name in data[1]}
            assert event.metrics["gap"]["accuracy"] == robust["train"] - robust["test"]


def test_best_is_the_first_highest_on_validation(data):
    found = [event for event in events(network(), data, replace(PLAN, epochs=6)) if isinstance(event, Epoch)]
    highest = -1.0
    for event in found:
        robust = event.metrics["validation"]["robust_accuracy"]
        assert event.best == (robust > highest)
        highest = max(robust, highest)


def test_schedules_are_read_where_the_docs_say(data):
    rates, gammas = [], []
    model = network()
    optimizer = sgd(model)

    def ball(t):
        gammas.append(t)
        radius = from_progress(1 / 3, constant(0.01))(t)
        return Layerwise(radius) if radius else None

    for event in fit(model, *data, replace(PLAN, ball=ball), optimizer):
        if isinstance(event, Stepped):
            rates.append(optimizer.param_groups[0]["lr"])
            assert (event.perturbed_loss != event.loss) == (event.epoch > 1)
    assert rates == [PLAN.learning_rate((step + 1) / 9) for step in range(9)]
    assert gammas[:3] == [0, 1 / 9, 2 / 9]


def test_the_clean_forward_feeds_running_statistics_only(data):
    plain, fed = network(), network()
    events(plain, data, replace(PLAN, epochs=1))
    events(fed, data, replace(PLAN, epochs=1, clean_forward=True))
    counted = [
        next(buffer for name, buffer in model.named_buffers() if "num_batches" in name) for model in (plain, fed)
    ]
    assert [count.item() for count in counted] == [3, 6]
    changed = {name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, fed.state_dict()[name])}
    assert changed
    # The first step's gradient does not see running statistics; the attack, in eval mode, does from the second on.
    first = [network(), network()]
    for model, forward in zip(first, (False, True), strict=True):
        next(iter(fit(model, *data, replace(PLAN, clean_forward=forward), sgd(model))))
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), first[1].parameters(), strict=True))


def test_gradients_that_are_not_finite_stop_with_one_line(data):
    plan = replace(PLAN, learning_rate=constant(1e30))
    with pytest.raises(FloatingPointError, match="epoch 1: the gradient of 2 of 3 batches was not finite"):
        events(mlp(), data, plan)


def test_batches_that_a_step_drops_on_a_search_of_its_own_stop_nothing(data):
    """Of an epoch's three batches, the first is dropped for good, the second by a search, the third not at all."""
    memory, places = {}, itertools.cycle(range(3))

    def step(model, x, y, **given):
        place = next(places)
        if place == 1:
            memory["searched"] = memory.get("searched", torch.tensor(0)) + 1
        return double_perturbation_step(model, x * torch.nan if place < 2 else x, y, **given)

    def excused():
        return memory.get("searched", torch.tensor(0))

    plan = replace(PLAN, step=step, memory=memory)
    found = events(network(), data, replace(plan, excused=excused))
    assert [event.metrics["dropped"] for event in found if isinstance(event, Epoch)] == [2, 2, 2]
    with pytest.raises(FloatingPointError, match="epoch 1: the gradient of 2 of 3 batches was not finite"):
        events(network(), data, plan)


def test_an_epoch_without_a_batch_that_was_used_has_no_loss(data):
    def step(model, x, y, **given):
        return double_perturbation_step(model, x * torch.nan, y, **given)

    counted = iter(range(0, 100, 3))  # fit asks at both ends of an epoch
    plan = replace(PLAN, epochs=1, step=step, excused=lambda: torch.tensor(next(counted)))
    last = events(network(), data, plan)[-1]
    assert last.metrics["dropped"] == 3
    assert math.isnan(last.metrics["loss"])


def test_modes_and_missing_sets(data):
    """Every module has its own mode between epochs, also if the training is given up in the middle of one."""
    model = network().eval()
    model[0].train()
    modes = [module.training for module in model.modules()]
    training = fit(model, data[0], {}, replace(PLAN, epochs=2), sgd(model))
    for event in training:
        if isinstance(event, Epoch):
            assert [module.training for module in model.modules()] == modes
            assert event.metrics["gap"] is None
            assert not event.best
        if isinstance(event, Stepped) and event.step == 4:
            assert all(module.training for module in model.modules())
            training.close()
    assert [module.training for module in model.modules()] == modes
    assert gap({"train": {"robust_accuracy": 0.5, "robust_loss": 1.0}}) is None


def test_the_measurements_starts_follow_the_seed(data):
    model, plan = network(), replace(PLAN, measure=PGD(Linf(0.15), 0.001, 1))
    losses = {measure(model, data[1]["test"], replace(plan, seed=seed))["robust_loss"] for seed in (0, 0, 1)}
    assert len(losses) == 2


def test_weights_come_from_the_objective_of_their_time(data):
    """beta and eps may be scheduled like everything else: objectives and attacks are functions of progress."""
    seen = []

    def objective(t):
        seen.append(t)
        return TRADES(6 * t)

    events(
        network(),
        data,
        replace(PLAN, epochs=1, objective=objective, attack=lambda t: replace(ATTACK, ball=Linf(0.1 * t))),
    )
    assert seen == [0.0, 1 / 3, 2 / 3]


def test_the_weights_are_perturbed_in_every_so_many_th_step_of_training(data):
    """Counted from the first of all, over the ends of epochs (three steps each) and of interruptions."""
    seen, kept = [], []

    def step(*args, ball, **given):
        seen.append(ball is not None)
        return double_perturbation_step(*args, ball=ball, **given)

    plan = replace(PLAN, perturb_every=2, step=step)
    for event in fit(model := network(), *data, plan, sgd(model)):
        kept += [copy.deepcopy(event.state)] if isinstance(event, Epoch) else []
    assert seen == [True, False] * 4 + [True]
    seen.clear()
    list(fit(model := network(), *data, plan, sgd(model), state=kept[0]))
    assert seen == [False, True] * 3
    with pytest.raises(ValueError, match="perturb_every: expected an integer >= 1, got 0"):
        replace(PLAN, perturb_every=0)


def test_averages_are_what_is_measured_and_kept(data):
    model = network()
    last = [event for event in events(model, data, replace(PLAN, average=0.9)) if isinstance(event, Epoch)][-1]
    assert last.model is not model
    images = data[1]["test"]
    assert last.metrics["test"]["clean_accuracy"] == outcomes(last.model, images, None).accuracy
    average, newest = next(last.model.parameters()), next(model.parameters())
    assert not torch.equal(average, newest)


def test_the_moving_average_is_torch_s_to_the_bit(data):
    """fit follows the weights by itself, since torch's class would wait for a GPU in every step."""
    model, plan = network(), replace(PLAN, epochs=2, average=0.9)
    expected = ema(model, 0.9)
    for event in fit(model, *data, plan, sgd(model)):
        if isinstance(event, Stepped):
            expected.update_parameters(model)
    assert isinstance(event, Epoch)
    assert equal_states(state(event.model), state(expected.module))
    assert event.state["average"]["n_averaged"] == event.metrics["step"]
