"""Which models a study trains: a grid of configs around base points, by name.

small   the bundled digits, a small CNN, minutes on a CPU; for the method of the study, and for what digits can say
paper   CIFAR-10, PreActResNet-18, the published hyper-parameters; days on a GPU

Two models that differ in one axis alone are what the granulated statistics live on: every axis is varied by itself,
from two base points, AT without and with AWP; every method is trained with several seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from saltflat.lab.config import Attack, Awp, BadInput, Data, Evaluation, Model, Objective, Optimizer, Train
from saltflat.lab.recipes import OBJECTIVES, RECIPES, adversary

Change = Mapping[str, Any]  # "awp.gamma" -> value
NOT_AN_AXIS = (
    "recipe", "device", "threads", "checkpoint_minutes", "keep_every", "data.path", "data.workers", "extra.path",
    "evaluation",
)  # fmt: skip
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Grid:
    """A base config, what each method changes in it, and what each axis does.

    methods: trained with every seed. axes: values tried one at a time, from each of the `varied` methods, with the
    first seed. floor: training robust accuracy in percent, below which a model counts as undertrained. checkpoints: of
    every run, which are models of the study.
    """

    base: Train
    methods: Mapping[str, Change]
    varied: Sequence[str]
    axes: Mapping[str, Sequence[Any]]
    floor: float
    checkpoints: Sequence[str] = ("last",)


SMALL = Grid(
    base=Train(
        data=Data(examples=400, validation_examples=200),
        model=Model("small-cnn", width=16, mean=(0.3,), std=(0.38,)),
        attack=Attack(eps=0.15, step_size=0.0375),
        optimizer=Optimizer(epochs=24, batch_size=50, learning_rate=0.1),
        evaluation=Evaluation(steps=5, examples=100, batch_size=512),
        threads=1,
        device="cpu",
    ),
    methods={
        "at": {},
        "at-awp": {"awp.gamma": 0.005},
        "trades": {"objective.name": "trades"},
        "trades-awp": {"objective.name": "trades", "awp.gamma": 0.005},
        "mart": {"objective.name": "mart"},
        "mart-awp": {"objective.name": "mart", "awp.gamma": 0.005},
    },
    varied=("at", "at-awp"),
    axes={
        "awp.gamma": (0.002, 0.01, 0.02),
        "optimizer.learning_rate": (0.02, 0.05),
        "optimizer.schedule": ("constant", "cosine", "cyclic"),
        "optimizer.weight_decay": (0.0, 5e-3),
        "optimizer.epochs": (8, 16, 40),
        "optimizer.batch_size": (25, 100),
        "data.examples": (200, 800),
        "model.width": (8, 24),
        "attack.steps": (3,),
    },
    floor=60.0,
)

PAPER = Grid(
    base=replace(RECIPES["cifar10-at"], keep_every=20),
    methods={
        "at": {},
        "at-awp": {"awp.gamma": 0.01},
        "trades": {"objective.name": "trades", "attack.start": "gaussian"},
        "trades-awp": {
            "objective.name": "trades",
            "attack.start": "gaussian",
            "awp.gamma": 0.005,
            "awp.warmup": 9,
        },
        "mart": {"objective.name": "mart", "attack.start": "gaussian"},
        "mart-awp": {"objective.name": "mart", "attack.start": "gaussian", "awp.gamma": 0.005, "awp.warmup": 9},
    },
    varied=("at", "at-awp"),
    axes={
        "awp.gamma": (0.001, 0.005, 0.02),
        "optimizer.learning_rate": (0.05,),
        "optimizer.schedule": ("constant", "cosine", "cyclic"),
        "optimizer.weight_decay": (1e-4, 2e-3),
        "optimizer.epochs": (100,),
        "optimizer.batch_size": (256, 512),
        "data.examples": (10000, 25000),
        "data.augment": ("none",),
        "model.name": ("vgg19-bn",),
        "optimizer.average": (0.999,),
        "data.label_smoothing": (0.1,),
        "data.mix": ("mixup", "cutmix"),
    },
    floor=35.0,
    checkpoints=("last", "best"),  # the best is early stopping, AT-ES of the paper
)
PRESETS = {"small": SMALL, "paper": PAPER}


def trainings(
    grid: Grid, recipes: Iterable[str] = (), data_path: Path | None = None, device: str | None = None
) -> dict[str, Train]:
    """All configs by name, each once; they are named after what they change. `recipes` join the methods: their
    objective and their weight adversary take the place of the base's.

    >>> list(trainings(replace(SMALL, axes={"awp.gamma": (0.01,)}, methods={"at": {}, "at-awp": {"awp.gamma": 0.005}})))
    ['at-seed0', 'at-seed1', 'at-seed2', 'at-awp-seed0', 'at-awp-seed1', 'at-awp-seed2', 'at-gamma-0.01']
    """
    given = list(recipes)
    if repeated := [name for i, name in enumerate(given) if name in given[:i]]:
        raise BadInput(f"recipes: expected each once, got {repeated[0]!r} again")
    methods = {**grid.methods, **{name: _method(name, grid) for name in given}}
    base = replace(grid.base, device=device or grid.base.device)
    base = base if data_path is None else replace(base, data=replace(base.data, path=data_path))
    found: dict[str, Train] = {}
    for name, changes in methods.items():
        for seed in SEEDS:
            config = named(changed(base, {**changes, "seed": seed}))
            if config not in found.values():
                found[f"{name}-seed{seed}"] = config
    for axis, values in grid.axes.items():
        for name in grid.varied:
            for value in values:
                config = named(changed(base, {**methods[name], axis: value}))
                if config not in found.values():
                    found[f"{name}-{axis.rpartition('.')[2].replace('_', '-')}-{value}"] = config
    return found


def device(preset: str | None) -> str:
    """Where a preset's models are trained and measured; "auto" without one."""
    return "auto" if preset is None else PRESETS[preset].base.device


def axes(config: Train) -> dict[str, Any]:
    """Every field that decides how a network comes out, by its name: what may differ between two models."""
    return {
        name: value
        for name, value in _leaves("", config)
        if not any(name == other or name.startswith(f"{other}.") for other in NOT_AN_AXIS)
    }


def _leaves(prefix: str, tree: Any) -> Iterator[tuple[str, Any]]:
    for entry in fields(tree):
        name, value = f"{prefix}{entry.name}", getattr(tree, entry.name)
        if is_dataclass(value):
            yield from _leaves(f"{name}.", value)
        else:
            yield name, list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def changed(config: Train, changes: Change) -> Train:
    for name, value in changes.items():
        part, _, leaf = name.rpartition(".")
        inner = replace(getattr(config, part), **{leaf: value}) if part else value
        config = replace(config, **{part or leaf: inner})
    return config


def named(config: Train) -> Train:
    """The recipe's name says the objective, and who perturbs the weights."""
    _, name = adversary(config.awp)
    return replace(config, recipe=config.objective.name + (f"-{name}" if name else ""))


def _method(recipe: str, grid: Grid) -> Change:
    if recipe not in RECIPES:
        raise BadInput(f"recipes: expected names that `saltflat recipes` lists, got {recipe!r}")
    if recipe in grid.methods:
        raise BadInput(f"recipes: {recipe!r} is in the grid already; expected others")
    of = RECIPES[recipe]
    prefix = "" if of.data.name == "digits" else f"{of.data.name}-"
    if _bare(of) not in [_bare(RECIPES[name]) for name in (f"{prefix}{of}" for of in OBJECTIVES) if name in RECIPES]:
        raise BadInput(
            f"recipes: a grid takes a recipe's objective and weight adversary alone, and {recipe!r} is more than that"
        )
    found = {"objective": of.objective, "awp": of.awp}
    if named(changed(grid.base, found)) in [named(changed(grid.base, changes)) for changes in grid.methods.values()]:
        raise BadInput(f"recipes: {recipe!r} adds nothing to the grid; expected others")
    return found


def _bare(config: Train) -> Train:
    """All but the objective and the weight adversary."""
    return replace(config, recipe="", objective=Objective(), awp=Awp())
