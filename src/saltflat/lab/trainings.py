"""The training behind `saltflat train`: read a config, run `fit`, write the run folder, show progress.

Whatever can be wrong with the input is found before the first file is written or the first batch computed, and raised
as `BadInput`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saltflat.data import Images
from saltflat.lab import build, checkpoints, initial, memory, record
from saltflat.lab.climbing import check_compiles
from saltflat.lab.config import BadInput, Train
from saltflat.lab.console import progress, say
from saltflat.lab.precision import exact, resolved
from saltflat.lab.threat import trained_against
from saltflat.random import derived_seed
from saltflat.train import Epoch, Stepped, fit

FELL = "robust accuracy on training images fell by more than 20 points"


@dataclass(frozen=True)
class Ready:
    """All that a training needs, found to be in order."""

    config: Train
    device: torch.device
    sets: build.Sets
    model: nn.Module


def train(config: Train, out: Path) -> None:
    """A new run in the folder `out`."""
    ready = _ready(config, initial.begun)
    gpu = ready.device.type == "cuda"
    where = torch.cuda.get_device_name(ready.device) if gpu else str(ready.device)
    versions = record.environment(where, torch.get_num_threads(), torch.version.cuda if gpu else None)
    versions["precision"] = resolved(config.compute.precision, ready.device)
    measured = {
        "attack": trained_against(config.attack).pgd_in_words(config.evaluation.steps),
        "mode": "eval",
        "weights": build.weights_in_words(config),
    }
    record.create(out, config, versions, measured)
    if config.model.initial is not None:
        say(f"weights begin with those of {config.model.initial}")
        checkpoints.save_weights(out / "checkpoints" / "initial.safetensors", ready.model)
    _train(ready, out, None)


def check(config: Train) -> Ready:
    """All that training asks for; BadInput if anything is not in order. Nothing is written."""
    return _ready(config, initial.begun)


def check_free(runs: Mapping[Path, Train]) -> None:
    """BadInput if one of these folders is a run of another config."""
    for out, config in runs.items():
        if out.exists() and record.read_config(out) != config:
            raise BadInput(f"out: {out} is a run of another config; choose another folder")


def made(config: Train, out: Path) -> None:
    """A run of this config in the folder `out`: trained, gone on with, or left alone where it is whole."""
    check_free({out: config})
    resume(out) if out.exists() else train(config, out)


def resume(out: Path) -> None:
    """Go on with a run from its last whole epoch; does nothing if it is finished."""
    config = record.read_config(out)
    path, metrics = out / "checkpoints" / "resume.pt", record.read_metrics(out)
    if not path.exists() and len(metrics) > 1:
        raise BadInput(f"run: {out} has {len(metrics)} epochs but no {path.name} to go on from")
    if path.exists() and checkpoints.epochs_done(path) >= config.optimizer.epochs:
        say(f"{out} is finished: {config.optimizer.epochs} epochs.")
        return
    ready, state = _ready(config, build.network if path.exists() else initial.begun), None
    if path.exists():
        averaged = config.optimizer.average > 0 or config.optimizer.swa_from > 0
        state = checkpoints.load_state(path, ready.model, averaged)
        if state["config"] != _identity(ready):
            changed = f"{out / 'config.yaml'}{' (or what extra.path holds)' if config.extra.path else ''}"
            raise BadInput(
                f"run: {changed} was changed since the run began: put it back, or begin a new run; or an earlier "
                "version of saltflat began it"
            )
    record.keep_metrics_until(out, 0 if state is None else state["epoch"])
    _train(ready, out, state)


def _identity(ready: Ready) -> str:
    """A digest of all that decides the numbers; where, and on how many threads, a run goes on may change, and what is
    kept of it.
    """
    config, more = ready.config, ready.sets.extra
    data, extra = replace(config.data, path=None), replace(config.extra, path=None)
    deciding = asdict(replace(config, device="", threads=0, data=data, extra=extra))
    del deciding["model"]["initial"]
    del deciding["keep_every"]
    if more is not None:
        parts = (more.images.contiguous().numpy(), more.labels.numpy())
        deciding["extra"]["digest"] = [hashlib.sha256(part.data).hexdigest() for part in parts]
    return record.digest(deciding)


def kept_epochs(config: Train) -> set[int]:
    """Epochs whose weights are kept as epoch-N: the first of all, every so many, and both sides of each drop of the
    learning rate.

    >>> from saltflat.lab.config import Optimizer
    >>> sorted(kept_epochs(Train(keep_every=20, optimizer=Optimizer(epochs=60))))
    [1, 20, 30, 31, 40, 45, 46, 60]
    """
    if config.keep_every == 0:
        return set()
    every = range(config.keep_every, config.optimizer.epochs + 1, config.keep_every)
    return {1, *every, *drops(config), *(epoch + 1 for epoch in drops(config))}


def drops(config: Train) -> list[int]:
    """The last whole epochs before each drop of the learning rate, where its schedule has any.

    >>> drops(Train())
    [30, 45]
    """
    if config.optimizer.schedule != "piecewise":
        return []
    whole = (int(progress * config.optimizer.epochs) for progress in build.DROPS)
    return [epoch for epoch in whole if epoch > 0]


def _ready(config: Train, network: Callable[[Train, Images], nn.Module]) -> Ready:
    if config.threads > (os.cpu_count() or 1):
        raise BadInput(f"threads: expected at most this machine's {os.cpu_count()} cores, got {config.threads}")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = build.device(config.device)
    if device.type == "cpu":
        memory.keep()
    if config.compute.compile:
        check_compiles(device)
    sets = build.with_extra(build.sets(config), config)
    torch.manual_seed(derived_seed(config.seed))  # dropout draws from torch's global generator
    model = network(config, sets.train).to(device)
    size = config.optimizer.batch_size
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    last = len(sets.train) % size or size
    if normalised and sets.extra is None and (last == 1 or (config.awp.method == "m-rwp" and last // 2 == 1)):
        raise BadInput(
            f"optimizer.batch_size: {len(sets.train)} images in batches of {size} leave one of a single image"
            f"{', or one that m-rwp halves to that' if last > 1 else ''}, which has no statistics for BatchNorm"
        )
    return Ready(config, device, sets, model)


@exact()  # but for the steps, which are in the config's precision
def _train(ready: Ready, out: Path, state: dict[str, Any] | None) -> None:
    config, model, sets = ready.config, ready.model, ready.sets
    plan, done = build.plan(config, sets.train.num_classes), 0 if state is None else state["epoch"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    precision = resolved(config.compute.precision, ready.device)
    say(
        f"{config.recipe}, seed {config.seed}: {len(sets.train)} images, {parameters:,} parameters, {precision} on "
        f"{ready.device}, in {out}"
    )
    began, identity = time.perf_counter(), _identity(ready)
    try:
        with progress() as bar:
            task = bar.add_task("training", total=None)
            optimizer = build.optimizer(config, model)
            for event in fit(model, sets.train, sets.measured, plan, optimizer, extra=sets.extra, state=state):
                if isinstance(event, Stepped):
                    bar.update(task, total=event.steps, completed=event.step, description=f"epoch {event.epoch}")
                elif isinstance(event, Epoch):
                    if event.metrics["collapsed"] and config.attack.stop_on_collapse:
                        say(f"epoch {event.epoch}: {FELL}; training ends with the epoch before")
                        return
                    _keep(out, event, config, identity)
                    left = (time.perf_counter() - began) / (event.epoch - done) * (plan.epochs - event.epoch)
                    say(_in_words(event, config, left))
    except KeyboardInterrupt:
        say(f"interrupted; go on with: saltflat train --resume {out}")
        raise


def _keep(out: Path, event: Epoch, config: Train, identity: str) -> None:
    """Metrics first, the state last: what stands in between is made again, equal, if the run is killed here."""
    record.append_metrics(out, event.metrics)
    if event.best:
        checkpoints.save_weights(out / "checkpoints" / "best.safetensors", event.model)
    if event.epoch in kept_epochs(config):
        checkpoints.save_weights(out / "checkpoints" / f"epoch-{event.epoch}.safetensors", event.model)
    checkpoints.save_weights(out / "checkpoints" / "last.safetensors", event.model)
    checkpoints.save_state(out / "checkpoints" / "resume.pt", {**event.state, "config": identity})


def _in_words(event: Epoch, config: Train, left: float) -> str:
    metrics, epochs = event.metrics, config.optimizer.epochs
    train, test, gap = metrics["train"], metrics["test"], metrics["gap"]
    line = (
        f"epoch {event.epoch:{len(str(epochs))}}/{epochs}  loss {metrics['loss']:.3f}  "
        f"robust train {train['robust_accuracy']:6.2%}  test {test['robust_accuracy']:6.2%}  "
        f"gap {gap['accuracy']:7.2%}  clean test {test['clean_accuracy']:6.2%}  {'best' if event.best else '    '}  "
        f"eta {int(left) // 60}:{int(left) % 60:02}"
    )
    if metrics["dropped"]:
        line += f"\n  {metrics['dropped']} batches were dropped: their gradients were not finite"
    if metrics["collapsed"]:
        one_step = config.attack.steps == 1 or config.attack.replays > 0
        line += f"\n  {'catastrophic overfitting? ' if one_step else ''}{FELL} since the epoch before"
    return line
