"""From a config to the weight adversary of a training: its ball at every moment, and the step that climbs in it.

A method is a ball, a climb, which weights, and what is climbed; which of them are which stands in one row here, and
docs/family.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from saltflat import parallel
from saltflat.balls import Box, Ellipsoid, Global, Layerwise
from saltflat.lab.climbing import attack_on
from saltflat.lab.config import Awp, Train
from saltflat.lab.precision import resolved, taken_in
from saltflat.neighbours.accumulated import accumulated_step
from saltflat.neighbours.adaptive_random_wp import adaptively_drawn, by_coordinate, by_filter
from saltflat.neighbours.amortised import amortised_step
from saltflat.neighbours.free import free_step
from saltflat.neighbours.kaggle import along_momentum
from saltflat.neighbours.random_wp import Gaussian, drawn, increasing, two_batch_step
from saltflat.neighbours.robust_wp import accumulated, below
from saltflat.neighbours.weighted import all_but_last
from saltflat.objectives import Objective
from saltflat.random import Generator
from saltflat.schedules import constant, from_progress
from saltflat.step import AttackOn, Climb, Radius, Step, double_perturbation_step, itself
from saltflat.weights import Where, default, perturbed, trained

LAYERS = ("awp", "robust-wp", "kaggle", "fast")  # leave biases and norm layers alone


def ball(config: Train) -> Callable[[float], Radius | None]:
    """t -> the ball, or None while there is no weight adversary."""
    awp = config.awp
    course = increasing(awp.gamma, awp.increase) if awp.increase else constant(awp.gamma)
    gamma = from_progress(awp.warmup / config.optimizer.epochs, course)
    of: dict[str, Callable[[float], Radius]] = {
        "awp": Layerwise,
        "robust-wp": partial(Global, relative=True),
        "random-wp": Gaussian,
        "m-rwp": Gaussian,
        "arwp": Gaussian,
        "sam": Global,
        "asam": partial(Ellipsoid, offset=awp.offset),
        "kaggle": Box,
        "fast": Box,
    }
    made = of[awp.method]
    if parallel.ranks() > 1 and config.compute.spread == "fsdp" and awp.method != "awp":
        return lambda t: parallel.Gathered(gamma(t), made(gamma(t))) if gamma(t) > 0 else None
    return lambda t: made(gamma(t)) if gamma(t) > 0 else None


def step(config: Train, memory: dict[str, Tensor]) -> Callable[..., Step]:
    """The step of that method, called like `double_perturbation_step`, in the config's precision; `memory` is what it
    keeps between steps.
    """

    @cache
    def climbed_on(precision: str, device: torch.device) -> dict[str, AttackOn]:
        if parallel.ranks() > 1 and config.compute.spread == "fsdp":
            return {}  # whose weights are whole within its own forwards alone
        found = attack_on(config, precision, device)
        return {} if found is None and parallel.ranks() == 1 else {"attack_on": parallel.on_raw(found or itself)}

    def taken(
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        **given: Any,
    ) -> Step:
        precision = resolved(config.compute.precision, x.device)
        given |= {"optimizer": optimizer, "where": _where(config.awp, model), **climbed_on(precision, x.device)}

        def take(cast: Objective) -> Step:
            climbed = _climbed(config.awp, cast, objective)
            return _taken(config, memory, model, x, y, climbed, objective=cast, **given)

        return taken_in(precision, take, objective, optimizer, memory, x.device)

    return taken


def _taken(
    config: Train,
    memory: dict[str, Tensor],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    climbed: Callable[..., Tensor] | None,
    **given: Any,
) -> Step:
    """The one of our steps that is the method's."""
    awp, attack = config.awp, config.attack
    if awp.method == "m-rwp":
        return two_batch_step(model, x, y, share=awp.share, attack_mode=attack.mode, **given)
    if awp.amortised:
        return amortised_step(
            model,
            x,
            y,
            attack_mode=attack.mode,
            step_inside=awp.step_inside,
            joint_mode=awp.joint_mode,
            **given,
        )
    given |= {
        "climb": _climb(awp, memory, given["optimizer"], given["generator"]),
        "climbed": climbed,
        "steps": awp.steps,
        "step_size": None if awp.method in ("kaggle", "fast") else awp.step_size or None,
    }
    if config.optimizer.accumulate > 1:
        return accumulated_step(
            model,
            x,
            y,
            micro_batches=config.optimizer.accumulate,
            attack_mode=attack.mode,
            step_inside=awp.step_inside,
            **given,
        )
    if attack.replays > 0:
        given.pop("attack_on", None)  # it attacks nothing by itself
        return free_step(model, x, y, replays=attack.replays, memory=memory, **given)
    return double_perturbation_step(
        model,
        x,
        y,
        share=awp.share,
        attack_mode=attack.mode,
        alternations=awp.alternations,
        step_inside=awp.step_inside,
        **given,
    )


def _climbed(awp: Awp, cast: Any, objective: Objective) -> Callable[..., Tensor] | None:
    """What is climbed if not the outer loss; with the weight that a rank's rows have in the objective."""
    return parallel.weighted(below(cast.each, awp.c), objective) if awp.method == "robust-wp" else None


def _where(awp: Awp, model: nn.Module) -> Where:
    if awp.truncated:
        return all_but_last(model)
    return default if awp.method in LAYERS else trained


def _climb(awp: Awp, memory: dict[str, Tensor], optimizer: torch.optim.Optimizer, generator: Generator) -> Climb:
    shrink = by_filter if awp.shrink == "filter" else by_coordinate
    found: dict[str, Climb] = {
        "awp": perturbed,
        "sam": perturbed,
        "asam": perturbed,
        "robust-wp": accumulated,
        "random-wp": partial(drawn, generator=generator),
        "arwp": partial(
            adaptively_drawn, generator=generator, memory=memory, eta=awp.eta, beta=awp.beta, shrink=shrink
        ),
        "kaggle": partial(perturbed, step=Layerwise(awp.step_size or 1.0)),
        "fast": partial(along_momentum, optimizer=optimizer, step=Layerwise(awp.step_size or awp.gamma)),
    }
    return parallel.per_rank(found[awp.method]) if awp.per_rank and parallel.ranks() > 1 else found[awp.method]
