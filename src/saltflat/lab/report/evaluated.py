"""Final evaluations, gathered: only what was measured alike, on as many images of one split, is averaged."""

from collections.abc import Mapping, Sequence

from saltflat.lab.report.runs import Attacked
from saltflat.lab.report.statistics import Group, Spread, finite

Place = tuple[str, str, int]  # checkpoint, split, number of images
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
            by_seed = places.setdefault((outcome.checkpoint, outcome.split, outcome.n), {})
            by_seed.setdefault(run.seed, []).extend(outcome.attacks)
    return dict(places)


def under(attack: Attack, by_seed: BySeed) -> dict[int, Attacked]:
    """What that attack left, by seed; of several measurements the last counts."""
    return {seed: one for seed, ones in by_seed.items() for one in ones if (one.name, one.description) == attack}


def accuracies(attack: Attack, by_seed: BySeed) -> Spread:
    """Accuracy under that attack, in percent."""
    return finite({seed: 100 * one.accuracy for seed, one in under(attack, by_seed).items()})
