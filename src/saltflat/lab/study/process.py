"""`saltflat study process`: the robust gap and the weight loss landscape of one run over its epochs, before and after
each drop of the learning rate, at the best epoch and at the last. It is the first experiment of the AWP paper (Wu, Xia,
Wang, arXiv 2004.05884, section 3): does the landscape sharpen as the gap opens?

    RUN/gaps, RUN/landscapes, RUN/flatness   what is measured of each checkpoint
    OUT/process.json  process.csv  process.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saltflat.lab import landscapes, record
from saltflat.lab.config import BadInput, Train
from saltflat.lab.console import say
from saltflat.lab.flatness import flatness
from saltflat.lab.gaps import How as GapHow
from saltflat.lab.gaps import robust_gap
from saltflat.lab.measures import How
from saltflat.lab.study import process_page
from saltflat.lab.study.models import Existing
from saltflat.lab.study.table import number
from saltflat.lab.study.workers import Engine, side_by_side
from saltflat.lab.trainings import drops


@dataclass(frozen=True)
class Plan:
    """What is measured at every checkpoint."""

    reach: float
    points: int
    directions: int
    slice: landscapes.How
    gap: GapHow
    how: How


@dataclass(frozen=True)
class Moment:
    """A checkpoint, the epoch that it is of, and why it is looked at."""

    source: Existing
    checkpoint: str
    epoch: int
    role: str
    plan: Plan


def study(run: Path, plan: Plan, out: Path, engine: Engine, data_path: Path | None, device: str) -> None:
    """Measure all kept checkpoints, and write the page; what is there already is read."""
    record.check_folder("out", out)
    config, epochs = record.read_config(run), record.read_metrics(run)
    names = _looked_at(run, epochs)
    source = Existing(run, tuple(names.values()), data_path, device)
    source.check()
    source.reads()[1]()
    moments = {name: Moment(source, name, epoch, _role(config, epochs, epoch), plan) for epoch, name in names.items()}
    report = _begun(run, config, epochs, plan)
    with engine() as executor, record.alone(out / "process.lock"):
        found = side_by_side(_measured, moments, executor, out / "logs", _in_words)
        settings = next(iter(found.values()))["settings"]
        points = [{key: value for key, value in point.items() if key != "settings"} for point in found.values()]
        sentences = process_page.write({**report, "settings": settings, "points": points}, out)
    for sentence in sentences:
        say(f"{sentence.claim} {sentence.evidence}".strip())
    say(f"{len(found)} checkpoints; {out / 'process.html'}")


def _begun(run: Path, config: Train, epochs: Sequence[Mapping[str, Any]], plan: Plan) -> dict[str, Any]:
    """What is known of the run before anything is measured."""
    needed = ("epoch", "learning_rate", "train", "test")
    if lacking := [name for line in epochs for name in needed if name not in line]:
        raise BadInput(f"run: expected {lacking[0]} in every line of {run / 'metrics.jsonl'}, found none in some")
    measured = run / "evaluation.json"
    return {
        "run": run.absolute().name,
        "recipe": config.recipe,
        "seed": config.seed,
        "epochs": config.optimizer.epochs,
        "drops": drops(config),
        "alphas": landscapes.symmetric(plan.reach, plan.points),
        "trajectory": [
            {
                "epoch": line["epoch"],
                "learning_rate": line["learning_rate"],
                "train": line["train"],
                "test": line["test"],
            }
            for line in epochs
        ],
        "evaluation": record.read_again(measured) if measured.is_file() else {},
    }


def _looked_at(run: Path, epochs: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """The kept epochs, the last and the best, in order; each epoch once, by its first name here."""
    kept = {path.stem for path in (run / "checkpoints").glob("*.safetensors")}
    numbers = [int(name.removeprefix("epoch-")) for name in kept if re.fullmatch("epoch-[0-9]+", name)]
    if len(numbers) < 2:
        there = ", ".join(sorted(kept)) or "none"
        raise BadInput(f"run: expected checkpoints of several epochs in {run} (train with --keep-every N), got {there}")
    if not epochs:
        raise BadInput(f"run: expected metrics of epochs in {run}, got none")
    names: dict[int, str] = {number: f"epoch-{number}" for number in numbers}
    for epoch, name in ((epochs[-1]["epoch"], "last"), (_best(epochs), "best")):
        if epoch is not None and name in kept:
            names.setdefault(epoch, name)
    return dict(sorted(names.items()))


def _best(epochs: Sequence[Mapping[str, Any]]) -> int | None:
    """Each epoch that beat those before it was marked when it was written."""
    return next((int(line["epoch"]) for line in reversed(epochs) if line.get("best")), None)


def _role(config: Train, epochs: Sequence[Mapping[str, Any]], epoch: int) -> str:
    """Why this epoch is of interest, in words; nothing where it is one of many."""
    roles = {
        "before a drop of the rate": epoch in drops(config),
        "after a drop of the rate": epoch - 1 in drops(config),
        "best on validation": epoch == _best(epochs),
        "last": epoch == epochs[-1]["epoch"],
    }
    return ", ".join(words for words, holds in roles.items() if holds)


def _measured(moment: Moment) -> dict[str, Any]:
    """One checkpoint, measured or read again."""
    of, plan = moment.source.subject(moment.checkpoint), moment.plan
    gap = robust_gap(of, plan.gap)
    line = landscapes.line(of, landscapes.symmetric(plan.reach, plan.points), plan.directions, plan.slice)
    flat = flatness(of, ("average", "slices", "norms"), plan.how)
    return {
        "checkpoint": moment.checkpoint,
        "epoch": moment.epoch,
        "role": moment.role,
        "train": gap["train"],
        "test": gap["test"],
        "gap": gap["gap"],
        "curves": [curve["robust_loss"] for curve in line["curves"]],
        "measures": flat["measures"],
        "settings": {
            "gap": f"{gap['settings']['attack']}; n = {gap['n']['train']} training and {gap['n']['test']} test images",
            "landscape": {"n": line["n"], "split": line["split"], **line["settings"]},
            "flatness": {"n": flat["n"], "split": flat["split"], **flat["settings"]},
        },
    }


def _in_words(point: Mapping[str, Any]) -> str:
    return (
        f"epoch {point['epoch']}{': ' + point['role'] if point['role'] else ''}, robust train "
        f"{point['train']['robust_accuracy']:.1%}, test {point['test']['robust_accuracy']:.1%}, "
        f"gap {number(point['gap']['loss']):.3f} nats"
    )
