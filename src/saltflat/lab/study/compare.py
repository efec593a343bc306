"""The study behind `saltflat study compare`: some recipes, the same seeds for each, evaluated and on one page, whose
differences are paired over seeds. It asks whether one recipe is better than another under the same changes to both:
AWP or none on generated images, say.

Everything in it is what the other commands do; what is finished is kept, a training that was interrupted goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from saltflat.lab import record, trainings
from saltflat.lab.config import BadInput, Train, checked, read_yaml
from saltflat.lab.console import report, say
from saltflat.lab.evaluations import How, evaluation
from saltflat.lab.recipes import RECIPES
from saltflat.lab.study.workers import Engine, side_by_side
from saltflat.lab.subjects import from_run
from saltflat.lab.threat import columns, trained_against

CHECKPOINTS = ("best", "last")
PATHS = ("path", "initial")  # fields whose values are not to be taken for numbers


@dataclass(frozen=True)
class Entry:
    """A run, and what it is attacked with."""

    folder: Path
    config: Train
    attacks: tuple[str, ...]
    examples: int


def study(runs: Mapping[Path, Train], attacks: Sequence[str], examples: int, out: Path, engine: Engine) -> None:
    """Train, evaluate, and write `out`/report.html."""
    began = time.perf_counter()
    record.check_folder("out", out)
    trainings.check_free(runs)
    for folder, config in runs.items():  # BadInput before anything is trained
        columns(attacks, trained_against(config.attack))
        there = len(trainings.check(config).sets.test) if not folder.exists() else examples
        if examples > there:
            raise BadInput(f"examples: expected at most the {there} test examples, got {examples}")
    entries = {folder.name: Entry(folder, config, tuple(attacks), examples) for folder, config in runs.items()}
    with engine() as executor, record.alone(out / "study.lock"):
        side_by_side(_made, entries, executor, out / "logs", in_words)
    path = report(list(runs), out / "report.html")
    say(f"done in {time.perf_counter() - began:.0f} s; open {path} in a browser")


def _made(of: Entry) -> dict[str, Any]:
    """The evaluation of the last checkpoint, after that of the best."""
    trainings.made(of.config, of.folder)
    found = {}
    for checkpoint in CHECKPOINTS:
        found = evaluation(from_run(of.folder, checkpoint), of.attacks, "test", of.examples, How())
    return found


def in_words(found: dict[str, Any]) -> str:
    """For a line while the study runs."""
    attacked = ", ".join(f"{row['name']} {row['accuracy']:.2%}" for row in found["attacks"])
    return f"{found['checkpoint']} checkpoint, {found['split']}: {attacked}"


def configs(recipes: Sequence[str], changes: Sequence[str], seeds: int, out: Path) -> dict[Path, Train]:
    """The run folders and their configs: every recipe with every change and every seed.

    >>> list(configs(["at", "at-awp"], ["attack.eps=8/255"], 1, Path("runs")))
    [PosixPath('runs/at-seed0'), PosixPath('runs/at-awp-seed0')]
    """
    for i, name in enumerate(recipes):
        if name not in RECIPES:
            raise BadInput(f"recipes: expected names that `saltflat recipes` lists, got {name!r}")
        if name in recipes[:i]:
            raise BadInput(f"recipes: expected each once, got {name!r} again")
    return {
        out / f"{name}-seed{seed}": changed(replace(RECIPES[name], seed=seed), changes)
        for name in recipes
        for seed in range(seeds)
    }


def changed(config: Train, changes: Sequence[str]) -> Train:
    """The config with `section.field=value` in place of what it had; BadInput for fields and values that do not exist.

    >>> changed(RECIPES["at"], ["optimizer.epochs=2"]).optimizer.epochs
    2
    """
    tree = asdict(config)
    seen: set[str] = set()
    for change in changes:
        name, equals, text = change.partition("=")
        name = name.replace("-", "_")  # as on the command line
        if not equals:
            raise BadInput(f"set: expected FIELD=VALUE, such as optimizer.epochs=2, got {change!r}")
        if name in seen:
            raise BadInput(f"set: expected each field once, got {name} again")
        seen.add(name)
        *sections, leaf = name.split(".")
        inner: Any = tree
        for section in sections:
            inner = inner.get(section) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or leaf not in inner or leaf in ("recipe", "seed"):
            raise BadInput(f"set: expected the name of a recipe's field, such as optimizer.epochs, got {name!r}")
        inner[leaf] = text if leaf in PATHS else read_yaml(text, f"set: expected a value for {name}")
    return checked(tree)
