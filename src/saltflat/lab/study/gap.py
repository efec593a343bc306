"""`saltflat study gap`: does the robust generalisation gap go with how flat the loss is? From a grid of recipes trained
here, from runs that are there already, or from checkpoints of others, to the answer.

    OUT/study.json           what was asked; another question needs another folder
    OUT/models/NAME/         the run folders of models trained here, or what was found of others
    OUT/logs/NAME.log        what the workers printed
    OUT/table.json           a row per model
    OUT/gap.html .csv findings.json
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from saltflat.lab import record
from saltflat.lab.config import BadInput, checked, number
from saltflat.lab.console import say
from saltflat.lab.gaps import How as GapHow
from saltflat.lab.measures import How
from saltflat.lab.study import grid, page
from saltflat.lab.study.grid import Grid
from saltflat.lab.study.models import Existing, OfOthers, Plan, Row, Task, Trained, in_words, row
from saltflat.lab.study.table import Measure, Model, Table, plain, write_table
from saltflat.lab.study.words import headline
from saltflat.lab.study.workers import side_by_side
from saltflat.lab.subjects import STEP, Foreign
from saltflat.lab.threat import Threat
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
    """A study: its models, and how they are measured."""

    title: str
    tasks: Mapping[str, Task]
    plan: Plan
    floor: float


def of_preset(preset: str, recipes: Iterable[str], out: Path, data_path: Path | None) -> Asked:
    """A grid, all of which is trained here."""
    wanted: Grid = grid.PRESETS[preset]
    configs = {name: checked(each) for name, each in grid.trainings(wanted, recipes, data_path).items()}
    folders = {name: out / "models" / name for name in configs}
    check_free({folders[name]: config for name, config in configs.items()})
    plan = PLANS[preset]
    tasks = {}
    for name, config in configs.items():
        for checkpoint in wanted.checkpoints:
            label = name if len(wanted.checkpoints) == 1 else f"{name}-{checkpoint}"
            tasks[label] = Task(label, name, Trained(config, folders[name], checkpoint), plan)
    return Asked(f"Flatness and the robust gap, {preset} grid", tasks, plan, wanted.floor)


def of_runs(runs: Sequence[Path], checkpoints: Sequence[str], plan: Plan, data_path: Path | None) -> Asked:
    """Runs that are there; each of their checkpoints is a model."""
    tasks: dict[str, Task] = {}
    for run in runs:
        record.read_config(run)
        for checkpoint in checkpoints:
            if not (run / "checkpoints" / f"{checkpoint}.safetensors").is_file():
                raise BadInput(f"runs: expected a checkpoint {checkpoint!r} in {run}, found none")
            name = run.name if len(checkpoints) == 1 else f"{run.name}-{checkpoint}"
            if name in tasks:
                raise BadInput(f"runs: expected folders of different names, got {run.name!r} twice")
            tasks[name] = Task(name, run.name, Existing(run, checkpoint, data_path), plan)
    return Asked("Flatness and the robust gap, existing runs", tasks, plan, FLOOR)


NEEDED = {"name", "file", "network", "data", "eps"}
FIELDS = NEEDED | {"data_path", "mean", "std", "key", "norm", "step_size", "cluster", "axes"}


def of_files(listing: Path, plan: Plan, out: Path) -> Asked:
    """Checkpoints of others, listed in a YAML file: for each, name, file, network, data, data_path, eps, and perhaps
    mean, std, key, norm, step_size, cluster, axes.
    """
    try:
        entries = yaml.safe_load(listing.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"listing: cannot read {listing}: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BadInput(f"listing: expected a list of models with named fields in {listing}")
    tasks: dict[str, Task] = {}
    for place, entry in enumerate(entries, start=1):
        task = _listed(entry, f"listing: model {place} of {listing}", plan, out)
        if task.name in tasks:
            raise BadInput(f"listing: expected names that differ, got {task.name!r} twice")
        tasks[task.name] = task
    return Asked("Flatness and the robust gap, checkpoints of others", tasks, plan, FLOOR)


def _listed(entry: Mapping[str, Any], where: str, plan: Plan, out: Path) -> Task:
    if strange := sorted(entry.keys() - FIELDS):
        raise BadInput(f"{where}: expected fields of {', '.join(sorted(FIELDS))}, got {strange[0]!r}")
    if missing := sorted(NEEDED - entry.keys()):
        raise BadInput(f"{where}: expected a {missing[0]}, got none")
    try:
        eps = number(entry["eps"])
        threat = Threat(entry.get("norm", "Linf"), eps, number(entry.get("step_size", STEP * eps)))
        mean, std = (tuple(number(value) for value in entry.get(name) or ()) for name in ("mean", "std"))
        axes = dict(entry.get("axes") or {})
    except (ValueError, TypeError) as error:
        raise BadInput(f"{where}: {error}") from None
    if threat.norm not in ("Linf", "L2"):
        raise BadInput(f"{where}: norm: expected Linf or L2, got {threat.norm!r}")
    file = Path(str(entry["file"]))
    if not file.is_file():
        raise BadInput(f"{where}: file: expected a checkpoint, got {str(file)!r}")
    data_path = Path(str(entry["data_path"])) if "data_path" in entry else None
    about = Foreign(str(entry["network"]), str(entry["data"]), data_path, mean, std, entry.get("key"))
    name = str(entry["name"])
    folder = out / "models" / name
    if folder.name != name:
        raise BadInput(f"{where}: name: expected a name without slashes, got {name!r}")
    return Task(name, str(entry.get("cluster", name)), OfOthers(file, about, threat, folder, axes), plan)


def with_floor(asked: Asked, floor: float) -> Asked:
    """The same with another floor of training robust accuracy, in percent."""
    return replace(asked, floor=floor)


def study(asked: Asked, out: Path, workers: int) -> None:
    """Train, measure, and write the page; what is there already is read."""
    if len(asked.tasks) < 2:
        raise BadInput(f"runs: expected at least two models, got {len(asked.tasks)}")
    _claim(out, asked)
    began = time.perf_counter()
    rows = side_by_side(row, asked.tasks, workers, out / "logs", in_words)
    table = tabled(asked, list(rows.values()))
    write_table(table, out / "table.json")
    found = page.write(table, out)
    for sentence in headline(found):
        say(f"{sentence.claim} {sentence.evidence}".strip())
    say(f"{len(rows)} models in {time.perf_counter() - began:.0f} s; {out / 'gap.html'}")


def _claim(out: Path, asked: Asked) -> None:
    """The folder is this study's: written down at its first call, and compared at every other."""
    question = {
        "title": asked.title,
        "models": list(asked.tasks),
        "plan": plain(asdict(asked.plan)),
        "floor": asked.floor,
    }
    path = out / "study.json"
    if path.is_file():
        if record.read_again(path) != question:
            raise BadInput(f"out: {out} holds another study; choose another folder")
        return
    if out.exists() and not out.is_dir():
        raise BadInput(f"out: expected a folder, got the file {str(out)!r}")
    record.write_json(path, question)


def tabled(asked: Asked, rows: Sequence[Row]) -> Table:
    """All rows as one table. Axes in which no two models differ say nothing, and are left out."""
    measures: dict[str, Measure] = {}
    for each in rows:
        for measure in each.measures:
            if measures.setdefault(measure.name, measure) != measure:
                measures[measure.name] = replace(measure, settings="differ between models")
    how = asked.plan.how
    return Table(
        title=asked.title,
        measures=tuple(measures.values()),
        models=tuple(_varying([each.model for each in rows])),
        floor=asked.floor,
        settings={
            "gap": f"PGD-{asked.plan.gap.steps}, at w, in eval mode, without augmentation, on up to "
            f"{asked.plan.gap.train_examples} training and {asked.plan.gap.test_examples} test examples",
            "flatness": f"PGD-{how.steps}, at w, in eval mode, on {how.examples} training examples",
        },
    )


def _varying(models: Sequence[Model]) -> list[Model]:
    values: dict[str, set[str]] = {}
    for model in models:
        for name, value in model.axes.items():
            values.setdefault(name, set()).add(repr(value))
    kept = {name for name, found in values.items() if len(found) > 1 or name == "seed"}
    return [replace(model, axes={n: _text(v) for n, v in model.axes.items() if n in kept}) for model in models]


def _text(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
