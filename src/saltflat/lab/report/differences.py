"""Tables of differences between groups of runs, seed by seed: every group minus the first.

    d_s = value of the group at seed s − value of the first group at seed s
    mean ± t(n − 1) · standard deviation of d / √n,  over the n seeds that both have

Runs with one seed begin alike and see the same batches, so that their difference varies less than they do.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from saltflat.lab.report.evaluated import accuracies, attacks_of, evaluated, images_in_words
from saltflat.lab.report.notation import MISSING, decimal
from saltflat.lab.report.runs import Epoch, Run
from saltflat.lab.report.statistics import Group, Spread, at, drop, measured, over_seeds, paired
from saltflat.lab.report.tables import CHECKPOINTS, DROP, MEASURES, WEIGHTS, Body, Cell, Column, Row, Table

PAIRS = Column("n", "common seeds", "seeds")
COMPARED = MEASURES[1:]  # an epoch's number is no result


def difference_tables(groups: Sequence[Group]) -> list[Table]:
    """At the best and the last epoch, and under the attacks of the final evaluations; those that have a row."""
    tables = [table for table in (_of_epochs(measured(groups)), _of_outcomes(groups)) if table.bodies]
    return [*tables[:1], *(replace(table, caption="Of the final evaluation, as above.") for table in tables[1:])]


def _of_epochs(groups: Sequence[Group]) -> Table:
    def row(first: Group, second: Group, checkpoint: str, pick: Callable[[Run], Epoch | None]) -> Row:
        def difference(quantity: Callable[[Run], float | None]) -> Spread:
            return paired(over_seeds(first.finished, quantity), over_seeds(second.finished, quantity))

        spreads = [(difference(at(pick, quantity)), places) for _, quantity, places in COMPARED]
        dropped = _cell(difference(drop)) if checkpoint == "last" else Cell("")
        return Row(checkpoint, (Cell(str(spreads[1][0].n)), *(_cell(*spread) for spread in spreads), dropped))

    return Table(
        label="Paired differences at the best and the last epoch",
        caption=_caption(groups),
        columns=(PAIRS, *(_as_difference(column) for column, _, _ in COMPARED), _as_difference(DROP)),
        bodies=_bodies(groups, lambda first, second: [row(first, second, *each) for each in CHECKPOINTS]),
        row_labels=WEIGHTS,
        corner="difference",
    )


def _of_outcomes(groups: Sequence[Group]) -> Table:
    attacks = attacks_of(groups)

    def rows(first: Group, second: Group) -> list[Row]:
        before, after = evaluated(first), evaluated(second)
        found = []
        for place in (place for place in before if place in after):
            both = [[accuracies(attack, each[place]) for each in (before, after)] for attack in attacks]
            spreads = [paired(*pair) for pair in both]
            pairs = Cell(str(max((spread.n for spread in spreads), default=0)))
            found.append(Row(place[0], (pairs, Cell(images_in_words(place)), *map(_cell, spreads))))
        return found

    return Table(
        label="Paired differences in the final evaluation",
        caption=_caption(groups),
        columns=(
            PAIRS,
            Column("images", "", "images"),
            *(Column(name, "points", "paired", f"Accuracy under: {words}" if words else "") for name, words in attacks),
        ),
        bodies=_bodies(groups, rows),
        row_labels=WEIGHTS,
        corner="difference",
    )


def _as_difference(column: Column) -> Column:
    unit = column.unit.replace("%", "points")
    return Column(column.text, unit, "paired", f"Of: {column.text}, {column.unit}")


def _bodies(groups: Sequence[Group], rows_of: Callable[[Group, Group], Sequence[Row]]) -> tuple[Body, ...]:
    bodies = (Body(one.name, one.series, tuple(rows_of(groups[0], one)), f"− {groups[0].name}") for one in groups[1:])
    return tuple(body for body in bodies if body.rows)


def _cell(difference: Spread, places: int = 2) -> Cell:
    """The mean with its sign, and its interval."""
    if not difference.n:
        return Cell(MISSING, detail="no seed in common")
    detail = ", ".join(f"seed {seed}: {signed(value, places)}" for seed, value in difference.by_seed.items())
    return Cell(signed(difference.mean, places), between(difference.interval, places), f"n = {difference.n}; {detail}")


def between(interval: tuple[float, float], places: int = 2) -> str:
    """An interval in brackets, nothing where there is none.

    >>> between((-1.0, 2.5), 1)
    '[−1.0, 2.5]'
    """
    return f"[{decimal(interval[0], places)}, {decimal(interval[1], places)}]" if math.isfinite(interval[0]) else ""


def signed(value: float, places: int = 2) -> str:
    """
    >>> signed(1.5), signed(-1.5), signed(0.001)
    ('+1.50', '−1.50', '0.00')
    """
    text = decimal(value, places)
    return f"+{text}" if value > 0 and float(text) > 0 else text


def _caption(groups: Sequence[Group]) -> str:
    if len(groups) < 2:
        return ""
    sentences = (
        f"Each recipe minus {groups[0].name}, seed by seed: mean over the n seeds that both have, and in brackets its "
        "95 % interval by Student's t with n − 1 degrees of freedom, which takes differences to be normally "
        "distributed. One seed has no interval, and two a very wide one.",
        f"{len(groups) - 1} recipes are compared with one, and no interval is widened for that."
        if len(groups) > 2
        else "",
    )
    return " ".join(sentence for sentence in sentences if sentence)
