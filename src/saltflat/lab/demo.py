"""The demo: AT and AT-AWP on the bundled digits from the same seeds, evaluated, their landscapes measured, and compared
on one page.

Everything in it is what the other commands do; what is finished is kept, a training that was interrupted goes on.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from saltflat.lab import trainings
from saltflat.lab.console import report, say
from saltflat.lab.evaluations import How, evaluation
from saltflat.lab.landscapes import How as Slice
from saltflat.lab.landscapes import line, symmetric
from saltflat.lab.recipes import RECIPES
from saltflat.lab.subjects import from_run

METHODS = ("at", "at-awp")
ALPHAS = symmetric(1.0, 21)


def run(out: Path, seeds: int) -> None:
    """Train, evaluate, measure, and write `out`/report.html."""
    began = time.perf_counter()
    runs = {
        out / f"{method}-seed{seed}": replace(RECIPES[method], seed=seed) for method in METHODS for seed in range(seeds)
    }
    trainings.check_free(runs)
    for folder, config in runs.items():
        trainings.made(config, folder)
        for checkpoint in ("best", "last"):
            evaluation(from_run(folder, checkpoint), ("clean", "fgsm", "pgd-20", "cw-20"), "test", 0, How(512))
        line(from_run(folder, "last"), ALPHAS, 1, Slice(examples=400, batch_size=400))
    path = report(list(runs), out / "report.html")
    say(f"done in {time.perf_counter() - began:.0f} s; open {path} in a browser")
