"""Accumulated micro-batches are the batch; one ascent for each is another method, in as many forwards."""

import copy
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from family import sgd
from hypothesis import given
from hypothesis import strategies as st
from networks import batch, convolutional, equal_states, state
from torch import nn

from saltflat import AT, MART, PGD, TRADES, Layerwise, Linf, PerExample, double_perturbation_step, perturbed
from saltflat.inputs import gaussian
from saltflat.neighbours.accumulated import _parts, accumulated_step, cheaply_accumulated_step
from saltflat.neighbours.random_wp import Gaussian, drawn
from saltflat.neighbours.robust_wp import accumulated, below
from saltflat.random import Rows, seeded

ATTACK, BALL = PGD(Linf(8 / 255), 4 / 255, 2), Layerwise(0.05)
OBJECTIVES = {"at": AT(), "trades": TRADES(6.0), "mart": MART(5.0)}
WAYS = {
    "after": {},
    "inside": {"step_inside": True},
    "two steps, twice": {"steps": 2, "alternations": 2},
    "no climb": {"ball": None},
    "no attack": {"attack": None},
}


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def batches(n, count=3):
    drawn = generator(1)
    return [(torch.rand(n, 3, 6, 6, dtype=torch.float64, generator=drawn), torch.arange(n) % 3) for _ in range(count)]


def after(step, model, n=8, draws=None, **given):
    """Weights, momentum and what the steps told, after three."""
    model, draws = copy.deepcopy(model), draws or generator()
    optimizer = sgd(model)
    given = {"objective": AT(), "attack": ATTACK, "ball": BALL} | given
    told = [step(model, x, y, optimizer=optimizer, generator=draws, **given) for x, y in batches(n)]
    momenta = {f"momentum.{i}": kept["momentum_buffer"] for i, kept in optimizer.state_dict()["state"].items()}
    return {**state(model), **momenta}, told


def agree(one, other):
    for name, tensor in one[0].items():
        torch.testing.assert_close(tensor, other[0][name], rtol=0, atol=1e-12)
    for mine, theirs in zip(one[1], other[1], strict=True):
        for field in ("loss", "perturbed_loss", "x_adv", "skipped", "dropped"):
            torch.testing.assert_close(getattr(mine, field), getattr(theirs, field), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("parts", "n"), [(1, 8), (2, 8), (3, 8), (2, 5), (4, 3)], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_are_the_batch(objective, parts, n):
    """To 1e-12 in float64, whether they are equal or not, or fewer than rows: weights, momentum, losses, and x_adv."""
    model, objective = convolutional(batch_norm=False).train(), OBJECTIVES[objective]
    whole = after(double_perturbation_step, model, n, objective=objective)
    agree(after(partial(accumulated_step, micro_batches=parts), model, n, objective=objective), whole)
    assert not equal_states(whole[0], {**whole[0], **state(model)})


@pytest.mark.parametrize("way", WAYS)
def test_whatever_else_a_step_is_asked_for(way):
    model = convolutional(batch_norm=False).train()
    agree(
        after(partial(accumulated_step, micro_batches=3), model, **WAYS[way]),
        after(double_perturbation_step, model, **WAYS[way]),
    )


def test_another_climb_on_another_loss():
    """RobustWP's, which sums gradients of a loss that looks at examples one by one."""
    model = convolutional(batch_norm=False).train()
    given = {"climb": accumulated, "climbed": below(AT().each, 1.1), "steps": 3}
    given["where"] = lambda name, parameter: name == "3.weight"
    agree(
        after(partial(accumulated_step, micro_batches=3), model, **given),
        after(double_perturbation_step, model, **given),
    )


def test_in_eval_mode_with_batch_norm_it_is_the_batch():
    model = convolutional().eval()
    agree(after(partial(accumulated_step, micro_batches=2), model), after(double_perturbation_step, model))


@pytest.mark.parametrize(
    "draws",
    [
        lambda: PerExample(0, torch.tensor([5, 3, 1, 9, 2, 0, 7, 4])),
        lambda: Rows(generator(), slice(4, 12), 16),
        lambda: Rows(PerExample(0, torch.arange(16)), slice(4, 12), 16),
    ],
    ids=["by example", "rows", "rows by example"],
)
@pytest.mark.parametrize("step", [accumulated_step, cheaply_accumulated_step])
def test_what_is_drawn_is_what_the_batch_draws(draws, step):
    """Whatever draws, also twice in a row (A = 2 draws once, a second step goes on)."""
    attack, model = replace(ATTACK, start=gaussian(0.1), step_size=0.0), convolutional(batch_norm=False).train()
    whole = after(double_perturbation_step, model, draws=draws(), attack=attack)[1]
    parts = after(partial(step, micro_batches=3), model, draws=draws(), attack=attack)[1]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.x_adv, other.x_adv)
    assert not torch.equal(whole[0].x_adv - batches(8)[0][0], whole[1].x_adv - batches(8)[1][0])


def test_the_global_generator_draws_for_rows_one_after_the_other():
    attack, model = replace(ATTACK, start=gaussian(0.1), step_size=0.0), convolutional(batch_norm=False).train()
    (x, y), given = batch(), {"objective": AT(), "attack": attack, "ball": BALL, "micro_batches": 2}
    x[4:] = x[:4]
    moved = accumulated_step(model, x, y, optimizer=sgd(model), **given).x_adv - x
    assert not torch.equal(moved[:4], moved[4:])


@pytest.mark.parametrize("step", [accumulated_step, cheaply_accumulated_step])
def test_it_asks_as_much_of_the_network_as_the_batch_does(step):
    """AT with PGD-2: 4 forwards and 2 weight gradients of every row."""
    model, seen = convolutional(batch_norm=False).train(), Counter()
    model[3].register_forward_hook(lambda _, given, __: seen.update(rows=len(given[0]), forwards=1))
    model[3].weight.register_hook(lambda _: seen.update(gradients=1))
    x, y = batch()
    step(model, x, y, objective=AT(), attack=ATTACK, ball=BALL, optimizer=sgd(model), micro_batches=2)
    assert seen == {"rows": 4 * 8, "forwards": 4 * 2, "gradients": 2 * 2}


class Packed:
    """What a graph keeps, as long as it does."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("step", [accumulated_step, cheaply_accumulated_step])
def test_one_graph_is_alive_at_a_time(step):
    """Of the numbers that graphs keep, a quarter of the batch's is alive at most, weights left aside."""
    model, (x, y) = convolutional(batch_norm=False).train(), batch(16)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    alive, peaks = 0, {}

    def pack(tensor):
        nonlocal alive
        packed, size = Packed(tensor), 0 if tensor.data_ptr() in weights else tensor.numel()
        alive += size
        peaks[parts] = max(peaks.get(parts, 0), alive)
        weakref.finalize(packed, forget, size)
        return packed

    def forget(size):
        nonlocal alive
        alive -= size

    for parts in (1, 4):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
            step(model, x, y, objective=AT(), attack=ATTACK, ball=BALL, optimizer=sgd(model), micro_batches=parts)
        assert alive == 0
    assert peaks[4] < 0.3 * peaks[1]


@pytest.mark.parametrize("step", [accumulated_step, cheaply_accumulated_step])
@pytest.mark.parametrize("ball", [BALL, None], ids=["awp", "plain"])
def test_a_batch_is_dropped_as_a_whole(step, ball):
    """Because of one row of its last micro-batch: no weight moves but by momentum and decay, no buffer does."""
    model, (x, y) = convolutional().train(), batch()
    x[7, 0, 0, 0] = torch.nan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state(model)
    found = step(model, x, y, objective=AT(), attack=None, ball=ball, optimizer=optimizer, micro_batches=3)
    assert int(found.dropped) == 1
    assert equal_states(before, state(model))
    assert all(bool((parameter.grad == 0).all()) for parameter in model.parameters())


def test_the_cheap_form_is_a_climb_for_each_micro_batch():
    """g = sum_c (n_c / n) grad L_c(w + v_c), written out."""
    model, (x, y) = convolutional(batch_norm=False).train(), batch(5)
    by_hand = copy.deepcopy(model)
    optimizer, losses = sgd(by_hand), []
    for rows, share in ((slice(0, 2), 2 / 5), (slice(2, 5), 3 / 5)):
        loss = partial(TRADES().outer, by_hand, x[rows], x[rows], y[rows])
        with perturbed(by_hand, loss, BALL, steps=2) as ascent:
            value = loss()
            (share * value).backward()
        losses.append((share * ascent.value, share * value.detach()))
    optimizer.step()
    found = cheaply_accumulated_step(
        model, x, y, objective=TRADES(), attack=None, ball=BALL, optimizer=sgd(model), steps=2, micro_batches=2
    )
    for name, tensor in state(by_hand).items():
        torch.testing.assert_close(tensor, state(model)[name], rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.stack([found.loss, found.perturbed_loss]), torch.tensor(losses).double().sum(0))


def test_a_generator_that_attacks_and_climbs_share_goes_on_for_the_climbs():
    """Each v_c is a draw of its own; and the attacks draw what the whole batch draws."""
    (x, y), model, drawn_v, ends = batch(8), convolutional(batch_norm=False), [], []

    @contextmanager
    def noted(*given, **more):
        with drawn(*given, **more) as ascent:
            drawn_v.append(next(iter(ascent.displacement.values())).flatten()[0].item())
            yield ascent

    for ball in (None, Gaussian(0.1)):
        g = seeded(0)
        step = cheaply_accumulated_step(
            model, x, y, objective=AT(), attack=replace(ATTACK, steps=1, step_size=0.0), ball=ball,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0), micro_batches=4,
            climb=partial(noted, generator=g), generator=g,
        )  # fmt: skip
        ends.append(step.x_adv)
    assert len({*drawn_v}) == len(drawn_v) == 4
    assert torch.equal(*ends)


def test_rows_that_are_taken_again_are_not_counted_as_skipped():
    (x, y), model = batch(2), nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 3)).double()
    for parts in (2, 5):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = cheaply_accumulated_step(
            model, x, y, objective=AT(), attack=None, ball=Layerwise(0.1), optimizer=optimizer, micro_batches=parts
        )
        assert step.skipped == 0


def test_the_cheap_form_is_another_step():
    """So there is something to choose; in one micro-batch, or without a climb, there is not."""
    model = convolutional(batch_norm=False).train()
    for asked, same in (({}, False), ({"ball": None}, True), ({"micro_batches": 1}, True)):
        steps = [partial(step, micro_batches=2) for step in (accumulated_step, cheaply_accumulated_step)]
        one, other = (after(step, model, **asked)[0]["0.weight"] for step in steps)
        assert bool((one - other).abs().max() < 1e-12) is same


def test_labels_may_be_probabilities():
    model, (x, y) = convolutional(batch_norm=False).train(), batch()
    soft = nn.functional.one_hot(y, 3).double() * 0.9 + 0.1 / 3
    given = {"objective": AT(), "attack": None, "ball": BALL}
    apart = copy.deepcopy(model)
    whole = double_perturbation_step(model, x, soft, optimizer=sgd(model), **given)
    parts = accumulated_step(apart, x, soft, optimizer=sgd(apart), micro_batches=3, **given)
    torch.testing.assert_close(whole.perturbed_loss, parts.perturbed_loss, rtol=0, atol=1e-14)


@given(st.integers(1, 50), st.integers(1, 12))
def test_micro_batches_are_all_rows_in_order(n, parts):
    found = [range(n)[rows] for rows, share in _parts(n, parts) if share > 0]
    assert [row for rows in found for row in rows] == [*range(n)]
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert len(_parts(n, parts)) == parts
    assert sum(share for _, share in _parts(n, parts)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"micro_batches": 0}, "micro_batches: expected an integer >= 1, got 0"),
        ({"micro_batches": 2, "alternations": 0}, "alternations: expected an integer >= 1, got 0"),
        ({"micro_batches": 2, "alternations": 2, "ball": None}, "alternations: expected 1 without a weight adversary"),
    ],
)
def test_bad_arguments_are_told_in_a_line(given, told):
    model, (x, y) = convolutional(), batch()
    given = {"objective": AT(), "attack": None, "ball": BALL} | given
    with pytest.raises(ValueError, match=told):
        accumulated_step(model, x, y, optimizer=sgd(model), **given)
