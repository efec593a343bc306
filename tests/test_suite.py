"""Suites: what they consist of and cost, what becomes of each example, and that nothing else has a say in it."""

import copy
import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from networks import convolutional, equal_states, state
from torch import nn

from saltflat import L1, L2, PGD, Linf, PerExample
from saltflat.data import digits, to_float
from saltflat.evaluation import (
    APGD,
    SPSA,
    SparseAPGD,
    Square,
    TargetedAPGD,
    TargetedFAB,
    TargetedSparseAPGD,
    Trial,
    find,
    suite,
)
from saltflat.evaluation.suite import Column, evaluate
from saltflat.objectives import ce, margin
from saltflat.random import derived_seed

FIELDS = ("by", "iteration", "margin")


class Tally:
    """Rows of all forwards, and of all gradients; copies of a network share it."""

    def __init__(self):
        self.forwards, self.gradients = [], []

    def __deepcopy__(self, memo):
        return self

    @property
    def cost(self):
        return sum(self.forwards) + sum(self.gradients)


class Counted(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.tally = network, Tally()

    def forward(self, x):
        z = self.network(x)
        self.tally.forwards.append(len(x))
        if z.requires_grad:
            z.register_hook(lambda gradient: self.tally.gradients.append(len(gradient)))
        return z


class Apart(nn.Module):
    """A network that computes every row by itself, so that company cannot round its logits."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return torch.cat([self.network(row[None]) for row in x])


@dataclass(frozen=True)
class Watched:
    """An attack that writes down whom it was given, batch by batch, and breaks off in the batch of number `until`."""

    attack: object
    given: list = field(compare=False)
    until: int = -1

    @property
    def ball(self):
        return self.attack.ball

    def __call__(self, logits, x, y, *, generator=None):
        self.given.append(generator.ids.tolist())
        search = self.attack(logits, x, y, generator=generator)
        if len(self.given) == self.until:
            yield next(search)
            raise InterruptedError
        yield from search


def watched(column, until=-1):
    """The column, and what each of its attacks will be given; one list for all if it is to break off."""
    common = []
    given = [[] if until < 0 else common for _ in column.stages]
    attacks = [Watched(stage.attack, rows, until) for stage, rows in zip(column.stages, given, strict=True)]
    stages = [replace(stage, attack=attack) for stage, attack in zip(column.stages, attacks, strict=True)]
    return replace(column, stages=tuple(stages)), common if until >= 0 else given


def verdicts(model, x, y, columns, **settings):
    *_, last = evaluate(model, x, y, columns, **settings)
    return last.verdicts


def equal(one, other, rows=slice(None), of=slice(None)):
    """Whether two verdicts are the same to the bit, for these rows of the one and those of the other."""
    return all(torch.equal(getattr(one, name)[rows], getattr(other, name)[of]) for name in FIELDS)


# What suites consist of


def parts(column):
    """Names, with how often they stand there in a row."""
    found = []
    for stage in column.stages:
        if found and found[-1][0] == stage.name:
            found[-1][1] += 1
        else:
            found.append([stage.name, 1])
    return [tuple(pair) for pair in found]


@pytest.mark.parametrize("ball", [Linf(8 / 255), L2(0.5)])
def test_standard_has_the_attacks_budgets_and_order_of_autoattack(ball):
    column = suite.standard(ball)
    assert column.name == "standard"
    assert parts(column) == [("apgd-ce", 1), ("apgd-t", 9), ("fab-t", 9), ("square", 1)]
    first, *targeted = (stage.attack for stage in column.stages)
    assert first == APGD(ball, ce, 100)
    assert targeted[:9] == [TargetedAPGD(ball, rank, steps=100) for rank in range(1, 10)]
    assert targeted[9:18] == [TargetedFAB(ball, rank, 100) for rank in range(1, 10)]
    assert targeted[18] == Square(ball, 5000)


def test_standard_in_l1_has_five_starts_and_five_targets():
    ball = L1(12.0)
    column = suite.standard(ball)
    assert parts(column) == [("apgd-ce", 5), ("apgd-t", 5), ("fab-t", 9), ("square", 1)]
    attacks = [stage.attack for stage in column.stages]
    assert attacks[:5] == [SparseAPGD(ball, ce, 100)] * 5
    assert attacks[5:10] == [TargetedSparseAPGD(ball, rank, steps=100) for rank in range(1, 6)]
    assert attacks[10:] == [*(TargetedFAB(ball, rank, 100) for rank in range(1, 10)), Square(ball, 5000)]
    assert len({stage.stream for stage in column.stages[:5]}) == 5  # starts that differ


@pytest.mark.parametrize("ball", [Linf(8 / 255), L2(0.5), L1(12.0)])
def test_fast_is_how_standard_begins(ball):
    fast, standard = suite.fast(ball), suite.standard(ball)
    assert fast.name == "fast"
    assert [stage.name for stage in fast.stages] == [
        stage.name for stage in standard.stages if stage.name.startswith("apgd")
    ]
    assert fast.stages == standard.stages[: len(fast.stages)]


def test_paper_has_the_columns_of_awps_tables_with_steps_of_a_quarter_of_the_radius():
    ball = Linf(8 / 255)
    columns = suite.paper(ball)
    assert [column.name for column in columns] == ["fgsm", "pgd-20", "pgd-100", "cw-100", "spsa", "standard"]
    fgsm, pgd20, pgd100, cw, spsa = (column.stages[0].attack for column in columns[:5])
    assert (fgsm.pgd.steps, fgsm.pgd.step_size) == (1, ball.radius)
    assert pgd20.pgd == PGD(ball, 2 / 255, 20)
    assert pgd100.pgd == cw.pgd == PGD(ball, 2 / 255, 100)
    assert (pgd20.loss, pgd100.loss, cw.loss) == (ce, ce, margin)
    assert spsa == SPSA(ball, 100, 256)
    assert columns[5] == suite.standard(ball)
    assert suite.paper(ball, 0.003)[1].stages[0].attack.pgd.step_size == 0.003


def test_there_is_no_paper_in_l1():
    with pytest.raises(ValueError, match=r"^ball: "):
        suite.paper(L1(12.0))


def test_names_tell_columns_apart():
    ball = Linf(0.1)
    columns = [suite.pgd(ball, 7, 0.1), suite.pgd(ball, 7, 0.1, 4), suite.pgd(ball, 7, 0.1, loss=margin)]
    assert [column.name for column in columns] == ["pgd-7", "pgd-7x4", "cw-7"]
    assert suite.chained("mine", columns).stages == tuple(column.stages[0] for column in columns)


# What they cost


def certain(classes=10):
    """A model that nobody fools, and three vectors of class 0."""
    model = nn.Linear(12, classes).double()
    with torch.no_grad():
        model.bias[0] = 1000.0
    return model, torch.rand(3, 12, dtype=torch.float64), torch.zeros(3, dtype=torch.long)


def everything(ball, steps):
    """Every kind of column that knows the ball."""
    columns = [
        suite.apgd_ce(ball, steps),
        suite.apgd_ce(ball, steps, restarts=3),
        suite.apgd_dlr(ball, steps),
        suite.apgd_t(ball, steps, targets=3),
        suite.fab_t(ball, steps, targets=2),
        suite.square(ball, 10 * steps),
        suite.standard(ball, steps=steps, queries=7, targets=9),
        suite.fast(ball, steps=steps),
    ]
    if not isinstance(ball, L1):
        columns += [suite.fgsm(ball), suite.pgd(ball, 6, 0.01), suite.pgd(ball, 2, 0.01, 3, margin)]
        columns.append(suite.spsa(ball, steps, samples=5))
    return [replace(column, name=str(number)) for number, column in enumerate(columns)]


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.5), L1(1.0)])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_the_cost_is_what_a_survivor_takes(ball, steps, padded):
    model, x, y = certain()
    for column in everything(ball, steps):
        counted = Counted(model)
        size = 3 if padded else 2
        *_, last = evaluate(counted, x, y, [column], batch_size=size, padded=padded)
        assert last.survivors == 3
        assert last.spent == 3 + 3 * sum(stage.cost for stage in column.stages)
        assert last.spent == counted.tally.cost


@pytest.mark.parametrize("build", [suite.apgd_t, suite.fab_t])
@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.5), L1(1.0)])
def test_a_target_that_does_not_exist_costs_one_forward(build, ball):
    model, x, y = certain(classes=3)
    counted, column = Counted(model), build(ball, 4, targets=5)
    verdicts(counted, x, y, [column])
    assert counted.tally.cost == 3 * (1 + 2 * column.stages[0].cost + 3)


def test_what_half_precision_asks_again_is_all_that_it_costs_more():
    """But for a look at each image. Margins are 1000 of 1000, so nobody comes near."""
    model, x, y = certain()
    counted, column = Counted(model.float()), suite.standard(Linf(0.1), steps=3, queries=5)
    *_, last = evaluate(counted, x.float(), y, [column], dtype=torch.bfloat16)
    assert last.spent == 3 * (1 + sum(stage.cost for stage in column.stages))
    assert counted.tally.cost == last.spent + 3


def test_spent_and_left_add_up_and_never_grow():
    model, x, y = graded(40)
    found = [watched(column) for column in columns()]
    states = list(evaluate(model, x, y, [column for column, _ in found], batch_size=7))
    spent, left = [done.spent for done in states], [done.left for done in states]
    sums = [sum(pair) for pair in zip(spent, left, strict=True)]
    costs = [[stage.cost for stage in column.stages] for column, _ in found]
    wrong = int((states[-1].verdicts["fgsm"].by[:7] == 0).sum())
    assert sums[0] == 40 + (40 - wrong) * sum(map(sum, costs))
    assert sums == sorted(sums, reverse=True)
    assert spent == sorted(spent)
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0 < left[-2]
    taken = sum(
        cost * sum(map(len, rows))
        for (_, given), of in zip(found, costs, strict=True)
        for cost, rows in zip(of, given, strict=True)
    )
    assert spent[-1] == 40 + taken
    assert sums[-1] < sums[0] / 2


# Who is attacked, and what becomes of them


def graded(n, classes=4):
    """A linear model, n vectors that it takes more and more to fool, and some that are wrong as they are."""
    model = nn.Linear(12, classes).double()
    x = torch.rand(n, 12, dtype=torch.float64)
    with torch.no_grad():
        z = model(x)
        model.bias -= z.mean(0)
        y = model(x).argmax(1)
    y[::9] = (y[::9] + 1) % classes
    return model, x, y


def columns(ball=None):
    ball = ball or Linf(0.08)
    single = suite.apgd_dlr(ball, 3) if isinstance(ball, L1) else suite.fgsm(ball)
    chain = [suite.square(ball, 4), single, suite.standard(ball, steps=3, queries=20, targets=2)]
    return [suite.chained("chain", chain), single, suite.standard(ball, steps=3, queries=9, targets=3)]


def test_only_those_that_are_left_go_on_in_full_batches():
    model, x, y = graded(60)
    with torch.no_grad():
        right = model(x).argmax(1) == y
    assert 40 < right.sum() < 60
    found = [watched(column) for column in columns()]
    for name, of in verdicts(model, x, y, [column for column, _ in found], batch_size=8).items():
        (given,) = (given for column, given in found if column.name == name)
        assert torch.equal(of.by == 0, ~right)
        for k, batches in enumerate(given):
            assert [i for rows in batches for i in rows] == of.robust(k).nonzero()[:, 0].tolist()
            assert [len(rows) for rows in batches[:-1]] == [8] * (len(batches) - 1)
            assert 0 < len(batches[-1]) <= 8
        fooled = Counter(of.by.tolist())
        assert sum(fooled[k] > 0 for k in range(1, len(given) + 1)) >= 1


@pytest.mark.parametrize("ball", [Linf(0.08), L2(0.3), L1(0.3)])
def test_a_chain_is_what_its_attacks_find_alone(ball):
    """Attacks are run one by one on all that are right; the first that fools an example has it."""
    model, x, y = graded(40)
    model, ids = Apart(model), 3 * torch.arange(40)
    (chain, *_) = columns(ball)
    of = verdicts(model, x, y, [chain], batch_size=7, seed=5, ids=ids)["chain"]
    with torch.no_grad():
        z = model(x)
    by, iteration, largest = torch.full_like(y, -1), torch.full_like(y, -1), margin(z, y).float()
    wrong = z.argmax(1) != y
    by[wrong], iteration[wrong] = 0, 0
    for k, stage in enumerate(chain.stages, start=1):
        generator = PerExample(derived_seed(5, stage.stream), ids)
        found, open_ = find(stage.attack, model, x, y, generator=generator), by == -1
        assert torch.equal(of.robust(k - 1), open_)
        largest = torch.where(open_, largest.maximum(found.margin.float()), largest)
        by[found.fooled & open_] = k
        iteration = torch.where(found.fooled & open_, found.iteration, iteration)
    assert equal(of, suite.Verdicts(by, iteration, largest))
    counts = Counter(by.tolist())
    assert len(counts) >= 4
    assert counts[-1] > 3


def test_verdicts_are_what_the_documentation_says():
    model, x, y = graded(60)
    with torch.no_grad():
        clean = margin(model(x), y).float()
    for column in columns(L2(0.25)):
        of = verdicts(model, x, y, [column])[column.name]
        survived, natural = of.by == -1, of.by == 0
        assert survived.any()
        assert natural.any()
        assert (~survived & ~natural).any()
        assert torch.equal(of.iteration == -1, survived)
        assert (of.iteration[natural] == 0).all()
        assert (of.margin >= clean).all()
        assert torch.equal(of.margin[natural], clean[natural])
        assert (of.margin[~survived] >= 0).all()
        assert (of.margin[survived] <= 0).all()
        assert torch.equal(of.robust(), survived)
        assert torch.equal(of.robust(len(column.stages)), survived)
        assert torch.equal(of.robust(0), ~natural)
        left = [of.robust(k) for k in range(len(column.stages) + 1)]
        assert all((after <= before).all() for before, after in pairwise(left))


def test_a_column_without_attacks_is_plain_accuracy():
    model, x, y = graded(20)
    *_, last = evaluate(model, x, y, [Column("clean")], batch_size=8)
    with torch.no_grad():
        z = model(x)
    of = last.verdicts["clean"]
    assert torch.equal(of.robust(), z.argmax(1) == y)
    assert torch.equal(of.margin, margin(z, y).float())
    assert (last.spent, last.left, last.batches) == (20, 0, 3)


def test_the_models_own_precision_decides_what_is_wrong_without_an_attack():
    """In single precision, the two logits are one and the same number."""
    model = nn.Linear(1, 2).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64))
    x, y = torch.zeros(2, 1, dtype=torch.float64), torch.tensor([0, 1])
    assert verdicts(model, x, y, [Column("clean")])["clean"].by.tolist() == [0, -1]


def test_where_all_are_wrong_nobody_is_attacked():
    model, x, y = certain()
    column, given = watched(suite.standard(Linf(0.1), steps=3, queries=5))
    *_, last = evaluate(model, x, y + 1, [column])
    assert given == [[]] * 20
    assert (last.survivors, last.left, last.spent) == (0, 0, 3)


# What has no say in it


def apart(n=40):
    model, x, y = graded(n)
    return Apart(model), x, y


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("ball", [Linf(0.08), L2(0.3), L1(0.3)])
def test_batches_and_order_do_not_matter_to_the_bit_where_rows_are_computed_apart(size, ball):
    model, x, y = apart()
    whole = verdicts(model, x, y, columns(ball), batch_size=17, seed=2)
    order = torch.randperm(40)
    other = verdicts(model, x[order], y[order], columns(ball), batch_size=size, seed=2, ids=order)
    for name, of in whole.items():
        assert 3 < of.robust().sum() < 35
        assert equal(of, other[name], rows=order)


def test_the_column_that_an_attack_stands_in_does_not_matter():
    model, x, y = apart(30)
    chain, *others = columns()
    alone = verdicts(model, x, y, [chain], seed=1)["chain"]
    among = verdicts(model, x, y, [others[1], chain, others[0]], seed=1)
    assert equal(alone, among["chain"])
    again = replace(others[0], name="again")
    assert equal(among["fgsm"], verdicts(model, x, y, [again], seed=1)["again"])


def test_seed_and_ids_are_what_is_drawn_from():
    model, x, y = apart(30)
    column = suite.square(Linf(0.05), 30)
    one, same, seed, ids = (
        verdicts(model, x, y, [column], **settings)["square"]
        for settings in ({}, {"ids": torch.arange(30)}, {"seed": 1}, {"ids": torch.arange(1, 31)})
    )
    assert equal(one, same)
    assert not torch.equal(one.margin, seed.margin)
    assert not torch.equal(one.margin, ids.margin)


def test_attacks_and_their_ranks_have_draws_of_their_own():
    streams = [stage.stream for column in suite.paper(Linf(0.1)) for stage in column.stages]
    streams += [stage.stream for stage in suite.apgd_ce(Linf(0.1), restarts=5).stages[1:]]
    assert len(set(streams)) == len(streams) == 29


@pytest.fixture(scope="module")
def trained():
    """A convolutional network with BatchNorm in single precision that resists somewhat; the digits' test images."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(256, 10)]
    model, splits = nn.Sequential(*layers), digits()
    x, y = to_float(splits.train.images), splits.train.labels
    optimizer, attack = torch.optim.Adam(model.parameters(), 5e-3), PGD(Linf(0.1), 0.05, 3)
    for _ in range(5):
        for rows in torch.randperm(len(y)).split(100):
            x_adv = attack(lambda x_adv, rows=rows: ce(model.eval()(x_adv), y[rows]), x[rows])
            optimizer.zero_grad()
            ce(model.train()(x_adv), y[rows]).mean().backward()
            optimizer.step()
    return model.eval(), splits.test.images, splits.test.labels


@pytest.mark.parametrize("ball", [Linf(0.12), L2(0.5)])
def test_batches_hardly_matter_to_convolutions_in_single_precision(trained, ball):
    model, x, y = trained[0], trained[1][:200], trained[2][:200]
    column = suite.standard(ball, steps=4, queries=8, targets=1)
    whole, *others = (verdicts(model, x, y, [column], batch_size=size)["standard"].robust() for size in (200, 64, 3))
    assert 40 < whole.sum() < 190
    for other in others:
        assert (whole == other).double().mean() >= 0.995


@pytest.mark.parametrize("ball", [Linf(0.12), L2(0.5)])
def test_padded_outcomes_are_equal_to_the_bit_in_any_order_and_company(trained, ball):
    model, x, y = trained[0], trained[1][:60], trained[2][:60]
    singles = [
        suite.apgd_ce(ball, 8),
        suite.apgd_t(ball, 8, targets=1),
        suite.fab_t(ball, 8, targets=1),
        suite.square(ball, 40),
    ]
    settings = {"batch_size": 16, "padded": True}
    whole = verdicts(model, x, y, singles, **settings)
    order = torch.randperm(60)
    few = torch.tensor([3, 59, 20, 41, 8])
    for rows in (order, few):
        other = verdicts(model, x[rows], y[rows], singles, ids=rows, **settings)
        for name, of in whole.items():
            assert 0 < of.robust().sum() < 59
            assert equal(of, other[name], rows=rows)


def test_padded_forwards_all_have_as_many_rows():
    counted = Counted(convolutional())
    x = torch.rand(10, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        y = counted.eval()(x).argmax(1)
    counted.tally.forwards.clear()
    ball = Linf(0.01)
    chain = [suite.fgsm(ball), suite.standard(ball, steps=3, queries=9), suite.spsa(ball, 2, samples=3)]
    verdicts(counted, x, y, [suite.chained("all", chain)], batch_size=4, padded=True)
    assert set(counted.tally.forwards) == set(counted.tally.gradients) == {4}


# Going on


def test_whatever_batch_it_goes_on_after_it_ends_with_the_same_verdicts():
    model, x, y = graded(24)
    states = [copy.deepcopy(done) for done in evaluate(model, x, y, columns(), batch_size=5)]
    whole = states[-1].verdicts
    assert len(states) > 30
    assert all(2 < of.robust().sum() < 20 for of in whole.values())
    for k, reached in enumerate(states):
        rest = [copy.copy(done) for done in evaluate(model, x, y, columns(), batch_size=5, after=reached)]
        assert len(rest) == len(states) - k - 1
        assert all(equal(of, reached.verdicts[name]) for name, of in whole.items())  # they were written on
        for one, other in zip(rest, states[k + 1 :], strict=True):
            assert replace(one, verdicts={}) == replace(other, verdicts={})


def test_an_evaluation_that_is_killed_in_a_batch_repeats_that_batch_alone():
    model, x, y = graded(24)
    column, given = watched(columns()[0], until=10**6)
    whole, total = verdicts(model, x, y, [column], batch_size=5), len(given)
    assert total > 15
    for until in range(1, total + 1):
        column, given = watched(columns()[0], until)
        with pytest.raises(InterruptedError):
            for done in evaluate(model, x, y, [column], batch_size=5):
                reached = done  # not a copy: what broke off wrote nothing into it
        *_, last = evaluate(model, x, y, [column], batch_size=5, after=reached)
        assert equal(whole["chain"], last.verdicts["chain"])
        assert len(given) == total + 1
        assert given[until] == given[until - 1]


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ball", [Linf(0.12), L2(0.5)])
def test_half_precision_believes_nobody_and_decides_as_single_precision_does(trained, ball, dtype, monkeypatch):
    model, x, y = trained[0], trained[1][:200], trained[2][:200]
    column, claimed = suite.standard(ball, steps=8, queries=40, targets=2), []

    def recorded(attack, logits, x, y, **settings):
        found = find(attack, logits, x, y, **settings)
        claimed.append((settings["generator"].ids, found))
        return found

    single = verdicts(model, x, y, [column])["standard"]
    monkeypatch.setattr(suite, "find", recorded)
    half = verdicts(model, x, y, [column], dtype=dtype)["standard"]
    assert 20 < single.robust().sum() < 190
    assert (single.robust() == half.robust()).double().mean() >= 0.99
    confirmed = 0
    for ids, found in claimed:
        rows = ids[found.fooled]
        if len(rows) == 0:
            continue
        with torch.no_grad():
            z = model(found.x_adv[found.fooled])
        assert (margin(z, y[rows]) > -1e-4).all()
        assert torch.allclose(half.margin[rows], margin(z, y[rows]), atol=1e-4)
        confirmed += len(rows)
    assert confirmed == (half.by > 0).sum() > 10
    assert (half.margin[half.robust()] <= 0).all()


@dataclass(frozen=True)
class Understates:
    """An attack with a point that fools, which says that its margin is `short` of the largest logit below 0."""

    ball: object
    short: float

    def __call__(self, logits, x, y, *, generator=None):
        yield Trial(x + self.ball.radius, x.new_tensor([[1.0, 1.0 - self.short]]).expand(len(x), -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_whoever_comes_near_is_asked_again(dtype):
    """By as much as this precision gets wrong; not of attacks that are given full precision."""
    model, slack = nn.Linear(1, 2), suite.SLACK[dtype]
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model.bias.zero_()
    x, y, ball = torch.full((2, 1), -0.1), torch.zeros(2, dtype=torch.long), Linf(0.2, None)
    near, far = Understates(ball, slack / 2), Understates(ball, 2 * slack)
    for stage, half, by in (
        (suite.Stage("near", near, 1), dtype, 1),
        (suite.Stage("near", near, 1, precise=True), dtype, -1),
        (suite.Stage("near", near, 1), None, -1),
        (suite.Stage("far", far, 1), dtype, -1),
    ):
        of = verdicts(model, x, y, [Column("it", (stage,))], dtype=half)["it"]
        assert of.by.tolist() == [by, by]
        if by == 1:
            assert torch.allclose(of.margin, torch.tensor(0.2))


@pytest.mark.parametrize(
    ("dtype", "size", "fits"), [(torch.float16, 1e5, False), (torch.float16, 1e4, True), (torch.bfloat16, 1e5, True)]
)
def test_a_precision_that_cannot_hold_the_logits_is_refused_before_any_attack(dtype, size, fits):
    """Else all gradients would be NaN, and everybody would look robust."""
    model, x, y = certain()
    with torch.no_grad():
        model.bias[0] = size
    column, given = watched(suite.fgsm(Linf(0.1)))
    batches = evaluate(model.float(), x.float(), y, [column], dtype=dtype)
    if fits:
        assert len(list(batches)) == 2
        return
    words = r"^dtype: expected one that holds the network's numbers \(its logits overflow\), got torch.float16$"
    with pytest.raises(ValueError, match=words):
        next(batches)
    assert given == [[]]


def test_logits_that_are_no_numbers_in_full_precision_are_not_blamed_on_half():
    model, x, y = certain()
    with torch.no_grad():
        model.bias[0] = math.inf
    of = verdicts(model.float(), x.float(), y, [suite.fgsm(Linf(0.1))], dtype=torch.bfloat16)["fgsm"]
    assert of.robust().all()


class TwoFaced(nn.Module):
    """Copies of it are fooled by anything."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def __deepcopy__(self, memo):
        return nn.Sequential(copy.deepcopy(self.network, memo), nn.Linear(10, 10))

    def forward(self, x):
        return self.network(x)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_the_model_itself_decides_and_none_of_its_copies(dtype, padded):
    model, x, y = certain()
    settings = {"dtype": dtype, "padded": padded, "batch_size": 2}
    column = suite.standard(Linf(0.1), steps=3, queries=5, targets=2)
    of = verdicts(TwoFaced(model.float()), x.float(), y, [column], **settings)["standard"]
    assert of.robust().all()
    assert (of.margin < -990).all()


@dataclass(frozen=True)
class Looks:
    """An attack that writes down the precision of what it is given, and tries nothing."""

    ball: object
    seen: list = field(compare=False)

    def __call__(self, logits, x, y, *, generator=None):
        self.seen.append(logits(x).dtype)
        yield from ()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_what_cannot_do_with_less_is_given_full_precision(dtype):
    ball, seen = Linf(0.1), []
    chain = suite.chained("all", [suite.standard(ball, targets=1), suite.spsa(ball), suite.pgd(ball, 2, 0.1)])
    stages = tuple(replace(stage, attack=Looks(ball, seen)) for stage in chain.stages)
    model, x, y = certain()
    verdicts(model.float(), x.float(), y, [replace(chain, stages=stages)], dtype=dtype)
    half, full = dtype or torch.float32, torch.float32
    assert [stage.name for stage in stages] == ["apgd-ce", "apgd-t", "fab-t", "square", "spsa", "pgd-2"]
    assert seen == [half, half, half, half, full, half]


# Classes, shapes and numbers


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("ball", [Linf(0.08), L2(0.3), L1(0.5)])
def test_few_classes_run_standard_to_the_end(classes, ball):
    """Targets that do not exist fool nobody, and cost no verdict."""
    model, x, y = graded(40, classes)
    whole, few = (
        verdicts(model, x, y, [suite.standard(ball, steps=5, queries=30, targets=targets)])["standard"]
        for targets in (9, classes - 1)
    )
    assert 2 < whole.robust().sum() < 36
    assert torch.equal(whole.robust(), few.robust())
    assert torch.equal(whole.margin, few.margin)


def test_with_one_class_everybody_is_right():
    model, x, y = graded(6, 1)
    of = verdicts(model, x, 0 * y, [suite.standard(Linf(0.1), steps=3, queries=5)])["standard"]
    assert of.robust().all()
    assert (of.margin == -math.inf).all()


def test_vectors_and_images_of_the_same_numbers_have_equal_verdicts():
    """But for Square, whose windows are segments of a vector."""
    model, x, y = graded(30)
    model, ball = nn.Sequential(nn.Flatten(), model), Linf(0.08)
    parts = [suite.apgd_ce(ball, 4), suite.apgd_t(ball, 4, 2), suite.fab_t(ball, 4, 2), suite.pgd(ball, 3, 0.03)]
    chain = suite.chained("chain", parts)
    flat = verdicts(model, x, y, [chain])["chain"]
    square = verdicts(model, x.view(30, 3, 2, 2), y, [chain])["chain"]
    assert 2 < flat.robust().sum() < 26
    assert torch.equal(flat.by, square.by)
    assert torch.equal(flat.iteration, square.iteration)
    assert torch.allclose(flat.margin, square.margin)


def test_bytes_are_255ths(trained):
    model, x, y = trained[0], trained[1][:30], trained[2][:30]
    assert x.dtype is torch.uint8
    column = suite.standard(Linf(0.12), steps=4, queries=8, targets=1)
    whole, floats = (verdicts(model, images, y, [column])["standard"] for images in (x, to_float(x)))
    assert equal(whole, floats)


# Bad input


def refused(model, x, y, columns, **settings):
    """The one line that is said, before anything is computed."""
    counted = Counted(model)
    with pytest.raises(ValueError) as error:
        next(evaluate(counted, x, y, columns, **settings))
    assert counted.tally.forwards == []
    (line,) = str(error.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, r"batch_size: expected an integer >= 1, got 0"),
        ({"batch_size": -3}, r"batch_size: expected an integer >= 1, got -3"),
        ({"dtype": torch.float32}, r"dtype: expected torch.bfloat16, torch.float16 or None, got torch.float32"),
        ({"ids": torch.arange(4)}, r"ids: expected int64 of shape (3,), got torch.int64 of shape (4,)"),
        ({"ids": torch.rand(3)}, r"ids: expected int64 of shape (3,), got torch.float32 of shape (3,)"),
        ({"ids": torch.arange(3)[:, None]}, r"ids: expected int64 of shape (3,), got torch.int64 of shape (3, 1)"),
        ({"columns": []}, "columns: expected at least one, and names that differ, got []"),
        (
            {"columns": [suite.fgsm(Linf(0.1)), suite.fgsm(Linf(0.2))]},
            "columns: expected at least one, and names that differ, got ['fgsm', 'fgsm']",
        ),
        ({"columns": [suite.fgsm(Linf(0.0))]}, "radius: expected a number > 0, got 0"),
        ({"columns": [Column("clean"), suite.square(L2(0.0))]}, "radius: expected a number > 0, got 0"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    model, x, y = certain()
    assert refused(model, x, y, settings.pop("columns", [suite.fgsm(Linf(0.1))]), **settings) == words


def test_a_negative_radius_makes_no_ball():
    with pytest.raises(ValueError, match=r"^radius: expected a finite number >= 0, got -0.1$"):
        suite.standard(Linf(-0.1))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.full((3, 12), 255.0), "x: expected numbers in the box (0, 1), got 255 to 255"),
        (torch.full((3, 12), -0.5), "x: expected numbers in the box (0, 1), got -0.5 to -0.5"),
        (torch.full((3, 12), math.nan), "x: expected numbers in the box (0, 1), got nan to nan"),
        (torch.zeros(3, 12, dtype=torch.int64), "x: expected uint8 or floating point numbers, got torch.int64"),
        (torch.zeros(3, 12, dtype=torch.bool), "x: expected uint8 or floating point numbers, got torch.bool"),
    ],
)
def test_inputs_outside_of_the_box_are_refused(x, words):
    model, _, y = certain()
    assert refused(model.float(), x, y, [suite.fgsm(Linf(0.1))]) == words


@pytest.mark.parametrize("columns", [[Column("clean")], [suite.fgsm(Linf(0.1, None))]])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_without_a_box_too(columns, number):
    model, x, y = certain()
    x[1, 2] = number
    assert refused(model, x, y, columns).startswith("x: expected finite numbers, got ")


def test_numbers_in_another_box_are_not_refused():
    model, x, y = certain()
    verdicts(model, 6 * x - 3, y, [suite.fgsm(Linf(0.1, (-3.0, 3.0)))])
    verdicts(model, 600 * x, y, [suite.fgsm(Linf(0.1, None)), Column("clean")])


@pytest.mark.parametrize(
    "y",
    [
        torch.zeros(4, dtype=torch.long),
        torch.zeros(3),
        torch.zeros(3, dtype=torch.int32),
        torch.zeros(3, 1, dtype=torch.long),
        torch.full((3, 10), 0.1),
        torch.tensor(0),
    ],
)
def test_labels_of_another_shape_or_kind_are_refused(y):
    model, x, _ = certain()
    words = "y: expected int64 classes of shape (3,), one for each of at least one input, got "
    assert refused(model, x, y, [suite.fgsm(Linf(0.1))]) == f"{words}{y.dtype} of shape {tuple(y.shape)}"


def test_no_data_are_refused():
    model, x, y = certain()
    line = refused(model, x[:0], y[:0], [suite.fgsm(Linf(0.1))])
    assert line.startswith("y: expected int64 classes of shape (0,), one for each of at least one input, got ")


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_that_are_no_class_of_the_model_are_refused(label):
    model, x, y = certain()
    y[2] = label
    words = rf"^y: expected classes in 0 \.\.\. 9, got {min(label, 0)} to {max(label, 0)}$"
    with pytest.raises(ValueError, match=words):
        next(evaluate(model, x, y, [suite.fgsm(Linf(0.1))], batch_size=2))


def test_it_goes_on_after_nothing_but_its_own_batches():
    model, x, y = certain()
    reached = next(evaluate(model, x, y, [Column("clean")]))
    words = "after: expected verdicts of 3 examples in the columns ['fgsm'], got those of 3 in ['clean']"
    assert refused(model, x, y, [suite.fgsm(Linf(0.1))], after=reached) == words
    words = "after: expected verdicts of 2 examples in the columns ['clean'], got those of 3 in ['clean']"
    assert refused(model, x[:2], y[:2], [Column("clean")], after=reached) == words


# The model


class Moody(nn.Module):
    """With layers in different modes, one of them frozen, and a gradient that somebody left there."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(convolutional(), nn.Dropout(0.5))
        self.train()
        self.network[0][1].eval()
        self.network[0][0].weight.requires_grad_(False)
        self.network[0][6].weight.grad = torch.ones_like(self.network[0][6].weight)

    def forward(self, x):
        return self.network(x)


def cannot_be_copied(self, memo):
    raise TypeError("no")


def signs_of_life(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if parameter.grad is None else parameter.grad.tolist() for parameter in model.parameters()],
    )


@pytest.mark.parametrize("way_out", ["end", "closed", "error"])
@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_model_is_left_as_it_was_on_any_way_out(way_out, copied, dtype, monkeypatch):
    model = Moody()
    if not copied:
        monkeypatch.setattr(Moody, "__deepcopy__", cannot_be_copied, raising=False)
    x, y = torch.rand(12, 3, 6, 6, dtype=torch.float64), torch.arange(12) % 3
    ball, ids = Linf(0.05), torch.arange(12)
    chain = [suite.standard(ball, steps=2, queries=4, targets=2), suite.spsa(ball, 2, 3), suite.pgd(ball, 2, 0.1)]
    column, _ = watched(suite.chained("all", chain), until=7 if way_out == "error" else 10**6)
    before, alive, given = state(model), signs_of_life(model), [tensor.clone() for tensor in (x, y, ids)]
    drawn = torch.get_rng_state()
    batches = evaluate(model, x, y, [column], batch_size=5, ids=ids, dtype=dtype)
    if way_out == "closed":
        for _ in range(6):
            next(batches)
        batches.close()
    else:
        with pytest.raises(InterruptedError) if way_out == "error" else nullcontext():
            list(batches)
    assert equal_states(state(model), before)
    assert signs_of_life(model) == alive
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(one, other) for one, other in zip((x, y, ids), given, strict=True))


def test_callers_gradients_stay_switched_as_they_are():
    model, x, y = certain()
    for _ in evaluate(model, x, y, [suite.standard(Linf(0.1), steps=2, queries=4)]):
        assert torch.is_grad_enabled()
    with torch.no_grad():
        for _ in evaluate(model, x, y, [suite.standard(Linf(0.1), steps=2, queries=4)]):
            assert not torch.is_grad_enabled()


def test_between_batches_the_model_is_its_owners():
    """Another evaluation beside it, or a change of mode, changes nothing; and it is left as it was."""

    def network():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        return nn.Sequential(*layers).train()

    x, y, column = torch.rand(12, 3, 6, 6), torch.arange(12) % 3, suite.fast(Linf(0.03), steps=3)
    expected = verdicts(network(), x, y, [column], batch_size=5)["fast"]
    model = network()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    one, other = (evaluate(model, x, y, [column], batch_size=5) for _ in range(2))
    next(other)
    for found in one:
        last = found.verdicts["fast"]
        assert model.training
        next(other, None)
        model.train()
    assert equal(last, expected)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("box", [(0.0, 255.0), (-1.0, 1.0)])
def test_uint8_images_have_one_box(box):
    x = torch.randint(256, (4, 3, 2, 2), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^x: uint8 is taken as numbers in \(0, 1\), expected floating point in "):
        verdicts(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), x, torch.arange(4) % 3, [suite.fast(Linf(0.1, box))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_spsa_is_refused_where_its_differences_vanish(dtype):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).to(dtype)
    with pytest.raises(ValueError, match=rf"^model: expected fp32 weights for spsa, whose differences {dtype} rounds"):
        verdicts(model, torch.rand(4, 3, 2, 2), torch.arange(4) % 3, [suite.spsa(Linf(0.1))])


def test_a_network_that_answers_with_no_number_is_never_right():
    x, y = torch.rand(6, 3, 2, 2), torch.zeros(6, dtype=torch.long)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    nn.init.constant_(model[1].bias, torch.nan)
    assert (verdicts(model, x, y, [suite.fast(Linf(0.1), steps=2)])["fast"].by == 0).all()
