"""A study of a few models that train in a second: `python -m small_study FOLDER WORKERS`."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from saltflat.lab.gaps import How as GapHow
from saltflat.lab.measures import How
from saltflat.lab.study import gap, grid
from saltflat.lab.study.models import Plan, Task, Trained
from saltflat.lab.study.workers import processes

HOW = How(examples=20, batch_size=10, steps=2, draws=2, climbs=1, restarts=0, directions=1, probes=6)
PLAN = Plan(("average", "norms"), HOW, GapHow(30, 30, 2, 10), again=("average",))
CHECKPOINTS = ("last", "best")


def tasks(folder: Path, rates: Sequence[float]) -> list[Task]:
    base = grid.SMALL.base
    base = replace(
        base,
        data=replace(base.data, examples=60),
        model=replace(base.model, width=4),
        attack=replace(base.attack, steps=2),
        optimizer=replace(base.optimizer, epochs=3),
        recipe="at",
    )
    found = []
    for rate in rates:
        config, name = replace(base, optimizer=replace(base.optimizer, learning_rate=rate)), f"at-{rate:g}"
        found.append(Task(name, Trained(config, folder / "models" / name, CHECKPOINTS), PLAN))
    return found


def asked(folder: Path) -> gap.Asked:
    return gap.Asked("six runs", tasks(folder, [0.02, 0.03, 0.05, 0.08, 0.1, 0.15]), PLAN, 0.0)


if __name__ == "__main__":
    gap.study(asked(Path(sys.argv[1])), Path(sys.argv[1]), partial(processes, int(sys.argv[2])))
