"""The models of one source, from where they come from to their rows: trained where that has to be, measured, and read
again where they were measured before.

A source is a run, or a file of others; each of its checkpoints is a model. It is worked on as a whole by one process,
so that a run is trained once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from saltflat.lab import build, record
from saltflat.lab.checkpoints import check_whole
from saltflat.lab.config import BadInput, Train
from saltflat.lab.flatness import flatness
from saltflat.lab.gaps import How as GapHow
from saltflat.lab.gaps import robust_gap
from saltflat.lab.measures import How
from saltflat.lab.study import grid
from saltflat.lab.study.table import Measure, Model, number
from saltflat.lab.subjects import Foreign, Subject, check_sides, from_file, from_run
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
    """Where models come from.

    check: BadInput for what can be seen before any work, but for its data. reads: a name for its data, and a function
    that reads them and raises BadInput if they cannot be used; sources of one name need be asked once. prepare: may
    take long; FloatingPointError for a training that failed. identity: what makes it this source and no other, as plain
    data.
    """

    @property
    def checkpoints(self) -> Sequence[str]: ...
    def check(self) -> None: ...
    def reads(self) -> tuple[Hashable, Callable[[], object]]: ...
    def prepare(self) -> None: ...
    def subject(self, checkpoint: str) -> Subject: ...
    def method(self) -> str: ...
    def axes(self) -> Mapping[str, Any]: ...
    def identity(self) -> Any: ...


@dataclass(frozen=True)
class Trained:
    """A run that is trained here, once, and kept."""

    config: Train
    folder: Path
    checkpoints: Sequence[str] = ("last",)

    def check(self) -> None:
        pass

    def reads(self) -> tuple[Hashable, Callable[[], object]]:
        return self.config.data, partial(build.sets, self.config)

    def prepare(self) -> None:
        made(self.config, self.folder)

    def subject(self, checkpoint: str) -> Subject:
        return from_run(self.folder, checkpoint, self.config.device)

    def method(self) -> str:
        return self.config.recipe

    def axes(self) -> Mapping[str, Any]:
        return grid.axes(self.config)

    def identity(self) -> Any:
        return grid.axes(self.config)


@dataclass(frozen=True)
class Existing:
    """A run that is there already."""

    folder: Path
    checkpoints: Sequence[str]
    data_path: Path | None = None
    device: str = "auto"

    def check(self) -> None:
        record.read_config(self.folder)
        for checkpoint in self.checkpoints:
            file = self.folder / "checkpoints" / f"{checkpoint}.safetensors"
            if not file.is_file():
                raise BadInput(f"runs: expected a checkpoint {checkpoint!r} in {self.folder}, found none")
            check_whole(file)

    def reads(self) -> tuple[Hashable, Callable[[], object]]:
        config = record.read_config(self.folder)
        data = config.data if self.data_path is None else replace(config.data, path=self.data_path)
        return data, partial(build.sets, replace(config, data=data))

    def prepare(self) -> None:
        pass

    def subject(self, checkpoint: str) -> Subject:
        return from_run(self.folder, checkpoint, self.device, data_path=self.data_path)

    def method(self) -> str:
        return record.read_config(self.folder).recipe

    def axes(self) -> Mapping[str, Any]:
        return grid.axes(record.read_config(self.folder))

    def identity(self) -> Any:
        return str(self.folder.absolute())


@dataclass(frozen=True)
class OfOthers:
    """A checkpoint of others, and what it does not say of itself; what is found goes to the folder."""

    file: Path
    about: Foreign
    threat: Threat
    folder: Path
    said: Mapping[str, Any]
    device: str = "auto"
    checkpoints: Sequence[str] = ("",)

    def check(self) -> None:
        if not self.file.is_file():
            raise BadInput(f"file: expected a checkpoint, got {str(self.file)!r}")
        self.subject("")

    def reads(self) -> tuple[Hashable, Callable[[], object]]:
        return (self.about.data, self.about.data_path), partial(check_sides, self.about)

    def prepare(self) -> None:
        pass

    def subject(self, checkpoint: str) -> Subject:
        return from_file(self.file, self.about, self.threat, self.device, self.folder)

    def method(self) -> str:
        return str(self.said.get("method", "not on record"))

    def axes(self) -> Mapping[str, Any]:
        return self.said

    def identity(self) -> Any:
        path = self.about.data_path
        about = {**asdict(self.about), "data_path": None if path is None else str(path.absolute())}
        return [str(self.file.absolute()), about, asdict(self.threat)]


@dataclass(frozen=True)
class Task:
    """A source to be measured. name: of its models, with the checkpoint behind it where there are several. cluster:
    models of one cluster are not independent; by default those of one source.
    """

    name: str
    source: Source
    plan: Plan
    cluster: str = ""

    @property
    def models(self) -> dict[str, str]:
        """The names of its models by their checkpoints."""
        several = len(self.source.checkpoints) > 1
        return {each: f"{self.name}-{each}" if several else self.name for each in self.source.checkpoints}


@dataclass(frozen=True)
class Row:
    """A model's row, and what its measures are."""

    model: Model
    measures: tuple[Measure, ...] = ()


def rows(task: Task) -> list[Row]:
    """Train if need be, then measure: all that is found is in the source's folder, and read from there the next time.

    A training whose loss leaves the numbers is a result, too: its rows have a note in place of values.
    """
    try:
        task.source.prepare()
    except FloatingPointError as error:
        note = f"training failed: {error}"
        return [Row(_empty(task, checkpoint, note)) for checkpoint in task.source.checkpoints]
    return [_row(task, checkpoint) for checkpoint in task.source.checkpoints]


def _row(task: Task, checkpoint: str) -> Row:
    of, plan = task.source.subject(checkpoint), task.plan
    gap = robust_gap(of, plan.gap)
    once = _by_name(flatness(of, plan.measures, plan.how))
    again = _by_name(flatness(of, plan.again, replace(plan.how, seed=plan.how.seed + AGAIN))) if plan.again else {}
    norm = once.pop(NORM, {"value": None})
    model = replace(
        _empty(task, checkpoint, _adequacy(gap)),
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
    )
    return Row(model, tuple(Measure(name, of["unit"], of["settings"], of["sign"]) for name, of in once.items()))


def _empty(task: Task, checkpoint: str, note: str) -> Model:
    several = len(task.source.checkpoints) > 1
    axes = dict(task.source.axes()) | ({"checkpoint": checkpoint} if several else {})
    cluster = task.cluster or task.name
    return Model(task.models[checkpoint], cluster, task.source.method(), axes, {}, {}, {}, note=note)


def _by_name(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Without the layers' own traces, which other architectures do not have."""
    return {each["name"]: each for each in found["measures"] if not each["name"].startswith("Hessian trace of")}


def in_words(found: Sequence[Row]) -> str:
    """For a line while the study runs."""
    return "; ".join(_in_words(row.model) for row in found)


def _in_words(of: Model) -> str:
    if not of.targets:
        return of.note
    return (
        f"robust train {of.controls['train_robust_accuracy']:.1f} %, test {of.targets['test_robust_accuracy']:.1f} %, "
        f"gap {number(of.targets['gap_loss']):.3f} nats"
    )


def _adequacy(gap: Mapping[str, Any]) -> str:
    """A note where a longer attack finds noticeably more loss: then the gap is that of a weak attack."""
    longer, short = gap["longer"]["loss"], gap["longer"]["loss_of_the_attack"]
    if longer is None or not short or longer <= 1.01 * short:
        return ""
    return f"PGD-{gap['longer']['steps']} finds {longer / short - 1:.1%} more loss on test"
