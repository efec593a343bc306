"""The jobs behind the commands: read a config, run the library, write the run folder, show progress.

Whatever can be wrong with the input is found before the first file is written or the first batch computed, and raised
as `BadInput`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from saltflat.data import Images, stratified_subset
from saltflat.evaluation import carlini_wagner, collect, cross_entropy, interval, outcomes_by_batch
from saltflat.evaluation.accuracy import Inner
from saltflat.inputs import FGSM, PGD
from saltflat.lab import build, checkpoints, record
from saltflat.lab.config import Attack, BadInput, Train, shown
from saltflat.lab.console import CONSOLE, progress, say
from saltflat.landscape import along, random_direction
from saltflat.random import derived_seed
from saltflat.train import Epoch, Stepped, fit


@dataclass(frozen=True)
class Ready:
    """All that a training needs, found to be in order."""

    config: Train
    device: torch.device
    sets: build.Sets
    model: nn.Module


def train(config: Train, out: Path) -> None:
    """A new run in the folder `out`."""
    ready = _ready(config)
    gpu = ready.device.type == "cuda"
    where = torch.cuda.get_device_name(ready.device) if gpu else str(ready.device)
    versions = record.environment(where, torch.get_num_threads(), torch.version.cuda if gpu else None)
    measured = {
        "attack": build.attack_in_words(config, config.evaluation.steps),
        "mode": "eval",
        "weights": _weights(config),
    }
    record.create(out, config, versions, measured)
    _train(ready, out, None)


def resume(out: Path) -> None:
    """Go on with a run from its last whole epoch; does nothing if it is finished."""
    config = record.read_config(out)
    path, metrics = out / "checkpoints" / "resume.pt", record.read_metrics(out)
    if not path.exists() and len(metrics) > 1:
        raise BadInput(f"run: {out} has {len(metrics)} epochs but no {path.name} to go on from")
    ready, state = _ready(config), None
    if path.exists():
        state = checkpoints.load_state(path, ready.model, config.optimizer.average > 0)
        if state["config"] != _identity(config):
            changed = out / "config.yaml"
            raise BadInput(f"run: {changed} was changed since the run began: put it back, or begin a new run")
        if state["epoch"] >= config.optimizer.epochs:
            say(f"{out} is finished: {config.optimizer.epochs} epochs.")
            return
    record.keep_metrics_until(out, 0 if state is None else state["epoch"])
    _train(ready, out, state)


def _identity(config: Train) -> str:
    """A digest of all that decides the numbers; where, and on how many threads, a run goes on may change."""
    return record.digest(asdict(replace(config, device="", threads=0, data=replace(config.data, path=None))))


def _weights(config: Train) -> str:
    average = config.optimizer.average
    return f"moving average of w, decay {average:g}" if average else "w"


def _ready(config: Train) -> Ready:
    if config.threads > (os.cpu_count() or 1):
        raise BadInput(f"threads: expected at most this machine's {os.cpu_count()} cores, got {config.threads}")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = build.device(config.device)
    sets = build.sets(config)
    torch.manual_seed(derived_seed(config.seed))  # dropout draws from torch's global generator
    model = build.network(config, sets.train).to(device)
    size = config.optimizer.batch_size
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if normalised and (size == 1 or len(sets.train) % size == 1):
        raise BadInput(
            f"optimizer.batch_size: {len(sets.train)} images in batches of {size} leave one of a single image, "
            "which has no statistics for BatchNorm"
        )
    return Ready(config, device, sets, model)


def _train(ready: Ready, out: Path, state: dict[str, Any] | None) -> None:
    config, model, sets = ready.config, ready.model, ready.sets
    plan, done = build.plan(config), 0 if state is None else state["epoch"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{config.recipe}, seed {config.seed}: {len(sets.train)} images, {parameters:,} parameters, in {out}")
    began = time.perf_counter()
    try:
        with progress() as bar:
            task = bar.add_task("training", total=None)
            for event in fit(model, sets.train, sets.measured, plan, build.optimizer(config, model), state=state):
                if isinstance(event, Stepped):
                    bar.update(task, total=event.steps, completed=event.step, description=f"epoch {event.epoch}")
                elif isinstance(event, Epoch):
                    _keep(out, event, _identity(config))
                    left = (time.perf_counter() - began) / (event.epoch - done) * (plan.epochs - event.epoch)
                    say(_in_words(event, plan.epochs, left))
    except KeyboardInterrupt:
        say(f"interrupted; go on with: saltflat train --resume {out}")
        raise


def _keep(out: Path, event: Epoch, config: str) -> None:
    """Metrics first, the state last: what stands in between is made again, equal, if the run is killed here."""
    record.append_metrics(out, event.metrics)
    if event.best:
        checkpoints.save_weights(out / "checkpoints" / "best.safetensors", event.model)
    checkpoints.save_weights(out / "checkpoints" / "last.safetensors", event.model)
    checkpoints.save_state(out / "checkpoints" / "resume.pt", {**event.state, "config": config})


def _in_words(event: Epoch, epochs: int, left: float) -> str:
    metrics = event.metrics
    train, test, gap = metrics["train"], metrics["test"], metrics["gap"]
    return (
        f"epoch {event.epoch:{len(str(epochs))}}/{epochs}  loss {metrics['loss']:.3f}  "
        f"robust train {train['robust_accuracy']:6.2%}  test {test['robust_accuracy']:6.2%}  "
        f"gap {gap['accuracy']:7.2%}  clean test {test['clean_accuracy']:6.2%}  {'best' if event.best else '    '}  "
        f"eta {int(left) // 60}:{int(left) % 60:02}"
    )


@dataclass(frozen=True)
class Opened:
    """A trained network, with the data and the config of its run."""

    folder: Path
    checkpoint: str
    sha256: str
    config: Train
    model: nn.Module
    sets: build.Sets


def opened(
    path: Path, checkpoint: str, device: str = "auto", weights: Path | None = None, data_path: Path | None = None
) -> Opened:
    """A run folder and the name of one of its checkpoints, or the path of a checkpoint in a run folder.

    `weights` is a file whose weights are taken instead; its path then stands for the checkpoint's name. `data_path` is
    where the run's data are now.
    """
    if path.suffix == ".safetensors":
        path, checkpoint = path.absolute().parent.parent, path.stem
    config = record.read_config(path)
    if data_path is not None:
        config = replace(config, data=replace(config.data, path=data_path))
    file = weights or path / "checkpoints" / f"{checkpoint}.safetensors"
    if weights is None and not file.is_file():
        there = sorted(found.stem for found in (path / "checkpoints").glob("*.safetensors"))
        raise BadInput(f"checkpoint: expected one of {', '.join(there) or 'none yet'} in {path}, got {checkpoint!r}")
    found = build.device(device)
    sets = build.sets(config)
    model = build.network(config, sets.train)
    checkpoints.load_weights(file, model)
    name = checkpoint if weights is None else str(weights)
    return Opened(path, name, checkpoints.digest(file), config, model.to(found).eval(), sets)


def with_threat(of: Opened, norm: str | None, eps: float | None, step_size: float | None) -> Opened:
    """The same network under another threat model."""
    attack = of.config.attack
    if norm is not None and norm != attack.norm and (eps is None or step_size is None):
        raise BadInput(
            f"norm: another norm than the run's {attack.norm} needs its own --eps and --step-size, got {norm!r}"
        )
    if step_size is None:  # another radius takes steps in proportion
        step_size = attack.step_size if eps is None or attack.eps == 0 else attack.step_size * eps / attack.eps
    eps = attack.eps if eps is None else eps
    threat: Attack = replace(attack, norm=norm or attack.norm, eps=eps, step_size=step_size)  # type: ignore[arg-type]
    return replace(of, config=replace(of.config, attack=threat))


def chosen(of: Opened, split: str, examples: int) -> Images:
    """A stratified part of a split; 0 takes all. Equal for all runs on equal data."""
    images = {"test": of.sets.test, "train": of.sets.train, "validation": of.sets.measured["validation"]}[split]
    if examples > len(images):
        raise BadInput(f"examples: expected at most the {len(images)} of the {split} split, got {examples}")
    return images.subset(stratified_subset(images.labels, examples, build.VALIDATION_SEED)) if examples else images


@dataclass(frozen=True)
class Attempt:
    """An attack, what it maximises, and how captions call it."""

    attack: PGD | None
    inner: Inner
    description: str


def attempts(config: Train, names: Sequence[str]) -> dict[str, Attempt]:
    """By name: clean, fgsm, pgd-K or cw-K."""
    found: dict[str, Attempt] = {}
    threat = f"{config.attack.norm}, eps {shown(config.attack.eps)}"
    for name in names:
        parts = re.fullmatch(r"(pgd|cw)-([1-9][0-9]{0,4})", name)
        if name == "clean":
            found[name] = Attempt(None, cross_entropy, "no attack")
        elif name == "fgsm":
            found[name] = Attempt(FGSM(build.ball(config)), cross_entropy, f"FGSM, {threat}")
        elif parts:
            steps = int(parts[2])
            words = build.attack_in_words(config, steps)
            inner = cross_entropy if parts[1] == "pgd" else carlini_wagner
            on = "cross-entropy" if parts[1] == "pgd" else "the margin max z_k - z_y (CW)"
            found[name] = Attempt(build.attack(config, steps), inner, f"{words}, on {on}")
        else:
            raise BadInput(f"attacks: expected clean, fgsm, pgd-K or cw-K (such as pgd-20), got {name!r}")
    return found


def evaluate(of: Opened, names: Sequence[str], split: str, examples: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Attack a checkpoint, write per-example outcomes and their summary into the run folder, and return the summary.

    What was asked before, of the same weights, is read and not computed again.
    """
    todo, images = attempts(of.config, names), chosen(of, split, examples)
    asked: dict[str, Any] = {
        "checkpoint": of.checkpoint,
        "sha256": of.sha256,
        "split": split,
        "n": len(images),
        "settings": {"seed": seed, "batch_size": batch_size, "mode": "eval", "weights": _weights(of.config)},
    }
    wanted = {name: attempt.description for name, attempt in todo.items()}
    path = _place(of, "outcomes", split, {**asked, "attacks": wanted})
    if path.is_file():
        return _read(path)
    arrays: dict[str, Any] = {"label": images.labels.numpy()}
    rows = []
    with progress() as bar:
        for name, attempt in todo.items():
            batches = outcomes_by_batch(
                of.model, images, attempt.attack, inner=attempt.inner, batch_size=batch_size, seed=seed
            )
            found = collect(bar.track(batches, total=-(-len(images) // batch_size), description=name))
            arrays[f"{name}_correct"], arrays[f"{name}_loss"] = found.correct.numpy(), found.loss.numpy()
            ends = interval(int(found.correct.sum()), len(images))
            rows.append({"name": name, "description": wanted[name], "accuracy": found.accuracy, "interval": ends})
    with record.replacing(path.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    summary = {**asked, "attacks": rows}
    record.write_json(path, summary)
    return summary


def landscape(
    of: Opened,
    alphas: Sequence[float],
    directions: int,
    split: str,
    examples: int,
    steps: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """g(alpha) = rho(w + alpha d), attacked afresh at every alpha, along random filter-normalised directions.

    Written into the run folder; what was asked before, of the same weights, is read and not computed again.
    """
    images, attack = chosen(of, split, examples), build.attack(of.config, steps)
    asked = {
        "checkpoint": of.checkpoint,
        "sha256": of.sha256,
        "split": split,
        "n": len(images),
        "alphas": list(alphas),
        "settings": {
            "direction": "random, filter-normalised, no biases and norm layers",
            "attack": f"{build.attack_in_words(of.config, steps)}, made afresh at each alpha, starts per example",
            "batch_norm": "eval mode",
            "seed": seed,
            "batch_size": batch_size,
        },
    }
    path = _place(of, "landscapes", split, {**asked, "directions": directions})
    if path.is_file():
        return _read(path)

    def measure() -> tuple[float, float, float]:
        robust = collect(outcomes_by_batch(of.model, images, attack, batch_size=batch_size, seed=seed))
        clean = collect(outcomes_by_batch(of.model, images, None, batch_size=batch_size))
        return robust.mean_loss, robust.accuracy, clean.mean_loss

    curves = []
    with progress() as bar:
        task = bar.add_task(f"landscape of {of.folder.absolute().name}", total=directions * len(alphas))
        for direction_seed in range(seed, seed + directions):
            points = []
            for _, point in along(of.model, random_direction(of.model, direction_seed), alphas, measure):
                points.append(point)
                bar.advance(task)
            robust_loss, robust_accuracy, clean_loss = map(list, zip(*points, strict=True))
            curves.append(
                {
                    "direction_seed": direction_seed,
                    "robust_loss": robust_loss,
                    "robust_accuracy": robust_accuracy,
                    "clean_loss": clean_loss,
                }
            )
    found = {**asked, "curves": curves}
    record.write_json(path, found)
    return found


def rise(found: dict[str, Any]) -> str:
    """A landscape in one line: g(0), and how far the mean curve rises to its ends."""
    alphas, mean = found["alphas"], np.mean([curve["robust_loss"] for curve in found["curves"]], axis=0)
    g0 = mean[alphas.index(0.0)]
    return (
        f"g(0) = {g0:.3f} nats, rises by {mean[0] - g0:.3f} at alpha = {alphas[0]:g} and by {mean[-1] - g0:.3f} at "
        f"{alphas[-1]:g}; directions: {len(found['curves'])}"
    )


def _place(of: Opened, kind: str, split: str, asked: dict[str, Any]) -> Path:
    """One file for one question: its name has a digest of the weights and of all settings."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", of.checkpoint)
    return of.folder / kind / f"{name}-{split}-{record.digest(asked)}.json"


def _read(path: Path) -> dict[str, Any]:
    say(f"already there: {path}")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def show_outcomes(of: Opened, summary: dict[str, Any]) -> None:
    """A table in the terminal."""
    title = f"{of.folder}: {summary['checkpoint']} checkpoint, {summary['split']} split, n = {summary['n']}"
    table = Table("attack", "accuracy", "95 % interval", "settings", title=title)
    for row in summary["attacks"]:
        low, high = row["interval"]
        table.add_row(row["name"], f"{row['accuracy']:.2%}", f"{low:.2%} to {high:.2%}", row["description"])
    CONSOLE.print(table)
