"""One model of a study, from where it comes from to its row: trained where it has to be, measured, and read again where
it was measured before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from saltflat.lab import record
from saltflat.lab.config import Train
from saltflat.lab.flatness import flatness
from saltflat.lab.gaps import How as GapHow
from saltflat.lab.gaps import robust_gap
from saltflat.lab.measures import How
from saltflat.lab.study import grid
from saltflat.lab.study.table import Measure, Model
from saltflat.lab.subjects import Foreign, Subject, from_file, from_run
from saltflat.lab.threat import Threat
from saltflat.lab.trainings import made

AGAIN = 1000  # added to the seed of what is measured again, for the noise floor
NORM = "weight norm"  # a control, not a measure of flatness


@dataclass(frozen=True)
class Plan:
    """What is measured of every model.

    again: measures that are taken a second time, with other draws.
    """

    measures: Sequence[str]
    how: How
    gap: GapHow
    again: Sequence[str] = ()


class Source(Protocol):
    """Where a model comes from. `subject` may take long, and raises FloatingPointError for a training that failed."""

    def subject(self) -> Subject: ...
    def method(self) -> str: ...
    def axes(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Trained:
    """A run that is trained here, once, and kept."""

    config: Train
    folder: Path
    checkpoint: str

    def subject(self) -> Subject:
        made(self.config, self.folder)
        return from_run(self.folder, self.checkpoint, self.config.device)

    def method(self) -> str:
        return self.config.recipe

    def axes(self) -> Mapping[str, Any]:
        return grid.axes(self.config) | {"checkpoint": self.checkpoint}


@dataclass(frozen=True)
class Existing:
    """A run that is there already."""

    folder: Path
    checkpoint: str
    data_path: Path | None = None

    def subject(self) -> Subject:
        return from_run(self.folder, self.checkpoint, data_path=self.data_path)

    def method(self) -> str:
        return record.read_config(self.folder).recipe

    def axes(self) -> Mapping[str, Any]:
        return grid.axes(record.read_config(self.folder)) | {"checkpoint": self.checkpoint}


@dataclass(frozen=True)
class OfOthers:
    """A checkpoint of others, and what it does not say of itself; what is found goes to the folder."""

    file: Path
    about: Foreign
    threat: Threat
    folder: Path
    said: Mapping[str, Any]

    def subject(self) -> Subject:
        return from_file(self.file, self.about, self.threat, "auto", self.folder)

    def method(self) -> str:
        return str(self.said.get("method", "not on record"))

    def axes(self) -> Mapping[str, Any]:
        return self.said


@dataclass(frozen=True)
class Task:
    """A model to be measured; checkpoints of one run share its `run`."""

    name: str
    run: str
    source: Source
    plan: Plan


@dataclass(frozen=True)
class Row:
    """A model's row, and what its measures are."""

    model: Model
    measures: tuple[Measure, ...] = ()


def row(task: Task) -> Row:
    """Train if need be, then measure: all that is found is in the model's folder, and read from there the next time.

    A training whose loss leaves the numbers is a result, too: its row has a note in place of values.
    """
    try:
        of = task.source.subject()
    except FloatingPointError as error:
        note = f"training failed: {error}"
        return Row(Model(task.name, task.run, task.source.method(), task.source.axes(), {}, {}, {}, note=note))
    plan = task.plan
    gap = robust_gap(of, plan.gap)
    once = _rows(flatness(of, plan.measures, plan.how))
    again = _rows(flatness(of, plan.again, replace(plan.how, seed=plan.how.seed + AGAIN))) if plan.again else {}
    norm = once.pop(NORM, {"value": None})
    model = Model(
        name=task.name,
        cluster=task.run,
        method=task.source.method(),
        axes=task.source.axes(),
        targets={
            "gap_loss": gap["gap"]["loss"],
            "gap_accuracy": 100 * gap["gap"]["accuracy"],
            "test_robust_accuracy": 100 * gap["test"]["robust_accuracy"],
        },
        controls={
            "train_robust_loss": gap["train"]["robust_loss"],
            "train_robust_accuracy": 100 * gap["train"]["robust_accuracy"],
            "weight_norm": norm["value"],
        },
        measures={name: found["value"] for name, found in once.items()},
        errors={name: found["standard_error"] for name, found in once.items()},
        again={name: found["value"] for name, found in again.items() if name in once},
        note=_adequacy(gap),
    )
    return Row(model, tuple(Measure(name, of["unit"], of["settings"], of["sign"]) for name, of in once.items()))


def _rows(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By name, without the layers' own traces, which other architectures do not have."""
    return {each["name"]: each for each in found["measures"] if not each["name"].startswith("Hessian trace of")}


def in_words(of: Row) -> str:
    """For a line while the study runs."""
    targets, controls = of.model.targets, of.model.controls
    if not targets:
        return of.model.note
    return (
        f"robust train {controls['train_robust_accuracy']:.1f} %, test {targets['test_robust_accuracy']:.1f} %, "
        f"gap {targets['gap_loss']:.3f} nats"
    )


def _adequacy(gap: Mapping[str, Any]) -> str:
    """A note where a longer attack finds noticeably more loss: then the gap is that of a weak attack."""
    longer = gap["longer"]
    more = longer["loss"] / longer["loss_of_the_attack"] - 1
    return f"PGD-{longer['steps']} finds {more:.1%} more loss on test" if more > 0.01 else ""
