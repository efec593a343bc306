"""What was asked of flatness, and the answers of every run: only what was measured alike is shown side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saltflat.lab.report.runs import Measure
from saltflat.lab.report.statistics import Group

Answers = Mapping[Group, Mapping[int, Measure]]  # by the run's seed


@dataclass(frozen=True)
class Question:
    """What must be equal for two numbers to stand in one row, or two curves in one figure."""

    name: str
    unit: str
    words: str
    checkpoint: str
    split: str
    n: int
    settings: tuple[tuple[str, str], ...]


def answers(groups: Sequence[Group]) -> dict[Question, Answers]:
    """Every question, in the order in which it is first met, over the finished runs of every group; of two answers of a
    run to one question the first counts.
    """
    found: dict[Question, dict[Group, dict[int, Measure]]] = {}
    for group in groups:
        for run in group.finished:
            for record in run.flatness:
                place = (record.checkpoint, record.split, record.n, tuple(sorted(record.settings.items())))
                for one in record.measures:
                    question = Question(one.name, one.unit, one.settings, *place)
                    found.setdefault(question, {}).setdefault(group, {}).setdefault(run.seed, one)
    return dict(found)
