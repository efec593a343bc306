"""How a landscape was measured, in words: facts for the figures, sentences for the captions."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from saltflat.lab.report.curves import Array
from saltflat.lab.report.landscapes import Gap, Line, Plane
from saltflat.lab.report.notation import decimal

NAMES = {
    "direction": "Direction",
    "normalisation": "normalisation",
    "attack": "attack",
    "batch_norm": "BatchNorm",
    "loss": "loss",
}
ALWAYS = ("direction", "attack", "batch_norm")
UNKNOWN = "not on record"


def footnotes(part: Line | Plane, grid: str) -> list[str]:
    """What stands on a figure: the grid, the images, BatchNorm's mode, the direction and the attack."""
    settings = part.settings
    facts = [
        grid,
        f"n = {part.n} {part.split} images",
        f"BatchNorm: {settings.get('batch_norm', UNKNOWN)}",
        settings.get("direction", f"direction {UNKNOWN}"),
        settings.get("normalisation", ""),
        settings.get("attack", f"attack {UNKNOWN}"),
    ]
    return [fact for fact in facts if fact]


def ends(steps: Array) -> str:
    """
    >>> ends(np.array([-1.0, 0.0, 0.5]))
    'from −1 to 0.5'
    """
    return f"from {steps[0]:g} to {steps[-1]:g}".replace("-", "−")


def settings_in_words(settings: Mapping[str, str], always: Sequence[str] = ALWAYS) -> str:
    """Every setting by name, and those that should `always` be there even if they are not."""
    keys = [key for key in NAMES if key in settings or key in always]
    listed = [(NAMES[key], settings.get(key, UNKNOWN)) for key in keys]
    listed += [(key, value) for key, value in settings.items() if key not in NAMES]
    return "; ".join(f"{name}: {value}" for name, value in listed)


def gaps_in_words(gaps: Iterable[tuple[str, Gap]], most: int = 4) -> str:
    """Where values are missing and why, with the name of whom each gap concerns; empty if none is."""
    places: dict[tuple[str, str], dict[str, None]] = {}
    for name, gap in gaps:
        beta = "" if np.isnan(gap.beta) else f", β = {decimal(gap.beta)}"
        places.setdefault((name, gap.why), {})[f"α = {decimal(gap.alpha)}{beta}"] = None
    said = [f"{name} at {_some(list(points), most)}: {why}" for (name, why), points in places.items()]
    return f"× marks what could not be measured ({_some(said, 2 * most)})." if said else ""


def _some(texts: Sequence[str], most: int) -> str:
    rest = len(texts) - most
    return "; ".join(texts[:most]) + (f"; and {rest} more" if rest > 0 else "")
