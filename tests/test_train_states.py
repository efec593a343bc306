"""Training goes on from the state of any step as if it had never stopped, and ends where gradients are not finite."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from networks import equal_states, state
from torch import Tensor, nn

from saltflat.data import digits, stratified_subset
from saltflat.lab import build
from saltflat.lab.config import Attack, Awp, Data, Evaluation, Model, Optimizer, Train
from saltflat.step import double_perturbation_step
from saltflat.train import IN_A_ROW, Diverged, Epoch, Stepped, fit

EPOCHS, PER_EPOCH = 2, 3
CONFIG = Train(
    data=Data(augment="none"),
    model=Model("small-cnn", width=4),
    attack=Attack(eps=0.15, step_size=0.1, steps=1),
    awp=Awp(gamma=0.01),
    optimizer=Optimizer(epochs=EPOCHS, batch_size=20, learning_rate=0.05),
    evaluation=Evaluation(steps=1),
)
CASES = {
    "plain": {},
    "moving average": {"optimizer": {"average": 0.9}},
    "stochastic weight averaging, BatchNorm": {
        "optimizer": {"swa_from": 0.3},
        "model": {"name": "small-resnet", "width": 4},
    },
    "extra examples, mixup, rotation": {
        "extra": {"share": 0.3, "path": "given"},
        "data": {"mix": "mixup", "rotation": 15.0},
    },
    "fp16": {"compute": {"precision": "fp16"}},
    "adaptive random perturbation": {"awp": {"method": "arwp"}},
    "free": {"attack": {"replays": 2}},
    "amortised, every second step": {"awp": {"amortised": True, "every": 2}},
    "in two parts": {"optimizer": {"accumulate": 2}},
}
REMEMBERING = {"fp16", "adaptive random perturbation", "free"}  # something from one step to the next


def small(images, n, skipped=0):
    rows = stratified_subset(images.labels, n + skipped, 0)
    return images.subset(rows[skipped:])


@pytest.fixture(scope="module")
def sets():
    read = digits()
    measured = {"train": small(read.train, 20), "validation": small(read.test, 20), "test": small(read.test, 20, 20)}
    return small(read.train, 20 * PER_EPOCH - 5), measured, small(read.train, 40, 60)


def changed(case):
    config = CONFIG
    for section, fields in CASES[case].items():
        config = replace(config, **{section: replace(getattr(config, section), **fields)})
    return config


def loaded(content):
    return torch.load(io.BytesIO(content), weights_only=True)


def trained(config, sets, state_of=None, take=True):
    """Network, metrics by epoch, and the bytes of each state: of every step, and, under -epoch, of every epoch."""
    train, measured, more = sets
    torch.manual_seed(5)  # dropout draws from torch's global generator, and a state brings it back
    model = nn.Sequential(nn.Dropout(0.1), build.network(config, train))
    metrics, states = {}, {}
    if state_of is not None:
        torch.manual_seed(6)

    def kept(state):
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    for event in fit(
        model, train, measured, build.plan(config, 10), build.optimizer(config, model),
        extra=more if config.extra.share else None, state=state_of,
    ):  # fmt: skip
        if isinstance(event, Stepped) and take:
            states[event.step] = kept(event.state())
        if isinstance(event, Epoch):
            metrics[event.epoch] = {name: of for name, of in event.metrics.items() if "seconds" not in name}
            states[-event.epoch] = kept(event.state)
            states["measured"] = kept(event.model.state_dict())
    return state(model), metrics, states


def same(one, other):
    """Whether two states are equal to the bit, but for times."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        names = set(one) - {"seconds"}
        return names == set(other) - {"seconds"} and all(same(one[name], other[name]) for name in names)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_from_any_step_to_equal_bits(case, sets):
    config = changed(case)
    weights, metrics, states = trained(config, sets)
    untouched, expected, _ = trained(config, sets, take=False)
    assert equal_states(weights, untouched)  # whoever takes states changes nothing
    assert metrics == expected
    memories = [loaded(states[step])["ranks"][0]["memory"] for step in (1, 2)]
    assert bool(memories[0]) == (case in REMEMBERING)
    assert same(*memories) == (case not in REMEMBERING)
    assert not equal_states(weights, state(nn.Sequential(nn.Dropout(), build.network(config, sets[0]))))
    first, middle, last = 1, 2, PER_EPOCH
    for begin in (first, middle, last, PER_EPOCH + 1, EPOCHS * PER_EPOCH, -1):
        again, found, later = trained(config, sets, loaded(states[begin]))
        done = (begin - 1) // PER_EPOCH if begin > 0 else -begin
        assert equal_states(again, weights), begin
        assert found == {epoch: metrics[epoch] for epoch in range(done + 1, EPOCHS + 1)}, begin
        at = begin if begin > 0 else -begin * PER_EPOCH
        assert set(later) == {"measured", *range(at + 1, EPOCHS * PER_EPOCH + 1), *range(-EPOCHS, -done)}, begin
        assert all(same(loaded(states[name]), loaded(later[name])) for name in later), begin


def test_states_of_one_training_are_told_apart(sets):
    """So that the test above can fail."""
    _, _, states = trained(changed("plain"), sets)
    one, other = loaded(states[1]), loaded(states[2])
    assert same(one, loaded(states[1]))
    assert not same(one, other)
    for name in ("model", "optimizer", "ranks", "within", "step"):
        assert not same(one[name], other[name]), name
    assert one["within"]["batches"] == 1
    assert loaded(states[-1])["within"] is None


def test_a_training_that_is_over_stays_over(sets):
    weights, _, states = trained(changed("plain"), sets)
    again, metrics, later = trained(changed("plain"), sets, loaded(states[-EPOCHS]))
    assert equal_states(weights, again)
    assert not metrics
    assert not later


def until_it_fails(sets, step, epochs, batch_size):
    config = replace(CONFIG, optimizer=Optimizer(epochs=epochs, batch_size=batch_size, learning_rate=0.05))
    model = build.network(config, sets[0])
    plan, steps = replace(build.plan(config, 10), step=step, attack=lambda t: None, ball=lambda t: None), 0
    with pytest.raises(Diverged) as error:
        for event in fit(model, sets[0], {}, plan, build.optimizer(config, model)):
            steps = event.step if isinstance(event, Stepped) else steps
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    return steps, error.value


def many(sets, n):
    train = sets[0]
    return (train.subset(torch.arange(n) % len(train)), *sets[1:])


def test_a_hundred_batches_in_a_row_that_are_not_finite_end_training_within_the_epoch(sets):
    given = []

    def step(model, x, y, **other):
        given.append((x, y))
        broken = {**other, "objective": NotFinite(other["objective"], len(given) > 7)}
        return double_perturbation_step(model, x, y, **broken)

    steps, error = until_it_fails(many(sets, 5 * 300), step, 1, 5)
    assert (steps, len(given)) == (7 + IN_A_ROW, 7 + IN_A_ROW)
    assert str(error).startswith("epoch 1: the gradients of 100 batches in a row were not finite; ")
    x, y = given[7 + IN_A_ROW - 1]
    assert torch.equal(error.batch["x"], x)
    assert torch.equal(error.batch["y"], y)


class NotFinite:
    """An objective that is not a number, if it is to be so."""

    def __init__(self, objective, bad):
        self.objective, self.bad = objective, bad

    def inner(self, model, x, y):
        return self.objective.inner(model, x, y)

    def outer(self, model, x, x_adv, y):
        return self.objective.outer(model, x, x_adv, y) * (torch.nan if self.bad else 1.0)


def test_batches_that_are_not_finite_but_not_in_a_row_end_training_after_the_epoch(sets):
    given = []

    def step(model, x, y, **other):
        given.append((x, y))
        broken = {**other, "objective": NotFinite(other["objective"], len(given) % 3 > 0)}
        return double_perturbation_step(model, x, y, **broken)

    steps, error = until_it_fails(many(sets, 5 * 300), step, 2, 5)
    assert steps == 300
    assert str(error).startswith("epoch 1: the gradient of 200 of 300 batches was not finite; ")
    x, y = given[298]  # the last that was not: 0-based, its number is 299
    assert torch.equal(error.batch["x"], x)
    assert torch.equal(error.batch["y"], y)


def test_a_batch_of_an_epoch_that_went_well_is_not_to_blame_for_another(sets):
    """One batch of the first epoch is dropped; in the second, weights become infinite without one."""
    taken = iter(range(10**6))

    def step(model, x, y, **other):
        number = next(taken)
        found = double_perturbation_step(
            model, x, y, **{**other, "objective": NotFinite(other["objective"], number == 1)}
        )
        if number == 5:
            nn.init.constant_(next(model.parameters()), torch.inf)
        return found

    model = build.network(CONFIG, sets[0])
    plan = replace(build.plan(CONFIG, 10), step=step, attack=lambda t: None, ball=lambda t: None)
    with pytest.raises(Diverged, match=r"^epoch 2: .* is not finite") as error:
        list(fit(model, sets[0], {}, plan, build.optimizer(CONFIG, model)))
    assert error.value.batch == {}


@pytest.mark.parametrize(("bad", "told"), [((3, 4), 4), ((3, 4, 5), 4), ((4, 5), 4)])
def test_after_a_short_batch_the_last_whole_one_is_told_of(bad, told, sets):
    """A training is gone on with at the last, small batch of its first epoch; in its second, batches are dropped."""
    given = {}

    def step_of(numbers):
        taken = iter(numbers)

        def step(model, x, y, **other):
            number = next(taken)
            given[number] = x
            return double_perturbation_step(
                model, x, y, **{**other, "objective": NotFinite(other["objective"], number in bad)}
            )

        return step

    def training(numbers, state):
        model = build.network(CONFIG, sets[0])
        plan = replace(build.plan(CONFIG, 10), step=step_of(numbers))
        return fit(model, sets[0], {}, plan, build.optimizer(CONFIG, model), state=state)

    first = training(range(3), None)
    next(first)
    kept = io.BytesIO()
    torch.save(next(first).state(), kept)
    with pytest.raises(Diverged, match=r"^epoch 2: ") as error:
        list(training(range(2, 6), loaded(kept.getvalue())))
    assert len(given[2]) < len(given[told])
    assert torch.equal(error.value.batch["x"], given[told])


def test_fewer_than_a_hundred_in_a_row_are_dropped_and_counted(sets):
    taken = iter(range(10**6))

    def step(model, x, y, **other):
        broken = {**other, "objective": NotFinite(other["objective"], next(taken) < IN_A_ROW - 1)}
        return double_perturbation_step(model, x, y, **broken)

    config = replace(CONFIG, optimizer=Optimizer(epochs=1, batch_size=5, learning_rate=0.05))
    train = many(sets, 5 * 300)[0]
    model = build.network(config, train)
    plan = replace(build.plan(config, 10), step=step, attack=lambda t: None, ball=lambda t: None)
    *_, last = fit(model, train, {}, plan, build.optimizer(config, model))
    assert (last.metrics["dropped"], last.metrics["step"]) == (IN_A_ROW - 1, 300)


@pytest.mark.parametrize(
    ("bad", "left", "sizes"),
    [
        ((0, 2), 1, []),
        ((0, 1), 1, [20, 20]),
        ((1, 2), 1, [20, 20]),
        ((0, 2), 2, [15, 15]),
        ((0, 1), 2, []),
        ((0, 1), 3, []),
    ],
)
def test_a_training_gone_on_with_counts_what_was_dropped_before(bad, left, sizes, sets):
    """Of an epoch's three batches, two are dropped: one before it was left, one after, a smaller one; or both before,
    so that there is none to look at.
    """

    def step_of(numbers):
        taken = iter(numbers)

        def step(model, x, y, **other):
            broken = {**other, "objective": NotFinite(other["objective"], next(taken) in bad)}
            return double_perturbation_step(model, x, y, **broken)

        return step

    model = build.network(CONFIG, sets[0])
    plan = replace(build.plan(CONFIG, 10), step=step_of(range(3)))
    training = fit(model, sets[0], {}, plan, build.optimizer(CONFIG, model))
    for _ in range(left):
        event, kept = next(training), io.BytesIO()
        torch.save(event.state(), kept)
    model = build.network(CONFIG, sets[0])
    again = replace(build.plan(CONFIG, 10), step=step_of(range(left, 3)))
    with pytest.raises(Diverged, match="epoch 1: the gradient of 2 of 3 batches was not finite") as error:
        list(fit(model, sets[0], {}, again, build.optimizer(CONFIG, model), state=loaded(kept.getvalue())))
    assert [len(part) for part in error.value.batch.values()] == sizes


def test_a_hundred_in_a_row_are_counted_over_the_end_of_an_epoch_and_over_a_resume(sets):
    train, config = many(sets, 5 * 150)[0], replace(CONFIG, optimizer=Optimizer(epochs=2, batch_size=5))
    taken = []

    def step(model, x, y, **other):
        taken.append(x)
        broken = {**other, "objective": NotFinite(other["objective"], len(taken) > 100)}  # 50 of the first epoch
        return double_perturbation_step(model, x, y, **broken)

    def events(state):
        model = build.network(config, train)
        plan = replace(build.plan(config, 10), step=step, attack=lambda t: None, ball=lambda t: None)
        return fit(model, train, {}, plan, build.optimizer(config, model), state=state)

    kept = next(event.state() for event in events(None) if isinstance(event, Stepped) and event.step == 170)
    assert kept["in_a_row"] == 70
    with pytest.raises(Diverged, match=r"^epoch 2: the gradients of 100 batches in a row were not finite"):
        list(events(kept))
    assert len(taken) == 200


def test_an_epoch_that_another_kind_of_device_began_draws_anew(sets):
    config, (train, *_) = replace(CONFIG, data=Data(rotation=15.0)), sets

    def events(state):
        model = build.network(config, train)
        return fit(model, train, {}, build.plan(config, 10), build.optimizer(config, model), state=state)

    kept = next(event.state() for event in events(None) if isinstance(event, Stepped))
    kept["within"] |= {"device": "cuda", "draws": torch.zeros(16, dtype=torch.uint8)}
    ends = [list(events(copy.deepcopy(kept)))[-1].state["model"] for _ in range(2)]
    assert equal_states(*ends)


def test_many_processes_need_a_spread(sets, monkeypatch):
    monkeypatch.setattr("saltflat.parallel.ranks", lambda: 2)
    train, measured, _ = sets
    model = build.network(CONFIG, train)
    with pytest.raises(ValueError, match=r"^spread: expected one over the 2 processes"):
        next(fit(model, train, measured, build.plan(CONFIG, 10), build.optimizer(CONFIG, model)))
