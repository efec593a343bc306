"""Models trained and measured as by a study, without its page: `python -m small_grid FOLDER WORKERS [EXECUTOR]`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from small_study import tasks

from saltflat.lab.study import executors
from saltflat.lab.study.models import in_words, rows
from saltflat.lab.study.table import plain
from saltflat.lab.study.workers import side_by_side

RATES = (0.02, 0.05, 0.1, 0.15)

if __name__ == "__main__":
    to, workers, *executor = sys.argv[1:]
    with executors.named(*(executor or ["local"]), int(workers), "cpu")() as pool:
        given = {task.name: task for task in tasks(Path(to), RATES)}
        found = side_by_side(rows, given, pool, Path(to) / "logs", in_words)
    text = json.dumps({name: [plain(asdict(row)) for row in each] for name, each in found.items()})
    (Path(to) / "rows.json").write_text(text)
