"""Final evaluations, gathered: only what was measured alike, on as many images of one split, is averaged."""

from collections.abc import Mapping, Sequence

from saltflat.lab.report.runs import Attacked
from saltflat.lab.report.statistics import Group, Spread, finite

Place = tuple[str, str, int, str]  # checkpoint, split, number of images, and settings that are not the usual
Attack = tuple[str, str]  # its name and its exact description
BySeed = Mapping[int, Sequence[Attacked]]


def attacks_of(groups: Sequence[Group]) -> list[Attack]:
    """Every attack that was made on a finished run, in the order in which it is first met."""
    outcomes = [outcome for group in groups for run in group.finished for outcome in run.outcomes]
    return list(dict.fromkeys((one.name, one.description) for outcome in outcomes for one in outcome.attacks))


def settings_of(groups: Sequence[Group]) -> list[str]:
    """The settings of the evaluations of finished runs, in words, each once."""
    outcomes = [outcome for group in groups for run in group.finished for outcome in run.outcomes if outcome.settings]
    return list(dict.fromkeys("; ".join(f"{key}: {value}" for key, value in one.settings.items()) for one in outcomes))


def evaluated(group: Group) -> dict[Place, BySeed]:
    """What was measured at each place, by seed, over the group's finished runs."""
    places: dict[Place, dict[int, list[Attacked]]] = {}
    for run in group.finished:
        for outcome in run.outcomes:
            place = outcome.checkpoint, outcome.split, outcome.n, _unusual(outcome.settings)
            by_seed = places.setdefault(place, {})
            by_seed.setdefault(run.seed, []).extend(outcome.attacks)
    return dict(places)


def _unusual(settings: Mapping[str, str]) -> str:
    """What may move an accuracy by more than rounding does, where it is not as usual.

    >>> _unusual({"precision": "bf16", "seed": "0", "batch_size": "64"})
    'precision bf16'
    """
    usual = {"precision": "fp32", "seed": "0"}
    return ", ".join(f"{key} {settings[key]}" for key, value in usual.items() if settings.get(key, value) != value)


def images_in_words(place: Place) -> str:
    """Which images were attacked, and how, where that is not as usual.

    >>> images_in_words(("best", "test", 100, "seed 9"))
    '100 test, seed 9'
    """
    _, split, n, unusual = place
    return f"{n} {split}" + (f", {unusual}" if unusual else "")


def under(attack: Attack, by_seed: BySeed) -> dict[int, Attacked]:
    """What that attack left, by seed; of several measurements the last counts."""
    return {seed: one for seed, ones in by_seed.items() for one in ones if (one.name, one.description) == attack}


def accuracies(attack: Attack, by_seed: BySeed) -> Spread:
    """Accuracy under that attack, in percent."""
    return finite({seed: 100 * one.accuracy for seed, one in under(attack, by_seed).items()})
