"""How numbers are written: with a true minus sign, and a dash where there is none."""

import math

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


def counted(n: int, noun: str) -> str:
    """
    >>> counted(1, "seed"), counted(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{n} {noun}{'' if n == 1 else 's'}"
