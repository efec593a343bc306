"""Which trainings the study of the paper's claims compares: arms, each with what it is held against, by preset.

small   the bundled digits, a small CNN, half an hour or so on two cores
cpu     1,000 images of CIFAR-10, a small ResNet: as much as two cores do in some hours, and enough to overfit
paper   CIFAR-10, PreActResNet-18, 200 epochs, the published settings: for GPUs; it was not run

An arm changes a few fields of its preset's base. Whatever it is held against is trained from the same weights, on the
same images in the same order, so that differences are paired over seeds; so another network, or another threat, is
held against nothing, and AWP on top of it against that.

RandomWP's gamma is none of AWP's: a standard deviation for each number, relative to its filter's norm, so that its v is
much longer.

Questions, and where they come from: Wu, Xia, Wang, NeurIPS 2020, arXiv 2004.05884 (methods with and without AWP, early
stopping, gamma, K2 and A, L2, other regularisers, random weight perturbation); Rice, Wong, Kolter, ICML 2020, arXiv
2002.11569 (l1, l2, cutout, mixup; schedules); Yu et al., IJCAI 2022, arXiv 2205.14826 (RobustWP). Early stopping is no
arm: it is the best checkpoint of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saltflat.lab.config import Attack, BadInput, Data, Evaluation, Extra, Model, Optimizer, Train
from saltflat.lab.gaps import How as GapHow
from saltflat.lab.landscapes import How as Slice
from saltflat.lab.measures import How
from saltflat.lab.recipes import RECIPES
from saltflat.lab.study.grid import changed, named

Change = Mapping[str, Any]  # "awp.gamma" -> value


@dataclass(frozen=True)
class Arm:
    """A training that is repeated with several seeds.

    question: what it is to answer, a heading. against: the arm that it is paired with, or none. changes: of the base's
    fields.
    """

    name: str
    question: str
    against: str
    changes: Change


@dataclass(frozen=True)
class Plan:
    """What is measured of each run: of its best checkpoint and of its last, but for flatness and the landscape, which
    are the last's.

    attacks, examples: on test images, as in `saltflat evaluate`. gap: on training and test images. measures, how: of
    flatness, as in `saltflat flatness`. alphas, directions, slices: of the landscape.
    """

    attacks: tuple[str, ...]
    examples: int
    gap: GapHow
    measures: tuple[str, ...]
    how: How
    alphas: tuple[float, ...]
    directions: int
    slices: Slice


@dataclass(frozen=True)
class Preset:
    """A base config, its arms, and what is measured."""

    base: Train
    arms: Sequence[Arm]
    plan: Plan


AWP = "AWP on AT, TRADES, MART and RST"
TRADES = {"objective.name": "trades", "attack.start": "gaussian"}  # as published
MART = {"objective.name": "mart", "attack.start": "gaussian"}
NEIGHBOURS = "Its neighbours"
GAMMA, STEPS = "The size gamma of the weight perturbation", "The ascent: K2 steps, A alternations"
L2, OTHERS = "L2 in place of L-inf", "Other remedies of overfitting"
RATES, NETWORK = "Schedules of the learning rate", "Another architecture"


def _methods(at: Change, others: Change, extra: Change | None) -> list[Arm]:
    """With and without AWP, as it is on AT and as it is on the others; RST where there are further labelled images."""
    found = []
    for name, changes, awp in (("at", {}, at), ("trades", TRADES, others), ("mart", MART, others)):
        found += [Arm(name, AWP, "", changes), Arm(f"{name}-awp", AWP, name, {**changes, **awp})]
    if extra is not None:
        rst = {**TRADES, **extra}
        found += [Arm("rst", AWP, "trades", rst), Arm("rst-awp", AWP, "rst", {**rst, **others})]
    return found


def _neighbours(gamma: float) -> list[Arm]:
    robust = {"awp.method": "robust-wp", "awp.gamma": gamma, "awp.steps": 10}
    random = {"awp.method": "random-wp", "awp.gamma": gamma}
    return [Arm("at-robust-wp", NEIGHBOURS, "at", robust), Arm("at-random-wp", NEIGHBOURS, "at", random)]


def _both(name: str, question: str, changes: Change, gamma: float, against: str = "at") -> list[Arm]:
    """A change to AT, and AWP on top of it."""
    return [
        Arm(f"at-{name}", question, against, changes),
        Arm(f"at-awp-{name}", question, f"at-{name}", {**changes, "awp.gamma": gamma}),
    ]


def _remedies(l1: float, decay: float, side: int) -> list[Arm]:
    changes: dict[str, Change] = {
        "l1": {"optimizer.l1": l1},
        "weight-decay": {"optimizer.weight_decay": decay},
        "cutout": {"data.cutout": side},
        "mixup": {"data.mix": "mixup"},
    }
    return [Arm(f"at-{name}", OTHERS, "at", change) for name, change in changes.items()]


def _gammas(values: Sequence[float]) -> list[Arm]:
    return [Arm(f"at-awp-gamma-{value:g}", GAMMA, "at", {"awp.gamma": value}) for value in values]


def _ascents(gamma: float, steps: int) -> list[Arm]:
    return [
        Arm(f"at-awp-k2-{steps}", STEPS, "at-awp", {"awp.gamma": gamma, "awp.steps": steps}),
        Arm("at-awp-a-2", STEPS, "at-awp", {"awp.gamma": gamma, "awp.alternations": 2}),
    ]


def _schedules(gamma: float) -> list[Arm]:
    names = ("cosine", "cyclic")
    return [arm for name in names for arm in _both(name, RATES, {"optimizer.schedule": name}, gamma)]


_ALPHAS = tuple(round(-1 + 0.2 * i, 1) for i in range(11))

SMALL = Preset(
    base=Train(
        data=Data(examples=400, validation_examples=200),
        model=Model("small-cnn", width=16, mean=(0.3,), std=(0.38,)),
        attack=Attack(eps=0.15, step_size=0.0375),
        optimizer=Optimizer(epochs=24, batch_size=50, learning_rate=0.1),
        evaluation=Evaluation(steps=5, examples=200, batch_size=512),
        threads=1,
        device="cpu",
    ),
    arms=[
        *_methods({"awp.gamma": 0.005}, {"awp.gamma": 0.005}, None),
        *_neighbours(0.005),
        *_gammas((0.002, 0.01, 0.02)),
        *_ascents(0.005, 5),
        *_both("l2", L2, {"attack.norm": "L2", "attack.eps": 1.0, "attack.step_size": 0.25}, 0.005, ""),
        *_remedies(1e-5, 5e-3, 3)[:3],
        *_schedules(0.005),
        *_both("mlp", NETWORK, {"model.name": "mlp", "model.width": 128}, 0.005, ""),
    ],
    plan=Plan(
        attacks=("clean", "pgd-20", "fast"),
        examples=500,
        gap=GapHow(train_examples=400, test_examples=1000, checked_examples=128),
        measures=("average",),
        how=How(examples=256, draws=8),
        alphas=_ALPHAS,
        directions=2,
        slices=Slice(examples=256),
    ),
)

CPU = Preset(
    base=replace(
        RECIPES["cifar10-at"],
        data=replace(RECIPES["cifar10-at"].data, augment="none", examples=1000, validation_examples=300),
        model=replace(RECIPES["cifar10-at"].model, name="small-resnet", width=24),
        optimizer=replace(RECIPES["cifar10-at"].optimizer, epochs=40, batch_size=64),
        evaluation=Evaluation(steps=5, examples=150),
        threads=1,
        device="cpu",
    ),
    arms=[
        *_methods({"awp.gamma": 0.01}, {"awp.gamma": 0.005}, {"extra.share": 0.5}),
        *_neighbours(0.01),
        *_gammas((0.001, 0.003, 0.03)),
        *_remedies(5e-5, 5e-3, 14),
        *_both("l2", L2, {"attack.norm": "L2", "attack.eps": 128 / 255, "attack.step_size": 15 / 255}, 0.01, ""),
        *_schedules(0.01),
        *_ascents(0.01, 5),
        *_both("wrn", NETWORK, {"model.name": "wide-resnet", "model.width": 0, "model.depth": 10,
                                "model.widen_factor": 1}, 0.01, ""),
    ],
    plan=Plan(
        attacks=("clean", "pgd-20", "fast"),
        examples=200,
        gap=GapHow(train_examples=500, test_examples=1000, checked_examples=64),
        measures=("average",),
        how=How(examples=256, draws=10),
        alphas=_ALPHAS,
        directions=1,
        slices=Slice(examples=256),
    ),
)  # fmt: skip

PAPER = Preset(
    base=RECIPES["cifar10-at"],
    arms=[
        *_methods({"awp.gamma": 0.01}, {"awp.gamma": 0.005, "awp.warmup": 9}, {"extra.share": 0.5}),
        *_neighbours(0.01),
        *_gammas((0.001, 0.005, 0.02)),
        *_remedies(5e-6, 5e-3, 14),
        *_both("l2", L2, {"attack.norm": "L2", "attack.eps": 128 / 255, "attack.step_size": 15 / 255}, 0.01, ""),
        *_schedules(0.01),
        *_ascents(0.01, 10),
        *_both("vgg", NETWORK, {"model.name": "vgg19-bn"}, 0.01, ""),
    ],
    plan=Plan(
        attacks=("clean", "pgd-20", "standard"),
        examples=0,
        gap=GapHow(train_examples=10000, test_examples=10000),
        measures=("average",),
        how=How(examples=1000, steps=20),
        alphas=tuple(round(-1 + 0.1 * i, 1) for i in range(21)),
        directions=5,
        slices=Slice(examples=1000),
    ),
)
PRESETS = {"small": SMALL, "cpu": CPU, "paper": PAPER}


def chosen(preset: Preset, names: Sequence[str], extra: Path | None) -> list[Arm]:
    """The arms of these names, and all that they are held against; all of the preset's for none.

    Those that want further images are left out where there are none, unless they were named: BadInput then.

    >>> [arm.name for arm in chosen(SMALL, ["at-awp-a-2"], None)]
    ['at', 'at-awp', 'at-awp-a-2']
    """
    by_name = {arm.name: arm for arm in preset.arms}
    for name in names:
        if name not in by_name:
            raise BadInput(f"arms: expected any of {', '.join(by_name)}, got {name!r}")
    wanted, waiting = set[str](), list(names or by_name)
    while waiting:
        name = waiting.pop()
        arm = by_name[name]
        if _wants_extra(arm) and extra is None:
            if names:
                raise BadInput(f"extra_path: expected a file of further labelled images for {name}, got none")
            continue
        wanted.add(name)
        waiting += [arm.against] if arm.against and arm.against not in wanted else []
    found = [arm for arm in preset.arms if arm.name in wanted]
    if extra is not None and not any(map(_wants_extra, found)):
        raise BadInput(f"extra_path: none of these arms takes further images, expected none, got {str(extra)!r}")
    return found


def config(base: Train, arm: Arm, seed: int, extra: Path | None) -> Train:
    """The config of one run, whose recipe's name says the objective, and who perturbs the weights.

    >>> config(SMALL.base, SMALL.arms[1], 2, None).recipe
    'at-awp'
    """
    found = named(changed(base, {**arm.changes, "seed": seed}))
    return replace(found, extra=Extra(extra, found.extra.share)) if _wants_extra(arm) else found


def _wants_extra(arm: Arm) -> bool:
    return "extra.share" in arm.changes
