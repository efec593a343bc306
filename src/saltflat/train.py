"""Training from the first batch to the last, in one straight line.

    for every epoch:   for every batch:   learning rate -> augment -> mix -> step -> average
                       measure at w, in eval mode, on images as they are:  the fixed training subset, validation, test

`fit` writes nothing and prints nothing: it yields what happened, and whoever runs it does with that what they like.
All that it draws at random in an epoch comes from generators seeded by (seed, epoch), so that an epoch is the same
whether training was interrupted before it or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from saltflat.averaging import ema, reestimate_statistics, swa
from saltflat.data.images import Images, to_float
from saltflat.evaluation import outcomes
from saltflat.inputs import PGD
from saltflat.objectives import Objective
from saltflat.random import derived_seed, seeded
from saltflat.schedules import Schedule
from saltflat.step import Radius, Step, double_perturbation_step, in_mode, undoing

ORDER, DRAWS, EXTRA = 0, 1, 2  # the streams of random numbers of an epoch
# What robust accuracy on training examples loses within an epoch of catastrophic overfitting (Wong, Rice, Kolter)
COLLAPSE = 0.2


def as_it_is(images: Tensor, generator: torch.Generator) -> Tensor:
    """No augmentation; draws nothing."""
    return images


def unmixed(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """No mixing of examples and labels; draws nothing."""
    return x, y


@dataclass(frozen=True)
class Plan:
    """What `fit` does, in objects and pure functions of progress t in [0, 1].

    Args:
        epochs: passes over the training set.
        batch_size: examples a step, the extra ones included; the last batch of an epoch may be smaller.
        learning_rate: t -> the optimiser's rate, read at the end of the step's share of progress, as the official
            scripts do.
        objective: t -> objective, read at its beginning, like the next two.
        attack: t -> input adversary, or None.
        ball: t -> the weight adversary's ball, or None.
        perturb_every: the ball is given to every so many-th step, the first of training among them; None to the others.
        step: `double_perturbation_step`, perhaps with some of its arguments bound, or a function that is called like it
            (`saltflat.neighbours`).
        excused: how many batches of this training, a number on any device, the step dropped while it was searching for
            something of its own, such as fp16's loss scale, which is as much as to say that the next may fit: these
            are no sign that training fails. None are, unless it says so.
        memory: what steps keep from one to the next, by name: the very dictionary that was bound to `step`, or resuming
            loses it. Emptied when training begins, saved with its state.
        clean_forward: after each step, run the model on the clean batch in train mode, for its running statistics
            alone, as the official AT script does while it logs.
        augment: (uint8 images, generator) -> uint8 images.
        mix: (x, y, generator) -> x, y: images in [0, 1] and their classes, as the adversaries and the step see them:
            label smoothing, mixup, CutMix.
        extra_share: of every batch, what is drawn from `fit`'s extra examples, with replacement; rounded down. Where
            the own examples run out, more of them fill the last batch. A batch is shuffled then.
        average: decay, per batch, of the moving average of weights that is then measured and kept, or None.
        swa_from: progress after which the weights at the ends of epochs are averaged, measured and kept, with the
            statistics of BatchNorm re-estimated on the training images as they are; or None.
        measure: the attack of the measurements at the end of each epoch.
        measure_batch_size: examples at a time in those.
        seed: of the order, the augmentation and the attacks' starts. (The initial weights are the caller's.)
    """

    epochs: int
    batch_size: int
    learning_rate: Schedule
    objective: Callable[[float], Objective]
    attack: Callable[[float], Any]
    ball: Callable[[float], Radius | None]
    measure: PGD
    perturb_every: int = 1
    step: Callable[..., Step] = double_perturbation_step
    excused: Callable[[], Tensor] = lambda: torch.zeros((), dtype=torch.int64)
    memory: dict[str, Tensor] = field(default_factory=dict)
    clean_forward: bool = False
    augment: Callable[[Tensor, torch.Generator], Tensor] = as_it_is
    mix: Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]] = unmixed
    extra_share: float = 0.0
    average: float | None = None
    swa_from: float | None = None
    measure_batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.perturb_every < 1:
            raise ValueError(f"perturb_every: expected an integer >= 1, got {self.perturb_every!r}")
        if not 0 <= self.extra_share < 1:
            raise ValueError(f"extra_share: expected a number in [0, 1), got {self.extra_share!r}")
        if self.average is not None and self.swa_from is not None:
            raise ValueError(f"swa_from: expected None beside a moving average, got {self.swa_from!r}")
        if self.swa_from is not None and not 0 <= self.swa_from < 1:
            raise ValueError(f"swa_from: expected a number in [0, 1), got {self.swa_from!r}")


@dataclass(frozen=True)
class Stepped:
    """A step is done. `loss` and `perturbed_loss`, as in `Step`, stay on the device."""

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
        metrics: numbers to be written down: losses of the epoch's steps, NaN where no batch was used, and for each
            measured set its size, clean and robust accuracy and loss; `gap` is robust accuracy on train minus on test,
            and robust loss on test minus on train; `collapsed`, whether robust accuracy on train fell by more than 20
            points since the epoch before; `skipped` and `dropped`, as in `Step`, over all steps; `seconds` of the
            epoch's steps, whose sum over epochs is the time of training, and `evaluation_seconds` of its measurements.
        best: robust accuracy on `validation` is the highest so far; clean accuracy, where training attacks nothing.
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
    extra: Images | None = None,
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
        extra: pseudo-labelled or generated examples, moved like `train`. An epoch has as many steps with them as
            without: every step takes fewer examples of `train`, and what is left of those waits for another epoch.
        state: of an earlier `Epoch`, to go on after it; model and optimiser are loaded from it.

    Raises: ValueError for a share of extra examples without such, or the reverse, and for extra examples of another
        shape or number of classes; FloatingPointError at the end of an epoch in which more than half of the batches
        were dropped, for gradients that are not finite, those that the plan excuses left aside.
    """
    _check_extra(extra, train, plan)
    device = next(model.parameters()).device
    images, labels = train.images.to(device), train.labels.to(device)
    more = None if extra is None else (extra.images.to(device), extra.labels.to(device))
    average = ema(model, plan.average) if plan.average is not None else None if plan.swa_from is None else swa(model)
    batches = math.ceil(len(train) / plan.batch_size)
    own = plan.batch_size - extra_per_batch(plan.extra_share, plan.batch_size)
    steps = plan.epochs * batches
    step = done = 0
    best = before = -1.0
    plan.memory.clear()
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
        torch.set_rng_state(state["random"])
        if device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], device)
        plan.memory.update({name: kept.to(device) for name, kept in state["memory"].items()})
        step, done, best, before = state["step"], state["epoch"], state["best"], state["before"]

    for epoch in range(done + 1, plan.epochs + 1):
        began = time.perf_counter()
        order = torch.randperm(len(train), generator=seeded(plan.seed, epoch, ORDER)).to(device)
        generator = seeded(plan.seed, epoch, DRAWS, device=device)
        drawn = _drawn(extra, batches, plan.batch_size, seeded(plan.seed, epoch, EXTRA)).to(device)
        sums, excused = torch.zeros(5, dtype=torch.float64, device=device), plan.excused()
        with in_mode(model, "train"):
            for rows, extra_rows in zip(torch.split(order, own), drawn, strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = plan.learning_rate((step + 1) / steps)
                progress = step / steps
                chosen, y = images[rows], labels[rows]
                if more is not None:
                    added = extra_rows[: plan.batch_size - len(rows)]
                    shuffled = torch.randperm(plan.batch_size, generator=generator, device=device)
                    chosen = torch.cat([chosen, more[0][added]])[shuffled]
                    y = torch.cat([y, more[1][added]])[shuffled]
                x, y = plan.mix(to_float(plan.augment(chosen, generator)), y, generator)
                found = plan.step(
                    model,
                    x,
                    y,
                    objective=plan.objective(progress),
                    attack=plan.attack(progress),
                    ball=plan.ball(progress) if step % plan.perturb_every == 0 else None,
                    optimizer=optimizer,
                    generator=generator,
                )
                if plan.clean_forward:
                    undo = undoing(model)
                    with torch.no_grad():
                        model(x)
                    undo(found.dropped > 0)
                if average is not None and plan.average is not None:
                    _follow(average, model, plan.average)
                step += 1
                sums += _sums(found, len(x))
                yield Stepped(step, steps, epoch, found.loss, found.perturbed_loss)
        if plan.swa_from is not None and average is not None and step / steps > plan.swa_from:
            average.update_parameters(model)
            reestimate_statistics(average.module, (to_float(part) for part in torch.tensor_split(images, batches)))

        sums = torch.cat([sums, (plan.excused() - excused).reshape(1).to(sums)])
        used, loss, perturbed_loss, skipped, dropped, excusable = sums.tolist()  # the epoch's one wait for the device
        if dropped - excusable > batches / 2:
            raise FloatingPointError(
                f"epoch {epoch}: the gradient of {int(dropped)} of {batches} batches was not finite; "
                "a lower learning rate, gamma or precision may be to blame"
            )
        trained = time.perf_counter()
        yield Measuring(epoch)
        begun = average is not None and int(average.n_averaged) > 0
        network: nn.Module = average.module if average is not None and begun else model
        sets = {name: measure(network, data, plan) for name, data in measured.items()}
        judged = "clean_accuracy" if plan.attack((step - 1) / steps) is None else "robust_accuracy"
        chosen_by = sets["validation"][judged] if "validation" in sets else -1.0
        is_best, best = chosen_by > best, max(chosen_by, best)
        trained_on = sets["train"]["robust_accuracy"] if "train" in sets else -1.0
        collapsed, before = before - trained_on > COLLAPSE, trained_on
        ball = plan.ball((step - 1) / steps)
        metrics = {
            "epoch": epoch,
            "step": step,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "gamma": 0.0 if ball is None else ball.radius,
            "loss": loss / used if used else math.nan,
            "perturbed_loss": perturbed_loss / used if used else math.nan,
            "skipped": int(skipped),
            "dropped": int(dropped),
            **sets,
            "gap": gap(sets),
            "best": is_best,
            "collapsed": collapsed,
            "seconds": trained - began,
            "evaluation_seconds": time.perf_counter() - trained,
        }
        reached = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": None if average is None else average.state_dict(),
            "random": torch.get_rng_state(),  # torch's global generators: dropout draws from them
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "memory": dict(plan.memory),
            "step": step,
            "epoch": epoch,
            "best": best,
            "before": before,
        }
        yield Epoch(epoch, metrics, is_best, network, reached)


@torch.no_grad()
def _follow(average: AveragedModel, model: nn.Module, decay: float) -> None:
    """`average.update_parameters(model)` of an EMA, to the bit, but for its waiting for a GPU: there torch moves its
    counter to the device in every step.
    """
    own: list[Tensor] = list(average.module.parameters())
    new: list[Tensor] = list(model.parameters())
    if int(average.n_averaged) == 0:  # which stands on the CPU
        torch._foreach_copy_(own, new)
    else:
        torch._foreach_lerp_(own, new, 1 - decay)
    for buffer, newest in zip(average.module.buffers(), model.buffers(), strict=True):
        buffer.copy_(newest)
    average.n_averaged += 1


def extra_per_batch(share: float, batch_size: int) -> int:
    """How many examples of a batch are extra ones.

    >>> extra_per_batch(0.29, 100), extra_per_batch(0.7, 512)
    (29, 358)
    """
    return math.floor(round(share * batch_size, 6))


def _check_extra(extra: Images | None, train: Images, plan: Plan) -> None:
    if (extra is None) != (plan.extra_share == 0):
        raise ValueError(f"extra: expected {'some' if extra is None else 'none'} with a share of {plan.extra_share!r}")
    if extra is None:
        return
    if extra_per_batch(plan.extra_share, plan.batch_size) == 0:
        raise ValueError(f"extra_share: expected one of {plan.batch_size} examples or more, got {plan.extra_share!r}")
    theirs, ours = ((*of.images.shape[1:], of.num_classes) for of in (extra, train))
    if theirs != ours:
        raise ValueError(f"extra: expected images and classes as {train.name} has them, {ours}, got {theirs}")


def _drawn(extra: Images | None, batches: int, size: int, generator: torch.Generator) -> Tensor:
    """Which extra examples every batch takes, with replacement: (batches, size)."""
    return torch.randint(1 if extra is None else len(extra), (batches, size), generator=generator)


def _sums(found: Step, examples: int) -> Tensor:
    """Examples used, their summed losses at w and at w + v, tensors skipped, batches dropped."""
    used = 1 - found.dropped
    n = used * examples
    losses = [torch.where(used > 0, loss, 0) * n for loss in (found.loss, found.perturbed_loss)]
    return torch.stack([n, *losses, found.skipped.to(n.device), found.dropped]).double()


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
