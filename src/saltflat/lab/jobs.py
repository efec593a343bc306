"""The jobs behind the commands: read a config, run the library, write the run folder, show progress.

Whatever can be wrong with the input is found before the first file is written or the first batch computed, and raised
as a ValueError of one line.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from saltflat.data import Images, stratified_subset
from saltflat.evaluation import carlini_wagner, collect, cross_entropy, interval, outcomes_by_batch
from saltflat.evaluation.accuracy import Inner
from saltflat.inputs import FGSM, PGD
from saltflat.lab import build, checkpoints, record
from saltflat.lab.config import Train, shown
from saltflat.landscape import along, random_direction
from saltflat.random import derived_seed
from saltflat.train import Epoch, Stepped, fit

CONSOLE = Console(highlight=False)


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar with an ETA, where there is a terminal; lines printed meanwhile stand above it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=CONSOLE, transient=True) as bar:
        yield bar


def train(config: Train, out: Path) -> None:
    """A new run in the folder `out`."""
    device, sets, model = _prepared(config)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    measured = {"attack": build.attack_in_words(config, config.evaluation.steps), "mode": "eval", "weights": "w"}
    record.create(out, config, record.environment(where, torch.get_num_threads()), measured)
    _train(config, out, sets, model, None)


def resume(out: Path) -> None:
    """Go on with a run from its last whole epoch; does nothing if it is finished."""
    config = record.read_config(out)
    device_sets_model = _prepared(config)
    path, state = out / "checkpoints" / "resume.pt", None
    if path.exists():
        state = checkpoints.load_state(path)
        if state["epoch"] >= config.optimizer.epochs:
            CONSOLE.print(f"{out} is finished: {config.optimizer.epochs} epochs.")
            return
    record.keep_metrics_until(out, 0 if state is None else state["epoch"])
    _train(config, out, *device_sets_model[1:], state)


def _prepared(config: Train) -> tuple[torch.device, build.Sets, nn.Module]:
    if config.threads:
        torch.set_num_threads(config.threads)
    device = build.device(config.device)
    sets = build.sets(config)
    torch.manual_seed(derived_seed(config.seed))  # dropout draws from torch's global generator
    return device, sets, build.network(config, sets.train).to(device)


def _train(config: Train, out: Path, sets: build.Sets, model: nn.Module, state: dict[str, Any] | None) -> None:
    plan, done = build.plan(config), 0 if state is None else state["epoch"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    CONSOLE.print(f"{config.recipe}, seed {config.seed}: {len(sets.train)} images, {parameters:,} parameters, in {out}")
    began = time.perf_counter()
    try:
        with progress() as bar:
            task = bar.add_task("training", total=None)
            for event in fit(model, sets.train, sets.measured, plan, build.optimizer(config, model), state=state):
                if isinstance(event, Stepped):
                    bar.update(task, total=event.steps, completed=event.step, description=f"epoch {event.epoch}")
                elif isinstance(event, Epoch):
                    _keep(out, event)
                    left = (time.perf_counter() - began) / (event.epoch - done) * (plan.epochs - event.epoch)
                    CONSOLE.print(_in_words(event, plan.epochs, left), soft_wrap=True)
    except KeyboardInterrupt:
        CONSOLE.print(f"interrupted; go on with: saltflat train --resume {out}")
        raise


def _keep(out: Path, event: Epoch) -> None:
    """Metrics first, the state last: what stands in between is made again, equal, if the run is killed here."""
    record.append_metrics(out, event.metrics)
    if event.best:
        checkpoints.save_weights(out / "checkpoints" / "best.safetensors", event.model)
    checkpoints.save_weights(out / "checkpoints" / "last.safetensors", event.model)
    checkpoints.save_state(out / "checkpoints" / "resume.pt", event.state)


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
    config: Train
    model: nn.Module
    sets: build.Sets


def opened(path: Path, checkpoint: str, device: str = "auto", weights: Path | None = None) -> Opened:
    """A run folder and the name of one of its checkpoints, or the path of a checkpoint in a run folder."""
    if path.suffix == ".safetensors":
        path, checkpoint = path.parent.parent, path.stem
    config = record.read_config(path)
    file = weights or path / "checkpoints" / f"{checkpoint}.safetensors"
    if weights is None and not file.is_file():
        there = sorted(found.stem for found in (path / "checkpoints").glob("*.safetensors"))
        raise ValueError(f"checkpoint: expected one of {', '.join(there) or 'none yet'} in {path}, got {checkpoint!r}")
    found = build.device(device)
    sets = build.sets(config)
    model = build.network(config, sets.train)
    checkpoints.load_weights(file, model)
    return Opened(path, checkpoint if weights is None else weights.stem, config, model.to(found).eval(), sets)


def chosen(of: Opened, split: str, examples: int) -> Images:
    """A stratified part of a split; 0 takes all. Equal for all runs on equal data."""
    images = {"test": of.sets.test, "train": of.sets.train, "validation": of.sets.measured["validation"]}[split]
    if examples > len(images):
        raise ValueError(f"examples: expected at most the {len(images)} of the {split} split, got {examples}")
    return images.subset(stratified_subset(images.labels, examples, build.VALIDATION_SEED)) if examples else images


def attacks(config: Train, names: Sequence[str]) -> dict[str, tuple[PGD | None, Inner, str]]:
    """Each attack with what it maximises and how captions call it: clean, fgsm, pgd-K or cw-K."""
    found: dict[str, tuple[PGD | None, Inner, str]] = {}
    threat = f"{config.attack.norm}, eps {shown(config.attack.eps)}"
    for name in names:
        parts = re.fullmatch(r"(pgd|cw)-([1-9][0-9]{0,4})", name)
        if name == "clean":
            found[name] = None, cross_entropy, "no attack"
        elif name == "fgsm":
            found[name] = FGSM(build.ball(config)), cross_entropy, f"FGSM, {threat}"
        elif parts:
            words = build.attack_in_words(config, int(parts[2]))
            inner = cross_entropy if parts[1] == "pgd" else carlini_wagner
            on = "cross-entropy" if parts[1] == "pgd" else "the margin max z_k - z_y (CW)"
            found[name] = build.attack(config, int(parts[2])), inner, f"{words}, on {on}"
        else:
            raise ValueError(f"attacks: expected clean, fgsm, pgd-K or cw-K (such as pgd-20), got {name!r}")
    return found


def evaluate(of: Opened, names: Sequence[str], split: str, examples: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Attack a checkpoint, write per-example outcomes and their summary into the run folder, and return the summary."""
    todo, images = attacks(of.config, names), chosen(of, split, examples)
    arrays: dict[str, Any] = {"label": images.labels.numpy()}
    rows = []
    with progress() as bar:
        for name, (attack, inner, description) in todo.items():
            batches = outcomes_by_batch(of.model, images, attack, inner=inner, batch_size=batch_size, seed=seed)
            found = collect(bar.track(batches, total=-(-len(images) // batch_size), description=name))
            arrays[f"{name}_correct"], arrays[f"{name}_loss"] = found.correct.numpy(), found.loss.numpy()
            ends = interval(int(found.correct.sum()), len(images))
            rows.append({"name": name, "description": description, "accuracy": found.accuracy, "interval": ends})
    settings = {"seed": seed, "batch_size": batch_size, "mode": "eval", "weights": "w"}
    summary = {"checkpoint": of.checkpoint, "split": split, "n": len(images), "attacks": rows, "settings": settings}
    asked = {**summary, "attacks": [row["description"] for row in rows]}
    stem = f"{of.checkpoint}-{split}-{record.digest(asked)}"
    with record.replacing(of.folder / "outcomes" / f"{stem}.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    record.write_json(of.folder / "outcomes" / f"{stem}.json", summary)
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
    """g(alpha) = rho(w + alpha d), attacked afresh at every alpha, along random filter-normalised directions."""
    images, attack = chosen(of, split, examples), build.attack(of.config, steps)

    def measure() -> tuple[float, float, float]:
        batches = outcomes_by_batch(of.model, images, attack, batch_size=batch_size, seed=seed)
        robust, clean = collect(batches), collect(outcomes_by_batch(of.model, images, None, batch_size=batch_size))
        return robust.mean_loss, robust.accuracy, clean.mean_loss

    curves = []
    with progress() as bar:
        task = bar.add_task(f"landscape of {of.folder.name}", total=directions * len(alphas))
        for number in range(directions):
            direction_seed = seed + number
            points = []
            for _, point in along(of.model, random_direction(of.model, direction_seed), alphas, measure):
                points.append(point)
                bar.advance(task)
            names = ("robust_loss", "robust_accuracy", "clean_loss")
            columns = zip(*points, strict=True)
            curves.append({"direction_seed": direction_seed, **dict(zip(names, map(list, columns), strict=True))})
    settings = {
        "direction": "random, filter-normalised, no biases and norm layers",
        "attack": f"{build.attack_in_words(of.config, steps)}, made afresh at each alpha, starts per example",
        "batch_norm": "eval mode",
        "seed": seed,
        "batch_size": batch_size,
    }
    found = {
        "checkpoint": of.checkpoint,
        "split": split,
        "n": len(images),
        "alphas": list(alphas),
        "curves": curves,
        "settings": settings,
    }
    name = f"{of.checkpoint}-{split}-{record.digest({**found, 'curves': directions})}.json"
    record.write_json(of.folder / "landscapes" / name, found)
    return found


def with_threat(of: Opened, norm: str | None, eps: float | None, step_size: float | None) -> Opened:
    """The same network under another threat model."""
    given = {"norm": norm, "eps": eps, "step_size": step_size}
    threat = replace(of.config.attack, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    return replace(of, config=replace(of.config, attack=threat))


def show_outcomes(of: Opened, summary: dict[str, Any]) -> None:
    """A table in the terminal."""
    title = f"{of.folder}: {summary['checkpoint']} checkpoint, {summary['split']} split, n = {summary['n']}"
    table = Table("attack", "accuracy", "95 % interval", "settings", title=title)
    for row in summary["attacks"]:
        low, high = row["interval"]
        table.add_row(row["name"], f"{row['accuracy']:.2%}", f"{low:.2%} to {high:.2%}", row["description"])
    CONSOLE.print(table)


def report(runs: Sequence[Path], out: Path | None) -> Path:
    """One page about the runs; returns where it is."""
    from saltflat.lab.report import write_report  # matplotlib takes a while

    path = out or (runs[0] if len(runs) == 1 else runs[0].parent) / "report.html"
    write_report(list(runs), path)
    CONSOLE.print(f"report: {path}", soft_wrap=True)
    return path
