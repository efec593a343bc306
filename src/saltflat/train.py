"""Training from the first batch to the last, in one straight line.

    for every epoch:   for every batch:   learning rate -> double_perturbation_step -> average
                       measure at w, in eval mode, on images as they are:  the fixed training subset, validation, test

`fit` writes nothing and prints nothing: it yields what happened, and whoever runs it does with that what they like.
All that it draws at random in an epoch comes from generators seeded by (seed, epoch), so that an epoch is the same
whether training was interrupted before it or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saltflat.averaging import ema
from saltflat.balls import WeightBall
from saltflat.data.images import Images, to_float
from saltflat.evaluation import outcomes
from saltflat.inputs import PGD, InputAdversary
from saltflat.objectives import Objective
from saltflat.random import derived_seed, seeded
from saltflat.schedules import Schedule
from saltflat.step import Mode, double_perturbation_step, in_mode

ORDER, DRAWS = 0, 1  # the two streams of random numbers of an epoch


def as_it_is(images: Tensor, generator: torch.Generator) -> Tensor:
    """No augmentation; draws nothing."""
    return images


@dataclass(frozen=True)
class Plan:
    """What `fit` does, in objects and pure functions of progress t in [0, 1].

    Args:
        epochs: passes over the training set.
        batch_size: examples a step; the last batch of an epoch may be smaller.
        learning_rate: t -> the optimiser's rate, read at the end of the step's share of progress, as the official
            scripts do.
        objective: t -> objective, read at its beginning, like the next two.
        attack: t -> input adversary, or None.
        ball: t -> the weight adversary's ball, or None.
        steps, step_size, alternations, step_inside, attack_mode: as in `double_perturbation_step`.
        clean_forward: after each step, run the model on the clean batch in train mode, for its running statistics
            alone, as the official AT script does while it logs.
        augment: (uint8 images, generator) -> uint8 images.
        average: decay of the moving average of weights that is then measured and kept, or None.
        measure: the attack of the measurements at the end of each epoch.
        measure_batch_size: examples at a time in those.
        seed: of the order, the augmentation and the attacks' starts. (The initial weights are the caller's.)
    """

    epochs: int
    batch_size: int
    learning_rate: Schedule
    objective: Callable[[float], Objective]
    attack: Callable[[float], InputAdversary | None]
    ball: Callable[[float], WeightBall | None]
    measure: PGD
    steps: int = 1
    step_size: float | None = None
    alternations: int = 1
    step_inside: bool = False
    attack_mode: Mode = "eval"
    clean_forward: bool = False
    augment: Callable[[Tensor, torch.Generator], Tensor] = as_it_is
    average: float | None = None
    measure_batch_size: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Stepped:
    """A step is done. `loss` (at w) and `perturbed_loss` (at w + v) stay on the device."""

    step: int
    steps: int
    epoch: int
    loss: Tensor
    perturbed_loss: Tensor


@dataclass(frozen=True)
class Measuring:
    """An epoch's steps are done, and its measurements begin."""

    epoch: int


@dataclass(frozen=True)
class Epoch:
    """An epoch is done and measured.

    Attributes:
        epoch: how many are done.
        metrics: numbers to be written down: losses of the epoch's steps, and for each measured set its size, clean and
            robust accuracy and loss; `gap` is robust accuracy on train minus on test, and robust loss on test minus on
            train.
        best: robust accuracy on `validation` is the highest so far.
        model: the network that was measured (the average, if there is one).
        state: all that `fit` needs to go on from here, as tensors and numbers; save it before asking for the next
            event.
    """

    epoch: int
    metrics: dict[str, Any]
    best: bool
    model: nn.Module
    state: dict[str, Any]


Event = Stepped | Measuring | Epoch


def fit(
    model: nn.Module,
    train: Images,
    measured: Mapping[str, Images],
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    *,
    state: dict[str, Any] | None = None,
) -> Iterator[Event]:
    """Train `model` in place, yielding a `Stepped` per step, and a `Measuring` and an `Epoch` per epoch.

    Args:
        model: on its device; all of it is trained in train mode, and each module has its own mode between epochs.
        train: moved to the model's device as uint8.
        measured: the fixed sets looked at after each epoch, by name: "train" (a subset), "validation", "test"; each
            may be missing.
        plan: what is done.
        optimizer: over the model's parameters; its learning rates are set by the plan.
        state: of an earlier `Epoch`, to go on after it; model and optimiser are loaded from it.

    Raises: FloatingPointError at the end of an epoch whose losses are not finite.
    """
    device = next(model.parameters()).device
    images, labels = train.images.to(device), train.labels.to(device)
    average = None if plan.average is None else ema(model, plan.average)
    steps = plan.epochs * math.ceil(len(train) / plan.batch_size)
    step = done = 0
    best = -1.0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
        torch.set_rng_state(state["random"])
        if device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], device)
        step, done, best = state["step"], state["epoch"], state["best"]

    for epoch in range(done + 1, plan.epochs + 1):
        began = time.perf_counter()
        order = torch.randperm(len(train), generator=seeded(plan.seed, epoch, ORDER)).to(device)
        generator = seeded(plan.seed, epoch, DRAWS, device=device)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        with in_mode(model, "train"):
            for rows in torch.split(order, plan.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = plan.learning_rate((step + 1) / steps)
                progress = step / steps
                x, y = to_float(plan.augment(images[rows], generator)), labels[rows]
                found = double_perturbation_step(
                    model,
                    x,
                    y,
                    objective=plan.objective(progress),
                    attack=plan.attack(progress),
                    ball=plan.ball(progress),
                    optimizer=optimizer,
                    attack_mode=plan.attack_mode,
                    steps=plan.steps,
                    step_size=plan.step_size,
                    alternations=plan.alternations,
                    step_inside=plan.step_inside,
                    generator=generator,
                )
                if plan.clean_forward:
                    with torch.no_grad():
                        model(x)
                if average is not None:
                    average.update_parameters(model)
                step += 1
                sums += torch.stack(
                    [found.loss * len(rows), found.perturbed_loss * len(rows), found.skipped.to(device)]
                )
                yield Stepped(step, steps, epoch, found.loss, found.perturbed_loss)

        loss, perturbed_loss, skipped = sums.tolist()  # the epoch's one wait for the device
        if not math.isfinite(loss + perturbed_loss):
            raise FloatingPointError(
                f"epoch {epoch}: the training loss is not finite: "
                f"{loss / len(train)} at w, {perturbed_loss / len(train)} at w + v"
            )
        trained = time.perf_counter()
        yield Measuring(epoch)
        network: nn.Module = model if average is None else average.module
        sets = {name: measure(network, data, plan) for name, data in measured.items()}
        robust = sets["validation"]["robust_accuracy"] if "validation" in sets else -1.0
        is_best, best = robust > best, max(robust, best)
        ball = plan.ball((step - 1) / steps)
        metrics = {
            "epoch": epoch,
            "step": step,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "gamma": 0.0 if ball is None else ball.radius,
            "loss": loss / len(train),
            "perturbed_loss": perturbed_loss / len(train),
            "skipped": int(skipped),
            **sets,
            "gap": gap(sets),
            "best": is_best,
            "seconds": trained - began,
            "evaluation_seconds": time.perf_counter() - trained,
        }
        reached = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": None if average is None else average.state_dict(),
            "random": torch.get_rng_state(),  # torch's global generators: dropout draws from them
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "step": step,
            "epoch": epoch,
            "best": best,
        }
        yield Epoch(epoch, metrics, is_best, network, reached)


def measure(model: nn.Module, data: Images, plan: Plan) -> dict[str, float]:
    """Clean and robust accuracy (fractions) and mean cross-entropy (nats) of the model as it stands."""
    seed = derived_seed(plan.seed)
    clean = outcomes(model, data, None, batch_size=plan.measure_batch_size)
    robust = outcomes(model, data, plan.measure, batch_size=plan.measure_batch_size, seed=seed)
    return {
        "n": len(data),
        "clean_accuracy": clean.accuracy,
        "clean_loss": clean.mean_loss,
        "robust_accuracy": robust.accuracy,
        "robust_loss": robust.mean_loss,
    }


def gap(sets: Mapping[str, Mapping[str, float]]) -> dict[str, float] | None:
    """The robust generalisation gap: how much better the training subset fares than the test set; None if either is
    missing.
    """
    if "train" not in sets or "test" not in sets:
        return None
    return {
        "accuracy": sets["train"]["robust_accuracy"] - sets["test"]["robust_accuracy"],
        "loss": sets["test"]["robust_loss"] - sets["train"]["robust_loss"],
    }
