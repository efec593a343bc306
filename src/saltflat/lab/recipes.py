"""Named configs: what to type for a published method, or for a first look.

`at`, `at-awp`, `trades`, `trades-awp`, `mart`, `mart-awp` run on the bundled digits in seconds; with `cifar10-` or
`cifar100-` before the name they have the published hyper-parameters (Wu, Xia, Wang, NeurIPS 2020, and the official
scripts): PreActResNet-18 for AT, WideResNet-34-10 for TRADES and MART, gamma 0.01 for AT, 0.005 from the tenth epoch on
else. `svhn-at` and `svhn-at-awp` are the scripts' SVHN.

`...-awp-amortised` takes AWP's ascent gradient from the attack's last backward pass: in the mode of training
(`awp.joint_mode` outer) where the network has BatchNorm, since its cosine with AWP's own gradient was above 0.99 then
(the record on cheaper ascents), and about 0.5 in the attack's mode, which is the default elsewhere. Without BatchNorm,
the two modes are one.
`speedrun-cifar10` is for the shortest time to a stated robust accuracy, and `speedrun-digits` shows on a CPU how it
goes.

`at-NEIGHBOUR` is AT with another weight adversary (docs/family.md). RobustWP, the random ones, SAM and ASAM have their
published sizes for CIFAR; WT-AWP's is AWP's, since its own is for graphs, and Kaggle's are those for fine-tuning (on
digits, larger ones of ours). `alp`, `fast-at`, `free-at`, `at-swa` and `rst` are other ways of adversarial
training, each with and without AWP. `rst` and `generated` need labelled images beside the data (`--extra.path`); the
latter is the setting of Wang et al., ICML 2023.

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
    data.rotation = 15 (AT on CIFAR-100)

Not reproduced: the first batch of an epoch attacked in eval mode (AT on CIFAR-10), the rate that drops one epoch
earlier (TRADES), the best epoch chosen on the test set, BatchNorm over half batches on two GPUs. MART has no official
script with AWP: its AWP setting is TRADES'.

Nor, of the others: an attack on the network in train mode (fast and free AT), momentum that moves with the rate (fast
and free AT, generated), a rate that peaks at 50 % of training (fast and free AT; here at 40 %), label smoothing (ALP),
a rate that stays within an epoch and epochs as long as with the validation images (RST, generated), an attack on batch
statistics, a rate that begins at a 25th, a decay of the average that grows at first, decay of the last bias, a momentum
of 0.01 for BatchNorm and padding on one side (generated).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from saltflat.lab.config import Attack, Awp, Compute, Data, Evaluation, Extra, Model, Objective, Optimizer, Train

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
        data=replace(
            config.data,
            padding_mode="reflect" if at and config.data.name == "cifar10" else "zero",
            rotation=15.0 if at and config.data.name == "cifar100" else 0.0,
        ),
        attack=replace(config.attack, mode="train" if at else "eval", final_forward=at),
        awp=replace(config.awp, step_inside=True),
        optimizer=replace(config.optimizer, clean_forward="after" if at else "inside"),
    )


NEIGHBOURS = {
    "robust-wp": Awp("robust-wp", gamma=0.01, steps=10),
    "random-wp": Awp("random-wp", gamma=0.01),
    "m-rwp": Awp("m-rwp", gamma=0.015, share=0.5),
    "arwp": Awp("arwp", gamma=0.001, increase=10.0),
    "wt-awp": Awp(gamma=0.01, share=0.5, truncated=True),
    "sam": Awp("sam", gamma=0.05),
    "asam": Awp("asam", gamma=0.5),
    "kaggle-awp": Awp("kaggle", gamma=1e-4),
    "fast-awp": Awp("fast", gamma=1e-3),
}
ON_CIFAR100 = {
    "robust-wp": replace(NEIGHBOURS["robust-wp"], c=4.0),
    "sam": Awp("sam", gamma=0.1),
    "asam": Awp("asam", gamma=1.0),
}
ON_DIGITS = {"kaggle-awp": 0.01, "fast-awp": 0.01}  # gamma, where the published one was made for fine-tuning


def others(base: Train) -> dict[str, tuple[Train, Awp]]:
    """Other ways of adversarial training from an AT recipe, each with what AWP is switched on by."""
    eps, of, awp = base.attack.eps, base.optimizer, replace(AWP["at"])
    few = base.data.name == "digits"
    return {
        "alp": (replace(base, objective=Objective("alp", 0.5)), awp),
        "fast-at": (
            replace(
                base,
                attack=replace(base.attack, step_size=1.25 * eps, steps=1),
                optimizer=replace(of, epochs=15, learning_rate=0.2, schedule="cyclic"),
            ),
            awp,
        ),
        "free-at": (
            replace(
                base,
                attack=replace(base.attack, step_size=eps, replays=4 if few else 8),
                optimizer=replace(of, epochs=8 if few else 10, learning_rate=0.04, schedule="cyclic"),
            ),
            awp,
        ),
        "at-swa": (replace(base, optimizer=replace(of, swa_from=0.275)), awp),
    }


def rst(base: Train, model: Model) -> Train:
    """Robust self-training (Carmon et al., NeurIPS 2019): TRADES, half of every batch pseudo-labelled."""
    return replace(
        base,
        extra=Extra(share=0.5),
        model=model,
        objective=OBJECTIVES["trades"],
        attack=replace(base.attack, start="gaussian"),
    )


def generated(base: Train) -> Train:
    """Generated images (Wang et al., ICML 2023): TRADES, beta 5, 70 % of every batch generated."""
    return replace(
        base,
        data=replace(
            base.data,
            validation_examples=1024,
            label_smoothing=0.1,
            rotation=15.0 if base.data.name == "cifar100" else 0.0,
        ),
        extra=Extra(share=0.7),
        model=replace(base.model, name="wide-resnet", depth=28, widen_factor=10, activation="silu"),
        objective=Objective("trades", 5.0),
        optimizer=Optimizer(
            epochs=400,
            batch_size=512,
            learning_rate=0.2,
            schedule="cosine",
            warmup=10,
            nesterov=True,
            decayed="weights",
            average=0.995,
        ),
    )


def amortised(config: Train, joint_mode: Literal["attack", "outer"] = "attack") -> dict[str, Train]:
    """The same recipe, AWP's ascent gradient taken from the attack's last backward pass."""
    name = f"{config.recipe}-amortised"
    return {name: replace(config, recipe=name, awp=replace(config.awp, amortised=True, joint_mode=joint_mode))}


def _with_and_without(name: str, config: Train, awp: Awp) -> dict[str, Train]:
    return {
        name: replace(config, recipe=name),
        f"{name}-awp": replace(config, recipe=f"{name}-awp", awp=awp),
    }


def _digits() -> dict[str, Train]:
    found: dict[str, Train] = {}
    for objective, awp in AWP.items():
        for suffix, ball in (("", Awp()), ("-awp", awp)):
            found[objective + suffix] = _on_digits(objective + suffix, objective, ball)
    at = found["at"]
    for name, awp in NEIGHBOURS.items():
        sized = replace(awp, gamma=ON_DIGITS.get(name, awp.gamma))
        found[f"at-{name}"] = replace(at, recipe=f"at-{name}", awp=sized)
    for name, (config, awp) in others(at).items():
        found |= _with_and_without(name, config, awp)
    found |= _with_and_without("rst", rst(at, at.model), replace(AWP["trades"], warmup=0))
    found |= amortised(found["at-awp"]) | amortised(found["trades-awp"])
    return found | {"speedrun-digits": _speedrun_on_digits(at)}


def _cifar(data: Literal["cifar10", "cifar100"]) -> dict[str, Train]:
    found: dict[str, Train] = {}
    for objective, awp in AWP.items():
        for suffix, ball in (("", Awp()), ("-awp", awp)):
            name = f"{data}-{objective}{suffix}"
            found[name] = _on_cifar(name, data, objective, ball)
            if objective != "mart":
                found[f"{name}-official"] = official(found[name])
    at, trades = found[f"{data}-at"], found[f"{data}-trades"]
    for name, awp in {**NEIGHBOURS, **(ON_CIFAR100 if data == "cifar100" else {})}.items():
        found[f"{data}-at-{name}"] = replace(at, recipe=f"{data}-at-{name}", awp=awp)
    robust = replace(NEIGHBOURS["robust-wp"], gamma=0.005, warmup=9)  # c is 1.7 in the script for TRADES always
    found[f"{data}-trades-robust-wp"] = replace(trades, recipe=f"{data}-trades-robust-wp", awp=robust)
    for name, (config, awp) in others(at).items():
        found |= _with_and_without(f"{data}-{name}", config, awp)
    found |= _with_and_without(f"{data}-generated", generated(at), replace(AWP["trades"], warmup=10))
    return found | amortised(found[f"{data}-at-awp"], "outer") | amortised(found[f"{data}-trades-awp"], "outer")


SPEEDRUN = Optimizer(
    epochs=20,
    batch_size=256,
    learning_rate=0.3,
    schedule="cyclic",
    nesterov=True,
    decayed="weights",
    average=0.998,
)


def _speedrun_on_cifar10(at: Train) -> Train:
    """The shortest time on one device to a stated robust accuracy with AWP: at least 50 % under PGD-20 and 47 % under
    AutoAttack, both at 8/255 on all 10 000 test images.

    That is the target, not a finding. Few epochs of one triangle of the learning rate, since adversarial training
    reaches its best before it overfits (Rice et al., arXiv 2002.11569; Wong et al., arXiv 2001.03994); three steps of
    half the radius; a moving average of weights and smoothed labels, no decay of biases and norms (Pang et al., arXiv
    2010.00467); bf16; the ascent gradient of the weights from the attack; few images measured after an epoch. Time of
    training is the sum of `seconds` in metrics.jsonl.
    """
    return replace(
        at,
        recipe="speedrun-cifar10",
        data=replace(at.data, label_smoothing=0.1),
        attack=replace(at.attack, step_size=4 / 255, steps=3),
        awp=Awp(gamma=0.005, amortised=True, joint_mode="outer"),
        optimizer=SPEEDRUN,
        evaluation=Evaluation(examples=500, batch_size=500),
        compute=Compute(precision="bf16"),
    )


def _speedrun_on_digits(at: Train) -> Train:
    """The same on the bundled digits, in seconds, and in fp32, since so small a network gains nothing by bf16."""
    return replace(
        at,
        recipe="speedrun-digits",
        data=replace(at.data, examples=0, label_smoothing=0.1),
        attack=replace(at.attack, step_size=at.attack.eps / 2, steps=3),
        awp=Awp(gamma=0.005, amortised=True),
        optimizer=replace(SPEEDRUN, epochs=10, batch_size=50, learning_rate=0.2, average=0.95),
    )


def _rst_on_cifar10(trades: Train) -> dict[str, Train]:
    config = rst(trades, replace(trades.model, depth=28))
    config = replace(
        config,
        attack=replace(config.attack, eps=0.031, step_size=0.007),
        optimizer=replace(trades.optimizer, batch_size=256, schedule="cosine", nesterov=True),
    )
    robust = replace(NEIGHBOURS["robust-wp"], gamma=0.005, warmup=9)
    return {
        **_with_and_without("cifar10-rst", config, AWP["trades"]),
        "cifar10-rst-robust-wp": replace(config, recipe="cifar10-rst-robust-wp", awp=robust),
    }


def _svhn() -> dict[str, Train]:
    config = replace(
        CIFAR,
        data=Data("svhn", validation_examples=1000),
        model=replace(CIFAR.model, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        attack=Attack(eps=8 / 255, step_size=1 / 255),
        optimizer=replace(CIFAR.optimizer, learning_rate=0.01),
    )
    found = _with_and_without("svhn-at", config, Awp(gamma=0.01, warmup=5))
    return found | {f"{name}-official": official(recipe) for name, recipe in found.items()}


def _all() -> dict[str, Train]:
    cifar10 = _cifar("cifar10")
    speedrun = _speedrun_on_cifar10(cifar10["cifar10-at"])
    rst = _rst_on_cifar10(cifar10["cifar10-trades"])
    return _digits() | cifar10 | rst | _cifar("cifar100") | _svhn() | {speedrun.recipe: speedrun}


RECIPES: dict[str, Train] = _all()


DATA = {"digits": "bundled digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN"}
OBJECTIVE = {"natural": "Natural", "at": "AT", "trades": "TRADES", "mart": "MART", "alp": "ALP"}
# What a weight adversary is called, and in the names of recipes
ADVERSARY = {
    "awp": ("AWP", "awp"),
    "wt-awp": ("WT-AWP", "wt-awp"),
    "robust-wp": ("RobustWP", "robust-wp"),
    "random-wp": ("RandomWP", "random-wp"),
    "m-rwp": ("m-RWP", "m-rwp"),
    "arwp": ("ARWP", "arwp"),
    "sam": ("SAM", "sam"),
    "asam": ("ASAM", "asam"),
    "kaggle": ("Kaggle AWP", "kaggle-awp"),
    "fast": ("fast AWP", "fast-awp"),
}


def adversary(awp: Awp) -> tuple[str, str]:
    """What the weight adversary is called, and in recipes; two empty words where there is none."""
    weighted = awp.method == "awp" and (awp.share < 1 or awp.truncated)
    name, recipe = ADVERSARY["wt-awp" if weighted else awp.method] if awp.gamma else ("", "")
    if not awp.amortised:
        return name, recipe
    mode = ", training mode" if awp.joint_mode == "outer" else ""
    return f"amortised {name}{mode}", f"{recipe}-amortised"


def described(config: Train) -> str:
    """One line for lists and help."""
    data, method = DATA.get(config.data.name, config.data.name), OBJECTIVE[config.objective.name]
    name, _ = adversary(config.awp)
    awp = f"{'-' if name == 'AWP' else ' + '}{name} (gamma {config.awp.gamma:g})" if name else ""
    ways = [
        f"free, {config.attack.replays} replays" if config.attack.replays else "",
        "one-step attack" if config.attack.steps == 1 and not config.attack.replays else "",
        f"{config.extra.share:.0%} extra data" if config.extra.share else "",
        "SWA" if config.optimizer.swa_from else "",
        "EMA" if config.optimizer.average else "",
        f"every {config.awp.every} steps" if config.awp.every > 1 else "",
        config.compute.precision if config.compute.precision != "auto" else "",
    ]
    way = "".join(f", {words}" for words in ways if words)
    quirks = ", as the official script does it" if config.recipe.endswith("-official") else ""
    return f"{method}{awp}{way} on {data}, {config.model.name}, {config.optimizer.epochs} epochs{quirks}."


def for_digits(config: Train) -> list[str]:
    """The fields, with their values, that were chosen for the bundled digits and still stand while the data are others.

    >>> for_digits(replace(RECIPES["at"], data=Data("npz", examples=0)))
    ['attack.eps 0.15', 'attack.step_size 0.0375', 'model.mean 0.3', 'model.std 0.38']
    >>> for_digits(RECIPES["at"])
    []
    """
    recipe = RECIPES.get(config.recipe)
    if recipe is None or recipe.data.name != "digits" or config.data.name == "digits":
        return []
    chosen: list[tuple[str, float | tuple[float, ...], float | tuple[float, ...]]] = [
        ("attack.eps", recipe.attack.eps, config.attack.eps),
        ("attack.step_size", recipe.attack.step_size, config.attack.step_size),
        ("data.examples", recipe.data.examples, config.data.examples),
        ("model.mean", recipe.model.mean, config.model.mean),
        ("model.std", recipe.model.std, config.model.std),
    ]
    return [f"{name} {_number(value)}" for name, value, now in chosen if value and now == value]


def _number(value: float | tuple[float, ...]) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"
