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


def places_for(value: float, digits: int = 3) -> int:
    """Decimal places that give a number so many digits, at most six places.

    >>> places_for(0.0123), places_for(-4.5), places_for(1234.0), places_for(0.0)
    (4, 2, 0, 3)
    """
    if value == 0 or not math.isfinite(value):
        return digits
    return min(6, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def counted(n: int, noun: str, plural: str = "") -> str:
    """
    >>> counted(1, "seed"), counted(3, "seed"), counted(2, "batch", "batches")
    ('1 seed', '3 seeds', '2 batches')
    """
    return f"{n} {noun if n == 1 else plural or f'{noun}s'}"


def cut(text: str, most: int) -> str:
    """
    >>> cut("a long name", 7), cut("short", 7)
    ('a long…', 'short')
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"
