"""Tables of the study of the paper's claims: of each question, what every arm reached, and what it gains over the arm
that it is held against, seed by seed.
"""

from __future__ import annotations

from collections.abc import Sequence

from saltflat.lab.report.notation import MISSING, decimal
from saltflat.lab.report.statistics import Spread
from saltflat.lab.report.tables import Body, Cell, Column, Row, Table
from saltflat.lab.study.claims_results import (
    Group,
    Pair,
    Quantity,
    Result,
    attacked,
    clean,
    drop,
    flatness,
    gap,
    pairs,
    rise,
    robust,
    robust_train,
)

SEEDS = Column("n", "seeds", "seeds")
NARROW = (1, 2, 3, 5, 6, 8)  # of the columns: clean at last, robust at best and at last, strongest, drop, gap


def columns(of: Result) -> list[tuple[Column, Quantity, int]]:
    """Heading, quantity and decimal places; the attacks are named as this run's plan has them."""
    strongest = of.plan["attacks"][-1]
    pgd = f"pgd-{of.plan['gap']['steps']}"
    return [
        (Column("clean, best", "%", "clean"), clean("best"), 1),
        (Column("clean, last", "%", "clean"), clean("last"), 1),
        (Column(f"{pgd}, best", "%", "robust"), robust("best"), 1),
        (Column(f"{pgd}, last", "%", "robust"), robust("last"), 1),
        (Column(f"{strongest}, best", "%", "strongest"), attacked("best"), 1),
        (Column(f"{strongest}, last", "%", "strongest"), attacked("last"), 1),
        (Column("drop", "points", "drop"), drop, 1),
        (Column(f"{pgd}, training images", "%", "train"), robust_train, 1),
        (Column("gap", "points", "gap"), gap, 1),
        (Column("average case", "nats", "flatness"), flatness, 2),
        (Column("rise", "nats", "rise"), rise, 2),
    ]


def reached_table(groups: Sequence[Group], places: Sequence[int] = range(11)) -> Table:
    """Every arm of these, mean and spread over its seeds: all columns, or those at some places."""
    shown = [columns(groups[0].runs[0])[place] for place in places]

    def body(group: Group) -> Body:
        spreads = [(group.spread(quantity), places) for _, quantity, places in shown]
        n = max(spread.n for spread, _ in spreads)
        return Body(group.arm, None, (Row("", (Cell(str(n)), *(_level(*each) for each in spreads))),))

    return Table(
        label="What every arm reached",
        caption="Mean ± sample standard deviation over seeds.",
        columns=(SEEDS, *(column for column, _, _ in shown)),
        bodies=tuple(map(body, groups)),
        corner="arm",
    )


def differences_table(some: Sequence[Pair]) -> Table:
    """What every arm has more than the one it is held against, with Student's 95 % interval over seeds."""
    shown = columns(some[0].arm.runs[0])

    def body(pair: Pair) -> Body:
        spreads = [(pair.difference(quantity), places) for _, quantity, places in shown]
        n = max(spread.n for spread, _ in spreads)
        name = f"{pair.arm.arm} − {pair.against.arm}"
        return Body(name, None, (Row("", (Cell(str(n)), *(_difference(*each) for each in spreads))),))

    return Table(
        label="Differences",
        caption="Paired over seeds: mean difference, and in brackets Student's 95 % interval.",
        columns=(SEEDS, *(Column(column.text, _points(column.unit), column.term) for column, _, _ in shown)),
        bodies=tuple(map(body, some)),
        corner="arm − the arm it is held against",
    )


def by_question(groups: Sequence[Group]) -> list[tuple[str, list[Group], list[Pair]]]:
    """Questions in the order of their first arms, each with its arms, those they are held against, and their pairs."""
    by_name, found = {group.arm: group for group in groups}, []
    for question in dict.fromkeys(group.question for group in groups):
        own = [group for group in groups if group.question == question]
        against = dict.fromkeys(g.against for g in own if g.against in by_name and by_name[g.against] not in own)
        found.append((question, [*(by_name[name] for name in against), *own], _pairs_of(own, groups)))
    return found


def _pairs_of(own: Sequence[Group], groups: Sequence[Group]) -> list[Pair]:
    return [pair for pair in pairs(groups) if pair.arm in own]


def _points(unit: str) -> str:
    """A difference of percentages is in points."""
    return "points" if unit == "%" else unit


def _level(of: Spread, places: int) -> Cell:
    if not of.n:
        return Cell(MISSING)
    detail = ", ".join(f"seed {seed}: {decimal(value, places)}" for seed, value in of.by_seed.items())
    return Cell(decimal(of.mean, places), f"± {decimal(of.deviation, places)}" if of.n > 1 else "", detail)


def _difference(of: Spread, places: int) -> Cell:
    if not of.n:
        return Cell(MISSING)
    detail = ", ".join(f"seed {seed}: {signed(value, places)}" for seed, value in of.by_seed.items())
    if of.n == 1:
        return Cell(signed(of.mean, places), "", detail)
    interval = f"[{', '.join(signed(end, places) for end in of.interval)}]"
    return Cell(signed(of.mean, places), interval, detail)


def signed(value: float, places: int) -> str:
    """
    >>> signed(1.25, 1), signed(-0.04, 1), signed(-3.0, 0)
    ('+1.2', '0.0', '−3')
    """
    shown = decimal(value, places)
    return f"+{shown}" if round(value, places) > 0 else shown
