"""Models trained and measured as by a study, without its page: `python -m small_grid FOLDER WORKERS [EXECUTOR]`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from small_study import tasks

from saltflat.lab.study import executors
from saltflat.lab.study.models import Row, Task, in_words, rows
from saltflat.lab.study.table import plain
from saltflat.lab.study.workers import side_by_side

RATES = (0.02, 0.05, 0.1, 0.15)


def grid(folder: Path) -> dict[str, Task]:
    return {task.name: task for task in tasks(folder, RATES)}


def write(found: dict[str, list[Row]], folder: Path) -> None:
    text = json.dumps({name: [plain(asdict(row)) for row in each] for name, each in found.items()})
    (folder / "rows.json").write_text(text)


if __name__ == "__main__":
    to, workers, *executor = sys.argv[1:]
    with executors.named(*(executor or ["local"]), int(workers), "cpu")() as pool:
        write(side_by_side(rows, grid(Path(to)), pool, Path(to) / "logs", in_words), Path(to))
