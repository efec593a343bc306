"""Named configs: what to type for a published method, or for a first look.

`at`, `at-awp`, `trades`, `trades-awp`, `mart`, `mart-awp` run on the bundled digits in seconds; with `cifar10-` or
`cifar100-` before the name they have the published hyper-parameters (Wu, Xia, Wang, NeurIPS 2020, and the official
scripts): PreActResNet-18 for AT, WideResNet-34-10 for TRADES and MART, gamma 0.01 for AT, 0.005 from the tenth epoch on
else.

`...-official` reproduces, besides, what the official scripts do without saying so. What they set, and why our default,
which is what we hold to be right, does not:

    attack.mode = train (AT)                   The attack sees batch statistics and feeds the running ones, so that
                                               three quarters of those come from unfinished attacks.
    awp.step_inside = true                     The optimiser steps at w + v: weight decay acts on w + v, not on w.
    attack.final_forward = true (AT)           One forward more in the attack, which feeds them as well.
    optimizer.clean_forward = after (AT)       A forward on clean images, made for the log, feeds the running
                                               statistics.
    optimizer.clean_forward = inside (TRADES)  The clean logits are computed twice in the loss.
    data.padding_mode = reflect (AT on CIFAR-10)

Not reproduced: the first batch of an epoch attacked in eval mode (AT on CIFAR-10), random rotations (AT on CIFAR-100),
the rate that drops one epoch earlier (TRADES), the best epoch chosen on the test set, BatchNorm over half batches on
two GPUs. MART has no official script with AWP: its AWP setting is TRADES'.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from saltflat.lab.config import Attack, Awp, Data, Evaluation, Model, Objective, Optimizer, Train

# Chosen so that plain AT visibly overfits within a demo; not published anywhere.
DIGITS = Train(
    data=Data(examples=400, validation_examples=200),
    model=Model("small-cnn", width=24, mean=(0.3,), std=(0.38,)),
    attack=Attack(eps=0.15, step_size=0.0375),
    optimizer=Optimizer(epochs=30, batch_size=50, learning_rate=0.1),
    evaluation=Evaluation(examples=300, batch_size=512),
)

CIFAR = Train(
    data=Data(augment="crop-flip", validation_examples=1000),
    model=Model("preact-resnet18"),
    attack=Attack(eps=8 / 255, step_size=2 / 255),
    optimizer=Optimizer(epochs=200, batch_size=128, learning_rate=0.1),
    evaluation=Evaluation(examples=1000),
)

# Mean and standard deviation of the training pixels, per channel, as the official AT scripts have them.
PIXELS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}

OBJECTIVES = {"at": Objective("at"), "trades": Objective("trades", 6.0), "mart": Objective("mart", 6.0)}
# "Warm-up 10" of the official script counts epochs from 1 and begins with the tenth: nine come before it.
AWP = {"at": Awp(gamma=0.01), "trades": Awp(gamma=0.005, warmup=9), "mart": Awp(gamma=0.005, warmup=9)}


def _on_digits(name: str, objective: str, awp: Awp) -> Train:
    # No warm-up: nine epochs of 200 would be less than three of these.
    return replace(DIGITS, recipe=name, objective=OBJECTIVES[objective], awp=replace(awp, warmup=0))


def _on_cifar(name: str, data: Literal["cifar10", "cifar100"], objective: str, awp: Awp) -> Train:
    config = replace(CIFAR, recipe=name, data=replace(CIFAR.data, name=data), objective=OBJECTIVES[objective], awp=awp)
    if objective == "at":
        return replace(config, model=replace(config.model, mean=PIXELS[data][0], std=PIXELS[data][1]))
    return replace(
        config,
        model=Model("wide-resnet", depth=34, widen_factor=10),  # inputs as they are, as published
        attack=replace(config.attack, start="gaussian"),
    )


def official(config: Train) -> Train:
    """The same recipe with the official scripts' unspoken behaviour."""
    at = config.objective.name == "at"
    return replace(
        config,
        recipe=f"{config.recipe}-official",
        data=replace(config.data, padding_mode="reflect" if at and config.data.name == "cifar10" else "zero"),
        attack=replace(config.attack, mode="train" if at else "eval", final_forward=at),
        awp=replace(config.awp, step_inside=True),
        optimizer=replace(config.optimizer, clean_forward="after" if at else "inside"),
    )


def _all() -> dict[str, Train]:
    found = {}
    for objective, awp in AWP.items():
        for suffix, ball in (("", Awp()), ("-awp", awp)):
            found[objective + suffix] = _on_digits(objective + suffix, objective, ball)
    archives: tuple[Literal["cifar10", "cifar100"], ...] = ("cifar10", "cifar100")
    for data in archives:
        for objective, awp in AWP.items():
            for suffix, ball in (("", Awp()), ("-awp", awp)):
                name = f"{data}-{objective}{suffix}"
                found[name] = _on_cifar(name, data, objective, ball)
                if objective != "mart":
                    found[f"{name}-official"] = official(found[name])
    return found


RECIPES: dict[str, Train] = _all()


def described(config: Train) -> str:
    """One line for lists and help."""
    data = {"digits": "bundled digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}.get(
        config.data.name, config.data.name
    )
    method = {"natural": "Natural", "at": "AT", "trades": "TRADES", "mart": "MART"}[config.objective.name]
    awp = f"-AWP (gamma {config.awp.gamma:g})" if config.awp.gamma else ""
    quirks = ", as the official script does it" if config.recipe.endswith("-official") else ""
    return f"{method}{awp} on {data}, {config.model.name}, {config.optimizer.epochs} epochs{quirks}."
