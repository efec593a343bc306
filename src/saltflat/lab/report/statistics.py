"""Statistics over seeds: runs that differ only in their seed form a group, and groups are compared seed by seed.

Spread is always the sample standard deviation over seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saltflat.lab.report.notation import MISSING, cut
from saltflat.lab.report.runs import Epoch, Run
from saltflat.lab.report.student import two_sided

# Fields of a config that say where or how often a run was made and not by which method: they never split a group.
NOT_THE_METHOD = frozenset({"seed", "device", "threads", "workers", "keep_every", "checkpoint_minutes"})
LONGEST = 200  # signs of a group's name, which stands in sentences and tables


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ only in seed, in the order of their seeds; `series` is their place in the page's colours."""

    name: str
    runs: tuple[Run, ...]
    series: int

    @property
    def last_epoch(self) -> int:
        """The last epoch of the longest run, 0 if nothing was measured."""
        return max(run.reached for run in self.runs)

    @property
    def planned_epochs(self) -> int:
        """How many epochs were asked for, 0 if that is not on record."""
        return self.runs[0].planned

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that came as far as the group's longest: numbers from different epochs are never averaged."""
        return tuple(run for run in self.runs if run.reached == self.last_epoch)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs; of two runs with equal method and seed the first counts."""
    members: dict[tuple[str, frozenset[tuple[str, str]]], dict[int, Run]] = {}
    for run in runs:
        members.setdefault((run.label, frozenset(_method(run).items())), {}).setdefault(run.seed, run)
    groups = [tuple(by_seed[seed] for seed in sorted(by_seed)) for by_seed in members.values()]
    firsts = [own[0] for own in groups]
    return [Group(_name(own[0], firsts), own, series) for series, own in enumerate(groups)]


def _method(run: Run) -> dict[str, str]:
    return {key: value for key, value in run.config.items() if key.rpartition(".")[2] not in NOT_THE_METHOD}


def _name(run: Run, others: Sequence[Run]) -> str:
    """The recipe's name, and where several groups share it, the fields in which they differ: those first that all have,
    since what a run of another version does not know may be no difference.
    """
    methods = [_method(other) for other in others if other.label == run.label]
    fields = sorted(differing(methods), key=lambda field: any(field not in method for method in methods))
    shown = ", ".join(f"{key} {run.config.get(key, MISSING)}" for key in fields[:3])
    return cut(f"{run.label} ({shown}{', …' if len(fields) > 3 else ''})" if fields else run.label, LONGEST)


def differing(tables: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys whose values are not the same in all tables, in the order of first appearance."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if len({table.get(key) for table in tables}) > 1]


def runs_of(groups: Sequence[Group]) -> list[Run]:
    """All runs, in the order of their groups and seeds."""
    return [run for group in groups for run in group.runs]


def measured(groups: Sequence[Group]) -> list[Group]:
    """The groups that have an epoch on record."""
    return [group for group in groups if group.last_epoch]


@dataclass(frozen=True)
class Spread:
    """Values by seed, with their mean and sample standard deviation; nan where there is none."""

    by_seed: Mapping[int, float]

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(list(self.by_seed.values()))) if self.by_seed else math.nan

    @property
    def deviation(self) -> float:
        """Sample standard deviation over seeds."""
        return float(np.std(list(self.by_seed.values()), ddof=1)) if self.n > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean by Student's t, of values that are draws from a normal law; nan for one value.

        >>> [round(end, 3) for end in Spread({0: 1.0, 1: 2.0, 2: 3.0}).interval]
        [-0.484, 4.484]
        """
        if self.n < 2:
            return math.nan, math.nan
        half = two_sided(self.n - 1) * self.deviation / math.sqrt(self.n)
        return self.mean - half, self.mean + half


def finite(by_seed: Mapping[int, float | None]) -> Spread:
    """The spread of those values that are there and finite."""
    return Spread({seed: value for seed, value in by_seed.items() if value is not None and math.isfinite(value)})


def over_seeds(runs: Sequence[Run], quantity: Callable[[Run], float | None]) -> Spread:
    """A quantity of every run that has it."""
    return finite({run.seed: quantity(run) for run in runs})


def paired(first: Spread, second: Spread) -> Spread:
    """second − first at the seeds that both have."""
    return Spread({s: second.by_seed[s] - first.by_seed[s] for s in first.by_seed if s in second.by_seed})


def at(pick: Callable[[Run], Epoch | None], quantity: Callable[[Epoch], float]) -> Callable[[Run], float | None]:
    """A quantity of an epoch as a quantity of a run."""
    return lambda run: quantity(epoch) if (epoch := pick(run)) else None


def last(run: Run) -> Epoch | None:
    """The last epoch, to be handed to `at`."""
    return run.last


def best(run: Run) -> Epoch | None:
    """The best epoch, to be handed to `at`."""
    return run.best


def drop(run: Run) -> float | None:
    """Percentage points of robust test accuracy lost between the best epoch and the last."""
    return run.best.robust - run.last.robust if run.best and run.last else None
