"""Two processes with a share of every batch's rows each end twenty steps of AWP with the weights of one process."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import family
import pytest
import torch
from family import MEMBERS, sgd, taking
from networks import equal_states, state
from ranks import found
from test_family_ddp import batches as halves
from test_family_ddp import fixed, part
from torch import nn

from saltflat import AT, MART, PGD, TRADES, Layerwise, Linf, double_perturbation_step, in_mode, perturbed
from saltflat.inputs import uniform
from saltflat.lab import adversaries
from saltflat.lab.config import Compute, Train
from saltflat.lab.recipes import NEIGHBOURS
from saltflat.neighbours.accumulated import accumulated_step, cheaply_accumulated_step
from saltflat.objectives import Objective
from saltflat.parallel import Alone, Replicated, Sharded, Weighted, mean, on_raw, per_rank, rank, ranks, share
from saltflat.random import Rows
from saltflat.step import itself

pytestmark = pytest.mark.slow

STEPS, TOLERANCE = 20, 1e-12
ATTACK, BALL = PGD(Linf(0.1), 0.05, 2, start=uniform), Layerwise(0.05)


@dataclass(frozen=True)
class Case:
    """What the twenty steps are. With `looked`, a forward without gradients comes after each, as if to measure."""

    objective: Objective = field(default_factory=AT)
    rows: int = 8
    norm: bool = False
    poison: bool = False
    looked: bool = False
    step: Any = double_perturbation_step
    given: dict[str, Any] = field(default_factory=dict)


CASES = {
    "at": Case(),
    "at, inside": Case(given={"step_inside": True}),
    "trades, two steps, twice": Case(TRADES(6.0), given={"steps": 2, "alternations": 2}),
    "mart, inside": Case(MART(5.0), norm=True, given={"step_inside": True}),
    "unequal shares": Case(TRADES(6.0), rows=7),
    "no attack": Case(norm=True, looked=True, given={"attack": None}),
    "poison": Case(poison=True, given={"attack": None}),
    "accumulated": Case(TRADES(6.0), rows=9, norm=True, step=partial(accumulated_step, micro_batches=2)),
    "accumulated, inside, two steps": Case(
        rows=7, step=partial(accumulated_step, micro_batches=3), given={"steps": 2, "step_inside": True}
    ),
}
SPREADS = {
    "replicated": Replicated,
    "sharded": lambda model: Sharded(model, lambda model: [model[0], model[3]]),
}

WAYS = {"replicated": "ddp", "sharded": "fsdp"}


def network(norm):
    """Of weights that two ranks cannot share evenly; normalised by rows themselves, or not."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4) if norm else nn.Identity(), nn.Tanh()]
    return nn.Sequential(*layers, nn.Conv2d(4, 5, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)).double()


def batches(n, poison=False, steps=STEPS):
    generator = torch.Generator().manual_seed(1)
    drawn = [
        (torch.rand(n, 3, 6, 6, dtype=torch.float64, generator=generator), torch.arange(n) % 3) for _ in range(steps)
    ]
    if poison:
        drawn[1][0][-1, 0, 0, 0] = torch.nan  # in the last row alone: on one rank of the two
    return drawn


def steps(case, spread):
    """On this rank's rows. Weights and momentum as they stand afterwards, and what all ranks were told on the way."""
    optimizer, generator = sgd(spread.called), torch.Generator().manual_seed(7)
    spread.called.train()
    losses, dropped = [], 0
    for x, y in batches(case.rows, case.poison):
        rows = share(len(x))
        objective = Weighted(case.objective, ranks() * len(x[rows]) / len(x))
        given = {"attack": ATTACK} | case.given
        step = case.step(
            spread.called, x[rows], y[rows], objective=objective, ball=BALL, optimizer=optimizer,
            attack_on=on_raw(itself), generator=Rows(generator, rows, len(x)), **given,
        )  # fmt: skip
        losses.append(mean(torch.stack([step.loss, step.perturbed_loss])))
        dropped += int(step.dropped)
        if case.looked:
            with torch.no_grad():
                spread.called(x[rows])
    kept = copy.deepcopy(spread.state(optimizer))
    momenta = {name: own["momentum_buffer"] for name, own in kept["optimizer"]["state"].items()}
    return {"weights": kept["model"], "momentum": momenta, "losses": losses, "dropped": dropped}


def by_itself(steps=4):
    """With an ascent per rank, of two steps: each v, and the weights at the end."""
    model, seen = network(norm=True).train(), []

    @contextmanager
    def watched(model, *given, **named):
        with perturbed(model, *given, **named) as ascent:
            seen.append({name.removeprefix("module."): v.clone() for name, v in ascent.displacement.items()})
            yield ascent

    spread = Replicated(model)
    optimizer, generator = sgd(model), torch.Generator().manual_seed(7)
    for x, y in batches(8, steps=steps):
        rows = share(len(x))
        double_perturbation_step(
            spread.called, x[rows], y[rows], objective=TRADES(6.0), attack=ATTACK, ball=BALL, optimizer=optimizer,
            climb=per_rank(watched), steps=2, attack_on=on_raw(itself), generator=Rows(generator, rows, len(x)),
        )  # fmt: skip
    return {"weights": state(model), "v": seen}


def cheaply(spread):
    optimizer = sgd(spread.called)
    for x, y in batches(8):
        rows = share(len(x))
        cheaply_accumulated_step(
            spread.called,
            x[rows],
            y[rows],
            objective=AT(),
            attack=None,
            ball=BALL,
            optimizer=optimizer,
            micro_batches=2,
        )
    return copy.deepcopy(spread.state(optimizer)["model"])


def member(name):
    """Three steps of a member of the family, as the lab builds it for sharded weights."""
    family.MEMBERS[name] = replace(MEMBERS[name], compute=replace(MEMBERS[name].compute, spread="fsdp"))
    spread = Sharded(fixed(), lambda model: [model.layers[0], model.layers[3]])
    return three_steps(name, spread, part(name, rank()))


def three_steps(name, spread, rows=slice(None)):
    optimizer = sgd(spread.called)
    take = taking(name, spread.called, optimizer, {}, attack=replace(family.ATTACK, steps=3))
    for x, y in halves("copies"):
        take(x[rows], y[rows])
    return copy.deepcopy(spread.state(optimizer)["model"])


def robust(make, spread="ddp"):
    """RobustWP's steps, as the lab builds them: on rows that ranks share unevenly, and once on a single one, which
    others borrow, so that it counts nothing there.
    """
    config = Train(awp=replace(NEIGHBOURS["robust-wp"], steps=3, c=1.2), compute=Compute(spread=spread))
    laid = make(network(norm=True).train())
    optimizer, step, masked = sgd(laid.called), adversaries.step(config, {}), []
    for n in (7, 1, 5, 7):
        for x, y in batches(n, steps=2):
            rows = share(len(x))
            objective = Weighted(TRADES(6.0), ranks() * (rows.stop - rows.start) / len(x))
            rows = rows if rows.stop > rows.start else slice(0, 1)
            with torch.no_grad():
                masked.append(float((TRADES(6.0).each(laid.called, x, x, y) < 1.2).double().mean()))
            step(
                laid.called, x[rows], y[rows], objective=objective, attack=None, ball=adversaries.ball(config)(0.5),
                optimizer=optimizer, generator=None,
            )  # fmt: skip
    return {"weights": copy.deepcopy(laid.state(optimizer)["model"]), "masked": masked}


def work(folder):
    told = {
        (name, kind): steps(case, make(network(case.norm)))
        for kind, make in SPREADS.items()
        for name, case in CASES.items()
    }
    return {
        **told,
        "per rank": by_itself(),
        **{("robust", kind): robust(make, WAYS[kind]) for kind, make in SPREADS.items()},
        **{("member", name): member(name) for name in MEMBERS},
        **{("cheaply", kind): cheaply(make(network(norm=True))) for kind, make in SPREADS.items()},
    }


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return found(work, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone():
    """What one process finds in each case, asked for once."""
    torch.set_num_threads(1)
    return {name: steps(case, Alone(network(case.norm))) for name, case in CASES.items()}


@pytest.mark.parametrize("kind", SPREADS)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_end_with_the_weights_of_one_process(told, alone, name, kind):
    """To 1e-12, weights, momentum and losses, and equal on both ranks to the bit; what is not finite on one is dropped
    by both.
    """
    (one, other), whole = (own[name, kind] for own in told), alone[name]
    for what in ("weights", "momentum"):
        assert equal_states(one[what], other[what])
        assert one[what].keys() == whole[what].keys()
        for key, tensor in whole[what].items():
            torch.testing.assert_close(one[what][key], tensor, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(one["losses"], whole["losses"], rtol=0, atol=TOLERANCE, equal_nan=True)
    assert one["dropped"] == other["dropped"] == whole["dropped"] == CASES[name].poison
    assert (whole["weights"]["0.weight"] - network(norm=False)[0].weight).abs().max() > 1e-3


def test_an_ascent_per_rank_is_awp_on_the_ranks_own_rows(told):
    """v by hand, on one process, of each half of a batch; the descent's gradient is the mean of those at both w + v."""
    one, other = (own["per rank"] for own in told)
    model = network(norm=True).train()
    optimizer, generator = sgd(model), torch.Generator().manual_seed(7)
    for number, (x, y) in enumerate(batches(8, steps=4)):
        optimizer.zero_grad()
        with in_mode(model, "eval"):
            x_adv = ATTACK(TRADES(6.0).inner(model, x, y), x, generator=generator)
        for rows, theirs in ((slice(0, 4), one["v"][number]), (slice(4, 8), other["v"][number])):
            loss = partial(TRADES(6.0).outer, model, x[rows], x_adv[rows], y[rows])
            with perturbed(model, loss, BALL, steps=2) as ascent:
                for name, v in ascent.displacement.items():
                    torch.testing.assert_close(theirs[name], v, rtol=0, atol=TOLERANCE)
                (loss() / 2).backward()
        optimizer.step()
        assert not equal_states(one["v"][number], other["v"][number])
    assert equal_states(one["weights"], other["weights"])
    for name, tensor in state(model).items():
        torch.testing.assert_close(one["weights"][name], tensor, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", SPREADS)
def test_the_cheap_form_climbs_on_the_same_micro_batch_of_all_ranks(told, kind):
    """Rows 0, 1 of the first rank with 4, 5 of the second, then 2, 3 with 6, 7."""
    model = network(norm=True)
    optimizer = sgd(model)
    for x, y in batches(8):
        order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
        cheaply_accumulated_step(
            model, x[order], y[order], objective=AT(), attack=None, ball=BALL, optimizer=optimizer, micro_batches=2
        )
    one, other = (own["cheaply", kind] for own in told)
    assert equal_states(one, other)
    for name, tensor in state(model).items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_of_the_family_steps_on_shards(told, name):
    """As test_family_ddp has it for replicas; `Gathered` gives the balls that are not layerwise whole tensors."""
    one, other = (own["member", name] for own in told)
    assert equal_states(one, other)
    for key, tensor in three_steps(name, Alone(fixed())).items():
        torch.testing.assert_close(one[key], tensor, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", SPREADS)
def test_robust_wp_climbs_on_the_rows_of_all_ranks_as_on_those_of_one(told, kind):
    """Some of them below c, some not; those of smaller shares count as much as those of larger ones."""
    (one, other), whole = (own["robust", kind] for own in told), robust(Alone)
    assert equal_states(one["weights"], other["weights"])
    assert any(0 < part < 1 for part in whole["masked"])
    for name, tensor in whole["weights"].items():
        torch.testing.assert_close(one["weights"][name], tensor, rtol=0, atol=TOLERANCE)


def synchronised(folder):
    """With BatchNorm in train mode, on one GPU that both use."""
    model = nn.Sequential(*network(norm=False)[:1], nn.BatchNorm2d(4), *network(norm=False)[2:]).double().cuda().train()
    spread = Replicated(model, sync_batch_norm=True)
    optimizer = sgd(spread.called)
    for x, y in batches(7):
        rows = share(len(x))
        objective = Weighted(TRADES(6.0), ranks() * len(x[rows]) / len(x))
        double_perturbation_step(
            spread.called,
            x[rows].cuda(),
            y[rows].cuda(),
            objective=objective,
            attack=None,
            ball=BALL,
            optimizer=optimizer,
        )
    return {name: tensor.cpu() for name, tensor in state(spread.network()).items()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="SyncBatchNorm runs on GPUs alone")
def test_with_synchronised_statistics_batch_norm_sees_the_batch(tmp_path):
    one, other = found(synchronised, tmp_path)
    assert rank() == 0
    model = nn.Sequential(*network(norm=False)[:1], nn.BatchNorm2d(4), *network(norm=False)[2:]).double().train()
    optimizer = sgd(model)
    for x, y in batches(7):
        double_perturbation_step(model, x, y, objective=TRADES(6.0), attack=None, ball=BALL, optimizer=optimizer)
    assert equal_states(one, other)
    for name, tensor in state(model).items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=1e-9)
