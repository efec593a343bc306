"""Tables of models made up for tests of the study: what goes with the gap is known."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from saltflat.lab.study.table import Measure, Model, Table

METHODS = ("at", "trades", "at-awp", "random-wp")
SHARP = Measure("sharpness", "nats", "average over 10 draws, gamma 0.5, PGD-20 for each", 1)


def grid(kinds: Mapping[str, str], *, seeds: int = 3, checkpoints: int = 1, draw: int = 0, floor: float = 0.0) -> Table:
    """Models of four methods × two learning rates × two sizes × seeds, each with checkpoints of one run.

    `kinds`: measure name to what it is a function of: "gap" (of the part of the gap that training loss does not know),
    "loss" (of training loss alone), "reversed", "noise", or "width" (sign −1, falls with the gap's own part).
    """
    draws = np.random.default_rng(draw)
    models = []
    for method in METHODS:
        for rate in (0.05, 0.1):
            for examples in (500, 1000):
                for seed in range(seeds):
                    run = f"{method}-{rate}-{examples}-{seed}"
                    trained = draws.normal()
                    models += [
                        model(run, method, rate, examples, seed, epoch, trained, kinds, draws)
                        for epoch in range(1, checkpoints + 1)
                    ]
    return Table("Does flatness go with a small robust gap?", described(kinds), tuple(models), floor, SETTINGS)


SETTINGS = {
    "attack": "PGD-20, L-inf, eps 8/255, step 2/255, 5 restarts, made afresh for each weight",
    "images": "1000 training and 1000 test images",
    "mode": "eval",
}


def described(kinds: Mapping[str, str]) -> tuple[Measure, ...]:
    return tuple(
        Measure(name, "nats", "10 draws, gamma 0.5, PGD-20 for each, eval mode", -1 if kind == "width" else 1)
        for name, kind in kinds.items()
    )


def model(
    run: str,
    method: str,
    rate: float,
    examples: int,
    seed: int,
    epoch: int,
    trained: float,
    kinds: Mapping[str, str],
    draws: np.random.Generator,
) -> Model:
    own = draws.normal() + 0.4 * METHODS.index(method)  # of the gap, beside how far the model is trained
    progress = trained + 0.5 * epoch
    loss = 1.2 - 0.25 * progress
    gap = 0.6 + 0.12 * progress + 0.12 * own
    accuracy = 60 + 8 * progress
    value = {
        "gap": lambda: math.exp(own + 0.6 * progress + 0.2 * draws.normal()),
        "loss": lambda: math.exp(2 - 2 * loss),
        "reversed": lambda: -gap + 0.05 * draws.normal(),
        "noise": lambda: draws.normal(),
        "width": lambda: math.exp(-own - 0.6 * progress + 0.2 * draws.normal()),
    }
    measures = {name: float(value[kind]()) for name, kind in kinds.items()}
    return Model(
        name=f"{run}-epoch-{epoch}",
        cluster=run,
        method=method,
        axes={"objective": method, "learning_rate": rate, "examples": examples, "epochs": epoch, "seed": seed},
        targets={
            "gap_loss": gap,
            "gap_accuracy": 30 * gap + 0.5 * draws.normal(),
            "test_robust_accuracy": 45 + 3 * draws.normal(),
        },
        controls={
            "train_robust_loss": loss,
            "train_robust_accuracy": accuracy,
            "weight_norm": 20 + draws.normal(),
        },
        measures=measures,
        errors={name: 0.05 * abs(measure) for name, measure in measures.items()},
        again={name: measure * (1 + 0.05 * draws.normal()) for name, measure in measures.items()},
    )


def names(count: int, kinds: Sequence[str]) -> dict[str, str]:
    return {f"measure {index}": kinds[index % len(kinds)] for index in range(count)}


def with_equal_seeds(table: Table, seeds: int) -> Table:
    """Every model of a table of one seed as so many runs, which come out alike."""
    models = tuple(
        replace(one, name=f"{one.name} {seed}", cluster=f"{one.cluster} {seed}", axes=dict(one.axes) | {"seed": seed})
        for one in table.models
        for seed in range(seeds)
    )
    return replace(table, models=models)
