"""The training behind `saltflat train`: read a config, run `fit`, write the run folder, show progress.

Whatever can be wrong with the input is found before the first file is written or the first batch computed, and raised
as `BadInput`.

On many processes (torchrun), all of them read, train and measure; the first one writes and speaks.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from saltflat import parallel
from saltflat.data import Images, Stored
from saltflat.lab import build, checkpoints, initial, memory, once, record
from saltflat.lab.climbing import check_compiles
from saltflat.lab.config import BadInput, Interrupted, Train, checked
from saltflat.lab.console import progress, say
from saltflat.lab.precision import exact, resolved
from saltflat.lab.recipes import for_digits
from saltflat.lab.signals import told_to_stop
from saltflat.lab.threat import trained_against
from saltflat.random import derived_seed
from saltflat.train import Diverged, Epoch, Stepped, fit

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
    with _together(config):
        _begin(config, out)


def _together(config: Train) -> AbstractContextManager[None]:
    """The processes that torchrun started train together inside."""
    return once.together(config.device, parallel.TIMEOUT)


def _begin(config: Train, out: Path) -> None:
    ready = _ready(config, initial.begun)
    gpu = ready.device.type == "cuda"
    where = torch.cuda.get_device_name(ready.device) if gpu else str(ready.device)
    versions = record.environment(where, torch.get_num_threads(), torch.version.cuda if gpu else None)
    versions |= {"precision": resolved(config.compute.precision, ready.device), "processes": parallel.ranks()}
    measured = {
        "attack": trained_against(config.attack).pgd_in_words(config.evaluation.steps),
        "mode": "eval",
        "weights": build.weights_in_words(config),
    }

    def made() -> None:
        record.create(out, config, versions, measured)
        _keep_initial(ready, out)

    parallel.first(made)
    with _alone(out):
        _train(ready, out, None)


def _keep_initial(ready: Ready, out: Path) -> None:
    if ready.config.model.initial is not None:
        say(f"weights begin with those of {ready.config.model.initial}")
        checkpoints.save_weights(out / "checkpoints" / "initial.safetensors", ready.model)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """BadInput if another training is at work in the folder, or if nothing can be written there."""
    with ExitStack() as held:
        try:
            held.enter_context(once.alone(out / "training.lock"))
        except BadInput:
            raise BadInput(f"run: another process is at work in {str(out)!r}") from None
        except OSError as error:
            raise BadInput(f"run: cannot write in {str(out)!r}: {error.strerror}") from None
        yield


def check(config: Train) -> Ready:
    """All that training asks for; BadInput if anything is not in order. Nothing is written."""
    return _ready(config, initial.begun)


def check_free(runs: Mapping[Path, Train]) -> None:
    """BadInput if one of these folders is a run of another config."""
    for out, config in runs.items():
        if out.exists():
            theirs, ours = (record.deciding(asdict(checked(of))) for of in (record.read_config(out), config))
            if differing := [name for name in ours if theirs[name] != ours[name]]:
                raise BadInput(f"out: {out} is a run of another config (see {differing[0]}); choose another folder")


def made(config: Train, out: Path) -> None:
    """A run of this config in the folder `out`: trained, gone on with, or left alone where it is whole."""
    with _together(config):
        there = parallel.first(lambda: out.exists() and (not out.is_dir() or any(out.iterdir())))
        if there:
            parallel.first(lambda: check_free({out: config}))
        _go_on(out) if there else _begin(config, out)


def resume(out: Path) -> None:
    """Go on with a run from what was saved last; does nothing if it is finished."""
    with _together(record.read_config(out)):
        _go_on(out)


def _finished_by_an_earlier_version(out: Path, config: Train) -> bool:
    """BadInput for a run that has begun, and has nothing to go on from."""
    folder = out / "checkpoints"
    earlier = checkpoints.epochs_of_earlier_version(folder)
    if checkpoints.states(folder) or (earlier is None and record.count_metrics(out) <= 1):
        return False
    if earlier is None or earlier < config.optimizer.epochs:
        raise BadInput(
            f"run: {out} has no checkpoint to go on from in {folder}"
            f"{', but one of an earlier version' if earlier is not None else ''}; begin a new run"
        )
    return True


def _newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """What is gone on from: the first process looks, and each reads it."""
    looked: list[tuple[Path, dict[str, Any]]] = []

    def look() -> Path | None:
        looked.extend(filter(None, [checkpoints.newest_whole(folder, say)]))
        return looked[0][0] if looked else None

    path = parallel.first(look)
    return None if path is None else looked[0] if looked else (path, checkpoints.read(path))


def _go_on(out: Path) -> None:
    config, folder = record.read_config(out), out / "checkpoints"
    if parallel.first(lambda: _finished_by_an_earlier_version(out, config)):
        say(f"{out} is finished: {config.optimizer.epochs} epochs.")
        return
    with _alone(out):
        found = _newest(folder)
        if found is None:
            parallel.first(lambda: _check_nothing_is_lost(out))
        if found is not None and found[1]["epoch"] >= config.optimizer.epochs:
            parallel.first(lambda: _repaired(out, found[1]))
            say(f"{out} is finished: {config.optimizer.epochs} epochs.")
            return
        ready, state = _ready(config, initial.begun if found is None else build.network), None
        if found is not None:
            path, state = found
            checkpoints.check_state(path, state, ready.model, config.optimizer.average + config.optimizer.swa_from > 0)
            (config_then, data_then), (config_now, data_now) = state["config"].split(), _identity(ready).split()
            if config_then == config_now and data_then != data_now:
                raise BadInput(f"data.path: {out} began with other images than {config.data.path} holds; put them back")
            if config_then != config_now:
                changed = f"{out / 'config.yaml'}{' (or what extra.path holds)' if config.extra.path else ''}"
                raise BadInput(
                    f"run: {changed} was changed since the run began: put it back, or begin a new run; or an earlier "
                    "version of saltflat began it"
                )
            if len(state["ranks"]) != parallel.ranks():
                say(
                    f"{out} goes on on {parallel.ranks()} process(es) after {len(state['ranks'])}: as before but for "
                    "rounding; what each drew by itself (dropout) or remembered of its own rows is not what it was"
                )
            say(f"{out} goes on after step {state['step']}, {state['epoch']} epochs done")
        else:
            parallel.first(lambda: _keep_initial(ready, out))  # it may have been killed before that
        parallel.first(lambda: record.write_metrics(out, [] if state is None else state["metrics"]))
        _train(ready, out, state)


def _repaired(out: Path, state: dict[str, Any]) -> None:
    """The metrics and the last weights of a finished run are those that its last checkpoint knows."""
    path, lines = out / "metrics.jsonl", "".join(line + "\n" for line in state["metrics"])
    if not path.exists() or path.read_bytes() != lines.encode():
        say(f"{path} is damaged: made anew")
        record.write_metrics(out, state["metrics"])
    last = out / "checkpoints" / "last.safetensors"
    try:
        checkpoints.whole_weights(last)
    except (BadInput, OSError):
        say(f"{last} is damaged: made anew")
        checkpoints.save_tensors(last, checkpoints.measured_weights(state))


def _check_nothing_is_lost(out: Path) -> None:
    """BadInput where a run would begin anew over what an earlier one has done."""
    if any((out / "checkpoints").glob("damaged-*")) and record.count_metrics(out) > 0:
        raise BadInput(
            f"run: {out} has no checkpoint that is whole to go on from; its best and last weights are as they were: "
            "keep the folder, and begin a new run in another"
        )


def _identity(ready: Ready) -> str:
    """Two digests: of the config, as far as it decides the numbers, and of the training examples (of stored images,
    their classes).
    """
    deciding, more = record.deciding(asdict(checked(ready.config))), ready.sets.extra
    if more is not None:
        parts = (more.images.contiguous().numpy(), more.labels.numpy())
        deciding["extra"]["digest"] = [hashlib.sha256(part.data).hexdigest() for part in parts]
    own = ready.sets.train
    told = hashlib.sha256(own.labels.numpy().data)
    if isinstance(own, Images):
        told.update(own.images.contiguous().numpy().data)
    return f"{record.digest(deciding)} {told.hexdigest()[:16]}"


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


def _ready(config: Train, network: Callable[[Train, Images | Stored], nn.Module]) -> Ready:
    if config.threads > (os.cpu_count() or 1):
        raise BadInput(f"threads: expected at most this machine's {os.cpu_count()} cores, got {config.threads}")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = build.device(config.device)
    _check_processes(config, device)
    if device.type == "cpu":
        memory.keep()
    if config.compute.compile:
        check_compiles(device)
    sets = build.with_extra(build.sets(config), config)
    own = (parallel.rank(),) if parallel.ranks() > 1 else ()
    torch.manual_seed(derived_seed(config.seed, *own))  # dropout draws from torch's global generator
    model = network(config, sets.train).to(device)
    size = config.optimizer.batch_size
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    last = size if sets.extra is not None else len(sets.train) % size or size
    smallest = last // parallel.ranks() // config.optimizer.accumulate // (2 if config.awp.method == "m-rwp" else 1)
    if normalised and smallest <= 1:
        parts = [f"{parallel.ranks()} processes"] * (parallel.ranks() > 1)
        parts += [f"{config.optimizer.accumulate} parts"] * (config.optimizer.accumulate > 1)
        parts += ["the halves of m-rwp"] * (config.awp.method == "m-rwp")
        raise BadInput(
            f"optimizer.batch_size: {len(sets.train)} images in batches of {size} leave one of "
            f"{f'{last}, for ' + ' and '.join(parts) if parts else 'a single image'}, "
            "which has no statistics for BatchNorm"
        )
    if smallest < 1 and config.optimizer.accumulate > 1:
        raise BadInput(
            f"optimizer.accumulate: the last batch has {last} images for {parallel.ranks()} processes, "
            f"expected at most {last // parallel.ranks()} parts, got {config.optimizer.accumulate}"
        )
    return Ready(config, device, sets, model)


def _check_processes(config: Train, device: torch.device) -> None:
    """BadInput for what many processes cannot do, or one alone."""
    if config.compute.sync_batch_norm and device.type != "cuda":
        raise BadInput("compute.sync_batch_norm: torch has it on GPUs alone, expected false on a CPU, got true")
    if parallel.ranks() == 1:
        return
    for name, holds in (("data.mix", config.data.mix != "none"), ("extra.share", config.extra.share > 0)):
        if config.data.stored and holds:
            raise BadInput(
                f"{name}: expected none with data.stored on {parallel.ranks()} processes, which have no batch whole"
            )
    if config.awp.amortised:
        raise BadInput(
            f"awp.amortised: expected false on {parallel.ranks()} processes, over which its gradient is not averaged, "
            "got true"
        )
    if parallel.ranks() > config.optimizer.batch_size:
        raise BadInput(
            f"optimizer.batch_size: expected an example or more for each of {parallel.ranks()} processes, got "
            f"{config.optimizer.batch_size}"
        )


def _spread(ready: Ready) -> parallel.Spread:
    """How the model lies on the processes."""
    of = ready.config.compute
    if parallel.ranks() == 1:
        return parallel.Alone(ready.model)
    if of.spread == "fsdp":
        return parallel.Sharded(ready.model, build.parts)
    return parallel.Replicated(ready.model, of.sync_batch_norm)


@exact()  # but for the steps, which are in the config's precision
def _train(ready: Ready, out: Path, state: dict[str, Any] | None) -> None:
    config, model, sets = ready.config, ready.model, ready.sets
    plan = build.plan(config, sets.train.num_classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    precision = resolved(config.compute.precision, ready.device)
    say(
        f"{config.recipe}, seed {config.seed}: {len(sets.train)} images, {parameters:,} parameters, {precision} on "
        f"{ready.device}, in {out}"
    )
    if parallel.ranks() > 1 or config.optimizer.accumulate > 1:
        say(_batches_in_words(config))
    if still := for_digits(config):
        say(f"note: chosen for the digits, and not changed with the data: {', '.join(still)}")
    began, metrics = time.perf_counter(), [] if state is None else list(state["metrics"])
    steps, whole = 0 if state is None else state["step"], {"config": _identity(ready), "metrics": metrics}
    spread, saved, last = _spread(ready), time.monotonic(), None
    events = fit(
        model,
        sets.train,
        sets.measured,
        plan,
        build.optimizer(config, model),
        extra=sets.extra,
        state=state,
        spread=spread,
    )
    del state
    try:
        with progress() as bar, told_to_stop(one_of_many=parallel.ranks() > 1) as told:
            task = bar.add_task("training", total=None)
            for event in events:
                if not isinstance(event, Epoch):
                    if isinstance(event, Stepped):
                        last = event
                        bar.update(task, total=event.steps, completed=event.step, description=f"epoch {event.epoch}")
                    due = event is last and 0 < config.checkpoint_minutes * 60 <= time.monotonic() - saved
                    if last is None or not parallel.anyones(due or bool(told)):
                        continue
                    _save(out, {**last.state(), **whole})
                    saved = time.monotonic()
                    if parallel.anyones(bool(told)):
                        say(f"told to stop, and saved at step {last.step}; go on with: saltflat train --resume {out}")
                        raise Interrupted
                else:
                    if event.metrics["collapsed"] and config.attack.stop_on_collapse:
                        say(f"epoch {event.epoch}: {FELL}; training ends with the epoch before")
                        return
                    parallel.first(lambda event=event: _keep(out, event, config, metrics))  # type: ignore[misc]
                    _save(out, {**event.state, **whole})
                    saved = time.monotonic()
                    here = event.metrics["step"]
                    done = max(1, here - steps)  # none, where an epoch's steps were done before
                    left = (time.perf_counter() - began) / done * (here // event.epoch * plan.epochs - here)
                    say(_in_words(event, config, left))
    except KeyboardInterrupt:
        say(f"interrupted; go on with: saltflat train --resume {out}")
        raise
    except Diverged as error:
        batch: dict[str, Any] = {name: parallel.joined(of).numpy() for name, of in error.batch.items()}
        message = f"{error}; the last one dropped is in {out / 'dropped-batch.npz'}" if batch else str(error)
        if batch:
            parallel.first(lambda: np.savez(out / "dropped-batch.npz", **batch))
        raise FloatingPointError(message) from None


def _batches_in_words(config: Train) -> str:
    of, ranks = config.optimizer, parallel.ranks()
    each = f"{ranks} processes x {of.batch_size / ranks:g}" if ranks > 1 else f"{of.batch_size}"
    parts = f" in {of.accumulate} parts" if of.accumulate > 1 else ""
    return (
        f"batches of {of.batch_size}: {each}{parts}; learning rate {of.learning_rate:g}, which is for the whole batch: "
        "it does not grow with the number of processes"
    )


def _save(out: Path, state: dict[str, Any]) -> None:
    """By the first process; all know whether it could."""
    parallel.first(lambda: checkpoints.save_state(out / "checkpoints", state))


def _keep(out: Path, event: Epoch, config: Train, metrics: list[str]) -> None:
    """Metrics first, the state last: what stands in between is made again, equal, if the run is killed here."""
    metrics.append(record.append_metrics(out, event.metrics))
    if event.best:
        checkpoints.save_weights(out / "checkpoints" / "best.safetensors", event.model)
    if event.epoch in kept_epochs(config):
        checkpoints.save_weights(out / "checkpoints" / f"epoch-{event.epoch}.safetensors", event.model)
    checkpoints.save_weights(out / "checkpoints" / "last.safetensors", event.model)


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
