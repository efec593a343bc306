"""`saltflat study gap`: does the robust generalisation gap go with how flat the loss is? From a grid of recipes trained
here, from runs that are there already, or from checkpoints of others, to the answer.

    OUT/study.json           what was asked; another question needs another folder
    OUT/models/NAME/         the run folders of models trained here, or what was found of others
    OUT/logs/NAME.log        what the workers printed
    OUT/table.json           a row per model
    OUT/gap.html .csv findings.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from saltflat.lab import record
from saltflat.lab.config import BadInput, checked
from saltflat.lab.console import say
from saltflat.lab.gaps import How as GapHow
from saltflat.lab.measures import How
from saltflat.lab.study import grid, listing, page
from saltflat.lab.study.models import Existing, Plan, Row, Task, Trained, in_words, rows
from saltflat.lab.study.table import Measure, Model, Table, plain, write_table
from saltflat.lab.study.words import headline
from saltflat.lab.study.workers import Engine, side_by_side
from saltflat.lab.trainings import check_free

# Sizes for digits: a measure takes a second or so.
SMALL = Plan(
    measures=(
        "average",
        "average-frozen",
        "adaptive-average",
        "worst",
        "adaptive",
        "keskar",
        "tolerance",
        "slices",
        "curvature",
        "gradients",
        "norms",
    ),
    how=How(examples=256, draws=8, climbs=8, restarts=1, directions=3, probes=36),
    gap=GapHow(steps=20),
    again=("average", "adaptive-average", "worst", "tolerance", "slices", "curvature"),
)
PAPER = replace(SMALL, how=How(examples=1000, steps=20, draws=10, climbs=20, restarts=3, directions=10, probes=100))
PLANS = {"small": SMALL, "paper": PAPER}
FLOOR = 0.0  # of models that were not trained here: nothing is known that would say what is undertrained


@dataclass(frozen=True)
class Asked:
    """A study: where its models come from, and below what training robust accuracy, in percent, one is undertrained."""

    title: str
    tasks: Sequence[Task]
    plan: Plan
    floor: float

    @property
    def models(self) -> list[str]:
        """Their names."""
        return [name for task in self.tasks for name in task.models.values()]


def of_preset(preset: str, recipes: Iterable[str], out: Path, data_path: Path | None, device: str | None) -> Asked:
    """A grid, all of which is trained here."""
    wanted, plan = grid.PRESETS[preset], PLANS[preset]
    configs = {name: checked(each) for name, each in grid.trainings(wanted, recipes, data_path, device).items()}
    folders = {name: out / "models" / name for name in configs}
    check_free({folders[name]: config for name, config in configs.items()})
    tasks = [Task(name, Trained(each, folders[name], wanted.checkpoints), plan) for name, each in configs.items()]
    return Asked(f"Flatness and the robust gap, {preset} grid", tasks, plan, wanted.floor)


def of_runs(runs: Sequence[Path], checkpoints: Sequence[str], data_path: Path | None, device: str | None) -> Asked:
    """Runs that are there; each of their checkpoints is a model."""
    if repeated := [name for i, name in enumerate(checkpoints) if name in checkpoints[:i]]:
        raise BadInput(f"checkpoints: expected each once, got {repeated[0]!r} again")
    tasks = [Task(run.absolute().name, Existing(run, checkpoints, data_path, device or "auto"), SMALL) for run in runs]
    return Asked("Flatness and the robust gap, existing runs", tasks, SMALL, FLOOR)


def of_files(path: Path, out: Path, device: str | None) -> Asked:
    """Checkpoints of others, listed in a file."""
    tasks = listing.read(path, SMALL, out, device or "auto")
    return Asked("Flatness and the robust gap, checkpoints of others", tasks, SMALL, FLOOR)


def study(asked: Asked, out: Path, engine: Engine) -> None:
    """Train, measure, and write the page; what is there already is read."""
    _check(asked, out)
    with engine() as executor, record.alone(out / "study.lock"):
        _claim(asked, out)
        began = time.perf_counter()
        found = side_by_side(rows, {task.name: task for task in asked.tasks}, executor, out / "logs", in_words)
        table = tabled(asked, [row for each in found.values() for row in each])
        write_table(table, out / "table.json")
        for sentence in headline(page.write(table, out)):
            say(f"{sentence.claim} {sentence.evidence}".strip())
        say(f"{len(table.models)} models in {time.perf_counter() - began:.0f} s; {out / 'gap.html'}")


def _check(asked: Asked, out: Path) -> None:
    """All that can be seen to be wrong without training or measuring is found here, before anything is written."""
    record.check_folder("out", out)
    if len(asked.models) < 2:
        raise BadInput(f"runs: expected at least two models, got {len(asked.models)}")
    names = [task.name for task in asked.tasks]
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise BadInput(f"runs: expected different names, got {repeated[0]!r} twice")
    for task in asked.tasks:
        task.source.check()
    for read in dict(task.source.reads() for task in asked.tasks).values():
        read()


def _claim(asked: Asked, out: Path) -> None:
    """The folder is this study's: written down at its first call, and compared at every other."""
    path = out / "study.json"
    if not path.is_file():
        record.write_json(path, _question(asked))
    elif record.read_again(path) != _question(asked):
        raise BadInput(f"out: {out} holds another study; choose another folder")


def _question(asked: Asked) -> dict[str, Any]:
    """What makes it this study, as JSON gives it back: its models and what is measured of them."""
    sources = {task.name: [task.source.identity(), list(task.source.checkpoints), task.cluster] for task in asked.tasks}
    question: dict[str, Any] = json.loads(json.dumps({"models": plain(sources), "plan": plain(asdict(asked.plan))}))
    return question


def tabled(asked: Asked, found: Sequence[Row]) -> Table:
    """All rows as one table. Axes in which no two models differ say nothing, and are left out."""
    measures: dict[str, Measure] = {}
    for each in found:
        for measure in each.measures:
            if measures.setdefault(measure.name, measure) != measure:
                measures[measure.name] = replace(measure, settings="differ between models")
    gap, how = asked.plan.gap, asked.plan.how
    return Table(
        title=asked.title,
        measures=tuple(measures.values()),
        models=tuple(_varying([each.model for each in found])),
        floor=asked.floor,
        settings={
            "gap": f"PGD-{gap.steps}, at w, in eval mode, without augmentation, on at most {gap.train_examples} "
            f"training and {gap.test_examples} test examples",
            "flatness": f"PGD-{how.steps}, at w, in eval mode, on at most {how.examples} training examples",
        },
    )


def _varying(models: Sequence[Model]) -> list[Model]:
    names = {name for model in models for name in model.axes}
    kept = {name for name in names if len({repr(model.axes.get(name, ...)) for model in models}) > 1 or name == "seed"}
    return [replace(model, axes={n: _text(v) for n, v in model.axes.items() if n in kept}) for model in models]


def _text(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
