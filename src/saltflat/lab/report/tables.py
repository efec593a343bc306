"""Tables of numbers: one body of rows per group, and every mean with its spread."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from saltflat.lab.report.drawing import shortened
from saltflat.lab.report.evaluated import (
    Attack,
    BySeed,
    Place,
    accuracies,
    attacks_of,
    evaluated,
    images_in_words,
    settings_of,
    under,
)
from saltflat.lab.report.notation import MISSING, decimal
from saltflat.lab.report.runs import Epoch, Run
from saltflat.lab.report.statistics import Group, Spread, at, best, drop, last, measured, over_seeds
from saltflat.lab.report.words import machine_caption, measurement_caption


@dataclass(frozen=True)
class Cell:
    """A mean and its spread as text; `detail`, on hover, has the value of each seed."""

    mean: str
    spread: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Column:
    """A heading; `term` is a key of the page's definitions, `title` says more of this column: both are shown where the
    heading, or a number below it, is pointed at or has the focus. A group's has its `series`.
    """

    text: str
    unit: str = ""
    term: str = ""
    title: str = ""
    series: int | None = None


@dataclass(frozen=True)
class Row:
    """Cells under the columns, after a label that says which row of its group it is."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Body:
    """The rows of one group, or of another thing that has no `series`; `detail` stands below its name."""

    name: str
    series: int | None
    rows: tuple[Row, ...]
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """What the page shows as one table; `corner` heads its bodies, `row_labels` the labels of rows that have any."""

    label: str
    caption: str
    columns: tuple[Column, ...]
    bodies: tuple[Body, ...]
    row_labels: Column | None = None
    corner: str = "recipe"


MEASURES: tuple[tuple[Column, Callable[[Epoch], float], int], ...] = (  # heading, value, decimal places
    (Column("epoch", "", "epoch"), lambda epoch: epoch.number, 0),
    (Column("clean", "test, %", "clean"), lambda epoch: epoch.clean, 2),
    (Column("robust", "test, %", "robust"), lambda epoch: epoch.robust, 2),
    (Column("robust", "training subset, %", "train"), lambda epoch: epoch.robust_train, 2),
    (Column("gap", "points", "gap"), lambda epoch: epoch.gap, 2),
    (Column("gap in loss", "nats", "loss-gap"), lambda epoch: epoch.loss_gap, 3),
)
MEASURED = tuple(column for column, _, _ in MEASURES)
SEEDS = Column("n", "seeds", "seeds")
WEIGHTS = Column("weights", "", "checkpoint")
DROP = Column("drop", "best to last, points", "drop")
CHECKPOINTS: tuple[tuple[str, Callable[[Run], Epoch | None]], ...] = (("best", best), ("last", last))


def accuracy_table(groups: Sequence[Group]) -> Table:
    """Best and last checkpoint of every group, over its finished runs."""

    def row(runs: Sequence[Run], checkpoint: str, pick: Callable[[Run], Epoch | None]) -> Row:
        spreads = [(over_seeds(runs, at(pick, quantity)), places) for _, quantity, places in MEASURES]
        dropped = _cell(over_seeds(runs, drop)) if checkpoint == "last" else Cell("")
        n_robust = spreads[2][0].n
        return Row(checkpoint, (Cell(str(n_robust)), *(_cell(*spread) for spread in spreads), dropped))

    return Table(
        label="Accuracies at the best and the last epoch",
        caption=f"Mean ± sample standard deviation over seeds. {measurement_caption(groups)}",
        columns=(SEEDS, *MEASURED, DROP),
        bodies=_bodies(measured(groups), lambda group: [row(group.finished, *each) for each in CHECKPOINTS]),
        row_labels=WEIGHTS,
    )


def seeds_table(groups: Sequence[Group]) -> Table:
    """The last epoch of every run by itself, so that nothing hides behind a mean."""

    def row(run: Run) -> Row:
        values = [decimal(at(last, quantity)(run), places) for _, quantity, places in MEASURES]
        ends = [decimal(at(best, lambda epoch: epoch.robust)(run)), decimal(drop(run))]
        return Row(str(run.seed), tuple(map(Cell, values + ends)))

    return Table(
        label="The last epoch of every run",
        caption="The last epoch that each run recorded, unfinished runs included.",
        columns=(*MEASURED, Column("robust at best", "test, %", "checkpoint"), DROP),
        bodies=_bodies(groups, lambda group: [row(run) for run in group.runs if run.epochs]),
        row_labels=Column("seed", "", "seed"),
    )


def outcome_table(groups: Sequence[Group]) -> Table:
    """Final evaluations: one row per group and checkpoint, one column per attack and its exact description."""
    attacks = attacks_of(groups)

    def rows(group: Group) -> list[Row]:
        return [row(place, by_seed) for place, by_seed in evaluated(group).items()]

    def row(place: Place, by_seed: BySeed) -> Row:
        cells = [_outcome_cell(attack, by_seed) for attack in attacks]
        return Row(place[0], (Cell(str(len(by_seed))), Cell(images_in_words(place)), *cells))

    return Table(
        label="Final evaluation",
        caption="Accuracy in percent, mean ± sample standard deviation over seeds; where one run stands alone, "
        "its 95 % interval in brackets. " + " ".join(f"Settings: {text}." for text in settings_of(groups)),
        columns=(
            SEEDS,
            Column("images", "", "images"),
            *(Column(name, "%", "clean" if name == "clean" else "robust", text) for name, text in attacks),
        ),
        bodies=_bodies(groups, rows),
        row_labels=WEIGHTS,
    )


def cost_table(groups: Sequence[Group]) -> Table:
    """Seconds per epoch and minutes per run, over finished runs; `relative` is to the first group."""
    timed = measured(groups)

    def row(group: Group) -> Row:
        training, reference = (over_seeds(one.finished, _training_seconds) for one in (group, timed[0]))
        relative = training.mean / reference.mean if reference.mean > 0 else math.nan
        times = Cell(decimal(relative) + ("×" if math.isfinite(relative) else ""))
        evaluation, total = (_cell(over_seeds(group.finished, cost)) for cost in (_evaluation_seconds, _total_minutes))
        return Row("", (Cell(str(training.n)), Cell(str(group.last_epoch)), _cell(training), times, evaluation, total))

    return Table(
        label="Cost",
        caption=f"Mean ± sample standard deviation over seeds. {machine_caption(groups)}",
        columns=(
            SEEDS,
            Column("epochs", "", "epochs"),
            Column("training", "s per epoch", "seconds"),
            Column("relative", f"to {shortened(timed[0].name, 24)}" if timed else "", "relative"),
            Column("evaluation", "s per epoch", "seconds"),
            Column("total", "min per run", "total"),
        ),
        bodies=_bodies(timed, lambda group: [row(group)]),
    )


def _training_seconds(run: Run) -> float:
    return float(np.mean([epoch.seconds for epoch in run.epochs]))


def _evaluation_seconds(run: Run) -> float:
    return float(np.mean([epoch.evaluation_seconds for epoch in run.epochs]))


def _total_minutes(run: Run) -> float:
    return sum(epoch.seconds + epoch.evaluation_seconds for epoch in run.epochs) / 60


def _bodies(groups: Sequence[Group], rows_of: Callable[[Group], Sequence[Row]]) -> tuple[Body, ...]:
    bodies = (Body(group.name, group.series, tuple(rows_of(group))) for group in groups)
    return tuple(body for body in bodies if body.rows)


def _cell(spread: Spread, places: int = 2) -> Cell:
    if not spread.n:
        return Cell(MISSING)
    detail = ", ".join(f"seed {seed}: {decimal(value, places)}" for seed, value in spread.by_seed.items())
    spreads = spread.n > 1 and (places > 0 or spread.deviation > 0)  # epochs are counts: 30 ± 0 says no more than 30
    return Cell(decimal(spread.mean, places), f"± {decimal(spread.deviation, places)}" if spreads else "", detail)


def _outcome_cell(attack: Attack, by_seed: BySeed) -> Cell:
    shown = _cell(accuracies(attack, by_seed))
    intervals = [one.interval for one in under(attack, by_seed).values()]
    if 0 < len(intervals) < len(by_seed):
        return Cell(shown.mean, f"{shown.spread} (n = {len(intervals)})".strip(), shown.detail)
    if len(intervals) == 1 and intervals[0]:
        return Cell(shown.mean, "[" + ", ".join(decimal(100 * end) for end in intervals[0]) + "]", shown.detail)
    return shown
