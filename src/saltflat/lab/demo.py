"""The demo: AT and AT-AWP on the bundled digits from the same seeds, evaluated, their landscapes measured, and
compared on one page.

Everything in it is what the other commands do; a run that is finished is kept, one that was interrupted goes on.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from saltflat.lab import jobs
from saltflat.lab.recipes import RECIPES

METHODS = ("at", "at-awp")
ALPHAS = [i / 10 for i in range(-10, 11)]


def run(out: Path, seeds: int) -> None:
    """Train, evaluate, measure, and write `out`/report.html."""
    began = time.perf_counter()
    runs = [
        (replace(RECIPES[method], seed=seed), out / f"{method}-seed{seed}")
        for method in METHODS
        for seed in range(seeds)
    ]
    for config, folder in runs:
        jobs.resume(folder) if (folder / "config.yaml").exists() else jobs.train(config, folder)
        for checkpoint in ("best", "last"):
            jobs.evaluate(jobs.opened(folder, checkpoint), ("clean", "fgsm", "pgd-20", "cw-20"), "test", 0, 256, 0)
        jobs.landscape(jobs.opened(folder, "last"), ALPHAS, 1, "test", 400, 10, 400, 0)
    path = jobs.report([folder for _, folder in runs], out / "report.html")
    jobs.CONSOLE.print(f"done in {time.perf_counter() - began:.0f} s; open {path} in a browser", soft_wrap=True)
