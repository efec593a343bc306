"""The demo: AT and AT-AWP on the bundled digits from the same seeds, evaluated, their landscapes measured, and compared
on one page.

Everything in it is what the other commands do; what is finished is kept, a training that was interrupted goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saltflat.lab import record, trainings
from saltflat.lab.config import Train
from saltflat.lab.console import report, say
from saltflat.lab.evaluations import How, evaluation
from saltflat.lab.landscapes import How as Slice
from saltflat.lab.landscapes import line, symmetric
from saltflat.lab.recipes import RECIPES
from saltflat.lab.study.compare import in_words
from saltflat.lab.study.workers import Engine, side_by_side
from saltflat.lab.subjects import from_run

METHODS = ("at", "at-awp")
ALPHAS = symmetric(1.0, 21)


@dataclass(frozen=True)
class Entry:
    """A run of the demo."""

    folder: Path
    config: Train


def run(out: Path, seeds: int, engine: Engine) -> None:
    """Train, evaluate, measure, and write `out`/report.html."""
    began = time.perf_counter()
    runs = {
        out / f"{method}-seed{seed}": replace(RECIPES[method], seed=seed) for method in METHODS for seed in range(seeds)
    }
    record.check_folder("out", out)
    trainings.check_free(runs)
    entries = {folder.name: Entry(folder, config) for folder, config in runs.items()}
    with engine() as executor, record.alone(out / "demo.lock"):
        side_by_side(_made, entries, executor, out / "logs", in_words)
    path = report(list(runs), out / "report.html")
    say(f"done in {time.perf_counter() - began:.0f} s; open {path} in a browser")


def _made(of: Entry) -> dict[str, Any]:
    """The evaluation of the last checkpoint, after that of the best, and its landscape."""
    trainings.made(of.config, of.folder)
    found = {}
    for checkpoint in ("best", "last"):
        attacks = ("clean", "fgsm", "pgd-20", "cw-20")
        found = evaluation(from_run(of.folder, checkpoint), attacks, "test", 0, How(512))
    line(from_run(of.folder, "last"), ALPHAS, 1, Slice(examples=400, batch_size=400))
    return found
