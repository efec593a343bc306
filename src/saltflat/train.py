"""Training from the first batch to the last, in one straight line.

    for every epoch:   for every batch:   learning rate -> augment -> mix -> step -> average
                       measure at w, in eval mode, on images as they are:  the fixed training subset, validation, test

`fit` writes nothing and prints nothing: it yields what happened, and whoever runs it does with that what they like.
All that it draws at random in an epoch comes from generators seeded by (seed, epoch), so that training is the same
whether it was interrupted or not. On many processes, each takes its share of every batch and of every measured set;
what is drawn is drawn as by one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from saltflat import parallel
from saltflat.averaging import ema, reestimate_statistics, swa
from saltflat.balls import alike
from saltflat.data.images import Images, to_float
from saltflat.data.stored import Stored, order, shape_of
from saltflat.data.stored import batches as read_batches
from saltflat.evaluation import Outcomes, collect, outcomes_by_batch
from saltflat.inputs import PGD
from saltflat.objectives import Objective
from saltflat.parallel import Alone, Spread, Weighted
from saltflat.random import Rows, derived_seed, seeded
from saltflat.schedules import Schedule
from saltflat.step import AttackOn, Radius, Step, double_perturbation_step, in_mode, itself, undoing

ORDER, DRAWS, EXTRA = 0, 1, 2  # the streams of random numbers of an epoch
IN_A_ROW = 100  # dropped batches, after which training fails before the epoch is over
LOOK = 25  # steps from one look at a GPU's count of them to the next, which waits for it
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
        measure_on: makes what it climbs on of the network: `attack_on` of `saltflat.evaluation.outcomes`.
        measure_batch_size: examples at a time in those.
        readers: processes that read `Stored` images ahead; with 0, this one reads them.
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
    measure_on: AttackOn = itself
    measure_batch_size: int = 256
    readers: int = 0
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


class Diverged(FloatingPointError):
    """Gradients were not finite, for too many batches, or the network is not.

    Attributes:
        batch: x and y, on the CPU, as the step was given them on this process: the last whole batch that was dropped
            of the epoch; none if those were before training was gone on with.
    """

    def __init__(self, message: str, batch: dict[str, Tensor]) -> None:
        super().__init__(message)
        self.batch = batch


@dataclass(frozen=True)
class Stepped:
    """A step is done. `loss` and `perturbed_loss`, as in `Step`, stay on the device; over many processes, their means
    are the batch's. `state()` makes what `Epoch.state` is, to go on from here; it may be asked for until the next
    event, on all processes alike.
    """

    step: int
    steps: int
    epoch: int
    loss: Tensor
    perturbed_loss: Tensor
    state: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Measuring:
    """An epoch's steps are done, and it is being measured: once before, and after every batch of the measurements, as
    often on all processes. The last `Stepped.state` may be asked for until the `Epoch`.
    """

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
        state: all that `fit` needs to go on from here, as tensors and numbers, equal on all processes but for seconds;
            save it before asking for the next event.
    """

    epoch: int
    metrics: dict[str, Any]
    best: bool
    model: nn.Module
    state: dict[str, Any]


Event = Stepped | Measuring | Epoch


def fit(
    model: nn.Module,
    train: Images | Stored,
    measured: Mapping[str, Images],
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    *,
    extra: Images | None = None,
    state: dict[str, Any] | None = None,
    spread: Spread | None = None,
) -> Iterator[Event]:
    """Train `model` in place, yielding a `Stepped` per step, and `Measuring`s and an `Epoch` per epoch.

    Args:
        model: on its device; all of it is trained in train mode, and each module has its own mode between epochs.
        train: `Images` are moved to the model's device as uint8; `Stored` ones are read batch by batch, in the order of
            `data.order`, by each process its share.
        measured: the fixed sets looked at after each epoch, by name: "train" (a subset), "validation", "test"; each
            may be missing.
        plan: what is done.
        optimizer: over the model's parameters; its learning rates are set by the plan.
        extra: pseudo-labelled or generated examples, moved like `train`. An epoch has as many steps with them as
            without: every step takes fewer examples of `train`, and what is left of those waits for another epoch.
        state: of an earlier `Epoch` or `Stepped`, to go on after it, to the bit on as many processes as it is of; model
            and optimiser are loaded from it.
        spread: how the model lies on the processes that `parallel.together` holds together, `Replicated(model)` or
            `Sharded(model, parts)`; every one of them runs this. Batch sizes are of all of them together.

    Raises: ValueError for a share of extra examples without such, or the reverse, for extra examples of another shape
        or number of classes, for a moving average of sharded weights, for many processes without a spread, and for
        stored images on them with what needs whole batches; `Diverged` at the end of an epoch in which more than half
        of the batches were dropped, for gradients that are not finite, those that the plan excuses left aside, or
        after which weights or running statistics are not finite, and after a hundred batches that were dropped one
        after the other (on a GPU, up to 25 later).
    """
    _check_extra(extra, train, plan)
    _check_processes(train, plan, spread)
    spread = spread or Alone(model)
    device = next(model.parameters()).device
    read = _from_memory(train, device) if isinstance(train, Images) else partial(_from_disk, train, plan, device)
    more = None if extra is None else (extra.images.to(device), extra.labels.to(device))
    average = None
    if plan.average is not None:
        if parallel.is_sharded(model):
            raise ValueError("average: expected None for sharded weights, which no process has all of after each step")
        average = ema(parallel.raw(spread.called), plan.average)
    elif plan.swa_from is not None:
        average = swa(spread.network())
    batches = math.ceil(len(train) / plan.batch_size)
    own = plan.batch_size - extra_per_batch(plan.extra_share, plan.batch_size)
    steps = plan.epochs * batches
    now, dropped = _Now(), _Dropped(device)
    plan.memory.clear()
    if state is not None:
        spread.load(optimizer, state)
        if average is not None:
            average.load_state_dict(state["average"])
        now = _gone_back_to(state, plan, device)
        dropped.in_a_row += state["in_a_row"]

    for epoch in range(now.epoch + 1, plan.epochs + 1):
        began = time.perf_counter()
        dropped.begin()
        rows_of_epoch = _order(train, seeded(plan.seed, epoch, ORDER))
        generator = seeded(plan.seed, epoch, DRAWS, device=device)
        drawn = _drawn(extra, batches, plan.batch_size, seeded(plan.seed, epoch, EXTRA)).to(device)
        sums, excused, behind = torch.zeros(5, dtype=torch.float64, device=device), plan.excused(), 0
        if now.within is not None:  # an epoch that was left in its midst
            sums, excused = (now.within[name].to(device) for name in ("sums", "excused"))
            began, behind = began - now.within["seconds"], now.within["batches"]
            if now.within["device"] == device.type:
                generator.set_state(now.within["draws"])
            else:  # CPUs and GPUs draw other numbers, from states of other kinds
                generator = seeded(plan.seed, epoch, DRAWS, behind, device=device)
            now.within |= {"draws": generator, "sums": sums, "excused": excused}
        with in_mode(spread.called, "train"):
            ahead = torch.split(rows_of_epoch, own)[behind:]
            for rows, extra_rows, (chosen, y) in zip(ahead, drawn[behind:], read(ahead), strict=False):
                if (device.type == "cpu" or now.step % LOOK == LOOK - 1) and int(dropped.in_a_row) >= IN_A_ROW:
                    raise dropped.diverged(
                        f"epoch {epoch}: the gradients of {IN_A_ROW} batches in a row were not finite"
                    )
                for group in optimizer.param_groups:
                    group["lr"] = plan.learning_rate((now.step + 1) / steps)
                progress = now.step / steps
                if more is not None:
                    added = extra_rows[: plan.batch_size - len(rows)]
                    shuffled = torch.randperm(plan.batch_size, generator=generator, device=device)
                    chosen = torch.cat([chosen, more[0][added]])[shuffled]
                    y = torch.cat([y, more[1][added]])[shuffled]
                x, y = plan.mix(to_float(plan.augment(chosen, generator)), y, generator)
                n, objective = len(x), plan.objective(progress)
                x, y, draws, objective = _own(x, y, generator, objective)
                found = plan.step(
                    spread.called,
                    x,
                    y,
                    objective=objective,
                    attack=plan.attack(progress),
                    ball=plan.ball(progress) if now.step % plan.perturb_every == 0 else None,
                    optimizer=optimizer,
                    generator=draws,
                )
                if plan.clean_forward:
                    undo = undoing(spread.called)
                    with torch.no_grad():
                        spread.called(x)
                    undo(found.dropped > 0)
                spread.settle()
                if average is not None and plan.average is not None:
                    _follow(average, parallel.raw(spread.called), plan.average)
                sums += _sums(found, n)
                dropped.see(found, x, y)
                now.step, now.within = now.step + 1, {"draws": generator, "sums": sums, "excused": excused}
                now.within |= {
                    "averaged": False,
                    "seconds": time.perf_counter() - began,
                    "batches": now.step - (epoch - 1) * batches,
                }
                state_here = partial(_state, spread, optimizer, average, plan, now, dropped, device)
                yield Stepped(now.step, steps, epoch, found.loss, found.perturbed_loss, state_here)
        averaged = now.within is not None and now.within.get("averaged", False)  # and interrupted while it was measured
        if plan.swa_from is not None and average is not None and now.step / steps > plan.swa_from and not averaged:
            average.update_parameters(spread.network())
            everything = torch.tensor_split(torch.arange(len(train)), batches)
            reestimate_statistics(average.module, (to_float(part) for part, _ in read(everything)))

        sums = torch.cat([parallel.mean(sums), (plan.excused() - excused).reshape(1).to(sums)])
        used, loss, perturbed_loss, skipped, lost, excusable = sums.tolist()  # the epoch's one wait for the device
        if now.within is not None:
            now.within["averaged"] = True
        if lost - excusable > batches / 2:
            raise dropped.diverged(f"epoch {epoch}: the gradient of {int(lost)} of {batches} batches was not finite")
        trained = time.perf_counter()
        yield Measuring(epoch)
        begun = average is not None and int(average.n_averaged) > 0
        network = average.module if average is not None and begun else spread.network()
        if (name := _not_finite(network)) is not None:
            raise dropped.diverged(f"epoch {epoch}: {name} is not finite")
        sets = {}
        for name, data in measured.items():
            sets[name] = yield from measuring(network, data, plan, epoch)
        judged = "clean_accuracy" if plan.attack((now.step - 1) / steps) is None else "robust_accuracy"
        chosen_by = sets["validation"][judged] if "validation" in sets else -1.0
        is_best, now.best = chosen_by > now.best, max(chosen_by, now.best)
        trained_on = sets["train"]["robust_accuracy"] if "train" in sets else -1.0
        collapsed, now.before = now.before - trained_on > COLLAPSE, trained_on
        now.epoch, now.within = epoch, None
        ball = plan.ball((now.step - 1) / steps)
        metrics = {
            "epoch": epoch,
            "step": now.step,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "gamma": 0.0 if ball is None else ball.radius,
            "loss": loss / used if used else math.nan,
            "perturbed_loss": perturbed_loss / used if used else math.nan,
            "skipped": int(skipped),
            "dropped": int(lost),
            **sets,
            "gap": gap(sets),
            "best": is_best,
            "collapsed": collapsed,
            "seconds": trained - began,
            "evaluation_seconds": time.perf_counter() - trained,
        }
        yield Epoch(epoch, metrics, is_best, network, _state(spread, optimizer, average, plan, now, dropped, device))


@dataclass
class _Now:
    """Where training stands, besides weights, their optimiser and their average.

    Attributes:
        step, epoch: how many are done.
        best, before: robust accuracy on validation, of all epochs, and on train, of the last.
        within: of an epoch that is under way: what its generator has come to, its sums, its batches and seconds so far.
    """

    step: int = 0
    epoch: int = 0
    best: float = -1.0
    before: float = -1.0
    within: dict[str, Any] | None = None


def _state(
    spread: Spread,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
    plan: Plan,
    now: _Now,
    dropped: _Dropped,
    device: torch.device,
) -> dict[str, Any]:
    """All of it, as tensors and numbers."""
    own = {
        "random": torch.get_rng_state(),  # torch's global generators: dropout draws from them
        "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "memory": {name: kept.cpu() for name, kept in plan.memory.items()},
        "sums": None if now.within is None else now.within["sums"].cpu(),
    }
    within = None
    if now.within is not None:
        within = {name: now.within[name] for name in ("seconds", "batches", "averaged")}
        within |= {"draws": now.within["draws"].get_state(), "excused": now.within["excused"].cpu()}
        within["device"] = device.type
    return {
        **spread.state(optimizer),
        "average": None if average is None else average.state_dict(),
        "ranks": parallel.everyones(own),
        "within": within,
        "step": now.step,
        "epoch": now.epoch,
        "best": now.best,
        "before": now.before,
        "in_a_row": int(dropped.in_a_row),
    }


def _gone_back_to(state: dict[str, Any], plan: Plan, device: torch.device) -> _Now:
    """Where a state was made; fills the plan's memory, and sets torch's global generators.

    On another number of processes, what was each one's own is the first one's, and generators stay as they are.
    """
    same = len(state["ranks"]) == parallel.ranks()
    own = state["ranks"][parallel.rank() if same else 0]
    if same:
        torch.set_rng_state(own["random"])
        if device.type == "cuda" and own["random_cuda"] is not None:
            torch.cuda.set_rng_state(own["random_cuda"], device)
    plan.memory.update({name: kept.to(device) for name, kept in own["memory"].items()})
    within = state["within"]
    if within is not None:
        summed = own["sums"] if same else torch.stack([one["sums"] for one in state["ranks"]]).mean(0)
        within = {**within, "sums": summed.clone()}
    return _Now(state["step"], state["epoch"], state["best"], state["before"], within)


def _check_processes(train: Images | Stored, plan: Plan, spread: Spread | None) -> None:
    if parallel.ranks() == 1:
        return
    if spread is None or isinstance(spread, Alone):
        raise ValueError(f"spread: expected one over the {parallel.ranks()} processes, or each would train by itself")
    if isinstance(train, Stored) and (plan.mix is not unmixed or plan.swa_from is not None):
        what = "swa_from" if plan.swa_from is not None else "mix"
        raise ValueError(f"{what}: expected none with stored images on many processes, of which none has a batch whole")


def _order(train: Images | Stored, generator: torch.Generator) -> Tensor:
    """Of an epoch."""
    return torch.randperm(len(train), generator=generator) if isinstance(train, Images) else order(train, generator)


def _from_memory(train: Images, device: torch.device) -> Callable[[Sequence[Tensor]], Iterator[tuple[Tensor, Tensor]]]:
    """Rows of every batch -> its images and labels, on the device."""
    images, labels = train.images.to(device), train.labels.to(device)
    return lambda batches: ((images[rows], labels[rows]) for rows in (batch.to(device) for batch in batches))


def _from_disk(
    train: Stored, plan: Plan, device: torch.device, batches: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same; each process reads its share, and others' images are black: what is drawn for a batch is drawn for all
    of it.
    """
    shares = [parallel.share(len(rows)) for rows in batches]
    own = (rows[share] if share.stop > share.start else rows[:1] for rows, share in zip(batches, shares, strict=True))
    for rows, share, (images, _) in zip(batches, shares, read_batches(train, own, plan.readers), strict=True):
        whole = images.to(device)
        if len(images) < len(rows):
            whole = torch.zeros((len(rows), *images.shape[1:]), dtype=images.dtype, device=device)
            whole[share if share.stop > share.start else slice(0, 1)] = images.to(device)
        yield whole, train.labels[rows].to(device)


def _own(
    x: Tensor, y: Tensor, generator: torch.Generator, objective: Objective
) -> tuple[Tensor, Tensor, Any, Objective]:
    """This process' rows of a batch; what draws for them, and the objective whose mean over processes is the batch's.

    Where there are fewer rows than processes, some take a row of somebody else's, which counts nothing.
    """
    n, ranks, rows = len(x), parallel.ranks(), parallel.share(len(x))
    if ranks == 1:
        return x, y, generator, objective
    size = rows.stop - rows.start
    rows = rows if size else slice(0, 1)
    weighted = objective if size * ranks == n else Weighted(objective, size * ranks / n)
    return x[rows].clone(), y[rows].clone(), Rows(generator, rows, n), weighted  # views would keep all of the batch


class _Dropped:
    """How many batches were dropped in a row, and the last whole one of them, all on the device; of this epoch, or of
    those before if nothing but dropped ones lie between.
    """

    def __init__(self, device: torch.device) -> None:
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.held = torch.zeros((), dtype=torch.bool, device=device)  # whether x and y are of one that was dropped
        self.x: Tensor | None = None
        self.y: Tensor | None = None

    def begin(self) -> None:
        """An epoch begins."""
        self.held = self.held & (self.in_a_row > 0)

    @torch.no_grad()
    def see(self, found: Step, x: Tensor, y: Tensor) -> None:
        bad = found.dropped > 0
        if self.x is None or self.y is None or len(x) > len(self.x):  # the first seen may have been an epoch's last
            self.x, self.y, self.held = x.clone(), y.clone(), bad
        elif self.x.shape == x.shape:
            self.x, self.y = torch.where(bad, x, self.x), torch.where(bad, y, self.y)
            self.held = self.held | bad
        self.in_a_row = (self.in_a_row + 1) * bad

    def diverged(self, message: str) -> Diverged:
        known = self.x is not None and self.y is not None and bool(self.held)
        batch = {"x": self.x.cpu(), "y": self.y.cpu()} if known else {}  # type: ignore[union-attr]
        return Diverged(f"{message}; a lower learning rate, gamma or precision may be to blame", batch)


@torch.no_grad()
def _not_finite(model: nn.Module) -> str | None:
    """The name of a weight or a running statistic that is not; gradients in train mode know nothing of the latter, and
    an attack that meets them does nothing. Other buffers, such as masks, may be infinite.
    """
    looked_at: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            looked_at |= {f"{name}.{key}": of for key, of in module.named_buffers(recurse=False)}
    fine = torch.stack([of.isfinite().all() for of in looked_at.values()]).tolist()
    return next((name for name, finite in zip(looked_at, fine, strict=True) if not finite), None)


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
        for mean, newest in alike(own, new):
            if mean[0].is_floating_point() or mean[0].is_complex():
                torch._foreach_lerp_(mean, newest, 1 - decay)
            else:  # as torch has it
                torch._foreach_copy_(mean, [m * decay + n * (1 - decay) for m, n in zip(mean, newest, strict=True)])
    for buffer, now in zip(average.module.buffers(), model.buffers(), strict=True):
        buffer.copy_(now)
    average.n_averaged += 1


def extra_per_batch(share: float, batch_size: int) -> int:
    """How many examples of a batch are extra ones.

    >>> extra_per_batch(0.29, 100), extra_per_batch(0.7, 512)
    (29, 358)
    """
    return math.floor(round(share * batch_size, 6))


def _check_extra(extra: Images | None, train: Images | Stored, plan: Plan) -> None:
    if (extra is None) != (plan.extra_share == 0):
        raise ValueError(f"extra: expected {'some' if extra is None else 'none'} with a share of {plan.extra_share!r}")
    if extra is None:
        return
    if extra_per_batch(plan.extra_share, plan.batch_size) == 0:
        raise ValueError(f"extra_share: expected one of {plan.batch_size} examples or more, got {plan.extra_share!r}")
    theirs, ours = ((*shape_of(of), of.num_classes) for of in (extra, train))
    if theirs != ours:
        raise ValueError(f"extra: expected images and classes as {train.name} has them, {ours}, got {theirs}")
    if isinstance(train, Stored) and parallel.ranks() > 1:
        raise ValueError(
            "extra: expected none with stored images on many processes, whose batches no process has whole"
        )


def _drawn(extra: Images | None, batches: int, size: int, generator: torch.Generator) -> Tensor:
    """Which extra examples every batch takes, with replacement: (batches, size)."""
    return torch.randint(1 if extra is None else len(extra), (batches, size), generator=generator)


def _sums(found: Step, examples: int) -> Tensor:
    """Examples used, their summed losses at w and at w + v, tensors skipped, batches dropped; over many processes, what
    of these has the right mean.
    """
    used = 1 - found.dropped
    n = used * examples
    losses = [torch.where(used > 0, loss, 0) * n for loss in (found.loss, found.perturbed_loss)]
    return torch.stack([n, *losses, parallel.gathered(found.skipped).to(n.device), found.dropped]).double()


def measure(model: nn.Module, data: Images, plan: Plan) -> dict[str, float]:
    """Clean and robust accuracy (fractions) and mean cross-entropy (nats) of the model as it stands."""
    steps = measuring(model, data, plan, 0)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            found: dict[str, float] = done.value
            return found


def measuring(model: nn.Module, data: Images, plan: Plan, epoch: int) -> Generator[Measuring, None, dict[str, float]]:
    """`measure`, with an event after every batch; on many processes, as many on each."""
    shared = len(data) >= parallel.ranks() > 1
    rows = torch.arange(len(data))[parallel.share(len(data))] if shared else torch.arange(len(data))
    most = -(-len(data) // parallel.ranks()) if shared else len(data)
    seed, found = derived_seed(plan.seed), list[Outcomes]()
    for attack in (None, plan.measure):
        parts: list[Outcomes] = []
        batches = outcomes_by_batch(
            model, data, attack, attack_on=plan.measure_on, batch_size=plan.measure_batch_size, seed=seed, rows=rows
        )
        for _ in range(math.ceil(most / plan.measure_batch_size)):
            parts += islice(batches, 1)
            yield Measuring(epoch)
        whole = collect(parts)
        found.append(Outcomes(parallel.joined(whole.loss), parallel.joined(whole.correct)) if shared else whole)
    clean, robust = found
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
