"""How a number, a spread and a count are written: a true minus sign, and no line break before a unit."""

import math

from saltflat.lab.report.statistics import Spread

MISSING = "–"
UNBROKEN = "\N{NO-BREAK SPACE}"  # keeps a number, its spread and its unit on one line


def decimal(value: float | None, places: int = 2) -> str:
    """A number with so many places, or a dash.

    >>> decimal(-1.5), decimal(-0.001), decimal(float("nan")), decimal(None)
    ('−1.50', '0.00', '–', '–')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{round(value, places) + 0.0:.{places}f}".replace("-", "−")


def percent(fraction: float) -> str:
    """
    >>> percent(0.25).replace(UNBROKEN, " ")
    '25 %'
    """
    return f"{100 * fraction:.3g}{UNBROKEN}%"


def counted(n: int, noun: str) -> str:
    """
    >>> counted(1, "seed"), counted(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{n} {noun}{'' if n == 1 else 's'}"


def spread_out(spread: Spread, *, signed: bool = False) -> str:
    """Mean ± deviation; the mean alone where one seed stands behind it.

    >>> spread_out(Spread({0: 1.0, 1: 3.0}), signed=True).replace(UNBROKEN, " ")
    '+2.00 ± 1.41'
    """
    mean = decimal(spread.mean)
    plus = "+" if signed and spread.mean != 0 and not mean.startswith("−") else ""
    return f"{plus}{mean}" + (f"{UNBROKEN}±{UNBROKEN}{decimal(spread.deviation)}" if spread.n > 1 else "")
